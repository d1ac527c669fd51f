//! From pages that were written to a page map: what is stored already is not stored again.

use std::collections::HashMap;
use std::io;
use std::iter::Sum;
use std::ops::{AddAssign, Range};

use crate::error::During;
use crate::ids::InnerPid;
use crate::mem::ahead::Copies;
use crate::mem::pages_to_come::Promise;
use crate::mem::{Gears, Pages, addresses_of, pages_of};
use crate::snapshot::Snapshot;
use crate::store::{Fresh, PageBytes, PageMap, PageStore, is_zero};
use crate::sys::pagemap::{Pagemap, category};
use crate::sys::vm;

/// Pages that are read from a snapshot in one go: 4 MiB.
const PORTION: usize = 1024;

/// What became of the pages that a checkpoint read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Stored.
    pub stored: u64,
    /// Not stored: zero, as pages are that were never written.
    pub zero: u64,
    /// Not stored: as the checkpoint before holds them, or that of the process that this one was forked from.
    pub same: u64,
    /// Not stored: as another page of the same process that was read at the same time.
    pub repeated: u64,
}

impl AddAssign for Kept {
    fn add_assign(&mut self, other: Self) {
        self.stored += other.stored;
        self.zero += other.zero;
        self.same += other.same;
        self.repeated += other.repeated;
    }
}

impl Sum for Kept {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, one| {
            sum += one;
            sum
        })
    }
}

/// A run of pages that were written, all in mappings of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) pages: Range<u64>,
    /// Pages that are not held show zeros.
    pub(crate) anonymous: bool,
    /// The process may read them.
    pub(crate) readable: bool,
}

/// How many pages the runs have.
pub(crate) fn count(runs: &[Written]) -> usize {
    let lengths = runs.iter().map(|run| run.pages.end - run.pages.start);
    lengths.sum::<u64>() as usize
}

/// Sorts pages that were read into a map.
#[derive(Debug)]
pub(crate) struct Sorter {
    pages: PageMap,
    like: Option<PageMap>,
    kept: Kept,
    /// A page of each content that was stored, by a hash of the content.
    stored: HashMap<u64, u64>,
}

impl Sorter {
    /// Begins with the pages that did not change, and those of a relative.
    pub(crate) fn new(pages: PageMap, like: Option<PageMap>) -> Self {
        Self {
            pages,
            like,
            kept: Kept::default(),
            stored: HashMap::new(),
        }
    }

    /// Sorts the pages of these runs, which were read into the fresh pages one after another.
    pub(crate) fn all(&mut self, runs: &[Written], fresh: &mut Fresh) {
        let pages = runs.iter().flat_map(|run| {
            let anonymous = run.anonymous;
            run.pages.clone().map(move |page| (page, anonymous))
        });
        for (index, (page, anonymous)) in pages.enumerate() {
            self.page(page, fresh, index, anonymous);
        }
    }

    fn page(&mut self, page: u64, fresh: &mut Fresh, index: usize, anonymous: bool) {
        let new = fresh.page(index);
        if anonymous && is_zero(new) {
            self.kept.zero += 1;
            self.pages.remove(page..page + 1);
        } else if self.pages.get(page) == Some(new) {
            // It was written, but with what it held.
            self.kept.same += 1;
        } else if let Some(like) = self.like.as_ref().filter(|l| l.get(page) == Some(new)) {
            self.kept.same += 1;
            self.pages.share(page, like, page);
        } else {
            self.store(page, fresh, index);
        }
    }

    fn store(&mut self, page: u64, fresh: &mut Fresh, index: usize) {
        let new = fresh.page(index);
        let first = *self.stored.entry(hash(new)).or_insert(page);
        if first != page && self.pages.get(first) == Some(new) {
            self.kept.repeated += 1;
            self.pages.repeat(page, first);
        } else {
            self.kept.stored += 1;
            self.pages.put(page, fresh, index);
        }
    }

    /// All pages.
    pub(crate) fn done(self) -> (PageMap, Kept) {
        (self.pages, self.kept)
    }
}

/// A quick hash. Contents of one hash are compared before they are taken for the same.
fn hash(page: &PageBytes) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut lanes = [1_u64, 2, 3, 4];
    for words in page.chunks_exact(32) {
        for (lane, word) in lanes.iter_mut().zip(words.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            *lane = (*lane ^ word).wrapping_mul(ODD).rotate_left(29);
        }
    }
    lanes
        .into_iter()
        .fold(0, |hash, lane| (hash ^ lane).wrapping_mul(ODD))
}

