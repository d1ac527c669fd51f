//! Reading the descriptor table of a process from `/proc/PID/fd` and `/proc/PID/fdinfo`.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, RawDir, SeekFrom, Statx, StatxFlags};

use super::fdinfo::FdInfo;
use crate::ids::HostPid;
use crate::procfs::OpenFiles;
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

/// So many `fdinfo` files of a process stay open: those of its lowest descriptors.
const KEEP_OPEN: usize = 4;

/// What is known of the descriptors of a process from an earlier visit.
#[derive(Debug, Default)]
pub(crate) struct KnownSlots(BTreeMap<i32, KnownSlot>);

/// What a descriptor led to.
#[derive(Debug)]
struct KnownSlot {
    /// Its `fdinfo` file. The kernel looks what the descriptor is when this is read, not when it is opened.
    info: Option<OwnedFd>,
    /// See [`FdInfo::file`].
    which: (i64, u64),
    file: FileId,
}

/// The open `/proc` directories of one process.
pub(crate) struct ProcFds {
    fds: Arc<File>,
    infos: Arc<File>,
    files: OpenFiles,
    /// `st_dev` of the versioned filesystem.
    versioned: u64,
}

impl ProcFds {
    /// Those of a process that was met before may be open already. `versioned` is the `st_dev` of the versioned filesystem.
    pub(crate) fn of(remote: &Remote, versioned: u64) -> io::Result<Self> {
        Ok(Self {
            fds: remote.proc_file("fd")?,
            infos: remote.proc_file("fdinfo")?,
            files: remote.files().clone(),
            versioned,
        })
    }

    /// Our own.
    pub(crate) fn own() -> io::Result<Self> {
        Self::open(HostPid::own(), 0)
    }

    fn open(host: HostPid, versioned: u64) -> io::Result<Self> {
        let dir = |name: &str| File::open(format!("/proc/{host}/{name}")).map(Arc::new);
        Ok(Self {
            fds: dir("fd")?,
            infos: dir("fdinfo")?,
            files: OpenFiles::default(),
            versioned,
        })
    }

    /// Every open descriptor, in ascending order.
    pub(crate) fn slots(&self) -> io::Result<Vec<RawSlot>> {
        let mut known = self.files.slots();
        if let Some(slots) = self.slots_as_before(&known)? {
            return Ok(slots);
        }
        rustix::fs::seek(&self.fds, SeekFrom::Start(0))?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut names = RawDir::new(&*self.fds, &mut buffer);
        let mut slots = Vec::new();
        let mut before = std::mem::take(&mut *known);
        while let Some(entry) = names.next() {
            let entry = entry?;
            let name = entry.file_name();
            if let Some(fd) = number(name) {
                let keep = known.0.len() < KEEP_OPEN;
                let (slot, now) = self.slot(fd, name, before.0.remove(&fd), keep)?;
                slots.push(slot);
                known.0.extend(now.map(|now| (fd, now)));
            }
        }
        slots.sort_unstable_by_key(|slot| slot.fd);
        Ok(slots)
    }

    /// The descriptors, if they lead to the same files as at the last visit and there are no others: the kernel tells how many there are
    /// as the size of the directory (Linux 6.2). They are few, then.
    fn slots_as_before(&self, known: &KnownSlots) -> io::Result<Option<Vec<RawSlot>>> {
        if known.0.values().any(|slot| slot.info.is_none()) {
            return Ok(None);
        }
        let count = rustix::fs::statx(&*self.fds, "", AtFlags::EMPTY_PATH, StatxFlags::SIZE)?;
        if count.stx_size != known.0.len() as u64 {
            return Ok(None);
        }
        let slots = known.0.iter().map(|(fd, slot)| {
            let info = read_info(slot.info.as_ref()?.as_fd()).ok()?;
            (info.file == slot.which).then_some(RawSlot {
                fd: *fd,
                file: slot.file,
                info,
            })
        });
        Ok(slots.collect())
    }

    /// One of our own, if this is our table.
    pub(crate) fn slot_of(&self, fd: BorrowedFd<'_>) -> io::Result<RawSlot> {
        let fd = fd.as_raw_fd();
        let slot = self.slot(fd, &CString::new(fd.to_string())?, None, false)?;
        Ok(slot.0)
    }

    /// Looks at a descriptor, and tells what is to be known of it at the next visit; its `fdinfo` may be kept open.
    fn slot(
        &self,
        fd: i32,
        name: &CStr,
        known: Option<KnownSlot>,
        keep: bool,
    ) -> io::Result<(RawSlot, Option<KnownSlot>)> {
        let (open, before) = known.map_or((None, None), |k| (k.info, Some((k.which, k.file))));
        let open = match open {
            Some(open) => open,
            None => self.open_info(name)?,
        };
        let info = read_info(open.as_fd())?;
        let file = match before {
            Some((which, file)) if which == info.file => file,
            _ => match self.file(name) {
                // The kernel counts what is in `/proc/PID/fd` to tell how large it is, and has nothing to count if the process has ended.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => FileId::directory(info.file.1),
                file => file?,
            },
        };
        let now = self.is_for_good(&file).then(|| KnownSlot {
            info: keep.then_some(open),
            which: info.file,
            file,
        });
        Ok((RawSlot { fd, file, info }, now))
    }

