//! Putting right what sockets hold that are in their places.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::model::{Message, Socket, State};
use super::plan::socket;
use super::{address, options, queue, repair, unix};
use crate::error::{During, Result};
use crate::fd::restore::Restore;
use crate::sys::socket as sys;

impl Restore<'_, '_> {
    /// Puts right the options, queues and directions of sockets, which are all in their places.
    pub(in crate::fd) fn settle_sockets(&mut self) -> Result<()> {
        for index in 0..self.target.objects.len() {
            let Some(wanted) = socket(self.target, index) else {
                continue;
            };
            let now = self.plan.reuse[index].and_then(|now| socket(self.current, now));
            let (pid, fd) = self.target.objects[index].home;
            let doing = || format!("putting the socket at descriptor {fd} right");
            self.settle_socket(index, now, wanted)
                .during(pid, &doing())?;
        }
        for (index, other) in std::mem::take(&mut self.feeders) {
            if let Some(image) = socket(self.target, index) {
                let lend = |message: &Message| self.lend(message);
                queue::fill(other.as_fd(), &image.queue, &lend).during(
                    self.target.objects[index].home.0,
                    "filling a socket's queue",
                )?;
            }
        }
        // Only now, for nothing can be sent through a direction that is shut down, or past a filter.
        for index in 0..self.target.objects.len() {
            let Some(wanted) = socket(self.target, index) else {
                continue;
            };
            let now = self.plan.reuse[index].and_then(|now| socket(self.current, now));
            self.close_up(index, now, wanted)
                .during(self.target.objects[index].home.0, "closing a socket's ways")?;
        }
        Ok(())
    }

    /// Lets through a socket only what it should.
    fn close_up(&self, index: usize, now: Option<&Socket>, wanted: &Socket) -> io::Result<()> {
        let missing = wanted.shutdown & !now.map_or(0, |now| now.shutdown);
        if missing != 0 && !matches!(wanted.state, State::Orphaned | State::Abandoned) {
            match sys::shutdown(self.handle(index)?.as_fd(), missing) {
                // Of datagrams without a connection the kernel says so, and shuts it all the same.
                Err(e) if wanted.is_udp() && e.raw_os_error() == Some(libc::ENOTCONN) => {}
                done => done?,
            }
        }
        let same = now.is_some_and(|now| {
            now.has_same_queue(wanted)
                && (&now.filter, now.is_locked()) == (&wanted.filter, wanted.is_locked())
        });
        if !same && (!wanted.filter.is_empty() || wanted.is_locked()) {
            options::set_filter(self.handle(index)?.as_fd(), wanted)?;
        }
        Ok(())
    }

    fn settle_socket(
        &mut self,
        index: usize,
        now: Option<&Socket>,
        wanted: &Socket,
    ) -> io::Result<()> {
        let slot = self.target.objects[index].home;
        let unset = match now {
            Some(now) => now.options != wanted.options,
            None => !wanted.is_unix() && self.shares_address(index, wanted),
        };
        if unset {
            options::set(self.handle(index)?.as_fd(), wanted)?;
        }
        let same = match now {
            Some(now) => now.has_same_queue(wanted),
            None => wanted.queue.is_empty(),
        };
        if let Some(now) = now
            && (!same || now.filter != wanted.filter)
        {
            options::open_filter(self.handle(index)?.as_fd(), now)?;
        }
        if now.is_some() && !wanted.keeps_queue() && wanted.domain != libc::AF_NETLINK {
            // Packets of a future that was given up.
            queue::drain(self.handle(index)?.as_fd(), wanted.kind)?;
        }
        match &wanted.state {
            State::Outside => {
                if let Some(now) = now
                    && (!same || now.moved != wanted.moved)
                {
                    repair::cut(self.handle(index)?.as_fd())?;
                    self.notes.push(format!(
                        "process {}, descriptor {}: the connection to the outside is cut",
                        slot.0, slot.1
                    ));
                }
                Ok(())
            }
            State::Connected { peer } if !same => {
                let to = self.handle(index)?;
                let mutual = socket(self.target, *peer).and_then(Socket::peer) == Some(index);
                if !mutual || self.has_of_others(wanted) {
                    self.refill(to.as_fd(), now.is_some(), None, wanted)?;
                    return self.resend(index, wanted);
                }
                let from = self.handle(*peer)?;
                self.refill(to.as_fd(), now.is_some(), Some(from.as_fd()), wanted)
            }
            State::Idle if !same => {
                let to = self.handle(index)?;
                self.refill(to.as_fd(), now.is_some(), None, wanted)?;
                self.resend(index, wanted)
            }
            _ => Ok(()),
        }
    }

