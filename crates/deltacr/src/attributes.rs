//! What belongs to a process besides memory, descriptors and threads: credentials, limits, signal
//! handlers, timers, umask and the like.

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

use crate::error::{During, Error, Result};
use crate::ids::HostPid;
use crate::procfs;
use crate::remote::{Arg, Batch, CallId, DataRef, Outcome, Remote};
use crate::stop::Stopped;
use crate::sys::process;

/// `sizeof(sigset_t)` of the kernel.
const SIGSET: u64 = 8;
const SIGNALS: i32 = 64;
/// Where the action for `SIGTRAP` is among those of all signals.
const TRAP: usize = libc::SIGTRAP as usize - 1;
/// The handler of a signal that is ignored.
const IGNORE: [u8; 8] = (libc::SIG_IGN as u64).to_le_bytes();
const RLIMITS: u32 = 16;
const ITIMERS: u64 = 3;
const GROUPS_MAX: usize = 256;
/// Capabilities that there are (`CAP_LAST_CAP` is 40).
const CAPABILITIES: i32 = 41;
/// `membarrier(2)`: what a process is registered for, as a set of commands (Linux 6.3).
const MEMBARRIER_GET_REGISTRATIONS: i32 = 1 << 9;
/// `personality(2)`: ask only.
const PERSONALITY_ASK: u64 = 0xffff_ffff;

/// User and group ids, as the sandbox counts, and capabilities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Credentials {
    /// Real, effective, saved, and that for files.
    users: [u32; 4],
    groups: [u32; 4],
    supplementary: Vec<u8>,
    /// Effective, permitted, inheritable; two words each, as `capget(2)` gives them.
    capabilities: Vec<u8>,
    /// Those that no program that is executed gets back; a bit for each, as for the next.
    bounding: u64,
    /// Those that a program keeps when it executes another.
    ambient: u64,
    securebits: u64,
    no_new_privileges: bool,
}

