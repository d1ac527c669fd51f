//! Files of the kernel's anonymous inodes that hold a number or a clock: eventfd, timerfd,
//! signalfd. The others have modules of their own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::EventfdFlags;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use super::capture::{Capture, Holder};
use super::fdinfo::TimerLine;
use super::model::{Kind, Timer};
use super::{epoll, watch};
use crate::error::Result;
use crate::sys;

/// Reads what an anonymous file is.
pub(crate) fn capture(capture: &mut Capture<'_>, holder: &Holder<'_>) -> Result<Kind> {
    let info = &holder.raw.info;
    if let Some(count) = info.event_count {
        let semaphore = info.event_semaphore;
        return Ok(Kind::Event { count, semaphore });
    }
    if let Some(timer) = info.timer {
        return timer_of(holder, timer);
    }
    if let Some(mask) = info.signal_mask {
        return Ok(Kind::Signals { mask });
    }
    let link = holder.link()?;
    match link.strip_prefix(b"anon_inode:").unwrap_or(&link) {
        b"[eventpoll]" => Ok(epoll::capture(capture, holder)),
        b"inotify" => watch::capture(capture, holder),
        name => {
            let name = String::from_utf8_lossy(name);
            Err(holder.refuse(format_args!("of the kind {name}, which is not carried")))
        }
    }
}

fn timer_of(holder: &Holder<'_>, line: TimerLine) -> Result<Kind> {
    if clock(line.clock).is_none() {
        return Err(holder.refuse("a timer on an unknown clock"));
    }
    Ok(Kind::Timer(Timer {
        clock: line.clock,
        ticks: line.ticks,
        value: line.value,
        interval: line.interval,
    }))
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

fn clock(number: i32) -> Option<TimerfdClockId> {
    Some(match number {
        libc::CLOCK_REALTIME => TimerfdClockId::Realtime,
        libc::CLOCK_MONOTONIC => TimerfdClockId::Monotonic,
        libc::CLOCK_BOOTTIME => TimerfdClockId::Boottime,
        libc::CLOCK_REALTIME_ALARM => TimerfdClockId::RealtimeAlarm,
        libc::CLOCK_BOOTTIME_ALARM => TimerfdClockId::BoottimeAlarm,
        _ => return None,
    })
}

/// A new, unarmed timerfd.
pub(crate) fn make_timer(wanted: &Timer) -> io::Result<OwnedFd> {
    let clock = clock(wanted.clock).ok_or(io::ErrorKind::InvalidData)?;
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    Ok(rustix::time::timerfd_create(clock, flags)?)
}

/// Arms a timer with the time that remained, and lets it tell of the ticks it had to tell of.
pub(crate) fn set_timer(timer: BorrowedFd<'_>, wanted: &Timer) -> io::Result<()> {
    let mut value = timespec(wanted.value);
    if wanted.value == (0, 0) && wanted.ticks > 0 && wanted.interval != (0, 0) {
        // An expired periodic timer goes on only when it is read: it is to expire at once.
        value.tv_nsec = 1;
    }
    let spec = Itimerspec {
        it_interval: timespec(wanted.interval),
        it_value: value,
    };
    rustix::time::timerfd_settime(timer, TimerfdTimerFlags::empty(), &spec)?;
    if wanted.ticks > 0 {
        sys::fd::set_timer_ticks(timer, wanted.ticks)?;
    }
    Ok(())
}

fn timespec((seconds, nanos): (u64, u64)) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(seconds).unwrap_or(i64::MAX),
        tv_nsec: nanos as i64,
    }
}
