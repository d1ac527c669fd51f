//! What waits in a socket's queues: looked at, taken out, put in.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::model::{Message, Socket};
use crate::sys::fd as sysfd;
use crate::sys::socket as sys;

const SO_PEEK_OFF: i32 = 42;
const SO_BUF_LOCK: i32 = 72;
/// Bytes of a send buffer that takes whatever was found in one.
const ROOMY: i32 = 256 << 20;
/// More messages than any queue holds by default.
const MOST: usize = 100_000;
/// The longest datagram.
const DATAGRAM: usize = 256 * 1024;
/// How often and how long to wait for what is on its way through the loopback device.
pub(super) const ROUNDS: u32 = 2000;
pub(super) const ROUND: Duration = Duration::from_micros(500);

/// A queue's content, or the sign that it holds what cannot be copied (descriptors).
pub(crate) enum Peeked {
    Messages(Vec<Message>),
    Rights,
}

/// Copies what waits in a receive queue, and leaves it there.
pub(crate) fn peek(socket: BorrowedFd<'_>, image: &Socket) -> io::Result<Peeked> {
    let stream = image.is_stream();
    let waiting = sysfd::readable(socket)?;
    if waiting == 0 && !more_than_bytes(socket, stream) {
        return Ok(Peeked::Messages(Vec::new()));
    }
    if image.is_tcp() {
        return peek_bytes(socket, waiting);
    }
    let before = sys::int_option(socket, libc::SOL_SOCKET, SO_PEEK_OFF)?;
    sys::set_int_option(socket, libc::SOL_SOCKET, SO_PEEK_OFF, 0)?;
    let peeked = take(socket, image.kind, libc::MSG_PEEK);
    sys::set_int_option(socket, libc::SOL_SOCKET, SO_PEEK_OFF, before)?;
    peeked
}

/// TCP shows its whole queue at once, and knows `SO_PEEK_OFF` only since Linux 6.9.
fn peek_bytes(socket: BorrowedFd<'_>, waiting: usize) -> io::Result<Peeked> {
    let mut bytes = vec![0; waiting];
    let received = match sys::receive(socket, &mut bytes, libc::MSG_PEEK) {
        Ok(nothing) if nothing.len == 0 => return Ok(Peeked::Messages(Vec::new())),
        Err(e) if ended(&e) => return Ok(Peeked::Messages(Vec::new())),
        received => received?,
    };
    bytes.truncate(received.len);
    let from = received.from;
    Ok(Peeked::Messages(vec![Message { bytes, from }]))
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
fn take(socket: BorrowedFd<'_>, kind: i32, flags: i32) -> io::Result<Peeked> {
    let stream = kind == libc::SOCK_STREAM;
    let mut left = sysfd::readable(socket)?;
    let mut buffer = vec![0; DATAGRAM];
    let mut messages: Vec<Message> = Vec::new();
    for _ in 0..MOST {
        let received = match sys::receive(socket, &mut buffer, flags) {
            Err(e) if ended(&e) => break,
            received => received?,
        };
        if received.rights && flags & libc::MSG_PEEK != 0 {
            return Ok(Peeked::Rights);
        }
        let bytes = &buffer[..received.len];
        left = left.saturating_sub(bytes.len());
        match messages.last_mut() {
            // The end of a stream. A datagram may be empty; of packets on a connection the end cannot be told from one
            // that is, so what comes empty after all bytes is taken for the end.
            _ if stream && bytes.is_empty() => break,
            _ if kind == libc::SOCK_SEQPACKET && bytes.is_empty() && left == 0 => break,
            Some(last) if stream => last.bytes.extend_from_slice(bytes),
            _ => messages.push(Message {
                bytes: bytes.to_vec(),
                from: received.from,
            }),
        }
    }
    Ok(Peeked::Messages(messages))
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

/// Sends messages from a connected socket, whatever the limit of its own buffer is: they have been in one before, but not as
/// the same pieces.
pub(crate) fn fill(from: BorrowedFd<'_>, messages: &[Message]) -> io::Result<()> {
    let Some(_room) = Room::make(from, messages)? else {
        return Ok(());
    };
    for message in messages {
        let mut rest = message.bytes.as_slice();
        loop {
            let n = sys::send(from, rest, &[])?;
            rest = &rest[n..];
            if rest.is_empty() {
                break;
            }
        }
    }
    Ok(())
}

/// A socket whose send buffer is larger for a while.
struct Room<'a> {
    socket: BorrowedFd<'a>,
    /// As the kernel tells it, twice what is to be set.
    size: i32,
    locked: i32,
}

impl<'a> Room<'a> {
    /// Makes room for these messages; `None` if there are none.
    fn make(socket: BorrowedFd<'a>, messages: &[Message]) -> io::Result<Option<Self>> {
        if messages.is_empty() {
            return Ok(None);
        }
        let room = Self {
            socket,
            size: sys::int_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUF)?,
            locked: sys::int_option(socket, libc::SOL_SOCKET, SO_BUF_LOCK)?,
        };
        sys::set_int_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, ROOMY)?;
        Ok(Some(room))
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        let set = |name, value| sys::set_int_option(self.socket, libc::SOL_SOCKET, name, value);
        let done = set(libc::SO_SNDBUFFORCE, self.size / 2);
        if let Err(e) = done.and_then(|()| set(SO_BUF_LOCK, self.locked)) {
            tracing::warn!("giving a socket the size of its send buffer back: {e}");
        }
    }
}
