//! The system calls that the floor is measured with, behind safe functions.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

const PAGE: u64 = 4096;

/// Pages of another process, as ranges of addresses.
#[derive(Debug, Default)]
pub(crate) struct Pages(Vec<Range<u64>>);

impl Pages {
    /// Their size together.
    pub(crate) fn bytes(&self) -> usize {
        self.0.iter().map(|r| (r.end - r.start) as usize).sum()
    }
}

/// A range with its categories, as `PAGEMAP_SCAN` fills it in.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
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

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;
const WRITE_PROTECT_MATCHING: u64 = 1;
const IS_WRITTEN: u64 = 1 << 1;
const IS_PRESENT: u64 = 1 << 3;
const USER_END: u64 = 0x7fff_ffff_f000;

/// Finds the pages that were written since the last time, and protects them again (`PAGEMAP_SCAN`, Linux 6.7). Mappings
/// without asynchronous write protection are passed over.
pub(crate) fn take_written(pagemap: &File) -> io::Result<Pages> {
    let mut pages = Pages::default();
    let mut regions = [PageRegion::default(); 512];
    let mut start = 0;
    while start < USER_END {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags: WRITE_PROTECT_MATCHING,
            start,
            end: USER_END,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_mask: IS_WRITTEN | IS_PRESENT,
            return_mask: IS_WRITTEN,
            ..ScanArgument::default()
        };
        // SAFETY: the argument is laid out as the kernel defines it, and `vec` names `vec_len` regions that live as long
        // as the call.
        let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        let found = usize::try_from(found).map_err(|_| io::Error::last_os_error())?;
        pages
            .0
            .extend(regions[..found].iter().map(|r| r.start..r.end));
        if argument.walk_end <= start {
            return Err(io::Error::other("the scan does not get on"));
        }
        start = argument.walk_end;
    }
    Ok(pages)
}

/// Copies pages of a stopped process to `copy`, which has their size.
pub(crate) fn read_pages(pid: i32, pages: &Pages, copy: &mut [u8]) -> io::Result<()> {
    let mut at = 0;
    for batch in batches(pages) {
        let size = batch.iter().map(|r| r.iov_len).sum();
        let part = &mut copy[at..at + size];
        let local = libc::iovec {
            iov_base: part.as_mut_ptr().cast(),
            iov_len: size,
        };
        let count = batch.len() as libc::c_ulong;
        // SAFETY: the kernel writes at most `iov_len` bytes to `part`, which is that long and borrowed mutably; the
        // other vector is `count` long and its addresses belong to the other process.
        let copied = unsafe { libc::process_vm_readv(pid, &local, 1, batch.as_ptr(), count, 0) };
        complete(copied, size)?;
        at += size;
    }
    Ok(())
}

/// Copies pages back to a stopped process.
pub(crate) fn write_pages(pid: i32, pages: &Pages, copy: &[u8]) -> io::Result<()> {
    let mut at = 0;
    for batch in batches(pages) {
        let size = batch.iter().map(|r| r.iov_len).sum();
        let part = &copy[at..at + size];
        let local = libc::iovec {
            iov_base: part.as_ptr().cast_mut().cast(),
            iov_len: size,
        };
        let count = batch.len() as libc::c_ulong;
        // SAFETY: the kernel only reads from `part`, which is `iov_len` long; the other vector is `count` long and its
        // addresses belong to the other process.
        let copied = unsafe { libc::process_vm_writev(pid, &local, 1, batch.as_ptr(), count, 0) };
        complete(copied, size)?;
        at += size;
    }
    Ok(())
}

/// The remote vectors of calls that are each within the kernel's limit on vectors.
fn batches(pages: &Pages) -> impl Iterator<Item = Vec<libc::iovec>> {
    pages.0.chunks(libc::UIO_MAXIOV as usize).map(|ranges| {
        let vector = |range: &Range<u64>| libc::iovec {
            iov_base: range.start as *mut libc::c_void,
            iov_len: (range.end - range.start) as usize,
        };
        ranges.iter().map(vector).collect()
    })
}

fn complete(copied: isize, wanted: usize) -> io::Result<()> {
    match usize::try_from(copied) {
        Ok(n) if n == wanted => Ok(()),
        Ok(n) => Err(io::Error::other(format!(
            "only {} of {} pages were copied",
            n as u64 / PAGE,
            wanted as u64 / PAGE
        ))),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Gives this thread, and the threads and programs that it starts, a mount namespace of their own: what is mounted
/// in it ends with them.
pub(crate) fn own_mounts() -> io::Result<()> {
    use rustix::mount::MountPropagationFlags;
    // SAFETY: no descriptor table is unshared, so nothing that holds a descriptor is affected.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(rustix::mount::mount_change("/", private)?)
}

/// Begins to trace a thread and tells it to stop.
pub(crate) fn seize(tid: i32) -> io::Result<()> {
    ptrace(libc::PTRACE_SEIZE, tid)?;
    ptrace(libc::PTRACE_INTERRUPT, tid)
}

/// Waits until a seized thread has stopped.
pub(crate) fn await_stop(tid: i32) -> io::Result<()> {
    let mut status = 0;
    // SAFETY: `status` is a place for an int.
    let waited = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) };
    match waited == tid && libc::WIFSTOPPED(status) {
        true => Ok(()),
        false if waited < 0 => Err(io::Error::last_os_error()),
        false => Err(io::Error::other("it ended instead of stopping")),
    }
}

/// Lets a stopped thread go on.
pub(crate) fn detach(tid: i32) -> io::Result<()> {
    ptrace(libc::PTRACE_DETACH, tid)
}

fn ptrace(request: libc::c_uint, tid: i32) -> io::Result<()> {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: the requests used here read and write no memory of ours.
    match unsafe { libc::ptrace(request, tid, none, none) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
