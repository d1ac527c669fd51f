//! Processes of the engine's own that work in a sandbox: init's children, made by a process that never knows of them.
//!
//! Such a process is made by a helper that shares the original's memory (`CLONE_VM | CLONE_VFORK`) and ends at once, so that
//! it becomes a child of init, which waits for it. It has no descriptors, a session of its own, and all signals blocked; nobody
//! traces it. Inside it is seen by `ps` for as long as it lives, and may be killed. It has one of the highest numbers, and others get the
//! numbers that they would have got without it.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::birth::spawn;
use crate::env::Environment;
use crate::ids::{HostPid, InnerPid};
use crate::remote::{Batch, Remote, block_signals};
use crate::stop::await_interruption;
use crate::sys::process;
use crate::sys::ptrace;

/// How long one may take to end: its page tables are taken down, or its work is done.
const END: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};
/// How long init may take to wait for a dead one. A process that wants its orphans for itself
/// (`PR_SET_CHILD_SUBREAPER`) gets them, and may never wait for them.
const BURIAL: Duration = Duration::from_millis(20);
/// Between two looks at whether it has.
const PAUSE: Duration = Duration::from_micros(100);

/// The processes of an engine's own, which are among those of the sandbox and do not belong to it.
#[derive(Clone, Debug, Default)]
pub struct Orphans(Arc<Mutex<HashSet<HostPid>>>);

impl Orphans {
    /// Whether a process of the sandbox is one of these.
    pub fn contains(&self, process: HostPid) -> bool {
        self.0.lock().contains(&process)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.lock().len()
    }
}

/// One of them. Ends when dropped, which waits until it is gone.
#[derive(Debug)]
pub(crate) struct Orphan {
    all: Orphans,
    host: HostPid,
    pidfd: OwnedFd,
    /// It has not begun yet.
    waits: bool,
}

/// What an orphan is for.
pub(crate) struct Purpose<'a> {
    /// Flags of `clone(2)`: what it shares with the original.
    pub(crate) share: i32,
    /// What it does, before it ends. It does it with the rights of the original.
    pub(crate) calls: &'a Batch,
    /// Where the calls are laid out, in its memory; in its area if nowhere is told.
    pub(crate) place: Option<u64>,
}

impl Orphan {
    /// Makes one from a stopped process. It waits to be [let go](Self::begin) by the calling thread, or for that thread's end.
    ///
    /// # Errors
    /// No process can be made in the sandbox, or the original died.
    pub(crate) fn make(
        original: &mut Remote,
        env: &dyn Environment,
        all: &Orphans,
        purpose: &Purpose<'_>,
    ) -> io::Result<Self> {
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES;
        let host = spawn::clone(original, flags)?;
        // From here on the original waits in the kernel until its helper has ended.
        ptrace::resume(original.host())?;
        let made = by_helper(host, original.area_address(), (env, all), purpose);
        if made.is_err() {
            let killed = process::pidfd_open(host);
            let _ = killed.and_then(|p| process::pidfd_signal(p.as_fd(), libc::SIGKILL));
            let _ = spawn::await_end(host);
        }
        original.finish(original.host())?;
        let (helper, orphan) = made?;
        spawn::reap(original, &[helper])?;
        set_next(env, helper);
        Ok(orphan)
    }

    fn of(host: HostPid, all: &Orphans) -> io::Result<Self> {
        let orphan = Self {
            all: all.clone(),
            host,
            pidfd: process::pidfd_open(host)?,
            waits: true,
        };
        all.0.lock().insert(host);
        Ok(orphan)
    }

    /// Its number.
    #[cfg(test)]
    pub(crate) fn host(&self) -> HostPid {
        self.host
    }

    /// Lets it do its work.
    pub(crate) fn begin(&mut self) {
        // One that was killed needs no letting go.
        if std::mem::take(&mut self.waits)
            && let Err(error) = ptrace::detach(self.host)
        {
            tracing::debug!(%error, "letting a process of the engine's begin");
        }
    }

    /// Waits until it has ended by itself.
    pub(crate) fn await_end(&self) {
        let mut end = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let _ = poll(&mut end, Some(&END));
    }
}

impl Drop for Orphan {
    fn drop(&mut self) {
        let _ = process::pidfd_signal(self.pidfd.as_fd(), libc::SIGKILL);
        self.await_end();
        self.all.0.lock().remove(&self.host);
        // Until init has waited for it, it has its number.
        let until = Instant::now() + BURIAL;
        while process::pidfd_signal(self.pidfd.as_fd(), 0).is_ok() && Instant::now() < until {
            std::thread::sleep(PAUSE);
        }
    }
}

/// A number that no program's process has, unless all were given already.
fn highest(taken: usize) -> InnerPid {
    static MOST: OnceLock<i32> = OnceLock::new();
    let most = MOST.get_or_init(|| {
        let told = std::fs::read_to_string("/proc/sys/kernel/pid_max").ok();
        told.and_then(|text| text.trim().parse().ok())
            .unwrap_or(1 << 15)
    });
    InnerPid(most - 1 - taken as i32)
}

fn set_next(env: &dyn Environment, number: InnerPid) {
    if let Err(error) = env.set_next_pid(number) {
        tracing::debug!(%error, "the next process gets another number");
    }
}

/// Makes the helper make the orphan, and end. Returns the helper's number inside.
fn by_helper(
    host: HostPid,
    area: Option<u64>,
    (env, all): (&dyn Environment, &Orphans),
    purpose: &Purpose<'_>,
) -> io::Result<(InnerPid, Orphan)> {
    await_interruption(host)?;
    block_signals(host)?;
    let pid = host.inner()?;
    let mut helper = Remote::new(pid, host, area)?;
    // A table of its own, with nothing in it: what the orphan held open would stay open.
    let mut close = Batch::new();
    let unshare = libc::CLOSE_RANGE_UNSHARE;
    let args = [0.into(), u32::MAX.into(), unshare.into()];
    let closed = close.call(libc::SYS_close_range, &args);
    helper.run(&close)?.result(closed)?;
    set_next(env, highest(all.count()));
    let born = spawn::clone_through(&mut helper, purpose.share)?;
    let orphan = Orphan::of(born, all)?;
    let mut remote = Remote::new(pid, born, area)?;
    remote.aim(born, purpose.calls, purpose.place)?;
    ptrace::set_signal_mask(born, u64::MAX)?;
    spawn::end_thread(&mut helper, host)?;
    Ok((pid, orphan))
}
