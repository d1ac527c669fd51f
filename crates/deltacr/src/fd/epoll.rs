//! Epoll instances. A registration is keyed by the file and the number it had in the process that registered
//! it, so registrations are made inside a process that has both.

use std::io;
use std::os::fd::OwnedFd;

use super::Procs;
use super::capture::{Capture, Holder};
use super::fdinfo::EpollItem;
use super::model::{Descriptors, Interest, Kind, Slot};
use super::plan::Plan;
use crate::error::{During, Result};
use crate::ids::InnerPid;
use crate::remote::{Arg, Batch, CallId};
use crate::sys;

/// Takes down that there is an epoll; [`resolve`] reads what it watches once all files are known.
pub(crate) fn capture(capture: &mut Capture<'_>, holder: &Holder<'_>) -> Kind {
    let lines = holder.raw.info.epoll.clone();
    capture.epolls.push((capture.image.objects.len(), lines));
    Kind::Epoll {
        interests: Vec::new(),
    }
}

/// Finds the files that the epolls watch.
pub(crate) fn resolve(capture: &mut Capture<'_>, procs: &Procs<'_>) -> Result<()> {
    for (epoll, lines) in std::mem::take(&mut capture.epolls) {
        let mut found = Vec::with_capacity(lines.len());
        for (index, line) in lines.iter().enumerate() {
            let same_number = lines[..index].iter().filter(|l| l.fd == line.fd).count();
            let Some(object) = watched(capture, procs, epoll, line, same_number)? else {
                capture.image.objects[epoll].kind = Kind::Refused {
                    what: format!(
                        "an epoll that watches a file which was descriptor {} and which no process has that has the epoll",
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
    procs: &Procs<'_>,
    epoll: usize,
    line: &EpollItem,
    same_number: usize,
) -> Result<Option<usize>> {
    let image = &capture.image;
    for &(pid, epfd) in &image.objects[epoll].slots {
        let owner = (procs[&pid].host(), epfd);
        let is_watched = |file| {
            let same = sys::fd::epoll_watches(file, owner, line.fd, same_number);
            match same {
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
                other => other.during(pid, "asking what an epoll watches"),
            }
        };
        if let Some(slot) = image.slot(pid, line.fd)
            && is_watched((owner.0, line.fd))?
        {
            return Ok(Some(slot.object));
        }
        // The file may be at another number since.
        let here = |object: &usize| {
            image.objects[*object]
                .slots
                .iter()
                .any(|slot| slot.0 == pid)
        };
        let inodes = capture.inodes.iter().enumerate();
        let alike = inodes.filter(|(_, inode)| **inode == line.ino);
        for object in alike.map(|(object, _)| object).filter(here) {
            if is_watched(capture.firsts[object])? {
                return Ok(Some(object));
            }
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
                if !wanted.iter().any(|goal| same(plan, interest, goal)) {
                    control(procs, current, &now.slots, libc::EPOLL_CTL_DEL, interest)?;
                }
            }
        }
    }
    Ok(())
}

/// Registers what the epolls should watch and do not. Must run when the tables are as `target` says.
pub(crate) fn register(
    current: &Descriptors,
    target: &Descriptors,
    plan: &Plan,
    procs: &mut Procs<'_>,
) -> Result<()> {
    for (index, object) in target.objects.iter().enumerate() {
        let Kind::Epoll { interests: wanted } = &object.kind else {
            continue;
        };
        let now = match plan.reuse[index].map(|now| &current.objects[now].kind) {
            Some(Kind::Epoll { interests }) => interests.as_slice(),
            _ => &[],
        };
        for goal in wanted {
            if !now.iter().any(|interest| same(plan, interest, goal)) {
                control(procs, target, &object.slots, libc::EPOLL_CTL_ADD, goal)?;
            }
        }
    }
    Ok(())
}

fn same(plan: &Plan, now: &Interest, goal: &Interest) -> bool {
    (now.fd, now.events, now.data) == (goal.fd, goal.events, goal.data)
        && plan.reuse[goal.object] == Some(now.object)
}

/// Runs `epoll_ctl(2)` in a process that has both the epoll and the watched file.
fn control(
    procs: &mut Procs<'_>,
    image: &Descriptors,
    epolls: &[(InnerPid, i32)],
    operation: i32,
    interest: &Interest,
) -> Result<()> {
    let at_number = |&&(pid, _): &&(InnerPid, i32)| {
        image.slot(pid, interest.fd).map(|slot| slot.object) == Some(interest.object)
    };
    if let Some((pid, epfd)) = epolls.iter().find(at_number).copied() {
        let mut batch = Batch::new();
        let call = call(&mut batch, epfd, operation, interest);
        return run(procs, pid, &batch, &[call]);
    }
    let elsewhere = epolls.iter().find_map(|&(pid, epfd)| {
        let mut slots = image.objects[interest.object].slots.iter();
        let &(_, from) = slots.find(|slot| slot.0 == pid)?;
        Some((pid, epfd, from))
    });
    let Some((pid, epfd, from)) = elsewhere else {
        return Ok(());
    };
    let mut batch = Batch::new();
    let calls = lend(
        &mut batch,
        image.slot(pid, interest.fd),
        (from, interest.fd),
        |b| call(b, epfd, operation, interest),
    );
    run(procs, pid, &batch, &calls)
}

fn call(batch: &mut Batch, epfd: i32, operation: i32, interest: &Interest) -> CallId {
    let mut event = interest.events.to_le_bytes().to_vec();
    event.extend_from_slice(&interest.data.to_le_bytes());
    let event = batch.input(&event);
    let args = [
        epfd.into(),
        operation.into(),
        interest.fd.into(),
        event.into(),
    ];
    batch.call(libc::SYS_epoll_ctl, &args)
}

/// Lets a descriptor have another number for the time of one call; what has that number is put aside.
fn lend(
    batch: &mut Batch,
    occupant: Option<Slot>,
    (from, to): (i32, i32),
    meanwhile: impl FnOnce(&mut Batch) -> CallId,
) -> Vec<CallId> {
    let place = |b: &mut Batch, from: Arg, cloexec: bool| {
        let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
        b.must(libc::SYS_dup3, &[from, to.into(), flags.into()])
    };
    let Some(occupant) = occupant else {
        let placed = place(batch, from.into(), true);
        let done = meanwhile(batch);
        return vec![placed, done, batch.call(libc::SYS_close, &[to.into()])];
    };
    let aside = [to.into(), libc::F_DUPFD_CLOEXEC.into(), 0.into()];
    let aside = batch.must(libc::SYS_fcntl, &aside);
    let placed = place(batch, from.into(), true);
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
