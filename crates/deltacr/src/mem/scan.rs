//! How the memory of a process differs from the last state that is known of it.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{During, Result};
use crate::ids::InnerPid;
use crate::mem::tracker::Reset;
use crate::mem::{
    AddressSpace, Layout, Memory, Tracker, Vma, addresses_of, layout, overlap, pages_of, vmas,
};
use crate::remote::Remote;
use crate::store::PageMap;
use crate::sys::pagemap::{self, PageRun, category};

const THERE: u64 = category::PRESENT | category::SWAPPED;

/// What became of a run of pages since the last known state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// It may hold other contents now.
    Written,
    /// It shows what lies behind the mapping again.
    Dropped,
}

/// The memory of a stopped process as it is now, without its contents: what is mapped, and which
/// pages may differ from the last known state. Good as long as the process stands still.
#[derive(Debug)]
pub struct Scan {
    pub(crate) pid: InnerPid,
    pub(crate) vmas: Vec<Vma>,
    pub(crate) guards: Vec<Range<u64>>,
    pub(crate) layout: Layout,
    pub(crate) auxv: Vec<u8>,
    /// The last known state; `None` if nothing is known, so that every page is told as written.
    pub(crate) base: Option<Arc<AddressSpace>>,
    /// Ranges of addresses in private mappings, ascending.
    pub(crate) changes: Vec<(Range<u64>, Change)>,
    pub(crate) reset: Reset,
}

impl Scan {
    /// How many pages may differ from the last known state.
    pub fn changed_pages(&self) -> u64 {
        let lengths = self.changes.iter().map(|(r, _)| pages_of(r));
        lengths.map(|pages| pages.end - pages.start).sum()
    }

    /// The program's code: where the executable is mapped.
    pub fn executable(&self) -> Option<&crate::mem::FileId> {
        crate::mem::executable(&self.vmas, &self.layout)
    }
}

impl Memory<'_> {
    /// Finds out how a stopped process' memory differs from the state that its tracker knows.
    /// `brk` is its program break ([`layout::program_break`]). Changes nothing.
    ///
    /// # Errors
    /// It has something mapped that cannot be carried, or `/proc` could not be read.
    pub fn scan(&self, remote: &Remote, tracker: Option<&Tracker>, brk: u64) -> Result<Scan> {
        let (pid, host) = (remote.pid(), remote.host());
        let base = tracker.map(|t| Arc::clone(t.base()));
        let known = base.as_ref().map_or(&[][..], |b| &b.vmas);
        let vmas = vmas::read(self, remote, known)?;
        let (layout, auxv) = layout::read(remote, brk)?;
        let pagemap =
            File::open(format!("/proc/{host}/pagemap")).during(pid, "scanning the pages")?;
        let mut scanner = Scanner {
            pagemap,
            empty: PageMap::new(),
            scan: Scan {
                pid,
                vmas: Vec::new(),
                guards: Vec::new(),
                layout,
                auxv,
                base,
                changes: Vec::new(),
                reset: Reset::default(),
            },
        };
        scanner.run(&vmas).during(pid, "scanning the pages")?;
        let mut scan = scanner.scan;
        scan.vmas = vmas;
        Ok(scan)
    }
}

struct Scanner {
    pagemap: File,
    empty: PageMap,
    scan: Scan,
}

impl Scanner {
    fn run(&mut self, vmas: &[Vma]) -> std::io::Result<()> {
        let Some(last) = vmas.last() else {
            return Ok(());
        };
        // Whether a page belongs to a file costs the kernel a cache miss each, so that is asked
        // only where it matters.
        let tell = category::TRACKED
            | category::WRITTEN
            | category::SWAPPED
            | category::ZERO
            | category::GUARD;
        let mut runs = Vec::new();
        let whole = vmas[0].start..last.end;
        pagemap::scan(&self.pagemap, whole, THERE | category::GUARD, tell, |r| {
            runs.push(r);
        })?;
        let mut first = 0;
        for vma in vmas {
            while runs.get(first).is_some_and(|r| r.end <= vma.start) {
                first += 1;
            }
            if vma.is_private() {
                let here = clip(&runs[first..], &vma.range());
                self.vma(vma, here)?;
            }
        }
        Ok(())
    }

