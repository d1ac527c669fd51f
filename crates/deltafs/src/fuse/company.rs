//! Keeping the thread that serves on the processor of those whom it serves.
//!
//! Whoever shares a processor with the server hands over to it and back; on two processors each request wakes one that sleeps, twice,
//! which takes several times as long in a virtual machine. The scheduler leaves them together where it finds them together, and apart
//! where it finds them apart; but where nothing else runs it may part them again. There the server looks for the next request for a moment
//! before it sleeps, which spares one of the two.

use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// After how many requests the thread looks where its caller is: first,
const FIRST: u32 = 16;
/// and from then on. It takes as long as one request.
const USUAL: u32 = 64;
/// Where going there does not help, it is done less and less often: this many times half as often.
const MAX_PATIENCE: u32 = 6;

/// So many times in a row apart, the thread lingers,
const APART: u32 = 2;
/// at most this long.
const LINGER: Duration = Duration::from_micros(50);
/// If it comes to run again only after this long, something else wants the processor.
const ROBBED: Duration = Duration::from_micros(15);

/// Where a thread and its callers are.
#[derive(Debug)]
pub(super) struct Company {
    /// Requests until the next look.
    left: u32,
    /// How many times in a row a caller was elsewhere.
    apart: u32,
    /// How many times in a row it lingered in vain.
    missed: u32,
    /// How many times more it does not linger.
    pause: u32,
}

impl Default for Company {
    fn default() -> Self {
        Self {
            left: FIRST,
            apart: 0,
            missed: 0,
            pause: 0,
        }
    }
}

impl Company {
    /// Every now and then, goes to the processor where this thread of another process ran last; it waits there.
    pub(super) fn join(&mut self, caller: u32) {
        self.left -= 1;
        if self.left > 0 {
            return;
        }
        let there = processor(caller).filter(|there| *there != sched_getcpu());
        self.apart = there.map_or(0, |_| self.apart + 1);
        self.left = USUAL << self.apart.saturating_sub(1).min(MAX_PATIENCE);
        there.into_iter().for_each(go);
    }

    /// Looks for the next request for a moment, if that may spare being woken. Where it does not, less and less often.
    pub(super) fn linger(&mut self, is_there: impl Fn() -> bool) {
        if self.apart < APART {
            return;
        }
        if self.pause > 0 {
            self.pause -= 1;
            return;
        }
        let begun = Instant::now();
        let mut before = begun;
        while !is_there() {
            let now = Instant::now();
            if now - begun > LINGER || now - before > ROBBED {
                self.missed = (self.missed + 1).min(MAX_PATIENCE);
                self.pause = 1 << self.missed;
                return;
            }
            before = now;
        }
        self.missed = 0;
    }
}

/// The processor on which a thread ran last; none if it is not known.
fn processor(thread: u32) -> Option<usize> {
    let mut stat = [0; 1024];
    let mut file = File::open(format!("/proc/{thread}/stat")).ok()?;
    let len = file.read(&mut stat).ok()?;
    parse_processor(&stat[..len])
}

/// Takes the field `processor` out of what `/proc/PID/stat` tells.
fn parse_processor(stat: &[u8]) -> Option<usize> {
    /// Its place after the name, which may hold anything.
    const FIELD: usize = 36;
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(name_end + 2..)?).ok()?;
    rest.split(' ').nth(FIELD)?.parse().ok()
}

/// Goes to a processor, without having to stay.
fn go(there: usize) {
    let Ok(allowed) = sched_getaffinity(None) else {
        return;
    };
    if there < CpuSet::MAX_CPU && allowed.is_set(there) {
        let mut only = CpuSet::new();
        only.set(there);
        // That it cannot go only makes it slower.
        let _ = sched_setaffinity(None, &only);
        let _ = sched_setaffinity(None, &allowed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_found_behind_any_name() {
        let stat = b"12 (a) 1 (b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 \
            32 33 34 35 7 0";
        assert_eq!(parse_processor(stat), Some(7));
        assert_eq!(parse_processor(b"12 (a"), None);
        assert_eq!(parse_processor(b"12 (a)"), None);
        let known = processor(std::process::id()).unwrap();
        assert!(sched_getaffinity(None).unwrap().is_set(known));
    }

    #[test]
    fn it_lingers_where_callers_are_elsewhere_and_only_as_long_as_that_helps() {
        let looks = std::cell::Cell::new(0);
        let look = |found: bool| {
            looks.set(looks.get() + 1);
            found
        };
        let mut company = Company::default();
        company.linger(|| look(true));
        assert_eq!(looks.get(), 0, "together, it does not");
        company.apart = APART;
        company.linger(|| look(true));
        assert_eq!((looks.get(), company.missed), (1, 0));
        company.linger(|| look(false));
        let before = looks.get();
        (0..2).for_each(|_| company.linger(|| look(true)));
        assert_eq!(
            looks.get(),
            before,
            "after it was in vain, it does not twice"
        );
        company.linger(|| look(true));
        assert_eq!((looks.get(), company.missed), (before + 1, 0));
    }

    #[test]
    fn a_caller_that_is_always_elsewhere_is_looked_for_less_and_less() {
        let allowed = sched_getaffinity(None).unwrap();
        let mut company = Company::default();
        (0..FIRST).for_each(|_| company.join(u32::MAX));
        assert_eq!((company.left, company.apart), (USUAL, 0));
        for apart in 1..20 {
            company.apart = apart;
            company.left = 1;
            company.join(std::process::id());
            assert!(company.left <= USUAL << MAX_PATIENCE);
        }
        assert_eq!(sched_getaffinity(None).unwrap(), allowed);
    }
}
