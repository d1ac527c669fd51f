//! Making a tree that stands still the same as an image.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use super::{Engine, Rollback, interview_all, member, open_once, remotes};
use crate::attributes;
use crate::birth::{self, terminal::Terminals};
use crate::end;
use crate::env::Environment;
use crate::error::{During, Result};
use crate::fd::{self, Descriptors, Prepared};
use crate::files::Place;
use crate::hold::{Deaths, Held};
use crate::ids::InnerPid;
use crate::image::{ProcessImage, TreeImage};
use crate::interview::Questionnaire;
use crate::keepers::{self, keepers};
use crate::mem::{Scan, Tracker, Vma};
use crate::programs::Programs;
use crate::reconcile::{Now, Reconcile};
use crate::stopwatch::{Phases, Stopwatch};
use crate::sysv::{self, Attached};
use crate::threads::ThreadImage;

/// What there is before a rollback, of the processes that may stay.
#[derive(Default)]
pub(super) struct Survey {
    processes: BTreeMap<InnerPid, Now>,
    descriptors: Descriptors,
    /// Whether there are System V semaphores, message queues or segments.
    system_v: bool,
}

impl Survey {
    /// What leads to these inodes is to be opened again.
    pub(super) fn forget(&mut self, stale: &[u64], target: &TreeImage) {
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

/// What can be seen of a process without its help.
struct Look {
    scan: Scan,
    same_program: bool,
}

/// Those that could stay, but are to have children again that they cannot have: whoever gives up a right, or is put under a filter,
/// may have children from before who are not.
fn unfit_parents(
    env: &dyn Environment,
    held: &Held,
    target: &TreeImage,
    now: &BTreeMap<InnerPid, Now>,
) -> BTreeSet<InnerPid> {
    let unborn = target
        .processes
        .iter()
        .filter(|(pid, _)| !now.contains_key(pid));
    let families = unborn.filter_map(|(_, child)| {
        let parent = child.stat.parent;
        Some((
            parent,
            now.get(&parent)?,
            held.processes.get(&parent)?,
            child,
        ))
    });
    let unfit = families.filter(|(_, parent, process, child)| {
        let host = process.stopped.remote.host();
        let is_filtered = |thread: &ThreadImage| !thread.is_within_filters(host, env);
        !attributes::can_bear(&parent.attributes, &child.attributes)
            || child.threads.iter().any(is_filtered)
    });
    unfit.map(|(parent, ..)| parent).collect()
}

/// Whether somebody is to be born, for good or for a moment.
fn are_births_due(held: &Held, target: &TreeImage) -> bool {
    let stays = |(pid, image): (&InnerPid, &Arc<ProcessImage>)| {
        let process = held.processes.get(pid);
        process.is_some_and(|process| process.stat.group == image.stat.group)
    };
    let mut dead = target.zombies.keys();
    !target.processes.iter().all(stays) || dead.any(|pid| !held.zombies.contains_key(pid))
}

/// There is no limit of processes for as long as this lives.
struct Unlimited<'a>(&'a dyn Environment);

impl<'a> Unlimited<'a> {
    fn begin(env: &'a dyn Environment) -> Result<Self> {
        let lifted = env.limit_processes(false);
        lifted.during_tree("suspending the limit of processes")?;
        Ok(Self(env))
    }
}

impl Drop for Unlimited<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.limit_processes(true) {
            tracing::error!(%error, "the limit of processes is not enforced any more");
        }
    }
}

/// What a rollback did with the processes.
pub(super) struct Done {
    running: Instant,
    pages: u64,
    kept: usize,
    rebuilt: usize,
    killed: usize,
    notes: Vec<String>,
    pub(super) fallback: Option<String>,
}

