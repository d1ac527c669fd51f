//! What answers the kernel's requests: the current view behind one lock.

use std::collections::HashSet;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use rustix::io::Errno;

use super::absent::Absent;
use super::barrier::Barrier;
use super::desk::{Channel, Service};
use super::kernel::Kernel;
use super::notify::Notice;
use super::outer::OUTER;
use super::wire::{IN_HEADER, Reply, Request, opcode};
use crate::ids::IdMap;
use crate::node::{Ino, Node, NodeRef};
use crate::tree::Tree;
use crate::view::{Caller, View, may_lose_set_id};

/// How often to try again what a quota refuses as long as removed files take of it,
const ROOM_TRIES: u32 = 5;
/// and how long to wait in between.
const ROOM_PAUSE: Duration = Duration::from_millis(4);

/// How a handler answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Reply,
    /// The kernel does not wait for an answer.
    Silence,
}

/// One volume's side of its FUSE connection.
#[derive(Debug)]
pub(crate) struct Server {
    tree: Arc<Tree>,
    view: RwLock<View>,
    kernel: Kernel,
    absent: Absent,
    barrier: Arc<Barrier>,
    ids: IdMap,
}

impl Service for Server {
    type Room = Reply;

    /// Answers a request, or has it wait behind the barrier.
    fn answer<'a>(
        &self,
        request: &[u8],
        channel: &Channel,
        reply: &'a mut Reply,
    ) -> Option<[&'a [u8]; 2]> {
        self.answer_unless(request, reply, |asked| {
            asked.opcode == opcode::GETATTR && self.barrier.take(asked.node, request, channel)
        })
    }

    fn answered(&self, taken: bool, reply: &mut Reply) {
        if !taken {
            tracing::debug!("a reply was not taken");
            for ino in reply.counted() {
                self.forget(*ino, 1);
            }
        }
        reply.clear();
    }
}

impl Server {
    /// A server that shows `view`.
    pub(crate) fn new(view: View, ids: IdMap) -> Self {
        Self {
            tree: Arc::clone(view.tree()),
            view: RwLock::new(view),
            kernel: Kernel::default(),
            absent: Absent::default(),
            barrier: Arc::default(),
            ids,
        }
    }

    pub(crate) fn tree(&self) -> &Arc<Tree> {
        &self.tree
    }

    /// The view that is shown now.
    pub(crate) fn view(&self) -> &RwLock<View> {
        &self.view
    }

    /// What the kernel holds of the mount.
    pub(crate) fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The names that the kernel may take for absent.
    pub(crate) fn absent(&self) -> &Absent {
        &self.absent
    }

    /// What is held back after a switch.
    pub(crate) fn barrier(&self) -> &Arc<Barrier> {
        &self.barrier
    }

    pub(crate) fn ids(&self) -> IdMap {
        self.ids
    }

    pub(super) fn caller(&self, request: &Request<'_>) -> Caller {
        Caller {
            uid: self.ids.inside(request.uid),
            gid: self.ids.inside(request.gid),
        }
    }

    /// Answers a request that has waited.
    pub(super) fn answer_now(&self, request: &[u8], channel: &Channel, reply: &mut Reply) {
        let message = self.answer_unless(request, reply, |_| false);
        let taken = message.is_none_or(|message| channel.send(message).is_ok());
        self.answered(taken, reply);
    }

    fn answer_unless<'a>(
        &self,
        bytes: &[u8],
        reply: &'a mut Reply,
        waits: impl FnOnce(&Request<'_>) -> bool,
    ) -> Option<[&'a [u8]; 2]> {
        if bytes.len() < IN_HEADER {
            return None;
        }
        let Ok(request) = Request::parse(bytes) else {
            tracing::error!(len = bytes.len(), "a FUSE request is malformed");
            return None;
        };
        if waits(&request) {
            return None;
        }
        reply.clear();
        let error = match self.handle(request, reply) {
            Ok(Answer::Reply) => 0,
            Ok(Answer::Silence) => return None,
            Err(errno) => {
                reply.clear();
                -errno.raw_os_error()
            }
        };
        Some([reply.finish(request.unique, error), &[]])
    }

    /// Gives the answer to a request. The kernel lets go of a removed file before the caller of `unlink(2)` goes on, but says so
    /// by a request that may be read behind the caller's next one: what finds the quota used up by such files waits a little.
    fn handle(&self, request: Request<'_>, reply: &mut Reply) -> Result<Answer, Errno> {
        for _ in 0..ROOM_TRIES {
            match self.try_to_handle(request, reply) {
                Err(Errno::NOSPC) if self.view.read().may_gain_room() => {
                    std::thread::sleep(ROOM_PAUSE);
                }
                done => return done,
            }
        }
        self.try_to_handle(request, reply)
    }

