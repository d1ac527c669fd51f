//! Capture: what a stopped tree has open.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;

use super::Procs;
use super::model::{Descriptors, Kind, Lock, LockKind, Object, Owner, Slot};
use super::table::{self, FileId, ProcFds, RawSlot};
use super::{event, fdinfo::LockClass, pipe, tty};
use crate::env::Environment;
use crate::error::{During, Error, Result};
use crate::ids::HostPid;
use crate::remote::Remote;
use crate::sys;

/// The descriptor by which an object is looked at.
pub(crate) struct Holder<'a> {
    pub(crate) remote: &'a Remote,
    pub(crate) fds: &'a ProcFds,
    pub(crate) raw: &'a RawSlot,
}

impl Holder<'_> {
    /// A duplicate, to be closed before the tree runs again.
    pub(crate) fn take(&self) -> Result<OwnedFd> {
        let doing = || format!("duplicating descriptor {}", self.raw.fd);
        self.remote
            .take_fd(self.raw.fd)
            .during(self.remote.pid(), &doing())
    }

    /// The refusal of what the descriptor is: "an io_uring".
    pub(crate) fn refuse(&self, what: impl std::fmt::Display) -> Error {
        Error::Unsupported {
            pid: self.remote.pid(),
            name: table::name_of(self.remote.host()),
            what: format!("descriptor {} is {what}", self.raw.fd),
        }
    }

    /// Adds what was attempted to a failed call's error.
    pub(crate) fn during<T, E: Into<std::io::Error>>(
        &self,
        result: std::result::Result<T, E>,
        doing: &str,
    ) -> Result<T> {
        let doing = || format!("{doing} behind descriptor {}", self.raw.fd);
        result
            .map_err(Into::into)
            .during(self.remote.pid(), &doing())
    }

    pub(crate) fn link(&self) -> Result<Vec<u8>> {
        self.during(self.fds.link(self.raw.fd), "reading the name of the file")
    }

    /// `open(2)` flags of the object. Close-on-exec is the slot's, and large every file is here.
    pub(crate) fn flags(&self) -> i32 {
        self.raw.info.flags & !(libc::O_CLOEXEC | LARGE)
    }
}

/// `O_LARGEFILE` as 64-bit kernels have it; libc's constant is zero.
const LARGE: i32 = 0o100000;

/// Slots in which the same object may be: equal where an object's slots must be.
type Likeness = (FileIdKey, i32, u64);
type FileIdKey = (u64, u64);

/// Reads what the processes have open. Every process must be stopped, and stay so.
///
/// # Errors
/// [`Error::Unsupported`] for what cannot be carried. Nothing is changed in any case, and no duplicate of a
/// descriptor is left open. Rests on `/proc/PID/fdinfo`, `kcmp(2)` and `pidfd_getfd(2)`.
pub fn capture(procs: &Procs<'_>, env: &dyn Environment) -> Result<Descriptors> {
    let mut capture = Capture {
        env,
        image: Descriptors::default(),
        pipes: HashMap::new(),
        likely: HashMap::new(),
        firsts: Vec::new(),
    };
    for remote in procs.values() {
        capture.process(remote)?;
    }
    let mut image = capture.image;
    pipe::read_all(&mut image, procs)?;
    Ok(image)
}

/// A capture under way.
pub(crate) struct Capture<'a> {
    pub(crate) env: &'a dyn Environment,
    pub(crate) image: Descriptors,
    /// Indices of the pipes by inode.
    pub(crate) pipes: HashMap<u64, usize>,
    likely: HashMap<Likeness, Vec<usize>>,
    /// For each object a slot in which it is, as `kcmp` wants it.
    firsts: Vec<(HostPid, i32)>,
}

