//! The read-only base directory, looked up lazily and shared by all volumes of a tree.
//!
//! A base inode is opened by its parent's descriptor and its own name, without following symbolic links and
//! without crossing mounts, so nothing in the base can lead out of it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::OsStr;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, Mode, OFlags, RawDir, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use crate::file::FileBody;
use crate::node::{
    Body, DIRECTORY, DirBody, EntryKey, Ino, Link, Meta, Name, Node, NodeRef, REGULAR, ROOT,
    SYMLINK, Time,
};
use crate::xattr::{XattrMap, Xattrs};

/// Directory entry offsets 0 and 1 are those of `.` and `..`.
const FIRST_COOKIE: u64 = 2;
/// How many descriptors of base files, and of base directories, are kept open.
const MAX_OPEN: usize = 512;
/// How many entries of base directories are kept in memory.
const MAX_LISTED: usize = 500_000;

/// A base inode's identity on the host.
type HostId = (u64, u64);

/// The base directory of a tree of volumes.
#[derive(Debug)]
pub(crate) struct Base {
    root: OwnedFd,
    hidden: HashSet<HostId>,
    hasher: RandomState,
    next_ino: AtomicU64,
    table: Mutex<Table>,
    listings: Mutex<Kept<Listing>>,
    dirs: Mutex<Kept<OwnedFd>>,
    files: Mutex<Kept<File>>,
}

#[derive(Debug, Default)]
struct Table {
    by_host: HashMap<HostId, Ino>,
    inodes: HashMap<Ino, Arc<BaseInode>>,
}

/// An inode of the base that was looked up at least once. It stands for the same file in every view.
#[derive(Debug)]
pub(crate) struct BaseInode {
    base: Weak<Base>,
    ino: Ino,
    host: HostId,
    parent: Option<Arc<BaseInode>>,
    name: Name,
    /// Filled when first asked for; the base does not change.
    node: OnceLock<NodeRef>,
    xattrs: OnceLock<Option<Arc<XattrMap>>>,
}

/// The entries of a base directory, by cookie.
#[derive(Debug)]
pub(crate) struct Listing(Vec<ListEntry>);

/// An entry of a base directory.
#[derive(Debug)]
pub(crate) struct ListEntry {
    pub(crate) key: EntryKey,
    host_ino: u64,
    pub(crate) dirent_type: u8,
}

impl Base {
    /// Takes a directory as the base. What lies at `hidden` (absolute, seen from the base) does not show.
    pub(crate) fn new(root: OwnedFd, hidden: &[PathBuf]) -> Result<Arc<Self>, Errno> {
        let root = single_filesystem(root);
        let attributes = stat(&root, b"")?;
        if u32::from(attributes.stx_mode) & crate::node::TYPE_MASK != DIRECTORY {
            return Err(Errno::NOTDIR);
        }
        let hidden = hidden
            .iter()
            .filter_map(|path| find_hidden(&root, path))
            .collect();
        let base = Arc::new(Self {
            root,
            hidden,
            hasher: RandomState::new(),
            next_ino: AtomicU64::new(ROOT + 1),
            table: Mutex::default(),
            listings: Mutex::new(Kept::new(MAX_LISTED)),
            dirs: Mutex::new(Kept::new(MAX_OPEN)),
            files: Mutex::new(Kept::new(MAX_OPEN)),
        });
        let inode = base.new_inode(ROOT, host_id(&attributes), None, Arc::from(&b""[..]));
        let _ = inode.node.set(inode.make_node(&attributes)?);
        let mut table = base.table.lock();
        table.by_host.insert(inode.host, ROOT);
        table.inodes.insert(ROOT, inode);
        drop(table);
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
        let cookie = (self.hasher.hash_one(&name[..]) >> 2).max(FIRST_COOKIE);
        EntryKey {
            cookie,
            name: Arc::clone(name),
        }
    }

    /// A base inode that was looked up before.
    pub(crate) fn inode(&self, ino: Ino) -> Option<Arc<BaseInode>> {
        self.table.lock().inodes.get(&ino).cloned()
    }

    /// How many base inodes are known.
    pub(crate) fn known(&self) -> usize {
        self.table.lock().inodes.len()
    }

