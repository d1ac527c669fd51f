//! Memory for page contents: slots of one page each, reference counted, in large anonymous
//! mappings.
//!
//! A slot is in one of three states. *Free*: its count is zero and it lies in the free list.
//! *Fresh*: its count is one and a [`Fresh`] owns it alone, so it may be written. *Shared*: one
//! or more [`Block`]s hold it, and its bytes never change until all of them let go. All safety of
//! this module rests on these states.

use std::collections::BTreeMap;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// The contents of a page.
pub(crate) type PageBytes = [u8; PAGE];
/// Slots of a block.
pub(crate) const BLOCK: usize = 64;

/// Slots of one mapping: 64 MiB.
const CHUNK: u32 = 16384;
/// The most mappings: 1 TiB of contents.
const CHUNKS: usize = 16384;
/// Completely free mappings keep their memory as long as no more than this many slots are free.
const KEEP_FREE: u64 = 2 * CHUNK as u64;

/// Names a slot; zero names none.
type Slot = u32;

#[derive(Debug)]
struct Chunk {
    base: NonNull<u8>,
    counts: Box<[AtomicU32]>,
}

// SAFETY: `base` is a mapping that lives as long as the chunk; who may touch which part of it is
// governed by the counts, see the module's description.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn map() -> io::Result<Self> {
        let len = CHUNK as usize * PAGE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, flags) }?;
        for advice in [
            Advice::LinuxHugepage,
            Advice::LinuxDontFork,
            Advice::LinuxDontDump,
        ] {
            // Each is a matter of speed or tidiness only, so that a refusal does no harm.
            // SAFETY: none of these changes the contents of the mapping just made.
            let _ = unsafe { madvise(base, len, advice) };
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let counts = (0..CHUNK).map(|_| AtomicU32::new(0)).collect();
        Ok(Self { base, counts })
    }

    fn advise(&self, first: u32, slots: u32, advice: Advice) {
        assert!(first + slots <= CHUNK, "the slots lie in the chunk");
        let at = self.base.as_ptr().wrapping_add(first as usize * PAGE);
        // A refusal costs speed or memory, not correctness.
        // SAFETY: the range lies in our mapping. The callers ask only for advice that keeps the
        // contents, or own all the slots.
        let _ = unsafe { madvise(at.cast(), slots as usize * PAGE, advice) };
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: the arena goes, and everything that holds a slot holds the arena.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), CHUNK as usize * PAGE) };
    }
}

#[derive(Debug, Default)]
struct Free {
    /// First slot and length of each free extent; none spans two chunks.
    extents: BTreeMap<Slot, u32>,
    /// Slots in the extents.
    slots: u64,
    /// How many chunks are mapped.
    chunks: u32,
}

impl Free {
    fn add(&mut self, first: Slot, len: u32) -> (Slot, u32) {
        self.slots += u64::from(len);
        let (mut first, mut len) = (first, len);
        if first % CHUNK != 0
            && let Some((&before, &n)) = self.extents.range(..first).next_back()
            && before + n == first
        {
            self.extents.remove(&before);
            (first, len) = (before, len + n);
        }
        if (first + len) % CHUNK != 0
            && let Some(n) = self.extents.remove(&(first + len))
        {
            len += n;
        }
        self.extents.insert(first, len);
        (first, len)
    }

    fn take(&mut self, want: u32) -> Option<(Slot, u32)> {
        let (first, len) = self.extents.pop_first()?;
        let taken = len.min(want);
        if taken < len {
            self.extents.insert(first + taken, len - taken);
        }
        self.slots -= u64::from(taken);
        Some((first, taken))
    }
}

/// All slots. See the module's description.
#[derive(Debug)]
pub(crate) struct Arena {
    chunks: Box<[OnceLock<Chunk>]>,
    free: Mutex<Free>,
}

