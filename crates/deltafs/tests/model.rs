//! A mounted volume against a plain directory: the same random operations on both, with checkpoints,
//! rollbacks and forks in between. After each of them the trees must be equal byte for byte, through fresh
//! look-ups and through the descriptors, mappings and directory handles that were there all along.

mod common;
#[path = "model/dump.rs"]
mod dump;
#[path = "model/ops.rs"]
mod ops;

use std::cell::OnceCell;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::mapper::{self, Mapper};
use common::{Fixture, Mounted, fixture, in_use};
use deltafs::{IdMap, Loader, Options, Quota, Snapshot};
use dump::Dump;
use ops::Op;
use proptest::prelude::*;

/// How many descriptors of files, and of directories, are open at most.
const MAX_OPEN: usize = 4;

/// A file that is open in both worlds, and mapped in ours.
struct Open {
    ours: File,
    theirs: File,
    ino: u64,
    /// The number of the mapping, and its length.
    mapping: Option<(usize, usize)>,
}

/// A directory that is open.
struct OpenDir {
    ours: File,
    /// The same one in the plain directory; none once that was built anew and it has no name there.
    theirs: Option<File>,
    ino: u64,
}

/// Never reached; so that it can be seen what counts.
const QUOTA: Quota = Quota {
    bytes: Some(1 << 30),
    inodes: Some(1 << 20),
};

/// What one checkpoint has to give back.
struct Saved {
    snapshot: Snapshot,
    tree: Dump,
    /// The inode, the name in the plain directory if it has one, and the content, of every open file.
    open: Vec<(u64, Option<PathBuf>, Vec<u8>)>,
    /// The inode, and the name in the plain directory if it has one, of every open directory.
    dirs: Vec<(u64, Option<PathBuf>)>,
    /// What the quota left of blocks and inodes when it was first rolled back to.
    room: OnceCell<(u64, u64)>,
}

struct Worlds {
    ours: Fixture,
    theirs: tempfile::TempDir,
    open: Vec<Open>,
    dirs: Vec<OpenDir>,
    saved: Vec<Saved>,
    mapper: Mapper,
}

