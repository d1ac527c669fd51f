//! A view: the filesystem as one sandbox sees it, one root into the persistent maps.
//!
//! Cloning a view is how a checkpoint is taken: everything is shared until one of the two changes it.

mod attr;
mod list;
mod namespace;
mod quota;
mod stored;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use rustix::io::Errno;

pub(crate) use attr::{AttrChange, TimeChange, may_lose_set_id};
pub(crate) use namespace::{NewNode, RenameMode};
pub use quota::Quota;
use quota::Usage;

use crate::file::{FileBody, ReadPlan, Writer};
use crate::node::{Body, DirBody, Entry, Ino, Name, Node, NodeRef, ROOT, Time};
use crate::tree::Tree;

/// The longest file name.
pub(crate) const MAX_NAME: usize = 255;

/// Who asks: ids inside the sandbox.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Caller {
    /// Whether the caller may be taken to have all capabilities over the volume's files. The
    /// protocol tells of capabilities only where this is not asked.
    fn is_root(self) -> bool {
        self.uid == 0
    }

    /// The caller, unless set-id bits survive what it does.
    fn unprivileged(self) -> Option<Self> {
        (!self.is_root()).then_some(self)
    }
}

/// One root into the maps of a tree.
#[derive(Clone, Debug)]
pub(crate) struct View {
    tree: Arc<Tree>,
    /// Every inode that differs from the base's. The others are looked up in the base.
    nodes: OrdMap<Ino, NodeRef>,
    /// Inodes without a name that something may still hold open.
    orphans: OrdSet<Ino>,
    /// Orphans that whoever asked for this state has yet to open again. That the kernel forgets what
    /// it knew of them in another state must not end them.
    pinned: OrdSet<Ino>,
    /// What was written in this epoch no snapshot can see.
    epoch: u64,
    quota: Quota,
    usage: Usage,
}

impl View {
    /// The base, unchanged.
    pub(crate) fn new(tree: Arc<Tree>) -> Self {
        let epoch = tree.next_epoch();
        Self {
            tree,
            nodes: OrdMap::new(),
            orphans: OrdSet::new(),
            pinned: OrdSet::new(),
            epoch,
            quota: Quota::default(),
            usage: Usage::default(),
        }
    }

    /// The same state in an epoch of its own, so that nothing written into it shows in the original.
    /// Its orphans are pinned.
    pub(crate) fn branch(&self) -> Self {
        Self {
            epoch: self.tree.next_epoch(),
            pinned: self.orphans.clone(),
            ..self.clone()
        }
    }

    /// From now on writes go to new blocks: whatever was written so far belongs to a snapshot.
    pub(crate) fn seal(&mut self) {
        self.epoch = self.tree.next_epoch();
    }

    /// What the volumes of the tree share.
    pub(crate) fn tree(&self) -> &Arc<Tree> {
        &self.tree
    }

    /// The inodes that differ from the base.
    pub(crate) fn nodes(&self) -> &OrdMap<Ino, NodeRef> {
        &self.nodes
    }

    /// The inodes without a name.
    pub(crate) fn orphans(&self) -> &OrdSet<Ino> {
        &self.orphans
    }

    /// The version of an inode that this view shows.
    pub(crate) fn node(&self, ino: Ino) -> Result<NodeRef, Errno> {
        match self.nodes.get(&ino) {
            Some(node) => Ok(node.clone()),
            None => self.tree.base.inode(ino).ok_or(Errno::STALE)?.node(),
        }
    }

    /// The inode of a name.
    pub(crate) fn lookup(&self, parent: Ino, name: &Name) -> Result<Option<Ino>, Errno> {
        match self.nodes.get(&parent) {
            Some(node) => self.find(as_dir(node)?, name),
            None => self.find(as_dir(&*self.node(parent)?)?, name),
        }
    }

    /// The directory that holds a directory.
    pub(crate) fn parent(&self, ino: Ino) -> Result<Ino, Errno> {
        let node = self.node(ino)?;
        as_dir(&node)?;
        Ok(node.names.first().map_or(ROOT, |link| link.parent))
    }

    /// A path of an inode from the root, without a leading `/` (empty for the root itself); none if it has no name that is
    /// known.
    pub(crate) fn path(&self, ino: Ino) -> Option<OsString> {
        let mut parts: Vec<Name> = Vec::new();
        let mut at = ino;
        while at != ROOT {
            let node = self.node(at).ok()?;
            let link = node
                .names
                .iter()
                .find(|link| self.lookup(link.parent, &link.name) == Ok(Some(at)))?;
            parts.push(Arc::clone(&link.name));
            at = link.parent;
        }
        let names: Vec<&[u8]> = parts.iter().rev().map(|name| &name[..]).collect();
        Some(OsString::from_vec(names.join(&b'/')))
    }

