//! The sessions of a sandbox by number. What a checkpoint keeps of them, and what a rollback looks at, does not grow with the
//! commands that have ended.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use imbl::OrdMap;

use crate::report::SessionId;
use crate::session::Session;
use crate::sessions_image::Kept;

/// Ended sessions that are remembered.
const REMEMBERED: usize = 256;

/// See the module's description.
#[derive(Default)]
pub(crate) struct Table {
    /// All sessions.
    pub(crate) sessions: OrdMap<SessionId, Arc<Session>>,
    /// What a checkpoint kept of those of them that will not change any more, unless a rollback takes them back to before their end.
    pub(crate) settled: OrdMap<SessionId, Arc<Kept>>,
    /// The others.
    pub(crate) changing: BTreeMap<SessionId, Arc<Session>>,
    /// Those of the settled ones that a rollback under way has brought back.
    pub(crate) back: Vec<Arc<Kept>>,
    pub(crate) last: u64,
    /// While a command is started: who has died since, and with which status. One of them may be the command.
    pub(crate) starting: Option<HashMap<i32, i32>>,
}

impl Table {
    /// Begins to start the command of a new session: its number.
    pub(crate) fn begin_start(&mut self) -> SessionId {
        self.starting = Some(HashMap::new());
        SessionId(self.last + 1)
    }

    /// Adds a session.
    pub(crate) fn insert(&mut self, session: &Arc<Session>) {
        self.sessions.insert(session.id, Arc::clone(session));
        self.changing.insert(session.id, Arc::clone(session));
        self.last = self.last.max(session.id.0);
    }

    /// Notes that a session will not change any more, and what was kept of it.
    pub(crate) fn settle(&mut self, id: SessionId, kept: &Arc<Kept>) {
        self.changing.remove(&id);
        self.settled.insert(id, Arc::clone(kept));
    }

    /// Forgets the oldest of those that have ended, if they are too many.
    pub(crate) fn forget_old(&mut self) {
        let ended = |session: &Session| session.state.lock().exit.is_some();
        let changing = self.changing.values().filter(|session| ended(session));
        let mut ids: Vec<_> = changing.map(|session| session.id).collect();
        let surplus = (self.settled.len() + ids.len()).saturating_sub(REMEMBERED);
        if surplus == 0 {
            return;
        }
        ids.extend(self.settled.keys());
        ids.sort_unstable();
        for id in &ids[..surplus] {
            self.sessions.remove(id);
            self.settled.remove(id);
            self.changing.remove(id);
        }
    }
}
