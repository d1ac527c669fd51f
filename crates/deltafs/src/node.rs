//! Inodes: one immutable version of each, shared by every view that shows it.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use imbl::OrdMap;
use rustix::time::{ClockId, clock_gettime};

use crate::base::BaseInode;
use crate::file::FileBody;
use crate::xattr::Xattrs;

/// The number of an inode, the same in every volume of a tree.
pub(crate) type Ino = u64;

/// The root directory.
pub(crate) const ROOT: Ino = 2;

/// The part of `st_mode` that tells the type.
pub(crate) const TYPE_MASK: u32 = 0o170_000;
/// The type of a directory in `st_mode`.
pub(crate) const DIRECTORY: u32 = 0o040_000;
/// The type of a regular file in `st_mode`.
pub(crate) const REGULAR: u32 = 0o100_000;
/// The type of a symbolic link in `st_mode`.
pub(crate) const SYMLINK: u32 = 0o120_000;
/// The type of a character device in `st_mode`.
pub(crate) const CHARACTER: u32 = 0o020_000;

/// A moment of the realtime clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Time {
    pub(crate) sec: i64,
    pub(crate) nsec: u32,
}

impl Time {
    /// The moment now.
    pub(crate) fn now() -> Self {
        let now = clock_gettime(ClockId::Realtime);
        Self {
            sec: now.tv_sec,
            nsec: u32::try_from(now.tv_nsec).unwrap_or(0),
        }
    }
}

/// What `stat(2)` tells of an inode, but for its size. Ids are those inside the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) nlink: u32,
    /// In the kernel's 32-bit encoding.
    pub(crate) rdev: u32,
    pub(crate) atime: Time,
    pub(crate) mtime: Time,
    pub(crate) ctime: Time,
}

impl Meta {
    /// The type bits of the mode.
    pub(crate) fn kind(&self) -> u32 {
        self.mode & TYPE_MASK
    }
}

/// The `DT_*` value of a mode.
pub(crate) fn dirent_type(mode: u32) -> u8 {
    u8::try_from((mode & TYPE_MASK) >> 12).unwrap_or(0)
}

/// One version of an inode.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) body: Body,
    pub(crate) xattrs: Xattrs,
    /// The names that are known of it. A base file with several links may have more.
    pub(crate) names: Vec<Link>,
}

/// A name of an inode: the directory and the name in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) parent: Ino,
    pub(crate) name: Name,
}

/// What an inode holds, by type.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    File(FileBody),
    Dir(DirBody),
    Symlink(Arc<[u8]>),
    /// Fifos, sockets and devices hold nothing.
    Special,
}

/// The entries of a directory that differ from those of its base directory.
#[derive(Clone, Debug, Default)]
pub(crate) struct DirBody {
    /// The base directory that shows through; none if the directory is opaque.
    pub(crate) base: Option<Arc<BaseInode>>,
    pub(crate) entries: OrdMap<EntryKey, Entry>,
}

/// Directory entries are ordered by a keyed hash of their name: the offsets that `readdir` hands
/// out then stay valid whatever comes and goes around them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EntryKey {
    pub(crate) cookie: u64,
    pub(crate) name: Name,
}

/// What a directory says of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// The name is that of an inode.
    Inode {
        ino: Ino,
        /// `DT_*`, so that listing needs no look at the inode.
        dirent_type: u8,
    },
    /// The base has the name, and it is gone.
    Whiteout,
}

/// A file name: any bytes but `/` and NUL, at most 255.
pub(crate) type Name = Arc<[u8]>;

impl Node {
    /// `st_size`.
    pub(crate) fn size(&self) -> u64 {
        match &self.body {
            Body::File(file) => file.size,
            Body::Dir(_) => 4096,
            Body::Symlink(target) => target.len() as u64,
            Body::Special => 0,
        }
    }

    /// `st_blocks`: units of 512 bytes.
    pub(crate) fn blocks(&self) -> u64 {
        match &self.body {
            Body::File(file) => file.blocks_512(),
            Body::Dir(_) => 8,
            Body::Symlink(_) | Body::Special => 0,
        }
    }

    /// Whether it is a directory.
    pub(crate) fn is_dir(&self) -> bool {
        matches!(self.body, Body::Dir(_))
    }
}

/// A shared version of an inode; equal if it is the same version.
#[derive(Clone)]
pub(crate) struct NodeRef(pub(crate) Arc<Node>);

impl NodeRef {
    /// An inode without a name, and without anything else.
    pub(crate) fn gone(mode: u32, body: Body) -> Self {
        let never = Time { sec: 0, nsec: 0 };
        Self(Arc::new(Node {
            meta: Meta {
                mode,
                uid: 0,
                gid: 0,
                nlink: 0,
                rdev: 0,
                atime: never,
                mtime: never,
                ctime: never,
            },
            body,
            xattrs: Xattrs::EMPTY,
            names: Vec::new(),
        }))
    }
}

impl PartialEq for NodeRef {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Deref for NodeRef {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.0
    }
}

impl fmt::Debug for NodeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