impl Worlds {
    fn new() -> Self {
        let theirs = tempfile::tempdir().unwrap();
        ops::fill_base(theirs.path());
        let ours = fixture(ops::fill_base);
        ours.volume.set_quota(QUOTA);
        Self {
            ours,
            theirs,
            open: Vec::new(),
            dirs: Vec::new(),
            saved: Vec::new(),
            mapper: Mapper::start("mapping_process"),
        }
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Open(path) => self.open_file(path),
            Op::Close(which) => {
                if !self.open.is_empty() {
                    let closed = self.open.swap_remove(which % self.open.len());
                    self.close(closed);
                }
            }
            Op::OpenDir(path) => self.open_dir(path),
            Op::CloseDir(which) => {
                if !self.dirs.is_empty() {
                    self.dirs.swap_remove(which % self.dirs.len());
                }
            }
            Op::OnOpen(which, change) => {
                if !self.open.is_empty() {
                    let file = &self.open[which % self.open.len()];
                    let ours = change.run(&file.ours, &mut self.mapper);
                    assert_eq!(ours, change.run(&file.theirs, &mut self.mapper), "{op:?}");
                }
            }
            Op::Checkpoint => self.checkpoint(),
            Op::Rollback(which, sparing) => self.rollback(*which, *sparing),
            Op::Fork(which) => self.fork(*which),
            Op::Tree(op) => {
                let ours = op.run(&self.ours.volume.at(""), &mut self.mapper);
                let theirs = op.run(self.theirs.path(), &mut self.mapper);
                assert_eq!(ours, theirs, "{op:?}: ours on the left");
            }
        }
    }

    fn open_file(&mut self, path: &Path) {
        let open = |root: &Path| {
            fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(root.join(path))
        };
        if self.open.len() == MAX_OPEN {
            return;
        }
        let (ours, theirs) = (open(&self.ours.volume.at("")), open(self.theirs.path()));
        assert_eq!(ours.is_ok(), theirs.is_ok(), "opening {}", path.display());
        if let (Ok(ours), Ok(theirs)) = (ours, theirs) {
            self.add(ours, theirs);
        }
    }

    /// Keeps a file open, and mapped if there is anything to map.
    fn add(&mut self, ours: File, theirs: File) {
        let meta = ours.metadata().unwrap();
        let len = usize::try_from(meta.len()).unwrap();
        let mapping = (len > 0).then(|| (self.mapper.map(&ours, len, true), len));
        self.open.push(Open {
            ours,
            theirs,
            ino: meta.ino(),
            mapping,
        });
    }

    fn close(&mut self, open: Open) {
        if let Some((mapping, _)) = open.mapping {
            self.mapper.unmap(mapping);
        }
    }

    fn open_dir(&mut self, path: &Path) {
        let ours = self.ours.volume.at(path);
        if self.dirs.len() < MAX_OPEN && fs::symlink_metadata(&ours).is_ok_and(|m| m.is_dir()) {
            let ours = File::open(ours).unwrap();
            self.dirs.push(OpenDir {
                ino: ours.metadata().unwrap().ino(),
                ours,
                theirs: Some(File::open(self.theirs.path().join(path)).unwrap()),
            });
        }
    }

    fn checkpoint(&mut self) {
        self.ours.volume.sync().unwrap();
        let tree = Dump::of(self.theirs.path());
        let open = self.open.iter().map(|file| {
            let host = file.theirs.metadata().unwrap().ino();
            (
                file.ino,
                tree.path_of(host).map(Path::to_owned),
                dump::content(&file.theirs),
            )
        });
        let path_of = |dir: &OpenDir| {
            let theirs = dir.theirs.as_ref()?;
            let found = tree.path_of(theirs.metadata().unwrap().ino());
            found.map(Path::to_owned)
        };
        let dirs = self.dirs.iter().map(|dir| (dir.ino, path_of(dir)));
        self.saved.push(Saved {
            dirs: dirs.collect(),
            open: open.collect(),
            snapshot: self.ours.volume.checkpoint(),
            tree,
            room: OnceCell::new(),
        });
    }

    fn rollback(&mut self, which: usize, sparing: bool) {
        if self.saved.is_empty() {
            return;
        }
        let which = which % self.saved.len();
        let saved = &self.saved[which];
        let held = || {
            let files = self.open.iter().map(|open| open.ino);
            let dirs = self.dirs.iter().map(|dir| dir.ino);
            in_use(files.chain(dirs))
        };
        let volume = &self.ours.volume;
        let few = if sparing { 0 } else { usize::MAX };
        let done = volume.rollback_sparing(&saved.snapshot, few, held);
        let reborn = done.unwrap().reborn;
        let found = rustix::fs::statvfs(volume.at("")).unwrap();
        let room = (found.f_bfree, found.f_ffree);
        assert_eq!(*saved.room.get_or_init(|| room), room, "what counts");
        fs::remove_dir_all(self.theirs.path()).unwrap();
        fs::create_dir(self.theirs.path()).unwrap();
        saved.tree.build(self.theirs.path());
        let mut before = std::mem::take(&mut self.open);
        for (ino, path, content) in self.saved[which].open.clone() {
            let twin = self.open.iter().find(|open| open.ino == ino);
            let theirs = match twin.filter(|_| path.is_none()) {
                Some(twin) => dump::open_twin(&twin.theirs),
                None => dump::open_again(self.theirs.path(), path.as_deref(), &content),
            };
            match before.iter().position(|open| open.ino == ino) {
                Some(at) => {
                    let kept = before.swap_remove(at);
                    self.open.push(Open { theirs, ..kept });
                }
                None => {
                    let ours = self.ours.volume.open_inode(ino, libc::O_RDWR).unwrap();
                    self.add(File::from(ours), theirs);
                }
            }
        }
        before.into_iter().for_each(|open| self.close(open));
        self.rollback_dirs(which, &reborn);
        self.compare();
    }

    /// Handles of directories that the state has go on, but for those that are to be opened again.
    fn rollback_dirs(&mut self, which: usize, reborn: &[u64]) {
        let mut before = std::mem::take(&mut self.dirs);
        for (ino, path) in &self.saved[which].dirs {
            let theirs = path.as_ref().map(|path| self.theirs.path().join(path));
            let theirs = theirs.map(|path| File::open(path).unwrap());
            if let Some(at) = before.iter().position(|dir| dir.ino == *ino) {
                let kept = before.swap_remove(at);
                let ours = match reborn.contains(ino) {
                    true => {
                        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
                        File::from(self.ours.volume.open_inode(*ino, flags).unwrap())
                    }
                    false => kept.ours,
                };
                self.dirs.push(OpenDir {
                    ours,
                    theirs,
                    ino: *ino,
                });
            }
        }
    }

    fn fork(&self, which: usize) {
        if self.saved.is_empty() {
            return;
        }
        let saved = &self.saved[which % self.saved.len()];
        let fork = Mounted::new(
            self.ours
                .volume
                .fork(&saved.snapshot, IdMap::IDENTITY)
                .unwrap(),
        );
        saved.tree.compare(&Dump::of(&fork.at("")));
        for (ino, _, content) in &saved.open {
            let file = File::from(fork.open_inode(*ino, libc::O_RDONLY).unwrap());
            assert!(dump::content(&file) == *content, "inode {ino} in a fork");
        }
        fork.write("only in the fork", "x");
    }

    /// Writes all checkpoints to disk, each against one before it, and goes on with what is read back.
    fn restart(&mut self) {
        let layers = tempfile::tempdir().unwrap();
        let dir = |at: usize| layers.path().join(at.to_string());
        let before = |at: usize| (at > 0).then(|| (at * 7 + 3) % at);
        for (at, saved) in self.saved.iter().enumerate() {
            fs::create_dir(dir(at)).unwrap();
            let before = before(at).map(|before| &self.saved[before].snapshot);
            saved.snapshot.save(&dir(at), before).unwrap();
            deltafs::verify_layer(&dir(at)).unwrap();
        }
        self.dirs.clear();
        for open in std::mem::take(&mut self.open) {
            self.close(open);
        }
        let mut loader = Loader::new(Options {
            base: File::open(self.ours.base.path()).unwrap().into(),
            hidden: Vec::new(),
            ids: IdMap::IDENTITY,
            data_dir: self.ours.data.path().to_owned(),
            threads: 2,
        })
        .unwrap();
        for at in 0..self.saved.len() {
            let before = before(at).map(|before| &self.saved[before].snapshot);
            let loaded = loader.load(&dir(at), before).unwrap();
            self.saved[at].snapshot = loaded;
        }
        assert!(loader.changed_base().is_empty());
        self.ours.volume = Mounted::new(loader.mount().unwrap());
        self.ours.volume.set_quota(QUOTA);
    }

    fn compare(&mut self) {
        self.compare_mappings();
        self.compare_dirs();
        Dump::of(self.theirs.path()).compare(&Dump::of(&self.ours.volume.at("")));
        for file in &self.open {
            assert!(
                dump::content(&file.ours) == dump::content(&file.theirs),
                "inode {} through its old descriptor {}",
                file.ino,
                file.ours.as_raw_fd()
            );
            let links = |file: &File| file.metadata().unwrap().nlink();
            assert_eq!(
                links(&file.ours),
                links(&file.theirs),
                "links of inode {}",
                file.ino
            );
        }
    }
}

