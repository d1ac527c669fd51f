//! Making the objects that are not there, but for connections.

use std::collections::btree_map::Entry;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::model::{Kind, Object};
use super::procfs::About;
use super::restore::{Restore, named, owner_of};
use super::{Procs, epoll, event, path, pipe, process, tty, watch};
use crate::env::ExternalId;
use crate::error::{During, Result};
use crate::ids::{HostPid, InnerPid};
use crate::sys;

/// Whether it is a file of `/proc` that tells of a descriptor.
fn tells(kind: &Kind) -> bool {
    let about = match kind {
        Kind::Path { path } => About::of(path),
        _ => None,
    };
    about.is_some_and(|about| about.is_of_descriptor())
}

impl Restore<'_, '_> {
    /// Makes the objects that are not there, but for connections.
    pub(super) fn make(&mut self, terminals: &dyn Fn(&mut Procs<'_>) -> Result<()>) -> Result<()> {
        // The other side of a pseudo-terminal can be opened when its master is there, and `/dev/tty` when the
        // process has a controlling terminal.
        self.make_those(|kind| matches!(kind, Kind::Master { .. }))?;
        let last = |kind: &Kind| matches!(kind, Kind::ControllingTerminal { .. });
        self.make_those(|kind| !matches!(kind, Kind::Master { .. }) && !last(kind))?;
        self.fresh.clear();
        self.hung_up.clear();
        std::mem::take(&mut self.departed).bury(self.procs)?;
        terminals(self.procs)?;
        self.make_those(last)
    }

    fn make_those(&mut self, these: impl Fn(&Kind) -> bool) -> Result<()> {
        let target = self.target;
        for (index, object) in target.objects.iter().enumerate() {
            let missing = self.plan.reuse[index].is_none() && !self.is_late(index);
            if missing && these(&object.kind) {
                let handle = self.make_object(index, object).map_err(named(object))?;
                self.handles.insert(index, handle);
            }
        }
        Ok(())
    }

    /// Makes what tells of descriptors, when those that it may tell of are in place.
    pub(super) fn make_telling(&mut self) -> Result<()> {
        let target = self.target;
        for (index, object) in target.objects.iter().enumerate() {
            if self.plan.reuse[index].is_none() && tells(&object.kind) {
                let handle = self.make_object(index, object).map_err(named(object))?;
                self.handles.insert(index, handle);
            }
        }
        Ok(())
    }

    /// Whether an object can only be made when others are in place.
    pub(super) fn is_late(&self, index: usize) -> bool {
        self.is_connection(index) || tells(&self.target.objects[index].kind)
    }

    fn make_object(&mut self, index: usize, object: &Object) -> Result<OwnedFd> {
        let flags = path::reopen_flags(object.flags);
        let (pid, _) = object.home;
        let made = match &object.kind {
            Kind::File { ino } => self.prepared.removed.or_inode(self.env, *ino, object.flags),
            Kind::Memory { key } => self.shared.open_descriptor(*key, flags),
            Kind::Path { path } => self.open_path(path, object),
            Kind::Namespace { name } => path::open_namespace(self.env, name, flags),
            Kind::ControllingTerminal { number } => self.open_controlling(*number, object),
            Kind::Pipe { pipe } => return self.make_pipe_end(*pipe, object),
            Kind::External(id) => self.open_external(*id, object.access()),
            Kind::Terminal { number, hung_up } => self.open_slave(*number, *hung_up, object.flags),
            Kind::Master { number } => match self.prepared.masters.remove(number) {
                Some(master) => Ok(master),
                None => tty::make_master(self.env, *number, object.flags),
            },
            Kind::Event { count, semaphore } => event::make_event(*count, *semaphore),
            Kind::Timer(timer) => event::make_timer(timer),
            Kind::Signals { mask } => sys::fd::new_signalfd(*mask),
            Kind::Inotify { .. } => watch::make(),
            Kind::Epoll { .. } => epoll::make(),
            Kind::Process { pid } => process::open(self.procs, *pid, object.flags),
            Kind::Zombie { pid } => process::open_zombie(self.procs, *pid, object),
            Kind::Ended { inode } => self.departed.open(self.procs, *inode, object),
            Kind::Socket(socket) => self.make_socket(index, socket),
            Kind::Refused { what } => Err(io::Error::new(io::ErrorKind::Unsupported, what.clone())),
        };
        made.during(pid, "opening it again")
    }

    /// The slave side of a terminal; of one that is to be hung up, by a master that is closed when all its slave sides are
    /// there.
    fn open_slave(&mut self, number: u32, hung_up: bool, flags: i32) -> io::Result<OwnedFd> {
        if hung_up && let Entry::Vacant(new) = self.hung_up.entry(number) {
            new.insert(tty::make_master(self.env, number, libc::O_RDWR)?);
        }
        tty::open_slave(self.env, number, flags)
    }

    /// An end of a pipe whose other end the service holds; a program may have opened the end that it was given once more, for
    /// anything.
    fn open_external(&self, id: ExternalId, access: i32) -> io::Result<OwnedFd> {
        let writes = access == libc::O_WRONLY;
        let (given, as_given) = match self.env.open_external(id, writes) {
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                (self.env.open_external(id, !writes)?, false)
            }
            given => (given?, access != libc::O_RDWR),
        };
        match as_given {
            true => Ok(given),
            false => pipe::reopen(given.as_fd(), access),
        }
    }

