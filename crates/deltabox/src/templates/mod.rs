//! Templates: processes of ours, outside every sandbox, that hold the memory of a checkpoint's processes, so that forks
//! share it instead of each writing it anew.
//!
//! Only ever a matter of time: whoever finds no template, or one that has died, makes the processes from the stored pages.
//!
//! A template need not be of the checkpoint that is forked: what differs is changed in the fork, or once for all forks, in a copy
//! of the template. Only templates of one *family* are looked at, which are sandboxes that were forked of each other.

mod files;
mod make;
mod pool;
mod process;

use std::fs;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use deltacr::TreeImage;
use deltacr::ids::InnerPid;
use deltacr::mem::Holding;
use deltafs::Snapshot;
use parking_lot::Mutex;

use crate::cgroup;
use crate::container::Container;
use crate::error::{Doing, Result};
use crate::report::{CheckpointId, TemplatesInfo};

pub(crate) use pool::Limits;
use pool::{Part, Pool};
use process::Process;

/// Sandboxes that were forked of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Family(u64);

impl Family {
    /// One that has no member yet.
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A checkpoint that is to be forked.
#[derive(Clone, Copy)]
pub(crate) struct Origin<'a> {
    pub(crate) id: CheckpointId,
    pub(crate) family: Family,
    pub(crate) image: &'a TreeImage,
    pub(crate) files: &'a Snapshot,
}

/// The most ranges that one message to a template tells.
const MOST_RANGES: usize = 8192;

/// A process that holds the memory of a checkpoint.
pub(crate) struct Template {
    /// No other has it.
    number: u64,
    holding: Holding,
    process: Process,
    family: Family,
    /// The memory that it has, from its oldest ancestor's to its own.
    parts: Vec<Part>,
    made: Instant,
    /// Counts for all templates.
    births: Arc<AtomicU64>,
}

impl Template {
    /// Where the memory is held.
    pub(crate) fn holding(&self) -> &Holding {
        &self.holding
    }

    /// Makes it give birth to a process in a sandbox, if that has not happened before.
    pub(crate) fn fork(&self, container: &Container, pid: i32, spare: i32) -> io::Result<i32> {
        match container.early().take(pid, self.number) {
            Some(host) => Ok(host),
            None => self.bear(container, [pid, spare], Vec::new()),
        }
    }

    /// Makes it give birth to the processes that a fork of a checkpoint will need, in a sandbox that has none yet. `touch` tells which
    /// addresses of a process are likely to be written to. Returns how many there are, and how many pages are theirs alone.
    pub(crate) fn fork_early(
        &self,
        container: &Container,
        image: &TreeImage,
        touch: impl Fn(InnerPid) -> Vec<Range<u64>>,
    ) -> io::Result<(u64, u64)> {
        let spare = image.free_number(std::iter::empty()).0;
        let (mut births, mut pages) = (0, 0);
        for pid in image.firstborn(&self.holding) {
            let touch = touch(pid);
            let touch = touch.iter().flat_map(|r| self.holding.held_of(pid, r));
            let touch: Vec<_> = touch.take(MOST_RANGES).collect();
            let bytes: u64 = touch.iter().map(|r| r.end - r.start).sum();
            let host = self.bear(container, [pid.0, spare], touch)?;
            container.early().add(pid.0, host, self.number)?;
            births += 1;
            pages += bytes / 4096;
        }
        Ok((births, pages))
    }

    /// Ends what was born early in a sandbox, but for what a fork of `image` will take up of this template. Returns how many are left,
    /// and how many were ended.
    pub(crate) fn select(
        &self,
        container: &Container,
        image: &TreeImage,
    ) -> io::Result<(usize, usize)> {
        let firstborn = image.firstborn(&self.holding);
        let wanted = |pid, template| template == self.number && firstborn.contains(&InnerPid(pid));
        container.early().select(container, wanted)
    }

    fn bear(
        &self,
        container: &Container,
        numbers: [i32; 2],
        touch: Vec<Range<u64>>,
    ) -> io::Result<i32> {
        let born = self.process.fork(container, numbers, touch);
        self.births
            .fetch_add(u64::from(born.is_ok()), Ordering::Relaxed);
        born
    }
}

/// A template, and how many pages of what is wanted it does not hold.
struct Near {
    id: CheckpointId,
    template: Arc<Template>,
    missing: u64,
}

/// The templates of a host.
pub(crate) struct Templates {
    /// The control group that they are in.
    group: PathBuf,
    births: Arc<AtomicU64>,
    /// Whether files can be mapped from the base, as far as is known.
    from_base: AtomicBool,
    state: Mutex<State>,
}

struct State {
    pool: Pool<Arc<Template>>,
    info: TemplatesInfo,
}

impl Templates {
    /// None as yet. They will be in the control group `group`, which is made with the first.
    pub(crate) fn new(group: PathBuf, limits: Limits) -> Self {
        let info = TemplatesInfo {
            limit: limits.number,
            limit_bytes: limits.bytes,
            ..TemplatesInfo::default()
        };
        Self {
            group,
            births: Arc::default(),
            from_base: AtomicBool::new(true),
            state: Mutex::new(State {
                pool: Pool::new(limits),
                info,
            }),
        }
    }

    /// What `forks` forks of a checkpoint are best made of: its template, or else a relative's.
    pub(crate) fn get(&self, origin: Origin<'_>, forks: usize) -> Option<Arc<Template>> {
        if let Some(found) = self.use_of(origin.id, forks) {
            self.state.lock().info.hits += forks as u64;
            return Some(found);
        }
        self.state.lock().info.misses += forks as u64;
        let made = (forks > 1).then(|| self.make(origin)).flatten();
        made.or_else(|| self.relative(origin, forks))
    }