    fn new_inode(
        self: &Arc<Self>,
        ino: Ino,
        host: HostId,
        parent: Option<Arc<BaseInode>>,
        name: Name,
    ) -> Arc<BaseInode> {
        Arc::new(BaseInode {
            base: Arc::downgrade(self),
            ino,
            host,
            parent,
            name,
            node: OnceLock::new(),
            xattrs: OnceLock::new(),
        })
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
            && (linked
                || (known.name == *name
                    && known
                        .parent
                        .as_ref()
                        .is_some_and(|parent| parent.ino == dir.ino)))
        {
            return Arc::clone(known);
        }
        let ino = self.next_ino();
        let inode = self.new_inode(ino, host, Some(Arc::clone(dir)), Arc::clone(name));
        table.by_host.insert(host, ino);
        table.inodes.insert(ino, Arc::clone(&inode));
        inode
    }
}

impl BaseInode {
    /// Its number.
    pub(crate) fn ino(&self) -> Ino {
        self.ino
    }

    /// The inode as views show it until they change it.
    pub(crate) fn node(self: &Arc<Self>) -> Result<NodeRef, Errno> {
        if let Some(node) = self.node.get() {
            return Ok(node.clone());
        }
        let attributes = match &self.parent {
            Some(parent) => stat(&*parent.dir()?, &self.name)?,
            None => stat(&self.base()?.root, b"")?,
        };
        if host_id(&attributes) != self.host {
            return Err(Errno::STALE);
        }
        let node = self.make_node(&attributes)?;
        Ok(self.node.get_or_init(|| node).clone())
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
        let host = host_id(&attributes);
        if base.hidden.contains(&host) {
            return Ok(None);
        }
        let is_dir = u32::from(attributes.stx_mode) & crate::node::TYPE_MASK == DIRECTORY;
        let inode = base.intern(host, self, name, !is_dir && attributes.stx_nlink > 1);
        if inode.node.get().is_none() {
            let node = inode.make_node(&attributes)?;
            let _ = inode.node.set(node);
        }
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
            && known.name == entry.key.name
            && known
                .parent
                .as_ref()
                .is_some_and(|parent| parent.ino == self.ino)
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
        let listing = Arc::new(self.read_listing(&base)?);
        base.listings
            .lock()
            .put(self.ino, Arc::clone(&listing), listing.0.len() + 1);
        Ok(listing)
    }

