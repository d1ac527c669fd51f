//! Putting page contents back into a stopped process.

use std::io;
use std::ops::Range;

use crate::error::{During, Result};
use crate::mem::{AddressSpace, PAGE, addresses_of, overlap};
use crate::remote::{Batch, Remote};
use crate::store::{PageBytes, PageMap};
use crate::sys::vm;

/// `MADV_DONTNEED` that works on locked pages too (Linux 5.18).
const MADV_DONTNEED_LOCKED: i32 = 24;

/// Gives the pages in these runs (of page numbers, ascending) the contents that they have in
/// `pages`, the page map of `target`. A page that is not held there shows what lies behind the mapping again.
pub(crate) fn put_back(
    remote: &mut Remote,
    target: &AddressSpace,
    pages: &PageMap,
    runs: &[Range<u64>],
) -> Result<()> {
    drop_pages(remote, &absent(pages, runs))?;
    write_pages(remote, target, pages, runs)
}

/// The parts of the runs that the target holds no page of.
fn absent(pages: &PageMap, runs: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut absent = Vec::new();
    for run in runs {
        let mut at = run.start;
        for held in pages.runs(run.clone()) {
            if at < held.start {
                absent.push(at..held.start);
            }
            at = held.end;
        }
        if at < run.end {
            absent.push(at..run.end);
        }
    }
    absent
}

fn drop_pages(remote: &mut Remote, runs: &[Range<u64>]) -> Result<()> {
    let pid = remote.pid();
    let doing = "dropping pages";
    let mut runs = runs.iter().peekable();
    while runs.peek().is_some() {
        let mut batch = Batch::new();
        let mut calls = Vec::new();
        while batch.fits(1, 0)
            && let Some(run) = runs.next()
        {
            let at = addresses_of(run);
            let len = at.end - at.start;
            let args = [at.start.into(), len.into(), MADV_DONTNEED_LOCKED.into()];
            calls.push(batch.call(libc::SYS_madvise, &args));
        }
        let outcome = remote.run(&batch).during(pid, doing)?;
        for call in calls {
            outcome.result(call).during(pid, doing)?;
        }
    }
    Ok(())
}

fn write_pages(
    remote: &Remote,
    target: &AddressSpace,
    pages: &PageMap,
    runs: &[Range<u64>],
) -> Result<()> {
    let (pid, host) = (remote.pid(), remote.host());
    let pages = runs.iter().flat_map(|run| pages.pages(run.clone()));
    let pages = pages.map(|(page, bytes)| (page * PAGE, bytes));
    let mut vmas = target.vmas.iter().peekable();
    let mut forced: Vec<(u64, &PageBytes)> = Vec::new();
    let easy = pages.filter(|(address, bytes)| {
        while vmas.next_if(|v| v.end <= *address).is_some() {}
        let writable = vmas.peek().is_some_and(|v| v.prot & libc::PROT_WRITE != 0);
        if !writable {
            forced.push((*address, bytes));
        }
        writable
    });
    vm::write_pages(host, easy).during(pid, "writing the memory")?;
    // What the process itself may not write is written by its tracer's right.
    for (address, bytes) in forced {
        let written: io::Result<()> = remote.write(address, bytes);
        written.during(pid, "writing the memory")?;
    }
    Ok(())
}

/// The parts of the ranges `a` (ascending) that lie in the ranges `b` (ascending).
pub(crate) fn common(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut out = Vec::new();
    let mut first = 0;
    for range in a {
        while b.get(first).is_some_and(|r| r.end <= range.start) {
            first += 1;
        }
        let near = b[first..].iter().take_while(|r| r.start < range.end);
        out.extend(near.filter_map(|r| overlap(range, r)));
    }
    out
}

/// The parts of the ranges `a` that lie outside of the ranges `b` (both ascending).
pub(crate) fn outside(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut out = Vec::new();
    let mut first = 0;
    for range in a {
        while b.get(first).is_some_and(|r| r.end <= range.start) {
            first += 1;
        }
        let mut at = range.start;
        for hole in b[first..].iter().take_while(|r| r.start < range.end) {
            if at < hole.start {
                out.push(at..hole.start);
            }
            at = at.max(hole.end);
        }
        if at < range.end {
            out.push(at..range.end);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_by_ranges() {
        let a = [0..10, 20..30, 40..50];
        let b = [5..25, 28..29, 60..70];
        assert_eq!(common(&a, &b), [5..10, 20..25, 28..29]);
        assert_eq!(outside(&a, &b), [0..5, 25..28, 29..30, 40..50]);
        assert_eq!(outside(&a, &[]), a);
        assert_eq!(common(&a, &[]), []);
    }
}