impl Worlds {
    /// Every page that lies within the file shows its content.
    fn compare_mappings(&mut self) {
        for open in &self.open {
            let Some((mapping, mapped)) = open.mapping else {
                continue;
            };
            let content = dump::content(&open.theirs);
            for at in (0..mapped.min(content.len())).step_by(2048) {
                let found = self.mapper.get(mapping, at);
                assert_eq!(found, content[at], "byte {at} of inode {} mapped", open.ino);
            }
        }
    }

    fn compare_dirs(&self) {
        let listed = |dir: &File| {
            let mut names = Vec::new();
            for entry in rustix::fs::Dir::read_from(dir).unwrap() {
                names.push(entry.unwrap().file_name().to_owned());
            }
            names.sort();
            names
        };
        for dir in &self.dirs {
            if let Some(theirs) = &dir.theirs {
                assert_eq!(
                    listed(&dir.ours),
                    listed(theirs),
                    "directory {} through its old handle",
                    dir.ino
                );
            }
        }
    }
}

#[test]
fn mapping_process() {
    mapper::serve();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_volume_is_what_a_plain_directory_is(ops in prop::collection::vec(ops::any_op(), 1..80)) {
        let mut worlds = Worlds::new();
        for op in &ops {
            worlds.run(op);
        }
        worlds.compare();
        for which in 0..worlds.saved.len() {
            worlds.rollback(which, which % 2 == 0);
        }
        worlds.restart();
        for which in 0..worlds.saved.len() {
            worlds.rollback(which, which % 3 == 0);
        }
        worlds.restart();
        for which in (0..worlds.saved.len()).rev() {
            worlds.rollback(which, which % 3 == 0);
        }
    }
}

/// Many cases are for a machine that has the time: `DELTAFS_MODEL_CASES`.
fn cases() -> u32 {
    let wish = std::env::var("DELTAFS_MODEL_CASES").ok();
    wish.and_then(|wish| wish.parse().ok()).unwrap_or(48)
}
