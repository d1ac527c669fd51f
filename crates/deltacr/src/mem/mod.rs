//! The memory of a process: what it has mapped, and what it wrote there.
//!
//! [`Memory::scan`] tells how a stopped process' memory differs from the last state that its
//! [`Tracker`] knows, without reading any of it. From there [`Memory::capture`] makes a new
//! [`AddressSpace`], and [`Memory::restore`] takes the process to any earlier one; both cost what
//! changed.

mod advice;
mod ahead;
mod capture;
mod gears;
mod harvest;
mod holding;
pub(crate) mod layout;
mod lazy;
mod outstanding;
mod pager;
mod pages;
mod pages_to_come;
mod plan;
mod restore;
mod scan;
mod segments;
mod shm;
mod spare;
mod sweeper;
#[cfg(test)]
mod tests;
mod touched;
mod tracker;
mod vmas;

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use gears::Gears;
pub use harvest::{Kept, Work};
pub use holding::{Derived, FileMapping, Holding, OfBase};
pub use layout::Layout;
pub use pages_to_come::Pages;
pub use scan::Scan;
pub(crate) use shm::copy_of as copy_of_object;
pub use shm::{SharedMemory, SharedObjects, ShmImage, ShmKey};
pub use tracker::Tracker;
pub(crate) use vmas::mapped_file;

use advice::Advised;

use crate::env::Environment;
use crate::error::Error;
use crate::ids::InnerPid;
use crate::orphan::Orphans;
use crate::store::PageStore;

/// Stands for the device number of the sandbox's own filesystem.
pub const VERSIONED: u64 = 0;

/// Stands for the device number of the base of the sandbox's filesystem, for files that are mapped from the base itself. What the
/// sandbox does to such a file is not seen by who has it mapped so.
pub const BASE: u64 = u64::MAX;

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;

/// A file, by its inode. Two are equal if they are the same inode, whatever the path.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileId {
    /// `st_dev`; [`VERSIONED`] for the sandbox's filesystem, which has another in each fork, and [`BASE`] for its base.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// The path that it was mapped by, for messages and for files outside the versioned
    /// filesystem.
    pub path: Arc<str>,
}

impl PartialEq for FileId {
    fn eq(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

impl Eq for FileId {}

/// What a mapping shows where the process did not write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Zeros.
    Anonymous,
    /// A file.
    File(FileId),
    /// A shared memory object: `MAP_SHARED | MAP_ANONYMOUS`, a memfd, or a segment of System V.
    Shm(ShmKey),
    /// A mapping that the kernel makes for every process: `[vdso]`, `[vvar]`.
    Special(Arc<str>),
}

/// One mapping. Neighbours that the kernel keeps apart only for its own reasons are one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// The address after the last.
    pub end: u64,
    /// `PROT_*` bits.
    pub prot: i32,
    /// `MAP_SHARED` rather than `MAP_PRIVATE`.
    pub shared: bool,
    /// Where in the file or object it begins, in bytes; zero without one.
    pub offset: u64,
    /// What lies behind it.
    pub backing: Backing,
    /// A stack that grows by itself (`MAP_GROWSDOWN`).
    pub grows_down: bool,
    /// The kernel may drop its pages at any time (`MAP_DROPPABLE`).
    #[serde(default)]
    pub droppable: bool,
    /// A segment of System V that was attached for reading only, and can never be made writable.
    #[serde(default)]
    pub read_only: bool,
}

