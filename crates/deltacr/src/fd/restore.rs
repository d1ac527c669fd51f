//! Restore: making a stopped tree have open what an image says.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::install::{self, Wanted};
use super::model::{Descriptors, Kind, Object, Pipe};
use super::plan::{Plan, TableChange};
use super::process::{self, Departed};
use super::{Procs, epoll, event, lease, lock, path, pipe, tty, watch};
use crate::env::Environment;
use crate::error::{During, Error, Result};
use crate::ids::{HostPid, InnerPid};
use crate::mem::SharedObjects;
use crate::remote::Remote;
use crate::sys;

/// Status flags that `fcntl(F_SETFL)` changes.
const SETTABLE: i32 = libc::O_APPEND | libc::O_DIRECT | libc::O_NOATIME | libc::O_NONBLOCK;

/// Finds out whether [`restore`] can succeed, as far as that can be known without changing anything.
///
/// # Errors
/// An image contradicts itself.
pub fn check(target: &Descriptors) -> Result<()> {
    target.validate()
}

/// Makes the processes have open what `target` says, where `current` is what they have open now.
/// A process that was built anew has nothing open and must not be in `current` ([`Descriptors::retain`]); what
/// `current` says of processes that are not among `procs` is ignored. Sessions must be right already; `terminals` is
/// called to give their leaders their controlling terminals, when those are there.
/// `shared` holds the memfds as they are to be.
/// Returns notes for the user: what could not be kept.
///
/// # Errors
/// A file could not be made or put in its place; the tables are then in between the two states.
pub fn restore(
    current: &Descriptors,
    target: &Descriptors,
    procs: &mut Procs<'_>,
    env: &dyn Environment,
    shared: &SharedObjects,
    terminals: &dyn Fn(&mut Procs<'_>) -> Result<()>,
) -> Result<Vec<String>> {
    let living;
    let current = if current.tables.keys().all(|pid| procs.contains_key(pid)) {
        current
    } else {
        let mut those = current.clone();
        those.retain(|pid| procs.contains_key(&pid));
        living = those;
        &living
    };
    let plan = Plan::new(current, target);
    let changes = target
        .tables
        .keys()
        .map(|&pid| (pid, plan.change(pid, current, target)))
        .filter(|(_, change)| !change.is_empty())
        .collect::<BTreeMap<_, _>>();
    let touched = changes.keys().copied().collect();
    let mut restore = Restore {
        current,
        target,
        plan,
        changes,
        procs,
        env,
        shared,
        handles: BTreeMap::new(),
        feeders: Vec::new(),
        departed: Departed::default(),
        fresh: BTreeMap::new(),
        notes: Vec::new(),
    };
    epoll::forget(current, target, &restore.plan, restore.procs)?;
    restore.take_moving()?;
    restore.drop_flights()?;
    restore.release_addresses()?;
    restore.close()?;
    restore.make(terminals)?;
    restore.install(false)?;
    restore.listen()?;
    restore.make_connections()?;
    restore.install(true)?;
    restore
        .handles
        .retain(|&index, _| target.objects[index].is_in_flight());
    restore.settle()?;
    restore.settle_sockets()?;
    lock::settle(current, target, &restore.plan, &touched, restore.procs)?;
    let lost = lease::settle(current, target, &restore.plan, restore.procs, env)?;
    restore.notes.extend(lost);
    epoll::register(&mut restore)?;
    epoll::rearm(&mut restore)?;
    Ok(restore.notes)
}

/// A restore under way.
pub(super) struct Restore<'a, 'p> {
    pub(super) current: &'a Descriptors,
    pub(super) target: &'a Descriptors,
    pub(super) plan: Plan,
    changes: BTreeMap<InnerPid, TableChange>,
    pub(super) procs: &'a mut Procs<'p>,
    pub(super) env: &'a dyn Environment,
    shared: &'a SharedObjects,
    /// Duplicates of target objects, for as long as they are on their way: to their slots, or into queues.
    pub(super) handles: BTreeMap<usize, OwnedFd>,
    /// The other ends of connections that nobody has the other end of: closed when the queues are filled.
    pub(super) feeders: Vec<(usize, OwnedFd)>,
    departed: Departed,
    /// Ends of new pipes, while others may want them.
    fresh: BTreeMap<usize, pipe::Fresh>,
    pub(super) notes: Vec<String>,
}

/// A duplicate of a target object that is in its place, or in flight and so among `handles`.
pub(super) fn duplicate(
    target: &Descriptors,
    handles: &BTreeMap<usize, OwnedFd>,
    procs: &Procs<'_>,
    index: usize,
) -> Result<OwnedFd> {
    let object = &target.objects[index];
    let (pid, fd) = object.home;
    let duplicate = match (object.is_in_flight(), handles.get(&index), procs.get(&pid)) {
        (true, Some(handle), _) => handle.try_clone(),
        (false, _, Some(remote)) => remote.take_fd(fd),
        _ => Err(io::ErrorKind::NotFound.into()),
    };
    duplicate.during(pid, &format!("duplicating descriptor {fd}"))
}

impl Restore<'_, '_> {
    pub(super) fn remote(&mut self, pid: InnerPid) -> Result<&mut Remote> {
        match self.procs.get_mut(&pid) {
            Some(remote) => Ok(remote),
            None => Err(gone(pid)),
        }
    }

    pub(super) fn take(&self, (pid, fd): (InnerPid, i32)) -> Result<OwnedFd> {
        let remote = self.procs.get(&pid).ok_or_else(|| gone(pid))?;
        let doing = || format!("duplicating descriptor {fd}");
        remote.take_fd(fd).during(pid, &doing())
    }

    /// A duplicate of a target object that is in its place, or in flight.
    pub(super) fn duplicate(&self, index: usize) -> Result<OwnedFd> {
        duplicate(self.target, &self.handles, self.procs, index)
    }

    /// Takes hold of what stays but is needed in more slots, or as the model of another end.
    fn take_moving(&mut self) -> Result<()> {
        let installs = self.changes.values().flat_map(|c| &c.install);
        let flying = (0..self.target.objects.len())
            .filter(|&object| self.target.objects[object].is_in_flight());
        let needed: Vec<usize> = installs.map(|&(_, object)| object).chain(flying).collect();
        for object in needed {
            if let Some(now) = self.plan.reuse[object]
                && !self.handles.contains_key(&object)
            {
                let handle = self.take(self.current.objects[now].home)?;
                self.handles.insert(object, handle);
            }
        }
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        let changes = std::mem::take(&mut self.changes);
        for (&pid, change) in changes.iter().filter(|(_, c)| !c.close.is_empty()) {
            install::close(self.remote(pid)?, &change.close).during(pid, "closing descriptors")?;
        }
        self.changes = changes;
        Ok(())
    }

    /// Makes the objects that are not there, but for connections.
    fn make(&mut self, terminals: &dyn Fn(&mut Procs<'_>) -> Result<()>) -> Result<()> {
        // The other side of a pseudo-terminal can be opened when its master is there, and `/dev/tty` when the
        // process has a controlling terminal.
        self.make_those(|kind| matches!(kind, Kind::Master { .. }))?;
        let last = |kind: &Kind| matches!(kind, Kind::ControllingTerminal);
        self.make_those(|kind| !matches!(kind, Kind::Master { .. }) && !last(kind))?;
        self.fresh.clear();
        std::mem::take(&mut self.departed).bury(self.procs)?;
        terminals(self.procs)?;
        self.make_those(last)
    }

    fn make_those(&mut self, these: impl Fn(&Kind) -> bool) -> Result<()> {
        let target = self.target;
        for (index, object) in target.objects.iter().enumerate() {
            let missing = self.plan.reuse[index].is_none() && !self.is_connection(index);
            if missing && these(&object.kind) {
                let handle = self.make_object(index, object).map_err(named(object))?;
                self.handles.insert(index, handle);
            }
        }
        Ok(())
    }

    fn make_object(&mut self, index: usize, object: &Object) -> Result<OwnedFd> {
        let flags = path::reopen_flags(object.flags);
        let (pid, _) = object.home;
        let made = match &object.kind {
            Kind::File { ino } => self.open_file(*ino, object.flags),
            Kind::Memory { key } => self.shared.open_descriptor(*key, flags),
            Kind::Path { path } => path::open(self.env, path, object.flags),
            Kind::ControllingTerminal => return self.open_inside(object, b"/dev/tty\0"),
            Kind::Pipe { pipe } => return self.make_pipe_end(*pipe, object),
            Kind::External(id) => self.env.open_external(*id, object.writes()),
            Kind::Terminal { number } => tty::open_slave(self.env, *number, object.flags),
            Kind::Master { number } => {
                let (user, _) = owner_of(self.remote(pid)?.host());
                tty::make_master(self.env, *number, object.flags, user)
            }
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

    fn open_file(&self, ino: u64, flags: i32) -> io::Result<OwnedFd> {
        let opened = self.env.open_inode(ino, path::reopen_flags(flags));
        match opened {
            // Files without a name come back; directories do not.
            Err(e) if e.raw_os_error() == Some(libc::ESTALE) => {
                path::removed_directory(self.env, None, flags)
            }
            other => other,
        }
    }

    /// Opens what is another thing for every process in the process itself.
    fn open_inside(&mut self, object: &Object, path: &[u8]) -> Result<OwnedFd> {
        let (pid, _) = object.home;
        let mut batch = crate::remote::Batch::new();
        let path = batch.input(path);
        let flags = path::reopen_flags(object.flags) | libc::O_NOCTTY;
        let call = batch.call(
            libc::SYS_openat,
            &[libc::AT_FDCWD.into(), path.into(), flags.into(), 0.into()],
        );
        let remote = self.remote(pid)?;
        let outcome = remote.run(&batch).during(pid, "running a batch")?;
        let fd = outcome.result(call).during(pid, "opening it again")? as i32;
        let handle = remote.take_fd(fd);
        install::close(remote, &[fd]).during(pid, "closing descriptors")?;
        handle.during(pid, "duplicating it")
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

    /// Puts what was made or moves in its places: connections, or all the rest.
    fn install(&mut self, connections: bool) -> Result<()> {
        for (&pid, change) in &self.changes {
            let table = &self.target.tables[&pid];
            let mut wanted = Vec::with_capacity(change.install.len());
            for &(fd, object) in &change.install {
                if self.is_connection(object) == connections {
                    wanted.push(Wanted {
                        fd,
                        file: self.handles.get(&object).ok_or_else(|| gone(pid))?.as_fd(),
                        cloexec: table[&fd].cloexec,
                    });
                }
            }
            let remote = self.procs.get_mut(&pid).ok_or_else(|| gone(pid))?;
            install::install(remote, &wanted).during(pid, "putting descriptors in place")?;
            if !connections {
                install::set_cloexec(remote, &change.cloexec)
                    .during(pid, "setting close-on-exec")?;
            }
        }
        Ok(())
    }

    /// Puts right what the objects, which are in their places now, hold.
    fn settle(&mut self) -> Result<()> {
        for (index, object) in self.target.objects.iter().enumerate() {
            let now = self.plan.reuse[index].map(|now| &self.current.objects[now]);
            if now.is_none_or(|now| differs(now, object)) {
                let handle = self.duplicate(index)?;
                let note = settle_object(handle.as_fd(), self.env, now, object)
                    .during(object.home.0, "setting it up")
                    .map_err(named(object))?;
                let (pid, fd) = object.home;
                let note = note.map(|note| format!("process {pid}, descriptor {fd}: {note}"));
                self.notes.extend(note);
            }
            if let Some(owner) = object.owner
                && now.is_none_or(|now| (now.owner, now.flags) != (object.owner, object.flags))
            {
                lock::set_owner(self.procs, object, owner)
                    .during(object.home.0, "setting its owner")
                    .map_err(named(object))?;
            }
        }
        self.settle_pipes()?;
        self.settle_terminals()
    }

    fn settle_pipes(&mut self) -> Result<()> {
        let mut done = std::collections::BTreeSet::new();
        for (at, object) in self.target.objects.iter().enumerate() {
            let Kind::Pipe { pipe: index } = object.kind else {
                continue;
            };
            let wanted = &self.target.pipes[index];
            let now = self
                .plan
                .pipes
                .get(&index)
                .map(|now| &self.current.pipes[*now]);
            if !done.insert(index) || now.is_some_and(|now| pipe::same(now, wanted)) {
                continue;
            }
            let handle = self.duplicate(at)?;
            let fresh = || {
                Ok(Pipe {
                    capacity: rustix::pipe::fcntl_getpipe_size(&handle)?,
                    ..Pipe::default()
                })
            };
            now.map_or_else(fresh, |now| Ok(now.clone()))
                .and_then(|now| pipe::set(handle.as_fd(), &now, wanted))
                .during(object.home.0, "filling it")
                .map_err(named(object))?;
        }
        Ok(())
    }

    fn settle_terminals(&mut self) -> Result<()> {
        for (number, wanted) in &self.target.terminals {
            let holds = |object: &Object| match object.kind {
                Kind::Terminal { number: held } | Kind::Master { number: held } => held == *number,
                _ => false,
            };
            if self.current.terminals.get(number) == Some(wanted) {
                continue;
            }
            if let Some(index) = self.target.objects.iter().position(holds) {
                let handle = self.duplicate(index)?;
                tty::set(handle.as_fd(), wanted)
                    .during(self.target.objects[index].home.0, "setting the terminal up")?;
            }
        }
        Ok(())
    }
}

fn differs(now: &Object, wanted: &Object) -> bool {
    let held = match &wanted.kind {
        // These are put right elsewhere.
        Kind::Pipe { .. } | Kind::Epoll { .. } | Kind::Socket(_) => false,
        Kind::Timer(timer) if timer.value != (0, 0) => true,
        kind => *kind != now.kind,
    };
    held || (now.flags, now.pos) != (wanted.flags, wanted.pos)
}

/// Sets flags, position and what the kind itself holds. Returns what could not be kept.
fn settle_object(
    file: BorrowedFd<'_>,
    env: &dyn Environment,
    now: Option<&Object>,
    wanted: &Object,
) -> io::Result<Option<&'static str>> {
    if wanted.flags & libc::O_PATH != 0 {
        return Ok(None);
    }
    // Signalling (O_ASYNC) is set where the owner is; here it ends.
    if now.is_none_or(|now| (now.flags ^ wanted.flags) & (SETTABLE | libc::O_ASYNC) != 0) {
        sys::fd::set_status_flags(file, wanted.flags & SETTABLE)?;
    }
    match (&wanted.kind, now.map(|now| &now.kind)) {
        (Kind::File { .. } | Kind::Path { .. } | Kind::Memory { .. }, _)
            if now.map_or(0, |now| now.pos) != wanted.pos =>
        {
            rustix::fs::seek(file, rustix::fs::SeekFrom::Start(wanted.pos))?;
        }
        (Kind::Event { count, semaphore }, Some(Kind::Event { count: now, .. })) => {
            event::set_event(file, *now, *count, *semaphore)?;
        }
        (Kind::Timer(timer), _) => event::set_timer(file, timer)?,
        (Kind::Signals { mask }, Some(_)) => sys::fd::set_signalfd(file, *mask)?,
        (Kind::Inotify { watches, queued }, now) => {
            let now = match now {
                Some(Kind::Inotify { watches, queued }) => (watches.as_slice(), *queued),
                _ => (&[][..], 0),
            };
            if watch::set(file, env, now, (watches, *queued))? {
                return Ok(Some(
                    "inotify events that waited at the checkpoint are lost",
                ));
            }
        }
        _ => {}
    }
    Ok(None)
}

/// Makes a file be of the user whom a process acts as.
pub(super) fn give_to(file: &OwnedFd, of: HostPid) -> io::Result<()> {
    let (uid, gid) = owner_of(of);
    let (uid, gid) = (
        rustix::fs::Uid::from_raw(uid),
        rustix::fs::Gid::from_raw(gid),
    );
    Ok(rustix::fs::fchown(file, Some(uid), Some(gid))?)
}

/// The user whom a process acts as.
fn owner_of(pid: HostPid) -> (u32, u32) {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(format!("/proc/{pid}")).map_or((0, 0), |m| (m.uid(), m.gid()))
}

fn gone(pid: InnerPid) -> Error {
    Error::Corrupt {
        pid,
        what: "it is not among the processes that are stopped".to_owned(),
    }
}

/// Says which descriptor an error is about.
pub(super) fn named(object: &Object) -> impl Fn(Error) -> Error {
    let (fd, kind) = (object.home.1, object.kind.describe());
    move |error| match error {
        Error::Process { doing, pid, source } => Error::Process {
            doing: format!("restoring descriptor {fd} ({kind}), {doing},"),
            pid,
            source,
        },
        other => other,
    }
}
