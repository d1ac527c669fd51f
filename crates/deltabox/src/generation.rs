//! What tells forks of one state apart, which share even their random numbers: a counter and random bytes that no other fork has,
//! in a file that running programs can look at or watch, and in the environment of commands that are started later.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::container::Container;
use crate::sys;

/// The directory of the file, below the root.
const DIRECTORY: [&str; 2] = ["run", "deltabox"];
const FILE: &str = "generation";
const NEW_FILE: &str = ".generation";

/// See the module's description.
#[derive(Clone, Debug)]
pub(crate) struct Generation {
    /// Which fork of its call it is, from 1 on.
    number: usize,
    /// 128 random bits in hexadecimal.
    id: String,
}

impl Generation {
    /// That of the fork with this number.
    pub(crate) fn new(number: usize) -> io::Result<Self> {
        let mut bytes = [0_u8; 16];
        let got = getrandom(&mut bytes, GetRandomFlags::empty())?;
        if got < bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let id = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { number, id })
    }

    /// For the environment of commands.
    pub(crate) fn environment(&self) -> [(Vec<u8>, Vec<u8>); 2] {
        [
            (b"DELTABOX_FORK".to_vec(), self.number.to_string().into()),
            (b"DELTABOX_GENERATION".to_vec(), self.id.clone().into()),
        ]
    }

    /// Writes the file, as root inside. No process of the sandbox runs.
    pub(crate) fn write(&self, container: &Container) -> io::Result<()> {
        let line = format!("{} {}\n", self.number, self.id);
        let root = container.outside(0);
        std::thread::scope(|scope| {
            // A thread of its own, for it is root inside to its end.
            let writer = scope.spawn(|| {
                sys::act_as(root);
                write(container.root(), line.as_bytes())
            });
            writer
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// What is there already may be anything: what is no directory, or a link, is an error.
fn write(root: BorrowedFd<'_>, line: &[u8]) -> io::Result<()> {
    let mut directory = open_directory(root, ".")?;
    for name in DIRECTORY {
        match rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        directory = open_directory(directory.as_fd(), name)?;
    }
    match rustix::fs::unlinkat(&directory, NEW_FILE, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(e) => return Err(e.into()),
    }
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&directory, NEW_FILE, flags, Mode::from_raw_mode(0o644))?;
    std::fs::File::from(file).write_all(line)?;
    Ok(rustix::fs::renameat(
        &directory, NEW_FILE, &directory, FILE,
    )?)
}

fn open_directory(at: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    // No links at all: they would have to be followed from the sandbox's root.
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    Ok(rustix::fs::openat2(
        at,
        name,
        flags,
        Mode::empty(),
        resolve,
    )?)
}
