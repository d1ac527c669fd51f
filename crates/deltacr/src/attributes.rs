//! What belongs to a process besides memory, descriptors and threads: credentials, limits, signal
//! handlers, timers, umask and the like.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

use crate::credentials::{self, Credentials, Gist};
use crate::error::{During, Error, Result};
use crate::ids::{HostPid, InnerPid};
use crate::limits::{self, Limit, Room};
use crate::procfs;
use crate::remote::{Arg, Batch, CallId, DataRef, Outcome, Remote};
use crate::signals::Queue;
use crate::stop::Stopped;

/// `sizeof(sigset_t)` of the kernel.
const SIGSET: u64 = 8;
const SIGNALS: i32 = 64;
/// Where the action for `SIGTRAP` is among those of all signals.
const TRAP: usize = libc::SIGTRAP as usize - 1;
/// The handler of a signal that is ignored.
const IGNORE: [u8; 8] = (libc::SIG_IGN as u64).to_le_bytes();
const RLIMITS: u32 = 16;
const ITIMERS: u64 = 3;
/// The size of `struct sigaction` of the kernel, and of `struct itimerval`.
const RECORD: usize = 32;
/// `membarrier(2)`: what a process is registered for, as a set of commands (Linux 6.3).
const MEMBARRIER_GET_REGISTRATIONS: i32 = 1 << 9;
/// `personality(2)`: ask only.
const PERSONALITY_ASK: u64 = 0xffff_ffff;

/// See the module's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attributes {
    /// Those of the first thread.
    pub(crate) credentials: Credentials,
    /// Those of other threads that have others.
    pub(crate) others: BTreeMap<InnerPid, Credentials>,
    /// What those have told of theirs; of processes that are looked at only.
    #[serde(skip)]
    gists: BTreeMap<InnerPid, Gist>,
    umask: u64,
    /// Soft and hard limit of each resource.
    limits: Vec<Limit>,
    /// `struct sigaction` of the kernel, for signal 1 and on.
    actions: Vec<[u8; RECORD]>,
    /// `struct itimerval`: real, virtual, profiling.
    timers: Vec<[u8; RECORD]>,
    dumpable: u64,
    death_signal: i32,
    subreaper: i32,
    personality: u64,
    /// Whether the kernel gives it no huge pages.
    no_huge_pages: u64,
    /// What it is registered for with `membarrier(2)`: bits that are commands.
    barriers: u64,
    /// How likely the kernel is to kill it for want of memory, as `/proc/PID/oom_score_adj` says.
    oom_score: Vec<u8>,
}

impl Attributes {
    /// Notes which threads have other credentials than the first, by what all have told.
    pub(crate) fn note_others(&mut self, told: impl Iterator<Item = (InnerPid, Gist)>) {
        let other = |(_, gist): &(InnerPid, Gist)| !self.credentials.are(gist);
        self.gists = told.filter(other).collect();
    }

    /// Asks once more for the interval timers whose signals are among those that are queued by now: one that has ended since it was asked
    /// for would tick twice.
    pub(crate) fn look_again(&mut self, remote: &mut Remote, queued: &Queue) -> io::Result<()> {
        let signals = [libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF];
        let ticked = signals.map(|signal| queued.set() & 1 << (signal - 1) != 0);
        if ticked == [false; 3] {
            return Ok(());
        }
        let mut batch = Batch::new();
        let questions = ask_for_timers(&mut batch);
        let now = told_of_timers(&remote.run(&batch)?, &questions);
        for ((timer, now), ticked) in self.timers.iter_mut().zip(now).zip(ticked) {
            if ticked {
                *timer = now;
            }
        }
        Ok(())
    }

    /// Notes that `SIGTRAP` is ignored, which asking for it has changed.
    pub(crate) fn ignore_trap(&mut self) {
        if let Some(handler) = self.actions.get_mut(TRAP) {
            handler[..IGNORE.len()].copy_from_slice(&IGNORE);
        }
    }

