//! The records of `files.meta`.

use deltalog::Format;
use serde::{Deserialize, Serialize};

use crate::base::Free;
use crate::file::StoredBase;
use crate::node::{Ino, Meta, Time};

/// The log of a layer's inodes.
pub(super) const FORMAT: Format = Format {
    kind: *b"FMET",
    version: 2,
};

/// A [`Numbering`]; the first record.
pub(super) const NUMBERING: u32 = 1;
/// A `Vec<StoredInode>`.
pub(super) const BASE: u32 = 2;
/// An [`Inode`].
pub(super) const INODE: u32 = 3;
/// A `Vec<Run>` of the last inode.
pub(super) const BLOCKS: u32 = 4;
/// A `Vec<Named>` of the last inode.
pub(super) const ENTRIES: u32 = 5;
/// A `Vec<Ino>` of inodes that the state before has and this one has not.
pub(super) const GONE: u32 = 6;
/// A `Vec<Ino>` of all inodes without a name.
pub(super) const ORPHANS: u32 = 7;
/// Checksums of blocks, eight bytes each.
pub(super) const SUMS: u32 = 8;

/// How inodes are numbered in the tree of volumes that the layer is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Numbering {
    /// Of the hash that orders the entries of directories.
    pub(super) keys: (u64, u64),
    pub(super) free: Free,
    /// The number of the base's root on the host.
    pub(super) root: u64,
}

/// A version of an inode.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Inode {
    pub(super) ino: Ino,
    /// Blocks and entries are given as they differ from the state before; from nothing otherwise.
    pub(super) relative: bool,
    mode: u32,
    uid: u32,
    gid: u32,
    nlink: u32,
    rdev: u32,
    atime: (i64, u32),
    mtime: (i64, u32),
    ctime: (i64, u32),
    pub(super) names: Vec<(Ino, Vec<u8>)>,
    pub(super) xattrs: Attributes,
    pub(super) body: Content,
}

/// Extended attributes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Attributes {
    Base(Ino),
    Own(Vec<(Vec<u8>, Vec<u8>)>),
}

/// What an inode holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Content {
    File { size: u64, base: Option<StoredBase> },
    Dir { base: Option<Ino> },
    Symlink(Vec<u8>),
    Special,
}

/// Blocks of a file that follow each other.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Run {
    /// The first one's number in the file.
    pub(super) block: u64,
    pub(super) len: u64,
    pub(super) place: Place,
}

/// Where blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Place {
    /// In `files.data`, from this number on.
    Data(u64),
    Hole,
    Gone,
}

/// What a directory says of a name.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Named {
    pub(super) name: Vec<u8>,
    pub(super) entry: NamedEntry,
}

/// See [`Named`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum NamedEntry {
    Inode(Ino, u8),
    Whiteout,
    /// It says nothing any more.
    Gone,
}

impl Inode {
    pub(super) fn new(
        ino: Ino,
        relative: bool,
        meta: &Meta,
        names: Vec<(Ino, Vec<u8>)>,
        xattrs: Attributes,
        body: Content,
    ) -> Self {
        let pair = |time: Time| (time.sec, time.nsec);
        Self {
            ino,
            relative,
            mode: meta.mode,
            uid: meta.uid,
            gid: meta.gid,
            nlink: meta.nlink,
            rdev: meta.rdev,
            atime: pair(meta.atime),
            mtime: pair(meta.mtime),
            ctime: pair(meta.ctime),
            names,
            xattrs,
            body,
        }
    }

    pub(super) fn meta(&self) -> Meta {
        let time = |(sec, nsec): (i64, u32)| Time { sec, nsec };
        Meta {
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            nlink: self.nlink,
            rdev: self.rdev,
            atime: time(self.atime),
            mtime: time(self.mtime),
            ctime: time(self.ctime),
        }
    }
}
