//! All sandboxes of one state directory.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Result;
use crate::report::{CheckpointId, Feature};
use crate::sandbox::Sandbox;
use crate::spec::SandboxSpec;

/// Where a [`Host`] keeps its state.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Holds everything that belongs to the sandboxes. Made if it is not there; hidden inside them.
    pub state_dir: PathBuf,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::from("/var/lib/deltabox"),
        }
    }
}

/// Hosts sandboxes. One process at a time per state directory (a lock file sees to it).
pub struct Host {}

impl Host {
    /// Opens a state directory; ends and removes what a host that was killed left behind.
    pub fn open(_config: HostConfig) -> Result<Self> {
        unimplemented_skeleton()
    }

    /// What [`Host::open`] cleaned up, one sentence each.
    pub fn cleaned_up(&self) -> &[String] {
        unimplemented_skeleton()
    }

    /// Creates a sandbox and starts it.
    pub fn create(&self, _spec: SandboxSpec) -> Result<Arc<Sandbox>> {
        unimplemented_skeleton()
    }

    /// The sandbox of this name.
    pub fn get(&self, _name: &str) -> Result<Arc<Sandbox>> {
        unimplemented_skeleton()
    }

    /// All sandboxes, by name.
    pub fn list(&self) -> Vec<Arc<Sandbox>> {
        unimplemented_skeleton()
    }

    /// Ends a sandbox and removes all that belongs to it. Forks of it are not touched.
    pub fn remove(&self, _name: &str) -> Result<()> {
        unimplemented_skeleton()
    }

    /// Makes `n` new sandboxes with the state of `source` at `id`, or as it is now (which makes a checkpoint of it).
    /// They are called `names`, or names made from the source's if that is empty.
    pub fn fork(
        &self,
        _source: &str,
        _id: Option<CheckpointId>,
        _n: usize,
        _names: &[String],
    ) -> Result<Vec<Arc<Sandbox>>> {
        unimplemented_skeleton()
    }

    /// Ends all sandboxes.
    pub fn shutdown(&self) {
        unimplemented_skeleton()
    }

    /// Says which kernel features are there and what to do about those that are not. Needs no state directory.
    pub fn doctor() -> Vec<Feature> {
        unimplemented_skeleton()
    }
}

pub(crate) fn unimplemented_skeleton() -> ! {
    unreachable!("written next")
}
