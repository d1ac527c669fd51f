//! Epoll instances. A registration is keyed by the file and the number it had in the process that registered
//! it, so registrations are made inside a process that has both.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::Procs;
use super::capture::{Capture, Holder};
use super::fdinfo::EpollItem;
use super::model::{Descriptors, Interest, Kind, Object, Slot};
use super::plan::Plan;
use super::restore::{Restore, duplicate};
use crate::error::{During, Result};
use crate::ids::InnerPid;
use crate::remote::{Arg, Batch, CallId};
use crate::sys;

/// `EPOLLET` and `EPOLLEXCLUSIVE`.
const EDGE: u32 = 1 << 31;
const EXCLUSIVE: u32 = 1 << 28;
/// What an `epoll_event` takes of a batch's heap.
const EVENT: usize = 16;

/// Takes down that there is an epoll; [`resolve`] reads what it watches once all files are known.
pub(crate) fn capture(capture: &mut Capture<'_>, holder: &Holder<'_>) -> Kind {
    let lines = holder.raw.info.epoll.clone();
    capture.epolls.push((capture.image.objects.len(), lines));
    Kind::Epoll {
        interests: Vec::new(),
    }
}

/// Finds the files that the epolls watch.
pub(crate) fn resolve(capture: &mut Capture<'_>) -> Result<()> {
    for (epoll, lines) in std::mem::take(&mut capture.epolls) {
        let mut found = Vec::with_capacity(lines.len());
        for (index, line) in lines.iter().enumerate() {
            let same_number = lines[..index].iter().filter(|l| l.fd == line.fd).count();
            let Some(object) = watched(capture, epoll, line, same_number)? else {
                capture.image.objects[epoll].kind = Kind::Refused {
                    what: format!(
                        "an epoll that watches a file which was descriptor {} and which no process has open",
                        line.fd
                    ),
                };
                break;
            };
            found.push(Interest {
                fd: line.fd,
                events: line.events,
                data: line.data,
                object,
            });
        }
        found.sort_unstable_by_key(|interest| (interest.fd, interest.object));
        if let Kind::Epoll { interests } = &mut capture.image.objects[epoll].kind {
            *interests = found;
        }
    }
    Ok(())
}

/// The object that an epoll watches by this line. Most are still at the number that they were registered by.
fn watched(
    capture: &Capture<'_>,
    epoll: usize,
    line: &EpollItem,
    same_number: usize,
) -> Result<Option<usize>> {
    let image = &capture.image;
    let owner = capture.firsts[epoll];
    let is_watched = |object: usize| {
        let file = capture.firsts[object];
        let same = sys::fd::epoll_watches(file, owner, line.fd, same_number);
        match same {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            other => other.during(image.objects[epoll].home.0, "asking what an epoll watches"),
        }
    };
    for &(pid, _) in &image.objects[epoll].slots {
        if let Some(slot) = image.slot(pid, line.fd)
            && is_watched(slot.object)?
        {
            return Ok(Some(slot.object));
        }
    }
    // The file may be at another number since, or elsewhere.
    for (object, inode) in capture.inodes.iter().enumerate() {
        if *inode == line.ino && is_watched(object)? {
            return Ok(Some(object));
        }
    }
    Ok(None)
}

/// A new instance that watches nothing.
pub(crate) fn make() -> io::Result<OwnedFd> {
    let flags = rustix::event::epoll::CreateFlags::CLOEXEC;
    Ok(rustix::event::epoll::create(flags)?)
}

/// What an epoll that stays watches and should not. Must run while the tables are as `current` says:
/// afterwards the numbers name other files.
pub(crate) fn forget(
    current: &Descriptors,
    target: &Descriptors,
    plan: &Plan,
    procs: &mut Procs<'_>,
) -> Result<()> {
    for (index, object) in target.objects.iter().enumerate() {
        if let Kind::Epoll { interests: wanted } = &object.kind
            && let Some(now) = plan.reuse[index].map(|now| &current.objects[now])
            && let Kind::Epoll { interests } = &now.kind
        {
            for interest in interests {
                // What is only in flight is closed, and forgotten by that.
                if !wanted.iter().any(|goal| same(plan, interest, goal))
                    && !current.objects[interest.object].is_in_flight()
                {
                    let taken = |procs: &Procs<'_>, object: usize| {
                        let (pid, fd) = current.objects[object].home;
                        let remote = procs.get(&pid).ok_or(io::ErrorKind::NotFound);
                        let taken = remote.map_err(io::Error::from);
                        taken
                            .and_then(|r| r.take_fd(fd))
                            .during(pid, "duplicating it")
                    };
                    let change = (libc::EPOLL_CTL_DEL, interest);
                    control(procs, current, now, change, &taken)?;
                }
            }
        }
    }
    Ok(())
}

