//! Births: processes of an image that are no longer there are made again, each under its true
//! parent, with its number, session and process group.
//!
//! A process is in the session of its parent, unless it made one of its own; but its parent may have made
//! a session since, or be gone (then it was [adopted]). So the order of births matters, and where the
//! member that a session or group is named after is dead, a stand-in lives for as long as it takes.

mod adopted;
pub(crate) mod spawn;
pub(crate) mod terminal;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::env::Environment;
use crate::error::{During, Error, Result};
use crate::files::Place;
use crate::hold::{Held, HeldProcess};
use crate::ids::InnerPid;
use crate::image::{INIT, ProcessImage, TreeImage};
use crate::numbers;
use crate::procfs::Stat;
use crate::programs::Programs;
use crate::remote::{Batch, Remote};
use crate::stop::{Stopped, hold_thread};
use crate::sys::ptrace;

/// How a session outside shows inside.
const NONE: InnerPid = InnerPid(0);

/// How often a copy of a template, or of a process, is tried, where one that was made has died or its number is taken,
const COPIES: usize = 5;
/// and how long init may take in between to wait for it.
const BURIAL: Duration = Duration::from_millis(2);

/// The processes that were made.
#[derive(Default)]
pub(crate) struct Born {
    pub(crate) all: BTreeSet<InnerPid>,
    /// Those that are copies of the template; the others are fresh images of their programs.
    pub(crate) copies: BTreeSet<InnerPid>,
    /// Masters of their terminals, where nobody has them.
    pub(crate) masters: BTreeMap<u32, OwnedFd>,
}

/// Makes what `target` has and `held` lacks.
pub(crate) fn deliver(env: &dyn Environment, held: &mut Held, target: &TreeImage) -> Result<Born> {
    let sessions = held
        .processes
        .iter()
        .map(|(pid, p)| (*pid, p.stat.session))
        .collect();
    let mut delivery = Delivery {
        env,
        held,
        target,
        sessions,
        born: Born::default(),
        dying: BTreeSet::new(),
    };
    delivery.families()?;
    if !delivery.born.all.is_empty() {
        delivery.terminals()?;
    }
    delivery.dying_leaders()?;
    delivery.groups()?;
    delivery.zombies()?;
    Ok(delivery.born)
}

struct Delivery<'a> {
    env: &'a dyn Environment,
    held: &'a mut Held,
    target: &'a TreeImage,
    /// The session that each process is in by now.
    sessions: BTreeMap<InnerPid, InnerPid>,
    born: Born,
    /// Those that are to be zombies. They are held as long as the groups or sessions that they lead are made.
    dying: BTreeSet<InnerPid>,
}

impl<'a> Delivery<'a> {
    fn families(&mut self) -> Result<()> {
        let mut wanted = self.target.processes.keys();
        if wanted.all(|pid| self.held.processes.contains_key(pid)) {
            return Ok(());
        }
        let present: Vec<InnerPid> = self.held.processes.keys().copied().collect();
        for pid in present {
            self.family(pid)?;
        }
        for child in self.unborn_children(INIT) {
            if self.born_in(child).is_none_or(|session| session.0 <= 1) {
                self.child_of_init(child)?;
                self.family(child)?;
            }
        }
        // The session of one that was adopted may be led by a descendant of another.
        loop {
            self.dying_leaders()?;
            let left = self.left_over();
            let Some(first) = left.first() else {
                return Ok(());
            };
            let Some(pid) = left.iter().copied().find(|pid| self.is_ready(*pid)) else {
                return Err(self.lost(*first, "its session's leader cannot be made before it"));
            };
            self.adopted(pid)?;
            self.family(pid)?;
        }
    }

