//! One inode of the base.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags, Statx};
use rustix::io::Errno;

use super::Base;
use super::ahead::Found;
use super::descriptors::open;
use super::host::{HostId, confined, encode_device, has_xattrs, host_id, read_xattrs, stat, time};
use super::listing::{ListEntry, Listing};
use crate::file::FileBody;
use crate::node::{
    Body, DIRECTORY, DirBody, Ino, Link, Meta, Name, Node, NodeRef, REGULAR, SYMLINK, TYPE_MASK,
};
use crate::xattr::{XattrMap, Xattrs};

/// An inode of the base that was looked up at least once. It stands for the same file in every view.
#[derive(Debug)]
pub(crate) struct BaseInode {
    base: Weak<Base>,
    pub(super) ino: Ino,
    pub(super) host: HostId,
    pub(super) parent: Option<Arc<BaseInode>>,
    pub(super) name: Name,
    /// Filled when first asked for; the base does not change.
    pub(super) node: Mutex<Option<NodeRef>>,
    xattrs: OnceLock<Option<Arc<XattrMap>>>,
}

impl BaseInode {
    /// An inode of which nothing but its place is known yet.
    pub(super) fn new(
        base: &Arc<Base>,
        ino: Ino,
        host: HostId,
        parent: Option<Arc<Self>>,
        name: Name,
    ) -> Arc<Self> {
        Arc::new(Self {
            base: Arc::downgrade(base),
            ino,
            host,
            parent,
            name,
            node: Mutex::default(),
            xattrs: OnceLock::new(),
        })
    }

    /// Whether it is what has this name in this directory.
    pub(super) fn is_at(&self, dir: &Self, name: &Name) -> bool {
        self.name == *name
            && self
                .parent
                .as_ref()
                .is_some_and(|parent| parent.ino == dir.ino)
    }

    /// Its number.
    pub(crate) fn ino(&self) -> Ino {
        self.ino
    }

    /// Its number on the host.
    pub(crate) fn host_ino(&self) -> u64 {
        self.host.1
    }

    /// Whether it has these numbers of device and inode on the host.
    pub(crate) fn is_on_host(&self, host: HostId) -> bool {
        self.host == host
    }

    /// The directory that it is in, and its name there; none for the root.
    pub(crate) fn place(&self) -> Option<(&Arc<Self>, &Name)> {
        self.parent.as_ref().map(|parent| (parent, &self.name))
    }

    /// The inode as views show it until they change it.
    pub(crate) fn node(self: &Arc<Self>) -> Result<NodeRef, Errno> {
        if let Some(node) = &*self.node.lock() {
            return Ok(node.clone());
        }
        let attributes = match &self.parent {
            Some(parent) => stat(&*parent.dir()?, &self.name)?,
            None => stat(&*self.base()?.root, b"")?,
        };
        if host_id(&attributes) != self.host {
            return Err(Errno::STALE);
        }
        let node = self.make_node(&attributes)?;
        Ok(self.node.lock().get_or_insert(node).clone())
    }

    /// Fills in what the host says of the inode, unless that was done before.
    pub(super) fn show(self: &Arc<Self>, attributes: &Statx) -> Result<(), Errno> {
        if self.node.lock().is_none() {
            let node = self.make_node(attributes)?;
            self.node.lock().get_or_insert(node);
        }
        Ok(())
    }

    /// Lets go of the version that the inode shows, which holds the inode.
    pub(super) fn let_go(&self) {
        *self.node.lock() = None;
    }

    /// Looks a name up in this directory.
    pub(crate) fn child(self: &Arc<Self>, name: &Name) -> Result<Option<Arc<BaseInode>>, Errno> {
        let base = self.base()?;
        if let Some(listing) = base.listings.lock().get(self.ino)
            && listing.find(&base.key(name)).is_none()
        {
            return Ok(None);
        }
        let attributes = match stat(&*self.dir()?, name) {
            Ok(attributes) => attributes,
            Err(Errno::NOENT | Errno::NAMETOOLONG) => return Ok(None),
            Err(error) => return Err(error),
        };
        self.adopt_child(&base, name, &attributes)
    }

