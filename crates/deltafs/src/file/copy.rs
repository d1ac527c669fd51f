//! Copying a range of a file into another by sharing its blocks.

use std::ops::Range;

use rustix::io::Errno;

use super::{FileBody, MAX_SIZE, Own, Writer, errno};
use crate::data::{BLOCK, BLOCK_LEN};

/// How much of a range is looked at by one call, so that nobody else waits for long.
const MAX_RANGE: u64 = 256 << 20;
/// How many bytes one call copies that it cannot share.
const MAX_COPIED: u64 = 16 << 20;

impl FileBody {
    /// Makes `len` bytes at `at` those of `from` at `offset`, and tells how many were: as with `copy_file_range(2)`, perhaps
    /// fewer, and none at the end of `from`. Blocks are shared where they lie alike in both; what the base shows is shared
    /// only if this file becomes what `from` begins with. No block of `from` may be of the epoch that is written in.
    pub(crate) fn copy_from(
        &mut self,
        to: Writer<'_>,
        from: &Self,
        offset: u64,
        at: u64,
        len: u64,
    ) -> Result<u64, Errno> {
        let len = len.min(from.size.saturating_sub(offset));
        if at.checked_add(len).is_none_or(|end| end > MAX_SIZE) {
            return Err(Errno::FBIG);
        }
        if offset == 0 && at == 0 && self.size <= len {
            let mut whole = from.clone();
            whole.truncate(to, len)?;
            *self = whole;
            return Ok(len);
        }
        let end = offset + len.min(MAX_RANGE);
        let (mut next, mut copied) = (offset, 0);
        while next < end && copied < MAX_COPIED {
            let place = at + (next - offset);
            let piece = next..end.min((next / BLOCK + 1) * BLOCK);
            if place % BLOCK == next % BLOCK && self.can_share(from, &piece, place) {
                self.share(from, next / BLOCK, place / BLOCK);
            } else if from.is_hole(next / BLOCK) && place >= self.size {
                // What lies beyond the end is a hole already.
            } else {
                match self.copy_piece(to, from, &piece, place) {
                    Ok(len) => copied += len,
                    Err(_) if next > offset => break,
                    Err(error) => return Err(error),
                }
            }
            next = piece.end;
            self.size = self.size.max(at + (next - offset));
        }
        Ok(next - offset)
    }

    /// Whether a piece is all that its block holds, here and there, and is not the base's.
    fn can_share(&self, from: &Self, piece: &Range<u64>, place: u64) -> bool {
        let whole = piece.end - piece.start == BLOCK
            || piece.end == from.size && place + (piece.end - piece.start) >= self.size;
        let own = from.blocks.contains_key(&(piece.start / BLOCK));
        whole && piece.start.is_multiple_of(BLOCK) && (own || from.is_hole(piece.start / BLOCK))
    }

    fn share(&mut self, from: &Self, block: u64, place: u64) {
        match from.blocks.get(&block) {
            Some(own @ Own::Data(_)) => self.set(place, own.clone()),
            _ if self.covers(place) => self.set(place, Own::Hole),
            _ => self.forget(place),
        }
    }

    fn copy_piece(
        &mut self,
        to: Writer<'_>,
        from: &Self,
        piece: &Range<u64>,
        place: u64,
    ) -> Result<u64, Errno> {
        let len = (piece.end - piece.start) as usize;
        let mut bytes = [0; BLOCK_LEN];
        let plan = from.plan_read(piece.start, len);
        plan.fetch(to.store, &mut bytes[..len]).map_err(errno)?;
        self.write(to, place, &bytes[..len])?;
        Ok(len as u64)
    }
}
