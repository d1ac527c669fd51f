//! Freeing what a switch leaves behind, and giving what was freed back to the disk, while the sandbox runs.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use parking_lot::Mutex;

use crate::data::DataStore;
use crate::fuse::Barrier;
use crate::view::View;

/// What the thread is told. The store may say so too, which the views hold; so it says nothing of them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    Work,
    End,
}

/// A thread that drops views and gives their blocks back to the disk. One for a tree of volumes.
#[derive(Debug)]
pub(crate) struct Reclaimer {
    left: Arc<Mutex<Vec<View>>>,
    calls: Sender<Call>,
    /// None only while this is dropped.
    thread: Option<JoinHandle<()>>,
}

impl Reclaimer {
    /// Starts the thread, for volumes whose data is in this store.
    pub(crate) fn start(store: &Arc<DataStore>) -> io::Result<Self> {
        let (calls, orders) = channel();
        store.reclaim_by(calls.clone());
        // Whatever is freed holds the store; nothing needs the thread to.
        let store = Arc::downgrade(store);
        let left = Arc::<Mutex<Vec<View>>>::default();
        let views = Arc::clone(&left);
        let work = move || {
            while let Ok(Call::Work) = orders.recv() {
                let some = std::mem::take(&mut *views.lock());
                drop(some);
                if let Some(store) = store.upgrade() {
                    store.trim();
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("deltafs-reclaim".to_owned())
            .spawn(work)?;
        Ok(Self {
            left,
            calls,
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
        let blocks = store.allocate(20_000, 1);
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
