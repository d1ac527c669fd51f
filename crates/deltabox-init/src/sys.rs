//! The system calls that rustix does not offer, or not for a process like this one, behind safe functions.
//!
//! All of them rest on this program having one thread.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// What [`fork`] returned in.
pub(crate) enum Fork {
    /// The parent, with the child's pid as the parent sees it.
    Parent(i32),
    /// The child.
    Child,
}

/// libc's own constant does not fit its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// How [`fork`] makes the child.
#[derive(Default)]
pub(crate) struct ForkOptions<'a> {
    /// `CLONE_…` flags beside the signal.
    pub(crate) flags: i32,
    /// The cgroup v2 directory that it is born in.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
    /// The pid that it gets in the pid namespace of the caller.
    pub(crate) pid: Option<i32>,
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The arguments of `clone3(2)`; `tids` must live across the call.
fn clone_args(options: &ForkOptions<'_>, tids: &Option<[i32; 1]>) -> libc::clone_args {
    // SAFETY: an all-zero clone_args is the default of every field.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = options.flags as u64;
    // A child of the caller's own parent takes over its exit signal.
    if options.flags & libc::CLONE_PARENT == 0 {
        args.exit_signal = libc::SIGCHLD as u64;
    }
    if let Some(cgroup) = options.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    if let Some(tids) = tids {
        args.set_tid = tids.as_ptr() as u64;
        args.set_tid_size = 1;
    }
    args
}

/// `clone3(2)` without shared memory.
pub(crate) fn fork(options: &ForkOptions<'_>) -> io::Result<Fork> {
    let tids = options.pid.map(|pid| [pid]);
    let args = clone_args(options, &tids);
    // SAFETY: args and tids live across the call; without CLONE_VM the child has its own copy of everything, and with
    // one thread in this program no lock can be held by another.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            std::mem::size_of::<libc::clone_args>(),
        )
    })?;
    Ok(match pid {
        0 => Fork::Child,
        pid => Fork::Parent(pid as i32),
    })
}

/// Bytes of stack of a process that [`run_beside`] makes.
const STACK: usize = 64 * 1024;

/// What a process that shares memory is to do.
struct Task<'a, T> {
    with: &'a T,
    work: fn(&T),
}

/// Makes a process that shares this one's memory, has it do `work`, and waits for its end (`CLONE_VM | CLONE_VFORK`). It has
/// descriptors, directories, namespaces and credentials of its own.
pub(crate) fn run_beside<T>(options: &ForkOptions<'_>, with: &T, work: fn(&T)) -> io::Result<()> {
    let mut stack = vec![0_u128; STACK / 16];
    let tids = options.pid.map(|pid| [pid]);
    let mut args = clone_args(options, &tids);
    args.flags |= libc::CLONE_VM as u64 | libc::CLONE_VFORK as u64;
    args.stack = stack.as_mut_ptr() as u64;
    args.stack_size = STACK as u64;
    let task = Task { with, work };
    let pid: i64;
    // SAFETY: this process is suspended until the child has ended (CLONE_VFORK), so that args, tids, task and the stack,
    // which is aligned, outlive the child's use of them. The child never returns from the call: it starts at the top of
    // its own stack and ends in exit. No handler can run in it, for this program installs none.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => pid,
            in("rdi") &raw const args,
            in("rsi") std::mem::size_of::<libc::clone_args>(),
            in("r12") &raw const task,
            in("r13") run_task::<T> as *const std::ffi::c_void,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    if pid < 0 {
        return Err(io::Error::from_raw_os_error(-pid as i32));
    }
    let mut status = 0;
    // SAFETY: status is a live integer.
    check(unsafe { libc::waitpid(pid as i32, &raw mut status, 0) }.into())?;
    match status {
        0 => Ok(()),
        // Killed before it had done its work.
        _ => Err(io::ErrorKind::Interrupted.into()),
    }
}

/// Where the process begins that [`run_beside`] makes.
extern "C" fn run_task<T>(task: *const Task<'_, T>) -> ! {
    // SAFETY: the task is the suspended parent's.
    let task = unsafe { &*task };
    (task.work)(task.with);
    exit(0)
}

/// Makes a time namespace for the children of this process.
pub(crate) fn unshare_time() -> io::Result<()> {
    const CLONE_NEWTIME: i32 = 0x80;
    // SAFETY: takes an integer.
    check(unsafe { libc::unshare(CLONE_NEWTIME) }.into()).map(drop)
}

/// Enters all namespaces of the process behind a pidfd (`setns(2)`).
pub(crate) fn enter_namespaces(process: BorrowedFd<'_>) -> io::Result<()> {
    let all = libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    // SAFETY: takes two integers.
    check(unsafe { libc::setns(process.as_raw_fd(), all) }.into()).map(drop)
}

