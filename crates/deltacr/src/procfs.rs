//! Reads the sandbox's own `/proc`, which counts processes as the sandbox does.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{
    AtFlags, Mode, OFlags, RawDir, ResolveFlags, SeekFrom, StatxFlags, openat, openat2, statat,
    statx,
};
use serde::{Deserialize, Serialize};

use crate::env::Environment;
use crate::fd::KnownSlots;
use crate::ids::InnerPid;
use crate::mem::Layout;

const PROC_SUPER_MAGIC: u32 = 0x9fa0;
/// No file that is read here is longer, but for hostile or strange cases, which are errors.
const FILE_MAX: usize = 4096;

/// The position of the first process in the list of a proc filesystem's root (the kernel's `FIRST_PROCESS_ENTRY`).
const FIRST_PROCESS: u64 = 256;

/// The sandbox's `/proc`.
#[derive(Clone)]
pub(crate) struct Procfs(Arc<Root>);

struct Root {
    dir: OwnedFd,
    /// The root directory of the sandbox.
    above: FileId,
    /// Positions in it belong to whoever holds it.
    list: Mutex<OwnedFd>,
}

/// What `/proc/PID/stat` tells and the engine needs (proc_pid_stat(5)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stat {
    pub(crate) name: Vec<u8>,
    pub(crate) state: u8,
    pub(crate) parent: InnerPid,
    pub(crate) group: InnerPid,
    pub(crate) session: InnerPid,
    /// Device number of the controlling terminal; 0 for none.
    pub(crate) tty: i32,
    /// The terminal's foreground group; -1 for none.
    pub(crate) foreground: i32,
    /// How many threads it has.
    pub(crate) threads: u32,
    /// Clock ticks after boot.
    pub(crate) start: u64,
    /// The signal that the parent gets at its end.
    pub(crate) exit_signal: i32,
    /// Wait status of a zombie.
    pub(crate) exit_status: i32,
    /// It ignores `SIGTRAP`.
    pub(crate) ignores_trap: bool,
}

/// Files below `/proc/PID` of one process that are read at every visit, and its handle. They stay open from one to the next: opening
/// one takes longer than reading it. If the process is gone, reading them fails, whoever has its number.
#[derive(Clone, Debug, Default)]
pub(crate) struct OpenFiles(Arc<Opened>);

#[derive(Debug, Default)]
struct Opened {
    files: Mutex<Vec<Named>>,
    slots: Mutex<KnownSlots>,
    /// The program that it runs, which is another only with another address space: setting `exe` alone needs a capability that
    /// nobody in a sandbox has.
    program: Mutex<Option<FileId>>,
}

