//! The cgroup v2 freezer: holds a whole tree still while its threads are seized one by one.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::ids::HostPid;
use crate::procfs;

/// How often the state is looked at before the caller goes to sleep: freezing takes 30-60 µs.
const GLANCES: usize = 30;
/// And then, between two glances. The kernel tells of a change by an event as well, but holds that back for up to 10 ms.
const NAP: Duration = Duration::from_micros(30);

/// Lets others run before the caller looks again, so many times after the first. Giving way is not enough where another
/// thread must run on the same processor: the scheduler may choose the caller again for some milliseconds.
pub(crate) fn glance(times: &mut usize) {
    *times += 1;
    if *times < GLANCES {
        std::thread::yield_now();
    } else {
        std::thread::sleep(NAP);
    }
}

/// The freezer of one cgroup.
pub(crate) struct Freezer {
    freeze: File,
    events: File,
    members: File,
}

impl Freezer {
    pub(crate) fn open(cgroup: &Path) -> io::Result<Self> {
        let freeze = File::options()
            .write(true)
            .open(cgroup.join("cgroup.freeze"))?;
        let events = File::open(cgroup.join("cgroup.events"))?;
        let members = File::open(cgroup.join("cgroup.procs"))?;
        Ok(Self {
            freeze,
            events,
            members,
        })
    }

    /// The processes of the cgroup, ascending.
    pub(crate) fn members(&mut self) -> io::Result<Vec<HostPid>> {
        let text = procfs::read_all(&self.members)?;
        let lines = text.split(|b| *b == b'\n');
        let numbers = lines.filter_map(|line| std::str::from_utf8(line).ok()?.parse().ok());
        // What is outside of the reader's pid namespace is called 0.
        let mut members: Vec<i32> = numbers.filter(|pid| *pid > 0).collect();
        members.sort_unstable();
        members.dedup();
        Ok(members.into_iter().map(HostPid).collect())
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
        let end = Instant::now() + timeout;
        let mut glances = 0;
        while !self.is_frozen()? {
            if Instant::now() >= end {
                return Ok(false);
            }
            glance(&mut glances);
        }
        Ok(true)
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
