//! Memory of a whole tree in one process outside the sandbox: a *template*, of which processes are forked instead of being
//! filled page by page.
//!
//! Each private anonymous mapping that holds pages has a *holding address* there, congruent to its final address modulo
//! 2 MiB: then the fork moves page tables, not pages, when it takes its own into place (`mremap(2)`), and large pages stay
//! large. Everything stays anonymous memory, shared copy-on-write; and private mappings of [files] stay such.
//!
//! What is held need not be what is wanted: a process that was forked of a template is like any other from then on, and
//! whatever differs is changed in it. A template may also be a copy of another one, changed in the same way.

mod derive;
mod files;
mod room;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use crate::env::Environment;
use crate::error::{During, Result};
use crate::ids::{HostPid, InnerPid};
use crate::image::TreeImage;
use crate::mem::{AddressSpace, PAGE, Scan, Vma, merged, overlap, pages_of};
use crate::remote::{Batch, Remote};
use crate::store::PageMap;
use crate::sys::vm;

pub use derive::Derived;
use files::FilePart;
pub use files::{FileMapping, OfBase};
use room::{occupied, place, surplus};

/// Bytes of a large page, and of what one page of a page table maps.
const LARGE: u64 = 2 << 20;
/// Pages of that.
const PAGES: u64 = LARGE / PAGE;

/// A range of memory and where it is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    from: u64,
    to: Range<u64>,
    /// None of anonymous memory.
    file: Option<FilePart>,
}

impl Piece {
    fn unplaced(to: Range<u64>, file: Option<FilePart>) -> Self {
        Self { from: 0, to, file }
    }

    /// Whether it would have to be where the kernel has its own mappings.
    fn conflicts(&self, fixed: &[Range<u64>]) -> bool {
        fixed.iter().any(|f| overlap(f, &self.to).is_some())
    }

    /// The part with these final addresses, which lie in it.
    fn part(&self, to: &Range<u64>) -> Self {
        let by = to.start - self.to.start;
        Self {
            from: self.from + by,
            to: to.clone(),
            file: self.file.as_ref().map(|file| file.later(by)),
        }
    }

    fn held(&self) -> Range<u64> {
        self.from..self.from + (self.to.end - self.to.start)
    }
}

/// Where a template holds the memory of each process of an image.
#[derive(Debug)]
pub struct Holding {
    processes: BTreeMap<InnerPid, Held>,
}

/// Where the memory of one process is held.
#[derive(Debug)]
struct Held {
    /// Ascending by their final addresses.
    pieces: Vec<Piece>,
    /// The pages that are held, by their final addresses.
    pages: PageMap,
}

impl Held {
    fn new(mut pieces: Vec<Piece>, mut pages: PageMap) -> Self {
        pieces.sort_unstable_by_key(|piece| piece.to.start);
        let mut from = 0;
        for piece in &pieces {
            let held = pages_of(&piece.to);
            pages.remove(from..held.start);
            from = held.end;
        }
        pages.remove(from..u64::MAX);
        Self { pieces, pages }
    }
}

impl Holding {
    /// Decides where the process `template` is to hold the memory of `image`. `None` if there is no room, or if the kernel has
    /// placed its own mappings in that process where a process of the image needs others. Files for which `of_base` says so are to be
    /// mapped from the base.
    ///
    /// # Errors
    /// `/proc` cannot be read, or memory of the image is lost.
    pub fn arrange(
        image: &TreeImage,
        template: HostPid,
        of_base: &OfBase<'_>,
    ) -> Result<Option<Self>> {
        let (own, fixed) = occupied(template).during_tree("reading the mappings of a template")?;
        Self::arrange_around(image, own, &fixed, of_base)
    }

    fn arrange_around(
        image: &TreeImage,
        own: Vec<Range<u64>>,
        fixed: &[Range<u64>],
        of_base: &OfBase<'_>,
    ) -> Result<Option<Self>> {
        let mut processes = BTreeMap::new();
        let mut finals = Vec::new();
        for (pid, process) in &image.processes {
            let memory = &process.memory;
            let pages = memory.pages.get()?;
            finals.extend(memory.vmas.iter().map(Vma::range));
            let pieces = files::wanted(memory, pages, of_base);
            if pieces.iter().any(|piece| piece.conflicts(fixed)) {
                return Ok(None);
            }
            processes.insert(*pid, Held::new(pieces, pages.clone()));
        }
        let pieces = processes.values_mut().flat_map(|held| &mut held.pieces);
        let placed = place(pieces.collect(), own, finals);
        Ok(placed.then_some(Self { processes }))
    }

    fn pieces(&self) -> impl Iterator<Item = (&PageMap, &Piece)> {
        let all = self.processes.values();
        all.flat_map(|held| held.pieces.iter().map(|piece| (&held.pages, piece)))
    }

