//! A thread that merges checkpoints on disk with deleted ones that they build on, so that whoever deletes one does not wait for it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use crate::error::{Doing, Result};
use crate::ground::Ground;
use crate::report::CompactionInfo;

/// Who has something to be merged, and what was done.
#[derive(Default)]
pub(crate) struct Compactor {
    queue: Mutex<Queue>,
    changed: Condvar,
    closing: AtomicBool,
    pub(crate) counters: Counters,
}

/// Names of sandboxes.
#[derive(Default)]
struct Queue {
    waiting: BTreeSet<String>,
    at_work: Option<String>,
}

#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) merges: AtomicU64,
    pub(crate) bytes: AtomicU64,
    failures: AtomicU64,
}

/// The thread. It ends when this is closed or dropped, after the merge that it is at.
pub(crate) struct Running {
    ground: Arc<Ground>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Compactor {
    /// There may be something to do for this sandbox.
    pub(crate) fn wake(&self, sandbox: &str) {
        self.queue.lock().waiting.insert(sandbox.to_owned());
        self.changed.notify_one();
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// What was done so far.
    pub(crate) fn info(&self) -> CompactionInfo {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let queue = self.queue.lock();
        CompactionInfo {
            waiting: queue.waiting.len() + usize::from(queue.at_work.is_some()),
            merges: count(&self.counters.merges),
            written_bytes: count(&self.counters.bytes),
            failures: count(&self.counters.failures),
        }
    }

    /// The next one that has something to do; none when this is closing.
    fn next(&self) -> Option<String> {
        let mut queue = self.queue.lock();
        queue.at_work = None;
        while !self.is_closing() {
            queue.at_work = queue.waiting.pop_first();
            if queue.at_work.is_some() {
                return queue.at_work.clone();
            }
            self.changed.wait(&mut queue);
        }
        None
    }

    fn run(&self, ground: &Ground) {
        while let Some(name) = self.next() {
            // It may be removed by now, with all that it has on disk.
            let Some(sandbox) = ground.get(&name) else {
                continue;
            };
            if let Err(error) = sandbox.compact()
                && ground.get(&name).is_some()
            {
                self.counters.failures.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(sandbox = name, %error, "deleted checkpoints stay on disk until the next one is deleted");
            }
        }
    }
}

impl Running {
    pub(crate) fn start(ground: Arc<Ground>) -> Result<Self> {
        let inside = Arc::clone(&ground);
        let thread = std::thread::Builder::new().name("compactor".to_owned());
        let thread = thread
            .spawn(move || inside.common.compactor.run(&inside))
            .doing("starting the thread that merges checkpoints on disk")?;
        Ok(Self {
            ground,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Ends the thread.
    pub(crate) fn close(&self) {
        let compactor = &self.ground.common.compactor;
        compactor.closing.store(true, Ordering::Release);
        // Whoever looks at the flag and then waits holds this.
        drop(compactor.queue.lock());
        compactor.changed.notify_all();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that merges checkpoints on disk has panicked");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.close();
    }
}