    fn refill(
        &self,
        to: BorrowedFd<'_>,
        drain: bool,
        from: Option<BorrowedFd<'_>>,
        wanted: &Socket,
    ) -> io::Result<()> {
        match from {
            Some(from) if wanted.is_tcp() && drain => queue::drain_connection(from, to)?,
            _ if drain => queue::drain(to, wanted.kind)?,
            _ => {}
        }
        let lend = |message: &Message| self.lend(message);
        from.map_or(Ok(()), |from| queue::fill(from, &wanted.queue, &lend))
    }

    /// The files that are to be in flight with a message.
    fn lend(&self, message: &Message) -> io::Result<Vec<OwnedFd>> {
        message
            .rights
            .iter()
            .map(|&file| self.handle(file))
            .collect()
    }

    /// Sends datagrams to a socket again, each from the address it came from.
    fn resend(&mut self, index: usize, wanted: &Socket) -> io::Result<()> {
        let to = self.handle(index)?;
        let _room = queue::Room::to_receive(to.as_fd())?;
        let apart = self.has_of_others(wanted);
        if apart {
            self.take_apart(to.as_fd(), wanted)?;
        }
        self.send_all(index, wanted)?;
        match apart {
            true => self.put_together(to.as_fd(), wanted),
            false => Ok(()),
        }
    }

    /// Whether it has got datagrams of others than the peer that it is connected to: from before it was.
    fn has_of_others(&self, wanted: &Socket) -> bool {
        let peer = wanted.peer().and_then(|peer| socket(self.target, peer));
        let of_another = |message: &Message| match (wanted.is_unix(), peer) {
            (true, Some(peer)) => message.from.len() > 2 && message.from != peer.local,
            (true, None) => false,
            (false, _) => !address::same_endpoint(&message.from, &wanted.remote),
        };
        let connected = peer.is_some() || !wanted.remote.is_empty();
        wanted.kind == libc::SOCK_DGRAM && connected && wanted.queue.iter().any(of_another)
    }

    /// Lets a socket hear everybody again, as it did before it was connected.
    fn take_apart(&self, to: BorrowedFd<'_>, wanted: &Socket) -> io::Result<()> {
        repair::cut(to)?;
        if let Some(peer) = wanted.peer() {
            // Who was connected to it is told that it has left.
            let peer = self.handle(peer)?;
            sys::int_option(peer.as_fd(), libc::SOL_SOCKET, libc::SO_ERROR)?;
            return Ok(());
        }
        // A port that it did not ask for is gone with the connection.
        match address::same_port(&sys::local_address(to)?, &wanted.local) {
            true => Ok(()),
            false => sys::bind(to, &wanted.local),
        }
    }

    fn put_together(&self, to: BorrowedFd<'_>, wanted: &Socket) -> io::Result<()> {
        match wanted.peer() {
            Some(peer) => match socket(self.target, peer) {
                Some(image) => sys::connect(to, &self.target_of(peer, image)?.address()),
                None => Ok(()),
            },
            None => sys::connect(to, &wanted.remote),
        }
    }

