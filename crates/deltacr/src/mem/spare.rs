//! Keeping what did not change out of a snapshot, so that taking one costs what changed and not what there is.
//!
//! Large parts without written pages are kept from the process' children (`MADV_DONTFORK`) while the snapshot is
//! taken. The program may have done that to a mapping itself, which nothing tells cheaply; so one page of each is left as it was. If
//! the snapshot has that page mapped, the mapping was one for children, and the rest of it becomes one again.

use std::fs::File;
use std::io;
use std::ops::Range;

use crate::mem::pages::outside;
use crate::mem::{PAGE, merged, overlap};
use crate::remote::{Batch, Remote};
use crate::sys::pagemap;

/// The least that is kept out, in bytes: its page tables take longer to copy than two changes of a mapping.
const LEAST: u64 = 4 << 20;
/// Holes that do not end a part, in bytes.
const HOLE: u64 = 2 << 20;
/// The most parts: each costs the process two more mappings for a moment.
const MOST: usize = 64;

/// A part of a mapping without written pages, and the page of the same mapping before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spare {
    witness: u64,
    range: Range<u64>,
}

impl Spare {
    /// How many pages it may have.
    pub(crate) fn pages(&self) -> u64 {
        (self.range.end - self.range.start) / PAGE
    }
}

/// Finds large parts that hold `clean` pages only, none of the `written` ones (both ascending).
pub(crate) fn find(
    remote: &Remote,
    clean: &[Range<u64>],
    written: &[Range<u64>],
) -> io::Result<Vec<Spare>> {
    let mut taken = written.to_vec();
    taken.push(remote.area());
    let large = |r: &Range<u64>| r.end - r.start >= LEAST;
    let hulls: Vec<_> = merged(clean.to_vec(), HOLE)
        .into_iter()
        .filter(large)
        .collect();
    let mut spares = Vec::new();
    if hulls.is_empty() {
        return Ok(spares);
    }
    let maps = File::open(format!("/proc/{}/maps", remote.host()))?;
    for part in outside(&hulls, &merged(taken, 0)).into_iter().filter(large) {
        let mut at = part.start;
        while at < part.end
            && let Some(mapping) = pagemap::mapping(&maps, at)?
        {
            if let Some(piece) = overlap(&(mapping.start..mapping.end), &part).filter(large) {
                spares.push(Spare {
                    witness: piece.start,
                    range: piece.start + PAGE..piece.end,
                });
            }
            at = mapping.end;
        }
    }
    spares.truncate(MOST);
    Ok(spares)
}

/// Keeps the parts from children of the process.
pub(crate) fn keep_back(remote: &mut Remote, spares: &[Spare]) -> io::Result<()> {
    advise(remote, spares.iter(), libc::MADV_DONTFORK)
}

/// Takes that back where it was not so before. `child` shows what a child has mapped that was made meanwhile; without one,
/// everything counts as not having been so.
pub(crate) fn give_back(
    remote: &mut Remote,
    spares: &[Spare],
    child: Option<&File>,
) -> io::Result<()> {
    let mut ours = Vec::new();
    for spare in spares {
        let shared = match child {
            Some(maps) => pagemap::mapping(maps, spare.witness)?
                .is_some_and(|mapping| mapping.start <= spare.witness),
            None => true,
        };
        if shared {
            ours.push(spare);
        }
    }
    advise(remote, ours.into_iter(), libc::MADV_DOFORK)
}

fn advise<'a>(
    remote: &mut Remote,
    spares: impl Iterator<Item = &'a Spare>,
    advice: i32,
) -> io::Result<()> {
    let mut batch = Batch::new();
    for Spare { range, .. } in spares {
        let len = range.end - range.start;
        // Where it fails, the part is shared, which costs time only.
        let args = [range.start.into(), len.into(), advice.into()];
        batch.call(libc::SYS_madvise, &args);
    }
    if batch.is_empty() {
        return Ok(());
    }
    remote.run(&batch).map(drop)
}
