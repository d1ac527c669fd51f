//! Which places of the block file are free.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Places that are free, the first one in the file first.
type Free = BinaryHeap<Reverse<u64>>;

/// What is free in the file. A place is the number of a block in it.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// The first place that was never used.
    end: u64,
    /// Free, with space on the disk, and whatever bytes.
    ready: Free,
    /// Free, perhaps without space on the disk, and zeros.
    blank: Free,
    /// Trimming was asked for; or it cannot be done.
    pub(super) asked: bool,
}

impl Places {
    /// How many places with space on the disk are free.
    pub(super) fn ready(&self) -> usize {
        self.ready.len()
    }

    /// Takes `count` places with space on the disk, in order, if there are as many.
    pub(super) fn take(&mut self, count: usize) -> Option<Vec<u64>> {
        (self.ready.len() >= count).then(|| {
            let lowest = std::iter::from_fn(|| self.ready.pop());
            lowest.take(count).map(|Reverse(place)| place).collect()
        })
    }

    /// Takes `count` places that read as zeros, in order, perhaps without space on the disk.
    pub(super) fn take_blank(&mut self, count: usize) -> Vec<u64> {
        let next = |_| match self.blank.pop() {
            Some(Reverse(place)) => place,
            None => {
                self.end += 1;
                self.end - 1
            }
        };
        (0..count).map(next).collect()
    }

    /// Frees places that have space on the disk.
    pub(super) fn free(&mut self, places: impl IntoIterator<Item = u64>) {
        self.ready.extend(places.into_iter().map(Reverse));
    }

    /// Frees places that read as zeros.
    pub(super) fn free_blank(&mut self, places: impl IntoIterator<Item = u64>) {
        self.blank.extend(places.into_iter().map(Reverse));
    }

    /// Takes all places that have space on the disk, in order.
    pub(super) fn take_all(&mut self) -> Vec<u64> {
        let ready = std::mem::take(&mut self.ready).into_sorted_vec();
        ready
            .into_iter()
            .rev()
            .map(|Reverse(place)| place)
            .collect()
    }
}
