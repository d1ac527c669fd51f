//! The files that an image refers to: the program, the working directory.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags, fchmod, fstat, openat2};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::env::Environment;
use crate::fd;
use crate::ids::InnerPid;
use crate::openings::{self, Wanted};
use crate::procfs::{FileId, OpenFiles, Procfs};
use crate::remote::Remote;

/// A file that a process refers to: what it is, and where it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// Its inode number, if it is on the versioned filesystem.
    inode: Option<u64>,
    /// As the kernel tells it; only a hint where there is an inode number.
    path: Vec<u8>,
}

impl Place {
    /// Where a process' `cwd` or `root` points.
    pub(crate) fn of(
        env: &dyn Environment,
        procfs: &Procfs,
        pid: InnerPid,
        link: &str,
    ) -> io::Result<Self> {
        Self::found(env, procfs, (pid, link), procfs.file(pid, link)?)
    }

    /// What was found where this link of a process points.
    pub(crate) fn found(
        env: &dyn Environment,
        procfs: &Procfs,
        (pid, link): (InnerPid, &str),
        found: FileId,
    ) -> io::Result<Self> {
        Ok(Self {
            inode: inode(env, found),
            path: procfs.link(pid, link)?,
        })
    }

    /// The program of a process, which has these files open.
    pub(crate) fn program(
        env: &dyn Environment,
        procfs: &Procfs,
        pid: InnerPid,
        files: &OpenFiles,
    ) -> io::Result<Self> {
        Self::found(env, procfs, (pid, "exe"), procfs.program(pid, files)?)
    }

    /// The root directory of a process; `None` for the sandbox's own.
    pub(crate) fn root(
        env: &dyn Environment,
        procfs: &Procfs,
        pid: InnerPid,
    ) -> io::Result<Option<Self>> {
        match procfs.link(pid, "root")?.as_slice() {
            b"/" => Ok(None),
            _ => Self::of(env, procfs, pid, "root").map(Some),
        }
    }

    /// Whether the root directory of a process is this one, or the sandbox's own for `None`.
    pub(crate) fn is_root_of(
        root: Option<&Self>,
        env: &dyn Environment,
        procfs: &Procfs,
        pid: InnerPid,
    ) -> io::Result<bool> {
        match (root, procfs.link(pid, "root")?.as_slice()) {
            (None, path) => Ok(path == b"/"),
            (Some(_), b"/") => Ok(false),
            (Some(root), _) => root.is_of(env, procfs, pid, "root"),
        }
    }

    /// Opens the file again; see [`open`].
    pub(crate) fn open(&self, env: &dyn Environment, flags: OFlags) -> io::Result<OwnedFd> {
        open(env, &self.path, self.inode, flags)
    }

    /// Has a process open the file again; returns the number of its descriptor.
    pub(crate) fn open_inside(
        &self,
        env: &dyn Environment,
        remote: &mut Remote,
        flags: OFlags,
    ) -> io::Result<i32> {
        let (path, wanted) = (&self.path[..], self.inode);
        let wanted = wanted.map(|inode| Wanted { path, inode, flags });
        let opened = openings::open(remote, env, wanted.as_slice())?;
        match opened.first() {
            Some(Some(fd)) => Ok(*fd),
            _ => Ok(remote.give_fds(&[self.open(env, flags)?.as_fd()])?[0]),
        }
    }

