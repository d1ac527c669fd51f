//! Which mappings to undo, move, make and protect, to get from one list of mappings to another.

use std::ops::Range;

use crate::mem::{Vma, merged, overlap};

/// A change of what is mapped where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step<'a> {
    /// Nothing is mapped there any more.
    Unmap(Range<u64>),
    /// This part of a mapping is made anew, over whatever is there.
    Map(Range<u64>, &'a Vma),
    /// What is there gets these `PROT_*` bits.
    Protect(Range<u64>, i32),
}

impl Step<'_> {
    /// Whether it is about a segment of System V that is to be attached.
    pub(crate) fn attaches(&self) -> bool {
        matches!(self, Step::Map(_, vma) if vma.segment().is_some())
    }
}

/// One of the kernel's own mappings goes elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) from: Range<u64>,
    pub(crate) to: u64,
}

impl Move {
    fn destination(&self) -> Range<u64> {
        self.to..self.to + (self.from.end - self.from.start)
    }
}

/// All that is to be done, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan<'a> {
    pub(crate) unmap: Vec<Step<'a>>,
    pub(crate) moves: Vec<Move>,
    pub(crate) change: Vec<Step<'a>>,
    /// What is mapped anew, ascending; everything else in the target's mappings is kept.
    pub(crate) fresh: Vec<Range<u64>>,
}

/// Makes the plan from `current` to `target`. The error tells a mapping of the kernel's that the
/// process does not have.
pub(crate) fn plan<'a>(current: &[Vma], target: &'a [Vma]) -> Result<Plan<'a>, &'a Vma> {
    let mut plan = Plan::default();
    // Mostly so: a step maps little that it leaves behind.
    if current == target {
        return Ok(plan);
    }
    plan.specials(current, target)?;
    for part in parts(current, target) {
        match (part.current, part.target) {
            (Some(_), None) => push(&mut plan.unmap, Step::Unmap(part.range)),
            (Some(c), Some(t)) if t.agrees_at(c, part.range.start) => {
                if c.prot != t.prot {
                    push(&mut plan.change, Step::Protect(part.range, t.prot));
                }
            }
            (_, Some(t)) => {
                plan.fresh.push(part.range.clone());
                push(&mut plan.change, Step::Map(part.range, t));
            }
            (None, None) => {}
        }
    }
    plan.fresh = merged(plan.fresh, 0);
    Ok(plan)
}

impl<'a> Plan<'a> {
    fn specials(&mut self, current: &[Vma], target: &'a [Vma]) -> Result<(), &'a Vma> {
        let mut have: Vec<&Vma> = current.iter().filter(|v| v.is_special()).collect();
        for want in target.iter().filter(|v| v.is_special()) {
            let same_kind =
                |v: &&Vma| v.backing == want.backing && v.end - v.start == want.end - want.start;
            let at = have.iter().position(same_kind).ok_or(want)?;
            let found = have.swap_remove(at);
            if found.start != want.start {
                self.moves.push(Move {
                    from: found.range(),
                    to: want.start,
                });
            }
        }
        let unwanted = have.iter().map(|v| Step::Unmap(v.range()));
        self.unmap.extend(unwanted);
        self.detour(current, target);
        Ok(())
    }

    /// Moves whose ways cross go by a place where nothing is mapped, now or later.
    fn detour(&mut self, current: &[Vma], target: &[Vma]) {
        let crossed = self.moves.iter().any(|a| {
            let mut others = self.moves.iter();
            others.any(|b| overlap(&a.destination(), &b.from).is_some())
        });
        if !crossed {
            return;
        }
        let taken = current.iter().chain(target).map(Vma::range).collect();
        let taken = merged(taken, 0);
        let mut room = taken.last().map_or(0, |r| r.end);
        for pair in taken.windows(2) {
            let gap = pair[1].start - pair[0].end;
            if gap > ROOM {
                // Far from both neighbours, which the engine's area may be next to.
                room = pair[0].end + gap / 2 / ROOM * ROOM;
            }
        }
        let (mut out, mut back) = (Vec::new(), Vec::new());
        for step in &self.moves {
            let len = step.from.end - step.from.start;
            out.push(Move {
                from: step.from.clone(),
                to: room,
            });
            back.push(Move {
                from: room..room + len,
                to: step.to,
            });
            room += len;
        }
        out.append(&mut back);
        self.moves = out;
    }
}

/// Room for a detour of all of the kernel's mappings, several times over.
const ROOM: u64 = 1 << 20;

fn push<'a>(steps: &mut Vec<Step<'a>>, step: Step<'a>) {
    match (steps.last_mut(), &step) {
        (Some(Step::Unmap(last)), Step::Unmap(next)) if last.end == next.start => {
            last.end = next.end;
        }
        (Some(Step::Protect(last, a)), Step::Protect(next, b))
            if last.end == next.start && a == b =>
        {
            last.end = next.end;
        }
        (Some(Step::Map(last, a)), Step::Map(next, b))
            if last.end == next.start && std::ptr::eq(*a, *b) =>
        {
            last.end = next.end;
        }
        _ => steps.push(step),
    }
}

