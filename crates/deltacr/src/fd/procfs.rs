//! Files of `/proc` that are about one process, or about one thread of it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::guise::StandIn;
use super::model::{Descriptors, Kind, Object};
use super::path;
use super::restore::Restore;
use crate::birth::spawn;
use crate::env::{Environment, Namespace};
use crate::ids::InnerPid;
use crate::image::INIT;
use crate::remote::Remote;
use crate::sys::process;

/// What the kernel adds to names that are gone.
pub(crate) const DELETED: &[u8] = b" (deleted)";

/// Where the kernel shows itself.
pub(crate) const SHOWN: [&[u8]; 2] = [b"/proc/", b"/sys/"];
/// `CAP_DAC_OVERRIDE`, `CAP_DAC_READ_SEARCH` and `CAP_SYS_PTRACE`: what may be needed to open files that are about processes.
const OPENING: u64 = 1 << 1 | 1 << 2 | 1 << 19;

/// Files of `/proc/PID` that go on showing an address space which the process has given up (`execve`).
const OF_MEMORY: [&[u8]; 9] = [
    b"auxv",
    b"clear_refs",
    b"environ",
    b"maps",
    b"mem",
    b"numa_maps",
    b"pagemap",
    b"smaps",
    b"smaps_rollup",
];

/// A path below `/proc` of which only the kernel knows whether it is still about somebody: `/proc/PID/entry` or
/// `/proc/PID/task/TID/entry`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct About<'a> {
    process: InnerPid,
    thread: Option<InnerPid>,
    /// With the slash before it; empty for the directory itself.
    entry: &'a [u8],
    /// Whether whom it is about has ended, so that nothing can be read any more.
    ended: bool,
}

impl<'a> About<'a> {
    pub(crate) fn of(path: &'a [u8]) -> Option<Self> {
        let living = path.strip_suffix(DELETED);
        let rest = living.unwrap_or(path).strip_prefix(b"/proc/")?;
        let (process, rest) = number(rest)?;
        let in_thread = rest.strip_prefix(b"/task/").and_then(number);
        let (thread, entry) = match in_thread {
            Some((thread, entry)) => (Some(thread), entry),
            None => (None, rest),
        };
        Some(Self {
            process,
            thread,
            entry,
            ended: living.is_some(),
        })
    }

    /// Whether it is about one of these processes, or about nobody who could be another by now.
    fn stays(&self, kept: impl Fn(InnerPid) -> bool) -> bool {
        self.ended || self.process == INIT || kept(self.process)
    }

    /// Whether it shows the address space that the process had when it was opened.
    fn is_of_memory(&self) -> bool {
        let name = self.entry.strip_prefix(b"/").unwrap_or_default();
        OF_MEMORY.contains(&name)
    }

    /// Whether it tells of a descriptor, which must be there to be told of.
    pub(crate) fn is_of_descriptor(&self) -> bool {
        let directories = [&b"/fd/"[..], b"/fdinfo/"];
        directories.iter().any(|name| self.entry.starts_with(name))
    }

    /// The path of an entry of somebody else.
    fn path_in(&self, process: InnerPid, thread: Option<InnerPid>, entry: &[u8]) -> Vec<u8> {
        let thread = thread.map_or_else(String::new, |tid| format!("/task/{tid}"));
        let mut path = format!("/proc/{process}{thread}").into_bytes();
        path.extend_from_slice(entry);
        path
    }

    /// Opens the entry of one that is there for a moment; another one of it where it never had that.
    fn open_in(
        &self,
        env: &dyn Environment,
        (process, thread): (InnerPid, Option<InnerPid>),
        flags: i32,
    ) -> io::Result<OwnedFd> {
        let any: &[u8] = match flags & libc::O_DIRECTORY {
            0 => b"/stat",
            _ => b"",
        };
        let opened = open(env, &self.path_in(process, thread, self.entry), flags);
        match opened {
            Err(e) if is_missing(&e) => open(env, &self.path_in(process, thread, any), flags),
            opened => opened,
        }
    }

    /// Opens it of `remote`, with another thread if it is about one that the process does not have.
    fn open_of(
        &self,
        env: &dyn Environment,
        remote: &mut Remote,
        flags: i32,
    ) -> io::Result<OwnedFd> {
        let process = remote.host().inner()?;
        match self.thread {
            None => self.open_in(env, (process, None), flags),
            Some(thread) if thread == self.process => {
                self.open_in(env, (process, Some(process)), flags)
            }
            Some(thread) => {
                env.set_next_pid(thread)?;
                let thread = spawn::any_thread(remote)?;
                let opened = self.open_in(env, (process, Some(thread.tid)), flags);
                spawn::end_thread(remote, thread.host)?;
                opened
            }
        }
    }
}

/// The number that a path begins with, and what comes behind it.
fn number(path: &[u8]) -> Option<(InnerPid, &[u8])> {
    let end = path.iter().position(|byte| *byte == b'/');
    let (number, rest) = path.split_at(end.unwrap_or(path.len()));
    let number = std::str::from_utf8(number).ok()?.parse().ok()?;
    (number > 0).then_some((InnerPid(number), rest))
}

