//! What all volumes of a tree share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::base::Base;
use crate::data::DataStore;
use crate::file::FileBody;
use crate::node::{Body, DIRECTORY, DirBody, Ino, NodeRef, REGULAR};

/// The base, the block store and the counters of a tree of volumes.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) base: Arc<Base>,
    pub(crate) data: Arc<DataStore>,
    next_epoch: AtomicU64,
    gone_directory: NodeRef,
    gone_file: NodeRef,
}

impl Tree {
    /// A tree without any volume yet.
    pub(crate) fn new(base: Arc<Base>, data: Arc<DataStore>) -> Self {
        Self {
            base,
            data,
            next_epoch: AtomicU64::new(1),
            gone_directory: NodeRef::gone(DIRECTORY, Body::Dir(DirBody::default())),
            gone_file: NodeRef::gone(REGULAR, Body::File(FileBody::default())),
        }
    }

    /// An epoch that no volume of the tree ever had.
    pub(crate) fn next_epoch(&self) -> u64 {
        self.next_epoch.fetch_add(1, Ordering::Relaxed)
    }

    /// What a view shows of an inode of the base that has no name any more and that nothing has open. All of them share
    /// it.
    pub(crate) fn gone(&self, is_dir: bool) -> NodeRef {
        let gone = if is_dir {
            &self.gone_directory
        } else {
            &self.gone_file
        };
        gone.clone()
    }

    /// An inode number that no inode of the tree ever had.
    pub(crate) fn next_ino(&self) -> Ino {
        self.base.next_ino()
    }
}
