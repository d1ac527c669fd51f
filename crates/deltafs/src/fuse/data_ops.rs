//! Requests about one inode: attributes, content, extended attributes.

use rustix::io::Errno;

use super::init::MAX_WRITE;
use super::server::Server;
use super::wire::{Reply, Request};
use crate::acl;
use crate::node::{Body, Time};
use crate::view::{AttrChange, MAX_NAME, TimeChange, as_file};
use crate::xattr::SetMode;

/// Bits of `fuse_setattr_in.valid`.
mod valid {
    pub(super) const MODE: u32 = 1 << 0;
    pub(super) const UID: u32 = 1 << 1;
    pub(super) const GID: u32 = 1 << 2;
    pub(super) const SIZE: u32 = 1 << 3;
    pub(super) const ATIME: u32 = 1 << 4;
    pub(super) const MTIME: u32 = 1 << 5;
    pub(super) const ATIME_NOW: u32 = 1 << 7;
    pub(super) const MTIME_NOW: u32 = 1 << 8;
    pub(super) const KILL_SUIDGID: u32 = 1 << 11;
}

const WRITE_KILL_SUIDGID: u32 = 1 << 2;
const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
const XATTR_CREATE: u32 = 1;
const XATTR_REPLACE: u32 = 2;

/// The most that the answer to `COPY_FILE_RANGE` can tell, in whole blocks.
const MAX_NARROW_COPY: u64 = 0xffff_f000;

impl Server {
    pub(super) fn get_attr(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let node = self.view().read().node(request.node)?;
        self.attributes(request.node, &node, reply);
        Ok(())
    }

    pub(super) fn set_attr(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let change = self.attr_change(request)?;
        let who = self.caller(&request);
        let node = self.view().write().set_attr(request.node, &change, who)?;
        self.attributes(request.node, &node, reply);
        Ok(())
    }

    /// Reads `struct fuse_setattr_in`.
    fn attr_change(&self, request: Request<'_>) -> Result<AttrChange, Errno> {
        let mut args = request.args;
        let bits = args.u32()?;
        args.skip(12)?;
        let size = args.u64()?;
        args.skip(8)?;
        let seconds = [args.u64()?, args.u64()?, args.u64()?];
        let nanos = [args.u32()?, args.u32()?, args.u32()?];
        let mode = args.u32()?;
        args.skip(4)?;
        let (uid, gid) = (args.u32()?, args.u32()?);
        let has = |bit| bits & bit != 0;
        let time = |index: usize, set, now| {
            let to = Time {
                sec: seconds[index].cast_signed(),
                nsec: nanos[index].min(999_999_999),
            };
            has(set).then_some(if has(now) {
                TimeChange::Now
            } else {
                TimeChange::To(to)
            })
        };
        Ok(AttrChange {
            mode: has(valid::MODE).then_some(mode),
            uid: has(valid::UID).then(|| self.ids().inside(uid)),
            gid: has(valid::GID).then(|| self.ids().inside(gid)),
            size: has(valid::SIZE).then_some(size),
            atime: time(0, valid::ATIME, valid::ATIME_NOW),
            mtime: time(1, valid::MTIME, valid::MTIME_NOW),
            kill_privileges: has(valid::KILL_SUIDGID),
        })
    }

    pub(super) fn read_link(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let node = self.view().read().node(request.node)?;
        match &node.body {
            Body::Symlink(target) => {
                reply.raw(target);
                Ok(())
            }
            _ => Err(Errno::INVAL),
        }
    }

    pub(super) fn read(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let mut args = request.args;
        args.skip(8)?;
        let offset = args.u64()?;
        let size = (args.u32()? as usize).min(MAX_WRITE);
        let plan = self.view().read().plan_read(request.node, offset, size)?;
        let room = reply.room(plan.len());
        plan.fetch(&self.tree().data, room)
            .map_err(crate::file::errno)
    }

    pub(super) fn write(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let mut args = request.args;
        args.skip(8)?;
        let offset = args.u64()?;
        let (size, flags) = (args.u32()?, args.u32()?);
        args.skip(16)?;
        let data = args.take(size as usize)?;
        let unprivileged = (flags & WRITE_KILL_SUIDGID != 0).then(|| self.caller(&request));
        self.view()
            .write()
            .write(request.node, offset, data, unprivileged)?;
        reply.u32(size).u32(0);
        Ok(())
    }

    pub(super) fn fallocate(&self, request: Request<'_>) -> Result<(), Errno> {
        let mut args = request.args;
        args.skip(8)?;
        let (start, len, mode) = (args.u64()?, args.u64()?, args.u32()?);
        let end = start.checked_add(len).ok_or(Errno::FBIG)?;
        let mode = rustix::fs::FallocateFlags::from_bits_retain(mode);
        let keep_size = mode.contains(rustix::fs::FallocateFlags::KEEP_SIZE);
        let what = mode.difference(rustix::fs::FallocateFlags::KEEP_SIZE);
        let who = self.caller(&request);
        let mut view = self.view().write();
        if what.is_empty() {
            view.reserve(request.node, start..end, keep_size, who)
        } else if what == rustix::fs::FallocateFlags::PUNCH_HOLE
            || what == rustix::fs::FallocateFlags::ZERO_RANGE
        {
            view.punch(request.node, start..end, keep_size, who)
        } else {
            Err(Errno::NOTSUP)
        }
    }

