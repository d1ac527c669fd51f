//! A tree of files in memory, as the answers that a FUSE server gives about it.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The root of a mount.
const OUTER: u64 = 1;
/// What the directory in it is called that is shown.
const INNER: &[u8] = b"root";

/// Seconds for which the kernel may keep what it was told.
const FOREVER: u64 = u32::MAX as u64;

/// `struct fuse_entry_out`.
pub(super) type Entry = [u8; 128];
/// Where in it `struct fuse_attr_out` begins,
pub(super) const ATTR_OUT: usize = 24;
/// the size is,
const SIZE: usize = 48;
/// and the mode.
const MODE: usize = 100;

/// What is shown.
pub(super) struct Image {
    nodes: HashMap<u64, Node>,
}

/// A file, directory or symbolic link.
pub(super) struct Node {
    pub(super) entry: Entry,
    pub(super) content: Content,
}

/// What is in it.
pub(super) enum Content {
    Dir(Dir),
    /// Of a file, or where a link leads.
    Bytes(Vec<u8>),
}

/// Its names, to be found and to be listed.
#[derive(Default)]
pub(super) struct Dir {
    names: HashMap<Vec<u8>, u64>,
    pub(super) plain: Listing,
    pub(super) plus: Listing,
}

/// What is answered to whoever lists a directory. The offset of an entry is its number.
#[derive(Default)]
pub(super) struct Listing {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Image {
    /// Reads the directory `shown` of `base`: its parent will seem to have nothing else.
    pub(super) fn read(base: &Path, shown: &str) -> io::Result<Self> {
        let mut image = Self {
            nodes: HashMap::new(),
        };
        let root = fs::metadata(base)?;
        let below = image.add(&base.join(shown))?;
        image.enter(&root, &[(shown.as_bytes().to_vec(), below)]);
        let inner = (INNER.to_vec(), root.ino());
        let mut outer = image.directory(OUTER, &[inner]);
        outer.entry = entry(OUTER, &root);
        image.nodes.insert(OUTER, outer);
        Ok(image)
    }

    pub(super) fn node(&self, ino: u64) -> Option<&Node> {
        self.nodes.get(&ino)
    }

    pub(super) fn look_up(&self, dir: u64, name: &[u8]) -> Option<&Node> {
        match &self.node(dir)?.content {
            Content::Dir(dir) => self.node(*dir.names.get(name)?),
            Content::Bytes(_) => None,
        }
    }

    fn add(&mut self, path: &Path) -> io::Result<u64> {
        let found = fs::symlink_metadata(path)?;
        if found.is_dir() {
            let mut names = Vec::new();
            for entry in fs::read_dir(path)? {
                let name = entry?.file_name();
                let ino = self.add(&path.join(&name))?;
                names.push((name.into_vec(), ino));
            }
            self.enter(&found, &names);
        } else {
            let bytes = match found.is_symlink() {
                true => fs::read_link(path)?.into_os_string().into_vec(),
                false => fs::read(path)?,
            };
            self.put(&found, Content::Bytes(bytes));
        }
        Ok(found.ino())
    }

    fn enter(&mut self, found: &Metadata, names: &[(Vec<u8>, u64)]) {
        let node = self.directory(found.ino(), names);
        self.put(found, node.content);
    }

    fn put(&mut self, found: &Metadata, content: Content) {
        let entry = entry(found.ino(), found);
        self.nodes.insert(found.ino(), Node { entry, content });
    }

    fn directory(&self, ino: u64, names: &[(Vec<u8>, u64)]) -> Node {
        let mut dir = Dir::default();
        for name in [b".", &b".."[..]] {
            dir.plain.add(&[], ino, name, 4);
            dir.plus.add(&[0; size_of::<Entry>()], ino, name, 4);
        }
        for (name, ino) in names {
            let entry = &self.nodes[ino].entry;
            // The type of a directory entry is the upper part of the mode.
            let kind = u32::from_ne_bytes(std::array::from_fn(|n| entry[MODE + n])) >> 12;
            dir.plain.add(&[], *ino, name, kind);
            dir.plus.add(entry, *ino, name, kind);
            dir.names.insert(name.clone(), *ino);
        }
        Node {
            entry: [0; size_of::<Entry>()],
            content: Content::Dir(dir),
        }
    }
}

impl Listing {
    /// Adds `struct fuse_dirent` or, with an entry at its head, `struct fuse_direntplus`.
    fn add(&mut self, head: &[u8], ino: u64, name: &[u8], kind: u32) {
        let next = self.ends.len() as u64 + 1;
        self.bytes.extend_from_slice(head);
        self.bytes.extend_from_slice(&ino.to_ne_bytes());
        self.bytes.extend_from_slice(&next.to_ne_bytes());
        let len = name.len() as u32;
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(name);
        let padded = self.bytes.len().next_multiple_of(8);
        self.bytes.resize(padded, 0);
        self.ends.push(padded);
    }

    /// What comes from an offset on, as much as there is room for.
    pub(super) fn part(&self, offset: usize, room: usize) -> &[u8] {
        let end = |count: usize| count.checked_sub(1).map_or(0, |last| self.ends[last]);
        let start = end(offset.min(self.ends.len()));
        let count = self.ends.partition_point(|end| *end <= start + room);
        &self.bytes[start..end(count).max(start)]
    }
}

/// `struct fuse_entry_out` of something that looks like `found`.
pub(super) fn entry(ino: u64, found: &Metadata) -> Entry {
    let mut bytes = Vec::with_capacity(size_of::<Entry>());
    let long = [
        ino,
        0,
        FOREVER,
        FOREVER,
        0,
        ino,
        found.len(),
        found.blocks(),
    ];
    let times = [found.atime(), found.mtime(), found.ctime()].map(i64::cast_unsigned);
    for value in long.into_iter().chain(times) {
        bytes.extend_from_slice(&value.to_ne_bytes());
    }
    let nanos = [found.atime_nsec(), found.mtime_nsec(), found.ctime_nsec()];
    let rest = [
        found.mode(),
        found.nlink() as u32,
        found.uid(),
        found.gid(),
        found.rdev() as u32,
        4096,
        0,
    ];
    for value in nanos.map(|n| n as u32).into_iter().chain(rest) {
        bytes.extend_from_slice(&value.to_ne_bytes());
    }
    let mut entry = [0; size_of::<Entry>()];
    entry.copy_from_slice(&bytes);
    entry
}

/// `struct fuse_entry_out` that says for good that there is no such name.
pub(super) fn no_entry() -> Entry {
    let mut entry = [0; size_of::<Entry>()];
    entry[16..24].copy_from_slice(&FOREVER.to_ne_bytes());
    entry
}

/// The size that an entry tells.
pub(super) fn size(entry: &Entry) -> u64 {
    u64::from_ne_bytes(std::array::from_fn(|n| entry[SIZE + n]))
}

/// Changes it.
pub(super) fn set_size(entry: &mut Entry, size: u64) {
    entry[SIZE..SIZE + 8].copy_from_slice(&size.to_ne_bytes());
}