/// What remains to be done for the memory of a process when it runs again. If it is dropped, its pages are lost.
#[derive(Debug)]
pub struct Work {
    pub(crate) pid: InnerPid,
    pub(crate) store: PageStore,
    /// The pages that did not change.
    pub(crate) pages: PageMap,
    /// The pages of a relative.
    pub(crate) like: Option<Pages>,
    /// Pages that were read while it stood still.
    pub(crate) read: (Vec<Written>, Fresh),
    /// Pages that were copied before it stood still, in anonymous mappings.
    pub(crate) copied: (Vec<Range<u64>>, Copies),
    /// Pages that are to be read from a snapshot.
    pub(crate) unread: Option<(Vec<Written>, Snapshot)>,
    pub(crate) promise: Promise,
}

impl Work {
    /// Whether it is little, and waits for nothing that is not known yet.
    pub(crate) fn is_quick(&self, gears: &Gears) -> bool {
        self.unread.is_none()
            && self.copied.0.is_empty()
            && self.like.as_ref().is_none_or(Pages::are_known)
            && (count(&self.read.0) as u64) < gears.sort_later
    }

    /// Does it: from then on the pages are known, or known to be lost.
    pub fn run(self) {
        let Self {
            pid,
            store,
            pages,
            like,
            read: (runs, mut fresh),
            copied: (copied, copies),
            mut unread,
            promise,
        } = self;
        // A relative whose pages are lost is none.
        let like = like.and_then(|like| like.get().ok().cloned());
        let mut sorter = Sorter::new(pages, like);
        sorter.all(&runs, &mut fresh);
        let sorted = copies.newest(copied, |page, fresh, index| {
            sorter.page(page, fresh, index, true);
        });
        let harvested = sorted.and_then(|()| match &mut unread {
            Some((runs, snapshot)) => harvest(&store, &mut sorter, runs, snapshot),
            None => Ok(()),
        });
        match harvested.during(pid, "copying the memory") {
            Ok(()) => promise.keep(sorter.done()),
            Err(e) => {
                tracing::warn!(error = %e, "a checkpoint's memory is lost");
                promise.fail(e.to_string());
            }
        }
        // Whoever waits for the pages need not wait for the snapshot's end.
        drop(unread);
    }
}

fn harvest(
    store: &PageStore,
    sorter: &mut Sorter,
    runs: &[Written],
    snapshot: &mut Snapshot,
) -> io::Result<()> {
    for portion in portions(runs) {
        expect(snapshot.maps().1, &portion)?;
        let mut fresh = store.allocate(count(&portion))?;
        let ranges = portion.iter().map(|run| run.pages.clone());
        let addresses = ranges.map(|pages| addresses_of(&pages));
        vm::read_ranges(snapshot.memory(), addresses, &mut fresh)?;
        sorter.all(&portion, &mut fresh);
    }
    Ok(())
}

/// Makes sure that a snapshot has these pages: one that it has not would be read as zeros.
fn expect(pagemap: &mut Pagemap, runs: &[Written]) -> io::Result<()> {
    let there = category::PRESENT | category::SWAPPED;
    let mut found = Vec::new();
    for run in runs.iter().filter(|run| run.anonymous) {
        found.clear();
        pagemap.scan(addresses_of(&run.pages), there, 0, &mut found)?;
        let pages: u64 = found
            .iter()
            .map(|run| pages_of(&(run.start..run.end)))
            .map(|r| r.end - r.start)
            .sum();
        if pages != run.pages.end - run.pages.start {
            return Err(io::Error::other("the snapshot has not all pages"));
        }
    }
    Ok(())
}

/// The runs, cut into lists of at most [`PORTION`] pages.
pub(crate) fn portions(runs: &[Written]) -> Vec<Vec<Written>> {
    let mut portions = Vec::new();
    let mut portion: Vec<Written> = Vec::new();
    let mut room = PORTION as u64;
    for run in runs {
        let mut rest = run.pages.clone();
        while !rest.is_empty() {
            let end = rest.end.min(rest.start + room);
            room -= end - rest.start;
            portion.push(Written {
                pages: rest.start..end,
                ..run.clone()
            });
            rest.start = end;
            if room == 0 {
                portions.push(std::mem::take(&mut portion));
                room = PORTION as u64;
            }
        }
    }
    portions.push(portion);
    portions
}
