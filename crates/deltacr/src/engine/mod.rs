//! Checkpoint and rollback of a whole tree.

mod capture;
mod undo;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::capture::Captured;
use crate::background::Background;
use crate::end;
use crate::env::Environment;
use crate::error::{During, Error, Result};
use crate::fd;
use crate::hold::{Acquaintances, Deaths, Grounds, Held, HeldProcess};
use crate::ids::{HostPid, InnerPid};
use crate::image::TreeImage;
use crate::interview::{Interview, Questionnaire};
use crate::mem::{Gears, Memory, Scan, SharedObjects, Tracker};
use crate::orphan::Orphans;
use crate::stopwatch::{Phases, Stopwatch};
use crate::store::PageStore;
use crate::tracer::trace;
use crate::waits::{self, Waits};

/// How long the processes may take to stand still. A process in an uninterruptible sleep takes
/// as long as what it waits for.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a checkpoint is begun, if it fails for what may be over a moment later.
const TRIES: u32 = 5;
/// How long the processes run before the second try; twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_millis(1);

/// A checkpoint of the processes, with what the caller captured at the same moment.
pub struct Checkpoint<T> {
    /// The processes.
    pub image: TreeImage,
    /// What the caller's closure returned.
    pub cut: T,
    /// How long the processes stood still, from the beginning of the freeze on.
    pub stop: Duration,
    /// The parts of that.
    pub phases: Phases,
    /// Memory pages that were copied.
    pub pages: u64,
}

/// What the caller's switch of the files' state brought.
pub struct Switched<T> {
    /// For the caller.
    pub value: T,
    /// Inodes that open descriptors and working directories no longer lead to, so that they are to be opened
    /// again (directories that were removed since).
    pub stale: Vec<u64>,
}

/// What a rollback did.
#[derive(Debug)]
pub struct Rollback<T> {
    /// What the caller's closure returned.
    pub switched: T,
    /// When the processes ran again.
    pub running: Instant,
    /// The parts, in order.
    pub phases: Phases,
    /// Memory pages that were written back.
    pub pages: u64,
    /// Processes undone in place.
    pub kept: usize,
    /// Processes made again.
    pub rebuilt: usize,
    /// Processes that were killed because they were born since.
    pub killed: usize,
    /// Why undoing in place failed, if it did; then the whole tree was made again.
    pub fallback: Option<String>,
    /// What could not be given back (connections to the outside), in sentences.
    pub notes: Vec<String>,
}

/// The engine of one sandbox: remembers what it has seen of the processes, so that each visit costs what
/// changed since the last.
pub struct Engine {
    means: Means,
    grounds: Option<Grounds>,
    known: Acquaintances,
    trackers: HashMap<HostPid, Option<Tracker>>,
    waits: Waits,
    background: Background,
}

/// What the memory of all processes is captured and restored with.
struct Means {
    store: Arc<PageStore>,
    shared: SharedObjects,
    orphans: Orphans,
    gears: Gears,
}

impl Means {
    fn memory<'a>(&'a self, env: &'a dyn Environment) -> Memory<'a> {
        Memory {
            store: &self.store,
            shared: &self.shared,
            env,
            orphans: &self.orphans,
            gears: self.gears,
        }
    }
}

impl Engine {
    /// An engine that has not met any process yet. Pages go to `store`.
    ///
    /// # Errors
    /// The kernel has no shared memory objects (`memfd_create(2)`).
    pub fn new(store: Arc<PageStore>) -> Result<Self> {
        Self::with_gears(store, Gears::default())
    }

