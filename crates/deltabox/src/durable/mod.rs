//! Checkpoints on disk: what outlives the service. `docs/format.md` describes the files.

mod archive;
mod ids;
mod layers;
mod manifest;
mod read;
mod sessions;
mod write;

pub(crate) use archive::{Archive, Stored};
pub(crate) use ids::Ids;
pub(crate) use layers::{Layer, Layers, Merge, next_merge, unneeded};
pub(crate) use manifest::{Manifest, Origin};
pub(crate) use read::{Loaded, Reader, verify};
pub(crate) use sessions::SessionReader;
pub(crate) use write::{Draft, rewrite, write};

/// The logs of a checkpoint that are ours; the others are those of `deltafs` and `deltacr`.
const MANIFEST: &str = "manifest";
/// See [`MANIFEST`].
const SESSIONS: &str = "sessions";