    fn read_listing(&self, base: &Base) -> Result<Listing, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat2(&*self.dir()?, ".", flags, Mode::empty(), confined())?;
        let mut buf = [MaybeUninit::uninit(); 32 * 1024];
        let mut raw = RawDir::new(&fd, &mut buf);
        let mut entries = Vec::new();
        while let Some(entry) = raw.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." || base.hidden.contains(&(self.host.0, entry.ino())) {
                continue;
            }
            let mut mode = entry.file_type().as_raw_mode();
            if mode == 0 {
                mode = u32::from(stat(&*self.dir()?, name)?.stx_mode);
            }
            entries.push(ListEntry {
                key: base.key(&Arc::from(name)),
                host_ino: entry.ino(),
                dirent_type: crate::node::dirent_type(mode),
            });
        }
        entries.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(Listing(entries))
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
    fn dir(&self) -> Result<Arc<OwnedFd>, Errno> {
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
            None => Arc::new(base.root.try_clone().map_err(crate::file::errno)?),
        };
        for inode in missing.iter().rev().skip(1) {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let name = OsStr::from_bytes(&inode.name);
            fd = Arc::new(rustix::fs::openat2(
                &*fd,
                name,
                flags,
                Mode::empty(),
                confined(),
            )?);
            base.dirs.lock().put(inode.ino, Arc::clone(&fd), 1);
        }
        Ok(fd)
    }

    fn open(&self, base: &Base, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match &self.parent {
            Some(parent) => rustix::fs::openat2(
                &*parent.dir()?,
                OsStr::from_bytes(&self.name),
                flags,
                Mode::empty(),
                confined(),
            )?,
            None => rustix::fs::openat2(&base.root, ".", flags, Mode::empty(), confined())?,
        };
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
        let fd = self.open(&*self.base()?, OFlags::PATH)?;
        let xattrs = read_xattrs(&fd)?;
        Ok(self.xattrs.get_or_init(|| xattrs).clone())
    }

    fn base(&self) -> Result<Arc<Base>, Errno> {
        self.base.upgrade().ok_or(Errno::STALE)
    }

    fn make_node(self: &Arc<Self>, attributes: &Statx) -> Result<NodeRef, Errno> {
        let mode = u32::from(attributes.stx_mode);
        let body = match mode & crate::node::TYPE_MASK {
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

impl Listing {
    /// The entries from a cookie on.
    pub(crate) fn from(&self, cookie: u64) -> &[ListEntry] {
        let start = self.0.partition_point(|entry| entry.key.cookie < cookie);
        &self.0[start..]
    }

    /// The entry of a name.
    pub(crate) fn find(&self, key: &EntryKey) -> Option<&ListEntry> {
        let at = self.0.binary_search_by(|entry| entry.key.cmp(key)).ok()?;
        self.0.get(at)
    }
}

/// The kernel's 32-bit form of a device number.
fn encode_device(device: rustix::fs::Dev) -> u32 {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn time(stamp: rustix::fs::StatxTimestamp) -> Time {
    Time {
        sec: stamp.tv_sec,
        nsec: stamp.tv_nsec,
    }
}

fn host_id(attributes: &Statx) -> HostId {
    let device = rustix::fs::makedev(attributes.stx_dev_major, attributes.stx_dev_minor);
    (device, attributes.stx_ino)
}

fn confined() -> ResolveFlags {
    ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV
}

fn stat<Fd: std::os::fd::AsFd>(dir: Fd, name: &[u8]) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
    rustix::fs::statx(dir, OsStr::from_bytes(name), flags, StatxFlags::BASIC_STATS)
}

/// A copy of the directory's mount in which no other mount shows; the directory itself where the kernel refuses to
/// copy it (it is such a copy already).
fn single_filesystem(root: OwnedFd) -> OwnedFd {
    use rustix::mount::OpenTreeFlags;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    rustix::mount::open_tree(&root, "", flags).unwrap_or(root)
}

fn find_hidden(root: &OwnedFd, path: &Path) -> Option<HostId> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd =
        rustix::fs::openat2(root, relative, flags, Mode::empty(), ResolveFlags::IN_ROOT).ok()?;
    Some(host_id(&stat(&fd, b"").ok()?))
}

fn read_xattrs(fd: &OwnedFd) -> Result<Option<Arc<XattrMap>>, Errno> {
    // The calls that take a descriptor refuse O_PATH ones; the link in /proc leads to the very inode.
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let mut names = vec![0; 65_536];
    let len = match rustix::fs::listxattr(&path, &mut names[..]) {
        Ok(len) => len,
        Err(Errno::NOTSUP) => 0,
        Err(error) => return Err(error),
    };
    let mut map = XattrMap::new();
    let mut value = vec![0; if len == 0 { 0 } else { 65_536 }];
    for name in names[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        match rustix::fs::getxattr(&path, OsStr::from_bytes(name), &mut value[..]) {
            Ok(len) => {
                map.insert(name.to_vec(), value[..len].to_vec());
            }
            Err(Errno::NODATA | Errno::NOTSUP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(map).filter(|map| !map.is_empty()).map(Arc::new))
}

/// Things kept by inode, up to a total weight; what came first goes first.
#[derive(Debug)]
struct Kept<T> {
    items: HashMap<Ino, (Arc<T>, usize)>,
    order: VecDeque<Ino>,
    weight: usize,
    limit: usize,
}

impl<T> Kept<T> {
    fn new(limit: usize) -> Self {
        Self {
            items: HashMap::new(),
            order: VecDeque::new(),
            weight: 0,
            limit,
        }
    }

    fn get(&self, ino: Ino) -> Option<Arc<T>> {
        self.items.get(&ino).map(|(item, _)| Arc::clone(item))
    }

    fn put(&mut self, ino: Ino, item: Arc<T>, weight: usize) {
        if self.items.contains_key(&ino) {
            return;
        }
        self.items.insert(ino, (item, weight));
        self.order.push_back(ino);
        self.weight += weight;
        while self.weight > self.limit
            && self.order.len() > 1
            && let Some(first) = self.order.pop_front()
            && let Some((_, weight)) = self.items.remove(&first)
        {
            self.weight -= weight;
        }
    }
}
