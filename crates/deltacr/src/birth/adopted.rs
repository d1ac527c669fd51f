//! Processes that came to their parent when their own parent ended: to init, or to one that takes orphans for it
//! (`PR_SET_CHILD_SUBREAPER`).
//!
//! They are in a session that they did not get from whose children they are now. So each is made by somebody of that session, as the
//! child of a stand-in whose end makes it its parent's. Where nobody of the session is left, the stand-in leads it for that time.

use std::io;

use super::{COPIES, Delivery, call, spawn};
use crate::error::{During, Error, Result};
use crate::ids::InnerPid;
use crate::image::INIT;
use crate::numbers;
use crate::remote::{Arg, Batch, Remote};

impl Delivery<'_> {
    /// The session that a process must be born in: its own, or one that it was in before it made its own, and that a child
    /// has got from it. `None` if any will do.
    pub(super) fn born_in(&self, pid: InnerPid) -> Option<InnerPid> {
        let image = self.image(pid);
        if image.stat.session != pid {
            return Some(image.stat.session);
        }
        let can_inherit = |session: &InnerPid| match self.target.processes.contains_key(session) {
            true => *session != pid && !self.descends(*session, pid),
            // Its orphans may as well have come later.
            false => !image.attributes.takes_orphans(),
        };
        let children = self.unborn_children(pid).into_iter();
        let mut inherited = children.filter_map(|child| self.born_in(child));
        inherited.find(can_inherit)
    }

    /// Whether a process is to be a descendant of another.
    fn descends(&self, pid: InnerPid, from: InnerPid) -> bool {
        let parent_of = |pid: &InnerPid| {
            let living = self.target.processes.get(pid).map(|p| &p.stat);
            Some(living.or_else(|| self.target.zombies.get(pid))?.parent)
        };
        from == INIT || std::iter::successors(parent_of(&pid), parent_of).any(|p| p == from)
    }

    /// Whether the leader of the session that a process is to be born in is there, or will never be.
    pub(super) fn is_ready(&self, pid: InnerPid) -> bool {
        let leader = self.birth_session(pid);
        let is_to_be = self.target.processes.contains_key(&leader)
            || self.target.zombies.contains_key(&leader);
        self.held.processes.contains_key(&leader) || !is_to_be
    }

    fn birth_session(&self, pid: InnerPid) -> InnerPid {
        self.born_in(pid).unwrap_or(pid)
    }

    /// Makes a process that its parent has adopted.
    pub(super) fn adopted(&mut self, pid: InnerPid) -> Result<()> {
        let parent = self.image(pid).stat.parent;
        if parent == INIT {
            self.by_stand_in(parent, pid)?;
        } else {
            let before = self.takes_orphans(parent, 1)?;
            let made = self.by_stand_in(parent, pid);
            self.takes_orphans(parent, before)?;
            made?;
        }
        match self.held.processes[&pid].stat.parent == parent {
            true => Ok(()),
            false => Err(self.lost(pid, "another process takes the orphans of its session")),
        }
    }

    /// Says whether a process takes orphans; returns whether it did before.
    fn takes_orphans(&mut self, pid: InnerPid, whether: i32) -> Result<i32> {
        let mut batch = Batch::new();
        let before = batch.output(4);
        let get = [libc::PR_GET_CHILD_SUBREAPER.into(), before.into()];
        batch.call(libc::SYS_prctl, &get);
        let set: [Arg; 2] = [libc::PR_SET_CHILD_SUBREAPER.into(), whether.into()];
        batch.call(libc::SYS_prctl, &set);
        let outcome = self.mother(pid)?.run(&batch);
        let outcome = outcome.during(pid, "having it take orphans")?;
        Ok(outcome.int(before))
    }

    fn by_stand_in(&mut self, parent: InnerPid, pid: InnerPid) -> Result<()> {
        let session = self.birth_session(pid);
        match self.relative(parent, session) {
            Some(relative) => {
                let stand_in = self.spare_copy(relative)?;
                let number = stand_in.pid();
                self.orphan_of(stand_in, session, pid)?;
                self.reap(relative, number)
            }
            None if parent == INIT => {
                let doing = "making its session";
                let host = numbers::once_free(|| self.env.birth(session));
                let host = host.during(pid, doing)?;
                let stand_in = spawn::adopt(session, host).during(pid, doing)?;
                self.orphan_of_leader(stand_in, session, pid)
            }
            None => {
                // A session whose leader has ended keeps its number as long as it has members.
                let refusal = "it takes orphans of a session that others are left in";
                let doing = "making a stand-in";
                let stand_in = self.copy_as(parent, session, libc::SIGCHLD, doing);
                let stand_in = stand_in.map_err(|e| match e {
                    Error::Process { source, .. }
                        if source.kind() == io::ErrorKind::AlreadyExists =>
                    {
                        self.lost(parent, refusal)
                    }
                    e => e,
                })?;
                self.orphan_of_leader(stand_in, session, pid)?;
                self.reap(parent, session)
            }
        }
    }

    /// Somebody of the session whose children's children go to `parent`; its leader if that is there.
    fn relative(&self, parent: InnerPid, session: InnerPid) -> Option<InnerPid> {
        let members = self.sessions.iter().filter(|(_, s)| **s == session);
        let descended = members
            .map(|(pid, _)| *pid)
            .filter(|pid| self.descends(*pid, parent));
        descended.min_by_key(|pid| *pid != session)
    }

    pub(super) fn mother(&mut self, pid: InnerPid) -> Result<&mut Remote> {
        let found = self.held.remote(pid).ok_or(io::ErrorKind::NotFound);
        found.during(pid, "finding it")
    }

    /// A copy of a process, with a number that nothing in the image has.
    fn spare_copy(&mut self, of: InnerPid) -> Result<Remote> {
        let mut taken = Vec::new();
        for _ in 0..COPIES {
            let number = self.spare(&taken);
            if let Some(copy) = self.copy(of, number)? {
                return Ok(copy);
            }
            // Who bore a copy of the template had it, and is not gone yet.
            taken.push(number);
        }
        Err(self.lost(of, "the numbers for its stand-ins are taken"))
    }

    /// A copy of a process; none if the number is taken.
    fn copy(&mut self, of: InnerPid, number: InnerPid) -> Result<Option<Remote>> {
        let chosen = self.env.set_next_pid(number);
        chosen.during(number, "choosing a number")?;
        let doing = "making a stand-in";
        let stand_in = spawn::copy(self.mother(of)?, number, libc::SIGCHLD).during(of, doing)?;
        let found = stand_in.host().inner().during(of, doing)?;
        if found == number {
            return Ok(Some(stand_in));
        }
        spawn::kill(&stand_in, &[stand_in.host()]).during(of, doing)?;
        self.reap(of, found)?;
        Ok(None)
    }

    fn reap(&mut self, mother: InnerPid, child: InnerPid) -> Result<()> {
        let reaped = spawn::reap(self.mother(mother)?, &[child]);
        reaped.during(mother, "taking a dead child off its hands")
    }

    fn orphan_of_leader(
        &mut self,
        mut stand_in: Remote,
        session: InnerPid,
        pid: InnerPid,
    ) -> Result<()> {
        let led = call(&mut stand_in, libc::SYS_setsid, &[]);
        led.during(pid, "making its session")?;
        self.orphan_of(stand_in, session, pid)
    }

    /// Makes a child of the stand-in, whose end then gives it to its parent.
    fn orphan_of(&mut self, mut stand_in: Remote, session: InnerPid, pid: InnerPid) -> Result<()> {
        let image = self.image(pid);
        let signal = image.stat.exit_signal;
        let born = self.programs().of(image, |exe| {
            numbers::born_as(self.env, pid, || {
                spawn::child(&mut stand_in, pid, signal, exe, None)
            })
        });
        let ended = spawn::kill(&stand_in, &[stand_in.host()]);
        let remote = born.during(pid, "making the process again")?;
        ended.during(pid, "ending its stand-in parent")?;
        self.admit(pid, remote, session)
    }
}
