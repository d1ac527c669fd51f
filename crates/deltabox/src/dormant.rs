//! Sandboxes that are on disk only: those of a service that has ended. They wake up when they are needed.

use std::path::PathBuf;

use parking_lot::Mutex;

use crate::clocks::Reading;
use crate::durable::{Origin, Stored};
use crate::report::{
    CheckpointId, CheckpointInfo, CheckpointState, SandboxInfo, SandboxState, Tree,
};
use crate::spec::SandboxSpec;

/// Epochs of a sandbox that was on disk begin at the next multiple of this: none that the service before counted, and a
/// client may still name, comes again.
const EPOCHS: u64 = 1000;

/// See the module's description.
pub(crate) struct Dormant {
    pub(crate) name: String,
    pub(crate) stored: Stored,
    /// Held by whoever wakes it up, or removes it.
    pub(crate) gate: Mutex<()>,
}

impl Dormant {
    pub(crate) fn new(name: String, stored: Stored) -> Self {
        Self {
            name,
            stored,
            gate: Mutex::default(),
        }
    }

    /// What it was created as, if any of its checkpoints can tell.
    pub(crate) fn origin(&self) -> Option<&Origin> {
        let newest = self.stored.readable().last();
        newest.map(|manifest| &manifest.origin)
    }

    /// What it is to be made as again. Its clocks go on where they were last, if it has its own.
    pub(crate) fn spec(&self) -> Option<SandboxSpec> {
        let mut spec = self.origin()?.spec.clone();
        let now = Reading::now();
        let readable = self.stored.readable();
        let offsets = readable.filter_map(|manifest| {
            let then = manifest.origin.spec.time_namespace?;
            let clocks = manifest.clocks.as_ref()?;
            Some(clocks.continued(then, &now))
        });
        spec.time_namespace = offsets.max_by_key(|offsets| offsets.monotonic);
        Some(spec)
    }

    /// The epoch that it wakes up in.
    pub(crate) fn epoch(&self) -> u64 {
        let epochs = self.stored.readable().map(|m| m.epoch);
        (epochs.max().unwrap_or(0) / EPOCHS + 1) * EPOCHS
    }

    /// Why it cannot be woken up, if so.
    pub(crate) fn lost(&self) -> Option<String> {
        if self.origin().is_some() {
            return None;
        }
        let why = self
            .stored
            .used
            .values()
            .find_map(|stored| stored.as_ref().err());
        Some(format!(
            "none of its durable checkpoints can be read: {}",
            why.map_or("", String::as_str)
        ))
    }

    pub(crate) fn info(&self) -> SandboxInfo {
        let state = match self.lost() {
            Some(reason) => SandboxState::Failed { reason },
            None => SandboxState::Stopped,
        };
        let readable = || self.stored.used.values().flatten();
        let origin = self.origin();
        SandboxInfo {
            name: self.name.clone(),
            state,
            base: origin.map_or_else(PathBuf::new, |origin| origin.spec.base.clone()),
            current: None,
            epoch: self.epoch(),
            created: origin.map_or(0, |origin| origin.created),
            checkpoints: self.stored.used.len(),
            durable: readable().count(),
            processes: 0,
            file_bytes: readable().map(|m| m.files.data_bytes).sum(),
            page_bytes: readable().map(|m| m.image.page_bytes).sum(),
            warnings: Vec::new(),
        }
    }

    pub(crate) fn tree(&self) -> Tree {
        let nodes = self.stored.used.iter();
        let nodes = nodes.map(|(id, stored)| match stored {
            Err(why) => unreadable(*id, why),
            Ok(manifest) => CheckpointInfo {
                id: *id,
                parent: self.stored.used_ancestor(manifest),
                message: manifest.message.clone(),
                created: manifest.created,
                processes: manifest.processes,
                current: false,
                state: CheckpointState::Durable,
            },
        });
        Tree {
            nodes: nodes.collect(),
        }
    }
}

/// A checkpoint of which nothing can be read.
pub(crate) fn unreadable(id: CheckpointId, why: &str) -> CheckpointInfo {
    CheckpointInfo {
        id,
        parent: None,
        message: None,
        created: 0,
        processes: 0,
        current: false,
        state: CheckpointState::Failed {
            reason: why.to_owned(),
        },
    }
}
