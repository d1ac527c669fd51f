//! What is left to do after a switch while the sandbox runs again.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

use super::barrier::Waiting;
use super::notify::{Notice, prune};
use super::server::Server;
use super::session::answer;
use super::wire::Reply;
use crate::invalidate::{Later, Rest};
use crate::node::{Ino, ROOT};
use crate::sys;

/// How many inodes are pruned by one notice.
const BATCH: usize = 4096;
/// The kernel tells what it has forgotten a little later; when nothing more has come for this long, nothing will.
const SILENCE: Duration = Duration::from_millis(4);

/// What the work needs.
struct Settle {
    rest: Rest,
    server: Arc<Server>,
    device: Arc<OwnedFd>,
    root: OwnedFd,
}

/// Raises the barrier before the directories from which walks begin, and has a thread of its own do the rest of a switch and
/// lower it again; without a thread that is done before this returns. `root` is a descriptor of the mount's root.
///
/// Nothing may be told the attributes of those directories between this and the end of the work, so this comes last in
/// a switch.
///
/// # Errors
/// If the kernel does not take a notice.
pub(crate) fn settle(
    rest: Rest,
    server: &Arc<Server>,
    device: &Arc<OwnedFd>,
    root: OwnedFd,
) -> Result<Option<JoinHandle<()>>, (Ino, Errno)> {
    let work = Arc::new(Settle {
        rest,
        server: Arc::clone(server),
        device: Arc::clone(device),
        root,
    });
    work.hold_back(&work.rest.starts)?;
    let shared = Arc::clone(&work);
    let thread = std::thread::Builder::new()
        .name("deltafs-settle".to_owned())
        .spawn(move || shared.run());
    if thread.is_err() {
        work.run();
    }
    Ok(thread.ok())
}

impl Settle {
    fn run(&self) {
        // That a notice is not taken means that the connection has ended, and with it all who might look.
        if let Err((ino, error)) = self.tell() {
            tracing::debug!(ino, %error, "the rest of a switch was not told to the kernel");
        }
        self.let_go(self.server.barrier().lower());
    }

    fn tell(&self) -> Result<(), (Ino, Errno)> {
        let (kernel, absent) = (self.server.kernel(), self.server.absent());
        let (plan, later) = self.rest.compare(kernel, absent);
        for notice in &plan.notices {
            self.server.tell(notice, self.device.as_fd())?;
        }
        for ino in plan.refresh {
            let _ = refresh_size(&self.root, ino, kernel.generation(ino));
        }
        self.hold_back(&later.behind)?;
        self.let_go(self.server.barrier().narrow(&later.behind));
        let dropped = self.drop_stale(&later);
        dropped.map_err(|errno| (ROOT, errno))
    }

    /// Has whoever walks through these directories wait.
    fn hold_back(&self, dirs: &HashSet<Ino>) -> Result<(), (Ino, Errno)> {
        self.server.barrier().raise(dirs);
        for ino in dirs {
            let dropped = Notice::Attributes(*ino);
            self.server.tell(&dropped, self.device.as_fd())?;
        }
        Ok(())
    }

    /// Answers who has waited.
    fn let_go(&self, waited: Vec<Waiting>) {
        let mut reply = Reply::new();
        for waiting in waited {
            let (channel, bytes) = (&waiting.channel, &waiting.bytes);
            answer(&self.server, channel, bytes, &mut reply, false);
        }
    }

    fn drop_stale(&self, later: &Later) -> Result<(), Errno> {
        let device = self.device.as_fd();
        let (notices, mut pruned) = later.sort();
        for notice in notices {
            notice.send(device)?;
        }
        for batch in pruned.chunks(BATCH) {
            prune(device, batch)?;
        }
        self.await_forgotten(&mut pruned);
        // What is in use all the same, as by a watch, stays and has to ask for everything again.
        for ino in pruned {
            let (start, len) = (0, 0);
            Notice::Content { ino, start, len }.send(device)?;
            let _ = refresh_size(&self.root, ino, self.server.kernel().generation(ino));
        }
        Ok(())
    }

    /// Takes out of `inodes` what the kernel does not know any more, until no more of them go.
    fn await_forgotten(&self, inodes: &mut Vec<Ino>) {
        let mut before = usize::MAX;
        loop {
            inodes.retain(|ino| self.server.kernel().knows(*ino));
            if inodes.is_empty() || inodes.len() == before {
                return;
            }
            before = inodes.len();
            std::thread::sleep(SILENCE);
        }
    }
}

/// Has the kernel ask for the attributes of an inode, its size above all, which it would otherwise trust in appends,
/// mappings and reads before the end.
pub(crate) fn refresh_size(root: &OwnedFd, ino: Ino, generation: u32) -> io::Result<()> {
    let fd = sys::open_by_node_id(root, ino, generation, libc::O_PATH)?;
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_FORCE_SYNC;
    rustix::fs::statx(&fd, "", flags, StatxFlags::BASIC_STATS)?;
    Ok(())
}