/// Mappings from this size on are not charged to the memory that the kernel has promised: they are reservations, most of which is
/// never touched.
const RESERVATION: u64 = 1 << 30;

/// Maps private anonymous memory at addresses where nothing is mapped.
pub(crate) fn map_at(range: std::ops::Range<u64>) -> io::Result<()> {
    let len = range.end.saturating_sub(range.start);
    let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    if len >= RESERVATION {
        flags |= libc::MAP_NORESERVE;
    }
    // SAFETY: what is mapped already stays as it is (MAP_FIXED_NOREPLACE), and nothing refers to the new memory.
    let at = unsafe {
        libc::mmap(
            range.start as *mut libc::c_void,
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Maps a part of a file privately at addresses where nothing is mapped.
pub(crate) fn map_file_at(
    range: std::ops::Range<u64>,
    (file, offset): (BorrowedFd<'_>, u64),
    prot: i32,
) -> io::Result<()> {
    let len = range.end.saturating_sub(range.start);
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: what is mapped already stays as it is (MAP_FIXED_NOREPLACE), and nothing refers to the new memory.
    let at = unsafe {
        libc::mmap(
            range.start as *mut libc::c_void,
            len as usize,
            prot,
            libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE,
            file.as_raw_fd(),
            offset,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives memory other `PROT_*` bits that nothing in this program refers to.
pub(crate) fn protect(range: std::ops::Range<u64>, prot: i32) -> io::Result<()> {
    let len = range.end.saturating_sub(range.start);
    let at = range.start as *mut libc::c_void;
    // SAFETY: the supervisor names only what it has had mapped.
    check(unsafe { libc::mprotect(at, len as usize, prot) }.into()).map(drop)
}

/// Undoes mappings of memory that nothing in this program refers to.
pub(crate) fn unmap(range: std::ops::Range<u64>) -> io::Result<()> {
    let len = range.end.saturating_sub(range.start);
    // SAFETY: the supervisor names only what it has had mapped by `map_at`.
    check(unsafe { libc::munmap(range.start as *mut libc::c_void, len as usize) }.into()).map(drop)
}

/// Makes memory zeros that nothing in this program refers to.
pub(crate) fn empty(range: std::ops::Range<u64>) -> io::Result<()> {
    let len = range.end.saturating_sub(range.start);
    let at = range.start as *mut libc::c_void;
    // SAFETY: the supervisor names only what it has had mapped by `map_at`.
    check(unsafe { libc::madvise(at, len as usize, libc::MADV_DONTNEED) }.into()).map(drop)
}

/// Makes this process have pages of its own in memory that it shares with others (`MADV_POPULATE_WRITE`).
pub(crate) fn populate(range: std::ops::Range<u64>) -> io::Result<()> {
    const MADV_POPULATE_WRITE: i32 = 23;
    let len = range.end.saturating_sub(range.start);
    let at = range.start as *mut libc::c_void;
    // SAFETY: no content changes.
    check(unsafe { libc::madvise(at, len as usize, MADV_POPULATE_WRITE) }.into()).map(drop)
}

/// Makes large pages of small ones (`MADV_COLLAPSE`), without a change of what they hold.
pub(crate) fn collapse(range: std::ops::Range<u64>) -> io::Result<()> {
    const MADV_COLLAPSE: i32 = 25;
    let len = range.end.saturating_sub(range.start);
    let at = range.start as *mut libc::c_void;
    // SAFETY: no content changes.
    check(unsafe { libc::madvise(at, len as usize, MADV_COLLAPSE) }.into()).map(drop)
}

/// Ends the process without running anything at exit.
pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// The descriptor that the supervisor left at this number.
pub(crate) fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD has no memory effects; it fails if the descriptor is not open.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }.into())?;
    // SAFETY: it is open, as just tested, and nothing in this program owns it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Leaves the supervisor's mount namespace for a copy of it.
pub(crate) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: CLONE_NEWNS does not touch memory or descriptors.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into()).map(drop)
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

static CAP_HEADER: CapHeader = CapHeader {
    version: 0x2008_0522,
    pid: 0,
};

fn capabilities() -> io::Result<[CapData; 2]> {
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 of the header goes with two data structs.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw const CAP_HEADER, data.as_mut_ptr()) })?;
    Ok(data)
}

fn set_capabilities(data: &[CapData; 2]) -> io::Result<()> {
    // SAFETY: version 3 of the header goes with two data structs.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const CAP_HEADER, data.as_ptr()) })
        .map(drop)
}

/// Empties the inheritable set, so that no capability passes by way of files.
pub(crate) fn clear_inheritable() -> io::Result<()> {
    let mut caps = capabilities()?;
    for set in &mut caps {
        set.inheritable = 0;
    }
    set_capabilities(&caps)
}

/// Takes a capability out of the bounding set; `EINVAL` for one that the kernel does not know.
pub(crate) fn drop_from_bounding_set(capability: i32) -> io::Result<()> {
    // SAFETY: no memory effects.
    check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }.into()).map(drop)
}

