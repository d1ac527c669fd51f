//! What all volumes of a tree share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::base::Base;
use crate::data::DataStore;
use crate::node::Ino;

/// The base, the block store and the counters of a tree of volumes.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) base: Arc<Base>,
    pub(crate) data: Arc<DataStore>,
    next_epoch: AtomicU64,
}

impl Tree {
    /// A tree without any volume yet.
    pub(crate) fn new(base: Arc<Base>, data: Arc<DataStore>) -> Self {
        Self {
            base,
            data,
            next_epoch: AtomicU64::new(1),
        }
    }

    /// An epoch that no volume of the tree ever had.
    pub(crate) fn next_epoch(&self) -> u64 {
        self.next_epoch.fetch_add(1, Ordering::Relaxed)
    }

    /// An inode number that no inode of the tree ever had.
    pub(crate) fn next_ino(&self) -> Ino {
        self.base.next_ino()
    }
}
