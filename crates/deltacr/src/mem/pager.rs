//! Giving pages back to a process that runs already: at once what it waits for, and all others in order.
//!
//! A thread waits for what the process touches, and meanwhile, from when it is told that the process runs, goes through all that is
//! outstanding: first what was touched after
//! earlier rollbacks to the same state, in that order, then the rest in order of addresses. It depends on nothing
//! but the page store: no lock that others hold for long, no file, nothing that the process could hold. The kernel itself sees to it
//! that a page is put only where none is and where the process has not mapped something else.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::mem::PAGE;
use crate::mem::outstanding::{Outstanding, Part};
use crate::mem::touched::Touched;
use crate::store::PageMap;
use crate::sys::arena::PageBytes;
use crate::sys::uffd::{self, Event};

/// Zero pages that are put at most for one that somebody waits for.
const ZEROS: u64 = 16 * PAGE;
/// Before what the kernel has no memory for, or is about to tell of, is tried again.
const PAUSE: Duration = Duration::from_millis(1);

/// Serves the missing pages of a process and of the children that it forks. Dropped, it first gives back all that is outstanding.
#[derive(Debug)]
pub(crate) struct Pager {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    work: Mutex<Work>,
    /// Pages that nobody waits for are given back, too.
    eager: AtomicBool,
    ending: AtomicBool,
    /// Readable from when one of these is set.
    wake: OwnedFd,
}

#[derive(Debug)]
struct Work {
    pages: PageMap,
    /// The process itself, then its children.
    spaces: Vec<Space>,
}

/// One address space.
#[derive(Debug)]
struct Space {
    uffd: Arc<OwnedFd>,
    outstanding: Outstanding,
    /// Addresses that somebody waits for.
    awaited: Vec<u64>,
    /// Pages that are likely to be touched next.
    likely: std::vec::IntoIter<u64>,
    /// Where to go on after those.
    next: u64,
    /// Where what is touched is noted, if it is to be.
    touched: Option<Touched>,
}

