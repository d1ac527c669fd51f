//! The public face: volumes and snapshots.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

use crate::base::Base;
use crate::data::DataStore;
use crate::error::{Error, Result};
use crate::fuse::{Server, Session, Settler, refresh_size};
use crate::ids::IdMap;
use crate::invalidate::{InUse, Plan, Rest, Switch};
use crate::node::{Ino, Name, ROOT};
use crate::reclaim::{LeftBehind, Reclaimer};
use crate::sys;
use crate::tree::Tree;
use crate::view::{Quota, View};

/// How a volume is made.
#[derive(Debug)]
pub struct Options {
    /// The directory that shows through wherever nothing was changed. It must not change while the
    /// volume lives. Mounts below it do not show.
    pub base: OwnedFd,
    /// Absolute paths, seen from the base, that must not show. What does not exist is skipped.
    pub hidden: Vec<PathBuf>,
    /// How ids inside the sandbox show on the host.
    pub ids: IdMap,
    /// The host directory whose filesystem the data is written to (one file without a name).
    pub data_dir: PathBuf,
    /// How many threads serve the mount; at least one.
    pub threads: usize,
}

/// The filesystem of one sandbox: a view, and a FUSE mount of it that threads of this process serve.
///
/// Dropping a volume ends the mount at once: what still uses it gets `ENOTCONN`.
#[derive(Debug)]
pub struct Volume {
    server: Arc<Server>,
    session: Session,
    /// The open root directory, from the first time that it was needed.
    root: OnceLock<OwnedFd>,
    threads: usize,
    /// Checkpoints and rollbacks come one after another.
    switch: Mutex<()>,
    /// Finishes the last rollback.
    settler: Settler,
    /// Dropped after everything that holds blocks: what nobody needs any more it does not write.
    reclaimer: Arc<Reclaimer>,
}

/// A state of a volume, kept at no cost but that of what changes later. Dropping the last clone frees what only it held.
#[derive(Clone, Debug)]
pub struct Snapshot(Arc<Frozen>);

#[derive(Debug)]
struct Frozen {
    view: View,
    /// How many inodes of the base its layer on disk and those before it know; zero without one.
    looked_up: AtomicU64,
    /// Dropped after the view, when the view's blocks are free.
    _trim: TrimOnDrop,
}

#[derive(Debug)]
struct TrimOnDrop(Arc<Tree>);

impl Drop for TrimOnDrop {
    fn drop(&mut self) {
        self.0.data.trim();
    }
}

/// What a rollback did.
#[derive(Debug)]
#[non_exhaustive]
pub struct RollbackStats {
    /// Notices that were sent to the kernel, to drop names, attributes and pages.
    pub told: usize,
    /// Whether the kernel is told of what nothing has in use only now, while the sandbox runs again.
    pub sparing: bool,
    /// Directories that had been removed while something stood in them or held them open, and that are there
    /// again. The kernel never revives a removed directory object, so every descriptor and working directory of such an
    /// inode number must be opened again ([`Volume::open_inode_in`]); the old ones give `EIO`.
    pub reborn: Vec<u64>,
    /// The state that is shown no more, to be dropped when the sandbox runs again: then it is freed, and the kernel told of the
    /// rest (before, if somebody waits for that).
    pub left: LeftBehind,
}

/// What a volume holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Bytes of file data that the views and snapshots of the whole tree of volumes hold.
    pub data_bytes: u64,
    /// Those of them that are in memory, to be written to the disk within seconds.
    pub buffered_bytes: u64,
    /// Inodes of this volume that differ from the base.
    pub changed_inodes: usize,
    /// Inodes of the base that were looked up, in the whole tree of volumes.
    pub base_inodes: usize,
    /// Inodes of this volume that the kernel has cached.
    pub kernel_inodes: usize,
}

impl Volume {
    /// Up to this many changed inodes it is cheapest to tell the kernel of each at once.
    pub const FEW: usize = 2;

    /// Makes a volume that shows the base, and mounts it (detached: it has no path on the host).
    ///
    /// # Errors
    /// If the base or the data directory cannot be used, the id map does not hold `nobody`, or FUSE does not mount.
    pub fn create(options: Options) -> Result<Self> {
        check_ids(options.ids)?;
        let base = Base::new(options.base, &options.hidden).map_err(|errno| Error::Base {
            what: "looking at the directory",
            source: errno.into(),
        })?;
        let data = DataStore::create(&options.data_dir).map_err(|source| Error::Data {
            path: options.data_dir,
            source,
        })?;
        let tree = Arc::new(Tree::new(base, data));
        Self::first(View::new(tree), options.ids, options.threads)
    }