    fn programs(&self) -> Programs<'a> {
        Programs {
            env: self.env,
            shared: &self.target.shared,
        }
    }

    fn image(&self, pid: InnerPid) -> &'a ProcessImage {
        &self.target.processes[&pid]
    }

    fn lost(&self, pid: InnerPid, why: &str) -> Error {
        let name = String::from_utf8_lossy(&self.image(pid).stat.name).into_owned();
        Error::Unsupported {
            pid,
            name,
            what: format!("it cannot be made again: {why}"),
        }
    }

    fn unborn_children(&self, parent: InnerPid) -> Vec<InnerPid> {
        let unborn = |(pid, p): (&InnerPid, &std::sync::Arc<ProcessImage>)| {
            (p.stat.parent == parent && !self.held.processes.contains_key(pid)).then_some(*pid)
        };
        self.target.processes.iter().filter_map(unborn).collect()
    }

    /// Those that are not there yet, but to whom somebody there is to be the parent.
    fn left_over(&self) -> Vec<InnerPid> {
        let parents = self.held.processes.keys().chain([&INIT]);
        parents.flat_map(|p| self.unborn_children(*p)).collect()
    }

    /// Makes the descendants of a process that is there, and its session if it is to lead one; but not those that it has
    /// adopted, nor theirs.
    fn family(&mut self, pid: InnerPid) -> Result<()> {
        let Some(image) = self.target.processes.get(&pid) else {
            return Ok(());
        };
        if image.stat.session == pid && self.sessions[&pid] != pid {
            let inherited = self.sessions[&pid];
            for child in self.unborn_children(pid) {
                if self.born_in(child) == Some(inherited) {
                    self.child(pid, child)?;
                }
            }
            self.lead_session(pid)?;
        }
        for child in self.unborn_children(pid) {
            let session = self.born_in(child);
            if session.is_none_or(|session| session == self.sessions[&pid]) {
                self.child(pid, child)?;
            }
        }
        let children: Vec<InnerPid> = self.born.all.iter().copied().collect();
        for child in children {
            if self.image(child).stat.parent == pid && child != pid {
                self.family(child)?;
            }
        }
        Ok(())
    }

    fn lead_session(&mut self, pid: InnerPid) -> Result<()> {
        self.call(pid, libc::SYS_setsid, &[])?;
        self.sessions.insert(pid, pid);
        self.take_terminal(pid);
        Ok(())
    }

    /// Gives a leader its terminal, which its children get from it and in no other way. Where that cannot be done yet, it is
    /// tried again when all descriptors are there.
    fn take_terminal(&mut self, pid: InnerPid) {
        // One that is to be a zombie has none.
        let tty = self.target.processes.get(&pid).map_or(0, |p| p.stat.tty);
        if tty == 0 {
            return;
        }
        let taken = self.held.remote(pid).map_or(Ok(()), |remote| {
            terminal::take(self.env, remote, tty, &mut self.born.masters)
        });
        if let Err(error) = taken {
            tracing::debug!(%error, "process {pid} gets its terminal later");
        }
    }

    /// Takes terminals away from those whose leader has got one after they were born.
    fn terminals(&mut self) -> Result<()> {
        for (pid, image) in &self.target.processes {
            let now = self.held.stat(*pid, &self.born.all)?.tty;
            if self.born.all.contains(pid)
                && image.stat.tty == 0
                && now != 0
                && let Some(remote) = self.held.remote(*pid)
            {
                terminal::leave(self.env, remote, now).during(*pid, "leaving a terminal")?;
            }
        }
        Ok(())
    }

    fn call(&mut self, pid: InnerPid, nr: i64, args: &[crate::remote::Arg]) -> Result<u64> {
        let remote = self
            .held
            .remote(pid)
            .ok_or(io::ErrorKind::NotFound)
            .during(pid, "finding it")?;
        call(remote, nr, args).during(pid, "restoring session and group")
    }

    fn child(&mut self, parent: InnerPid, pid: InnerPid) -> Result<()> {
        let image = self.image(pid);
        if self.born.copies.contains(&parent) && self.is_in_template(pid) {
            return self.twin(parent, pid);
        }
        // One that stays may be in a root directory of its own already.
        let root = Place::root(self.env, &self.held.procfs, parent);
        let root = root.during(parent, "reading its root directory")?;
        let whole = root.map(|_| self.env.root());
        let (env, programs) = (self.env, self.programs());
        let mother = self.mother(parent)?;
        let signal = image.stat.exit_signal;
        let remote = programs.of(image, |exe| {
            numbers::born_as(env, pid, || spawn::child(mother, pid, signal, exe, whole))
        });
        let remote = remote.during(pid, "making the process again")?;
        let session = self.sessions[&parent];
        self.admit(pid, remote, session)
    }

    fn is_in_template(&self, pid: InnerPid) -> bool {
        let template = self.env.template();
        template.is_some_and(|t| t.has(pid))
    }

    /// Makes a child of a copy of the template, another copy.
    fn twin(&mut self, parent: InnerPid, pid: InnerPid) -> Result<()> {
        let exit_signal = self.image(pid).stat.exit_signal;
        let remote = self.copy_as(parent, pid, exit_signal, "copying its parent")?;
        self.born.copies.insert(pid);
        let session = self.sessions[&parent];
        self.admit(pid, remote, session)
    }

    /// Makes a child of init by way of the template, if there is one that can. Such a child begins in no session of the
    /// sandbox, so it has to make its own before it has children.
    fn copy_of_template(&mut self, pid: InnerPid) -> Result<bool> {
        let template = self.env.template();
        if !template.is_some_and(|t| self.target.begins_as_copy(pid, t)) {
            return Ok(false);
        }
        for _ in 0..COPIES {
            let born = self.env.birth_from_template(pid, self.spare(&[]));
            let is_born = born.is_ok();
            match born.and_then(|host| spawn::adopt(pid, host)) {
                Ok(remote) => {
                    self.born.copies.insert(pid);
                    self.admit(pid, remote, NONE)?;
                    return Ok(true);
                }
                // One that was born early has died just now: its number is free when init has waited for it.
                Err(e) if is_born || e.kind() == io::ErrorKind::AlreadyExists => {
                    tracing::debug!(error = %e, "another copy of the template is made");
                    std::thread::sleep(BURIAL);
                }
                Err(e) => {
                    tracing::debug!(error = %e, "a process is made without its template");
                    return Ok(false);
                }
            }
        }
        Ok(false)
    }

    fn child_of_init(&mut self, pid: InnerPid) -> Result<()> {
        if self.copy_of_template(pid)? {
            return Ok(());
        }
        let image = self.image(pid);
        let host = numbers::once_free(|| self.env.birth(pid));
        let born = host.and_then(|host| spawn::adopt(pid, host));
        let born = born.and_then(|mut remote| {
            let execute = |exe: BorrowedFd<'_>| spawn::execute(&mut remote, exe, None);
            self.programs().of(image, execute)?;
            Ok(remote)
        });
        let remote = born.during(pid, "making the process again")?;
        self.admit(pid, remote, INIT)
    }

    /// A number that nothing in the image has, nor what is held, and that is not `taken`.
    fn spare(&self, taken: &[InnerPid]) -> InnerPid {
        let processes = self.held.processes.values();
        let threads = processes.flat_map(|p| p.stopped.threads.iter().map(|t| t.tid));
        self.target
            .free_number(threads.chain(taken.iter().copied()))
    }

    fn admit(&mut self, pid: InnerPid, remote: Remote, session: InnerPid) -> Result<()> {
        let process = admit(self.held, remote, self.image(pid).birth)?;
        self.held.processes.insert(pid, process);
        self.sessions.insert(pid, session);
        self.born.all.insert(pid);
        Ok(())
    }

    fn groups(&mut self) -> Result<()> {
        let mut astray: BTreeMap<InnerPid, InnerPid> = BTreeMap::new();
        for (pid, image) in &self.target.processes {
            let stat = self.held.stat(*pid, &self.born.all)?;
            if stat.group != image.stat.group {
                astray.insert(*pid, image.stat.group);
            }
        }
        let left = self.left_groups(&astray);
        for leader in &left {
            self.call(*leader, libc::SYS_setpgid, &[0.into(), 0.into()])?;
            astray.insert(*leader, self.image(*leader).stat.group);
        }
        // Those that groups are named after come first, but for those who leave theirs.
        let mut astray: Vec<(InnerPid, InnerPid)> = astray.into_iter().collect();
        astray.sort_by_key(|(pid, group)| (left.contains(pid), pid != group, *group));
        let mut stand_ins: BTreeMap<InnerPid, (InnerPid, Remote)> = BTreeMap::new();
        let mut result = Ok(());
        for (pid, group) in astray {
            result = self.join(pid, group, &mut stand_ins);
            if result.is_err() {
                break;
            }
        }
        for (group, (mother, stand_in)) in stand_ins {
            spawn::kill(&stand_in, &[stand_in.host()]).during(group, "ending a stand-in")?;
            if let Some(mother) = self.held.remote(mother) {
                spawn::reap(mother, &[group]).during(group, "taking a dead child off its hands")?;
            }
        }
        result
    }

    /// The processes that are in another group than the one which is named after them, and that others are to join.
    fn left_groups(&self, astray: &BTreeMap<InnerPid, InnerPid>) -> BTreeSet<InnerPid> {
        let groups = astray.iter().filter(|(pid, group)| pid != group);
        let is_left = |group: &InnerPid| {
            let leader = self.target.processes.get(group);
            leader.is_some_and(|leader| leader.stat.group != *group)
        };
        groups.map(|(_, group)| *group).filter(is_left).collect()
    }

    fn join(
        &mut self,
        pid: InnerPid,
        group: InnerPid,
        stand_ins: &mut BTreeMap<InnerPid, (InnerPid, Remote)>,
    ) -> Result<()> {
        let args = [0.into(), group.0.into()];
        let joined = self.call(pid, libc::SYS_setpgid, &args);
        if joined.is_ok() || pid == group || stand_ins.contains_key(&group) {
            return joined.map(drop);
        }
        // Nobody is in the group any more: it needs a leader to come into being.
        let mut leader = self.copy_as(pid, group, libc::SIGCHLD, "making its group")?;
        let made = call(&mut leader, libc::SYS_setpgid, &[0.into(), 0.into()]);
        stand_ins.insert(group, (pid, leader));
        made.during(pid, "making its group")?;
        self.call(pid, libc::SYS_setpgid, &args).map(drop)
    }

    /// A child with a number, which is a copy of its parent.
    fn copy_as(
        &mut self,
        parent: InnerPid,
        pid: InnerPid,
        exit_signal: i32,
        doing: &str,
    ) -> Result<Remote> {
        let env = self.env;
        let mother = self.mother(parent)?;
        let copy = numbers::born_as(env, pid, || spawn::twin(mother, pid, exit_signal));
        copy.during(pid, doing)
    }

    /// Children that have ended and were not waited for, and whose parent is there.
    fn missing_zombies(&self) -> Vec<(InnerPid, &'a Stat)> {
        let there = |pid| self.held.zombies.contains_key(pid) || self.dying.contains(pid);
        let missing =
            self.target.zombies.iter().filter(|(pid, stat)| {
                !there(pid) && self.held.processes.contains_key(&stat.parent)
            });
        missing.map(|(pid, stat)| (*pid, stat)).collect()
    }

    /// Makes those that led a group or a session: as long as they live others can be born in it, or join.
    fn dying_leaders(&mut self) -> Result<()> {
        for (pid, stat) in self.missing_zombies() {
            if stat.group == pid {
                let doing = "making a dead child again";
                let child = self.copy_as(stat.parent, pid, stat.exit_signal, doing)?;
                let process = admit(self.held, child, 0)?;
                self.held.processes.insert(pid, process);
                self.sessions.insert(pid, self.sessions[&stat.parent]);
                self.dying.insert(pid);
                match stat.session == pid {
                    true => self.lead_session(pid)?,
                    false => drop(self.call(pid, libc::SYS_setpgid, &[0.into(), 0.into()])?),
                }
            }
        }
        Ok(())
    }

    /// Makes children that have ended and were not waited for.
    fn zombies(&mut self) -> Result<()> {
        let doing = "making a dead child again";
        for pid in std::mem::take(&mut self.dying) {
            if let Some(process) = self.held.processes.remove(&pid) {
                let ended = end_as(process.stopped.remote, &self.target.zombies[&pid]);
                ended.during(pid, doing)?;
                self.held
                    .zombies
                    .insert(pid, self.target.zombies[&pid].clone());
            }
        }
        for (pid, stat) in self.missing_zombies() {
            self.zombie(pid, stat).during(pid, doing)?;
        }
        Ok(())
    }

    fn zombie(&mut self, pid: InnerPid, stat: &Stat) -> io::Result<()> {
        let mother = self
            .held
            .remote(stat.parent)
            .ok_or(io::ErrorKind::NotFound)?;
        let env = self.env;
        let signal = stat.exit_signal;
        let mut child = numbers::born_as(env, pid, || spawn::twin(mother, pid, signal))?;
        let group = stat.group.0;
        let join = |child: &mut Remote| call(child, libc::SYS_setpgid, &[0.into(), group.into()]);
        let is_taken = |number: InnerPid| {
            let (living, dead) = (&self.target.processes, &self.target.zombies);
            let mut stats = living.values().map(|p| &p.stat).chain(dead.values());
            living.contains_key(&number)
                || dead.contains_key(&number)
                || stats.any(|s| s.session == number)
                || living.values().any(|p| p.stat.group == number)
        };
        if group != 0 && join(&mut child).is_err() && !is_taken(stat.group) {
            // Nobody is in its group any more: it needs a leader to come into being.
            let mut leader =
                numbers::born_as(env, stat.group, || spawn::twin(mother, stat.group, 0))?;
            let led = call(&mut leader, libc::SYS_setpgid, &[0.into(), 0.into()]);
            // Of one that was in another session the group is lost, as nobody but itself could have entered it.
            let _ = led.and_then(|_| join(&mut child));
            spawn::kill(&leader, &[leader.host()])?;
            spawn::reap(mother, &[stat.group])?;
        }
        end_as(child, stat)
    }
}

