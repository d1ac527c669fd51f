//! The programs that processes are made again with.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use crate::env::Environment;
use crate::image::ProcessImage;
use crate::mem::{Backing, SharedMemory, ShmKey, copy_of_object};

/// What a process with the program in a memfd shows as that.
const MEMFD: &[u8] = b"/memfd:";

/// Where the programs of an image are found: in files, or in its shared memory.
#[derive(Clone, Copy)]
pub(crate) struct Programs<'a> {
    pub(crate) env: &'a dyn Environment,
    pub(crate) shared: &'a SharedMemory,
}

impl Programs<'_> {
    /// Does what takes the program of a process, which may be executed.
    pub(crate) fn of<T>(
        self,
        image: &ProcessImage,
        mut act: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        let memory = in_memory(image).and_then(|key| self.shared.objects.get(&key));
        match memory {
            // The process maps the object itself; what it was executed from is only told of, and holds the same.
            Some(object) => act(copy_of_object(object)?.as_fd()),
            None => image.exe.as_program(self.env, act),
        }
    }
}

/// The object that a process has its program from, if that is a memfd.
pub(crate) fn in_memory(image: &ProcessImage) -> Option<ShmKey> {
    if image.exe.inode().is_some() || !image.exe.path().starts_with(MEMFD) {
        return None;
    }
    let code = image.memory.layout.start_code;
    let vma = image
        .memory
        .vmas
        .iter()
        .find(|vma| vma.range().contains(&code))?;
    match &vma.backing {
        Backing::Shm(key) => Some(*key),
        _ => None,
    }
}
