//! Opening by path inside the sandbox's root.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};

use crate::env::Environment;

/// Flags that make a difference when a file is opened again; what was a one-time wish at the first
/// open (create, truncate) must not be wished again.
const KEPT: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_NONBLOCK
    | libc::O_DIRECT
    | libc::O_NOATIME
    | libc::O_SYNC
    | libc::O_PATH
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW;

/// How many names are tried for a directory that is there for a moment.
const NAMES: u32 = 100;
/// Who the processes are that enter it is not looked at: whoever is in a removed directory can only look.
const FOR_ALL: Mode = Mode::RWXU
    .union(Mode::RGRP)
    .union(Mode::XGRP)
    .union(Mode::ROTH)
    .union(Mode::XOTH);
/// What `O_TMPFILE` has beside `O_DIRECTORY`. A file that was made so keeps both among its flags.
const TEMPORARY: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// The flags with which to open a file so that its status flags become `flags`.
pub(crate) fn reopen_flags(flags: i32) -> i32 {
    let kept = match flags & TEMPORARY {
        0 => KEPT,
        _ => KEPT & !libc::O_DIRECTORY,
    };
    flags & kept | libc::O_CLOEXEC
}

/// Opens a path of the sandbox as its own root directory resolves it.
pub(crate) fn open(env: &dyn Environment, path: &[u8], flags: i32) -> io::Result<OwnedFd> {
    let flags = reopen_flags(flags) | flags & libc::O_NOCTTY;
    Ok(rustix::fs::openat2(
        env.root(),
        path,
        OFlags::from_bits_retain(flags as u32),
        Mode::empty(),
        ResolveFlags::IN_ROOT,
    )?)
}

/// The names of namespaces in `/proc/PID/ns`.
pub(crate) const NAMESPACES: [&str; 8] =
    ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// The name of the sandbox's own namespace that a link like `net:[4026532338]` leads to.
pub(crate) fn own_namespace(env: &dyn Environment, link: &[u8]) -> Option<String> {
    let name = link.split(|byte| *byte == b':').next()?;
    let name = NAMESPACES.iter().find(|known| known.as_bytes() == name)?;
    let own = std::fs::read_link(namespace_path(env, name)).ok()?;
    (own.as_os_str().as_bytes() == link).then(|| (*name).to_owned())
}

/// Opens one of the sandbox's own namespaces.
pub(crate) fn open_namespace(env: &dyn Environment, name: &str, flags: i32) -> io::Result<OwnedFd> {
    let flags = OFlags::from_bits_retain(flags as u32) | OFlags::CLOEXEC;
    Ok(rustix::fs::open(
        namespace_path(env, name),
        flags,
        Mode::empty(),
    )?)
}

fn namespace_path(env: &dyn Environment, name: &str) -> String {
    format!("/proc/{}/ns/{name}", env.init_pid())
}

/// What was made before the descriptors and is to be among them.
#[derive(Debug, Default)]
pub struct Prepared {
    pub(crate) removed: Removed,
    /// Masters of pseudo-terminals, by number.
    pub(crate) masters: BTreeMap<u32, OwnedFd>,
}

/// Directories that have been removed, in place of those that had been when the checkpoint was taken: the kernel revives none,
/// and one is like the other but for its number. By the numbers that they had.
#[derive(Debug, Default)]
pub(crate) struct Removed(HashMap<u64, OwnedFd>);

impl Removed {
    /// Opens an inode of the versioned filesystem, or what stands for it if it is a directory that had been removed.
    pub(crate) fn or_inode(
        &mut self,
        env: &dyn Environment,
        ino: u64,
        flags: i32,
    ) -> io::Result<OwnedFd> {
        match env.open_inode(ino, reopen_flags(flags)) {
            // Files without a name come back; directories do not.
            Err(e) if e.raw_os_error() == Some(libc::ESTALE) => {
                self.open(env, Some(ino), None, flags)
            }
            other => other,
        }
    }

    /// Opens the one that had this number, or another one if it is not known. It is called as `path` says, if nothing else is.
    pub(crate) fn open(
        &mut self,
        env: &dyn Environment,
        ino: Option<u64>,
        path: Option<&[u8]>,
        flags: i32,
    ) -> io::Result<OwnedFd> {
        let unknown;
        let made = match ino.map(|ino| self.0.entry(ino)) {
            Some(Entry::Occupied(made)) => made.into_mut(),
            Some(Entry::Vacant(new)) => new.insert(make_removed(env, path)?),
            None => {
                unknown = make_removed(env, path)?;
                &unknown
            }
        };
        let path = format!("/proc/self/fd/{}", made.as_raw_fd());
        let flags = OFlags::from_bits_retain(reopen_flags(flags) as u32) | OFlags::CLOEXEC;
        Ok(rustix::fs::open(path, flags, Mode::empty())?)
    }
}

fn make_removed(env: &dyn Environment, path: Option<&[u8]>) -> io::Result<OwnedFd> {
    let spares = (0..NAMES).map(|number| format!("/.removed-{number}").into_bytes());
    let mut error = io::ErrorKind::AlreadyExists.into();
    for path in path.map(<[u8]>::to_vec).into_iter().chain(spares) {
        match make_and_remove(env, &path) {
            Err(e) => error = e,
            opened => return opened,
        }
    }
    Err(error)
}

/// Opens a directory that is there only while this runs. What is there already is the program's own, and an error.
fn make_and_remove(env: &dyn Environment, path: &[u8]) -> io::Result<OwnedFd> {
    let slash = path.iter().rposition(|b| *b == b'/');
    let (above, name) = path.split_at(slash.map_or(0, |at| at + 1));
    let directory = libc::O_PATH | libc::O_DIRECTORY;
    let above = open(env, above, directory)?;
    rustix::fs::mkdirat(&above, name, FOR_ALL)?;
    // Whatever the service's umask is.
    let opened = rustix::fs::chmodat(&above, name, FOR_ALL, AtFlags::empty())
        .map_err(io::Error::from)
        .and_then(|()| open(env, path, directory));
    rustix::fs::unlinkat(&above, name, AtFlags::REMOVEDIR)?;
    opened
}