    /// Makes limits that are in the way of what a stopped process is to become let it through.
    pub(crate) fn make_room(
        &mut self,
        host: HostPid,
        room: &Room,
        target: &Self,
    ) -> io::Result<()> {
        room.make(host, &mut self.limits, &target.limits)
    }

    /// The same for a process that was just born, which is to become this.
    pub(crate) fn make_room_for_new(&self, host: HostPid, room: &Room) -> io::Result<()> {
        room.make_for_new(host, &self.limits)
    }

    /// Whether it is given the orphans of its descendants.
    pub(crate) fn takes_orphans(&self) -> bool {
        self.subreaper != 0
    }

    /// Whether `SIGTRAP` is ignored.
    pub(crate) fn ignores_trap(&self) -> bool {
        self.actions
            .get(TRAP)
            .is_some_and(|a| a.starts_with(&IGNORE))
    }
}

/// Where in a batch the questions to a process are.
pub(crate) struct Questions {
    credentials: credentials::Questions,
    umask: CallId,
    limits: Vec<DataRef>,
    actions: Vec<DataRef>,
    timers: Vec<DataRef>,
    dumpable: CallId,
    death_signal: DataRef,
    subreaper: DataRef,
    personality: CallId,
    no_huge_pages: CallId,
    barriers: CallId,
    program_break: CallId,
}

pub(crate) fn prctl(batch: &mut Batch, option: i32, value: impl Into<Arg>) -> CallId {
    batch.call(
        libc::SYS_prctl,
        &[option.into(), value.into(), 0.into(), 0.into(), 0.into()],
    )
}

impl Questions {
    /// Adds the questions to a batch: about 110 quick calls, and one for each capability that `bounding` says that may be in the bounding
    /// set. Another 41 for the ambient capabilities, which nobody has who has none that are inheritable.
    pub(crate) fn ask(b: &mut Batch, ambient_too: bool, bounding: u64) -> Self {
        let credentials = credentials::Questions::ask(b, ambient_too, bounding);
        // The umask can only be read by setting it.
        let umask = b.call(libc::SYS_umask, &[0o77.into()]);
        b.call(libc::SYS_umask, &[umask.into()]);
        let limits = (0..RLIMITS)
            .map(|resource| {
                let limit = b.output(16);
                b.call(
                    libc::SYS_prlimit64,
                    &[0.into(), resource.into(), 0.into(), limit.into()],
                );
                limit
            })
            .collect();
        let actions = (1..=SIGNALS)
            .map(|signal| {
                let action = b.output(RECORD);
                let args = [signal.into(), 0.into(), action.into(), SIGSET.into()];
                b.call(libc::SYS_rt_sigaction, &args);
                action
            })
            .collect();
        let timers = ask_for_timers(b);
        let dumpable = prctl(b, libc::PR_GET_DUMPABLE, 0);
        let death_signal = b.output(4);
        prctl(b, libc::PR_GET_PDEATHSIG, death_signal);
        let subreaper = b.output(4);
        prctl(b, libc::PR_GET_CHILD_SUBREAPER, subreaper);
        let personality = b.call(libc::SYS_personality, &[PERSONALITY_ASK.into()]);
        let no_huge_pages = prctl(b, libc::PR_GET_THP_DISABLE, 0);
        let barriers = [MEMBARRIER_GET_REGISTRATIONS.into(), 0.into(), 0.into()];
        let barriers = b.call(libc::SYS_membarrier, &barriers);
        let program_break = b.call(libc::SYS_brk, &[0.into()]);
        Self {
            credentials,
            umask,
            limits,
            actions,
            timers,
            dumpable,
            death_signal,
            subreaper,
            personality,
            no_huge_pages,
            barriers,
            program_break,
        }
    }

    /// Where its heap ends.
    pub(crate) fn program_break(&self, o: &Outcome) -> io::Result<u64> {
        o.result(self.program_break)
    }

