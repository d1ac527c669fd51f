//! Attributes, content and extended attributes of one inode.

use std::ops::Range;

use rustix::io::Errno;

use super::{Caller, View, as_file, quota};
use crate::acl;
use crate::data::BLOCK;
use crate::node::{Ino, Meta, Node, NodeRef, REGULAR, Time};
use crate::xattr::SetMode;

const SETUID: u32 = 0o4000;
const SETGID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o010;
const PERMISSIONS: u32 = 0o7777;
const CAPABILITY: &[u8] = b"security.capability";

/// What `utimensat(2)` says of a time.
#[derive(Clone, Copy, Debug)]
pub(crate) enum TimeChange {
    Now,
    To(Time),
}

/// What is to change of an inode.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AttrChange {
    pub(crate) mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) size: Option<u64>,
    pub(crate) atime: Option<TimeChange>,
    pub(crate) mtime: Option<TimeChange>,
    /// The caller may not keep the set-id bits when it changes the size.
    pub(crate) kill_privileges: bool,
}

impl View {
    /// Changes attributes.
    pub(crate) fn set_attr(
        &mut self,
        ino: Ino,
        change: &AttrChange,
        who: Caller,
    ) -> Result<NodeRef, Errno> {
        if let Some(size) = change.size {
            self.change_file(ino, |file, to| file.truncate(to, size))?;
        }
        let now = Time::now();
        let at = |change| match change {
            TimeChange::Now => now,
            TimeChange::To(time) => time,
        };
        self.change(ino, |node| {
            if change.size.is_some() {
                node.meta.mtime = now;
                drop_privileges(node, change.kill_privileges.then_some(who))?;
            }
            if let Some(mode) = change.mode {
                node.meta.mode = node.meta.kind() | (mode & PERMISSIONS);
                acl::chmod(&mut node.xattrs, mode)?;
            }
            if change.uid.is_some() || change.gid.is_some() {
                if !node.is_dir() {
                    drop_privileges(node, Some(who))?;
                }
                node.meta.uid = change.uid.unwrap_or(node.meta.uid);
                node.meta.gid = change.gid.unwrap_or(node.meta.gid);
            }
            node.meta.atime = change.atime.map_or(node.meta.atime, at);
            node.meta.mtime = change.mtime.map_or(node.meta.mtime, at);
            node.meta.ctime = now;
            Ok(())
        })?;
        self.node(ino)
    }

    /// Writes into a file. `unprivileged` is who writes, if set-id bits are not to survive it.
    pub(crate) fn write(
        &mut self,
        ino: Ino,
        offset: u64,
        data: &[u8],
        unprivileged: Option<Caller>,
    ) -> Result<(), Errno> {
        self.change_file(ino, |file, to| file.write(to, offset, data))?;
        self.content_changed(ino, unprivileged)
    }

    /// Makes a range of a file that of another, or of itself; see [`FileBody::copy_from`]. Tells how many bytes were copied.
    pub(crate) fn copy(
        &mut self,
        (from, offset): (Ino, u64),
        (to, at): (Ino, u64),
        len: u64,
        who: Caller,
    ) -> Result<u64, Errno> {
        let source = self.node(from)?;
        let source = as_file(&source)?;
        // Blocks that two files share must not be overwritten in place.
        self.seal();
        let copied = self.change_file(to, |file, writer| {
            file.copy_from(writer, source, offset, at, len)
        })?;
        if copied > 0 {
            self.content_changed(to, who.unprivileged())?;
        }
        Ok(copied)
    }

    /// Reserves disk space for a range (`fallocate(2)`).
    pub(crate) fn reserve(
        &mut self,
        ino: Ino,
        range: Range<u64>,
        keep_size: bool,
        who: Caller,
    ) -> Result<(), Errno> {
        let room = self.room();
        self.change_file(ino, |file, to| {
            // What cannot be is not tried: reserving takes the disk space first.
            let wanted = (range.end - range.start) / BLOCK;
            let there = file.blocks_512() / (BLOCK / 512);
            if room.is_some_and(|room| wanted.saturating_sub(there) > room.saturating_add(1)) {
                return Err(Errno::NOSPC);
            }
            file.reserve(to, range.clone())?;
            if !keep_size && range.end > file.size {
                file.truncate(to, range.end)?;
            }
            Ok(())
        })?;
        self.content_changed(ino, who.unprivileged())
    }