impl Vma {
    /// Its addresses.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end
    }

    /// Whether the process' writes stay its own, so that they are part of its page map.
    pub(crate) fn is_private(&self) -> bool {
        !self.shared && !self.is_special()
    }

    /// Whether a page that was never written shows zeros.
    pub(crate) fn is_anonymous(&self) -> bool {
        self.backing == Backing::Anonymous
    }

    /// Whether the kernel made it.
    pub(crate) fn is_special(&self) -> bool {
        matches!(self.backing, Backing::Special(_))
    }

    /// The id of the segment of System V that it attaches, if it does.
    pub(crate) fn segment(&self) -> Option<i32> {
        match self.backing {
            Backing::Shm(key) => key.segment(),
            _ => None,
        }
    }

    /// Where in the file or object the byte at `address` lies; zero without one.
    pub(crate) fn offset_at(&self, address: u64) -> u64 {
        match self.backing {
            Backing::File(_) | Backing::Shm(_) => {
                self.offset.wrapping_add(address).wrapping_sub(self.start)
            }
            Backing::Anonymous | Backing::Special(_) => 0,
        }
    }

    /// Whether both show the same thing at `address`, protection aside.
    pub(crate) fn agrees_at(&self, other: &Self, address: u64) -> bool {
        self.shared == other.shared
            && self.grows_down == other.grows_down
            && self.droppable == other.droppable
            && self.read_only == other.read_only
            && self.backing == other.backing
            && self.offset_at(address) == other.offset_at(address)
    }
}

/// The memory of one process at one moment.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct AddressSpace {
    /// The mappings, ascending. The engine's own area is left out.
    pub vmas: Vec<Vma>,
    /// The guard pages (`MADV_GUARD_INSTALL`), ascending.
    pub guards: Vec<Range<u64>>,
    /// The bounds that the kernel keeps: program break, arguments, environment.
    pub layout: Layout,
    /// The auxiliary vector, as `/proc/PID/auxv` shows it.
    pub auxv: Vec<u8>,
    /// What the program has asked of the kernel for parts of it.
    #[serde(default)]
    pub(crate) advised: Advised,
    /// The pages, by address divided by 4096, that differ from what the private mapping shows by
    /// itself. Persisted apart from the rest.
    #[serde(skip)]
    pub pages: Pages,
}

impl AddressSpace {
    /// The file that holds the program's code: the executable.
    pub fn executable(&self) -> Option<&FileId> {
        executable(&self.vmas, &self.layout)
    }
}

fn executable<'a>(vmas: &'a [Vma], layout: &Layout) -> Option<&'a FileId> {
    let code = layout.start_code;
    let at = vmas.partition_point(|v| v.end <= code);
    match &vmas.get(at).filter(|v| v.start <= code)?.backing {
        Backing::File(file) => Some(file),
        _ => None,
    }
}

/// What the memory of every process of a tree is captured and restored with.
#[derive(Clone, Copy)]
pub struct Memory<'a> {
    /// Where contents are kept.
    pub store: &'a PageStore,
    /// The shared memory objects of the tree.
    pub shared: &'a SharedObjects,
    /// The sandbox.
    pub env: &'a dyn Environment,
    /// The engine's own processes in the sandbox.
    pub orphans: &'a Orphans,
    /// When to work another way.
    pub gears: Gears,
}

impl Memory<'_> {
    /// Whether the processes may have so many pages twice for a while.
    fn has_room(&self, pages: u64) -> bool {
        self.env
            .memory_left()
            .is_none_or(|left| left / PAGE > pages)
    }
}

fn unsupported(pid: InnerPid, what: String) -> Error {
    Error::Unsupported {
        pid,
        name: String::new(),
        what,
    }
}

/// The pages that lie in a range of addresses.
pub(crate) fn pages_of(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE..range.end.div_ceil(PAGE)
}

/// The addresses of a range of pages.
pub(crate) fn addresses_of(pages: &Range<u64>) -> Range<u64> {
    pages.start * PAGE..pages.end * PAGE
}

/// The part that two ranges have in common, if any.
pub(crate) fn overlap(a: &Range<u64>, b: &Range<u64>) -> Option<Range<u64>> {
    let common = a.start.max(b.start)..a.end.min(b.end);
    (common.start < common.end).then_some(common)
}

/// Sorts ranges and makes one of those that touch or lie at most `gap` apart.
pub(crate) fn merged(mut ranges: Vec<Range<u64>>, gap: u64) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|r| r.start);
    let mut out: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.start <= last.end.saturating_add(gap) => {
                last.end = last.end.max(range.end);
            }
            _ => out.push(range),
        }
    }
    out
}