    fn send_all(&mut self, index: usize, wanted: &Socket) -> io::Result<()> {
        for message in &wanted.queue {
            let sender = (0..self.target.objects.len()).find(|&other| {
                socket(self.target, other).is_some_and(|s| is_sender(s, wanted, index, message))
            });
            let (end, connected) = match sender {
                Some(other) => {
                    let connected = socket(self.target, other)
                        .is_some_and(|s| s.peer().is_some() || !s.remote.is_empty());
                    (self.handle(other)?, connected)
                }
                None => (self.stranger(index, wanted, message)?, false),
            };
            let rights = self.lend(message)?;
            let send = |to: &[u8]| sys::send_with(end.as_fd(), &message.bytes, to, &rights);
            match wanted.domain {
                _ if connected => send(&[])?,
                libc::AF_UNIX => send(&self.target_of(index, wanted)?.address())?,
                _ => send(&destination(wanted))?,
            };
        }
        Ok(())
    }

    /// A sender that is gone, or sends elsewhere by now: a socket for one datagram, with its name if that can be had.
    fn stranger(&self, index: usize, wanted: &Socket, message: &Message) -> io::Result<OwnedFd> {
        let end = self.fresh(wanted)?;
        if message.from.len() <= 2 {
            return Ok(end);
        }
        if !wanted.is_unix() {
            self.bind_stranger(end.as_fd(), wanted, &message.from)?;
            return Ok(end);
        }
        match unix::bind(
            self.env,
            self.host_of(index)?,
            end.as_fd(),
            (&message.from, None),
        ) {
            // An abstract name is another's.
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => Ok(end),
            bound => bound.map(|()| end),
        }
    }

    /// Gives a socket of an internet family an address that another one may have, or that is not of this host.
    fn bind_stranger(&self, end: BorrowedFd<'_>, wanted: &Socket, from: &[u8]) -> io::Result<()> {
        let mut sharing = Vec::new();
        for (other, object) in self.target.objects.iter().enumerate() {
            if let Some(holder) = socket(self.target, other)
                && holder.is_udp()
                && !object.is_in_flight()
                && address::same_port(&holder.local, from)
            {
                sharing.push(self.handle(other)?);
            }
        }
        let reuse = (libc::SOL_SOCKET, libc::SO_REUSEADDR);
        let mut held = Vec::new();
        for other in &sharing {
            held.push(sys::int_option(other.as_fd(), reuse.0, reuse.1)?);
            sys::set_int_option(other.as_fd(), reuse.0, reuse.1, 1)?;
        }
        sys::set_int_option(end, reuse.0, reuse.1, 1)?;
        let bound = match sys::bind(end, from) {
            Err(e) if e.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
                let (level, name) = match wanted.domain {
                    libc::AF_INET => (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
                    _ => (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
                };
                sys::set_int_option(end, level, name, 1)?;
                sys::bind(end, from)
            }
            bound => bound,
        };
        for (other, before) in sharing.iter().zip(held) {
            sys::set_int_option(other.as_fd(), reuse.0, reuse.1, before)?;
        }
        bound
    }
}

/// Whether `sender` can have sent a message to the socket `to`, and can do so again.
fn is_sender(sender: &Socket, to: &Socket, index: usize, message: &Message) -> bool {
    let kin = (sender.domain, sender.kind) == (to.domain, to.kind);
    let free = sender.remote.is_empty() && sender.state == State::Idle;
    let bound_to_it = sender.peer() == Some(index)
        || !sender.remote.is_empty() && address::same_endpoint(&sender.remote, &destination(to));
    let named = if message.from.len() <= 2 {
        sender.local.is_empty()
    } else {
        sender.local == message.from || address::same_endpoint(&sender.local, &message.from)
    };
    kin && named && (free || bound_to_it)
}

/// Where to send what is to reach this socket.
fn destination(socket: &Socket) -> Vec<u8> {
    match socket.domain {
        libc::AF_UNIX => socket.local.clone(),
        _ => address::reachable(&socket.local),
    }
}
