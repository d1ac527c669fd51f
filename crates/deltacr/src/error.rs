//! What can go wrong with a process tree.

use std::io;

use crate::ids::InnerPid;

/// The result of an operation on a process tree.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a checkpoint or a rollback was not made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process holds something that a checkpoint cannot carry. Found before anything was changed.
    #[error("process {pid}{} cannot be checkpointed: {what}", named(.name))]
    Unsupported {
        /// The process, as the sandbox counts.
        pid: InnerPid,
        /// Its name (`comm`), empty where it is not known.
        name: String,
        /// What it holds, and what to do about it.
        what: String,
    },
    /// A system call of the supervisor, or one that it made the process run, failed.
    #[error("{doing} of process {pid}: {source}")]
    Process {
        /// What was attempted, as a noun phrase: "reading the memory".
        doing: String,
        /// The process, as the sandbox counts.
        pid: InnerPid,
        /// Why it failed.
        source: io::Error,
    },
    /// A system call that concerns the tree as a whole failed.
    #[error("{doing}: {source}")]
    Tree {
        /// What was attempted.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The tree did not stand still in time.
    #[error("the processes did not stop within {waited_ms} ms: {what}")]
    NotFrozen {
        /// How long the supervisor waited, in milliseconds.
        waited_ms: u64,
        /// Which process, and what it waits for.
        what: String,
    },
    /// The checkpoint's pages of a process were not copied, so that it cannot be given back.
    #[error("the memory of process {pid} at the checkpoint is lost: {what}")]
    Lost {
        /// The process, as the sandbox counts.
        pid: InnerPid,
        /// Why.
        what: String,
    },
    /// An image on disk could not be written or read, or is damaged.
    #[error(transparent)]
    Image(#[from] deltalog::Error),
    /// What was read from a process or an image contradicts itself.
    #[error("process {pid}: {what}")]
    Corrupt {
        /// The process, as the sandbox counts.
        pid: InnerPid,
        /// What is wrong.
        what: String,
    },
}

impl Error {
    /// Whether it tells that a process or thread was gone: a kill does not wait for a thaw.
    pub(crate) fn is_death(&self) -> bool {
        let (Self::Process { source, .. } | Self::Tree { source, .. }) = self else {
            return false;
        };
        source.raw_os_error() == Some(libc::ESRCH)
    }
}

fn named(name: &str) -> String {
    if name.is_empty() {
        String::new()
    } else {
        format!(" ({name})")
    }
}

/// Adds to an I/O error what was attempted, and on which process.
pub trait During<T> {
    /// `doing` is a noun phrase: "reading the memory".
    fn during(self, pid: InnerPid, doing: &str) -> Result<T>;
    /// The same for the tree as a whole.
    fn during_tree(self, doing: &str) -> Result<T>;
}

impl<T, E: Into<io::Error>> During<T> for std::result::Result<T, E> {
    fn during(self, pid: InnerPid, doing: &str) -> Result<T> {
        self.map_err(|e| Error::Process {
            doing: doing.to_owned(),
            pid,
            source: e.into(),
        })
    }

    fn during_tree(self, doing: &str) -> Result<T> {
        self.map_err(|e| Error::Tree {
            doing: doing.to_owned(),
            source: e.into(),
        })
    }
}
