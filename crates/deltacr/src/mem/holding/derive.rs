//! A template that begins as a copy of another one.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use super::files::{self, FileMapping, OfBase};
use super::{Held, Holding, Piece, occupied, place};
use crate::error::{During, Result};
use crate::ids::{HostPid, InnerPid};
use crate::image::TreeImage;
use crate::mem::pages::outside;
use crate::mem::{PAGE, Vma, addresses_of, merged, overlap, pages_of};
use crate::store::{PageBytes, PageMap};
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
    /// Files to be mapped.
    pub files: Vec<FileMapping>,
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
    pub fn arrange(
        parent: &Holding,
        image: &TreeImage,
        copy: HostPid,
        of_base: &OfBase<'_>,
    ) -> Result<Option<Self>> {
        let (own, fixed) = occupied(copy).during_tree("reading the mappings of a template")?;
        Self::arrange_around(parent, image, (own, &fixed), of_base)
    }

    fn arrange_around(
        parent: &Holding,
        image: &TreeImage,
        (own, fixed): (Vec<Range<u64>>, &[Range<u64>]),
        of_base: &OfBase<'_>,
    ) -> Result<Option<Self>> {
        let mut fresh = Vec::new();
        let mut kept = Vec::new();
        for (pid, process) in &image.processes {
            let (memory, pages) = (&process.memory, process.memory.pages.get()?);
            let wanted = files::wanted(memory, pages, of_base);
            let inherited = match parent.processes.get(pid) {
                Some(held) => inherited(held, &wanted, pages),
                None => Vec::new(),
            };
            let there: Vec<_> = inherited.iter().map(|piece| piece.to.clone()).collect();
            let holds = |piece: &Piece| {
                piece.file.is_some() || pages.runs(pages_of(&piece.to)).next().is_some()
            };
            for piece in &wanted {
                let new = outside(std::slice::from_ref(&piece.to), &there);
                let new = new.iter().map(|to| piece.part(to)).filter(holds);
                fresh.extend(new.map(|piece| (*pid, piece)));
            }
            kept.extend(inherited.into_iter().map(|piece| (*pid, piece)));
        }
        // Who takes its pieces into place must not run over one that is still where it is held.
        let finals = merged(taken_by(image), 0);
        let crossed = |piece: &Piece| {
            let moves = piece.from != piece.to.start;
            moves && finals.iter().any(|r| overlap(r, &piece.held()).is_some())
        };
        if kept.iter().any(|(_, piece)| crossed(piece))
            || fresh.iter().any(|(_, piece)| piece.conflicts(fixed))
            || !place(
                fresh.iter_mut().map(|(_, piece)| piece).collect(),
                own,
                finals,
            )
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
        let anonymous = fresh.iter().filter(|(_, piece)| piece.file.is_none());
        let map = anonymous.map(|(_, piece)| piece.held()).collect();
        let mut with_pages = Vec::new();
        for (pid, piece) in &fresh {
            with_pages.push((image.processes[pid].memory.pages.get()?, piece));
        }
        let files = files::mappings(with_pages.into_iter());
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
            files,
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

/// The parts of what is held that are wanted as they are. What cannot be written to must hold the pages already.
fn inherited(held: &Held, wanted: &[Piece], pages: &PageMap) -> Vec<Piece> {
    let same_pages = |range: &Range<u64>| {
        let mut same = true;
        held.pages.diff(pages, pages_of(range), |_| same = false);
        same
    };
    let mut inherited = Vec::new();
    for there in &held.pieces {
        for range in wanted
            .iter()
            .filter_map(|w| Some((w, overlap(&there.to, &w.to)?)))
        {
            let (wanted, range) = range;
            let (part, file) = (there.part(&range), wanted.part(&range).file);
            let fits = part.file == file
                && file.is_none_or(|file| file.is_writable() || same_pages(&range));
            inherited.extend(fits.then_some(part));
        }
    }
    inherited
}

fn taken_by(image: &TreeImage) -> Vec<Range<u64>> {
    let vmas = image.processes.values().flat_map(|p| &p.memory.vmas);
    vmas.map(Vma::range).collect()
}