type Named = (&'static str, Arc<File>);

/// Those that show the address space which the process had when they were opened.
const OF_MEMORY: [&str; 3] = ["auxv", "maps", "pagemap"];

impl OpenFiles {
    /// The file of this name, which is opened if it is not yet.
    pub(crate) fn get(
        &self,
        name: &'static str,
        open: impl FnOnce() -> io::Result<File>,
    ) -> io::Result<Arc<File>> {
        let mut files = lock(&self.0.files);
        if let Some((_, file)) = files.iter().find(|(known, _)| *known == name) {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(open()?);
        files.push((name, Arc::clone(&file)));
        Ok(file)
    }

    /// How many page faults the process has had that needed no device, if its `stat` is open.
    pub(crate) fn page_faults(&self) -> io::Result<u64> {
        let closed = || Err(io::ErrorKind::NotFound.into());
        let text = read_all(&*self.get("stat", closed)?)?;
        let faults = StatText::split(&text).and_then(|text| text.number(10));
        faults.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable stat"))
    }

    /// What an earlier visit knew of the descriptors, for as long as this one looks at them.
    pub(crate) fn slots(&self) -> MutexGuard<'_, KnownSlots> {
        lock(&self.0.slots)
    }

    /// The process has another address space.
    pub(crate) fn forget_memory(&self) {
        let mut files = lock(&self.0.files);
        files.retain(|(name, _)| !OF_MEMORY.contains(name));
        self.forget_program();
    }

    /// The process runs another program, or is said to.
    pub(crate) fn forget_program(&self) {
        *lock(&self.0.program) = None;
    }
}

/// What these hold is right after a panic, too.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file, by device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl Procfs {
    pub(crate) fn open(env: &dyn Environment) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
        let dir = openat2(
            env.root(),
            "proc",
            flags | OFlags::PATH,
            Mode::empty(),
            resolve,
        )?;
        if rustix::fs::fstatfs(&dir)?.f_type as u32 != PROC_SUPER_MAGIC {
            return Err(io::Error::other(
                "/proc of the sandbox is not a proc filesystem",
            ));
        }
        let list = Mutex::new(openat(&dir, ".", flags | OFlags::RDONLY, Mode::empty())?);
        let above = file_at(env.root(), "", AtFlags::EMPTY_PATH)?;
        Ok(Self(Arc::new(Root { dir, above, list })))
    }

    /// The root directory of the sandbox.
    pub(crate) fn root(&self) -> FileId {
        self.0.above
    }

    /// All processes that have a number, zombies and init among them.
    pub(crate) fn processes(&self) -> io::Result<Vec<InnerPid>> {
        let list = lock(&self.0.list);
        // Where the processes begin; what comes before costs the kernel much more.
        rustix::fs::seek(&*list, SeekFrom::Start(FIRST_PROCESS))?;
        let mut buffer = [MaybeUninit::uninit(); 8192];
        let mut entries = RawDir::new(&*list, &mut buffer);
        let mut pids = Vec::new();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_str().ok();
            pids.extend(name.and_then(|n| n.parse().ok()).map(InnerPid));
        }
        Ok(pids)
    }

    pub(crate) fn stat(&self, pid: InnerPid) -> io::Result<Stat> {
        let files = OpenFiles::default();
        self.stat_and_bounds(pid, &files).map(|(stat, _)| stat)
    }

    /// Opens a file to read it.
    pub(crate) fn open_file(&self, path: &str) -> io::Result<File> {
        open_file(&self.0.dir, path)
    }

    /// The same with the bounds of the address space, which the same file shows.
    pub(crate) fn stat_and_bounds(
        &self,
        pid: InnerPid,
        files: &OpenFiles,
    ) -> io::Result<(Stat, Layout)> {
        let text = read_all(&*files.get("stat", || self.open_file(&format!("{pid}/stat")))?)?;
        let text = StatText::split(&text);
        text.and_then(|text| Stat::parse(&text).zip(Layout::parse(&text)))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable stat"))
    }

    /// Whether a process has a thread of this number.
    pub(crate) fn has_thread(&self, pid: InnerPid, tid: InnerPid) -> bool {
        statat(&self.0.dir, format!("{pid}/task/{tid}"), AtFlags::empty()).is_ok()
    }

    /// The file behind `cwd`, `root` or `exe`; its filesystem is not asked.
    pub(crate) fn file(&self, pid: InnerPid, link: &str) -> io::Result<FileId> {
        file_at(&self.0.dir, &format!("{pid}/{link}"), AtFlags::empty())
    }

    /// The program of a process, which has these files open.
    pub(crate) fn program(&self, pid: InnerPid, files: &OpenFiles) -> io::Result<FileId> {
        let mut program = lock(&files.0.program);
        match *program {
            Some(known) => Ok(known),
            None => Ok(*program.insert(self.file(pid, "exe")?)),
        }
    }

    /// Where `cwd`, `root` or `exe` points, as the kernel tells it.
    pub(crate) fn link(&self, pid: InnerPid, link: &str) -> io::Result<Vec<u8>> {
        let path = rustix::fs::readlinkat(&self.0.dir, format!("{pid}/{link}"), Vec::new())?;
        Ok(path.into_bytes())
    }

    /// The command line with spaces between its words; empty for a zombie.
    pub(crate) fn command(&self, pid: InnerPid, files: &OpenFiles) -> String {
        let file = files.get("cmdline", || self.open_file(&format!("{pid}/cmdline")));
        let bytes = file.and_then(|file| read_all(&file)).unwrap_or_default();
        let words: Vec<_> = bytes
            .split(|b| *b == 0)
            .map(String::from_utf8_lossy)
            .collect();
        words.join(" ").trim_end().to_owned()
    }
}

