//! What is left to do after a switch while the sandbox runs again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

use super::barrier::Waiting;
use super::notify::{Notice, prune};
use super::server::Server;
use super::wire::Reply;
use crate::invalidate::{Later, Rest};
use crate::node::{Ino, ROOT};
use crate::sys;

/// How many inodes are pruned by one notice.
const BATCH: usize = 4096;
/// The kernel tells what it has forgotten a little later: how long to wait for it first,
const NAP: Duration = Duration::from_micros(50);
/// and how long nothing more must have come for nothing more to be expected.
const SILENCE: Duration = Duration::from_millis(4);

/// Does the rests of a volume's switches, one after another, on a thread that the first one starts.
#[derive(Debug)]
pub(crate) struct Settler {
    server: Arc<Server>,
    device: Arc<OwnedFd>,
    next: Arc<Mutex<Option<Work>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The rest of a switch, and what it needs.
#[derive(Debug)]
struct Work {
    rest: Rest,
    server: Arc<Server>,
    device: Arc<OwnedFd>,
    root: OwnedFd,
}

impl Settler {
    pub(crate) fn new(server: &Arc<Server>, device: &Arc<OwnedFd>) -> Self {
        Self {
            server: Arc::clone(server),
            device: Arc::clone(device),
            next: Arc::default(),
            thread: Mutex::default(),
        }
    }

    /// Raises the barrier before the directories from which walks begin, and leaves the rest of a switch to the thread, which
    /// lowers it again. It begins when [`Barrier::begin`] says so or somebody waits; without a thread the work is done before this
    /// returns. `root` is a descriptor of the mount's root. What was left before must be [finished](Self::finish).
    ///
    /// Nothing may be told the attributes of those directories between this and the end of the work, so this comes last in
    /// a switch.
    ///
    /// # Errors
    /// If the kernel does not take a notice.
    pub(crate) fn leave(&self, rest: Rest, root: OwnedFd) -> Result<(), (Ino, Errno)> {
        let starts = rest.starts.clone();
        *self.next.lock() = Some(Work {
            rest,
            server: Arc::clone(&self.server),
            device: Arc::clone(&self.device),
            root,
        });
        let held_back = self.server.hold_back(&starts, self.device.as_fd());
        if let Err(error) = self.start() {
            tracing::warn!(%error, "cannot start a thread; a rollback takes longer");
            run_next(&self.next);
        }
        held_back
    }

    fn start(&self) -> io::Result<()> {
        let mut thread = self.thread.lock();
        if thread.is_none() {
            let (barrier, next) = (Arc::clone(self.server.barrier()), Arc::clone(&self.next));
            let work = move || {
                while barrier.await_begin() {
                    run_next(&next);
                }
            };
            let name = "deltafs-settle".to_owned();
            *thread = Some(std::thread::Builder::new().name(name).spawn(work)?);
        }
        Ok(())
    }

    /// Waits until the kernel was told everything.
    pub(crate) fn finish(&self) {
        self.server.barrier().begin();
        self.server.barrier().await_lowered();
    }

    /// Ends the thread, when the connection has ended.
    pub(crate) fn end(&self) {
        self.server.barrier().end();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
    }
}

fn run_next(next: &Mutex<Option<Work>>) {
    let work = next.lock().take();
    work.iter().for_each(Work::run);
}

impl Work {
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
        self.server.hold_back(&later.behind, self.device.as_fd())?;
        self.let_go(self.server.barrier().narrow(&later.behind));
        let dropped = self.drop_stale(&later);
        dropped.map_err(|errno| (ROOT, errno))
    }

    /// Answers who has waited.
    fn let_go(&self, waited: Vec<Waiting>) {
        let mut reply = Reply::default();
        for waiting in waited {
            let (channel, bytes) = (&waiting.channel, &waiting.bytes);
            self.server.answer_now(bytes, channel, &mut reply);
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
        let mut silence = NAP;
        loop {
            let before = inodes.len();
            inodes.retain(|ino| self.server.kernel().knows(*ino));
            if inodes.is_empty() || silence > SILENCE {
                return;
            }
            silence = match inodes.len() < before {
                true => NAP,
                false => silence * 2,
            };
            std::thread::sleep(silence);
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
