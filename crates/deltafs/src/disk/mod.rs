//! Layers on disk: what a snapshot changed since the one that it is written against.
//!
//! A layer is two files in a directory: `files.meta`, a log of the inodes that differ, and `files.data`, their blocks.
//! `docs/format.md` describes both.

mod load;
mod read;
mod records;
mod save;

use std::path::Path;

use serde::{Deserialize, Serialize};

pub use load::Loader;

use crate::error::Result;
use read::Layer;

/// The name of the log of inodes.
const META: &str = "files.meta";
/// The name of the file of blocks.
const DATA: &str = "files.data";

/// What a layer on disk holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerInfo {
    /// Inodes that are new or others than before.
    pub inodes: u64,
    /// Inodes that are gone or the base's again.
    pub gone: u64,
    /// Inodes of the base that were looked up since.
    pub base_inodes: u64,
    /// Bytes of file data.
    pub data_bytes: u64,
}

/// Reads a layer and checks every byte of it.
///
/// # Errors
/// It is damaged; the error names the file.
pub fn verify_layer(dir: &Path) -> Result<LayerInfo> {
    let layer = Layer::read(dir)?;
    layer.blocks(dir)?.verify()?;
    Ok(layer.info())
}
