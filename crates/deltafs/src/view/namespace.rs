//! Names: creating, linking, removing and renaming.

use std::sync::Arc;

use rustix::io::Errno;

use super::{Caller, MAX_NAME, View, as_dir};
use crate::acl;
use crate::node::{
    Body, CHARACTER, DIRECTORY, DirBody, Entry, Ino, Link, Meta, Name, Node, NodeRef, REGULAR,
    ROOT, SYMLINK, TYPE_MASK, Time,
};
use crate::xattr::Xattrs;

const SETGID: u32 = 0o2000;

/// How many names a file may have, as on ext4. Each is known to its inode, which is copied whole.
const MAX_LINKS: u32 = 65_000;

/// What to create.
#[derive(Debug)]
pub(crate) struct NewNode {
    /// With the type bits.
    pub(crate) mode: u32,
    pub(crate) umask: u32,
    pub(crate) rdev: u32,
    /// Where a symbolic link leads.
    pub(crate) target: Option<Arc<[u8]>>,
}

/// What a rename does with a file that has the new name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RenameMode {
    Replace,
    NoReplace,
    Exchange,
    /// Replaces, and leaves a whiteout (a character device 0/0) at the old name.
    Whiteout,
}

impl View {
    /// Creates an inode with a name.
    pub(crate) fn create(
        &mut self,
        parent: Ino,
        name: &Name,
        new: NewNode,
        who: Caller,
    ) -> Result<Ino, Errno> {
        check_name(name)?;
        let dir = self.live_dir(parent)?;
        if self.lookup(parent, name)?.is_some() {
            return Err(Errno::EXIST);
        }
        let mut node = self.make(&dir, new, who)?;
        self.admit_inode(&node)?;
        self.admit_entry(as_dir(&dir)?)?;
        let ino = self.tree.next_ino();
        node.names.push(Link {
            parent,
            name: Arc::clone(name),
        });
        let mode = node.meta.mode;
        self.usage.came(&node);
        self.nodes.insert(ino, NodeRef(Arc::new(node)));
        self.insert_entry(parent, name, ino, mode)?;
        if mode & TYPE_MASK == DIRECTORY {
            self.count_subdir(parent, 1)?;
        }
        Ok(ino)
    }

    /// Creates a file without a name (`O_TMPFILE`).
    pub(crate) fn create_unnamed(
        &mut self,
        parent: Ino,
        new: NewNode,
        who: Caller,
    ) -> Result<Ino, Errno> {
        let dir = self.live_dir(parent)?;
        let mut node = self.make(&dir, new, who)?;
        self.admit_inode(&node)?;
        let ino = self.tree.next_ino();
        node.meta.nlink = 0;
        self.usage.came(&node);
        self.nodes.insert(ino, NodeRef(Arc::new(node)));
        self.orphans.insert(ino);
        Ok(ino)
    }

    /// Gives an inode one more name.
    pub(crate) fn link(&mut self, ino: Ino, parent: Ino, name: &Name) -> Result<(), Errno> {
        check_name(name)?;
        let dir = self.live_dir(parent)?;
        if self.lookup(parent, name)?.is_some() {
            return Err(Errno::EXIST);
        }
        self.admit_entry(as_dir(&dir)?)?;
        let node = self.node_mut(ino)?;
        if node.is_dir() {
            return Err(Errno::PERM);
        }
        if node.meta.nlink >= MAX_LINKS {
            return Err(Errno::MLINK);
        }
        node.meta.nlink += 1;
        node.meta.ctime = Time::now();
        node.names.push(Link {
            parent,
            name: Arc::clone(name),
        });
        let mode = node.meta.mode;
        self.orphans.remove(&ino);
        self.insert_entry(parent, name, ino, mode)
    }

    /// Removes the name of anything but a directory. Gives the inode back.
    pub(crate) fn unlink(&mut self, parent: Ino, name: &Name) -> Result<Ino, Errno> {
        let ino = self.lookup(parent, name)?.ok_or(Errno::NOENT)?;
        if self.node(ino)?.is_dir() {
            return Err(Errno::ISDIR);
        }
        self.remove_entry(parent, name)?;
        self.drop_link(ino, parent, name)?;
        Ok(ino)
    }

