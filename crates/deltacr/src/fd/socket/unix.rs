//! Making unix sockets: names in the sandbox's filesystem, pairs, connections.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Gid, Mode, Stat, StatxFlags, Uid};

use super::model::Socket;
use crate::env::Environment;
use crate::fd::guise::{Guise, in_guise};
use crate::fd::path;
use crate::ids::{HostPid, InnerPid};
use crate::remote::{Batch, CallId, Remote};
use crate::sys::socket as sys;

/// Runs something with the root and the working directory of a process.
fn inside<T: Send>(of: HostPid, act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let place = |link| PathBuf::from(format!("/proc/{of}/{link}"));
    sys::elsewhere(&place("root"), &place("cwd"), act)
}

/// The path of an address, unless it is an abstract one.
fn path_of(address: &[u8]) -> Option<PathBuf> {
    let name = address.get(2..).filter(|name| name.first() != Some(&0))?;
    let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
    (end > 0).then(|| PathBuf::from(OsStr::from_bytes(&name[..end])))
}

/// Binds a fresh socket to a name. `file` is the number of the old socket's file, which the filesystem has brought back and which leads
/// nowhere: it gives way to a new one with the same owner and mode, under all its names. It may have others than the one that it was
/// bound to, for programs rename the file, or link it, when the socket listens.
pub(super) fn bind(
    env: &dyn Environment,
    of: HostPid,
    end: BorrowedFd<'_>,
    (local, file): (&[u8], Option<u64>),
) -> io::Result<()> {
    let Some(path) = path_of(local) else {
        return sys::bind(end, local);
    };
    let file = file.and_then(|file| OldFile::find(env, file));
    inside(of, || {
        let there = stat(CWD, &path).ok();
        let is_old = |there: &Stat| file.as_ref().is_some_and(|file| file.is(there));
        let own = there.as_ref().is_some_and(is_old);
        let other = there.is_some() && !own;
        let aside = aside(path.as_os_str());
        if own {
            rustix::fs::unlink(&path)?;
        } else if other {
            rustix::fs::rename(&path, &aside)?;
        }
        let bound = with_parents(&path, || {
            sys::bind(end, local)?;
            if let Some(file) = &file {
                file.replace_by(&path)?;
            }
            match own {
                true => Ok(()),
                false => Ok(rustix::fs::unlink(&path)?),
            }
        });
        if other {
            // Another file has the name by now.
            rustix::fs::rename(&aside, &path)?;
        }
        bound
    })
}

/// The file of a socket that is no more: what it is like, and its names in one directory.
struct OldFile {
    directory: OwnedFd,
    names: Vec<OsString>,
    stat: Stat,
}

impl OldFile {
    /// A file of the versioned filesystem, if it has a name.
    fn find(env: &dyn Environment, ino: u64) -> Option<Self> {
        let file = env.open_inode(ino, libc::O_PATH | libc::O_NOFOLLOW).ok()?;
        let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
        let above = path.parent()?.as_os_str().as_bytes();
        let directory = path::open(env, above, libc::O_RDONLY | libc::O_DIRECTORY).ok()?;
        let name = path.file_name()?;
        let stat = stat(&directory, name).ok()?;
        let names = match stat.st_nlink {
            _ if stat.st_ino != ino => return None,
            1 => vec![name.to_owned()],
            _ => names_of(&directory, ino).ok()?,
        };
        Some(Self {
            directory,
            names,
            stat,
        })
    }

    fn is(&self, other: &Stat) -> bool {
        is_same(&self.stat, other)
    }

    /// Gives another file its owner, its mode and its names.
    fn replace_by(&self, path: &Path) -> io::Result<()> {
        let (uid, gid) = (
            Uid::from_raw(self.stat.st_uid),
            Gid::from_raw(self.stat.st_gid),
        );
        rustix::fs::chown(path, Some(uid), Some(gid))?;
        rustix::fs::chmod(path, Mode::from_raw_mode(self.stat.st_mode))?;
        let new = stat(CWD, path)?;
        let here = &self.directory;
        for name in &self.names {
            // One of them may be that which it was bound to.
            if !stat(here, name).is_ok_and(|there| is_same(&there, &new)) {
                let aside = aside(name);
                rustix::fs::linkat(CWD, path, here, &aside, AtFlags::empty())?;
                rustix::fs::renameat(here, &aside, here, name)?;
            }
        }
        Ok(())
    }
}

/// The names of a file in a directory.
fn names_of(directory: &OwnedFd, ino: u64) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        if entry.ino() == ino {
            names.push(OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
        }
    }
    Ok(names)
}

fn stat(directory: impl AsFd, name: impl rustix::path::Arg) -> io::Result<Stat> {
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    Ok(rustix::fs::statat(directory, name, flags)?)
}

