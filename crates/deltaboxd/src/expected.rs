//! Readers that stand in for clients who start a command and are about to attach to it, or to follow its output.
//!
//! A command waits for its readers, but not for one that has not come yet; between the two requests it could write
//! more than its log keeps. So the service reads, that is: waits, in the client's place.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use deltabox::{Events, Session};
use parking_lot::Mutex;

/// How long a client may take between its requests.
const WAIT: Duration = Duration::from_secs(10);

/// The stand-ins, by the address of their session (which they keep alive).
#[derive(Clone, Default)]
pub(crate) struct Expected(Arc<Mutex<HashMap<usize, Events>>>);

impl Expected {
    /// Somebody will attach to this session from its first byte on.
    pub(crate) fn add(&self, session: &Arc<Session>) {
        let key = key(session);
        self.0.lock().insert(key, session.events(0));
        let map = self.0.clone();
        tokio::spawn(async move {
            tokio::time::sleep(WAIT).await;
            // Not dropped under the lock of the map: it has locks of its own to take.
            let late = map.lock().remove(&key);
            drop(late);
        });
    }

    /// The events from output byte `offset` on, for a client that has come.
    pub(crate) fn events(&self, session: &Arc<Session>, offset: u64) -> Events {
        let stand_in = self.0.lock().remove(&key(session));
        match stand_in {
            Some(events) if offset == 0 => events,
            _ => session.events(offset),
        }
    }
}

fn key(session: &Arc<Session>) -> usize {
    Arc::as_ptr(session).addr()
}
