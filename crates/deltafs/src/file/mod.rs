//! The content of a regular file: blocks of its own over what its base file shows.

mod copy;
mod read;
mod seek;
mod stored;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use imbl::OrdMap;
use rustix::io::Errno;

pub(crate) use read::ReadPlan;
pub(crate) use stored::{StoredBase, StoredBlock};

use crate::base::BaseInode;
use crate::data::{BLOCK, BLOCK_LEN, Block, DataStore};

/// The largest file: the kernel's own limit for offsets.
const MAX_SIZE: u64 = i64::MAX as u64;

/// One version of a file's content.
#[derive(Clone, Debug, Default)]
pub(crate) struct FileBody {
    pub(crate) size: u64,
    base: Option<BasePart>,
    /// By block number. What is not here comes from the base part, or is a hole.
    blocks: OrdMap<u64, Own>,
    /// How many of `blocks` hold data.
    data_blocks: u64,
    /// How many of `blocks` lie over the part of the base that shows.
    covering: u64,
}

/// A base file as far as it shows through.
#[derive(Clone, Debug)]
struct BasePart {
    inode: Arc<BaseInode>,
    /// Bytes of the base from here on are hidden: the file was cut there once.
    limit: u64,
    /// The base file's `st_blocks`.
    blocks_512: u64,
}

/// A block that is not the base's.
#[derive(Clone, Debug)]
enum Own {
    Data(Block),
    /// A hole punched into the base.
    Hole,
}

impl PartialEq for Own {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Data(a), Self::Data(b)) => Arc::ptr_eq(a, b),
            (Self::Hole, Self::Hole) => true,
            _ => false,
        }
    }
}

/// The way in which data is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Writer<'a> {
    /// Where new blocks go.
    pub(crate) store: &'a Arc<DataStore>,
    /// The epoch whose blocks no snapshot can see.
    pub(crate) epoch: u64,
}

impl FileBody {
    /// The content of a base file.
    pub(crate) fn of_base(inode: Arc<BaseInode>, size: u64, blocks_512: u64) -> Self {
        Self {
            size,
            base: Some(BasePart {
                inode,
                limit: size,
                blocks_512,
            }),
            ..Self::default()
        }
    }

    /// How many blocks it has besides those of its base.
    pub(crate) fn data_blocks(&self) -> u64 {
        self.data_blocks
    }

    /// `st_blocks`.
    pub(crate) fn blocks_512(&self) -> u64 {
        let per_block = BLOCK / 512;
        let own = self.data_blocks * per_block;
        let Some(base) = &self.base else { return own };
        let shown = base.blocks_512.min(base.limit.div_ceil(BLOCK) * per_block);
        shown.saturating_sub(self.covering * per_block) + own
    }

    /// Finds where `len` bytes from `offset` on are, cut at the end of the file.
    pub(crate) fn plan_read(&self, offset: u64, len: usize) -> ReadPlan {
        let end = self.size.min(offset.saturating_add(len as u64));
        let mut plan = ReadPlan::default();
        let mut at = offset;
        while at < end {
            let next = (at / BLOCK + 1) * BLOCK;
            self.plan_block(&mut plan, at, next.min(end));
            at = next;
        }
        plan
    }

    fn plan_block(&self, plan: &mut ReadPlan, start: u64, end: u64) {
        match (self.blocks.get(&(start / BLOCK)), &self.base) {
            (Some(Own::Data(block)), _) => {
                plan.push_data(block, start % BLOCK, (end - start) as usize);
            }
            (None, Some(base)) if start < base.limit => {
                let cut = end.min(base.limit);
                plan.push_base(&base.inode, start, (cut - start) as usize);
                plan.push_zeros((end - cut) as usize);
            }
            _ => plan.push_zeros((end - start) as usize),
        }
    }

    /// Writes `data` at `offset`. On an error the file is as before, but for bytes of the range itself.
    pub(crate) fn write(&mut self, to: Writer<'_>, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let end = offset
            .checked_add(data.len() as u64)
            .filter(|end| *end <= MAX_SIZE)
            .ok_or(Errno::FBIG)?;
        if data.is_empty() {
            return Ok(());
        }
        let targets = self.targets(to, offset / BLOCK..end.div_ceil(BLOCK))?;
        let mut out = Output::new(to.store, data);
        for target in &targets {
            let start = offset.max(target.block * BLOCK);
            let stop = end.min((target.block + 1) * BLOCK);
            let piece = (start - offset) as usize..(stop - offset) as usize;
            if target.fresh && piece.len() < BLOCK_LEN {
                let mut whole = self.read_block(to.store, target.block)?;
                let at = (start % BLOCK) as usize;
                whole[at..at + piece.len()].copy_from_slice(&data[piece]);
                let written = to.store.write(&whole, target.slot.position());
                written.map_err(errno)?;
            } else {
                out.push(target.slot.position() + start % BLOCK, piece)?;
            }
        }
        out.flush()?;
        for target in targets.into_iter().filter(|target| target.fresh) {
            self.set(target.block, Own::Data(target.slot));
        }
        self.size = self.size.max(end);
        Ok(())
    }

