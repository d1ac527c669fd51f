//! Pidfds: of processes of the tree, of zombies, and of processes that are gone.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::Procs;
use super::capture::{Capture, Holder};
use super::model::{Kind, Object};
use crate::birth::spawn;
use crate::error::{During, Result};
use crate::ids::{HostPid, InnerPid};
use crate::remote::Batch;
use crate::sys::fd::pidfd_open;
use crate::sys::process::pidfd_signal;

/// Flags of pidfd_open(2).
const FLAGS: i32 = libc::O_NONBLOCK | libc::O_EXCL;

/// Reads whose handle a pidfd is. `host` is as `fdinfo` tells it.
pub(crate) fn capture(capture: &Capture<'_>, holder: &Holder<'_>, host: HostPid) -> Result<Kind> {
    if let Some(pid) = capture.member(host) {
        return Ok(Kind::Process { pid });
    }
    if host.0 <= 0 {
        let inode = holder.raw.file.ino;
        return Ok(Kind::Ended { inode });
    }
    match host.inner() {
        Ok(pid) if host.is_zombie() => Ok(Kind::Zombie { pid }),
        _ => Err(holder.refuse("a pidfd of a process that is not in the tree")),
    }
}

/// A new handle of a process of the tree.
pub(crate) fn open(procs: &Procs<'_>, pid: InnerPid, flags: i32) -> io::Result<OwnedFd> {
    let remote = procs.get(&pid).ok_or(io::ErrorKind::NotFound)?;
    pidfd_open(remote.host(), flags & FLAGS)
}

/// A new handle of a zombie, whose number only those inside know.
pub(crate) fn open_zombie(
    procs: &mut Procs<'_>,
    pid: InnerPid,
    object: &Object,
) -> io::Result<OwnedFd> {
    let remote = procs
        .get_mut(&object.home.0)
        .ok_or(io::ErrorKind::NotFound)?;
    let mut batch = Batch::new();
    let flags = object.flags & FLAGS;
    let call = batch.call(libc::SYS_pidfd_open, &[pid.0.into(), flags.into()]);
    let fd = remote.run(&batch)?.result(call)? as i32;
    let taken = remote.take_fd(fd);
    remote.close(&[fd])?;
    taken
}

/// Stand-ins for processes that are gone, by the inode numbers of the handles that there were: dead from the beginning, and
/// gone for good when all handles are made.
#[derive(Default)]
pub(crate) struct Departed(BTreeMap<u64, Corpse>);

/// A dead child that was not waited for yet.
struct Corpse {
    parent: InnerPid,
    pid: InnerPid,
    host: HostPid,
}

impl Departed {
    /// A new handle of one.
    pub(crate) fn open(
        &mut self,
        procs: &mut Procs<'_>,
        inode: u64,
        object: &Object,
    ) -> io::Result<OwnedFd> {
        let corpse = match self.0.entry(inode) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(Corpse::make(procs, object.home.0)?),
        };
        pidfd_open(corpse.host, object.flags & FLAGS)
    }

    /// Has them waited for.
    pub(crate) fn bury(self, procs: &mut Procs<'_>) -> Result<()> {
        for corpse in self.0.into_values() {
            if let Some(parent) = procs.get_mut(&corpse.parent) {
                spawn::reap(parent, &[corpse.pid]).during(corpse.parent, "reaping a stand-in")?;
            }
        }
        Ok(())
    }
}

impl Corpse {
    /// A child that never runs, and of whose death nobody is told.
    fn make(procs: &mut Procs<'_>, parent: InnerPid) -> io::Result<Self> {
        let remote = procs.get_mut(&parent).ok_or(io::ErrorKind::NotFound)?;
        let host = spawn::clone_through(remote, libc::CLONE_VM)?;
        let pid = host.inner()?;
        let handle = pidfd_open(host, 0)?;
        pidfd_signal(handle.as_fd(), libc::SIGKILL)?;
        spawn::await_end(host)?;
        Ok(Self { parent, pid, host })
    }
}
