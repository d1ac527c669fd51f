//! The image of a tree's descriptors: open file objects, and the tables that point at them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use serde::{Deserialize, Serialize};

use super::path;
use super::socket::Socket;
use crate::env::ExternalId;
use crate::error::{Error, Result};
use crate::ids::InnerPid;
use crate::mem::ShmKey;

/// The open files of a whole process tree at one moment: every open file object once, with the
/// slots `(process, descriptor)` that share it, and what the objects hold (pipe contents, counters,
/// terminal settings).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Descriptors {
    pub(crate) objects: Vec<Object>,
    pub(crate) tables: BTreeMap<InnerPid, Table>,
    /// Pipes and fifos.
    pub(crate) pipes: Vec<Pipe>,
    /// Settings of the terminals that the tree holds, by number in its devpts.
    pub(crate) terminals: BTreeMap<u32, Terminal>,
}

/// A process' descriptor table, by descriptor number.
pub(crate) type Table = BTreeMap<i32, Slot>;

/// One descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Slot {
    /// Index into [`Descriptors::objects`].
    pub(crate) object: usize,
    pub(crate) cloexec: bool,
}

/// What the kernel calls a `struct file`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Object {
    pub(crate) kind: Kind,
    /// `open(2)` flags without `O_CLOEXEC` and `O_LARGEFILE`.
    pub(crate) flags: i32,
    pub(crate) pos: u64,
    pub(crate) owner: Option<Owner>,
    pub(crate) locks: Vec<Lock>,
    pub(crate) lease: Option<Lease>,
    /// The slots that share it; none if it is only in flight.
    pub(crate) slots: Vec<(InnerPid, i32)>,
    /// Where it was found: one of its slots, or that of the socket which it waits in.
    pub(crate) home: (InnerPid, i32),
}

impl Object {
    /// Whether nobody has it open: it waits in a socket to be received.
    pub(crate) fn is_in_flight(&self) -> bool {
        self.slots.is_empty()
    }

    /// `O_RDONLY`, `O_WRONLY` or `O_RDWR`.
    pub(crate) fn access(&self) -> i32 {
        self.flags & libc::O_ACCMODE
    }

    pub(crate) fn reads(&self) -> bool {
        self.access() != libc::O_WRONLY && self.flags & libc::O_PATH == 0
    }

    pub(crate) fn writes(&self) -> bool {
        self.access() != libc::O_RDONLY
    }
}

/// What an open file object is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// A file or directory of the versioned filesystem, named or not.
    File { ino: u64 },
    /// A memfd; its contents are the memory's.
    Memory { key: ShmKey },
    /// Opened by path: device nodes, files of `/proc` and `/sys`, directories outside the versioned filesystem.
    Path { path: Vec<u8> },
    /// One of the sandbox's own namespaces, by its name in `/proc/PID/ns`.
    Namespace { name: String },
    /// `/dev/tty`, and the number of the terminal that this was for the process which opened it; none if that is hung up.
    ControllingTerminal { number: Option<u32> },
    /// One end of a pipe or fifo (which one is in the flags), by index into [`Descriptors::pipes`].
    Pipe { pipe: usize },
    /// The inside end of a pipe that the service holds the other end of.
    External(ExternalId),
    /// The slave side of a pseudo-terminal. It is hung up when the master is closed.
    Terminal { number: u32, hung_up: bool },
    /// The master side of one.
    Master { number: u32 },
    /// An eventfd.
    Event { count: u64, semaphore: bool },
    /// A timerfd.
    Timer(Timer),
    /// A signalfd; bit n is for signal n+1.
    Signals { mask: u64 },
    /// An inotify instance, and the bytes of events that waited in it.
    Inotify { watches: Vec<Watch>, queued: usize },
    /// An epoll instance.
    Epoll { interests: Vec<Interest> },
    /// A pidfd of a process of the tree.
    Process { pid: InnerPid },
    /// A pidfd of a process that has ended and was not waited for yet.
    Zombie { pid: InnerPid },
    /// A pidfd of a process that is gone; the inode number tells one from another.
    Ended { inode: u64 },
    /// A socket.
    Socket(Box<Socket>),
    /// What cannot be carried: "an io_uring".
    Refused { what: String },
}

impl Kind {
    /// What it is, in a word or two.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::File { ino } => format!("file with inode {ino}"),
            Self::Memory { .. } => "memfd".to_owned(),
            Self::Path { path } => String::from_utf8_lossy(path).into_owned(),
            Self::Namespace { name } => format!("{name} namespace"),
            Self::ControllingTerminal { .. } => "controlling terminal".to_owned(),
            Self::Pipe { .. } | Self::External(_) => "pipe".to_owned(),
            Self::Terminal { number, .. } => format!("pseudo-terminal {number}"),
            Self::Master { number } => format!("master of pseudo-terminal {number}"),
            Self::Event { .. } => "eventfd".to_owned(),
            Self::Timer(_) => "timerfd".to_owned(),
            Self::Signals { .. } => "signalfd".to_owned(),
            Self::Inotify { .. } => "inotify".to_owned(),
            Self::Epoll { .. } => "epoll".to_owned(),
            Self::Process { pid } | Self::Zombie { pid } => format!("pidfd of process {pid}"),
            Self::Ended { .. } => "pidfd of a process that is gone".to_owned(),
            Self::Socket(_) => "socket".to_owned(),
            Self::Refused { what } => what.clone(),
        }
    }
}

