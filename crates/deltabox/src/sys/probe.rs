//! Trying kernel features out, without lasting effect.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::mm::UserfaultfdFlags;

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_PRESENT: u64 = 1 << 3;

fn check(result: i64) -> io::Result<i64> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Write tracking without a handler: `userfaultfd(2)` with `UFFD_FEATURE_WP_ASYNC` and `UFFD_FEATURE_WP_UNPOPULATED`.
pub(crate) fn write_tracking() -> io::Result<()> {
    // SAFETY: no memory is registered with it.
    let uffd = unsafe { rustix::mm::userfaultfd(user_mode_only()) }?;
    let mut api = [
        UFFD_API,
        UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED,
        0,
    ];
    // SAFETY: UFFDIO_API reads and writes a struct of three 64-bit numbers.
    check(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) }.into()).map(drop)
}

fn user_mode_only() -> UserfaultfdFlags {
    // UFFD_USER_MODE_ONLY
    UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(1)
}

/// `ioctl(PAGEMAP_SCAN)`, on one page of this process.
pub(crate) fn page_scan() -> io::Result<()> {
    #[repr(C)]
    #[derive(Default)]
    struct Region {
        start: u64,
        end: u64,
        categories: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Argument {
        size: u64,
        flags: u64,
        start: u64,
        end: u64,
        walk_end: u64,
        vec: u64,
        vec_len: u64,
        max_pages: u64,
        category_inverted: u64,
        category_mask: u64,
        category_anyof_mask: u64,
        return_mask: u64,
    }
    let pagemap = rustix::fs::open(
        "/proc/self/pagemap",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let page = rustix::param::page_size() as u64;
    let mut region = Region::default();
    let start = (&raw const region) as u64 / page * page;
    let mut argument = Argument {
        size: std::mem::size_of::<Argument>() as u64,
        start,
        end: start + page,
        vec: (&raw mut region) as u64,
        vec_len: 1,
        category_mask: PAGE_IS_PRESENT,
        return_mask: PAGE_IS_PRESENT,
        ..Argument::default()
    };
    // SAFETY: PAGEMAP_SCAN reads and writes the argument, and writes at most vec_len regions to vec.
    let found =
        check(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) }.into())?;
    if found == 1 && region.categories == PAGE_IS_PRESENT && region.end == start + page {
        Ok(())
    } else {
        Err(io::Error::other(
            "the page that was just written is not found",
        ))
    }
}

/// `PTRACE_SEIZE` of a child with `PTRACE_O_SUSPEND_SECCOMP`, which lets the engine make calls that the sandbox's
/// filter denies. The child stays traced by this thread until it ends.
pub(crate) fn seize(child: i32) -> io::Result<()> {
    const PTRACE_O_SUSPEND_SECCOMP: libc::c_ulong = 1 << 21;
    // SAFETY: PTRACE_SEIZE takes numbers.
    check(unsafe {
        libc::ptrace(
            libc::PTRACE_SEIZE,
            child,
            std::ptr::null_mut::<libc::c_void>(),
            PTRACE_O_SUSPEND_SECCOMP,
        )
    })
    .map(drop)
}

/// `kcmp(2)` of the descriptor tables of this process and a child.
pub(crate) fn compare(child: i32) -> io::Result<()> {
    const KCMP_FILES: libc::c_int = 2;
    // SAFETY: kcmp takes numbers.
    check(unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            libc::getpid(),
            child,
            KCMP_FILES,
            0_u64,
            0_u64,
        )
    })
    .map(drop)
}

/// `pidfd_getfd(2)` of descriptor 3 of a child.
pub(crate) fn take_descriptor(child: i32) -> io::Result<OwnedFd> {
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let pid = Pid::from_raw(child).ok_or(rustix::io::Errno::SRCH)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    Ok(pidfd_getfd(pidfd.as_fd(), 3, PidfdGetfdFlags::empty())?)
}
