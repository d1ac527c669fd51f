//! The wire format of the FUSE protocol, `linux/fuse.h`.

use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;

use crate::ids::IdMap;
use crate::node::{Ino, Name, Node};

/// Seconds for which the kernel may keep what it was told: for good. It is told when something changes.
const FOREVER: u64 = u32::MAX as u64;

/// Bytes of the header before every request.
pub(crate) const IN_HEADER: usize = 40;
/// Bytes of the header before every reply.
pub(crate) const OUT_HEADER: usize = 16;

/// The number of a request's kind.
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;
    pub(crate) const TMPFILE: u32 = 51;
    pub(crate) const COPY_FILE_RANGE_64: u32 = 53;
}

/// One request of the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) opcode: u32,
    pub(crate) unique: u64,
    pub(crate) node: Ino,
    /// Ids of the host.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) args: Args<'a>,
}

impl<'a> Request<'a> {
    /// Reads a request from what `/dev/fuse` gave.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, Errno> {
        let mut args = Args { bytes };
        let len = args.u32()? as usize;
        let opcode = args.u32()?;
        let unique = args.u64()?;
        let node = args.u64()?;
        let (uid, gid) = (args.u32()?, args.u32()?);
        args.skip(8)?;
        if len != bytes.len() {
            return Err(Errno::INVAL);
        }
        Ok(Self {
            opcode,
            unique,
            node,
            uid,
            gid,
            args,
        })
    }
}

/// The thread that makes a request, as this process numbers it; none where nobody waits for the answer.
pub(crate) fn caller(request: &[u8]) -> Option<u32> {
    const PLACE: usize = 32;
    let (number, _) = request.get(PLACE..)?.split_first_chunk()?;
    Some(u32::from_ne_bytes(*number)).filter(|number| *number != 0)
}

/// The arguments of a request, taken from front to back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Args<'a> {
    bytes: &'a [u8],
}

impl<'a> Args<'a> {
    pub(crate) fn u32(&mut self) -> Result<u32, Errno> {
        let (head, rest) = self.bytes.split_first_chunk().ok_or(Errno::INVAL)?;
        self.bytes = rest;
        Ok(u32::from_ne_bytes(*head))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Errno> {
        let (head, rest) = self.bytes.split_first_chunk().ok_or(Errno::INVAL)?;
        self.bytes = rest;
        Ok(u64::from_ne_bytes(*head))
    }

    pub(crate) fn skip(&mut self, len: usize) -> Result<(), Errno> {
        self.take(len).map(|_| ())
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (head, rest) = self.bytes.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.bytes = rest;
        Ok(head)
    }

    /// Bytes up to a NUL.
    pub(crate) fn text(&mut self) -> Result<&'a [u8], Errno> {
        let len = self
            .bytes
            .iter()
            .position(|byte| *byte == 0)
            .ok_or(Errno::INVAL)?;
        let text = self.take(len)?;
        self.skip(1)?;
        Ok(text)
    }

    pub(crate) fn name(&mut self) -> Result<Name, Errno> {
        self.text().map(Arc::from)
    }
}

/// A reply of more bytes uses room that the threads of all mounts share, which are more than ever reply at once: fresh memory of that size
/// is slow to touch for the first time, and each would keep its own.
const LARGE: usize = 64 << 10;
/// The most pieces of room that are kept.
const SPARES: usize = 16;

static SPARE: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// A reply under construction, with room for its header.
#[derive(Debug)]
pub(crate) struct Reply {
    bytes: Vec<u8>,
    /// The inodes for each of which the kernel counts a look-up when it takes the reply.
    counted: Vec<Ino>,
}

impl Default for Reply {
    fn default() -> Self {
        Self {
            bytes: vec![0; OUT_HEADER],
            counted: Vec::new(),
        }
    }
}

impl Reply {
    /// Forgets everything but the room for the header.
    pub(crate) fn clear(&mut self) {
        self.bytes.truncate(OUT_HEADER);
        self.counted.clear();
        if self.bytes.capacity() > LARGE {
            let large = std::mem::replace(&mut self.bytes, vec![0; OUT_HEADER]);
            let mut spare = SPARE.lock();
            if spare.len() < SPARES {
                spare.push(large);
            }
        }
    }

