//! How TCP sockets stand to one another, and what is on its way between them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::address::{endpoint, ends, is_any, loopback};
use super::capture::{Relation, Sockets};
use super::model::{Setting, State};
use super::queue::{self, ROUNDS};
use super::repair::{RECEIVE_QUEUE, SEND_QUEUE, TCP, repairing, sequence};
use crate::fd::model::{Descriptors, Kind};
use crate::sys::fd as sysfd;
use crate::sys::socket as sys;

const SO_PEERNAME: i32 = 28;

/// States of a TCP socket (`tcp_states.h`).
pub(super) mod state {
    pub(in crate::fd::socket) const SYN_SENT: u8 = 2;
    pub(in crate::fd::socket) const SYN_RECEIVED: u8 = 3;
    pub(in crate::fd::socket) const FIN_WAIT_1: u8 = 4;
    pub(in crate::fd::socket) const FIN_WAIT_2: u8 = 5;
    pub(in crate::fd::socket) const CLOSED: u8 = 7;
    pub(in crate::fd::socket) const CLOSE_WAIT: u8 = 8;
    pub(in crate::fd::socket) const LAST_ACK: u8 = 9;
    pub(in crate::fd::socket) const LISTEN: u8 = 10;
    pub(in crate::fd::socket) const CLOSING: u8 = 11;
}

/// The beginning of `struct tcp_info`.
pub(super) struct Info(Vec<u8>);

impl Info {
    pub(super) fn read(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let mut raw = sys::option(socket, TCP, libc::TCP_INFO)?;
        raw.resize(256, 0);
        Ok(Self(raw))
    }

    pub(super) fn state(&self) -> u8 {
        self.0[0]
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.0[at..at + 4].try_into().expect("four bytes"))
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.0[at..at + 8].try_into().expect("eight bytes"))
    }

    /// Connections that wait at a listening socket (`tcpi_unacked`), and may wait (`tcpi_sacked`).
    fn waiting(&self) -> (u32, u32) {
        (self.u32_at(24), self.u32_at(28))
    }

    /// `tcpi_bytes_acked`, of which the connection's beginning is one, and `tcpi_bytes_received`.
    fn moved(&self) -> (u64, u64) {
        (self.u64_at(120), self.u64_at(128))
    }
}

/// Finds out how an internet socket stands to the others.
pub(super) fn relate(
    sockets: &Sockets,
    image: &mut Descriptors,
    index: usize,
) -> Result<(), Relation> {
    if !sockets.socket(image, index).is_tcp() {
        return Ok(());
    }
    let handle = sockets.handles[&index].as_fd();
    let info = Info::read(handle)?;
    let state = match info.state() {
        state::CLOSED => closed(handle)?,
        state::SYN_SENT | state::SYN_RECEIVED => {
            return Err(Relation::Refused(
                "a TCP connection that is being made; wait for it".into(),
            ));
        }
        state::LISTEN => listening(sockets, image, index, &info)?,
        _ => connected(sockets, image, index, &info)?,
    };
    let Kind::Socket(socket) = &mut image.objects[index].kind else {
        return Ok(());
    };
    if state == State::Outside {
        let (acknowledged, received) = info.moved();
        socket.moved = acknowledged.wrapping_add(received);
    }
    let sent_end = [
        state::FIN_WAIT_1,
        state::FIN_WAIT_2,
        state::CLOSING,
        state::LAST_ACK,
    ];
    socket.shutdown = if sent_end.contains(&info.state()) {
        2
    } else {
        0
    };
    if state == State::Ended {
        // Nobody is told the peer of what is not connected, but the kernel remembers.
        socket.remote = peer_name(handle, socket.domain).unwrap_or_default();
        socket.options.retain(Setting::matters_connected);
    }
    socket.state = state;
    Ok(())
}

fn peer_name(socket: BorrowedFd<'_>, domain: i32) -> io::Result<Vec<u8>> {
    let room = loopback(domain, 0).len();
    sys::option_within(socket, libc::SOL_SOCKET, SO_PEERNAME, room)
}

/// What a closed socket is: one that was connected reads as the end, another has no connection to read from.
fn closed(socket: BorrowedFd<'_>) -> Result<State, Relation> {
    match sys::receive(socket, &mut [0], libc::MSG_PEEK) {
        Ok(received) if received.len == 0 => Ok(State::Ended),
        Ok(_) => Err(Relation::Refused(
            "a TCP connection that both sides have ended, with bytes that wait to be read".into(),
        )),
        Err(_) => Ok(State::Idle),
    }
}

