//! Init's life: requests in, answers out, dead children reported.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use deltabox_init::wire::{self, MAX_MESSAGE};
use deltabox_init::{Event, Reply, Request, Step};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::sys::{self, Fork};
use crate::{At, Failure, child};

/// Init of a sandbox.
pub(crate) struct Init {
    pub(crate) control: OwnedFd,
    pub(crate) events: OwnedFd,
    pub(crate) payload: OwnedFd,
    pub(crate) last_pid: OwnedFd,
    pub(crate) filters: Vec<Vec<libc::sock_filter>>,
    pub(crate) children: OwnedFd,
}

/// Takes seccomp programs off the wire.
pub(crate) fn parse_filters(filters: &[Vec<u8>]) -> Result<Vec<Vec<libc::sock_filter>>, Failure> {
    let parse = |bytes: &Vec<u8>| {
        let (instructions, []) = bytes.as_chunks::<8>() else {
            return Err(Errno::INVAL);
        };
        Ok(instructions
            .iter()
            .map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| libc::sock_filter {
                code: u16::from_le_bytes([c0, c1]),
                jt,
                jf,
                k: u32::from_le_bytes([k0, k1, k2, k3]),
            })
            .collect())
    };
    filters
        .iter()
        .map(parse)
        .collect::<Result<_, _>>()
        .at(Step::Setup, "reading the seccomp filter")
}

impl Init {
    /// Serves until the supervisor closes the control socket.
    pub(crate) fn serve(&self) -> io::Result<()> {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let mut fds = [
                PollFd::new(&self.control, PollFlags::IN),
                PollFd::new(&self.children, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            let [asked, died] = fds.map(|fd| !fd.revents().is_empty());
            if died {
                self.reap()?;
            }
            if asked {
                let Some(got) = wire::receive(&self.control, &mut buffer, RecvFlags::empty())?
                else {
                    return Ok(());
                };
                let reply = self.answer(&buffer[..got.len], got.fds);
                self.send(&reply.unwrap_or_else(Reply::from))?;
            }
        }
    }

    /// A process that was made is named as the sender: so the supervisor learns its number outside.
    fn send(&self, reply: &Reply) -> io::Result<()> {
        match reply {
            Reply::Pid(pid) => wire::send_as(&self.control, &reply.encode(), *pid),
            _ => wire::send(&self.control, &reply.encode(), &[]),
        }
    }

    /// Reports every dead child, orphans that it inherited included, and reaps it after that: whoever sees no dead child of
    /// init any more finds the reports of all of them on the socket.
    fn reap(&self) -> io::Result<()> {
        // The signal is only a hint that there is something to wait for; several may have become one.
        let mut signals = [0; 128 * 8];
        while rustix::io::read(&self.children, &mut signals).is_ok() {}
        loop {
            let (pid, status) = match sys::dead_child() {
                Ok(Some(dead)) => dead,
                Ok(None) => return Ok(()),
                Err(e) if e.raw_os_error() == Some(libc::ECHILD) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            wire::send(&self.events, &Event::Exited { pid, status }.encode(), &[])?;
            sys::reap(pid)?;
        }
    }

    fn answer(&self, message: &[u8], fds: Vec<OwnedFd>) -> Result<Reply, Failure> {
        let request = Request::decode(message)
            .ok_or(Errno::BADMSG)
            .at(Step::Request, "reading the request")?;
        match request {
            Request::Setup(_) => Err(Errno::ALREADY).at(Step::Request, "setting up twice"),
            Request::Template { .. }
            | Request::Hold(_)
            | Request::Collapse(_)
            | Request::Unmap(_)
            | Request::Empty(_)
            | Request::HoldFiles(_)
            | Request::Protect { .. }
            | Request::Derive
            | Request::Fork { .. } => {
                Err(Errno::INVAL).at(Step::Request, "doing a template's work")
            }
            Request::Spawn(spawn) => child::spawn(self, &spawn, &fds).map(Reply::Pid),
            Request::SetNextPid(pid) => self.set_last_pid(pid).map(|()| Reply::Done),
            Request::Birth(pid) => self.birth(pid).map(Reply::Pid),
            Request::Signal { group, signal } => {
                sys::signal_group(group, signal).at(Step::Request, "signalling")?;
                Ok(Reply::Done)
            }
            Request::Sync => {
                self.reap().at(Step::Request, "reaping")?;
                Ok(Reply::Done)
            }
        }
    }

    fn set_last_pid(&self, next: i32) -> Result<(), Failure> {
        let last = (next - 1).max(0).to_string();
        rustix::io::pwrite(&self.last_pid, last.as_bytes(), 0)
            .map(drop)
            .at(Step::Clone, "writing ns_last_pid")
    }

    /// Answers only when the child is confined: from then on it belongs to the engine, which interrupts it anywhere.
    fn birth(&self, pid: i32) -> Result<i32, Failure> {
        let options = sys::ForkOptions {
            cgroup: Some(self.payload.as_fd()),
            pid: Some(pid),
            flags: 0,
        };
        let (report, failed) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .at(Step::Clone, "making a pipe")?;
        match sys::fork(&options).at(Step::Clone, "making a process with a chosen pid")? {
            Fork::Parent(pid) => {
                drop(failed);
                let mut errno = [0; 4];
                let got = child::await_report(pid, &report, &mut errno)
                    .at(Step::Prepare, "waiting for a new process")?;
                // End of file: it has closed all that it had.
                if got < errno.len() {
                    return Ok(pid);
                }
                Err(Failure {
                    step: Step::Prepare,
                    errno: i32::from_le_bytes(errno),
                    what: "confining a new process".to_owned(),
                })
            }
            Fork::Child => {
                let confined = child::confine(&self.filters).and_then(|()| sys::set_dumpable(true));
                if let Err(e) = confined {
                    let errno = e.raw_os_error().unwrap_or(libc::EIO).to_le_bytes();
                    // Nobody is left to tell if this fails.
                    let _ = rustix::io::write(failed, &errno);
                    sys::exit(127);
                }
                match sys::close_from(0, false) {
                    Ok(()) => sys::pause_for_ever(),
                    Err(_) => sys::exit(127),
                }
            }
        }
    }
}
