//! How TCP sockets stand to one another, and what is on its way between them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::address::{endpoint, ends, is_any, loopback};
use super::capture::{Relation, Sockets, check_reachable};
use super::model::{Pending, Setting, State};
use super::queue::{self, ROUNDS};
use super::repair::{RECEIVE_QUEUE, SEND_QUEUE, TCP, repairing, sequence};
use crate::fd::model::{Descriptors, Kind};
use crate::sys::fd as sysfd;
use crate::sys::socket as sys;

const SO_PEERNAME: i32 = 28;

/// States of a TCP socket (`tcp_states.h`).
pub(super) mod state {
    pub(crate) const ESTABLISHED: u8 = 1;
    pub(crate) const SYN_SENT: u8 = 2;
    pub(crate) const SYN_RECEIVED: u8 = 3;
    pub(crate) const FIN_WAIT_1: u8 = 4;
    pub(crate) const FIN_WAIT_2: u8 = 5;
    pub(crate) const CLOSED: u8 = 7;
    pub(crate) const CLOSE_WAIT: u8 = 8;
    pub(crate) const LAST_ACK: u8 = 9;
    pub(crate) const LISTEN: u8 = 10;
    pub(crate) const CLOSING: u8 = 11;
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
            return Err(being_made());
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
    let sends = !sent_end.contains(&info.state());
    // The other side's end looks the same.
    let reads = is_left(info.state()) || !sys::reads_end(handle)?;
    socket.shutdown = match state {
        State::Idle | State::Ended | State::Cut | State::Listening { .. } => 0,
        _ => u8::from(!reads) | u8::from(!sends) << 1,
    };
    if state == State::Ended {
        // Nobody is told the peer of what is not connected, but the kernel remembers.
        socket.remote = peer_name(handle).unwrap_or_default();
        socket.options.retain(Setting::matters_connected);
    }
    socket.state = state;
    Ok(())
}

/// The address of a peer, also of one that is not connected any more.
pub(super) fn peer_name(socket: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let domain = sys::int_option(socket, libc::SOL_SOCKET, libc::SO_DOMAIN)?;
    let room = loopback(domain, 0).len();
    sys::option_within(socket, libc::SOL_SOCKET, SO_PEERNAME, room)
}

/// What a closed socket is: one that was connected reads as the end, another has no connection to read from.
fn closed(socket: BorrowedFd<'_>) -> Result<State, Relation> {
    if sysfd::readable(socket)? == 0 && sys::has_error(socket)? {
        return Ok(State::Cut);
    }
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
        let mut clients: Vec<_> = sockets.all().filter(other_side).collect();
        clients.sort_unstable();
        for client in clients {
            pending.push(match has_sent(sockets.handles[&client].as_fd())? {
                false => Pending::quiet(client),
                true => Pending {
                    client: Some(client),
                    ..Pending::default()
                },
            });
        }
    }
    if pending.len() > waiting as usize {
        return Err(being_made());
    }
    // The other ends of the rest are closed.
    pending.resize_with(waiting as usize, Pending::default);
    check_reachable(&pending, image.objects[index].is_in_flight())?;
    Ok(State::Listening {
        backlog: i32::try_from(most).unwrap_or(i32::MAX),
        pending,
    })
}

fn being_made() -> Relation {
    Relation::Refused("a TCP connection that is being made; wait for it".into())
}

/// Whether a connection's other end has ended its side, as none does that nobody has accepted.
fn is_left(state: u8) -> bool {
    [state::CLOSE_WAIT, state::LAST_ACK, state::CLOSING].contains(&state)
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
        return match Info::read(sockets.handles[&listener].as_fd())?.waiting() {
            // It waits for the first bytes before it can be accepted (TCP_DEFER_ACCEPT).
            (0, _) => Err(being_made()),
            _ => Ok(State::Connected { peer: listener }),
        };
    }
    match is_left(info.state()) {
        true => Ok(State::Orphaned),
        false => Ok(State::Outside),
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
    if Info::read(sockets.handles[&index].as_fd()).is_ok_and(|info| is_left(info.state())) {
        return None;
    }
    sockets.all().find(|&other| {
        let other = sockets.socket(image, other);
        other.is_tcp()
            && matches!(other.state, State::Listening { .. })
            && endpoint(&other.local)
                .is_some_and(|(port, ip)| port == there.0 && (ip == there.1 || is_any(&ip)))
    })
}

/// Whether a connection has sent anything since it began.
fn has_sent(socket: BorrowedFd<'_>) -> io::Result<bool> {
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
