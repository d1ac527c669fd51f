//! Where the contents of memory are kept: a store of pages, and maps from page numbers to them.
//!
//! Maps share structure with the maps they were cloned from, so a checkpoint costs what differs
//! from the one before it. See [`PageMap`].

mod map;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

pub use map::PageMap;

use crate::sys::arena::Arena;
pub(crate) use crate::sys::arena::{Fresh, PageBytes};
pub(crate) use map::is_zero;

/// A pool of 4 KiB pages in anonymous memory, each counted by the page maps that hold it and freed
/// with the last of them.
#[derive(Clone, Debug)]
pub struct PageStore {
    arena: Arc<Arena>,
}

impl PageStore {
    /// An empty store.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            arena: Arena::new(),
        })
    }

    /// How many pages are held, by any map.
    pub fn pages(&self) -> u64 {
        self.arena.used()
    }

    /// Sees to it that the next `pages` pages can be stored without page faults. To be called
    /// while nobody waits; it makes the next capture faster, nothing else.
    ///
    /// # Errors
    /// There is no memory for them (`mmap(2)`).
    pub fn prepare(&self, pages: usize) -> io::Result<()> {
        self.arena.populate(pages)
    }

    /// Takes pages for new contents.
    pub(crate) fn allocate(&self, pages: usize) -> io::Result<Fresh> {
        self.arena.allocate(pages)
    }
}
