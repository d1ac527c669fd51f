//! Reading the checkpoints of a sandbox.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use deltacr::TreeImage;
use deltacr::store::PageStore;
use deltafs::{Loader, Snapshot};

use super::archive::{Archive, Stored};
use super::manifest::{Manifest, kernel};
use super::sessions;
use crate::error::Result;
use crate::report::CheckpointId;

/// Files and processes of a checkpoint.
pub(crate) struct Loaded {
    pub(crate) files: Snapshot,
    pub(crate) processes: TreeImage,
}

/// Reads the files and processes of all checkpoints of one sandbox, those included that were deleted.
pub(crate) struct Reader<'a> {
    pub(crate) archive: &'a Archive,
    pub(crate) sandbox: &'a str,
    pub(crate) pages: &'a PageStore,
}

impl Reader<'_> {
    /// Reads what can be read; of the others, why not.
    pub(crate) fn read(
        &self,
        stored: &Stored,
        loader: &mut Loader,
    ) -> BTreeMap<CheckpointId, Result<Loaded, String>> {
        let mut all: BTreeMap<CheckpointId, Result<Loaded, String>> = BTreeMap::new();
        // A parent's id is below its children's.
        for (id, manifest) in stored.all() {
            let deleted = stored.deleted.contains_key(id);
            let dir = self.archive.layer_dir(self.sandbox, *id, deleted);
            let loaded = match manifest {
                Ok(manifest) => self.read_one(&dir, manifest, &all, loader),
                Err(why) => Err(why.clone()),
            };
            all.insert(*id, loaded);
        }
        all
    }

    fn read_one(
        &self,
        dir: &Path,
        manifest: &Manifest,
        others: &BTreeMap<CheckpointId, Result<Loaded, String>>,
        loader: &mut Loader,
    ) -> Result<Loaded, String> {
        let now = kernel();
        if manifest.kernel != now {
            let then = &manifest.kernel;
            return Err(format!("it was made under Linux {then}, and this is {now}"));
        }
        let before = match manifest.parent {
            None => None,
            Some(parent) => match others.get(&parent) {
                Some(Ok(before)) => Some(before),
                Some(Err(why)) => return Err(format!("it builds on {parent}: {why}")),
                None => return Err(format!("it builds on {parent}, which is missing")),
            },
        };
        let files = loader.load(dir, before.map(|before| &before.files));
        let files = files.map_err(|e| e.to_string())?;
        let processes = TreeImage::load(dir, before.map(|b| &b.processes), self.pages);
        let loaded = Loaded {
            files,
            processes: processes.map_err(|e| e.to_string())?,
        };
        match loaded.changed_program(loader) {
            None => Ok(loaded),
            Some(path) => Err(format!(
                "its processes use {} of the base, which has changed",
                path.display()
            )),
        }
    }
}

impl Loaded {
    /// A file of the base that a process has in its memory, and that is another now.
    fn changed_program(&self, loader: &Loader) -> Option<PathBuf> {
        let changed = loader.changed_base();
        let mapped = self.processes.mapped_inodes();
        let mapped = mapped.into_iter().filter(|ino| self.files.shows_base(*ino));
        let mut mapped = mapped.chain(self.processes.mapped_of_base());
        mapped.find_map(|ino| changed.get(&ino).cloned())
    }
}

/// Reads all files of a checkpoint and checks every byte of them.
///
/// # Errors
/// One is damaged; the error names it.
pub(crate) fn verify(dir: &Path) -> Result<()> {
    Manifest::read(dir)?;
    deltafs::verify_layer(dir)?;
    deltacr::verify_image(dir)?;
    sessions::verify(dir)
}
