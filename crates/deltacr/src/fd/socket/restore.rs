//! Making sockets that are missing, and putting right what they hold.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::model::{Message, Socket, State};
use super::plan::socket;
use super::{inet, options, queue, unix};
use crate::env::Namespace;
use crate::error::{During, Result};
use crate::fd::model::Kind;
use crate::fd::restore::Restore;
use crate::sys::socket as sys;

impl Restore<'_, '_> {
    /// Takes files that are in flight out of queues which stay: what of them is wanted is sent anew. What nobody else has open ends
    /// with that, before it is made again.
    pub(in crate::fd) fn drop_flights(&mut self) -> Result<()> {
        for now in self.plan.reuse.iter().flatten() {
            let object = &self.current.objects[*now];
            if let Kind::Socket(socket) = &object.kind
                && socket.in_flight().next().is_some()
            {
                let handle = self.take(object.home)?;
                queue::drain(handle.as_fd(), socket.kind)
                    .during(object.home.0, "taking descriptors in flight out of a queue")?;
            }
        }
        Ok(())
    }

    /// Makes sure that TCP sockets which are about to be closed leave no address behind that waits.
    pub(in crate::fd) fn release_addresses(&mut self) -> Result<()> {
        let staying: Vec<_> = self.plan.reuse.iter().flatten().collect();
        for (index, object) in self.current.objects.iter().enumerate() {
            if let Kind::Socket(socket) = &object.kind
                && socket.is_tcp()
                && !staying.contains(&&index)
                && !object.is_in_flight()
                && self.procs.contains_key(&object.home.0)
            {
                let handle = self.take(object.home)?;
                inet::close_hard(handle.as_fd())
                    .during(object.home.0, "preparing to close a socket")?;
            }
        }
        Ok(())
    }

    /// Whether an object can only be made when all listening sockets listen.
    pub(in crate::fd) fn is_connection(&self, index: usize) -> bool {
        socket(self.target, index)
            .is_some_and(|s| !matches!(s.state, State::Idle | State::Listening { .. }))
    }

    /// Makes a socket that needs no other one.
    pub(in crate::fd) fn make_socket(
        &mut self,
        index: usize,
        image: &Socket,
    ) -> io::Result<OwnedFd> {
        let of = self.host_of(index)?;
        let end = self.fresh(image)?;
        if image.domain == libc::AF_UNIX {
            options::set(end.as_fd(), image)?;
            if !image.local.is_empty() {
                unix::bind(of, end.as_fd(), image)?;
            }
            return Ok(end);
        }
        crate::fd::restore::give_to(&end, of)?;
        let shared = self.shares_address(index, image);
        inet::place(&self.net()?, end.as_fd(), image, shared)?;
        Ok(end)
    }

    /// Whether other sockets are bound to the same address, as the kernel lets those that want it.
    fn shares_address(&self, index: usize, image: &Socket) -> bool {
        (0..self.target.objects.len()).any(|other| {
            let socket = socket(self.target, other).filter(|_| other != index);
            socket.is_some_and(|s| {
                let may_share = s.is_udp() || s.remote.is_empty();
                may_share
                    && s.protocol == image.protocol
                    && inet::same_endpoint(&s.local, &image.local)
            })
        })
    }

    fn net(&self) -> io::Result<OwnedFd> {
        self.env.namespace(Namespace::Net)
    }

    fn fresh(&self, image: &Socket) -> io::Result<OwnedFd> {
        sys::socket_in(&self.net()?, image.domain, image.kind, image.protocol)
    }

    fn host_of(&self, index: usize) -> io::Result<crate::ids::HostPid> {
        let (pid, _) = self.target.objects[index].home;
        let remote = self.procs.get(&pid).ok_or(io::ErrorKind::NotFound)?;
        Ok(remote.host())
    }

