//! The `ioctl`s by which the kernel tells what another process has mapped and which pages it
//! wrote: `PROCMAP_QUERY` on `/proc/PID/maps` (Linux 6.11), `PAGEMAP_SCAN` on `/proc/PID/pagemap`
//! (Linux 6.7), and `userfaultfd` registration (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use crate::ids::HostPid;
use crate::mem::PAGE;

/// Facts of a page, as `PAGEMAP_SCAN` tells them.
pub(crate) mod category {
    /// Writes to the page are tracked by a `userfaultfd`.
    pub(crate) const TRACKED: u64 = 1 << 0;
    /// Written (or mapped) since it was last write-protected.
    pub(crate) const WRITTEN: u64 = 1 << 1;
    /// Page cache of a file, not the process' own copy.
    pub(crate) const FILE: u64 = 1 << 2;
    /// In memory.
    pub(crate) const PRESENT: u64 = 1 << 3;
    /// Swapped out, or the mark of a page that was dropped.
    pub(crate) const SWAPPED: u64 = 1 << 4;
    /// The kernel's page of zeros.
    pub(crate) const ZERO: u64 = 1 << 5;
    /// A guard page (`MADV_GUARD_INSTALL`).
    pub(crate) const GUARD: u64 = 1 << 8;
}

/// A run of pages with the same facts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageRun {
    /// First address.
    pub(crate) start: u64,
    /// The address after the last.
    pub(crate) end: u64,
    /// Bits of [`category`].
    pub(crate) facts: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    tell: u64,
}

const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;
const WP_MATCHING: u64 = 1;
/// Facts that a page must all have (with [`NOT`]: must not have), some of which it must have, and that are told of it.
type Filter = (u64, u64, u64);
/// Turns a filter round; no fact of a page.
const NOT: u64 = 1 << 63;
/// In memory or swapped out: what is not there has no mark that could tell whether it was written.
const THERE: u64 = category::PRESENT | category::SWAPPED;
/// Pages that were written.
const WRITTEN: Filter = (category::WRITTEN, THERE, category::WRITTEN);
/// Runs that one call can tell.
const RUNS: usize = 1024;

/// The pages of a process, as `/proc/PID/pagemap` tells them.
#[derive(Debug)]
pub(crate) struct Pagemap {
    file: Arc<File>,
    /// Where the kernel puts what it found.
    runs: Vec<PageRun>,
}

impl Pagemap {
    /// Opens the page map of a process.
    pub(crate) fn open(pid: HostPid) -> io::Result<Self> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Self::of(Arc::new(file)))
    }

    /// The page map that this file is.
    pub(crate) fn of(file: Arc<File>) -> Self {
        Self {
            file,
            runs: Vec::with_capacity(RUNS),
        }
    }

    /// Adds every run of pages within `range` that has some of the facts `any_of` to `found`, with
    /// those of its facts that are in `tell`, ascending.
    pub(crate) fn scan(
        &mut self,
        range: Range<u64>,
        any_of: u64,
        tell: u64,
        found: &mut Vec<PageRun>,
    ) -> io::Result<()> {
        self.walk(range, 0, (0, any_of, tell), |runs| {
            found.extend_from_slice(runs);
        })
    }

    /// Write-protects every page within `range` that is tracked, written and there, so that it
    /// counts as written only after the next write.
    pub(crate) fn protect_written(&mut self, range: Range<u64>) -> io::Result<()> {
        self.walk(range, WP_MATCHING, WRITTEN, |_| {})
    }

    /// The same; adds the runs that were protected to `found`, ascending. What is not tracked is left out. If it fails, pages
    /// may have been protected that are not told.
    pub(crate) fn take_written(
        &mut self,
        range: Range<u64>,
        found: &mut Vec<Range<u64>>,
    ) -> io::Result<()> {
        self.walk(range, WP_MATCHING, WRITTEN, add_to(found))
    }

    /// Whether there is a page within `range` whose writes are not tracked.
    pub(crate) fn has_untracked(&mut self, range: Range<u64>) -> io::Result<bool> {
        let filter = (NOT | category::TRACKED, THERE, 0);
        self.step(&range, 0, filter, 1)?;
        Ok(!self.runs.is_empty())
    }

    /// Adds the runs of pages within `range` that are there and do not count as written to `found`, whether they are tracked or not.
    pub(crate) fn marked(
        &mut self,
        range: Range<u64>,
        found: &mut Vec<Range<u64>>,
    ) -> io::Result<()> {
        let filter = (NOT | category::WRITTEN, THERE, 0);
        self.walk(range, 0, filter, add_to(found))
    }

    fn walk(
        &mut self,
        range: Range<u64>,
        flags: u64,
        filter: Filter,
        mut found: impl FnMut(&[PageRun]),
    ) -> io::Result<()> {
        let mut rest = range;
        while rest.start < rest.end {
            let end = self.step(&rest, flags, filter, 0)?;
            found(&self.runs);
            if end <= rest.start {
                return Err(io::Error::other("the kernel's page scan made no progress"));
            }
            rest.start = end;
        }
        Ok(())
    }

    /// One call, which may end early; after `most` pages if that is not zero. Leaves the runs that it found, and tells where it ended.
    fn step(
        &mut self,
        range: &Range<u64>,
        flags: u64,
        (all_of, any_of, tell): Filter,
        most: u64,
    ) -> io::Result<u64> {
        // The kernel makes as much room of its own for them, which takes it longer than to look at a few pages.
        let room = RUNS.min((range.end - range.start).div_ceil(PAGE) as usize);
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags,
            start: range.start,
            end: range.end,
            vec: self.runs.as_mut_ptr() as u64,
            vec_len: room as u64,
            max_pages: most,
            inverted: if all_of & NOT == 0 { 0 } else { all_of & !NOT },
            all_of: all_of & !NOT,
            any_of,
            tell,
            ..ScanArg::default()
        };
        // SAFETY: the argument has the layout that the kernel defines, and `vec` points to room for
        // `vec_len` regions that lives through the call.
        let n = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        if n < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has written so many regions, of which any bits are valid, into the room for them.
        unsafe { self.runs.set_len(room.min(n as usize)) };
        Ok(arg.walk_end)
    }
}

