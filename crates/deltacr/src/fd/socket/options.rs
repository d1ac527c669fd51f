//! Socket options: which are carried, and how they are set again.

use std::io;
use std::os::fd::BorrowedFd;

use super::model::{Setting, Socket};
use crate::sys::socket as sys;

const SOL_SOCKET: i32 = libc::SOL_SOCKET;
const SO_BUF_LOCK: i32 = 72;
const SO_PEEK_OFF: i32 = 42;
const SO_BINDTOIFINDEX: i32 = 62;
const SOL_RAW: i32 = 255;
const ICMP_FILTER: i32 = 1;
const UDPLITE_SEND_CSCOV: i32 = 10;
const UDPLITE_RECV_CSCOV: i32 = 11;
const PACKET_ORIGDEV: i32 = 9;
/// Bits of `SO_BUF_LOCK`.
const SEND_LOCKED: i32 = 1;
const RECEIVE_LOCKED: i32 = 2;

const COMMON: &[(i32, i32)] = &[
    (SOL_SOCKET, libc::SO_REUSEADDR),
    (SOL_SOCKET, libc::SO_BROADCAST),
    (SOL_SOCKET, libc::SO_KEEPALIVE),
    (SOL_SOCKET, libc::SO_OOBINLINE),
    (SOL_SOCKET, libc::SO_PRIORITY),
    (SOL_SOCKET, libc::SO_LINGER),
    (SOL_SOCKET, libc::SO_REUSEPORT),
    (SOL_SOCKET, libc::SO_RCVLOWAT),
    (SOL_SOCKET, libc::SO_RCVTIMEO),
    (SOL_SOCKET, libc::SO_SNDTIMEO),
    (SOL_SOCKET, libc::SO_TIMESTAMP),
    (SOL_SOCKET, libc::SO_TIMESTAMPNS),
    (SOL_SOCKET, libc::SO_DONTROUTE),
    (SOL_SOCKET, libc::SO_NO_CHECK),
    (SOL_SOCKET, libc::SO_MARK),
    (SOL_SOCKET, SO_BINDTOIFINDEX),
    (SOL_SOCKET, libc::SO_LOCK_FILTER),
];
const UNIX: &[(i32, i32)] = &[
    (SOL_SOCKET, libc::SO_PASSCRED),
    (SOL_SOCKET, libc::SO_PASSSEC),
    (SOL_SOCKET, SO_PEEK_OFF),
];
const INET: &[(i32, i32)] = &[
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IP, libc::IP_TTL),
    (libc::IPPROTO_IP, libc::IP_RECVERR),
    (libc::IPPROTO_IP, libc::IP_PKTINFO),
    (libc::IPPROTO_IP, libc::IP_RECVTTL),
    (libc::IPPROTO_IP, libc::IP_RECVTOS),
    (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
    (libc::IPPROTO_IP, libc::IP_MINTTL),
    (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
];
const INET6: &[(i32, i32)] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_FREEBIND),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG),
    (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
];
/// Not of streams, of which an accepted one has what the first packet had.
const DATAGRAMS: &[(i32, i32)] = &[
    (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP),
];
const RAW: &[(i32, i32)] = &[
    (libc::IPPROTO_IP, libc::IP_HDRINCL),
    (SOL_RAW, ICMP_FILTER),
    (libc::IPPROTO_ICMPV6, ICMP_FILTER),
];
const UDP_LITE: &[(i32, i32)] = &[
    (libc::IPPROTO_UDPLITE, UDPLITE_SEND_CSCOV),
    (libc::IPPROTO_UDPLITE, UDPLITE_RECV_CSCOV),
];
const PACKET: &[(i32, i32)] = &[
    (libc::SOL_PACKET, libc::PACKET_AUXDATA),
    (libc::SOL_PACKET, PACKET_ORIGDEV),
    (libc::SOL_PACKET, libc::PACKET_VERSION),
    (libc::SOL_PACKET, libc::PACKET_RESERVE),
    (libc::SOL_PACKET, libc::PACKET_LOSS),
    (libc::SOL_PACKET, libc::PACKET_TIMESTAMP),
    (libc::SOL_PACKET, libc::PACKET_FANOUT),
];
const TCP: &[(i32, i32)] = &[
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_CORK),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_SYNCNT),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
];

impl Setting {
    /// Whether a socket that has another value can be given this one.
    pub(crate) fn can_follow(&self, other: &Self) -> bool {
        let of_group = (self.level, self.name) == (libc::SOL_PACKET, libc::PACKET_FANOUT);
        !of_group || other.value == [0; 4] || self.value == other.value
    }

