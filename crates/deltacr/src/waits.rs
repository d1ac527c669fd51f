//! Calls that wait for a limited time: how much of it is left, and how a thread is given that back.
//!
//! `nanosleep`, `poll` and `futex` go on by a note that the kernel keeps in the thread, with the time when they end. A
//! checkpoint leaves it alone. A thread that is rolled back needs a new one: it begins the call once more with what is left,
//! is interrupted at once, and has the note that the kernel then makes. Its registers are those that it had.
//!
//! Other calls (`epoll_wait`, `sigtimedwait`, …) have no note. `epoll_wait` has its limit in a register, which is lowered; the
//! limit of the rest is in the program's memory, so they begin anew, and end at the first stop after their time.
//!
//! A thread's own seccomp filter may not know the call (`restart_syscall`) by which the kernel goes on with a note, and end the process for it
//! (OpenSSH's does). Such a thread is sent back to the call itself, as if it had no note.
//!
//! Of a wait that is found for the first time it is not known when it began, but where the kernel has written it down for
//! the program (`nanosleep`): then it counts from the stop on.

use std::collections::HashMap;
use std::io;
use std::time::{Duration, Instant};

use crate::ids::HostPid;
use crate::remote::{Remote, longs};
use crate::resume::{self, Begun};
use crate::sys::process::{SYSCALL, read_memory};
use crate::sys::ptrace::Registers;

/// What a thread has in the upper half of the register with the call's number when it is sent back. The kernel looks at the
/// lower half only, and shows all of it at the next stop if that is in the same wait.
const SENT_BACK: u64 = 0x0de1_7ac4 << 32;
const LOWER_HALF: u64 = 0xffff_ffff;
const FUTEX_COMMAND: u64 = 0x7f;
const NANOSECONDS: i64 = 1_000_000_000;
/// More than a process has.
const DESCRIPTORS: u64 = 1 << 20;
/// Size of `struct pollfd`.
const POLLFD: u64 = 8;
const PAGE: usize = 4096;

const NANOSLEEP: u64 = libc::SYS_nanosleep as u64;
const CLOCK_NANOSLEEP: u64 = libc::SYS_clock_nanosleep as u64;
const POLL: u64 = libc::SYS_poll as u64;
const FUTEX: u64 = libc::SYS_futex as u64;
const EPOLL_WAIT: u64 = libc::SYS_epoll_wait as u64;
const EPOLL_PWAIT: u64 = libc::SYS_epoll_pwait as u64;
const EPOLL_PWAIT2: u64 = libc::SYS_epoll_pwait2 as u64;
const SIGTIMEDWAIT: u64 = libc::SYS_rt_sigtimedwait as u64;
const SEMTIMEDOP: u64 = libc::SYS_semtimedop as u64;
const RESTART: u64 = libc::SYS_restart_syscall as u64;

/// A wait with a time limit that was interrupted before, to know it again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait {
    nr: u64,
    /// Where in the program it is.
    at: (u64, u64),
    /// Of no meaning where the limit is a time of the clock.
    deadline: Instant,
}

/// The wait that each thread was in when it was last stopped.
pub(crate) type Waits = HashMap<HostPid, Option<Wait>>;

impl Wait {
    /// One that was just given back with so much time.
    fn given_back(nr: u64, regs: &Registers, left: Duration) -> Self {
        Self {
            nr,
            at: (regs.rip, regs.rsp),
            deadline: Instant::now() + left,
        }
    }

    fn left(&self, now: Instant) -> Duration {
        self.deadline.saturating_duration_since(now)
    }
}

/// Where a call has its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    /// In a register.
    Milliseconds(u64),
    /// In a `struct timespec` at this address.
    At(u64),
}

