//! What belongs to one thread, and how it is given back.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::credentials::{self, Credentials, Gist, GistQuestions};
use crate::disk::stored;
use crate::env::Environment;
use crate::error::{During, Result};
use crate::ids::{HostPid, InnerPid};
use crate::remote::{Batch, CallId, DataRef, Outcome, Remote};
use crate::signals::{Queue, Scope};
use crate::stop::StoppedThread;
use crate::sys::process;
use crate::sys::ptrace::{self, Registers, RseqConfig};
use crate::verdict;
use crate::waits::{self, Wait};

const PR_GET_TID_ADDRESS: i32 = 40;
const SCHED_ATTR: usize = 56;
const AFFINITY: usize = 128;
const IOPRIO_WHO_PROCESS: i32 = 1;
const RSEQ_UNREGISTER: i32 = 1;
const RSEQ_LEN_MIN: u32 = 32;

/// A thread at a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ThreadImage {
    pub(crate) tid: InnerPid,
    #[serde(with = "stored::registers")]
    regs: Registers,
    /// What is left of the wait that the thread is in, if it goes on by a note of the kernel's.
    #[serde(default)]
    left: Option<Duration>,
    mask: u64,
    xstate: Arc<[u8]>,
    pending: Queue,
    rseq: RseqConfig,
    /// Head and length of the list of robust futexes.
    robust: (u64, u64),
    /// What `set_tid_address(2)` was given.
    clear_tid: u64,
    properties: Properties,
    filters: Filters,
}

/// The seccomp filters that a thread has beside those of the sandbox, the oldest first. They can be added to, and never taken
/// away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Filters(Vec<Vec<u8>>);

impl Filters {
    /// Those of a stopped thread; none where the kernel does not tell.
    fn of(host: HostPid, env: &dyn Environment) -> Self {
        Self::from(host, env.seccomp_filters())
    }

    /// Those of a stopped thread from this one on.
    fn from(host: HostPid, first: usize) -> Self {
        let read = |index| ptrace::seccomp_filter(host, index).ok().flatten();
        Self((first..).map_while(read).collect())
    }

    /// Whether a thread with these registers may go on with a call by the note that the kernel keeps of it, which is a call of its own.
    fn let_go_on(&self, regs: &Registers) -> bool {
        let call = libc::SYS_restart_syscall as u32;
        let mut all = self.0.iter();
        all.all(|filter| verdict::lets_pass(filter, call, regs))
    }
}

/// Whether all filters of a stopped thread with these registers let it go on with a call by the note that the kernel keeps of it.
pub(crate) fn may_go_on_by_note(host: HostPid, regs: &Registers) -> bool {
    Filters::from(host, 0).let_go_on(regs)
}

impl ThreadImage {
    /// Whether a stopped thread can have this one's seccomp filters.
    pub(crate) fn is_within_filters(&self, host: HostPid, env: &dyn Environment) -> bool {
        self.filters.0.starts_with(&Filters::of(host, env).0)
    }

    /// The signals that are queued for it alone.
    pub(crate) fn pending(&self) -> &Queue {
        &self.pending
    }

    /// Whether it has the seccomp filters of another thread.
    pub(crate) fn has_filters_of(&self, other: &Self) -> bool {
        self.filters == other.filters
    }

    /// Addresses that the thread, or the kernel for it, needs as soon as it runs or when it ends.
    pub(crate) fn hot(&self) -> Vec<u64> {
        let mut hot = vec![
            self.regs.rip,
            self.regs.rsp,
            self.regs.fs_base,
            self.rseq.address,
            self.robust.0,
            self.clear_tid,
        ];
        if self.left.is_some() {
            hot.extend(waits::touched(&self.regs));
        }
        hot
    }
}

/// What a batch in the thread tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Properties {
    /// `stack_t`
    signal_stack: Vec<u8>,
    name: Vec<u8>,
    timer_slack: u64,
    scheduling: Vec<u8>,
    affinity: Vec<u8>,
    io_priority: u64,
}

