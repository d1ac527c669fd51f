//! Finding data and holes, over the base too.

use rustix::io::Errno;

use super::{FileBody, Own};
use crate::data::BLOCK;

impl FileBody {
    /// Where the next data at or after `offset` begins (`SEEK_DATA`).
    pub(crate) fn next_data(&self, offset: u64) -> Result<u64, Errno> {
        let mut at = offset;
        while at < self.size {
            match self.blocks.get(&(at / BLOCK)) {
                Some(Own::Data(_)) => return Ok(at),
                Some(Own::Hole) => at = (at / BLOCK + 1) * BLOCK,
                None => {
                    let next = self.next_own(at);
                    match self.base_data(at)? {
                        Some(found) if found < next => return Ok(found),
                        _ => at = next,
                    }
                }
            }
        }
        Err(Errno::NXIO)
    }

    /// Where the next hole at or after `offset` begins (`SEEK_HOLE`); the end of the file is one.
    pub(crate) fn next_hole(&self, offset: u64) -> Result<u64, Errno> {
        if offset >= self.size {
            return Err(Errno::NXIO);
        }
        let mut at = offset;
        while at < self.size {
            match self.blocks.get(&(at / BLOCK)) {
                Some(Own::Data(_)) => at = (at / BLOCK + 1) * BLOCK,
                Some(Own::Hole) => return Ok(at),
                None => {
                    let hole = self.base_hole(at)?;
                    let next = self.next_own(at);
                    if hole < next {
                        return Ok(hole);
                    }
                    at = next;
                }
            }
        }
        Ok(self.size)
    }

    /// The start of the first block after that of `at` that is not the base's.
    fn next_own(&self, at: u64) -> u64 {
        let after = at / BLOCK + 1;
        let next = self.blocks.range(after..).next();
        next.map_or(self.size, |(block, _)| (block * BLOCK).min(self.size))
    }

    fn base_data(&self, at: u64) -> Result<Option<u64>, Errno> {
        let Some(base) = self.base.as_ref().filter(|base| at < base.limit) else {
            return Ok(None);
        };
        let file = base.inode.file()?;
        match rustix::fs::seek(&*file, rustix::fs::SeekFrom::Data(at)) {
            Ok(found) => Ok(Some(found).filter(|found| *found < base.limit)),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn base_hole(&self, at: u64) -> Result<u64, Errno> {
        let Some(base) = self.base.as_ref().filter(|base| at < base.limit) else {
            return Ok(at);
        };
        let file = base.inode.file()?;
        match rustix::fs::seek(&*file, rustix::fs::SeekFrom::Hole(at)) {
            Ok(found) => Ok(found.min(base.limit)),
            Err(Errno::NXIO) => Ok(at),
            Err(error) => Err(error),
        }
    }
}