/// Registers what the epolls should watch and do not. Must run when the tables are as the target says.
pub(crate) fn register(restore: &mut Restore<'_, '_>) -> Result<()> {
    let (current, target) = (restore.current, restore.target);
    for (index, object) in target.objects.iter().enumerate() {
        let Kind::Epoll { interests: wanted } = &object.kind else {
            continue;
        };
        let now = match restore.plan.reuse[index].map(|now| &current.objects[now].kind) {
            Some(Kind::Epoll { interests }) => interests.as_slice(),
            _ => &[],
        };
        for goal in wanted {
            if !now
                .iter()
                .any(|interest| same(&restore.plan, interest, goal))
            {
                let handles = &restore.handles;
                let taken = |procs: &Procs<'_>, index| duplicate(target, handles, procs, index);
                let change = (libc::EPOLL_CTL_ADD, goal);
                control(restore.procs, target, object, change, &taken)?;
            }
        }
    }
    Ok(())
}

/// Makes epolls that stay tell of what is ready. An edge may have been told of since, or not yet then, though what it is about
/// looks the same: better an edge too many, which a program must be ready for, than one too few.
pub(crate) fn rearm(restore: &mut Restore<'_, '_>) -> Result<()> {
    let target = restore.target;
    let kept = |object: &usize| restore.plan.reuse[*object].is_some();
    let mut by_process: BTreeMap<InnerPid, Vec<(i32, &Interest)>> = BTreeMap::new();
    for epoll in (0..target.objects.len()).filter(kept) {
        let Kind::Epoll { interests } = &target.objects[epoll].kind else {
            continue;
        };
        let edges = interests.iter().filter(|i| i.events & EDGE != 0);
        for interest in edges.filter(|i| kept(&i.object)) {
            // What is watched by a number that it no longer has is left as it is.
            if let Some((pid, epfd)) = at_number(target, &target.objects[epoll], interest) {
                by_process.entry(pid).or_default().push((epfd, interest));
            }
        }
    }
    for (pid, edges) in by_process {
        let mut edges = edges.into_iter().peekable();
        while edges.peek().is_some() {
            let (mut batch, mut calls) = (Batch::new(), Vec::new());
            while batch.fits(2, 2 * EVENT)
                && let Some((epfd, interest)) = edges.next()
            {
                let operations = match interest.events & EXCLUSIVE {
                    0 => &[libc::EPOLL_CTL_MOD][..],
                    // The kernel lets these not be changed.
                    _ => &[libc::EPOLL_CTL_DEL, libc::EPOLL_CTL_ADD],
                };
                let made = operations
                    .iter()
                    .map(|op| call(&mut batch, epfd.into(), *op, interest));
                calls.extend(made);
            }
            run(restore.procs, pid, &batch, &calls)?;
        }
    }
    Ok(())
}

/// A process that has both the epoll, and what it watches at the number that it is watched by; and the epoll's number there.
fn at_number(image: &Descriptors, epoll: &Object, interest: &Interest) -> Option<(InnerPid, i32)> {
    let mut slots = epoll.slots.iter().copied();
    slots.find(|&(pid, _)| {
        image.slot(pid, interest.fd).map(|slot| slot.object) == Some(interest.object)
    })
}

fn same(plan: &Plan, now: &Interest, goal: &Interest) -> bool {
    (now.fd, now.events, now.data) == (goal.fd, goal.events, goal.data)
        && plan.reuse[goal.object] == Some(now.object)
}

