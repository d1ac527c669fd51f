//! DeltaState: the transaction over files, processes and sessions.
//!
//! A checkpoint is one frozen layer of the files, one image of the processes and one of the sessions, taken
//! while all processes stand still; it is in the tree when all three are there, or not at all. A rollback gives all
//! three back in the same way.

mod persist;
mod surroundings;
mod tree;
mod warmer;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use deltacr::ids::InnerPid;
use deltacr::mem::Gears;
use deltacr::store::PageStore;
use deltacr::{Deaths, During, Engine, ProcessSummary, Rollback, Switched, TreeImage};
use deltafs::{ChangeKind, InUse, LeftBehind, Snapshot, Volume};
use parking_lot::Mutex;

use crate::compactor::Compactor;
use crate::dormant::unreadable;
use crate::durable::{Archive, Ids};
use crate::error::{Error, Result};
use crate::report::*;
use crate::sessions::Shared;
use crate::sessions_image::SessionsImage;
use crate::templates::{Family, Origin, Template, Templates};

pub(crate) use persist::TakenUp;
use surroundings::Surroundings;
use tree::{Checkpoints, Node};
use warmer::Warmer;

/// What one checkpoint holds. Cloning shares it.
#[derive(Clone)]
pub(crate) struct Content {
    files: Snapshot,
    processes: TreeImage,
    sessions: SessionsImage,
}

/// What the checkpoints of all sandboxes of a host share.
pub(crate) struct Common {
    /// Their memory pages.
    pub(crate) pages: Arc<PageStore>,
    pub(crate) templates: Templates,
    gears: Gears,
    warmer: Warmer,
    /// Those of them that are on disk.
    pub(crate) archive: Archive,
    pub(crate) ids: Ids,
    /// Who merges those on disk that build on deleted ones.
    pub(crate) compactor: Compactor,
}

impl Common {
    pub(crate) fn new(templates: Templates, gears: Gears, archive: Archive, ids: Ids) -> Self {
        let pages = PageStore::new();
        Self {
            warmer: Warmer::start(pages.clone()),
            pages,
            templates,
            gears,
            archive,
            ids,
            compactor: Compactor::default(),
        }
    }
}

/// The checkpoints of a sandbox, and the engine that makes them.
pub(crate) struct DeltaState {
    name: String,
    common: Arc<Common>,
    family: Family,
    engine: Engine,
    checkpoints: Checkpoints<Content>,
    /// Checkpoints on disk that cannot be used, and why.
    lost: BTreeMap<CheckpointId, Lost>,
    /// Checkpoints that were deleted while others on disk build on them.
    deleted: BTreeMap<CheckpointId, Deleted>,
    /// What is to be told with every rollback.
    notes: Vec<String>,
}

/// A checkpoint on disk that cannot be used.
pub(crate) struct Lost {
    pub(crate) why: String,
    /// The one that it builds on, if that much can be read.
    pub(crate) before: Option<CheckpointId>,
}

/// A checkpoint that was deleted, and is on disk for others that build on it.
struct Deleted {
    before: Option<CheckpointId>,
    bytes: u64,
    /// None of one that cannot be read.
    node: Option<Node<Content>>,
}

/// The sandbox that a state is taken from or given to.
#[derive(Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) volume: &'a Volume,
}

impl<'a> Subject<'a> {
    fn surroundings(
        self,
        restoring: Option<&'a SessionsImage>,
        template: Option<&'a Template>,
    ) -> Surroundings<'a> {
        Surroundings {
            shared: self.shared,
            volume: self.volume,
            restoring,
            template,
        }
    }

    fn cut(self, deaths: Deaths) -> deltacr::Result<(Snapshot, SessionsImage)> {
        let synced = self.volume.sync().map_err(io::Error::other);
        synced.during_tree("writing back the shared file mappings")?;
        self.shared
            .drain(deaths)
            .during_tree("reading the sessions' output")?;
        let sessions = self.shared.image().during_tree("capturing the sessions")?;
        Ok((self.volume.checkpoint(), sessions))
    }

    /// Gives files and sessions the state of `target`. Returns what it leaves behind, and [`Switched::stale`].
    fn switch(self, target: &Content, epoch: u64) -> deltacr::Result<(LeftBehind, Vec<u64>)> {
        // What else is open now will be closed or gone before anything runs again.
        let held = || InUse {
            files: target.processes.mapped_inodes(),
            others: target.processes.open_inodes(),
        };
        let files = &target.files;
        let done = self.volume.rollback_sparing(files, Volume::FEW, held);
        let done = done.map_err(io::Error::other);
        let stats = done.during_tree("switching the files")?;
        self.shared.begin_restore(&target.sessions, epoch);
        Ok((stats.left, stats.reborn))
    }
}

impl DeltaState {
    pub(crate) fn new(name: &str, common: Arc<Common>) -> Result<Self> {
        let engine = Engine::with_gears(common.pages.clone(), common.gears)?;
        Ok(Self {
            name: name.to_owned(),
            common,
            family: Family::new(),
            engine,
            checkpoints: Checkpoints::default(),
            lost: BTreeMap::new(),
            deleted: BTreeMap::new(),
            notes: Vec::new(),
        })
    }

