//! Calls on other processes that are not `ptrace`.

use std::cmp::Ordering;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::ids::HostPid;

fn owned(fd: i64) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A handle of a process that stays right when its number is used again.
pub(crate) fn pidfd_open(pid: HostPid) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, 0) })
}

/// A duplicate of another process' descriptor.
pub(crate) fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes three integers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })
}

/// What `clone(2)` lets processes have together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// `CLONE_VM`.
    Memory = 1,
    /// `CLONE_FILES`.
    Descriptors = 2,
}

/// The order of what two processes have by `kcmp(2)`: equal if they share it, else arbitrary but the same for as long as both live.
pub(crate) fn compare(share: Share, a: HostPid, b: HostPid) -> io::Result<Ordering> {
    // SAFETY: kcmp with KCMP_VM or KCMP_FILES, which have these numbers, takes integers only and changes nothing.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, share as libc::c_int, 0, 0) };
    match order {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        3 => Err(io::ErrorKind::Unsupported.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends a signal by handle.
pub(crate) fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: takes integers; a null siginfo is allowed.
    let r = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<u8>(),
            0,
        )
    };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// `_LINUX_CAPABILITY_VERSION_3`, which has two words for each set.
pub(crate) const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityWord {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The inheritable capabilities of a process, as bits.
pub(crate) fn inheritable(pid: HostPid) -> io::Result<u64> {
    let header = CapabilityHeader {
        version: CAPABILITY_VERSION,
        pid: pid.0,
    };
    let mut words = [CapabilityWord::default(); 2];
    // SAFETY: both have the layout that the kernel defines for this version.
    done(unsafe { libc::syscall(libc::SYS_capget, &raw const header, words.as_mut_ptr()) })?;
    let [low, high] = words.map(|word| u64::from(word.inheritable));
    Ok(low | high << 32)
}

/// Leaves the calling thread only these capabilities, for good.
pub(crate) fn keep_capabilities(kept: u64) -> io::Result<()> {
    let header = CapabilityHeader {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    let words = [kept as u32, (kept >> 32) as u32].map(|word| CapabilityWord {
        effective: word,
        permitted: word,
        inheritable: 0,
    });
    // SAFETY: both have the layout that the kernel defines for this version. The raw call concerns this thread only.
    done(unsafe { libc::syscall(libc::SYS_capset, &raw const header, words.as_ptr()) })
}

/// Takes the calling thread into a namespace, for good.
pub(crate) fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: setns takes integers only; no namespace has a bearing on memory.
    done(unsafe { libc::syscall(libc::SYS_setns, namespace.as_raw_fd(), 0) })
}

/// Sends a signal to one thread of a process.
pub(crate) fn thread_signal(pid: HostPid, tid: HostPid, signal: i32) -> io::Result<()> {
    // SAFETY: takes three integers.
    done(unsafe { libc::syscall(libc::SYS_tgkill, pid.0, tid.0, signal) })
}

/// Has the calling thread's short sleeps end in time (the kernel's default lets them last 50 µs longer).
pub(crate) fn sleep_precisely() {
    // SAFETY: takes integers. It cannot fail with a positive slack.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64) };
}

/// Reads memory of a process; all or an error.
pub(crate) fn read_memory(pid: HostPid, address: u64, into: &mut [u8]) -> io::Result<()> {
    let want = into.len();
    let local = [IoSliceMut::new(into)];
    let remote = libc::iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: want,
    };
    // SAFETY: an IoSliceMut is an iovec of memory that we may write; the kernel checks the
    // other process' side.
    let n =
        unsafe { libc::process_vm_readv(pid.0, local.as_ptr().cast(), 1, &raw const remote, 1, 0) };
    whole(n, want)
}

/// Writes memory of a process that it could write itself; all or an error.
pub(crate) fn write_memory(pid: HostPid, address: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
    let want = parts.iter().map(|p| p.len()).sum();
    let remote = libc::iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: want,
    };
    // SAFETY: an IoSlice is an iovec of memory that we may read; the kernel checks the other
    // process' side.
    let n = unsafe {
        libc::process_vm_writev(
            pid.0,
            parts.as_ptr().cast(),
            parts.len() as libc::c_ulong,
            &raw const remote,
            1,
            0,
        )
    };
    whole(n, want)
}

fn whole(n: isize, want: usize) -> io::Result<()> {
    match n {
        -1 => Err(io::Error::last_os_error()),
        n if n as usize == want => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}

/// Head and size of a thread's list of robust futexes.
pub(crate) fn robust_list(tid: HostPid) -> io::Result<(u64, u64)> {
    let (mut head, mut len) = (0_u64, 0_u64);
    // SAFETY: both pointers are to live integers.
    let r = unsafe {
        libc::syscall(
            libc::SYS_get_robust_list,
            tid.0,
            &raw mut head,
            &raw mut len,
        )
    };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok((head, len))
    }
}

/// The address of a `syscall` instruction in the vDSO, relative to its start. The vDSO is the
/// same in every 64-bit process of one kernel.
pub(crate) fn vdso_syscall_offset() -> Option<u64> {
    // SAFETY: getauxval reads a table of our own process.
    let base = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    if base == 0 {
        return None;
    }
    // SAFETY: the kernel maps the vDSO readable for the life of the process; it begins with an ELF
    // header, whose first program header tells how much of it is mapped.
    let image = unsafe {
        let header = &*(base as *const libc::Elf64_Ehdr);
        let load = &*((base + header.e_phoff) as *const libc::Elf64_Phdr);
        std::slice::from_raw_parts(base as *const u8, load.p_memsz as usize)
    };
    image
        .windows(2)
        .position(|w| w == SYSCALL)
        .map(|at| at as u64)
}

