//! What is done while the sandbox runs: freeing what a switch leaves behind, giving what was freed back to the disk, and writing what
//! is in memory into the block file.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::data::DataStore;
use crate::fuse::Barrier;
use crate::view::View;

/// For how long what was written may stay in memory only: what is soon written again, or removed, is not written for nothing.
const LINGER: Duration = Duration::from_secs(5);

/// What the thread is told. The store may say so too, which the views hold; so it says nothing of them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    /// There are views to be dropped, or much was freed.
    Work,
    /// Blocks are in memory that are to be written into the file.
    WriteSoon,
    /// The same, and memory is scarce.
    WriteNow,
    End,
}

/// A thread that drops views, gives their blocks back to the disk, and writes blocks. One for a tree of volumes.
#[derive(Debug)]
pub(crate) struct Reclaimer {
    left: Arc<Mutex<Vec<View>>>,
    calls: Sender<Call>,
    /// Whether the thread is to come to its end: what is left to be given back goes with the file.
    ending: Arc<AtomicBool>,
    /// None only while this is dropped.
    thread: Option<JoinHandle<()>>,
}

impl Reclaimer {
    /// Starts the thread, for volumes whose data is in this store.
    pub(crate) fn start(store: &Arc<DataStore>) -> io::Result<Self> {
        let (calls, orders) = channel();
        store.reclaim_by(calls.clone());
        let left = Arc::<Mutex<Vec<View>>>::default();
        let ending = Arc::<AtomicBool>::default();
        let mut work = Work {
            left: Arc::clone(&left),
            ending: Arc::clone(&ending),
            // Whatever is freed holds the store; nothing needs the thread to.
            store: Arc::downgrade(store),
            due: None,
        };
        let thread = std::thread::Builder::new()
            .name("deltafs-reclaim".to_owned())
            .spawn(move || work.until_end(&orders))?;
        Ok(Self {
            left,
            calls,
            ending,
            thread: Some(thread),
        })
    }

    /// Has a view dropped.
    fn drop_later(&self, view: View) {
        self.left.lock().push(view);
        // The thread listens until it is told to end.
        let _ = self.calls.send(Call::Work);
    }
}

/// What the thread knows.
#[derive(Debug)]
struct Work {
    left: Arc<Mutex<Vec<View>>>,
    ending: Arc<AtomicBool>,
    store: Weak<DataStore>,
    /// When what is in memory is to be written.
    due: Option<Instant>,
}

impl Work {
    fn until_end(&mut self, orders: &Receiver<Call>) {
        loop {
            match self.next(orders) {
                Ok(Call::Work) => self.free(),
                Ok(Call::WriteSoon) => {
                    self.due = self.due.or_else(|| Some(Instant::now() + LINGER))
                }
                Ok(Call::WriteNow) | Err(RecvTimeoutError::Timeout) => self.write_back(),
                Ok(Call::End) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        // Snapshots may outlive all volumes, and nothing would write for them later.
        self.left.lock().clear();
        self.write_back();
    }

    fn next(&self, orders: &Receiver<Call>) -> Result<Call, RecvTimeoutError> {
        match self.due {
            Some(due) => orders.recv_timeout(due.saturating_duration_since(Instant::now())),
            None => orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
        }
    }

    fn free(&self) {
        let some = std::mem::take(&mut *self.left.lock());
        drop(some);
        if let Some(store) = self.store.upgrade() {
            store.trim_while(|| !self.ending.load(Ordering::Relaxed));
        }
    }

    fn write_back(&mut self) {
        let left = self.store.upgrade().is_some_and(|store| store.write_back());
        self.due = left.then(|| Instant::now() + LINGER);
    }
}

/// A view that a switch has left behind. When this is dropped, a thread begins to free it, and another to tell the kernel what
/// could wait until then.
#[derive(Debug)]
pub struct LeftBehind {
    /// None only while this is dropped.
    view: Option<View>,
    reclaimer: Arc<Reclaimer>,
    barrier: Arc<Barrier>,
}

impl LeftBehind {
    pub(crate) fn new(view: View, reclaimer: &Arc<Reclaimer>, barrier: &Arc<Barrier>) -> Self {
        Self {
            view: Some(view),
            reclaimer: Arc::clone(reclaimer),
            barrier: Arc::clone(barrier),
        }
    }
}

impl Drop for LeftBehind {
    fn drop(&mut self) {
        self.barrier.begin();
        self.view
            .take()
            .into_iter()
            .for_each(|view| self.reclaimer.drop_later(view));
    }
}

impl Drop for Reclaimer {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        let _ = self.calls.send(Call::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::data::BLOCK_LEN;

    #[test]
    fn what_is_freed_goes_back_to_the_disk_without_a_snapshot_that_ends() {
        let dir = tempfile::tempdir().unwrap();
        let store = DataStore::create(dir.path()).unwrap();
        let _reclaimer = Reclaimer::start(&store).unwrap();
        let blocks = store.allocate(20_000, 1).unwrap();
        let mib = vec![7; 256 * BLOCK_LEN];
        for some in blocks.chunks_exact(256) {
            store.write(&mib, some[0].position()).unwrap();
        }
        assert!(store.disk_bytes().unwrap() > 64 << 20);
        drop(blocks);
        while store.disk_bytes().unwrap() > 16 << 20 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