    /// Makes sockets listen that should, with nothing waiting but what should wait. They are in their places.
    pub(in crate::fd) fn listen(&mut self) -> Result<()> {
        for (index, object) in self.target.objects.iter().enumerate() {
            let Some(wanted) = socket(self.target, index) else {
                continue;
            };
            let State::Listening { backlog, pending } = &wanted.state else {
                continue;
            };
            let now = self.plan.reuse[index].and_then(|now| socket(self.current, now));
            let (now_backlog, now_pending) = match now.map(|now| &now.state) {
                Some(State::Listening { backlog, pending }) => (Some(*backlog), pending.as_slice()),
                _ => (None, &[][..]),
            };
            let (pid, fd) = object.home;
            let kept = pending.len() == now_pending.len()
                && pending.iter().all(|&p| self.plan.reuse[p].is_some());
            if !kept && !now_pending.is_empty() {
                let listener = self.duplicate(index)?;
                refuse_waiting(&listener).during(pid, "refusing connections")?;
                crate::sys::fd::set_status_flags(&listener, object.flags)
                    .during(pid, "setting the flags of a socket")?;
            }
            if now_backlog != Some(*backlog) {
                let listening = match object.is_in_flight() {
                    true => self.handle(index).and_then(|handle| {
                        rustix::net::listen(&handle, *backlog).map_err(io::Error::from)
                    }),
                    false => unix::listen(self.remote(pid)?, fd, *backlog),
                };
                listening.during(pid, "making a socket listen")?;
            }
        }
        Ok(())
    }

    /// Makes the connections that are missing: those that were accepted first, then those that wait.
    pub(in crate::fd) fn make_connections(&mut self) -> Result<()> {
        let target = self.target;
        for waiting in [false, true] {
            for (index, object) in target.objects.iter().enumerate() {
                let Some(image) = socket(target, index) else {
                    continue;
                };
                let missing =
                    self.plan.reuse[index].is_none() && !self.handles.contains_key(&index);
                let waits = image
                    .peer()
                    .and_then(|peer| socket(target, peer))
                    .is_some_and(|peer| matches!(peer.state, State::Listening { .. }));
                if missing && self.is_connection(index) && waits == waiting {
                    self.make_connection(index, image)
                        .during(object.home.0, "making a connection")
                        .map_err(crate::fd::restore::named(object))?;
                }
            }
        }
        Ok(())
    }

    fn make_connection(&mut self, index: usize, image: &Socket) -> io::Result<()> {
        let target = self.target;
        let peer = image
            .peer()
            .and_then(|peer| Some((peer, socket(target, peer)?)));
        let made = match (&image.state, peer) {
            (State::Connected { .. }, Some((listener, peer)))
                if matches!(peer.state, State::Listening { .. }) =>
            {
                self.make_waiting(index, image, (listener, peer))?
            }
            (State::Connected { .. }, Some((other, peer)))
                if peer.peer() == Some(index) && other != index =>
            {
                let (end, other_end) = self.make_pair((index, image), (other, peer))?;
                self.handles.insert(other, other_end);
                end
            }
            // A sender of datagrams that goes one way.
            (State::Connected { .. }, Some((other, peer))) => {
                let end = self.make_socket(index, image)?;
                let target = match other == index {
                    true => unix::Target::of(end.as_fd(), image)?,
                    false => self.target_of(other, peer)?,
                };
                sys::connect(end.as_fd(), &target.address())?;
                end
            }
            (State::Orphaned, _) => self.make_orphan(index, image)?,
            (State::Ended, _) => {
                let ends = [self.fresh(image)?, self.fresh(image)?];
                inet::make_ended(&self.net()?, image, ends)?
            }
            _ => {
                let (pid, fd) = target.objects[index].home;
                self.notes.push(format!(
                    "process {pid}, descriptor {fd}: the connection to the outside is cut"
                ));
                let end = self.fresh(image)?;
                inet::make_cut(&self.net()?, &end, image)?;
                end
            }
        };
        self.handles.insert(index, made);
        Ok(())
    }