impl Pager {
    /// Begins to serve who waits for pages of these ranges, which are registered with the descriptor and empty. Notes what is
    /// touched.
    pub(crate) fn start(
        uffd: OwnedFd,
        ranges: &[Range<u64>],
        pages: PageMap,
        touched: Touched,
    ) -> io::Result<Self> {
        let space = Space {
            uffd: Arc::new(uffd),
            outstanding: Outstanding::of(ranges),
            awaited: Vec::new(),
            likely: touched.order().into_iter(),
            next: 0,
            touched: Some(touched),
        };
        let shared = Arc::new(Shared {
            work: Mutex::new(Work {
                pages,
                spaces: vec![space],
            }),
            eager: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let thread = {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name("deltacr pager".to_owned());
            thread.spawn(move || shared.run())?
        };
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Begins to give back what nobody waits for: the process runs.
    pub(crate) fn begin(&self) {
        self.shared.eager.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // An event counter takes eight bytes until it overflows, which two writes do not make it.
        let _ = rustix::io::write(&self.shared.wake, &1_u64.to_ne_bytes());
    }

    /// Gives back all that is outstanding, and ends the serving: what is missing then is zero. The process may be running.
    ///
    /// A child that is being made meanwhile misses nothing, either: while the kernel copies memory with missing pages, it refuses to take
    /// any of them, and so does not come to an end of this, until it has told of the child.
    fn stop(&mut self) {
        while self.shared.turn(true) {}
        self.shared.ending.store(true, Ordering::Release);
        self.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("serving missing pages failed");
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop();
        }
    }
}

impl Shared {
    fn run(&self) {
        while !self.ending.load(Ordering::Acquire) {
            if !self.turn(self.eager.load(Ordering::Acquire)) {
                self.sleep();
            }
        }
    }

    /// Does what is most urgent; if `eager`, what nobody waits for, too. `false` if there is no more to do.
    fn turn(&self, eager: bool) -> bool {
        let (busy, stuck) = {
            let mut work = self.work.lock();
            let stuck = work.turn(eager);
            (work.is_busy(eager), stuck)
        };
        if stuck {
            std::thread::sleep(PAUSE);
        }
        busy
    }

    /// Until somebody waits for a page.
    fn sleep(&self) {
        let uffds: Vec<_> = {
            let work = self.work.lock();
            work.spaces.iter().map(|s| Arc::clone(&s.uffd)).collect()
        };
        let uffds = uffds.iter().map(|uffd| PollFd::new(uffd, PollFlags::IN));
        let mut fds: Vec<_> = uffds.collect();
        fds.push(PollFd::new(&self.wake, PollFlags::IN));
        let _ = poll(&mut fds, None);
        // Whoever woke it has set what it is woken for.
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
    }
}

impl Work {
    /// Reads what is told, serves who waits, and, if `eager`, gives back one part more. Tells whether the kernel refused for the moment.
    fn turn(&mut self, eager: bool) -> bool {
        let mut born = Vec::new();
        let mut stuck = false;
        self.spaces.retain_mut(|space| {
            space.listen(&mut born);
            match space.serve(&self.pages, eager) {
                Ok(()) => true,
                Err(Errno::SRCH) => {
                    space.abandon();
                    true
                }
                Err(e) => {
                    tracing::trace!("giving pages back: {e}");
                    stuck = true;
                    true
                }
            }
        });
        self.spaces.append(&mut born);
        stuck
    }

    fn is_busy(&self, eager: bool) -> bool {
        let busy = |s: &Space| eager && !s.outstanding.is_empty() || !s.awaited.is_empty();
        self.spaces.iter().any(busy)
    }
}

impl Space {
    fn listen(&mut self, born: &mut Vec<Self>) {
        while let Ok(Some(event)) = uffd::next_event(self.uffd.as_fd()) {
            match event {
                Event::Missing(address) => self.awaited.push(address / PAGE * PAGE),
                // What the parent has been given since is missed by the child as well: it was copied before.
                Event::Forked(uffd) => born.push(Self {
                    uffd: Arc::new(uffd),
                    outstanding: self.outstanding.clone(),
                    awaited: Vec::new(),
                    likely: Vec::new().into_iter(),
                    next: 0,
                    touched: None,
                }),
                Event::Moved { from, to, len } => self.outstanding.relocate(from, to, len),
                Event::Removed(range) => self.outstanding.remove(&range),
            }
        }
    }

    /// Serves who waits; then, if `eager`, gives back one part more.
    fn serve(&mut self, pages: &PageMap, eager: bool) -> Result<(), Errno> {
        while let Some(&address) = self.awaited.last() {
            match self.outstanding.around(address) {
                Some(part) => {
                    self.touched
                        .iter()
                        .for_each(|touched| touched.note(part.page));
                    self.give(&part, pages)?;
                    self.next = part.range.end;
                }
                None => self.zero(address)?,
            }
            self.awaited.pop();
        }
        if eager && let Some(part) = self.due() {
            self.give(&part, pages)?;
        }
        Ok(())
    }

    /// What to give back next: what is likely to be touched, but not what the process has moved elsewhere; then the rest.
    fn due(&mut self) -> Option<Part> {
        let outstanding = &self.outstanding;
        let likely = self.likely.find_map(|page| {
            let part = outstanding.around(page * PAGE)?;
            (part.page == page).then_some(part)
        });
        likely.or_else(|| {
            let part = self.outstanding.next(self.next)?;
            self.next = part.range.end;
            Some(part)
        })
    }

    /// The address space is gone, with all who waited.
    fn abandon(&mut self) {
        self.outstanding = Outstanding::default();
        self.awaited.clear();
    }

    /// Puts the pages of a part that the map holds. The others are zero, for whoever asks.
    fn give(&mut self, part: &Part, pages: &PageMap) -> Result<(), Errno> {
        let count = (part.range.end - part.range.start) / PAGE;
        let held = pages.pages(part.page..part.page + count);
        let mut run: (u64, Vec<&PageBytes>) = (0, Vec::new());
        for (page, bytes) in held {
            let at = part.range.start + (page - part.page) * PAGE;
            if at != run.0 + run.1.len() as u64 * PAGE {
                self.put(run.0, &run.1)?;
                run = (at, Vec::new());
            }
            run.1.push(bytes);
        }
        self.put(run.0, &run.1)?;
        self.outstanding.remove(&part.range);
        // One that waits for a page that was there already, or is none of the map's, asks again.
        let _ = uffd::wake(self.uffd.as_fd(), &part.range);
        Ok(())
    }

    fn put(&self, at: u64, pages: &[&PageBytes]) -> Result<(), Errno> {
        let mut done = 0;
        while done < pages.len() {
            let to = at + done as u64 * PAGE;
            let (put, refused) = uffd::put(self.uffd.as_fd(), to, &pages[done..]);
            done += put;
            match refused {
                None => {}
                // There already, or something else is mapped there by now; or the run ends in another mapping.
                Some(Errno::EXIST) => done += 1,
                Some(Errno::NOENT | Errno::INVAL | Errno::FAULT) if put == 0 => {
                    let here = at + done as u64 * PAGE;
                    match uffd::put(self.uffd.as_fd(), here, &pages[done..=done]).1 {
                        Some(e @ (Errno::AGAIN | Errno::NOMEM | Errno::SRCH)) => return Err(e),
                        _ => done += 1,
                    }
                }
                Some(Errno::NOENT | Errno::INVAL | Errno::FAULT) => {}
                Some(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Puts zeros where somebody waits and nothing is outstanding, and on the next pages too.
    fn zero(&self, address: u64) -> Result<(), Errno> {
        let next = self.outstanding.next(address);
        let limit = next.map_or(u64::MAX, |part| part.range.start);
        let mut range = address..address.saturating_add(ZEROS);
        if limit > address {
            range.end = range.end.min(limit);
        }
        let one = address..address + PAGE;
        let uffd = self.uffd.as_fd();
        let put = uffd::put_zeros(uffd, &range).or_else(|_| uffd::put_zeros(uffd, &one));
        match put {
            Err(e @ (Errno::AGAIN | Errno::NOMEM | Errno::SRCH)) => Err(e),
            _ => {
                let _ = uffd::wake(uffd, &one);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_touched_after_an_earlier_rollback_comes_first_and_the_rest_in_order() {
        const MIB: u64 = 256;
        let touched = Touched::default();
        // The middle, the end, what is not outstanding this time, and the beginning, which is in the middle of a block.
        for page in [3 * MIB, 5 * MIB - 64, 9 * MIB, MIB + 7] {
            touched.note(page);
        }
        let range = (MIB + 7) * PAGE..5 * MIB * PAGE;
        let mut space = Space {
            uffd: Arc::new(uffd::of_this_process().unwrap()),
            outstanding: Outstanding::of(std::slice::from_ref(&range)),
            awaited: Vec::new(),
            likely: touched.order().into_iter(),
            next: 0,
            touched: Some(touched),
        };
        let mut given = Vec::new();
        while let Some(part) = space.due() {
            space.outstanding.remove(&part.range);
            given.push(part.page);
        }
        assert_eq!(
            given[..5],
            [3 * MIB, 5 * MIB - 64, MIB + 7, MIB + 64, MIB + 128]
        );
        assert_eq!(given.len(), 16);
    }
}
