//! Commands and shells: their streams, their logs, their ends.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;

use crate::error::{Doing, Error, Result};
use crate::log::{Log, Piece};
use crate::readers::{ReaderId, Readers};
use crate::report::{SessionEvent, SessionId, SessionInfo};
use crate::sessions::Shared;
use crate::spec::WindowSize;
use crate::streams::Streams;
use crate::sys;

/// How long a blocked writer sleeps before it looks whether the session still goes on.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The most bytes of one output event.
const PIECE: usize = 64 * 1024;

/// A command or shell in a sandbox. Its output is kept in a log (in a file of the state directory, at most 64 MiB of
/// the newest bytes), from which any number of readers stream.
pub struct Session {
    pub(crate) id: SessionId,
    pub(crate) argv: Vec<String>,
    pub(crate) pid: i32,
    /// The number of its terminal in the sandbox's `/dev/pts`.
    pub(crate) terminal: Option<u32>,
    /// The user inside that its streams belong to.
    pub(crate) owner: u32,
    pub(crate) shared: Weak<Shared>,
    pub(crate) state: Mutex<State>,
    pub(crate) changed: Condvar,
}

/// What changes about a session.
pub(crate) struct State {
    pub(crate) log: Log,
    pub(crate) streams: Streams,
    pub(crate) exit: Option<Exit>,
    /// The sandbox's epoch when this future of the session began.
    pub(crate) epoch: u64,
    /// The sandbox was rolled back to before this session, or removed.
    pub(crate) abandoned: bool,
    /// When it is to be killed.
    pub(crate) deadline: Option<Instant>,
    /// Whether the deadline has passed.
    pub(crate) timed_out: bool,
    /// Whether a checkpoint knows the session, so that it may come back after its end.
    pub(crate) kept: bool,
    pub(crate) readers: Readers,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) status: i32,
    pub(crate) timed_out: bool,
}

/// A session is the same as another only if it is that.
impl PartialEq for Session {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Session {
    /// Its number.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// What it is and how it is doing.
    pub fn info(&self) -> SessionInfo {
        let state = self.state.lock();
        SessionInfo {
            id: self.id,
            argv: self.argv.clone(),
            pid: self.pid,
            tty: self.terminal.is_some(),
            exit: state.exit.map(|e| e.status),
            output: state.log.end(),
        }
    }

    /// Writes to its standard input or terminal. Waits while the command does not read.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it has no input (any more), [`Error::Epoch`] when the sandbox is rolled back meanwhile.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        let epoch = self.state.lock().epoch;
        let mut rest = bytes;
        while !rest.is_empty() {
            let input = {
                let state = self.state.lock();
                state.check(epoch)?;
                let input = state.input(self)?;
                match rustix::io::write(input, rest) {
                    Ok(n) => {
                        rest = &rest[n..];
                        continue;
                    }
                    Err(Errno::INTR) => continue,
                    Err(Errno::AGAIN) => input.try_clone().doing(self.doing("writing to"))?,
                    Err(Errno::PIPE | Errno::IO) => return Err(self.no_input()),
                    Err(e) => return Err(e).doing(self.doing("writing to")),
                }
            };
            wait_until_writable(&input).doing(self.doing("writing to"))?;
        }
        Ok(())
    }

    /// Ends its standard input (on a terminal: types the end-of-file character).
    pub fn close_stdin(&self) -> Result<()> {
        if self.terminal.is_some() {
            // VEOF as every terminal begins; a program that has changed it reads the byte.
            return self.write(&[4]);
        }
        self.state.lock().streams.stdin = None;
        Ok(())
    }

    /// Sets the terminal's size.
    pub fn resize(&self, size: WindowSize) -> Result<()> {
        match &self.state.lock().streams.master {
            Some(master) => sys::set_window_size(master.fd(), size)
                .doing(self.doing("resizing the terminal of")),
            None => Err(Error::Invalid(format!(
                "session {} is not on a terminal",
                self.id
            ))),
        }
    }

    /// Sends a signal to the command's process group.
    pub fn signal(&self, signal: i32) -> Result<()> {
        if !(1..=64).contains(&signal) {
            return Err(Error::Invalid(format!("{signal} is no signal number")));
        }
        if self.state.lock().exit.is_some() {
            return Ok(());
        }
        self.shared()?
            .container
            .signal_group(self.pid, signal)
            .doing(self.doing("signalling"))
    }

    /// Kills the command and all its descendants.
    pub fn kill(&self) -> Result<()> {
        let shared = self.shared()?;
        let _whole = shared.whole.lock();
        if shared.is_closed() {
            return Err(self.orphaned());
        }
        shared.kill_descendants(self)
    }

