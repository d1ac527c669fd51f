//! Sessions as part of the state: what a checkpoint keeps of them, and how a rollback or fork gives it back.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use deltacr::Deaths;
use deltacr::env::ExternalId;
use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use parking_lot::{Condvar, Mutex};

use crate::error::{Doing, Result};
use crate::log::{Log, View};
use crate::readers::Readers;
use crate::report::SessionId;
use crate::session::{Exit, Session, State};
use crate::sessions::Shared;
use crate::sessions_table::Table;
use crate::spawn::open_terminal;
use crate::streams::{Channel, End, Streams};
use crate::sys;

/// All sessions of a sandbox as they were at one moment.
#[derive(Clone, Default)]
pub(crate) struct SessionsImage {
    sessions: OrdMap<SessionId, Arc<Session>>,
    settled: OrdMap<SessionId, Arc<Kept>>,
    changing: Arc<BTreeMap<SessionId, Arc<Kept>>>,
}

impl SessionsImage {
    /// These sessions.
    pub(crate) fn of(kept: BTreeMap<SessionId, Kept>) -> Self {
        let sessions = kept.iter();
        Self {
            sessions: sessions
                .map(|(id, kept)| (*id, Arc::clone(&kept.session)))
                .collect(),
            settled: OrdMap::new(),
            changing: Arc::new(
                kept.into_iter()
                    .map(|(id, kept)| (id, Arc::new(kept)))
                    .collect(),
            ),
        }
    }

    /// What was kept of each session, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&SessionId, &Arc<Kept>)> {
        self.settled.iter().chain(self.changing.iter())
    }

    /// What was kept of a session.
    pub(crate) fn get(&self, id: SessionId) -> Option<&Arc<Kept>> {
        self.changing.get(&id).or_else(|| self.settled.get(&id))
    }
}

/// One session.
pub(crate) struct Kept {
    pub(crate) session: Arc<Session>,
    pub(crate) view: View,
    pub(crate) exit: Option<Exit>,
    /// How much of its time was left.
    pub(crate) left: Option<Duration>,
    pub(crate) timed_out: bool,
    /// Input that it had not read.
    pub(crate) input: Vec<u8>,
}

/// A session that is made again from what is on disk of it.
pub(crate) struct Restored {
    pub(crate) id: SessionId,
    pub(crate) argv: Vec<String>,
    pub(crate) pid: i32,
    pub(crate) terminal: Option<u32>,
    pub(crate) owner: u32,
}

impl Shared {
    /// The sessions as they are. The processes are stopped and [`Shared::drain`] was called.
    pub(crate) fn image(&self) -> io::Result<SessionsImage> {
        let now = Instant::now();
        let mut table = self.table.lock();
        let mut changing = BTreeMap::new();
        let sessions: Vec<_> = table.changing.values().cloned().collect();
        for session in sessions {
            let kept = Arc::new(Kept::of(&session, now)?);
            match kept.is_settled() {
                true => table.settle(session.id, &kept),
                false => drop(changing.insert(session.id, kept)),
            }
        }
        Ok(SessionsImage {
            sessions: table.sessions.clone(),
            settled: table.settled.clone(),
            changing: Arc::new(changing),
        })
    }

    /// Begins a rollback to `image`, after which the epoch is `epoch`: sessions born since end for their clients, all
    /// readers are told but those of sessions that are settled in both states, logs end where they ended then. Until [`Shared::finish_restore`], output is thrown away and
    /// deaths are not noted: they belong to the future that is given up. The caller holds [`Shared::whole`] and has
    /// stopped the processes; `external_pipe` and `open_external` answer for the image's sessions from here on.
    pub(crate) fn begin_restore(&self, image: &SessionsImage, epoch: u64) {
        self.restoring.store(true, Ordering::Release);
        self.epoch.store(epoch, Ordering::Release);
        let mut table = self.table.lock();
        for item in table.sessions.diff(&image.sessions) {
            if let DiffItem::Remove(_, session) = item {
                session.abandon(epoch);
            }
        }
        let differing = table.settled.diff(&image.settled);
        let back: Vec<_> = differing
            .filter_map(|item| match item {
                DiffItem::Add(_, kept) | DiffItem::Update { new: (_, kept), .. } => Some(kept),
                DiffItem::Remove(..) => None,
            })
            .cloned()
            .collect();
        for kept in back.iter().chain(image.changing.values()) {
            kept.rewind(epoch);
        }
        let changing = image.changing.iter();
        *table = Table {
            sessions: image.sessions.clone(),
            settled: image.settled.clone(),
            changing: changing
                .map(|(id, kept)| (*id, Arc::clone(&kept.session)))
                .collect(),
            back,
            last: table.last,
            starting: None,
        };
    }

    /// Ends what [`Shared::begin_restore`] began. The processes of the image are there, and still stopped.
    pub(crate) fn finish_restore(&self, image: &SessionsImage, deaths: Deaths) -> io::Result<()> {
        let done = self.settle(image, deaths);
        self.restoring.store(false, Ordering::Release);
        if image.changing.values().any(|kept| kept.left.is_some()) {
            // Deadlines have moved.
            self.wake();
        }
        done
    }

    fn settle(&self, image: &SessionsImage, deaths: Deaths) -> io::Result<()> {
        if deaths == Deaths::Pending {
            self.container.sync()?;
        }
        self.take_events();
        let (changing, back) = {
            let mut table = self.table.lock();
            let changing: Vec<_> = table.changing.values().cloned().collect();
            (changing, std::mem::take(&mut table.back))
        };
        let back = back.iter().map(|kept| (Arc::clone(&kept.session), kept));
        // In a fork these are not the sessions that the image was taken of.
        let kept = |session: Arc<Session>| image.get(session.id).map(|kept| (session, kept));
        for (session, kept) in changing.into_iter().filter_map(kept).chain(back) {
            let mut state = session.state.lock();
            state.streams.reset(&kept.input, &self.poller, true)?;
            if kept.exit.is_none() {
                state.streams.watch(session.id, &self.poller)?;
            }
        }
        Ok(())
    }

