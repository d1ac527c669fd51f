//! Writing a checkpoint.

use super::archive::Archive;
use super::manifest::{Manifest, Origin, kernel};
use super::sessions;
use crate::error::Result;
use crate::report::CheckpointId;
use crate::state::Content;

/// A checkpoint that is to be written.
pub(crate) struct Draft {
    pub(crate) id: CheckpointId,
    pub(crate) message: Option<String>,
    pub(crate) created: u64,
    pub(crate) processes: usize,
    pub(crate) content: Content,
    /// The durable checkpoint that it is written against.
    pub(crate) before: Option<(CheckpointId, Content)>,
}

/// Writes a checkpoint; when this returns it is on disk. `epoch` is the sandbox's now.
///
/// # Errors
/// It could not be written. Nothing is left of it, nothing else is touched.
pub(crate) fn write(archive: &Archive, draft: &Draft, origin: &Origin, epoch: u64) -> Result<()> {
    let content = &draft.content;
    let before = draft.before.as_ref().map(|(_, before)| before);
    archive.write(&origin.sandbox, draft.id, |dir| {
        let files = content.files().save(dir, before.map(Content::files))?;
        let image = content
            .processes()
            .save(dir, before.map(Content::processes))?;
        let sessions = before.map(Content::sessions);
        sessions::write(content.sessions(), sessions, origin.first_id, dir)?;
        let manifest = Manifest {
            id: draft.id,
            parent: draft.before.as_ref().map(|(id, _)| *id),
            message: draft.message.clone(),
            created: draft.created,
            processes: draft.processes,
            origin: origin.clone(),
            epoch,
            kernel: kernel(),
            files,
            image,
        };
        manifest.write(dir)?;
        Ok(())
    })
}
