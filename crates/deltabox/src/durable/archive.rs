//! The directories of durable checkpoints: `checkpoints/SANDBOX/ID`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use deltalog::{commit, sync_directory};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::layers::{Layer, Layers, unneeded};
use super::manifest::Manifest;
use crate::error::{Doing, Result};
use crate::names;
use crate::report::CheckpointId;

/// What is being written has this behind its name.
const UNFINISHED: &str = "new";
/// What was deleted while others build on it has this behind its name.
const DELETED: &str = "deleted";
/// What is being removed has this before its number.
const REMOVED: &str = ".removed-";

/// All durable checkpoints of a state directory.
pub(crate) struct Archive {
    root: PathBuf,
    removals: AtomicU64,
}

/// The durable checkpoints of one sandbox.
#[derive(Default)]
pub(crate) struct Stored {
    pub(crate) used: Manifests,
    /// Those that were deleted while others build on them.
    pub(crate) deleted: Manifests,
}

/// By checkpoint; of one that cannot be read, why.
pub(crate) type Manifests = BTreeMap<CheckpointId, Result<Manifest, String>>;

impl Stored {
    /// All that can be read, older ones first.
    pub(crate) fn readable(&self) -> impl Iterator<Item = &Manifest> {
        self.all().flat_map(|(_, manifest)| manifest)
    }

