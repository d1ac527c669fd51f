//! One sandbox: what its user can do with it.

use std::sync::Arc;

use crate::error::Result;
use crate::host::unimplemented_skeleton;
use crate::report::*;
use crate::session::Session;
use crate::spec::CommandSpec;

/// A sandbox. All methods may be called from any thread; operations that change the whole state exclude each other.
pub struct Sandbox {}

/// The output and status of a command that [`Sandbox::run`] ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunOutput {
    /// 0-255, 128+n for signal n.
    pub status: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Sandbox {
    /// Its name.
    pub fn name(&self) -> &str {
        unimplemented_skeleton()
    }

    /// What it is and how it is doing.
    pub fn info(&self) -> SandboxInfo {
        unimplemented_skeleton()
    }

    /// How often it was rolled back.
    pub fn epoch(&self) -> u64 {
        unimplemented_skeleton()
    }

    /// Starts a command as a new session.
    pub fn spawn(&self, _command: CommandSpec) -> Result<Arc<Session>> {
        unimplemented_skeleton()
    }

    /// Runs a command without input to its end.
    pub fn run(&self, _argv: &[&str]) -> Result<RunOutput> {
        unimplemented_skeleton()
    }

    /// A session by number; also one that has ended, until the sandbox forgets it (the last 256 are kept).
    pub fn session(&self, _id: SessionId) -> Result<Arc<Session>> {
        unimplemented_skeleton()
    }

    /// All sessions, also ended ones that are still remembered.
    pub fn sessions(&self) -> Vec<SessionInfo> {
        unimplemented_skeleton()
    }

    /// Checkpoints files, processes and sessions together.
    pub fn checkpoint(&self, _message: Option<String>) -> Result<CheckpointReport> {
        unimplemented_skeleton()
    }

    /// Gives the sandbox the state of a checkpoint of its tree back.
    pub fn rollback(&self, _id: CheckpointId) -> Result<RollbackReport> {
        unimplemented_skeleton()
    }

    /// What differs between two checkpoints.
    pub fn diff(&self, _a: CheckpointId, _b: CheckpointId) -> Result<Difference> {
        unimplemented_skeleton()
    }

    /// Forgets a checkpoint. Its children become its parent's.
    pub fn delete(&self, _id: CheckpointId) -> Result<()> {
        unimplemented_skeleton()
    }

    /// The tree of checkpoints.
    pub fn tree(&self) -> Tree {
        unimplemented_skeleton()
    }

    /// Ends all processes; the checkpoints stay, and a rollback makes it run again.
    pub fn stop(&self) -> Result<()> {
        unimplemented_skeleton()
    }
}
