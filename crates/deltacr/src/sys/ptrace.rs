//! `ptrace(2)`, one safe function a request.
//!
//! Every request must come from the thread that seized the tracee; the kernel answers `ESRCH` to
//! any other, so a mistake here is an error and not undefined behaviour.

use std::io;
use std::mem;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::ids::HostPid;

/// What a tracee does without telling: it forks and execs, which the engine must see, and its
/// seccomp filter must not judge the calls that the engine makes it run (needs `CAP_SYS_ADMIN`).
const OPTIONS: libc::c_int = libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_SUSPEND_SECCOMP;

const NT_X86_XSTATE: usize = 0x202;
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
/// More than the largest state a processor has today (AMX: 11 KiB).
const XSTATE_MAX: usize = 16 * 1024;
const PEEKSIGINFO_SHARED: u32 = 1;
/// How many queued signals are read in one go.
const SIGINFO_BATCH: usize = 32;

/// General registers, as `PTRACE_GETREGS` gives them.
pub(crate) type Registers = libc::user_regs_struct;

/// A `siginfo_t` as bytes.
pub(crate) type RawSiginfo = [u8; 128];

fn request(op: libc::c_uint, tid: HostPid, addr: usize, data: usize) -> io::Result<i64> {
    // SAFETY: callers pass as `data` (and `addr`) either plain numbers or pointers to memory that lives
    // and is large enough for what this request reads or writes.
    let r = unsafe { libc::ptrace(op, tid.0, addr, data) };
    if r == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r)
    }
}

/// Attaches without stopping (`PTRACE_SEIZE`).
pub(crate) fn seize(tid: HostPid) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, OPTIONS as usize).map(drop)
}

/// The same for a thread that runs: nothing that it still does stops it. When it has stopped, [`set_options`] makes up for
/// that.
pub(crate) fn seize_plainly(tid: HostPid) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, 0).map(drop)
}

/// Has a tracee that stands still be traced like one of [`seize`].
pub(crate) fn set_options(tid: HostPid) -> io::Result<()> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, OPTIONS as usize).map(drop)
}

/// Asks for a stop, which [`wait`] then reports.
pub(crate) fn interrupt(tid: HostPid) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped tracee run on.
pub(crate) fn resume(tid: HostPid) -> io::Result<()> {
    resume_with(tid, 0)
}

/// The same, and lets it have the signal that it stopped for.
pub(crate) fn resume_with(tid: HostPid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// Lets a stopped tracee run one instruction.
pub(crate) fn step(tid: HostPid) -> io::Result<()> {
    request(libc::PTRACE_SINGLESTEP, tid, 0, 0).map(drop)
}

/// Lets a stopped tracee run until it enters or leaves a system call.
pub(crate) fn to_system_call(tid: HostPid) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

/// Lets a stopped tracee go for good.
pub(crate) fn detach(tid: HostPid) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, 0).map(drop)
}

/// Registers that are all zero.
pub(crate) fn no_registers() -> Registers {
    // SAFETY: the structure is integers only, for which zero is a value.
    unsafe { mem::zeroed() }
}

/// Reads the general registers.
pub(crate) fn registers(tid: HostPid) -> io::Result<Registers> {
    let mut regs = no_registers();
    request(libc::PTRACE_GETREGS, tid, 0, &raw mut regs as usize)?;
    Ok(regs)
}

/// Writes the general registers.
pub(crate) fn set_registers(tid: HostPid, regs: &Registers) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, tid, 0, &raw const *regs as usize).map(drop)
}

/// Reads the extended state (x87, SSE, AVX, PKRU, AMX), in the processor's XSAVE layout.
pub(crate) fn xstate(tid: HostPid) -> io::Result<Vec<u8>> {
    // The same for all threads.
    static LEN: OnceLock<usize> = OnceLock::new();
    let mut bytes = vec![0; LEN.get().copied().unwrap_or(XSTATE_MAX)];
    let mut iov = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    request(
        libc::PTRACE_GETREGSET,
        tid,
        NT_X86_XSTATE,
        &raw mut iov as usize,
    )?;
    let len = LEN.get_or_init(|| iov.iov_len);
    bytes.truncate(*len);
    Ok(bytes)
}

/// Writes the extended state.
pub(crate) fn set_xstate(tid: HostPid, bytes: &[u8]) -> io::Result<()> {
    let iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    request(
        libc::PTRACE_SETREGSET,
        tid,
        NT_X86_XSTATE,
        &raw const iov as usize,
    )
    .map(drop)
}

