//! Making unix sockets: names in the sandbox's filesystem, pairs, connections.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Gid, Mode, Stat, Uid};

use super::model::Socket;
use crate::fd::guise::{Guise, in_guise};
use crate::ids::{HostPid, InnerPid};
use crate::remote::{Batch, Remote};
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

/// Binds a fresh socket to the name that the image has. The file of the old socket, which the filesystem
/// has brought back, leads nowhere: it gives way to a new one with the same owner and mode, under all its names. It may have others than
/// the one that it was bound to, for programs rename the file, or link it, when the socket listens.
pub(super) fn bind(of: HostPid, end: BorrowedFd<'_>, image: &Socket) -> io::Result<()> {
    let Some(path) = path_of(&image.local) else {
        return sys::bind(end, &image.local);
    };
    inside(of, || {
        let there = rustix::fs::statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW).ok();
        let names = image.file.map(|file| names(&path, there.as_ref(), file));
        let names = names.transpose()?.unwrap_or_default();
        let old = names.first().map(|name| stat(name)).transpose()?;
        let own = names.contains(&path);
        let other = there.is_some() && !own;
        let aside = aside(&path);
        if own {
            rustix::fs::unlink(&path)?;
        } else if other {
            rustix::fs::rename(&path, &aside)?;
        }
        let bound = with_parents(&path, || {
            sys::bind(end, &image.local)?;
            if let Some(old) = old {
                let (uid, gid) = (Uid::from_raw(old.st_uid), Gid::from_raw(old.st_gid));
                rustix::fs::chown(&path, Some(uid), Some(gid))?;
                rustix::fs::chmod(&path, Mode::from_raw_mode(old.st_mode))?;
            }
            for name in names.iter().filter(|name| **name != path) {
                replace(name, &path)?;
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

fn stat(path: &Path) -> io::Result<Stat> {
    Ok(rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// The names in one directory of the file that a socket was bound to as `path`, where `there` is what has that name. Of the file's
/// number only the lower half is known.
fn names(path: &Path, there: Option<&Stat>, file: u64) -> io::Result<Vec<PathBuf>> {
    let is_it = |number: u64| number & u64::from(u32::MAX) == file;
    if there.is_some_and(|there| is_it(there.st_ino) && there.st_nlink == 1) {
        return Ok(vec![path.to_owned()]);
    }
    let above = path.parent().unwrap_or(Path::new("/"));
    let opened = match above.as_os_str().is_empty() {
        true => fs::read_dir("."),
        false => fs::read_dir(above),
    };
    let mut names = Vec::new();
    // The directory may be gone with the name.
    for entry in opened.into_iter().flatten() {
        let entry = entry?;
        if is_it(entry.ino()) && entry.file_type()?.is_socket() {
            names.push(above.join(entry.file_name()));
        }
    }
    Ok(names)
}

/// Makes `name` another name of the file at `path`, whatever it was.
fn replace(name: &Path, path: &Path) -> io::Result<()> {
    let aside = aside(name);
    rustix::fs::link(path, &aside)?;
    Ok(rustix::fs::rename(&aside, name)?)
}

/// A name beside another that nobody else has.
fn aside(path: &Path) -> PathBuf {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".deltabox-aside");
    aside.into()
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
    close(remote, &numbers)?;
    taken
}

/// A connection made by the process itself to a listening socket. `name` gives the connecting end its address before. Gives
/// that end.
pub(super) fn connected(
    remote: &mut Remote,
    guise: Option<Guise>,
    kind: i32,
    target: &Target,
    name: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
) -> io::Result<OwnedFd> {
    let (mut lent, address) = match target {
        Target::File(file) => {
            let lent = remote.give_fds(&[file.as_fd()])?;
            let name = by_descriptor(lent[0]);
            (lent, name)
        }
        Target::Name(name) => (Vec::new(), name.clone()),
    };
    let mut batch = Batch::new();
    let flags = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let args = [libc::AF_UNIX.into(), flags.into(), 0.into()];
    let made = batch.call(libc::SYS_socket, &args);
    let number = remote.run(&batch)?.result(made)? as i32;
    lent.push(number);
    let taken = remote.take_fd(number).and_then(|end| {
        name(end.as_fd())?;
        connect(remote, guise, number, &address)?;
        Ok(end)
    });
    close(remote, &lent)?;
    taken
}

fn connect(
    remote: &mut Remote,
    guise: Option<Guise>,
    number: i32,
    address: &[u8],
) -> io::Result<()> {
    let mut batch = Batch::new();
    let bytes = batch.input(address);
    let args = [number.into(), bytes.into(), address.len().into()];
    let call = in_guise(&mut batch, guise, |b| b.call(libc::SYS_connect, &args));
    match remote.run(&batch)?.result(call) {
        // Who may connect to it may have changed since.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied && guise.is_some() => {
            connect(remote, None, number, address)
        }
        done => done.map(drop),
    }
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

fn close(remote: &mut Remote, numbers: &[i32]) -> io::Result<()> {
    crate::fd::install::close(remote, numbers)
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