impl Limit {
    /// That of a call, if it has one that counts from the call on.
    fn of(nr: u64, regs: &Registers) -> Option<Self> {
        match nr {
            NANOSLEEP => Some(Self::At(regs.rdi)),
            CLOCK_NANOSLEEP => {
                (regs.rsi & libc::TIMER_ABSTIME as u64 == 0).then_some(Self::At(regs.rdx))
            }
            FUTEX if regs.rsi & FUTEX_COMMAND == libc::FUTEX_WAIT as u64 => Self::at(regs.r10),
            POLL => Self::milliseconds(regs.rdx),
            EPOLL_WAIT | EPOLL_PWAIT => Self::milliseconds(regs.r10),
            EPOLL_PWAIT2 | SEMTIMEDOP => Self::at(regs.r10),
            SIGTIMEDWAIT => Self::at(regs.rdx),
            _ => None,
        }
    }

    fn at(address: u64) -> Option<Self> {
        (address != 0).then_some(Self::At(address))
    }

    fn milliseconds(register: u64) -> Option<Self> {
        let timeout = register & 0xffff_ffff;
        (1..=i32::MAX as u64)
            .contains(&timeout)
            .then_some(Self::Milliseconds(timeout))
    }

    fn read(self, host: HostPid) -> Option<Duration> {
        match self {
            Self::Milliseconds(ms) => Some(Duration::from_millis(ms)),
            Self::At(address) => timespec(host, address),
        }
    }
}

/// A `struct timespec` of the program's.
fn timespec(host: HostPid, address: u64) -> Option<Duration> {
    let mut bytes = [0; 16];
    read_memory(host, address, &mut bytes).ok()?;
    let field = |at: usize| i64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let (seconds, nanoseconds) = (field(0), field(8));
    let whole = seconds >= 0 && (0..NANOSECONDS).contains(&nanoseconds);
    whole.then(|| Duration::new(seconds as u64, nanoseconds as u32))
}

/// Where the kernel has written down for the program what is left of a sleep.
fn written_rest(nr: u64, regs: &Registers) -> Option<u64> {
    let address = match nr {
        NANOSLEEP => regs.rsi,
        CLOCK_NANOSLEEP => regs.r10,
        _ => 0,
    };
    (address != 0).then_some(address)
}

/// What a call returns when its time is over.
fn timed_out(nr: u64) -> u64 {
    match nr {
        SIGTIMEDWAIT | SEMTIMEDOP => -i64::from(libc::EAGAIN) as u64,
        FUTEX => -i64::from(libc::ETIMEDOUT) as u64,
        _ => 0,
    }
}

/// Looks after the call that a stop took a thread out of. `regs` are what it was stopped with, and become what it is to go on
/// with; returned are those of the image, and what is left of the wait if it goes on by a note, which `by_note` allows. `wait` is what
/// was found last time.
pub(crate) fn settle(
    remote: &Remote,
    regs: &mut Registers,
    signalled: bool,
    by_note: bool,
    wait: &mut Option<Wait>,
) -> (Registers, Option<Duration>) {
    let host = remote.host();
    let before = wait.take();
    if let Some(mut image) = with_note(host, regs) {
        if by_note {
            let left = noted(host, &mut image, before, wait);
            return (image, left);
        }
        match call_of(host, &image, before) {
            Some(nr) => image.orig_rax = nr,
            None => resume::end_interrupted(&mut image),
        }
        resume::interrupt(&mut image);
        *regs = image;
    }
    if !resume::is_interrupted(regs, signalled) {
        // It may not even have got back to its call.
        *wait = before.filter(|w| w.nr | SENT_BACK == regs.rax);
        return (*regs, None);
    }
    let now = Instant::now();
    let known = before.filter(|w| w.nr | SENT_BACK == regs.orig_rax);
    let stopped_at = *regs;
    regs.orig_rax &= LOWER_HALF;
    let nr = regs.orig_rax;
    resume::restart(regs);
    let limit = Limit::of(nr, regs);
    let full = limit.and_then(|limit| limit.read(host));
    if let Some((limit, full)) = limit.zip(full) {
        let found = recognize(nr, regs, full, known, now);
        *wait = lower(regs, &stopped_at, limit, found, now);
    }
    let image = *regs;
    if wait.is_some() {
        regs.rax |= SENT_BACK;
    }
    (image, None)
}