/// Reads the mask of blocked signals: bit n-1 for signal n.
pub(crate) fn signal_mask(tid: HostPid) -> io::Result<u64> {
    let mut mask = 0_u64;
    request(libc::PTRACE_GETSIGMASK, tid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

/// Writes the mask of blocked signals.
pub(crate) fn set_signal_mask(tid: HostPid, mask: u64) -> io::Result<()> {
    request(libc::PTRACE_SETSIGMASK, tid, 8, &raw const mask as usize).map(drop)
}

/// What the kernel tells of the signal that a tracee stopped for.
pub(crate) fn siginfo(tid: HostPid) -> io::Result<RawSiginfo> {
    let mut info = [0_u8; 128];
    request(libc::PTRACE_GETSIGINFO, tid, 0, info.as_mut_ptr() as usize)?;
    Ok(info)
}

/// The queued signals of the thread, or of its process, without taking them off the queue.
pub(crate) fn queued_signals(tid: HostPid, shared: bool) -> io::Result<Vec<RawSiginfo>> {
    #[repr(C)]
    struct Args {
        off: u64,
        flags: u32,
        nr: i32,
    }
    let mut all = Vec::new();
    loop {
        let args = Args {
            off: all.len() as u64,
            flags: if shared { PEEKSIGINFO_SHARED } else { 0 },
            nr: SIGINFO_BATCH as i32,
        };
        let mut infos = [[0_u8; 128]; SIGINFO_BATCH];
        let n = request(
            libc::PTRACE_PEEKSIGINFO,
            tid,
            &raw const args as usize,
            infos.as_mut_ptr() as usize,
        )? as usize;
        all.extend_from_slice(&infos[..n]);
        if n < SIGINFO_BATCH {
            return Ok(all);
        }
    }
}

/// A seccomp filter of a thread (`struct sock_filter` for `struct sock_filter`), counted from the oldest on; `None` if it has
/// no such.
///
/// # Errors
/// Besides the usual ones: the caller is under a filter itself, or the kernel cannot tell (`CONFIG_CHECKPOINT_RESTORE`).
pub(crate) fn seccomp_filter(tid: HostPid, index: usize) -> io::Result<Option<Vec<u8>>> {
    let count = match request(PTRACE_SECCOMP_GET_FILTER, tid, index, 0) {
        Ok(count) => count as usize,
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut program = vec![0; count * size_of::<libc::sock_filter>()];
    let at = program.as_mut_ptr() as usize;
    request(PTRACE_SECCOMP_GET_FILTER, tid, index, at)?;
    Ok(Some(program))
}

/// The restartable-sequence area that a thread registered.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RseqConfig {
    pub(crate) address: u64,
    pub(crate) size: u32,
    pub(crate) signature: u32,
    pub(crate) flags: u32,
    pad: u32,
}

/// Reads where a thread's restartable-sequence area is.
pub(crate) fn rseq(tid: HostPid) -> io::Result<RseqConfig> {
    let mut config = RseqConfig::default();
    request(
        PTRACE_GET_RSEQ_CONFIGURATION,
        tid,
        mem::size_of::<RseqConfig>(),
        &raw mut config as usize,
    )?;
    Ok(config)
}

/// The number that goes with the event that a tracee stopped for: the pid of a new child.
pub(crate) fn event_message(tid: HostPid) -> io::Result<u64> {
    let mut message: libc::c_ulong = 0;
    request(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut message as usize)?;
    Ok(message)
}

/// Why a tracee stopped, or that it is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// On its way to receive this signal.
    Signal(i32),
    /// At the entry or exit of a system call, after [`to_system_call`].
    SystemCall,
    /// By [`interrupt`], or as a new-born tracee.
    Interrupted,
    /// The same, but its process is stopped besides, by this signal.
    GroupStopped(i32),
    /// It had a child: after `fork`, `vfork` or `clone`.
    Born,
    /// It runs a new program.
    Executed,
    /// It is dead; the wait status tells how.
    Gone(i32),
}

/// Waits for the next stop of one tracee. `None` if `patient` is not set and there is none yet.
pub(crate) fn wait(tid: HostPid, patient: bool) -> io::Result<Option<Stop>> {
    let flags = libc::__WALL | if patient { 0 } else { libc::WNOHANG };
    let mut status = 0;
    let got = loop {
        // SAFETY: `status` is a live integer.
        let r = unsafe { libc::waitpid(tid.0, &raw mut status, flags) };
        let e = io::Error::last_os_error();
        if r >= 0 {
            break r;
        }
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    };
    if got == 0 {
        return Ok(None);
    }
    if !libc::WIFSTOPPED(status) {
        return Ok(Some(Stop::Gone(status)));
    }
    Ok(Some(match status >> 16 {
        0 if libc::WSTOPSIG(status) == libc::SIGTRAP | 0x80 => Stop::SystemCall,
        0 => Stop::Signal(libc::WSTOPSIG(status)),
        libc::PTRACE_EVENT_EXEC => Stop::Executed,
        libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE => Stop::Born,
        _ if libc::WSTOPSIG(status) == libc::SIGTRAP => Stop::Interrupted,
        _ => Stop::GroupStopped(libc::WSTOPSIG(status)),
    }))
}

/// Takes note of the end of every tracee of the calling thread that has ended; lets those that stop on the way
/// there go on. Tells whether there are others.
pub(crate) fn reap_tracees() -> io::Result<bool> {
    loop {
        let mut status = 0;
        // __WNOTHREAD keeps other threads' tracees and children out of it.
        let flags = libc::__WALL | libc::__WNOTHREAD | libc::WNOHANG;
        // SAFETY: `status` is a live integer.
        let got = unsafe { libc::waitpid(-1, &raw mut status, flags) };
        if got == 0 {
            return Ok(true);
        }
        if got < 0 {
            let e = io::Error::last_os_error();
            return if e.raw_os_error() == Some(libc::ECHILD) {
                Ok(false)
            } else {
                Err(e)
            };
        }
        if libc::WIFSTOPPED(status) {
            // It is being killed; if it is gone already, so much the better.
            let _ = resume(HostPid(got));
        }
    }
}
