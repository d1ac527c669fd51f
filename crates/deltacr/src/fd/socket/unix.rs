//! Making unix sockets: names in the sandbox's filesystem, pairs, connections.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Gid, Mode, Uid};

use super::model::Socket;
use crate::ids::HostPid;
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
/// has brought back, leads nowhere: it gives way to a new one with the same owner and mode.
pub(super) fn bind(of: HostPid, end: BorrowedFd<'_>, image: &Socket) -> io::Result<()> {
    let Some(path) = path_of(&image.local) else {
        return sys::bind(end, &image.local);
    };
    inside(of, || {
        let old = rustix::fs::statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW).ok();
        let own = old.is_some_and(|old| image.file == Some(old.st_ino & u64::from(u32::MAX)));
        let mut aside = path.clone().into_os_string();
        aside.push(".deltabox-aside");
        if own {
            rustix::fs::unlink(&path)?;
        } else if old.is_some() {
            // Another socket's file has the name by now.
            rustix::fs::rename(&path, &aside)?;
        }
        let bound = with_parents(&path, || {
            sys::bind(end, &image.local)?;
            if own {
                Ok(())
            } else {
                Ok(rustix::fs::unlink(&path)?)
            }
        });
        if let Some(old) = old {
            if own {
                let (uid, gid) = (Uid::from_raw(old.st_uid), Gid::from_raw(old.st_gid));
                rustix::fs::chown(&path, Some(uid), Some(gid))?;
                rustix::fs::chmod(&path, Mode::from_raw_mode(old.st_mode))?;
            } else {
                rustix::fs::rename(&aside, &path)?;
            }
        }
        bound
    })
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

/// A pair made by the process itself, whose credentials the ends then tell (`SO_PEERCRED`).
pub(super) fn pair(remote: &mut Remote, kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut batch = Batch::new();
    let ends = batch.output(8);
    let made = batch.call(
        libc::SYS_socketpair,
        &[
            libc::AF_UNIX.into(),
            (kind | libc::SOCK_CLOEXEC).into(),
            0.into(),
            ends.into(),
        ],
    );
    let outcome = remote.run(&batch)?;
    outcome.result(made)?;
    let numbers = [outcome.int(ends.at(0, 4)), outcome.int(ends.at(4, 4))];
    let taken = remote
        .take_fd(numbers[0])
        .and_then(|a| Ok((a, remote.take_fd(numbers[1])?)));
    close(remote, &numbers)?;
    taken
}

/// A connection made by the process itself to a listening socket. Gives the connected end.
pub(super) fn connected(remote: &mut Remote, kind: i32, target: &Target) -> io::Result<OwnedFd> {
    let (lent, name) = match target {
        Target::File(file) => {
            let lent = remote.give_fds(&[file.as_fd()])?;
            let name = by_descriptor(lent[0]);
            (lent, name)
        }
        Target::Name(name) => (Vec::new(), name.clone()),
    };
    let mut batch = Batch::new();
    let flags = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let made = batch.must(
        libc::SYS_socket,
        &[libc::AF_UNIX.into(), flags.into(), 0.into()],
    );
    let address = batch.input(&name);
    let connect = batch.call(
        libc::SYS_connect,
        &[made.into(), address.into(), name.len().into()],
    );
    let outcome = remote.run(&batch)?;
    let number = outcome.result(made)? as i32;
    let taken = outcome.result(connect).and_then(|_| remote.take_fd(number));
    close(remote, &[vec![number], lent].concat())?;
    taken
}

fn close(remote: &mut Remote, numbers: &[i32]) -> io::Result<()> {
    crate::fd::install::close(remote, numbers)
}

/// Makes a socket listen, in the process that has it: peers are told its credentials.
pub(super) fn listen(remote: &mut Remote, fd: i32, backlog: i32) -> io::Result<()> {
    let mut batch = Batch::new();
    let call = batch.call(libc::SYS_listen, &[fd.into(), backlog.into()]);
    remote.run(&batch)?.result(call).map(drop)
}

/// Takes one end of a fresh connection from a listening socket.
pub(super) fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    // The flag is the open file's and is put right when it is settled.
    crate::sys::fd::set_status_flags(listener, libc::O_NONBLOCK)?;
    sys::accept(listener.as_fd())
}