fn is_same(a: &Stat, b: &Stat) -> bool {
    (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
}

/// A name beside another that nobody else has.
fn aside(name: &OsStr) -> OsString {
    let mut aside = name.to_owned();
    aside.push(".deltabox-aside");
    aside
}

/// The number of the file that a socket is bound to, if it is on the versioned filesystem.
pub(super) fn file_of(
    env: &dyn Environment,
    end: BorrowedFd<'_>,
    local: &[u8],
) -> io::Result<Option<u64>> {
    if path_of(local).is_none() {
        return Ok(None);
    }
    let file = sys::file_of_unix(end)?;
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(&file, "", flags, StatxFlags::INO)?;
    let device = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
    Ok((device == env.fs_device()).then_some(stat.stx_ino))
}

/// Makes the directories above a name that are not there any more, for as long as `act` takes.
fn with_parents(path: &Path, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let missing = |dir: &&Path| {
        !dir.as_os_str().is_empty() && rustix::fs::statat(CWD, *dir, AtFlags::empty()).is_err()
    };
    let missing: Vec<&Path> = path.ancestors().skip(1).take_while(missing).collect();
    let mut made = Vec::new();
    let mut result = Ok(());
    for dir in missing.into_iter().rev() {
        result = rustix::fs::mkdir(dir, Mode::RWXU).map_err(io::Error::from);
        if result.is_err() {
            break;
        }
        made.push(dir);
    }
    let result = result.and_then(|()| act());
    for dir in made.into_iter().rev() {
        rustix::fs::rmdir(dir)?;
    }
    result
}

/// Where another socket is reached.
pub(super) enum Target {
    /// By the file that it is bound to, whatever that is called by now.
    File(OwnedFd),
    /// By its abstract name.
    Name(Vec<u8>),
}

impl Target {
    /// Where a socket with a name is reached: by its file if it has one, for the name may be gone, or another's.
    pub(super) fn of(end: BorrowedFd<'_>, image: &Socket) -> io::Result<Self> {
        match path_of(&image.local) {
            Some(_) => sys::file_of_unix(end).map(Self::File),
            None => Ok(Self::Name(image.local.clone())),
        }
    }

    /// The address, as the supervisor has it.
    pub(super) fn address(&self) -> Vec<u8> {
        match self {
            Self::File(file) => by_descriptor(file.as_raw_fd()),
            Self::Name(name) => name.clone(),
        }
    }
}

/// The address of a socket by a descriptor of its file.
fn by_descriptor(fd: i32) -> Vec<u8> {
    let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    address.extend_from_slice(format!("/proc/self/fd/{fd}\0").as_bytes());
    address
}

/// A pair made by the process itself, which the ends then take for their peer (`SO_PEERCRED`).
pub(super) fn pair(
    remote: &mut Remote,
    guise: Option<Guise>,
    kind: i32,
) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut batch = Batch::new();
    let ends = batch.output(8);
    let args = [
        libc::AF_UNIX.into(),
        (kind | libc::SOCK_CLOEXEC).into(),
        0.into(),
        ends.into(),
    ];
    let made = in_guise(&mut batch, guise, |b| b.call(libc::SYS_socketpair, &args));
    let outcome = remote.run(&batch)?;
    outcome.result(made)?;
    let numbers = [outcome.int(ends.at(0, 4)), outcome.int(ends.at(4, 4))];
    let taken = remote
        .take_fd(numbers[0])
        .and_then(|a| Ok((a, remote.take_fd(numbers[1])?)));
    remote.close(&numbers)?;
    taken
}

/// A connection made by the process itself to a listening socket. `name` gives the connecting end its address before. `root` is the
/// sandbox's root directory. Gives that end.
pub(super) fn connected(
    remote: &mut Remote,
    guise: Option<Guise>,
    kind: i32,
    (target, root): (&Target, BorrowedFd<'_>),
    name: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
) -> io::Result<OwnedFd> {
    let mut lent = match target {
        Target::File(file) => remote.give_fds(&[file.as_fd(), root])?,
        Target::Name(_) => Vec::new(),
    };
    let way = match (target, lent.as_slice()) {
        (Target::Name(name), _) => Way::Name(name.clone()),
        (_, [file, root, ..]) => Way::File {
            file: *file,
            root: *root,
        },
        _ => return Err(io::ErrorKind::NotFound.into()),
    };
    let mut batch = Batch::new();
    let flags = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let args = [libc::AF_UNIX.into(), flags.into(), 0.into()];
    let made = batch.call(libc::SYS_socket, &args);
    let number = remote.run(&batch)?.result(made)? as i32;
    lent.push(number);
    let taken = remote.take_fd(number).and_then(|end| {
        name(end.as_fd())?;
        match (connect(remote, guise, number, &way), target) {
            // Who may connect to it may have changed since, and so may have who it is that does.
            (Err(e), Target::File(file)) if e.kind() == io::ErrorKind::PermissionDenied => {
                let _open = OpenToAll::make(file.as_fd())?;
                connect(remote, guise, number, &way)?;
            }
            (connected, _) => connected?,
        }
        Ok(end)
    });
    remote.close(&lent)?;
    taken
}

/// The file of a socket to which everybody may connect for a moment.
struct OpenToAll<'a> {
    file: BorrowedFd<'a>,
    before: Mode,
}