    /// Does what takes a program that may be executed. Whoever runs it may have taken the permission to do so away since, and of
    /// such a file not even root may make a process' program: then it has the permission again for that time.
    pub(crate) fn as_program<T>(
        &self,
        env: &dyn Environment,
        mut act: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        let file = self.open(env, OFlags::RDONLY)?;
        match act(file.as_fd()) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                let _permitted = Permitted::to_execute(file.as_fd())?;
                act(file.as_fd())
            }
            done => done,
        }
    }

    /// The path, as the kernel told it.
    pub(crate) fn path(&self) -> &[u8] {
        &self.path
    }

    /// Its inode number, if it is on the versioned filesystem.
    pub(crate) fn inode(&self) -> Option<u64> {
        self.inode
    }

    /// The path that it had, if the kernel says behind it that the name is gone (which a living one may say, too).
    pub(crate) fn removed(&self) -> Option<&[u8]> {
        self.path.strip_suffix(b" (deleted)")
    }

    /// The process and the thread whose directory of `/proc` it is.
    pub(crate) fn told_of(&self) -> impl Iterator<Item = InnerPid> {
        fd::told_of(&self.path)
    }

    /// Whether it is the same when only those processes are kept that `kept` names; see [`fd::stays`].
    pub(crate) fn stays(&self, kept: impl Fn(InnerPid) -> bool) -> bool {
        self.inode.is_some() || fd::stays(&self.path, kept)
    }

    /// Whether it is one of these.
    pub(crate) fn is_among(&self, inodes: &[u64]) -> bool {
        self.inode.is_some_and(|inode| inodes.contains(&inode))
    }

    /// Whether a process' `cwd` or `root` points to this file, whatever its name.
    pub(crate) fn is_of(
        &self,
        env: &dyn Environment,
        procfs: &Procfs,
        pid: InnerPid,
        link: &str,
    ) -> io::Result<bool> {
        self.is(env, procfs, (pid, link), procfs.file(pid, link)?)
    }

    /// Whether it is the program of a process, which has these files open.
    pub(crate) fn is_program_of(
        &self,
        env: &dyn Environment,
        procfs: &Procfs,
        pid: InnerPid,
        files: &OpenFiles,
    ) -> io::Result<bool> {
        self.is(env, procfs, (pid, "exe"), procfs.program(pid, files)?)
    }

    /// Whether it is what was found where this link of a process points, whatever its name.
    pub(crate) fn is(
        &self,
        env: &dyn Environment,
        procfs: &Procfs,
        (pid, link): (InnerPid, &str),
        found: FileId,
    ) -> io::Result<bool> {
        Ok(match (self.inode, inode(env, found)) {
            (Some(a), Some(b)) => a == b,
            (None, None) => self.path == procfs.link(pid, link)?,
            _ => false,
        })
    }
}

/// A file that its owner may execute for a moment.
struct Permitted<'a> {
    file: BorrowedFd<'a>,
    before: Mode,
}

impl<'a> Permitted<'a> {
    fn to_execute(file: BorrowedFd<'a>) -> io::Result<Self> {
        let before = Mode::from_raw_mode(fstat(file)?.st_mode);
        fchmod(file, before | Mode::XUSR)?;
        Ok(Self { file, before })
    }
}

impl Drop for Permitted<'_> {
    fn drop(&mut self) {
        if let Err(error) = fchmod(self.file, self.before) {
            tracing::warn!(%error, "a program keeps the permission to be executed");
        }
    }
}

/// The inode number of a file, if that is on the versioned filesystem.
fn inode(env: &dyn Environment, file: FileId) -> Option<u64> {
    (file.device == env.fs_device()).then_some(file.inode)
}

/// Opens a file again. One of the versioned filesystem, which has an inode number here, is opened by its path if that
/// still leads to it, so that the kernel shows the path to the program; else by its number. Any other is opened by its path.
pub(crate) fn open(
    env: &dyn Environment,
    path: &[u8],
    inode: Option<u64>,
    flags: OFlags,
) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    let by_path = || open_path(env, path, inode, flags);
    let mut opened = Err(Errno::ACCESS);
    env.as_root(&mut || opened = by_path());
    if matches!(opened, Err(Errno::ACCESS | Errno::PERM)) {
        opened = by_path();
    }
    match (inode, opened?) {
        (_, Some(found)) => Ok(found),
        (Some(inode), None) => env.open_inode(inode, flags.bits() as i32),
        (None, None) => Err(io::ErrorKind::NotFound.into()),
    }
}

/// Opens what a path leads to; none if that is not this inode of the versioned filesystem.
fn open_path(
    env: &dyn Environment,
    path: &[u8],
    inode: Option<u64>,
    flags: OFlags,
) -> Result<Option<OwnedFd>, Errno> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let walk = |flags| openat2(env.root(), path, flags, Mode::empty(), resolve);
    let Some(inode) = inode else {
        return walk(flags).map(Some);
    };
    // Only looked at, for what has taken the path meanwhile may be a fifo or a device.
    let found = match walk(OFlags::PATH | OFlags::CLOEXEC) {
        Ok(found) => found,
        Err(e @ (Errno::ACCESS | Errno::PERM)) => return Err(e),
        Err(_) => return Ok(None),
    };
    let stat = fstat(&found)?;
    if (stat.st_dev, stat.st_ino) != (env.fs_device(), inode) {
        return Ok(None);
    }
    if flags.contains(OFlags::NOFOLLOW) {
        return walk(flags).map(Some);
    }
    // What was looked at is opened, without another walk along the path.
    let found = format!("/proc/self/fd/{}", found.as_raw_fd());
    rustix::fs::open(found, flags, Mode::empty()).map(Some)
}