/// Whether what a path leads to is about the same process before and after a rollback that keeps the processes that `kept` names.
/// One that was made again is another one, whatever its number.
pub(crate) fn stays(path: &[u8], kept: impl Fn(InnerPid) -> bool) -> bool {
    About::of(path).is_none_or(|about| about.stays(kept))
}

/// The same of an open file.
pub(crate) fn stays_open(path: &[u8], kept: impl Fn(InnerPid) -> bool) -> bool {
    About::of(path).is_none_or(|about| about.stays(kept) && !about.is_of_memory())
}

/// Opens what the kernel shows of itself as one of the sandbox's processes would: some of it is about the namespaces of who opens it,
/// and some tells more to one with more rights (where the kernel is in memory).
fn open(env: &dyn Environment, path: &[u8], flags: i32) -> io::Result<OwnedFd> {
    if !SHOWN.iter().any(|root| path.starts_with(root)) {
        return path::open(env, path, flags);
    }
    let net = env.namespace(Namespace::Net)?;
    let ipc = env.namespace(Namespace::Ipc)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            process::enter(net.as_fd())?;
            process::enter(ipc.as_fd())?;
            process::keep_capabilities(OPENING)?;
            path::open(env, path, flags)
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The process and the thread that a path is about, if they have not ended.
pub(crate) fn told_of(path: &[u8]) -> impl Iterator<Item = InnerPid> {
    let living = About::of(path).filter(|about| !about.ended);
    living
        .into_iter()
        .flat_map(|about| about.thread.into_iter().chain([about.process]))
}

fn is_missing(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

/// The path of an open file with this inode number, marked as gone if whom it is about has ended. The kernel marks directories only, and
/// what is about a network whenever somebody has looked for it since.
pub(crate) fn mark_ended(env: &dyn Environment, path: Vec<u8>, ino: u64) -> Vec<u8> {
    let mut path = match path.strip_suffix(DELETED) {
        Some(living) => living.to_vec(),
        None => path,
    };
    let there = path::open(env, &path, libc::O_PATH | libc::O_NOFOLLOW);
    let there = there.and_then(|file| Ok(rustix::fs::fstat(file)?));
    if !there.is_ok_and(|stat| stat.st_ino == ino) {
        path.extend_from_slice(DELETED);
    }
    path
}

impl Descriptors {
    /// The processes and threads that open files of `/proc` are about, and those that open files signal.
    pub(crate) fn told_of(&self) -> impl Iterator<Item = InnerPid> {
        self.objects.iter().flat_map(|object| {
            let path = match &object.kind {
                Kind::Path { path } => path.as_slice(),
                _ => &[],
            };
            let owner = object.owner.map(|owner| InnerPid(owner.id));
            told_of(path).chain(owner)
        })
    }
}

impl Restore<'_, '_> {
    /// A file by its path. What `/proc` had of one that has ended is opened with one of the same number, or with another if that is
    /// taken, there for a moment.
    pub(super) fn open_path(&mut self, path: &[u8], object: &Object) -> io::Result<OwnedFd> {
        let about = About::of(path);
        if let Some(about) = about.filter(|about| about.ended) {
            return self.open_of_ended(about, object);
        }
        match (open(self.env, path, object.flags), about) {
            // It ended while the checkpoint was taken, or is a zombie, of which most cannot be opened any more.
            (Err(e), Some(about)) => self.open_of_ended(about, object).map_err(|_| e),
            (opened, _) => opened,
        }
    }

    fn open_of_ended(&mut self, about: About<'_>, object: &Object) -> io::Result<OwnedFd> {
        let other_thread = about.thread.is_some_and(|thread| thread != about.process);
        if other_thread && let Some(process) = self.procs.get_mut(&about.process) {
            return about.open_of(self.env, process, object.flags);
        }
        let mut stand_in = StandIn::any(self.procs, self.env, object.home.0, about.process)?;
        let opened = about.open_of(self.env, &mut stand_in.remote, object.flags);
        stand_in.end(self.procs)?;
        opened
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(process: i32, thread: Option<i32>, entry: &[u8], ended: bool) -> About<'_> {
        About {
            process: InnerPid(process),
            thread: thread.map(InnerPid),
            entry,
            ended,
        }
    }

    #[test]
    fn a_path_is_about_a_process_or_a_thread() {
        let of = |path: &'static str| About::of(path.as_bytes());
        assert_eq!(of("/proc/7"), Some(about(7, None, b"", false)));
        assert_eq!(of("/proc/7 (deleted)"), Some(about(7, None, b"", true)));
        let status = about(7, None, b"/status", true);
        assert_eq!(of("/proc/7/status (deleted)"), Some(status));
        assert_eq!(of("/proc/7/task"), Some(about(7, None, b"/task", false)));
        let thread = about(7, Some(9), b"/status", false);
        assert_eq!(of("/proc/7/task/9/status"), Some(thread));
        for other in ["/proc/net/tcp", "/proc/0/x", "/proc/7x", "/proc", "/sys/7"] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn what_tells_of_a_descriptor_is_known() {
        for (path, is) in [
            ("/proc/7/fdinfo/3", true),
            ("/proc/7/task/8/fd/3", true),
            ("/proc/7/fd", false),
            ("/proc/7/status", false),
        ] {
            assert_eq!(About::of(path.as_bytes()).unwrap().is_of_descriptor(), is);
        }
    }
}
