//! What the engine needs to know of the sandbox around the processes.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::hold::Deaths;
use crate::ids::{HostPid, InnerPid};
use crate::mem::Holding;

/// Names a pipe or terminal end that lives outside the tree: the standard streams of a session,
/// whose other end the service holds. The number is the caller's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ExternalId(pub u64);

/// The sandbox around a process tree, as the engine sees it.
///
/// Every descriptor that a method returns is close-on-exec and belongs to the caller.
pub trait Environment: Sync {
    /// The cgroup v2 directory that holds every process of the tree, and no other.
    fn cgroup(&self) -> &Path;
    /// PID 1 of the sandbox; no part of the tree.
    fn init_pid(&self) -> HostPid;
    /// The root directory of the sandbox (an `O_PATH` descriptor in its mount namespace).
    fn root(&self) -> BorrowedFd<'_>;
    /// Has files opened by somebody with the permissions of the sandbox's root, and no others, if that is of use.
    fn as_root(&self, open: &mut dyn FnMut()) {
        open();
    }
    /// `st_dev` of the sandbox's versioned filesystem.
    fn fs_device(&self) -> u64;
    /// How many seccomp filters every process of the sandbox has from its birth on.
    fn seccomp_filters(&self) -> usize;
    /// The capabilities that processes of the sandbox can have in their bounding sets when they run: a bit for each.
    fn bounding_set(&self) -> u64 {
        u64::MAX
    }
    /// Opens an inode of the versioned filesystem by its number, also one that has no name any
    /// more. `flags` are `open(2)` flags.
    fn open_inode(&self, ino: u64, flags: i32) -> io::Result<OwnedFd>;
    /// If what `/proc/PID/maps` shows with these numbers of device and inode is a file of the base that the versioned filesystem
    /// is made over, mapped from the base itself: its path there. Such a file has the same inode number in both.
    fn path_in_base(&self, device: u64, ino: u64) -> Option<Vec<u8>> {
        let _ = (device, ino);
        None
    }
    /// Opens the base's own file with this number, which is at `path`, for reading, whatever the versioned filesystem shows of it.
    fn open_base(&self, ino: u64, path: &[u8]) -> io::Result<OwnedFd> {
        let _ = (ino, path);
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Whether the versioned filesystem shows an inode just as the base has it: content, attributes and path.
    fn shows_base(&self, ino: u64) -> bool {
        let _ = ino;
        false
    }
    /// The pipe (by inode number, as `st_ino` tells) whose other end is outside the tree.
    fn external_pipe(&self, ino: u64) -> Option<ExternalId>;
    /// The inside end of an external pipe, made anew if the old one is gone.
    /// `write` says which end the tree holds.
    fn open_external(&self, id: ExternalId, write: bool) -> io::Result<OwnedFd>;
    /// Makes the next process or thread born in the sandbox get this number
    /// (`/proc/sys/kernel/ns_last_pid`, written by init).
    fn set_next_pid(&self, pid: InnerPid) -> io::Result<()>;
    /// Makes init give birth to a process with this number. It waits in `pause(2)`, has the sandbox's seccomp filter,
    /// bounding set and `no_new_privs`, holds no descriptor, and is in the tree's cgroup.
    fn birth(&self, pid: InnerPid) -> io::Result<HostPid>;
    /// Where a template holds the memory of the state that is given back, if there is one.
    fn template(&self) -> Option<&Holding> {
        None
    }
    /// Makes the template give birth to a process with this number, as [`Environment::birth`] makes init; but it has
    /// all that the template has mapped, may hold descriptors, and is in no session of the sandbox. `spare` is another
    /// number that is free.
    ///
    /// # Errors
    /// There is no template (any more), or no more processes can be made.
    fn birth_from_template(&self, pid: InnerPid, spare: InnerPid) -> io::Result<HostPid> {
        let _ = (pid, spare);
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Called when all processes of a state that is given back are there, just before they run on. `deaths` tells whether
    /// init has reported those of the state that was given up.
    fn before_resume(&self, deaths: Deaths) -> io::Result<()>;
    /// Enforces the limit of how many processes there may be, or suspends it: while a state is given back there are more of them now and
    /// then than it has. Nothing of the tree runs meanwhile.
    fn limit_processes(&self, whether: bool) -> io::Result<()> {
        let _ = whether;
        Ok(())
    }
    /// How many bytes of memory may still be charged to the processes; `None` if there is no limit.
    fn memory_left(&self) -> Option<u64> {
        None
    }
    /// A descriptor of one of the namespaces of the sandbox (`/proc/PID/ns/…` of init).
    fn namespace(&self, kind: Namespace) -> io::Result<OwnedFd>;
}

/// The namespaces that the engine enters to make an object for a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// Network: sockets are made in it.
    Net,
    /// Mounts.
    Mount,
    /// System V semaphores, message queues and shared memory.
    Ipc,
}
