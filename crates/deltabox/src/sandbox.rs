//! One sandbox: what its user can do with it.

mod compact;
mod durable;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use deltacr::ids::InnerPid;
use deltafs::{IdMap, Volume};
use parking_lot::Mutex;

use crate::container::Container;
use crate::error::{Doing, Error, Result};
use crate::generation::Generation;
use crate::report::*;
use crate::session::Session;
use crate::sessions::{Sessions, Shared};
use crate::spawn;
use crate::spec::{CommandSpec, SandboxSpec};
use crate::state::{Common, Content, DeltaState, Failure, Subject};
use crate::templates::{Family, Template};

/// A sandbox. All methods may be called from any thread; operations that change the whole state exclude each other.
pub struct Sandbox {
    name: String,
    created: u64,
    first_id: u32,
    spec: SandboxSpec,
    // Before the sessions, whose processes it knows.
    state: Mutex<DeltaState>,
    sessions: Sessions,
    // Dropped after the sessions, and with them the processes.
    volume: Volume,
    dir: Directory,
    making: Mutex<deltacr::Phases>,
    common: Arc<Common>,
    /// Held by whatever changes the checkpoints on disk.
    disk: Mutex<()>,
    /// Held by whoever merges them. Before `disk`.
    merging: Mutex<()>,
    /// What its user is warned of besides what the container lacks.
    warnings: Mutex<Vec<String>>,
}

/// The sandbox's directory on the host; removed with it.
pub(crate) struct Directory {
    path: PathBuf,
    /// Another sandbox may be called so, and use the path, by now.
    removed: AtomicBool,
}

impl Directory {
    pub(crate) fn new(path: PathBuf) -> Self {
        let removed = AtomicBool::new(false);
        Self { path, removed }
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn remove(&self) -> Result<()> {
        if self.removed.load(Ordering::Acquire) {
            return Ok(());
        }
        match std::fs::remove_dir_all(&self.path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            other => other.doing(format!("removing {}", self.path.display()))?,
        }
        self.removed.store(true, Ordering::Release);
        Ok(())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(e) = self.remove() {
            tracing::warn!("{e}");
        }
    }
}

/// The output and status of a command that [`Sandbox::run`] ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunOutput {
    /// 0-255, 128+n for signal n.
    pub status: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// The most bytes of output that [`Sandbox::run`] returns.
const MAX_RUN_OUTPUT: usize = crate::log::CAPACITY as usize;

impl Sandbox {
    /// Puts a running container and its files together; `dir` is for logs.
    pub(crate) fn assemble(
        name: String,
        spec: &SandboxSpec,
        first_id: u32,
        container: Container,
        volume: Volume,
        dir: Directory,
        common: Arc<Common>,
    ) -> Result<Self> {
        let logs = dir.join("logs");
        Ok(Self {
            state: Mutex::new(DeltaState::new(&name, Arc::clone(&common))?),
            sessions: Sessions::start(&name, Arc::new(container), logs)?,
            name,
            spec: spec.clone(),
            created: now(),
            first_id,
            volume,
            dir,
            making: Mutex::default(),
            common,
            disk: Mutex::default(),
            merging: Mutex::default(),
            warnings: Mutex::default(),
        })
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.sessions.shared
    }

    pub(crate) fn container(&self) -> &Container {
        &self.shared().container
    }

