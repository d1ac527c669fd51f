//! Reading: first find where the bytes are, then fetch them without holding up anybody.

use std::io;
use std::sync::Arc;

use crate::base::BaseInode;
use crate::data::{Block, DataStore, read_or_zeros};

/// A run of bytes of a file and where they are.
#[derive(Debug)]
struct Segment {
    len: usize,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// Bytes of the block file from `position` on; the blocks are held so that nobody takes their places.
    Data {
        position: u64,
        held: Vec<Block>,
    },
    Base {
        inode: Arc<BaseInode>,
        position: u64,
    },
    Zeros,
}

/// What a read found, to be fetched without holding up anybody.
#[derive(Debug, Default)]
pub(crate) struct ReadPlan {
    segments: Vec<Segment>,
    len: usize,
}

impl ReadPlan {
    /// How many bytes there are to read.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Reads everything into `buf`, which is as long as the plan.
    pub(crate) fn fetch(&self, store: &DataStore, buf: &mut [u8]) -> io::Result<()> {
        let mut rest = buf;
        for segment in &self.segments {
            let (part, after) = rest.split_at_mut(segment.len.min(rest.len()));
            match &segment.source {
                Source::Data { position, .. } => store.read(part, *position)?,
                Source::Base { inode, position } => {
                    let file = inode.file()?;
                    read_or_zeros(&file, part, *position)?;
                }
                Source::Zeros => part.fill(0),
            }
            rest = after;
        }
        Ok(())
    }

    pub(super) fn push_data(&mut self, block: &Block, within: u64, len: usize) {
        self.len += len;
        let from = block.position() + within;
        if let Some(Segment {
            len: before,
            source: Source::Data { position, held },
        }) = self.segments.last_mut()
            && *position + *before as u64 == from
        {
            held.push(Arc::clone(block));
            *before += len;
            return;
        }
        let held = vec![Arc::clone(block)];
        self.segments.push(Segment {
            len,
            source: Source::Data {
                position: from,
                held,
            },
        });
    }

    pub(super) fn push_base(&mut self, inode: &Arc<BaseInode>, from: u64, len: usize) {
        self.len += len;
        if let Some(Segment {
            len: before,
            source: Source::Base { position, .. },
        }) = self.segments.last_mut()
            && *position + *before as u64 == from
        {
            *before += len;
            return;
        }
        let inode = Arc::clone(inode);
        self.segments.push(Segment {
            len,
            source: Source::Base {
                inode,
                position: from,
            },
        });
    }

    pub(super) fn push_zeros(&mut self, len: usize) {
        if len == 0 {
            return;
        }
        self.len += len;
        match self.segments.last_mut() {
            Some(Segment {
                len: before,
                source: Source::Zeros,
            }) => *before += len,
            _ => self.segments.push(Segment {
                len,
                source: Source::Zeros,
            }),
        }
    }
}
