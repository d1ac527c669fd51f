//! What is done for a checkpoint before its stop, while the processes run.
//!
//! Where much was written, the written pages are found and write-protected again ahead of the stop, and those that are more than a
//! snapshot is to share are copied. Such a page counts as written, whatever the kernel tells of it from then on, until a checkpoint or
//! a rollback has made it part of the state that is known: what was taken is remembered ([`Ahead`]), whatever becomes of the checkpoint
//! that it was taken for.
//!
//! A copy is made after its page was protected, and is used only if the stop finds a page there that is tracked and has not been written
//! since. The kernel tells of whatever else the process did there: a mapping that was made or moved (`mremap`) is not tracked, and a page
//! that was dropped is not there, or counts as written. Nothing that was read ahead decides what else is done.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::ids::HostPid;
use crate::mem::harvest::{Written, count, portions};
use crate::mem::pages::{common, outside};
use crate::mem::{Memory, PAGE, Tracker, merged, pages_of};
use crate::procfs::OpenFiles;
use crate::store::{Fresh, PageStore};
use crate::sys::pagemap::{self, Pagemap};
use crate::sys::{process, vm};

/// The least mapping that is looked into. The kernel's own are smaller.
const LEAST: u64 = 128 << 10;
/// So small a part more than there is room for is not worth a copy, and another look.
const SMALL: u64 = 16;
/// How often pages are copied, if the program writes to them again.
const ROUNDS: u32 = 2;

/// What was taken from the kernel's record of written pages since the state that is known.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    /// The pages that were protected, as ascending ranges of addresses.
    taken: Vec<Range<u64>>,
    /// Those of them that were copied after that.
    copied: Vec<Range<u64>>,
    copies: Copies,
}

impl Ahead {
    pub(crate) fn taken(&self) -> &[Range<u64>] {
        &self.taken
    }

    pub(crate) fn copied(&self) -> &[Range<u64>] {
        &self.copied
    }

    /// The copies, which are not there any more then.
    pub(crate) fn take_copies(&mut self) -> Copies {
        self.copied.clear();
        std::mem::take(&mut self.copies)
    }

    /// These pages were protected. Copies that were made of them before are of other contents.
    fn note(&mut self, new: Vec<Range<u64>>) {
        let new = merged(new, 0);
        self.copied = outside(&self.copied, &new);
        self.taken.extend(new);
        self.taken = merged(std::mem::take(&mut self.taken), 0);
    }

    /// It is not known what was protected.
    fn lose_track(&mut self) {
        let all = 0..u64::MAX;
        self.taken = vec![all];
        self.take_copies();
    }

    fn not_copied(&self) -> Vec<Range<u64>> {
        outside(&self.taken, &self.copied)
    }

    /// A portion was copied.
    fn add(&mut self, portion: Portion) {
        let pages = portion.pages.iter();
        let addresses = pages.map(|run| run.start * PAGE..run.end * PAGE);
        self.copied.extend(addresses);
        self.copied = merged(std::mem::take(&mut self.copied), 0);
        self.copies.0.push(portion);
    }
}

/// Pages that were copied, in the order in which that was done.
#[derive(Debug, Default)]
pub(crate) struct Copies(Vec<Portion>);

/// Runs of pages, which were read into the fresh ones one after another.
#[derive(Debug)]
struct Portion {
    pages: Vec<Range<u64>>,
    fresh: Fresh,
}

impl Copies {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Hands out the newest copy of each page in these runs (ascending), as fresh page and index.
    ///
    /// # Errors
    /// There is a page without one.
    pub(crate) fn newest(
        self,
        runs: Vec<Range<u64>>,
        mut each: impl FnMut(u64, &mut Fresh, usize),
    ) -> io::Result<()> {
        let mut missing = runs;
        for Portion { pages, mut fresh } in self.0.into_iter().rev() {
            let here = common(&pages, &missing);
            let mut first = 0;
            let mut wanted = here.iter().peekable();
            for run in pages {
                while let Some(part) = wanted.next_if(|part| part.end <= run.end) {
                    for page in part.clone() {
                        each(page, &mut fresh, (first + page - run.start) as usize);
                    }
                }
                first += run.end - run.start;
            }
            missing = outside(&missing, &here);
        }
        match missing.is_empty() {
            true => Ok(()),
            false => Err(io::Error::other("pages that were copied ahead are missing")),
        }
    }
}

impl Memory<'_> {
    /// Takes the written pages of a process that may be running, of which `files` are open since it stood still; `room` is how many
    /// of them, and of those of others after it, need not be copied. It is not disturbed but by having pages protected. What fails is left to
    /// the stop.
    pub(crate) fn look_ahead(
        &self,
        host: HostPid,
        files: &OpenFiles,
        tracker: &mut Tracker,
        room: &mut u64,
    ) {
        // None is opened now: another process may have the number.
        let Ok(mut look) = Look::by(host, files) else {
            return;
        };
        if let Err(error) = look.all(self.store, tracker, *room) {
            tracing::debug!(%error, "looking ahead at process {host}");
            tracker.ahead_mut().lose_track();
        }
        *room = room.saturating_sub(pages_in(&tracker.ahead().not_copied()));
    }
}

/// What a running process is looked at by.
struct Look {
    host: HostPid,
    pidfd: Arc<File>,
    maps: Arc<File>,
    pagemap: Pagemap,
}

impl Look {
    fn by(host: HostPid, files: &OpenFiles) -> io::Result<Self> {
        let open = |name| files.get(name, || Err(io::ErrorKind::NotFound.into()));
        Ok(Self {
            host,
            pidfd: open("pidfd")?,
            maps: open("maps")?,
            pagemap: Pagemap::of(open("pagemap")?),
        })
    }