    /// Where the bytes of a file are.
    pub(crate) fn plan_read(&self, ino: Ino, offset: u64, len: usize) -> Result<ReadPlan, Errno> {
        match self.nodes.get(&ino) {
            Some(node) => Ok(as_file(node)?.plan_read(offset, len)),
            None => Ok(as_file(&*self.node(ino)?)?.plan_read(offset, len)),
        }
    }

    /// Lets go of an inode without a name that nothing holds open any more. What remains of one of the base is that
    /// it is gone.
    pub(crate) fn release_orphan(&mut self, ino: Ino) {
        if self.pinned.contains(&ino) || self.orphans.remove(&ino).is_none() {
            return;
        }
        let of_base = self.is_of_base(ino);
        let node = self.nodes.remove(&ino);
        if let Some(node) = node {
            self.usage.went(&node, of_base);
            if of_base {
                self.nodes.insert(ino, self.tree.gone(node.is_dir()));
            }
        }
    }

    /// Whether the inode is one of the base that is gone.
    pub(crate) fn is_gone(&self, ino: Ino) -> bool {
        let nameless = |node: &NodeRef| node.meta.nlink == 0;
        self.nodes.get(&ino).is_some_and(nameless) && !self.orphans.contains(&ino)
    }

    /// Ends the pinning: whatever is to be opened again was opened.
    pub(crate) fn unpin(&mut self) {
        self.pinned = OrdSet::new();
    }

    fn find(&self, dir: &DirBody, name: &Name) -> Result<Option<Ino>, Errno> {
        if !dir.entries.is_empty() {
            match dir.entries.get(&self.tree.base.key(name)) {
                Some(Entry::Inode { ino, .. }) => return Ok(Some(*ino)),
                Some(Entry::Whiteout) => return Ok(None),
                None => {}
            }
        }
        match &dir.base {
            Some(base) => Ok(base.child(name)?.map(|inode| inode.ino())),
            None => Ok(None),
        }
    }

    /// The inode for changing: a copy of its own of what a snapshot or the base holds.
    fn node_mut(&mut self, ino: Ino) -> Result<&mut Node, Errno> {
        if !self.nodes.contains_key(&ino) {
            let node = self.node(ino)?;
            self.nodes.insert(ino, node);
        }
        let node = self.nodes.get_mut(&ino).ok_or(Errno::STALE)?;
        Ok(Arc::make_mut(&mut node.0))
    }

    /// Runs `change` on an inode, and counts what it takes then.
    fn change<T>(
        &mut self,
        ino: Ino,
        change: impl FnOnce(&mut Node) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let node = self.node_mut(ino)?;
        let before = quota::blocks(node);
        let done = change(node);
        let after = quota::blocks(node);
        self.usage.resize(before, after);
        done
    }

    /// Runs `change` on the entries of a directory, whose times change by that.
    fn change_entries(
        &mut self,
        ino: Ino,
        change: impl FnOnce(&mut DirBody) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        self.change(ino, |node| {
            let Body::Dir(dir) = &mut node.body else {
                return Err(Errno::NOTDIR);
            };
            change(dir)?;
            node.meta.mtime = Time::now();
            node.meta.ctime = node.meta.mtime;
            Ok(())
        })
    }

    /// Runs `change` on the content of a file, with the place where its new blocks go.
    fn change_file<T>(
        &mut self,
        ino: Ino,
        change: impl FnOnce(&mut FileBody, Writer<'_>) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let (tree, epoch) = (Arc::clone(&self.tree), self.epoch);
        let to = Writer {
            store: &tree.data,
            epoch,
        };
        let room = self.room();
        let file = match &mut self.node_mut(ino)?.body {
            Body::File(file) => file,
            Body::Dir(_) => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        };
        let before = file.data_blocks();
        let done = quota::within(file, room, |file| change(file, to));
        let after = file.data_blocks();
        self.usage.resize(before, after);
        done
    }
}

/// The directory in a node.
pub(crate) fn as_dir(node: &Node) -> Result<&DirBody, Errno> {
    match &node.body {
        Body::Dir(dir) => Ok(dir),
        _ => Err(Errno::NOTDIR),
    }
}

/// The file in a node.
pub(crate) fn as_file(node: &Node) -> Result<&FileBody, Errno> {
    match &node.body {
        Body::File(file) => Ok(file),
        Body::Dir(_) => Err(Errno::ISDIR),
        _ => Err(Errno::INVAL),
    }
}
