//! The directory around the root of a volume.
//!
//! The kernel makes the inode of a mount's root before it knows what the server can do, and never caches access lists of it: it
//! would ask for that of the root whenever anybody but its owner walks a path. So the root of a volume is a
//! directory within the root of its mount, and what is given out is a mount of that directory alone.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

use super::server::Server;
use super::wire::{Reply, Request, opcode};
use crate::ids::IdMap;
use crate::node::{Body, DIRECTORY, DirBody, Ino, NodeRef, ROOT};

/// The number of the root of a mount, as FUSE fixes it.
pub(super) const OUTER: Ino = 1;

/// What a volume's root is called in it.
const NAME: &str = "root";

impl Server {
    /// Answers what the kernel has to know on its way to the volume's root.
    pub(super) fn outer(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let mut args = request.args;
        match request.opcode {
            opcode::LOOKUP if args.text()? == NAME.as_bytes() => {
                let view = self.view().read();
                self.entry(ROOT, &view.node(ROOT)?, reply);
                Ok(())
            }
            opcode::GETATTR => {
                let mut outer = NodeRef::gone(DIRECTORY | 0o555, Body::Dir(DirBody::default()));
                // As long as the kernel knows an inode without links, it does not make the filesystem read-only.
                Arc::make_mut(&mut outer.0).meta.nlink = 2;
                // It is the host's own: only we ever walk through it.
                reply.attr_out(OUTER, true, &outer, IdMap::IDENTITY);
                Ok(())
            }
            opcode::GETXATTR => Err(Errno::NODATA),
            _ => Err(Errno::NOENT),
        }
    }
}

/// A detached mount of the volume's root, of a mount that is being served.
pub(super) fn inner(mount: impl AsFd) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(mount, NAME, flags)
}
