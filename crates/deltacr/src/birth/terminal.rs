//! Controlling terminals of session leaders, and the foreground groups of those.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::env::Environment;
use crate::error::{During, Result};
use crate::hold::Held;
use crate::ids::InnerPid;
use crate::image::TreeImage;
use crate::procfs::Stat;
use crate::remote::Batch;

/// Gives session leaders the terminals and foreground groups that they have in `target`. `born` are those
/// that were made since the tree was held.
///
/// A terminal whose master is inside the tree exists only when descriptors are restored, and `/dev/tty` can be opened
/// only when terminals are; so this is done before, as far as it goes, and after that.
pub(crate) fn restore(
    env: &dyn Environment,
    held: &mut Held,
    target: &TreeImage,
    born: &BTreeSet<InnerPid>,
) -> Result<()> {
    let mut result = Ok(());
    for (pid, image) in &target.processes {
        if image.stat.session != *pid || image.stat.tty == 0 {
            continue;
        }
        let stat = match held.processes.get(pid) {
            Some(process) if !born.contains(pid) => process.stat.clone(),
            _ => held
                .procfs
                .stat(*pid)
                .during(*pid, "reading its terminal")?,
        };
        if (stat.tty, stat.foreground) != (image.stat.tty, image.stat.foreground) {
            let take = stat.tty != image.stat.tty;
            let given = give(env, held, *pid, &image.stat, take);
            result = result.and(given.during(*pid, "restoring its terminal"));
        }
    }
    result
}

fn give(
    env: &dyn Environment,
    held: &mut Held,
    pid: InnerPid,
    wanted: &Stat,
    take: bool,
) -> io::Result<()> {
    let number = pty_number(wanted.tty)
        .ok_or_else(|| io::Error::other("its terminal is no pseudo-terminal"))?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let tty = openat2(
        env.root(),
        format!("dev/pts/{number}"),
        flags,
        Mode::empty(),
        resolve,
    )?;
    let remote = held.remote(pid).ok_or(io::ErrorKind::NotFound)?;
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

/// The number of a Unix 98 pseudo-terminal (majors 136 to 143) in a `tty_nr` of `/proc/PID/stat`.
fn pty_number(tty: i32) -> Option<u32> {
    let (major, minor) = ((tty >> 8) & 0xfff, (tty & 0xff) | ((tty >> 12) & 0xf_ff00));
    (136..144)
        .contains(&major)
        .then(|| ((major - 136) << 20 | minor) as u32)
}
