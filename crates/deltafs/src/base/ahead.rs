//! Reading directories ahead. Whoever walks a tree asks for one directory after another, and what the service does for each is to ask
//! the host about every entry. So while a tree is walked a thread asks about the directories that will come next.
//!
//! What it finds belongs to nobody until a directory is listed: it gets no numbers, and is let go of soon.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::fs::Statx;

use super::inode::BaseInode;
use super::listing::{ListEntry, Listing};
use crate::node::Ino;

/// Someone walks a tree if so many directories were listed for the first time, one after another, each in one that was listed before.
const WALK: u32 = 2;
/// How many directories there may be whose subdirectories are to be read.
const MAX_OPEN: usize = 64;
/// How many entries (of 300 bytes) are kept; then the thread waits until some of them are used.
const MAX_ENTRIES: usize = 8192;
/// Of larger directories only the names are read.
const MAX_DIR: usize = 1024;
/// For how long the thread waits for something to do, and what it has read for somebody to ask for it.
const PATIENCE: Duration = Duration::from_millis(500);

/// What was read ahead of one base.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    state: Mutex<State>,
    called: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// How many directories were listed in a row as someone does who walks a tree.
    walked: u32,
    /// Directories whose subdirectories are to be read, that of the last one first.
    open: Vec<Open>,
    found: HashMap<Ino, Found>,
    /// How many entries were found.
    entries: usize,
    /// Whether there is a thread that listens.
    running: bool,
    /// The last one.
    thread: Option<JoinHandle<()>>,
    /// Whether the base is gone.
    ended: bool,
}

/// A directory, and how many of its entries were looked at.
#[derive(Debug)]
struct Open {
    dir: Arc<BaseInode>,
    listing: Arc<Listing>,
    done: usize,
}

/// A directory that was read, and how its entries look, as far as that is known.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) listing: Listing,
    pub(super) looks: Vec<Option<Statx>>,
}

impl Ahead {
    /// Takes what was read of a directory.
    pub(super) fn take(&self, dir: Ino) -> Option<Found> {
        let mut state = self.state.lock();
        let found = state.found.remove(&dir)?;
        if state.entries >= MAX_ENTRIES {
            self.called.notify_one();
        }
        state.entries -= found.weight();
        Some(found)
    }

    /// A directory was listed for the first time; `below` one that was listed before.
    pub(super) fn listed(
        self: &Arc<Self>,
        dir: &Arc<BaseInode>,
        listing: &Arc<Listing>,
        below: bool,
    ) {
        let mut state = self.state.lock();
        state.walked = if below { state.walked + 1 } else { 0 };
        if state.walked < WALK || !listing.entries().iter().any(ListEntry::is_dir) {
            return;
        }
        if state.open.len() == MAX_OPEN {
            state.open.remove(0);
        }
        state.open.push(Open {
            dir: Arc::clone(dir),
            listing: Arc::clone(listing),
            done: 0,
        });
        if state.running {
            self.called.notify_one();
            return;
        }
        let ahead = Arc::clone(self);
        let thread = std::thread::Builder::new().name("deltafs-ahead".to_owned());
        // Without it all goes on, but slower.
        state.thread = thread.spawn(move || ahead.run()).ok();
        state.running = state.thread.is_some();
    }

    /// The base is going, and so does the thread.
    pub(super) fn end(&self) {
        let mut state = self.state.lock();
        state.ended = true;
        state.open.clear();
        self.called.notify_one();
        let thread = state.thread.take();
        drop(state);
        // It may be the thread itself that used the base last.
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }

    /// Waits until something was found.
    #[cfg(test)]
    pub(super) fn await_found(&self) {
        while self.state.lock().found.is_empty() {
            std::thread::yield_now();
        }
    }

    fn run(&self) {
        while let Some((dir, listing, entry)) = self.next() {
            // What cannot be read now is asked for again by whoever wants it.
            let found = dir.read_ahead(&listing.entries()[entry], MAX_DIR);
            if let Ok(Some((ino, found))) = found {
                self.keep(ino, found);
            }
        }
    }

    /// The next directory to read: where it is, and which entry. None if there was none for a while; then nothing is kept any more.
    fn next(&self) -> Option<(Arc<BaseInode>, Arc<Listing>, usize)> {
        let mut state = self.state.lock();
        while !state.ended {
            if state.entries < MAX_ENTRIES
                && let Some(next) = state.next()
            {
                return Some(next);
            }
            if self.called.wait_for(&mut state, PATIENCE).timed_out() {
                break;
            }
        }
        *state = State {
            ended: state.ended,
            thread: state.thread.take(),
            ..State::default()
        };
        None
    }

    fn keep(&self, dir: Ino, found: Found) {
        let mut state = self.state.lock();
        state.entries += found.weight();
        if let Some(before) = state.found.insert(dir, found) {
            state.entries -= before.weight();
        }
    }
}

impl State {
    fn next(&mut self) -> Option<(Arc<BaseInode>, Arc<Listing>, usize)> {
        while let Some(open) = self.open.last_mut() {
            let left = open.listing.entries()[open.done..].iter();
            if let Some(skipped) = left.clone().position(ListEntry::is_dir) {
                open.done += skipped + 1;
                return Some((
                    Arc::clone(&open.dir),
                    Arc::clone(&open.listing),
                    open.done - 1,
                ));
            }
            self.open.pop();
        }
        None
    }
}

impl Found {
    fn weight(&self) -> usize {
        self.listing.entries().len() + 1
    }
}
