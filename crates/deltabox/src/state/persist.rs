//! The part of the state that is on disk, too.

use std::collections::BTreeMap;

use super::tree::{Disk, Node};
use super::{Content, DeltaState};
use crate::durable::{Draft, Loaded, Manifest};
use crate::error::{Error, Result};
use crate::report::CheckpointId;
use crate::sessions_image::SessionsImage;

impl DeltaState {
    /// How many checkpoints are on disk.
    pub(crate) fn durable(&self) -> usize {
        self.checkpoints.durable()
    }

    /// What is to be written to make a checkpoint durable; `None` if it is.
    pub(crate) fn draft(&self, id: CheckpointId) -> Result<Option<Draft>> {
        let node = self.node(id)?;
        if matches!(node.disk, Disk::Durable(_)) {
            return Ok(None);
        }
        self.draft_against(id, self.checkpoints.durable_ancestor(id))
            .map(Some)
    }

    /// What is to be written of a checkpoint, against another one.
    pub(crate) fn draft_against(
        &self,
        id: CheckpointId,
        before: Option<CheckpointId>,
    ) -> Result<Draft> {
        let node = self.node(id)?;
        let before = before.map(|id| Ok::<_, Error>((id, self.content(id)?)));
        Ok(Draft {
            id,
            message: node.message.clone(),
            created: node.created,
            processes: node.processes,
            content: node.content.clone(),
            before: before.transpose()?,
        })
    }

    /// Notes that a checkpoint was written against another one.
    pub(crate) fn written(&mut self, id: CheckpointId, before: Option<CheckpointId>) {
        self.checkpoints.set_disk(id, Disk::Durable(before));
    }

    /// Notes why a checkpoint could not be written.
    pub(crate) fn not_written(&mut self, id: CheckpointId, why: String) {
        self.checkpoints.set_disk(id, Disk::Failed(why));
    }

    /// The durable checkpoints that must be written anew before this one can go, and against which one; `None` if it is not
    /// on disk itself.
    pub(crate) fn built_on(
        &self,
        id: CheckpointId,
    ) -> Option<(Vec<CheckpointId>, Option<CheckpointId>)> {
        if self.lost.contains_key(&id) {
            return Some((Vec::new(), None));
        }
        match self.checkpoints.get(id)?.disk {
            Disk::Durable(before) => Some((self.checkpoints.built_on(id), before)),
            _ => None,
        }
    }

    /// Forgets a checkpoint. Its children become its parent's.
    pub(crate) fn delete(&mut self, id: CheckpointId) -> Result<()> {
        if self.lost.remove(&id).is_some() {
            return Ok(());
        }
        let sandbox = self.name.clone();
        let removed = self.checkpoints.remove(id);
        self.common.templates.remove(id);
        removed.map(drop).ok_or(Error::NoCheckpoint { sandbox, id })
    }

    /// Takes a checkpoint up that was read from disk.
    pub(crate) fn take_up(&mut self, manifest: &Manifest, loaded: Loaded, sessions: SessionsImage) {
        let content = Content {
            files: loaded.files,
            processes: loaded.processes,
            sessions,
        };
        let node = Node {
            parent: manifest.parent,
            message: manifest.message.clone(),
            created: manifest.created,
            processes: manifest.processes,
            content,
            disk: Disk::Durable(manifest.parent),
        };
        self.checkpoints.put(manifest.id, node);
    }

    /// Knows checkpoints that cannot be used.
    pub(crate) fn lose(&mut self, lost: BTreeMap<CheckpointId, String>) {
        self.lost.extend(lost);
    }

    /// Has something told with every rollback.
    pub(crate) fn note(&mut self, note: String) {
        self.notes.push(note);
    }
}