    /// Kills all processes and removes all that belongs to it. Clients that still hold it find it failed.
    pub(crate) fn close(&self) -> Result<()> {
        self.sessions.close();
        // What is under way fails by that, and is over before anything can have the name of what it works on.
        if let Err(e) = self.container().kill() {
            // Who waits in the kernel for an answer about files can end when none will come any more.
            tracing::warn!("{e}; ending its files");
            self.volume.shutdown();
            self.container().kill()?;
        }
        let _whole = self.shared().whole.lock();
        self.container().close()?;
        self.dir.remove()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is and how it is doing.
    pub fn info(&self) -> SandboxInfo {
        let (current, checkpoints, durable, page_bytes) = {
            let state = self.state.lock();
            let (all, durable) = (state.len(), state.durable());
            (state.current(), all, durable, state.page_bytes())
        };
        SandboxInfo {
            name: self.name.clone(),
            state: self.shared().condition(),
            base: self.spec.base.clone(),
            current,
            epoch: self.epoch(),
            created: self.created,
            checkpoints,
            durable,
            processes: self.shared().processes(),
            file_bytes: self.volume.stats().data_bytes,
            page_bytes,
            warnings: [self.container().warnings(), &self.warnings.lock()].concat(),
        }
    }

    /// How often it was rolled back.
    pub fn epoch(&self) -> u64 {
        self.shared().epoch.load(Ordering::Acquire)
    }

    /// Starts a command as a new session.
    pub fn spawn(&self, command: CommandSpec) -> Result<Arc<Session>> {
        // What init has begun to start is half a process, which init waits for: none must be stopped there.
        let _whole = self.shared().whole.lock();
        self.shared().check(&self.name)?;
        spawn::spawn(self.shared(), self.first_id, command)
    }

    /// Runs a command without input to its end.
    pub fn run(&self, argv: &[&str]) -> Result<RunOutput> {
        let session = self.spawn(CommandSpec {
            argv: argv.iter().map(|a| (*a).to_owned()).collect(),
            ..CommandSpec::default()
        })?;
        let mut events = session.events(0);
        let mut output = RunOutput {
            status: 0,
            stdout: Vec::new(),
            stderr: Vec::new(),
        };
        loop {
            match events.next(None) {
                Some(SessionEvent::Output { stream, bytes }) => match stream {
                    Stream::Stdout => output.stdout.extend(bytes),
                    Stream::Stderr => output.stderr.extend(bytes),
                },
                Some(SessionEvent::Missed { .. }) => {}
                Some(SessionEvent::Exit { status, .. }) => {
                    output.status = status;
                    return Ok(output);
                }
                Some(SessionEvent::RolledBack { epoch }) => {
                    return Err(Error::Epoch {
                        expected: epoch.saturating_sub(1),
                        actual: epoch,
                    });
                }
                // Without a time limit there is always a next one, up to the end, which was returned.
                None => return Ok(output),
            }
            if output.stdout.len() + output.stderr.len() > MAX_RUN_OUTPUT {
                session.kill()?;
                return Err(Error::Invalid(format!(
                    "{:?} wrote more than {} MiB; use a session and read its events",
                    argv.first().unwrap_or(&""),
                    MAX_RUN_OUTPUT >> 20
                )));
            }
        }
    }

    /// A session by number; also one that has ended, until the sandbox forgets it (the last 256 are kept).
    pub fn session(&self, id: SessionId) -> Result<Arc<Session>> {
        self.shared().session(id).ok_or_else(|| Error::NoSession {
            sandbox: self.name.clone(),
            id,
        })
    }

    /// All sessions, also ended ones that are still remembered.
    pub fn sessions(&self) -> Vec<SessionInfo> {
        self.shared().list()
    }

    fn subject(&self) -> Subject<'_> {
        Subject {
            shared: self.shared(),
            volume: &self.volume,
        }
    }

    /// Checkpoints files, processes and sessions together.
    pub fn checkpoint(&self, message: Option<String>) -> Result<CheckpointReport> {
        let _whole = self.shared().whole.lock();
        self.shared().check(&self.name)?;
        self.state.lock().checkpoint(self.subject(), message)
    }

    /// Waits until a checkpoint is complete: of much memory the copying goes on after [`Sandbox::checkpoint`] has returned,
    /// while the processes run. What needs the checkpoint before that waits by itself.
    ///
    /// # Errors
    /// There is no such checkpoint, or memory could not be copied, so that it cannot be rolled back to.
    pub fn complete(&self, id: CheckpointId) -> Result<KeptPages> {
        let content = self.state.lock().content(id)?;
        content.complete()
    }

