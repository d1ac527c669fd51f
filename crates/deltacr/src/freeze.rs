//! The cgroup v2 freezer: holds a whole tree still while its threads are seized one by one.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// How often the state is looked at before the caller goes to sleep: freezing takes 30-60 µs.
const GLANCES: usize = 50;

/// The freezer of one cgroup.
pub(crate) struct Freezer {
    freeze: File,
    events: File,
}

impl Freezer {
    pub(crate) fn open(cgroup: &Path) -> io::Result<Self> {
        let freeze = File::options()
            .write(true)
            .open(cgroup.join("cgroup.freeze"))?;
        let events = File::open(cgroup.join("cgroup.events"))?;
        Ok(Self { freeze, events })
    }

    /// Freezes, and waits until everything stands still. `false` if it does not within `timeout`;
    /// then it is thawed again.
    pub(crate) fn freeze(&mut self, timeout: Duration) -> io::Result<bool> {
        self.begin()?;
        match self.await_frozen(timeout) {
            Ok(true) => Ok(true),
            other => {
                self.thaw()?;
                other
            }
        }
    }

    /// Begins to freeze.
    pub(crate) fn begin(&mut self) -> io::Result<()> {
        self.freeze.write_all(b"1")
    }

    pub(crate) fn thaw(&mut self) -> io::Result<()> {
        self.freeze.write_all(b"0")
    }

    fn await_frozen(&mut self, timeout: Duration) -> io::Result<bool> {
        for _ in 0..GLANCES {
            if self.is_frozen()? {
                return Ok(true);
            }
            std::thread::yield_now();
        }
        let end = Instant::now() + timeout;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let left = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut events = [PollFd::from_borrowed_fd(
                self.events.as_fd(),
                PollFlags::PRI,
            )];
            match poll(&mut events, Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            if self.is_frozen()? {
                return Ok(true);
            }
            if Instant::now() >= end {
                return Ok(false);
            }
        }
    }

    fn is_frozen(&mut self) -> io::Result<bool> {
        self.events.rewind()?;
        let mut text = [0; 128];
        let n = self.events.read(&mut text)?;
        Ok(text[..n]
            .split(|b| *b == b'\n')
            .any(|line| line == b"frozen 1"))
    }
}
