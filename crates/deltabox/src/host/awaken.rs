//! Sandboxes of a service that has ended, seen by the host.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use deltafs::{Loader, Options};

use super::{FILE_THREADS, Host, open_directory};
use crate::dormant::Dormant;
use crate::durable::{Reader, Stored};
use crate::error::{Doing, Error, Result};
use crate::names;
use crate::report::{CheckpointId, LayerReport, SandboxInfo, SessionInfo, Tree};
use crate::sandbox::Sandbox;

impl Host {
    /// Finds the sandboxes of services that have ended; a sentence for each.
    pub(super) fn find_dormant(&self, all: BTreeMap<String, Stored>) -> Vec<String> {
        let mut sentences = Vec::new();
        for (name, stored) in all {
            let sandbox = Dormant::new(name.clone(), stored);
            let first_id = sandbox.origin().map(|origin| origin.first_id);
            if !self.ground.hold(&name, first_id) {
                sentences.push(format!("Sandbox {name:?} is left out: there are too many."));
                continue;
            }
            sentences.push(match sandbox.lost() {
                None => format!(
                    "Kept {} of sandbox {name:?}, which is stopped.",
                    durable(sandbox.stored.used.len())
                ),
                Some(why) => format!("Sandbox {name:?} cannot be used: {why}."),
            });
            self.dormant.lock().insert(name, Arc::new(sandbox));
        }
        sentences
    }

    /// Makes a sandbox of one that is on disk: stopped, with all its checkpoints.
    pub(super) fn awaken(&self, dormant: &Dormant) -> Result<Arc<Sandbox>> {
        let _gate = dormant.gate.lock();
        let name = &dormant.name;
        if let Some(sandbox) = self.ground.get(name) {
            return Ok(sandbox);
        }
        let held = self.ground.held(name).filter(|_| self.find(name).is_some());
        let place = held.ok_or_else(|| Error::NoSandbox(name.clone()))?;
        let Some(spec) = dormant.spec() else {
            return Err(Error::NotRunning {
                name: name.clone(),
                state: dormant.lost().unwrap_or_default(),
            });
        };
        let common = &self.ground.common;
        let (base, hidden) = names::check_base(&spec.base, &self.ground.state_dir)?;
        let base = open_directory(&base)?;
        let mut loaded = BTreeMap::new();
        let mut changed = BTreeMap::new();
        let _busy = self.warm.pause();
        let blank = self.ground.blank(place, spec, |ids, data_dir| {
            fs::create_dir_all(&data_dir).doing(format!("making {}", data_dir.display()))?;
            let mut loader = Loader::new(Options {
                base,
                hidden,
                ids,
                data_dir,
                threads: FILE_THREADS,
            })?;
            let reader = Reader {
                archive: &common.archive,
                sandbox: name,
                pages: &common.pages,
            };
            loaded = reader.read(&dormant.stored, &mut loader);
            changed.clone_from(loader.changed_base());
            let volume = loader.mount()?;
            // What is mounted in it is to find the places that it had before, which all checkpoints have.
            if let Some(newest) = loaded.values().rev().flatten().next() {
                volume.rollback(&newest.files)?;
            }
            Ok(volume)
        })?;
        let (mut sandbox, place) = self.ground.settle(blank)?;
        sandbox.take_up(dormant, loaded);
        sandbox.warn(changed_base(&changed));
        let sandbox = Arc::new(sandbox);
        place.keep(Arc::clone(&sandbox));
        // It was in the middle of a merge, perhaps; and is found by its name only from here on.
        self.ground.common.compactor.wake(name);
        self.dormant.lock().remove(name);
        Ok(sandbox)
    }

    /// Removes a sandbox that is on disk only.
    pub(super) fn remove_dormant(&self, dormant: &Dormant) -> Result<()> {
        let _gate = dormant.gate.lock();
        if self.dormant.lock().remove(&dormant.name).is_none() {
            // It has woken up meanwhile, or is gone.
            return self.remove(&dormant.name);
        }
        let removed = self.ground.common.archive.remove_all(&dormant.name);
        self.ground.release(&dormant.name);
        removed
    }

    pub(super) fn find(&self, name: &str) -> Option<Arc<Dormant>> {
        self.dormant.lock().get(name).cloned()
    }

