//! The block store: 4 KiB blocks in one file, shared by all volumes of a tree.
//!
//! A block belongs to whoever holds its [`Block`]; the last one that drops it gives its place back. The epoch in
//! which it was written tells whether the current view alone can see it, and so may overwrite it in place.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::reclaim::Call;

/// Bytes in a block; the page size, so that a page of a mapping is one block.
pub(crate) const BLOCK: u64 = 4096;

/// [`BLOCK`] as a length in memory.
pub(crate) const BLOCK_LEN: usize = BLOCK as usize;

/// Freed places are punched out of the file once this many have come together (1 MiB).
const PUNCH_BATCH: usize = 256;

/// So many freed places (64 MiB) are kept for what is written next; from then on [`DataStore::trim`] is asked for.
const FREED_ENOUGH: usize = 16 << 10;

/// The file and what is free in it.
#[derive(Debug)]
pub(crate) struct DataStore {
    file: File,
    places: Mutex<Places>,
    /// Who is to trim it.
    reclaim: OnceLock<Sender<Call>>,
}

#[derive(Debug, Default)]
struct Places {
    /// The first place that was never used.
    end: u64,
    /// Freed, with their bytes still on disk.
    freed: Vec<u64>,
    /// Freed and punched out.
    punched: Vec<u64>,
    used: u64,
    /// Trimming was asked for; or it cannot be done.
    asked: bool,
}

/// One block of data, shared by every version of a file that holds it.
pub(crate) type Block = Arc<Slot>;

/// A place in the block file.
#[derive(Debug)]
pub(crate) struct Slot {
    store: Arc<DataStore>,
    index: u64,
    epoch: u64,
}

impl Slot {
    /// The epoch in which the block was written.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Where in the file the block begins, in bytes.
    pub(crate) fn position(&self) -> u64 {
        self.index * BLOCK
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut places = self.store.places.lock();
        places.freed.push(self.index);
        places.used -= 1;
        if places.freed.len() >= FREED_ENOUGH
            && !places.asked
            && let Some(reclaim) = self.store.reclaim.get()
        {
            // Who does not listen any more has trimmed for the last time.
            places.asked = reclaim.send(Call::Work).is_ok();
        }
    }
}

