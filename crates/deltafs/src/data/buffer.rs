//! Blocks that are in memory, to be written into the block file later.
//!
//! A block that is here has its newest bytes here, and is written here; what is not here is in the file. So whoever writes a block
//! and whoever writes it into the file never write to the file at the same time.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::BLOCK;
use super::pool::{Page, Pool};

/// The most places that are written into the file at a time: copying them, while nobody can write, takes some 20 µs.
const FLIGHT: usize = 64;

/// Where memory is scarce, whoever has so many blocks (4 MiB) is to write them back at once.
const MANY: usize = 1024;

/// The blocks in memory of one block file.
#[derive(Debug)]
pub(super) struct Buffer {
    pool: Arc<Pool>,
    held: BTreeMap<u64, Held>,
    /// The places that are being written into the file.
    flight: Range<u64>,
    /// Those of them that were given back meanwhile.
    landing: Vec<u64>,
    /// No blocks are taken in.
    closed: bool,
    /// The file could not be written: no more blocks are taken in until it can be.
    pub(super) failed: bool,
    /// Writing back was asked for since memory is scarce.
    hurried: bool,
}

#[derive(Debug)]
struct Held {
    page: Page,
    /// Whether what is being written into the file is what the page holds.
    in_flight: bool,
}

/// What is to be done about a block that was taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urge {
    Nothing,
    /// It is the first one: it is to be written back some time.
    First,
    /// Memory is scarce: all are to be written back now.
    Scarce,
}

impl Buffer {
    pub(super) fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            held: BTreeMap::new(),
            flight: 0..0,
            landing: Vec::new(),
            closed: false,
            failed: false,
            hurried: false,
        }
    }

    /// Takes in no blocks from now on.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// Fills `buf` with the bytes from `position` on as far as they are here. Tells which parts are not.
    pub(super) fn read(&self, buf: &mut [u8], position: u64) -> Vec<Range<usize>> {
        let span = Span::new(position, buf.len());
        let held = self.held.range(span.places());
        span.visit(held, |held, within, part| {
            buf[part].copy_from_slice(&held.page[within]);
        })
    }

    /// Writes `bytes` from `position` on into blocks that are here. Tells which parts are not.
    pub(super) fn overwrite(&mut self, bytes: &[u8], position: u64) -> Vec<Range<usize>> {
        let span = Span::new(position, bytes.len());
        let held = self.held.range_mut(span.places());
        span.visit(held, |held, within, part| {
            held.page[within].copy_from_slice(&bytes[part]);
            held.in_flight = false;
        })
    }

    /// Takes in a whole block that is not here yet; none if there is no room, or no block is to be.
    pub(super) fn take_in(&mut self, place: u64, bytes: &[u8]) -> Option<Urge> {
        if self.closed || self.failed {
            return None;
        }
        let page = self.pool.take(bytes)?;
        let first = self.held.is_empty();
        let in_flight = false;
        self.held.insert(place, Held { page, in_flight });
        if !self.hurried && self.held.len() >= MANY && self.pool.is_scarce() {
            self.hurried = true;
            return Some(Urge::Scarce);
        }
        Some(if first { Urge::First } else { Urge::Nothing })
    }

    /// Drops a block that nobody needs any more. Tells whether its place may be used again; if not, [`Buffer::land`] tells when.
    pub(super) fn discard(&mut self, place: u64) -> bool {
        self.held.remove(&place);
        let free = !self.flight.contains(&place);
        if !free {
            self.landing.push(place);
        }
        free
    }

    /// Copies blocks that lie next to each other, the first that are at `from` or behind it, to be written into the file. Tells
    /// where; none if there are no more.
    pub(super) fn take_off(&mut self, from: u64, bytes: &mut Vec<u8>) -> Option<Range<u64>> {
        self.hurried = false;
        bytes.clear();
        let mut places = None;
        for (place, held) in self.held.range_mut(from..).take(FLIGHT) {
            let run = places.get_or_insert(*place..*place);
            if run.end != *place {
                break;
            }
            run.end += 1;
            bytes.extend_from_slice(&held.page);
            held.in_flight = true;
        }
        self.flight = places.clone().unwrap_or_default();
        places
    }

    /// What took off has been written, or not. What is in the file now goes from here. Tells which places were given back meanwhile.
    pub(super) fn land(&mut self, written: bool) -> Vec<u64> {
        let flight = std::mem::take(&mut self.flight);
        for place in flight.filter(|_| written) {
            if self.held.get(&place).is_some_and(|held| held.in_flight) {
                self.held.remove(&place);
            }
        }
        std::mem::take(&mut self.landing)
    }
}

/// A range of bytes of the file.
#[derive(Clone, Copy, Debug)]
struct Span {
    position: u64,
    len: usize,
}

impl Span {
    fn new(position: u64, len: usize) -> Self {
        Self { position, len }
    }

    fn end(self) -> u64 {
        self.position + self.len as u64
    }

    fn places(self) -> Range<u64> {
        self.position / BLOCK..self.end().div_ceil(BLOCK)
    }

    /// Visits blocks of the range, ascending: which bytes of the block, and which of the range. Tells which parts of the range are in
    /// none of them.
    fn visit<'a, T>(
        self,
        blocks: impl Iterator<Item = (&'a u64, T)>,
        mut visit: impl FnMut(T, Range<usize>, Range<usize>),
    ) -> Vec<Range<usize>> {
        let mut absent = Vec::new();
        let mut next = 0;
        for (place, block) in blocks {
            let block_start = place * BLOCK;
            let start = block_start.max(self.position);
            let end = (block_start + BLOCK).min(self.end());
            let part = (start - self.position) as usize..(end - self.position) as usize;
            if next < part.start {
                absent.push(next..part.start);
            }
            next = part.end;
            let within = (start - block_start) as usize..(end - block_start) as usize;
            visit(block, within, part);
        }
        if next < self.len {
            absent.push(next..self.len);
        }
        absent
    }
}
