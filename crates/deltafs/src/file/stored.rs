//! The content of a file as a layer on disk keeps it.

use std::sync::Arc;

use imbl::ordmap::DiffItem;
use serde::{Deserialize, Serialize};

use super::{BasePart, FileBody, MAX_SIZE, Own};
use crate::base::{Base, BaseInode};
use crate::data::{BLOCK, Block};
use crate::node::Ino;

/// The part of a base file that shows through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredBase {
    pub(crate) ino: Ino,
    limit: u64,
    blocks_512: u64,
}

/// What a layer says of a block of a file.
#[derive(Clone, Debug)]
pub(crate) enum StoredBlock {
    Data(Block),
    /// A hole punched into the base.
    Hole,
    /// The file has no block of its own there any more.
    Gone,
}

impl FileBody {
    /// The part of a base file that shows through.
    pub(crate) fn stored_base(&self) -> Option<StoredBase> {
        self.base.as_ref().map(|base| StoredBase {
            ino: base.inode.ino(),
            limit: base.limit,
            blocks_512: base.blocks_512,
        })
    }

    /// The blocks in which it differs from an earlier version, ascending.
    pub(crate) fn blocks_since(&self, before: &Self) -> Vec<(u64, StoredBlock)> {
        let own = |own: &Own| match own {
            Own::Data(block) => StoredBlock::Data(Arc::clone(block)),
            Own::Hole => StoredBlock::Hole,
        };
        let items = before.blocks.diff(&self.blocks);
        items
            .map(|item| match item {
                DiffItem::Add(block, new) => (*block, own(new)),
                DiffItem::Update { new, .. } => (*new.0, own(new.1)),
                DiffItem::Remove(block, _) => (*block, StoredBlock::Gone),
            })
            .collect()
    }

    /// A later version of it. `None` if there can be no such file.
    pub(crate) fn with_stored(
        &self,
        size: u64,
        base: Option<(StoredBase, Arc<BaseInode>)>,
        blocks: Vec<(u64, StoredBlock)>,
    ) -> Option<Self> {
        let mut own = self.blocks.clone();
        for (block, change) in blocks {
            if block > MAX_SIZE / BLOCK {
                return None;
            }
            match change {
                StoredBlock::Data(slot) => own.insert(block, Own::Data(slot)),
                StoredBlock::Hole => own.insert(block, Own::Hole),
                StoredBlock::Gone => own.remove(&block),
            };
        }
        let base = base.map(|(stored, inode)| BasePart {
            inode,
            limit: stored.limit,
            blocks_512: stored.blocks_512,
        });
        let shown = base.as_ref().map_or(0, |base| base.limit);
        let sound = size <= MAX_SIZE && shown <= MAX_SIZE;
        sound.then(|| Self {
            size,
            data_blocks: own.values().filter(|o| matches!(o, Own::Data(_))).count() as u64,
            covering: own.range(..shown.div_ceil(BLOCK)).count() as u64,
            base,
            blocks: own,
        })
    }
}

impl StoredBase {
    /// The base inode that it means.
    pub(crate) fn find(self, base: &Base) -> Option<(Self, Arc<BaseInode>)> {
        Some((self, base.inode(self.ino)?))
    }
}