impl Done {
    pub(super) fn with<T>(self, switched: T, phases: Phases) -> Rollback<T> {
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

impl Engine {
    pub(super) fn make_all(
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

    pub(super) fn make_in_empty(
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
    pub(super) fn survey(
        &mut self,
        env: &dyn Environment,
        held: &mut Held,
        target: &TreeImage,
    ) -> Result<Survey> {
        self.forget_the_dead(held);
        self.end_lazy(held)?;
        fd::check(&target.descriptors)?;
        let mapped = |key| target.is_mapped_for_writing(key);
        let parted = self.means.shared.part_with_sealed(&target.shared, mapped);
        parted.during_tree("reading the seals of the shared memory")?;
        let mut stuck = BTreeSet::new();
        let keep = keepers(held, target, &stuck);
        let questionnaire = Questionnaire::of(env.bounding_set());
        let interviews = interview_all(held, &questionnaire, |pid| keep.contains(pid))?;
        held.find_dead()?;
        let descriptors = fd::survey(&remotes(held), env, &self.means.shared)?;
        let mut answering = Vec::new();
        for (pid, interview) in interviews {
            let look = self.look(env, held, pid, target);
            answering.push((pid, interview, look));
        }
        let mut processes = BTreeMap::new();
        let mut system_v = false;
        for (pid, interview, look) in answering {
            let process = member(&mut held.processes, pid)?;
            let answers = interview.end(&mut process.stopped.remote)?;
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
            let mut look = look?;
            look.scan.layout.brk = answers.program_break;
            let place = answers.whereabouts;
            let directory = place.is_directory(&image.cwd, env, &held.procfs, pid);
            let root = place.is_root(image.root.as_ref(), env, &held.procfs, pid);
            let now = Now {
                attributes,
                threads: answers.threads,
                scan: Some(look.scan),
                same_program: look.same_program,
                same_directory: directory.during(pid, "reading its directory")?,
                same_root: root.during(pid, "reading its root directory")?,
            };
            processes.insert(pid, now);
        }
        loop {
            let keep = keepers(held, target, &stuck);
            processes.retain(|pid, _| keep.contains(pid));
            let before = stuck.len();
            stuck.extend(keepers::in_the_way(held, target, &keep));
            stuck.extend(unfit_parents(env, held, target, &processes));
            if stuck.len() == before {
                break;
            }
        }
        let kept: BTreeSet<InnerPid> = processes.keys().copied().collect();
        for (pid, now) in &mut processes {
            let stays = |place: &Place| place.stays(|pid| kept.contains(&pid));
            let image = &target.processes[pid];
            now.same_directory &= stays(&image.cwd);
            now.same_root &= image.root.as_ref().is_none_or(stays);
        }
        Ok(Survey {
            processes,
            descriptors,
            system_v,
        })
    }

    /// Looks at a process of the image while it answers questions. Its program break is not known yet.
    fn look(
        &mut self,
        env: &dyn Environment,
        held: &Held,
        pid: InnerPid,
        target: &TreeImage,
    ) -> Result<Look> {
        let scan = self.scan(env, held, pid)?;
        let (procfs, image) = (&held.procfs, &target.processes[&pid]);
        let files = held.processes[&pid].stopped.remote.files();
        let exe = image.exe.is_program_of(env, procfs, pid, files);
        Ok(Look {
            scan,
            same_program: exe.during(pid, "reading its program")?,
        })
    }

    /// System V semaphores, message queues and segments of shared memory, which the processes can attach then.
    fn system_v(
        &mut self,
        env: &dyn Environment,
        held: &mut Held,
        before: &mut BTreeMap<InnerPid, Now>,
        target: &TreeImage,
    ) -> Result<()> {
        let mut attached = Attached::default();
        for (pid, now) in before.iter() {
            let host = member(&mut held.processes, *pid)?.stopped.remote.host();
            attached.note(host, now.mapped());
        }
        if !attached.is_empty() {
            let doomed = sysv::doomed(env, &target.system_v)?;
            for (pid, now) in before.iter_mut() {
                let remote = &mut member(&mut held.processes, *pid)?.stopped.remote;
                now.detach(remote, &doomed)?;
            }
            attached.forget(&doomed);
        }
        let missing = target.processes.iter().flat_map(|(pid, image)| {
            let now = before.get(pid).map_or(&[][..], Now::mapped);
            let segments = image
                .memory
                .vmas
                .iter()
                .filter(|vma| vma.segment().is_some());
            let wanted = segments.filter(|vma| !now.contains(vma));
            wanted.filter_map(Vma::segment)
        });
        let to_attach = missing.collect();
        let shared = &self.means.shared;
        sysv::restore(env, &target.system_v, (shared, &attached), &to_attach)
    }

    /// The work on one process of those that are held.
    fn reconcile<'a>(
        &'a mut self,
        programs: Programs<'a>,
        held: &'a mut Held,
        pid: InnerPid,
        image: &'a Arc<ProcessImage>,
    ) -> Result<Reconcile<'a>> {
        let env = programs.env;
        let process = member(&mut held.processes, pid)?;
        let host = process.stopped.remote.host();
        Ok(Reconcile {
            env,
            memory: self.means.memory(env),
            procfs: &held.procfs,
            process,
            tracker: self.trackers.entry(host).or_default(),
            image,
            programs,
            waits: &mut self.waits,
        })
    }

    /// Makes what is held the same as `target`.
    pub(super) fn undo(
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
        let mut before = survey.processes;
        let programs = Programs {
            env,
            shared: &target.shared,
        };
        let room = Arc::clone(&open_once(&mut self.grounds, env)?.room);
        for (pid, now) in &mut before {
            let image = &target.processes[pid];
            let mut work = self.reconcile(programs, held, *pid, image)?;
            work.end_extra_threads()?;
            work.make_room(&room, now)?;
        }
        let unlimited = are_births_due(held, target).then(|| Unlimited::begin(env));
        let unlimited = unlimited.transpose()?;
        let born = birth::deliver(env, held, target)?;
        for pid in &born.all {
            let image = &target.processes[pid];
            let work = self.reconcile(programs, held, *pid, image)?;
            work.make_room_for_new(&room)?;
        }
        watch.lap("births");
        let mut there_is = survey.system_v || !target.system_v.is_empty();
        if before.is_empty() && !there_is {
            there_is = match held.processes.values_mut().next() {
                Some(process) => sysv::are_there(&mut process.stopped.remote)?,
                None => true,
            };
        }
        if there_is {
            self.system_v(env, held, &mut before, target)?;
        }
        let mut descriptors = survey.descriptors;
        // A process that is to start its program again loses all that it has open by that.
        descriptors.retain(|pid| {
            let now = before.get(&pid);
            now.is_some_and(|now| now.same_program)
        });
        let owners = self.means.shared.owners(env)?;
        if before.is_empty() {
            self.means.shared.part_with_all();
        }
        self.means
            .shared
            .restore(&target.shared.outside(owners))
            .during_tree("restoring the shared memory")?;
        let mut pages = 0;
        let mut prepared = Prepared {
            masters: born.masters,
            ..Prepared::default()
        };
        let told_of = target.told_of();
        for (pid, image) in &target.processes {
            let mut work = self.reconcile(programs, held, *pid, image)?;
            let template = env.template().filter(|_| born.copies.contains(pid));
            pages += work.memory(before.get_mut(pid), template)?;
            work.threads_told_of(&told_of)?;
        }
        let sealed = self.means.shared.seal(&target.shared);
        sealed.during_tree("sealing the shared memory")?;
        for (pid, image) in &target.processes {
            let mut work = self.reconcile(programs, held, *pid, image)?;
            work.directory(before.get(pid), &mut prepared.removed)?;
        }
        self.means.shared.let_go_of_segments();
        sysv::finish(env, &target.system_v)?;
        watch.lap("memory");
        let terminals = Terminals::missing(held, target, &born.all)?;
        let notes = fd::restore(
            &descriptors,
            &target.descriptors,
            &mut remotes(held),
            env,
            (&self.means.shared, &mut prepared),
            &|procs| terminals.restore(env, procs),
        )?;
        watch.lap("descriptors");
        let mut attributes = BTreeMap::new();
        for (pid, image) in &target.processes {
            let mut work = self.reconcile(programs, held, *pid, image)?;
            attributes.insert(*pid, work.state(before.remove(pid))?);
        }
        for (pid, image) in &target.processes {
            let process = member(&mut held.processes, *pid)?;
            let now = &attributes[pid];
            attributes::restore_credentials(&mut process.stopped, now, &image.attributes)?;
            attributes::restore_limits(&process.stopped.remote, now, &image.attributes)?;
            process.ignores_trap = image.attributes.ignores_trap();
            process.stop_with = image.user_stop.filter(|_| process.user_stop.is_none());
        }
        watch.lap("processes");
        drop(unlimited);
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
        self.trackers
            .values_mut()
            .flatten()
            .for_each(Tracker::run_on);
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
