//! TCP connections whose both ends are inside, built anew.
//!
//! A lost connection is built by `TCP_REPAIR`, which puts the two ends into the established state
//! without a packet. What waited in its queues is then sent through it in the ordinary way.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::address::loopback;
use super::inet::connect_over;
use super::model::Socket;
use super::options;
use super::queue::{ROUND, ROUNDS};
use super::tcp::{Info, state};
use crate::sys::socket as sys;

pub(super) const TCP: i32 = libc::IPPROTO_TCP;
const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_REPAIR_WINDOW: i32 = 29;
const REPAIR_ON: i32 = 1;
/// Leaves repair mode without asking the peer for its window.
const REPAIR_OFF: i32 = -1;
pub(super) const RECEIVE_QUEUE: i32 = 1;
pub(super) const SEND_QUEUE: i32 = 2;
/// Any numbers will do, as long as the two ends agree.
const SEQUENCE: [u32; 2] = [0x1000_0000, 0x2000_0000];
/// Segment size and window of a fresh connection through the loopback device.
const SEGMENT: u32 = 65_483;
const WINDOW: u32 = 65_536;
const WINDOW_SCALE: u32 = 7;
const OPTION_SEGMENT: u32 = 2;
const OPTION_WINDOW: u32 = 3;
const OPTION_SACK: u32 = 4;

/// The port that discards by definition.
const DISCARD: u16 = 9;

/// Does something with a live socket in repair mode, which forgets `SO_REUSEADDR` when it ends.
pub(super) fn repairing<T>(
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

/// The number of the byte after those of a queue, of a socket in repair mode.
pub(super) fn sequence(socket: BorrowedFd<'_>, queue: i32) -> io::Result<u32> {
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

/// Makes a fresh socket both ends of one connection, as one is that has connected to its own port.
pub(super) fn connect_to_itself(
    net: &OwnedFd,
    end: BorrowedFd<'_>,
    image: &Socket,
) -> io::Result<()> {
    options::set(end, image)?;
    sys::set_int_option(end, TCP, TCP_REPAIR, REPAIR_ON)?;
    let [number, _] = SEQUENCE;
    establish(net, end, [number, number], &image.local, &image.remote)?;
    sys::set_int_option(end, TCP, TCP_REPAIR, REPAIR_OFF)?;
    options::set(end, image)
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
    until(|| (Info::read(end.as_fd()).ok()?.state() == state::CLOSE_WAIT).then_some(()))?;
    sys::shutdown(end.as_fd(), 2)?;
    until(|| (Info::read(end.as_fd()).ok()?.state() == state::CLOSED).then_some(()))?;
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
pub(super) fn until<T>(mut done: impl FnMut() -> Option<T>) -> io::Result<T> {
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
