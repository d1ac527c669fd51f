//! The read-only base directory, looked up lazily and shared by all volumes of a tree.
//!
//! A base inode is opened by its parent's descriptor and its own name, without following symbolic links and
//! without crossing mounts, so nothing in the base can lead out of it.

mod ahead;
mod descriptors;
mod host;
mod inode;
mod kept;
mod listing;
mod stored;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::io::Errno;
use siphasher::sip::SipHasher13;

use ahead::Ahead;
use host::{HostId, find_hidden, host_id, single_filesystem, stat};
pub(crate) use inode::BaseInode;
use kept::Kept;
pub(crate) use listing::ListEntry;
use listing::Listing;
pub(crate) use stored::{Free, StoredInode};

use crate::node::{DIRECTORY, EntryKey, Ino, Name, ROOT, TYPE_MASK};

/// A file of the base has the number that it has on the host, so that programs which remember numbers (git does, in its
/// index) find it unchanged. All other inodes have numbers from here on; so has what has a higher number on the host, or one
/// that is taken. Numbers stay exact in a `double`, which is what JavaScript has for them.
const FIRST_OWN: Ino = 1 << 40;
/// Directory entry offsets 0 and 1 are those of `.` and `..`.
const FIRST_COOKIE: u64 = 2;
/// How many descriptors of base files, and of base directories, are kept open.
const MAX_OPEN: usize = 512;
/// How many entries of base directories are kept in memory.
const MAX_LISTED: usize = 500_000;

/// The base directory of a tree of volumes.
#[derive(Debug)]
pub(crate) struct Base {
    root: Arc<OwnedFd>,
    hidden: HashSet<HostId>,
    /// The keys of the hash that orders names.
    keys: (u64, u64),
    next_ino: AtomicU64,
    table: Mutex<Table>,
    listings: Mutex<Kept<Listing>>,
    dirs: Mutex<Kept<OwnedFd>>,
    files: Mutex<Kept<File>>,
    ahead: Arc<Ahead>,
}

#[derive(Debug, Default)]
struct Table {
    by_host: HashMap<HostId, Ino>,
    inodes: HashMap<Ino, Arc<BaseInode>>,
    /// The numbers in the order in which they were looked up first, each with its rank, ascending.
    order: Vec<(u64, Ino)>,
    next_rank: u64,
}

impl Table {
    fn insert(&mut self, host: HostId, inode: Arc<BaseInode>, rank: u64) {
        let ino = inode.ino();
        self.by_host.insert(host, ino);
        let at = self.order.partition_point(|(before, _)| *before < rank);
        self.order.insert(at, (rank, ino));
        self.next_rank = self.next_rank.max(rank.saturating_add(1));
        self.inodes.insert(ino, inode);
    }

    /// The number that an inode has on the host, if it can have it here.
    fn host_number(&self, host: HostId) -> Option<Ino> {
        let (_, ino) = host;
        let fits = (ROOT + 1..FIRST_OWN).contains(&ino);
        (fits && !self.inodes.contains_key(&ino)).then_some(ino)
    }
}

impl Base {
    /// Takes a directory as the base. What lies at `hidden` (absolute, seen from the base) does not show.
    pub(crate) fn new(root: OwnedFd, hidden: &[PathBuf]) -> Result<Arc<Self>, Errno> {
        Self::with_keys(root, hidden, stored::random_keys()?)
    }

    /// The same, with names in the order that they had with these keys.
    pub(crate) fn with_keys(
        root: OwnedFd,
        hidden: &[PathBuf],
        keys: (u64, u64),
    ) -> Result<Arc<Self>, Errno> {
        let root = single_filesystem(root);
        let attributes = stat(&root, b"")?;
        if u32::from(attributes.stx_mode) & TYPE_MASK != DIRECTORY {
            return Err(Errno::NOTDIR);
        }
        let hidden = hidden
            .iter()
            .filter_map(|path| find_hidden(&root, path))
            .collect();
        let base = Arc::new(Self {
            root: Arc::new(root),
            hidden,
            keys,
            next_ino: AtomicU64::new(FIRST_OWN),
            table: Mutex::default(),
            listings: Mutex::new(Kept::new(MAX_LISTED)),
            dirs: Mutex::new(Kept::new(MAX_OPEN)),
            files: Mutex::new(Kept::new(MAX_OPEN)),
            ahead: Arc::default(),
        });
        let inode = BaseInode::new(&base, ROOT, host_id(&attributes), None, Arc::from(&b""[..]));
        inode.show(&attributes)?;
        let mut table = base.table.lock();
        table.insert(host_id(&attributes), inode, 0);
        drop(table);
        descriptors::register(&base);
        Ok(base)
    }

    /// A number that no inode of the tree ever had.
    pub(crate) fn next_ino(&self) -> Ino {
        self.next_ino.fetch_add(1, Ordering::Relaxed)
    }

    /// The place of a name in its directory's order.
    pub(crate) fn key(&self, name: &Name) -> EntryKey {
        // One bit is the sign of `off_t`, one keeps the offset after the last entry in range. Two names of
        // one directory with the same 62-bit keyed hash are not to be expected.
        let hash = SipHasher13::new_with_keys(self.keys.0, self.keys.1).hash(name);
        let cookie = (hash >> 2).max(FIRST_COOKIE);
        EntryKey {
            cookie,
            name: Arc::clone(name),
        }
    }