impl Arena {
    /// An arena without slots; they are mapped as they are needed.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(),
            free: Mutex::default(),
        })
    }

    /// How many slots are in use.
    pub(crate) fn used(&self) -> u64 {
        let free = self.free.lock();
        // The first slot of all is never given out: its number means "none".
        (u64::from(free.chunks) * u64::from(CHUNK))
            .saturating_sub(free.slots)
            .saturating_sub(u64::from(free.chunks > 0))
    }

    /// Takes slots for new contents. What they hold before they are written is unspecified.
    pub(crate) fn allocate(self: &Arc<Self>, count: usize) -> io::Result<Fresh> {
        let mut fresh = Fresh {
            arena: Arc::clone(self),
            slots: Vec::with_capacity(count),
        };
        let mut free = self.free.lock();
        while fresh.slots.len() < count {
            let want = u32::try_from(count - fresh.slots.len()).unwrap_or(u32::MAX);
            let Some((first, len)) = free.take(want) else {
                self.grow(&mut free)?;
                continue;
            };
            for slot in first..first + len {
                self.count(slot).store(1, Ordering::Relaxed);
                fresh.slots.push(slot);
            }
        }
        drop(free);
        Ok(fresh)
    }

    /// Sees to it that the next `count` slots to be given out are backed by memory already.
    pub(crate) fn populate(&self, count: usize) -> io::Result<()> {
        let mut ranges = Vec::new();
        let mut free = self.free.lock();
        while free.slots < count as u64 {
            self.grow(&mut free)?;
        }
        let mut missing = u32::try_from(count).unwrap_or(u32::MAX);
        for (&first, &len) in &free.extents {
            let part = len.min(missing);
            ranges.push((first, part));
            missing -= part;
            if missing == 0 {
                break;
            }
        }
        drop(free);
        for (first, len) in ranges {
            self.chunk(first)
                .advise(first % CHUNK, len, Advice::LinuxPopulateWrite);
        }
        Ok(())
    }

    fn grow(&self, free: &mut Free) -> io::Result<()> {
        let index = free.chunks;
        let place = self
            .chunks
            .get(index as usize)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let chunk = Chunk::map()?;
        // Under the lock, so that nobody else filled this place meanwhile.
        place.set(chunk).map_err(|_| io::ErrorKind::AlreadyExists)?;
        free.chunks += 1;
        let reserved = u32::from(index == 0);
        free.add(index * CHUNK + reserved, CHUNK - reserved);
        Ok(())
    }

    fn chunk(&self, slot: Slot) -> &Chunk {
        self.chunks[(slot / CHUNK) as usize]
            .get()
            .expect("a slot lies in a mapped chunk")
    }

    fn count(&self, slot: Slot) -> &AtomicU32 {
        &self.chunk(slot).counts[(slot % CHUNK) as usize]
    }

    fn pointer(&self, slot: Slot) -> NonNull<PageBytes> {
        let offset = (slot % CHUNK) as usize * PAGE;
        // SAFETY: the offset is below the length of the chunk's mapping.
        unsafe { self.chunk(slot).base.add(offset).cast() }
    }

    fn retain(&self, slot: Slot) {
        // The caller's own reference keeps the slot alive, so that no order is needed.
        let before = self.count(slot).fetch_add(1, Ordering::Relaxed);
        assert!(before < u32::MAX / 2, "a page is shared too often");
    }

    /// Gives references back. Slots that nobody else holds become free.
    fn release(&self, slots: &[Slot]) {
        let unused: Vec<Slot> = slots
            .iter()
            .copied()
            .filter(|&s| s != 0 && self.count(s).fetch_sub(1, Ordering::Release) == 1)
            .collect();
        if unused.is_empty() {
            return;
        }
        // All reads by earlier holders come before whatever is written next.
        fence(Ordering::Acquire);
        let mut free = self.free.lock();
        let mut rest = &unused[..];
        while let [first, ..] = rest {
            let len = rest
                .iter()
                .zip(*first..)
                .take_while(|(slot, next)| **slot == *next && *next / CHUNK == *first / CHUNK)
                .count();
            let (first, whole) = free.add(*first, len as u32);
            if whole == CHUNK && free.slots > KEEP_FREE {
                // Under the lock, so that none of the slots is given out meanwhile.
                self.chunk(first).advise(0, CHUNK, Advice::LinuxDontNeed);
            }
            rest = &rest[len..];
        }
    }
}

/// Slots that were taken for new contents and are not shared yet.
#[derive(Debug)]
pub(crate) struct Fresh {
    arena: Arc<Arena>,
    /// Zero where a slot has moved into a block.
    slots: Vec<Slot>,
}

impl Fresh {
    /// The contents of a slot. Panics if it was given away.
    pub(crate) fn page(&self, index: usize) -> &PageBytes {
        // SAFETY: the slot is fresh, so that only we hold it; mapped memory is always initialised.
        unsafe { self.pointer(index).as_ref() }
    }