    /// An engine that works in its second gear from other amounts on.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn with_gears(store: Arc<PageStore>, gears: Gears) -> Result<Self> {
        let shared = SharedObjects::new(store.clone()).during_tree("looking for shared memory")?;
        Ok(Self {
            means: Means {
                store,
                shared,
                orphans: Orphans::default(),
                gears,
            },
            grounds: None,
            known: HashMap::new(),
            trackers: HashMap::new(),
            waits: HashMap::new(),
            background: Background::default(),
        })
    }

    /// Processes of the engine's own, for whoever lists those of the sandbox.
    pub fn orphans(&self) -> Orphans {
        self.means.orphans.clone()
    }

    /// Waits until what the last checkpoint or rollback left to be done is done, and nothing of it is left among the processes.
    pub fn settle(&mut self) {
        self.background.end();
        self.trackers
            .values_mut()
            .flatten()
            .for_each(Tracker::finish);
    }

    /// Does for a checkpoint what can be done while the processes run.
    fn look_ahead(&mut self, env: &dyn Environment) {
        let memory = self.means.memory(env);
        let mut room = memory.gears.ahead;
        for (host, tracker) in &mut self.trackers {
            if let (Some(tracker), Some(known)) = (tracker, self.known.get(host))
                && tracker.is_worth_a_look(&known.files, memory.gears.snapshot)
            {
                memory.look_ahead(*host, &known.files, tracker, &mut room);
            }
        }
    }

    /// Stops all processes.
    fn hold(&mut self, env: &dyn Environment) -> Result<Held> {
        let grounds = open_once(&mut self.grounds, env)?;
        let held = Held::tree(grounds, &self.known, &mut self.waits, FREEZE_TIMEOUT)?;
        for thread in held.threads() {
            waits::note(thread.host, &thread.regs, &mut self.waits);
        }
        Ok(held)
    }

    /// Stops all processes, captures them, calls `cut` while they stand still, and lets them run on. `cut` is told whether
    /// all deaths have been reported.
    ///
    /// # Errors
    /// Something cannot be carried or captured, or `cut` failed. The processes run on in any case.
    pub fn checkpoint<T: Send>(
        &mut self,
        env: &dyn Environment,
        cut: impl FnOnce(Deaths) -> Result<T> + Send,
    ) -> Result<Checkpoint<T>> {
        self.settle();
        self.look_ahead(env);
        trace(|| {
            let mut tries = 0;
            let (mut held, captured, mut watch) = loop {
                let mut watch = Stopwatch::start();
                let mut held = self.hold(env)?;
                watch.lap("stop");
                let captured = self.capture(env, &mut held, &mut watch);
                held.remember(&mut self.known);
                // What was captured of the shared memory is good for this checkpoint only.
                let shared = self.means.shared.take();
                tries += 1;
                match captured {
                    Ok(mut captured) => {
                        let owners = self.means.shared.owners(env)?;
                        captured.image.shared = Arc::new(shared.inside(owners));
                        break (held, captured, watch);
                    }
                    // One that was killed while it stood still is not what the others fail for.
                    Err(e) if tries < TRIES && (e.is_death() || held.has_casualties()) => {
                        held.release()?;
                    }
                    // A connection that is being made, say, is made or refused soon.
                    Err(Error::Unsupported { .. }) if tries < TRIES => {
                        held.release()?;
                        std::thread::sleep(FIRST_PAUSE * (1 << (tries - 1)));
                    }
                    Err(e) => return Err(e),
                }
            };
            let Captured { image, pages, left } = captured;
            let cut = cut(held.deaths)?;
            watch.lap("files");
            held.release()?;
            watch.lap("resume");
            let stop = held.since.elapsed();
            self.background.begin(left)?;
            Ok(Checkpoint {
                image,
                cut,
                stop,
                phases: watch.phases,
                pages,
            })
        })
    }

    /// What a process has mapped and what of it was written, which can be seen while it answers questions. Its program break is not known yet.
    fn scan(&mut self, env: &dyn Environment, held: &Held, pid: InnerPid) -> Result<Scan> {
        let process = &held.processes[&pid];
        let remote = &process.stopped.remote;
        let tracker = self.trackers.entry(remote.host()).or_default();
        let memory = self.means.memory(env);
        memory.scan(remote, tracker.as_ref(), process.bounds)
    }

    fn forget_the_dead(&mut self, held: &Held) {
        let alive: HashSet<HostPid> = held.threads().map(|thread| thread.host).collect();
        // A number may have been used again since.
        let met = held.met_before(&self.known);
        // A state whose pages were lost is no state to go on from.
        let is_good = |t: &Option<Tracker>| t.as_ref().is_none_or(|t| t.base().pages.get().is_ok());
        self.trackers
            .retain(|host, tracker| met.contains(host) && is_good(tracker));
        self.waits.retain(|host, _| alive.contains(host));
    }

    /// What was given back while the processes ran becomes like all their memory.
    fn end_lazy(&mut self, held: &mut Held) -> Result<()> {
        for process in held.processes.values_mut() {
            let remote = &mut process.stopped.remote;
            if let Some(Some(tracker)) = self.trackers.get_mut(&remote.host()) {
                tracker.end_lazy(remote)?;
            }
        }
        Ok(())
    }

    /// Gives the processes the state of `target` back. `switch` is called when they stand still and it is known
    /// that nothing speaks against it; it gives the files their state back. If undoing in place fails after that, all
    /// processes are killed and made again from the image.
    ///
    /// # Errors
    /// Before `switch`: nothing has changed. After it: the tree is dead, and the error says why.
    pub fn rollback<T: Send>(
        &mut self,
        env: &dyn Environment,
        target: &TreeImage,
        switch: impl FnOnce() -> Result<Switched<T>> + Send,
    ) -> Result<Rollback<T>> {
        self.settle();
        target.complete()?;
        trace(|| {
            let mut watch = Stopwatch::start();
            let mut held = self.hold(env)?;
            watch.lap("stop");
            let survey = self.survey(env, &mut held, target);
            watch.lap("survey");
            let Switched { value, stale } = switch()?;
            watch.lap("files");
            let undone = survey.and_then(|mut now| {
                now.forget(&stale, target);
                self.undo(env, &mut held, now, target, &mut watch)
            });
            let done = match undone {
                Ok(done) => done,
                Err(e) => {
                    tracing::warn!(error = %e, "undoing in place failed; making the tree again");
                    held.abandon();
                    let mut done = self.make_all(env, target, &mut watch)?;
                    done.fallback = Some(e.to_string());
                    done
                }
            };
            Ok(done.with(value, watch.phases))
        })
    }

    /// Kills what is left of a tree, and makes all processes of `target`.
    ///
    /// # Errors
    /// No process is left of those that were made.
    pub fn rebuild(&mut self, env: &dyn Environment, target: &TreeImage) -> Result<Rollback<()>> {
        self.settle();
        target.complete()?;
        trace(|| {
            let mut watch = Stopwatch::start();
            let done = self.make_all(env, target, &mut watch)?;
            Ok(done.with((), watch.phases))
        })
    }

    /// Makes all processes of `target` in a sandbox that has none, but for copies of a template that wait to be taken up.
    ///
    /// # Errors
    /// No process is left of those that were made.
    pub fn build(&mut self, env: &dyn Environment, target: &TreeImage) -> Result<Rollback<()>> {
        target.complete()?;
        trace(|| {
            let mut watch = Stopwatch::start();
            let done = self.make_in_empty(env, target, &mut watch)?;
            Ok(done.with((), watch.phases))
        })
    }

    /// Kills all processes.
    ///
    /// # Errors
    /// They do not end.
    pub fn kill_all(&mut self, env: &dyn Environment) -> Result<()> {
        self.settle();
        self.known.clear();
        self.trackers.clear();
        self.waits.clear();
        trace(|| end::all(open_once(&mut self.grounds, env)?))
    }
}

