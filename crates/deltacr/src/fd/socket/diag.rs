//! The sockets of a network namespace, as `sock_diag(7)` lists them.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::model::Socket;
use crate::sys;

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_ACK: u16 = 4;
/// Bytes of `struct inet_diag_sockid`, and of `struct inet_diag_msg`, and where that has the inode number.
const TCP_ID: usize = 48;
const INET_MESSAGE: usize = 72;
const INET_INODE: usize = 68;
const INET_DIAG_SHUTDOWN: u16 = 8;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const UDIAG_SHOW: u32 = SHOW_PEER | SHOW_ICONS | SHOW_RQLEN;
const SHOW_PEER: u32 = 4;
const SHOW_ICONS: u32 = 8;
const SHOW_RQLEN: u32 = 16;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_ICONS: u16 = 3;
const UNIX_DIAG_RQLEN: u16 = 4;
const UNIX_DIAG_SHUTDOWN: u16 = 6;
/// Bytes of `struct nlmsghdr` and `struct unix_diag_msg`.
const HEADER: usize = 16;
const MESSAGE: usize = 16;

/// One unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct UnixLine {
    /// Inode number of the peer; zero if that has no descriptor.
    pub(crate) peer: Option<u64>,
    /// Connections that wait to be accepted, by the inode number of the other side.
    pub(crate) pending: Vec<u64>,
    /// Of a listening socket: the most connections that may wait.
    pub(crate) backlog: u32,
    /// 1 for receiving, 2 for sending.
    pub(crate) shutdown: u8,
}

/// Every unix socket of the namespace `net`, by inode number.
pub(crate) fn unix_sockets(net: &OwnedFd) -> io::Result<HashMap<u64, UnixLine>> {
    let socket = diag_socket(net)?;
    sys::socket::send(socket.as_fd(), &request(), &[])?;
    let mut found = HashMap::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let received = sys::socket::receive(socket.as_fd(), &mut buffer, 0)?;
        if parse(&buffer[..received.len], &mut found)? {
            return Ok(found);
        }
    }
}

/// Removes what closed TCP connections from or to a port have left behind in the namespace, such as
/// their waiting times (`SOCK_DESTROY`). Only sockets without a descriptor are looked at.
pub(crate) fn forget_closed(net: &OwnedFd, port: u16) -> io::Result<()> {
    let socket = diag_socket(net)?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        sys::socket::send(socket.as_fd(), &tcp_request(family, None), &[])?;
        let mut closed = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let received = sys::socket::receive(socket.as_fd(), &mut buffer, 0)?;
            let done = messages(&buffer[..received.len], |body| {
                closed.extend(closed_on(body, port));
            })?;
            if done {
                break;
            }
        }
        for id in closed {
            sys::socket::send(socket.as_fd(), &tcp_request(family, Some(id)), &[])?;
            let received = sys::socket::receive(socket.as_fd(), &mut buffer, 0)?;
            // One that has gone by itself meanwhile is as good.
            let _ = messages(&buffer[..received.len], |_| {});
        }
    }
    Ok(())
}

/// The identity of a connection (`struct inet_diag_sockid`) that has no descriptor and this port.
fn closed_on(body: &[u8], port: u16) -> Option<[u8; TCP_ID]> {
    let id: [u8; TCP_ID] = body.get(4..4 + TCP_ID)?.try_into().ok()?;
    let inode = body.get(INET_INODE..INET_INODE + 4)?;
    let ports = [u16_at(&id, 0), u16_at(&id, 2)].map(u16::from_be);
    (inode == [0; 4] && ports.contains(&port)).then_some(id)
}

