//! Capture: what a stopped tree has open.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};

use super::Procs;
use super::fdinfo::EpollItem;
use super::model::{Descriptors, Kind, Object, Owner, Slot};
use super::table::{self, FileId, ProcFds, RawSlot};
use super::{epoll, event, lock, pipe, socket, tty};
use crate::env::Environment;
use crate::error::{During, Error, Result};
use crate::ids::{HostPid, InnerPid};
use crate::mem::SharedObjects;
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
            name: String::new(),
            what: what.to_string(),
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

/// Reads what the processes have open, for a checkpoint. Every process must be stopped, and stay so.
///
/// The contents of memfds go to `shared`.
///
/// # Errors
/// [`Error::Unsupported`] for what cannot be carried. Nothing is changed in any case, and no duplicate of a
/// descriptor is left open. Rests on `/proc/PID/fdinfo`, `kcmp(2)` and `pidfd_getfd(2)`.
pub fn capture(
    procs: &Procs<'_>,
    env: &dyn Environment,
    shared: &SharedObjects,
) -> Result<Descriptors> {
    let image = read(procs, env, shared, true)?;
    for object in &image.objects {
        if let Kind::Refused { what } = &object.kind {
            let (pid, fd) = object.slots[0];
            return Err(Error::Unsupported {
                pid,
                name: table::name_of(procs[&pid].host()),
                what: format!("descriptor {fd} is {what}"),
            });
        }
    }
    Ok(image)
}

/// Reads what the processes have open, for a rollback: what cannot be carried is no reason not
/// to get rid of it.
///
/// # Errors
/// A process is gone or cannot be read.
pub fn survey(
    procs: &Procs<'_>,
    env: &dyn Environment,
    shared: &SharedObjects,
) -> Result<Descriptors> {
    read(procs, env, shared, false)
}

fn read(
    procs: &Procs<'_>,
    env: &dyn Environment,
    shared: &SharedObjects,
    contents: bool,
) -> Result<Descriptors> {
    let mut capture = Capture {
        env,
        shared,
        contents,
        image: Descriptors::default(),
        hosts: procs
            .values()
            .map(|remote| (remote.host(), remote.pid()))
            .collect(),
        pipes: HashMap::new(),
        epolls: Vec::new(),
        sockets: Vec::new(),
        likely: HashMap::new(),
        firsts: Vec::new(),
        inodes: Vec::new(),
    };
    for remote in procs.values() {
        capture.process(remote)?;
    }
    epoll::resolve(&mut capture, procs)?;
    socket::relate(&mut capture, procs)?;
    let mut image = capture.image;
    pipe::read_all(&mut image, procs)?;
    Ok(image)
}

