//! The block store: 4 KiB blocks in one file, shared by all volumes of a tree.
//!
//! A block belongs to whoever holds its [`Block`]; the last one that drops it gives its place back. The epoch in
//! which it was written tells whether the current view alone can see it, and so may overwrite it in place.
//!
//! Every place that is given out has its space on the disk already. So what is written a little at a time can stay in memory for a
//! moment, and be written into the file with what lies beside it.

mod buffer;
mod places;
mod pool;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::reclaim::Call;
use buffer::{Buffer, Urge};
use places::Places;
use pool::Pool;

/// Bytes in a block; the page size, so that a page of a mapping is one block.
pub(crate) const BLOCK: u64 = 4096;

/// [`BLOCK`] as a length in memory.
pub(crate) const BLOCK_LEN: usize = BLOCK as usize;

/// Freed places are punched out of the file once this many have come together (1 MiB).
const PUNCH_BATCH: usize = 256;

/// So many freed places (64 MiB) are kept for what is written next; from then on [`DataStore::trim`] is asked for.
const FREED_ENOUGH: usize = 16 << 10;

/// Space on the disk is taken for so many places (256 KiB) at a time.
const AHEAD: usize = 64;

/// What is written in longer pieces goes into the file at once: that takes little longer than copying it.
const SMALL: usize = 32 << 10;

/// The file and what is free in it.
#[derive(Debug)]
pub(crate) struct DataStore {
    file: File,
    state: Mutex<State>,
    /// How many blocks there are.
    used: AtomicU64,
    /// Who is to trim it, and to write back what is in memory; nothing stays there without.
    reclaim: OnceLock<Sender<Call>>,
}

#[derive(Debug)]
struct State {
    places: Places,
    buffer: Buffer,
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
        self.store.used.fetch_sub(1, Ordering::Relaxed);
        self.store.free(self.index);
    }
}

impl DataStore {
    /// Makes the block file: one without a name in `dir`, so that nothing can be left behind.
    pub(crate) fn create(dir: &Path) -> io::Result<Arc<Self>> {
        Self::with_pool(dir, Pool::shared())
    }