    /// What the template is to map: private anonymous memory, readable and writable.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        self.anonymous().map(|(_, piece)| piece.held()).collect()
    }

    fn anonymous(&self) -> impl Iterator<Item = (&PageMap, &Piece)> {
        self.pieces().filter(|(_, piece)| piece.file.is_none())
    }

    /// The files that the template is to map.
    pub fn files(&self) -> Vec<FileMapping> {
        files::mappings(self.pieces())
    }

    /// Whether it maps the base's own file with this number.
    pub fn has_file(&self, inode: u64) -> bool {
        let mut files = self.pieces().filter_map(|(_, piece)| piece.file.as_ref());
        files.any(|file| file.is(inode))
    }

    /// Bytes that are held.
    pub fn bytes(&self) -> u64 {
        let pages = self.pieces().flat_map(|(pages, piece)| {
            let runs = pages.runs(pages_of(&piece.to));
            runs.map(|run| run.end - run.start)
        });
        pages.sum::<u64>() * PAGE
    }

    /// The ranges that can be large pages: every page in them is held. Ascending in each process; those that touch are one.
    pub fn large(&self) -> Vec<Range<u64>> {
        let mut large = Vec::new();
        for (pages, piece) in self.anonymous() {
            let runs = pages.runs(pages_of(&piece.to)).collect();
            for run in merged(runs, 0) {
                let first = run.start.next_multiple_of(PAGES);
                let end = run.end / PAGES * PAGES;
                if first < end {
                    let moved = |page: u64| page * PAGE - piece.to.start + piece.from;
                    large.push(moved(first)..moved(end));
                }
            }
        }
        large
    }

    /// Writes one page into each large page to be, so that there is something to make it of.
    ///
    /// # Errors
    /// The template is gone, or there is no memory.
    pub fn touch(&self, template: HostPid, large: &[Range<u64>]) -> io::Result<()> {
        let firsts = large.iter().flat_map(|r| r.clone().step_by(LARGE as usize));
        let zeros = [0; PAGE as usize];
        vm::write_pages(template, firsts.map(|at| (at, &zeros)))
    }

    /// Writes all that is held into the template, which has mapped it.
    ///
    /// # Errors
    /// The template is gone, or there is no memory.
    pub fn fill(&self, template: HostPid) -> io::Result<()> {
        let pages = self.pieces().flat_map(|(pages, piece)| {
            let held = pages.pages(pages_of(&piece.to));
            held.map(move |(page, bytes)| (page * PAGE - piece.to.start + piece.from, bytes))
        });
        vm::write_pages(template, pages)
    }

    /// How many pages of an image are not held as they are in it.
    ///
    /// # Errors
    /// Memory of the image is lost.
    pub fn missing(&self, image: &TreeImage) -> Result<u64> {
        let nothing = PageMap::new();
        let mut missing = 0;
        for (pid, process) in &image.processes {
            let held = self.processes.get(pid).map_or(&nothing, |held| &held.pages);
            let wanted = process.memory.pages.get()?;
            held.diff(wanted, 0..u64::MAX / PAGE, |run| {
                missing += run.end - run.start
            });
        }
        Ok(missing)
    }

    /// Where it holds these addresses of a process, as far as it does and they can be written to.
    pub fn held_of(&self, pid: InnerPid, addresses: &Range<u64>) -> Vec<Range<u64>> {
        let pieces = self.processes.get(&pid).map_or(&[][..], |h| &h.pieces);
        let writable = |p: &&Piece| p.file.as_ref().is_none_or(FilePart::is_writable);
        let parts = pieces
            .iter()
            .filter(writable)
            .filter_map(|piece| Some(piece.part(&overlap(&piece.to, addresses)?).held()));
        parts.collect()
    }

    /// Whether it holds memory for a process of this number.
    pub(crate) fn has(&self, pid: InnerPid) -> bool {
        let held = self.processes.get(&pid);
        held.is_some_and(|held| !held.pieces.is_empty())
    }

    /// Makes a process that is a copy of the template keep nothing but its own memory, at its final addresses, and no descriptors.
    /// It is to be given `memory`.
    pub(crate) fn settle(&self, remote: &mut Remote, memory: &AddressSpace) -> Result<()> {
        let pid = remote.pid();
        let held = self.processes.get(&pid);
        let pieces = held.map_or(&[][..], |held| &held.pieces);
        let wanted = |area: &Range<u64>| {
            let vmas = memory.vmas.iter().map(Vma::range);
            let mut all = vmas.chain(pieces.iter().map(|piece| piece.to.clone()));
            all.any(|range| overlap(&range, area).is_some())
        };
        let doing = "taking over the memory of a template";
        remote.clear_of(wanted).during(pid, doing)?;
        let drop = surplus(remote, pieces).during(pid, doing)?;
        let close = (libc::SYS_close_range, vec![0, u32::MAX.into(), 0]);
        let mut calls = std::iter::once(close)
            .chain(
                drop.iter()
                    .map(|r| (libc::SYS_munmap, vec![r.start, r.end - r.start])),
            )
            .chain(pieces.iter().filter(|p| p.from != p.to.start).map(|piece| {
                let len = piece.to.end - piece.to.start;
                let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
                let args = vec![piece.from, len, len, flags, piece.to.start];
                (libc::SYS_mremap, args)
            }))
            .peekable();
        while calls.peek().is_some() {
            let mut batch = Batch::new();
            let mut made = Vec::new();
            while batch.fits(1, 0)
                && let Some((nr, args)) = calls.next()
            {
                let args: Vec<_> = args.into_iter().map(Into::into).collect();
                made.push(batch.must(nr, &args));
            }
            let outcome = remote.run(&batch).during(pid, doing)?;
            for call in made {
                outcome.result(call).during(pid, doing)?;
            }
        }
        Ok(())
    }

    /// Corrects what was found in a process that has [settled](Self::settle): nothing is known of it, so all counts as
    /// written; but what it took over is known. It is to be given `memory`, whose bounds are set with its
    /// [program](crate::mem::layout::write_program).
    pub(crate) fn know(&self, scan: &mut Scan, memory: &AddressSpace, env: &dyn Environment) {
        let Some(held) = self.processes.get(&scan.pid) else {
            return;
        };
        let Held { pages, pieces } = held;
        scan.layout = memory.layout;
        scan.auxv.clone_from(&memory.auxv);
        held.recognize(&mut scan.vmas, memory, env);
        let kept = |range: &Range<u64>| pieces.iter().any(|p| overlap(&p.to, range).is_some());
        scan.changes.retain(|(range, _)| !kept(range));
        scan.known = pages.clone();
    }
}
