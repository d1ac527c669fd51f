//! Reading a layer's log.

use std::path::{Path, PathBuf};

use deltalog::{BlockReader, LogReader, Record};

use super::records::{
    BASE, BLOCKS, ENTRIES, FORMAT, GONE, INODE, Inode, NUMBERING, Named, Numbering, ORPHANS, Run,
    SUMS,
};
use super::{DATA, LayerInfo, META};
use crate::base::StoredInode;
use crate::data::BLOCK;
use crate::error::Result;
use crate::node::Ino;

/// A layer's log in memory.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) path: PathBuf,
    pub(super) numbering: Numbering,
    pub(super) base: Vec<StoredInode>,
    pub(super) inodes: Vec<Changed>,
    pub(super) gone: Vec<Ino>,
    pub(super) orphans: Vec<Ino>,
    sums: Vec<u64>,
}

/// An inode, with how its content changed.
#[derive(Debug)]
pub(super) struct Changed {
    pub(super) inode: Inode,
    pub(super) runs: Vec<Run>,
    pub(super) entries: Vec<Named>,
}

impl Layer {
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(META);
        let mut log = LogReader::open(&path, FORMAT)?;
        let first = log.next_record()?.filter(|record| record.tag == NUMBERING);
        let Some(first) = first else {
            return Err(log.damaged("its first record is not the numbering").into());
        };
        let mut layer = Self {
            numbering: first.value()?,
            path,
            base: Vec::new(),
            inodes: Vec::new(),
            gone: Vec::new(),
            orphans: Vec::new(),
            sums: Vec::new(),
        };
        while let Some(record) = log.next_record()? {
            layer.take(&record)?;
        }
        Ok(layer)
    }

    fn take(&mut self, record: &Record) -> Result<()> {
        let last = || record.damaged("it belongs to an inode, and none came before");
        match record.tag {
            BASE => self.base.append(&mut record.value()?),
            INODE => self.inodes.push(Changed {
                inode: record.value()?,
                runs: Vec::new(),
                entries: Vec::new(),
            }),
            BLOCKS => {
                let inode = self.inodes.last_mut().ok_or_else(last)?;
                inode.runs.append(&mut record.value()?);
            }
            ENTRIES => {
                let inode = self.inodes.last_mut().ok_or_else(last)?;
                inode.entries.append(&mut record.value()?);
            }
            GONE => self.gone.append(&mut record.value()?),
            ORPHANS => self.orphans.append(&mut record.value()?),
            SUMS => {
                let (sums, rest) = record.payload.as_chunks();
                if !rest.is_empty() {
                    return Err(record.damaged("half a checksum is in it").into());
                }
                self.sums
                    .extend(sums.iter().map(|sum| u64::from_le_bytes(*sum)));
            }
            tag => {
                return Err(record
                    .damaged(format!("it has the unknown tag {tag}"))
                    .into());
            }
        }
        Ok(())
    }

    /// Its blocks.
    pub(super) fn blocks(&self, dir: &Path) -> Result<BlockReader> {
        Ok(BlockReader::open(&dir.join(DATA), self.sums.clone())?)
    }

    pub(super) fn info(&self) -> LayerInfo {
        LayerInfo {
            inodes: self.inodes.len() as u64,
            gone: self.gone.len() as u64,
            base_inodes: self.base.len() as u64,
            data_bytes: self.sums.len() as u64 * BLOCK,
        }
    }
}
