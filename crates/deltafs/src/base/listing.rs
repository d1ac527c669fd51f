//! The entries of a base directory.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, RawDir};
use rustix::io::Errno;

use super::Base;
use super::descriptors::open;
use super::host::{confined, stat};
use crate::node::{DIRECTORY, EntryKey, dirent_type};

/// All entries of a base directory but `.`, `..` and what is hidden, by cookie.
#[derive(Debug)]
pub(crate) struct Listing(Vec<ListEntry>);

/// An entry of a base directory.
#[derive(Debug)]
pub(crate) struct ListEntry {
    pub(crate) key: EntryKey,
    pub(super) host_ino: u64,
    pub(crate) dirent_type: u8,
}

impl ListEntry {
    pub(super) fn is_dir(&self) -> bool {
        self.dirent_type == dirent_type(DIRECTORY)
    }
}

impl Listing {
    /// Reads a directory that lies on this device.
    pub(super) fn read(base: &Base, dir: &OwnedFd, device: u64) -> Result<Self, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = open(|| rustix::fs::openat2(dir, ".", flags, Mode::empty(), confined()))?;
        let mut buf = [MaybeUninit::uninit(); 32 * 1024];
        let mut raw = RawDir::new(&fd, &mut buf);
        let mut entries = Vec::new();
        while let Some(entry) = raw.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." || base.hidden.contains(&(device, entry.ino())) {
                continue;
            }
            let mut mode = entry.file_type().as_raw_mode();
            if mode == 0 {
                mode = u32::from(stat(dir.as_fd(), name)?.stx_mode);
            }
            entries.push(ListEntry {
                key: base.key(&Arc::from(name)),
                host_ino: entry.ino(),
                dirent_type: dirent_type(mode),
            });
        }
        entries.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(Self(entries))
    }

    pub(super) fn entries(&self) -> &[ListEntry] {
        &self.0
    }

    /// The entries from a cookie on.
    pub(crate) fn from(&self, cookie: u64) -> &[ListEntry] {
        let start = self.0.partition_point(|entry| entry.key.cookie < cookie);
        &self.0[start..]
    }

    /// The entry of a name.
    pub(crate) fn find(&self, key: &EntryKey) -> Option<&ListEntry> {
        let at = self.0.binary_search_by(|entry| entry.key.cmp(key)).ok()?;
        self.0.get(at)
    }
}