    /// Cuts the file at `size`, or lengthens it with a hole.
    pub(crate) fn truncate(&mut self, to: Writer<'_>, size: u64) -> Result<(), Errno> {
        if size > MAX_SIZE {
            return Err(Errno::FBIG);
        }
        if size < self.size {
            let whole = size.div_ceil(BLOCK);
            if !size.is_multiple_of(BLOCK)
                && matches!(self.blocks.get(&(size / BLOCK)), Some(Own::Data(_)))
            {
                self.zero_bytes(to, size..whole * BLOCK)?;
            }
            let gone: Vec<u64> = self
                .blocks
                .range(whole..)
                .map(|(block, _)| *block)
                .collect();
            for block in gone {
                self.forget(block);
            }
            self.limit_base(size);
        }
        self.size = size;
        Ok(())
    }

    /// Makes `range` read as zeros and gives its whole blocks back. The size stays.
    pub(crate) fn punch(&mut self, to: Writer<'_>, range: Range<u64>) -> Result<(), Errno> {
        let range = range.start..range.end.min(self.size.next_multiple_of(BLOCK));
        if range.is_empty() {
            return Ok(());
        }
        let inner = range.start.div_ceil(BLOCK)..range.end / BLOCK;
        if inner.start > inner.end {
            return self.zero_bytes(to, range);
        }
        self.zero_bytes(to, range.start..inner.start * BLOCK)?;
        self.zero_bytes(to, inner.end * BLOCK..range.end)?;
        let own: Vec<u64> = self
            .blocks
            .range(inner.clone())
            .map(|(block, _)| *block)
            .collect();
        for block in own {
            self.forget(block);
        }
        let shown = self
            .base
            .as_ref()
            .map_or(0, |base| base.limit.div_ceil(BLOCK));
        if inner.end >= shown {
            self.limit_base(inner.start * BLOCK);
        } else {
            for block in inner {
                self.set(block, Own::Hole);
            }
        }
        Ok(())
    }

    /// Reserves disk space for the holes in `range`.
    pub(crate) fn reserve(&mut self, to: Writer<'_>, range: Range<u64>) -> Result<(), Errno> {
        if range.end > MAX_SIZE {
            return Err(Errno::FBIG);
        }
        if range.end - range.start > to.store.free_bytes()? {
            return Err(Errno::NOSPC);
        }
        let holes: Vec<u64> = (range.start / BLOCK..range.end.div_ceil(BLOCK))
            .filter(|block| self.is_hole(*block))
            .collect();
        let slots = to.store.reserve(holes.len(), to.epoch)?;
        for (block, slot) in holes.into_iter().zip(slots) {
            self.set(block, Own::Data(slot));
        }
        Ok(())
    }

    /// The byte ranges in which two versions of a file differ, whole blocks; `None` if nothing is known to be the same.
    pub(crate) fn changed_ranges(&self, other: &Self) -> Option<Vec<Range<u64>>> {
        let limits = match (&self.base, &other.base) {
            (None, None) => (0, 0),
            (Some(a), Some(b)) if Arc::ptr_eq(&a.inode, &b.inode) => (a.limit, b.limit),
            (Some(a), None) => (a.limit, 0),
            (None, Some(b)) => (0, b.limit),
            _ => return None,
        };
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for item in self.blocks.diff(&other.blocks) {
            let block = match item {
                imbl::ordmap::DiffItem::Add(block, _)
                | imbl::ordmap::DiffItem::Remove(block, _)
                | imbl::ordmap::DiffItem::Update {
                    old: (block, _), ..
                } => *block,
            };
            ranges.push(block * BLOCK..(block + 1) * BLOCK);
        }
        for (a, b) in [limits, (self.size, other.size)] {
            if a != b {
                ranges.push(a.min(b) / BLOCK * BLOCK..a.max(b).next_multiple_of(BLOCK));
            }
        }
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.dedup_by(|next, last| {
            let joins = next.start <= last.end;
            if joins {
                last.end = last.end.max(next.end);
            }
            joins
        });
        Some(ranges)
    }

    /// Whether the two versions hold the same content without a look at any byte.
    pub(crate) fn is_same_version(&self, other: &Self) -> bool {
        self.size == other.size
            && self
                .changed_ranges(other)
                .is_some_and(|ranges| ranges.is_empty())
    }

    /// Where blocks of the file are written: in place if no snapshot can see that, and otherwise to new places, which are not the
    /// file's yet.
    fn targets(&self, to: Writer<'_>, blocks: Range<u64>) -> Result<Vec<Target>, Errno> {
        let in_place = self.blocks.range(blocks.clone());
        let in_place = in_place.filter_map(|(block, own)| match own {
            Own::Data(slot) if slot.epoch() == to.epoch => Some((*block, Arc::clone(slot))),
            _ => None,
        });
        let in_place: Vec<(u64, Block)> = in_place.collect();
        let missing = (blocks.end - blocks.start) as usize - in_place.len();
        let fresh = to.store.allocate(missing, to.epoch).map_err(errno)?;
        let (mut in_place, mut fresh) = (in_place.into_iter().peekable(), fresh.into_iter());
        let target = |block| {
            let own = in_place.next_if(|(at, _)| *at == block);
            Some(Target {
                block,
                fresh: own.is_none(),
                slot: own.map(|(_, slot)| slot).or_else(|| fresh.next())?,
            })
        };
        Ok(blocks.filter_map(target).collect())
    }

