//! Where a template can hold memory: what is free in its address space.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;

use super::{LARGE, Piece};
use crate::ids::HostPid;
use crate::mem::{PAGE, merged, overlap, pages::outside};
use crate::remote::Remote;
use crate::sys::pagemap::{self, Mapping};

/// Kept free at both ends of the room for holding addresses, for stacks that grow and for the kernel's choices.
const MARGIN: u64 = 1 << 30;
/// Kept free around what the template needs for itself where memory is held in place, for its own stack and heap.
const GROWTH: u64 = 16 << 20;
/// Addresses that a process may have.
const ADDRESSES: Range<u64> = 1 << 32..1 << 47;

/// Chooses the holding addresses of all pieces: where they are to be in the end if the template has nothing of its `own` near, and
/// no other process' memory is held there; else where no process is to have anything, which `finals` tell. Returns whether there
/// is room.
pub(super) fn place(pieces: Vec<&mut Piece>, own: Ranges, finals: Ranges) -> bool {
    let elsewhere = in_place(pieces, &own);
    if elsewhere.is_empty() {
        return true;
    }
    let room = |piece: &&mut Piece| piece.to.end - piece.to.start + 2 * LARGE;
    let taken = [own, finals].concat();
    let Some(mut at) = largest_gap(taken, elsewhere.iter().map(room).sum()) else {
        return false;
    };
    for piece in elsewhere {
        at = at.next_multiple_of(LARGE) + piece.to.start % LARGE;
        piece.from = at;
        // At least a page apart, so that no two become one mapping.
        at = piece.held().end + PAGE;
    }
    true
}

/// Places what can be held in place. Returns the others.
fn in_place<'a>(pieces: Vec<&'a mut Piece>, own: &[Range<u64>]) -> Vec<&'a mut Piece> {
    let near = |r: &Range<u64>| r.start.saturating_sub(GROWTH)..r.end.saturating_add(GROWTH);
    let own: Ranges = own.iter().map(near).collect();
    let mut there = BTreeMap::new();
    let mut elsewhere = Vec::new();
    for piece in pieces {
        let Range { start, end } = piece.to;
        let before = there.range(..end).next_back();
        let free = before.is_none_or(|(_, before_end)| *before_end <= start)
            && own.iter().all(|r| overlap(r, &piece.to).is_none());
        if free {
            there.insert(start, end);
            piece.from = start;
        } else {
            elsewhere.push(piece);
        }
    }
    elsewhere
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

pub(super) type Ranges = Vec<Range<u64>>;

/// What a process has mapped, and which of that the kernel made for itself.
pub(super) fn occupied(process: HostPid) -> io::Result<(Ranges, Ranges)> {
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
pub(super) fn surplus(remote: &Remote, pieces: &[Piece]) -> io::Result<Vec<Range<u64>>> {
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
    Ok(outside(&merged(surplus, 0), &merged(kept, 0)))
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
        fn holding_addresses_are_free_apart_and_congruent(finals in ranges(), own in ranges()) {
            let mut pieces: Vec<Piece> = finals.iter().cloned().map(|to| Piece::unplaced(to, None)).collect();
            let all: Ranges = finals.iter().chain(&own).cloned().collect();
            if !place(pieces.iter_mut().collect(), own.clone(), finals.clone()) {
                return Ok(());
            }
            for (index, piece) in pieces.iter().enumerate() {
                prop_assert_eq!(piece.from % LARGE, piece.to.start % LARGE);
                prop_assert!(piece.held().end <= ADDRESSES.end);
                let others = || pieces.iter().enumerate().filter(|(other, _)| *other != index);
                prop_assert!(own.iter().all(|r| overlap(r, &piece.held()).is_none()));
                prop_assert!(others().all(|(_, o)| overlap(&o.held(), &piece.held()).is_none()));
                if piece.from == piece.to.start {
                    continue;
                }
                prop_assert!(all.iter().all(|r| overlap(r, &piece.held()).is_none()));
                let near = piece.from - PAGE..piece.held().end + PAGE;
                prop_assert!(others().all(|(_, o)| overlap(&o.held(), &near).is_none()));
            }
        }
    }

    #[test]
    fn a_usual_process_finds_room_and_a_full_address_space_does_not() {
        let program = 0x5555_5555_4000..0x5555_5560_0000;
        let heap = 0x5555_5570_0000..0x5555_7570_0000;
        let library = 0x7fff_f000_0000..0x7fff_ffff_f000;
        let mut piece = Piece::unplaced(heap.clone(), None);
        let finals = vec![program, heap.clone(), library];
        assert!(place(vec![&mut piece], Vec::new(), finals.clone()));
        assert_eq!(piece.held(), heap, "nothing is in the way");
        let near = heap.end + PAGE..heap.end + 2 * PAGE;
        assert!(place(vec![&mut piece], vec![near], finals));
        assert!(overlap(&piece.held(), &heap).is_none());
        let end = (1 << 47) - (2 << 30);
        let full = vec![0..1 << 40, 1 << 40..end];
        assert!(!place(vec![&mut piece], full, Vec::new()));
    }
}