/// State of a timerfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Timer {
    pub(crate) clock: i32,
    /// Expirations not read yet.
    pub(crate) ticks: u64,
    /// What remained, in seconds and nanoseconds; zeros when not armed.
    pub(crate) value: (u64, u64),
    pub(crate) interval: (u64, u64),
}

/// An inotify watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Watch {
    pub(crate) wd: i32,
    pub(crate) ino: u64,
    pub(crate) mask: u32,
}

/// An epoll registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Interest {
    /// The number under which the file was registered.
    pub(crate) fd: i32,
    pub(crate) events: u32,
    pub(crate) data: u64,
    /// Index into [`Descriptors::objects`].
    pub(crate) object: usize,
}

/// Who is told of input by signal (`F_SETOWN_EX`, `F_SETSIG`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Owner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub(crate) class: i32,
    /// The thread, process or group as the sandbox counts.
    pub(crate) id: i32,
    /// Zero for `SIGIO` without details.
    pub(crate) signal: i32,
    /// The real and the effective user who has said so, on whom it depends whom the file may signal; where the kernel tells.
    pub(crate) users: Option<(u32, u32)>,
}

/// A lease on the file, held through an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Lease {
    Read,
    Write,
    /// Somebody waits for it to be given up, or to become one for reading.
    Broken {
        to_read: bool,
    },
}

/// A file lock held through an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lock {
    pub(crate) class: LockKind,
    pub(crate) write: bool,
    pub(crate) start: u64,
    /// The last byte; `None` for "to the end, however the file grows".
    pub(crate) end: Option<u64>,
}

/// Whose a lock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum LockKind {
    /// `flock(2)`: the object's.
    Flock,
    /// `F_OFD_SETLK`: the object's.
    OpenFile,
    /// `F_SETLK`: this process'.
    Process(InnerPid),
}

/// A pipe or fifo and what waits in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pipe {
    /// Inode number at capture; what a fifo is opened again by.
    pub(crate) inode: u64,
    /// A fifo of the versioned filesystem.
    pub(crate) fifo: bool,
    /// Bytes, as `F_GETPIPE_SZ` tells.
    pub(crate) capacity: usize,
    /// Made with `O_DIRECT`: every write is read as it was written.
    pub(crate) packets: bool,
    /// Packets in packet mode, else one piece.
    pub(crate) content: Vec<Vec<u8>>,
}

/// Settings of a terminal, and what waits in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Terminal {
    /// The kernel's `struct termios2`.
    pub(crate) termios: Vec<u8>,
    /// Rows, columns, and both in pixels.
    pub(crate) size: [u16; 4],
    /// User and group of the slave side, as the sandbox counts, and its mode.
    pub(crate) owner: (u32, u32),
    pub(crate) mode: u32,
    /// What only a slave side tells, and has: that nobody else may open it, and input. `None` if there is none, or its input is
    /// too much to be read and put back.
    pub(crate) exclusive: bool,
    pub(crate) input: Option<Input>,
    /// What only a master tells, and has; the same.
    pub(crate) locked: bool,
    pub(crate) packets: bool,
    /// Whether it reads as ended: the slave side has been open, and nobody has it any more.
    pub(crate) left: bool,
    pub(crate) output: Option<Vec<u8>>,
}

/// Input that waits to be read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Input {
    /// Lines that have ended, by a character that ends one, or else by the end of the file.
    pub(crate) lines: Vec<Vec<u8>>,
    /// The line that has not ended; or all of it, where it is not read by lines.
    pub(crate) rest: Vec<u8>,
}

impl Input {
    pub(crate) fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.rest.is_empty()
    }
}

impl Descriptors {
    /// Descriptors of these inodes lead nowhere any more, so that none of them can stay as it is.
    pub(crate) fn forget(&mut self, stale: &[u64]) {
        for object in &mut self.objects {
            if matches!(object.kind, Kind::File { ino } if stale.contains(&ino)) {
                object.kind = Kind::Refused {
                    what: "a directory that was removed".to_owned(),
                };
            }
        }
    }

    /// The inodes of the versioned filesystem that are open.
    pub(crate) fn inodes(&self) -> impl Iterator<Item = u64> {
        let files = self.objects.iter().filter_map(|object| match object.kind {
            Kind::File { ino } => Some(ino),
            _ => None,
        });
        let fifos = self.pipes.iter().filter(|pipe| pipe.fifo);
        files.chain(fifos.map(|pipe| pipe.inode))
    }

