//! Directories that are there whole or not at all.

use std::fs::{self, File};
use std::path::Path;

use crate::error::{Doing, Result};

/// Gives a directory, whose files are all on disk, its final name in the same parent, in the place of what had that
/// name, if anything (which must be empty, or not be there). When this returns, a power cut does not undo it.
///
/// # Errors
/// The disk refuses. The directory may have either name then.
pub fn commit(from: &Path, to: &Path) -> Result<()> {
    sync_directory(from)?;
    fs::rename(from, to).doing("renaming", from)?;
    to.parent().map_or(Ok(()), sync_directory)
}

/// Has the names in a directory on disk.
///
/// # Errors
/// It is none, or the disk refuses.
pub fn sync_directory(path: &Path) -> Result<()> {
    let file = File::open(path).doing("opening", path)?;
    file.sync_all().doing("writing out", path)
}
