//! What the kernel holds of a mount: which inodes it knows.

use std::collections::{HashMap, HashSet};

use parking_lot::Mutex;

use crate::node::Ino;

/// The inodes that the kernel has looked up and not forgotten.
#[derive(Debug, Default)]
pub(crate) struct Kernel {
    known: Mutex<HashMap<Ino, Known>>,
    /// Directories that were removed through the mount and are still known: the kernel never lets
    /// anything happen in those inode objects again.
    dead: Mutex<HashSet<Ino>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Known {
    lookups: u64,
    generation: u32,
}

impl Kernel {
    /// Counts a look-up that is about to be answered; gives the generation to answer with.
    pub(crate) fn count(&self, ino: Ino) -> u32 {
        let mut known = self.known.lock();
        let entry = known.entry(ino).or_default();
        entry.lookups += 1;
        entry.generation
    }

    /// Takes look-ups back. Tells whether the kernel does not know the inode any more; `gone` is called then, before it can
    /// look the inode up again.
    pub(crate) fn forget(&self, ino: Ino, lookups: u64, gone: impl FnOnce()) -> bool {
        let mut known = self.known.lock();
        let Some(entry) = known.get_mut(&ino) else {
            return false;
        };
        entry.lookups = entry.lookups.saturating_sub(lookups);
        if entry.lookups == 0 {
            known.remove(&ino);
            self.dead.lock().remove(&ino);
            gone();
            return true;
        }
        false
    }

    /// Whether the kernel may have anything cached of the inode.
    pub(crate) fn knows(&self, ino: Ino) -> bool {
        ino == crate::node::ROOT || self.known.lock().contains_key(&ino)
    }

    /// How many inodes the kernel knows.
    pub(crate) fn len(&self) -> usize {
        self.known.lock().len()
    }

    /// The generation under which the kernel knows the inode, or will.
    pub(crate) fn generation(&self, ino: Ino) -> u32 {
        self.known
            .lock()
            .get(&ino)
            .map_or(0, |known| known.generation)
    }

    /// Remembers that a directory was removed through the mount.
    pub(crate) fn set_dead(&self, ino: Ino) {
        let known = self.known.lock();
        if known.contains_key(&ino) {
            self.dead.lock().insert(ino);
        }
    }

    /// Gives a new generation to the removed directories that `lives` says are there again, so that the kernel makes
    /// new inode objects for them.
    pub(crate) fn revive(&self, lives: impl Fn(Ino) -> bool) -> Vec<Ino> {
        let mut known = self.known.lock();
        let revived: Vec<Ino> = self.dead.lock().extract_if(|ino| lives(*ino)).collect();
        for ino in &revived {
            if let Some(known) = known.get_mut(ino) {
                known.generation = known.generation.wrapping_add(1);
            }
        }
        revived
    }
}