    /// Opens a terminal as `/dev/tty` in a process that it is the controlling terminal of; where there is none any more, by its own
    /// name.
    fn open_controlling(&mut self, number: Option<u32>, object: &Object) -> io::Result<OwnedFd> {
        let Some(number) = number else {
            return tty::open_hung_up(self.env, object.flags);
        };
        let home = object.home.0;
        let others = self.procs.keys().copied().filter(|pid| *pid != home);
        for pid in [home].into_iter().chain(others).collect::<Vec<_>>() {
            if let Ok(tty) = self.open_inside(pid, object.flags, b"/dev/tty\0")
                && tty::number_of(tty.as_fd())? == Some(number)
            {
                return Ok(tty);
            }
        }
        tty::open_slave(self.env, number, object.flags)
    }

    /// Opens what is another thing for every process in the process itself.
    fn open_inside(&mut self, pid: InnerPid, flags: i32, path: &[u8]) -> io::Result<OwnedFd> {
        let mut batch = crate::remote::Batch::new();
        let path = batch.input(path);
        let flags = path::reopen_flags(flags) | libc::O_NOCTTY;
        let call = batch.call(
            libc::SYS_openat,
            &[libc::AT_FDCWD.into(), path.into(), flags.into(), 0.into()],
        );
        let remote = self.procs.get_mut(&pid).ok_or(io::ErrorKind::NotFound)?;
        let fd = remote.run(&batch)?.result(call)? as i32;
        let handle = remote.take_fd(fd);
        remote.close(&[fd])?;
        handle
    }

    /// Another end of a pipe that is there, or the first of a new one.
    fn make_pipe_end(&mut self, index: usize, object: &Object) -> Result<OwnedFd> {
        let (pid, _) = object.home;
        let host = self.remote(pid)?.host();
        let model = match self.pipe_handle(index)? {
            Some(handle) => handle,
            None if self.target.pipes[index].fifo => self
                .env
                .open_inode(
                    self.target.pipes[index].inode,
                    libc::O_RDWR | libc::O_NONBLOCK,
                )
                .during(pid, "opening the fifo")?,
            None => return self.fresh_pipe_end(index, object, host),
        };
        let fresh = self.fresh.get_mut(&index);
        match fresh.and_then(|ends| ends.take(object.access())) {
            Some(end) => Ok(end),
            None => pipe::reopen(model.as_fd(), object.access()).during(pid, "opening it again"),
        }
    }

    /// The first end of a new pipe.
    fn fresh_pipe_end(&mut self, index: usize, object: &Object, host: HostPid) -> Result<OwnedFd> {
        let made = pipe::Fresh::make(owner_of(host)).and_then(|mut ends| {
            let end = match (ends.take(object.access()), ends.any()) {
                (Some(end), _) => end,
                (None, Some(any)) => pipe::reopen(any, object.access())?,
                (None, None) => return Err(io::ErrorKind::NotFound.into()),
            };
            self.fresh.insert(index, ends);
            Ok(end)
        });
        made.during(object.home.0, "making a pipe")
    }

    /// Any end of a target pipe that exists already: one on its way, or one in its place.
    fn pipe_handle(&self, wanted: usize) -> Result<Option<OwnedFd>> {
        for (index, object) in self.target.objects.iter().enumerate() {
            if !matches!(object.kind, Kind::Pipe { pipe } if pipe == wanted) {
                continue;
            }
            if let Some(handle) = self.handles.get(&index) {
                let copy = handle.try_clone();
                return copy
                    .during(object.home.0, "duplicating a pipe end")
                    .map(Some);
            }
            if self.plan.reuse[index].is_some() {
                // Not on its way, so every slot of it stays as it is.
                return self.take(object.home).map(Some);
            }
        }
        Ok(None)
    }
}
