//! Files of the kernel's anonymous inodes: eventfd.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::EventfdFlags;

use super::capture::Holder;
use super::model::Kind;
use crate::error::Result;

/// Reads what an anonymous file is.
pub(crate) fn capture(holder: &Holder<'_>) -> Result<Kind> {
    let info = &holder.raw.info;
    if let Some(count) = info.event_count {
        let semaphore = info.event_semaphore;
        return Ok(Kind::Event { count, semaphore });
    }
    let link = holder.link()?;
    let name = String::from_utf8_lossy(&link).into_owned();
    let name = name.strip_prefix("anon_inode:").unwrap_or(&name);
    Err(holder.refuse(format_args!("of the kind {name}, which is not carried")))
}

/// A new eventfd with this count.
pub(crate) fn make_event(count: u64, semaphore: bool) -> io::Result<OwnedFd> {
    let mut flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    flags.set(EventfdFlags::SEMAPHORE, semaphore);
    let event = rustix::event::eventfd(0, flags)?;
    add(event.as_fd(), count)?;
    Ok(event)
}

/// Makes an eventfd that counts `now` count `wanted`.
pub(crate) fn set_event(
    event: BorrowedFd<'_>,
    now: u64,
    wanted: u64,
    semaphore: bool,
) -> io::Result<()> {
    // A read takes one from a semaphore and all from a plain counter. It does not block: there is
    // something to take.
    let (reads, left) = match semaphore {
        true => (now.saturating_sub(wanted), now.min(wanted)),
        false => (u64::from(now > 0), 0),
    };
    for _ in 0..reads {
        rustix::io::read(event, &mut [0_u8; 8])?;
    }
    add(event, wanted - left)
}

fn add(event: BorrowedFd<'_>, count: u64) -> io::Result<()> {
    if count > 0 {
        rustix::io::write(event, &count.to_ne_bytes())?;
    }
    Ok(())
}
