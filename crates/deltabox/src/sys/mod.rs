//! The system calls that rustix does not offer, behind safe functions.

pub(crate) mod probe;
mod pty;
mod start;

pub(crate) use pty::{open_peer, set_window_size, terminal_number, unlock_terminal};
pub(crate) use start::start_program;

/// Has the calling thread act on files as a user and group of this number, to its end.
pub(crate) fn act_as(id: u32) {
    // SAFETY: takes numbers. For a process with `CAP_SETUID` and `CAP_SETGID` neither can fail.
    unsafe {
        libc::setfsgid(id);
        libc::setfsuid(id);
    }
}