    fn vma(&mut self, vma: &Vma, runs: Vec<PageRun>) -> std::io::Result<()> {
        if runs.iter().any(|r| r.facts & category::TRACKED == 0) {
            self.scan.reset.untracked.push(vma.range());
        }
        let written = runs.iter().filter(|r| self.is_written(r));
        let written: Vec<Range<u64>> = written.map(|r| r.start..r.end).collect();
        if vma.is_anonymous() {
            self.judge(&vma.range(), &runs);
        } else if let Some(hull) = self.hull(vma, &written) {
            let mut runs = Vec::new();
            let tell = category::TRACKED
                | category::WRITTEN
                | category::FILE
                | category::SWAPPED
                | category::GUARD;
            let some = THERE | category::GUARD;
            pagemap::scan(&self.pagemap, hull.clone(), some, tell, |r| runs.push(r))?;
            self.judge(&hull, &runs);
        }
        self.scan.reset.written.extend(written);
        Ok(())
    }

    fn is_written(&self, run: &PageRun) -> bool {
        let clean = run.facts & (category::WRITTEN | category::TRACKED) == category::TRACKED;
        !clean || self.scan.base.is_none()
    }

    fn base_pages(&self) -> &PageMap {
        self.scan.base.as_ref().map_or(&self.empty, |b| &b.pages)
    }

    /// The part of a private file mapping outside of which it shows nothing but the file, before
    /// and now.
    fn hull(&self, vma: &Vma, written: &[Range<u64>]) -> Option<Range<u64>> {
        let known = self.base_pages().runs(pages_of(&vma.range()));
        let known = known.map(|pages| addresses_of(&pages));
        let parts = known.chain(written.iter().cloned());
        parts.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
    }

    /// Decides about each page of a range, of which the kernel told these runs.
    fn judge(&mut self, range: &Range<u64>, runs: &[PageRun]) {
        let mut at = range.start;
        for run in runs {
            self.dropped(at..run.start);
            at = run.end;
            let here = run.start..run.end;
            if run.facts & category::GUARD != 0 {
                self.dropped(here.clone());
                self.scan.guards.push(here);
            } else if run.facts & (category::FILE | category::ZERO) != 0 {
                self.dropped(here);
            } else if self.is_written(run) {
                self.scan.changes.push((here, Change::Written));
            } else if run.facts & category::SWAPPED != 0 {
                // Swapped out, or the mark that a dropped page of a file mapping leaves behind.
                self.known_parts(here, Change::Written);
            }
        }
        self.dropped(at..range.end);
    }

    fn dropped(&mut self, range: Range<u64>) {
        self.known_parts(range, Change::Dropped);
    }

    /// Notes a change of those pages of a range that the last known state holds.
    fn known_parts(&mut self, range: Range<u64>, change: Change) {
        if range.is_empty() {
            return;
        }
        let Some(base) = self.scan.base.clone() else {
            return;
        };
        let known = base.pages.runs(pages_of(&range));
        let changes = known.map(|pages| (addresses_of(&pages), change));
        self.scan.changes.extend(changes);
    }
}

/// The parts of the first runs that lie in a range, which none ends before.
fn clip(runs: &[PageRun], range: &Range<u64>) -> Vec<PageRun> {
    runs.iter()
        .take_while(|r| r.start < range.end)
        .filter_map(|r| {
            let part = overlap(&(r.start..r.end), range)?;
            Some(PageRun {
                start: part.start,
                end: part.end,
                facts: r.facts,
            })
        })
        .collect()
}
