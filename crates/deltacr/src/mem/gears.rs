//! When it pays to do a thing another way.

/// From how many changed pages of a process on the engine works in its second gear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gears {
    /// Written pages are write-protected again. Fewer stay writable, and count as written at the next visit too.
    pub protect: u64,
    /// A checkpoint has returned before the pages that it copied are sorted.
    pub sort_later: u64,
    /// A checkpoint takes a copy-on-write snapshot, and copies after the process runs on.
    pub snapshot: u64,
    /// A checkpoint copies before the stop what is more than this of the pages that a snapshot would share, of all processes.
    pub ahead: u64,
    /// A rollback lets the process run on, and gives pages back then.
    pub lazy: u64,
}

impl Default for Gears {
    fn default() -> Self {
        Self {
            // Copying and comparing a page takes 1 µs at the next visit; protecting flushes the TLB of all processors for
            // 40, and if the program writes to the pages in each step, each costs it a fault besides.
            protect: 32,
            // Comparing a page takes 0.3 µs; a thread is started in 50.
            sort_later: 256,
            // Copying a page takes 1.4 µs, and a snapshot 300 µs and 0.1 µs a page. But while the pages are copied
            // from the snapshot, a page that the process writes to is copied by its fault.
            snapshot: 2048,
            // Sharing so many takes 2 ms. To copy a page ahead takes 1.2 µs, for which the caller waits, and nobody else.
            ahead: 16384,
            // Writing a page back takes 1 µs, setting memory aside 500 µs; but a page that is touched before it is back
            // costs 30, and in all it is half as much again.
            lazy: 4096,
        }
    }
}

/// What copying and snapshots cost, in nanoseconds: a page copied, a page that a snapshot shares, and a snapshot as such.
const COPY: u64 = 1400;
const SHARE: u64 = 100;
const SNAPSHOT: u64 = 300_000;

impl Gears {
    /// Whether `written` pages are better read from a snapshot, which shares `shared` pages.
    pub(crate) fn wants_snapshot(&self, written: u64, shared: u64) -> bool {
        written >= self.snapshot
            && (self.snapshot < Self::default().snapshot
                || 2 * (SNAPSHOT + SHARE * shared) < COPY * written)
    }
}
