//! Blank sandboxes that are kept ready for forks: namespaces, control groups, mounts and init are there before anybody asks.
//!
//! A thread makes them while nothing else is going on, as many as the last fork of the same source took, and not
//! more than a limit for all. A fork that finds none ready makes its own: it only takes longer.
//!
//! Where forks of one checkpoint are likely, and there is a template of it, their processes are born in there as well, with the pages that
//! they are likely to write to.

use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::error::{Doing, Result};
use crate::ground::{Blank, Ground};
use crate::memory;
use crate::report::{CheckpointId, WarmInfo};
use crate::sandbox::Sandbox;
use crate::state::Content;
use crate::templates::Template;

/// Sources that blanks are kept for at a time.
const SOURCES: usize = 8;

/// What a blank takes, roughly, in bytes.
const BLANK: u64 = 4 << 20;

/// How soon to look again whether there is memory.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Owns the blanks, and the thread that makes them.
pub(crate) struct Warm {
    pool: Arc<Pool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What is done in advance for forks that are likely.
#[derive(Clone, Copy)]
pub(crate) struct Early {
    /// Whether their processes are born.
    pub(crate) births: bool,
    /// How many pages of each step are made their own.
    pub(crate) pages: u64,
    /// Under how much pressure, in percent, all of that is left for later.
    pub(crate) pressure: f64,
}

/// Early births of more than so many forks at a time do not pay, unless there is much memory,
const FEW: usize = 16;
/// which is so many bytes.
const MUCH: u64 = 4 << 20;

/// How many of the last steps are looked at for what is likely to be written to.
const STEPS: usize = 4;

struct Pool {
    ground: Arc<Ground>,
    limit: usize,
    early: Early,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What is expected, the latest first.
    expected: Vec<Expected>,
    /// Calls that are under way, before which the thread stands back.
    busy: usize,
    closing: bool,
    info: WarmInfo,
}

/// Forks of one source are expected.
struct Expected {
    source: Weak<Sandbox>,
    /// What is expected to be forked.
    id: CheckpointId,
    count: usize,
    wants_template: bool,
    /// More than one call asks for this checkpoint.
    hot: bool,
    ready: Vec<Blank>,
}

impl Expected {
    fn is_of(&self, source: &Arc<Sandbox>) -> bool {
        std::ptr::eq(self.source.as_ptr(), Arc::as_ptr(source))
    }
}

/// The thread stands back as long as this lives.
pub(crate) struct Pause<'a>(&'a Pool);

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.0.state.lock().busy -= 1;
        self.0.changed.notify_all();
    }
}

impl Warm {
    /// Keeps at most `limit` blanks; with 0 there is no thread.
    pub(crate) fn start(ground: Arc<Ground>, limit: usize, early: Early) -> Result<Self> {
        let pool = Arc::new(Pool {
            ground,
            limit,
            early,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        pool.state.lock().info.limit = limit;
        let runner = Arc::clone(&pool);
        let thread = (limit > 0).then(|| {
            let thread = std::thread::Builder::new().name("warm".to_owned());
            thread.spawn(move || runner.run())
        });
        let thread = thread
            .transpose()
            .doing("starting the thread that keeps sandboxes ready")?;
        Ok(Self {
            pool,
            thread: Mutex::new(thread),
        })
    }

    /// Makes the thread stand back while something that is waited for is under way.
    pub(crate) fn pause(&self) -> Pause<'_> {
        self.pool.state.lock().busy += 1;
        Pause(&self.pool)
    }

    /// A blank for a fork of `source`, if there is one.
    pub(crate) fn take(&self, source: &Arc<Sandbox>) -> Option<Blank> {
        let mut state = self.pool.state.lock();
        let mut of_source = state.expected.iter_mut().filter(|e| e.is_of(source));
        let found = of_source.next().and_then(|e| e.ready.pop());
        match found {
            Some(_) => state.info.hits += 1,
            None => state.info.misses += 1,
        }
        found
    }

    /// `count` forks of `source` are likely: said by the caller, or because there were as many.
    pub(crate) fn expect(&self, source: &Arc<Sandbox>, id: CheckpointId, count: usize, said: bool) {
        if self.pool.limit == 0 {
            return;
        }
        let mut state = self.pool.state.lock();
        if state.closing {
            return;
        }
        let at = state.expected.iter().position(|e| e.is_of(source));
        let before = at.map(|at| state.expected.remove(at));
        // A template is memory, which one fork does not say much for; a second one does.
        let again = before.as_ref().is_some_and(|b| b.id == id);
        let expected = Expected {
            source: Arc::downgrade(source),
            id,
            count,
            wants_template: said || again || count > 1,
            hot: said || again,
            ready: before.map(|b| b.ready).unwrap_or_default(),
        };
        state.expected.insert(0, expected);
        drop(state);
        self.pool.changed.notify_all();
    }

    /// There will be no more forks of this one.
    pub(crate) fn forget(&self, source: &Arc<Sandbox>) {
        let mut state = self.pool.state.lock();
        let gone: Vec<_> = state.expected.extract_if(.., |e| e.is_of(source)).collect();
        drop(state);
        drop(gone);
        self.pool.changed.notify_all();
    }

    /// A fork took up, and ended, so many processes that were born early.
    pub(crate) fn note_early(&self, (taken, ended): (usize, usize)) {
        let mut state = self.pool.state.lock();
        state.info.early_taken += taken as u64;
        state.info.early_ended += ended as u64;
    }

    /// How it is doing.
    pub(crate) fn info(&self) -> WarmInfo {
        let state = self.pool.state.lock();
        let ready = state.expected.iter().map(|e| e.ready.len()).sum();
        WarmInfo {
            ready,
            ..state.info
        }
    }

    /// Ends the thread and all blanks.
    pub(crate) fn close(&self) {
        self.pool.state.lock().closing = true;
        self.pool.changed.notify_all();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that keeps sandboxes ready has panicked");
        }
        let all = std::mem::take(&mut self.pool.state.lock().expected);
        drop(all);
    }
}

