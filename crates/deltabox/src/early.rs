//! Processes of a fork that are born before anybody asks for it: copies of a template that wait in a blank sandbox.
//!
//! They have nothing yet of what a process of a sandbox consists of but its number and its memory, so they do not grow old.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::container::Container;

/// How long one may take to end.
const END: Duration = Duration::from_secs(5);
/// Between two looks at whether it has.
const PAUSE: Duration = Duration::from_micros(50);

/// Those of a sandbox, by their numbers inside.
#[derive(Default)]
pub(crate) struct EarlyBirths(Mutex<BTreeMap<i32, Birth>>);

struct Birth {
    /// The number of its template.
    template: u64,
    host: i32,
    pidfd: OwnedFd,
}

impl Birth {
    /// Readable when it has ended, hung up when init has waited for it, too (Linux 6.9).
    fn is(&self, state: PollFlags) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().contains(state)
    }
}

impl EarlyBirths {
    /// Notes one: its numbers inside and outside, and that of the template that it is a copy of.
    pub(crate) fn add(&self, pid: i32, host: i32, template: u64) -> io::Result<()> {
        let process = Pid::from_raw(host).ok_or(Errno::SRCH)?;
        let pidfd = pidfd_open(process, PidfdFlags::empty())?;
        let birth = Birth {
            template,
            host,
            pidfd,
        };
        self.0.lock().insert(pid, birth);
        Ok(())
    }

    /// Takes one up, which belongs to the caller then: its number outside.
    pub(crate) fn take(&self, pid: i32, template: u64) -> Option<i32> {
        let mut births = self.0.lock();
        births.get(&pid).filter(|b| b.template == template)?;
        let birth = births.remove(&pid)?;
        (!birth.is(PollFlags::IN)).then_some(birth.host)
    }

    /// Ends those that are not `wanted`, given a number inside and the template's. Returns how many are left, and how many were ended.
    pub(crate) fn select(
        &self,
        container: &Container,
        wanted: impl Fn(i32, u64) -> bool,
    ) -> io::Result<(usize, usize)> {
        let mut births = self.0.lock();
        let all = std::mem::take(&mut *births).into_iter();
        let (kept, ended): (BTreeMap<_, _>, BTreeMap<_, _>) =
            all.partition(|(pid, birth)| wanted(*pid, birth.template));
        let left = kept.len();
        *births = kept;
        drop(births);
        for birth in ended.values() {
            // One that has ended already is as good as ended.
            let _ = pidfd_send_signal(&birth.pidfd, Signal::KILL);
        }
        let begun = Instant::now();
        for birth in ended.values() {
            // Until init has waited for it, it has its number.
            while !birth.is(PollFlags::HUP) {
                if begun.elapsed() > END {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                container.sync()?;
                std::thread::sleep(PAUSE);
            }
        }
        Ok((left, ended.len()))
    }
}