/// Where in a batch the questions to a thread are.
pub(crate) struct Questions {
    signal_stack: DataRef,
    clear_tid: DataRef,
    name: DataRef,
    timer_slack: CallId,
    scheduling: DataRef,
    affinity: (CallId, DataRef),
    io_priority: CallId,
    gist: GistQuestions,
}

/// What a thread answered.
pub(crate) struct Answers {
    pub(crate) gist: Gist,
    clear_tid: u64,
    properties: Properties,
}

impl Questions {
    /// Adds the questions to a batch.
    pub(crate) fn ask(b: &mut Batch) -> Self {
        let signal_stack = b.output(24);
        b.call(libc::SYS_sigaltstack, &[0.into(), signal_stack.into()]);
        let clear_tid = b.output(8);
        b.call(
            libc::SYS_prctl,
            &[PR_GET_TID_ADDRESS.into(), clear_tid.into()],
        );
        let name = b.output(16);
        b.call(libc::SYS_prctl, &[libc::PR_GET_NAME.into(), name.into()]);
        let timer_slack = b.call(libc::SYS_prctl, &[libc::PR_GET_TIMERSLACK.into()]);
        let scheduling = b.output(SCHED_ATTR);
        let args = [0.into(), scheduling.into(), SCHED_ATTR.into(), 0.into()];
        b.call(libc::SYS_sched_getattr, &args);
        let mask = b.output(AFFINITY);
        let args = [0.into(), AFFINITY.into(), mask.into()];
        let affinity = (b.call(libc::SYS_sched_getaffinity, &args), mask);
        let io_priority = b.call(libc::SYS_ioprio_get, &[IOPRIO_WHO_PROCESS.into(), 0.into()]);
        Self {
            signal_stack,
            clear_tid,
            name,
            timer_slack,
            scheduling,
            affinity,
            io_priority,
            gist: GistQuestions::ask(b),
        }
    }

    pub(crate) fn answers(&self, o: &Outcome) -> io::Result<Answers> {
        let (call, mask) = self.affinity;
        let bytes = (o.result(call)? as usize).min(mask.len());
        let properties = Properties {
            signal_stack: o.bytes(self.signal_stack).to_vec(),
            name: o.bytes(self.name).to_vec(),
            timer_slack: o.result(self.timer_slack)?,
            scheduling: o.bytes(self.scheduling).to_vec(),
            affinity: o.bytes(mask)[..bytes].to_vec(),
            io_priority: o.result(self.io_priority)?,
        };
        Ok(Answers {
            gist: self.gist.answers(o),
            clear_tid: o.long(self.clear_tid),
            properties,
        })
    }
}

/// The answers of a thread that it has given already; if it has not, it is asked.
pub(crate) fn known_or_asked(
    remote: &mut Remote,
    thread: &StoppedThread,
    given: &mut BTreeMap<InnerPid, Answers>,
) -> Result<Answers> {
    if let Some(answers) = given.remove(&thread.tid) {
        return Ok(answers);
    }
    let mut batch = Batch::new();
    let questions = Questions::ask(&mut batch);
    let outcome = remote.run_in(thread.host, &batch);
    let answers = outcome.and_then(|outcome| questions.answers(&outcome));
    answers.during(remote.pid(), "asking a thread")
}

/// Takes down a stopped thread, which gave these answers; `first` are the credentials of its process' first thread. Gives
/// the thread's own, if they are others. `shared` holds the signals queued for its process, `wait` the timed
/// wait that the thread was in when it was last looked at.
///
/// A call that the stop made return `EINTR` is sent back to in `thread` too, for it goes on from there.
pub(crate) fn capture(
    env: &dyn Environment,
    remote: &mut Remote,
    thread: &mut StoppedThread,
    (answers, first): (Answers, &Credentials),
    shared: &Queue,
    wait: &mut Option<Wait>,
) -> Result<(ThreadImage, Option<Credentials>)> {
    let pid = remote.pid();
    let credentials = match first.are(&answers.gist) {
        true => None,
        false => {
            let read = credentials::read(remote, thread.host);
            Some(read.during(pid, "asking a thread for its credentials")?)
        }
    };
    let image = read(env, remote, thread, answers, shared, wait).during(pid, "reading a thread")?;
    Ok((image, credentials))
}