    /// `COPY_FILE_RANGE`, and with `wide` the newer request whose answer has room for larger counts.
    pub(super) fn copy_file_range(
        &self,
        request: Request<'_>,
        reply: &mut Reply,
        wide: bool,
    ) -> Result<(), Errno> {
        let mut args = request.args;
        args.skip(8)?;
        let (offset, to) = (args.u64()?, args.u64()?);
        args.skip(8)?;
        let (at, len) = (args.u64()?, args.u64()?);
        let len = if wide { len } else { len.min(MAX_NARROW_COPY) };
        let who = self.caller(&request);
        let from = (request.node, offset);
        let copied = self.view().write().copy(from, (to, at), len, who)?;
        match u32::try_from(copied) {
            _ if wide => reply.u64(copied),
            Ok(copied) => reply.u32(copied).u32(0),
            Err(_) => return Err(Errno::OVERFLOW),
        };
        Ok(())
    }

    pub(super) fn lseek(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let mut args = request.args;
        args.skip(8)?;
        let (offset, whence) = (args.u64()?, args.u32()?);
        let node = self.view().read().node(request.node)?;
        let file = as_file(&node)?;
        let found = match whence.cast_signed() {
            libc::SEEK_DATA => file.next_data(offset)?,
            libc::SEEK_HOLE => file.next_hole(offset)?,
            _ => return Err(Errno::INVAL),
        };
        reply.u64(found);
        Ok(())
    }

    pub(super) fn statfs(&self, reply: &mut Reply) -> Result<(), Errno> {
        let disk = self.tree().data.statvfs()?;
        let space = self.view().read().statfs(&disk);
        for count in [
            space.blocks,
            space.free,
            space.available,
            space.inodes,
            space.free_inodes,
        ] {
            reply.u64(count);
        }
        let block = u32::try_from(space.unit).unwrap_or(4096);
        let longest = u32::try_from(MAX_NAME).unwrap_or(255);
        reply
            .u32(block)
            .u32(longest)
            .u32(block)
            .u32(0)
            .raw(&[0; 24]);
        Ok(())
    }

    pub(super) fn set_xattr(&self, request: Request<'_>) -> Result<(), Errno> {
        let mut args = request.args;
        let (size, flags, more) = (args.u32()?, args.u32()?, args.u32()?);
        args.skip(4)?;
        let name = args.text()?;
        let value = acl::from_kernel(name, args.take(size as usize)?, self.ids());
        let mode = match flags {
            XATTR_CREATE => SetMode::Create,
            XATTR_REPLACE => SetMode::Replace,
            _ => SetMode::Any,
        };
        let kill_setgid = more & SETXATTR_ACL_KILL_SGID != 0;
        self.view()
            .write()
            .set_xattr(request.node, name, &value, mode, kill_setgid)
    }

    pub(super) fn get_xattr(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let mut args = request.args;
        let size = args.u32()? as usize;
        args.skip(4)?;
        let name = args.text()?;
        let node = self.view().read().node(request.node)?;
        let value = node.xattrs.get(name)?.ok_or_else(|| no_xattr(name))?;
        answer_sized(&acl::to_kernel(name, value, self.ids()), size, reply)
    }

    pub(super) fn list_xattr(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let mut args = request.args;
        let size = args.u32()? as usize;
        let node = self.view().read().node(request.node)?;
        let mut list = Vec::new();
        for name in node.xattrs.map()?.iter().flat_map(|map| map.keys()) {
            list.extend_from_slice(name);
            list.push(0);
        }
        answer_sized(&list, size, reply)
    }

    pub(super) fn remove_xattr(&self, request: Request<'_>) -> Result<(), Errno> {
        let mut args = request.args;
        let name = args.text()?;
        self.view().write().remove_xattr(request.node, name)
    }
}

/// What to answer for an extended attribute that is not there. The kernel asks us for a label only where it has no SELinux, and
/// does not remember the answer. Programs do if there are no labels at all: `ls -l` asks once instead of for every file.
fn no_xattr(name: &[u8]) -> Errno {
    match name {
        b"security.selinux" => Errno::NOTSUP,
        _ => Errno::NODATA,
    }
}

/// Answers with a value, or with its length if the caller has no room at all for it.
fn answer_sized(value: &[u8], room: usize, reply: &mut Reply) -> Result<(), Errno> {
    if room == 0 {
        reply
            .u32(u32::try_from(value.len()).unwrap_or(u32::MAX))
            .u32(0);
        return Ok(());
    }
    if value.len() > room {
        return Err(Errno::RANGE);
    }
    reply.raw(value);
    Ok(())
}
