//! The one primitive by which the engine acts inside a process: a *remote batch* of system calls.

mod batch;

pub use batch::{Arg, Batch, CAPACITY, CallId, DataRef, Outcome};

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use crate::ids::{HostPid, InnerPid};

/// A stopped process of the sandbox that can be made to run batches.
pub struct Remote {
    pid: InnerPid,
    host: HostPid,
    pidfd: OwnedFd,
}

impl Remote {
    /// The process, as the sandbox counts.
    pub fn pid(&self) -> InnerPid {
        self.pid
    }

    /// The process, as the supervisor counts.
    pub fn host(&self) -> HostPid {
        self.host
    }

    /// Runs the calls in the process, one after another, in one stop.
    ///
    /// # Errors
    /// The outer error says that the process died or could not be driven. That a call failed is told by
    /// [`Outcome::result`].
    pub fn run(&mut self, _batch: &Batch) -> io::Result<Outcome> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// A duplicate of a descriptor of the process (`pidfd_getfd(2)`).
    pub fn take_fd(&self, _fd: i32) -> io::Result<OwnedFd> {
        let _ = &self.pidfd;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Gives the process duplicates of these descriptors (`SCM_RIGHTS`); they are close-on-exec
    /// there and have the returned numbers.
    pub fn give_fds(&mut self, _fds: &[BorrowedFd<'_>]) -> io::Result<Vec<i32>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Reads memory of the process (`process_vm_readv(2)`).
    pub fn read(&self, _address: u64, _into: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Writes memory of the process, whatever its protection (`/proc/PID/mem`).
    pub fn write(&self, _address: u64, _bytes: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The range of addresses that the engine itself occupies in the process; no part of a
    /// checkpoint, and never to be unmapped.
    pub fn area(&self) -> std::ops::Range<u64> {
        0..0
    }
}