impl Drop for Warm {
    fn drop(&mut self) {
        self.close();
    }
}

/// What the thread is to do next.
enum Task {
    Template(Arc<Sandbox>, CheckpointId),
    /// Whether it is hot, and how many forks are expected at a time.
    Make(Arc<Sandbox>, CheckpointId, (bool, usize)),
    Drop(Vec<Blank>),
    WaitForMemory,
    Wait,
}

impl Pool {
    fn run(&self) {
        let mut state = self.state.lock();
        while !state.closing {
            match self.next(&mut state) {
                Task::Make(source, id, many) => {
                    drop(state);
                    let made = self.make(&source, id, many);
                    state = self.state.lock();
                    self.put(&mut state, &source, made);
                }
                Task::Template(source, id) => {
                    drop(state);
                    // Without it forks take longer; what is wrong with the checkpoint, they say.
                    if source.takes_templates()
                        && let Ok((content, _)) = source.origin(id)
                    {
                        let origin = content.origin(id, source.family());
                        self.ground.templates().make(origin);
                    }
                    state = self.state.lock();
                }
                Task::Drop(blanks) => {
                    state.info.dropped += blanks.len() as u64;
                    drop(state);
                    drop(blanks);
                    state = self.state.lock();
                }
                Task::WaitForMemory => {
                    drop(state);
                    self.ground.templates().shrink();
                    state = self.state.lock();
                    if !state.closing {
                        self.changed.wait_for(&mut state, LOOK_AGAIN);
                    }
                }
                Task::Wait => self.changed.wait(&mut state),
            }
        }
    }

    fn next(&self, state: &mut State) -> Task {
        if state.busy > 0 {
            return Task::Wait;
        }
        let mut surplus = Vec::new();
        let gone = |e: &mut Expected| e.source.strong_count() == 0;
        for old in state.expected.extract_if(.., gone) {
            surplus.extend(old.ready);
        }
        for old in state.expected.drain(SOURCES.min(state.expected.len())..) {
            surplus.extend(old.ready);
        }
        let scarce = memory::is_scarce(BLANK);
        if !scarce && let Some(task) = self.next_template(state) {
            return task;
        }
        let mut left = if scarce { 0 } else { self.limit };
        let mut wanted = None;
        for expected in &mut state.expected {
            let share = expected.count.min(left);
            left -= share;
            while expected.ready.len() > share {
                surplus.extend(expected.ready.pop());
            }
            if expected.ready.len() < share && wanted.is_none() {
                let source = expected.source.upgrade();
                let many = (expected.hot, expected.count);
                wanted = source.map(|source| (source, expected.id, many));
            }
        }
        match wanted {
            _ if !surplus.is_empty() => Task::Drop(surplus),
            Some((source, id, many)) => Task::Make(source, id, many),
            None if scarce && !state.expected.is_empty() => Task::WaitForMemory,
            None => Task::Wait,
        }
    }

    /// A template that is likely to be used, and has not been tried yet.
    fn next_template(&self, state: &mut State) -> Option<Task> {
        let untried = |e: &&mut Expected| e.wants_template;
        for expected in state.expected.iter_mut().filter(untried) {
            expected.wants_template = false;
            if let Some(source) = expected.source.upgrade()
                && !self.ground.templates().has(expected.id)
            {
                return Some(Task::Template(source, expected.id));
            }
        }
        None
    }

    fn make(
        &self,
        source: &Sandbox,
        id: CheckpointId,
        (hot, count): (bool, usize),
    ) -> Result<Blank> {
        let (content, spec) = source.origin(id)?;
        let make_files = |ids| source.fork_volume(&content, ids);
        let blank = self.ground.nameless_blank(spec, make_files)?;
        let template = self.ground.templates().peek(id);
        Ground::read_ahead(&blank, content.processes(), template.as_deref());
        if hot
            && self.early.births
            && let Some(template) = self.ground.templates().of(id)
            && (count <= FEW || template.holding().bytes() >= MUCH)
        {
            self.bear_early(source, (id, &content), &template, &blank);
        }
        Ok(blank)
    }

    /// Has the processes of a fork born in a blank, if there is nothing better to do.
    fn bear_early(
        &self,
        source: &Sandbox,
        (id, content): (CheckpointId, &Content),
        template: &Template,
        blank: &Blank,
    ) {
        if memory::cpu_pressure() > self.early.pressure {
            self.state.lock().info.stood_back += 1;
            return;
        }
        let touch = |pid| source.written_after(id, pid, (STEPS, self.early.pages));
        let born = template.fork_early(blank.container(), content.processes(), touch);
        // What is missing is born when the fork is made.
        let (births, pages) = born.unwrap_or_else(|e| {
            tracing::debug!("bearing the processes of a fork of {id}: {e}");
            (0, 0)
        });
        let mut state = self.state.lock();
        state.info.early_births += births;
        state.info.early_pages += pages;
    }

    fn put(&self, state: &mut State, source: &Arc<Sandbox>, made: Result<Blank>) {
        let at = state.expected.iter().position(|e| e.is_of(source));
        match (at, made) {
            (Some(at), Ok(blank)) => {
                state.info.made += 1;
                state.expected[at].ready.push(blank);
            }
            (None, Ok(_)) => state.info.dropped += 1,
            (at, Err(e)) => {
                // The next fork of it will say what is wrong.
                tracing::debug!("keeping a sandbox ready: {e}");
                at.map(|at| state.expected.remove(at));
            }
        }
    }
}
