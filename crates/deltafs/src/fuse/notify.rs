//! Telling the kernel what to drop from its caches.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use crate::node::{Ino, Name};

const NOTIFY_INVAL_INODE: i32 = 2;
const NOTIFY_INVAL_ENTRY: i32 = 3;
/// Linux 6.18.
const NOTIFY_PRUNE: i32 = 9;

/// Has the kernel drop inodes that are not in use, with their names and pages. Of those in use, as by a socket that is
/// bound to one, the names are looked up again when they are used next.
///
/// # Errors
/// `EINVAL` if the kernel does not know this notice.
pub(crate) fn prune(device: BorrowedFd<'_>, inodes: &[Ino]) -> Result<(), Errno> {
    let mut message = super::wire::Reply::default();
    let count = u32::try_from(inodes.len()).map_err(|_| Errno::TOOBIG)?;
    message.u32(count).raw(&[0; 12]);
    for ino in inodes {
        message.u64(*ino);
    }
    rustix::io::write(device, message.finish(0, NOTIFY_PRUNE)).map(drop)
}

/// Something that the kernel is to drop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The attributes of an inode.
    Attributes(Ino),
    /// The attributes, and pages or listing, of an inode; `len` 0 is up to the end.
    Content { ino: Ino, start: u64, len: u64 },
    /// A name in a directory, or that there is none.
    Entry { parent: Ino, name: Name },
}

impl Notice {
    /// The inode that it is about.
    pub(crate) fn ino(&self) -> Ino {
        match self {
            Self::Attributes(ino) | Self::Content { ino, .. } => *ino,
            Self::Entry { parent, .. } => *parent,
        }
    }

    /// Sends it. Must not be called by a thread that serves requests, nor under a lock that a handler
    /// takes: the kernel waits for requests that are under way.
    pub(crate) fn send(&self, device: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut message = super::wire::Reply::default();
        let code = match self {
            Self::Attributes(ino) => {
                message.u64(*ino).u64(u64::MAX).u64(0);
                NOTIFY_INVAL_INODE
            }
            Self::Content { ino, start, len } => {
                message.u64(*ino).u64(*start).u64(*len);
                NOTIFY_INVAL_INODE
            }
            Self::Entry { parent, name } => {
                let len = u32::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)?;
                message.u64(*parent).u32(len).u32(0).raw(name).raw(&[0]);
                NOTIFY_INVAL_ENTRY
            }
        };
        match rustix::io::write(device, message.finish(0, code)) {
            // Not cached: nothing to drop.
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
