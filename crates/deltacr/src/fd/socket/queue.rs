//! What waits in a socket's queues: looked at, taken out, put in.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use super::model::{Message, Socket};
use crate::sys::fd as sysfd;
use crate::sys::socket as sys;

const SO_PEEK_OFF: i32 = 42;
const SO_BUF_LOCK: i32 = 72;
/// Bytes of a buffer that takes whatever was found in one.
const ROOMY: i32 = 256 << 20;
/// More messages than any queue holds by default.
const MOST: usize = 100_000;
/// The longest datagram.
const DATAGRAM: usize = 256 * 1024;
/// How often and how long to wait for what is on its way through the loopback device.
pub(super) const ROUNDS: u32 = 2000;
pub(super) const ROUND: Duration = Duration::from_micros(500);

/// A datagram, or a part of a stream, that waits.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    pub(crate) bytes: Vec<u8>,
    /// The sender's address.
    pub(crate) from: Vec<u8>,
    /// Duplicates of the descriptors that are in flight with it.
    pub(crate) rights: Vec<OwnedFd>,
}

/// Copies what waits in a receive queue, and leaves it there.
pub(crate) fn peek(socket: BorrowedFd<'_>, image: &Socket) -> io::Result<Vec<Waiting>> {
    let stream = image.is_stream();
    let waiting = sysfd::readable(socket)?;
    // Who asks for more is told of an error, and nobody after it.
    if waiting == 0 && (sys::has_error(socket)? || !more_than_bytes(socket, stream)) {
        return Ok(Vec::new());
    }
    let before = sys::int_option(socket, libc::SOL_SOCKET, SO_PEEK_OFF)?;
    peek_from(socket, 0)?;
    let peeked = take(socket, image.kind, libc::MSG_PEEK);
    sys::set_int_option(socket, libc::SOL_SOCKET, SO_PEEK_OFF, before)?;
    peeked
}

/// Which byte of the queue is peeked at next.
fn peek_from(socket: BorrowedFd<'_>, offset: usize) -> io::Result<()> {
    let offset = i32::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
    sys::set_int_option(socket, libc::SOL_SOCKET, SO_PEEK_OFF, offset)
}

/// The bytes that wait in a TCP socket, which shows its whole queue at once, and knows `SO_PEEK_OFF` only since Linux 6.9.
pub(super) fn peek_bytes(socket: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; sysfd::readable(socket)?];
    if bytes.is_empty() {
        return Ok(bytes);
    }
    let len = match sys::receive(socket, &mut bytes, libc::MSG_PEEK) {
        Err(e) if ended(&e) => 0,
        received => received?.len,
    };
    bytes.truncate(len);
    Ok(bytes)
}

/// An empty datagram waits although there are no bytes.
fn more_than_bytes(socket: BorrowedFd<'_>, stream: bool) -> bool {
    !stream && sys::receive(socket, &mut [], libc::MSG_PEEK | libc::MSG_TRUNC).is_ok()
}

/// Takes out what waits in a receive queue.
pub(crate) fn drain(socket: BorrowedFd<'_>, kind: i32) -> io::Result<()> {
    take(socket, kind, 0).map(drop)
}

/// `kind` is one of `SOCK_STREAM` and so on.
fn take(socket: BorrowedFd<'_>, kind: i32, flags: i32) -> io::Result<Vec<Waiting>> {
    let stream = kind == libc::SOCK_STREAM;
    let peeks = flags & libc::MSG_PEEK != 0;
    // Not every kind of socket tells, but those can where it matters.
    let mut left = match kind {
        libc::SOCK_STREAM | libc::SOCK_SEQPACKET => sysfd::readable(socket)?,
        _ => 0,
    };
    let mut seen = 0;
    // Descriptors are shown again with every part of their message, so that each must be read whole.
    let mut buffer = vec![0; left.max(DATAGRAM)];
    let mut messages: Vec<Waiting> = Vec::new();
    for _ in 0..MOST {
        // Behind all bytes of a stream there may be an error, which is told once.
        if stream && left == 0 {
            break;
        }
        let received = match sys::receive(socket, &mut buffer, flags) {
            Err(e) if ended(&e) => break,
            received => received?,
        };
        if peeks && received.cut {
            let what = "the service has no room for the descriptors in flight";
            return Err(io::Error::other(what));
        }
        let bytes = &buffer[..received.len];
        left = left.saturating_sub(bytes.len());
        // The end of a stream. A datagram may be empty; of packets on a connection the end cannot be told from one
        // that is, so what comes empty after all bytes is taken for the end.
        let ends =
            stream || kind == libc::SOCK_SEQPACKET && left == 0 && received.rights.is_empty();
        if bytes.is_empty() && ends {
            break;
        }
        let plain = match (stream, peeks && !received.rights.is_empty()) {
            (true, true) => plain_bytes(socket, seen, bytes.len())?,
            (true, false) => bytes.len(),
            (false, _) => 0,
        };
        match messages.last_mut() {
            Some(last) if stream && last.rights.is_empty() => last.bytes.extend(&bytes[..plain]),
            _ if plain > 0 => messages.push(Waiting {
                bytes: bytes[..plain].to_vec(),
                ..Waiting::default()
            }),
            _ => {}
        }
        if !stream || plain < bytes.len() {
            messages.push(Waiting {
                bytes: bytes[plain..].to_vec(),
                from: received.from,
                rights: received.rights,
            });
        }
        seen += bytes.len();
    }
    Ok(messages)
}