    /// Whether no other kind of file will have this inode number. Another filesystem (`/proc`) may give a number away again.
    fn is_for_good(&self, file: &FileId) -> bool {
        matches!(
            file.format(),
            0 | libc::S_IFIFO | libc::S_IFSOCK | libc::S_IFCHR
        ) || file.dev == self.versioned
    }

    fn file(&self, name: &CStr) -> io::Result<FileId> {
        let flags = AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(&*self.fds, name, flags, StatxFlags::BASIC_STATS)?;
        Ok(FileId::of(&stat))
    }

    fn open_info(&self, name: &CStr) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(
            &*self.infos,
            name,
            flags,
            Mode::empty(),
        )?)
    }

    /// What the descriptor's link says: a path as the process' mount namespace has it, or `anon_inode:[…]`.
    pub(crate) fn link(&self, fd: i32) -> io::Result<Vec<u8>> {
        let link = rustix::fs::readlinkat(&*self.fds, fd.to_string(), Vec::new())?;
        Ok(link.into_bytes())
    }
}

fn read_info(file: BorrowedFd<'_>) -> io::Result<FdInfo> {
    let mut small = [0_u8; 2048];
    let n = rustix::io::pread(file, &mut small, 0)?;
    let parsed = if n < small.len() / 2 {
        FdInfo::parse(&small[..n])
    } else {
        let mut all = small[..n].to_vec();
        read_to_end(file, &mut all)?;
        FdInfo::parse(&all)
    };
    parsed.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable fdinfo"))
}

impl FileId {
    /// A directory of which nothing is known but its number.
    fn directory(ino: u64) -> Self {
        Self {
            dev: 0,
            ino,
            mode: libc::S_IFDIR,
            rdev: 0,
        }
    }

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

/// Reads what comes behind that which is there already.
fn read_to_end(file: BorrowedFd<'_>, into: &mut Vec<u8>) -> io::Result<()> {
    let mut chunk = [0_u8; 16 * 1024];
    loop {
        match rustix::io::pread(file, &mut chunk, into.len() as u64)? {
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn what_was_known_of_a_descriptor_is_used_only_while_it_is_right() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let meta = file.as_file().metadata().unwrap();
        file.as_file().write_all_at(b"one\ntwo\n", 0).unwrap();
        let mut shell = Command::new("bash")
            .env("FILE", file.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut input = shell.stdin.take().unwrap();
        let mut output = BufReader::new(shell.stdout.take().unwrap());
        let mut run = |command: &str| {
            writeln!(input, "{command}; echo").unwrap();
            output.read_line(&mut String::new()).unwrap();
        };
        let fds = ProcFds::open(HostPid(shell.id() as i32), meta.dev()).unwrap();
        let slot = |fd: i32| {
            let mut slots = fds.slots().unwrap().into_iter();
            slots.find(|slot| slot.fd == fd)
        };
        // What the test was started with.
        run(
            "for fd in /proc/$$/fd/*; do fd=${fd##*/}; [ $fd -lt 3 ] || eval \"exec $fd<&-\"; done",
        );
        let numbers = || {
            let slots = fds.slots().unwrap().into_iter();
            slots.map(|slot| slot.fd).collect::<Vec<_>>()
        };
        assert_eq!(numbers(), [0, 1, 2]);
        assert!(fds.slots_as_before(&fds.files.slots()).unwrap().is_some());
        // As many, but others.
        run("exec 3<&2 2<&-");
        assert_eq!(numbers(), [0, 1, 3]);
        run("exec 2<&3 3<&-");
        assert_eq!(numbers(), [0, 1, 2]);
        run("exec 2<$FILE");
        assert_eq!(slot(2).unwrap().file.ino, meta.ino());
        run("exec 2>/dev/null");
        run("exec 4</dev/null 5<$FILE 6</dev/zero 7<$FILE");
        let regular = |slot: RawSlot| (slot.file.ino, slot.file.format(), slot.info.pos);
        for fd in [5, 7] {
            let expected = (meta.ino(), libc::S_IFREG, 0);
            assert_eq!(slot(fd).map(regular), Some(expected));
            run(&format!("read -r line <&{fd}"));
            let expected = (meta.ino(), libc::S_IFREG, 4);
            assert_eq!(slot(fd).map(regular), Some(expected));
        }
        let before = slot(4).unwrap().file;
        run("exec 5</dev/null 6<&- 7</dev/null");
        for fd in [5, 7] {
            assert_eq!(slot(fd).unwrap().file, before);
        }
        assert!(slot(6).is_none());
        let kept = fds.files.slots();
        let open = kept.0.values().filter(|slot| slot.info.is_some());
        assert_eq!(open.count(), KEEP_OPEN);
        drop(kept);
        shell.kill().unwrap();
        shell.wait().unwrap();
        assert!(fds.slots().is_err(), "of whoever has the number now");
    }
}
