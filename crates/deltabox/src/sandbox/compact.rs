//! What becomes of checkpoints of a sandbox that were deleted, on disk.

use std::io;
use std::sync::atomic::Ordering;

use super::Sandbox;
use crate::durable::{self, Merge, next_merge, unneeded};
use crate::error::{Doing, Result};

impl Sandbox {
    /// Removes deleted checkpoints that nothing builds on, and merges those that it pays to merge, until nothing is left to do.
    /// Checkpoints are made and deleted meanwhile. It can be interrupted by whatever may come: at every moment all checkpoints are whole on disk.
    ///
    /// # Errors
    /// The disk refuses, or lacks the space for a merge; what is on disk is good, and larger than it could be.
    pub(crate) fn compact(&self) -> Result<()> {
        let _merging = self.merging.lock();
        loop {
            self.remove_unneeded()?;
            let merge = next_merge(&self.state.lock().layers());
            let Some(merge) = merge.filter(|_| !self.common.compactor.is_closing()) else {
                return Ok(());
            };
            self.merge(&merge)?;
        }
    }

    fn remove_unneeded(&self) -> Result<()> {
        let archive = &self.common.archive;
        let mut gone = Vec::new();
        {
            let _disk = self.disk.lock();
            self.shared().check_open(&self.name)?;
            let unneeded = unneeded(&self.state.lock().layers());
            for id in unneeded {
                gone.extend(archive.take_away_deleted(&self.name, id)?);
                self.state.lock().removed(id);
            }
        }
        // Of much data this takes its time, for which nobody need wait.
        for path in gone {
            archive.remove(&path)?;
        }
        Ok(())
    }

    fn merge(&self, merge: &Merge) -> Result<()> {
        let archive = &self.common.archive;
        let free = archive.free_bytes()?;
        if free / 2 < merge.bytes {
            let (into, needed) = (merge.into, merge.bytes.saturating_mul(2));
            let doing = format!(
                "merging deleted checkpoints into {into}, for which {needed} bytes of disk must be free, and {free} are"
            );
            return Err(io::Error::from(io::ErrorKind::StorageFull)).doing(doing);
        }
        let draft = self.state.lock().draft_against(merge.into, merge.before)?;
        let bytes = durable::rewrite(archive, &draft, &self.durable_origin(), self.epoch())?;
        let _disk = self.disk.lock();
        let open = self.shared().check_open(&self.name);
        let deleted = self.state.lock().is_deleted(merge.into);
        if open.is_ok()
            && let Some(deleted) = deleted
        {
            archive.replace(&self.name, merge.into, deleted)?;
            self.state.lock().written(merge.into, merge.before, bytes);
            let merges = &self.common.compactor.counters;
            merges.merges.fetch_add(1, Ordering::Relaxed);
            merges.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        archive.discard(&self.name, merge.into)?;
        open
    }
}
