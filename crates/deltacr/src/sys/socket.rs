//! System calls on sockets, with addresses as the kernel's own bytes.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::ids::HostPid;

/// Room for any socket address (`struct sockaddr_storage`).
const ADDRESS: usize = 128;
/// Room for the control data of a message: the most descriptors there can be, and some.
const CONTROL: usize = 2048;
/// Bytes of `struct sock_filter`.
const FILTER_BLOCK: usize = 8;
/// Bytes of `struct cmsghdr`.
const CMSG_HEADER: usize = 16;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn size(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Reads an option of at most 256 bytes; of a longer one, the beginning.
pub(crate) fn option(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<Vec<u8>> {
    option_within(fd, level, name, 256)
}

/// Reads an option of at most this many bytes, for those of which the kernel gives no more, and no less, than there is room.
pub(crate) fn option_within(
    fd: BorrowedFd<'_>,
    level: i32,
    name: i32,
    room: usize,
) -> io::Result<Vec<u8>> {
    let mut value = vec![0_u8; room];
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: getsockopt writes at most `len` bytes to `value`, and the length to `len`.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut len,
        )
    })?;
    value.truncate(len as usize);
    Ok(value)
}

/// Reads an option that is an int.
pub(crate) fn int_option(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let value = option(fd, level, name)?;
    let value = value.as_slice().try_into().map(i32::from_ne_bytes);
    value.map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Whom a unix socket takes its peer for, as the caller counts (`SO_PEERCRED`): process, user and group. The process is 0 where
/// there is no peer.
pub(crate) fn peer_credentials(fd: BorrowedFd<'_>) -> io::Result<(HostPid, u32, u32)> {
    let told = option(fd, libc::SOL_SOCKET, libc::SO_PEERCRED)?;
    let mut words = told
        .chunks_exact(4)
        .map(|word| i32::from_ne_bytes(word.try_into().expect("four bytes")));
    let mut next = || words.next().ok_or(io::ErrorKind::InvalidData);
    Ok((
        HostPid(next()?),
        next()?.cast_unsigned(),
        next()?.cast_unsigned(),
    ))
}

/// Sets an option.
pub(crate) fn set_option(
    fd: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: &[u8],
) -> io::Result<()> {
    // SAFETY: setsockopt reads the bytes of `value`.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    })
    .map(drop)
}

/// Sets an option that is an int.
pub(crate) fn set_int_option(
    fd: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: i32,
) -> io::Result<()> {
    set_option(fd, level, name, &value.to_ne_bytes())
}

/// The address that the socket is bound to; two bytes long for an unbound unix socket.
pub(crate) fn local_address(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut address = [0_u8; ADDRESS];
    let mut len = address.len() as libc::socklen_t;
    // SAFETY: getsockname writes at most `len` bytes to `address`, and the length to `len`.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), address.as_mut_ptr().cast(), &raw mut len) })?;
    Ok(address[..(len as usize).min(ADDRESS)].to_vec())
}

/// The address of the peer, `None` when there is none.
pub(crate) fn remote_address(fd: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    let mut address = [0_u8; ADDRESS];
    let mut len = address.len() as libc::socklen_t;
    // SAFETY: getpeername writes at most `len` bytes to `address`, and the length to `len`.
    let result = check(unsafe {
        libc::getpeername(fd.as_raw_fd(), address.as_mut_ptr().cast(), &raw mut len)
    });
    match result {
        Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => Ok(None),
        result => result.map(|_| Some(address[..(len as usize).min(ADDRESS)].to_vec())),
    }
}

/// A new socket, close-on-exec and non-blocking.
fn socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    let kind = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket takes integers only.
    let fd = check(unsafe { libc::socket(domain, kind, protocol) })?;
    // SAFETY: the call made this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Binds the socket.
pub(crate) fn bind(fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    let len = address.len() as libc::socklen_t;
    // SAFETY: bind reads the bytes of `address`.
    check(unsafe { libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), len) }).map(drop)
}

/// Connects the socket; to an address of the family `AF_UNSPEC`, takes it apart from its peer.
pub(crate) fn connect(fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    let len = address.len() as libc::socklen_t;
    // SAFETY: connect reads the bytes of `address`.
    check(unsafe { libc::connect(fd.as_raw_fd(), address.as_ptr().cast(), len) }).map(drop)
}

