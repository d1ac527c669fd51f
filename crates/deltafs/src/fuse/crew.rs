//! The threads of a mount: one serves, and the others help when it does not keep up.
//!
//! The kernel gives a request to whoever has waited longest. Threads that all wait take turns then, and each is woken where it ran last,
//! which is not where the caller runs, who goes on beside the one that answered; so every request goes to another processor, which
//! slept. One thread that waits and its caller share a processor after a few requests, which takes half the time.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::session::{Desk, Left};

/// For how long the first thread may be at one request before another one takes its place meanwhile.
const PATIENCE: Duration = Duration::from_millis(1);
/// After so many times this long without a request, nobody watches the first thread until there is one.
const QUIET: u32 = 4;

/// What the threads of one mount know of each other.
#[derive(Debug)]
pub(super) struct Crew {
    helpers: usize,
    /// Odd while the first thread is at a request; another number each time.
    turn: AtomicU64,
    /// Whether a helper watches the first thread.
    watched: AtomicBool,
    state: Mutex<State>,
    called: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Helpers that do nothing, or watch.
    idle: usize,
    /// Whether there are requests for one of them.
    wanted: bool,
    /// Whether the first thread is no more.
    ended: bool,
}

/// Why a helper is to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// There are more requests than the first thread can answer at a time.
    More,
    /// The first thread has been at one request for long; which one.
    Stuck(u64),
    /// There is no first thread any more.
    Alone,
}

/// Says that the first thread is no more when it is dropped, however that comes.
#[derive(Debug)]
struct Lead<'a>(&'a Crew);

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        self.0.state.lock().ended = true;
        self.0.called.notify_all();
    }
}

impl Crew {
    /// Of the first thread and so many helpers.
    pub(super) fn new(helpers: usize) -> Arc<Self> {
        Arc::new(Self {
            helpers,
            turn: AtomicU64::new(0),
            watched: AtomicBool::new(false),
            state: Mutex::default(),
            called: Condvar::new(),
        })
    }

    /// Serves until the connection ends; the channel is one that waits.
    pub(super) fn lead(&self, desk: &mut Desk) {
        let _lead = Lead(self);
        desk.serve(|channel| self.begin(channel), || self.done());
    }

    /// Serves when that is needed until the connection ends; the channel is one that does not wait.
    pub(super) fn help(&self, desk: &mut Desk) {
        loop {
            let need = self.await_need();
            loop {
                if desk.serve(|_| {}, || {}) == Left::Closed {
                    return;
                }
                if !self.lasts(need) {
                    break;
                }
                let patience = match need {
                    Need::Alone => None,
                    _ => Timespec::try_from(PATIENCE).ok(),
                };
                // If that fails, the next look at the channel tells why.
                let _ = await_request(desk.channel(), patience.as_ref());
            }
        }
    }

    /// The first thread has a request.
    fn begin(&self, channel: &OwnedFd) {
        self.turn.fetch_add(1, Ordering::SeqCst);
        if self.helpers == 0 {
            return;
        }
        let more = await_request(channel, Some(&Timespec::default()));
        if more || !self.watched.load(Ordering::SeqCst) {
            let mut state = self.state.lock();
            if state.idle > 0 {
                state.wanted |= more;
                self.watched.store(true, Ordering::SeqCst);
                self.called.notify_one();
            }
        }
    }

    /// The first thread has answered it.
    fn done(&self) {
        self.turn.fetch_add(1, Ordering::SeqCst);
    }

    fn await_need(&self) -> Need {
        let mut state = self.state.lock();
        state.idle += 1;
        let mut quiet = 0;
        let need = loop {
            if state.ended {
                break Need::Alone;
            }
            if std::mem::take(&mut state.wanted) {
                break Need::More;
            }
            if !self.watched.load(Ordering::SeqCst) {
                self.called.wait(&mut state);
                quiet = 0;
                continue;
            }
            let turn = self.turn();
            let called = !self.called.wait_for(&mut state, PATIENCE).timed_out();
            if called || self.turn() != turn {
                quiet = 0;
            } else if turn % 2 == 1 {
                break Need::Stuck(turn);
            } else {
                quiet += 1;
            }
            if quiet == QUIET {
                self.watched.store(false, Ordering::SeqCst);
                // Who begins now either sees that nobody watches, or is seen here.
                self.watched.store(self.turn() != turn, Ordering::SeqCst);
            }
        };
        state.idle -= 1;
        need
    }

    /// Whether there is still need for a helper that finds no request.
    fn lasts(&self, need: Need) -> bool {
        match need {
            Need::More => false,
            Need::Stuck(turn) => self.turn() == turn,
            Need::Alone => true,
        }
    }

    fn turn(&self) -> u64 {
        self.turn.load(Ordering::SeqCst)
    }
}

/// Waits for a request, or for nothing to come any more. Tells whether there is one.
fn await_request(channel: &OwnedFd, patience: Option<&Timespec>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN)];
    poll(&mut fds, patience).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn helper(crew: &Arc<Crew>) -> std::thread::JoinHandle<Need> {
        let crew = Arc::clone(crew);
        std::thread::spawn(move || crew.await_need())
    }

    fn await_idle(crew: &Crew) {
        while crew.state.lock().idle == 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_helper_comes_for_a_second_request_and_for_a_long_one_and_when_it_is_alone() {
        let (mut kernel, channel) = std::os::unix::net::UnixStream::pair().unwrap();
        let channel = OwnedFd::from(channel);
        let crew = Crew::new(1);
        let stuck = helper(&crew);
        await_idle(&crew);
        crew.begin(&channel);
        assert_eq!(stuck.join().unwrap(), Need::Stuck(1));
        assert!(crew.lasts(Need::Stuck(1)));
        crew.done();
        assert!(!crew.lasts(Need::Stuck(1)) && !crew.lasts(Need::More));

        std::io::Write::write_all(&mut kernel, b"request").unwrap();
        let more = helper(&crew);
        await_idle(&crew);
        crew.begin(&channel);
        assert_eq!(more.join().unwrap(), Need::More);
        crew.done();

        let alone = helper(&crew);
        drop(Lead(&crew));
        assert_eq!(alone.join().unwrap(), Need::Alone);
        assert!(crew.lasts(Need::Alone));
    }

    #[test]
    fn nobody_watches_while_there_are_no_requests() {
        let (_kernel, channel) = std::os::unix::net::UnixStream::pair().unwrap();
        let channel = OwnedFd::from(channel);
        let crew = Crew::new(1);
        let watching = helper(&crew);
        await_idle(&crew);
        crew.begin(&channel);
        crew.done();
        while crew.watched.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        drop(Lead(&crew));
        assert_eq!(watching.join().unwrap(), Need::Alone);
    }
}
