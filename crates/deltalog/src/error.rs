//! What can be wrong with a file.

use std::io;
use std::path::{Path, PathBuf};

/// The result of an operation on a file.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a file could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused: the disk is full, the file is missing.
    #[error("{doing} {path:?}: {source}")]
    Io {
        /// What was attempted.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file is not as it was written.
    #[error("{path:?} is damaged at byte {at}: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the damage was found.
        at: u64,
        /// What is wrong there.
        what: String,
    },
    /// The file is of another version of the format.
    #[error("{path:?} has version {found} of its format; this program reads version {supported}")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version that can be read.
        supported: u32,
    },
    /// A value cannot be written down.
    #[error("a record of {path:?} cannot be encoded: {why}")]
    Encode {
        /// The file that it was meant for.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

impl Error {
    /// Damage found in a file by whoever knows what its records mean.
    pub fn damaged(path: &Path, at: u64, what: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            at,
            what: what.into(),
        }
    }
}

/// Adds to an I/O error what was attempted.
pub(crate) trait Doing<T> {
    fn doing(self, doing: &'static str, path: &Path) -> Result<T>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, doing: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io {
            doing,
            path: path.to_owned(),
            source,
        })
    }
}
