//! Memory for blocks that are to be written: one bounded supply for the whole process.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;

use super::BLOCK_LEN;

/// The most that the blocks of all trees may take: this part of the machine's memory,
const PART_OF_MEMORY: u64 = 64;
/// and never more than this.
const MOST_BYTES: u64 = 256 << 20;

/// This part of all pages is kept when nobody needs them: to have the kernel give and clear one takes five times as long as to fill it.
const PART_SPARE: usize = 4;

/// A bounded supply of pages.
#[derive(Debug)]
pub(super) struct Pool {
    most: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    taken: usize,
    spare: Vec<Box<[u8]>>,
}

/// Memory for the bytes of one block, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Page {
    /// Empty only while this is dropped.
    bytes: Box<[u8]>,
    pool: Arc<Pool>,
}

impl Pool {
    /// A supply of `most` pages.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            state: Mutex::default(),
        })
    }

    /// The supply that all trees of this process share.
    pub(super) fn shared() -> Arc<Self> {
        static SHARED: LazyLock<Arc<Pool>> = LazyLock::new(|| {
            let machine = rustix::system::sysinfo();
            let memory = machine.totalram.saturating_mul(machine.mem_unit.into());
            let most = (memory / PART_OF_MEMORY).min(MOST_BYTES);
            Pool::new(most as usize / BLOCK_LEN)
        });
        Arc::clone(&SHARED)
    }

    /// A page that holds `bytes`, which are a block; none if all are taken.
    pub(super) fn take(self: &Arc<Self>, bytes: &[u8]) -> Option<Page> {
        let spare = {
            let mut state = self.state.lock();
            if state.taken == self.most {
                return None;
            }
            state.taken += 1;
            state.spare.pop()
        };
        let bytes = match spare {
            Some(mut spare) => {
                spare.copy_from_slice(bytes);
                spare
            }
            None => Box::from(bytes),
        };
        Some(Page {
            bytes,
            pool: Arc::clone(self),
        })
    }

    /// Whether more than half of the pages are taken.
    pub(super) fn is_scarce(&self) -> bool {
        self.state.lock().taken > self.most / 2
    }
}

impl Deref for Page {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Page {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut state = self.pool.state.lock();
        state.taken -= 1;
        if state.spare.len() < self.pool.most / PART_SPARE {
            state.spare.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_so_many_pages_and_no_more() {
        let pool = Pool::new(3);
        let block = [1; BLOCK_LEN];
        let mut taken: Vec<Page> = (0..3).map_while(|_| pool.take(&block)).collect();
        assert_eq!(taken.len(), 3);
        assert!(pool.is_scarce() && pool.take(&block).is_none());
        taken.truncate(1);
        assert!(!pool.is_scarce());
        assert_eq!(&*pool.take(&[2; BLOCK_LEN]).unwrap(), &[2; BLOCK_LEN]);
    }
}
