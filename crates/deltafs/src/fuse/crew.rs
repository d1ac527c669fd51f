//! The threads of a mount: one serves, and the others help when it does not keep up.
//!
//! The kernel gives a request to whoever has waited longest. Threads that all wait take turns then, and each is woken where it ran last,
//! which is not where the caller runs, who goes on beside the one that answered; so every request goes to another processor, which
//! slept. One thread that waits can share a processor with its caller.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::company::Company;
use super::desk::{Desk, Duty, Left, Service};
use super::wire;

/// For how long the first thread may be at one request before another one takes its place meanwhile.
const PATIENCE: Duration = Duration::from_millis(1);
/// After so many times this long without a request, nobody watches the first thread until there is one.
const QUIET: u32 = 4;
/// For so many requests after one that was not alone, helpers wait for more of them like the first thread.
const CROWD: u32 = 32;

/// What the threads of one mount know of each other.
#[derive(Debug, Default)]
pub(super) struct Crew {
    /// Odd while the first thread is at a request; another number each time.
    turn: AtomicU64,
    /// For how many requests more there may be others beside them.
    crowd: AtomicU32,
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

/// What the first thread does. That it is no more is said when this is dropped, however that comes.
#[derive(Debug)]
struct Lead<'a> {
    crew: &'a Crew,
    company: Company,
}

impl Duty for Lead<'_> {
    fn stays(&mut self, channel: &OwnedFd) -> bool {
        if self.crew.crowd.load(Ordering::Relaxed) == 0 {
            self.company.linger(|| is_waiting(channel));
        }
        true
    }

    fn begin(&mut self, channel: &OwnedFd, request: &[u8]) {
        // Of many callers there is none to go to.
        if !self.crew.begin(channel)
            && let Some(caller) = wire::caller(request)
        {
            self.company.join(caller);
        }
    }

    fn done(&mut self) {
        self.crew.done();
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        self.crew.state.lock().ended = true;
        self.crew.called.notify_all();
    }
}

/// What a helper does.
#[derive(Debug)]
struct Help<'a> {
    crew: &'a Crew,
    need: Need,
}

impl Duty for Help<'_> {
    fn stays(&mut self, channel: &OwnedFd) -> bool {
        self.crew.is_needed(self.need, channel)
    }

    fn begin(&mut self, channel: &OwnedFd, _: &[u8]) {
        self.crew.are_more(channel);
    }

    fn done(&mut self) {}
}

impl Crew {
    /// Serves until the connection ends.
    pub(super) fn lead<S: Service>(&self, desk: &mut Desk<'_, S>) {
        desk.serve(&mut self.first());
    }

    /// Serves when that is needed until the connection ends.
    pub(super) fn help<S: Service>(&self, desk: &mut Desk<'_, S>) {
        loop {
            let need = self.await_need();
            if desk.serve(&mut Help { crew: self, need }) == Left::Closed {
                return;
            }
        }
    }

    fn first(&self) -> Lead<'_> {
        Lead {
            crew: self,
            company: Company::default(),
        }
    }

    /// Whether a helper is to wait for one more request.
    fn is_needed(&self, need: Need, channel: &OwnedFd) -> bool {
        if need == Need::Alone || self.crowd.load(Ordering::Relaxed) > 0 {
            return true;
        }
        let mut there = is_waiting(channel);
        while !there
            && let Need::Stuck(turn) = need
            && turn == self.turn()
        {
            there = await_request(channel, Timespec::try_from(PATIENCE).ok().as_ref());
        }
        there
    }

    /// Whether there are more requests than the one that was just taken.
    fn are_more(&self, channel: &OwnedFd) -> bool {
        let more = is_waiting(channel);
        let crowd = match more {
            true => CROWD,
            false => self.crowd.load(Ordering::Relaxed).saturating_sub(1),
        };
        self.crowd.store(crowd, Ordering::Relaxed);
        more
    }

    /// The first thread has a request. Tells whether there are more.
    fn begin(&self, channel: &OwnedFd) -> bool {
        self.turn.fetch_add(1, Ordering::SeqCst);
        let more = self.are_more(channel);
        if more || !self.watched.load(Ordering::SeqCst) {
            let mut state = self.state.lock();
            if state.idle > 0 {
                state.wanted |= more;
                self.watched.store(true, Ordering::SeqCst);
                self.called.notify_one();
            }
        }
        more
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

    fn turn(&self) -> u64 {
        self.turn.load(Ordering::SeqCst)
    }
}

/// Whether there is a request now.
fn is_waiting(channel: &OwnedFd) -> bool {
    await_request(channel, Some(&Timespec::default()))
}

/// Waits for a request, or for nothing to come any more. Tells whether there is one.
fn await_request(channel: &OwnedFd, patience: Option<&Timespec>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN)];
    poll(&mut fds, patience).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

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
        let crew = Arc::new(Crew::default());
        let stuck = helper(&crew);
        await_idle(&crew);
        crew.begin(&channel);
        assert_eq!(stuck.join().unwrap(), Need::Stuck(1));
        crew.done();
        assert!(!crew.is_needed(Need::Stuck(1), &channel));
        assert!(!crew.is_needed(Need::More, &channel));

        std::io::Write::write_all(&mut kernel, b"request").unwrap();
        let more = helper(&crew);
        await_idle(&crew);
        crew.begin(&channel);
        assert_eq!(more.join().unwrap(), Need::More);
        assert!(crew.is_needed(Need::More, &channel));
        crew.done();

        let alone = helper(&crew);
        drop(crew.first());
        assert_eq!(alone.join().unwrap(), Need::Alone);
        assert!(crew.is_needed(Need::Alone, &channel));
    }

    #[test]
    fn nobody_watches_while_there_are_no_requests() {
        let (_kernel, channel) = std::os::unix::net::UnixStream::pair().unwrap();
        let channel = OwnedFd::from(channel);
        let crew = Arc::new(Crew::default());
        let watching = helper(&crew);
        await_idle(&crew);
        crew.begin(&channel);
        crew.done();
        while crew.watched.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        drop(crew.first());
        assert_eq!(watching.join().unwrap(), Need::Alone);
    }
}