/// Sets `no_new_privs`, for good.
pub(crate) fn set_no_new_privs() -> io::Result<()> {
    // SAFETY: no memory effects.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into()).map(drop)
}

/// Whether other processes may trace this one and look into its `/proc`.
pub(crate) fn set_dumpable(yes: bool) -> io::Result<()> {
    // SAFETY: no memory effects.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, libc::c_ulong::from(yes), 0, 0, 0) }.into())
        .map(drop)
}

/// Installs a seccomp program (`struct sock_filter`s).
pub(crate) fn install_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let fprog = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: fprog points to len instructions; the kernel only reads them.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const fprog,
        )
    })
    .map(drop)
}

/// Puts every signal back to its default action and unblocks all.
pub(crate) fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL is always valid; the calls for SIGKILL, SIGSTOP and libc's own two fail without effect.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    set_mask(libc::SIG_SETMASK, None);
}

/// Blocks one signal.
pub(crate) fn block_signal(signal: i32) {
    set_mask(libc::SIG_BLOCK, Some(signal));
}

fn set_mask(how: i32, signal: Option<i32>) {
    // SAFETY: set is initialized by sigemptyset before use.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        if let Some(signal) = signal {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::sigprocmask(how, &raw const set, std::ptr::null_mut());
    }
}

/// A descriptor that is readable while SIGCHLD is pending.
pub(crate) fn child_signals() -> io::Result<OwnedFd> {
    block_signal(libc::SIGCHLD);
    // SAFETY: set is initialized by sigemptyset; the result is a new descriptor that nothing else owns.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        let fd = check(
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK).into(),
        )?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// Marks every descriptor from `first` on close-on-exec, or closes them all.
pub(crate) fn close_from(first: u32, on_exec: bool) -> io::Result<()> {
    let flags = if on_exec {
        libc::CLOSE_RANGE_CLOEXEC
    } else {
        0
    };
    // SAFETY: closing needs no memory; callers use no owned descriptor afterwards.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) }).map(drop)
}

/// Gives the descriptor this number, open across exec.
pub(crate) fn place(fd: BorrowedFd<'_>, at: RawFd) -> io::Result<()> {
    // SAFETY: at is 0, 1 or 2, which no OwnedFd holds: the process was started with them open.
    check(unsafe { libc::dup2(fd.as_raw_fd(), at) }.into()).map(drop)
}

/// Makes standard input the controlling terminal of the session that this process leads.
pub(crate) fn take_terminal() -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes a number.
    check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }.into()).map(drop)
}

/// Supplementary groups, group and user: all three user ids, all three group ids.
pub(crate) fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: groups points to groups.len() ids; the others take numbers.
    unsafe {
        check(libc::setgroups(groups.len(), groups.as_ptr()).into())?;
        check(libc::setresgid(gid, gid, gid).into())?;
        check(libc::setresuid(uid, uid, uid).into())?;
    }
    Ok(())
}

/// `execve(2)`; returns only on failure.
pub(crate) fn execute(path: &CString, argv: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter()
            .map(|s| s.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: both arrays end with a null pointer and point to strings that outlive the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Brings the loopback interface up.
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: an all-zero ifreq is valid; the name is shorter than its field and stays terminated.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: SIOCSIFFLAGS reads the ifreq.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into())
        .map(drop)
}

/// Sends a signal to a process group other than this process's own.
pub(crate) fn signal_group(group: i32, signal: i32) -> io::Result<()> {
    if group <= 1 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: no memory effects.
    check(unsafe { libc::kill(-group, signal) }.into()).map(drop)
}

/// Waits for signals, for ever.
pub(crate) fn pause_for_ever() -> ! {
    loop {
        // SAFETY: no memory effects.
        unsafe { libc::pause() };
    }
}

/// A child that has ended and is still to be waited for: its number and wait status.
pub(crate) fn dead_child() -> io::Result<Option<(i32, i32)>> {
    // SAFETY: the structure is plain data, for which all zeros are a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` is live and writable.
    check(unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, flags) }.into())?;
    // SAFETY: both fields are there in what waitid writes; without a dead child they are left zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    let status = match info.si_code {
        libc::CLD_EXITED => (status & 0xff) << 8,
        libc::CLD_DUMPED => status | 0x80,
        _ => status,
    };
    Ok((pid != 0).then_some((pid, status)))
}

/// Takes note of a dead child's end, so that its number is free.
pub(crate) fn reap(pid: i32) -> io::Result<()> {
    // SAFETY: the status may be left out.
    check(unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) }.into()).map(drop)
}
