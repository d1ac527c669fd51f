//! The system calls that rustix does not offer, behind safe functions.

pub(crate) mod probe;
mod pty;
mod start;

pub(crate) use pty::{open_peer, set_window_size, terminal_number, unlock_terminal};
pub(crate) use start::start_program;
