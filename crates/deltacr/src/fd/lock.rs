//! File locks, and the owners of files that signal. Both are set inside the process: a lock of `F_SETLK` belongs
//! to the descriptor table it was taken through, an owner remembers who set it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;

use super::Procs;
use super::capture::{Capture, Holder};
use super::fdinfo::{LockClass, LockLine};
use super::guise::{Guise, in_guise};
use super::install::run_all;
use super::model::{Descriptors, Lock, LockKind, Object, Owner};
use super::plan::Plan;
use crate::error::{During, Result};
use crate::ids::{HostPid, InnerPid};
use crate::remote::{Arg, Batch};
use crate::sys;

/// The class of owners that are process groups.
const F_OWNER_PGRP: i32 = 2;

/// The lock that a line of `fdinfo` tells of.
pub(crate) fn of(line: &LockLine, pid: InnerPid) -> Lock {
    let class = match line.class {
        LockClass::Posix => LockKind::Process(pid),
        LockClass::OpenFile => LockKind::OpenFile,
        LockClass::Flock => LockKind::Flock,
    };
    Lock {
        class,
        write: line.write,
        start: line.start,
        end: line.end,
    }
}

/// Whom the file signals. Asked only where signals are on, for it takes a duplicate.
pub(crate) fn owner(capture: &Capture<'_>, holder: &Holder<'_>) -> Result<Option<Owner>> {
    if holder.flags() & libc::O_ASYNC == 0 && holder.raw.info.lease.is_none() {
        return Ok(None);
    }
    if holder.in_flight() {
        return Err(holder.refuse("a file that signals, which no process has open"));
    }
    let handle = holder.take()?;
    let (class, host) = holder.during(sys::fd::owner(handle.as_fd()), "asking for the owner")?;
    let signal = holder.during(
        sys::fd::owner_signal(handle.as_fd()),
        "asking for the signal",
    )?;
    let id = match inner_number(host) {
        Some(id) => id,
        None if class == F_OWNER_PGRP && host != 0 => {
            return Err(holder.refuse("a file that signals a group whose leader has ended"));
        }
        // One that has ended hears nothing, like nobody.
        None => 0,
    };
    // Kernels without checkpoints of their own do not tell.
    let users = match sys::fd::owner_users(handle.as_fd()) {
        Ok((real, effective)) => {
            let owners = capture.owners()?;
            Some((owners.inside((real, 0)).0, owners.inside((effective, 0)).0))
        }
        Err(_) => None,
    };
    Ok(Some(Owner {
        class,
        id,
        signal,
        users,
    }))
}

/// The number inside of a process, thread or group leader.
fn inner_number(host: i32) -> Option<i32> {
    HostPid(host).inner().ok().map(|pid| pid.0)
}

/// Takes the locks that should be held and lets go of those that should not. Must run when the tables are as `target` says.
pub(crate) fn settle(
    current: &Descriptors,
    target: &Descriptors,
    plan: &Plan,
    touched: &BTreeSet<InnerPid>,
    procs: &mut Procs<'_>,
) -> Result<()> {
    let mut batches = BTreeMap::new();
    for (index, object) in target.objects.iter().enumerate() {
        for lock in held(current, plan, index) {
            if !object.locks.contains(lock) {
                add(&mut batches, object, lock, false);
            }
        }
    }
    for (index, object) in target.objects.iter().enumerate() {
        let held = held(current, plan, index);
        for lock in &object.locks {
            // A process loses its locks on a file by closing any descriptor of it.
            let lost = matches!(lock.class, LockKind::Process(pid) if touched.contains(&pid));
            if lost || !held.contains(lock) {
                add(&mut batches, object, lock, true);
            }
        }
    }
    // All is let go of before anything is taken, whoever holds it.
    for taking in [false, true] {
        for (&(pid, _), batch) in batches.iter().filter(|((_, take), _)| *take == taking) {
            if let Some(remote) = procs.get_mut(&pid) {
                run_all(remote, batch).during(pid, "putting file locks right")?;
            }
        }
    }
    Ok(())
}

fn held<'a>(current: &'a Descriptors, plan: &Plan, index: usize) -> &'a [Lock] {
    plan.reuse[index].map_or(&[], |now| &current.objects[now].locks)
}

/// Adds the call that takes a lock or lets it go to the batch of the process which has to make it.
fn add(batches: &mut BTreeMap<(InnerPid, bool), Batch>, object: &Object, lock: &Lock, take: bool) {
    let fits = |&&(pid, _): &&(InnerPid, i32)| match lock.class {
        LockKind::Process(owner) => owner == pid,
        LockKind::Flock | LockKind::OpenFile => true,
    };
    let Some(&(pid, fd)) = object.slots.iter().find(fits) else {
        return;
    };
    let batch = batches.entry((pid, take)).or_default();
    if lock.class == LockKind::Flock {
        let operation = match (take, lock.write) {
            (false, _) => libc::LOCK_UN,
            (true, true) => libc::LOCK_EX | libc::LOCK_NB,
            (true, false) => libc::LOCK_SH | libc::LOCK_NB,
        };
        batch.call(libc::SYS_flock, &[fd.into(), operation.into()]);
        return;
    }
    let command = match lock.class {
        LockKind::OpenFile => libc::F_OFD_SETLK,
        _ => libc::F_SETLK,
    };
    let kind = match (take, lock.write) {
        (false, _) => libc::F_UNLCK,
        (true, true) => libc::F_WRLCK,
        (true, false) => libc::F_RDLCK,
    };
    let range = batch.input(&flock(kind, lock.start, lock.end));
    batch.call(libc::SYS_fcntl, &[fd.into(), command.into(), range.into()]);
}

/// A `struct flock` from the file's beginning.
fn flock(kind: i32, start: u64, end: Option<u64>) -> [u8; 32] {
    let len = end.map_or(0, |end| (end - start.min(end)).saturating_add(1));
    let mut raw = [0; 32];
    raw[..2].copy_from_slice(&(kind as i16).to_le_bytes());
    raw[8..16].copy_from_slice(&start.to_le_bytes());
    raw[16..24].copy_from_slice(&len.to_le_bytes());
    raw
}

/// Makes a file, at its slot in a process, signal its owner again. A process that was just made, of which `made` tells, says so as
/// the user who did.
pub(crate) fn set_owner(
    procs: &mut Procs<'_>,
    object: &Object,
    owner: Owner,
    made: impl Fn(InnerPid) -> bool,
) -> io::Result<()> {
    let (pid, fd) = object.slots[0];
    let remote = procs.get_mut(&pid).ok_or(io::ErrorKind::NotFound)?;
    let guise = owner
        .users
        .filter(|_| made(pid))
        .map(|(real_user, user)| Guise {
            real_user,
            user,
            group: 0,
        });
    let mut batch = Batch::new();
    let raw = [owner.class.to_le_bytes(), owner.id.to_le_bytes()].concat();
    let raw = batch.input(&raw);
    let fcntl = |batch: &mut Batch, command: i32, argument: Arg| {
        batch.call(libc::SYS_fcntl, &[fd.into(), command.into(), argument])
    };
    let signal = fcntl(&mut batch, sys::fd::F_SETSIG, owner.signal.into());
    let flags = fcntl(&mut batch, libc::F_SETFL, object.flags.into());
    let owned = in_guise(&mut batch, guise, |batch| {
        fcntl(batch, sys::fd::F_SETOWN_EX, raw.into())
    });
    let outcome = remote.run(&batch)?;
    [signal, flags, owned]
        .into_iter()
        .try_for_each(|call| outcome.result(call).map(drop))
}
