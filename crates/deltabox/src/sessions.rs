//! The sessions of one sandbox, and the thread that moves their output into their logs.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use deltabox_init::Event;
use deltacr::ids::HostPid;
use deltacr::{Deaths, Orphans};
use parking_lot::{Condvar, Mutex};
use rustix::event::epoll;
use rustix::io::Errno;

use crate::container::Container;
use crate::descendants;
use crate::error::{Doing, Error, Result};
use crate::generation::Generation;
use crate::log::Log;
use crate::readers::Readers;
use crate::report::{SandboxState, SessionId, SessionInfo};
use crate::session::{Exit, Session, State};
use crate::sessions_table::Table;
use crate::streams::{Channel, Streams};

/// Output that one stream may move before another has its turn, in bytes.
const TURN: usize = 256 * 1024;

/// How soon to try again to kill a command whose time is up while a checkpoint or rollback is under way.
const TRY_AGAIN: Duration = Duration::from_millis(5);

/// Epoll's name for the socket on which init reports.
const EVENTS: u64 = u64::MAX;

/// Epoll's name for the descriptor that wakes the thread up.
const WAKE: u64 = u64::MAX - 1;

/// What the sandbox, its sessions and their thread share.
pub(crate) struct Shared {
    pub(crate) container: Arc<Container>,
    /// Held by whatever changes or captures the whole state: one at a time.
    pub(crate) whole: Mutex<()>,
    /// Processes of the engine's own that are among the sandbox's; known from the first checkpoint or rollback on.
    pub(crate) orphans: OnceLock<Orphans>,
    /// How often the sandbox was rolled back.
    pub(crate) epoch: AtomicU64,
    pub(crate) table: Mutex<Table>,
    pub(crate) poller: OwnedFd,
    /// A rollback is under way: output and deaths belong to the future that is being given up.
    pub(crate) restoring: AtomicBool,
    /// Held while deaths are noted: who has it knows that none is between its report and its note.
    noting: Mutex<()>,
    /// Why the sandbox cannot go on.
    pub(crate) failed: Mutex<Option<String>>,
    /// Its user has stopped it.
    pub(crate) stopped: AtomicBool,
    /// What tells it apart from other forks of the same state, if that was asked for.
    pub(crate) generation: OnceLock<Generation>,
    wake: OwnedFd,
    closing: AtomicBool,
    logs: PathBuf,
}

/// Owns the thread.
pub(crate) struct Sessions {
    pub(crate) shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Sessions {
    /// Starts the thread. `logs` is an existing directory for the logs.
    pub(crate) fn start(name: &str, container: Arc<Container>, logs: PathBuf) -> Result<Self> {
        let doing = || format!("starting the streams of sandbox {name:?}");
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC).doing(doing())?;
        let wake = rustix::event::eventfd(
            0,
            rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK,
        )
        .doing(doing())?;
        for (fd, key) in [
            (container.events(), EVENTS),
            (std::os::fd::AsFd::as_fd(&wake), WAKE),
        ] {
            epoll::add(
                &poller,
                fd,
                epoll::EventData::new_u64(key),
                epoll::EventFlags::IN,
            )
            .doing(doing())?;
        }
        let shared = Arc::new(Shared {
            container,
            whole: Mutex::default(),
            orphans: OnceLock::new(),
            epoch: AtomicU64::new(0),
            table: Mutex::default(),
            poller,
            restoring: AtomicBool::new(false),
            noting: Mutex::default(),
            failed: Mutex::default(),
            stopped: AtomicBool::new(false),
            generation: OnceLock::new(),
            wake,
            closing: AtomicBool::new(false),
            logs,
        });
        let runner = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(format!("io {name}"))
            .spawn(move || runner.run())
            .doing(doing())?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Ends the thread, and every session for its clients.
    pub(crate) fn close(&self) {
        self.shared.closing.store(true, Ordering::Release);
        self.shared.wake();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the stream thread of a sandbox has panicked");
        }
        let epoch = self.shared.epoch.load(Ordering::Acquire);
        let table = std::mem::take(&mut *self.shared.table.lock());
        for session in table.sessions.values() {
            session.abandon(epoch);
        }
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        self.close();
    }
}

/// A session about to be added.
pub(crate) struct NewSession {
    pub(crate) argv: Vec<String>,
    pub(crate) owner: u32,
    pub(crate) terminal: Option<u32>,
    pub(crate) streams: Streams,
    pub(crate) timeout: Option<Duration>,
}

impl Shared {
    /// The session of this number.
    pub(crate) fn session(&self, id: SessionId) -> Option<Arc<Session>> {
        self.table.lock().sessions.get(&id).cloned()
    }

    /// All sessions.
    pub(crate) fn list(&self) -> Vec<SessionInfo> {
        let table = self.table.lock();
        table.sessions.values().map(|s| s.info()).collect()
    }

