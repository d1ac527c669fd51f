//! Commands and shells: their streams, their logs, their ends.

use std::time::Duration;

use crate::error::Result;
use crate::host::unimplemented_skeleton;
use crate::report::{SessionEvent, SessionInfo};
use crate::spec::WindowSize;

/// A command or shell in a sandbox. Its output is kept in a log (in a file of the state directory, at most 64 MiB of
/// the newest bytes), from which any number of readers stream.
pub struct Session {}

impl Session {
    /// What it is and how it is doing.
    pub fn info(&self) -> SessionInfo {
        unimplemented_skeleton()
    }

    /// Writes to its standard input or terminal. Waits while the command does not read.
    pub fn write(&self, _bytes: &[u8]) -> Result<()> {
        unimplemented_skeleton()
    }

    /// Ends its standard input (on a terminal: types the end-of-file character).
    pub fn close_stdin(&self) -> Result<()> {
        unimplemented_skeleton()
    }

    /// Sets the terminal's size.
    pub fn resize(&self, _size: WindowSize) -> Result<()> {
        unimplemented_skeleton()
    }

    /// Sends a signal to the command's process group.
    pub fn signal(&self, _signal: i32) -> Result<()> {
        unimplemented_skeleton()
    }

    /// Kills the command and all its descendants.
    pub fn kill(&self) -> Result<()> {
        unimplemented_skeleton()
    }

    /// The session's events from output byte `offset` on (0: from the beginning of what the log still has).
    pub fn events(&self, _offset: u64) -> Events {
        unimplemented_skeleton()
    }
}

/// Reads a session's events, one after another.
pub struct Events {}

impl Events {
    /// The next event; `None` when `timeout` passed without one, or after `Exit` or `RolledBack`.
    pub fn next(&mut self, _timeout: Option<Duration>) -> Option<SessionEvent> {
        unimplemented_skeleton()
    }
}
