//! Where a process stands: its working directory and its root, as it tells itself.

use std::io;

use crate::env::Environment;
use crate::files::Place;
use crate::ids::InnerPid;
use crate::procfs::{FileId, Procfs};
use crate::remote::{Batch, CallId, DataRef, Outcome};

const STATX: usize = size_of::<libc::statx>();

/// Where in a batch the questions are.
pub(crate) struct Questions {
    directory: (CallId, DataRef),
    root: (CallId, DataRef),
}

/// What a process told; a directory of which it could not tell is looked at from outside.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Whereabouts {
    directory: Option<FileId>,
    root: Option<FileId>,
}

impl Questions {
    /// Adds the questions to a batch.
    pub(crate) fn ask(b: &mut Batch) -> Self {
        let here = b.input(b"\0");
        let top = b.input(b"/\0");
        let mut ask = |path: DataRef| {
            let found = b.output(STATX);
            // The filesystem is not asked, which may wait.
            let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
            let args = [
                libc::AT_FDCWD.into(),
                path.into(),
                flags.into(),
                libc::STATX_INO.into(),
                found.into(),
            ];
            (b.call(libc::SYS_statx, &args), found)
        };
        Self {
            directory: ask(here),
            root: ask(top),
        }
    }

    pub(crate) fn answers(&self, o: &Outcome) -> Whereabouts {
        let found = |(call, found): (CallId, DataRef)| {
            o.result(call).ok()?;
            let major = std::mem::offset_of!(libc::statx, stx_dev_major);
            let minor = std::mem::offset_of!(libc::statx, stx_dev_minor);
            let inode = std::mem::offset_of!(libc::statx, stx_ino);
            Some(FileId {
                device: rustix::fs::makedev(
                    o.int(found.at(major, 4)) as u32,
                    o.int(found.at(minor, 4)) as u32,
                ),
                inode: o.long(found.at(inode, 8)),
            })
        };
        Whereabouts {
            directory: found(self.directory),
            root: found(self.root),
        }
    }
}

impl Whereabouts {
    /// The working directory of the process.
    pub(crate) fn directory(
        &self,
        env: &dyn Environment,
        procfs: &Procfs,
        pid: InnerPid,
    ) -> io::Result<Place> {
        match self.directory {
            Some(found) => Place::found(env, procfs, (pid, "cwd"), found),
            None => Place::of(env, procfs, pid, "cwd"),
        }
    }

    /// Whether that is its working directory.
    pub(crate) fn is_directory(
        &self,
        place: &Place,
        env: &dyn Environment,
        procfs: &Procfs,
        pid: InnerPid,
    ) -> io::Result<bool> {
        match self.directory {
            Some(found) => place.is(env, procfs, (pid, "cwd"), found),
            None => place.is_of(env, procfs, pid, "cwd"),
        }
    }

    /// Its root directory; `None` for the sandbox's own.
    pub(crate) fn root(
        &self,
        env: &dyn Environment,
        procfs: &Procfs,
        pid: InnerPid,
    ) -> io::Result<Option<Place>> {
        match self.root {
            Some(found) if found == procfs.root() => Ok(None),
            _ => Place::root(env, procfs, pid),
        }
    }

    /// Whether that is its root directory.
    pub(crate) fn is_root(
        &self,
        root: Option<&Place>,
        env: &dyn Environment,
        procfs: &Procfs,
        pid: InnerPid,
    ) -> io::Result<bool> {
        match self.root {
            Some(found) if found == procfs.root() => Ok(root.is_none()),
            _ => Place::is_root_of(root, env, procfs, pid),
        }
    }
}