/// See the module's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attributes {
    pub(crate) credentials: Credentials,
    umask: u64,
    /// Soft and hard limit of each resource.
    limits: Vec<[u64; 2]>,
    /// `struct sigaction` of the kernel, for signal 1 and on.
    actions: Vec<Vec<u8>>,
    /// `struct itimerval`: real, virtual, profiling.
    timers: Vec<Vec<u8>>,
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
    /// Notes that `SIGTRAP` is ignored, which asking for it has changed.
    pub(crate) fn ignore_trap(&mut self) {
        if let Some(handler) = self.actions.get_mut(TRAP).and_then(|a| a.get_mut(..8)) {
            handler.copy_from_slice(&IGNORE);
        }
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
    users: (DataRef, CallId),
    groups: (DataRef, CallId),
    supplementary: (CallId, DataRef),
    capabilities: DataRef,
    bounding: Vec<CallId>,
    ambient: Vec<CallId>,
    securebits: CallId,
    no_new_privileges: CallId,
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

fn ambient(batch: &mut Batch, operation: i32, capability: i32) -> CallId {
    let option = libc::PR_CAP_AMBIENT;
    let args = [
        option.into(),
        operation.into(),
        capability.into(),
        0.into(),
        0.into(),
    ];
    batch.call(libc::SYS_prctl, &args)
}

fn prctl(batch: &mut Batch, option: i32, value: impl Into<Arg>) -> CallId {
    batch.call(
        libc::SYS_prctl,
        &[option.into(), value.into(), 0.into(), 0.into(), 0.into()],
    )
}

/// Asks for three ids, and by setting none for the fourth.
fn ids(batch: &mut Batch, three: i64, fourth: i64) -> (DataRef, CallId) {
    let ids = batch.output(12);
    let args = [0, 4, 8].map(|at| ids.at(at, 4).into());
    batch.call(three, &args);
    (ids, batch.call(fourth, &[u32::MAX.into()]))
}

fn capability_header() -> Vec<u8> {
    [process::CAPABILITY_VERSION.to_le_bytes(), [0; 4]].concat()
}

impl Questions {
    /// Adds the questions to a batch: about 150 quick calls. Another 41 for the ambient capabilities, which nobody has who has
    /// none that are inheritable.
    pub(crate) fn ask(b: &mut Batch, ambient_too: bool) -> Self {
        let users = ids(b, libc::SYS_getresuid, libc::SYS_setfsuid);
        let groups = ids(b, libc::SYS_getresgid, libc::SYS_setfsgid);
        let list = b.output(4 * GROUPS_MAX);
        let count = b.call(libc::SYS_getgroups, &[GROUPS_MAX.into(), list.into()]);
        let header = b.input(&capability_header());
        let capabilities = b.output(24);
        b.call(libc::SYS_capget, &[header.into(), capabilities.into()]);
        let bounding = (0..CAPABILITIES)
            .map(|capability| prctl(b, libc::PR_CAPBSET_READ, capability))
            .collect();
        let ambient = (0..CAPABILITIES)
            .filter(|_| ambient_too)
            .map(|capability| ambient(b, libc::PR_CAP_AMBIENT_IS_SET, capability))
            .collect();
        let securebits = prctl(b, libc::PR_GET_SECUREBITS, 0);
        let no_new_privileges = prctl(b, libc::PR_GET_NO_NEW_PRIVS, 0);
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
                let action = b.output(32);
                let args = [signal.into(), 0.into(), action.into(), SIGSET.into()];
                b.call(libc::SYS_rt_sigaction, &args);
                action
            })
            .collect();
        let timers = (0..ITIMERS)
            .map(|which| {
                let timer = b.output(32);
                b.call(libc::SYS_getitimer, &[which.into(), timer.into()]);
                timer
            })
            .collect();
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
            users,
            groups,
            supplementary: (count, list),
            capabilities,
            bounding,
            ambient,
            securebits,
            no_new_privileges,
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

    fn credentials(&self, o: &Outcome) -> io::Result<Credentials> {
        let ids = |(three, fourth): (DataRef, CallId)| {
            let [a, b, c] = [0, 4, 8].map(|at| o.int(three.at(at, 4)) as u32);
            Ok::<_, io::Error>([a, b, c, o.result(fourth)? as u32])
        };
        // What the kernel does not know nobody has.
        let set = |calls: &[CallId]| {
            let bits = calls.iter().zip(0..);
            bits.fold(0, |set, (call, bit)| match o.result(*call) {
                Ok(1) => set | 1 << bit,
                _ => set,
            })
        };
        let (count, list) = self.supplementary;
        let bytes = (o.result(count)? as usize * 4).min(list.len());
        Ok(Credentials {
            users: ids(self.users)?,
            groups: ids(self.groups)?,
            supplementary: o.bytes(list)[..bytes].to_vec(),
            capabilities: o.bytes(self.capabilities).to_vec(),
            bounding: set(&self.bounding),
            ambient: set(&self.ambient),
            securebits: o.result(self.securebits)?,
            no_new_privileges: o.result(self.no_new_privileges)? != 0,
        })
    }

    /// Where its heap ends.
    pub(crate) fn program_break(&self, o: &Outcome) -> io::Result<u64> {
        o.result(self.program_break)
    }

    /// The kernel starts a real-time timer with an interval again when the process takes the signal of the last time; until
    /// then it shows nothing that is left.
    fn timers(&self, o: &Outcome) -> Vec<Vec<u8>> {
        let mut timers: Vec<_> = self.timers.iter().map(|d| o.bytes(*d).to_vec()).collect();
        if let Some((interval, left)) = timers.first_mut().and_then(|t| t.split_at_mut_checked(16))
            && left.iter().all(|byte| *byte == 0)
        {
            left.copy_from_slice(interval);
        }
        timers
    }

    pub(crate) fn attributes(&self, o: &Outcome, remote: &Remote) -> io::Result<Attributes> {
        let copies = |list: &[DataRef]| list.iter().map(|d| o.bytes(*d).to_vec()).collect();
        Ok(Attributes {
            credentials: self.credentials(o)?,
            umask: o.result(self.umask)?,
            limits: self
                .limits
                .iter()
                .map(|d| [o.long(*d), o.long(d.at(8, 8))])
                .collect(),
            actions: copies(&self.actions),
            timers: self.timers(o),
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

/// Whether `current` can become `target` by the process' own means.
pub(crate) fn reachable(current: &Attributes, target: &Attributes) -> bool {
    let (c, t) = (&current.credentials, &target.credentials);
    if c == t {
        return true;
    }
    // Root may become anybody; nobody else can be sure to. no_new_privs never goes away.
    let root = c.users == [0; 4] && c.capabilities == t.capabilities && t.users == [0; 4];
    root && c.no_new_privileges <= t.no_new_privileges && t.bounding & !c.bounding == 0
}

/// Undoes what differs, but for credentials ([`restore_credentials`]).
pub(crate) fn restore(
    remote: &mut Remote,
    current: &Attributes,
    target: &Attributes,
) -> Result<()> {
    let pid = remote.pid();
    restore_limits(remote.host(), current, target).during(pid, "restoring the limits")?;
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
        if have != want {
            let timer = b.input(want);
            let args = [which.into(), timer.into(), 0.into()];
            calls.push(("an interval timer", b.call(libc::SYS_setitimer, &args)));
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
    let first = remote.host();
    run_all(remote, first, &b, &calls)
}

/// Makes the credentials of all threads those of `target`. Comes last, for it may take rights away.
pub(crate) fn restore_credentials(
    stopped: &mut Stopped,
    current: &Attributes,
    target: &Attributes,
) -> Result<()> {
    let (have, want) = (&current.credentials, &target.credentials);
    let first = stopped.remote.host();
    let mut b = Batch::new();
    let mut calls = Vec::new();
    if have != want {
        calls = change_credentials(&mut b, have, want);
        // Each thread has its own; those that were made just now have what the first has.
        let others = stopped.threads.iter().map(|thread| thread.host);
        for host in others.filter(|host| *host != first) {
            run_all(&mut stopped.remote, host, &b, &calls)?;
        }
    }
    // Changing ids resets these.
    if have != want || current.dumpable != target.dumpable {
        if target.dumpable <= 1 {
            prctl(&mut b, libc::PR_SET_DUMPABLE, target.dumpable);
        }
        prctl(&mut b, libc::PR_SET_PDEATHSIG, target.death_signal);
    }
    run_all(&mut stopped.remote, first, &b, &calls)
}

/// Adds the calls that change a thread's credentials, and tells what each of them is for.
fn change_credentials(
    b: &mut Batch,
    have: &Credentials,
    want: &Credentials,
) -> Vec<(&'static str, CallId)> {
    let mut calls = Vec::new();
    let list = b.input(&want.supplementary);
    let count = want.supplementary.len() / 4;
    let header = b.input(&capability_header());
    let sets = b.input(&want.capabilities);
    if have.supplementary != want.supplementary {
        let args = [count.into(), list.into()];
        calls.push((
            "the supplementary groups",
            b.call(libc::SYS_setgroups, &args),
        ));
    }
    for capability in 0..CAPABILITIES {
        if have.bounding & !want.bounding & 1 << capability != 0 {
            calls.push((
                "the bounding set",
                prctl(b, libc::PR_CAPBSET_DROP, capability),
            ));
        }
    }
    let ids = |[a, b, c, _]: [u32; 4]| [a, b, c].map(Arg::from);
    calls.push((
        "the group ids",
        b.call(libc::SYS_setresgid, &ids(want.groups)),
    ));
    // The calls for the fourth ids give the old one and no errors.
    b.call(libc::SYS_setfsgid, &[want.groups[3].into()]);
    // Capabilities survive the change of user only so.
    prctl(b, libc::PR_SET_KEEPCAPS, 1);
    calls.push((
        "the user ids",
        b.call(libc::SYS_setresuid, &ids(want.users)),
    ));
    if !want.users[..3].contains(&want.users[3]) {
        // What is permitted must be in effect for that, and some of it is not any more after it.
        let mut effective = want.capabilities.clone();
        effective.copy_within(4..8, 0);
        effective.copy_within(16..20, 12);
        let effective = b.input(&effective);
        b.call(libc::SYS_capset, &[header.into(), effective.into()]);
        b.call(libc::SYS_setfsuid, &[want.users[3].into()]);
    }
    calls.push((
        "the capabilities",
        b.call(libc::SYS_capset, &[header.into(), sets.into()]),
    ));
    prctl(b, libc::PR_SET_KEEPCAPS, 0);
    for capability in (0..CAPABILITIES).filter(|c| want.ambient & 1 << c != 0) {
        calls.push((
            "the ambient capabilities",
            ambient(b, libc::PR_CAP_AMBIENT_RAISE, capability),
        ));
    }
    if have.securebits != want.securebits {
        let set = prctl(b, libc::PR_SET_SECUREBITS, want.securebits);
        calls.push(("the securebits", set));
    }
    if want.no_new_privileges && !have.no_new_privileges {
        calls.push(("no_new_privs", prctl(b, libc::PR_SET_NO_NEW_PRIVS, 1)));
    }
    calls
}

fn run_all(
    remote: &mut Remote,
    thread: HostPid,
    batch: &Batch,
    calls: &[(&str, CallId)],
) -> Result<()> {
    if batch.is_empty() {
        return Ok(());
    }
    let pid = remote.pid();
    let outcome = remote
        .run_in(thread, batch)
        .during(pid, "restoring the attributes")?;
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

fn restore_limits(host: HostPid, current: &Attributes, target: &Attributes) -> io::Result<()> {
    for (resource, (have, want)) in (0..).zip(current.limits.iter().zip(&target.limits)) {
        if have != want {
            process::set_limit(host, resource, *want)?;
        }
    }
    Ok(())
}
