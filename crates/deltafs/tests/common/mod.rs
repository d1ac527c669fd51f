//! A volume over a fresh base, reached through a descriptor: nothing is mounted in the host's tree, so nothing can be
//! left behind.

#![allow(dead_code, reason = "every test file uses another part")]

pub(crate) mod mapper;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use deltafs::{IdMap, InUse, Options, Volume};
use rustix::fs::{Mode, OFlags};

/// A base, a place for data, and a volume over them.
pub(crate) struct Fixture {
    pub(crate) volume: Mounted,
    pub(crate) base: tempfile::TempDir,
    pub(crate) data: tempfile::TempDir,
}

/// A volume and a descriptor of its root.
pub(crate) struct Mounted {
    root: OwnedFd,
    pub(crate) volume: Volume,
}

/// Inodes that are in use, of whatever kind they are.
pub(crate) fn in_use(inodes: impl Iterator<Item = u64>) -> InUse {
    InUse {
        others: inodes.collect(),
        ..InUse::default()
    }
}

impl Mounted {
    pub(crate) fn new(volume: Volume) -> Self {
        let root = open_dir(volume.mount());
        Self { root, volume }
    }

    /// A path that leads to `path` in the volume.
    pub(crate) fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.root.as_raw_fd())).join(path)
    }

    /// The content of a file.
    pub(crate) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap()
    }

    /// Writes a file.
    pub(crate) fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        fs::write(self.at(path), content).unwrap();
    }
}

impl std::ops::Deref for Mounted {
    type Target = Volume;

    fn deref(&self) -> &Volume {
        &self.volume
    }
}

fn open_dir(fd: impl std::os::fd::AsFd) -> OwnedFd {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(fd, ".", flags, Mode::empty()).unwrap()
}

/// Makes a volume over the base that `fill` fills.
pub(crate) fn fixture(fill: impl FnOnce(&Path)) -> Fixture {
    fixture_with(fill, IdMap::IDENTITY, Vec::new())
}

/// As [`fixture`], with an id map and hidden paths.
pub(crate) fn fixture_with(fill: impl FnOnce(&Path), ids: IdMap, hidden: Vec<PathBuf>) -> Fixture {
    let base = tempfile::tempdir().unwrap();
    let data = tempfile::tempdir().unwrap();
    fill(base.path());
    let options = Options {
        base: File::open(base.path()).unwrap().into(),
        hidden,
        ids,
        data_dir: data.path().to_owned(),
        threads: 2,
    };
    let volume = Mounted::new(Volume::create(options).unwrap());
    Fixture { volume, base, data }
}

/// The names in a directory, sorted.
pub(crate) fn names(dir: impl AsRef<Path>) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Opens a file for reading and writing.
pub(crate) fn open_rw(path: impl AsRef<Path>) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).open(path).unwrap()
}

/// The whole content of an open file.
pub(crate) fn content(mut file: &File) -> String {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

/// Random numbers that are the same in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}
