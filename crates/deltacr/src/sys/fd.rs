//! System calls on open files that have no safe wrapper elsewhere.

use std::cmp::Ordering;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::ids::HostPid;

const KCMP_FILE: libc::c_long = 0;

/// The kernel's `struct termios2`, opaque to us.
pub(crate) type RawTermios = [u8; 44];

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The order of two slots' open files by `kcmp(2)`: equal if it is the same one, else arbitrary but
/// the same for as long as both are open.
pub(crate) fn compare_files(a: (HostPid, i32), b: (HostPid, i32)) -> io::Result<Ordering> {
    // SAFETY: kcmp with KCMP_FILE takes integers only and changes nothing.
    let order = check(unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            libc::c_long::from(a.0.0),
            libc::c_long::from(b.0.0),
            KCMP_FILE,
            libc::c_long::from(a.1),
            libc::c_long::from(b.1),
        )
    })?;
    match order {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Whether an epoll watches this file of some process under the number `fd` (`KCMP_EPOLL_TFD`). `nth` tells registrations
/// with the same number apart.
pub(crate) fn epoll_watches(
    file: (HostPid, i32),
    (owner, epfd): (HostPid, i32),
    fd: i32,
    nth: usize,
) -> io::Result<bool> {
    const KCMP_EPOLL_TFD: libc::c_long = 7;
    let slot = [epfd, fd, i32::try_from(nth).unwrap_or(i32::MAX)];
    // SAFETY: the kernel reads one kcmp_epoll_slot, three 32-bit numbers, which `slot` is.
    let order = check(unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            libc::c_long::from(file.0.0),
            libc::c_long::from(owner.0),
            KCMP_EPOLL_TFD,
            libc::c_long::from(file.1),
            slot.as_ptr(),
        )
    })?;
    Ok(order == 0)
}

/// The line settings of a terminal (`TCGETS2`).
pub(crate) fn termios(tty: BorrowedFd<'_>) -> io::Result<RawTermios> {
    let mut raw = [0; 44];
    // SAFETY: TCGETS2 writes one termios2, 44 bytes, which `raw` has.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TCGETS2, raw.as_mut_ptr()) }.into())?;
    Ok(raw)
}

/// Sets the line settings at once (`TCSETS2`). Any bytes are valid settings for the kernel.
pub(crate) fn set_termios(tty: BorrowedFd<'_>, raw: &RawTermios) -> io::Result<()> {
    // SAFETY: TCSETS2 reads one termios2, 44 bytes, which `raw` has.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TCSETS2, raw.as_ptr()) }.into())?;
    Ok(())
}

fn int_ioctl(fd: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<i32> {
    let mut value: libc::c_int = 0;
    // SAFETY: callers name requests that write one int, which `value` is.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) }.into())?;
    Ok(value)
}

/// The number of a pseudo-terminal, from its master (`TIOCGPTN`).
pub(crate) fn pty_number(master: BorrowedFd<'_>) -> io::Result<u32> {
    int_ioctl(master, libc::TIOCGPTN).map(|n| n as u32)
}

/// Major and minor number of the terminal that a file is (`TIOCGDEV`), also of one that was opened as `/dev/tty`.
pub(crate) fn terminal_device(tty: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    const TIOCGDEV: libc::Ioctl = 0x8004_5432;
    let device = int_ioctl(tty, TIOCGDEV)? as u32;
    // The kernel's own encoding.
    Ok((device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xf_ff00))
}

/// Bytes that wait to be read (`FIONREAD`).
pub(crate) fn readable(fd: BorrowedFd<'_>) -> io::Result<usize> {
    int_ioctl(fd, libc::FIONREAD).map(|n| usize::try_from(n).unwrap_or(0))
}

/// Locks or unlocks the slave side of a pseudo-terminal (`TIOCSPTLCK`).
pub(crate) fn lock_pty(master: BorrowedFd<'_>, locked: bool) -> io::Result<()> {
    let value = libc::c_int::from(locked);
    // SAFETY: TIOCSPTLCK reads one int, which `value` is.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const value) }.into())?;
    Ok(())
}

/// Whether the slave side of a pseudo-terminal is locked, from its master (`TIOCGPTLCK`).
pub(crate) fn pty_is_locked(master: BorrowedFd<'_>) -> io::Result<bool> {
    int_ioctl(master, libc::TIOCGPTLCK).map(|locked| locked != 0)
}

/// Whether reads of a master tell what else has happened (`TIOCGPKT`).
pub(crate) fn in_packet_mode(master: BorrowedFd<'_>) -> io::Result<bool> {
    int_ioctl(master, libc::TIOCGPKT).map(|packets| packets != 0)
}

/// Makes reads of a master tell what else has happened, or not (`TIOCPKT`).
pub(crate) fn set_packet_mode(master: BorrowedFd<'_>, packets: bool) -> io::Result<()> {
    let value = libc::c_int::from(packets);
    // SAFETY: TIOCPKT reads one int, which `value` is.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCPKT, &raw const value) }.into())?;
    Ok(())
}

/// Whether a terminal may not be opened any more (`TIOCGEXCL`).
pub(crate) fn is_exclusive(tty: BorrowedFd<'_>) -> io::Result<bool> {
    int_ioctl(tty, libc::TIOCGEXCL).map(|exclusive| exclusive != 0)
}

/// Forbids or allows that a terminal is opened (`TIOCEXCL`, `TIOCNXCL`).
pub(crate) fn set_exclusive(tty: BorrowedFd<'_>, exclusive: bool) -> io::Result<()> {
    let request = match exclusive {
        true => libc::TIOCEXCL,
        false => libc::TIOCNXCL,
    };
    // SAFETY: neither request takes an argument.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), request) }.into())?;
    Ok(())
}

/// Has a terminal take a byte as if it had come from the other side (`TIOCSTI`).
pub(crate) fn pretend_input(tty: BorrowedFd<'_>, byte: u8) -> io::Result<()> {
    // SAFETY: TIOCSTI reads one byte, which `byte` is.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCSTI, &raw const byte) }.into())?;
    Ok(())
}

/// Sets the ticks that a timerfd has to tell of (`TFD_IOC_SET_TICKS`); not zero.
pub(crate) fn set_timer_ticks(timer: BorrowedFd<'_>, ticks: u64) -> io::Result<()> {
    const TFD_IOC_SET_TICKS: libc::Ioctl = 0x4008_5400;
    // SAFETY: TFD_IOC_SET_TICKS reads one u64, which `ticks` is.
    check(unsafe { libc::ioctl(timer.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) }.into())?;
    Ok(())
}

/// Chooses the number that the next new watch gets (`INOTIFY_IOC_SETNEXTWD`).
pub(crate) fn set_next_watch(inotify: BorrowedFd<'_>, wd: i32) -> io::Result<()> {
    const INOTIFY_IOC_SETNEXTWD: libc::Ioctl = 0x4004_4900;
    // SAFETY: INOTIFY_IOC_SETNEXTWD takes its number by value.
    check(unsafe { libc::ioctl(inotify.as_raw_fd(), INOTIFY_IOC_SETNEXTWD, wd) }.into())?;
    Ok(())
}

/// A new signalfd for the signals of `mask` (bit n for signal n+1).
pub(crate) fn new_signalfd(mask: u64) -> io::Result<OwnedFd> {
    let new = signalfd(-1, mask)?;
    // SAFETY: the call made this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// Makes a signalfd be for the signals of `mask`.
pub(crate) fn set_signalfd(existing: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
    signalfd(existing.as_raw_fd(), mask).map(drop)
}

fn signalfd(fd: i32, mask: u64) -> io::Result<i32> {
    // SAFETY: the kernel reads eight bytes, which `mask` has.
    let new = check(unsafe {
        libc::syscall(
            libc::SYS_signalfd4,
            libc::c_long::from(fd),
            &raw const mask,
            size_of::<u64>(),
            libc::SFD_CLOEXEC,
        )
    })?;
    Ok(new as i32)
}

/// A pidfd of a process (`O_NONBLOCK`) or thread (`O_EXCL`).
pub(crate) fn pidfd_open(pid: HostPid, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes integers only.
    let new = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, flags) })?;
    // SAFETY: the call made this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(new as i32) })
}

