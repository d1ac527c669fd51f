//! The host of the sandboxes that are measured.

use std::ops::Deref;

use anyhow::Result;
use deltabox::{Host, HostConfig};
use tempfile::TempDir;

use crate::Options;

/// A host in a directory of its own; ends all its sandboxes when it goes.
pub(crate) struct Stage {
    host: Host,
    _dir: TempDir,
}

impl Stage {
    pub(crate) fn open(options: &Options) -> Result<Self> {
        Self::with(options, 0, false, 0)
    }

    /// The same, with a host that keeps up to `warm` blank sandboxes ready, in which processes of forks may be born early, with so many
    /// pages of their own.
    pub(crate) fn with(
        options: &Options,
        warm: usize,
        early_births: bool,
        early_pages: u64,
    ) -> Result<Self> {
        let dir = options.temporary_dir()?;
        let host = Host::open(HostConfig {
            state_dir: dir.path().to_owned(),
            warm,
            early_births,
            early_pages,
            // What is measured has the machine for itself.
            early_pressure: 101.0,
            ..HostConfig::default()
        })?;
        Ok(Self { host, _dir: dir })
    }
}

impl Deref for Stage {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.host.shutdown();
    }
}