    pub(crate) fn attributes(&self, o: &Outcome, remote: &Remote) -> io::Result<Attributes> {
        Ok(Attributes {
            credentials: self.credentials.answers(o)?,
            others: BTreeMap::new(),
            gists: BTreeMap::new(),
            umask: o.result(self.umask)?,
            limits: self
                .limits
                .iter()
                .map(|d| [o.long(*d), o.long(d.at(8, 8))])
                .collect(),
            actions: o.records(&self.actions),
            timers: told_of_timers(o, &self.timers),
            dumpable: o.result(self.dumpable)?,
            death_signal: o.int(self.death_signal),
            subreaper: o.int(self.subreaper),
            personality: o.result(self.personality)?,
            no_huge_pages: o.result(self.no_huge_pages)?,
            // Older kernels do not tell.
            barriers: o.result(self.barriers).unwrap_or_default(),
            oom_score: procfs::read_all(&*remote.proc_file("oom_score_adj")?)?,
        })
    }
}

/// Adds the questions for the interval timers to a batch.
fn ask_for_timers(b: &mut Batch) -> Vec<DataRef> {
    let ask = |which: u64| {
        let timer = b.output(RECORD);
        b.call(libc::SYS_getitimer, &[which.into(), timer.into()]);
        timer
    };
    (0..ITIMERS).map(ask).collect()
}

/// The kernel starts a real-time timer with an interval again when the process takes the signal of the last time; until
/// then it shows nothing that is left.
fn told_of_timers(o: &Outcome, timers: &[DataRef]) -> Vec<[u8; RECORD]> {
    let mut timers = o.records(timers);
    if let Some((interval, left)) = timers.first_mut().map(|t| t.split_at_mut(RECORD / 2))
        && left.iter().all(|byte| *byte == 0)
    {
        left.copy_from_slice(interval);
    }
    timers
}

/// Undoes what differs, but for what comes later: [timers](arm), [credentials](restore_credentials) and [limits](restore_limits).
pub(crate) fn restore(
    remote: &mut Remote,
    current: &Attributes,
    target: &Attributes,
) -> Result<()> {
    let pid = remote.pid();
    if current.oom_score != target.oom_score {
        let written = fs::write(oom_score_file(remote.host()), &target.oom_score);
        written.during(pid, "restoring the OOM score")?;
    }
    let mut b = Batch::new();
    let mut calls = Vec::new();
    if current.umask != target.umask {
        b.call(libc::SYS_umask, &[target.umask.into()]);
    }
    for (signal, (have, want)) in (1..).zip(current.actions.iter().zip(&target.actions)) {
        if have != want && signal != libc::SIGKILL && signal != libc::SIGSTOP {
            let action = b.input(want);
            let args = [signal.into(), action.into(), 0.into(), SIGSET.into()];
            calls.push(("a signal handler", b.call(libc::SYS_rt_sigaction, &args)));
        }
    }
    for (which, (have, want)) in (0_u64..).zip(current.timers.iter().zip(&target.timers)) {
        // One that ticked now would do so in the state that is given up.
        if have != want && is_armed(have) {
            calls.push(("an interval timer", set_timer(&mut b, which, &[0; RECORD])));
        }
    }
    if current.death_signal != target.death_signal {
        prctl(&mut b, libc::PR_SET_PDEATHSIG, target.death_signal);
    }
    if current.subreaper != target.subreaper {
        prctl(&mut b, libc::PR_SET_CHILD_SUBREAPER, target.subreaper);
    }
    if current.personality != target.personality {
        b.call(libc::SYS_personality, &[target.personality.into()]);
    }
    if current.no_huge_pages != target.no_huge_pages {
        prctl(&mut b, libc::PR_SET_THP_DISABLE, target.no_huge_pages);
    }
    for bit in 0..u64::BITS {
        let command = 1_u64 << bit;
        if target.barriers & !current.barriers & command != 0 {
            let args = [command.into(), 0.into(), 0.into()];
            calls.push(("a memory barrier", b.call(libc::SYS_membarrier, &args)));
        }
    }
    run_all(remote, &b, &calls)
}

/// Arms the interval timers. Comes when the queued signals are back, for one may tick at once.
pub(crate) fn arm(remote: &mut Remote, current: &Attributes, target: &Attributes) -> Result<()> {
    let mut b = Batch::new();
    let mut calls = Vec::new();
    for (which, (have, want)) in (0_u64..).zip(current.timers.iter().zip(&target.timers)) {
        if have != want && is_armed(want) {
            calls.push(("an interval timer", set_timer(&mut b, which, want)));
        }
    }
    run_all(remote, &b, &calls)
}

