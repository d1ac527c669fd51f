//! System calls that the freeze interrupted: the program must not be able to tell.
//!
//! Most calls restart by themselves: the kernel leaves `-ERESTART…` in the result, and goes back to the
//! call when the thread runs again. Some never do (signal(7): `epoll_wait`, `semop`, reads with a
//! time limit …) and would return `EINTR`, which without a signal the program would not have seen.
//! Those are sent back to the call here, waiting calls with the time that is left.

use std::time::{Duration, Instant};

use crate::sys::ptrace::Registers;

const EINTR: u64 = -(libc::EINTR as i64) as u64;
/// The kernel restarts these through a note in the thread, which a rebuilt thread does not have.
const ERESTART_RESTARTBLOCK: u64 = -516_i64 as u64;
/// Length of the `syscall` instruction.
const INSTRUCTION: u64 = 2;
/// Going back to sleep, being frozen and being traced switch the thread away once each.
const SWITCHES_OF_ONE_WAIT: u64 = 3;

/// A wait with a time limit that was interrupted before, to know it again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait {
    at: (u64, u64),
    timeout: u64,
    deadline: Instant,
    switches: u64,
}

/// Whether a thread stands at a call that would return `EINTR` although it got no signal.
/// `signalled` says that a signal waits to be delivered: then the `EINTR` is rightful.
pub(crate) fn is_interrupted(regs: &Registers, signalled: bool) -> bool {
    let in_call = (regs.orig_rax as i64) >= 0;
    // close(2) has closed the descriptor even when it reports EINTR.
    in_call && regs.rax == EINTR && !signalled && regs.orig_rax != libc::SYS_close as u64
}

/// Sends a thread back to the system call that it was taken out of.
pub(crate) fn restart(regs: &mut Registers) {
    regs.rip = regs.rip.wrapping_sub(INSTRUCTION);
    regs.rax = regs.orig_rax;
    regs.orig_rax = u64::MAX;
}

/// Makes registers that a thread was stopped with fit for a thread that has not just been in that
/// call: what the kernel noted of the call lives in the thread, not in the registers.
pub(crate) fn detach_from_call(regs: &mut Registers) {
    if (regs.orig_rax as i64) >= 0 && regs.rax == ERESTART_RESTARTBLOCK {
        restart(regs);
    }
}

/// Whether the call that the thread is sent back to has a time limit in a register.
pub(crate) fn is_timed(nr: u64, regs: &Registers) -> bool {
    let timed = [libc::SYS_epoll_wait as u64, libc::SYS_epoll_pwait as u64];
    timed.contains(&nr) && (1..=i32::MAX as u64).contains(&(regs.r10 & 0xffff_ffff))
}

/// Lowers the time limit of an `epoll_wait` by what has passed of it. `before` is the wait that
/// the thread was found in last time, `switches` how often it has been switched away so far.
pub(crate) fn shorten(
    regs: &mut Registers,
    before: Option<Wait>,
    switches: u64,
    now: Instant,
) -> Wait {
    let timeout = regs.r10 & 0xffff_ffff;
    let at = (regs.rip, regs.rsp);
    let same = before.filter(|w| {
        w.at == at
            && w.timeout == timeout
            && switches.wrapping_sub(w.switches) <= SWITCHES_OF_ONE_WAIT
    });
    let deadline = same.map_or_else(|| now + Duration::from_millis(timeout), |w| w.deadline);
    let left = deadline.saturating_duration_since(now);
    // Rounded up: never to return too early.
    let left = left.as_nanos().div_ceil(1_000_000) as u64;
    regs.r10 = left;
    Wait {
        at,
        timeout: left,
        deadline,
        switches,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(orig_rax: i64, rax: i64) -> Registers {
        let mut regs = crate::sys::ptrace::no_registers();
        regs.orig_rax = orig_rax as u64;
        regs.rax = rax as u64;
        regs.rip = 0x1002;
        regs
    }

    #[test]
    fn eintr_without_a_signal_is_undone() {
        let mut regs = registers(libc::SYS_epoll_wait, -i64::from(libc::EINTR));
        assert!(is_interrupted(&regs, false));
        assert!(!is_interrupted(&regs, true));
        restart(&mut regs);
        assert_eq!((regs.rip, regs.rax as i64), (0x1000, libc::SYS_epoll_wait));
        assert!(!is_interrupted(&registers(libc::SYS_close, -4), false));
        assert!(
            !is_interrupted(&registers(-1, -4), false),
            "a program's own -4 is no EINTR"
        );
    }

    #[test]
    fn a_wait_that_is_interrupted_again_and_again_ends_in_time() {
        let start = Instant::now();
        let mut regs = registers(-1, 0);
        regs.r10 = 1000;
        let first = shorten(&mut regs, None, 10, start);
        assert_eq!(regs.r10, 1000);
        let second = shorten(
            &mut regs,
            Some(first),
            13,
            start + Duration::from_millis(400),
        );
        assert_eq!(regs.r10, 600);
        shorten(
            &mut regs,
            Some(second),
            16,
            start + Duration::from_millis(1700),
        );
        assert_eq!(regs.r10, 0);
    }

    #[test]
    fn a_new_wait_that_looks_alike_gets_its_full_time() {
        let start = Instant::now();
        let mut regs = registers(-1, 0);
        regs.r10 = 1000;
        let first = shorten(&mut regs, None, 10, start);
        shorten(
            &mut regs,
            Some(first),
            14,
            start + Duration::from_millis(400),
        );
        assert_eq!(regs.r10, 1000);
    }
}