    fn try_to_handle(&self, request: Request<'_>, reply: &mut Reply) -> Result<Answer, Errno> {
        match request.opcode {
            opcode::FORGET | opcode::BATCH_FORGET => {
                // A malformed one would be the kernel's bug; there is nobody to tell.
                let _ = self.forget_request(request);
                return Ok(Answer::Silence);
            }
            opcode::LOOKUP | opcode::GETATTR | opcode::GETXATTR if request.node == OUTER => {
                self.outer(request, reply)
            }
            opcode::LOOKUP => self.lookup(request, reply),
            opcode::GETATTR => self.get_attr(request, reply),
            opcode::SETATTR => self.set_attr(request, reply),
            opcode::READLINK => self.read_link(request, reply),
            opcode::SYMLINK => self.symlink(request, reply),
            opcode::MKNOD => self.mknod(request, reply),
            opcode::MKDIR => self.mkdir(request, reply),
            opcode::UNLINK => self.unlink(request),
            opcode::RMDIR => self.rmdir(request),
            opcode::RENAME => self.rename(request, false),
            opcode::RENAME2 => self.rename(request, true),
            opcode::LINK => self.link(request, reply),
            opcode::TMPFILE => self.tmpfile(request, reply),
            opcode::READDIR => self.read_dir(request, reply, false),
            opcode::READDIRPLUS => self.read_dir(request, reply, true),
            opcode::READ => self.read(request, reply),
            opcode::WRITE => self.write(request, reply),
            opcode::FALLOCATE => self.fallocate(request),
            opcode::COPY_FILE_RANGE => self.copy_file_range(request, reply, false),
            opcode::COPY_FILE_RANGE_64 => self.copy_file_range(request, reply, true),
            opcode::LSEEK => self.lseek(request, reply),
            opcode::STATFS => self.statfs(reply),
            opcode::SETXATTR => self.set_xattr(request),
            opcode::GETXATTR => self.get_xattr(request, reply),
            opcode::LISTXATTR => self.list_xattr(request, reply),
            opcode::REMOVEXATTR => self.remove_xattr(request),
            opcode::RELEASE | opcode::SYNCFS | opcode::DESTROY => Ok(()),
            // Most of all OPEN, OPENDIR, FLUSH and FSYNC: the kernel remembers and does not ask again. Neither
            // opening nor closing concerns us, and data is with us as soon as it was written.
            _ => Err(Errno::NOSYS),
        }?;
        Ok(Answer::Reply)
    }

    /// Answers with an inode, and counts that the kernel knows it.
    pub(super) fn entry(&self, ino: Ino, node: &NodeRef, reply: &mut Reply) {
        let keep_attributes = self.attributes_last(ino, node);
        let generation = self.kernel.count(ino);
        reply.entry_out(ino, generation, keep_attributes, node, self.ids);
    }

    /// Answers with the attributes of an inode.
    pub(super) fn attributes(&self, ino: Ino, node: &Node, reply: &mut Reply) {
        let keep_attributes = self.attributes_last(ino, node);
        reply.attr_out(ino, keep_attributes, node, self.ids);
    }

    /// Whether the kernel may keep the attributes of an inode. When it has written it takes the size and the times for changed but not
    /// the mode, from which we may have taken set-id bits: it would go on to run the file with the rights of its owner.
    fn attributes_last(&self, ino: Ino, node: &Node) -> bool {
        !self.barrier.covers(ino) && !may_lose_set_id(&node.meta)
    }

    /// Has the kernel drop something. As for [`Notice::send`].
    pub(crate) fn tell(&self, notice: &Notice, device: BorrowedFd<'_>) -> Result<(), (Ino, Errno)> {
        let sent = notice.send(device);
        sent.map_err(|errno| (notice.ino(), errno))?;
        if let Notice::Entry { parent, name } = notice {
            self.absent.remove(*parent, name);
        }
        Ok(())
    }

    /// Has whoever walks through these directories wait at the barrier.
    pub(super) fn hold_back(
        &self,
        dirs: &HashSet<Ino>,
        device: BorrowedFd<'_>,
    ) -> Result<(), (Ino, Errno)> {
        self.barrier.raise(dirs);
        dirs.iter()
            .try_for_each(|ino| self.tell(&Notice::Attributes(*ino), device))
    }

    /// Takes look-ups back; an inode without a name that nobody knows any more is gone.
    pub(crate) fn forget(&self, ino: Ino, lookups: u64) {
        let gone = || {
            self.absent.forget(ino);
            self.tree.base.forget(ino);
        };
        if self.kernel.forget(ino, lookups, gone) && self.view.read().orphans().contains(&ino) {
            self.release_if_unknown(ino);
        }
    }

    /// Lets go of inodes without a name that the kernel does not know, those included that were
    /// pinned by a switch and never opened.
    pub(crate) fn release_orphans(&self) {
        if self.view.read().orphans().is_empty() {
            return;
        }
        let orphans: Vec<Ino> = {
            let mut view = self.view.write();
            view.unpin();
            view.orphans().iter().copied().collect()
        };
        for ino in orphans {
            self.release_if_unknown(ino);
        }
    }

    pub(super) fn release_if_unknown(&self, ino: Ino) {
        let mut view = self.view.write();
        // Look-ups are counted under the lock, so none can come in between.
        if !self.kernel.knows(ino) {
            view.release_orphan(ino);
        }
    }

    fn forget_request(&self, request: Request<'_>) -> Result<(), Errno> {
        let mut args = request.args;
        if request.opcode == opcode::FORGET {
            self.forget(request.node, args.u64()?);
            return Ok(());
        }
        let count = args.u32()?;
        args.skip(4)?;
        for _ in 0..count {
            let ino = args.u64()?;
            self.forget(ino, args.u64()?);
        }
        Ok(())
    }
}
