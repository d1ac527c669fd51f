//! Serving the missing pages of another process: `userfaultfd` in its missing mode (`ioctl_userfaultfd(2)`), with the events
//! that tell what the process does to the memory meanwhile.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use crate::sys::arena::{PAGE, PageBytes};

const API: u64 = 0xaa;
const FEATURE_EVENT_FORK: u64 = 1 << 1;
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const MODE_MISSING: u64 = 1;

const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
const UFFDIO_UNREGISTER: libc::Ioctl = 0x8010_aa01_u32 as libc::Ioctl;
const UFFDIO_WAKE: libc::Ioctl = 0x8010_aa02_u32 as libc::Ioctl;
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;
const UFFDIO_ZEROPAGE: libc::Ioctl = 0xc020_aa04_u32 as libc::Ioctl;
const UFFDIO_WRITEPROTECT: libc::Ioctl = 0xc018_aa06_u32 as libc::Ioctl;

/// `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd` (Linux 6.1): needs no privilege but the open device, and the kernel's own accesses
/// are served as well.
pub(crate) const NEW: u64 = 0xaa00;

/// Opens the device that such descriptors are made by.
pub(crate) fn device() -> io::Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")?;
    Ok(file.into())
}

/// A descriptor for missing pages of this process, with all that the kernel itself misses. Needs `CAP_SYS_PTRACE`.
pub(crate) fn of_this_process() -> io::Result<OwnedFd> {
    // SAFETY: takes flags.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    let uffd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    enable_with(uffd.as_fd(), 0)?;
    Ok(uffd)
}

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArg {
    start: u64,
    len: u64,
}

#[repr(C)]
struct ProtectArg {
    range: RangeArg,
    mode: u64,
}

#[repr(C)]
struct RegisterArg {
    range: RangeArg,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArg {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct ZeroArg {
    range: RangeArg,
    mode: u64,
    zeroed: i64,
}

fn ioctl<T>(uffd: BorrowedFd<'_>, op: libc::Ioctl, arg: &mut T) -> io::Result<()> {
    // SAFETY: every caller below passes the structure that the kernel defines for the operation; what it points to is
    // memory of another process, or pages that are borrowed for the call and only read.
    match unsafe { libc::ioctl(uffd.as_raw_fd(), op, std::ptr::from_mut(arg)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn range_arg(range: &Range<u64>) -> RangeArg {
    RangeArg {
        start: range.start,
        len: range.end - range.start,
    }
}

/// Readies a new descriptor for missing pages, and for telling forks, moved mappings and dropped pages. Needs
/// `CAP_SYS_PTRACE`.
pub(crate) fn enable(uffd: BorrowedFd<'_>) -> io::Result<()> {
    let features = FEATURE_EVENT_FORK | FEATURE_EVENT_REMAP | FEATURE_EVENT_REMOVE;
    enable_with(uffd, features)
}

fn enable_with(uffd: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    let mut arg = ApiArg {
        api: API,
        features,
        ioctls: 0,
    };
    ioctl(uffd, UFFDIO_API, &mut arg)
}

/// From now on, whoever touches a page of the range that is not there waits for it.
pub(crate) fn register(uffd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    let mut arg = RegisterArg {
        range: range_arg(range),
        mode: MODE_MISSING,
        ioctls: 0,
    };
    ioctl(uffd, UFFDIO_REGISTER, &mut arg)
}

/// Leaves the range to itself, whatever it was registered for.
pub(crate) fn unregister(uffd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    ioctl(uffd, UFFDIO_UNREGISTER, &mut range_arg(range))
}

/// Takes the protection from all pages of a range whose writes are tracked: they count as written. Fails if a part of it is not tracked.
pub(crate) fn unprotect(uffd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    let mut arg = ProtectArg {
        range: range_arg(range),
        mode: 0,
    };
    ioctl(uffd, UFFDIO_WRITEPROTECT, &mut arg)
}

/// Whether the address space that a descriptor belongs to is still there; `range` is to be left to itself.
pub(crate) fn is_alive(uffd: BorrowedFd<'_>, range: &Range<u64>) -> bool {
    unregister(uffd, range).map_or_else(|e| e.raw_os_error() != Some(libc::ENOMEM), |()| true)
}

/// Lets whoever waits for a page of the range look again.
pub(crate) fn wake(uffd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    ioctl(uffd, UFFDIO_WAKE, &mut range_arg(range))
}

/// Puts pages where none are, one after another, and wakes who waits for them. Tells how many, and what kept the next
/// from being put.
pub(crate) fn put(uffd: BorrowedFd<'_>, to: u64, pages: &[&PageBytes]) -> (usize, Option<Errno>) {
    let mut done = 0;
    while done < pages.len() {
        let from = pages[done].as_ptr() as u64;
        let follow = pages[done..].iter().zip(0_u64..);
        let run = follow
            .take_while(|(page, n)| page.as_ptr() as u64 == from + n * PAGE as u64)
            .count();
        let mut arg = CopyArg {
            to: to + (done * PAGE) as u64,
            from,
            len: (run * PAGE) as u64,
            mode: 0,
            copied: 0,
        };
        if let Err(e) = ioctl(uffd, UFFDIO_COPY, &mut arg) {
            done += usize::try_from(arg.copied).unwrap_or(0) / PAGE;
            return (done, Some(errno(&e)));
        }
        done += run;
    }
    (done, None)
}

/// Puts zeros where no page is.
pub(crate) fn put_zeros(uffd: BorrowedFd<'_>, range: &Range<u64>) -> Result<(), Errno> {
    let mut arg = ZeroArg {
        range: range_arg(range),
        mode: 0,
        zeroed: 0,
    };
    ioctl(uffd, UFFDIO_ZEROPAGE, &mut arg).map_err(|e| errno(&e))
}

fn errno(e: &io::Error) -> Errno {
    Errno::from_io_error(e).unwrap_or(Errno::IO)
}

/// What a descriptor tells.
#[derive(Debug)]
pub(crate) enum Event {
    /// Somebody waits for the page at this address.
    Missing(u64),
    /// A child was made that shares the pages that are there. Its own missing pages are served by this descriptor.
    Forked(OwnedFd),
    /// A range has moved.
    Moved { from: u64, to: u64, len: u64 },
    /// The pages of a range are dropped: zeros take their place.
    Removed(Range<u64>),
}

const MESSAGE: usize = 32;
const PAGEFAULT: u8 = 0x12;
const FORK: u8 = 0x13;
const REMAP: u8 = 0x14;
const REMOVE: u8 = 0x15;
const UNMAP: u8 = 0x16;

/// The next event, if there is one. The descriptor does not block.
pub(crate) fn next_event(uffd: BorrowedFd<'_>) -> io::Result<Option<Event>> {
    let mut message = [0_u8; MESSAGE];
    let n = match rustix::io::read(uffd, &mut message) {
        Ok(n) => n,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    if n != MESSAGE {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let field =
        |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().expect("eight bytes"));
    let event = match message[0] {
        PAGEFAULT => Event::Missing(field(16)),
        FORK => {
            // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
            Event::Forked(unsafe { OwnedFd::from_raw_fd(field(8) as u32 as i32) })
        }
        REMAP => Event::Moved {
            from: field(8),
            to: field(16),
            len: field(24),
        },
        REMOVE | UNMAP => Event::Removed(field(8)..field(16)),
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    Ok(Some(event))
}