    /// Adds the session whose process `start` starts and returns the pid of; `start` is told its number. The caller holds
    /// [`Shared::whole`]. The table is not locked meanwhile: init, which is to answer, may have more deaths to report before than
    /// there is room for, and whoever hears of them needs the table.
    pub(crate) fn add(
        self: &Arc<Self>,
        new: NewSession,
        start: impl FnOnce(SessionId) -> Result<i32>,
    ) -> Result<Arc<Session>> {
        let id = self.table.lock().begin_start();
        let started = start(id);
        let mut table = self.table.lock();
        let died = table.starting.take().unwrap_or_default();
        let pid = started?;
        let session = Arc::new(Session {
            id,
            argv: new.argv,
            pid,
            terminal: new.terminal,
            owner: new.owner,
            shared: Arc::downgrade(self),
            state: Mutex::new(State {
                log: Log::new(self.log_path(id)),
                streams: new.streams,
                exit: None,
                epoch: self.epoch.load(Ordering::Acquire),
                abandoned: false,
                deadline: new.timeout.and_then(|t| Instant::now().checked_add(t)),
                timed_out: false,
                kept: false,
                readers: Readers::default(),
            }),
            changed: Condvar::new(),
        });
        session
            .state
            .lock()
            .streams
            .watch(id, &self.poller)
            .doing(session.doing("watching the output of"))?;
        table.insert(&session);
        if let Some(status) = died.get(&pid) {
            self.end(&session, exit_code(*status));
        }
        table.forget_old();
        if new.timeout.is_some() {
            self.wake();
        }
        Ok(session)
    }

    /// Where the log of a session goes.
    pub(crate) fn log_path(&self, id: SessionId) -> PathBuf {
        self.logs.join(format!("{id}.log"))
    }

    /// Makes the thread look at deadlines and at whether it is to end.
    pub(crate) fn wake(&self) {
        // It fails only if the counter is full: then the thread is as awake as can be.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn run(&self) {
        let mut events = Vec::with_capacity(64);
        while !self.is_closed() {
            events.clear();
            let timeout = self.kill_late().map(|d| rustix::event::Timespec {
                tv_sec: d.as_secs() as i64,
                tv_nsec: d.subsec_nanos().into(),
            });
            match epoll::wait(
                &self.poller,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return self.fail(format!("waiting for its output failed: {e}")),
            }
            for event in &events {
                match event.data.u64() {
                    WAKE => drop(rustix::io::read(&self.wake, &mut [0; 8])),
                    EVENTS => self.take_events(),
                    key => self.pump(key),
                }
            }
        }
    }

    /// Moves one turn's worth of output.
    fn pump(&self, key: u64) {
        let (id, channel) = Channel::of(key);
        let Some(session) = self.session(id) else {
            return;
        };
        let mut state = session.state.lock();
        let restoring = self.restoring.load(Ordering::Acquire);
        if !restoring && state.lags() {
            // The reader that moves on, or leaves, has it watched again.
            state.readers.paused = true;
            if let Err(e) = state.streams.unwatch(&self.poller) {
                tracing::warn!("pausing the output of session {id}: {e}");
            }
            return;
        }
        let State {
            log, streams, kept, ..
        } = &mut *state;
        let log = (!restoring).then_some(log);
        if let Err(e) = streams.pump(channel, log, TURN, &self.poller, *kept) {
            tracing::warn!("reading the output of session {id}: {e}");
            *streams.slot(channel) = None;
        }
        session.changed.notify_all();
    }

    /// Watches the output of a session again that was paused for a reader.
    pub(crate) fn resume(&self, session: &Session) {
        let mut state = session.state.lock();
        state.readers.paused = false;
        if let Err(e) = state.streams.watch(session.id, &self.poller) {
            tracing::warn!("watching the output of session {}: {e}", session.id);
        }
    }

    /// Takes note of the processes that init reports as dead.
    pub(crate) fn take_events(&self) {
        let _noting = self.noting.lock();
        loop {
            match self.container.event() {
                Ok(Some(Event::Exited { pid, status })) => self.exited(pid, status),
                Ok(None) => return,
                Err(e) => {
                    // Nothing more comes from there.
                    let _ = epoll::delete(&self.poller, self.container.events());
                    return self.fail(format!("its init has ended ({e})"));
                }
            }
        }
    }

    fn exited(&self, pid: i32, status: i32) {
        let mut table = self.table.lock();
        // Not before it is locked: whoever waits for the table may get it in the middle of a rollback, and the session of this
        // pid is another one then.
        if self.restoring.load(Ordering::Acquire) {
            return;
        }
        let session = table
            .changing
            .values()
            .find(|s| s.pid == pid && s.state.lock().exit.is_none())
            .cloned();
        if let Some(session) = session {
            self.end(&session, exit_code(status));
            table.forget_old();
        } else if let Some(died) = &mut table.starting {
            died.insert(pid, status);
        }
    }

