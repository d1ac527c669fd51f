//! Descriptors that go into a process and come out of it.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::{Batch, Remote, longs};
use crate::limits::Widened;
use crate::sys::process;

/// How many descriptors one batch closes.
const CLOSED_AT_ONCE: usize = 500;
/// The most descriptors that one message carries (the kernel's limit is 253).
const FDS_A_MESSAGE: usize = 128;
const CMSG_HEADER: usize = 16;

impl Remote {
    /// A duplicate of a descriptor of the process (`pidfd_getfd(2)`).
    pub fn take_fd(&self, fd: i32) -> io::Result<OwnedFd> {
        process::pidfd_getfd(self.pidfd.as_fd(), fd)
    }

    /// Gives the process duplicates of these descriptors (`SCM_RIGHTS`); they are close-on-exec
    /// there and have the returned numbers.
    pub fn give_fds(&mut self, fds: &[BorrowedFd<'_>]) -> io::Result<Vec<i32>> {
        let mut given = Vec::with_capacity(fds.len());
        for part in fds.chunks(FDS_A_MESSAGE) {
            given.extend(self.with_numbers(|remote| remote.give_some(part))?);
        }
        Ok(given)
    }

    /// Does what takes numbers of descriptors for a moment, beyond the process' limit if need be.
    pub(crate) fn with_numbers<T>(
        &mut self,
        act: impl Fn(&mut Self) -> io::Result<T>,
    ) -> io::Result<T> {
        match act(self) {
            Err(e) if e.raw_os_error() == Some(libc::EMFILE) => {
                let _more = Widened::of(self.host, libc::RLIMIT_NOFILE)?;
                act(self)
            }
            done => done,
        }
    }

    /// Closes descriptors of the process.
    pub(crate) fn close(&mut self, fds: &[i32]) -> io::Result<()> {
        for part in fds.chunks(CLOSED_AT_ONCE) {
            let mut batch = Batch::new();
            for &fd in part {
                batch.call(libc::SYS_close, &[fd.into()]);
            }
            // What close(2) returns tells of the last write, not of the descriptor: it is closed.
            self.run(&batch)?;
        }
        Ok(())
    }

    fn give_some(&mut self, fds: &[BorrowedFd<'_>]) -> io::Result<Vec<i32>> {
        let mut open = Batch::new();
        let pair = open.output(8);
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
        let made = open.call(
            libc::SYS_socketpair,
            &[libc::AF_UNIX.into(), kind.into(), 0.into(), pair.into()],
        );
        let outcome = self.run(&open)?;
        outcome.result(made)?;
        let (near, far) = (outcome.int(pair.at(0, 4)), outcome.int(pair.at(4, 4)));
        let sent = self
            .take_fd(near)
            .and_then(|ours| send_rights(ours.as_fd(), fds));

        let mut receive = Batch::new();
        let control = receive.output(control_len(fds.len()));
        let byte = receive.output(1);
        let iov = receive.input(&longs(&[0, 1]));
        let header = receive.input(&longs(&[0, 0, 0, 1, 0, control.len() as u64, 0]));
        receive.link(iov, &[(0, byte)]);
        receive.link(header, &[(16, iov), (32, control)]);
        let got = receive.call(
            libc::SYS_recvmsg,
            &[
                far.into(),
                header.into(),
                (libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT).into(),
            ],
        );
        receive.call(libc::SYS_close, &[near.into()]);
        receive.call(libc::SYS_close, &[far.into()]);
        let outcome = self.run(&receive)?;
        sent?;
        outcome.result(got)?;
        let rights = received_rights(outcome.bytes(control));
        if rights.len() != fds.len() {
            self.close(&rights)?;
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        Ok(rights)
    }
}

fn control_len(fds: usize) -> usize {
    (CMSG_HEADER + 4 * fds).next_multiple_of(8)
}

fn send_rights(socket: BorrowedFd<'_>, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_A_MESSAGE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(
        socket,
        &[IoSlice::new(&[0])],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// The descriptor numbers in a control message that the target's kernel wrote.
fn received_rights(control: &[u8]) -> Vec<i32> {
    let len = u64::from_le_bytes(control[..8].try_into().expect("eight bytes")) as usize;
    let end = len.clamp(CMSG_HEADER, control.len().max(CMSG_HEADER));
    control
        .get(CMSG_HEADER..end)
        .unwrap_or_default()
        .chunks_exact(4)
        .map(|n| i32::from_le_bytes(n.try_into().expect("four bytes")))
        .collect()
}