impl DataStore {
    /// Makes the block file: one without a name in `dir`, so that nothing can be left behind.
    pub(crate) fn create(dir: &Path) -> io::Result<Arc<Self>> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let fd = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(Arc::new(Self {
            file: File::from(fd),
            places: Mutex::default(),
            reclaim: OnceLock::new(),
        }))
    }

    /// Asks `reclaim` to trim from now on, when much was freed.
    pub(crate) fn reclaim_by(&self, reclaim: Sender<Call>) {
        // A store has one tree, and that one thread for this.
        let _ = self.reclaim.set(reclaim);
    }

    /// Takes `count` places, next to each other where that is possible.
    pub(crate) fn allocate(self: &Arc<Self>, count: usize, epoch: u64) -> Vec<Block> {
        let mut places = self.places.lock();
        let mut taken = Vec::with_capacity(count);
        for _ in 0..count {
            let index = places.take();
            taken.push(Arc::new(Slot {
                store: Arc::clone(self),
                index,
                epoch,
            }));
        }
        taken
    }

    /// Takes `count` places that read as zeros and whose disk space is reserved.
    pub(crate) fn reserve(self: &Arc<Self>, count: u64, epoch: u64) -> Result<Vec<Block>, Errno> {
        let blocks: Vec<Block> = {
            let mut places = self.places.lock();
            let slot = |_| {
                Arc::new(Slot {
                    store: Arc::clone(self),
                    index: places.take_zeros(),
                    epoch,
                })
            };
            (0..count).map(slot).collect()
        };
        for run in blocks.chunk_by(|a, b| a.index + 1 == b.index) {
            let (start, len) = (run[0].position(), run.len() as u64 * BLOCK);
            rustix::fs::fallocate(&self.file, FallocateFlags::empty(), start, len)?;
        }
        Ok(blocks)
    }

    /// Reads bytes of the file; what lies beyond its end reads as zeros.
    pub(crate) fn read(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        read_or_zeros(&self.file, buf, position)
    }

    /// Writes bytes into the file.
    pub(crate) fn write(&self, buf: &[u8], position: u64) -> io::Result<()> {
        self.file.write_all_at(buf, position)
    }

    /// Gives the disk space of freed blocks back, if enough of them have come together.
    pub(crate) fn trim(&self) {
        let mut freed = {
            let mut places = self.places.lock();
            if places.freed.len() < PUNCH_BATCH {
                places.asked = false;
                return;
            }
            std::mem::take(&mut places.freed)
        };
        freed.sort_unstable();
        let mut kept = Vec::new();
        for run in freed.chunk_by(|a, b| a + 1 == *b) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let (start, len) = (run[0] * BLOCK, run.len() as u64 * BLOCK);
            // A filesystem that cannot punch keeps the space; the places are used again all the same.
            if rustix::fs::fallocate(&self.file, flags, start, len).is_err() {
                kept.extend_from_slice(run);
            }
        }
        let mut places = self.places.lock();
        places.asked = !kept.is_empty();
        if kept.is_empty() {
            places.punched.extend(freed.into_iter().rev());
        } else {
            places.freed.extend(freed.into_iter().rev());
        }
    }

    /// Bytes of data that some view or snapshot holds.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.places.lock().used * BLOCK
    }

    /// What the file takes of the disk.
    #[cfg(test)]
    pub(crate) fn disk_bytes(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// How much more data the disk takes.
    pub(crate) fn free_bytes(&self) -> Result<u64, Errno> {
        let disk = self.statvfs()?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    /// Size and free space of the filesystem that the data is on.
    pub(crate) fn statvfs(&self) -> Result<rustix::fs::StatVfs, Errno> {
        rustix::fs::fstatvfs(&self.file)
    }
}

impl Places {
    fn take(&mut self) -> u64 {
        self.used += 1;
        if let Some(index) = self.freed.pop().or_else(|| self.punched.pop()) {
            return index;
        }
        self.end += 1;
        self.end - 1
    }

    /// A place that reads as zeros.
    fn take_zeros(&mut self) -> u64 {
        self.used += 1;
        self.punched.pop().unwrap_or_else(|| {
            self.end += 1;
            self.end - 1
        })
    }
}

/// Fills `buf` from `position` of `file`, with zeros beyond its end.
pub(crate) fn read_or_zeros(file: &File, buf: &mut [u8], position: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], position + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buf[done..].fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_block_gives_its_place_back() {
        let dir = tempfile::tempdir().unwrap();
        let store = DataStore::create(dir.path()).unwrap();
        let mut blocks = store.allocate(1000, 1);
        assert_eq!(store.used_bytes(), 1000 * BLOCK);
        let kept = blocks.pop().unwrap();
        store.write(&[7; BLOCK_LEN], kept.position()).unwrap();
        drop(blocks);
        assert_eq!(store.used_bytes(), BLOCK);
        store.trim();
        let again = store.allocate(10, 2);
        assert!(again.iter().all(|block| block.position() < 999 * BLOCK));
        let mut buf = [0; BLOCK_LEN];
        store.read(&mut buf, kept.position()).unwrap();
        assert_eq!(buf, [7; BLOCK_LEN]);
    }

    #[test]
    fn what_was_given_back_to_the_disk_is_reserved_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = DataStore::create(dir.path()).unwrap();
        let blocks = store.allocate(1000, 1);
        let all = vec![7; 1000 * BLOCK_LEN];
        store.write(&all, blocks[0].position()).unwrap();
        drop(blocks);
        store.trim();
        let blocks = store.reserve(900, 1).unwrap();
        let mut buf = [1; BLOCK_LEN];
        for block in &blocks {
            assert!(block.position() < 1000 * BLOCK);
            store.read(&mut buf, block.position()).unwrap();
            assert_eq!(buf, [0; BLOCK_LEN]);
        }
    }

    #[test]
    fn reserved_blocks_read_as_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let store = DataStore::create(dir.path()).unwrap();
        let blocks = store.reserve(3, 1).unwrap();
        let mut buf = [1; BLOCK_LEN];
        store.read(&mut buf, blocks[2].position()).unwrap();
        assert_eq!(buf, [0; BLOCK_LEN]);
    }
}