    /// A base inode that was looked up before.
    pub(crate) fn inode(&self, ino: Ino) -> Option<Arc<BaseInode>> {
        self.table.lock().inodes.get(&ino).cloned()
    }

    /// Lets go of what the host said of an inode that the kernel has forgotten; it is asked again when that is needed. The
    /// number stays that file's.
    pub(crate) fn forget(&self, ino: Ino) {
        let inode = self.inode(ino);
        if let Some(inode) = inode.filter(|_| ino != ROOT) {
            inode.let_go();
        }
    }

    /// How many base inodes are known.
    pub(crate) fn known(&self) -> usize {
        self.table.lock().inodes.len()
    }

    /// The inode for a file of the host, new if it was never seen. A file with one link that turns up under another
    /// name is another file, which got the number of one that is gone.
    fn intern(
        self: &Arc<Self>,
        host: HostId,
        dir: &Arc<BaseInode>,
        name: &Name,
        linked: bool,
    ) -> Arc<BaseInode> {
        let mut table = self.table.lock();
        if let Some(known) = table
            .by_host
            .get(&host)
            .and_then(|ino| table.inodes.get(ino))
            && (linked || known.is_at(dir, name))
        {
            return Arc::clone(known);
        }
        let ino = table.host_number(host).unwrap_or_else(|| self.next_ino());
        let inode = BaseInode::new(self, ino, host, Some(Arc::clone(dir)), Arc::clone(name));
        let rank = table.next_rank;
        table.insert(host, Arc::clone(&inode), rank);
        inode
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        self.ahead.end();
        // The versions that base inodes show hold the inodes in turn.
        for inode in self.table.get_mut().inodes.values() {
            inode.let_go();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forgotten_inode_keeps_its_number_and_shows_the_same_again() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "x").unwrap();
        let base = Base::new(File::open(dir.path()).unwrap().into(), &[]).unwrap();
        let root = base.inode(ROOT).unwrap();
        let name: Name = Arc::from(&b"file"[..]);
        let child = root.child(&name).unwrap().unwrap();
        let shown = child.node().unwrap();
        base.forget(child.ino());
        assert_eq!(Arc::strong_count(&shown.0), 1, "nobody else holds it");
        assert_eq!(root.child(&name).unwrap().unwrap().ino(), child.ino());
        let again = child.node().unwrap();
        assert_eq!((again.meta, &again.names), (shown.meta, &shown.names));
    }

    fn lists_as_on_the_host(dir: &Arc<BaseInode>, place: &std::path::Path) {
        let mut names = Vec::new();
        for entry in dir.listing().unwrap().from(0) {
            let inode = dir.listed_child(entry).unwrap();
            let name = std::str::from_utf8(&entry.key.name).unwrap();
            let host = std::fs::symlink_metadata(place.join(name)).unwrap();
            let node = inode.node().unwrap();
            assert_eq!(node.size(), if node.is_dir() { 4096 } else { host.len() });
            assert_eq!(inode.ino(), std::os::unix::fs::MetadataExt::ino(&host));
            if node.is_dir() {
                lists_as_on_the_host(&inode, &place.join(name));
            }
            names.push(name.to_owned());
        }
        names.sort();
        let there = std::fs::read_dir(place).unwrap();
        let there = there.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut there: Vec<String> = there.filter(|name| name != "hidden").collect();
        there.sort();
        assert_eq!(names, there);
    }

    #[test]
    fn what_was_read_ahead_is_what_is_listed() {
        let dir = tempfile::tempdir().unwrap();
        for place in 0..40 {
            let place = dir.path().join(format!("{}/{place}", place % 4));
            std::fs::create_dir_all(place.join("hidden")).unwrap();
            for file in 0..place.as_os_str().len() {
                std::fs::write(place.join(file.to_string()), vec![1; file]).unwrap();
            }
            std::os::unix::fs::symlink("0", place.join("link")).unwrap();
        }
        let hidden = (0..40).map(|place| PathBuf::from(format!("/{}/{place}/hidden", place % 4)));
        let hidden: Vec<PathBuf> = hidden.collect();
        let base = Base::new(File::open(dir.path()).unwrap().into(), &hidden).unwrap();
        let root = base.inode(ROOT).unwrap();
        let first = root.listing().unwrap();
        for (entry, at) in first.from(0).iter().zip(0..) {
            let child = root.listed_child(entry).unwrap();
            child.listing().unwrap();
            if at > 0 {
                // The third directory in a row: someone walks.
                base.ahead.await_found();
            }
        }
        let known = base.known();
        lists_as_on_the_host(&root, dir.path());
        assert!(
            known < base.known(),
            "what was read ahead got no numbers before"
        );
    }

    #[test]
    fn a_base_that_is_dropped_leaves_nothing_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "x").unwrap();
        let base = Base::new(File::open(dir.path()).unwrap().into(), &[]).unwrap();
        let root = base.inode(ROOT).unwrap();
        let child = root.child(&Arc::from(&b"file"[..])).unwrap().unwrap();
        child.node().unwrap();
        let kept = Arc::downgrade(&child);
        drop((child, root, base));
        assert!(kept.upgrade().is_none());
    }
}
