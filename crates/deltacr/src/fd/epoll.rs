//! Epoll instances. A registration is keyed by the file and the number it had in the process that registered
//! it, so registrations are made inside a process that has both.

use std::io;
use std::os::fd::OwnedFd;

use super::Procs;
use super::capture::{Capture, Holder};
use super::model::{Descriptors, Interest, Kind};
use super::plan::Plan;
use crate::error::{During, Result};
use crate::ids::InnerPid;
use crate::remote::Batch;
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
            let Some(object) = watched(&capture.image, procs, epoll, line.fd, same_number)? else {
                capture.image.objects[epoll].kind = Kind::Refused {
                    what: format!(
                        "an epoll that watches a file which is no longer at descriptor {}",
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

/// The object at `fd` in a process that shares the epoll, if the epoll watches that very file.
fn watched(
    image: &Descriptors,
    procs: &Procs<'_>,
    epoll: usize,
    fd: i32,
    same_number: usize,
) -> Result<Option<usize>> {
    for &(pid, epfd) in &image.objects[epoll].slots {
        if let Some(slot) = image.slot(pid, fd) {
            let same = sys::fd::epoll_watches(procs[&pid].host(), epfd, fd, same_number);
            // The file may have been closed since; then the number names none or another.
            match same {
                Ok(true) => return Ok(Some(slot.object)),
                Ok(false) => {}
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
                Err(e) => return Err(e).during(pid, "asking what an epoll watches"),
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

/// Runs `epoll_ctl(2)` in a process in which the epoll and the watched number both are.
fn control(
    procs: &mut Procs<'_>,
    image: &Descriptors,
    epolls: &[(InnerPid, i32)],
    operation: i32,
    interest: &Interest,
) -> Result<()> {
    let here = |&&(pid, _): &&(InnerPid, i32)| {
        image.slot(pid, interest.fd).map(|slot| slot.object) == Some(interest.object)
    };
    let Some((pid, epfd)) = epolls.iter().find(here).copied() else {
        return Ok(());
    };
    let Some(remote) = procs.get_mut(&pid) else {
        return Ok(());
    };
    let mut batch = Batch::new();
    let mut event = interest.events.to_le_bytes().to_vec();
    event.extend_from_slice(&interest.data.to_le_bytes());
    let event = batch.input(&event);
    let call = batch.call(
        libc::SYS_epoll_ctl,
        &[
            epfd.into(),
            operation.into(),
            interest.fd.into(),
            event.into(),
        ],
    );
    let doing = "putting an epoll right";
    let outcome = remote.run(&batch).during(pid, doing)?;
    outcome.result(call).during(pid, doing).map(drop)
}
