//! Sockets of the internet families: reading, and building connections whose both ends are inside.
//!
//! A lost connection is built by `TCP_REPAIR`, which puts the two ends into the established state
//! without a packet. What waited in its queues is then sent through it in the ordinary way.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::capture::{Relation, Sockets};
use super::model::{Setting, Socket, State};
use super::queue::{self, ROUND, ROUNDS};
use super::{diag, options};
use crate::fd::model::{Descriptors, Kind};
use crate::sys::fd as sysfd;
use crate::sys::socket as sys;

const TCP: i32 = libc::IPPROTO_TCP;
const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_REPAIR_WINDOW: i32 = 29;
const REPAIR_ON: i32 = 1;
/// Leaves repair mode without asking the peer for its window.
const REPAIR_OFF: i32 = -1;
const RECEIVE_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;
/// Any numbers will do, as long as the two ends agree.
const SEQUENCE: [u32; 2] = [0x1000_0000, 0x2000_0000];
/// Segment size and window of a fresh connection through the loopback device.
const SEGMENT: u32 = 65_483;
const WINDOW: u32 = 65_536;
const WINDOW_SCALE: u32 = 7;
const OPTION_SEGMENT: u32 = 2;
const OPTION_WINDOW: u32 = 3;
const OPTION_SACK: u32 = 4;

const SO_PEERNAME: i32 = 28;
/// The old kind of packet sockets.
const SOCK_PACKET: i32 = 10;
/// The port that discards by definition.
const DISCARD: u16 = 9;

/// States of a TCP socket (`tcp_states.h`).
mod tcp {
    pub(super) const SYN_SENT: u8 = 2;
    pub(super) const SYN_RECEIVED: u8 = 3;
    pub(super) const FIN_WAIT_1: u8 = 4;
    pub(super) const FIN_WAIT_2: u8 = 5;
    pub(super) const CLOSED: u8 = 7;
    pub(super) const CLOSE_WAIT: u8 = 8;
    pub(super) const LAST_ACK: u8 = 9;
    pub(super) const LISTEN: u8 = 10;
    pub(super) const CLOSING: u8 = 11;
}

/// The beginning of `struct tcp_info`.
struct Info(Vec<u8>);

impl Info {
    fn read(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let mut raw = sys::option(socket, TCP, libc::TCP_INFO)?;
        raw.resize(256, 0);
        Ok(Self(raw))
    }