    /// The first volume of a tree.
    pub(crate) fn first(view: View, ids: IdMap, threads: usize) -> Result<Self> {
        let reclaimer = Reclaimer::start(&view.tree().data).map_err(|source| Error::Mount {
            what: "starting a thread",
            source,
        })?;
        Self::start(view, ids, threads, Arc::new(reclaimer))
    }

    fn start(view: View, ids: IdMap, threads: usize, reclaimer: Arc<Reclaimer>) -> Result<Self> {
        let server = Arc::new(Server::new(view, ids));
        let session = Session::start(&server, threads)?;
        let settler = Settler::new(&server, session.device());
        Ok(Self {
            server,
            session,
            root: OnceLock::new(),
            threads,
            switch: Mutex::default(),
            settler,
            reclaimer,
        })
    }

    /// The mount, without a path: an `O_PATH` descriptor of its root. Clone it into a mount namespace with `open_tree(2)`
    /// (`OPEN_TREE_CLONE`, `AT_EMPTY_PATH`) and `move_mount(2)`.
    pub fn mount(&self) -> BorrowedFd<'_> {
        self.session.mount()
    }

    /// `st_dev` of everything in the mount.
    pub fn device(&self) -> u64 {
        self.session.device_number()
    }

    /// Keeps the state that the volume has now; constant time.
    ///
    /// Writes through shared mappings belong to it only if they were flushed before ([`Volume::sync`]).
    pub fn checkpoint(&self) -> Snapshot {
        let _switch = self.switch.lock();
        self.server.release_orphans();
        let mut view = self.server.view().write();
        let frozen = view.clone();
        view.seal();
        Snapshot::new(frozen, 0)
    }

    /// Shows the state of a snapshot from now on; costs what differs between the two states.
    ///
    /// Nothing may use the mount meanwhile: its processes are stopped outside of system calls. Open descriptors,
    /// mappings and working directories then show the inodes they name as they are in the snapshot, but for
    /// [`RollbackStats::reborn`].
    ///
    /// # Errors
    /// If the snapshot is of another tree of volumes (nothing was changed then), or the kernel does not take a notice.
    pub fn rollback(&self, to: &Snapshot) -> Result<RollbackStats> {
        self.rollback_sparing(to, usize::MAX, InUse::default)
    }

    /// As [`Volume::rollback`], but where more than `few` inodes differ, it costs what is in use, and the kernel is told of the rest
    /// after this returns; for fewer than [`Volume::FEW`] that does not pay. Until then whoever walks through a directory with such
    /// files waits, and for the first moment, in which the states are compared, whoever walks at all; so nobody can see the difference.
    ///
    /// `held` is asked if it matters. Inodes that are held in another way than it tells, as by a watch, do not matter. Needs Linux 6.18 to
    /// have an effect.
    ///
    /// # Errors
    /// As [`Volume::rollback`].
    pub fn rollback_sparing(
        &self,
        to: &Snapshot,
        few: usize,
        held: impl FnOnce() -> InUse,
    ) -> Result<RollbackStats> {
        let _switch = self.switch.lock();
        let target = to.view();
        if !Arc::ptr_eq(target.tree(), self.server.tree()) {
            return Err(Error::ForeignSnapshot);
        }
        self.settler.finish();
        // Dirty pages would be written into the new state when they are dropped. What becomes of them in the old one,
        // which goes, does not matter; not even an error.
        let _ = self.sync();
        let mut new = target.branch();
        new.set_quota(self.server.view().read().quota());
        let old = std::mem::replace(&mut *self.server.view().write(), new.clone());
        let (plan, rest) = self.plan(&old, &new, few, held);
        let lives = |ino| new.node(ino).is_ok_and(|node| node.meta.nlink > 0);
        let reborn = self.server.kernel().revive(lives);
        drop(new);
        for notice in &plan.notices {
            let sent = self.server.tell(notice, self.session.device().as_fd());
            sent.map_err(invalidate)?;
        }
        let stats = RollbackStats {
            told: plan.notices.len(),
            sparing: rest.is_some(),
            reborn,
            left: LeftBehind::new(old, &self.reclaimer, self.server.barrier()),
        };
        self.finish(&plan, rest)?;
        Ok(stats)
    }

    fn plan(
        &self,
        old: &View,
        new: &View,
        few: usize,
        held: impl FnOnce() -> InUse,
    ) -> (Plan, Option<Rest>) {
        let switch = Switch {
            old,
            new,
            kernel: self.server.kernel(),
        };
        if switch.exceeds(few) && self.session.prunes() {
            let (plan, rest) = Plan::of_held(switch, &held());
            return (plan, Some(rest));
        }
        (Plan::complete(switch), None)
    }

    /// Does what is left when all notices are sent.
    fn finish(&self, plan: &Plan, rest: Option<Rest>) -> Result<()> {
        if plan.refresh.is_empty() && plan.look_up.is_empty() && rest.is_none() {
            return Ok(());
        }
        let root = self.root().map_err(opening_root)?;
        self.refresh(plan, root);
        if let Some(rest) = rest {
            let root = root.try_clone().map_err(opening_root)?;
            self.settler.leave(rest, root).map_err(invalidate)?;
        }
        Ok(())
    }

    /// Makes the kernel ask for what it cannot be told. An inode that it has just forgotten needs nothing.
    fn refresh(&self, plan: &Plan, root: &OwnedFd) {
        for ino in &plan.refresh {
            let _ = refresh_size(root, *ino, self.server.kernel().generation(*ino));
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_FORCE_SYNC;
        let look_up = |(parent, name): &(Ino, Name)| -> io::Result<()> {
            let fd = self.open_by_number(root, *parent, libc::O_PATH)?;
            let name = std::ffi::OsStr::from_bytes(name);
            rustix::fs::statx(&fd, name, flags, StatxFlags::BASIC_STATS)?;
            Ok(())
        };
        // A directory cannot move below one that is still below it: its turn comes in a later round.
        let mut left: Vec<&(Ino, Name)> = plan.look_up.iter().collect();
        let mut before = usize::MAX;
        while !left.is_empty() && left.len() < before {
            before = left.len();
            left.retain(|entry| look_up(entry).is_err());
        }
    }

    /// Another volume that begins with the state of a snapshot and shares the base and all data with this one.
    ///
    /// # Errors
    /// As [`Volume::create`]; also if the snapshot is of another tree of volumes.
    pub fn fork(&self, from: &Snapshot, ids: IdMap) -> Result<Self> {
        check_ids(ids)?;
        let view = from.view();
        if !Arc::ptr_eq(view.tree(), self.server.tree()) {
            return Err(Error::ForeignSnapshot);
        }
        let reclaimer = Arc::clone(&self.reclaimer);
        let mut view = view.branch();
        view.set_quota(self.server.view().read().quota());
        Self::start(view, ids, self.threads, reclaimer)
    }

    /// Opens an inode by its number, with a name or without, in the volume's own mount. `flags` are those of `open(2)`.
    ///
    /// # Errors
    /// Those of `open(2)`; `ESTALE` if the state that is shown has no such inode.
    pub fn open_inode(&self, ino: u64, flags: i32) -> io::Result<OwnedFd> {
        self.open_node(self.root()?, ino, flags)
    }

    /// As [`Volume::open_inode`], in another mount of the volume, such as that in a sandbox's mount namespace. `mount` is any
    /// descriptor of the mount's root.
    ///
    /// # Errors
    /// As [`Volume::open_inode`].
    pub fn open_inode_in(&self, mount: impl AsFd, ino: u64, flags: i32) -> io::Result<OwnedFd> {
        let root = rustix::fs::openat(mount, ".", directory(), Mode::empty())?;
        self.open_node(&root, ino, flags)
    }

    /// The open root. Opening it anew would have the kernel ask for its attributes whenever something in it changed.
    fn root(&self) -> io::Result<&OwnedFd> {
        if let Some(root) = self.root.get() {
            return Ok(root);
        }
        let root = rustix::fs::openat(self.session.mount(), ".", directory(), Mode::empty())?;
        Ok(self.root.get_or_init(|| root))
    }

    fn open_node(&self, root: &OwnedFd, ino: Ino, flags: i32) -> io::Result<OwnedFd> {
        if ino != ROOT
            && let Some(fd) = self.open_by_name(root, ino, flags)
        {
            return Ok(fd);
        }
        // A number leads past the directories where others wait.
        self.settler.finish();
        self.open_by_number(root, ino, flags)
    }

    fn open_by_number(&self, root: &OwnedFd, ino: Ino, flags: i32) -> io::Result<OwnedFd> {
        let generation = self.server.kernel().generation(ino);
        sys::open_by_node_id(root, ino, generation, flags)
    }

    /// Does something with the permissions that the root of the view has to files, and no others. Most files are his, and of the owner
    /// of a file the kernel asks no access list, which would be a request for each file on the way. To be tried again without where
    /// it is not permitted.
    pub fn as_root<T>(&self, act: impl FnOnce() -> T) -> T {
        sys::as_user_of_files(self.server.ids().outside_first, act)
    }

    /// Opens an inode by the name it has, so that `/proc/PID/fd` and `getcwd(2)` tell that name.
    fn open_by_name(&self, root: &OwnedFd, ino: Ino, flags: i32) -> Option<OwnedFd> {
        let path = self.server.view().read().path(ino)?;
        let mut flags = OFlags::from_bits_retain(flags.cast_unsigned()) | OFlags::CLOEXEC;
        if flags.contains(OFlags::PATH) {
            // `openat2` refuses what has no meaning; `open` does not.
            flags &= OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        }
        // Not O_NOFOLLOW, which would stay among the descriptor's flags.
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let open = || rustix::fs::openat2(root, &*path, flags, Mode::empty(), resolve);
        let fd = match self.as_root(open) {
            Err(Errno::ACCESS | Errno::PERM) => open(),
            other => other,
        };
        let fd = fd.ok()?;
        let found = rustix::fs::statx(&fd, "", AtFlags::EMPTY_PATH, StatxFlags::INO).ok()?;
        (found.stx_ino == ino && self.is_ours(&found)).then_some(fd)
    }

    /// Another filesystem may be mounted over a name.
    fn is_ours(&self, found: &rustix::fs::Statx) -> bool {
        rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor) == self.device()
    }

    /// Has the dirty pages of all shared mappings written into the volume; costs what is dirty.
    ///
    /// # Errors
    /// If a write failed, such as for a full disk.
    pub fn sync(&self) -> Result<()> {
        let flush = || -> io::Result<()> {
            rustix::fs::syncfs(self.root()?)?;
            self.session.drain()
        };
        flush().map_err(|source| Error::Flush { source })
    }

    /// Has the dirty pages of one inode written into the volume.
    ///
    /// # Errors
    /// If the inode is not a file that can be opened, or a write failed.
    pub fn flush_inode(&self, ino: u64) -> io::Result<()> {
        let fd = self.open_inode(ino, libc::O_RDONLY | libc::O_NONBLOCK)?;
        Ok(rustix::fs::fdatasync(&fd)?)
    }

    /// Bounds what the volume may take, from now on. It belongs to the volume, not to its state: a rollback leaves it, a fork
    /// takes it over.
    pub fn set_quota(&self, quota: Quota) {
        self.server.view().write().set_quota(quota);
    }

    /// What the volume holds.
    pub fn stats(&self) -> Stats {
        let tree = self.server.tree();
        Stats {
            data_bytes: tree.data.used_bytes(),
            buffered_bytes: tree.data.buffered_bytes(),
            changed_inodes: self.server.view().read().nodes().len(),
            base_inodes: tree.base.known(),
            kernel_inodes: self.server.kernel().len(),
        }
    }

    /// Looks at the view that is shown.
    pub(crate) fn view<T>(&self, look: impl FnOnce(&View) -> T) -> T {
        look(&self.server.view().read())
    }

    /// Ends the mount and its threads. What still uses the mount gets `ENOTCONN`.
    pub fn shutdown(&self) {
        self.session.stop();
        self.settler.end();
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Snapshot {
    pub(crate) fn new(view: View, looked_up: u64) -> Self {
        Self(Arc::new(Frozen {
            _trim: TrimOnDrop(Arc::clone(view.tree())),
            looked_up: AtomicU64::new(looked_up),
            view,
        }))
    }

    /// How many inodes of the base its layer on disk and those before it know; zero without one.
    pub(crate) fn looked_up(&self) -> u64 {
        self.0.looked_up.load(Ordering::Acquire)
    }

    /// Notes what its layer on disk knows. One that is written anew knows more than layers that build on the old one may rely on.
    pub(crate) fn set_looked_up(&self, count: u64) {
        let none = |before: u64| (before == 0).then_some(count);
        let _ = (self.0.looked_up).fetch_update(Ordering::AcqRel, Ordering::Acquire, none);
    }

    pub(crate) fn view(&self) -> &View {
        &self.0.view
    }

    /// Whether an inode is just what the base has.
    pub fn shows_base(&self, ino: u64) -> bool {
        !self.view().nodes().contains_key(&ino)
    }

    /// Inodes that differ from the base in this state.
    pub fn changed_inodes(&self) -> usize {
        self.view().nodes().len()
    }
}

fn invalidate((ino, errno): (Ino, rustix::io::Errno)) -> Error {
    Error::Invalidate {
        ino,
        source: errno.into(),
    }
}

fn opening_root(source: io::Error) -> Error {
    Error::Mount {
        what: "opening the root directory",
        source,
    }
}

fn directory() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC
}

pub(crate) fn check_ids(ids: IdMap) -> Result<()> {
    if ids.is_wide_enough() {
        Ok(())
    } else {
        Err(Error::IdMap { count: ids.count })
    }
}
