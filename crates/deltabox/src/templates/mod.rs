//! Templates: processes of ours, outside every sandbox, that hold the memory of a checkpoint's processes, so that forks
//! share it instead of each writing it anew.
//!
//! Only ever a matter of time: whoever finds no template, or one that has died, makes the processes from the stored pages.

mod pool;
mod process;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use deltacr::TreeImage;
use deltacr::ids::HostPid;
use deltacr::mem::Holding;
use parking_lot::Mutex;

use crate::cgroup;
use crate::container::Container;
use crate::error::{Doing, Result};
use crate::memory;
use crate::report::{CheckpointId, TemplatesInfo};

pub(crate) use pool::Limits;
use pool::Pool;
use process::Process;

/// How often a process is tried whose own mappings are in the way.
const TRIES: usize = 4;

/// A process that holds the memory of a checkpoint.
pub(crate) struct Template {
    holding: Holding,
    process: Process,
    made: Instant,
    /// Counts for all templates.
    births: Arc<AtomicU64>,
}

impl Template {
    /// Where the memory is held.
    pub(crate) fn holding(&self) -> &Holding {
        &self.holding
    }

    /// Makes it give birth to a process in a sandbox.
    pub(crate) fn fork(&self, container: &Container, pid: i32, spare: i32) -> io::Result<i32> {
        let born = self.process.fork(container, pid, spare);
        self.births
            .fetch_add(u64::from(born.is_ok()), Ordering::Relaxed);
        born
    }
}

/// The templates of a host.
pub(crate) struct Templates {
    /// The control group that they are in.
    group: PathBuf,
    births: Arc<AtomicU64>,
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
            state: Mutex::new(State {
                pool: Pool::new(limits),
                info,
            }),
        }
    }

    /// The template of a checkpoint, if there is one, for `forks` forks.
    pub(crate) fn get(&self, id: CheckpointId, forks: usize) -> Option<Arc<Template>> {
        let mut state = self.state.lock();
        let found = state.pool.get(id).cloned();
        let found = found.filter(|t| t.process.is_alive());
        match found {
            Some(_) => state.info.hits += forks as u64,
            None => state.info.misses += forks as u64,
        }
        found
    }

    /// The template of a checkpoint, if there is one, for something else than a fork.
    pub(crate) fn look_up(&self, id: CheckpointId) -> Option<Arc<Template>> {
        let mut state = self.state.lock();
        let found = state.pool.get(id).cloned();
        found.filter(|t| t.process.is_alive())
    }

    /// Whether there is a template of a checkpoint.
    pub(crate) fn has(&self, id: CheckpointId) -> bool {
        let state = self.state.lock();
        state.pool.peek(id).is_some_and(|t| t.process.is_alive())
    }

    /// Makes a template of a checkpoint, if there is room for it.
    pub(crate) fn make(&self, id: CheckpointId, image: &TreeImage) -> Option<Arc<Template>> {
        let begun = Instant::now();
        let made = self.try_make(image).unwrap_or_else(|e| {
            // Whoever wanted to use it does without.
            tracing::debug!("making a template of {id}: {e}");
            None
        })?;
        let made = Arc::new(made);
        let bytes = made.holding.bytes();
        let mut state = self.state.lock();
        let gone = state
            .pool
            .put(id, Arc::clone(&made), bytes, begun.elapsed());
        state.info.made += 1;
        state.info.evicted += gone.len() as u64;
        drop(state);
        drop(gone);
        Some(made)
    }

    fn try_make(&self, image: &TreeImage) -> Result<Option<Template>> {
        let doing = || "making a template".to_owned();
        for _ in 0..TRIES {
            if self.state.lock().pool.limits.number == 0 {
                return Ok(None);
            }
            let group = self.open_group()?;
            let process = Process::start(&group)?;
            let host = HostPid(process.host());
            let Some(holding) = Holding::arrange(image, host)? else {
                continue;
            };
            let bytes = holding.bytes();
            if !self.state.lock().pool.could_hold(bytes) || memory::is_scarce(bytes) {
                return Ok(None);
            }
            process.hold(holding.ranges()).doing(doing())?;
            let large = holding.large();
            holding.touch(host, &large).doing(doing())?;
            process.collapse(large).doing(doing())?;
            holding.fill(host).doing(doing())?;
            return Ok(Some(Template {
                holding,
                process,
                made: Instant::now(),
                births: Arc::clone(&self.births),
            }));
        }
        Ok(None)
    }

    fn open_group(&self) -> Result<std::os::fd::OwnedFd> {
        let doing = || format!("making the control group {}", self.group.display());
        fs::create_dir_all(&self.group).doing(doing())?;
        let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        rustix::fs::open(&self.group, flags, rustix::fs::Mode::empty()).doing(doing())
    }

    /// The checkpoint is gone, or its template has failed.
    pub(crate) fn remove(&self, id: CheckpointId) {
        let gone = self.state.lock().pool.remove(id);
        drop(gone);
    }

    /// Keeps the template of a checkpoint whatever comes, or no longer. Returns whether there is one.
    pub(crate) fn pin(&self, id: CheckpointId, pinned: bool) -> bool {
        self.state.lock().pool.pin(id, pinned)
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
        let ages = state.pool.iter().map(|t| t.made.elapsed());
        let oldest = ages.max().unwrap_or(Duration::ZERO);
        TemplatesInfo {
            number: state.pool.len(),
            bytes: state.pool.bytes(),
            oldest: oldest.as_secs_f64(),
            births: self.births.load(Ordering::Relaxed),
            ..state.info
        }
    }

    /// The processes that hold memory.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let state = self.state.lock();
        state.pool.iter().map(|t| t.process.host()).collect()
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
