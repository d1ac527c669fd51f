//! A copy-on-write snapshot of a stopped process' memory: a process of its own that only waits.
//!
//! Copying page tables takes a twentieth of the time of copying pages, so of much memory a snapshot is taken while the
//! process stands still, and the pages are read from it while the process runs on.
//!
//! The process is made by a helper that shares the original's memory (`CLONE_VM | CLONE_VFORK`) and ends at once, so that
//! the snapshot becomes a child of init, which waits for it, and the original never has a child that it does not know. It has no
//! descriptors, a session of its own, all signals blocked, and waits in `pause(2)`; nobody traces it. Inside it is seen by `ps`
//! for as long as it lives. Whoever kills it there makes the checkpoint fail, not wrong.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::birth::spawn;
use crate::ids::{HostPid, InnerPid};
use crate::remote::{Batch, Remote, block_signals};
use crate::stop::await_interruption;
use crate::sys::process;
use crate::sys::ptrace;

/// How long a killed snapshot may take to end: its page tables are taken down.
const END: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};
/// How long init may take to wait for a dead one. A process that wants its orphans for itself
/// (`PR_SET_CHILD_SUBREAPER`) gets the snapshot, and may never wait for it.
const BURIAL: Duration = Duration::from_millis(20);
/// Between two looks at whether it has.
const PAUSE: Duration = Duration::from_micros(100);

/// The processes of an engine's snapshots, which are among those of the sandbox and do not belong to it.
#[derive(Clone, Debug, Default)]
pub struct Snapshots(Arc<Mutex<HashSet<HostPid>>>);

impl Snapshots {
    /// Whether a process of the sandbox is a snapshot.
    pub fn contains(&self, process: HostPid) -> bool {
        self.0.lock().contains(&process)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.lock().len()
    }
}

/// The memory of a process as it was. Ends with its process when dropped, which waits until that is gone.
#[derive(Debug)]
pub(crate) struct Snapshot {
    all: Snapshots,
    host: HostPid,
    pidfd: OwnedFd,
    /// `/proc/PID/mem`. Unlike `process_vm_readv(2)`, which pins pages and must not pin shared ones, reading it does
    /// not make copies of the pages in the snapshot.
    memory: File,
}

impl Snapshot {
    /// Takes a snapshot of a stopped process, but of the ranges that it keeps from its children (`MADV_DONTFORK`,
    /// `MADV_WIPEONFORK`).
    ///
    /// # Errors
    /// No process can be made in the sandbox, or the original died.
    pub(crate) fn take(original: &mut Remote, all: &Snapshots) -> io::Result<Self> {
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES;
        let host = spawn::clone(original, flags)?;
        // From here on the original waits in the kernel until its helper has ended.
        ptrace::resume(original.host())?;
        let taken = take_by(host, original.area_address(), all);
        if taken.is_err() {
            let killed = process::pidfd_open(host);
            let _ = killed.and_then(|p| process::pidfd_signal(p.as_fd(), libc::SIGKILL));
            let _ = spawn::await_end(host);
        }
        original.finish(original.host())?;
        let (helper, snapshot) = taken?;
        spawn::reap(original, &[helper])?;
        Ok(snapshot)
    }

    /// Takes up a process that was made to be one.
    fn of(host: HostPid, all: &Snapshots) -> io::Result<Self> {
        let snapshot = Self {
            all: all.clone(),
            host,
            pidfd: process::pidfd_open(host)?,
            memory: File::open(format!("/proc/{host}/mem"))?,
        };
        all.0.lock().insert(host);
        Ok(snapshot)
    }

    /// The snapshot's process.
    pub(crate) fn host(&self) -> HostPid {
        self.host
    }

    /// To read the memory by (at the offset of the address).
    pub(crate) fn memory(&self) -> &File {
        &self.memory
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        let _ = process::pidfd_signal(self.pidfd.as_fd(), libc::SIGKILL);
        let mut end = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let _ = poll(&mut end, Some(&END));
        self.all.0.lock().remove(&self.host);
        // Until init has waited for it, it has its number.
        let until = Instant::now() + BURIAL;
        while process::pidfd_signal(self.pidfd.as_fd(), 0).is_ok() && Instant::now() < until {
            std::thread::sleep(PAUSE);
        }
    }
}

/// Makes the helper make the snapshot, and end. Returns the helper's number inside.
fn take_by(host: HostPid, area: Option<u64>, all: &Snapshots) -> io::Result<(InnerPid, Snapshot)> {
    await_interruption(host)?;
    block_signals(host)?;
    let pid = host.inner()?;
    let mut helper = Remote::new(pid, host, area)?;
    // A table of its own, with nothing in it: what the snapshot held open would stay open.
    let mut close = Batch::new();
    let unshare = libc::CLOSE_RANGE_UNSHARE;
    let args = [0.into(), u32::MAX.into(), unshare.into()];
    let closed = close.call(libc::SYS_close_range, &args);
    helper.run(&close)?.result(closed)?;
    let copy = spawn::clone_through(&mut helper, 0)?;
    let snapshot = Snapshot::of(copy, all)?;
    wait_forever(pid, copy, area)?;
    spawn::end_thread(&mut helper, host)?;
    Ok((pid, snapshot))
}

/// Lets the new-born copy go, into a wait that only a kill ends.
fn wait_forever(pid: InnerPid, host: HostPid, area: Option<u64>) -> io::Result<()> {
    let mut wait = Batch::new();
    // Neither a signal to the session or group of the original, nor the end of its terminal is meant for it.
    wait.call(libc::SYS_setsid, &[]);
    wait.call(libc::SYS_pause, &[]);
    wait.call(libc::SYS_exit_group, &[0.into()]);
    Remote::new(pid, host, area)?.aim(host, &wait)?;
    ptrace::set_signal_mask(host, u64::MAX)?;
    ptrace::detach(host)
}