/// Has a new-born process end as one did that is a zombie.
fn end_as(mut child: Remote, stat: &Stat) -> io::Result<()> {
    let mut batch = Batch::new();
    let mut name = stat.name.clone();
    name.push(0);
    let name = batch.input(&name);
    batch.call(libc::SYS_prctl, &[libc::PR_SET_NAME.into(), name.into()]);
    let signal = stat.exit_status & 0x7f;
    if signal != 0 {
        let default = batch.input(&[0; 32]);
        let args = [signal.into(), default.into(), 0.into(), 8.into()];
        batch.call(libc::SYS_rt_sigaction, &args);
        child.run(&batch)?;
        ptrace::set_signal_mask(child.host(), 0)?;
        return spawn::die(&child, signal);
    }
    batch.call(libc::SYS_exit_group, &[(stat.exit_status >> 8).into()]);
    child.start(child.host(), &batch)?;
    spawn::await_end(child.host())
}

fn admit(held: &Held, remote: Remote, birth: u64) -> Result<HeldProcess> {
    let (pid, host) = (remote.pid(), remote.host());
    let thread = hold_thread(pid, host).during(pid, "holding it")?;
    let found = held.procfs.stat_and_bounds(pid, remote.files());
    let (stat, bounds) = found.during(pid, "reading what it is")?;
    let stopped = Stopped::take(remote, vec![thread]);
    Ok(HeldProcess {
        stopped,
        stat,
        bounds,
        birth,
        user_stop: None,
        ignores_trap: false,
        stop_with: None,
    })
}

fn call(remote: &mut Remote, nr: i64, args: &[crate::remote::Arg]) -> io::Result<u64> {
    let mut batch = Batch::new();
    let call = batch.call(nr, args);
    remote.run(&batch)?.result(call)
}
