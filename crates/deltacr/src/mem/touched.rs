//! What a process touches first after it was taken back to a state, so that it is there earlier the next time.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::sys::arena::BLOCK;

/// Blocks of a page map, in the order in which somebody waited for one of their pages. Clones are the same list.
#[derive(Clone, Debug, Default)]
pub(crate) struct Touched(Arc<Mutex<List>>);

#[derive(Debug, Default)]
struct List {
    /// A page of each, the first that is given back.
    order: Vec<u64>,
    known: BTreeSet<u64>,
}

impl Touched {
    /// Somebody waits for a page of the block of this one. What was there in time keeps its place.
    pub(crate) fn note(&self, page: u64) {
        let mut list = self.0.lock();
        if list.known.insert(page / BLOCK as u64) {
            list.order.push(page);
        }
    }

    /// A page of each block.
    pub(crate) fn order(&self) -> Vec<u64> {
        self.0.lock().order.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_told_once_and_in_the_order_of_their_first_touch() {
        let touched = Touched::default();
        let block = BLOCK as u64;
        for page in [5 * block + 3, 2, 5 * block, block - 1, 9 * block] {
            touched.clone().note(page);
        }
        assert_eq!(touched.order(), [5 * block + 3, 2, 9 * block]);
    }
}