    /// Removes an empty directory. Gives the inode back.
    pub(crate) fn rmdir(&mut self, parent: Ino, name: &Name) -> Result<Ino, Errno> {
        let ino = self.lookup(parent, name)?.ok_or(Errno::NOENT)?;
        let node = self.node(ino)?;
        as_dir(&node)?;
        if !self.is_empty(&node)? {
            return Err(Errno::NOTEMPTY);
        }
        self.remove_entry(parent, name)?;
        self.drop_link(ino, parent, name)?;
        self.count_subdir(parent, -1)?;
        Ok(ino)
    }

    /// Moves a name. Gives the inode back that lost its name to it.
    pub(crate) fn rename(
        &mut self,
        from: (Ino, &Name),
        to: (Ino, &Name),
        mode: RenameMode,
        who: Caller,
    ) -> Result<Option<Ino>, Errno> {
        check_name(to.1)?;
        let ino = self.lookup(from.0, from.1)?.ok_or(Errno::NOENT)?;
        let other = self.lookup(to.0, to.1)?;
        let dir = self.live_dir(to.0)?;
        let node = self.node(ino)?;
        if node.is_dir() && from.0 != to.0 && self.is_below(to.0, ino)? {
            return Err(Errno::INVAL);
        }
        if mode == RenameMode::Exchange {
            self.exchange(from, ino, to, other.ok_or(Errno::NOENT)?)?;
            return Ok(None);
        }
        if let Some(other) = other {
            if mode == RenameMode::NoReplace {
                return Err(Errno::EXIST);
            }
            if other == ino {
                return Ok(None);
            }
        }
        if from.0 != to.0 {
            self.admit_entry(as_dir(&dir)?)?;
        }
        if let Some(other) = other {
            self.displace(to, other, node.is_dir())?;
        }
        self.remove_entry(from.0, from.1)?;
        self.insert_entry(to.0, to.1, ino, node.meta.mode)?;
        self.move_name(ino, from, to)?;
        if mode == RenameMode::Whiteout {
            let whiteout = NewNode {
                mode: CHARACTER,
                umask: 0,
                rdev: 0,
                target: None,
            };
            self.create(from.0, from.1, whiteout, who)?;
        }
        Ok(other)
    }

    fn exchange(
        &mut self,
        from: (Ino, &Name),
        ino: Ino,
        to: (Ino, &Name),
        other: Ino,
    ) -> Result<(), Errno> {
        let (mode, other_node) = (self.node(ino)?.meta.mode, self.node(other)?);
        if other_node.is_dir() && from.0 != to.0 && self.is_below(from.0, other)? {
            return Err(Errno::INVAL);
        }
        self.insert_entry(from.0, from.1, other, other_node.meta.mode)?;
        self.insert_entry(to.0, to.1, ino, mode)?;
        self.move_name(ino, from, to)?;
        self.move_name(other, to, from)
    }

    /// Takes the name away from what a rename replaces.
    fn displace(&mut self, at: (Ino, &Name), ino: Ino, by_dir: bool) -> Result<(), Errno> {
        let node = self.node(ino)?;
        match (node.is_dir(), by_dir) {
            (true, false) => return Err(Errno::ISDIR),
            (false, true) => return Err(Errno::NOTDIR),
            (true, true) if !self.is_empty(&node)? => return Err(Errno::NOTEMPTY),
            _ => {}
        }
        self.drop_link(ino, at.0, at.1)?;
        if node.is_dir() {
            self.count_subdir(at.0, -1)?;
        }
        Ok(())
    }

    /// Records the new name in the inode itself, and in the link counts of the directories.
    fn move_name(&mut self, ino: Ino, from: (Ino, &Name), to: (Ino, &Name)) -> Result<(), Errno> {
        let node = self.node_mut(ino)?;
        node.meta.ctime = Time::now();
        node.names
            .retain(|link| link.parent != from.0 || link.name != *from.1);
        node.names.push(Link {
            parent: to.0,
            name: Arc::clone(to.1),
        });
        if node.is_dir() && from.0 != to.0 {
            self.count_subdir(from.0, -1)?;
            self.count_subdir(to.0, 1)?;
        }
        Ok(())
    }