/// Takes the next connection of a listening socket, if one waits. The listener must not block.
pub(crate) fn accept(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: null pointers tell accept4 that the address is not wanted.
    let new = check(unsafe {
        libc::accept4(
            fd.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            flags,
        )
    })?;
    // SAFETY: the call made this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// Shuts directions down: 1 for receiving, 2 for sending, 3 for both.
pub(crate) fn shutdown(fd: BorrowedFd<'_>, directions: u8) -> io::Result<()> {
    let how = match directions {
        0 => return Ok(()),
        1 => libc::SHUT_RD,
        2 => libc::SHUT_WR,
        _ => libc::SHUT_RDWR,
    };
    // SAFETY: shutdown takes integers only.
    check(unsafe { libc::shutdown(fd.as_raw_fd(), how) }).map(drop)
}

/// Whether reading finds the end of the stream when it has read what waits.
pub(crate) fn reads_end(fd: BorrowedFd<'_>) -> io::Result<bool> {
    tells(fd, PollFlags::RDHUP)
}

/// Whether an urgent byte waits to be read.
pub(crate) fn has_urgent(fd: BorrowedFd<'_>) -> io::Result<bool> {
    tells(fd, PollFlags::PRI)
}

/// Whether there is an error that the next call tells of, and nobody after it.
pub(crate) fn has_error(fd: BorrowedFd<'_>) -> io::Result<bool> {
    tells(fd, PollFlags::ERR)
}

fn tells(fd: BorrowedFd<'_>, what: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::from_borrowed_fd(fd, what)];
    poll(&mut fds, Some(&Timespec::default()))?;
    Ok(fds[0].revents().contains(what))
}

/// A handle of the file that a unix socket is bound to (`SIOCUNIXFILE`).
pub(crate) fn file_of_unix(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const SIOCUNIXFILE: libc::Ioctl = 0x89e0;
    // SAFETY: SIOCUNIXFILE takes no argument.
    let file = check(unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE) })?;
    // SAFETY: the call made this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(file) })
}

/// Bytes sent that the other side has not taken yet (`SIOCOUTQ`).
pub(crate) fn unsent(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut value: libc::c_int = 0;
    // SAFETY: TIOCOUTQ, which is SIOCOUTQ, writes one int, which `value` is.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut value) })?;
    Ok(usize::try_from(value).unwrap_or(0))
}

/// What one `recvmsg(2)` brought.
pub(crate) struct Received {
    /// Bytes in the buffer.
    pub(crate) len: usize,
    /// The sender's address; empty if it has none or the socket is connected.
    pub(crate) from: Vec<u8>,
    /// The descriptors that came with it.
    pub(crate) rights: Vec<OwnedFd>,
    /// Not all descriptors found room, in the message or among ours.
    pub(crate) cut: bool,
}

/// Receives without waiting, with `flags` such as `MSG_PEEK`.
pub(crate) fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: i32) -> io::Result<Received> {
    let mut address = [0_u8; ADDRESS];
    let mut control = [0_u64; CONTROL / 8];
    let mut piece = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all zeros is a valid msghdr: no address, no data, no control data.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_name = address.as_mut_ptr().cast();
    message.msg_namelen = ADDRESS as u32;
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = CONTROL;
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `message` points at `address`, `buffer` and `control` with their true lengths, and all outlive the call.
    let len = size(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) })?;
    let bytes: Vec<u8> = control.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let rights = take_rights(&bytes[..message.msg_controllen.min(CONTROL)]);
    Ok(Received {
        len: len.min(buffer.len()),
        from: address[..(message.msg_namelen as usize).min(ADDRESS)].to_vec(),
        rights,
        cut: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Peeks at a unix stream, but only at pieces, as they were sent, that fit into the buffer whole. Tells how many bytes those
/// have.
///
/// The kernel copies each piece at one go, and one that would reach into memory which is not there not at all.
pub(crate) fn peek_pieces(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let mut pieces = [
        libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        },
        libc::iovec {
            iov_base: std::ptr::without_provenance_mut(1),
            iov_len: 1,
        },
    ];
    // SAFETY: all zeros is a valid msghdr: no address, no data, no control data.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len();
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: `message` points at `pieces`, of which the first is `buffer` with its true length. Nothing is ever mapped at the
    // address of the second, so that the kernel writes nothing there.
    match size(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) }) {
        Err(e) if e.raw_os_error() == Some(libc::EFAULT) => Ok(0),
        result => result,
    }
}

/// The descriptors that control messages brought.
fn take_rights(mut control: &[u8]) -> Vec<OwnedFd> {
    let mut rights = Vec::new();
    while control.len() >= CMSG_HEADER {
        let word =
            |at: usize| i32::from_ne_bytes(control[at..at + 4].try_into().expect("four bytes"));
        let len = usize::try_from(word(0)).unwrap_or(0);
        let len = len.clamp(CMSG_HEADER, control.len());
        if (word(8), word(12)) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            for at in (CMSG_HEADER..len.saturating_sub(3)).step_by(4) {
                // SAFETY: the kernel put this descriptor into our table for this message; nobody else owns it.
                rights.push(unsafe { OwnedFd::from_raw_fd(word(at)) });
            }
        }
        control = &control[len.next_multiple_of(8).min(control.len())..];
    }
    rights
}

