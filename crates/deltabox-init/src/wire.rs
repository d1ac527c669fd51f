//! Sending and receiving one message with its descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, UCred, recvmsg, sendmsg,
};
use rustix::process::Pid;

/// The longest message in bytes. Command line and environment of a command must fit.
pub const MAX_MESSAGE: usize = 256 * 1024;

/// The most descriptors beside one message.
pub const MAX_FDS: usize = 16;

/// Room for all that goes beside a message.
const SPACE: usize = rustix::cmsg_space!(ScmRights(MAX_FDS), ScmCredentials(1));

/// A message that was received.
#[derive(Debug)]
pub struct Received {
    /// How many bytes it has.
    pub len: usize,
    /// The descriptors beside it.
    pub fds: Vec<OwnedFd>,
    /// The process that it is from, if the socket was set to tell (`SO_PASSCRED`).
    pub sender: Option<i32>,
}

/// Sends one message.
///
/// # Errors
/// As `sendmsg(2)`; `EMSGSIZE` for one longer than [`MAX_MESSAGE`] or with more than [`MAX_FDS`] descriptors.
pub fn send(socket: impl AsFd, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_all(socket, message, fds, None)
}

/// Sends one message as from process `pid` of the sender's pid namespace, which takes `CAP_SYS_ADMIN` there. The kernel
/// translates the number into the receiver's (`SCM_CREDENTIALS`).
///
/// # Errors
/// As `sendmsg(2)`; `ESRCH` if there is no such process.
pub fn send_as(socket: impl AsFd, message: &[u8], pid: i32) -> io::Result<()> {
    let sender = UCred {
        pid: Pid::from_raw(pid).ok_or(Errno::INVAL)?,
        uid: rustix::process::getuid(),
        gid: rustix::process::getgid(),
    };
    send_all(socket, message, &[], Some(sender))
}

fn send_all(
    socket: impl AsFd,
    message: &[u8],
    fds: &[BorrowedFd<'_>],
    sender: Option<UCred>,
) -> io::Result<()> {
    if message.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(Errno::MSGSIZE.into());
    }
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if let Some(sender) = sender {
        control.push(SendAncillaryMessage::ScmCredentials(sender));
    }
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    retry(|| {
        sendmsg(
            &socket,
            &[IoSlice::new(message)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
    })?;
    Ok(())
}

/// Receives one message into `buffer`, which should have [`MAX_MESSAGE`] bytes, and tells about it. `None` when the
/// other side has closed.
///
/// # Errors
/// As `recvmsg(2)`; `EMSGSIZE` for a message that was cut.
pub fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    flags: RecvFlags,
) -> io::Result<Option<Received>> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = retry(|| {
        recvmsg(
            &socket,
            &mut [IoSliceMut::new(buffer)],
            &mut control,
            flags | RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let mut received = Received {
        len: got.bytes,
        fds: Vec::new(),
        sender: None,
    };
    for m in control.drain() {
        match m {
            RecvAncillaryMessage::ScmRights(rights) => received.fds.extend(rights),
            RecvAncillaryMessage::ScmCredentials(sender) => {
                received.sender = Some(sender.pid.as_raw_nonzero().get());
            }
            _ => {}
        }
    }
    if got
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(Errno::MSGSIZE.into());
    }
    Ok((received.len > 0).then_some(received))
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}
