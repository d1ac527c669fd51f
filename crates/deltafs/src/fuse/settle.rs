//! What is left to do after a switch while the sandbox runs again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

use super::notify::{Notice, prune};
use super::server::Server;
use super::session::answer;
use super::wire::Reply;
use crate::invalidate::Later;
use crate::node::Ino;
use crate::sys;

/// How many inodes are pruned by one notice.
const BATCH: usize = 4096;
/// The kernel tells what it has forgotten a little later; when nothing more has come for this long, nothing will.
const SILENCE: Duration = Duration::from_millis(4);

/// What the work needs.
struct Settle {
    later: Later,
    server: Arc<Server>,
    device: Arc<OwnedFd>,
    root: OwnedFd,
}

/// Raises the barrier before the directories of `later`, and has a thread of its own do what is left and lower it
/// again; without a thread that is done before this returns. `root` is a descriptor of the mount's root.
///
/// Nothing may be told the attributes of those directories between this and the end of the work, so this comes last in
/// a switch.
///
/// # Errors
/// If the kernel does not take a notice.
pub(crate) fn settle(
    later: Later,
    server: &Arc<Server>,
    device: &Arc<OwnedFd>,
    root: OwnedFd,
) -> Result<Option<JoinHandle<()>>, (Ino, Errno)> {
    server.barrier().raise(later.behind.clone());
    for ino in &later.behind {
        let dropped = Notice::Attributes(*ino).send(device.as_fd());
        dropped.map_err(|errno| (*ino, errno))?;
    }
    let work = Arc::new(Settle {
        later,
        server: Arc::clone(server),
        device: Arc::clone(device),
        root,
    });
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
        let _ = self.drop_stale();
        let mut reply = Reply::new();
        for waiting in self.server.barrier().lower() {
            let (channel, bytes) = (&waiting.channel, &waiting.bytes);
            answer(&self.server, channel, bytes, &mut reply, false);
        }
    }

    fn drop_stale(&self) -> Result<(), Errno> {
        let device = self.device.as_fd();
        let (notices, mut pruned) = self.later.sort();
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