fn read(
    env: &dyn Environment,
    remote: &Remote,
    thread: &mut StoppedThread,
    answers: Answers,
    shared: &Queue,
    wait: &mut Option<Wait>,
) -> io::Result<ThreadImage> {
    let host = thread.host;
    let pending = Queue::capture(host, Scope::Thread)?;
    let rseq = ptrace::rseq(host)?;
    leave_critical_section(remote, &rseq, &mut thread.regs);
    let signalled = (pending.set() | shared.set()) & !thread.mask != 0;
    let filters = Filters::of(host, env);
    let by_note = filters.let_go_on(&thread.regs);
    let (regs, left) = waits::settle(remote, &mut thread.regs, signalled, by_note, wait);
    thread.settled = true;
    Ok(ThreadImage {
        tid: thread.tid,
        regs,
        left,
        mask: thread.mask,
        xstate: ptrace::xstate(host)?.into(),
        pending,
        rseq,
        robust: process::robust_list(host)?,
        clear_tid: answers.clear_tid,
        properties: answers.properties,
        filters,
    })
}

/// A thread that is stopped inside a restartable sequence must start it over, as the kernel would have
/// made it (`Documentation/userspace-api/rseq.rst`): its registers no longer tell the kernel so once they were set.
fn leave_critical_section(remote: &Remote, rseq: &RseqConfig, regs: &mut Registers) {
    let long_at = |at: u64| {
        let mut bytes = [0; 8];
        remote.read(at, &mut bytes).ok()?;
        Some(u64::from_le_bytes(bytes))
    };
    if rseq.address == 0 {
        return;
    }
    let section = long_at(rseq.address.wrapping_add(8)).filter(|at| *at != 0);
    let bounds = section.and_then(|at| {
        let field = |n: u64| long_at(at.wrapping_add(n));
        Some((field(8)?, field(16)?, field(24)?))
    });
    if let Some((start, length, abort)) = bounds
        && regs.rip.wrapping_sub(start) < length
    {
        regs.rip = abort;
    }
}

/// Ends the registration of a thread's rseq area if it is not where `target` has it: the kernel writes there when the
/// thread runs, and the memory may be about to go.
pub(crate) fn release_rseq(
    remote: &mut Remote,
    host: HostPid,
    target: Option<&ThreadImage>,
) -> io::Result<()> {
    let current = ptrace::rseq(host)?;
    if current.address == 0 || target.is_some_and(|t| t.rseq == current) {
        return Ok(());
    }
    let mut batch = Batch::new();
    let call = batch.call(libc::SYS_rseq, &rseq_args(&current, RSEQ_UNREGISTER));
    remote.run_in(host, &batch)?.result(call).map(drop)
}

/// Gives a stopped thread everything of `target` but what [`StoppedThread`] holds, and sets that
/// up to be what the thread goes on with. `current` is what it is now; `wait` becomes the timed wait that it is in. Seccomp filters
/// that it lacks go to all threads of the process if `together`.
pub(crate) fn restore(
    remote: &mut Remote,
    thread: &mut StoppedThread,
    current: &ThreadImage,
    (target, together): (&ThreadImage, bool),
    wait: &mut Option<Wait>,
) -> Result<()> {
    let pid = remote.pid();
    write(remote, thread, current, target, together).during(pid, "restoring a thread")?;
    *wait = None;
    thread.regs = match target.left {
        Some(left) => waits::give_back(remote, thread.host, &target.regs, left, wait)
            .during(pid, "making a thread wait again")?,
        None => target.regs,
    };
    thread.settled = true;
    thread.mask = target.mask;
    Ok(())
}

