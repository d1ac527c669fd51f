//! Leases (`F_SETLEASE`). They belong to the open file, but only its owner may take one, so that it is taken inside the
//! process, as the file's owner.
//!
//! One that cannot be had again is no reason to fail: the kernel may take a lease away at any time, and its holder is told.

use std::io;

use super::Procs;
use super::install::run_all;
use super::lock;
use super::model::{Descriptors, Kind, Lease, Object};
use super::plan::Plan;
use crate::env::Environment;
use crate::error::{During, Result};
use crate::ids::InnerPid;
use crate::remote::{Batch, Remote};

/// Bytes of `struct stat`, and where it has the owner.
const STAT: usize = 144;
const STAT_UID: usize = 28;

/// Makes the open files have the leases that they should. Must run when the tables are as `target` says. Returns notes for the
/// user: what could not be had again.
pub(crate) fn settle(
    current: &Descriptors,
    target: &Descriptors,
    plan: &Plan,
    procs: &mut Procs<'_>,
    env: &dyn Environment,
) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    let made = |pid| !current.tables.contains_key(&pid);
    let held = |index: usize| plan.reuse[index].and_then(|now| current.objects[now].lease);
    // All are let go of before any is taken, for they exclude each other.
    for (index, object) in target.objects.iter().enumerate() {
        if held(index).is_some() && held(index) != object.lease {
            let (pid, fd) = object.home;
            if let Some(remote) = procs.get_mut(&pid) {
                run_all(remote, &release(fd)).during(pid, "giving up a lease")?;
            }
        }
    }
    for (index, object) in target.objects.iter().enumerate() {
        if let Some(lease) = object.lease.filter(|_| held(index) != object.lease)
            && let Err(e) = take(procs, env, object, lease, &made)
        {
            let (pid, fd) = object.home;
            notes.push(format!(
                "process {pid}, descriptor {fd}: the lease is lost: {e}"
            ));
        }
    }
    Ok(notes)
}

fn release(fd: i32) -> Batch {
    let mut batch = Batch::new();
    batch.must(
        libc::SYS_fcntl,
        &[fd.into(), libc::F_SETLEASE.into(), libc::F_UNLCK.into()],
    );
    batch
}

fn take(
    procs: &mut Procs<'_>,
    env: &dyn Environment,
    object: &Object,
    lease: Lease,
    made: &dyn Fn(InnerPid) -> bool,
) -> io::Result<()> {
    if object.is_in_flight() {
        return Err(io::Error::other("no process has the file open"));
    }
    let (pid, fd) = object.home;
    let remote = procs.get_mut(&pid).ok_or(io::ErrorKind::NotFound)?;
    let broken = match lease {
        Lease::Read | Lease::Write => None,
        Lease::Broken { to_read } => Some(to_read),
    };
    // Which one it was before it was broken nobody can ask; the holder only hears what is left to it.
    let write =
        lease == Lease::Write || broken == Some(true) || broken.is_some() && object.writes();
    acquire(remote, fd, write)?;
    if let Some(to_read) = broken {
        // The holder has been told before the checkpoint.
        let mut silent = Batch::new();
        silent.must(
            libc::SYS_fcntl,
            &[fd.into(), libc::F_SETOWN.into(), 0.into()],
        );
        run_all(remote, &silent)?;
        begin_to_break(env, &object.kind, to_read)?;
    }
    match object.owner {
        Some(owner) => lock::set_owner(procs, object, owner, made),
        None => Ok(()),
    }
}

/// Takes a lease as the file's owner.
fn acquire(remote: &mut Remote, fd: i32, write: bool) -> io::Result<()> {
    let mut ask = Batch::new();
    let stat = ask.output(STAT);
    ask.must(libc::SYS_fstat, &[fd.into(), stat.into()]);
    let outcome = remote.run(&ask)?;
    let owner = outcome.int(stat.at(STAT_UID, 4));
    let mut batch = Batch::new();
    let kind = if write { libc::F_WRLCK } else { libc::F_RDLCK };
    let before = batch.call(libc::SYS_setfsuid, &[owner.into()]);
    let taken = batch.call(
        libc::SYS_fcntl,
        &[fd.into(), libc::F_SETLEASE.into(), kind.into()],
    );
    batch.call(libc::SYS_setfsuid, &[before.into()]);
    remote.run(&batch)?.result(taken).map(drop)
}

/// Opens the file so that the lease is in the way, without waiting for it.
fn begin_to_break(env: &dyn Environment, kind: &Kind, to_read: bool) -> io::Result<()> {
    let Kind::File { ino } = kind else {
        return Err(io::ErrorKind::Unsupported.into());
    };
    let access = if to_read {
        libc::O_RDONLY
    } else {
        libc::O_WRONLY
    };
    match env.open_inode(*ino, access | libc::O_NONBLOCK) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
        opened => opened.map(drop),
    }
}