/// The file of this path; its filesystem is not asked.
fn file_at(dir: impl AsFd, path: &str, flags: AtFlags) -> io::Result<FileId> {
    let stat = statx(dir, path, flags | AtFlags::STATX_DONT_SYNC, StatxFlags::INO)?;
    Ok(FileId {
        device: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
        inode: stat.stx_ino,
    })
}

/// The content of a file of a proc filesystem, `dir` or the caller's own.
pub(crate) fn read_file(dir: impl AsFd, path: &str) -> io::Result<Vec<u8>> {
    read_all(&open_file(dir, path)?)
}

fn open_file(dir: impl AsFd, path: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(openat(dir, path, flags, Mode::empty())?.into())
}

/// The content of a file of a proc or cgroup filesystem, from its beginning on.
pub(crate) fn read_all(file: &File) -> io::Result<Vec<u8>> {
    let mut room = [0; FILE_MAX];
    let mut bytes = Vec::new();
    loop {
        let n = file.read_at(&mut room, bytes.len() as u64)?;
        bytes.extend_from_slice(&room[..n]);
        // A record that does not fit is left for the next call, and none is as long as half the room: what is read in one go
        // and leaves so much of it is all.
        if n == 0 || bytes.len() < FILE_MAX / 2 {
            return Ok(bytes);
        }
    }
}

/// The text of a `/proc/PID/stat` in its parts.
pub(crate) struct StatText<'a> {
    name: &'a [u8],
    /// From the third field of proc_pid_stat(5) on.
    fields: [&'a str; StatText::FIELDS],
}

impl<'a> StatText<'a> {
    const FIELDS: usize = 50;

    /// `None` if it is not what the kernel writes. The name may hold any byte, `)` and newline included.
    pub(crate) fn split(text: &'a [u8]) -> Option<Self> {
        let open = text.iter().position(|b| *b == b'(')?;
        let close = text.iter().rposition(|b| *b == b')')?;
        let name = text.get(open + 1..close)?;
        let rest = std::str::from_utf8(text.get(close + 1..)?).ok()?;
        let mut fields = [""; Self::FIELDS];
        let mut there = rest.split_ascii_whitespace();
        for field in &mut fields {
            *field = there.next()?;
        }
        Some(Self { name, fields })
    }

    fn field(&self, number: usize) -> &'a str {
        self.fields[number - 3]
    }

    /// The field that has this number in the manual.
    pub(crate) fn number<T: std::str::FromStr>(&self, number: usize) -> Option<T> {
        self.field(number).parse().ok()
    }
}

impl Stat {
    fn parse(text: &StatText<'_>) -> Option<Self> {
        let number = |field| text.number::<i64>(field);
        let pid = |field| text.number(field).map(InnerPid);
        Some(Self {
            name: text.name.to_vec(),
            state: *text.field(3).as_bytes().first()?,
            parent: pid(4)?,
            group: pid(5)?,
            session: pid(6)?,
            tty: number(7)? as i32,
            foreground: number(8)? as i32,
            threads: text.number(20)?,
            start: text.number(22)?,
            exit_signal: number(38)? as i32,
            exit_status: number(52)? as i32,
            ignores_trap: number(33)? & 1 << (libc::SIGTRAP - 1) != 0,
        })
    }
}

/// See [`StatText::split`].
pub(crate) fn parse_stat(text: &[u8]) -> Option<Stat> {
    Stat::parse(&StatText::split(text)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let own = std::fs::read("/proc/self/stat").unwrap();
        let close = own.iter().rposition(|b| *b == b')').unwrap();
        let mut text = b"7 (a) b (c\n)".to_vec();
        text.extend_from_slice(&own[close + 1..]);
        let stat = parse_stat(&text).unwrap();
        assert_eq!(stat.name, b"a) b (c\n");
        assert_eq!(stat.exit_signal, libc::SIGCHLD);
        assert_eq!(stat.session, parse_stat(&own).unwrap().session);
    }

    proptest! {
        #[test]
        fn no_stat_text_makes_the_reader_panic(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_stat(&text);
        }
    }
}
