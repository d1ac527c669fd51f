//! A thread that makes room for the next checkpoint's pages while nobody waits: the first write to fresh memory is
//! what copying pages costs most.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use deltacr::store::PageStore;
use parking_lot::Mutex;

/// Room is made for at least this many pages,
const LEAST: u64 = 512;
/// and for at most this many: 64 MiB.
const MOST: u64 = 16 * 1024;

/// Handle of the thread, which ends when this is dropped.
pub(crate) struct Warmer(Mutex<Sender<u64>>);

impl Warmer {
    /// Starts the thread. Without it, checkpoints are slower, and nothing else.
    pub(crate) fn start(pages: Arc<PageStore>) -> Self {
        let (sender, receiver) = channel();
        let thread = std::thread::Builder::new().name("page warmer".to_owned());
        if let Err(e) = thread.spawn(move || run(&pages, &receiver)) {
            tracing::warn!("starting the page warmer: {e}");
        }
        Self(Mutex::new(sender))
    }

    /// A checkpoint copied this many pages; the next is likely to be like it.
    pub(crate) fn used(&self, pages: u64) {
        // If the thread could not be started there is nobody to tell.
        let _ = self.0.lock().send(pages);
    }
}

fn run(store: &PageStore, used: &Receiver<u64>) {
    while let Ok(pages) = used.recv() {
        let pages = used.try_iter().fold(pages, u64::max);
        let room = (2 * pages).clamp(LEAST, MOST) as usize;
        if let Err(e) = store.prepare(room) {
            tracing::debug!("making room for {room} pages: {e}");
        }
    }
}
