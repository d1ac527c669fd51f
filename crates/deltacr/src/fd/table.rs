//! Reading the descriptor table of a process from `/proc/PID/fd` and `/proc/PID/fdinfo`.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, RawDir, SeekFrom, Statx, StatxFlags};

use super::fdinfo::FdInfo;
use crate::ids::HostPid;
use crate::remote::Remote;

/// What `stat(2)` says of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
    pub(crate) mode: u32,
    pub(crate) rdev: u64,
}

/// One slot of a descriptor table as the kernel shows it.
#[derive(Clone, Debug)]
pub(crate) struct RawSlot {
    pub(crate) fd: i32,
    pub(crate) file: FileId,
    pub(crate) info: FdInfo,
}

/// The open `/proc` directories of one process.
pub(crate) struct ProcFds {
    fds: Arc<File>,
    infos: Arc<File>,
}

impl ProcFds {
    pub(crate) fn open(pid: HostPid) -> io::Result<Self> {
        let dir = |name: &str| File::open(format!("/proc/{pid}/{name}")).map(Arc::new);
        Ok(Self {
            fds: dir("fd")?,
            infos: dir("fdinfo")?,
        })
    }

    /// Those of a process that was met before may be open already.
    pub(crate) fn of(remote: &Remote) -> io::Result<Self> {
        Ok(Self {
            fds: remote.proc_file("fd")?,
            infos: remote.proc_file("fdinfo")?,
        })
    }

    /// Every open descriptor, in ascending order.
    pub(crate) fn slots(&self) -> io::Result<Vec<RawSlot>> {
        rustix::fs::seek(&self.fds, SeekFrom::Start(0))?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut names = RawDir::new(&*self.fds, &mut buffer);
        let mut slots = Vec::new();
        while let Some(entry) = names.next() {
            let entry = entry?;
            let name = entry.file_name();
            if let Some(fd) = number(name) {
                slots.push(self.slot(fd, name)?);
            }
        }
        slots.sort_unstable_by_key(|slot| slot.fd);
        Ok(slots)
    }

    /// One of our own, if this is our table.
    pub(crate) fn slot_of(&self, fd: BorrowedFd<'_>) -> io::Result<RawSlot> {
        let fd = fd.as_raw_fd();
        self.slot(fd, &CString::new(fd.to_string())?)
    }

    fn slot(&self, fd: i32, name: &CStr) -> io::Result<RawSlot> {
        let flags = AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(&*self.fds, name, flags, StatxFlags::BASIC_STATS)?;
        Ok(RawSlot {
            fd,
            file: FileId::of(&stat),
            info: self.info(name)?,
        })
    }

    fn info(&self, name: &CStr) -> io::Result<FdInfo> {
        let file = rustix::fs::openat(
            &*self.infos,
            name,
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let mut small = [0_u8; 2048];
        let n = rustix::io::read(&file, &mut small)?;
        let parsed = if n < small.len() / 2 {
            FdInfo::parse(&small[..n])
        } else {
            let mut all = small[..n].to_vec();
            read_to_end(file.as_fd(), &mut all)?;
            FdInfo::parse(&all)
        };
        parsed.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable fdinfo"))
    }

    /// What the descriptor's link says: a path as the process' mount namespace has it, or `anon_inode:[…]`.
    pub(crate) fn link(&self, fd: i32) -> io::Result<Vec<u8>> {
        let link = rustix::fs::readlinkat(&*self.fds, fd.to_string(), Vec::new())?;
        Ok(link.into_bytes())
    }
}

impl FileId {
    fn of(stat: &Statx) -> Self {
        Self {
            dev: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            mode: u32::from(stat.stx_mode),
            rdev: rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
        }
    }

    /// The `S_IFMT` part of the mode; zero for the kernel's anonymous files.
    pub(crate) fn format(&self) -> u32 {
        self.mode & libc::S_IFMT
    }
}

fn number(name: &CStr) -> Option<i32> {
    std::str::from_utf8(name.to_bytes()).ok()?.parse().ok()
}

fn read_to_end(file: BorrowedFd<'_>, into: &mut Vec<u8>) -> io::Result<()> {
    let mut chunk = [0_u8; 16 * 1024];
    loop {
        match rustix::io::read(file, &mut chunk)? {
            0 => return Ok(()),
            n => into.extend_from_slice(&chunk[..n]),
        }
    }
}

/// The name of a process (`comm`), for messages.
pub(crate) fn name_of(pid: HostPid) -> String {
    std::fs::read(format!("/proc/{pid}/comm"))
        .map(|name| String::from_utf8_lossy(&name).trim_end().to_owned())
        .unwrap_or_default()
}
