//! Checkpoint and rollback of a whole tree.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::attributes;
use crate::background::Background;
use crate::birth::{self, terminal::Terminals};
use crate::describe::describe;
use crate::end;
use crate::env::Environment;
use crate::error::{During, Error, Result};
use crate::fd::{self, Descriptors};
use crate::files::Place;
use crate::hold::{Acquaintances, Deaths, Grounds, Held, HeldProcess};
use crate::ids::{HostPid, InnerPid};
use crate::image::{ProcessImage, TreeImage};
use crate::interview::Interview;
use crate::mem::{Gears, Layout, Memory, SharedObjects, Tracker, Vma, Work};
use crate::orphan::Orphans;
use crate::reconcile::{self, Now, Reconcile};
use crate::stopwatch::{Phases, Stopwatch};
use crate::store::PageStore;
use crate::sysv::{self, SystemV};
use crate::tracer::trace;
use crate::waits::Wait;

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
    store: Arc<PageStore>,
    grounds: Option<Grounds>,
    known: Acquaintances,
    trackers: HashMap<HostPid, Option<Tracker>>,
    waits: HashMap<HostPid, Option<Wait>>,
    shared: SharedObjects,
    gears: Gears,
    orphans: Orphans,
    background: Background,
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
            store,
            grounds: None,
            known: HashMap::new(),
            trackers: HashMap::new(),
            waits: HashMap::new(),
            shared,
            gears,
            orphans: Orphans::default(),
            background: Background::default(),
        })
    }

    /// Processes of the engine's own, for whoever lists those of the sandbox.
    pub fn orphans(&self) -> Orphans {
        self.orphans.clone()
    }

    /// Waits until what the last checkpoint or rollback left to be done is done, and nothing of it is left among the processes.
    pub fn settle(&mut self) {
        self.background.end();
        self.trackers
            .values_mut()
            .flatten()
            .for_each(Tracker::finish);
    }

    /// Stops all processes.
    fn hold(&mut self, env: &dyn Environment) -> Result<Held> {
        let grounds = open_once(&mut self.grounds, env)?;
        Held::tree(grounds, &self.known, FREEZE_TIMEOUT)
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
        trace(|| {
            let mut tries = 0;
            let (mut held, captured, mut watch) = loop {
                let mut watch = Stopwatch::start();
                let mut held = match self.hold(env) {
                    // A process on its way out has threads left when its first one has ended.
                    Err(Error::Unsupported { .. }) if tries + 1 < TRIES => {
                        tries += 1;
                        std::thread::sleep(FIRST_PAUSE * (1 << (tries - 1)));
                        continue;
                    }
                    held => held?,
                };
                watch.lap("stop");
                let captured = self.capture(env, &mut held, &mut watch);
                held.remember(&mut self.known);
                // What was captured of the shared memory is good for this checkpoint only.
                let shared = self.shared.take();
                tries += 1;
                match captured {
                    Ok(mut captured) => {
                        captured.image.shared = Arc::new(shared);
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
            let Captured { image, pages, work } = captured;
            let cut = cut(held.deaths)?;
            watch.lap("files");
            held.release()?;
            watch.lap("resume");
            let stop = held.since.elapsed();
            self.background.begin(work)?;
            Ok(Checkpoint {
                image,
                cut,
                stop,
                phases: watch.phases,
                pages,
            })
        })
    }

    fn capture(
        &mut self,
        env: &dyn Environment,
        held: &mut Held,
        watch: &mut Stopwatch,
    ) -> Result<Captured> {
        self.forget_the_dead(held);
        self.end_lazy(held)?;
        // While the processes answer, their descriptors are looked at.
        let interviews = interview_all(held, |_| true)?;
        let descriptors = fd::capture(&remotes(held), env, &self.shared)?;
        watch.lap("descriptors");
        let mut mapped = self.mappings(env, held, |_| true)?;
        watch.lap("mappings");
        let mut described = BTreeMap::new();
        // Without a process there is nobody to ask.
        let mut has_system_v = interviews.is_empty();
        for (pid, interview) in interviews {
            let process = member(&mut held.processes, pid)?;
            let answers = interview.end(&mut process.stopped.remote)?;
            has_system_v |= answers.system_v;
            let state = describe(env, &held.procfs, process, answers, &mut self.waits)?;
            described.insert(pid, state);
        }
        let system_v = match has_system_v {
            true => sysv::capture(env)?,
            false => SystemV::default(),
        };
        watch.lap("processes");
        let memory = Memory {
            store: &self.store,
            shared: &self.shared,
            env,
            orphans: &self.orphans,
            gears: self.gears,
        };
        let mut pages = 0;
        let mut left = Vec::new();
        let mut processes: BTreeMap<InnerPid, Arc<ProcessImage>> = BTreeMap::new();
        for (pid, (mut state, layout)) in described {
            let process = member(&mut held.processes, pid)?;
            let remote = &mut process.stopped.remote;
            let tracker = self.trackers.entry(remote.host()).or_default();
            let vmas = mapped.remove(&pid).unwrap_or_default();
            let scan = memory.scan_mapped(remote, tracker.as_ref(), vmas, layout)?;
            pages += scan.changed_pages();
            // A new process is like its parent, of which it is a fork.
            let parent = processes
                .get(&state.stat.parent)
                .filter(|_| tracker.is_none());
            let like = parent.map(|p| p.memory.clone());
            let (captured, work) = memory.capture(remote, tracker, scan, like.as_deref())?;
            state.memory = captured;
            left.extend(work);
            processes.insert(pid, Arc::new(state));
        }
        watch.lap("memory");
        let image = TreeImage {
            processes,
            zombies: held.zombies.clone(),
            descriptors: Arc::new(descriptors),
            shared: Arc::default(),
            system_v,
        };
        Ok(Captured {
            image,
            pages,
            work: left,
        })
    }

    /// What the processes have mapped.
    fn mappings(
        &self,
        env: &dyn Environment,
        held: &Held,
        wanted: impl Fn(&InnerPid) -> bool,
    ) -> Result<BTreeMap<InnerPid, Vec<Vma>>> {
        let memory = self.memory(env);
        let processes = held.processes.iter().filter(|(pid, _)| wanted(pid));
        processes
            .map(|(pid, process)| {
                let remote = &process.stopped.remote;
                let tracker = self.trackers.get(&remote.host());
                let tracker = tracker.and_then(Option::as_ref);
                Ok((*pid, memory.mappings(remote, tracker)?))
            })
            .collect()
    }

    fn memory<'a>(&'a self, env: &'a dyn Environment) -> Memory<'a> {
        Memory {
            store: &self.store,
            shared: &self.shared,
            env,
            orphans: &self.orphans,
            gears: self.gears,
        }
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

    fn make_all(
        &mut self,
        env: &dyn Environment,
        target: &TreeImage,
        watch: &mut Stopwatch,
    ) -> Result<Done> {
        end::all(open_once(&mut self.grounds, env)?)?;
        self.known.clear();
        self.trackers.clear();
        self.waits.clear();
        watch.lap("kill");
        self.make_in_empty(env, target, watch)
    }

    fn make_in_empty(
        &mut self,
        env: &dyn Environment,
        target: &TreeImage,
        watch: &mut Stopwatch,
    ) -> Result<Done> {
        let mut held = Held::empty(open_once(&mut self.grounds, env)?);
        let nothing = Survey::default();
        let made = self.undo(env, &mut held, nothing, target, watch);
        if made.is_err() {
            held.abandon();
            end::all(open_once(&mut self.grounds, env)?)?;
        }
        made
    }

    /// Looks at what there is, as far as it may stay. Changes nothing.
    fn survey(
        &mut self,
        env: &dyn Environment,
        held: &mut Held,
        target: &TreeImage,
    ) -> Result<Survey> {
        self.forget_the_dead(held);
        self.end_lazy(held)?;
        fd::check(&target.descriptors)?;
        let mut stuck = BTreeSet::new();
        let keep = reconcile::keepers(held, target, &stuck);
        let interviews = interview_all(held, |pid| keep.contains(pid))?;
        let descriptors = fd::survey(&remotes(held), env, &self.shared)?;
        let mut mapped = self.mappings(env, held, |pid| keep.contains(pid))?;
        let mut processes = BTreeMap::new();
        let memory = Memory {
            store: &self.store,
            shared: &self.shared,
            env,
            orphans: &self.orphans,
            gears: self.gears,
        };
        let mut system_v = false;
        for (pid, interview) in interviews {
            let process = member(&mut held.processes, pid)?;
            let remote = &mut process.stopped.remote;
            let answers = interview.end(remote)?;
            system_v |= answers.system_v;
            let attributes = answers.attributes;
            let image = &target.processes[&pid];
            let may_be_filtered = image.threads.iter().all(|wanted| {
                let mut threads = process.stopped.threads.iter();
                let thread = threads.find(|thread| thread.tid == wanted.tid);
                thread.is_none_or(|thread| wanted.is_within_filters(thread.host, env))
            });
            if !may_be_filtered || !attributes::reachable(&attributes, &image.attributes) {
                stuck.insert(pid);
                continue;
            }
            let tracker = self.trackers.entry(remote.host()).or_default();
            let layout = Layout {
                brk: answers.program_break,
                ..process.bounds
            };
            let vmas = mapped.remove(&pid).unwrap_or_default();
            let scan = memory.scan_mapped(remote, tracker.as_ref(), vmas, layout)?;
            let procfs = &held.procfs;
            let exe = image.exe.is_of(env, procfs, pid, "exe");
            let cwd = image.cwd.is_of(env, procfs, pid, "cwd");
            let root = Place::is_root_of(image.root.as_ref(), env, procfs, pid);
            let now = Now {
                attributes,
                threads: answers.threads,
                scan: Some(scan),
                same_program: exe.during(pid, "reading its program")?,
                same_directory: cwd.during(pid, "reading its directory")?,
                same_root: root.during(pid, "reading its root directory")?,
            };
            processes.insert(pid, now);
        }
        if !stuck.is_empty() {
            let keep = reconcile::keepers(held, target, &stuck);
            processes.retain(|pid, _| keep.contains(pid));
        }
        Ok(Survey {
            processes,
            descriptors,
            system_v,
        })
    }

    /// The work on one process of those that are held.
    fn reconcile<'a>(
        &'a mut self,
        env: &'a dyn Environment,
        held: &'a mut Held,
        pid: InnerPid,
        image: &'a Arc<ProcessImage>,
    ) -> Result<Reconcile<'a>> {
        let process = member(&mut held.processes, pid)?;
        let host = process.stopped.remote.host();
        Ok(Reconcile {
            env,
            memory: Memory {
                store: &self.store,
                shared: &self.shared,
                env,
                orphans: &self.orphans,
                gears: self.gears,
            },
            procfs: &held.procfs,
            process,
            tracker: self.trackers.entry(host).or_default(),
            image,
            waits: &mut self.waits,
        })
    }

    /// Makes what is held the same as `target`.
    fn undo(
        &mut self,
        env: &dyn Environment,
        held: &mut Held,
        survey: Survey,
        target: &TreeImage,
        watch: &mut Stopwatch,
    ) -> Result<Done> {
        let keep = survey.processes.keys().copied().collect();
        let killed = end::others(held, &keep, target)?;
        watch.lap("kill");
        let born = birth::deliver(env, held, target)?;
        watch.lap("births");
        let mut there_is = survey.system_v || !target.system_v.is_empty();
        if survey.processes.is_empty() && !there_is {
            there_is = match held.processes.values_mut().next() {
                Some(process) => sysv::are_there(&mut process.stopped.remote)?,
                None => true,
            };
        }
        if there_is {
            sysv::restore(env, &target.system_v)?;
        }
        let mut descriptors = survey.descriptors;
        // A process that is to start its program again loses all that it has open by that.
        descriptors.retain(|pid| {
            let now = survey.processes.get(&pid);
            now.is_some_and(|now| now.same_program)
        });
        self.shared
            .restore(&target.shared)
            .during_tree("restoring the shared memory")?;
        let mut before = survey.processes;
        let mut pages = 0;
        for (pid, image) in &target.processes {
            let mut work = self.reconcile(env, held, *pid, image)?;
            let template = env.template().filter(|_| born.copies.contains(pid));
            pages += work.memory(before.get_mut(pid), template)?;
            work.directory(before.get(pid))?;
        }
        watch.lap("memory");
        let terminals = Terminals::missing(held, target, &born.all)?;
        let notes = fd::restore(
            &descriptors,
            &target.descriptors,
            &mut remotes(held),
            env,
            &self.shared,
            &|procs| terminals.restore(env, procs),
        )?;
        watch.lap("descriptors");
        let mut attributes = BTreeMap::new();
        for (pid, image) in &target.processes {
            let mut work = self.reconcile(env, held, *pid, image)?;
            attributes.insert(*pid, work.state(before.remove(pid))?);
        }
        for (pid, image) in &target.processes {
            let process = member(&mut held.processes, *pid)?;
            let now = &attributes[pid];
            attributes::restore_credentials(&mut process.stopped.remote, now, &image.attributes)?;
            process.ignores_trap = image.attributes.ignores_trap();
            process.stop_with = image.user_stop.filter(|_| process.user_stop.is_none());
        }
        watch.lap("processes");
        // Stand-ins that were children of init may have died just now.
        let deaths = match born.all.is_empty() {
            true => held.deaths,
            false => Deaths::Pending,
        };
        let told = env.before_resume(deaths);
        told.during_tree("restoring the sessions")?;
        held.remember(&mut self.known);
        held.release()?;
        let running = Instant::now();
        watch.lap("resume");
        Ok(Done {
            running,
            pages,
            kept: keep.len(),
            rebuilt: born.all.len(),
            killed,
            notes,
            fallback: None,
        })
    }
}

/// What was captured of a tree that stands still, and what is left to be done when it runs again.
struct Captured {
    image: TreeImage,
    pages: u64,
    work: Vec<Work>,
}

/// What there is before a rollback, of the processes that may stay.
#[derive(Default)]
struct Survey {
    processes: BTreeMap<InnerPid, Now>,
    descriptors: Descriptors,
    /// Whether there are System V semaphores or message queues.
    system_v: bool,
}

impl Survey {
    /// What leads to these inodes is to be opened again.
    fn forget(&mut self, stale: &[u64], target: &TreeImage) {
        if stale.is_empty() {
            return;
        }
        self.descriptors.forget(stale);
        for (pid, now) in &mut self.processes {
            let image = &target.processes[pid];
            let stale = |place: &Place| place.is_among(stale);
            now.same_directory &= !stale(&image.cwd);
            now.same_root &= !image.root.as_ref().is_some_and(stale);
        }
    }
}

/// What a rollback did with the processes.
struct Done {
    running: Instant,
    pages: u64,
    kept: usize,
    rebuilt: usize,
    killed: usize,
    notes: Vec<String>,
    fallback: Option<String>,
}

impl Done {
    fn with<T>(self, switched: T, phases: Phases) -> Rollback<T> {
        let Self {
            running,
            pages,
            kept,
            rebuilt,
            killed,
            notes,
            fallback,
        } = self;
        Rollback {
            switched,
            running,
            phases,
            pages,
            kept,
            rebuilt,
            killed,
            fallback,
            notes,
        }
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
fn interview_all(
    held: &mut Held,
    wanted: impl Fn(&InnerPid) -> bool,
) -> Result<Vec<(InnerPid, Interview)>> {
    let processes = held.processes.iter_mut().filter(|(pid, _)| wanted(pid));
    processes
        .map(|(pid, process)| Ok((*pid, Interview::begin(&mut process.stopped)?)))
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
