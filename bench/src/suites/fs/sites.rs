//! The places where a workload runs: a plain directory, an overlayfs, a DeltaFS over the same base, and a FUSE server that does nothing else.

use std::fs::{self, File};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use deltafs::transport::Session;
use deltafs::{IdMap, Options, Snapshot, Volume};
use rustix::fs::CWD;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use tempfile::TempDir;

use super::bare::{Answers, Bare};
use super::run;

/// Threads that serve the volume; as many as a sandbox has.
const THREADS: usize = 2;

/// Which filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A copy of the base on the filesystem that also holds the base.
    Native,
    Overlay,
    Delta,
    /// A DeltaFS with a long chain of checkpoints before it.
    Deep,
    /// A FUSE server that has all answers ready, and throws away what is written.
    Bare,
    /// The same, with what is written kept in a file.
    Keeping,
}

pub(super) const KINDS: [Kind; 6] = [
    Kind::Native,
    Kind::Overlay,
    Kind::Delta,
    Kind::Deep,
    Kind::Bare,
    Kind::Keeping,
];

/// What trees are made of.
#[derive(Clone, Copy)]
pub(super) struct Ground<'a> {
    pub(super) base: &'a Path,
    /// On the filesystem of the base.
    pub(super) dir: &'a Path,
    /// What a bare server answers; none where there is to be no such server.
    pub(super) answers: Option<&'a Arc<Answers>>,
}

/// Checkpoints in the long chain.
const DEPTH: usize = 1_000;

/// A tree that begins as the base; unmounted when it is dropped.
pub(super) struct Site {
    root: PathBuf,
    mounted: bool,
    volume: Option<Volume>,
    /// What a bare server is served through.
    _session: Option<Session>,
    /// The volume's checkpoints.
    _chain: Vec<Snapshot>,
    /// Where changes go.
    _data: TempDir,
}

impl Site {
    /// Makes it below the directory of `ground`. A copy of the base is made only if `copy` says so; otherwise the native tree is the
    /// base itself.
    pub(super) fn open(kind: Kind, ground: &Ground<'_>, copy: bool) -> Result<Self> {
        let base = ground.base;
        let data = TempDir::new_in(ground.dir)?;
        let root = data.path().join("root");
        fs::create_dir(&root)?;
        let site = |root, mounted, volume, data| Self {
            root,
            mounted,
            volume,
            _session: None,
            _chain: Vec::new(),
            _data: data,
        };
        Ok(match kind {
            Kind::Native if copy => {
                let all = base.join(".");
                run(Command::new("cp").arg("-a").args([all, root.clone()]))?;
                site(root, false, None, data)
            }
            Kind::Native => site(base.to_owned(), false, None, data),
            Kind::Overlay => {
                mount_overlay(base, data.path(), &root)?;
                site(root, true, None, data)
            }
            Kind::Delta | Kind::Deep => {
                let volume = mount_delta(base, data.path(), &root)?;
                let depth = if kind == Kind::Deep { DEPTH } else { 1 };
                let chain = (0..depth).map(|n| {
                    fs::write(root.join("counter"), n.to_string())?;
                    Ok(volume.checkpoint())
                });
                let chain = chain.collect::<Result<_>>()?;
                let mut site = site(root, true, Some(volume), data);
                site._chain = chain;
                site
            }
            Kind::Bare | Kind::Keeping => {
                let kept = match kind {
                    Kind::Keeping => Some(tempfile::tempfile_in(data.path())?),
                    _ => None,
                };
                let answers = ground.answers.context("a bare server has no answers")?;
                let bare = Arc::new(Bare::new(answers, kept));
                let session = Session::start(&bare, THREADS).context("mounting a bare server")?;
                place(session.mount(), &root)?;
                let mut site = site(root, true, None, data);
                site._session = Some(session);
                site
            }
        })
    }

    /// The tree.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// The volume behind it, of a DeltaFS.
    pub(super) fn volume(&self) -> Result<&Volume> {
        self.volume.as_ref().context("not a DeltaFS")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.mounted {
            // Left mounted, it would go with the mount namespace of this process.
            let _ = rustix::mount::unmount(&self.root, UnmountFlags::DETACH);
        }
    }
}

fn mount_overlay(base: &Path, data: &Path, root: &Path) -> Result<()> {
    let (upper, work) = (data.join("upper"), data.join("work"));
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        base.display(),
        upper.display(),
        work.display()
    );
    let options = std::ffi::CString::new(options)?;
    rustix::mount::mount("overlay", root, "overlay", MountFlags::empty(), &*options)
        .context("mounting an overlayfs")
}

fn mount_delta(base: &Path, data: &Path, root: &Path) -> Result<Volume> {
    let volume = Volume::create(Options {
        base: File::open(base)?.into(),
        hidden: Vec::new(),
        ids: IdMap::IDENTITY,
        data_dir: data.to_owned(),
        threads: THREADS,
    })?;
    place(volume.mount(), root)?;
    Ok(volume)
}

fn place(mount: BorrowedFd<'_>, root: &Path) -> Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = rustix::mount::open_tree(mount, "", flags)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&mount, "", CWD, root, flags).context("placing a mount")
}
