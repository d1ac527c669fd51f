//! Controlling terminals of sessions, and the foreground groups of those.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::env::Environment;
use crate::error::{During, Result};
use crate::fd::{self, Procs};
use crate::hold::Held;
use crate::ids::InnerPid;
use crate::image::TreeImage;
use crate::procfs::Stat;
use crate::remote::{Batch, Remote};

/// The session leaders that are to get a terminal or a foreground group.
pub(crate) struct Terminals(Vec<Missing>);

struct Missing {
    leader: InnerPid,
    wanted: Stat,
    /// The terminal too, not only the foreground group.
    take: bool,
}

impl Terminals {
    /// Finds those that lack what they have in `target`. `born` were made since the tree was held.
    pub(crate) fn missing(
        held: &Held,
        target: &TreeImage,
        born: &BTreeSet<InnerPid>,
    ) -> Result<Self> {
        let mut missing = Vec::new();
        for (pid, image) in &target.processes {
            if image.stat.session != *pid || image.stat.tty == 0 {
                continue;
            }
            let stat = held.stat(*pid, born)?;
            let wanted = image.stat.clone();
            let take = stat.tty != wanted.tty;
            let other = stat.foreground != wanted.foreground;
            if take || other || is_new(InnerPid(wanted.foreground), held, target, born) {
                missing.push(Missing {
                    leader: *pid,
                    wanted,
                    take,
                });
            }
        }
        Ok(Self(missing))
    }

    /// Gives them what they lack. The terminals are there, and nothing has `/dev/tty` open anew yet.
    pub(crate) fn restore(&self, env: &dyn Environment, procs: &mut Procs<'_>) -> Result<()> {
        self.0.iter().try_for_each(|missing| {
            let remote = procs
                .get_mut(&missing.leader)
                .ok_or(io::ErrorKind::NotFound);
            remote
                .map_err(io::Error::from)
                .and_then(|remote| give(env, remote, &missing.wanted, missing.take))
                .during(missing.leader, "restoring its terminal")
        })
    }
}

/// Whether a group may have come into being just now: to the kernel, it is another one than that with the same number before.
fn is_new(group: InnerPid, held: &Held, target: &TreeImage, born: &BTreeSet<InnerPid>) -> bool {
    let stayed = |pid: &InnerPid| {
        let process = held.processes.get(pid).filter(|_| !born.contains(pid));
        process.is_some_and(|process| process.stat.group == group)
    };
    let mut processes = target.processes.iter();
    processes.any(|(pid, image)| image.stat.group == group && !stayed(pid))
}

fn give(env: &dyn Environment, remote: &mut Remote, wanted: &Stat, take: bool) -> io::Result<()> {
    let tty = open(env, number_of(wanted.tty)?)?;
    let fd = remote.give_fds(&[tty.as_fd()])?[0];
    let mut batch = Batch::new();
    let took = take.then(|| {
        batch.call(
            libc::SYS_ioctl,
            &[fd.into(), libc::TIOCSCTTY.into(), 0.into()],
        )
    });
    let group = batch.input(&wanted.foreground.to_le_bytes());
    if wanted.foreground > 0 {
        // A group that has ended meanwhile cannot be put there; nothing is lost by that.
        batch.call(
            libc::SYS_ioctl,
            &[fd.into(), libc::TIOCSPGRP.into(), group.into()],
        );
    }
    batch.call(libc::SYS_close, &[fd.into()]);
    let outcome = remote.run(&batch)?;
    took.map_or(Ok(()), |call| outcome.result(call).map(drop))
}

/// Gives a leader that has none this terminal. If that is not there, it is made, and its master put among `masters`.
pub(super) fn take(
    env: &dyn Environment,
    remote: &mut Remote,
    tty: i32,
    masters: &mut BTreeMap<u32, OwnedFd>,
) -> io::Result<()> {
    let number = number_of(tty)?;
    let terminal = match open(env, number) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let flags = libc::O_RDWR | libc::O_NONBLOCK;
            masters.insert(number, fd::make_master(env, number, flags)?);
            open(env, number)?
        }
        opened => opened?,
    };
    control(remote, terminal.as_fd(), libc::TIOCSCTTY)
}

/// Makes a process that does not lead its session have no terminal.
pub(super) fn leave(env: &dyn Environment, remote: &mut Remote, tty: i32) -> io::Result<()> {
    let terminal = open(env, number_of(tty)?)?;
    control(remote, terminal.as_fd(), libc::TIOCNOTTY)
}

fn control(remote: &mut Remote, terminal: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<()> {
    let fd = remote.give_fds(&[terminal])?[0];
    let mut batch = Batch::new();
    let call = batch.call(libc::SYS_ioctl, &[fd.into(), request.into(), 0.into()]);
    batch.call(libc::SYS_close, &[fd.into()]);
    remote.run(&batch)?.result(call).map(drop)
}

fn open(env: &dyn Environment, number: u32) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let path = format!("dev/pts/{number}");
    Ok(openat2(env.root(), path, flags, Mode::empty(), resolve)?)
}

fn number_of(tty: i32) -> io::Result<u32> {
    pty_number(tty).ok_or_else(|| io::Error::other("its terminal is no pseudo-terminal"))
}

/// The number of a Unix 98 pseudo-terminal (majors 136 to 143) in a `tty_nr` of `/proc/PID/stat`.
fn pty_number(tty: i32) -> Option<u32> {
    let (major, minor) = ((tty >> 8) & 0xfff, (tty & 0xff) | ((tty >> 12) & 0xf_ff00));
    (136..144)
        .contains(&major)
        .then(|| ((major - 136) << 20 | minor) as u32)
}
