//! Copies of whole pages between stored slots and the memory of another process.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use crate::ids::HostPid;
use crate::sys::arena::{Fresh, PAGE, PageBytes};

/// The most pieces that one call takes on each side.
const IOV_MAX: usize = 1024;

#[derive(Clone, Copy)]
enum Direction {
    FromProcess,
    IntoProcess,
}

/// Pieces of one call, ours and the other process', which cover each other.
struct Transfer {
    pid: HostPid,
    direction: Direction,
    local: Vec<libc::iovec>,
    remote: Vec<libc::iovec>,
    bytes: usize,
}

impl Transfer {
    fn new(pid: HostPid, direction: Direction) -> Self {
        Self {
            pid,
            direction,
            local: Vec::with_capacity(IOV_MAX),
            remote: Vec::with_capacity(IOV_MAX),
            bytes: 0,
        }
    }

    /// Adds a page; runs the call first if it is full.
    fn page(&mut self, address: u64, at: *mut PageBytes) -> io::Result<()> {
        if self.local.len() == IOV_MAX || self.remote.len() == IOV_MAX {
            self.run()?;
        }
        add(&mut self.local, at as usize);
        add(&mut self.remote, address as usize);
        self.bytes += PAGE;
        Ok(())
    }

    fn run(&mut self) -> io::Result<()> {
        let call = match self.direction {
            Direction::FromProcess => libc::process_vm_readv,
            Direction::IntoProcess => libc::process_vm_writev,
        };
        // SAFETY: the local pieces are pages that the callers below own for writing (read from the
        // process) or hold for reading (write into it), for as long as the transfer lives; the
        // kernel checks the other process' side.
        let n = unsafe {
            call(
                self.pid.0,
                self.local.as_ptr(),
                self.local.len() as libc::c_ulong,
                self.remote.as_ptr(),
                self.remote.len() as libc::c_ulong,
                0,
            )
        };
        let want = std::mem::take(&mut self.bytes);
        self.local.clear();
        self.remote.clear();
        match n {
            -1 => Err(io::Error::last_os_error()),
            n if n as usize == want => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        }
    }
}

fn add(pieces: &mut Vec<libc::iovec>, at: usize) {
    if let Some(last) = pieces.last_mut()
        && last.iov_base as usize + last.iov_len == at
    {
        last.iov_len += PAGE;
        return;
    }
    pieces.push(libc::iovec {
        iov_base: at as *mut libc::c_void,
        iov_len: PAGE,
    });
}

/// Reads the pages at these addresses, each into the fresh slot of its number
/// (`process_vm_readv(2)`); all or an error.
pub(crate) fn read_pages(
    pid: HostPid,
    pages: impl Iterator<Item = (usize, u64)>,
    fresh: &mut Fresh,
) -> io::Result<()> {
    let mut transfer = Transfer::new(pid, Direction::FromProcess);
    for (index, address) in pages {
        transfer.page(address, fresh.pointer(index).as_ptr())?;
    }
    transfer.run()
}

/// Reads the pages of these ranges of addresses, one after another, into the fresh slots, by a process' `/proc/PID/mem`;
/// all or an error.
pub(crate) fn read_ranges(
    memory: &File,
    ranges: impl Iterator<Item = Range<u64>>,
    fresh: &mut Fresh,
) -> io::Result<()> {
    let mut index = 0;
    for range in ranges {
        let mut address = range.start;
        while address < range.end {
            let mut local = Vec::new();
            let mut end = address;
            while end < range.end && local.len() < IOV_MAX {
                add(&mut local, fresh.pointer(index).as_ptr() as usize);
                index += 1;
                end += PAGE as u64;
            }
            // SAFETY: the pieces are fresh pages, which are borrowed mutably and not shared with anybody.
            let n = unsafe {
                libc::preadv(
                    memory.as_raw_fd(),
                    local.as_ptr(),
                    local.len() as libc::c_int,
                    address as libc::off_t,
                )
            };
            match n {
                -1 => return Err(io::Error::last_os_error()),
                n if n as u64 == end - address => address = end,
                _ => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
            }
        }
    }
    Ok(())
}

/// Writes pages to these addresses (`process_vm_writev(2)`); all or an error.
pub(crate) fn write_pages<'a>(
    pid: HostPid,
    pages: impl Iterator<Item = (u64, &'a PageBytes)>,
) -> io::Result<()> {
    let mut transfer = Transfer::new(pid, Direction::IntoProcess);
    for (address, page) in pages {
        transfer.page(address, std::ptr::from_ref(page).cast_mut())?;
    }
    transfer.run()
}
