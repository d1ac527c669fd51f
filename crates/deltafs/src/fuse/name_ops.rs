//! Requests about names.

use std::sync::Arc;

use rustix::io::Errno;

use super::server::Server;
use super::wire::{ENTRY_OUT, Reply, Request, dirent_len};
use crate::node::{DIRECTORY, Ino, Name, REGULAR, SYMLINK, TYPE_MASK};
use crate::view::{MAX_NAME, NewNode, RenameMode};

const RENAME_NOREPLACE: u32 = 1;
const RENAME_EXCHANGE: u32 = 2;
const RENAME_WHITEOUT: u32 = 4;

/// The answer to an open: keep what is cached, do not tell of closes.
const KEEP_CACHE: u32 = 1 << 1;
const NO_FLUSH: u32 = 1 << 5;

impl Server {
    pub(super) fn lookup(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let mut args = request.args;
        let name = args.name()?;
        if name.len() > MAX_NAME {
            return Err(Errno::NAMETOOLONG);
        }
        let view = self.view().read();
        let found = match &name[..] {
            b"." if view.is_gone(request.node) => return Err(Errno::STALE),
            b"." => Some(request.node),
            b".." => Some(view.parent(request.node)?),
            _ => view.lookup(request.node, &name)?,
        };
        match found {
            Some(ino) => self.entry(ino, &view.node(ino)?, reply),
            None => {
                // Before the answer: a switch must know of it as soon as the kernel does.
                self.absent().add(request.node, &name);
                reply.no_entry();
            }
        }
        Ok(())
    }

    pub(super) fn mknod(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let mut args = request.args;
        let (mode, rdev, umask) = (args.u32()?, args.u32()?, args.u32()?);
        args.skip(4)?;
        let mode = if mode & TYPE_MASK == 0 {
            mode | REGULAR
        } else {
            mode
        };
        let new = NewNode {
            mode,
            umask,
            rdev,
            target: None,
        };
        self.create(request, &args.name()?, new, reply)
    }

    pub(super) fn mkdir(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let mut args = request.args;
        let (mode, umask) = (args.u32()?, args.u32()?);
        let new = NewNode {
            mode: DIRECTORY | (mode & 0o7777),
            umask,
            rdev: 0,
            target: None,
        };
        self.create(request, &args.name()?, new, reply)
    }

    pub(super) fn symlink(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let mut args = request.args;
        let name = args.name()?;
        let new = NewNode {
            mode: SYMLINK | 0o777,
            umask: 0,
            rdev: 0,
            target: Some(Arc::from(args.text()?)),
        };
        self.create(request, &name, new, reply)
    }

    fn create(
        &self,
        request: Request<'_>,
        name: &Name,
        new: NewNode,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let who = self.caller(&request);
        let mut view = self.view().write();
        let ino = view.create(request.node, name, new, who)?;
        self.absent().remove(request.node, name);
        self.entry(ino, &view.node(ino)?, reply);
        Ok(())
    }

    pub(super) fn tmpfile(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let mut args = request.args;
        let (_flags, mode, umask) = (args.u32()?, args.u32()?, args.u32()?);
        let new = NewNode {
            mode: REGULAR | (mode & 0o7777),
            umask,
            rdev: 0,
            target: None,
        };
        let who = self.caller(&request);
        let mut view = self.view().write();
        let ino = view.create_unnamed(request.node, new, who)?;
        self.entry(ino, &view.node(ino)?, reply);
        reply.u64(0).u32(KEEP_CACHE | NO_FLUSH).u32(0);
        Ok(())
    }

    pub(super) fn link(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let mut args = request.args;
        let ino = args.u64()?;
        let name = args.name()?;
        let mut view = self.view().write();
        view.link(ino, request.node, &name)?;
        self.absent().remove(request.node, &name);
        self.entry(ino, &view.node(ino)?, reply);
        Ok(())
    }

    pub(super) fn unlink(&self, request: Request<'_>) -> Result<(), Errno> {
        let mut args = request.args;
        let name = args.name()?;
        let ino = self.view().write().unlink(request.node, &name)?;
        self.name_lost(ino);
        Ok(())
    }

    pub(super) fn rmdir(&self, request: Request<'_>) -> Result<(), Errno> {
        let mut args = request.args;
        let name = args.name()?;
        let ino = self.view().write().rmdir(request.node, &name)?;
        self.kernel().set_dead(ino);
        self.name_lost(ino);
        Ok(())
    }

    pub(super) fn rename(&self, request: Request<'_>, with_flags: bool) -> Result<(), Errno> {
        let mut args = request.args;
        let parent = args.u64()?;
        let mut flags = 0;
        if with_flags {
            flags = args.u32()?;
            args.skip(4)?;
        }
        let mode = match flags {
            0 => RenameMode::Replace,
            RENAME_NOREPLACE => RenameMode::NoReplace,
            RENAME_EXCHANGE => RenameMode::Exchange,
            RENAME_WHITEOUT => RenameMode::Whiteout,
            _ => return Err(Errno::INVAL),
        };
        let (from, to) = (args.name()?, args.name()?);
        let who = self.caller(&request);
        let mut view = self.view().write();
        let displaced = view.rename((request.node, &from), (parent, &to), mode, who)?;
        self.absent().remove(parent, &to);
        let is_dir = match displaced {
            Some(ino) => view.node(ino)?.is_dir(),
            None => false,
        };
        drop(view);
        if let Some(ino) = displaced {
            if is_dir {
                self.kernel().set_dead(ino);
            }
            self.name_lost(ino);
        }
        Ok(())
    }

    /// Lets go of an inode that has lost a name, if that was its last and nobody has it open.
    fn name_lost(&self, ino: Ino) {
        if !self.kernel().knows(ino) {
            self.release_if_unknown(ino);
        }
    }

    /// The offset of an entry is its cookie; what comes after it begins at the next number. 0 and 1 are `.` and `..`.
    pub(super) fn read_dir(
        &self,
        request: Request<'_>,
        reply: &mut Reply,
        plus: bool,
    ) -> Result<(), Errno> {
        let mut args = request.args;
        args.skip(8)?;
        let offset = args.u64()?;
        let size = args.u32()? as usize;
        let view = self.view().read();
        let dir = view.node(request.node)?;
        if dir.is_dir() && dir.meta.nlink == 0 {
            return Ok(());
        }
        let head = if plus { ENTRY_OUT } else { 0 };
        let dots = [
            (&b"."[..], request.node),
            (&b".."[..], view.parent(request.node)?),
        ];
        for (index, (name, ino)) in (0_u64..)
            .zip(dots)
            .skip(usize::try_from(offset).unwrap_or(usize::MAX))
        {
            if reply.len() + head + dirent_len(name) > size {
                return Ok(());
            }
            if plus {
                reply.unknown_entry();
            }
            reply.dirent(ino, index + 1, crate::node::dirent_type(DIRECTORY), name);
        }
        view.list(&dir, offset, |listed| {
            let name = &listed.key.name;
            if reply.len() + head + dirent_len(name) > size {
                return false;
            }
            if plus {
                match view.node(listed.ino) {
                    Ok(node) => self.entry(listed.ino, &node, reply),
                    Err(_) => {
                        reply.unknown_entry();
                    }
                }
            }
            reply.dirent(listed.ino, listed.key.cookie + 1, listed.dirent_type, name);
            true
        })
    }
}
