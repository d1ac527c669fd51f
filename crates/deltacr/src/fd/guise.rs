//! Doing something as somebody else, where the kernel remembers who did it: who made a unix socket (`SO_PEERCRED`), who asked for the
//! signals of a file.

use std::io;

use super::Procs;
use super::socket::Maker;
use crate::birth::spawn;
use crate::env::Environment;
use crate::ids::InnerPid;
use crate::numbers;
use crate::remote::{Batch, Remote};

/// Leaves an id as it is.
const AS_IT_IS: u32 = u32::MAX;

/// A user and a group to act as, as the sandbox counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Guise {
    pub(crate) real_user: u32,
    pub(crate) user: u32,
    pub(crate) group: u32,
}

impl Guise {
    /// That of who made a unix socket.
    pub(crate) fn of(maker: Maker) -> Self {
        Self {
            real_user: maker.user,
            user: maker.user,
            group: maker.group,
        }
    }

    /// Has a batch act so from here on, as far as the process may.
    fn put_on(self, batch: &mut Batch) {
        let groups = [AS_IT_IS, self.group, AS_IT_IS].map(Into::into);
        batch.call(libc::SYS_setresgid, &groups);
        // The saved id stays root's, and with it what is permitted.
        let users = [self.real_user, self.user, AS_IT_IS].map(Into::into);
        batch.call(libc::SYS_setresuid, &users);
    }

    /// Has a batch act as root again.
    fn take_off(self, batch: &mut Batch) {
        batch.call(libc::SYS_setresuid, &[0, 0, AS_IT_IS].map(Into::into));
        batch.call(
            libc::SYS_setresgid,
            &[AS_IT_IS, 0, AS_IT_IS].map(Into::into),
        );
    }
}

/// Adds a call to a batch, to be made in a guise if there is one.
pub(crate) fn in_guise<T>(
    batch: &mut Batch,
    guise: Option<Guise>,
    call: impl FnOnce(&mut Batch) -> T,
) -> T {
    if let Some(guise) = guise {
        guise.put_on(batch);
    }
    let called = call(batch);
    if let Some(guise) = guise {
        guise.take_off(batch);
    }
    called
}

/// A process that is there only to do something as one that has ended.
pub(crate) struct StandIn {
    parent: InnerPid,
    pub(crate) remote: Remote,
}

impl StandIn {
    /// One with this number, a child of `parent` that is told of nothing.
    ///
    /// # Errors
    /// The number is taken, or no more processes can be made.
    pub(crate) fn make(
        procs: &mut Procs<'_>,
        env: &dyn Environment,
        parent: InnerPid,
        pid: InnerPid,
    ) -> io::Result<Self> {
        let made = Self::any(procs, env, parent, pid)?;
        match made.remote.host().inner()? {
            found if found == pid => Ok(made),
            found => {
                made.end(procs)?;
                Err(numbers::taken(pid, found))
            }
        }
    }

    /// The same, with another number if this one is taken.
    pub(crate) fn any(
        procs: &mut Procs<'_>,
        env: &dyn Environment,
        parent: InnerPid,
        pid: InnerPid,
    ) -> io::Result<Self> {
        let remote = procs.get_mut(&parent).ok_or(io::ErrorKind::NotFound)?;
        env.set_next_pid(pid)?;
        let remote = spawn::copy(remote, pid, libc::CLONE_VM)?;
        Ok(Self { parent, remote })
    }

    /// Ends it and has it waited for.
    pub(crate) fn end(self, procs: &mut Procs<'_>) -> io::Result<()> {
        let number = self.remote.host().inner()?;
        spawn::kill(&self.remote, &[self.remote.host()])?;
        match procs.get_mut(&self.parent) {
            Some(parent) => spawn::reap(parent, &[number]),
            None => Ok(()),
        }
    }
}