    /// Takes what was written, and copies what is too much, until that is little, or not much less than it was.
    fn all(&mut self, store: &PageStore, tracker: &mut Tracker, room: u64) -> io::Result<()> {
        let mut before = u64::MAX;
        for round in 0.. {
            let taken = self.take(tracker)?;
            let new = pages_in(&taken);
            let ahead = tracker.ahead_mut();
            ahead.note(taken);
            let left = ahead.not_copied();
            let excess = pages_in(&left).saturating_sub(room);
            if excess <= room / SMALL || round == ROUNDS || new > before / 2 {
                break;
            }
            before = new;
            self.copy(store, &left, excess, ahead);
        }
        Ok(())
    }

    /// Protects what was written in private anonymous memory, and tracks what of it is not yet.
    fn take(&mut self, tracker: &Tracker) -> io::Result<Vec<Range<u64>>> {
        let mut taken = Vec::new();
        let mut at = 0;
        while let Some(mapping) = pagemap::mapping(&self.maps, at)? {
            at = mapping.end;
            let range = mapping.start..mapping.end;
            let anonymous = !mapping.shared && (mapping.device, mapping.inode) == (0, 0);
            if !anonymous || range.end - range.start < LEAST {
                continue;
            }
            // Looked at first, for what is tracked already must keep its marks.
            if self.pagemap.has_untracked(range.clone())? && !self.track(&range, tracker)? {
                continue;
            }
            self.pagemap.take_written(range, &mut taken)?;
        }
        Ok(taken)
    }

    /// Tracks a mapping, unless it is changed just then: if it grows while a part of it is registered, the kernel makes two of it, and the
    /// program could tell (`mremap`). They are made one again.
    fn track(&mut self, range: &Range<u64>, tracker: &Tracker) -> io::Result<bool> {
        let before = self.beside(range)?;
        tracker.track_anew(range, &mut self.pagemap)?;
        let whole = before.are_or_joined(&self.beside(range)?, range);
        if !whole {
            tracker.leave(range)?;
        }
        Ok(whole)
    }

    /// What is mapped right beside a range.
    fn beside(&self, range: &Range<u64>) -> io::Result<Beside> {
        let covering = |at| {
            let found = pagemap::mapping(&self.maps, at)?;
            Ok::<_, io::Error>(found.filter(|m| m.start <= at).map(|m| m.start..m.end))
        };
        Ok(Beside {
            below: covering(range.start.saturating_sub(1))?,
            above: covering(range.end)?,
        })
    }

    /// Copies so many pages of these ranges. What cannot be read is left out.
    fn copy(&self, store: &PageStore, ranges: &[Range<u64>], pages: u64, ahead: &mut Ahead) {
        let mut rest = pages;
        let mut runs = Vec::new();
        for range in ranges {
            let all = pages_of(range);
            let pages = all.start..all.end.min(all.start + rest);
            rest -= pages.end - pages.start;
            runs.push(Written {
                pages,
                anonymous: true,
                readable: true,
            });
        }
        for portion in portions(&runs) {
            let Ok(mut fresh) = store.allocate(count(&portion)) else {
                return;
            };
            let pages: Vec<_> = portion.into_iter().map(|run| run.pages).collect();
            let addresses = pages.iter().cloned().flatten().map(|page| page * PAGE);
            let read = vm::read_pages(self.host, addresses.enumerate(), &mut fresh);
            // As long as it is there, its number was not another's.
            let is_there = process::pidfd_signal(self.pidfd.as_fd(), 0).is_ok();
            if read.is_ok() && is_there {
                ahead.add(Portion { pages, fresh });
            }
        }
    }
}

/// The mappings right below and above a range.
#[derive(Debug)]
struct Beside {
    below: Option<Range<u64>>,
    above: Option<Range<u64>>,
}

impl Beside {
    /// Whether those are still the same, but that the range may have joined them.
    fn are_or_joined(&self, after: &Self, range: &Range<u64>) -> bool {
        let below = match (&self.below, &after.below) {
            (Some(b), Some(a)) => a.start == b.start && (a.end == b.end || a.end >= range.end),
            (b, a) => b == a,
        };
        let above = match (&self.above, &after.above) {
            (Some(b), Some(a)) => a.end == b.end && (a.start == b.start || a.start <= range.start),
            (b, a) => b == a,
        };
        below && above
    }
}

fn pages_in(ranges: &[Range<u64>]) -> u64 {
    let lengths = ranges.iter().map(|range| range.end - range.start);
    lengths.sum::<u64>() / PAGE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_that_became_two_is_told_from_one_that_joined_others() {
        let beside = |below: Option<Range<u64>>, above: Option<Range<u64>>| Beside { below, above };
        let (range, none) = (10..20, beside(None, None));
        assert!(none.are_or_joined(&none, &range));
        // It had grown, downwards or upwards, or others were mapped there.
        assert!(!none.are_or_joined(&beside(None, Some(20..30)), &range));
        assert!(!none.are_or_joined(&beside(Some(5..10), None), &range));
        let both = beside(Some(5..10), Some(20..30));
        assert!(both.are_or_joined(&both, &range));
        assert!(both.are_or_joined(&beside(Some(5..20), Some(20..30)), &range));
        assert!(both.are_or_joined(&beside(Some(5..10), Some(10..30)), &range));
        assert!(both.are_or_joined(&beside(Some(5..30), Some(5..30)), &range));
        assert!(!both.are_or_joined(&beside(Some(5..10), Some(20..25)), &range));
        assert!(!both.are_or_joined(&none, &range));
    }
}