    pub(crate) fn current(&self) -> Option<CheckpointId> {
        self.checkpoints.current()
    }

    pub(crate) fn len(&self) -> usize {
        self.checkpoints.len() + self.lost.len()
    }

    /// Bytes of memory pages that the checkpoints of the whole host hold.
    pub(crate) fn page_bytes(&self) -> u64 {
        self.common.pages.pages() * 4096
    }

    pub(crate) fn tree(&self) -> Tree {
        let mut tree = self.checkpoints.describe();
        for node in &mut tree.nodes {
            let content = self.checkpoints.get(node.id).map(|node| &node.content);
            if let Some(reason) = content.and_then(|content| content.processes.loss()) {
                node.state = CheckpointState::Failed { reason };
            }
        }
        let lost = self
            .lost
            .iter()
            .map(|(id, lost)| unreadable(*id, &lost.why));
        tree.nodes.extend(lost);
        tree.nodes.sort_by_key(|node| node.id);
        tree
    }

    /// The templates of its checkpoints are of no use any more.
    pub(crate) fn forget_templates(&self) {
        for node in self.checkpoints.describe().nodes {
            self.common.templates.remove(node.id);
        }
    }

    fn node(&self, id: CheckpointId) -> Result<&Node<Content>> {
        let sandbox = self.name.clone();
        if let Some(lost) = self.lost.get(&id) {
            let why = lost.why.clone();
            return Err(Error::Unusable { sandbox, id, why });
        }
        self.checkpoints
            .get(id)
            .ok_or(Error::NoCheckpoint { sandbox, id })
    }

    pub(crate) fn content(&self, id: CheckpointId) -> Result<Content> {
        self.node(id).map(|node| node.content.clone())
    }

    pub(crate) fn checkpoint(
        &mut self,
        subject: Subject<'_>,
        message: Option<String>,
    ) -> Result<CheckpointReport> {
        let begin = Instant::now();
        let env = subject.surroundings(None, None);
        let orphans = || self.engine.orphans();
        subject.shared.orphans.get_or_init(orphans);
        let made = self.engine.checkpoint(&env, |deaths| subject.cut(deaths))?;
        self.common.warmer.used(made.pages);
        let id = self.common.ids.next()?;
        let (files, sessions) = made.cut;
        let processes = made.image.len();
        let content = Content {
            files,
            processes: made.image,
            sessions,
        };
        self.checkpoints
            .add(id, Node::new(message, processes, content));
        Ok(CheckpointReport {
            id,
            stop: made.stop,
            total: begin.elapsed(),
            phases: made.phases.into(),
            pages: made.pages,
            processes,
        })
    }

    /// Rolls back. `alive` tells whether there are processes that can be undone in place.
    pub(crate) fn rollback(
        &mut self,
        subject: Subject<'_>,
        id: CheckpointId,
        alive: bool,
    ) -> std::result::Result<RollbackReport, Failure> {
        let begin = Instant::now();
        let target = self.content(id).map_err(Failure::Untouched)?;
        target.complete().map_err(Failure::Untouched)?;
        let epoch = subject.shared.epoch.load(Ordering::Acquire) + 1;
        let switched = AtomicBool::new(false);
        // Dropped when the processes run.
        let left = Mutex::new(None);
        let switch = || {
            switched.store(true, Ordering::Relaxed);
            let (behind, stale) = subject.switch(&target, epoch)?;
            *left.lock() = Some(behind);
            Ok(Switched { value: (), stale })
        };
        let template = self.template(id, &target, alive);
        let env = subject.surroundings(Some(&target.sessions), template.as_deref());
        let mut done = if alive {
            self.engine.rollback(&env, &target.processes, switch)
        } else {
            switch().and_then(|_| self.engine.rebuild(&env, &target.processes))
        };
        // What cannot be held as it is can be killed, and then made as it was.
        if let Err(e @ (deltacr::Error::Unsupported { .. } | deltacr::Error::NotFrozen { .. })) =
            &done
            && !switched.swap(true, Ordering::Relaxed)
        {
            let why = e.to_string();
            tracing::warn!(error = why, "the processes cannot be held; killing them");
            // Their deaths belong to the future that is given up.
            subject.shared.restoring.store(true, Ordering::Release);
            done = self
                .engine
                .kill_all(&env)
                .and_then(|()| switch())
                .and_then(|_| {
                    let done = self.engine.rebuild(&env, &target.processes)?;
                    Ok(Rollback {
                        fallback: Some(why),
                        ..done
                    })
                });
        }
        match done {
            Ok(done) => {
                self.checkpoints.move_to(id);
                let mut report = report(id, epoch, done.running - begin, done);
                report.notes.extend_from_slice(&self.notes);
                Ok(report)
            }
            Err(e) if switched.into_inner() => Err(Failure::Dead(e.into())),
            Err(e) => Err(Failure::Untouched(e.into())),
        }
    }

