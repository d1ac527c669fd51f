//! The supervisor's ends of a session's pipes and terminal.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::log::Log;
use crate::report::{SessionId, Stream};

/// More than any pipe holds (`/proc/sys/fs/pipe-max-size`, which only root outside goes past, is 1 MiB).
const DRAIN: usize = 4 << 20;

/// Which of a session's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Channel {
    Stdin,
    Stdout,
    Stderr,
    Terminal,
}

impl Channel {
    const ALL: [Self; 4] = [Self::Stdin, Self::Stdout, Self::Stderr, Self::Terminal];

    /// One number for a channel of a session.
    pub(crate) fn key(self, session: SessionId) -> u64 {
        session.0 << 2 | self as u64
    }

    /// The channel and session of such a number.
    pub(crate) fn of(key: u64) -> (SessionId, Self) {
        (SessionId(key >> 2), Self::ALL[(key & 3) as usize])
    }
}

/// One end, with the inode number that tells it from others.
pub(crate) struct End {
    fd: OwnedFd,
    ino: u64,
}

impl End {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let ino = rustix::fs::fstat(&fd)?.st_ino;
        Ok(Self { fd, ino })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(crate) fn owned(&self) -> &OwnedFd {
        &self.fd
    }

    /// The same pipe or terminal, opened again: with an offset and flags of its own, or the other end of it.
    fn reopen(&self, flags: OFlags) -> io::Result<OwnedFd> {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        Ok(rustix::fs::open(
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }
}

/// A pipe: the end for outside (non-blocking) and the one for inside.
pub(crate) fn pipe(inside_writes: bool, owner: u32) -> io::Result<(End, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    // So that the command can open /dev/stdout and the like by name.
    rustix::fs::fchown(
        &read,
        Some(Uid::from_raw(owner)),
        Some(Gid::from_raw(owner)),
    )?;
    let (outside, inside) = if inside_writes {
        (read, write)
    } else {
        (write, read)
    };
    rustix::fs::fcntl_setfl(&outside, OFlags::NONBLOCK)?;
    Ok((End::new(outside)?, inside))
}

/// The open ends of a session.
#[derive(Default)]
pub(crate) struct Streams {
    pub(crate) stdin: Option<End>,
    pub(crate) stdout: Option<End>,
    pub(crate) stderr: Option<End>,
    pub(crate) master: Option<End>,
}

impl Streams {
    pub(crate) fn slot(&mut self, channel: Channel) -> &mut Option<End> {
        match channel {
            Channel::Stdin => &mut self.stdin,
            Channel::Stdout => &mut self.stdout,
            Channel::Stderr => &mut self.stderr,
            Channel::Terminal => &mut self.master,
        }
    }

    /// Which channel the pipe with this inode number is.
    pub(crate) fn channel_of(&mut self, ino: u64) -> Option<Channel> {
        let pipes = [Channel::Stdin, Channel::Stdout, Channel::Stderr];
        pipes
            .into_iter()
            .find(|c| self.slot(*c).as_ref().is_some_and(|e| e.ino == ino))
    }

    /// Whether nothing comes or goes by them any more.
    pub(crate) fn are_closed(&self) -> bool {
        let Self {
            stdin,
            stdout,
            stderr,
            master,
        } = self;
        [stdin, stdout, stderr, master]
            .into_iter()
            .all(Option::is_none)
    }

    /// Closes all but the terminal.
    pub(crate) fn close_pipes(&mut self) {
        (self.stdin, self.stdout, self.stderr) = (None, None, None);
    }

    /// Watches what can be read.
    pub(crate) fn watch(&mut self, session: SessionId, poller: &OwnedFd) -> io::Result<()> {
        for channel in [Channel::Stdout, Channel::Stderr, Channel::Terminal] {
            let Some(end) = self.slot(channel) else {
                continue;
            };
            let data = epoll::EventData::new_u64(channel.key(session));
            match epoll::add(poller, &end.fd, data, epoll::EventFlags::IN) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Watches no more what can be read: writers wait once their pipes are full.
    pub(crate) fn unwatch(&mut self, poller: &OwnedFd) -> io::Result<()> {
        for channel in [Channel::Stdout, Channel::Stderr, Channel::Terminal] {
            let Some(end) = self.slot(channel) else {
                continue;
            };
            match epoll::delete(poller, &end.fd) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Moves what is there to be read from one channel to the log (or nowhere), at most `limit` bytes. Whether there
    /// may be more.
    pub(crate) fn pump(
        &mut self,
        channel: Channel,
        mut log: Option<&mut Log>,
        limit: usize,
        poller: &OwnedFd,
        keep_terminal: bool,
    ) -> io::Result<bool> {
        let stream = match channel {
            Channel::Stderr => Stream::Stderr,
            _ => Stream::Stdout,
        };
        let slot = self.slot(channel);
        let Some(end) = slot else { return Ok(false) };
        // Not zeroed, which would take longer than to find nothing.
        let mut buffer = [const { MaybeUninit::uninit() }; 64 * 1024];
        let mut moved = 0;
        while moved < limit {
            match rustix::io::read(&end.fd, &mut buffer[..]) {
                // End of file, or a terminal that nobody has open: it may be opened again after a rollback.
                Ok(([], _)) | Err(Errno::IO) => {
                    if channel == Channel::Terminal && keep_terminal {
                        match epoll::delete(poller, &end.fd) {
                            Ok(()) | Err(Errno::NOENT) => {}
                            Err(e) => return Err(e.into()),
                        }
                    } else {
                        *slot = None;
                    }
                    return Ok(false);
                }
                Ok((bytes, _)) => {
                    if let Some(log) = log.as_deref_mut() {
                        log.append(stream, bytes);
                    }
                    moved += bytes.len();
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    /// Reads everything that is there, or that a writer which goes on adds up to a limit.
    pub(crate) fn drain(
        &mut self,
        mut log: Option<&mut Log>,
        poller: &OwnedFd,
        keep_terminal: bool,
    ) -> io::Result<()> {
        for channel in [Channel::Stdout, Channel::Stderr, Channel::Terminal] {
            self.pump(channel, log.as_deref_mut(), DRAIN, poller, keep_terminal)?;
        }
        Ok(())
    }

    /// What was written to standard input and not read yet, left where it is.
    pub(crate) fn unread_input(&self) -> io::Result<Vec<u8>> {
        let Some(stdin) = &self.stdin else {
            return Ok(Vec::new());
        };
        let pending = rustix::io::ioctl_fionread(&stdin.fd)? as usize;
        if pending == 0 {
            return Ok(Vec::new());
        }
        let inside = stdin.reopen(OFlags::RDONLY | OFlags::NONBLOCK)?;
        let (copy, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // The copy must be able to hold as many buffers as the pipe has.
        rustix::pipe::fcntl_setpipe_size(&into, rustix::pipe::fcntl_getpipe_size(&stdin.fd)?)?;
        let n = rustix::pipe::tee(&inside, &into, pending, rustix::pipe::SpliceFlags::NONBLOCK)?;
        drop(into);
        let mut bytes = Vec::with_capacity(n);
        io::Read::read_to_end(&mut std::fs::File::from(copy), &mut bytes)?;
        Ok(bytes)
    }

    /// Throws away all that is under way, in both directions, and puts `input` in the way instead.
    pub(crate) fn reset(
        &mut self,
        input: &[u8],
        poller: &OwnedFd,
        keep_terminal: bool,
    ) -> io::Result<()> {
        if let Some(master) = &self.master {
            rustix::termios::tcflush(&master.fd, rustix::termios::QueueSelector::IOFlush)?;
        }
        self.drain(None, poller, keep_terminal)?;
        if let Some(stdin) = &self.stdin {
            if rustix::io::ioctl_fionread(&stdin.fd)? > 0 {
                let inside = stdin.reopen(OFlags::RDONLY | OFlags::NONBLOCK)?;
                let mut buffer = [0; 64 * 1024];
                while rustix::io::read(&inside, &mut buffer).is_ok_and(|n| n > 0) {}
            }
            let mut rest = input;
            while !rest.is_empty() {
                // It came out of a pipe of this size, so that it goes into one; and if not, it waits for nobody.
                let Ok(n) = rustix::io::write(&stdin.fd, rest) else {
                    break;
                };
                rest = &rest[n..];
            }
        }
        Ok(())
    }

    /// The inside end of a pipe; a new pipe if there is none.
    pub(crate) fn open_inside(
        &mut self,
        channel: Channel,
        write: bool,
        owner: u32,
    ) -> io::Result<OwnedFd> {
        let slot = self.slot(channel);
        if let Some(end) = slot {
            let flags = if write {
                OFlags::WRONLY
            } else {
                OFlags::RDONLY
            };
            return end.reopen(flags);
        }
        let (outside, inside) = pipe(write, owner)?;
        *slot = Some(outside);
        Ok(inside)
    }
}
