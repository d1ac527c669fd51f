//! Memory of a whole tree in one process outside the sandbox: a *template*, of which processes are forked instead of being
//! filled page by page.
//!
//! Each private anonymous mapping that holds pages has a *holding address* there, congruent to its final address modulo
//! 2 MiB: then the fork moves page tables, not pages, when it takes its own into place (`mremap(2)`), and large pages stay
//! large. Everything stays anonymous memory, shared copy-on-write.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{During, Result};
use crate::ids::{HostPid, InnerPid};
use crate::image::TreeImage;
use crate::mem::{AddressSpace, PAGE, Scan, Vma, merged, overlap, pages_of};
use crate::remote::{Batch, Remote};
use crate::store::PageMap;
use crate::sys::pagemap::{self, Mapping};
use crate::sys::vm;

/// Bytes of a large page, and of what one page of a page table maps.
const LARGE: u64 = 2 << 20;
/// Pages of that.
const PAGES: u64 = LARGE / PAGE;
/// Kept free at both ends of the room for holding addresses, for stacks that grow and for the kernel's choices.
const MARGIN: u64 = 1 << 30;
/// Addresses that a process may have.
const ADDRESSES: Range<u64> = 1 << 32..1 << 47;

/// A range of memory and where it is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    from: u64,
    to: Range<u64>,
}

impl Piece {
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
    memory: Arc<AddressSpace>,
    pages: PageMap,
    pieces: Vec<Piece>,
}

impl Holding {
    /// Decides where the process `template` is to hold the memory of `image`. `None` if there is no room, or if the kernel has
    /// placed its own mappings in that process where a process of the image needs others.
    ///
    /// # Errors
    /// `/proc` cannot be read, or memory of the image is lost.
    pub fn arrange(image: &TreeImage, template: HostPid) -> Result<Option<Self>> {
        let (taken, fixed) =
            occupied(template).during_tree("reading the mappings of a template")?;
        Self::arrange_around(image, taken, &fixed)
    }

    fn arrange_around(
        image: &TreeImage,
        mut taken: Vec<Range<u64>>,
        fixed: &[Range<u64>],
    ) -> Result<Option<Self>> {
        let mut processes = BTreeMap::new();
        for (pid, process) in &image.processes {
            let memory = Arc::clone(&process.memory);
            let pages = memory.pages.get()?.clone();
            taken.extend(memory.vmas.iter().map(Vma::range));
            let pieces: Vec<Piece> = memory
                .vmas
                .iter()
                .filter(|vma| is_held(&pages, vma))
                .map(|vma| Piece {
                    from: 0,
                    to: vma.range(),
                })
                .collect();
            let conflicts = |piece: &Piece| fixed.iter().any(|f| overlap(f, &piece.to).is_some());
            if pieces.iter().any(conflicts) {
                return Ok(None);
            }
            let held = Held {
                memory,
                pages,
                pieces,
            };
            processes.insert(*pid, held);
        }
        let pieces = processes.values_mut().flat_map(|held| &mut held.pieces);
        let placed = place(pieces.collect(), taken);
        Ok(placed.then_some(Self { processes }))
    }

    fn pieces(&self) -> impl Iterator<Item = (&PageMap, &Piece)> {
        let all = self.processes.values();
        all.flat_map(|held| held.pieces.iter().map(|piece| (&held.pages, piece)))
    }

