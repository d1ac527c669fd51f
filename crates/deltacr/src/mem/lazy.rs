//! Lazy restore: a process runs on before its memory is back; what it touches is given to it then.
//!
//! The pages that are to go are not dropped, which takes as long as copying a third of them: their page tables are moved to
//! a holding area, from where a helper drops them later. The emptied ranges are served by a [`Pager`] until the next stop.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::env::Environment;
use crate::error::{During, Result};
use crate::mem::pager::Pager;
use crate::mem::sweeper::Sweeper;
use crate::mem::{AddressSpace, Backing, PAGE, Pages, Tracker, merged, overlap, pages_of};
use crate::orphan::Orphans;
use crate::remote::{Batch, CallId, Remote};
use crate::sys::pagemap;
use crate::sys::uffd;

/// What one page table spans: moving it as a whole costs no more than moving a page.
const TABLE: u64 = 2 << 20;
/// A page table's span is restored lazily if at least one in so many of its pages are to be put back.
const SPARSE: u64 = 4;
/// The most ranges, each of which is a mapping of its own until the next stop.
const MOST: usize = 64;

/// Memory that is being given back while the process runs, until it stops the next time.
#[derive(Debug)]
pub(crate) struct Lazy {
    /// `None` when all is back.
    pager: Option<Pager>,
    sweeper: Option<Sweeper>,
    /// Where the pages of the state before are held.
    hold: Range<u64>,
}

impl Lazy {
    /// The process runs: gives back what nobody waits for, and has the pages of the state before dropped. Before, either would
    /// take a processor from who is still to let the process run. To be called by the thread that began it.
    pub(crate) fn run_on(&mut self) {
        self.pager.iter().for_each(Pager::begin);
        self.sweeper.iter_mut().for_each(Sweeper::begin);
    }

    /// Waits until all pages are back, and those of the state before are dropped. From then on nobody serves the ranges.
    pub(crate) fn finish(&mut self) {
        self.pager = None;
        self.sweeper = None;
    }

    /// Ends it while the process stands still: nothing is left of it there. `uffd` belongs to the address space that it had.
    pub(crate) fn end(mut self, remote: &mut Remote, uffd: BorrowedFd<'_>) -> Result<()> {
        self.finish();
        let hold = self.hold;
        // It may have another program by now, which has something of its own there.
        if !uffd::is_alive(uffd, &hold) {
            return Ok(());
        }
        let mut batch = Batch::new();
        let len = hold.end - hold.start;
        batch.call(libc::SYS_munmap, &[hold.start.into(), len.into()]);
        remote
            .run(&batch)
            .during(remote.pid(), "unmapping what was held back")?;
        Ok(())
    }
}

/// What of a restore is left for later.
pub(crate) struct Plan {
    /// Opened first: without it there is no lazy restore.
    device: OwnedFd,
    /// Ranges of addresses, each within one mapping of the kernel's, ascending.
    pub(crate) ranges: Vec<Range<u64>>,
}

/// Which pages can be given back later: dense ones in private anonymous mappings, which are those of `target` by now. `runs` are
/// the pages to be put back, `avoid` what must be there at once; both ascending. `None` if that are fewer than `least` pages, or
/// the kernel has no means.
pub(crate) fn plan(
    remote: &Remote,
    target: &AddressSpace,
    runs: &[Range<u64>],
    avoid: &[Range<u64>],
    least: u64,
) -> io::Result<Option<Plan>> {
    let mappings = anonymous(remote, target)?;
    let mut ranges = Vec::new();
    let mut pages = 0;
    for span in mappings.iter().flat_map(spans) {
        let changed = count_in(runs, &pages_of(&span));
        let is_dense = changed * SPARSE * PAGE >= span.end - span.start;
        if is_dense && !avoid.iter().any(|r| overlap(r, &span).is_some()) {
            pages += changed;
            push(&mut ranges, span, &mappings);
        }
    }
    if pages < least || ranges.len() > MOST {
        return Ok(None);
    }
    let Ok(device) = uffd::device() else {
        return Ok(None);
    };
    Ok(Some(Plan { device, ranges }))
}

/// The mappings as the kernel has them, of those that are private and anonymous, and no stack.
fn anonymous(remote: &Remote, target: &AddressSpace) -> io::Result<Vec<Range<u64>>> {
    let maps = std::fs::File::open(format!("/proc/{}/maps", remote.host()))?;
    let plain = target.vmas.iter().filter(|v| {
        v.is_private()
            && v.backing == Backing::Anonymous
            && !v.grows_down
            && !v.droppable
            && v.end - v.start >= TABLE
    });
    let plain: Vec<_> = plain.map(|v| v.range()).collect();
    let mut found = Vec::new();
    for range in merged(plain, 0) {
        let mut at = range.start;
        while at < range.end
            && let Some(mapping) = pagemap::mapping(&maps, at)?
        {
            found.extend(overlap(&(mapping.start..mapping.end), &range));
            at = mapping.end;
        }
    }
    Ok(found)
}

/// The parts of a range by page table.
fn spans(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let range = range.clone();
    let first = range.start / TABLE;
    (first..range.end.div_ceil(TABLE))
        .filter_map(move |n| overlap(&(n * TABLE..(n + 1) * TABLE), &range))
}