    /// The template of a checkpoint, or else a relative's, for something else than a fork.
    pub(crate) fn look_up(&self, origin: Origin<'_>) -> Option<Arc<Template>> {
        let found = self.use_of(origin.id, 1);
        found.or_else(|| self.relative(origin, 1))
    }

    /// The template of a checkpoint, if there is one, for something else than a fork.
    pub(crate) fn of(&self, id: CheckpointId) -> Option<Arc<Template>> {
        self.use_of(id, 1)
    }

    fn use_of(&self, id: CheckpointId, uses: usize) -> Option<Arc<Template>> {
        let mut state = self.state.lock();
        let found = state.pool.get(id, uses as u64).cloned();
        found.filter(|t| t.process.is_alive())
    }

    /// Uses a template that holds most of what a checkpoint needs.
    fn relative(&self, origin: Origin<'_>, uses: usize) -> Option<Arc<Template>> {
        let near = self.nearest(origin)?;
        let mut state = self.state.lock();
        state.info.relatives += uses as u64;
        state.pool.get(near.id, uses as u64);
        Some(near.template)
    }

    /// The template of the family that holds most of what a checkpoint needs, if it holds at least half.
    fn nearest(&self, origin: Origin<'_>) -> Option<Near> {
        let state = self.state.lock();
        let family = state.pool.iter().filter(|(_, t)| t.family == origin.family);
        let family: Vec<_> = family.map(|(id, t)| (id, Arc::clone(t))).collect();
        drop(state);
        let near = family.into_iter().filter(|(_, t)| t.process.is_alive());
        let near = near.filter_map(|(id, template)| {
            let missing = template.holding.missing(origin.image).ok()?;
            Some(Near {
                id,
                template,
                missing,
            })
        });
        let nearest = near.min_by_key(|near| near.missing)?;
        let pages = origin.image.pages().ok()?;
        (2 * nearest.missing < pages).then_some(nearest)
    }

    /// Whether there is a template of a checkpoint.
    pub(crate) fn has(&self, id: CheckpointId) -> bool {
        self.peek(id).is_some()
    }

    /// The template of a checkpoint, if there is one, not to be used but looked at.
    pub(crate) fn peek(&self, id: CheckpointId) -> Option<Arc<Template>> {
        let found = self.state.lock().pool.peek(id).cloned();
        found.filter(|t| t.process.is_alive())
    }

    /// Makes a template of a checkpoint, if there is room for it.
    pub(crate) fn make(&self, origin: Origin<'_>) -> Option<Arc<Template>> {
        let begun = Instant::now();
        let made = self.try_make(origin).unwrap_or_else(|e| {
            // Whoever wanted to use it does without.
            tracing::debug!("making a template of {}: {e}", origin.id);
            None
        })?;
        let derived = made.parts.len() > 1;
        let parts = made.parts.clone();
        let made = Arc::new(made);
        let mut state = self.state.lock();
        let gone = state
            .pool
            .put(origin.id, Arc::clone(&made), parts, begun.elapsed());
        state.info.made += 1;
        state.info.derived += u64::from(derived);
        state.info.evicted += gone.len() as u64;
        drop(state);
        drop(gone);
        Some(made)
    }

    fn open_group(&self) -> Result<std::os::fd::OwnedFd> {
        let doing = || format!("making the control group {}", self.group.display());
        fs::create_dir_all(&self.group).doing(doing())?;
        let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        rustix::fs::open(&self.group, flags, rustix::fs::Mode::empty()).doing(doing())
    }

    /// The checkpoint is gone.
    pub(crate) fn remove(&self, id: CheckpointId) {
        let mut state = self.state.lock();
        state.pool.pin(id, false);
        state.pool.expect(id, 0);
        let gone = state.pool.remove(id);
        drop(state);
        drop(gone);
    }

    /// Keeps the template of a checkpoint whatever comes, when there is one, or no longer.
    pub(crate) fn pin(&self, id: CheckpointId, pinned: bool) {
        self.state.lock().pool.pin(id, pinned);
    }

    /// So many forks of a checkpoint are likely to be asked for next: its template is worth as much as if they had been.
    pub(crate) fn expect(&self, id: CheckpointId, forks: usize) {
        self.state.lock().pool.expect(id, forks as u64);
    }

    /// Gives up the one that is worth least, for want of memory. Returns whether there was one.
    pub(crate) fn shrink(&self) -> bool {
        let mut state = self.state.lock();
        let gone = state.pool.evict();
        state.info.evicted += u64::from(gone.is_some());
        drop(state);
        gone.is_some()
    }

    /// How they are doing.
    pub(crate) fn info(&self) -> TemplatesInfo {
        let state = self.state.lock();
        let ages = state.pool.iter().map(|(_, t)| t.made.elapsed());
        let oldest = ages.max().unwrap_or(Duration::ZERO);
        TemplatesInfo {
            number: state.pool.len(),
            bytes: state.pool.bytes(),
            pinned: state.pool.pinned(),
            oldest: oldest.as_secs_f64(),
            births: self.births.load(Ordering::Relaxed),
            ..state.info
        }
    }

    /// The processes that hold memory.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let state = self.state.lock();
        state.pool.iter().map(|(_, t)| t.process.host()).collect()
    }

    /// Ends all.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.pool.limits.number = 0;
        let all = state.pool.drain();
        drop(state);
        drop(all);
        let removed = cgroup::kill_all(&self.group).and_then(|()| {
            cgroup::remove_tree(&self.group).doing(format!(
                "removing the control group {}",
                self.group.display()
            ))
        });
        if let Err(e) = removed {
            tracing::warn!("{e}");
        }
    }
}