    /// Gives a new sandbox the sessions of its source as they were in `image`: same numbers, pids and terminals, their
    /// logs copied. Their pipes are made when the processes that hold them are.
    pub(crate) fn adopt(self: &Arc<Self>, image: &SessionsImage) -> Result<()> {
        let mut table = self.table.lock();
        for (_, kept) in image.iter() {
            let session = self.adopt_one(kept)?;
            table.insert(&Arc::new(session));
        }
        Ok(())
    }

    fn adopt_one(self: &Arc<Self>, kept: &Kept) -> Result<Session> {
        let source = &kept.session;
        let log = source
            .state
            .lock()
            .log
            .copy(&kept.view, &self.log_path(source.id))
            .doing(source.doing("copying the log of"))?;
        let mut streams = Streams::default();
        if let (Some(number), None) = (source.terminal, kept.exit) {
            streams.master = Some(self.make_master(number, source.owner)?);
        }
        Ok(Session {
            id: source.id,
            argv: source.argv.clone(),
            pid: source.pid,
            terminal: source.terminal,
            owner: source.owner,
            shared: Arc::downgrade(self),
            state: Mutex::new(State {
                log,
                streams,
                exit: kept.exit,
                epoch: self.epoch.load(Ordering::Acquire),
                abandoned: false,
                deadline: kept.left.and_then(|t| Instant::now().checked_add(t)),
                timed_out: kept.timed_out,
                kept: true,
                readers: Readers::default(),
            }),
            changed: Condvar::new(),
        })
    }

    /// A session that was on disk, with an empty log. It is in no list until the sandbox is rolled back to a state that has
    /// it.
    pub(crate) fn restored(self: &Arc<Self>, session: Restored) -> Session {
        Session {
            id: session.id,
            argv: session.argv,
            pid: session.pid,
            terminal: session.terminal,
            owner: session.owner,
            shared: Arc::downgrade(self),
            state: Mutex::new(State {
                log: Log::new(self.log_path(session.id)),
                streams: Streams::default(),
                exit: None,
                epoch: self.epoch.load(Ordering::Acquire),
                abandoned: false,
                deadline: None,
                timed_out: false,
                kept: true,
                readers: Readers::default(),
            }),
            changed: Condvar::new(),
        }
    }

    /// Makes the terminal of such a session, if it is on one.
    pub(crate) fn open_master(&self, session: &Session) -> Result<()> {
        let streams = &mut session.state.lock().streams;
        if let (Some(number), None) = (session.terminal, &streams.master) {
            streams.master = Some(self.make_master(number, session.owner)?);
        }
        Ok(())
    }

    /// A terminal of this number that belongs to this user.
    fn make_master(&self, number: u32, owner: u32) -> Result<End> {
        let (master, _) = open_terminal(self.container.root(), Some(number))?;
        let owner = rustix::fs::Uid::from_raw(self.container.outside(owner));
        sys::open_peer(master.fd())
            .and_then(|terminal| Ok(rustix::fs::fchown(&terminal, Some(owner), None)?))
            .doing("giving a terminal to its user")?;
        Ok(master)
    }

    /// The session stream that the pipe with this inode number is.
    pub(crate) fn external_pipe(&self, ino: u64) -> Option<ExternalId> {
        self.table.lock().changing.values().find_map(|session| {
            let channel = session.state.lock().streams.channel_of(ino)?;
            Some(ExternalId(channel.key(session.id)))
        })
    }

    /// The inside end of a session's stream; a new pipe if the old one is gone.
    pub(crate) fn open_external(&self, id: ExternalId, write: bool) -> io::Result<OwnedFd> {
        let (number, channel) = Channel::of(id.0);
        if channel == Channel::Terminal || write == (channel == Channel::Stdin) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let session = self.session(number).ok_or(io::ErrorKind::NotFound)?;
        let mut state = session.state.lock();
        let owner = self.container.outside(session.owner);
        let inside = state.streams.open_inside(channel, write, owner)?;
        state.streams.watch(number, &self.poller)?;
        Ok(inside)
    }
}

/// One is the same as another only if it is that.
impl PartialEq for Kept {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Kept {
    /// What is to be kept of a session.
    fn of(session: &Arc<Session>, now: Instant) -> io::Result<Self> {
        let mut state = session.state.lock();
        state.kept = true;
        Ok(Self {
            session: Arc::clone(session),
            view: state.log.view().clone(),
            exit: state.exit,
            left: state.deadline.map(|d| d.saturating_duration_since(now)),
            timed_out: state.timed_out,
            input: state.streams.unread_input()?,
        })
    }

    /// Whether nothing will change about it any more, unless a rollback takes it back to before its end.
    fn is_settled(&self) -> bool {
        let over = self.exit.is_some() && self.left.is_none() && self.input.is_empty();
        over && self.session.state.lock().streams.are_closed()
    }

    fn rewind(&self, epoch: u64) {
        let mut state = self.session.state.lock();
        state.log.restore(&self.view);
        state.exit = self.exit;
        state.epoch = epoch;
        state.abandoned = false;
        state.timed_out = self.timed_out;
        state.deadline = self.left.and_then(|t| Instant::now().checked_add(t));
        self.session.changed.notify_all();
    }
}