/// How many pages of the runs (ascending) lie in a range of pages.
fn count_in(runs: &[Range<u64>], pages: &Range<u64>) -> u64 {
    let first = runs.partition_point(|run| run.end <= pages.start);
    let near = runs[first..].iter().take_while(|run| run.start < pages.end);
    near.filter_map(|run| overlap(run, pages))
        .map(|part| part.end - part.start)
        .sum()
}

/// Adds a span, to the range before it if that is of the same mapping.
fn push(ranges: &mut Vec<Range<u64>>, span: Range<u64>, mappings: &[Range<u64>]) {
    match ranges.last_mut() {
        Some(last) if last.end == span.start && !mappings.iter().any(|m| m.start == span.start) => {
            last.end = span.end;
        }
        _ => ranges.push(span),
    }
}

/// Empties the ranges of the plan, and begins to serve who waits for their pages. Those in `fresh` ranges are empty.
pub(crate) fn begin(
    remote: &mut Remote,
    tracker: &Tracker,
    plan: Plan,
    fresh: &[Range<u64>],
    pages: &Pages,
    ours: (&dyn Environment, &Orphans),
) -> Result<Lazy> {
    let pid = remote.pid();
    let doing = "setting its memory aside";
    let Plan { device, ranges } = plan;
    let uffd = make(remote, &device).during(pid, doing)?;
    let (hold, held) = set_aside(remote, &ranges).during(pid, doing)?;
    for range in &ranges {
        tracker.leave(range).during(pid, doing)?;
        uffd::register(uffd.as_fd(), range).during(pid, doing)?;
    }
    let full = ranges.iter().zip(held).filter(|(range, _)| {
        let mut fresh = fresh.iter();
        !fresh.any(|f| f.start <= range.start && range.end <= f.end)
    });
    let full: Vec<_> = full.map(|(_, held)| held).collect();
    let sweep = || Sweeper::make(remote, hold.start, &full, ours);
    let sweeper = (!full.is_empty()).then(sweep).transpose();
    let sweeper = sweeper
        .inspect_err(|e| tracing::debug!(error = %e, "no sweeper for process {pid}"))
        .unwrap_or_default();
    let map = pages.get()?.clone();
    let pager = Pager::start(uffd, &ranges, map, pages.touched()).during(pid, doing)?;
    Ok(Lazy {
        pager: Some(pager),
        sweeper,
        hold,
    })
}

/// Makes the descriptor in the process, and takes it out.
fn make(remote: &mut Remote, device: &OwnedFd) -> io::Result<OwnedFd> {
    let there = remote.give_fds(&[device.as_fd()])?[0];
    let mut make = Batch::new();
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let made = make.call(
        libc::SYS_ioctl,
        &[there.into(), uffd::NEW.into(), flags.into()],
    );
    let outcome = remote.run(&make)?;
    let made = outcome.result(made);
    let taken = match &made {
        Ok(fd) => remote.take_fd(*fd as i32),
        Err(e) => Err(io::Error::from(e.kind())),
    };
    let mut close = Batch::new();
    close.call(libc::SYS_close, &[there.into()]);
    if let Ok(fd) = made {
        close.call(libc::SYS_close, &[fd.into()]);
    }
    remote.run(&close)?;
    let uffd = taken?;
    uffd::enable(uffd.as_fd())?;
    Ok(uffd)
}

/// Moves the page tables of the ranges into a new area. Tells where that is, and where in it they are.
fn set_aside(
    remote: &mut Remote,
    ranges: &[Range<u64>],
) -> io::Result<(Range<u64>, Vec<Range<u64>>)> {
    // Room to put each where page tables can be moved whole, and for the sweeper's calls before them.
    let room = ranges.iter().map(|r| r.end - r.start + 2 * TABLE);
    let room: u64 = room.sum::<u64>() + TABLE;
    let mut reserve = Batch::new();
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let args = [
        0.into(),
        room.into(),
        prot.into(),
        flags.into(),
        (-1).into(),
        0.into(),
    ];
    let reserved = reserve.call(libc::SYS_mmap, &args);
    let start = remote.run(&reserve)?.result(reserved)?;
    let hold = start..start + room;
    let mut at = start + PAGE;
    let mut held = Vec::new();
    for range in ranges {
        let to = at.next_multiple_of(TABLE) + range.start % TABLE;
        held.push(to..to + (range.end - range.start));
        at = to + (range.end - range.start);
    }
    let mut batch = Batch::new();
    let calls: Vec<CallId> = ranges
        .iter()
        .zip(&held)
        .map(|(range, held)| {
            let len = range.end - range.start;
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
            let args = [
                range.start.into(),
                len.into(),
                len.into(),
                flags.into(),
                held.start.into(),
            ];
            batch.must(libc::SYS_mremap, &args)
        })
        .collect();
    let args = [start.into(), room.into(), libc::MADV_DONTFORK.into()];
    let spared = batch.call(libc::SYS_madvise, &args);
    let outcome = remote.run(&batch)?;
    for call in calls {
        outcome.result(call)?;
    }
    outcome.result(spared)?;
    Ok((hold, held))
}
