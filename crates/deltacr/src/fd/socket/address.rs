//! Addresses of the internet families, as the kernel's own bytes.

use super::model::Socket;

/// A socket's own and its peer's address.
pub(super) type Ends = (Endpoint, Endpoint);
pub(super) type Endpoint = (u16, [u8; 16]);

/// The addresses of a TCP connection.
pub(super) fn ends(socket: &Socket) -> Option<Ends> {
    let ends = ends_of(&socket.local, &socket.remote)?;
    socket.is_tcp().then_some(ends)
}

/// Two addresses as [`Ends`].
pub(super) fn ends_of(local: &[u8], remote: &[u8]) -> Option<Ends> {
    Some((endpoint(local)?, endpoint(remote)?))
}

/// Port and address of a socket address, an IPv4 one in its IPv6 form.
pub(super) fn endpoint(address: &[u8]) -> Option<Endpoint> {
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
pub(super) fn is_any(ip: &[u8; 16]) -> bool {
    *ip == [0; 16] || ip[10..] == [0xff, 0xff, 0, 0, 0, 0]
}

/// Whether a socket has no port.
pub(super) fn is_free(socket: &Socket) -> bool {
    endpoint(&socket.local).is_none_or(|(port, _)| port == 0)
}

/// An address of the loopback device.
pub(super) fn loopback(domain: i32, port: u16) -> Vec<u8> {
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

/// Whether two addresses have the same port.
pub(super) fn same_port(a: &[u8], b: &[u8]) -> bool {
    let port = |address| endpoint(address).map(|(port, _)| port);
    port(a).is_some() && port(a) == port(b)
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