    /// What the template is to map: private anonymous memory, readable and writable.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        self.pieces().map(|(_, piece)| piece.held()).collect()
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
        for (pages, piece) in self.pieces() {
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

    fn of(&self, pid: InnerPid, memory: &Arc<AddressSpace>) -> Option<&[Piece]> {
        let held = self.processes.get(&pid)?;
        Arc::ptr_eq(&held.memory, memory).then_some(&held.pieces)
    }

    /// Whether this is the memory that a process of an image is to have.
    pub(crate) fn covers(&self, pid: InnerPid, memory: &Arc<AddressSpace>) -> bool {
        self.of(pid, memory).is_some()
    }

    /// Makes a process that is a copy of the template keep nothing but its own memory, at its final addresses.
    pub(crate) fn settle(&self, remote: &mut Remote, memory: &Arc<AddressSpace>) -> Result<()> {
        let pid = remote.pid();
        let pieces = self.of(pid, memory).unwrap_or_default();
        let wanted = |area: &Range<u64>| {
            let mut vmas = memory.vmas.iter();
            vmas.any(|v| overlap(&v.range(), area).is_some())
        };
        let doing = "taking over the memory of a template";
        remote.clear_of(wanted).during(pid, doing)?;
        let drop = surplus(remote, pieces).during(pid, doing)?;
        let mut calls = drop
            .iter()
            .map(|r| (libc::SYS_munmap, vec![r.start, r.end - r.start]))
            .chain(pieces.iter().map(|piece| {
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
    /// written; but what it took over is as the target has it.
    pub(crate) fn know(&self, scan: &mut Scan) {
        let Some(Held { pages, pieces, .. }) = self.processes.get(&scan.pid) else {
            return;
        };
        let kept = |range: &Range<u64>| pieces.iter().any(|p| overlap(&p.to, range).is_some());
        scan.changes.retain(|(range, _)| !kept(range));
        let mut pages = pages.clone();
        let mut from = 0;
        for piece in pieces {
            let held = pages_of(&piece.to);
            pages.remove(from..held.start);
            from = held.end;
        }
        pages.remove(from..u64::MAX);
        scan.known = pages;
    }
}

/// Whether a mapping is held: it is anonymous, and there are pages of it. A stack that grows by itself is not, for another process
/// cannot have it where it is held.
fn is_held(pages: &PageMap, vma: &Vma) -> bool {
    let kind = vma.is_private() && vma.is_anonymous() && !vma.grows_down;
    kind && pages.runs(pages_of(&vma.range())).next().is_some()
}

/// Chooses the holding addresses of all pieces where nothing is `taken`. Returns whether there is room.
fn place(pieces: Vec<&mut Piece>, taken: Ranges) -> bool {
    let room = |piece: &&mut Piece| piece.to.end - piece.to.start + 2 * LARGE;
    let Some(mut at) = largest_gap(taken, pieces.iter().map(room).sum()) else {
        return false;
    };
    for piece in pieces {
        at = at.next_multiple_of(LARGE) + piece.to.start % LARGE;
        piece.from = at;
        // At least a page apart, so that no two become one mapping.
        at = piece.held().end + PAGE;
    }
    true
}

/// Where at least so much room begins: in the middle of what is free.
fn largest_gap(taken: Vec<Range<u64>>, room: u64) -> Option<u64> {
    let mut ends = vec![0..ADDRESSES.start, ADDRESSES.end..u64::MAX];
    ends.extend(taken);
    let taken = merged(ends, 0);
    let gaps = taken.windows(2).map(|pair| pair[0].end..pair[1].start);
    let largest = gaps.max_by_key(|gap| gap.end - gap.start)?;
    let free = largest.end - largest.start;
    (free >= room + 2 * MARGIN).then_some(largest.start + MARGIN)
}

type Ranges = Vec<Range<u64>>;

/// What a process has mapped, and which of that the kernel made for itself.
fn occupied(process: HostPid) -> io::Result<(Ranges, Ranges)> {
    let (mut all, mut kernels) = (Vec::new(), Vec::new());
    let maps = File::open(format!("/proc/{process}/maps"))?;
    for found in mappings(&maps)? {
        if is_kernels(&maps, &found)? {
            kernels.push(found.start..found.end);
        }
        all.push(found.start..found.end);
    }
    Ok((all, kernels))
}

fn mappings(maps: &File) -> io::Result<Vec<Mapping>> {
    let mut all = Vec::new();
    let mut address = 0;
    while let Some(found) = pagemap::mapping(maps, address)? {
        all.push(found);
        address = found.end;
    }
    Ok(all)
}

/// Whether the kernel made a mapping for itself, such as the vDSO.
fn is_kernels(maps: &File, found: &Mapping) -> io::Result<bool> {
    let fileless = found.inode == 0 && found.device == 0;
    Ok(fileless && pagemap::mapping_name(maps, found.start)?.starts_with(b"[v"))
}

/// What a copy of a template has mapped and is not to keep.
fn surplus(remote: &Remote, pieces: &[Piece]) -> io::Result<Vec<Range<u64>>> {
    let maps = File::open(format!("/proc/{}/maps", remote.host()))?;
    let area = remote.area();
    let mut kept: Vec<Range<u64>> = pieces.iter().map(Piece::held).collect();
    kept.push(area);
    let mut surplus = Vec::new();
    for found in mappings(&maps)? {
        let range = found.start..found.end;
        if range.start < ADDRESSES.end && !is_kernels(&maps, &found)? {
            surplus.push(range);
        }
    }
    Ok(crate::mem::pages::outside(
        &merged(surplus, 0),
        &merged(kept, 0),
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges() -> impl Strategy<Value = Ranges> {
        let range = (1_u64..1 << 35, 1_u64..1 << 18, 0_u32..10);
        let range = range.prop_map(|(page, pages, shift)| {
            let start = (page * PAGE).min((1 << 47) - PAGE);
            start..(start + ((pages * PAGE) << shift)).min(1 << 47)
        });
        prop::collection::vec(range, 0..40)
    }

    proptest! {
        #[test]
        fn holding_addresses_are_free_apart_and_congruent(finals in ranges(), taken in ranges()) {
            let mut pieces: Vec<Piece> = finals.iter().cloned().map(|to| Piece { from: 0, to }).collect();
            let all: Ranges = finals.iter().chain(&taken).cloned().collect();
            if !place(pieces.iter_mut().collect(), all.clone()) {
                return Ok(());
            }
            for (index, piece) in pieces.iter().enumerate() {
                prop_assert_eq!(piece.from % LARGE, piece.to.start % LARGE);
                prop_assert!(piece.held().end <= ADDRESSES.end);
                prop_assert!(all.iter().all(|r| overlap(r, &piece.held()).is_none()));
                let near = piece.from - PAGE..piece.held().end + PAGE;
                let mut others = pieces.iter().enumerate().filter(|(other, _)| *other != index);
                prop_assert!(others.all(|(_, o)| overlap(&o.held(), &near).is_none()));
            }
        }
    }

    #[test]
    fn a_usual_process_finds_room_and_a_full_address_space_does_not() {
        let program = 0x5555_5555_4000..0x5555_5560_0000;
        let heap = 0x5555_5570_0000..0x5555_7570_0000;
        let library = 0x7fff_f000_0000..0x7fff_ffff_f000;
        let mut piece = Piece {
            from: 0,
            to: heap.clone(),
        };
        assert!(place(vec![&mut piece], vec![program, heap, library]));
        let end = (1 << 47) - (2 << 30);
        assert!(!place(vec![&mut piece], vec![0..1 << 40, 1 << 40..end]));
    }
}
