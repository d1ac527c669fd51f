//! What can go wrong when a volume is made or switched.

use std::io;
use std::path::PathBuf;

/// The result of an operation on a volume.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation on a volume failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The base cannot be used.
    #[error("cannot use the base directory: {what}")]
    Base {
        /// What was attempted.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The directory for block data cannot be used.
    #[error("cannot make the block file in {}: is it a writable directory?", path.display())]
    Data {
        /// The directory.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The filesystem could not be mounted or served.
    #[error("cannot mount DeltaFS: {what} (needs root and CONFIG_FUSE_FS)")]
    Mount {
        /// The step that failed.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The map of user and group ids is too small to hold `nobody`.
    #[error("the id map has {count} ids; it needs at least 65535, so that it holds nobody (65534)")]
    IdMap {
        /// How many ids the map has.
        count: u32,
    },
    /// The snapshot was made in another tree of volumes: it has another base and other inode numbers.
    #[error("the snapshot belongs to another tree of volumes than this one")]
    ForeignSnapshot,
    /// Dirty pages of shared mappings could not be written into the volume.
    #[error("cannot flush the dirty pages of the mount: is the disk of the block file full?")]
    Flush {
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A layer on disk could not be written or read, or is damaged.
    #[error(transparent)]
    Layer(#[from] deltalog::Error),
    /// Blocks of a layer could not be copied from or to the block file.
    #[error("cannot copy blocks of file data {what}")]
    Blocks {
        /// From where to where.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The base is not what a layer on disk was made over.
    #[error("the base has changed since the layer in {} was written: {what}", layer.display())]
    BaseChanged {
        /// The layer's directory.
        layer: PathBuf,
        /// What is another.
        what: String,
    },
    /// The kernel would not drop what it had cached of an inode.
    #[error("cannot invalidate the kernel's cache of inode {ino}")]
    Invalidate {
        /// The inode.
        ino: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}
