//! Which objects of the state wanted are there already.

use std::collections::{BTreeMap, BTreeSet};

use super::model::{Descriptors, Kind, Object};
use super::{procfs, socket};
use crate::ids::InnerPid;

/// Flags that only a new open can change.
const FIXED: i32 = libc::O_ACCMODE | libc::O_PATH | libc::O_SYNC;
/// Reads that putting a semaphore back may take; more is for a new one.
const SEMAPHORE_READS: u64 = 1000;

/// Pairs of objects that are the same, or can be made so in place.
pub(crate) struct Plan {
    /// For each target object the current one that becomes it.
    pub(crate) reuse: Vec<Option<usize>>,
    /// For each target pipe the current one that becomes it.
    pub(crate) pipes: BTreeMap<usize, usize>,
}

/// What is to be done to one process' table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct TableChange {
    /// Descriptors that must not stay as they are.
    pub(crate) close: Vec<i32>,
    /// Descriptors that stay.
    pub(crate) keep: BTreeSet<i32>,
    /// Descriptors that stay, but for this value of close-on-exec.
    pub(crate) cloexec: Vec<(i32, bool)>,
    /// Descriptors that are missing, with the target object.
    pub(crate) install: Vec<(i32, usize)>,
}

impl TableChange {
    pub(crate) fn is_empty(&self) -> bool {
        self.close.is_empty() && self.cloexec.is_empty() && self.install.is_empty()
    }
}

impl Plan {
    pub(crate) fn new(current: &Descriptors, target: &Descriptors) -> Self {
        let mut plan = Self {
            reuse: vec![None; target.objects.len()],
            pipes: pair_pipes(current, target),
        };
        let mut taken = BTreeSet::new();
        // First what is in its place already; then what is elsewhere but cannot be had twice.
        for (index, wanted) in target.objects.iter().enumerate() {
            let mut here = wanted.slots.iter().filter_map(|&(pid, fd)| {
                let object = current.slot(pid, fd)?.object;
                (!taken.contains(&object) && plan.alike(current, object, wanted)).then_some(object)
            });
            plan.reuse[index] = here.next();
            taken.extend(plan.reuse[index]);
        }
        for (index, wanted) in target.objects.iter().enumerate() {
            if plan.reuse[index].is_none() && unique(&wanted.kind) {
                plan.reuse[index] = (0..current.objects.len())
                    .filter(|object| !taken.contains(object))
                    .filter(|&object| !current.objects[object].is_in_flight())
                    .find(|&object| plan.alike(current, object, wanted));
                taken.extend(plan.reuse[index]);
            }
        }
        socket::verify(current, target, &mut plan.reuse);
        plan
    }

    /// Whether `now` can become `wanted` without being opened anew.
    fn alike(&self, current: &Descriptors, now: usize, wanted: &Object) -> bool {
        let now = &current.objects[now];
        if now.flags & FIXED != wanted.flags & FIXED {
            return false;
        }
        match (&now.kind, &wanted.kind) {
            (Kind::Pipe { pipe: now }, Kind::Pipe { pipe: wanted }) => {
                self.pipes.get(wanted) == Some(now)
            }
            (
                Kind::Event { count, semaphore },
                Kind::Event {
                    count: goal,
                    semaphore: same,
                },
            ) => semaphore == same && (!semaphore || count.saturating_sub(*goal) < SEMAPHORE_READS),
            (Kind::Timer(now), Kind::Timer(wanted)) => now.clock == wanted.clock,
            (Kind::Signals { .. }, Kind::Signals { .. })
            | (Kind::Inotify { .. }, Kind::Inotify { .. })
            | (Kind::Epoll { .. }, Kind::Epoll { .. }) => true,
            // A process that was built anew is another one, whatever its number.
            (Kind::Process { pid: now }, Kind::Process { pid }) => {
                now == pid && current.tables.contains_key(pid)
            }
            (Kind::Socket(now), Kind::Socket(wanted)) => socket::alike(now, wanted),
            (Kind::Path { path: now }, Kind::Path { path }) => {
                now == path && procfs::stays_open(path, |pid| current.tables.contains_key(&pid))
            }
            // So is a zombie, and who was one may be gone.
            (Kind::Refused { .. } | Kind::Zombie { .. }, _) => false,
            (now, wanted) => now == wanted,
        }
    }

    /// What differs between the two tables of a process.
    pub(crate) fn change(
        &self,
        pid: InnerPid,
        current: &Descriptors,
        target: &Descriptors,
    ) -> TableChange {
        let mut change = TableChange::default();
        let empty = BTreeMap::new();
        let now = current.tables.get(&pid).unwrap_or(&empty);
        let wanted = target.tables.get(&pid).unwrap_or(&empty);
        for (&fd, slot) in now {
            match wanted.get(&fd) {
                Some(goal) if self.reuse[goal.object] == Some(slot.object) => {
                    change.keep.insert(fd);
                    if goal.cloexec != slot.cloexec {
                        change.cloexec.push((fd, goal.cloexec));
                    }
                }
                _ => change.close.push(fd),
            }
        }
        let missing = wanted.iter().filter(|(fd, _)| !change.keep.contains(fd));
        change.install = missing.map(|(&fd, slot)| (fd, slot.object)).collect();
        change
    }
}

/// Kinds of which a second one would be another thing.
fn unique(kind: &Kind) -> bool {
    matches!(
        kind,
        Kind::Pipe { .. } | Kind::External(_) | Kind::Master { .. } | Kind::Socket(_)
    )
}

/// Pairs pipes by where their ends are, and what is left by inode. A fifo is its inode.
fn pair_pipes(current: &Descriptors, target: &Descriptors) -> BTreeMap<usize, usize> {
    let mut pairs = Pairs {
        current,
        target,
        pairs: BTreeMap::new(),
        taken: BTreeSet::new(),
    };
    for object in &target.objects {
        let Kind::Pipe { pipe: wanted } = object.kind else {
            continue;
        };
        for &(pid, fd) in &object.slots {
            if let Some(slot) = current.slot(pid, fd)
                && let now = &current.objects[slot.object]
                && let Kind::Pipe { pipe } = now.kind
                && now.access() == object.access()
            {
                pairs.pair(wanted, pipe);
            }
        }
    }
    let mut held = BTreeMap::new();
    for object in &current.objects {
        if let Kind::Pipe { pipe } = object.kind
            && !object.is_in_flight()
        {
            held.insert(current.pipes[pipe].inode, pipe);
        }
    }
    for (wanted, pipe) in target.pipes.iter().enumerate() {
        if let Some(&now) = held.get(&pipe.inode) {
            pairs.pair(wanted, now);
        }
    }
    pairs.pairs
}

struct Pairs<'a> {
    current: &'a Descriptors,
    target: &'a Descriptors,
    pairs: BTreeMap<usize, usize>,
    taken: BTreeSet<usize>,
}

impl Pairs<'_> {
    fn pair(&mut self, wanted: usize, now: usize) {
        let (goal, have) = (&self.target.pipes[wanted], &self.current.pipes[now]);
        let fits = goal.fifo == have.fifo && (!goal.fifo || goal.inode == have.inode);
        if fits && !self.pairs.contains_key(&wanted) && self.taken.insert(now) {
            self.pairs.insert(wanted, now);
        }
    }
}