    /// Makes a range a hole (`FALLOC_FL_PUNCH_HOLE`), or zeros that may lengthen the file (`FALLOC_FL_ZERO_RANGE`).
    pub(crate) fn punch(
        &mut self,
        ino: Ino,
        range: Range<u64>,
        keep_size: bool,
        who: Caller,
    ) -> Result<(), Errno> {
        self.change_file(ino, |file, to| {
            file.punch(to, range.clone())?;
            if !keep_size && range.end > file.size {
                file.truncate(to, range.end)?;
            }
            Ok(())
        })?;
        self.content_changed(ino, who.unprivileged())
    }

    /// Sets an extended attribute. Setting the access list sets the mode too; `kill_setgid` says that the caller may
    /// not keep the set-group-id bit then.
    pub(crate) fn set_xattr(
        &mut self,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        mode: SetMode,
        kill_setgid: bool,
    ) -> Result<(), Errno> {
        let room = self.room();
        self.change(ino, |node| {
            let blocks = quota::blocks(node);
            let before = (node.meta.mode, node.xattrs.clone());
            let set = set_xattr(node, name, value, mode, kill_setgid).and_then(|()| {
                let more = quota::blocks(node).saturating_sub(blocks);
                match room.is_some_and(|room| more > room) {
                    true => Err(Errno::NOSPC),
                    false => Ok(()),
                }
            });
            match set {
                Ok(()) => node.meta.ctime = Time::now(),
                // The mode changes with the access list or not at all.
                Err(_) => (node.meta.mode, node.xattrs) = before,
            }
            set
        })
    }

    /// Removes an extended attribute.
    pub(crate) fn remove_xattr(&mut self, ino: Ino, name: &[u8]) -> Result<(), Errno> {
        self.change(ino, |node| {
            if !node.xattrs.remove(name)? {
                return Err(Errno::NODATA);
            }
            node.meta.ctime = Time::now();
            Ok(())
        })
    }

    fn content_changed(&mut self, ino: Ino, unprivileged: Option<Caller>) -> Result<(), Errno> {
        self.change(ino, |node| {
            node.meta.mtime = Time::now();
            node.meta.ctime = node.meta.mtime;
            drop_privileges(node, unprivileged)
        })
    }
}

fn set_xattr(
    node: &mut Node,
    name: &[u8],
    value: &[u8],
    mode: SetMode,
    kill_setgid: bool,
) -> Result<(), Errno> {
    if name == acl::ACCESS {
        let permissions = acl::permissions(value)?;
        node.meta.mode = (node.meta.mode & !0o777) | permissions.unwrap_or(node.meta.mode & 0o777);
        if kill_setgid {
            node.meta.mode &= !SETGID;
        }
        if acl::is_minimal(value)? {
            node.xattrs.remove(name)?;
            return Ok(());
        }
    }
    node.xattrs.set(name, value, mode)
}

/// A changed file loses its capabilities, and its set-id bits by whoever may not keep them.
fn drop_privileges(node: &mut Node, by: Option<Caller>) -> Result<(), Errno> {
    if let Some(who) = by {
        node.meta.mode = without_set_id(&node.meta, who);
    }
    node.xattrs.remove(CAPABILITY)?;
    Ok(())
}

/// Whether somebody who writes into it may take set-id bits away.
pub(crate) fn may_lose_set_id(meta: &Meta) -> bool {
    meta.kind() == REGULAR && meta.mode & (SETUID | SETGID) != 0
}

/// A set-group-id bit without group execution once meant mandatory locking: members of the group leave it. Of the groups that somebody
/// is in the protocol tells one.
fn without_set_id(meta: &Meta, who: Caller) -> u32 {
    let member = who.is_root() || who.gid == meta.gid;
    let stays = member && meta.mode & GROUP_EXECUTE == 0;
    meta.mode & !(SETUID | if stays { 0 } else { SETGID })
}