/// The registers of a thread whose call goes on by a note, as they are when it has just come out of the call.
fn with_note(host: HostPid, regs: &Registers) -> Option<Registers> {
    if resume::has_note(regs) {
        return Some(*regs);
    }
    let mut code = [0; 2];
    let goes_back =
        regs.rax == RESTART && read_memory(host, regs.rip, &mut code).is_ok() && code == SYSCALL;
    goes_back.then(|| resume::as_with_note(regs, RESTART))
}

/// Takes down the wait of a thread that was stopped and goes on by a note, if nobody else has: the registers tell which call
/// it is in the first time only.
pub(crate) fn note(host: HostPid, regs: &Registers, waits: &mut Waits) {
    if resume::has_note(regs) && regs.orig_rax != RESTART {
        let mut image = *regs;
        noted(host, &mut image, None, waits.entry(host).or_default());
    }
}

/// A wait that goes on by a note.
fn noted(
    host: HostPid,
    image: &mut Registers,
    before: Option<Wait>,
    wait: &mut Option<Wait>,
) -> Option<Duration> {
    let same = same_wait(image, before);
    let Some(nr) = call_of(host, image, before) else {
        resume::end_interrupted(image);
        return None;
    };
    image.orig_rax = nr;
    let now = Instant::now();
    let left = Limit::of(nr, image).and_then(|limit| {
        let rest = written_rest(nr, image).and_then(|address| timespec(host, address));
        rest.or(same.map(|w| w.left(now)))
            .or_else(|| limit.read(host))
    });
    *wait = Some(Wait::given_back(nr, image, left.unwrap_or_default()));
    if left.is_none() {
        // Its limit is a time of the clock.
        resume::restart(image);
    }
    left
}

/// The wait that was found last time, if a thread with a note is still in it.
fn same_wait(image: &Registers, before: Option<Wait>) -> Option<Wait> {
    let at = (image.rip, image.rsp);
    before.filter(|w| image.orig_rax == RESTART && w.at == at)
}

/// The call that goes on by a note: the registers tell it the first time only.
fn call_of(host: HostPid, image: &Registers, before: Option<Wait>) -> Option<u64> {
    let known = || same_wait(image, before).map(|w| w.nr);
    match image.orig_rax {
        RESTART => known().or_else(|| call_in_code(host, image.rip)),
        nr => Some(nr),
    }
}

/// The number that a program loads right before its `syscall` instruction, if it is of a call that goes on by a note.
fn call_in_code(host: HostPid, rip: u64) -> Option<u64> {
    const LOAD_EAX: u8 = 0xb8;
    let mut code = [0; 7];
    read_memory(host, rip.wrapping_sub(7), &mut code).ok()?;
    let nr = u64::from(u32::from_le_bytes(
        code[1..5].try_into().expect("four bytes"),
    ));
    let noted = [NANOSLEEP, CLOCK_NANOSLEEP, POLL, FUTEX];
    (code[0] == LOAD_EAX && code[5..] == SYSCALL && noted.contains(&nr)).then_some(nr)
}

/// The wait of a thread that is sent back to a call with this limit: the one of last time, or a new one.
fn recognize(
    nr: u64,
    regs: &Registers,
    limit: Duration,
    before: Option<Wait>,
    now: Instant,
) -> Wait {
    let at = (regs.rip, regs.rsp);
    let same = before.filter(|w| w.at == at);
    same.unwrap_or(Wait {
        nr,
        at,
        deadline: now + limit,
    })
}

/// Lets a wait end in time: lowers its limit if that is in a register, otherwise ends it when its time is over.
fn lower(
    regs: &mut Registers,
    stopped_at: &Registers,
    limit: Limit,
    wait: Wait,
    now: Instant,
) -> Option<Wait> {
    let left = wait.left(now);
    match limit {
        Limit::Milliseconds(_) => {
            // Rounded up: never to return too early.
            let left = left.as_nanos().div_ceil(1_000_000) as u64;
            match wait.nr {
                POLL => regs.rdx = left,
                _ => regs.r10 = left,
            }
            Some(wait)
        }
        Limit::At(_) if left.is_zero() => {
            *regs = *stopped_at;
            resume::end(regs, timed_out(wait.nr));
            None
        }
        Limit::At(_) => Some(wait),
    }
}

