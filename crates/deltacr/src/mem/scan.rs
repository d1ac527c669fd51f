//! How the memory of a process differs from the last state that is known of it.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{During, Result};
use crate::ids::InnerPid;
use crate::mem::ahead::Ahead;
use crate::mem::tracker::Reset;
use crate::mem::{
    AddressSpace, Layout, Memory, PAGE, Tracker, Vma, addresses_of, layout, merged, overlap,
    pages_of, vmas,
};
use crate::remote::Remote;
use crate::store::PageMap;
use crate::sys::pagemap::{PageRun, Pagemap, category};

/// Pages with any of these facts are told.
const SOME: u64 = category::PRESENT | category::SWAPPED | category::GUARD;
/// What is told of each.
const TELL: u64 =
    category::TRACKED | category::WRITTEN | category::SWAPPED | category::ZERO | category::GUARD;
/// Not told by the kernel: counts as written, for it was before it was protected ahead of the stop.
const TAKEN: u64 = 1 << 62;
/// Not told by the kernel: was copied after that.
const COPIED: u64 = 1 << 63;
/// Parts of file mappings less than this far apart are looked at by one call.
const NEAR: u64 = 4 * PAGE;

/// What became of a run of pages since the last known state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// It may hold other contents now.
    Written,
    /// So it may, but it was copied ahead of the stop, and not written since.
    Copied,
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
    /// The pages of that state, none if nothing is known.
    pub(crate) known: PageMap,
    /// How many pages its private mappings have in memory.
    pub(crate) present: u64,
    /// The runs of those that were not written, or are copied, ascending.
    pub(crate) clean: Vec<Range<u64>>,
    /// Ranges of addresses in private mappings, ascending.
    pub(crate) changes: Vec<(Range<u64>, Change)>,
    pub(crate) reset: Reset,
    pub(crate) pagemap: Pagemap,
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
    /// `layout` are the bounds of its address space. Mappings that the tracker knows are not looked into again. Changes nothing.
    ///
    /// # Errors
    /// It has something mapped that cannot be carried, or `/proc` could not be read.
    pub fn scan(&self, remote: &Remote, tracker: Option<&Tracker>, layout: Layout) -> Result<Scan> {
        let pid = remote.pid();
        let known = tracker.map_or(&[][..], |t| &t.base().vmas);
        let vmas = vmas::read(self, remote, known)?;
        let base = tracker.map(|t| Arc::clone(t.base()));
        let known = match &base {
            Some(base) => base.pages.get()?.clone(),
            None => PageMap::new(),
        };
        let auxv = layout::auxv(remote)?;
        let doing = "scanning the pages";
        let mut scanner = Scanner {
            scan: Scan {
                pid,
                vmas: Vec::new(),
                guards: Vec::new(),
                layout,
                auxv,
                base,
                known,
                present: 0,
                clean: Vec::new(),
                changes: Vec::new(),
                reset: Reset::default(),
                pagemap: Pagemap::of(remote.proc_file("pagemap").during(pid, doing)?),
            },
        };
        let none = Ahead::default();
        let ahead = tracker.map_or(&none, Tracker::ahead);
        scanner.run(&vmas, ahead).during(pid, doing)?;
        let mut scan = scanner.scan;
        scan.vmas = vmas;
        Ok(scan)
    }
}

struct Scanner {
    scan: Scan,
}

impl Scanner {
    fn run(&mut self, vmas: &[Vma], ahead: &Ahead) -> io::Result<()> {
        let Some(last) = vmas.last() else {
            return Ok(());
        };
        // Whether a page belongs to a file costs the kernel a cache miss each, so that is asked
        // only where it matters.
        let mut coarse = Vec::new();
        let whole = vmas[0].start..last.end;
        self.scan.pagemap.scan(whole, SOME, TELL, &mut coarse)?;
        let guards = coarse.iter().filter(|run| is_guard(run));
        self.scan.guards = guards.map(|run| run.start..run.end).collect();
        let coarse = mark(coarse, ahead.taken(), TAKEN);
        let coarse = mark(coarse, ahead.copied(), COPIED);
        let mut hulls = Vec::new();
        let mut runs = &coarse[..];
        for vma in vmas.iter().filter(|v| v.is_private()) {
            hulls.push(self.survey(vma, clip(&mut runs, vma.range())));
        }
        let mut fine = Vec::new();
        for hull in merged(hulls.iter().flatten().cloned().collect(), NEAR) {
            self.scan
                .pagemap
                .scan(hull, SOME, TELL | category::FILE, &mut fine)?;
        }
        let fine = mark(fine, ahead.taken(), TAKEN);
        let (mut coarse, mut fine) = (&coarse[..], &fine[..]);
        for (vma, hull) in vmas.iter().filter(|v| v.is_private()).zip(hulls) {
            if vma.is_anonymous() {
                self.judge(vma.range(), clip(&mut coarse, vma.range()));
            } else if let Some(hull) = hull {
                self.judge(hull.clone(), clip(&mut fine, hull));
            }
        }
        Ok(())
    }

