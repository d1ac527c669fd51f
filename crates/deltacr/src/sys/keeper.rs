//! Keeping an address space after the process that had it has ended.
//!
//! An open `/proc/PID/mem` does not keep one; a read that is under way does. So a thread of ours begins to read `/proc/PID/pagemap` into
//! a page which is missing and which nobody gives it (`userfaultfd`). As long as it waits, the kernel keeps the address space,
//! and files of `/proc/PID` that were opened in time show it, though no process is left.
//!
//! Such threads are used again: one that is started waits for its first turn on a processor, up to 3 ms where there is other work, while
//! everything in the sandbox stands still; one that is woken does not.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::ids::HostPid;
use crate::sys::arena::PAGE;
use crate::sys::uffd::{self, Event};

/// How long the reader may take until it waits.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often to look whether it has failed instead.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 10_000_000,
};

/// Keeps the address space of a process. Lets go of it when dropped, which waits until it is gone.
#[derive(Debug)]
pub(crate) struct Keeper {
    uffd: OwnedFd,
    missing: Range<u64>,
    /// How the read went, when it is over.
    outcome: Option<Receiver<io::Result<()>>>,
}

impl Keeper {
    /// Begins to keep the address space of a process, which may end from then on.
    ///
    /// # Errors
    /// The process has ended, or `userfaultfd` cannot be had.
    pub(crate) fn of(process: HostPid) -> io::Result<Self> {
        let pagemap = File::open(format!("/proc/{process}/pagemap"))?;
        let page = Page::map()?;
        let missing = page.0.clone();
        let uffd = uffd::of_this_process()?;
        uffd::register(uffd.as_fd(), &missing)?;
        let (done, outcome) = channel();
        begin(Read {
            pagemap,
            page,
            done,
        })?;
        let mut keeper = Self {
            uffd,
            missing,
            outcome: Some(outcome),
        };
        keeper.await_reader()?;
        Ok(keeper)
    }

    /// Waits until the kernel tells that the page is missed: from then on the address space is kept.
    fn await_reader(&mut self) -> io::Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            let mut fds = [PollFd::new(&self.uffd, PollFlags::IN)];
            // Whatever ends the wait, what there is to be seen is looked at.
            let _ = poll(&mut fds, Some(&LOOK));
            if let Some(Event::Missing(_)) = uffd::next_event(self.uffd.as_fd())? {
                return Ok(());
            }
            match self.outcome.as_ref().map(Receiver::try_recv) {
                Some(Err(TryRecvError::Empty)) => {}
                _ => {
                    self.outcome = None;
                    return Err(io::ErrorKind::NotFound.into());
                }
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    fn end(&mut self) -> io::Result<()> {
        // The page becomes one like any other, and the read ends.
        uffd::unregister(self.uffd.as_fd(), &self.missing)?;
        match self.outcome.take().map(|outcome| outcome.recv()) {
            None => Ok(()),
            Some(Ok(read)) => read,
            // The panic was reported when it happened.
            Some(Err(_)) => Err(io::Error::other("the thread that keeps memory failed")),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if self.outcome.is_some()
            && let Err(error) = self.end()
        {
            tracing::warn!(%error, "letting go of a snapshot");
        }
    }
}

/// Something to be read by a thread that waits for it.
struct Read {
    pagemap: File,
    page: Page,
    done: Sender<io::Result<()>>,
}

/// Threads that wait for something to read.
static IDLE: Mutex<Vec<Sender<Read>>> = Mutex::new(Vec::new());
/// The most that are kept.
const MOST_IDLE: usize = 4;

/// Gives the work to a thread.
fn begin(mut read: Read) -> io::Result<()> {
    loop {
        let Some(idle) = IDLE.lock().pop() else {
            let thread = std::thread::Builder::new().name("deltacr keep".to_owned());
            return thread.spawn(move || serve(read)).map(drop);
        };
        match idle.send(read) {
            Ok(()) => return Ok(()),
            // It has failed.
            Err(back) => read = back.0,
        }
    }
}

fn serve(mut read: Read) {
    block_signals();
    loop {
        let Read {
            pagemap,
            page,
            done,
        } = read;
        let outcome = page.read_into(&pagemap);
        drop(pagemap);
        let (turn, next) = channel();
        let mut idle = IDLE.lock();
        let stays = idle.len() < MOST_IDLE;
        if stays {
            idle.push(turn);
        }
        drop(idle);
        // Whoever is not interested any more has let go of it.
        let _ = done.send(outcome);
        match next.recv() {
            Ok(more) if stays => read = more,
            _ => return,
        }
    }
}

/// A page of this process that nothing refers to.
struct Page(Range<u64>);

impl Page {
    fn map() -> io::Result<Self> {
        // SAFETY: new memory, at an address that the kernel chooses.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = at as u64;
        Ok(Self(at..at + PAGE as u64))
    }

    /// Reads the first entry of a page map into it. No signal is handled meanwhile, which would end the read.
    fn read_into(self, pagemap: &File) -> io::Result<()> {
        // SAFETY: the page is there as long as `self` is, and nothing refers to it.
        match unsafe { libc::pread(pagemap.as_raw_fd(), self.0.start as *mut _, 8, 0) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nothing refers to it.
        unsafe { libc::munmap(self.0.start as *mut _, PAGE) };
    }
}

/// Leaves the signals of this process to its other threads.
fn block_signals() {
    // SAFETY: the set is initialized by sigfillset before it is used.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::sys::pagemap::{self, Pagemap, category};

    #[test]
    fn memory_is_there_after_its_process_as_long_as_it_is_kept_and_no_longer() {
        let mut child = Command::new("sleep")
            .arg("1000")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let host = HostPid(child.id() as i32);
        let open = |name: &str| File::open(format!("/proc/{host}/{name}")).unwrap();
        let (memory, maps) = (open("mem"), open("maps"));
        let mut scanner = Pagemap::open(host).unwrap();
        let keeper = Keeper::of(host).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!std::path::Path::new(&format!("/proc/{host}")).exists());
        let first = pagemap::mapping(&maps, 0).unwrap().unwrap();
        let mut present = || {
            let mut found = Vec::new();
            let range = first.start..first.end;
            let scanned = scanner.scan(range, category::PRESENT, 0, &mut found);
            scanned.map(|()| found.len())
        };
        let mut magic = [0; 4];
        memory.read_exact_at(&mut magic, first.start).unwrap();
        assert_eq!(&magic, b"\x7fELF");
        assert!(present().unwrap() > 0);
        drop(keeper);
        assert!(present().is_err());
        assert!(memory.read_exact_at(&mut magic, first.start).is_err());
        assert!(Keeper::of(host).is_err(), "there is no such process");
    }
}