fn listening(
    sockets: &Sockets,
    image: &Descriptors,
    index: usize,
    info: &Info,
) -> Result<State, Relation> {
    let (waiting, most) = info.waiting();
    let mut pending = Vec::new();
    if waiting > 0 {
        let other_side = |&other: &usize| waits_at(sockets, image, other) == Some(index);
        pending.extend(sockets.all().filter(other_side));
        pending.sort_unstable();
    }
    if pending.len() != waiting as usize {
        return Err(Relation::Refused(
            "a TCP socket on which a connection waits whose other side is gone; accept it first"
                .into(),
        ));
    }
    Ok(State::Listening {
        backlog: i32::try_from(most).unwrap_or(i32::MAX),
        pending,
    })
}

fn connected(
    sockets: &Sockets,
    image: &Descriptors,
    index: usize,
    info: &Info,
) -> Result<State, Relation> {
    if let Some(peer) = other_end(sockets, image, index) {
        return Ok(State::Connected { peer });
    }
    if let Some(listener) = waits_at(sockets, image, index) {
        return Ok(State::Connected { peer: listener });
    }
    match info.state() {
        state::CLOSE_WAIT | state::LAST_ACK | state::CLOSING => Ok(State::Orphaned),
        _ => Ok(State::Outside),
    }
}

/// The other end of a connection, among the sockets of the tree.
fn other_end(sockets: &Sockets, image: &Descriptors, index: usize) -> Option<usize> {
    let (here, there) = ends(sockets.socket(image, index))?;
    sockets.by_ends.get(&(there, here)).copied()
}

/// The listening socket that a connection without another end waits at.
fn waits_at(sockets: &Sockets, image: &Descriptors, index: usize) -> Option<usize> {
    let socket = sockets.socket(image, index);
    if !socket.is_tcp() || other_end(sockets, image, index).is_some() {
        return None;
    }
    let there = endpoint(&socket.remote)?;
    sockets.all().find(|&other| {
        let other = sockets.socket(image, other);
        other.is_tcp()
            && matches!(other.state, State::Listening { .. })
            && endpoint(&other.local)
                .is_some_and(|(port, ip)| port == there.0 && (ip == there.1 || is_any(&ip)))
    })
}

/// Whether a connection has sent anything since it began.
pub(super) fn has_sent(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(Info::read(socket)?.moved().0 > 1 || sys::unsent(socket)? > 0)
}

/// What `from` has sent and `to` has not read: what waits at `to`, and what is not there yet.
///
/// The network does not stand still with the processes, so bytes may move from one queue to the other meanwhile.
pub(super) fn between(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    for _ in 0..ROUNDS {
        let mut bytes = queue::peek_bytes(to)?;
        let there = bytes.len();
        if sys::unsent(from)? > 0 {
            bytes.extend(on_the_way(from, to)?);
        }
        if sysfd::readable(to)? == there {
            return Ok(bytes);
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// What `from` has sent and `to` has not got.
fn on_the_way(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let (mut bytes, end) = repairing(from, send_queue)?;
    let got = repairing(to, |to| sequence(to, RECEIVE_QUEUE))?;
    // The queue keeps what was received but not acknowledged; its last byte has the number before `end`. Behind that may
    // only be the end of the stream.
    let missing = usize::try_from(end.wrapping_sub(got) as i32).unwrap_or(0);
    bytes.drain(..bytes.len().saturating_sub(missing));
    Ok(bytes)
}

/// The bytes of the send queue, and the number of the byte after them.
fn send_queue(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, u32)> {
    let end = sequence(socket, SEND_QUEUE)?;
    for _ in 0..ROUNDS {
        let len = sys::unsent(socket)?;
        let mut bytes = vec![0; len];
        let received = sys::receive(socket, &mut bytes, libc::MSG_PEEK)?;
        // Bytes leave the queue when they are acknowledged.
        if sys::unsent(socket)? == len {
            bytes.truncate(received.len);
            // The end of the stream has a number of its own.
            return Ok((bytes, end.wrapping_sub((len - received.len) as u32)));
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}
