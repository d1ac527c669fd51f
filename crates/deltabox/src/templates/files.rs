//! The base's own files, which a template maps where a checkpoint's processes have them mapped unchanged.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use deltacr::ids::HostPid;
use deltacr::mem::{BASE, FileId, FileMapping, VERSIONED};
use deltafs::Snapshot;
use rustix::fs::StatVfsMountFlags;

/// Those of one checkpoint that were asked for.
pub(super) struct BaseFiles<'a> {
    snapshot: &'a Snapshot,
    opened: RefCell<BTreeMap<u64, Option<Arc<File>>>>,
}

impl<'a> BaseFiles<'a> {
    pub(super) fn of(snapshot: &'a Snapshot) -> Self {
        Self {
            snapshot,
            opened: RefCell::default(),
        }
    }

    /// Whether a mapped file can be mapped from the base instead, so that a program sees the same in it, and the same path in
    /// `/proc/PID/maps`.
    pub(super) fn has(&self, file: &FileId) -> bool {
        let shown = match file.device {
            VERSIONED => self.snapshot.shows_original(file.inode),
            device => device == BASE,
        };
        if !shown {
            return false;
        }
        let mut all = self.opened.borrow_mut();
        let known = all.entry(file.inode).or_insert_with(|| self.open(file));
        known.is_some()
    }

    fn open(&self, file: &FileId) -> Option<Arc<File>> {
        let path = file.path.as_bytes();
        let opened = self.snapshot.open_original(file.inode, path).ok()?;
        let shown = fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd())).ok()?;
        let mount = rustix::fs::fstatvfs(&opened).ok()?;
        let fits = shown.as_os_str().as_bytes() == path
            && !mount.f_flag.contains(StatVfsMountFlags::NOEXEC);
        fits.then_some(opened)
    }

    /// One for which [`BaseFiles::has`] has said so.
    pub(super) fn opened(&self, inode: u64) -> io::Result<Arc<File>> {
        let all = self.opened.borrow();
        let found = all.get(&inode).cloned().flatten();
        found.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Whether all of them show in a process by the numbers that they have. Where a filesystem lies over another, those of the one
    /// below may show.
    pub(super) fn show_in(&self, process: HostPid, mappings: &[FileMapping]) -> io::Result<bool> {
        for mapping in mappings {
            let file = self.opened(mapping.inode)?.metadata()?;
            if file.ino() != mapping.inode || !mapping.shows_in(process, file.dev())? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