/// The `syscall` instruction.
pub(crate) const SYSCALL: [u8; 2] = [0x0f, 0x05];

std::arch::global_asm!(
    // Runs the records of a batch (see remote::batch): rbx points to the first, r12 counts them.
    // Touches neither stack nor any register that the caller would not restore.
    ".pushsection .rodata",
    ".globl deltacr_stub_begin",
    ".globl deltacr_stub_end",
    ".hidden deltacr_stub_begin",
    ".hidden deltacr_stub_end",
    "deltacr_stub_begin:",
    "2:",
    "test r12, r12",
    "jz 9f",
    "mov rax, [rbx]",
    // An argument of kind 0 is a number, of kind 1 the address of a long, of kind 2 of an int.
    "mov rdi, [rbx + 16]",
    "cmp byte ptr [rbx + 8], 1",
    "jb 4f",
    "je 3f",
    "movsxd rdi, dword ptr [rdi]",
    "jmp 4f",
    "3: mov rdi, [rdi]",
    "4: mov rsi, [rbx + 24]",
    "cmp byte ptr [rbx + 9], 1",
    "jb 4f",
    "je 3f",
    "movsxd rsi, dword ptr [rsi]",
    "jmp 4f",
    "3: mov rsi, [rsi]",
    "4: mov rdx, [rbx + 32]",
    "cmp byte ptr [rbx + 10], 1",
    "jb 4f",
    "je 3f",
    "movsxd rdx, dword ptr [rdx]",
    "jmp 4f",
    "3: mov rdx, [rdx]",
    "4: mov r10, [rbx + 40]",
    "cmp byte ptr [rbx + 11], 1",
    "jb 4f",
    "je 3f",
    "movsxd r10, dword ptr [r10]",
    "jmp 4f",
    "3: mov r10, [r10]",
    "4: mov r8, [rbx + 48]",
    "cmp byte ptr [rbx + 12], 1",
    "jb 4f",
    "je 3f",
    "movsxd r8, dword ptr [r8]",
    "jmp 4f",
    "3: mov r8, [r8]",
    "4: mov r9, [rbx + 56]",
    "cmp byte ptr [rbx + 13], 1",
    "jb 4f",
    "je 3f",
    "movsxd r9, dword ptr [r9]",
    "jmp 4f",
    "3: mov r9, [r9]",
    "4: syscall",
    "mov [rbx + 64], rax",
    "test byte ptr [rbx + 72], 1",
    "jz 8f",
    "cmp rax, -4095",
    "jae 9f",
    "8: add rbx, 80",
    "dec r12",
    "jmp 2b",
    "9: int3",
    "deltacr_stub_end:",
    ".popsection",
);

unsafe extern "C" {
    static deltacr_stub_begin: u8;
    static deltacr_stub_end: u8;
}

/// The position-independent code that runs a batch. It ends with `int3`.
pub(crate) fn stub() -> &'static [u8] {
    // SAFETY: both symbols are defined by the assembly above, in this order, in one section of
    // read-only data.
    unsafe {
        let begin = &raw const deltacr_stub_begin;
        let end = &raw const deltacr_stub_end;
        std::slice::from_raw_parts(begin, end.offset_from(begin) as usize)
    }
}

/// A process' soft and hard limit of a resource.
pub(crate) fn limit(pid: HostPid, resource: u32) -> io::Result<[u64; 2]> {
    let mut limit = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure for the old limit is live; no new one is given.
    let r = unsafe { libc::prlimit64(pid.0, resource, std::ptr::null(), &raw mut limit) };
    done(r.into())?;
    Ok([limit.rlim_cur, limit.rlim_max])
}

/// Sets a process' soft and hard limit of a resource.
pub(crate) fn set_limit(pid: HostPid, resource: u32, limit: [u64; 2]) -> io::Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: limit[0],
        rlim_max: limit[1],
    };
    // SAFETY: the new limit is a live structure; the old one is not asked for.
    let r = unsafe { libc::prlimit64(pid.0, resource, &raw const limit, std::ptr::null_mut()) };
    done(r.into())
}

fn done(r: i64) -> io::Result<()> {
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Sets a thread's scheduling policy and priorities (`struct sched_attr`).
pub(crate) fn set_scheduling(tid: HostPid, attributes: &[u8]) -> io::Result<()> {
    // SAFETY: the structure begins with its size, which the kernel wrote itself when it was read.
    done(unsafe { libc::syscall(libc::SYS_sched_setattr, tid.0, attributes.as_ptr(), 0) })
}

/// Sets the processors that a thread may run on.
pub(crate) fn set_affinity(tid: HostPid, mask: &[u8]) -> io::Result<()> {
    // SAFETY: pointer and length are those of a live slice.
    done(unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            tid.0,
            mask.len(),
            mask.as_ptr(),
        )
    })
}

/// Sets a thread's I/O class and priority.
pub(crate) fn set_io_priority(tid: HostPid, priority: u64) -> io::Result<()> {
    const WHO_PROCESS: i32 = 1;
    // SAFETY: takes three integers.
    done(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, tid.0, priority) })
}
