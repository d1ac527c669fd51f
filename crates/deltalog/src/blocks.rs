//! Block files.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::checksum;
use crate::error::{Doing, Error, Result};

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// Writes a block file, from its first block to its last.
#[derive(Debug)]
pub struct BlockWriter {
    path: PathBuf,
    file: BufWriter<File>,
    sums: Vec<u64>,
}

impl BlockWriter {
    /// Makes the file, which must not exist.
    ///
    /// # Errors
    /// It exists, or the disk refuses.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create_new(path).doing("making", path)?;
        Ok(Self {
            path: path.to_owned(),
            file: BufWriter::with_capacity(1 << 20, file),
            sums: Vec::new(),
        })
    }

    /// Adds a block; returns its number.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn push(&mut self, block: &[u8; BLOCK]) -> Result<u64> {
        let number = self.len();
        self.file.write_all(block).doing("writing", &self.path)?;
        self.sums.push(checksum(number, block));
        Ok(number)
    }

    /// How many blocks it has so far.
    pub fn len(&self) -> u64 {
        self.sums.len() as u64
    }

    /// Whether it has none so far.
    pub fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }

    /// Has all of it on disk; returns the checksums, for [`BlockReader::open`].
    ///
    /// # Errors
    /// The disk refuses.
    pub fn finish(mut self) -> Result<Vec<u64>> {
        self.file.flush().doing("writing", &self.path)?;
        let file = self.file.get_ref();
        file.sync_all().doing("writing out", &self.path)?;
        Ok(self.sums)
    }
}

/// Reads blocks, each checked.
#[derive(Debug)]
pub struct BlockReader {
    path: PathBuf,
    file: File,
    sums: Vec<u64>,
}

impl BlockReader {
    /// Opens a block file whose blocks have these checksums.
    ///
    /// # Errors
    /// It is missing, or has another number of blocks.
    pub fn open(path: &Path, sums: Vec<u64>) -> Result<Self> {
        let file = File::open(path).doing("opening", path)?;
        let len = file.metadata().doing("looking at", path)?.len();
        let wanted = sums.len() as u64 * BLOCK as u64;
        if len != wanted {
            let what = format!("it has {len} bytes, and should have {wanted}");
            return Err(Error::damaged(path, len.min(wanted), what));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            sums,
        })
    }

    /// How many blocks there are.
    pub fn len(&self) -> u64 {
        self.sums.len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }

    /// Fills `into`, whose length is a multiple of that of a block, with blocks from number `first` on.
    ///
    /// # Errors
    /// There are not so many, or one is damaged.
    pub fn read(&self, first: u64, into: &mut [u8]) -> Result<()> {
        let count = (into.len() / BLOCK) as u64;
        let at = first.saturating_mul(BLOCK as u64);
        let Some(sums) = first.checked_add(count).and_then(|end| {
            self.sums
                .get(usize::try_from(first).ok()?..usize::try_from(end).ok()?)
        }) else {
            let what = format!(
                "it has no blocks {first} to {}",
                first.saturating_add(count)
            );
            return Err(Error::damaged(&self.path, at, what));
        };
        self.file
            .read_exact_at(into, at)
            .doing("reading", &self.path)?;
        for ((number, block), sum) in (first..).zip(into.chunks_exact(BLOCK)).zip(sums) {
            if checksum(number, block) != *sum {
                let at = number * BLOCK as u64;
                let what = "the checksum of a block is wrong";
                return Err(Error::damaged(&self.path, at, what));
            }
        }
        Ok(())
    }

    /// Reads and checks all blocks.
    ///
    /// # Errors
    /// One is damaged.
    pub fn verify(&self) -> Result<()> {
        let mut buffer = vec![0; 256 * BLOCK];
        let mut first = 0;
        while first < self.len() {
            let count = (self.len() - first).min(256);
            self.read(first, &mut buffer[..count as usize * BLOCK])?;
            first += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(path: &Path) -> Vec<u64> {
        let mut blocks = BlockWriter::create(path).unwrap();
        for byte in 1..=3 {
            blocks.push(&[byte; BLOCK]).unwrap();
        }
        blocks.finish().unwrap()
    }

    #[test]
    fn a_damaged_or_exchanged_block_is_never_handed_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blocks");
        let sums = written(&path);
        let good = std::fs::read(&path).unwrap();
        let mut block = [0; BLOCK];
        let open = || BlockReader::open(&path, sums.clone());
        open().unwrap().read(1, &mut block).unwrap();
        assert_eq!(block, [2; BLOCK]);
        open().unwrap().verify().unwrap();
        for at in [BLOCK, BLOCK + 77, 2 * BLOCK - 1] {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            std::fs::write(&path, &bytes).unwrap();
            let blocks = open().unwrap();
            blocks.read(0, &mut block).unwrap();
            assert!(matches!(
                blocks.read(1, &mut block),
                Err(Error::Damaged { .. })
            ));
            assert!(blocks.verify().is_err());
        }
        let exchanged = [&good[BLOCK..2 * BLOCK], &good[..BLOCK], &good[2 * BLOCK..]].concat();
        std::fs::write(&path, exchanged).unwrap();
        assert!(open().unwrap().read(0, &mut block).is_err());
    }

    #[test]
    fn a_block_file_of_another_length_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blocks");
        let sums = written(&path);
        let good = std::fs::read(&path).unwrap();
        for len in [0, 1, BLOCK, 3 * BLOCK - 1] {
            std::fs::write(&path, &good[..len]).unwrap();
            let refused = BlockReader::open(&path, sums.clone()).unwrap_err();
            assert!(matches!(refused, Error::Damaged { .. }), "{len}");
        }
        std::fs::write(&path, &good).unwrap();
        let blocks = BlockReader::open(&path, sums).unwrap();
        assert!(blocks.read(3, &mut [0; BLOCK]).is_err());
        assert!(blocks.read(u64::MAX, &mut [0; BLOCK]).is_err());
    }
}