fn open_once<'a>(
    grounds: &'a mut Option<Grounds>,
    env: &dyn Environment,
) -> Result<&'a mut Grounds> {
    match grounds {
        Some(open) => Ok(open),
        none => Ok(none.insert(Grounds::open(env)?)),
    }
}

/// Asks the processes for what only they can tell, all at once.
fn interview_all<'q>(
    held: &mut Held,
    questionnaire: &'q Questionnaire,
    wanted: impl Fn(&InnerPid) -> bool,
) -> Result<Vec<(InnerPid, Interview<'q>)>> {
    let processes = held.processes.iter_mut().filter(|(pid, _)| wanted(pid));
    processes
        .map(|(pid, process)| Ok((*pid, Interview::begin(&mut process.stopped, questionnaire)?)))
        .collect()
}

fn remotes(held: &mut Held) -> fd::Procs<'_> {
    held.processes
        .iter_mut()
        .map(|(pid, p)| (*pid, &mut p.stopped.remote))
        .collect()
}

/// A process of the image, all of which are there if the image's families are whole.
fn member(
    processes: &mut BTreeMap<InnerPid, HeldProcess>,
    pid: InnerPid,
) -> Result<&mut HeldProcess> {
    processes.get_mut(&pid).ok_or_else(|| Error::Corrupt {
        pid,
        what: "its parent is not in the image".to_owned(),
    })
}