/// Asks for all closing connections of a family, or for the end of one.
fn tcp_request(family: i32, destroy: Option<[u8; TCP_ID]>) -> Vec<u8> {
    /// FIN_WAIT1, FIN_WAIT2, TIME_WAIT, LAST_ACK and CLOSING of `tcp_states.h`.
    const CLOSING: u32 = 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 11;
    let (kind, flags) = match destroy {
        Some(_) => (SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK),
        None => (SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP),
    };
    let mut request = Vec::with_capacity(72);
    request.extend_from_slice(&72_u32.to_ne_bytes());
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(&flags.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(&[family as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    request.extend_from_slice(&CLOSING.to_ne_bytes());
    request.extend_from_slice(&destroy.unwrap_or([0; TCP_ID]));
    request
}

/// The directions of a UDP socket with a port that are shut down: 1 for receiving, 2 for sending.
pub(crate) fn udp_shutdown(asking: BorrowedFd<'_>, socket: &Socket) -> io::Result<u8> {
    sys::socket::send(asking, &udp_request(socket), &[])?;
    let mut buffer = vec![0; 16 * 1024];
    let received = sys::socket::receive(asking, &mut buffer, 0)?;
    let mut shutdown = 0;
    let answered = messages(&buffer[..received.len], |body| {
        // Of several that share the port another one may be shown.
        let inode = body.get(INET_INODE..INET_INODE + 4);
        if inode == Some(&(socket.inode as u32).to_ne_bytes()) {
            each_attribute(&body[INET_MESSAGE.min(body.len())..], |kind, value| {
                if let (INET_DIAG_SHUTDOWN, Some(&bits)) = (kind, value.first()) {
                    shutdown = bits & 3;
                }
            });
        }
    });
    match answered {
        // Not found, where another network device or address stands in the way.
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(0),
        answered => answered.map(|_| shutdown),
    }
}

/// Asks for one UDP socket. The kernel looks for it as for the receiver of a datagram: source is the peer.
fn udp_request(socket: &Socket) -> Vec<u8> {
    let port = |address: &[u8]| address.get(2..4).unwrap_or(&[0; 2]).to_vec();
    let host = |address: &[u8]| {
        let range = if socket.domain == libc::AF_INET {
            4..8
        } else {
            8..24
        };
        let mut host = address.get(range).unwrap_or_default().to_vec();
        host.resize(16, 0);
        host
    };
    let (local, remote) = (&socket.local, &socket.remote);
    let mut request = Vec::with_capacity(72);
    request.extend_from_slice(&72_u32.to_ne_bytes());
    request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(&[socket.domain as u8, socket.protocol as u8, 0, 0]);
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    for part in [port(remote), port(local), host(remote), host(local)] {
        request.extend_from_slice(&part);
    }
    // No device, and no cookie.
    request.extend_from_slice(&[0; 4]);
    request.extend_from_slice(&[0xff; 8]);
    request
}

pub(crate) fn diag_socket(net: &OwnedFd) -> io::Result<OwnedFd> {
    sys::socket::socket_in(net, libc::AF_NETLINK, libc::SOCK_DGRAM, NETLINK_SOCK_DIAG)
}

fn request() -> Vec<u8> {
    let mut request = Vec::with_capacity(40);
    request.extend_from_slice(&40_u32.to_ne_bytes());
    request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(&[libc::AF_UNIX as u8, 0, 0, 0]);
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    request.extend_from_slice(&0_u32.to_ne_bytes());
    request.extend_from_slice(&UDIAG_SHOW.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request
}

fn parse(bytes: &[u8], found: &mut HashMap<u64, UnixLine>) -> io::Result<bool> {
    messages(bytes, |body| {
        if body.len() >= MESSAGE {
            found.insert(u32_at(body, 4).into(), attributes(&body[MESSAGE..]));
        }
    })
}

/// Hands on the messages of one datagram; tells whether the answer is complete.
fn messages(mut bytes: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<bool> {
    while bytes.len() >= HEADER {
        let len = (u32_at(bytes, 0) as usize).clamp(HEADER, bytes.len());
        let body = &bytes[HEADER..len];
        match u16_at(bytes, 4) {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR if body.len() >= 4 => match u32_at(body, 0) as i32 {
                0 => return Ok(true),
                code => {
                    let code = code.checked_neg().unwrap_or(libc::EIO);
                    return Err(io::Error::from_raw_os_error(code));
                }
            },
            SOCK_DIAG_BY_FAMILY => each(body),
            _ => {}
        }
        bytes = &bytes[len.next_multiple_of(4).min(bytes.len())..];
    }
    Ok(false)
}

fn attributes(bytes: &[u8]) -> UnixLine {
    let mut line = UnixLine::default();
    each_attribute(bytes, |kind, value| match kind {
        UNIX_DIAG_PEER if value.len() >= 4 => line.peer = Some(u32_at(value, 0).into()),
        UNIX_DIAG_ICONS => {
            let inodes = value.chunks_exact(4);
            line.pending = inodes.map(|ino| u32_at(ino, 0).into()).collect();
        }
        UNIX_DIAG_RQLEN if value.len() >= 8 => line.backlog = u32_at(value, 4),
        UNIX_DIAG_SHUTDOWN => line.shutdown = value.first().copied().unwrap_or(0) & 3,
        _ => {}
    });
    line
}

/// Hands on the attributes of a message, each with what kind it is.
fn each_attribute(mut bytes: &[u8], mut each: impl FnMut(u16, &[u8])) {
    while bytes.len() >= 4 {
        let len = usize::from(u16_at(bytes, 0)).clamp(4, bytes.len());
        each(u16_at(bytes, 2), &bytes[4..len]);
        bytes = &bytes[len.next_multiple_of(4).min(bytes.len())..];
    }
}

/// The caller has checked that the bytes are there.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;
    use rustix::fs::fstat;

    use super::*;

    #[test]
    fn the_ends_of_a_pair_name_each_other() {
        let (a, b) = UnixStream::pair().unwrap();
        a.shutdown(std::net::Shutdown::Write).unwrap();
        let net = std::fs::File::open("/proc/self/ns/net").unwrap().into();
        let found = unix_sockets(&net).unwrap();
        let (a, b) = (fstat(&a).unwrap().st_ino, fstat(&b).unwrap().st_ino);
        assert_eq!((found[&a].peer, found[&a].shutdown), (Some(b), 2));
        assert_eq!((found[&b].peer, found[&b].shutdown), (Some(a), 1));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200),
            len in 0..220_u8,
        ) {
            let _ = parse(&bytes, &mut HashMap::new());
            if bytes.len() > 6 {
                bytes[..6].copy_from_slice(&[len, 0, 0, 0, 20, 0]);
                let _ = parse(&bytes, &mut HashMap::new());
            }
        }
    }
}
