//! Attaching segments of System V shared memory. Mapped by a file they would look the same, but `shmdt(2)` would not know
//! them, nor would they count as attached.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;

use crate::error::{During, Result};
use crate::mem::plan::Step;
use crate::mem::{Backing, Memory, PAGE, Scan, ShmKey, Vma};
use crate::remote::{Arg, Batch, Remote};

/// What may become a mapping of its own: nothing is charged for it.
const PLACEHOLDER: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
/// Calls that a process makes in one stop.
const AT_ONCE: usize = 256;

/// What one `shmat(2)` made: `shmdt(2)` undoes all that is left of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Attachment {
    key: ShmKey,
    /// Where the segment's first byte is, or was.
    base: u64,
    read_only: bool,
}

/// The part of an attachment in a range, with its `PROT_*` bits.
type Part = (Range<u64>, i32);

impl Memory<'_> {
    /// Attaches the segments that the steps map, which exist, in place of whatever the process has there.
    pub(super) fn attach(&self, remote: &mut Remote, steps: &[Step<'_>]) -> Result<()> {
        let mut attachments: BTreeMap<Attachment, Vec<Part>> = BTreeMap::new();
        for step in steps {
            if let Step::Map(range, vma) = step
                && let Backing::Shm(key) = vma.backing
            {
                let attachment = Attachment {
                    key,
                    base: range.start.wrapping_sub(vma.offset_at(range.start)),
                    read_only: vma.read_only,
                };
                let parts = attachments.entry(attachment).or_default();
                parts.push((range.clone(), vma.prot));
            }
        }
        attachments.iter().try_for_each(|(attachment, parts)| {
            let made = self.make(remote, *attachment, parts);
            made.during(remote.pid(), "attaching a System V segment")
        })
    }

    fn make(&self, remote: &mut Remote, what: Attachment, parts: &[Part]) -> io::Result<()> {
        let id = what.key.segment().ok_or(io::ErrorKind::InvalidInput)?;
        let size = self.shared.size(what.key)?.next_multiple_of(PAGE);
        let is_whole = match parts {
            [(range, _)] => (range.start, range.end - range.start) == (what.base, size),
            _ => false,
        };
        let at = match is_whole {
            true => what.base,
            false => aside(remote, parts, size)?,
        };
        let flags = libc::SHM_REMAP | if what.read_only { libc::SHM_RDONLY } else { 0 };
        let mut calls = vec![(libc::SYS_shmat, vec![id.into(), at.into(), flags.into()])];
        for (range, prot) in parts {
            let len: Arg = (range.end - range.start).into();
            if !is_whole {
                let from = at + range.start.wrapping_sub(what.base);
                let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED).into();
                let args = vec![from.into(), len, len, flags, range.start.into()];
                calls.push((libc::SYS_mremap, args));
            }
            let args = vec![range.start.into(), len, (*prot).into()];
            calls.push((libc::SYS_mprotect, args));
        }
        if !is_whole {
            calls.push((libc::SYS_munmap, vec![at.into(), size.into()]));
        }
        run(remote, &calls).map(drop)
    }
}

impl Scan {
    /// Makes the process let go of segments, which it has nowhere mapped then.
    pub(crate) fn detach(&mut self, remote: &mut Remote, ids: &BTreeSet<i32>) -> Result<()> {
        let is_one = |vma: &mut Vma| vma.segment().is_some_and(|id| ids.contains(&id));
        let unmap = |vma: Vma| {
            let args = vec![vma.start.into(), (vma.end - vma.start).into()];
            (libc::SYS_munmap, args)
        };
        let calls: Vec<_> = self.vmas.extract_if(.., is_one).map(unmap).collect();
        let done = run(remote, &calls).map(drop);
        done.during(remote.pid(), "detaching a System V segment")
    }
}

/// Finds room for a whole segment outside the ranges that parts of it are meant for.
fn aside(remote: &mut Remote, parts: &[Part], size: u64) -> io::Result<u64> {
    let map = |at: u64, len: u64, flags: i32| {
        let (none, no_file) = (libc::PROT_NONE.into(), (-1).into());
        let args = vec![at.into(), len.into(), none, flags.into(), no_file, 0.into()];
        (libc::SYS_mmap, args)
    };
    let taken = parts.iter().map(|(range, _)| {
        let len = range.end - range.start;
        map(range.start, len, PLACEHOLDER | libc::MAP_FIXED)
    });
    let room = std::iter::once(map(0, size, PLACEHOLDER));
    run(remote, &taken.chain(room).collect::<Vec<_>>())
}

/// Runs calls, of which each must succeed; returns the result of the last one.
fn run(remote: &mut Remote, calls: &[(i64, Vec<Arg>)]) -> io::Result<u64> {
    let mut last = 0;
    for some in calls.chunks(AT_ONCE) {
        let mut batch = Batch::new();
        let ids: Vec<_> = some
            .iter()
            .map(|(nr, args)| batch.must(*nr, args))
            .collect();
        let outcome = remote.run(&batch)?;
        for id in ids {
            last = outcome.result(id)?;
        }
    }
    Ok(last)
}