fn write(
    remote: &mut Remote,
    thread: &StoppedThread,
    current: &ThreadImage,
    target: &ThreadImage,
    together: bool,
) -> io::Result<()> {
    let (have, want) = (&current.properties, &target.properties);
    let mut b = Batch::new();
    let mut calls = Vec::new();
    if have.signal_stack != want.signal_stack {
        let stack = b.input(&want.signal_stack);
        calls.push(b.call(libc::SYS_sigaltstack, &[stack.into(), 0.into()]));
    }
    if current.clear_tid != target.clear_tid {
        calls.push(b.call(libc::SYS_set_tid_address, &[target.clear_tid.into()]));
    }
    if current.robust != target.robust {
        let args = [target.robust.0.into(), target.robust.1.into()];
        calls.push(b.call(libc::SYS_set_robust_list, &args));
    }
    if have.name != want.name {
        let name = b.input(&want.name);
        calls.push(b.call(libc::SYS_prctl, &[libc::PR_SET_NAME.into(), name.into()]));
    }
    if have.timer_slack != want.timer_slack {
        let args = [libc::PR_SET_TIMERSLACK.into(), want.timer_slack.into()];
        calls.push(b.call(libc::SYS_prctl, &args));
    }
    if current.rseq != target.rseq {
        if current.rseq.address != 0 {
            b.call(libc::SYS_rseq, &rseq_args(&current.rseq, RSEQ_UNREGISTER));
        }
        if target.rseq.address != 0 {
            calls.push(b.call(libc::SYS_rseq, &rseq_args(&target.rseq, 0)));
        }
    }
    if !b.is_empty() {
        let outcome = remote.run_in(thread.host, &b)?;
        for call in calls {
            outcome.result(call)?;
        }
    }
    for filter in target.filters.0.iter().skip(current.filters.0.len()) {
        add_filter(remote, thread.host, filter, together)?;
    }
    // By the supervisor, which may raise what the thread itself may not.
    if have.scheduling != want.scheduling {
        process::set_scheduling(thread.host, &want.scheduling)?;
    }
    if have.affinity != want.affinity {
        process::set_affinity(thread.host, &want.affinity)?;
    }
    if have.io_priority != want.io_priority {
        process::set_io_priority(thread.host, want.io_priority)?;
    }
    current.pending.restore(
        &target.pending,
        remote,
        (thread.tid, thread.host),
        Scope::Thread,
    )?;
    if current.xstate != target.xstate {
        ptrace::set_xstate(thread.host, &target.xstate)?;
    }
    Ok(())
}

/// Gives a thread another filter; all threads of the process if they are to have it `together`, for only what they share lets the
/// program give them more together later.
fn add_filter(remote: &mut Remote, host: HostPid, filter: &[u8], together: bool) -> io::Result<()> {
    let attempts: &[_] = match together {
        true => &[libc::SECCOMP_FILTER_FLAG_TSYNC, 0],
        false => &[0],
    };
    for &flags in attempts {
        let mut b = Batch::new();
        let program = b.input(filter);
        let count = filter.len() / size_of::<libc::sock_filter>();
        let header = b.input(&crate::remote::longs(&[count as u64, 0]));
        b.link(header, &[(8, program)]);
        let args = [
            libc::SECCOMP_SET_MODE_FILTER.into(),
            flags.into(),
            header.into(),
        ];
        let call = b.call(libc::SYS_seccomp, &args);
        // The number of a thread that has others says that nothing was done.
        if remote.run_in(host, &b)?.result(call)? == 0 {
            break;
        }
    }
    Ok(())
}

fn rseq_args(config: &RseqConfig, flags: i32) -> [crate::remote::Arg; 4] {
    let len = config.size.max(RSEQ_LEN_MIN);
    [
        config.address.into(),
        len.into(),
        flags.into(),
        config.signature.into(),
    ]
}
