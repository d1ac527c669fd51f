//! Giving sockets of the internet and other families their addresses.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::address::endpoint;
use super::model::Socket;
use super::{diag, options};
use crate::sys::socket as sys;

/// The old kind of packet sockets.
const SOCK_PACKET: i32 = 10;

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