    /// Notes a session's end, behind all that it wrote before.
    fn end(&self, session: &Session, status: i32) {
        let mut state = session.state.lock();
        let State {
            log, streams, kept, ..
        } = &mut *state;
        if let Err(e) = streams.drain(Some(log), &self.poller, *kept) {
            tracing::warn!("reading the output of session {}: {e}", session.id);
        }
        streams.stdin = None;
        if !*kept {
            streams.master = None;
        }
        state.exit = Some(Exit {
            status,
            timed_out: state.timed_out,
        });
        state.deadline = None;
        session.changed.notify_all();
    }

    /// Ends all sessions: the sandbox cannot go on.
    pub(crate) fn fail(&self, reason: String) {
        self.failed.lock().get_or_insert(reason);
        let live: Vec<_> = self.table.lock().changing.values().cloned().collect();
        for session in live {
            if session.state.lock().exit.is_none() {
                self.end(&session, 128 + libc::SIGKILL);
            }
        }
    }

    /// Kills commands whose time is up; how long until the next one's is.
    fn kill_late(&self) -> Option<Duration> {
        let now = Instant::now();
        let live: Vec<_> = self.table.lock().changing.values().cloned().collect();
        let mut next: Option<Duration> = None;
        for session in live {
            let Some(deadline) = session.state.lock().deadline else {
                continue;
            };
            let left = deadline.saturating_duration_since(now);
            let left = if left.is_zero() {
                match self.kill_timed_out(&session) {
                    true => continue,
                    false => TRY_AGAIN,
                }
            } else {
                left
            };
            next = Some(next.map_or(left, |n| n.min(left)));
        }
        next
    }

    fn kill_timed_out(&self, session: &Session) -> bool {
        // Not waited for: whoever holds it may wait for this thread's work.
        let Some(_whole) = self.whole.try_lock() else {
            return false;
        };
        {
            let mut state = session.state.lock();
            // A rollback may have moved it.
            if state.deadline.is_none_or(|d| d > Instant::now()) {
                return true;
            }
            state.deadline = None;
            state.timed_out = true;
        }
        if let Err(e) = self.kill_descendants(session) {
            tracing::warn!("killing session {}, whose time is up: {e}", session.id);
        }
        true
    }

    /// Kills the command of a session with all its descendants. The caller holds [`Shared::whole`].
    pub(crate) fn kill_descendants(&self, session: &Session) -> Result<()> {
        let orphans = self.orphans.get();
        let spare = |pid| orphans.is_some_and(|s| s.contains(HostPid(pid)));
        descendants::kill(self.container.payload(), session.id, session.pid, &spare)
    }

    /// How many processes there are.
    pub(crate) fn processes(&self) -> usize {
        let orphans = self.orphans.get().map_or(0, Orphans::count);
        self.container.processes().saturating_sub(orphans)
    }

    /// Whether the sandbox has not been removed; what belonged to it may have the name of something else's by now.
    pub(crate) fn check_open(&self, name: &str) -> Result<()> {
        if !self.is_closed() {
            return Ok(());
        }
        Err(Error::NoSandbox(name.to_owned()))
    }

    /// Whether the sandbox has been removed, or is about to be.
    pub(crate) fn is_closed(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// How the sandbox is.
    pub(crate) fn condition(&self) -> SandboxState {
        if self.is_closed() {
            let reason = "it was removed".to_owned();
            return SandboxState::Failed { reason };
        }
        match &*self.failed.lock() {
            Some(reason) => SandboxState::Failed {
                reason: reason.clone(),
            },
            None if self.stopped.load(Ordering::Acquire) => SandboxState::Stopped,
            None => SandboxState::Running,
        }
    }

    /// It runs again, whatever it was.
    pub(crate) fn revive(&self) {
        *self.failed.lock() = None;
        self.stopped.store(false, Ordering::Release);
    }

    /// Whether the sandbox goes on; why not otherwise.
    pub(crate) fn check(&self, name: &str) -> Result<()> {
        let state = match self.condition() {
            SandboxState::Running => return Ok(()),
            SandboxState::Stopped => "stopped".to_owned(),
            SandboxState::Failed { reason } => format!("failed: {reason}"),
        };
        Err(Error::NotRunning {
            name: name.to_owned(),
            state,
        })
    }

    /// Reads everything into the logs and takes note of all deaths so far. The caller has stopped the processes.
    pub(crate) fn drain(&self, deaths: Deaths) -> io::Result<()> {
        if deaths == Deaths::Pending {
            self.container.sync()?;
        }
        self.take_events();
        for session in self.table.lock().changing.values() {
            let mut state = session.state.lock();
            let State {
                log, streams, kept, ..
            } = &mut *state;
            streams.drain(Some(log), &self.poller, *kept)?;
            session.changed.notify_all();
        }
        Ok(())
    }
}

/// The exit status of a shell for a status of `wait(2)`.
fn exit_code(status: i32) -> i32 {
    if libc::WIFSIGNALED(status) {
        128 + libc::WTERMSIG(status)
    } else {
        libc::WEXITSTATUS(status)
    }
}