    /// The child of which the host says this; none if it is hidden.
    fn adopt_child(
        self: &Arc<Self>,
        base: &Arc<Base>,
        name: &Name,
        attributes: &Statx,
    ) -> Result<Option<Arc<BaseInode>>, Errno> {
        let host = host_id(attributes);
        if base.hidden.contains(&host) {
            return Ok(None);
        }
        let is_dir = u32::from(attributes.stx_mode) & TYPE_MASK == DIRECTORY;
        let inode = base.intern(host, self, name, !is_dir && attributes.stx_nlink > 1);
        inode.show(attributes)?;
        Ok(Some(inode))
    }

    /// The child that a listing named.
    pub(crate) fn listed_child(
        self: &Arc<Self>,
        entry: &ListEntry,
    ) -> Result<Arc<BaseInode>, Errno> {
        let base = self.base()?;
        let known = {
            let table = base.table.lock();
            let ino = table.by_host.get(&(self.host.0, entry.host_ino));
            ino.and_then(|ino| table.inodes.get(ino)).cloned()
        };
        if let Some(known) = known
            && known.is_at(self, &entry.key.name)
        {
            return Ok(known);
        }
        self.child(&entry.key.name)?.ok_or(Errno::NOENT)
    }

    /// All entries of this directory but `.`, `..` and what is hidden.
    pub(crate) fn listing(self: &Arc<Self>) -> Result<Arc<Listing>, Errno> {
        let base = self.base()?;
        if let Some(listing) = base.listings.lock().get(self.ino) {
            return Ok(listing);
        }
        let listing = Arc::new(match base.ahead.take(self.ino) {
            Some(found) => self.adopt(&base, found),
            None => Listing::read(&base, &*self.dir()?, self.host.0)?,
        });
        let below = {
            let mut listings = base.listings.lock();
            listings.put(self.ino, Arc::clone(&listing), listing.entries().len() + 1);
            let parent = self.parent.as_ref();
            parent.is_some_and(|parent| listings.get(parent.ino).is_some())
        };
        base.ahead.listed(self, &listing, below);
        Ok(listing)
    }

    /// Gives what was read ahead of this directory to its entries.
    fn adopt(self: &Arc<Self>, base: &Arc<Base>, found: Found) -> Listing {
        for (entry, look) in found.listing.entries().iter().zip(found.looks) {
            if let Some(look) = look {
                // What fails now fails again for whoever asks for the entry.
                let _ = self.adopt_child(base, &entry.key.name, &look);
            }
        }
        found.listing
    }

    /// Reads the directory that a listing of this one names, and how its entries look if they are not more than `most`. None if it was
    /// listed already. Nobody knows what is in it by that.
    pub(super) fn read_ahead(
        self: &Arc<Self>,
        entry: &ListEntry,
        most: usize,
    ) -> Result<Option<(Ino, Found)>, Errno> {
        let inode = self.listed_child(entry)?;
        let base = self.base()?;
        if base.listings.lock().get(inode.ino).is_some() {
            return Ok(None);
        }
        let dir = inode.dir()?;
        let listing = Listing::read(&base, &dir, inode.host.0)?;
        let entries = listing.entries();
        let entries = if entries.len() > most { &[] } else { entries };
        let looks = entries
            .iter()
            .map(|entry| stat(&*dir, &entry.key.name).ok());
        let looks = looks.collect();
        Ok(Some((inode.ino, Found { listing, looks })))
    }

