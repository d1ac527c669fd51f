//! Restore: making a stopped tree have open what an image says.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::install::{self, Wanted};
use super::model::{Descriptors, Object};
use super::plan::{Plan, TableChange};
use super::process::Departed;
use super::{Prepared, Procs, epoll, lease, lock, pipe};
use crate::env::Environment;
use crate::error::{During, Error, Result};
use crate::ids::{HostPid, InnerPid};
use crate::mem::SharedObjects;
use crate::remote::Remote;

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
/// `shared` holds the memfds as they are to be; `prepared`, what was made of the target already.
/// Returns notes for the user: what could not be kept.
///
/// # Errors
/// A file could not be made or put in its place; the tables are then in between the two states.
pub fn restore(
    current: &Descriptors,
    target: &Descriptors,
    procs: &mut Procs<'_>,
    env: &dyn Environment,
    (shared, prepared): (&SharedObjects, &mut Prepared),
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
        prepared,
        handles: BTreeMap::new(),
        feeders: Vec::new(),
        departed: Departed::default(),
        hung_up: BTreeMap::new(),
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
    restore.make_telling()?;
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
    pub(super) shared: &'a SharedObjects,
    pub(super) prepared: &'a mut Prepared,
    /// Duplicates of target objects, for as long as they are on their way: to their slots, or into queues.
    pub(super) handles: BTreeMap<usize, OwnedFd>,
    /// The other ends of connections that nobody has the other end of: closed when the queues are filled.
    pub(super) feeders: Vec<(usize, OwnedFd)>,
    pub(super) departed: Departed,
    /// Masters of terminals that are to be hung up.
    pub(super) hung_up: BTreeMap<u32, OwnedFd>,
    /// Ends of new pipes, while others may want them.
    pub(super) fresh: BTreeMap<usize, pipe::Fresh>,
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
            self.remote(pid)?
                .close(&change.close)
                .during(pid, "closing descriptors")?;
        }
        self.changes = changes;
        Ok(())
    }

    /// Puts what was made or moves in its places: what could only be made late, or all the rest.
    fn install(&mut self, late: bool) -> Result<()> {
        for (&pid, change) in &self.changes {
            let table = &self.target.tables[&pid];
            let mut wanted = Vec::with_capacity(change.install.len());
            for &(fd, object) in &change.install {
                if self.is_late(object) == late {
                    wanted.push(Wanted {
                        fd,
                        file: self.handles.get(&object).ok_or_else(|| gone(pid))?.as_fd(),
                        cloexec: table[&fd].cloexec,
                    });
                }
            }
            let remote = self.procs.get_mut(&pid).ok_or_else(|| gone(pid))?;
            install::install(remote, &wanted).during(pid, "putting descriptors in place")?;
            if !late {
                install::set_cloexec(remote, &change.cloexec)
                    .during(pid, "setting close-on-exec")?;
            }
        }
        Ok(())
    }
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
pub(super) fn owner_of(pid: HostPid) -> (u32, u32) {
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