/// A capture under way.
pub(crate) struct Capture<'a> {
    pub(crate) env: &'a dyn Environment,
    shared: &'a SharedObjects,
    /// Whether the contents of memfds are wanted too.
    contents: bool,
    pub(crate) image: Descriptors,
    hosts: HashMap<HostPid, InnerPid>,
    /// The epolls, by object, with what they watch.
    pub(crate) epolls: Vec<(usize, Vec<EpollItem>)>,
    /// The sockets, by object.
    pub(crate) sockets: Vec<usize>,
    /// Indices of the pipes by inode.
    pub(crate) pipes: HashMap<u64, usize>,
    /// Objects of the same likeness, in the order of `kcmp`.
    likely: HashMap<Likeness, Vec<usize>>,
    /// For each object a slot in which it is, as `kcmp` wants it.
    pub(crate) firsts: Vec<(HostPid, i32)>,
    /// For each object the number of its inode.
    pub(crate) inodes: Vec<u64>,
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
        let place = match self.place(holder, &likeness)? {
            Ok(known) => {
                self.image.objects[known].slots.push(slot);
                self.locks(holder, known);
                return Ok(known);
            }
            Err(place) => place,
        };
        let known = self
            .kind(holder)
            .and_then(|kind| Ok((kind, lock::owner(holder)?)));
        let (kind, owner) = known.or_else(refusal)?;
        let object = self.image.objects.len();
        self.image.objects.push(Object {
            kind,
            flags: holder.flags(),
            pos: holder.raw.info.pos,
            owner,
            locks: Vec::new(),
            slots: vec![slot],
        });
        self.firsts.push(here);
        self.inodes.push(ino);
        self.likely
            .entry(likeness)
            .or_default()
            .insert(place, object);
        self.locks(holder, object);
        Ok(object)
    }

    /// The object of a slot, or where among its likes it is to be sorted in.
    fn place(&self, holder: &Holder<'_>, likeness: &Likeness) -> Result<Result<usize, usize>> {
        let likes = self.likely.get(likeness).map_or(&[][..], Vec::as_slice);
        let here = (holder.remote.host(), holder.raw.fd);
        let (mut low, mut high) = (0, likes.len());
        while low < high {
            let middle = usize::midpoint(low, high);
            let order = sys::fd::compare_files(self.firsts[likes[middle]], here);
            match holder.during(order, "comparing the file")? {
                Ordering::Equal => return Ok(Ok(likes[middle])),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(Err(low))
    }

    fn kind(&mut self, holder: &Holder<'_>) -> Result<Kind> {
        let file = &holder.raw.file;
        let on_fs = file.dev == self.env.fs_device();
        let by_path = holder.flags() & libc::O_PATH != 0;
        match file.format() {
            _ if holder.raw.info.pid.is_some() => self.process_handle(holder),
            _ if on_fs && by_path => Ok(Kind::File { ino: file.ino }),
            libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK if on_fs => {
                Ok(Kind::File { ino: file.ino })
            }
            libc::S_IFREG if file.dev == self.shared.device() => self.memory(holder),
            _ if by_path => self.path(holder),
            libc::S_IFIFO => pipe::capture(self, holder, on_fs),
            libc::S_IFCHR => tty::capture(self, holder),
            libc::S_IFSOCK => socket::capture(self, holder),
            libc::S_IFREG | libc::S_IFDIR => self.path(holder),
            0 => event::capture(self, holder),
            _ => Err(holder.refuse("a file of an unknown type")),
        }
    }

    fn memory(&self, holder: &Holder<'_>) -> Result<Kind> {
        let FileId { dev, ino, .. } = holder.raw.file;
        if self.contents {
            let handle = holder.take()?;
            let key = self.shared.capture_fd(handle.as_fd());
            let key = holder.during(key, "reading the memfd")?;
            return Ok(Kind::Memory { key });
        }
        match self.shared.find(dev, ino) {
            Some(key) => Ok(Kind::Memory { key }),
            None => Err(holder.refuse("a memfd that no checkpoint knows")),
        }
    }

    fn process_handle(&self, holder: &Holder<'_>) -> Result<Kind> {
        let of = holder
            .raw
            .info
            .pid
            .and_then(|pid| self.hosts.get(&HostPid(pid)));
        match of {
            Some(&pid) => Ok(Kind::Process { pid }),
            None => Err(holder.refuse("a pidfd of a process that has ended or is not in the tree")),
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

    /// Adds the locks that this slot shows to its object.
    fn locks(&mut self, holder: &Holder<'_>, object: usize) {
        let info = &holder.raw.info;
        let object = &mut self.image.objects[object];
        let mut odd = info.odd_locks > 0;
        for line in &info.locks {
            match lock::of(line, holder.remote.pid()) {
                Some(lock) if !object.locks.contains(&lock) => object.locks.push(lock),
                Some(_) => {}
                None => odd = true,
            }
        }
        if odd {
            object.kind = Kind::Refused {
                what: "a file with a lease; end it with fcntl(F_SETLEASE)".to_owned(),
            };
        }
    }
}

/// Takes a refusal down as what the object is.
fn refusal(error: Error) -> Result<(Kind, Option<Owner>)> {
    match error {
        Error::Unsupported { what, .. } => Ok((Kind::Refused { what }, None)),
        other => Err(other),
    }
}
