//! System calls that the freeze interrupted: the program must not be able to tell.
//!
//! Most calls restart by themselves: the kernel leaves `-ERESTART…` in the result, and goes back to the
//! call when the thread runs again. Some never do (signal(7): `epoll_wait`, `semop`, reads with a
//! time limit …) and would return `EINTR`, which without a signal the program would not have seen.
//! Those are sent back to the call here. What calls with a time limit need besides is in [`crate::waits`].

use crate::sys::ptrace::Registers;

const EINTR: u64 = -(libc::EINTR as i64) as u64;
/// The kernel restarts these through a note in the thread, which a rebuilt thread does not have.
const ERESTART_RESTARTBLOCK: u64 = -516_i64 as u64;
/// What the kernel may leave as the result of a call that is to begin again: `-ERESTARTSYS` and the two after it.
const ERESTARTS: std::ops::RangeInclusive<u64> = -514_i64 as u64..=-512_i64 as u64;
/// Length of the `syscall` instruction.
const INSTRUCTION: u64 = 2;
/// In no system call.
const NONE: u64 = u64::MAX;

fn in_call(regs: &Registers) -> bool {
    (regs.orig_rax as i64) >= 0
}

/// Whether a thread stands at a call that would return `EINTR` although it got no signal.
/// `signalled` says that a signal waits to be delivered: then the `EINTR` is rightful.
pub(crate) fn is_interrupted(regs: &Registers, signalled: bool) -> bool {
    // close(2) has closed the descriptor even when it reports EINTR.
    let nr = regs.orig_rax as i32;
    in_call(regs) && regs.rax == EINTR && !signalled && i64::from(nr) != libc::SYS_close
}

/// Whether the kernel will go on with the call by its note in the thread.
pub(crate) fn has_note(regs: &Registers) -> bool {
    in_call(regs) && regs.rax == ERESTART_RESTARTBLOCK
}

/// The registers that a thread has had before the kernel sent it back to its call, which is `nr` unless they tell.
pub(crate) fn as_with_note(regs: &Registers, nr: u64) -> Registers {
    let mut regs = *regs;
    regs.rip = regs.rip.wrapping_add(INSTRUCTION);
    if !in_call(&regs) {
        regs.orig_rax = nr;
    }
    regs.rax = ERESTART_RESTARTBLOCK;
    regs
}

/// Sends a thread back to the system call that it was taken out of.
pub(crate) fn restart(regs: &mut Registers) {
    regs.rip = regs.rip.wrapping_sub(INSTRUCTION);
    regs.rax = regs.orig_rax;
    regs.orig_rax = NONE;
}

/// Makes a call end with a result.
pub(crate) fn end(regs: &mut Registers, result: u64) {
    regs.rax = result;
    regs.orig_rax = NONE;
}

/// Makes a call look like one that never restarts.
pub(crate) fn interrupt(regs: &mut Registers) {
    regs.rax = EINTR;
}

/// Makes a call end as one that a signal has interrupted.
pub(crate) fn end_interrupted(regs: &mut Registers) {
    end(regs, EINTR);
}

/// What a call has left that was interrupted as soon as it had begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begun {
    /// The kernel's note, by which it goes on.
    Note,
    /// Nothing: it is to begin again.
    Nothing,
    /// Its result: it did not have to wait.
    Result(u64),
}

impl Begun {
    pub(crate) fn of(regs: &Registers) -> Self {
        match regs.rax {
            ERESTART_RESTARTBLOCK => Self::Note,
            EINTR => Self::Nothing,
            result if ERESTARTS.contains(&result) => Self::Nothing,
            result => Self::Result(result),
        }
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
    fn what_a_call_has_left_is_told_by_its_result() {
        let begun = |rax| Begun::of(&registers(libc::SYS_poll, rax));
        assert_eq!(begun(-516), Begun::Note);
        for restarts in [-512, -513, -514, -4] {
            assert_eq!(begun(restarts), Begun::Nothing);
        }
        assert_eq!(begun(-11), Begun::Result(-11_i64 as u64));
        assert_eq!(begun(3), Begun::Result(3));
    }
}
