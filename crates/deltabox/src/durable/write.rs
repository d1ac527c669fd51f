//! Writing a checkpoint.

use std::panic::resume_unwind;
use std::path::Path;
use std::thread::{Builder, Scope, ScopedJoinHandle};

use super::archive::Archive;
use super::manifest::{Manifest, Origin, kernel};
use super::sessions;
use crate::clocks::Reading;
use crate::error::{Doing, Result};
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

/// Writes a checkpoint; when this returns it is on disk. `epoch` is the sandbox's now. Returns what it takes, in bytes.
///
/// # Errors
/// It could not be written. Nothing is left of it, nothing else is touched.
pub(crate) fn write(archive: &Archive, draft: &Draft, origin: &Origin, epoch: u64) -> Result<u64> {
    archive.write(&origin.sandbox, draft.id, |dir| {
        fill(dir, draft, origin, epoch)
    })
}

/// Writes a new version of a checkpoint that is on disk. It does not count before [`Archive::replace`]. Returns what it takes, in bytes.
///
/// # Errors
/// As [`write`].
pub(crate) fn rewrite(
    archive: &Archive,
    draft: &Draft,
    origin: &Origin,
    epoch: u64,
) -> Result<u64> {
    archive.begin(&origin.sandbox, draft.id, |dir| {
        fill(dir, draft, origin, epoch)
    })
}

fn fill(dir: &Path, draft: &Draft, origin: &Origin, epoch: u64) -> Result<u64> {
    let content = &draft.content;
    let before = draft.before.as_ref().map(|(_, before)| before);
    let files = || Ok(content.files().save(dir, before.map(Content::files))?);
    let processes = || -> Result<_> {
        let before = before.map(Content::processes);
        Ok(content.processes().save(dir, before)?)
    };
    let sessions = || {
        let before = before.map(Content::sessions);
        sessions::write(content.sessions(), before, dir)
    };
    // Side by side, since each waits for the disk most of the time.
    let (files, image) = std::thread::scope(|scope| -> Result<_> {
        let files = beside(scope, files)?;
        let sessions = beside(scope, sessions)?;
        let image = processes();
        let (files, sessions) = (finished(files), finished(sessions));
        sessions?;
        Ok((files?, image?))
    })?;
    let manifest = Manifest {
        id: draft.id,
        parent: draft.before.as_ref().map(|(id, _)| *id),
        message: draft.message.clone(),
        created: draft.created,
        processes: draft.processes,
        origin: origin.clone(),
        epoch,
        kernel: kernel(),
        clocks: Some(Reading::now()),
        files,
        image,
    };
    manifest.write(dir)?;
    Ok(manifest.bytes())
}

type Part<'scope, T> = ScopedJoinHandle<'scope, Result<T>>;

fn beside<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    part: impl FnOnce() -> Result<T> + Send + 'scope,
) -> Result<Part<'scope, T>> {
    let thread = Builder::new().name("persist".to_owned());
    let started = thread.spawn_scoped(scope, part);
    started.doing("starting a thread that writes a checkpoint")
}

fn finished<T>(part: Part<'_, T>) -> Result<T> {
    // A panic goes on here.
    part.join().unwrap_or_else(|panic| resume_unwind(panic))
}
