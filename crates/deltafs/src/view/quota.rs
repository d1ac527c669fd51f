//! What a view may take, and what it takes.

use rustix::fs::StatVfs;
use rustix::io::Errno;

use super::View;
use crate::data::BLOCK;
use crate::file::FileBody;
use crate::node::{Body, DirBody, Ino, Node};

/// Bytes that an entry of a directory counts.
const ENTRY: u64 = 128;

/// The longest symbolic link, and the most bytes of extended attributes, that count nothing: about what ext4 keeps in the inode.
const SHORT_LINK: usize = 60;
const FEW_ATTRIBUTES: usize = 256;

/// How much a volume may take besides its base. Whoever wants more gets `ENOSPC`.
///
/// What counts is what the volume shows now (and files without a name that are open), not what only snapshots hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Bytes, in blocks of 4 KiB: file data (blocks that two files share count twice), 128 for each entry of a directory that
    /// its base does not have, extended attributes of more than 256 bytes, symbolic links of more than 60.
    pub bytes: Option<u64>,
    /// Files and directories that the base does not have.
    pub inodes: Option<u64>,
}

/// What a view takes besides the base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    blocks: u64,
    inodes: u64,
}

impl Usage {
    /// An inode of `before` blocks has `after` blocks now.
    pub(super) fn resize(&mut self, before: u64, after: u64) {
        self.blocks = (self.blocks + after).saturating_sub(before);
    }

    /// An inode came that the base does not have.
    pub(super) fn came(&mut self, node: &Node) {
        self.resize(0, blocks(node));
        self.inodes += 1;
    }

    /// An inode went, with its blocks.
    pub(super) fn went(&mut self, node: &Node, of_base: bool) {
        self.resize(blocks(node), 0);
        if !of_base {
            self.inodes = self.inodes.saturating_sub(1);
        }
    }
}

/// How many blocks an inode counts. What it holds beside the data is kept in memory, so that a bound on blocks is one on that, too.
pub(super) fn blocks(node: &Node) -> u64 {
    let body = match &node.body {
        Body::File(file) => file.data_blocks(),
        Body::Dir(dir) => entry_blocks(dir.entries.len()),
        Body::Symlink(target) => u64::from(target.len() > SHORT_LINK),
        Body::Special => 0,
    };
    body + match node.xattrs.own_bytes() {
        0..=FEW_ATTRIBUTES => 0,
        bytes => (bytes as u64).div_ceil(BLOCK),
    }
}

fn entry_blocks(entries: usize) -> u64 {
    entries as u64 * ENTRY / BLOCK
}

impl Quota {
    fn blocks(&self) -> Option<u64> {
        self.bytes.map(|bytes| bytes / BLOCK)
    }
}

impl View {
    /// What the volume may take.
    pub(crate) fn quota(&self) -> Quota {
        self.quota
    }

    pub(crate) fn set_quota(&mut self, quota: Quota) {
        self.quota = quota;
    }

    /// What these inodes take.
    pub(super) fn count_usage(&mut self) {
        let mut usage = Usage::default();
        for (ino, node) in &self.nodes {
            match self.is_of_base(*ino) {
                true => usage.resize(0, blocks(node)),
                false => usage.came(node),
            }
        }
        self.usage = usage;
    }

    pub(super) fn is_of_base(&self, ino: Ino) -> bool {
        self.tree.base.inode(ino).is_some()
    }

    /// Whether this may be one more inode.
    pub(super) fn admit_inode(&self, new: &Node) -> Result<(), Errno> {
        match self.quota.inodes {
            Some(most) if self.usage.inodes >= most => Err(Errno::NOSPC),
            _ => self.admit(0, blocks(new)),
        }
    }

    /// Whether a directory may have one more entry.
    pub(super) fn admit_entry(&self, dir: &DirBody) -> Result<(), Errno> {
        let entries = dir.entries.len();
        self.admit(entry_blocks(entries), entry_blocks(entries + 1))
    }

    /// Whether what has `before` blocks may have `after`.
    pub(super) fn admit(&self, before: u64, after: u64) -> Result<(), Errno> {
        let more = after.saturating_sub(before);
        match self.room() {
            // What is over already may still shrink, or stay.
            Some(room) if more > 0 && more > room => Err(Errno::NOSPC),
            _ => Ok(()),
        }
    }

    /// How many more blocks may be taken; `None` without a bound.
    pub(super) fn room(&self) -> Option<u64> {
        let most = self.quota.blocks()?;
        Some(most.saturating_sub(self.usage.blocks))
    }

    /// Whether files without a name that nothing may have open any more take of the quota.
    pub(crate) fn may_gain_room(&self) -> bool {
        self.quota != Quota::default() && self.orphans.iter().any(|ino| !self.pinned.contains(ino))
    }

    /// What `statfs(2)` tells, given what it tells of the disk.
    pub(crate) fn statfs(&self, disk: &StatVfs) -> Space {
        let unit = disk.f_frsize.max(1);
        let mut space = Space {
            unit,
            blocks: disk.f_blocks,
            free: disk.f_bfree,
            available: disk.f_bavail,
            inodes: disk.f_files,
            free_inodes: disk.f_ffree,
        };
        if let (Some(most), Some(room)) = (self.quota.blocks(), self.room()) {
            let units = |blocks: u64| blocks.saturating_mul(BLOCK) / unit;
            space.blocks = units(most);
            space.free = space.free.min(units(room));
            space.available = space.available.min(units(room));
        }
        if let Some(most) = self.quota.inodes {
            space.inodes = most;
            let room = most.saturating_sub(self.usage.inodes);
            // A disk that makes inodes as they are needed tells of none.
            space.free_inodes = match disk.f_files {
                0 => room,
                _ => room.min(disk.f_ffree),
            };
        }
        space
    }
}

/// Sizes as `statfs(2)` tells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Space {
    /// Bytes of what `blocks`, `free` and `available` count.
    pub(crate) unit: u64,
    pub(crate) blocks: u64,
    pub(crate) free: u64,
    pub(crate) available: u64,
    pub(crate) inodes: u64,
    pub(crate) free_inodes: u64,
}

/// Runs `change` on the content of a file so that it does not come to hold more than `room` blocks more. If it would, the file
/// is as before, but for bytes that were overwritten.
pub(super) fn within<T>(
    file: &mut FileBody,
    room: Option<u64>,
    change: impl FnOnce(&mut FileBody) -> Result<T, Errno>,
) -> Result<T, Errno> {
    let Some(room) = room else {
        return change(file);
    };
    let most = file.data_blocks().saturating_add(room);
    let mut changed = file.clone();
    let done = change(&mut changed)?;
    // What is over already may still shrink.
    if changed.data_blocks() > most.max(file.data_blocks()) {
        return Err(Errno::NOSPC);
    }
    *file = changed;
    Ok(done)
}
