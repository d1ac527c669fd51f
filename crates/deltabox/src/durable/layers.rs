//! What the checkpoints on disk build on, and what can be done about those that were deleted.
//!
//! A checkpoint that was deleted stays on disk as long as others build on it. One that only one other builds on is merged into that: the
//! other one is written anew, as it differs from what lies above the deleted ones. What several build on is what they share, and
//! would be written once for each of them: it stays.

use std::collections::BTreeMap;

use crate::report::CheckpointId;

/// Deleted checkpoints that hold less than this, with what they are merged into, are merged at once.
const LITTLE: u64 = 16 << 20;

/// So many deleted checkpoints in a row are merged, however little that gives back.
const LONG: usize = 32;

/// A checkpoint on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    /// What it builds on.
    pub(crate) parent: Option<CheckpointId>,
    /// What it takes, in bytes.
    pub(crate) bytes: u64,
    /// It is there for what builds on it only.
    pub(crate) deleted: bool,
    /// It can be written anew; otherwise it is left as it is.
    pub(crate) readable: bool,
}

/// All checkpoints on disk of one sandbox.
pub(crate) type Layers = BTreeMap<CheckpointId, Layer>;

/// Deleted checkpoints that lie in a row below `before`, and are to become one with `into`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Merge {
    pub(crate) into: CheckpointId,
    /// What `into` is to build on.
    pub(crate) before: Option<CheckpointId>,
    /// How much disk space it takes at most, until the old ones are gone.
    pub(crate) bytes: u64,
}

/// Deleted checkpoints that nothing builds on.
pub(crate) fn unneeded(layers: &Layers) -> Vec<CheckpointId> {
    let mut left = layers.clone();
    let mut gone = Vec::new();
    // What builds on another has a higher id.
    for (id, layer) in layers.iter().rev() {
        if layer.deleted && builders(&left, *id) == 0 {
            left.remove(id);
            gone.push(*id);
        }
    }
    gone
}

/// A merge that is worth its while.
pub(crate) fn next_merge(layers: &Layers) -> Option<Merge> {
    // One that is deleted itself is either in the middle of a row, or what several build on.
    let ends = |(id, layer): &(&CheckpointId, &Layer)| !layer.deleted || builders(layers, **id) > 1;
    let readable = layers.iter().filter(|(_, layer)| layer.readable);
    readable
        .filter(ends)
        .find_map(|(id, layer)| merge_into(layers, *id, *layer))
}

fn merge_into(layers: &Layers, into: CheckpointId, layer: Layer) -> Option<Merge> {
    let (mut before, mut bytes, mut most, mut count) = (layer.parent, layer.bytes, layer.bytes, 0);
    while let Some(id) = before
        && let Some(deleted) = layers.get(&id)
        && deleted.deleted
        && builders(layers, id) == 1
    {
        bytes += deleted.bytes;
        most = most.max(deleted.bytes);
        count += 1;
        before = deleted.parent;
    }
    // All but the largest may turn out to be void. What is written is at most three times that, so that a long row of deletions
    // costs in proportion to what was deleted.
    let worth = bytes <= LITTLE || (bytes - most) * 2 >= most || count >= LONG;
    (count > 0 && worth).then_some(Merge {
        into,
        before,
        bytes,
    })
}

fn builders(layers: &Layers, on: CheckpointId) -> usize {
    let newer = layers.range(on..).map(|(_, layer)| layer);
    newer.filter(|layer| layer.parent == Some(on)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// What a checkpoint of a test is.
    #[derive(Clone, Copy, PartialEq)]
    enum Kind {
        Used,
        Unreadable,
        Deleted,
    }

    fn layers(all: &[(u64, u64, u64, Kind)]) -> Layers {
        let all = all.iter().map(|(id, parent, mib, kind)| {
            let layer = Layer {
                parent: (*parent > 0).then_some(CheckpointId(*parent)),
                bytes: mib * MIB,
                deleted: *kind == Deleted,
                readable: *kind != Unreadable,
            };
            (CheckpointId(*id), layer)
        });
        all.collect()
    }

    use Kind::{Deleted, Unreadable, Used};

    #[test]
    fn what_nothing_builds_on_goes_with_all_that_only_it_needed() {
        let all = layers(&[
            (1, 0, 1, Used),
            (2, 1, 1, Deleted),
            (3, 2, 1, Deleted),
            (4, 1, 1, Deleted),
            (5, 4, 1, Unreadable),
        ]);
        assert_eq!(unneeded(&all), [CheckpointId(3), CheckpointId(2)]);
    }

    #[test]
    fn a_row_is_merged_into_what_builds_on_it() {
        let all = layers(&[
            (1, 0, 1, Used),
            (2, 1, 1, Deleted),
            (3, 2, 1, Deleted),
            (4, 3, 1, Used),
        ]);
        let merge = next_merge(&all).unwrap();
        assert_eq!(
            (merge.into, merge.before, merge.bytes),
            (CheckpointId(4), Some(CheckpointId(1)), 3 * MIB)
        );
    }

    #[test]
    fn what_several_build_on_stays_and_ends_the_row() {
        let all = layers(&[
            (1, 0, 1, Deleted),
            (2, 1, 1, Deleted),
            (3, 2, 1, Used),
            (4, 1, 1, Used),
        ]);
        assert_eq!(unneeded(&all), []);
        let merge = next_merge(&all).unwrap();
        assert_eq!(
            (merge.into, merge.before),
            (CheckpointId(3), Some(CheckpointId(1)))
        );
        let above = layers(&[
            (1, 0, 1, Deleted),
            (2, 1, 1, Deleted),
            (3, 2, 1, Used),
            (4, 2, 1, Used),
        ]);
        let merge = next_merge(&above).unwrap();
        assert_eq!((merge.into, merge.before), (CheckpointId(2), None));
        let one_left = layers(&[(1, 0, 1, Deleted), (3, 1, 2, Used)]);
        assert_eq!(next_merge(&one_left).unwrap().before, None);
    }

    #[test]
    fn much_is_not_written_again_for_the_sake_of_little() {
        let first = (1, 0, 300, Deleted);
        assert_eq!(next_merge(&layers(&[first, (2, 1, 4, Used)])), None);
        assert!(next_merge(&layers(&[first, (2, 1, 200, Used)])).is_some());
        let row = |n: u64| {
            let mut all = vec![first];
            all.extend((2..n).map(|id| (id, id - 1, 0, Deleted)));
            all.push((n, n - 1, 0, Used));
            layers(&all)
        };
        assert_eq!(next_merge(&row(10)), None);
        assert!(next_merge(&row(40)).is_some());
    }

    #[test]
    fn what_cannot_be_written_anew_is_left_with_what_it_needs() {
        let all = layers(&[(1, 0, 1, Deleted), (2, 1, 1, Unreadable)]);
        assert_eq!((next_merge(&all), unneeded(&all)), (None, Vec::new()));
    }
}