/// Whether a `struct itimerval` has time left.
fn is_armed(timer: &[u8; RECORD]) -> bool {
    timer[RECORD / 2..].iter().any(|byte| *byte != 0)
}

fn set_timer(batch: &mut Batch, which: u64, setting: &[u8; RECORD]) -> CallId {
    let setting = batch.input(setting);
    let args = [which.into(), setting.into(), 0.into()];
    batch.call(libc::SYS_setitimer, &args)
}

/// What threads take over from the one that makes them, and nobody else can give them.
pub(crate) fn restore_personality(remote: &mut Remote, target: &Attributes) -> Result<()> {
    let mut b = Batch::new();
    let call = b.call(libc::SYS_personality, &[target.personality.into()]);
    run_all(remote, &b, &[("the personality", call)])
}

/// Whether `current` can become `target` by the process' own means.
pub(crate) fn reachable(current: &Attributes, target: &Attributes) -> bool {
    let goal = |tid| target.others.get(tid).unwrap_or(&target.credentials);
    let first = &current.credentials;
    let as_first = |tid: &InnerPid| !current.gists.contains_key(tid);
    // What a thread with others could become is not known.
    current.gists.iter().all(|(tid, gist)| goal(tid).are(gist))
        && target
            .others
            .iter()
            .all(|(tid, goal)| !as_first(tid) || first.can_become(goal))
        && first.can_become(&target.credentials)
}

/// Whether a process with these attributes can have a child with those of `child`.
pub(crate) fn can_bear(parent: &Attributes, child: &Attributes) -> bool {
    let first = &parent.credentials;
    let mut all = child.others.values().chain([&child.credentials]);
    all.all(|credentials| first.can_bear(credentials))
}

/// Makes the credentials of all threads those of `target`, and what their change resets. Comes last, for it may take rights away.
pub(crate) fn restore_credentials(
    stopped: &mut Stopped,
    current: &Attributes,
    target: &Attributes,
) -> Result<()> {
    let remote = &mut stopped.remote;
    let pid = remote.pid();
    let mut changed = false;
    for thread in &stopped.threads {
        let of = |attributes: &'_ Attributes| {
            let own = attributes.others.get(&thread.tid);
            own.unwrap_or(&attributes.credentials).clone()
        };
        let (have, want) = (of(current), of(target));
        if have != want {
            changed = true;
            let restored = credentials::restore(remote, thread.host, &have, &want);
            restored.map_err(|(what, source)| Error::Process {
                doing: format!("restoring {what}"),
                pid,
                source,
            })?;
        }
    }
    let mut b = Batch::new();
    if changed || current.dumpable != target.dumpable {
        if target.dumpable <= 1 {
            prctl(&mut b, libc::PR_SET_DUMPABLE, target.dumpable);
        }
        prctl(&mut b, libc::PR_SET_PDEATHSIG, target.death_signal);
    }
    run_all(remote, &b, &[])
}

fn run_all(remote: &mut Remote, batch: &Batch, calls: &[(&str, CallId)]) -> Result<()> {
    if batch.is_empty() {
        return Ok(());
    }
    let pid = remote.pid();
    let outcome = remote.run(batch).during(pid, "restoring the attributes")?;
    for (what, call) in calls {
        outcome.result(*call).map_err(|source| Error::Process {
            doing: format!("restoring {what}"),
            pid,
            source,
        })?;
    }
    Ok(())
}

fn oom_score_file(host: HostPid) -> String {
    format!("/proc/{host}/oom_score_adj")
}

/// Gives a process its limits. Comes last of all, for they may be below what it has.
pub(crate) fn restore_limits(
    remote: &Remote,
    current: &Attributes,
    target: &Attributes,
) -> Result<()> {
    let restored = limits::restore(remote.host(), &current.limits, &target.limits);
    restored.during(remote.pid(), "restoring the limits")
}
