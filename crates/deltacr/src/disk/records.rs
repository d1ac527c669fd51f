//! The records of `processes` and `pages.meta`.

use deltalog::Format;
use serde::{Deserialize, Serialize};

use crate::ids::InnerPid;
use crate::mem::ShmKey;

/// The log of the processes.
pub(super) const PROCESSES: Format = Format {
    kind: *b"PROC",
    version: 1,
};

/// A number and a process.
pub(super) const PROCESS: u32 = 1;
/// The zombies.
pub(super) const ZOMBIES: u32 = 2;
/// The open files.
pub(super) const DESCRIPTORS: u32 = 3;
/// The shared memory objects.
pub(super) const SHARED: u32 = 4;
/// System V semaphores, message queues and segments, if there are any.
pub(super) const SYSTEM_V: u32 = 5;

/// The log of page maps.
pub(super) const MAPS: Format = Format {
    kind: *b"PAGE",
    version: 1,
};

/// A [`Map`].
pub(super) const MAP: u32 = 1;
/// A `Vec<Run>` of the last map.
pub(super) const RUNS: u32 = 2;
/// Checksums of pages, eight bytes each.
pub(super) const SUMS: u32 = 3;

/// Whose pages they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Whose {
    Process(InnerPid),
    Shared(ShmKey),
}

/// A page map, as it differs from one of the image before.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Map {
    pub(super) of: Whose,
    /// Which one; an empty one if `None`.
    pub(super) like: Option<Whose>,
}

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Run {
    /// The first one's number.
    pub(super) page: u64,
    pub(super) len: u64,
    /// Where in `pages.data` the first is; no page is held if `None`.
    pub(super) block: Option<u64>,
}

impl Run {
    /// Whether the run goes on with this page in this place.
    pub(super) fn goes_on_with(&self, page: u64, block: Option<u64>) -> bool {
        self.page + self.len == page && self.block.map(|first| first + self.len) == block
    }
}
