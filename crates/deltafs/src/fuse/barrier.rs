//! Holding back requests about directories below which the kernel's caches are not right yet.
//!
//! Every walk through a directory asks for its permissions first, and the kernel asks us for its attributes if they were
//! dropped. So whoever would find something stale below such a directory waits here, without holding up a thread. He
//! holds no lock of the directory then, which telling the kernel of a name needs; so nothing but attributes may be held back.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

use super::desk::Channel;
use crate::node::Ino;

/// The directories that nobody passes for now, and who waits.
#[derive(Debug, Default)]
pub(crate) struct Barrier {
    /// Spares the lock while nothing is held back.
    up: AtomicBool,
    state: Mutex<State>,
    /// That `wanted` or `ended` became true.
    called: Condvar,
    lowered: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Whether it is to be lowered, though nothing may be behind it any more.
    raised: bool,
    behind: HashSet<Ino>,
    waiting: Vec<Waiting>,
    /// Whether it is time to do what lowers the barrier.
    wanted: bool,
    /// Whether nobody will raise it any more.
    ended: bool,
}

/// A request that is answered later, and where.
#[derive(Debug)]
pub(crate) struct Waiting {
    ino: Ino,
    pub(super) bytes: Vec<u8>,
    pub(super) channel: Channel,
}

impl Barrier {
    /// Holds back requests about these directories too from now on. The kernel must have been told to drop their
    /// attributes before anybody can come to them.
    pub(crate) fn raise(&self, behind: &HashSet<Ino>) {
        let mut state = self.state.lock();
        state.raised = true;
        state.behind.extend(behind);
        self.up.store(true, Ordering::Release);
    }

    /// Whether requests about the directory are held back. The kernel must not keep attributes of it that it is told
    /// meanwhile.
    pub(super) fn covers(&self, ino: Ino) -> bool {
        self.up.load(Ordering::Acquire) && self.state.lock().behind.contains(&ino)
    }

    /// Takes a request for the attributes of an inode if it has to wait.
    pub(super) fn take(&self, ino: Ino, bytes: &[u8], channel: &Channel) -> bool {
        if !self.up.load(Ordering::Acquire) {
            return false;
        }
        let mut state = self.state.lock();
        let waits = state.behind.contains(&ino);
        if waits {
            state.waiting.push(Waiting {
                ino,
                bytes: bytes.to_vec(),
                channel: channel.clone(),
            });
            state.wanted = true;
            self.called.notify_one();
        }
        waits
    }

    /// Has whoever lowers the barrier, if it is up, begin with what is to be done before.
    pub(crate) fn begin(&self) {
        let mut state = self.state.lock();
        if state.raised {
            state.wanted = true;
            self.called.notify_one();
        }
    }

    /// Waits until it is time to begin, or somebody waits here. Tells whether there will be something to do.
    pub(super) fn await_begin(&self) -> bool {
        let mut state = self.state.lock();
        let idle = |state: &mut State| !state.wanted && !state.ended;
        self.called.wait_while(&mut state, idle);
        state.wanted
    }

    /// Waits until it is down.
    pub(super) fn await_lowered(&self) {
        let mut state = self.state.lock();
        self.lowered.wait_while(&mut state, |state| state.raised);
    }

    /// Nobody will raise it any more.
    pub(super) fn end(&self) {
        self.begin();
        self.state.lock().ended = true;
        self.called.notify_one();
    }

    /// From now on holds back requests about these directories, which it did before, and about no others; gives what waited for
    /// the others, to be answered.
    pub(super) fn narrow(&self, to: &HashSet<Ino>) -> Vec<Waiting> {
        let mut state = self.state.lock();
        state.behind.retain(|ino| to.contains(ino));
        let State {
            behind, waiting, ..
        } = &mut *state;
        waiting
            .extract_if(.., |waiting| !behind.contains(&waiting.ino))
            .collect()
    }

    /// Holds nothing back any more; gives what waited, to be answered.
    pub(super) fn lower(&self) -> Vec<Waiting> {
        let mut state = self.state.lock();
        self.up.store(false, Ordering::Release);
        state.behind = HashSet::new();
        (state.raised, state.wanted) = (false, false);
        self.lowered.notify_all();
        std::mem::take(&mut state.waiting)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn requests(waited: &[Waiting]) -> Vec<&[u8]> {
        waited.iter().map(|waiting| &waiting.bytes[..]).collect()
    }

    #[test]
    fn what_is_behind_waits_until_the_barrier_is_lowered() {
        let device = std::fs::File::open("/dev/null").unwrap();
        let channel = Channel::of_device(&Arc::new(device.into()));
        let barrier = Barrier::default();
        assert!(!barrier.take(7, b"early", &channel));
        barrier.raise(&HashSet::from([7]));
        barrier.raise(&HashSet::from([9]));
        assert!(barrier.covers(7) && !barrier.covers(8) && barrier.covers(9));
        assert!(barrier.take(7, b"late", &channel) && barrier.take(9, b"later", &channel));
        assert!(!barrier.take(8, b"other", &channel));
        assert_eq!(requests(&barrier.narrow(&HashSet::from([9, 8]))), [b"late"]);
        assert!(!barrier.covers(7) && !barrier.covers(8) && barrier.covers(9));
        assert!(barrier.await_begin());
        assert_eq!(requests(&barrier.lower()), [b"later"]);
        barrier.await_lowered();
        assert!(!barrier.take(9, b"after", &channel) && !barrier.covers(9));
        barrier.begin();
        barrier.end();
        assert!(!barrier.await_begin());
    }

    #[test]
    fn with_nothing_behind_it_the_barrier_is_up_until_it_is_lowered() {
        let barrier = Arc::new(Barrier::default());
        barrier.raise(&HashSet::from([7]));
        assert!(barrier.narrow(&HashSet::new()).is_empty());
        barrier.begin();
        assert!(barrier.await_begin());
        let lowered = Arc::new(AtomicBool::new(false));
        let waiter = std::thread::spawn({
            let (barrier, lowered) = (Arc::clone(&barrier), Arc::clone(&lowered));
            move || {
                barrier.await_lowered();
                lowered.load(Ordering::Acquire)
            }
        });
        lowered.store(true, Ordering::Release);
        barrier.lower();
        assert!(waiter.join().unwrap());
    }
}