    fn set(&mut self, block: u64, own: Own) {
        let is_data = |own: &Own| u64::from(matches!(own, Own::Data(_)));
        self.data_blocks += is_data(&own);
        match self.blocks.insert(block, own) {
            Some(before) => self.data_blocks -= is_data(&before),
            None => self.covering += u64::from(self.covers(block)),
        }
    }

    fn forget(&mut self, block: u64) {
        if let Some(own) = self.blocks.remove(&block) {
            self.data_blocks -= u64::from(matches!(own, Own::Data(_)));
            self.covering -= u64::from(self.covers(block));
        }
    }

    fn covers(&self, block: u64) -> bool {
        self.base
            .as_ref()
            .is_some_and(|base| block * BLOCK < base.limit)
    }

    /// Hides the base from `limit` on.
    fn limit_base(&mut self, limit: u64) {
        if let Some(base) = &mut self.base
            && limit < base.limit
        {
            base.limit = limit;
            self.covering = self.blocks.range(..limit.div_ceil(BLOCK)).count() as u64;
        }
        self.drop_hidden_base();
    }

    /// Lets go of a base file of which nothing shows any more, and of the holes over it.
    fn drop_hidden_base(&mut self) {
        if self.base.as_ref().is_some_and(|base| base.limit == 0) {
            self.base = None;
            if self.data_blocks != self.blocks.len() as u64 {
                self.blocks = self
                    .blocks
                    .iter()
                    .filter(|(_, own)| matches!(own, Own::Data(_)))
                    .map(|(block, own)| (*block, own.clone()))
                    .collect();
            }
        }
    }

    fn is_hole(&self, block: u64) -> bool {
        match self.blocks.get(&block) {
            Some(Own::Data(_)) => false,
            Some(Own::Hole) => true,
            None => self
                .base
                .as_ref()
                .is_none_or(|base| block * BLOCK >= base.limit),
        }
    }

    /// Overwrites bytes of one block with zeros, unless they are a hole's.
    fn zero_bytes(&mut self, to: Writer<'_>, range: Range<u64>) -> Result<(), Errno> {
        if range.is_empty() || self.is_hole(range.start / BLOCK) {
            return Ok(());
        }
        let size = self.size;
        let zeros = [0; BLOCK_LEN];
        let len = (range.end - range.start) as usize;
        let done = self.write(to, range.start, &zeros[..len.min(BLOCK_LEN)]);
        self.size = size;
        done
    }

    fn read_block(&self, store: &DataStore, block: u64) -> Result<[u8; BLOCK_LEN], Errno> {
        let mut whole = [0; BLOCK_LEN];
        let mut plan = ReadPlan::default();
        self.plan_block(&mut plan, block * BLOCK, (block + 1) * BLOCK);
        plan.fetch(store, &mut whole).map_err(errno)?;
        Ok(whole)
    }
}

/// Where a block of a file is written.
struct Target {
    /// Its number in the file.
    block: u64,
    slot: Block,
    /// It holds nothing yet, and is not the file's.
    fresh: bool,
}

/// Joins pieces of one buffer that lie next to each other in the block file into single writes.
struct Output<'a> {
    store: &'a DataStore,
    data: &'a [u8],
    position: u64,
    pending: Range<usize>,
}

impl<'a> Output<'a> {
    fn new(store: &'a DataStore, data: &'a [u8]) -> Self {
        Self {
            store,
            data,
            position: 0,
            pending: 0..0,
        }
    }

    fn push(&mut self, position: u64, piece: Range<usize>) -> Result<(), Errno> {
        let joins = self.pending.end == piece.start
            && self.position + self.pending.len() as u64 == position;
        if joins && !self.pending.is_empty() {
            self.pending.end = piece.end;
            return Ok(());
        }
        self.flush()?;
        self.position = position;
        self.pending = piece;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Errno> {
        let pending = std::mem::take(&mut self.pending);
        if pending.is_empty() {
            return Ok(());
        }
        self.store
            .write(&self.data[pending], self.position)
            .map_err(errno)
    }
}

/// What a program is told when its data cannot be written or read. It knows a device that is full or fails, not what the host's
/// filesystem calls its troubles.
pub(crate) fn errno(error: io::Error) -> Errno {
    match Errno::from_io_error(&error) {
        Some(errno @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::NOMEM | Errno::STALE)) => {
            errno
        }
        _ => {
            tracing::error!(%error, "data of a DeltaFS volume cannot be written or read");
            Errno::IO
        }
    }
}