    /// The sandbox of this name, unless it is on disk only.
    ///
    /// # Errors
    /// There is none; or it is on disk only, and so is stopped.
    pub fn get_awake(&self, name: &str) -> Result<Arc<Sandbox>> {
        match self.find(name) {
            None => self.get(name),
            Some(_) => Err(Error::NotRunning {
                name: name.to_owned(),
                state: "stopped".to_owned(),
            }),
        }
    }

    /// What all sandboxes are and how they are doing, by name; also of those that are on disk only.
    pub fn infos(&self) -> Vec<SandboxInfo> {
        let dormant: Vec<_> = self.dormant.lock().values().map(|d| d.info()).collect();
        let awake = self.list();
        let mut all: Vec<_> = awake.iter().map(|sandbox| sandbox.info()).collect();
        for info in dormant {
            if all.iter().all(|other| other.name != info.name) {
                all.push(info);
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// What a sandbox is and how it is doing. One that is on disk only stays so.
    pub fn info(&self, name: &str) -> Result<SandboxInfo> {
        match self.find(name) {
            Some(dormant) => Ok(dormant.info()),
            None => Ok(self.get(name)?.info()),
        }
    }

    /// The tree of checkpoints of a sandbox. One that is on disk only stays so.
    pub fn tree(&self, name: &str) -> Result<Tree> {
        match self.find(name) {
            Some(dormant) => Ok(dormant.tree()),
            None => Ok(self.get(name)?.tree()),
        }
    }

    /// The sessions of a sandbox; none of one that is on disk only.
    pub fn sessions(&self, name: &str) -> Result<Vec<SessionInfo>> {
        match self.find(name) {
            Some(_) => Ok(Vec::new()),
            None => Ok(self.get(name)?.sessions()),
        }
    }

    /// The durable checkpoints of a sandbox, or of all, as they are on disk. With `verify` every byte of them is read and
    /// checked.
    pub fn layers(&self, name: Option<&str>, verify: bool) -> Result<Vec<LayerReport>> {
        let archive = &self.ground.common.archive;
        let all = match name {
            None => archive.list()?,
            Some(name) => {
                self.info(name)?;
                BTreeMap::from([(name.to_owned(), archive.of(name)?)])
            }
        };
        let mut reports = Vec::new();
        for (sandbox, stored) in all {
            for (id, manifest) in stored.all() {
                let deleted = stored.deleted.contains_key(id);
                let dir = archive.layer_dir(&sandbox, *id, deleted);
                let damage = match manifest {
                    Err(why) => Some(why.clone()),
                    Ok(_) if verify => crate::durable::verify(&dir).err().map(|e| e.to_string()),
                    Ok(_) => None,
                };
                let manifest = manifest.as_ref().ok();
                let files = manifest.map(|m| m.files).unwrap_or_default();
                let image = manifest.map(|m| m.image).unwrap_or_default();
                reports.push(LayerReport {
                    sandbox: sandbox.clone(),
                    id: *id,
                    parent: manifest.and_then(|m| m.parent),
                    created: manifest.map_or(0, |m| m.created),
                    inodes: files.inodes,
                    file_bytes: files.data_bytes,
                    processes: image.processes,
                    page_bytes: image.page_bytes,
                    verified: verify,
                    damage,
                    deleted,
                });
            }
        }
        Ok(reports)
    }
}

/// What is told of files of the base that are others than when a checkpoint was made.
fn changed_base(changed: &BTreeMap<u64, PathBuf>) -> Option<String> {
    const NAMED: usize = 5;
    let paths: Vec<String> = changed.values().map(|p| p.display().to_string()).collect();
    let more = match paths.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let named = paths.get(..NAMED.min(paths.len()))?.join(", ");
    (!paths.is_empty()).then(|| {
        format!("files of the base have changed since its checkpoints were made: {named}{more}")
    })
}

fn durable(n: usize) -> String {
    match n {
        1 => "the durable checkpoint".to_owned(),
        n => format!("the {n} durable checkpoints"),
    }
}

/// The highest id of a durable checkpoint.
pub(super) fn highest(all: &BTreeMap<String, Stored>) -> u64 {
    let ids = all
        .values()
        .flat_map(|stored| stored.all().map(|(id, _)| id));
    ids.max().map_or(0, |CheckpointId(n)| *n)
}
