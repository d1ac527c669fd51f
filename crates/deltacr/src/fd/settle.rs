//! Putting right what the objects hold that are in their places.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;

use super::model::{Kind, Object, Pipe};
use super::path::Removed;
use super::restore::{Restore, named};
use super::{event, lock, pipe, tty, watch};
use crate::env::Environment;
use crate::error::{During, Result};
use crate::sys;

/// Status flags that `fcntl(F_SETFL)` changes.
const SETTABLE: i32 = libc::O_APPEND | libc::O_DIRECT | libc::O_NOATIME | libc::O_NONBLOCK;

impl Restore<'_, '_> {
    /// Puts right what the objects, which are in their places now, hold.
    pub(super) fn settle(&mut self) -> Result<()> {
        for (index, object) in self.target.objects.iter().enumerate() {
            let now = self.plan.reuse[index].map(|now| &self.current.objects[now]);
            if now.is_none_or(|now| differs(now, object)) {
                let handle = self.duplicate(index)?;
                let note = settle_object(
                    handle.as_fd(),
                    (self.env, &mut self.prepared.removed),
                    now,
                    object,
                )
                .during(object.home.0, "setting it up")
                .map_err(named(object))?;
                let (pid, fd) = object.home;
                let note = note.map(|note| format!("process {pid}, descriptor {fd}: {note}"));
                self.notes.extend(note);
            }
            if let Some(owner) = object.owner
                && now.is_none_or(|now| (now.owner, now.flags) != (object.owner, object.flags))
            {
                let made = |pid| !self.current.tables.contains_key(&pid);
                lock::set_owner(self.procs, object, owner, made)
                    .during(object.home.0, "setting its owner")
                    .map_err(named(object))?;
            }
        }
        self.settle_pipes()?;
        self.settle_terminals()
    }

    fn settle_pipes(&mut self) -> Result<()> {
        let mut done = std::collections::BTreeSet::new();
        for (at, object) in self.target.objects.iter().enumerate() {
            let Kind::Pipe { pipe: index } = object.kind else {
                continue;
            };
            let wanted = &self.target.pipes[index];
            let now = self
                .plan
                .pipes
                .get(&index)
                .map(|now| &self.current.pipes[*now]);
            if !done.insert(index) || now.is_some_and(|now| pipe::same(now, wanted)) {
                continue;
            }
            let handle = self.duplicate(at)?;
            let fresh = || {
                Ok(Pipe {
                    capacity: rustix::pipe::fcntl_getpipe_size(&handle)?,
                    ..Pipe::default()
                })
            };
            now.map_or_else(fresh, |now| Ok(now.clone()))
                .and_then(|now| pipe::set(handle.as_fd(), &now, wanted))
                .during(object.home.0, "filling it")
                .map_err(named(object))?;
        }
        Ok(())
    }

    fn settle_terminals(&mut self) -> Result<()> {
        for (number, wanted) in &self.target.terminals {
            let sides = self.target.sides(*number);
            let Some(index) = sides[0].or(sides[1]) else {
                continue;
            };
            let handle = |side: Option<usize>| side.map(|index| self.duplicate(index)).transpose();
            let [slave, master] = [handle(sides[0])?, handle(sides[1])?];
            let sides = [&slave, &master].map(|side| side.as_ref().map(AsFd::as_fd));
            let now = self.current.terminals.get(number);
            tty::set(sides, self.env, *number, now, wanted)
                .during(self.target.objects[index].home.0, "setting the terminal up")?;
        }
        Ok(())
    }
}

fn differs(now: &Object, wanted: &Object) -> bool {
    let held = match &wanted.kind {
        // These are put right elsewhere.
        Kind::Pipe { .. } | Kind::Epoll { .. } | Kind::Socket(_) => false,
        Kind::Timer(timer) if timer.value != (0, 0) => true,
        kind => *kind != now.kind,
    };
    held || (now.flags, now.pos) != (wanted.flags, wanted.pos)
}

/// Sets flags, position and what the kind itself holds. Returns what could not be kept.
fn settle_object(
    file: BorrowedFd<'_>,
    (env, removed): (&dyn Environment, &mut Removed),
    now: Option<&Object>,
    wanted: &Object,
) -> io::Result<Option<&'static str>> {
    if wanted.flags & libc::O_PATH != 0 {
        return Ok(None);
    }
    // Signalling (O_ASYNC) is set where the owner is; here it ends.
    if now.is_none_or(|now| (now.flags ^ wanted.flags) & (SETTABLE | libc::O_ASYNC) != 0) {
        sys::fd::set_status_flags(file, wanted.flags & SETTABLE)?;
    }
    match (&wanted.kind, now.map(|now| &now.kind)) {
        (Kind::File { .. } | Kind::Path { .. } | Kind::Memory { .. }, _)
            if now.map_or(0, |now| now.pos) != wanted.pos =>
        {
            match rustix::fs::seek(file, rustix::fs::SeekFrom::Start(wanted.pos)) {
                // Of a process that has ended: nothing more is read from it, wherever.
                Err(Errno::SRCH) if matches!(wanted.kind, Kind::Path { .. }) => {}
                sought => drop(sought?),
            }
        }
        (Kind::Event { count, semaphore }, Some(Kind::Event { count: now, .. })) => {
            event::set_event(file, *now, *count, *semaphore)?;
        }
        (Kind::Timer(timer), _) => event::set_timer(file, timer)?,
        (Kind::Signals { mask }, Some(_)) => sys::fd::set_signalfd(file, *mask)?,
        (Kind::Inotify { watches, queued }, now) => {
            let now = match now {
                Some(Kind::Inotify { watches, queued }) => (watches.as_slice(), *queued),
                _ => (&[][..], 0),
            };
            if watch::set(file, env, removed, now, (watches, *queued))? {
                return Ok(Some(
                    "inotify events that waited at the checkpoint are lost",
                ));
            }
        }
        _ => {}
    }
    Ok(None)
}
