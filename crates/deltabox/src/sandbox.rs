//! One sandbox: what its user can do with it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use deltafs::Volume;

use crate::container::Container;
use crate::error::{Doing, Error, Result};
use crate::host::unimplemented_skeleton;
use crate::report::*;
use crate::session::Session;
use crate::sessions::{Sessions, Shared};
use crate::spawn;
use crate::spec::{CommandSpec, SandboxSpec};

/// A sandbox. All methods may be called from any thread; operations that change the whole state exclude each other.
pub struct Sandbox {
    name: String,
    base: PathBuf,
    created: u64,
    first_id: u32,
    sessions: Sessions,
    // Dropped after the sessions, and with them the processes.
    volume: Volume,
    dir: Directory,
}

/// The sandbox's directory on the host; removed with it.
pub(crate) struct Directory(pub(crate) PathBuf);

impl Directory {
    fn remove(&self) -> Result<()> {
        match std::fs::remove_dir_all(&self.0) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other.doing(format!("removing {}", self.0.display())),
        }
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
    /// Puts a running container and its files together.
    pub(crate) fn assemble(
        name: String,
        spec: &SandboxSpec,
        first_id: u32,
        container: Container,
        volume: Volume,
        dir: Directory,
    ) -> Result<Self> {
        let logs = dir.0.join("logs");
        std::fs::create_dir(&logs).doing(format!("making {}", logs.display()))?;
        Ok(Self {
            sessions: Sessions::start(&name, Arc::new(container), logs)?,
            name,
            base: spec.base.clone(),
            created: now(),
            first_id,
            volume,
            dir,
        })
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.sessions.shared
    }

    pub(crate) fn volume(&self) -> &Volume {
        &self.volume
    }

    pub(crate) fn container(&self) -> &Container {
        &self.shared().container
    }

    /// Kills all processes and removes all that belongs to it. Clients that still hold it find it failed.
    pub(crate) fn close(&self) -> Result<()> {
        self.shared()
            .failed
            .lock()
            .get_or_insert_with(|| "it was removed".to_owned());
        self.sessions.close();
        self.container().close()?;
        self.dir.remove()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is and how it is doing.
    pub fn info(&self) -> SandboxInfo {
        let failed = self.shared().failed.lock().clone();
        SandboxInfo {
            name: self.name.clone(),
            state: match failed {
                Some(reason) => SandboxState::Failed { reason },
                None => SandboxState::Running,
            },
            base: self.base.clone(),
            current: None,
            epoch: self.epoch(),
            created: self.created,
            checkpoints: 0,
            processes: self.container().processes(),
            file_bytes: self.volume.stats().data_bytes,
            page_bytes: 0,
            warnings: self.container().warnings().to_vec(),
        }
    }

    /// How often it was rolled back.
    pub fn epoch(&self) -> u64 {
        self.shared().epoch.load(Ordering::Acquire)
    }

    /// Starts a command as a new session.
    pub fn spawn(&self, command: CommandSpec) -> Result<Arc<Session>> {
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

    /// Checkpoints files, processes and sessions together.
    pub fn checkpoint(&self, _message: Option<String>) -> Result<CheckpointReport> {
        unimplemented_skeleton()
    }

    /// Gives the sandbox the state of a checkpoint of its tree back.
    pub fn rollback(&self, _id: CheckpointId) -> Result<RollbackReport> {
        unimplemented_skeleton()
    }

    /// What differs between two checkpoints.
    pub fn diff(&self, _a: CheckpointId, _b: CheckpointId) -> Result<Difference> {
        unimplemented_skeleton()
    }

    /// Forgets a checkpoint. Its children become its parent's.
    pub fn delete(&self, _id: CheckpointId) -> Result<()> {
        unimplemented_skeleton()
    }

    /// The tree of checkpoints.
    pub fn tree(&self) -> Tree {
        unimplemented_skeleton()
    }

    /// Ends all processes; the checkpoints stay, and a rollback makes it run again.
    pub fn stop(&self) -> Result<()> {
        unimplemented_skeleton()
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}