/// `F_SETSIG` of fcntl(2).
pub(crate) const F_SETSIG: i32 = 10;
/// `F_SETOWN_EX` of fcntl(2).
pub(crate) const F_SETOWN_EX: i32 = 15;

/// Whom the file signals (`F_GETOWN_EX`): the class of the owner, and its number outside.
pub(crate) fn owner(fd: BorrowedFd<'_>) -> io::Result<(i32, i32)> {
    const F_GETOWN_EX: i32 = 16;
    let mut raw = [0_i32; 2];
    // SAFETY: F_GETOWN_EX writes one f_owner_ex, two 32-bit numbers, which `raw` is.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, raw.as_mut_ptr()) }.into())?;
    Ok((raw[0], raw[1]))
}

/// The real and the effective user who named the owner, outside (`F_GETOWNER_UIDS`).
pub(crate) fn owner_users(fd: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    const F_GETOWNER_UIDS: i32 = 17;
    let mut raw = [0_u32; 2];
    // SAFETY: F_GETOWNER_UIDS writes two 32-bit numbers, which `raw` is.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWNER_UIDS, raw.as_mut_ptr()) }.into())?;
    Ok((raw[0], raw[1]))
}

/// The signal that the file sends (`F_GETSIG`), zero for a plain `SIGIO`.
pub(crate) fn owner_signal(fd: BorrowedFd<'_>) -> io::Result<i32> {
    const F_GETSIG: i32 = 11;
    // SAFETY: F_GETSIG takes no argument.
    let signal = check(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) }.into())?;
    Ok(signal as i32)
}

/// Sets the file's status flags (`F_SETFL`), the rest of `flags` is ignored by the kernel.
pub(crate) fn set_status_flags(fd: impl AsFd, flags: i32) -> io::Result<()> {
    let flags = rustix::fs::OFlags::from_bits_retain(flags as u32);
    Ok(rustix::fs::fcntl_setfl(fd, flags)?)
}

/// The soft and hard limit of a process' descriptor numbers (`RLIMIT_NOFILE`).
pub(crate) fn descriptor_limit(pid: HostPid) -> io::Result<(u64, u64)> {
    limit(pid, None)
}

/// Sets the soft and hard limit of a process' descriptor numbers.
pub(crate) fn set_descriptor_limit(pid: HostPid, new: (u64, u64)) -> io::Result<()> {
    limit(pid, Some(new)).map(drop)
}

fn limit(pid: HostPid, new: Option<(u64, u64)>) -> io::Result<(u64, u64)> {
    let new = new.map(|(rlim_cur, rlim_max)| libc::rlimit { rlim_cur, rlim_max });
    let mut old = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let pointer = new.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: prlimit reads `new` if there is one and writes `old`, both of which live until it returns.
    let result = unsafe { libc::prlimit(pid.0, libc::RLIMIT_NOFILE, pointer, &raw mut old) };
    check(result.into())?;
    Ok((old.rlim_cur, old.rlim_max))
}