    /// The contents of a slot, to be written. Panics if it was given away.
    pub(crate) fn page_mut(&mut self, index: usize) -> &mut PageBytes {
        // SAFETY: the slot is fresh and we are borrowed mutably, so that no other reference exists.
        unsafe { self.pointer(index).as_mut() }
    }

    /// Where the contents of a slot lie. Panics if it was given away.
    pub(super) fn pointer(&self, index: usize) -> NonNull<PageBytes> {
        let slot = self.slots[index];
        assert!(slot != 0, "the slot is still fresh");
        self.arena.pointer(slot)
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        self.arena.release(&self.slots);
    }
}

/// A run of 64 places, each of which may hold a shared slot.
#[derive(Debug)]
pub(crate) struct Block {
    arena: Arc<Arena>,
    slots: [Slot; BLOCK],
    /// A bit for each place that holds one.
    mask: u64,
}

impl Block {
    /// A block that holds nothing.
    pub(crate) fn new(arena: &Arc<Arena>) -> Self {
        Self {
            arena: Arc::clone(arena),
            slots: [0; BLOCK],
            mask: 0,
        }
    }

    /// An empty block for slots of the arena that a fresh page comes from.
    pub(crate) fn of(fresh: &Fresh) -> Self {
        Self::new(&fresh.arena)
    }

    /// An empty block for slots of the same arena.
    pub(crate) fn beside(other: &Self) -> Self {
        Self::new(&other.arena)
    }

    /// A bit for each place that holds a page.
    pub(crate) fn mask(&self) -> u64 {
        self.mask
    }

    /// The page at a place.
    pub(crate) fn page(&self, at: usize) -> Option<&PageBytes> {
        let slot = self.slots[at];
        // SAFETY: the slot is shared, so that nobody writes it while we hold it, and the reference
        // does not outlive our hold.
        (slot != 0).then(|| unsafe { self.arena.pointer(slot).as_ref() })
    }

    /// A bit for each place where two blocks hold different slots (or one of them none).
    pub(crate) fn differs(&self, other: &Self) -> u64 {
        let same_arena = Arc::ptr_eq(&self.arena, &other.arena);
        let mut mask = 0;
        for (at, (a, b)) in self.slots.iter().zip(&other.slots).enumerate() {
            mask |= u64::from(a != b || !same_arena && *a != 0) << at;
        }
        mask
    }

    /// Puts a fresh page at a place; it is fresh no more.
    pub(crate) fn put(&mut self, at: usize, fresh: &mut Fresh, index: usize) {
        assert!(
            Arc::ptr_eq(&self.arena, &fresh.arena),
            "both are of one arena"
        );
        let slot = std::mem::take(&mut fresh.slots[index]);
        assert!(slot != 0, "the slot is still fresh");
        self.set(at, slot);
    }

    /// Puts the page that another block holds at a place; both hold it then.
    pub(crate) fn share(&mut self, at: usize, other: &Self, from: usize) {
        assert!(
            Arc::ptr_eq(&self.arena, &other.arena),
            "both are of one arena"
        );
        let slot = other.slots[from];
        if slot != 0 {
            self.arena.retain(slot);
        }
        self.set(at, slot);
    }

    /// Puts the page of one place at another; both hold it then.
    pub(crate) fn repeat(&mut self, at: usize, from: usize) {
        let slot = self.slots[from];
        if slot != 0 {
            self.arena.retain(slot);
        }
        self.set(at, slot);
    }

    /// Lets go of the pages at the places whose bit is set.
    pub(crate) fn remove(&mut self, mask: u64) {
        let mut gone = [0; BLOCK];
        for (at, slot) in self.slots.iter_mut().enumerate() {
            if mask & 1 << at != 0 {
                gone[at] = std::mem::take(slot);
            }
        }
        self.mask &= !mask;
        self.arena.release(&gone);
    }

    fn set(&mut self, at: usize, slot: Slot) {
        let old = std::mem::replace(&mut self.slots[at], slot);
        if slot == 0 {
            self.mask &= !(1 << at);
        } else {
            self.mask |= 1 << at;
        }
        if old != 0 {
            self.arena.release(&[old]);
        }
    }
}

impl Clone for Block {
    fn clone(&self) -> Self {
        for &slot in self.slots.iter().filter(|&&s| s != 0) {
            self.arena.retain(slot);
        }
        Self {
            arena: Arc::clone(&self.arena),
            slots: self.slots,
            mask: self.mask,
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.arena.release(&self.slots);
    }
}