    fn state(&self) -> u8 {
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

/// Port and address of a socket address, an IPv4 one in its IPv6 form.
fn endpoint(address: &[u8]) -> Option<Endpoint> {
    let family = i32::from(u16::from_ne_bytes(address.get(..2)?.try_into().ok()?));
    let port = u16::from_be_bytes(address.get(2..4)?.try_into().ok()?);
    let mut ip = [0; 16];
    match family {
        libc::AF_INET => {
            ip[10..12].fill(0xff);
            ip[12..].copy_from_slice(address.get(4..8)?);
        }
        libc::AF_INET6 => ip.copy_from_slice(address.get(8..24)?),
        _ => return None,
    }
    Some((port, ip))
}

/// Whether a listening socket's address stands for every address of the host.
fn is_any(ip: &[u8; 16]) -> bool {
    *ip == [0; 16] || ip[10..] == [0xff, 0xff, 0, 0, 0, 0]
}

/// Whether a socket has no port.
pub(super) fn is_free(socket: &Socket) -> bool {
    endpoint(&socket.local).is_none_or(|(port, _)| port == 0)
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
        tcp::CLOSED => closed(handle)?,
        tcp::SYN_SENT | tcp::SYN_RECEIVED => {
            return Err(Relation::Refused(
                "a TCP connection that is being made; wait for it".into(),
            ));
        }
        tcp::LISTEN => listening(sockets, image, index, &info)?,
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
        tcp::FIN_WAIT_1,
        tcp::FIN_WAIT_2,
        tcp::CLOSING,
        tcp::LAST_ACK,
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
        tcp::CLOSE_WAIT | tcp::LAST_ACK | tcp::CLOSING => Ok(State::Orphaned),
        _ => Ok(State::Outside),
    }
}

/// A socket's own and its peer's address.
pub(super) type Ends = (Endpoint, Endpoint);
type Endpoint = (u16, [u8; 16]);

/// The addresses of a TCP connection.
pub(super) fn ends(socket: &Socket) -> Option<Ends> {
    let ends = (endpoint(&socket.local)?, endpoint(&socket.remote)?);
    socket.is_tcp().then_some(ends)
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

/// Does something with a live socket in repair mode, which forgets `SO_REUSEADDR` when it ends.
fn repairing<T>(
    socket: BorrowedFd<'_>,
    act: impl FnOnce(BorrowedFd<'_>) -> io::Result<T>,
) -> io::Result<T> {
    let reuse = sys::int_option(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
    sys::set_int_option(socket, TCP, TCP_REPAIR, REPAIR_ON)?;
    let result = act(socket);
    sys::set_int_option(socket, TCP, TCP_REPAIR, REPAIR_OFF)?;
    sys::set_int_option(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse)?;
    result
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

fn sequence(socket: BorrowedFd<'_>, queue: i32) -> io::Result<u32> {
    sys::set_int_option(socket, TCP, TCP_REPAIR_QUEUE, queue)?;
    sys::int_option(socket, TCP, TCP_QUEUE_SEQ).map(|n| n as u32)
}

/// Makes two fresh sockets the ends of one connection. The one of the two may lack an image: it is
/// the end of one that has closed its side.
pub(super) fn connect_pair(
    net: &OwnedFd,
    (a, image): (BorrowedFd<'_>, &Socket),
    (b, peer): (BorrowedFd<'_>, Option<&Socket>),
) -> io::Result<()> {
    for (end, image) in [(a, Some(image)), (b, peer)] {
        if let Some(image) = image {
            options::set(end, image)?;
        }
        sys::set_int_option(end, TCP, TCP_REPAIR, REPAIR_ON)?;
    }
    establish(net, a, SEQUENCE, &image.local, &image.remote)?;
    let (local, remote) = match peer {
        Some(peer) => (&peer.local, &peer.remote),
        None => (&image.remote, &image.local),
    };
    establish(net, b, [SEQUENCE[1], SEQUENCE[0]], local, remote)?;
    for (end, image) in [(a, Some(image)), (b, peer)] {
        sys::set_int_option(end, TCP, TCP_REPAIR, REPAIR_OFF)?;
        if let Some(image) = image {
            // The end of repair mode forgets that the address may be used again.
            options::set(end, image)?;
        }
    }
    Ok(())
}

fn establish(
    net: &OwnedFd,
    end: BorrowedFd<'_>,
    [ours, theirs]: [u32; 2],
    local: &[u8],
    remote: &[u8],
) -> io::Result<()> {
    sys::bind(end, local)?;
    for (queue, sequence) in [(SEND_QUEUE, ours), (RECEIVE_QUEUE, theirs)] {
        sys::set_int_option(end, TCP, TCP_REPAIR_QUEUE, queue)?;
        sys::set_int_option(end, TCP, TCP_QUEUE_SEQ, sequence as i32)?;
    }
    connect_over(net, end, local, remote)?;
    let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|w| w.to_ne_bytes()).collect() };
    let scales = WINDOW_SCALE | WINDOW_SCALE << 16;
    let agreed = [
        OPTION_SEGMENT,
        SEGMENT,
        OPTION_WINDOW,
        scales,
        OPTION_SACK,
        0,
    ];
    sys::set_option(end, TCP, TCP_REPAIR_OPTIONS, &words(&agreed))?;
    // Last update's number, window to send in, greatest such, window to receive in, where it begins.
    let window = [theirs, WINDOW, WINDOW, WINDOW, theirs];
    sys::set_option(end, TCP, TCP_REPAIR_WINDOW, &words(&window))
}

/// Connects a bound socket, in the place of what an earlier connection may have left.
pub(super) fn connect_over(
    net: &OwnedFd,
    end: BorrowedFd<'_>,
    local: &[u8],
    remote: &[u8],
) -> io::Result<()> {
    match sys::connect(end, remote) {
        Err(e) if e.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
            forget_closed(net, local)?;
            sys::connect(end, remote)
        }
        result => result,
    }
}

/// Binds a socket, in the place of what earlier connections may have left.
pub(super) fn bind_over(net: &OwnedFd, end: BorrowedFd<'_>, local: &[u8]) -> io::Result<()> {
    match sys::bind(end, local) {
        Err(e) if e.raw_os_error() == Some(libc::EADDRINUSE) => {
            forget_closed(net, local)?;
            sys::bind(end, local)
        }
        // It was allowed to be bound to an address that the host does not have.
        Err(e) if e.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
            sys::set_int_option(end, libc::IPPROTO_IP, libc::IP_FREEBIND, 1)?;
            let bound = sys::bind(end, local);
            sys::set_int_option(end, libc::IPPROTO_IP, libc::IP_FREEBIND, 0)?;
            bound
        }
        result => result,
    }
}

fn forget_closed(net: &OwnedFd, local: &[u8]) -> io::Result<()> {
    endpoint(local).map_or(Ok(()), |(port, _)| diag::forget_closed(net, port))
}

/// An address of the loopback device.
fn loopback(domain: i32, port: u16) -> Vec<u8> {
    let (len, family) = match domain {
        libc::AF_INET => (16, libc::AF_INET),
        _ => (28, libc::AF_INET6),
    };
    let mut address = vec![0; len];
    address[..2].copy_from_slice(&(family as u16).to_ne_bytes());
    address[2..4].copy_from_slice(&port.to_be_bytes());
    match domain {
        libc::AF_INET => address[4..8].copy_from_slice(&[127, 0, 0, 1]),
        _ => address[23] = 1,
    }
    address
}

/// A connection that both sides have ended, made of two fresh sockets.
pub(super) fn make_ended(
    net: &OwnedFd,
    image: &Socket,
    [a, b]: [OwnedFd; 2],
) -> io::Result<OwnedFd> {
    let (end, other) = if image.remote.is_empty() {
        connect_anyhow(image, a, b)?
    } else {
        connect_pair(net, (a.as_fd(), image), (b.as_fd(), None))?;
        (a, b)
    };
    sys::shutdown(other.as_fd(), 2)?;
    until(|| (Info::read(end.as_fd()).ok()?.state() == tcp::CLOSE_WAIT).then_some(()))?;
    sys::shutdown(end.as_fd(), 2)?;
    until(|| (Info::read(end.as_fd()).ok()?.state() == tcp::CLOSED).then_some(()))?;
    Ok(end)
}

/// A connection between any two addresses.
fn connect_anyhow(
    image: &Socket,
    other: OwnedFd,
    listener: OwnedFd,
) -> io::Result<(OwnedFd, OwnedFd)> {
    sys::bind(listener.as_fd(), &loopback(image.domain, 0))?;
    rustix::net::listen(&listener, 1)?;
    sys::connect(other.as_fd(), &sys::local_address(listener.as_fd())?).or_else(|e| {
        match e.raw_os_error() {
            Some(libc::EINPROGRESS) => Ok(()),
            _ => Err(e),
        }
    })?;
    let end = until(|| sys::accept(listener.as_fd()).ok())?;
    options::set(end.as_fd(), image)?;
    Ok((end, other))
}

/// Waits for what comes through the loopback device at once, or nearly so.
fn until<T>(mut done: impl FnMut() -> Option<T>) -> io::Result<T> {
    for _ in 0..ROUNDS {
        if let Some(result) = done() {
            return Ok(result);
        }
        std::thread::sleep(ROUND);
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// A connection that was cut: the first call on it tells so.
pub(super) fn make_cut(net: &OwnedFd, end: &OwnedFd, image: &Socket) -> io::Result<()> {
    let end = end.as_fd();
    options::set(end, image)?;
    sys::set_int_option(end, TCP, TCP_REPAIR, REPAIR_ON)?;
    // Nobody hears of this connection: it is made without a packet.
    let loopback = |port| loopback(image.domain, port);
    establish(net, end, SEQUENCE, &loopback(0), &loopback(DISCARD))?;
    sys::set_int_option(end, TCP, TCP_REPAIR, REPAIR_OFF)?;
    cut(end)
}

/// Cuts a connection in place: its next use fails with `ECONNRESET`.
pub(super) fn cut(end: BorrowedFd<'_>) -> io::Result<()> {
    let mut nowhere = [0; 16];
    nowhere[..2].copy_from_slice(&(libc::AF_UNSPEC as u16).to_ne_bytes());
    sys::connect(end, &nowhere)
}

/// Makes a socket's closing leave nothing behind, not even a waiting address.
pub(super) fn close_hard(end: BorrowedFd<'_>) -> io::Result<()> {
    let on = [1_i32.to_ne_bytes(), 0_i32.to_ne_bytes()].concat();
    sys::set_option(end, libc::SOL_SOCKET, libc::SO_LINGER, &on)
}

/// Binds a fresh socket, and connects one that does not need a partner for it. If the address is `shared` with others, it
/// may be that of any socket meanwhile, and the options are to be set once more when all are there.
pub(super) fn place(
    net: &OwnedFd,
    end: BorrowedFd<'_>,
    image: &Socket,
    shared: bool,
) -> io::Result<()> {
    if image.domain == libc::AF_PACKET {
        bind_packet(end, image)?;
        // A group takes only sockets that listen.
        return options::set(end, image);
    }
    options::set(end, image)?;
    if shared {
        for option in [libc::SO_REUSEADDR, libc::SO_REUSEPORT] {
            sys::set_int_option(end, libc::SOL_SOCKET, option, 1)?;
        }
    }
    let bound = match image.domain {
        libc::AF_NETLINK => image.local.iter().skip(2).any(|&byte| byte != 0),
        _ => endpoint(&image.local).is_some_and(|(port, _)| port != 0),
    };
    if bound {
        bind_over(net, end, &image.local)?;
    }
    if !image.is_tcp() && !image.remote.is_empty() {
        sys::connect(end, &image.remote)?;
    }
    Ok(())
}

/// Has a packet socket listen. Its address is told without room for that of the hardware, but must be given with it.
fn bind_packet(end: BorrowedFd<'_>, image: &Socket) -> io::Result<()> {
    let mut local = image.local.clone();
    if image.kind != SOCK_PACKET {
        local.resize(local.len().max(size_of::<libc::sockaddr_ll>()), 0);
    }
    match local.iter().skip(2).any(|&byte| byte != 0) {
        true => sys::bind(end, &local),
        false => Ok(()),
    }
}

/// Whether two addresses are the same port of the same host, in whichever form.
pub(super) fn same_endpoint(a: &[u8], b: &[u8]) -> bool {
    let (a, b) = (endpoint(a), endpoint(b));
    a.is_some() && a == b
}

/// The address by which a socket bound to this one is reached from inside.
pub(super) fn reachable(local: &[u8]) -> Vec<u8> {
    let mut address = local.to_vec();
    if let Some((_, ip)) = endpoint(local)
        && is_any(&ip)
    {
        match address.len() {
            16 => address[4..8].copy_from_slice(&[127, 0, 0, 1]),
            28.. => address[23] = 1,
            _ => {}
        }
    }
    address
}