    /// A connection that waits to be accepted.
    fn make_waiting(
        &mut self,
        index: usize,
        image: &Socket,
        (at, listener): (usize, &Socket),
    ) -> io::Result<OwnedFd> {
        if image.domain == libc::AF_UNIX {
            let target = self.target_of(at, listener)?;
            let (pid, _) = self.target.objects[index].home;
            let remote = self.procs.get_mut(&pid).ok_or(io::ErrorKind::NotFound)?;
            let end = unix::connected(remote, image.kind, &target)?;
            options::set(end.as_fd(), image)?;
            return Ok(end);
        }
        let end = self.fresh(image)?;
        options::set(end.as_fd(), image)?;
        // What is left of an earlier connection may have the port.
        let reuse = sys::int_option(end.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
        sys::set_int_option(end.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        inet::bind_over(&self.net()?, end.as_fd(), &image.local)?;
        sys::set_int_option(end.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse)?;
        match inet::connect_over(&self.net()?, end.as_fd(), &image.local, &image.remote) {
            // The loopback device is quick, but the answer need not be here yet.
            Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => Ok(end),
            result => result.map(|()| end),
        }
    }

    fn make_pair(
        &mut self,
        (index, image): (usize, &Socket),
        (other, peer): (usize, &Socket),
    ) -> io::Result<(OwnedFd, OwnedFd)> {
        if image.domain != libc::AF_UNIX {
            let (a, b) = (self.fresh(image)?, self.fresh(peer)?);
            inet::connect_pair(&self.net()?, (a.as_fd(), image), (b.as_fd(), Some(peer)))?;
            return Ok((a, b));
        }
        if image.kind == libc::SOCK_DGRAM && !(image.local.is_empty() && peer.local.is_empty()) {
            return self.make_named_pair((index, image), (other, peer));
        }
        let accepted = if let Some(listener) = self.listener_of(peer) {
            self.make_accepted(index, listener, peer)?
        } else if let Some(listener) = self.listener_of(image) {
            self.make_accepted(other, listener, image)?
                .map(|(b, a)| (a, b))
        } else {
            None
        };
        let (a, b) = match accepted {
            Some(pair) => pair,
            None => {
                let (pid, _) = self.target.objects[index].home;
                let remote = self.procs.get_mut(&pid).ok_or(io::ErrorKind::NotFound)?;
                unix::pair(remote, image.kind)?
            }
        };
        options::set(a.as_fd(), image)?;
        options::set(b.as_fd(), peer)?;
        Ok((a, b))
    }

    /// The listening socket that a connection with this name was accepted from.
    fn listener_of(&self, accepted: &Socket) -> Option<usize> {
        if accepted.local.is_empty() {
            return None;
        }
        (0..self.target.objects.len()).find(|&index| {
            socket(self.target, index).is_some_and(|listener| {
                // Where others wait already, what is accepted next is not what was connected last.
                let free = match &listener.state {
                    State::Listening { pending, .. } => {
                        !pending.iter().any(|&p| self.plan.reuse[p].is_some())
                    }
                    _ => false,
                };
                free && (&listener.local, listener.kind) == (&accepted.local, accepted.kind)
            })
        })
    }

    /// Connects from the process of one end and accepts from the listening socket of the other. `None`
    /// where the name does not lead to that socket (any more).
    fn make_accepted(
        &mut self,
        connecting: usize,
        listener: usize,
        accepted: &Socket,
    ) -> io::Result<Option<(OwnedFd, OwnedFd)>> {
        let Some(at) = socket(self.target, listener) else {
            return Ok(None);
        };
        let target = self.target_of(listener, at)?;
        let (pid, _) = self.target.objects[connecting].home;
        let remote = self.procs.get_mut(&pid).ok_or(io::ErrorKind::NotFound)?;
        let Ok(end) = unix::connected(remote, accepted.kind, &target) else {
            return Ok(None);
        };
        let listener_end = self.handle(listener)?;
        let other = unix::accept(&listener_end);
        crate::sys::fd::set_status_flags(&listener_end, self.target.objects[listener].flags)?;
        Ok(other.ok().map(|other| (end, other)))
    }

    /// Datagram sockets with names, connected to each other.
    fn make_named_pair(
        &mut self,
        (index, image): (usize, &Socket),
        (other, peer): (usize, &Socket),
    ) -> io::Result<(OwnedFd, OwnedFd)> {
        if image.local.is_empty() || peer.local.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a datagram socket without a name is connected both ways to one with a name",
            ));
        }
        let (a, b) = (
            self.make_socket(index, image)?,
            self.make_socket(other, peer)?,
        );
        let to_b = unix::Target::of(b.as_fd(), peer)?;
        sys::connect(a.as_fd(), &to_b.address())?;
        let to_a = unix::Target::of(a.as_fd(), image)?;
        sys::connect(b.as_fd(), &to_a.address())?;
        Ok((a, b))
    }

    /// Where a unix socket that has a name is reached.
    fn target_of(&self, index: usize, image: &Socket) -> io::Result<unix::Target> {
        match self.handles.get(&index) {
            Some(end) => unix::Target::of(end.as_fd(), image),
            None => unix::Target::of(self.handle(index)?.as_fd(), image),
        }
    }

    /// One end of a connection whose other end is closed.
    fn make_orphan(&mut self, index: usize, image: &Socket) -> io::Result<OwnedFd> {
        let (end, other) = if image.domain == libc::AF_UNIX {
            let (pid, _) = self.target.objects[index].home;
            let remote = self.procs.get_mut(&pid).ok_or(io::ErrorKind::NotFound)?;
            let pair = unix::pair(remote, image.kind)?;
            options::set(pair.0.as_fd(), image)?;
            pair
        } else {
            let (a, b) = (self.fresh(image)?, self.fresh(image)?);
            inet::connect_pair(&self.net()?, (a.as_fd(), image), (b.as_fd(), None))?;
            (a, b)
        };
        self.feeders.push((index, other));
        Ok(end)
    }

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
        if missing != 0 && wanted.state != State::Orphaned {
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
                    inet::cut(self.handle(index)?.as_fd())?;
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
                if !mutual {
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
                None => (self.stranger(wanted, message)?, false),
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

    /// A sender that is gone: a socket for one datagram.
    fn stranger(&self, wanted: &Socket, message: &Message) -> io::Result<OwnedFd> {
        let end = self.fresh(wanted)?;
        if message.from.len() > 2 {
            let on = 1_i32.to_ne_bytes();
            sys::set_option(end.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, &on)?;
            sys::bind(end.as_fd(), &message.from)?;
        }
        Ok(end)
    }

    fn handle(&self, index: usize) -> io::Result<OwnedFd> {
        self.duplicate(index).map_err(io::Error::other)
    }
}

/// Whether `sender` can have sent a message to the socket `to`, and can do so again.
fn is_sender(sender: &Socket, to: &Socket, index: usize, message: &Message) -> bool {
    let kin = (sender.domain, sender.kind) == (to.domain, to.kind);
    let free = sender.remote.is_empty() && sender.state == State::Idle;
    let bound_to_it = sender.peer() == Some(index)
        || !sender.remote.is_empty() && inet::same_endpoint(&sender.remote, &destination(to));
    let named = if message.from.len() <= 2 {
        sender.local.is_empty()
    } else {
        sender.local == message.from || inet::same_endpoint(&sender.local, &message.from)
    };
    kin && named && (free || bound_to_it)
}

/// Where to send what is to reach this socket.
fn destination(socket: &Socket) -> Vec<u8> {
    match socket.domain {
        libc::AF_UNIX => socket.local.clone(),
        _ => inet::reachable(&socket.local),
    }
}

/// Takes the connections that wait, and ends them.
fn refuse_waiting(listener: &OwnedFd) -> io::Result<()> {
    loop {
        match unix::accept(listener) {
            Ok(waiting) => inet::close_hard(waiting.as_fd())?,
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}
