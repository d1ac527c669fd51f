//! What a layer on disk keeps of the base: which numbers its inodes have, and how they looked.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::host::{host_id, stat, time};
use super::{Base, BaseInode};
use crate::node::{Ino, Name, Node, ROOT};

/// A base inode that was looked up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredInode {
    pub(crate) ino: Ino,
    /// Its place in the order of look-ups.
    rank: u64,
    pub(crate) parent: Ino,
    pub(crate) name: Vec<u8>,
    /// Its number on the host.
    host: u64,
    look: Option<Look>,
}

/// The first inode number and the first rank that nothing in a tree of volumes ever had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Free {
    pub(crate) ino: Ino,
    pub(crate) rank: u64,
}

impl Free {
    /// The rank of what is looked up first: the root was there before.
    pub(crate) const FIRST_RANK: u64 = 1;
}

/// What tells a file from one that was written since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Look {
    /// A directory changes with every entry, so that nothing is compared but its number.
    dir: bool,
    size: u64,
    mtime: (i64, u32),
}

impl Look {
    fn of(node: &Node) -> Self {
        Self {
            dir: node.is_dir(),
            size: node.size(),
            mtime: (node.meta.mtime.sec, node.meta.mtime.nsec),
        }
    }
}

/// Keys that nobody can know.
pub(super) fn random_keys() -> Result<(u64, u64), Errno> {
    let mut keys = [[0; 8]; 2];
    for key in &mut keys {
        rustix::rand::getrandom(&mut key[..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok((u64::from_ne_bytes(keys[0]), u64::from_ne_bytes(keys[1])))
}

impl Base {
    /// The keys of the hash that orders names.
    pub(crate) fn keys(&self) -> (u64, u64) {
        self.keys
    }

    /// The number of the base's root on the host.
    pub(crate) fn root_host(&self) -> Option<u64> {
        Some(self.inode(ROOT)?.host.1)
    }

    /// The inodes that were looked up as `from`-th or later, parents before children, and what is free.
    pub(crate) fn looked_up_since(&self, from: u64) -> (Vec<StoredInode>, Free) {
        // Under the lock no number is given to an inode of the base.
        let table = self.table.lock();
        let free = Free {
            ino: self.next_ino.load(Ordering::Relaxed),
            rank: table.next_rank,
        };
        let begin = table.order.partition_point(|(rank, _)| *rank < from);
        // A parent is looked up before what is in it.
        let known = table.order[begin..].iter();
        let known = known.filter_map(|(rank, ino)| table.inodes.get(ino)?.stored(*rank));
        (known.collect(), free)
    }

    /// What comes before `free` is taken.
    pub(crate) fn reserve(&self, free: Free) {
        let mut table = self.table.lock();
        table.next_rank = table.next_rank.max(free.rank);
        self.next_ino.fetch_max(free.ino, Ordering::Relaxed);
    }

    /// Knows an inode of the base again by the number that it had. Tells whether that can be: its parent is known, and
    /// nothing else has the number. What it looks like on the host now does not matter; if it is another one, whoever
    /// uses it gets `ESTALE`.
    pub(crate) fn know(self: &Arc<Self>, stored: &StoredInode) -> bool {
        let mut table = self.table.lock();
        let Some(parent) = table.inodes.get(&stored.parent).cloned() else {
            return false;
        };
        if let Some(known) = table.inodes.get(&stored.ino) {
            return known.is_at(&parent, &Name::from(&stored.name[..]));
        }
        let host = (parent.host.0, stored.host);
        let name = Name::from(&stored.name[..]);
        let inode = BaseInode::new(self, stored.ino, host, Some(parent), name);
        table.insert(host, inode, stored.rank);
        true
    }

    /// Where an inode was, from the root of the base and with a leading `/`, if it is not what it was when it was stored.
    pub(crate) fn changed(&self, stored: &StoredInode) -> Option<PathBuf> {
        let inode = self.inode(stored.ino)?;
        let look = stored.look?;
        (!inode.looks(look)).then(|| inode.path())
    }
}

impl BaseInode {
    /// `None` for the root, which has no name.
    fn stored(&self, rank: u64) -> Option<StoredInode> {
        let look = self.node.lock().as_ref().map(|node| Look::of(node));
        Some(StoredInode {
            ino: self.ino,
            rank,
            parent: self.parent.as_ref()?.ino,
            name: self.name.to_vec(),
            host: self.host.1,
            look,
        })
    }

    fn looks(&self, look: Look) -> bool {
        let Some(parent) = &self.parent else {
            return true;
        };
        let found = parent.dir().and_then(|dir| stat(&*dir, &self.name));
        let Ok(found) = found else { return false };
        let mtime = time(found.stx_mtime);
        host_id(&found) == self.host
            && (look.dir || (found.stx_size, (mtime.sec, mtime.nsec)) == (look.size, look.mtime))
    }

    /// Where it is, from the root of the base, with a leading `/`.
    pub(crate) fn path(&self) -> PathBuf {
        let mut names = Vec::new();
        let mut at = Some(self);
        while let Some(inode) = at {
            if inode.parent.is_some() {
                names.push(&inode.name[..]);
            }
            at = inode.parent.as_deref();
        }
        names.reverse();
        let path = [&b"/"[..], &names.join(&b'/')].concat();
        PathBuf::from(OsString::from_vec(path))
    }
}