/// Makes a stopped thread, which has its memory and descriptors, wait for what is `left` of the call that `target` is in.
/// Returns the registers that it is to go on with.
pub(crate) fn give_back(
    remote: &mut Remote,
    host: HostPid,
    target: &Registers,
    left: Duration,
    wait: &mut Option<Wait>,
) -> io::Result<Registers> {
    let nr = target.orig_rax;
    let milliseconds = left.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as u64;
    let limit = longs(&[left.as_secs(), u64::from(left.subsec_nanos())]);
    let begun = remote.begin_call(host, target, &limit, |call, at| match nr {
        NANOSLEEP => call.rdi = at,
        CLOCK_NANOSLEEP => call.rdx = at,
        FUTEX => call.r10 = at,
        _ => call.rdx = milliseconds,
    })?;
    let mut regs = *target;
    match Begun::of(&begun) {
        Begun::Note => *wait = Some(Wait::given_back(nr, &regs, left)),
        Begun::Nothing => resume::restart(&mut regs),
        Begun::Result(result) => resume::end(&mut regs, result),
    }
    Ok(regs)
}

/// Addresses that the kernel looks at when a wait is given back.
pub(crate) fn touched(regs: &Registers) -> Vec<u64> {
    match regs.orig_rax {
        FUTEX => vec![regs.rdi],
        POLL => {
            let end = regs.rdi.saturating_add(regs.rsi.min(DESCRIPTORS) * POLLFD);
            let pages = (regs.rdi..end).step_by(PAGE);
            pages.chain([end]).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_epoll_wait(milliseconds: u64) -> Registers {
        let mut regs = crate::sys::ptrace::no_registers();
        (regs.rax, regs.r10) = (EPOLL_WAIT, milliseconds);
        regs
    }

    #[test]
    fn a_wait_that_is_interrupted_again_and_again_ends_in_time() {
        let start = Instant::now();
        let mut regs = in_epoll_wait(1000);
        let mut known = None;
        for (after, left) in [(0, 1000), (400, 600), (1700, 0)] {
            let now = start + Duration::from_millis(after);
            let limit = Limit::Milliseconds(regs.r10);
            let full = Duration::from_millis(regs.r10);
            let wait = recognize(EPOLL_WAIT, &regs, full, known, now);
            known = lower(&mut regs, &in_epoll_wait(0), limit, wait, now);
            assert_eq!(regs.r10, left);
        }
    }

    #[test]
    fn a_limit_in_memory_is_kept_until_the_time_is_over() {
        let start = Instant::now();
        let mut regs = crate::sys::ptrace::no_registers();
        regs.rdx = 0x1000;
        let limit = Limit::of(SIGTIMEDWAIT, &regs).unwrap();
        assert_eq!(limit, Limit::At(0x1000));
        let second = Duration::from_secs(1);
        let wait = recognize(SIGTIMEDWAIT, &regs, second, None, start);
        let stopped_at = regs;
        let soon = start + second / 2;
        assert!(lower(&mut regs, &stopped_at, limit, wait, soon).is_some());
        assert!(lower(&mut regs, &stopped_at, limit, wait, start + second).is_none());
        assert_eq!(regs.rax as i64, -i64::from(libc::EAGAIN));
    }

    #[test]
    fn only_limits_that_count_from_the_call_on_are_found() {
        let mut regs = crate::sys::ptrace::no_registers();
        (regs.rsi, regs.rdx, regs.r10) = (0, 0x1000, 0x2000);
        assert_eq!(Limit::of(CLOCK_NANOSLEEP, &regs), Some(Limit::At(0x1000)));
        assert_eq!(Limit::of(FUTEX, &regs), Some(Limit::At(0x2000)));
        regs.rsi = libc::TIMER_ABSTIME as u64;
        assert_eq!(Limit::of(CLOCK_NANOSLEEP, &regs), None);
        regs.rsi = libc::FUTEX_WAIT_BITSET as u64;
        assert_eq!(Limit::of(FUTEX, &regs), None);
        regs.rdx = u64::MAX;
        assert_eq!(Limit::of(POLL, &regs), None, "without a limit");
    }
}
