//! The part of the state that is on disk, too.

use super::tree::{Disk, Node};
use super::{Content, Deleted, DeltaState, Lost};
use crate::durable::{Draft, Layer, Layers, Loaded, Manifest};
use crate::error::{Error, Result};
use crate::report::CheckpointId;
use crate::sessions_image::SessionsImage;

/// A checkpoint that was read from disk.
pub(crate) struct TakenUp<'a> {
    pub(crate) manifest: &'a Manifest,
    pub(crate) loaded: Loaded,
    pub(crate) sessions: SessionsImage,
    /// Where it stands in the tree.
    pub(crate) parent: Option<CheckpointId>,
    /// It is there only for others that build on it.
    pub(crate) deleted: bool,
}

impl From<Lost> for Deleted {
    fn from(lost: Lost) -> Self {
        Self {
            before: lost.before,
            bytes: 0,
            node: None,
        }
    }
}

impl DeltaState {
    /// How many checkpoints are on disk.
    pub(crate) fn durable(&self) -> usize {
        self.checkpoints.durable()
    }

    /// What is to be written to make a checkpoint durable; `None` if it is.
    pub(crate) fn draft(&self, id: CheckpointId) -> Result<Option<Draft>> {
        let node = self.node(id)?;
        if matches!(node.disk, Disk::Durable { .. }) {
            return Ok(None);
        }
        self.draft_against(id, self.checkpoints.durable_ancestor(id))
            .map(Some)
    }

    /// What is to be written of a checkpoint, against another one. Both may be deleted.
    pub(crate) fn draft_against(
        &self,
        id: CheckpointId,
        before: Option<CheckpointId>,
    ) -> Result<Draft> {
        let node = self.layer_node(id)?;
        let before = before.map(|id| Ok::<_, Error>((id, self.layer_node(id)?.content.clone())));
        Ok(Draft {
            id,
            message: node.message.clone(),
            created: node.created,
            processes: node.processes,
            content: node.content.clone(),
            before: before.transpose()?,
        })
    }

    fn layer_node(&self, id: CheckpointId) -> Result<&Node<Content>> {
        let deleted = self.deleted.get(&id);
        let deleted = deleted.and_then(|deleted| deleted.node.as_ref());
        deleted.map_or_else(|| self.node(id), Ok)
    }

    /// Notes that a checkpoint was written against another one, and takes so many bytes.
    pub(crate) fn written(&mut self, id: CheckpointId, before: Option<CheckpointId>, bytes: u64) {
        if let Some(deleted) = self.deleted.get_mut(&id) {
            (deleted.before, deleted.bytes) = (before, bytes);
        }
        let disk = Disk::Durable { before, bytes };
        self.checkpoints.set_disk(id, disk);
    }

    /// Notes why a checkpoint could not be written.
    pub(crate) fn not_written(&mut self, id: CheckpointId, why: String) {
        self.checkpoints.set_disk(id, Disk::Failed(why));
    }

    /// Whether there is something of a checkpoint on disk.
    pub(crate) fn is_on_disk(&self, id: CheckpointId) -> bool {
        let durable = |node: &Node<_>| matches!(node.disk, Disk::Durable { .. });
        self.lost.contains_key(&id) || self.checkpoints.get(id).is_some_and(durable)
    }

    /// Forgets a checkpoint. Its children become its parent's. If it is on disk, it stays there until
    /// [`DeltaState::removed`].
    pub(crate) fn delete(&mut self, id: CheckpointId) -> Result<()> {
        if let Some(lost) = self.lost.remove(&id) {
            self.deleted.insert(id, lost.into());
            return Ok(());
        }
        let sandbox = self.name.clone();
        let removed = self.checkpoints.remove(id);
        self.common.templates.remove(id);
        let node = removed.ok_or(Error::NoCheckpoint { sandbox, id })?;
        if let Disk::Durable { before, bytes } = node.disk {
            let node = Some(node);
            let deleted = Deleted {
                before,
                bytes,
                node,
            };
            self.deleted.insert(id, deleted);
        }
        Ok(())
    }

    /// What the checkpoints on disk build on.
    pub(crate) fn layers(&self) -> Layers {
        let used = self
            .checkpoints
            .iter()
            .filter_map(|(id, node)| match node.disk {
                Disk::Durable { before, bytes } => Some((*id, layer(before, bytes, false, true))),
                _ => None,
            });
        let lost = self.lost.iter();
        let lost = lost.map(|(id, lost)| (*id, layer(lost.before, 0, false, false)));
        let deleted = self.deleted.iter();
        let deleted =
            deleted.map(|(id, d)| (*id, layer(d.before, d.bytes, true, d.node.is_some())));
        used.chain(lost).chain(deleted).collect()
    }

    /// Of a checkpoint on disk, whether it is deleted; `None` if there is none.
    pub(crate) fn is_deleted(&self, id: CheckpointId) -> Option<bool> {
        match self.deleted.contains_key(&id) {
            true => Some(true),
            false => self.is_on_disk(id).then_some(false),
        }
    }

    /// Takes a checkpoint up that was read from disk.
    pub(crate) fn take_up(&mut self, taken: TakenUp<'_>) {
        let TakenUp {
            manifest,
            loaded,
            sessions,
            parent,
            deleted,
        } = taken;
        let content = Content {
            files: loaded.files,
            processes: loaded.processes,
            sessions,
        };
        let (before, bytes) = (manifest.parent, manifest.bytes());
        let node = Node {
            parent,
            message: manifest.message.clone(),
            created: manifest.created,
            processes: manifest.processes,
            content,
            disk: Disk::Durable { before, bytes },
        };
        if deleted {
            let node = Some(node);
            let deleted = Deleted {
                before,
                bytes,
                node,
            };
            self.deleted.insert(manifest.id, deleted);
        } else {
            self.checkpoints.put(manifest.id, node);
        }
    }

    /// Knows a checkpoint that cannot be used.
    pub(crate) fn lose(&mut self, id: CheckpointId, lost: Lost, deleted: bool) {
        match deleted {
            true => drop(self.deleted.insert(id, lost.into())),
            false => drop(self.lost.insert(id, lost)),
        }
    }

    /// Notes that nothing is on disk any more of a checkpoint that was deleted.
    pub(crate) fn removed(&mut self, id: CheckpointId) {
        self.deleted.remove(&id);
    }

    /// Has something told with every rollback.
    pub(crate) fn note(&mut self, note: String) {
        self.notes.push(note);
    }
}

fn layer(parent: Option<CheckpointId>, bytes: u64, deleted: bool, readable: bool) -> Layer {
    Layer {
        parent,
        bytes,
        deleted,
        readable,
    }
}