/// A range within which neither list has a boundary.
struct Part<'c, 't> {
    range: Range<u64>,
    current: Option<&'c Vma>,
    target: Option<&'t Vma>,
}

fn parts<'c, 't>(current: &'c [Vma], target: &'t [Vma]) -> impl Iterator<Item = Part<'c, 't>> {
    let both = current.iter().chain(target).filter(|v| !v.is_special());
    let mut cuts: Vec<u64> = both.flat_map(|v| [v.start, v.end]).collect();
    cuts.sort_unstable();
    cuts.dedup();
    let (mut c, mut t) = (0, 0);
    let mut from = None;
    cuts.into_iter().filter_map(move |to| {
        let range = from.replace(to)?..to;
        Some(Part {
            current: covering(current, &mut c, range.start),
            target: covering(target, &mut t, range.start),
            range,
        })
    })
}

/// The mapping at an address. Addresses are asked for in ascending order.
fn covering<'v>(vmas: &'v [Vma], at: &mut usize, address: u64) -> Option<&'v Vma> {
    while vmas.get(*at).is_some_and(|v| v.end <= address) {
        *at += 1;
    }
    let found = vmas.get(*at)?;
    (found.start <= address && !found.is_special()).then_some(found)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::mem::{Backing, FileId};

    fn anonymous(range: Range<u64>, prot: i32) -> Vma {
        Vma {
            start: range.start,
            end: range.end,
            prot,
            shared: false,
            offset: 0,
            backing: Backing::Anonymous,
            grows_down: false,
            droppable: false,
            read_only: false,
        }
    }

    fn file(range: Range<u64>, inode: u64, offset: u64) -> Vma {
        let path = Arc::from("/f");
        Vma {
            backing: Backing::File(FileId {
                device: 1,
                inode,
                path,
            }),
            offset,
            ..anonymous(range, 1)
        }
    }

    fn special(range: Range<u64>, name: &str) -> Vma {
        Vma {
            backing: Backing::Special(Arc::from(name)),
            ..anonymous(range, 1)
        }
    }

    #[test]
    fn equal_mappings_need_no_step() {
        let vmas = [
            anonymous(0..10, 3),
            file(20..30, 1, 0),
            special(40..41, "v"),
        ];
        assert_eq!(plan(&vmas, &vmas).unwrap(), Plan::default());
    }

    #[test]
    fn only_what_differs_is_touched() {
        let current = [
            anonymous(0..10, 3),
            anonymous(20..30, 3),
            file(40..50, 1, 0),
        ];
        let target = [
            anonymous(0..4, 3),
            anonymous(6..12, 3),
            anonymous(20..24, 3),
            anonymous(24..30, 1),
            file(40..50, 1, 7),
        ];
        let plan = plan(&current, &target).unwrap();
        assert_eq!(plan.unmap, [Step::Unmap(4..6)]);
        assert_eq!(
            plan.change,
            [
                Step::Map(10..12, &target[1]),
                Step::Protect(24..30, 1),
                Step::Map(40..50, &target[4]),
            ]
        );
        assert_eq!(plan.fresh, [10..12, 40..50]);
    }

    #[test]
    fn a_part_of_a_file_mapping_is_kept_if_its_offset_fits() {
        let current = [file(0..100, 1, 0)];
        let target = [file(20..40, 1, 20)];
        let plan = plan(&current, &target).unwrap();
        assert_eq!(plan.unmap, [Step::Unmap(0..20), Step::Unmap(40..100)]);
        assert!(plan.change.is_empty());
    }

    #[test]
    fn the_kernels_mappings_move_and_make_a_detour_if_they_must() {
        let current = [special(10..14, "[vvar]"), special(14..16, "[vdso]")];
        let target = [special(12..16, "[vvar]"), special(16..18, "[vdso]")];
        let plan = plan(&current, &target).unwrap();
        assert_eq!(plan.moves.len(), 4);
        assert_eq!(plan.moves[2].to, 12);
        assert_eq!(plan.moves[3].to, 16);
        let elsewhere = [special(50..52, "[vdso]")];
        let moved = super::plan(&current, &elsewhere).unwrap();
        assert_eq!(moved.unmap, [Step::Unmap(10..14)]);
        assert_eq!(
            moved.moves,
            [Move {
                from: 14..16,
                to: 50
            }]
        );
        assert!(super::plan(&[], &target).is_err());
    }
}
