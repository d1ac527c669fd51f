//! Checkpoints of a sandbox that are on disk.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Sandbox;
use crate::dormant::Dormant;
use crate::durable::{self, Draft, Loaded, Origin, SessionReader};
use crate::error::{Error, Result};
use crate::report::{CheckpointId, CheckpointReport};
use crate::sessions_image::SessionsImage;
use crate::state::{Lost, TakenUp};

impl Sandbox {
    /// Checkpoints the sandbox as [`Sandbox::checkpoint`] does, lets it run on, and returns when the checkpoint is on disk.
    ///
    /// # Errors
    /// As [`Sandbox::checkpoint`]; and [`Error::NotDurable`] if the checkpoint is in memory only.
    pub fn checkpoint_durable(&self, message: Option<String>) -> Result<CheckpointReport> {
        let begin = Instant::now();
        let report = self.checkpoint(message)?;
        self.persist(report.id)?;
        Ok(CheckpointReport {
            total: begin.elapsed(),
            ..report
        })
    }

    /// Makes a checkpoint durable; returns when it is on disk.
    ///
    /// # Errors
    /// There is no such checkpoint; or [`Error::NotDurable`], and the checkpoint says why from then on. It can still be
    /// rolled back to.
    pub fn persist(&self, id: CheckpointId) -> Result<()> {
        let _disk = self.disk.lock();
        let Some(draft) = self.state.lock().draft(id)? else {
            return Ok(());
        };
        self.write(&draft).map_err(|e| {
            self.state.lock().not_written(id, e.to_string());
            Error::NotDurable {
                id,
                source: Box::new(e),
            }
        })
    }

    /// The caller holds `disk`.
    fn write(&self, draft: &Draft) -> Result<()> {
        self.shared().check_open(&self.name)?;
        let archive = &self.common.archive;
        let bytes = durable::write(archive, draft, &self.durable_origin(), self.epoch())?;
        let before = draft.before.as_ref().map(|(id, _)| *id);
        self.state.lock().written(draft.id, before, bytes);
        Ok(())
    }

    pub(super) fn durable_origin(&self) -> Origin {
        Origin {
            sandbox: self.name.clone(),
            created: self.created,
            first_id: self.first_id,
            spec: self.spec.clone(),
        }
    }

    /// Forgets a checkpoint. Its children become its parent's. What is on disk of it is deleted at once if nothing
    /// builds on it, and otherwise merged into what does when that pays, in the background.
    ///
    /// # Errors
    /// There is no such checkpoint; or the disk refuses, and it is still there.
    pub fn delete(&self, id: CheckpointId) -> Result<()> {
        let _disk = self.disk.lock();
        self.shared().check_open(&self.name)?;
        let on_disk = self.state.lock().is_on_disk(id);
        if on_disk {
            self.common.archive.set_aside(&self.name, id)?;
        }
        self.state.lock().delete(id)?;
        if on_disk {
            self.common.compactor.wake(&self.name);
        }
        Ok(())
    }

    /// Returns when nothing is being written of it. After [`Sandbox::close`] nothing will be.
    pub(crate) fn wait_for_disk(&self) {
        drop(self.merging.lock());
        drop(self.disk.lock());
    }

    /// Has its user warned, and told with every rollback.
    pub(crate) fn warn(&self, warning: Option<String>) {
        if let Some(warning) = warning {
            self.state.lock().note(warning.clone());
            self.warnings.lock().push(warning);
        }
    }

    /// Takes up, stopped, what was on disk of a sandbox: it has just been assembled.
    pub(crate) fn take_up(
        &mut self,
        dormant: &Dormant,
        mut loaded: BTreeMap<CheckpointId, Result<Loaded, String>>,
    ) {
        let shared = &self.sessions.shared;
        shared.stopped.store(true, Ordering::Release);
        shared.epoch.store(dormant.epoch(), Ordering::Release);
        let mut reader = SessionReader::new(shared);
        let mut read: BTreeMap<CheckpointId, SessionsImage> = BTreeMap::new();
        let state = self.state.get_mut();
        let stored = &dormant.stored;
        for (id, manifest) in stored.all() {
            let deleted = stored.deleted.contains_key(id);
            let before = manifest.as_ref().ok().and_then(|m| m.parent);
            let usable = loaded
                .remove(id)
                .unwrap_or_else(|| Err("it was not read".to_owned()));
            let usable = usable.and_then(|loaded| {
                let before = match before {
                    Some(parent) => {
                        let unusable = || format!("it builds on {parent}, which cannot be used");
                        Some(read.get(&parent).ok_or_else(unusable)?)
                    }
                    None => None,
                };
                let archive = &self.common.archive;
                let dir = archive.layer_dir(&dormant.name, *id, deleted);
                let sessions = reader.read(&dir, before).map_err(|e| e.to_string())?;
                let manifest = manifest.as_ref().map_err(String::clone)?;
                Ok::<_, String>((manifest, loaded, sessions))
            });
            match usable {
                Ok((manifest, loaded, sessions)) => {
                    read.insert(*id, sessions.clone());
                    state.take_up(TakenUp {
                        manifest,
                        loaded,
                        sessions,
                        parent: stored.used_ancestor(manifest),
                        deleted,
                    });
                }
                Err(why) => state.lose(*id, Lost { why, before }, deleted),
            }
        }
        shared.table.lock().last = reader.last();
        if let Some(origin) = dormant.origin() {
            self.created = origin.created;
        }
    }
}
