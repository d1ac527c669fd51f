//! What is run in every tree. Each workload times itself, so that what it needs before and after does not count.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::base::{Packages, RARE_WORD, WHEEL};
use super::sites::Kind;
use super::{git, run};

/// Files that are created and deleted.
const SMALL_FILES: u32 = 5_000;
/// Bytes of the sequential and random workloads.
const SEQUENTIAL: usize = 256 << 20;
const CHUNK: usize = 1 << 20;
/// Blocks that are overwritten.
const RANDOM_BLOCKS: u64 = 8_192;
/// Appends of 4 KiB each.
const APPENDS: u32 = 4_096;

/// In which state a tree is when a workload runs in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tree {
    /// One tree for all repetitions; the first does not count.
    Warm,
    /// Mounted for this repetition.
    Fresh,
}

type Run = fn(&Path, &Packages) -> Result<Duration>;

/// A workload.
pub(super) struct Workload {
    pub(super) name: &'static str,
    pub(super) tree: Tree,
    /// Repetitions, in a quick run and otherwise.
    pub(super) repetitions: [u32; 2],
    pub(super) run: Run,
    /// The bare servers that it can be run on.
    pub(super) bare: &'static [Kind],
}

impl Workload {
    /// The same, on these bare servers too.
    const fn and(mut self, bare: &'static [Kind]) -> Self {
        self.bare = bare;
        self
    }

    /// Whether it can be run there.
    pub(super) fn runs_on(&self, kind: Kind) -> bool {
        !matches!(kind, Kind::Bare | Kind::Keeping) || self.bare.contains(&kind)
    }
}

/// For what only reads files of the repository,
const READS: &[Kind] = &[Kind::Bare];
/// and what writes files.
const WRITES: &[Kind] = &[Kind::Bare, Kind::Keeping];

const fn warm(name: &'static str, repetitions: [u32; 2], run: Run) -> Workload {
    Workload {
        name,
        tree: Tree::Warm,
        repetitions,
        run,
        bare: &[],
    }
}

const fn fresh(name: &'static str, repetitions: [u32; 2], run: Run) -> Workload {
    Workload {
        name,
        tree: Tree::Fresh,
        repetitions,
        run,
        bare: &[],
    }
}

/// All of them.
pub(super) const ALL: [Workload; 20] = [
    warm("git status", [7, 30], git_status),
    warm("find", [7, 30], find),
    warm("ls -lR", [7, 30], list),
    warm("grep -r", [7, 30], grep),
    warm("python import", [5, 20], import),
    warm("pytest collection", [3, 15], collect),
    fresh("cold first touch: git status", [3, 10], git_status).and(READS),
    fresh("cold first touch: find", [3, 10], find).and(READS),
    fresh("cold first touch: ls -lR", [3, 10], list).and(READS),
    fresh("cold first touch: grep -r", [3, 10], grep).and(READS),
    fresh("cold first touch: python import", [3, 10], import),
    fresh("cold first touch: pytest collection", [3, 10], collect),
    warm("untar 3,000 files", [3, 15], untar),
    warm("pip install of a wheel", [3, 10], install),
    warm("git checkout", [3, 15], checkout),
    warm("create and delete 5,000 files", [3, 15], create_and_delete),
    warm("sequential write 256 MiB", [3, 10], write).and(WRITES),
    warm("sequential read 256 MiB", [3, 10], read),
    warm("append 4 KiB", [3, 10], append).and(WRITES),
    warm("overwrite 4 KiB at random", [3, 10], overwrite).and(WRITES),
];

/// The first write into the large file: a tree of its own, for overlayfs copies the file.
pub(super) const FIRST_WRITE: Workload =
    fresh("first write into a large base file", [2, 5], first_write);

fn timed(command: &mut Command) -> Result<Duration> {
    let begun = Instant::now();
    run(command)?;
    Ok(begun.elapsed())
}

fn git_status(root: &Path, _: &Packages) -> Result<Duration> {
    timed(git(&root.join("repo")).args(["status", "--porcelain"]))
}

fn find(root: &Path, _: &Packages) -> Result<Duration> {
    let repo = root.join("repo");
    timed(
        Command::new("find")
            .arg(repo)
            .args(["-name", "*.c", "-newer", "/"]),
    )
}

fn list(root: &Path, _: &Packages) -> Result<Duration> {
    timed(Command::new("ls").arg("-lR").arg(root.join("repo")))
}

fn grep(root: &Path, _: &Packages) -> Result<Duration> {
    let options = ["-r", "-l", "--exclude-dir=.git", RARE_WORD];
    timed(Command::new("grep").args(options).arg(root.join("repo")))
}

