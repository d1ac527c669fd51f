//! The operations that both worlds are put through.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rustix::fs::{CWD, FallocateFlags, RenameFlags, XattrFlags};

use crate::common::mapper::Mapper;
use crate::dump::XATTR;

/// Room in which files grow.
const SIZE: u64 = 40_000;

/// One step.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Tree(TreeOp),
    Open(PathBuf),
    Close(usize),
    OnOpen(usize, Change),
    Checkpoint,
    OpenDir(PathBuf),
    CloseDir(usize),
    /// Whether the kernel is told of most files later.
    Rollback(usize, bool),
    Fork(usize),
}

/// A step on a path.
#[derive(Clone, Debug)]
pub(crate) enum TreeOp {
    Create(PathBuf),
    Change(PathBuf, Change),
    Mkdir(PathBuf),
    Rmdir(PathBuf),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf, u32),
    Link(PathBuf, PathBuf),
    Symlink(PathBuf, PathBuf),
    Chmod(PathBuf, u32),
    SetXattr(PathBuf, u8),
    RemoveXattr(PathBuf),
    List(PathBuf),
    Copy {
        from: PathBuf,
        to: PathBuf,
        offset: u64,
        at: u64,
        len: u64,
    },
}

/// A step on the content of a file.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Write { at: u64, len: usize, byte: u8 },
    Append { len: usize, byte: u8 },
    Truncate(u64),
    Allocate { at: u64, len: u64, keep: bool },
    Punch { at: u64, len: u64 },
    Zero { at: u64, len: u64 },
    Map { at: u64, byte: u8 },
}

type Outcome = Result<String, i32>;

impl TreeOp {
    pub(crate) fn run(&self, root: &Path, mapper: &mut Mapper) -> Outcome {
        let at = |path: &Path| root.join(path);
        let done = match self {
            Self::Create(path) => OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(at(path))
                .map(drop),
            Self::Change(path, change) => {
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(at(path))
                    .map_err(errno)?;
                return change.run(&file, mapper);
            }
            Self::Mkdir(path) => fs::create_dir(at(path)),
            Self::Rmdir(path) => fs::remove_dir(at(path)),
            Self::Unlink(path) => fs::remove_file(at(path)),
            Self::Rename(from, to, flags) => {
                let flags = RenameFlags::from_bits_retain(*flags);
                rustix::fs::renameat_with(CWD, at(from), CWD, at(to), flags).map_err(Into::into)
            }
            Self::Link(from, to) => fs::hard_link(at(from), at(to)),
            Self::Symlink(target, path) => std::os::unix::fs::symlink(target, at(path)),
            Self::Chmod(path, mode) => {
                fs::set_permissions(at(path), fs::Permissions::from_mode(*mode))
            }
            Self::SetXattr(path, byte) => {
                rustix::fs::lsetxattr(at(path), XATTR, &[*byte; 9], XattrFlags::empty())
                    .map_err(Into::into)
            }
            Self::RemoveXattr(path) => {
                rustix::fs::lremovexattr(at(path), XATTR).map_err(Into::into)
            }
            Self::List(path) => return list(&at(path)),
            Self::Copy {
                from,
                to,
                offset,
                at: place,
                len,
            } => return copy(&at(from), &at(to), (*offset, *place), *len),
        };
        done.map(|()| String::new()).map_err(errno)
    }
}

fn copy(from: &Path, to: &Path, (mut offset, mut at): (u64, u64), len: u64) -> Outcome {
    let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
    let (from, to) = (open(from).map_err(errno)?, open(to).map_err(errno)?);
    let (offset, at) = (Some(&mut offset), Some(&mut at));
    let len = usize::try_from(len).unwrap();
    match rustix::fs::copy_file_range(&from, offset, &to, at, len) {
        Ok(copied) => Ok(copied.to_string()),
        Err(error) => Err(error.raw_os_error()),
    }
}

fn list(dir: &Path) -> Outcome {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(errno)? {
        let entry = entry.map_err(errno)?;
        names.push(format!(
            "{:?} {:?}",
            entry.file_name(),
            entry.file_type().map_err(errno)?
        ));
    }
    names.sort();
    Ok(names.join(" "))
}

impl Change {
    pub(crate) fn run(&self, file: &File, mapper: &mut Mapper) -> Outcome {
        let done = match *self {
            Self::Write { at, len, byte } => file.write_all_at(&vec![byte; len], at),
            Self::Append { len, byte } => file
                .metadata()
                .and_then(|meta| file.write_all_at(&vec![byte; len], meta.len())),
            Self::Truncate(size) => file.set_len(size),
            Self::Allocate { at, len, keep } => {
                let flags = if keep {
                    FallocateFlags::KEEP_SIZE
                } else {
                    FallocateFlags::empty()
                };
                rustix::fs::fallocate(file, flags, at, len).map_err(Into::into)
            }
            Self::Punch { at, len } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(file, flags, at, len).map_err(Into::into)
            }
            Self::Zero { at, len } => {
                rustix::fs::fallocate(file, FallocateFlags::ZERO_RANGE, at, len).map_err(Into::into)
            }
            Self::Map { at, byte } => write_mapped(file, at, byte, mapper),
        };
        done.map_err(errno)?;
        let len = file.metadata().map_err(errno)?.len();
        Ok(len.to_string())
    }
}