    /// The image restricted to the processes that `keep` names: what is left of it when the others have ended.
    pub fn retain(&mut self, keep: impl Fn(InnerPid) -> bool) {
        self.tables.retain(|&pid, _| keep(pid));
        for object in &mut self.objects {
            object.slots.retain(|&(pid, _)| keep(pid));
        }
        let homes = self.homes();
        let mut renumbered = vec![None; self.objects.len()];
        let mut kept = Vec::new();
        for (old, mut object) in std::mem::take(&mut self.objects).into_iter().enumerate() {
            if let Some(&home) = homes.get(&old) {
                object.home = home;
                renumbered[old] = Some(kept.len());
                kept.push(object);
            }
        }
        self.objects = kept;
        for slot in self.tables.values_mut().flat_map(BTreeMap::values_mut) {
            slot.object = renumbered[slot.object].expect("a slot's object has that slot");
        }
        for object in &mut self.objects {
            match &mut object.kind {
                Kind::Epoll { interests } => {
                    interests.retain_mut(|interest| renumber(&renumbered, &mut interest.object))
                }
                Kind::Socket(socket) => socket.renumber(|index| renumber(&renumbered, index)),
                _ => {}
            }
        }
    }

    /// Where the objects are that can be reached: by a slot, or by receiving them from a socket that can be.
    fn homes(&self) -> BTreeMap<usize, (InnerPid, i32)> {
        let mut homes = BTreeMap::new();
        let placed = |(index, object): (usize, &Object)| Some((index, *object.slots.first()?));
        let mut found: Vec<_> = self.objects.iter().enumerate().filter_map(placed).collect();
        while let Some((index, home)) = found.pop() {
            let Entry::Vacant(vacant) = homes.entry(index) else {
                continue;
            };
            let object = &self.objects[index];
            let home = *vacant.insert(object.slots.first().copied().unwrap_or(home));
            if let Kind::Socket(socket) = &object.kind {
                found.extend(socket.in_flight().map(|other| (other, home)));
            }
        }
        homes
    }

    /// Whether the image is sound: what it points at is there.
    ///
    /// # Errors
    /// [`Error::Corrupt`] with the descriptor that is not.
    pub(crate) fn validate(&self) -> Result<()> {
        for (&pid, table) in &self.tables {
            for (&fd, slot) in table {
                let object = self.objects.get(slot.object);
                if !object.is_some_and(|object| object.slots.contains(&(pid, fd))) {
                    let what = format!("the image of descriptor {fd} names no open file");
                    return Err(Error::Corrupt { pid, what });
                }
            }
        }
        let lost = |pid, what| -> Result<()> { Err(Error::Corrupt { pid, what }) };
        for object in &self.objects {
            let (pid, fd) = object.home;
            let placed = object
                .slots
                .iter()
                .all(|&(pid, fd)| self.slot(pid, fd).is_some());
            if !placed || !self.points_right(&object.kind) {
                let kind = object.kind.describe();
                let what =
                    format!("the image of descriptor {fd} ({kind}) points at what is not there");
                return lost(pid, what);
            }
        }
        // Only now is it known that all indices are good.
        let homes = self.homes();
        for (index, object) in self.objects.iter().enumerate() {
            if !homes.contains_key(&index) {
                let what = "the image has an open file that nobody can reach".to_owned();
                return lost(object.home.0, what);
            }
        }
        Ok(())
    }

    /// Where a terminal of the tree is open, by its slave and by its master side.
    pub(crate) fn sides(&self, terminal: u32) -> [Option<usize>; 2] {
        let find = |wanted: &dyn Fn(&Kind) -> bool| {
            let found = |object: &Object| !object.is_in_flight() && wanted(&object.kind);
            self.objects.iter().position(found)
        };
        let slave = |kind: &Kind| matches!(kind, Kind::Terminal { number, hung_up: false } if *number == terminal);
        let master = |kind: &Kind| matches!(kind, Kind::Master { number } if *number == terminal);
        [find(&slave), find(&master)]
    }

    fn points_right(&self, kind: &Kind) -> bool {
        let is_socket = |&index: &usize| {
            let object = self.objects.get(index);
            object.is_some_and(|object| matches!(object.kind, Kind::Socket(_)))
        };
        match kind {
            Kind::Pipe { pipe } => *pipe < self.pipes.len(),
            Kind::Epoll { interests } => interests
                .iter()
                .all(|interest| interest.object < self.objects.len()),
            Kind::Process { pid } => self.tables.contains_key(pid),
            Kind::Namespace { name } => path::NAMESPACES.contains(&name.as_str()),
            Kind::Socket(socket) => {
                let mut rights = socket.in_flight();
                rights.all(|right| right < self.objects.len())
                    && socket.related().iter().all(is_socket)
            }
            Kind::Refused { .. } => false,
            _ => true,
        }
    }

    /// How many open file objects the tree has.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether no process has anything open.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    pub(crate) fn slot(&self, pid: InnerPid, fd: i32) -> Option<Slot> {
        self.tables.get(&pid)?.get(&fd).copied()
    }
}

/// Gives an object its new number; false if it is gone.
fn renumber(numbers: &[Option<usize>], object: &mut usize) -> bool {
    let number = numbers[*object];
    *object = number.unwrap_or_default();
    number.is_some()
}