    /// Whether `dir` is `ancestor` or lies below it.
    fn is_below(&self, dir: Ino, ancestor: Ino) -> Result<bool, Errno> {
        let mut at = dir;
        while at != ancestor {
            if at == ROOT {
                return Ok(false);
            }
            at = self.parent(at)?;
        }
        Ok(true)
    }

    fn make(&self, dir: &Node, new: NewNode, who: Caller) -> Result<Node, Errno> {
        let is_dir = new.mode & TYPE_MASK == DIRECTORY;
        let inherits_group = dir.meta.mode & SETGID != 0;
        let mut mode = new.mode;
        let mut xattrs = Xattrs::EMPTY;
        if new.mode & TYPE_MASK != SYMLINK {
            (mode, xattrs) = acl::inherit(&dir.xattrs, mode, new.umask)?;
        }
        if is_dir && inherits_group {
            mode |= SETGID;
        }
        let body = match mode & TYPE_MASK {
            REGULAR => Body::File(crate::file::FileBody::default()),
            DIRECTORY => Body::Dir(DirBody::default()),
            SYMLINK => Body::Symlink(new.target.ok_or(Errno::INVAL)?),
            _ => Body::Special,
        };
        let now = Time::now();
        Ok(Node {
            meta: Meta {
                mode,
                uid: who.uid,
                gid: if inherits_group {
                    dir.meta.gid
                } else {
                    who.gid
                },
                nlink: if is_dir { 2 } else { 1 },
                rdev: new.rdev,
                atime: now,
                mtime: now,
                ctime: now,
            },
            body,
            xattrs,
            names: Vec::new(),
        })
    }

    /// A directory that was not removed.
    fn live_dir(&self, ino: Ino) -> Result<NodeRef, Errno> {
        let node = self.node(ino)?;
        as_dir(&node)?;
        if node.meta.nlink == 0 {
            return Err(Errno::NOENT);
        }
        Ok(node)
    }

    fn insert_entry(&mut self, parent: Ino, name: &Name, ino: Ino, mode: u32) -> Result<(), Errno> {
        let key = self.tree.base.key(name);
        let dirent_type = crate::node::dirent_type(mode);
        self.change_entries(parent, |dir| {
            dir.entries.insert(key, Entry::Inode { ino, dirent_type });
            Ok(())
        })
    }

    fn remove_entry(&mut self, parent: Ino, name: &Name) -> Result<(), Errno> {
        let key = self.tree.base.key(name);
        self.change_entries(parent, |dir| {
            let in_base = match &dir.base {
                Some(base) => base.child(name)?.is_some(),
                None => false,
            };
            if in_base {
                dir.entries.insert(key, Entry::Whiteout);
            } else {
                dir.entries.remove(&key);
            }
            Ok(())
        })
    }

    fn drop_link(&mut self, ino: Ino, parent: Ino, name: &Name) -> Result<(), Errno> {
        let node = self.node_mut(ino)?;
        node.names
            .retain(|link| link.parent != parent || link.name != *name);
        node.meta.nlink = if node.is_dir() {
            0
        } else {
            node.meta.nlink.saturating_sub(1)
        };
        node.meta.ctime = Time::now();
        if node.meta.nlink == 0 {
            self.orphans.insert(ino);
        }
        Ok(())
    }

    /// Counts a subdirectory in or out. A link count of 1 says that the base does not count them.
    fn count_subdir(&mut self, parent: Ino, by: i32) -> Result<(), Errno> {
        let meta = &mut self.node_mut(parent)?.meta;
        if meta.nlink > 1 {
            meta.nlink = meta.nlink.saturating_add_signed(by).max(2);
        }
        Ok(())
    }
}

fn check_name(name: &Name) -> Result<(), Errno> {
    if name.len() > MAX_NAME {
        return Err(Errno::NAMETOOLONG);
    }
    if name.is_empty()
        || &name[..] == b"."
        || &name[..] == b".."
        || name.contains(&b'/')
        || name.contains(&0)
    {
        return Err(Errno::INVAL);
    }
    Ok(())
}