    /// The file, open for reading.
    pub(crate) fn file(&self) -> Result<Arc<File>, Errno> {
        let base = self.base()?;
        if let Some(file) = base.files.lock().get(self.ino) {
            return Ok(file);
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOATIME | OFlags::NOCTTY;
        let file = Arc::new(File::from(self.open(&base, flags)?));
        base.files.lock().put(self.ino, Arc::clone(&file), 1);
        Ok(file)
    }

    /// The directory's `O_PATH` descriptor.
    pub(super) fn dir(&self) -> Result<Arc<OwnedFd>, Errno> {
        let base = self.base()?;
        let mut missing = vec![self];
        let mut fd = base.dirs.lock().get(self.ino);
        while fd.is_none()
            && let Some(parent) = missing.last().and_then(|last| last.parent.as_deref())
        {
            fd = base.dirs.lock().get(parent.ino);
            missing.push(parent);
        }
        // The last one is either the nearest ancestor that is open, or the root.
        let mut fd = match fd {
            Some(fd) => fd,
            None => Arc::clone(&base.root),
        };
        for inode in missing.iter().rev().skip(1) {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let name = OsStr::from_bytes(&inode.name);
            let below = open(|| rustix::fs::openat2(&*fd, name, flags, Mode::empty(), confined()))?;
            fd = Arc::new(below);
            base.dirs.lock().put(inode.ino, Arc::clone(&fd), 1);
        }
        Ok(fd)
    }

    fn open(&self, base: &Base, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let (dir, name) = match &self.parent {
            Some(parent) => (parent.dir()?, OsStr::from_bytes(&self.name)),
            None => (Arc::clone(&base.root), OsStr::new(".")),
        };
        let fd = open(|| rustix::fs::openat2(&*dir, name, flags, Mode::empty(), confined()))?;
        if host_id(&stat(&fd, b"")?) != self.host {
            return Err(Errno::STALE);
        }
        Ok(fd)
    }

    /// Its extended attributes.
    pub(crate) fn xattrs(&self) -> Result<Option<Arc<XattrMap>>, Errno> {
        if let Some(xattrs) = self.xattrs.get() {
            return Ok(xattrs.clone());
        }
        let xattrs = match &self.parent {
            // Most have none, and that takes one call.
            Some(parent) if !has_xattrs(&*parent.dir()?, &self.name) => None,
            _ => read_xattrs(&self.open(&*self.base()?, OFlags::PATH)?)?,
        };
        Ok(self.xattrs.get_or_init(|| xattrs).clone())
    }

    fn base(&self) -> Result<Arc<Base>, Errno> {
        self.base.upgrade().ok_or(Errno::STALE)
    }

    fn make_node(self: &Arc<Self>, attributes: &Statx) -> Result<NodeRef, Errno> {
        let mode = u32::from(attributes.stx_mode);
        let body = match mode & TYPE_MASK {
            REGULAR => Body::File(FileBody::of_base(
                Arc::clone(self),
                attributes.stx_size,
                attributes.stx_blocks,
            )),
            DIRECTORY => Body::Dir(DirBody {
                base: Some(Arc::clone(self)),
                ..DirBody::default()
            }),
            SYMLINK => Body::Symlink(self.read_link()?),
            _ => Body::Special,
        };
        let names = match &self.parent {
            Some(parent) => vec![Link {
                parent: parent.ino,
                name: Arc::clone(&self.name),
            }],
            None => Vec::new(),
        };
        let rdev = rustix::fs::makedev(attributes.stx_rdev_major, attributes.stx_rdev_minor);
        Ok(NodeRef(Arc::new(Node {
            meta: Meta {
                mode,
                uid: attributes.stx_uid,
                gid: attributes.stx_gid,
                nlink: attributes.stx_nlink,
                rdev: encode_device(rdev),
                atime: time(attributes.stx_atime),
                mtime: time(attributes.stx_mtime),
                ctime: time(attributes.stx_ctime),
            },
            body,
            xattrs: Xattrs::Base(Arc::clone(self)),
            names,
        })))
    }

    fn read_link(&self) -> Result<Arc<[u8]>, Errno> {
        let parent = self.parent.as_ref().ok_or(Errno::INVAL)?;
        let target =
            rustix::fs::readlinkat(&*parent.dir()?, OsStr::from_bytes(&self.name), Vec::new())?;
        Ok(Arc::from(target.as_bytes()))
    }
}