    /// Notes what is to be done for a mapping's tracking. If it is of a file, tells the part of it outside
    /// of which it shows nothing but the file, before and now.
    fn survey(&mut self, vma: &Vma, runs: impl Iterator<Item = PageRun>) -> Option<Range<u64>> {
        let mut tracked = true;
        let mut hull: Option<Range<u64>> = None;
        let mut add = |part: Range<u64>| {
            hull = Some(match &hull {
                Some(h) => h.start.min(part.start)..h.end.max(part.end),
                None => part,
            });
        };
        for run in runs {
            tracked &= run.facts & category::TRACKED != 0;
            self.scan.present += (run.end - run.start) / PAGE;
            let here = run.start..run.end;
            if run.facts & (category::TRACKED | category::WRITTEN) == 0 {
                self.scan.reset.stale.push(here.clone());
            }
            if !self.is_written(&run) || run.facts & COPIED != 0 {
                self.scan.clean.push(here.clone());
            }
            if self.is_written(&run) {
                add(here.clone());
                // What was taken ahead is protected.
                let is_taken = run.facts & TAKEN != 0;
                self.scan.reset.written.extend((!is_taken).then_some(here));
            }
        }
        if !tracked {
            self.scan.reset.untracked.push(vma.range());
        }
        if vma.is_anonymous() {
            return None;
        }
        let known = self.scan.known.runs(pages_of(&vma.range()));
        known.for_each(|pages| add(addresses_of(&pages)));
        hull
    }

    fn is_written(&self, run: &PageRun) -> bool {
        !is_clean(run) || run.facts & TAKEN != 0 || self.scan.base.is_none()
    }

    /// Decides about each page of a range, of which the kernel told these runs.
    fn judge(&mut self, range: Range<u64>, runs: impl Iterator<Item = PageRun>) {
        let mut at = range.start;
        for run in runs {
            self.dropped(at..run.start);
            at = run.end;
            let here = run.start..run.end;
            if is_guard(&run) || run.facts & (category::FILE | category::ZERO) != 0 {
                self.dropped(here);
            } else if run.facts & (COPIED | category::SWAPPED) == COPIED {
                self.scan.changes.push((here, Change::Copied));
            } else if self.is_written(&run) {
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
        let known = self.scan.known.runs(pages_of(&range));
        let changes = known.map(|pages| (addresses_of(&pages), change));
        self.scan.changes.extend(changes);
    }
}

fn is_guard(run: &PageRun) -> bool {
    run.facts & category::GUARD != 0
}

/// Whether the kernel says that the pages were not written since they were protected.
fn is_clean(run: &PageRun) -> bool {
    run.facts & (category::WRITTEN | category::TRACKED) == category::TRACKED
}

/// Adds a fact to what of the clean runs lies in these ranges (both ascending).
fn mark(runs: Vec<PageRun>, ranges: &[Range<u64>], fact: u64) -> Vec<PageRun> {
    if ranges.is_empty() {
        return runs;
    }
    let mut marked = Vec::with_capacity(runs.len() + ranges.len());
    let mut first = 0;
    for run in runs {
        while ranges.get(first).is_some_and(|r| r.end <= run.start) {
            first += 1;
        }
        let near = ranges[first..].iter().take_while(|r| r.start < run.end);
        let mut at = run.start;
        for range in near.filter(|_| is_clean(&run)) {
            let (start, end) = (range.start.max(run.start), range.end.min(run.end));
            if at < start {
                marked.push(PageRun {
                    start: at,
                    end: start,
                    ..run
                });
            }
            let facts = run.facts | fact;
            marked.push(PageRun { start, end, facts });
            at = end;
        }
        if at < run.end {
            marked.push(PageRun { start: at, ..run });
        }
    }
    marked
}

/// The parts of the runs that lie in a range. Runs that end before it are dropped: ranges are asked
/// for in ascending order.
fn clip<'r>(
    runs: &mut &'r [PageRun],
    range: Range<u64>,
) -> impl Iterator<Item = PageRun> + use<'r> {
    let before = runs.iter().take_while(|r| r.end <= range.start).count();
    *runs = &runs[before..];
    let (runs, end) = (*runs, range.end);
    runs.iter()
        .take_while(move |r| r.start < end)
        .filter_map(move |r| {
            let part = overlap(&(r.start..r.end), &range)?;
            Some(PageRun {
                start: part.start,
                end: part.end,
                facts: r.facts,
            })
        })
}
