//! Process numbers: a process has one number inside its sandbox and another outside.

use std::fmt;
use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

/// A process or thread number as the supervisor's own pid namespace counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPid(pub i32);

/// A process or thread number as the sandbox counts; this is the one a checkpoint records.
#[derive(
    Default, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct InnerPid(pub i32);

impl HostPid {
    /// The caller's process.
    pub fn own() -> Self {
        Self(std::process::id().cast_signed())
    }

    /// Whether it has ended and was not waited for yet.
    pub fn is_zombie(self) -> bool {
        let status = fs::read(format!("/proc/{self}/status")).unwrap_or_default();
        let mut lines = status.split(|&b| b == b'\n');
        lines.any(|line| line.starts_with(b"State:\tZ"))
    }

    /// The number in the innermost pid namespace that the process or thread is in.
    ///
    /// # Errors
    /// It is gone.
    pub fn inner(self) -> io::Result<InnerPid> {
        // The name in it may hold any bytes but newlines.
        let status = fs::read(format!("/proc/{self}/status"))?;
        String::from_utf8_lossy(&status)
            .lines()
            .find_map(|l| {
                l.strip_prefix("NSpid:")?
                    .split_ascii_whitespace()
                    .last()?
                    .parse()
                    .ok()
            })
            .map(InnerPid)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl fmt::Display for HostPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for InnerPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