fn add_to(found: &mut Vec<Range<u64>>) -> impl FnMut(&[PageRun]) {
    |runs| found.extend(runs.iter().map(|run| run.start..run.end))
}

/// A mapping, as `PROCMAP_QUERY` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// First address.
    pub(crate) start: u64,
    /// The address after the last.
    pub(crate) end: u64,
    /// `PROT_*` bits.
    pub(crate) prot: i32,
    /// `MAP_SHARED` rather than `MAP_PRIVATE`.
    pub(crate) shared: bool,
    /// Offset into the file, in bytes.
    pub(crate) offset: u64,
    /// `st_dev` of the file, zero without one.
    pub(crate) device: u64,
    /// Inode number of the file, zero without one.
    pub(crate) inode: u64,
}

#[repr(C)]
#[derive(Default)]
struct QueryArg {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    vma_flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    major: u32,
    minor: u32,
    name_size: u32,
    build_id_size: u32,
    name: u64,
    build_id: u64,
}

const PROCMAP_QUERY: libc::Ioctl = 0xc068_6611_u32 as libc::Ioctl;
const COVERING_OR_NEXT: u64 = 0x10;
const SHARED: u64 = 8;

/// The mapping that covers `address`, or the next one; `None` behind the last.
pub(crate) fn mapping(maps: &File, address: u64) -> io::Result<Option<Mapping>> {
    query(maps, address, &mut []).map(|found| found.map(|(mapping, _)| mapping))
}

/// The name of the mapping that covers `address`, as `/proc/PID/maps` shows it; empty without one.
pub(crate) fn mapping_name(maps: &File, address: u64) -> io::Result<Vec<u8>> {
    let mut room = [0; libc::PATH_MAX as usize];
    let len = query(maps, address, &mut room)?.map_or(0, |(_, len)| len);
    let told = &room[..room.len().min(len)];
    // The kernel counts the terminating zero.
    Ok(told.iter().copied().take_while(|b| *b != 0).collect())
}

/// A mapping and the length of its name, which is written to `name` if there is room.
fn query(maps: &File, address: u64, name: &mut [u8]) -> io::Result<Option<(Mapping, usize)>> {
    let mut arg = QueryArg {
        size: size_of::<QueryArg>() as u64,
        flags: COVERING_OR_NEXT,
        address,
        ..QueryArg::default()
    };
    if !name.is_empty() {
        arg.name = name.as_mut_ptr() as u64;
        arg.name_size = name.len() as u32;
    }
    // SAFETY: the argument has the layout that the kernel defines, and `name` points to
    // `name_size` bytes that live through the call.
    if unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut arg) } < 0 {
        let e = io::Error::last_os_error();
        return match e.raw_os_error() {
            Some(libc::ENOENT) => Ok(None),
            _ => Err(e),
        };
    }
    let mapping = Mapping {
        start: arg.start,
        end: arg.end,
        prot: (arg.vma_flags & 7) as i32,
        shared: arg.vma_flags & SHARED != 0,
        offset: arg.offset,
        device: libc::makedev(arg.major, arg.minor),
        inode: arg.inode,
    };
    Ok(Some((mapping, arg.name_size as usize)))
}

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RegisterArg {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
const API: u64 = 0xaa;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const MODE_WP: u64 = 2;

/// `UFFD_USER_MODE_ONLY`, which lets any process make a `userfaultfd`.
pub(crate) const USER_MODE_ONLY: i32 = 1;

/// Makes a new `userfaultfd` track writes by itself, without a handler.
pub(crate) fn enable_write_tracking(uffd: BorrowedFd<'_>) -> io::Result<()> {
    let mut arg = ApiArg {
        api: API,
        features: FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED,
        ioctls: 0,
    };
    // SAFETY: the argument has the layout that the kernel defines.
    check(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut arg) })
}

/// Tracks writes to all mappings within `range` from now on.
pub(crate) fn track_writes(uffd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    let mut arg = RegisterArg {
        start: range.start,
        len: range.end - range.start,
        mode: MODE_WP,
        ioctls: 0,
    };
    // SAFETY: the argument has the layout that the kernel defines.
    check(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut arg) })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_this_process_are_those_of_its_maps_file() {
        let maps = File::open("/proc/self/maps").unwrap();
        let here = mappings_of_this_process_are_those_of_its_maps_file as *const () as u64;
        let found = mapping(&maps, here).unwrap().unwrap();
        let name = mapping_name(&maps, here).unwrap();
        assert!(found.start <= here && here < found.end);
        assert_eq!(found.prot, libc::PROT_READ | libc::PROT_EXEC);
        let exe = std::fs::metadata("/proc/self/exe").unwrap();
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!((found.device, found.inode), (exe.dev(), exe.ino()));
        let path = std::fs::read_link("/proc/self/exe").unwrap();
        assert_eq!(String::from_utf8(name).unwrap(), path.to_str().unwrap());
        assert_eq!(mapping(&maps, u64::MAX - 4096).unwrap(), None);
    }
}