/// How many blocks of eight bytes a classic filter has, and the filter (`SO_GET_FILTER`); empty if there is none.
pub(crate) fn filter(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let read = |program: &mut [u8]| {
        let mut len = (program.len() / FILTER_BLOCK) as libc::socklen_t;
        // SAFETY: getsockopt writes at most `len` blocks of eight bytes to `program`, and their number to `len`.
        check(unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_GET_FILTER,
                program.as_mut_ptr().cast(),
                &raw mut len,
            )
        })
        .map(|_| len as usize)
    };
    let mut program = vec![0; read(&mut [])? * FILTER_BLOCK];
    if !program.is_empty() {
        read(&mut program)?;
    }
    Ok(program)
}

/// Attaches a classic filter, as [`filter`] gives it.
pub(crate) fn attach_filter(fd: BorrowedFd<'_>, program: &[u8]) -> io::Result<()> {
    let mut blocks: Vec<u64> = program
        .chunks_exact(FILTER_BLOCK)
        .map(|block| u64::from_ne_bytes(block.try_into().expect("eight bytes")))
        .collect();
    let program = libc::sock_fprog {
        len: blocks.len().try_into().map_err(io::Error::other)?,
        filter: blocks.as_mut_ptr().cast(),
    };
    // SAFETY: the kernel reads one sock_fprog, and through it `blocks`, whose number it has. A block is a sock_filter of eight bytes.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    })
    .map(drop)
}

/// Sends without waiting, to `to` if it is not empty.
pub(crate) fn send(fd: BorrowedFd<'_>, bytes: &[u8], to: &[u8]) -> io::Result<usize> {
    send_with(fd, bytes, to, &[])
}

/// Sends without waiting, with descriptors (`SCM_RIGHTS`), of which a message holds 253 at most.
pub(crate) fn send_with(
    fd: BorrowedFd<'_>,
    bytes: &[u8],
    to: &[u8],
    rights: &[OwnedFd],
) -> io::Result<usize> {
    let control = control_of(rights);
    let mut piece = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all zeros is a valid msghdr: no address, no data, no control data.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    if !to.is_empty() {
        message.msg_name = to.as_ptr().cast_mut().cast();
        message.msg_namelen = to.len() as u32;
    }
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    if !control.is_empty() {
        message.msg_control = control.as_ptr().cast_mut().cast();
        message.msg_controllen = control.len() * size_of::<u64>();
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `message` points at `to`, `bytes` and `control` with their true lengths; sendmsg only reads them.
    size(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) })
}

/// One control message with these descriptors, aligned as the kernel wants it; nothing if there are none.
fn control_of(rights: &[OwnedFd]) -> Vec<u64> {
    if rights.is_empty() {
        return Vec::new();
    }
    let len = CMSG_HEADER + size_of::<i32>() * rights.len();
    let mut bytes = Vec::with_capacity(len.next_multiple_of(8));
    bytes.extend_from_slice(&len.to_ne_bytes());
    bytes.extend_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
    bytes.extend_from_slice(&libc::SCM_RIGHTS.to_ne_bytes());
    for right in rights {
        bytes.extend_from_slice(&right.as_raw_fd().to_ne_bytes());
    }
    bytes.resize(len.next_multiple_of(8), 0);
    let words = bytes.chunks_exact(8);
    words
        .map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")))
        .collect()
}

/// Makes a socket in another network namespace.
///
/// The calling thread visits the namespace for one call: a thread of its own would cost a hundred times as much.
pub(crate) fn socket_in(
    net: &OwnedFd,
    domain: i32,
    kind: i32,
    protocol: i32,
) -> io::Result<OwnedFd> {
    let home = std::fs::File::open("/proc/thread-self/ns/net")?;
    enter(net.as_raw_fd())?;
    let made = socket(domain, kind, protocol);
    if let Err(e) = enter(home.as_raw_fd()) {
        // The thread would go on to act for the host with the sandbox's network.
        tracing::error!("the way back from a sandbox's network namespace is barred: {e}");
        std::process::abort();
    }
    made
}

fn enter(net: i32) -> io::Result<()> {
    // SAFETY: setns takes integers only and has no bearing on memory.
    check(unsafe { libc::setns(net, libc::CLONE_NEWNET) }).map(drop)
}

/// Runs `act` on a thread of its own that has another root directory and working directory.
pub(crate) fn elsewhere<T: Send>(
    root: &Path,
    directory: &Path,
    act: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            // SAFETY: unshare with CLONE_FS gives this thread, which ends with the closure, its
            // own root and working directory; it has no bearing on memory.
            check(unsafe { libc::unshare(libc::CLONE_FS) })?;
            // Looked up from here, before the root changes.
            let directory = std::fs::File::open(directory)?;
            let root = std::fs::File::open(root)?;
            rustix::process::fchdir(root)?;
            rustix::process::chroot(".")?;
            rustix::process::fchdir(directory)?;
            act()
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
