//! A template that begins as a copy of another one.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use super::{Held, Holding, Piece, is_held, occupied, place};
use crate::error::{During, Result};
use crate::ids::{HostPid, InnerPid};
use crate::image::TreeImage;
use crate::mem::pages::outside;
use crate::mem::{PAGE, Vma, addresses_of, merged, overlap, pages_of};
use crate::store::PageBytes;
use crate::sys::vm;

/// What becomes of a copy of a template, and how, in this order: ranges are unmapped, mapped, emptied; then it is [filled](Self::fill).
#[derive(Debug)]
pub struct Derived {
    /// Where the memory is held then.
    pub holding: Holding,
    /// To be unmapped.
    pub unmap: Vec<Range<u64>>,
    /// To be mapped: private anonymous memory, readable and writable.
    pub map: Vec<Range<u64>>,
    /// To be made zeros.
    pub empty: Vec<Range<u64>>,
    changed: Vec<(InnerPid, Piece)>,
}

impl Derived {
    /// Decides where the process `copy`, a copy of the template that holds `parent`, is to hold the memory of `image`. What it holds
    /// already stays where it is. `None` if that is not possible.
    ///
    /// # Errors
    /// `/proc` cannot be read, or memory of the image is lost.
    pub fn arrange(parent: &Holding, image: &TreeImage, copy: HostPid) -> Result<Option<Self>> {
        let (taken, fixed) = occupied(copy).during_tree("reading the mappings of a template")?;
        Self::arrange_around(parent, image, taken, &fixed)
    }

    fn arrange_around(
        parent: &Holding,
        image: &TreeImage,
        mut taken: Vec<Range<u64>>,
        fixed: &[Range<u64>],
    ) -> Result<Option<Self>> {
        let mut fresh = Vec::new();
        let mut kept = Vec::new();
        for (pid, process) in &image.processes {
            let (vmas, pages) = (&process.memory.vmas, process.memory.pages.get()?);
            taken.extend(vmas.iter().map(Vma::range));
            let wanted = vmas.iter().filter(|vma| is_held(pages, vma));
            let wanted: Vec<_> = wanted.map(Vma::range).collect();
            let there = parent.processes.get(pid).map_or(&[][..], |h| &h.pieces);
            kept.extend(inherited(there, &wanted).map(|piece| (*pid, piece)));
            let there: Vec<_> = there.iter().map(|piece| piece.to.clone()).collect();
            let holds = |range: &Range<u64>| pages.runs(pages_of(range)).next().is_some();
            let new = outside(&wanted, &there).into_iter().filter(holds);
            fresh.extend(new.map(|to| (*pid, Piece::unplaced(to))));
        }
        // Who takes its pieces into place must not run over one that is still where it is held.
        let images = merged(taken_by(image), 0);
        let crossed = |piece: &Piece| images.iter().any(|r| overlap(r, &piece.held()).is_some());
        if kept.iter().any(|(_, piece)| crossed(piece))
            || fresh.iter().any(|(_, piece)| piece.conflicts(fixed))
            || !place(fresh.iter_mut().map(|(_, piece)| piece).collect(), taken)
        {
            return Ok(None);
        }
        Self::between(parent, image, kept, fresh).map(Some)
    }

    /// What is to be done, given the pieces that are there already and those that are not.
    fn between(
        parent: &Holding,
        image: &TreeImage,
        kept: Vec<(InnerPid, Piece)>,
        fresh: Vec<(InnerPid, Piece)>,
    ) -> Result<Self> {
        let old = parent.pieces().map(|(_, piece)| piece.held());
        let still = kept.iter().map(|(_, piece)| piece.held()).collect();
        let unmap = outside(&merged(old.collect(), 0), &merged(still, 0));
        let map = fresh.iter().map(|(_, piece)| piece.held()).collect();
        let (mut empty, mut changed) = (Vec::new(), fresh.clone());
        for (pid, piece) in &kept {
            let (before, now) = (
                &parent.processes[pid].pages,
                image.processes[pid].memory.pages.get()?,
            );
            before.diff(now, pages_of(&piece.to), |run| {
                let held = now.runs(run.clone()).collect::<Vec<_>>();
                let gone = outside(&[run], &merged(held.clone(), 0));
                empty.extend(gone.iter().map(|run| piece.part(&addresses_of(run)).held()));
                let part = |run| (*pid, piece.part(&addresses_of(run)));
                changed.extend(held.iter().map(part));
            });
        }
        let mut processes = BTreeMap::new();
        for (pid, process) in &image.processes {
            let of_process = |all: &[(InnerPid, Piece)]| {
                let own = all.iter().filter(|(of, _)| of == pid);
                own.map(|(_, piece)| piece.clone()).collect::<Vec<_>>()
            };
            let pieces = [of_process(&kept), of_process(&fresh)].concat();
            let pages = process.memory.pages.get()?.clone();
            processes.insert(*pid, Held::new(pieces, pages));
        }
        Ok(Self {
            holding: Holding { processes },
            unmap,
            map,
            empty,
            changed,
        })
    }

    fn changed(&self) -> impl Iterator<Item = (u64, &PageBytes)> {
        self.changed.iter().flat_map(|(pid, piece)| {
            let pages = self.holding.processes[pid].pages.pages(pages_of(&piece.to));
            pages.map(|(page, bytes)| (page * PAGE - piece.to.start + piece.from, bytes))
        })
    }

    /// Bytes that it does not share with the other template.
    pub fn bytes(&self) -> u64 {
        self.changed().count() as u64 * PAGE
    }

    /// Writes what differs into the copy.
    ///
    /// # Errors
    /// It is gone, or there is no memory.
    pub fn fill(&self, copy: HostPid) -> io::Result<()> {
        vm::write_pages(copy, self.changed())
    }
}

/// The parts of the pieces that are in wanted ranges.
fn inherited(pieces: &[Piece], wanted: &[Range<u64>]) -> impl Iterator<Item = Piece> {
    pieces.iter().flat_map(move |piece| {
        let parts = wanted.iter().filter_map(|w| overlap(&piece.to, w));
        parts.map(|part| piece.part(&part))
    })
}

fn taken_by(image: &TreeImage) -> Vec<Range<u64>> {
    let vmas = image.processes.values().flat_map(|p| &p.memory.vmas);
    vmas.map(Vma::range).collect()
}