    /// Whether it says anything about a connection: the families that an address takes do not matter once
    /// there is one, and the kernel would not let it be set.
    pub(crate) fn matters_connected(&self) -> bool {
        (self.level, self.name) != (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY)
    }
}

/// Reads the options of a socket.
pub(crate) fn read(socket: BorrowedFd<'_>, image: &Socket) -> io::Result<Vec<Setting>> {
    let (domain, kind) = (image.domain, image.kind);
    let inet = domain == libc::AF_INET || domain == libc::AF_INET6;
    let tables = [
        (true, COMMON),
        (domain == libc::AF_UNIX, UNIX),
        (inet, INET),
        (domain == libc::AF_INET6, INET6),
        (inet && kind == libc::SOCK_STREAM, TCP),
        (inet && kind != libc::SOCK_STREAM, DATAGRAMS),
        (inet && kind == libc::SOCK_RAW, RAW),
        (inet && image.protocol == libc::IPPROTO_UDPLITE, UDP_LITE),
        (domain == libc::AF_PACKET, PACKET),
    ];
    let mut settings = Vec::new();
    for &(level, name) in tables.iter().filter(|t| t.0).flat_map(|t| t.1) {
        // An option that this family or kernel does not have need not be carried.
        if let Ok(value) = sys::option(socket, level, name) {
            settings.push(Setting { level, name, value });
        }
    }
    let locked = sys::int_option(socket, SOL_SOCKET, SO_BUF_LOCK)?;
    for (bit, name) in [
        (SEND_LOCKED, libc::SO_SNDBUF),
        (RECEIVE_LOCKED, libc::SO_RCVBUF),
    ] {
        if locked & bit != 0 {
            let value = sys::option(socket, SOL_SOCKET, name)?;
            settings.push(Setting {
                level: SOL_SOCKET,
                name,
                value,
            });
        }
    }
    Ok(settings)
}

/// Makes the options of a socket be those of the image. Only what differs is set.
pub(crate) fn set(socket: BorrowedFd<'_>, wanted: &Socket) -> io::Result<()> {
    let now = read(socket, wanted)?;
    let mut unset: Vec<_> = wanted.options.iter().filter(|s| !now.contains(s)).collect();
    // Who switches one kind of timestamp off switches off the other.
    unset.sort_by_key(|setting| setting.value.iter().any(|&byte| byte != 0));
    for setting in unset {
        match (setting.level, setting.name) {
            // Only when the filter is there; see `set_filter`.
            (SOL_SOCKET, libc::SO_LOCK_FILTER) => {}
            // There is no leaving a group; a socket that has a wrong one is made anew.
            (libc::SOL_PACKET, libc::PACKET_FANOUT) if setting.value == [0; 4] => {}
            (SOL_SOCKET, libc::SO_SNDBUF) => buffer(socket, libc::SO_SNDBUFFORCE, setting)?,
            (SOL_SOCKET, libc::SO_RCVBUF) => buffer(socket, libc::SO_RCVBUFFORCE, setting)?,
            (level, name) => sys::set_option(socket, level, name, &setting.value)?,
        }
    }
    Ok(())
}

/// Makes a socket receive whatever comes, so that what it had received can be put into it again.
pub(crate) fn open_filter(socket: BorrowedFd<'_>, now: &Socket) -> io::Result<()> {
    if now.filter.is_empty() {
        return Ok(());
    }
    sys::set_int_option(socket, SOL_SOCKET, libc::SO_DETACH_FILTER, 0)
}

/// Gives a socket that has none the filter of the image.
pub(crate) fn set_filter(socket: BorrowedFd<'_>, wanted: &Socket) -> io::Result<()> {
    if !wanted.filter.is_empty() {
        sys::attach_filter(socket, &wanted.filter)?;
    }
    match wanted.is_locked() {
        true => sys::set_int_option(socket, SOL_SOCKET, libc::SO_LOCK_FILTER, 1),
        false => Ok(()),
    }
}

/// The kernel doubles what is set, and tells the double.
fn buffer(socket: BorrowedFd<'_>, name: i32, setting: &Setting) -> io::Result<()> {
    let told = setting.value.as_slice().try_into().map(i32::from_ne_bytes);
    let told = told.map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    sys::set_int_option(socket, SOL_SOCKET, name, told / 2)
}