/// Finds a duplicate of an object.
type Taken<'a> = &'a dyn Fn(&Procs<'_>, usize) -> Result<OwnedFd>;

/// Runs `epoll_ctl(2)` in a process that has both the epoll and the watched file; for want of one, in a process that is lent
/// them.
fn control(
    procs: &mut Procs<'_>,
    image: &Descriptors,
    epoll: &Object,
    (operation, interest): (i32, &Interest),
    taken: Taken<'_>,
) -> Result<()> {
    if let Some((pid, epfd)) = at_number(image, epoll, interest) {
        let mut batch = Batch::new();
        let call = call(&mut batch, epfd.into(), operation, interest);
        return run(procs, pid, &batch, &[call]);
    }
    let elsewhere = epoll.slots.iter().find_map(|&(pid, epfd)| {
        let mut slots = image.objects[interest.object].slots.iter();
        let &(_, from) = slots.find(|slot| slot.0 == pid)?;
        Some((pid, epfd, from))
    });
    let mut batch = Batch::new();
    if let Some((pid, epfd, from)) = elsewhere {
        let occupant = image.slot(pid, interest.fd);
        let calls = lend(&mut batch, occupant, (from.into(), interest.fd), |b| {
            call(b, epfd.into(), operation, interest)
        });
        return run(procs, pid, &batch, &calls);
    }
    let (pid, doing) = (epoll.home.0, "lending descriptors");
    let of_epoll = image.objects.iter().position(|o| std::ptr::eq(o, epoll));
    let handles = [
        taken(procs, of_epoll.unwrap_or_default())?,
        taken(procs, interest.object)?,
    ];
    let Some(remote) = procs.get_mut(&pid) else {
        return Ok(());
    };
    let given = remote.give_fds(&handles.each_ref().map(OwnedFd::as_fd));
    // Out of the way of the number that the file is to have for a moment.
    let mut calls = Vec::new();
    for from in given.during(pid, doing)? {
        let above = [
            from.into(),
            libc::F_DUPFD_CLOEXEC.into(),
            (interest.fd + 1).into(),
        ];
        calls.push(batch.must(libc::SYS_fcntl, &above));
        calls.push(batch.call(libc::SYS_close, &[from.into()]));
    }
    let (epfd, from) = (calls[0], calls[2]);
    let occupant = image.slot(pid, interest.fd);
    calls.extend(lend(
        &mut batch,
        occupant,
        (from.into(), interest.fd),
        |b| call(b, epfd.into(), operation, interest),
    ));
    calls.push(batch.call(libc::SYS_close, &[epfd.into()]));
    calls.push(batch.call(libc::SYS_close, &[from.into()]));
    run(procs, pid, &batch, &calls)
}

fn call(batch: &mut Batch, epfd: Arg, operation: i32, interest: &Interest) -> CallId {
    let mut event = interest.events.to_le_bytes().to_vec();
    event.extend_from_slice(&interest.data.to_le_bytes());
    let event = batch.input(&event);
    let args = [epfd, operation.into(), interest.fd.into(), event.into()];
    batch.call(libc::SYS_epoll_ctl, &args)
}

/// Lets a descriptor have another number for the time of one call; what has that number is put aside.
fn lend(
    batch: &mut Batch,
    occupant: Option<Slot>,
    (from, to): (Arg, i32),
    meanwhile: impl FnOnce(&mut Batch) -> CallId,
) -> Vec<CallId> {
    let place = |b: &mut Batch, from: Arg, cloexec: bool| {
        let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
        b.must(libc::SYS_dup3, &[from, to.into(), flags.into()])
    };
    let Some(occupant) = occupant else {
        let placed = place(batch, from, true);
        let done = meanwhile(batch);
        return vec![placed, done, batch.call(libc::SYS_close, &[to.into()])];
    };
    let aside = [to.into(), libc::F_DUPFD_CLOEXEC.into(), 0.into()];
    let aside = batch.must(libc::SYS_fcntl, &aside);
    let placed = place(batch, from, true);
    let done = meanwhile(batch);
    let back = place(batch, aside.into(), occupant.cloexec);
    let closed = batch.call(libc::SYS_close, &[aside.into()]);
    vec![aside, placed, done, back, closed]
}

fn run(procs: &mut Procs<'_>, pid: InnerPid, batch: &Batch, calls: &[CallId]) -> Result<()> {
    let Some(remote) = procs.get_mut(&pid) else {
        return Ok(());
    };
    let doing = "putting an epoll right";
    let outcome = remote.run(batch).during(pid, doing)?;
    calls
        .iter()
        .try_for_each(|call| outcome.result(*call).during(pid, doing).map(drop))
}