impl Capture<'_> {
    fn process(&mut self, remote: &Remote) -> Result<()> {
        let (pid, host) = (remote.pid(), remote.host());
        let fds = ProcFds::open(host).during(pid, "opening the descriptor table")?;
        let raws = fds.slots().during(pid, "reading the descriptor table")?;
        let mut slots = BTreeMap::new();
        for raw in &raws {
            let holder = Holder {
                remote,
                fds: &fds,
                raw,
            };
            let object = self.object(&holder)?;
            let cloexec = raw.info.flags & libc::O_CLOEXEC != 0;
            slots.insert(raw.fd, Slot { object, cloexec });
        }
        self.image.tables.insert(pid, slots);
        Ok(())
    }

    /// The object behind a slot: one that is known already, or a new one.
    fn object(&mut self, holder: &Holder<'_>) -> Result<usize> {
        let FileId { dev, ino, .. } = holder.raw.file;
        let likeness = ((dev, ino), holder.flags(), holder.raw.info.pos);
        let here = (holder.remote.host(), holder.raw.fd);
        let slot = (holder.remote.pid(), holder.raw.fd);
        for &known in self.likely.get(&likeness).into_iter().flatten() {
            let same = sys::fd::same_file(self.firsts[known], here);
            if holder.during(same, "comparing the file")? {
                self.image.objects[known].slots.push(slot);
                self.locks(holder, known)?;
                return Ok(known);
            }
        }
        let kind = self.kind(holder)?;
        let object = self.image.objects.len();
        self.image.objects.push(Object {
            kind,
            flags: holder.flags(),
            pos: holder.raw.info.pos,
            owner: owner(holder)?,
            locks: Vec::new(),
            slots: vec![slot],
        });
        self.firsts.push(here);
        self.likely.entry(likeness).or_default().push(object);
        self.locks(holder, object)?;
        Ok(object)
    }

    fn kind(&mut self, holder: &Holder<'_>) -> Result<Kind> {
        let file = &holder.raw.file;
        let on_fs = file.dev == self.env.fs_device();
        let by_path = holder.flags() & libc::O_PATH != 0;
        match file.format() {
            _ if on_fs && by_path => Ok(Kind::File { ino: file.ino }),
            libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK if on_fs => {
                Ok(Kind::File { ino: file.ino })
            }
            _ if by_path => self.path(holder),
            libc::S_IFIFO => pipe::capture(self, holder, on_fs),
            libc::S_IFCHR => tty::capture(self, holder),
            libc::S_IFSOCK => Err(holder.refuse("a socket")),
            libc::S_IFREG | libc::S_IFDIR => self.path(holder),
            0 => event::capture(holder),
            _ => Err(holder.refuse("a file of an unknown type")),
        }
    }

    /// A file outside the versioned filesystem: carried by its path if that says it all.
    fn path(&self, holder: &Holder<'_>) -> Result<Kind> {
        let path = holder.link()?;
        let shown = String::from_utf8_lossy(&path).into_owned();
        let directory = holder.raw.file.format() == libc::S_IFDIR;
        let virtual_file = [&b"/proc/"[..], b"/sys/"]
            .iter()
            .any(|root| path.starts_with(root));
        if path.ends_with(b" (deleted)") || !path.starts_with(b"/") {
            return Err(holder.refuse(format_args!(
                "{shown}, which has no name and is not on the sandbox's filesystem"
            )));
        }
        if !directory && !virtual_file {
            return Err(holder.refuse(format_args!(
                "{shown}, a file that is not on the sandbox's filesystem"
            )));
        }
        Ok(Kind::Path { path })
    }

    fn locks(&mut self, holder: &Holder<'_>, object: usize) -> Result<()> {
        let info = &holder.raw.info;
        if info.odd_locks > 0 || info.locks.iter().any(|l| l.class == LockClass::Lease) {
            return Err(holder.refuse("a file with a lease; end it with fcntl(F_SETLEASE)"));
        }
        for line in &info.locks {
            let lock = Lock {
                class: match line.class {
                    LockClass::Posix => LockKind::Process(holder.remote.pid()),
                    LockClass::OpenFile => LockKind::OpenFile,
                    LockClass::Flock | LockClass::Lease => LockKind::Flock,
                },
                write: line.write,
                start: line.start,
                end: line.end,
            };
            let locks = &mut self.image.objects[object].locks;
            if !locks.contains(&lock) {
                locks.push(lock);
            }
        }
        Ok(())
    }
}

/// Whom the file signals. Asked only where signals are on, for it takes a duplicate.
fn owner(holder: &Holder<'_>) -> Result<Option<Owner>> {
    if holder.flags() & libc::O_ASYNC == 0 {
        return Ok(None);
    }
    Err(holder.refuse("a file that signals its owner (O_ASYNC)"))
}
