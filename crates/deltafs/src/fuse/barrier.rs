//! Holding back requests about directories below which the kernel's caches are not right yet.
//!
//! Every walk through a directory asks for its permissions first, and the kernel asks us if its attributes were
//! dropped. So whoever would find something stale below such a directory waits here, without holding up a thread.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::node::Ino;

/// The directories that nobody passes for now, and who waits.
#[derive(Debug, Default)]
pub(crate) struct Barrier {
    /// Spares the lock while nothing is held back.
    up: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    behind: HashSet<Ino>,
    waiting: Vec<Waiting>,
}

/// A request that is answered later, and where.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(super) bytes: Vec<u8>,
    pub(super) channel: Arc<OwnedFd>,
}

impl Barrier {
    /// Holds back requests about these directories from now on. The kernel must have been told to drop their
    /// attributes before anybody can make requests.
    pub(crate) fn raise(&self, behind: HashSet<Ino>) {
        self.state.lock().behind = behind;
        self.up.store(true, Ordering::Release);
    }

    /// Whether requests about the directory are held back. The kernel must not keep attributes of it that it is told
    /// meanwhile.
    pub(super) fn covers(&self, ino: Ino) -> bool {
        self.up.load(Ordering::Acquire) && self.state.lock().behind.contains(&ino)
    }

    /// Takes a request if it has to wait.
    pub(super) fn take(&self, ino: Ino, bytes: &[u8], channel: &Arc<OwnedFd>) -> bool {
        if !self.up.load(Ordering::Acquire) {
            return false;
        }
        let mut state = self.state.lock();
        let waits = state.behind.contains(&ino);
        if waits {
            state.waiting.push(Waiting {
                bytes: bytes.to_vec(),
                channel: Arc::clone(channel),
            });
        }
        waits
    }

    /// Holds nothing back any more; gives what waited, to be answered.
    pub(super) fn lower(&self) -> Vec<Waiting> {
        let mut state = self.state.lock();
        self.up.store(false, Ordering::Release);
        state.behind = HashSet::new();
        std::mem::take(&mut state.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_behind_waits_until_the_barrier_is_lowered() {
        let channel = Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        let barrier = Barrier::default();
        assert!(!barrier.take(7, b"early", &channel));
        barrier.raise(HashSet::from([7]));
        assert!(barrier.covers(7) && !barrier.covers(8));
        assert!(barrier.take(7, b"late", &channel));
        assert!(!barrier.take(8, b"other", &channel));
        let waited = barrier.lower();
        assert_eq!(waited.len(), 1);
        assert_eq!(waited[0].bytes, b"late");
        assert!(!barrier.take(7, b"after", &channel) && !barrier.covers(7));
    }
}