    /// The session's events from output byte `offset` on (0: from the beginning of what the log still has).
    ///
    /// From now on the command waits for this reader when it lags behind by half of what the log keeps, as it would
    /// for the reader of a pipe; so read on, or drop it.
    pub fn events(self: &Arc<Self>, offset: u64) -> Events {
        let mut state = self.state.lock();
        let offset = offset.min(state.log.end());
        let epoch = state.epoch;
        Events {
            session: Arc::clone(self),
            id: state.readers.add(epoch, offset),
            offset,
            epoch,
            over: false,
        }
    }

    fn shared(&self) -> Result<Arc<Shared>> {
        self.shared.upgrade().ok_or_else(|| self.orphaned())
    }

    fn orphaned(&self) -> Error {
        Error::Invalid(format!(
            "the sandbox of session {} has been removed",
            self.id
        ))
    }

    fn no_input(&self) -> Error {
        Error::Invalid(format!(
            "session {} takes no input: it was started without, or its end was closed",
            self.id
        ))
    }

    pub(crate) fn doing(&self, what: &str) -> String {
        format!("{what} session {}", self.id)
    }

    /// Ends it for its clients: it belongs to a future that is over.
    pub(crate) fn abandon(&self, epoch: u64) {
        let mut state = self.state.lock();
        state.abandoned = true;
        state.epoch = epoch;
        state.deadline = None;
        state.streams.close_pipes();
        self.changed.notify_all();
    }
}

impl State {
    /// Whether the command has to wait for a reader.
    pub(crate) fn lags(&self) -> bool {
        self.readers.lag(self.epoch, self.log.end())
    }

    fn check(&self, epoch: u64) -> Result<()> {
        if self.epoch == epoch && !self.abandoned {
            return Ok(());
        }
        Err(Error::Epoch {
            expected: epoch,
            actual: self.epoch,
        })
    }

    fn input(&self, session: &Session) -> Result<&OwnedFd> {
        let end = self.streams.master.as_ref().or(self.streams.stdin.as_ref());
        match end {
            Some(end) if self.exit.is_none() => Ok(end.owned()),
            _ => Err(session.no_input()),
        }
    }
}

fn wait_until_writable(fd: &OwnedFd) -> std::io::Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let look_again = Timespec::try_from(LOOK_AGAIN).map_err(std::io::Error::other)?;
    match poll(&mut [PollFd::new(fd, PollFlags::OUT)], Some(&look_again)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Reads a session's events, one after another.
pub struct Events {
    session: Arc<Session>,
    id: ReaderId,
    offset: u64,
    epoch: u64,
    over: bool,
}

impl Events {
    /// The next event; `None` when `timeout` passed without one, or after `Exit` or `RolledBack`.
    pub fn next(&mut self, timeout: Option<Duration>) -> Option<SessionEvent> {
        let event = self.wait(timeout);
        self.resume();
        event
    }

    fn wait(&mut self, timeout: Option<Duration>) -> Option<SessionEvent> {
        let until = timeout.map(|t| Instant::now() + t);
        let session = Arc::clone(&self.session);
        let mut state = session.state.lock();
        loop {
            if self.over {
                return None;
            }
            if let Some(event) = self.look(&mut state) {
                return Some(event);
            }
            match until {
                None => session.changed.wait(&mut state),
                Some(until) => {
                    if session.changed.wait_until(&mut state, until).timed_out() {
                        return self.look(&mut state);
                    }
                }
            }
        }
    }

    /// Lets the command write on if it had to wait, and has to no longer.
    fn resume(&self) {
        let waits = |state: &State| state.readers.paused && !state.lags();
        if !waits(&self.session.state.lock()) {
            return;
        }
        // Without the lock: this may be the last that holds the sandbox.
        if let Some(shared) = self.session.shared.upgrade() {
            shared.resume(&self.session);
        }
    }

    fn look(&mut self, state: &mut State) -> Option<SessionEvent> {
        let event = self.take(state);
        state.readers.moved(self.id, self.offset);
        event
    }

    fn take(&mut self, state: &State) -> Option<SessionEvent> {
        if state.epoch != self.epoch || state.abandoned {
            self.over = true;
            return Some(SessionEvent::RolledBack { epoch: state.epoch });
        }
        match state.log.read(self.offset, PIECE) {
            Ok(Some(Piece::Output(stream, bytes, next))) => {
                self.offset = next;
                Some(SessionEvent::Output { stream, bytes })
            }
            Ok(Some(Piece::Missed(bytes, next))) => {
                self.offset = next;
                Some(SessionEvent::Missed { bytes })
            }
            Ok(None) => state.exit.map(|Exit { status, timed_out }| {
                self.over = true;
                SessionEvent::Exit { status, timed_out }
            }),
            Err(e) => {
                tracing::warn!("reading the log of session {}: {e}", self.session.id);
                let bytes = state.log.end() - self.offset;
                self.offset = state.log.end();
                Some(SessionEvent::Missed { bytes })
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.session.state.lock().readers.remove(self.id);
        self.resume();
    }
}
