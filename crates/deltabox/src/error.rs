//! What can go wrong with a sandbox, as its user is told.

use std::io;
use std::path::PathBuf;

use crate::report::{CheckpointId, SessionId};

/// The result of an operation on a sandbox.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation was not done. The sandbox is as it was before, unless the variant says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No sandbox has this name.
    #[error("there is no sandbox {0:?}; `deltabox ls` lists them")]
    NoSandbox(String),
    /// A sandbox has this name already.
    #[error(
        "a sandbox {0:?} exists already; choose another name, or remove it with `deltabox rm {0}`"
    )]
    NameTaken(String),
    /// The sandbox has no such checkpoint.
    #[error("sandbox {sandbox:?} has no checkpoint {id}; `deltabox tree {sandbox}` shows them")]
    NoCheckpoint {
        /// The sandbox.
        sandbox: String,
        /// The id asked for.
        id: CheckpointId,
    },
    /// The sandbox has no such session.
    #[error("sandbox {sandbox:?} has no session {id}")]
    NoSession {
        /// The sandbox.
        sandbox: String,
        /// The id asked for.
        id: SessionId,
    },
    /// What was asked for makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The sandbox is not running.
    #[error("sandbox {name:?} is {state}; roll it back to a checkpoint to make it run again")]
    NotRunning {
        /// The sandbox.
        name: String,
        /// How it is.
        state: String,
    },
    /// The command could not be started.
    #[error("cannot run {program:?} in the sandbox: {source}")]
    Spawn {
        /// The program asked for.
        program: String,
        /// Why: not found, not executable, no such directory.
        source: io::Error,
    },
    /// A request named an epoch that is over.
    #[error("the sandbox was rolled back since: epoch {expected} was expected, it is {actual} now")]
    Epoch {
        /// What the request expected.
        expected: u64,
        /// What it is.
        actual: u64,
    },
    /// Processes: see the message.
    #[error(transparent)]
    Processes(#[from] deltacr::Error),
    /// Files: see the message.
    #[error(transparent)]
    Files(#[from] deltafs::Error),
    /// A checkpoint was made, and is kept in memory, but is not on disk.
    #[error(
        "checkpoint {id} was made and is kept in memory, but could not be made durable: {source}"
    )]
    NotDurable {
        /// The checkpoint.
        id: CheckpointId,
        /// Why.
        source: Box<Error>,
    },
    /// A durable checkpoint is there and cannot be used.
    #[error("checkpoint {id} of sandbox {sandbox:?} cannot be restored: {why}")]
    Unusable {
        /// The sandbox.
        sandbox: String,
        /// The checkpoint.
        id: CheckpointId,
        /// What is wrong with it.
        why: String,
    },
    /// A file of a durable checkpoint could not be written or read, or is damaged.
    #[error(transparent)]
    Disk(#[from] deltalog::Error),
    /// A system call failed.
    #[error("{doing}: {source}")]
    System {
        /// What was attempted, on what.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The state directory cannot be used.
    #[error("the state directory {path:?} cannot be used: {why}")]
    StateDir {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

impl Error {
    /// Whether it is for want of space on a disk.
    pub fn is_disk_full(&self) -> bool {
        let full = |e: &io::Error| e.kind() == io::ErrorKind::StorageFull;
        let log =
            |e: &deltalog::Error| matches!(e, deltalog::Error::Io { source, .. } if full(source));
        match self {
            Self::System { source, .. } => full(source),
            Self::NotDurable { source, .. } => source.is_disk_full(),
            Self::Disk(e)
            | Self::Files(deltafs::Error::Layer(e))
            | Self::Processes(deltacr::Error::Image(e)) => log(e),
            _ => false,
        }
    }
}

/// Adds to an I/O error what was attempted.
pub(crate) trait Doing<T> {
    /// `what` is a noun phrase with its object: "mounting /proc in the sandbox".
    fn doing(self, what: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|e| Error::System {
            doing: what.into(),
            source: e.into(),
        })
    }
}
