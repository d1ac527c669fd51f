//! Pipes and fifos, with what waits in them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::pipe::{PipeFlags, SpliceFlags};

use super::Procs;
use super::capture::{Capture, Holder};
use super::model::{Kind, Pipe};
use crate::error::{During, Result};
use crate::sys;

/// More than any pipe holds.
const ALL: usize = i32::MAX as usize & !0xfff;
/// A packet is at most a page.
const PACKET: usize = 4096;

/// Reads what a pipe end is; [`read_all`] reads what waits in it.
pub(crate) fn capture(capture: &mut Capture<'_>, holder: &Holder<'_>, fifo: bool) -> Result<Kind> {
    let ino = holder.raw.file.ino;
    if !fifo && let Some(id) = capture.env.external_pipe(ino) {
        return Ok(Kind::External(id));
    }
    let pipes = &mut capture.image.pipes;
    let index = *capture.pipes.entry(ino).or_insert(pipes.len());
    if index == pipes.len() {
        pipes.push(Pipe {
            inode: ino,
            fifo,
            ..Pipe::default()
        });
    }
    pipes[index].packets |= holder.flags() & libc::O_DIRECT != 0;
    Ok(Kind::Pipe { pipe: index })
}

/// Reads what waits in the pipes, once all their ends are known.
pub(crate) fn read_all(capture: &mut Capture<'_>, procs: &Procs<'_>) -> Result<()> {
    // Only a reading end shows the content: those come last and win.
    let mut ends = BTreeMap::new();
    for reads in [false, true] {
        for (object, end) in capture.image.objects.iter().enumerate() {
            if let Kind::Pipe { pipe } = end.kind
                && end.reads() == reads
            {
                ends.insert(pipe, (object, reads));
            }
        }
    }
    for (index, (object, reads)) in ends {
        let pid = capture.image.objects[object].home.0;
        let end = capture.duplicate(object, procs)?;
        let pipe = &mut capture.image.pipes[index];
        pipe.capacity =
            rustix::pipe::fcntl_getpipe_size(&end).during(pid, "asking for a pipe's size")?;
        if reads && sys::fd::readable(end.as_fd()).during(pid, "looking into a pipe")? > 0 {
            pipe.content = peek(end.as_fd(), pipe.capacity, pipe.packets)
                .during(pid, "copying what is in a pipe")?;
        }
    }
    Ok(())
}

/// Copies the content through a scratch pipe by `tee(2)`.
fn peek(end: BorrowedFd<'_>, capacity: usize, packets: bool) -> io::Result<Vec<Vec<u8>>> {
    let (out, into) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    rustix::pipe::fcntl_setpipe_size(&into, capacity)?;
    rustix::pipe::tee(end, &into, ALL, SpliceFlags::NONBLOCK)?;
    drop(into);
    drain(out.as_fd(), packets)
}

/// Takes everything out of a pipe, until it is empty.
fn drain(out: BorrowedFd<'_>, packets: bool) -> io::Result<Vec<Vec<u8>>> {
    let mut buffer = vec![0; if packets { PACKET } else { 64 * 1024 }];
    let mut content: Vec<Vec<u8>> = Vec::new();
    loop {
        let n = match rustix::io::read(out, &mut buffer) {
            Ok(0) | Err(rustix::io::Errno::AGAIN) => return Ok(content),
            read => read?,
        };
        match content.first_mut() {
            Some(piece) if !packets => piece.extend_from_slice(&buffer[..n]),
            _ => content.push(buffer[..n].to_vec()),
        }
    }
}

/// Another end of the same pipe or fifo, from any handle of it. Does not wait for a partner.
pub(crate) fn reopen(handle: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(
        CWD,
        format!("/proc/self/fd/{}", handle.as_raw_fd()),
        OFlags::from_bits_retain(flags as u32) | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// The ends of a new pipe that are not in use yet, for reading and for writing. One that is opened again tells other flags
/// (`O_LARGEFILE`).
#[derive(Debug)]
pub(crate) struct Fresh([Option<OwnedFd>; 2]);

impl Fresh {
    /// A new pipe, owned by the user who is to use it.
    pub(crate) fn make(owner: (u32, u32)) -> io::Result<Self> {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let (uid, gid) = (
            rustix::fs::Uid::from_raw(owner.0),
            rustix::fs::Gid::from_raw(owner.1),
        );
        rustix::fs::fchown(&read, Some(uid), Some(gid))?;
        Ok(Self([Some(read), Some(write)]))
    }

    /// The end for this access, once.
    pub(crate) fn take(&mut self, access: i32) -> Option<OwnedFd> {
        let [read, write] = &mut self.0;
        match access {
            libc::O_RDONLY => read.take(),
            libc::O_WRONLY => write.take(),
            _ => None,
        }
    }

    /// Any end.
    pub(crate) fn any(&self) -> Option<BorrowedFd<'_>> {
        self.0.iter().flatten().next().map(OwnedFd::as_fd)
    }
}

/// Whether two pipes hold the same, in the same room.
pub(crate) fn same(now: &Pipe, wanted: &Pipe) -> bool {
    (now.capacity, &now.content) == (wanted.capacity, &wanted.content)
}

/// Makes a pipe that is as `now` says be as `wanted` says. `handle` may be any end.
pub(crate) fn set(handle: BorrowedFd<'_>, now: &Pipe, wanted: &Pipe) -> io::Result<()> {
    let same_content = now.content == wanted.content;
    let both = reopen(handle, libc::O_RDWR)?;
    if !same_content {
        drain(both.as_fd(), false)?;
    }
    if now.capacity != wanted.capacity {
        rustix::pipe::fcntl_setpipe_size(&both, wanted.capacity)?;
    }
    if !same_content {
        // Packet mode cannot be asked for at the opening, only later.
        let mode = if wanted.packets { libc::O_DIRECT } else { 0 };
        sys::fd::set_status_flags(&both, libc::O_NONBLOCK | mode)?;
        for piece in &wanted.content {
            write_all(both.as_fd(), piece)?;
        }
    }
    Ok(())
}

fn write_all(into: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = rustix::io::write(into, bytes)?;
        bytes = &bytes[n..];
    }
    Ok(())
}
