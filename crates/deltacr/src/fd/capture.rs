//! Capture: what a stopped tree has open.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::Procs;
use super::fdinfo::EpollItem;
use super::model::{Descriptors, Kind, Object, Owner, Slot};
use super::procfs::{self, About, DELETED};
use super::table::{self, FileId, ProcFds, RawSlot};
use super::{epoll, event, lock, path, pipe, process, socket, tty};
use crate::env::Environment;
use crate::error::{During, Error, Result};
use crate::ids::{HostPid, InnerPid};
use crate::mem::SharedObjects;
use crate::owners::Owners;
use crate::remote::Remote;
use crate::sys;

/// Whose the descriptor is by which an object is looked at.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// A process'.
    Process(&'a Remote),
    /// Ours: a duplicate of what waits in the socket which is at this slot.
    Flight {
        duplicate: BorrowedFd<'a>,
        socket: (InnerPid, i32),
    },
}

/// The descriptor by which an object is looked at.
pub(crate) struct Holder<'a> {
    pub(crate) source: Source<'a>,
    pub(crate) fds: &'a ProcFds,
    pub(crate) raw: &'a RawSlot,
}

impl Holder<'_> {
    /// A duplicate, to be closed before the tree runs again.
    pub(crate) fn take(&self) -> Result<OwnedFd> {
        let doing = || format!("duplicating descriptor {}", self.raw.fd);
        match self.source {
            Source::Process(remote) => remote.take_fd(self.raw.fd),
            Source::Flight { duplicate, .. } => duplicate.try_clone_to_owned(),
        }
        .during(self.pid(), &doing())
    }

    fn pid(&self) -> InnerPid {
        self.home().0
    }

    /// Where it is found: the slot itself, or the socket that it waits in.
    fn home(&self) -> (InnerPid, i32) {
        match self.source {
            Source::Process(remote) => (remote.pid(), self.raw.fd),
            Source::Flight { socket, .. } => socket,
        }
    }

    pub(crate) fn in_flight(&self) -> bool {
        matches!(self.source, Source::Flight { .. })
    }

    /// Where the kernel finds it, for `kcmp(2)`.
    fn here(&self) -> (HostPid, i32) {
        match self.source {
            Source::Process(remote) => (remote.host(), self.raw.fd),
            Source::Flight { .. } => (HostPid::own(), self.raw.fd),
        }
    }

    /// The refusal of what the descriptor is: "an io_uring".
    pub(crate) fn refuse(&self, what: impl std::fmt::Display) -> Error {
        Error::Unsupported {
            pid: self.pid(),
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
        result.map_err(Into::into).during(self.pid(), &doing())
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
            let (pid, fd) = object.home;
            let waits = match object.is_in_flight() {
                true => "a socket in whose queue waits ",
                false => "",
            };
            return Err(Error::Unsupported {
                pid,
                name: table::name_of(procs[&pid].host()),
                what: format!("descriptor {fd} is {waits}{what}"),
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
        flights: HashMap::new(),
        likely: HashMap::new(),
        firsts: Vec::new(),
        inodes: Vec::new(),
    };
    for remote in procs.values() {
        capture.process(remote)?;
    }
    socket::open_queues(&mut capture)?;
    epoll::resolve(&mut capture)?;
    socket::relate(&mut capture)?;
    pipe::read_all(&mut capture, procs)?;
    Ok(capture.image)
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
    /// The sockets, by object, with duplicates.
    pub(crate) sockets: Vec<(usize, OwnedFd)>,
    /// Duplicates of what is in flight, by object.
    flights: HashMap<usize, OwnedFd>,
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
        let pid = remote.pid();
        let fds = ProcFds::of(remote, self.env.fs_device())
            .during(pid, "opening the descriptor table")?;
        let raws = fds.slots().during(pid, "reading the descriptor table")?;
        let mut slots = BTreeMap::new();
        for raw in &raws {
            let holder = Holder {
                source: Source::Process(remote),
                fds: &fds,
                raw,
            };
            let object = self.object(&holder)?;
            self.image.objects[object].slots.push((pid, raw.fd));
            let cloexec = raw.info.flags & libc::O_CLOEXEC != 0;
            slots.insert(raw.fd, Slot { object, cloexec });
        }
        self.image.tables.insert(pid, slots);
        Ok(())
    }

    /// The object of which this is a duplicate that was in flight in a socket.
    pub(crate) fn flight(&mut self, duplicate: OwnedFd, socket: (InnerPid, i32)) -> Result<usize> {
        let doing = "looking at a descriptor in flight";
        let fds = ProcFds::own().during(socket.0, doing)?;
        let raw = fds.slot_of(duplicate.as_fd()).during(socket.0, doing)?;
        let source = Source::Flight {
            duplicate: duplicate.as_fd(),
            socket,
        };
        let holder = Holder {
            source,
            fds: &fds,
            raw: &raw,
        };
        let object = self.object(&holder)?;
        self.flights.entry(object).or_insert(duplicate);
        Ok(object)
    }

    /// A duplicate of an object, to be closed before the tree runs again.
    pub(crate) fn duplicate(&self, object: usize, procs: &Procs<'_>) -> Result<OwnedFd> {
        let (pid, fd) = self.image.objects[object].home;
        let taken = match self.flights.get(&object) {
            Some(flight) => flight.try_clone(),
            None => procs[&pid].take_fd(fd),
        };
        taken.during(pid, &format!("duplicating descriptor {fd}"))
    }

    /// The object behind a descriptor: one that is known already, or a new one.
    fn object(&mut self, holder: &Holder<'_>) -> Result<usize> {
        let FileId { dev, ino, .. } = holder.raw.file;
        let likeness = ((dev, ino), holder.flags(), holder.raw.info.pos);
        let place = match self.place(holder, &likeness)? {
            Ok(known) => {
                self.locks(holder, known);
                return Ok(known);
            }
            Err(place) => place,
        };
        let known = self
            .kind(holder)
            .and_then(|kind| Ok((kind, lock::owner(self, holder)?)));
        let (kind, owner) = known.or_else(refusal)?;
        let object = self.image.objects.len();
        self.image.objects.push(Object {
            kind,
            flags: holder.flags(),
            pos: holder.raw.info.pos,
            owner,
            locks: Vec::new(),
            lease: None,
            slots: Vec::new(),
            home: holder.home(),
        });
        self.firsts.push(holder.here());
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
        let here = holder.here();
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
        if let Some(host) = holder.raw.info.pid {
            return process::capture(self, holder, HostPid(host));
        }
        let file = &holder.raw.file;
        let on_fs = file.dev == self.env.fs_device();
        let by_path = holder.flags() & libc::O_PATH != 0;
        match file.format() {
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

    /// How users and groups show outside.
    pub(crate) fn owners(&self) -> Result<&Owners> {
        self.shared.owners(self.env)
    }

    /// The process of the tree that has this number outside.
    pub(crate) fn member(&self, host: HostPid) -> Option<InnerPid> {
        self.hosts.get(&host).copied()
    }

    /// A file outside the versioned filesystem: carried by its path if that says it all.
    fn path(&self, holder: &Holder<'_>) -> Result<Kind> {
        let path = holder.link()?;
        if let Some(name) = path::own_namespace(self.env, &path) {
            return Ok(Kind::Namespace { name });
        }
        if About::of(&path).is_some() {
            let path = procfs::mark_ended(self.env, path, holder.raw.file.ino);
            return Ok(Kind::Path { path });
        }
        let shown = String::from_utf8_lossy(&path).into_owned();
        let directory = holder.raw.file.format() == libc::S_IFDIR;
        let virtual_file = procfs::SHOWN.iter().any(|root| path.starts_with(root));
        if path.ends_with(DELETED) || !path.starts_with(b"/") {
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
        object.lease = object.lease.or(info.lease);
        for line in &info.locks {
            let lock = lock::of(line, holder.pid());
            if object.locks.contains(&lock) {
                continue;
            }
            object.locks.push(lock);
            if holder.in_flight() {
                object.kind = Kind::Refused {
                    what: "a file with a lock, which no process has open".to_owned(),
                };
            }
        }
        if info.odd_locks > 0 {
            object.kind = Kind::Refused {
                what: "a file with a lock of an unknown kind".to_owned(),
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