    /// All, older ones first.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&CheckpointId, &Result<Manifest, String>)> {
        let mut all: Vec<_> = self.used.iter().chain(&self.deleted).collect();
        all.sort_by_key(|(id, _)| **id);
        all.into_iter()
    }

    /// The nearest checkpoint above this one that was not deleted.
    pub(crate) fn used_ancestor(&self, of: &Manifest) -> Option<CheckpointId> {
        let mut at = of.parent?;
        while !self.used.contains_key(&at) {
            at = self.deleted.get(&at)?.as_ref().ok()?.parent?;
        }
        Some(at)
    }

    /// What the checkpoints build on.
    fn layers(&self) -> Layers {
        let layers = self.all().map(|(id, manifest)| {
            let layer = Layer {
                parent: manifest.as_ref().ok().and_then(|m| m.parent),
                bytes: manifest.as_ref().map_or(0, Manifest::bytes),
                deleted: self.deleted.contains_key(id),
                readable: manifest.is_ok(),
            };
            (*id, layer)
        });
        layers.collect()
    }
}

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
            let name = file_name(&sandbox);
            // The service ended between a merge and this.
            for id in unneeded(&archive.of(&name)?.layers()) {
                if let Some(gone) = archive.take_away_deleted(&name, id)? {
                    remove(&gone)?;
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
            if !stored.used.is_empty() {
                all.insert(name, stored);
            }
        }
        Ok(all)
    }

    /// What there is of a sandbox.
    pub(crate) fn of(&self, sandbox: &str) -> Result<Stored> {
        let mut stored = Stored::default();
        for path in entries(&self.root.join(sandbox))? {
            let name = file_name(&path);
            let (id, into) = match name.split_once('.') {
                None => (&*name, &mut stored.used),
                Some((id, DELETED)) => (id, &mut stored.deleted),
                Some(_) => continue,
            };
            let Ok(id) = id.parse::<CheckpointId>() else {
                continue;
            };
            let manifest = Manifest::read(&path).map_err(|e| e.to_string());
            let manifest = manifest.and_then(|manifest| match manifest.id == id {
                true => Ok(manifest),
                false => Err(format!("{path:?} holds checkpoint {}", manifest.id)),
            });
            into.insert(id, manifest);
        }
        Ok(stored)
    }

    /// Where a checkpoint is.
    pub(crate) fn dir(&self, sandbox: &str, id: CheckpointId) -> PathBuf {
        self.root.join(sandbox).join(id.to_string())
    }

    /// Where a checkpoint is of which `deleted` tells whether it was deleted while others build on it.
    pub(crate) fn layer_dir(&self, sandbox: &str, id: CheckpointId, deleted: bool) -> PathBuf {
        let dir = self.dir(sandbox, id);
        match deleted {
            true => dir.with_extension(DELETED),
            false => dir,
        }
    }

    /// How much more the disk takes, in bytes.
    pub(crate) fn free_bytes(&self) -> Result<u64> {
        let disk = rustix::fs::statvfs(&self.root).doing("asking for the free disk space")?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    /// Writes a checkpoint: `fill` fills a directory, which then comes into being under its name. When this returns a
    /// power cut does not undo it.
    ///
    /// # Errors
    /// Nothing is left of it.
    pub(crate) fn write<T>(
        &self,
        sandbox: &str,
        id: CheckpointId,
        fill: impl FnOnce(&Path) -> Result<T>,
    ) -> Result<T> {
        let parent = self.root.join(sandbox);
        if !parent.exists() {
            fs::create_dir(&parent).doing(format!("making {}", parent.display()))?;
            sync_directory(&self.root)?;
        }
        let filled = self.begin(sandbox, id, fill)?;
        let new = self.new_dir(sandbox, id);
        let done = commit(&new, &self.dir(sandbox, id));
        if new.exists() {
            remove(&new)?;
        }
        done?;
        Ok(filled)
    }

    /// Writes a new version of a checkpoint, which does not count before [`Archive::replace`].
    ///
    /// # Errors
    /// Nothing is left of the new version.
    pub(crate) fn begin<T>(
        &self,
        sandbox: &str,
        id: CheckpointId,
        fill: impl FnOnce(&Path) -> Result<T>,
    ) -> Result<T> {
        let new = self.new_dir(sandbox, id);
        if new.exists() {
            remove(&new)?;
        }
        fs::create_dir(&new).doing(format!("making {}", new.display()))?;
        let filled = fill(&new);
        if filled.is_err() {
            remove(&new)?;
        }
        filled
    }

    /// Has the new version of a checkpoint in the place of the old one; when this returns a power cut does not undo it. What is left is for
    /// [`Archive::discard`].
    pub(crate) fn replace(&self, sandbox: &str, id: CheckpointId, deleted: bool) -> Result<()> {
        let new = self.new_dir(sandbox, id);
        let done = self.layer_dir(sandbox, id, deleted);
        sync_directory(&new)?;
        renameat_with(CWD, &new, CWD, &done, RenameFlags::EXCHANGE)
            .doing(format!("replacing {}", done.display()))?;
        Ok(sync_directory(&self.root.join(sandbox))?)
    }

    /// Deletes the version of a checkpoint that does not count.
    pub(crate) fn discard(&self, sandbox: &str, id: CheckpointId) -> Result<()> {
        remove(&self.new_dir(sandbox, id))
    }

    fn new_dir(&self, sandbox: &str, id: CheckpointId) -> PathBuf {
        self.dir(sandbox, id).with_extension(UNFINISHED)
    }

    /// Notes that a checkpoint was deleted. It is still there for those that build on it. When this returns a power cut does not undo it.
    pub(crate) fn set_aside(&self, sandbox: &str, id: CheckpointId) -> Result<()> {
        let path = self.dir(sandbox, id);
        let deleted = self.layer_dir(sandbox, id, true);
        match fs::rename(&path, deleted) {
            // Somebody has removed it by hand.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.doing(format!("deleting {}", path.display()))?,
        }
        Ok(sync_directory(&self.root.join(sandbox))?)
    }

    /// Takes a checkpoint that was deleted out, which nothing builds on any more. Its space is given back by removing
    /// what this returns, with [`Archive::remove`].
    pub(crate) fn take_away_deleted(
        &self,
        sandbox: &str,
        id: CheckpointId,
    ) -> Result<Option<PathBuf>> {
        let path = self.layer_dir(sandbox, id, true);
        let gone = match path.exists() {
            true => Some(self.take_away(&path)?),
            false => None,
        };
        // Kept while others are in it.
        let _ = fs::remove_dir(self.root.join(sandbox));
        Ok(gone)
    }

    /// Gives the space of what was taken away back.
    pub(crate) fn remove(&self, gone: &Path) -> Result<()> {
        remove(gone)
    }

    /// Deletes all checkpoints of a sandbox, and gives their space back.
    pub(crate) fn remove_all(&self, sandbox: &str) -> Result<()> {
        let path = self.root.join(sandbox);
        match path.exists() {
            true => remove(&self.take_away(&path)?),
            false => Ok(()),
        }
    }

    /// Takes the name away at once, so that half of it is never found. Returns the name that it has until it is removed.
    fn take_away(&self, path: &Path) -> Result<PathBuf> {
        let number = self.removals.fetch_add(1, Ordering::Relaxed);
        let gone = self.root.join(format!("{REMOVED}{number}"));
        fs::rename(path, &gone).doing(format!("removing {}", path.display()))?;
        if let Some(parent) = path.parent() {
            sync_directory(parent)?;
        }
        sync_directory(&self.root)?;
        Ok(gone)
    }
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
