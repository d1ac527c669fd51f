//! DeltaFS: a versioned union filesystem over a read-only base directory.
//!
//! A [`Volume`] is the filesystem of one sandbox: a FUSE mount, served by threads of this process. Its whole
//! state is one root into immutable, structurally shared maps, so [`Volume::checkpoint`] keeps a
//! root in constant time, [`Volume::rollback`] puts it back and tells the kernel to drop exactly what
//! differs, and [`Volume::fork`] shows it through another mount.
//!
//! An inode number is never given twice in a tree of volumes, and it is the node id that the kernel
//! uses. So an open descriptor names the inode, not a version of it: after a rollback the same
//! descriptor shows the version of the state that was rolled back to, files without a name included.
//!
//! Needs root, `/proc`, and Linux 5.10 or newer with FUSE (the new mount API, `RESOLVE_BENEATH`,
//! cloned `/dev/fuse` descriptors).

mod acl;
mod base;
mod data;
mod diff;
mod disk;
mod error;
mod file;
mod fuse;
mod ids;
mod invalidate;
mod node;
mod original;
mod reclaim;
mod sys;
mod tree;
mod view;
mod volume;
mod xattr;

pub use diff::{Change, ChangeKind, diff};
pub use disk::{LayerInfo, Loader, verify_layer};
pub use error::{Error, Result};
pub use fuse::io_uring_is_offered;
pub use ids::IdMap;
pub use invalidate::InUse;
pub use reclaim::LeftBehind;
pub use view::Quota;
pub use volume::{Options, RollbackStats, Snapshot, Stats, Volume};

/// What a volume is served through, for other servers of FUSE.
pub mod transport {
    pub use crate::fuse::{Channel, Service, Session};
}