    /// Gives the sandbox the state of a checkpoint of its tree back.
    pub fn rollback(&self, id: CheckpointId) -> Result<RollbackReport> {
        let shared = self.shared();
        let _whole = shared.whole.lock();
        shared.check_open(&self.name)?;
        let alive = shared.condition() == SandboxState::Running;
        let done = self.state.lock().rollback(self.subject(), id, alive);
        match done {
            Ok(report) => {
                shared.revive();
                Ok(report)
            }
            Err(Failure::Untouched(e)) => Err(e),
            Err(Failure::Dead(e)) => {
                if let Err(e) = self.state.lock().kill_all(self.subject()) {
                    tracing::error!("ending sandbox {:?}: {e}", self.name);
                }
                shared.restoring.store(false, Ordering::Release);
                shared.fail(format!("rolling back to {id}: {e}"));
                Err(e)
            }
        }
    }

    /// What differs between two checkpoints.
    pub fn diff(&self, a: CheckpointId, b: CheckpointId) -> Result<Difference> {
        self.state.lock().diff(a, b)
    }

    /// The tree of checkpoints.
    pub fn tree(&self) -> Tree {
        self.state.lock().tree()
    }

    /// Ends all processes; the checkpoints stay, and a rollback makes it run again.
    pub fn stop(&self) -> Result<()> {
        let shared = self.shared();
        let _whole = shared.whole.lock();
        shared.check_open(&self.name)?;
        shared.stopped.store(true, Ordering::Release);
        self.state.lock().kill_all(self.subject())
    }

    /// What a fork needs of it: the state at a checkpoint, and what it was created as.
    pub(crate) fn origin(&self, id: CheckpointId) -> Result<(Content, SandboxSpec)> {
        Ok((self.state.lock().content(id)?, self.spec.clone()))
    }

    /// Whether its processes can be copies of a template. A process that shares another's memory, as who makes them does, cannot
    /// enter a time namespace.
    pub(crate) fn takes_templates(&self) -> bool {
        self.spec.time_namespace.is_none()
    }

    /// A volume that shows the files of a checkpoint.
    pub(crate) fn fork_volume(&self, content: &Content, ids: IdMap) -> Result<Volume> {
        Ok(self.volume.fork(content.files(), ids)?)
    }

    /// Gives a sandbox that has just been assembled, and whose volume shows the files of `content`, the sessions and
    /// processes of it. It is of that family then. `template` holds most of their memory, if there is one. Returns how many processes
    /// that were born early it has, and how many had to go.
    pub(crate) fn populate(
        &self,
        content: &Content,
        family: Family,
        template: Option<&Template>,
    ) -> Result<(usize, usize)> {
        let _whole = self.shared().whole.lock();
        self.shared().restoring.store(true, Ordering::Release);
        let container = self.container();
        let early = match template {
            Some(template) => template.select(container, content.processes()),
            None => container.early().select(container, |_, _| false),
        };
        let early = early.doing(format!("emptying sandbox {:?}", self.name))?;
        self.shared().adopt(content.sessions())?;
        let phases = self
            .state
            .lock()
            .populate(self.subject(), content, family, template)?;
        self.note_phases(phases);
        Ok(early)
    }

    /// The addresses that the steps after a checkpoint wrote to; see [`DeltaState::written_after`].
    pub(crate) fn written_after(
        &self,
        id: CheckpointId,
        pid: InnerPid,
        most: (usize, u64),
    ) -> Vec<Range<u64>> {
        self.state.lock().written_after(id, pid, most)
    }

    /// Tells it apart from other forks of the same state; before there are processes.
    pub(crate) fn set_generation(&self, generation: Generation) -> Result<()> {
        let written = generation.write(self.container());
        written.doing(format!(
            "telling fork {:?} apart: writing /run/deltabox/generation",
            self.name
        ))?;
        // It is set once, by who makes the fork.
        let _ = self.shared().generation.set(generation);
        Ok(())
    }

    /// Which sandboxes it shares memory with.
    pub(crate) fn family(&self) -> Family {
        self.state.lock().family()
    }

    /// There will be no more forks of it.
    pub(crate) fn forget_templates(&self) {
        self.state.lock().forget_templates();
    }

    /// Notes how long further parts of its making took.
    pub(crate) fn note_phases(&self, phases: deltacr::Phases) {
        self.making.lock().extend(phases);
    }

    /// How long the parts of its making took, in order: by [`crate::Host::create`] or [`crate::Host::fork`].
    pub fn making(&self) -> Phases {
        self.making.lock().clone().into()
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}