impl<'a> OpenToAll<'a> {
    fn make(file: BorrowedFd<'a>) -> io::Result<Self> {
        let before = Mode::from_raw_mode(rustix::fs::fstat(file)?.st_mode);
        set_mode(file, before | Mode::WUSR | Mode::WGRP | Mode::WOTH)?;
        Ok(Self { file, before })
    }
}

impl Drop for OpenToAll<'_> {
    fn drop(&mut self) {
        if let Err(error) = set_mode(self.file, self.before) {
            tracing::warn!(%error, "everybody may connect to a socket from now on");
        }
    }
}

/// The mode of a file of which only a handle is open.
fn set_mode(file: BorrowedFd<'_>, mode: Mode) -> io::Result<()> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::chmod(path, mode)?)
}

/// How a process reaches a socket.
enum Way {
    /// By its abstract name.
    Name(Vec<u8>),
    /// By its file, of which it has this descriptor; and one of the sandbox's root directory, for in another root it has no `/proc`.
    File { file: i32, root: i32 },
}

fn connect(remote: &mut Remote, guise: Option<Guise>, number: i32, way: &Way) -> io::Result<()> {
    match way {
        Way::Name(name) => connect_to(remote, guise, number, name),
        Way::File { file, root } => {
            match connect_to(remote, guise, number, &by_descriptor(*file)) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    connect_from(remote, guise, number, (*file, *root))
                }
                done => done,
            }
        }
    }
}

fn connect_to(
    remote: &mut Remote,
    guise: Option<Guise>,
    number: i32,
    address: &[u8],
) -> io::Result<()> {
    let mut batch = Batch::new();
    let call = add_connect(&mut batch, guise, number, address);
    remote.run(&batch)?.result(call).map(drop)
}

/// The same from another working directory. That it can come back is tried first.
fn connect_from(
    remote: &mut Remote,
    guise: Option<Guise>,
    number: i32,
    (file, root): (i32, i32),
) -> io::Result<()> {
    let mut batch = Batch::new();
    let dot = batch.input(b".\0");
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    let args = [libc::AT_FDCWD.into(), dot.into(), flags.into(), 0.into()];
    let here = batch.must(libc::SYS_openat, &args);
    let back = batch.must(libc::SYS_fchdir, &[here.into()]);
    let gone = batch.must(libc::SYS_fchdir, &[root.into()]);
    let mut address = by_descriptor(file);
    // Relative to there.
    address.remove(2);
    let call = add_connect(&mut batch, guise, number, &address);
    batch.call(libc::SYS_fchdir, &[here.into()]);
    batch.call(libc::SYS_close, &[here.into()]);
    let outcome = remote.run(&batch)?;
    [here, back, gone, call]
        .into_iter()
        .try_for_each(|call| outcome.result(call).map(drop))
}

fn add_connect(batch: &mut Batch, guise: Option<Guise>, number: i32, address: &[u8]) -> CallId {
    let bytes = batch.input(address);
    let args = [number.into(), bytes.into(), address.len().into()];
    in_guise(batch, guise, |b| b.call(libc::SYS_connect, &args))
}

/// The number of the process that a socket takes its peer for, as the process that has it counts; 0 if it is not known there.
pub(super) fn peer_process(remote: &mut Remote, fd: i32) -> io::Result<InnerPid> {
    let mut batch = Batch::new();
    let told = batch.output(12);
    let len = batch.input(&12_u32.to_ne_bytes());
    let args = [
        fd.into(),
        libc::SOL_SOCKET.into(),
        libc::SO_PEERCRED.into(),
        told.into(),
        len.into(),
    ];
    let call = batch.call(libc::SYS_getsockopt, &args);
    let outcome = remote.run(&batch)?;
    outcome.result(call)?;
    Ok(InnerPid(outcome.int(told.at(0, 4))))
}

/// Makes a socket listen, in a process that has it: those who connect take that for their peer.
pub(super) fn listen(
    remote: &mut Remote,
    guise: Option<Guise>,
    fd: i32,
    backlog: i32,
) -> io::Result<()> {
    let mut batch = Batch::new();
    let args = [fd.into(), backlog.into()];
    let call = in_guise(&mut batch, guise, |b| b.call(libc::SYS_listen, &args));
    remote.run(&batch)?.result(call).map(drop)
}

/// Takes one end of a fresh connection from a listening socket.
pub(super) fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    // The flag is the open file's and is put right when it is settled.
    crate::sys::fd::set_status_flags(listener, libc::O_NONBLOCK)?;
    sys::accept(listener.as_fd())
}