/// Changes a byte through a shared mapping, and leaves it to the kernel when to write it.
fn write_mapped(file: &File, at: u64, byte: u8, mapper: &mut Mapper) -> io::Result<()> {
    let len = usize::try_from(file.metadata()?.len()).unwrap();
    if len > 0 {
        let mapping = mapper.map(file, len, true);
        mapper.set(mapping, usize::try_from(at).unwrap() % len, byte);
        mapper.unmap(mapping);
    }
    Ok(())
}

fn errno(error: io::Error) -> i32 {
    error.raw_os_error().unwrap_or(-1)
}

/// What is there before the first step.
pub(crate) fn fill_base(base: &Path) {
    fs::create_dir_all(base.join("d1/d2")).unwrap();
    fs::write(base.join("f1"), vec![b'1'; 10_000]).unwrap();
    fs::write(base.join("d1/f2"), vec![b'2'; 5000]).unwrap();
    fs::write(base.join("d1/d2/f3"), "3").unwrap();
    let sparse = File::create(base.join("d1/sparse")).unwrap();
    sparse.write_all_at(b"end", 30_000).unwrap();
    fs::hard_link(base.join("f1"), base.join("d1/linked")).unwrap();
    std::os::unix::fs::symlink("d1/f2", base.join("link")).unwrap();
    fs::write(base.join(OsStr::from_bytes(b"\xff\xfe odd")), "odd").unwrap();
}

fn path() -> impl Strategy<Value = PathBuf> {
    let names: Vec<PathBuf> = ["f1", "d1", "link", "new"]
        .iter()
        .map(PathBuf::from)
        .collect();
    let below = [
        "f2", "d2", "linked", "sparse", "new", "d2/f3", "d2/new", "d2/d2",
    ];
    let below: Vec<PathBuf> = below.iter().map(PathBuf::from).collect();
    prop_oneof![
        4 => prop::sample::select(names),
        6 => prop::sample::select(below.clone()).prop_map(|path| Path::new("d1").join(path)),
        2 => prop::sample::select(below).prop_map(|path| Path::new("new").join(path)),
        1 => Just(PathBuf::from(OsStr::from_bytes(b"\xff\xfe odd"))),
    ]
}

/// Where a copy begins: at the beginning, at a block, anywhere.
fn place() -> impl Strategy<Value = u64> {
    prop_oneof![2 => Just(0), 2 => (0..4_u64).prop_map(|block| block * 4096), 1 => 0..SIZE]
}

/// How much is copied.
fn copied() -> impl Strategy<Value = u64> {
    prop_oneof![Just(SIZE * 2), 1..20_000_u64, Just(8192)]
}

fn change() -> impl Strategy<Value = Change> {
    let at = || prop_oneof![0..SIZE, (0..SIZE / 4096).prop_map(|block| block * 4096)];
    let len = || prop_oneof![1..9000_u64, (1..3_u64).prop_map(|blocks| blocks * 4096)];
    let long = || len().prop_map(|len| usize::try_from(len).unwrap());
    prop_oneof![
        4 => (at(), long(), any::<u8>()).prop_map(|(at, len, byte)| Change::Write { at, len, byte }),
        2 => (long(), any::<u8>()).prop_map(|(len, byte)| Change::Append { len, byte }),
        2 => at().prop_map(Change::Truncate),
        1 => (at(), len(), any::<bool>()).prop_map(|(at, len, keep)| Change::Allocate { at, len, keep }),
        1 => (at(), len()).prop_map(|(at, len)| Change::Punch { at, len }),
        1 => (at(), len()).prop_map(|(at, len)| Change::Zero { at, len }),
        2 => (at(), any::<u8>()).prop_map(|(at, byte)| Change::Map { at, byte }),
    ]
}

fn tree_op() -> impl Strategy<Value = TreeOp> {
    let modes = vec![0o644, 0o600, 0o755, 0o4755, 0o2755];
    prop_oneof![
        3 => path().prop_map(TreeOp::Create),
        6 => (path(), change()).prop_map(|(path, change)| TreeOp::Change(path, change)),
        2 => path().prop_map(TreeOp::Mkdir),
        2 => path().prop_map(TreeOp::Rmdir),
        4 => path().prop_map(TreeOp::Unlink),
        5 => (path(), path(), 0..3_u32).prop_map(|(from, to, flags)| TreeOp::Rename(from, to, flags)),
        2 => (path(), path()).prop_map(|(from, to)| TreeOp::Link(from, to)),
        1 => (path(), path()).prop_map(|(target, path)| TreeOp::Symlink(target, path)),
        1 => (path(), prop::sample::select(modes)).prop_map(|(path, mode)| TreeOp::Chmod(path, mode)),
        1 => (path(), any::<u8>()).prop_map(|(path, byte)| TreeOp::SetXattr(path, byte)),
        1 => path().prop_map(TreeOp::RemoveXattr),
        1 => path().prop_map(TreeOp::List),
        2 => (path(), path(), place(), place(), copied()).prop_map(|(from, to, offset, at, len)| TreeOp::Copy { from, to, offset, at, len }),
    ]
}

/// Any step.
pub(crate) fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        20 => tree_op().prop_map(Op::Tree),
        3 => path().prop_map(Op::Open),
        1 => any::<usize>().prop_map(Op::Close),
        4 => (any::<usize>(), change()).prop_map(|(which, change)| Op::OnOpen(which, change)),
        2 => Just(Op::Checkpoint),
        2 => path().prop_map(Op::OpenDir),
        1 => any::<usize>().prop_map(Op::CloseDir),
        2 => (any::<usize>(), any::<bool>()).prop_map(|(which, sparing)| Op::Rollback(which, sparing)),
        1 => any::<usize>().prop_map(Op::Fork),
    ]
}