    /// The inodes whose look-ups were counted for this reply.
    pub(crate) fn counted(&self) -> &[Ino] {
        &self.counted
    }

    /// The whole message, its header filled in.
    pub(crate) fn finish(&mut self, unique: u64, error: i32) -> &[u8] {
        let len = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes[4..8].copy_from_slice(&error.to_ne_bytes());
        self.bytes[8..OUT_HEADER].copy_from_slice(&unique.to_ne_bytes());
        &self.bytes
    }

    /// Bytes after the header.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - OUT_HEADER
    }

    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_ne_bytes())
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_ne_bytes())
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_ne_bytes())
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Makes room for `len` bytes more and gives it to fill.
    pub(crate) fn room(&mut self, len: usize) -> &mut [u8] {
        let start = self.bytes.len();
        if start + len > LARGE.max(self.bytes.capacity())
            && let Some(mut large) = SPARE.lock().pop()
        {
            large.clear();
            large.extend_from_slice(&self.bytes);
            self.bytes = large;
        }
        self.bytes.resize(start + len, 0);
        &mut self.bytes[start..]
    }

    /// `struct fuse_attr`.
    fn attr(&mut self, ino: Ino, node: &Node, ids: IdMap) -> &mut Self {
        let meta = &node.meta;
        self.u64(ino).u64(node.size()).u64(node.blocks());
        for time in [meta.atime, meta.mtime, meta.ctime] {
            self.u64(time.sec.cast_unsigned());
        }
        self.u32(meta.atime.nsec)
            .u32(meta.mtime.nsec)
            .u32(meta.ctime.nsec);
        self.u32(meta.mode).u32(meta.nlink);
        self.u32(ids.outside(meta.uid)).u32(ids.outside(meta.gid));
        self.u32(meta.rdev).u32(4096).u32(0)
    }

    /// `struct fuse_attr_out`.
    pub(crate) fn attr_out(&mut self, ino: Ino, keep: bool, node: &Node, ids: IdMap) -> &mut Self {
        self.u64(if keep { FOREVER } else { 0 })
            .u64(0)
            .attr(ino, node, ids)
    }

    /// `struct fuse_entry_out`.
    pub(crate) fn entry_out(
        &mut self,
        ino: Ino,
        generation: u32,
        keep_attributes: bool,
        node: &Node,
        ids: IdMap,
    ) -> &mut Self {
        self.counted.push(ino);
        self.u64(ino)
            .u64(generation.into())
            .u64(FOREVER)
            .u64(if keep_attributes { FOREVER } else { 0 })
            .u64(0);
        self.attr(ino, node, ids)
    }

    /// `struct fuse_entry_out` that says for good that there is no such name.
    pub(crate) fn no_entry(&mut self) -> &mut Self {
        self.u64(0).u64(0).u64(FOREVER).raw(&[0; 128 - 24])
    }

    /// An entry that tells nothing of its inode, before a directory entry.
    pub(crate) fn unknown_entry(&mut self) -> &mut Self {
        self.raw(&[0; 128])
    }

    /// `struct fuse_dirent`, padded.
    pub(crate) fn dirent(
        &mut self,
        ino: Ino,
        next: u64,
        dirent_type: u8,
        name: &[u8],
    ) -> &mut Self {
        let len = u32::try_from(name.len()).unwrap_or(0);
        self.u64(ino)
            .u64(next)
            .u32(len)
            .u32(dirent_type.into())
            .raw(name);
        let pad = name.len().next_multiple_of(8) - name.len();
        self.raw(&[0; 8][..pad])
    }
}

/// Bytes that a directory entry with this name takes.
pub(crate) fn dirent_len(name: &[u8]) -> usize {
    24 + name.len().next_multiple_of(8)
}

/// Bytes of `struct fuse_entry_out`.
pub(crate) const ENTRY_OUT: usize = 128;