    /// The addresses of a process that the steps after a checkpoint wrote to, as far as there are checkpoints of them: of each of
    /// the newest `steps` at most so many pages.
    pub(crate) fn written_after(
        &self,
        id: CheckpointId,
        pid: InnerPid,
        (steps, pages): (usize, u64),
    ) -> Vec<Range<u64>> {
        let Some(now) = self.checkpoints.get(id) else {
            return Vec::new();
        };
        let image = &now.content.processes;
        let next = self.checkpoints.children(id).take(steps);
        let mut written: Vec<Range<u64>> = next
            .flat_map(|next| image.changes_to(&next.content.processes, pid, pages))
            .collect();
        written.sort_unstable_by_key(|range| range.start);
        written
    }

    /// What serves a rollback where processes have to be made again. Only if all of them have to, it pays to look further.
    fn template(&self, id: CheckpointId, target: &Content, alive: bool) -> Option<Arc<Template>> {
        let origin = target.origin(id, self.family);
        match alive {
            true => self.common.templates.of(id),
            false => self.common.templates.look_up(origin),
        }
    }

    /// Which sandboxes it shares memory with.
    pub(crate) fn family(&self) -> Family {
        self.family
    }

    /// Kills all processes.
    pub(crate) fn kill_all(&mut self, subject: Subject<'_>) -> Result<()> {
        Ok(self.engine.kill_all(&subject.surroundings(None, None))?)
    }

    /// Makes the processes of a new sandbox of a family, whose files show `content` already, those of `content`. `template` holds
    /// their memory or most of it, if there is one.
    /// Returns how long the parts of it took.
    pub(crate) fn populate(
        &mut self,
        subject: Subject<'_>,
        content: &Content,
        family: Family,
        template: Option<&Template>,
    ) -> Result<deltacr::Phases> {
        self.family = family;
        let env = subject.surroundings(Some(&content.sessions), template);
        let made = self.engine.build(&env, &content.processes)?;
        Ok(made.phases)
    }

    pub(crate) fn diff(&self, a: CheckpointId, b: CheckpointId) -> Result<Difference> {
        let (a, b) = (&self.node(a)?.content, &self.node(b)?.content);
        let mut files: Vec<FileChange> = deltafs::diff(&a.files, &b.files)
            .into_iter()
            .map(file_change)
            .collect();
        files.sort_by(|x, y| path(x).cmp(path(y)));
        Ok(Difference {
            files,
            came: only_in(&b.processes, &a.processes),
            went: only_in(&a.processes, &b.processes),
        })
    }
}

impl Content {
    /// Waits until all of it is there.
    pub(crate) fn complete(&self) -> Result<KeptPages> {
        let kept = self.processes.complete()?;
        Ok(KeptPages {
            stored: kept.stored,
            zero: kept.zero,
            same: kept.same,
            repeated: kept.repeated,
        })
    }

    /// The files, for a volume that is to show them.
    pub(crate) fn files(&self) -> &Snapshot {
        &self.files
    }

    /// The processes.
    pub(crate) fn processes(&self) -> &TreeImage {
        &self.processes
    }

    /// What is to be forked, given its number and the family of its sandbox.
    pub(crate) fn origin(&self, id: CheckpointId, family: Family) -> Origin<'_> {
        Origin {
            id,
            family,
            image: &self.processes,
            files: &self.files,
        }
    }

    /// The sessions, for a sandbox that is to have them.
    pub(crate) fn sessions(&self) -> &SessionsImage {
        &self.sessions
    }
}

/// How a rollback failed.
pub(crate) enum Failure {
    /// Nothing was changed.
    Untouched(Error),
    /// The sandbox has no processes any more.
    Dead(Error),
}

fn report(id: CheckpointId, epoch: u64, total: Duration, done: Rollback<()>) -> RollbackReport {
    RollbackReport {
        id,
        epoch,
        total,
        phases: done.phases.into(),
        pages: done.pages,
        kept: done.kept,
        rebuilt: done.rebuilt,
        killed: done.killed,
        fallback: done.fallback,
        notes: done.notes,
    }
}

fn file_change(change: deltafs::Change) -> FileChange {
    let path = change.path;
    match change.kind {
        ChangeKind::Added => FileChange::Added { path },
        ChangeKind::Modified => FileChange::Modified { path },
        ChangeKind::Deleted => FileChange::Deleted { path },
        ChangeKind::Renamed { from } => FileChange::Renamed { from, to: path },
    }
}

fn path(change: &FileChange) -> &std::path::Path {
    match change {
        FileChange::Added { path }
        | FileChange::Modified { path }
        | FileChange::Deleted { path }
        | FileChange::Renamed { to: path, .. } => path,
    }
}

fn only_in(these: &TreeImage, those: &TreeImage) -> Vec<ProcessName> {
    let identity = |p: &ProcessSummary| (p.pid, p.start);
    let there: BTreeSet<_> = those.processes().map(|p| identity(&p)).collect();
    let new = these.processes().filter(|p| !there.contains(&identity(p)));
    new.map(|p| ProcessName {
        pid: p.pid.0,
        command: p.command,
    })
    .collect()
}
