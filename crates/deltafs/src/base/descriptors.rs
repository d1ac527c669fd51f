//! Opening things of the base in a process that has no descriptor left: what is only kept open for later is closed, by all bases, and
//! if that does not do, a few are there that nobody else may have. So reading becomes slower then, and does not fail.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::Base;

/// Descriptors that are kept for the worst case: two are needed at a time to walk down a path.
const RESERVE: usize = 4;
/// How often to try again when others have used up what was freed,
const TRIES: u32 = 100;
/// and how long to wait in between.
const PAUSE: Duration = Duration::from_millis(2);

static BASES: Mutex<Vec<Weak<Base>>> = Mutex::new(Vec::new());
static SPARE: Mutex<Vec<OwnedFd>> = Mutex::new(Vec::new());

/// What this base keeps open can be closed from now on.
pub(super) fn register(base: &Arc<Base>) {
    let mut bases = BASES.lock();
    bases.retain(|base| base.strong_count() > 0);
    bases.push(Arc::downgrade(base));
    drop(bases);
    refill(&mut SPARE.lock());
}

/// Opens something.
pub(super) fn open(open: impl Fn() -> Result<OwnedFd, Errno>) -> Result<OwnedFd, Errno> {
    let first = open();
    if !is_for_want(&first) {
        return first;
    }
    for _ in 0..TRIES {
        close_all();
        let mut spare = SPARE.lock();
        spare.clear();
        let opened = open();
        refill(&mut spare);
        drop(spare);
        if !is_for_want(&opened) {
            return opened;
        }
        // Who uses them now is done soon, for nothing is kept open.
        std::thread::sleep(PAUSE);
    }
    open()
}

fn is_for_want(opened: &Result<OwnedFd, Errno>) -> bool {
    matches!(opened, Err(Errno::MFILE | Errno::NFILE))
}

fn close_all() {
    let bases: Vec<Arc<Base>> = BASES.lock().iter().filter_map(Weak::upgrade).collect();
    for base in bases {
        base.files.lock().let_go();
        base.dirs.lock().let_go();
    }
}

fn refill(spare: &mut Vec<OwnedFd>) {
    while spare.len() < RESERVE {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        // Without it all goes on as long as something is kept open that can be closed.
        let Ok(fd) = rustix::fs::open("/", flags, Mode::empty()) else {
            return;
        };
        spare.push(fd);
    }
}