/// How many of `len` bytes of a stream, which were peeked at in one go, come before those that descriptors came with. The
/// kernel goes no further than the piece that has descriptors, but may begin with others.
fn plain_bytes(socket: BorrowedFd<'_>, seen: usize, len: usize) -> io::Result<usize> {
    peek_from(socket, seen)?;
    let plain = sys::peek_pieces(socket, &mut vec![0; len.saturating_sub(1)])?;
    peek_from(socket, seen + len)?;
    Ok(plain)
}

/// Whether an error of recvmsg(2) says that there is nothing (more).
fn ended(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EAGAIN
                | libc::ENOTCONN
                | libc::ECONNRESET
                | libc::ECONNREFUSED
                | libc::ECONNABORTED
                | libc::ETIMEDOUT
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
                | libc::EINVAL
        )
    )
}

/// Takes out what is in the queue of `to`, and what its peer `from` has sent but is not there yet.
pub(crate) fn drain_connection(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    for _ in 0..ROUNDS {
        drain(to, libc::SOCK_STREAM)?;
        if sys::unsent(from)? == 0 && sysfd::readable(to)? == 0 {
            return Ok(());
        }
        std::thread::sleep(ROUND);
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Finds the files that go with a message.
pub(crate) type Lender<'a> = &'a dyn Fn(&Message) -> io::Result<Vec<OwnedFd>>;

/// Sends messages from a connected socket, whatever the limit of its own buffer is: they have been in one before, but not as
/// the same pieces.
pub(crate) fn fill(from: BorrowedFd<'_>, messages: &[Message], lend: Lender<'_>) -> io::Result<()> {
    if messages.is_empty() {
        return Ok(());
    }
    let _room = Room::to_send(from)?;
    for message in messages {
        let mut rights = lend(message)?;
        let mut rest = message.bytes.as_slice();
        loop {
            let n = sys::send_with(from, rest, &[], &rights)?;
            rights.clear();
            rest = &rest[n..];
            if rest.is_empty() {
                break;
            }
        }
    }
    Ok(())
}

/// A socket one of whose buffers is larger for a while.
pub(super) struct Room<'a> {
    socket: BorrowedFd<'a>,
    /// The option by which it is set.
    buffer: i32,
    /// As the kernel tells it, twice what is to be set.
    size: i32,
    locked: i32,
}

impl<'a> Room<'a> {
    /// To send whatever was found in a buffer.
    fn to_send(socket: BorrowedFd<'a>) -> io::Result<Self> {
        Self::make(socket, (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE))
    }

    /// To receive as much, where what finds no room is dropped.
    pub(super) fn to_receive(socket: BorrowedFd<'a>) -> io::Result<Self> {
        Self::make(socket, (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE))
    }

    fn make(socket: BorrowedFd<'a>, (told, buffer): (i32, i32)) -> io::Result<Self> {
        let room = Self {
            socket,
            buffer,
            size: sys::int_option(socket, libc::SOL_SOCKET, told)?,
            locked: sys::int_option(socket, libc::SOL_SOCKET, SO_BUF_LOCK)?,
        };
        sys::set_int_option(socket, libc::SOL_SOCKET, buffer, ROOMY)?;
        Ok(room)
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        let set = |name, value| sys::set_int_option(self.socket, libc::SOL_SOCKET, name, value);
        let done = set(self.buffer, self.size / 2);
        if let Err(e) = done.and_then(|()| set(SO_BUF_LOCK, self.locked)) {
            tracing::warn!("giving a socket the size of its buffer back: {e}");
        }
    }
}