    fn with_pool(dir: &Path, pool: Arc<Pool>) -> io::Result<Arc<Self>> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let fd = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(Arc::new(Self {
            file: File::from(fd),
            state: Mutex::new(State {
                places: Places::default(),
                buffer: Buffer::new(pool),
            }),
            used: AtomicU64::new(0),
            reclaim: OnceLock::new(),
        }))
    }

    /// Asks `reclaim` from now on to trim, when much was freed, and to write back.
    pub(crate) fn reclaim_by(&self, reclaim: Sender<Call>) {
        // A store has one tree, and that one thread for this.
        let _ = self.reclaim.set(reclaim);
    }

    /// Takes `count` places, next to each other where that is possible, whose disk space is reserved.
    pub(crate) fn allocate(self: &Arc<Self>, count: usize, epoch: u64) -> io::Result<Vec<Block>> {
        loop {
            let taken = {
                let places = &mut self.state.lock().places;
                let taken = places.take(count);
                taken.ok_or_else(|| count - places.ready())
            };
            let missing = match taken {
                Ok(taken) => return Ok(self.slots(taken, epoch)),
                Err(missing) => missing,
            };
            let more = match self.secure(missing.max(AHEAD)) {
                Err(Errno::NOSPC | Errno::DQUOT) => self.secure(missing)?,
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.without_space(missing),
                more => more?,
            };
            self.state.lock().places.free(more);
        }
    }

    /// Takes `count` places that read as zeros and whose disk space is reserved.
    pub(crate) fn reserve(self: &Arc<Self>, count: usize, epoch: u64) -> Result<Vec<Block>, Errno> {
        let places = match self.secure(count) {
            // The free places that have their space already are not blank.
            Err(Errno::NOSPC | Errno::DQUOT) => {
                self.give_back(|| true);
                self.secure(count)?
            }
            other => other?,
        };
        Ok(self.slots(places, epoch))
    }

    fn slots(self: &Arc<Self>, places: Vec<u64>, epoch: u64) -> Vec<Block> {
        self.used.fetch_add(places.len() as u64, Ordering::Relaxed);
        let slot = |index| {
            Arc::new(Slot {
                store: Arc::clone(self),
                index,
                epoch,
            })
        };
        places.into_iter().map(slot).collect()
    }

    /// Takes `count` places that read as zeros, and the disk space for them.
    fn secure(&self, count: usize) -> Result<Vec<u64>, Errno> {
        let taken = self.state.lock().places.take_blank(count);
        let reserve = |run: &[u64]| {
            let (start, len) = (run[0] * BLOCK, run.len() as u64 * BLOCK);
            rustix::fs::fallocate(&self.file, FallocateFlags::empty(), start, len)
        };
        let reserved = runs(&taken).try_for_each(reserve);
        match reserved {
            Ok(()) => Ok(taken),
            Err(error) => {
                self.state.lock().places.free_blank(taken);
                Err(error)
            }
        }
    }

    /// Takes `count` places on a filesystem that does not reserve space: whether there is some shows when they are written, so that has to be
    /// done at once.
    fn without_space(&self, count: usize) -> Vec<u64> {
        let state = &mut *self.state.lock();
        state.buffer.close();
        state.places.take_blank(count)
    }

    fn free(&self, place: u64) {
        let mut state = self.state.lock();
        let State { places, buffer } = &mut *state;
        if buffer.discard(place) {
            places.free([place]);
        }
        if places.ready() >= FREED_ENOUGH
            && !places.asked
            && let Some(reclaim) = self.reclaim.get()
        {
            // Who does not listen any more has trimmed for the last time.
            places.asked = reclaim.send(Call::Work).is_ok();
        }
    }

    /// Reads bytes of blocks; what was never written reads as zeros.
    pub(crate) fn read(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        let in_file = self.state.lock().buffer.read(buf, position);
        for part in in_file {
            let at = position + part.start as u64;
            read_or_zeros(&self.file, &mut buf[part], at)?;
        }
        Ok(())
    }

    /// Writes bytes into blocks.
    pub(crate) fn write(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        let absent = self.state.lock().buffer.overwrite(bytes, position);
        for part in absent {
            let at = position + part.start as u64;
            let bytes = &bytes[part];
            if bytes.len() > SMALL || self.reclaim.get().is_none() {
                self.file.write_all_at(bytes, at)?;
            } else {
                self.write_small(bytes, at)?;
            }
        }
        Ok(())
    }

    /// Writes bytes into blocks that are not in memory; then they are, if there is room.
    fn write_small(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let at = position + (bytes.len() - rest.len()) as u64;
            let (place, within) = (at / BLOCK, (at % BLOCK) as usize);
            let (piece, more) = rest.split_at(rest.len().min(BLOCK_LEN - within));
            rest = more;
            let taken = if piece.len() == BLOCK_LEN {
                self.take_in(place, piece)
            } else {
                let mut whole = [0; BLOCK_LEN];
                read_or_zeros(&self.file, &mut whole, place * BLOCK)?;
                whole[within..within + piece.len()].copy_from_slice(piece);
                self.take_in(place, &whole)
            };
            if !taken {
                self.file.write_all_at(piece, at)?;
            }
        }
        Ok(())
    }

    /// Keeps a block in memory, to be written into the file later; tells whether there was room.
    fn take_in(&self, place: u64, bytes: &[u8]) -> bool {
        let taken = self.state.lock().buffer.take_in(place, bytes);
        let call = match taken {
            Some(Urge::First) => Call::WriteSoon,
            Some(Urge::Scarce) => Call::WriteNow,
            Some(Urge::Nothing) | None => return taken.is_some(),
        };
        // Who does not listen any more outlives all volumes, and so all that write.
        let _ = self.reclaim.get().map(|reclaim| reclaim.send(call));
        true
    }

    /// Writes blocks that are in memory into the file. Tells whether some are left: they were written to meanwhile, or the file cannot be written.
    pub(crate) fn write_back(&self) -> bool {
        let mut bytes = Vec::new();
        let mut from = 0;
        loop {
            let off = self.state.lock().buffer.take_off(from, &mut bytes);
            let Some(run) = off else { break };
            let written = self.file.write_all_at(&bytes, run.start * BLOCK);
            let mut state = self.state.lock();
            let freed = state.buffer.land(written.is_ok());
            state.places.free(freed);
            if let Err(error) = written {
                if !std::mem::replace(&mut state.buffer.failed, true) {
                    tracing::error!(%error, "file data cannot be written to the disk of the data directory; it stays in memory, and is tried again");
                }
                return true;
            }
            from = run.end;
        }
        let buffer = &mut self.state.lock().buffer;
        buffer.failed = false;
        buffer.len() > 0
    }

    /// Gives the disk space of freed blocks back, if enough of them have come together.
    pub(crate) fn trim(&self) {
        self.trim_while(|| true);
    }

    /// The same as long as `go_on` says so: each part takes its time where the disk is told of it at once (`discard`).
    pub(crate) fn trim_while(&self, go_on: impl Fn() -> bool) {
        {
            let places = &mut self.state.lock().places;
            if places.ready() < PUNCH_BATCH {
                places.asked = false;
                return;
            }
        }
        self.give_back(go_on);
    }

    fn give_back(&self, go_on: impl Fn() -> bool) {
        let freed = self.state.lock().places.take_all();
        let (mut punched, mut kept) = (Vec::new(), Vec::new());
        for run in runs(&freed) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let (start, len) = (run[0] * BLOCK, run.len() as u64 * BLOCK);
            let given = go_on() && rustix::fs::fallocate(&self.file, flags, start, len).is_ok();
            // A filesystem that cannot punch keeps the space; the places are used again all the same.
            let list = if given { &mut punched } else { &mut kept };
            list.extend_from_slice(run);
        }
        let places = &mut self.state.lock().places;
        places.asked = !kept.is_empty();
        places.free_blank(punched);
        places.free(kept);
    }

    /// Bytes of data that some view or snapshot holds.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed) * BLOCK
    }

    /// Bytes of data that are in memory, and not in the file yet.
    pub(crate) fn buffered_bytes(&self) -> u64 {
        self.state.lock().buffer.len() as u64 * BLOCK
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

    /// Size and free space of the filesystem that the data is on. Free places of the file are free space.
    pub(crate) fn statvfs(&self) -> Result<rustix::fs::StatVfs, Errno> {
        let mut disk = rustix::fs::fstatvfs(&self.file)?;
        let ready = self.state.lock().places.ready() as u64 * BLOCK / disk.f_frsize.max(1);
        disk.f_bfree = disk.f_bfree.saturating_add(ready);
        disk.f_bavail = disk.f_bavail.saturating_add(ready);
        Ok(disk)
    }
}

/// Places that lie next to each other, of such that are in order.
fn runs(places: &[u64]) -> impl Iterator<Item = &[u64]> {
    places.chunk_by(|a, b| a + 1 == *b)
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
mod tests;