fn import(root: &Path, packages: &Packages) -> Result<Duration> {
    let program = format!(
        "import sys; sys.path[:0] = [sys.argv[1]]; import {}",
        packages.imports
    );
    let mut python = Command::new(&packages.interpreter);
    python.args(["-I", "-S", "-B", "-c", &program]);
    timed(python.arg(root.join("site")))
}

/// Whether a workload can be done with these packages.
pub(super) fn is_possible(workload: &Workload, packages: &Packages) -> bool {
    packages.pytest || !workload.name.contains("pytest")
}

fn collect(root: &Path, packages: &Packages) -> Result<Duration> {
    const PROGRAM: &str =
        "import sys; sys.path[:0] = [sys.argv.pop(1)]; import pytest; sys.exit(pytest.main())";
    let mut python = Command::new(&packages.interpreter);
    python.args(["-I", "-S", "-B", "-c", PROGRAM]);
    python.arg(root.join("site"));
    python.args(["--collect-only", "-q", "-p", "no:cacheprovider"]);
    timed(python.arg(root.join("tests")))
}

fn install(root: &Path, packages: &Packages) -> Result<Duration> {
    let place = root.join("installed");
    let mut python = Command::new(&packages.interpreter);
    python.args([
        "-I",
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
    ]);
    python.args(["--disable-pip-version-check", "--no-compile", "--target"]);
    let time = timed(python.arg(&place).arg(root.join(WHEEL)))?;
    fs::remove_dir_all(&place)?;
    Ok(time)
}

fn untar(root: &Path, _: &Packages) -> Result<Duration> {
    let place = root.join("unpacked");
    fs::create_dir(&place)?;
    let archive = root.join("sources.tar");
    let options = [OsStr::new("-xf"), archive.as_os_str(), OsStr::new("-C")];
    let time = timed(Command::new("tar").args(options).arg(&place))?;
    fs::remove_dir_all(&place)?;
    Ok(time)
}

fn checkout(root: &Path, _: &Packages) -> Result<Duration> {
    let repo = root.join("repo");
    run(git(&repo).args(["checkout", "-q", "first"]))?;
    timed(git(&repo).args(["checkout", "-q", "second"]))
}

fn create_and_delete(root: &Path, _: &Packages) -> Result<Duration> {
    let place = root.join("small");
    fs::create_dir(&place)?;
    let begun = Instant::now();
    for index in 0..SMALL_FILES {
        fs::write(place.join(index.to_string()), "a few bytes")?;
    }
    for index in 0..SMALL_FILES {
        fs::remove_file(place.join(index.to_string()))?;
    }
    let time = begun.elapsed();
    fs::remove_dir(&place)?;
    Ok(time)
}

fn write(root: &Path, _: &Packages) -> Result<Duration> {
    let place = root.join("sequential");
    let chunk = vec![1; CHUNK];
    let begun = Instant::now();
    let mut file = File::create(&place)?;
    for _ in 0..SEQUENTIAL / CHUNK {
        file.write_all(&chunk)?;
    }
    drop(file);
    let time = begun.elapsed();
    fs::remove_file(&place)?;
    Ok(time)
}

/// Reads what this mount has not read yet.
fn read(root: &Path, _: &Packages) -> Result<Duration> {
    let mut file = File::open(root.join("large"))?;
    // What was read before is dropped, so that every filesystem has to bring it again.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    let mut chunk = vec![0; CHUNK];
    let begun = Instant::now();
    let mut left = SEQUENTIAL;
    while left > 0 {
        let got = file.read(&mut chunk)?;
        ensure!(got > 0, "the large file is too small");
        left = left.saturating_sub(got);
    }
    Ok(begun.elapsed())
}

fn append(root: &Path, _: &Packages) -> Result<Duration> {
    let place = root.join("log");
    let begun = Instant::now();
    let mut file = OpenOptions::new().create(true).append(true).open(&place)?;
    for _ in 0..APPENDS {
        file.write_all(&[2; 4096])?;
    }
    drop(file);
    let time = begun.elapsed();
    fs::remove_file(&place)?;
    Ok(time)
}

fn overwrite(root: &Path, _: &Packages) -> Result<Duration> {
    let place = root.join("random");
    if !place.exists() {
        fs::write(&place, vec![0; 64 << 20])?;
    }
    let file = OpenOptions::new().write(true).open(&place)?;
    let begun = Instant::now();
    for index in 0..RANDOM_BLOCKS {
        let block = index.wrapping_mul(2_654_435_761) % (16 << 10);
        file.write_all_at(&[3; 4096], block * 4096)?;
    }
    drop(file);
    Ok(begun.elapsed())
}

fn first_write(root: &Path, _: &Packages) -> Result<Duration> {
    let begun = Instant::now();
    let file = OpenOptions::new().write(true).open(root.join("large"))?;
    file.write_all_at(b"x", 123_456_789)?;
    drop(file);
    Ok(begun.elapsed())
}
