//! Signals that wait in a thread's or a process' queue.

use std::io;

use serde::{Deserialize, Serialize};

use crate::disk::stored;
use crate::ids::{HostPid, InnerPid};
use crate::remote::{Batch, Remote};
use crate::sys::ptrace::{self, RawSiginfo};

/// `sizeof(sigset_t)` of the kernel.
const SIGSET: u64 = 8;

/// Where a `siginfo_t` has the code that tells what it is of,
const CODE: usize = 8;
/// and the number of a timer.
const TIMER: usize = 16;

/// Queued signals, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Queue(#[serde(with = "stored::signals")] Vec<RawSiginfo>);

/// Which queue: a thread's own or the one of its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    Thread,
    Process,
}

impl Queue {
    /// Reads a queue and leaves it as it is.
    pub(crate) fn capture(tid: HostPid, scope: Scope) -> io::Result<Self> {
        ptrace::queued_signals(tid, scope == Scope::Process).map(Self)
    }

    /// Adds signals behind the others.
    pub(crate) fn extend<'a>(&mut self, signals: impl Iterator<Item = &'a RawSiginfo>) {
        self.0.extend(signals);
    }

    fn signal_numbers(&self) -> impl Iterator<Item = i32> {
        self.0
            .iter()
            .map(|info| i32::from_le_bytes([info[0], info[1], info[2], info[3]]))
            .filter(|signal| (1..=64).contains(signal))
    }

    /// The signals in it: bit n-1 for signal n.
    pub(crate) fn set(&self) -> u64 {
        self.signal_numbers()
            .fold(0, |set, signal| set | 1 << (signal - 1))
    }

    /// The POSIX timers that signals in it are of.
    pub(crate) fn timers(&self) -> impl Iterator<Item = i32> {
        let field = |info: &RawSiginfo, at: usize| {
            i32::from_le_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]])
        };
        let infos = self.0.iter();
        let of_timers = infos.filter(move |info| field(info, CODE) == libc::SI_TIMER);
        of_timers.map(move |info| field(info, TIMER))
    }

    /// Makes the queue of `tid`, which is `self` now, the same as `target`. Takes the thread's signals off its queue before its
    /// process', as the kernel does, so a thread's queue is to be restored before its process'.
    pub(crate) fn restore(
        &self,
        target: &Self,
        remote: &mut Remote,
        (tid, host): (InnerPid, HostPid),
        scope: Scope,
    ) -> io::Result<()> {
        if self == target {
            return Ok(());
        }
        let mut batch = Batch::new();
        for signal in self.signal_numbers() {
            make_room(&mut batch, remote, host)?;
            let now = batch.input(&[0; 16]);
            let set = batch.input(&(1_u64 << (signal - 1)).to_le_bytes());
            let args = [set.into(), 0.into(), now.into(), SIGSET.into()];
            batch.call(libc::SYS_rt_sigtimedwait, &args);
        }
        let pid = remote.pid();
        for (signal, info) in target.signal_numbers().zip(&target.0) {
            make_room(&mut batch, remote, host)?;
            let info = batch.input(info);
            match scope {
                Scope::Process => batch.call(
                    libc::SYS_rt_sigqueueinfo,
                    &[pid.0.into(), signal.into(), info.into()],
                ),
                Scope::Thread => batch.call(
                    libc::SYS_rt_tgsigqueueinfo,
                    &[pid.0.into(), tid.0.into(), signal.into(), info.into()],
                ),
            };
        }
        remote.run_in(host, &batch).map(drop)
    }
}

/// Runs what a batch holds if no other signal fits; there may be thousands.
fn make_room(batch: &mut Batch, remote: &mut Remote, host: HostPid) -> io::Result<()> {
    if !batch.fits(1, size_of::<RawSiginfo>()) {
        remote.run_in(host, &std::mem::take(batch))?;
    }
    Ok(())
}
