//! The directories of durable checkpoints: `checkpoints/SANDBOX/ID`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use deltalog::{commit, sync_directory};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::manifest::Manifest;
use crate::error::{Doing, Result};
use crate::names;
use crate::report::CheckpointId;

/// What is being written has this behind its name.
const UNFINISHED: &str = "new";
/// What is being deleted has this before its number.
const REMOVED: &str = ".removed-";

/// All durable checkpoints of a state directory.
pub(crate) struct Archive {
    root: PathBuf,
    removals: AtomicU64,
}

/// The durable checkpoints of one sandbox; of a manifest that cannot be read, why.
pub(crate) type Stored = BTreeMap<CheckpointId, Result<Manifest, String>>;

impl Archive {
    /// Opens the archive of a state directory, and finishes what a service that was killed had begun to delete or to
    /// write: both are gone then. Returns a sentence for each.
    pub(crate) fn open(state_dir: &Path) -> Result<(Self, Vec<String>)> {
        let root = state_dir.join("checkpoints");
        if !root.is_dir() {
            fs::create_dir(&root).doing(format!("making {}", root.display()))?;
            sync_directory(state_dir)?;
            // The state directory may be new itself.
            state_dir.parent().map_or(Ok(()), sync_directory)?;
        }
        let archive = Self {
            root,
            removals: AtomicU64::new(0),
        };
        let mut sentences = Vec::new();
        for sandbox in entries(&archive.root)? {
            if file_name(&sandbox).starts_with(REMOVED) {
                remove(&sandbox)?;
                sentences.push("Removed durable checkpoints that were being deleted.".to_owned());
                continue;
            }
            for checkpoint in entries(&sandbox)? {
                if checkpoint.extension().is_some_and(|e| e == UNFINISHED) {
                    remove(&checkpoint)?;
                    let path = checkpoint.display();
                    sentences.push(format!("Removed {path}: it was not written to its end."));
                }
            }
            // It has none left if nothing else is in it.
            let _ = fs::remove_dir(&sandbox);
        }
        Ok((archive, sentences))
    }

    /// What there is.
    pub(crate) fn list(&self) -> Result<BTreeMap<String, Stored>> {
        let mut all = BTreeMap::new();
        for sandbox in entries(&self.root)? {
            let name = file_name(&sandbox);
            if names::check_name(&name).is_err() {
                continue;
            }
            let stored = self.of(&name)?;
            if !stored.is_empty() {
                all.insert(name, stored);
            }
        }
        Ok(all)
    }

    /// What there is of a sandbox.
    pub(crate) fn of(&self, sandbox: &str) -> Result<Stored> {
        let mut stored = Stored::new();
        for path in entries(&self.root.join(sandbox))? {
            let Ok(id) = file_name(&path).parse::<CheckpointId>() else {
                continue;
            };
            let manifest = Manifest::read(&path).map_err(|e| e.to_string());
            let manifest = manifest.and_then(|manifest| match manifest.id == id {
                true => Ok(manifest),
                false => Err(format!("{path:?} holds checkpoint {}", manifest.id)),
            });
            stored.insert(id, manifest);
        }
        Ok(stored)
    }

    /// Where a checkpoint is.
    pub(crate) fn dir(&self, sandbox: &str, id: CheckpointId) -> PathBuf {
        self.root.join(sandbox).join(id.to_string())
    }

    /// Writes a checkpoint: `fill` fills a directory, which then comes into being under its name, in the place of an older
    /// version if there is one. When this returns a power cut does not undo it.
    ///
    /// # Errors
    /// Nothing is left of it, and an older version is as it was.
    pub(crate) fn write<T>(
        &self,
        sandbox: &str,
        id: CheckpointId,
        fill: impl FnOnce(&Path) -> Result<T>,
    ) -> Result<T> {
        let done = self.dir(sandbox, id);
        let new = done.with_extension(UNFINISHED);
        let parent = self.root.join(sandbox);
        let doing = || format!("making {}", new.display());
        if !parent.exists() {
            fs::create_dir(&parent).doing(doing())?;
            sync_directory(&self.root)?;
        }
        if new.exists() {
            remove(&new)?;
        }
        fs::create_dir(&new).doing(doing())?;
        let written = fill(&new).and_then(|filled| {
            match done.exists() {
                false => commit(&new, &done)?,
                true => replace(&new, &done)?,
            }
            Ok(filled)
        });
        if new.exists() {
            // Half of a new version, or the old one.
            remove(&new)?;
        }
        written
    }

    /// Deletes a checkpoint, and gives its space back.
    pub(crate) fn remove(&self, sandbox: &str, id: CheckpointId) -> Result<()> {
        self.remove_at(&self.dir(sandbox, id))?;
        // Kept while others are in it.
        let _ = fs::remove_dir(self.root.join(sandbox));
        Ok(())
    }

    /// Deletes all checkpoints of a sandbox, and gives their space back.
    pub(crate) fn remove_all(&self, sandbox: &str) -> Result<()> {
        self.remove_at(&self.root.join(sandbox))
    }

    /// Takes the name away at once, so that half of it is never found, and then the files.
    fn remove_at(&self, path: &Path) -> Result<()> {
        let number = self.removals.fetch_add(1, Ordering::Relaxed);
        let gone = self.root.join(format!("{REMOVED}{number}"));
        match fs::rename(path, &gone) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.doing(format!("removing {}", path.display()))?,
        }
        if let Some(parent) = path.parent() {
            sync_directory(parent)?;
        }
        sync_directory(&self.root)?;
        remove(&gone)
    }
}

/// Gives `new` the name `done`, and what has that name the other.
fn replace(new: &Path, done: &Path) -> Result<()> {
    sync_directory(new)?;
    renameat_with(CWD, new, CWD, done, RenameFlags::EXCHANGE)
        .doing(format!("replacing {}", done.display()))?;
    done.parent().map_or(Ok(()), |dir| Ok(sync_directory(dir)?))
}

fn remove(path: &Path) -> Result<()> {
    fs::remove_dir_all(path).doing(format!("removing {}", path.display()))
}

/// The directories in a directory, sorted; none if it is not there.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let doing = || format!("reading {}", dir.display());
    let listing = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.doing(doing())?,
    };
    let mut found = Vec::new();
    for entry in listing {
        let path = entry.doing(doing())?.path();
        if path.is_dir() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}
