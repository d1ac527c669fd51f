//! Inotify instances and their watches.
//!
//! Watches keep their numbers. Events that wait to be read cannot be looked at without taking them, so
//! they are not part of the image; only that there were some is.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use super::capture::{Capture, Holder};
use super::model::{Kind, Watch};
use super::path::Removed;
use crate::env::Environment;
use crate::error::Result;
use crate::sys;

/// Reads an inotify instance. Every watch must be on the sandbox's filesystem.
pub(crate) fn capture(capture: &Capture<'_>, holder: &Holder<'_>) -> Result<Kind> {
    let device = capture.env.fs_device();
    // The kernel's own encoding of device numbers, as fdinfo shows it.
    let kernel = rustix::fs::major(device) << 20 | rustix::fs::minor(device);
    let lines = &holder.raw.info.watches;
    if lines.iter().any(|line| line.dev != kernel) {
        return Err(holder
            .refuse("an inotify with a watch on a file that is not on the sandbox's filesystem"));
    }
    let mut watches: Vec<_> = lines
        .iter()
        .map(|line| Watch {
            wd: line.wd,
            ino: line.ino,
            mask: line.mask,
        })
        .collect();
    watches.sort_unstable_by_key(|watch| watch.wd);
    let handle = holder.take()?;
    let queued = sys::fd::readable(handle.as_fd());
    let queued = holder.during(queued, "counting inotify events")?;
    Ok(Kind::Inotify { watches, queued })
}

/// A new instance without watches.
pub(crate) fn make() -> io::Result<OwnedFd> {
    Ok(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?)
}

/// Makes the watches be those `wanted`. Tells whether events that waited at the checkpoint are lost.
pub(crate) fn set(
    instance: BorrowedFd<'_>,
    env: &dyn Environment,
    removed: &mut Removed,
    now: (&[Watch], usize),
    wanted: (&[Watch], usize),
) -> io::Result<bool> {
    for watch in now.0.iter().filter(|watch| !wanted.0.contains(watch)) {
        inotify::remove_watch(instance, watch.wd)?;
    }
    for watch in wanted.0.iter().filter(|watch| !now.0.contains(watch)) {
        let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let file = removed.or_inode(env, watch.ino, flags)?;
        sys::fd::set_next_watch(instance, watch.wd)?;
        let mask = WatchFlags::from_bits_retain(watch.mask);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let got = inotify::add_watch(instance, path, mask)?;
        if got != watch.wd {
            let what = format!("watch {} became watch {got}", watch.wd);
            return Err(io::Error::other(what));
        }
    }
    if wanted.1 == 0 {
        discard_events(instance)?;
    }
    Ok(wanted.1 != 0 && sys::fd::readable(instance)? != wanted.1)
}

fn discard_events(instance: BorrowedFd<'_>) -> io::Result<()> {
    let mut buffer = [0_u8; 4096];
    while sys::fd::readable(instance)? > 0 {
        rustix::io::read(instance, &mut buffer)?;
    }
    Ok(())
}
