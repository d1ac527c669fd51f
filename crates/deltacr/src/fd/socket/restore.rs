//! Making sockets that are missing, but for connections.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::model::{Maker, Pending, Socket, State};
use super::plan::{socket, waits_alike};
use super::{address, inet, options, queue, repair, unix};
use crate::env::Namespace;
use crate::error::{During, Result};
use crate::fd::guise::{Guise, StandIn};
use crate::fd::model::Kind;
use crate::fd::restore::Restore;
use crate::ids::InnerPid;
use crate::remote::Remote;
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
                repair::close_hard(handle.as_fd())
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
                unix::bind(self.env, of, end.as_fd(), image.bound())?;
            }
            return Ok(end);
        }
        crate::fd::restore::give_to(&end, of)?;
        let shared = self.shares_address(index, image);
        inet::place(&self.net()?, end.as_fd(), image, shared)?;
        Ok(end)
    }

    /// Whether other sockets are bound to the same address, as the kernel lets those that want it.
    pub(super) fn shares_address(&self, index: usize, image: &Socket) -> bool {
        (0..self.target.objects.len()).any(|other| {
            let socket = socket(self.target, other).filter(|_| other != index);
            socket.is_some_and(|s| {
                let may_share = s.is_udp() || s.remote.is_empty();
                may_share
                    && s.protocol == image.protocol
                    && address::same_endpoint(&s.local, &image.local)
            })
        })
    }

    pub(super) fn net(&self) -> io::Result<OwnedFd> {
        self.env.namespace(Namespace::Net)
    }

    pub(super) fn fresh(&self, image: &Socket) -> io::Result<OwnedFd> {
        sys::socket_in(&self.net()?, image.domain, image.kind, image.protocol)
    }

    pub(super) fn host_of(&self, index: usize) -> io::Result<crate::ids::HostPid> {
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
            let (pid, _) = object.home;
            let kept = waits_alike(now_pending, pending, &self.plan.reuse);
            if !kept && !now_pending.is_empty() {
                let listener = self.duplicate(index)?;
                refuse_waiting(&listener).during(pid, "refusing connections")?;
                crate::sys::fd::set_status_flags(&listener, object.flags)
                    .during(pid, "setting the flags of a socket")?;
            }
            let room = match kept {
                true => *backlog,
                false => room_for(*backlog, pending),
            };
            if now_backlog != Some(room) {
                let listening = self.listen_as_maker(index, wanted, room);
                listening.during(pid, "making a socket listen")?;
            }
        }
        Ok(())
    }

    /// Makes a socket listen; a unix socket by the process that did it once if that is there, whether it has it open or not.
    pub(super) fn listen_as_maker(
        &mut self,
        index: usize,
        wanted: &Socket,
        backlog: i32,
    ) -> io::Result<()> {
        let end = self.handle(index)?;
        if !wanted.is_unix() {
            return Ok(rustix::net::listen(&end, backlog)?);
        }
        let maker = wanted.maker.map(|maker| maker.pid);
        let there = maker.filter(|pid| self.procs.contains_key(pid));
        let by = there.unwrap_or(self.target.objects[index].home.0);
        let guise = self.guise(wanted.maker, by);
        let remote = self.procs.get_mut(&by).ok_or(io::ErrorKind::NotFound)?;
        let lent = remote.give_fds(&[end.as_fd()])?;
        let done = unix::listen(remote, guise, lent[0], backlog);
        remote.close(&lent)?;
        done
    }

    /// As whom a process is to act. Only one that was just made may: others have credentials of their own.
    fn guise(&self, maker: Option<Maker>, pid: InnerPid) -> Option<Guise> {
        let made = !self.current.tables.contains_key(&pid);
        maker.filter(|_| made).map(Guise::of)
    }

    /// Has the process that made a socket make it again: the same, or one that stands in for it if it has ended. Where neither can
    /// be, `home` does.
    pub(super) fn as_maker<T>(
        &mut self,
        maker: Option<Maker>,
        home: InnerPid,
        act: impl FnOnce(&mut Remote, Option<Guise>) -> io::Result<T>,
    ) -> io::Result<T> {
        let pid = maker.map_or(home, |maker| maker.pid);
        if !self.procs.contains_key(&pid)
            && pid.0 > 0
            && let Ok(mut stand_in) = StandIn::make(self.procs, self.env, home, pid)
        {
            let done = act(&mut stand_in.remote, maker.map(Guise::of));
            stand_in.end(self.procs)?;
            return done;
        }
        let by = if self.procs.contains_key(&pid) {
            pid
        } else {
            home
        };
        let guise = self.guise(maker, by);
        act(
            self.procs.get_mut(&by).ok_or(io::ErrorKind::NotFound)?,
            guise,
        )
    }

    /// Connects a fresh unix socket to one that listens, as who did so once. It becomes the object `client`, if it is to be one.
    pub(super) fn dial(
        &mut self,
        client: Option<usize>,
        (at, listening): (usize, &Socket),
        maker: Option<Maker>,
    ) -> io::Result<OwnedFd> {
        let target = self.target_of(at, listening)?;
        let (home, _) = self.target.objects[client.unwrap_or(at)].home;
        let host = self.host_of(client.unwrap_or(at))?;
        let image = client.and_then(|client| socket(self.target, client));
        let named = image.filter(|image| !image.local.is_empty());
        let env = self.env;
        let name = |end: BorrowedFd<'_>| {
            named.map_or(Ok(()), |image| unix::bind(env, host, end, image.bound()))
        };
        self.as_maker(maker, home, |remote, guise| {
            unix::connected(remote, guise, listening.kind, (&target, env.root()), name)
        })
    }

    /// Where a unix socket that has a name is reached.
    pub(super) fn target_of(&self, index: usize, image: &Socket) -> io::Result<unix::Target> {
        match self.handles.get(&index) {
            Some(end) => unix::Target::of(end.as_fd(), image),
            None => unix::Target::of(self.handle(index)?.as_fd(), image),
        }
    }

    pub(super) fn handle(&self, index: usize) -> io::Result<OwnedFd> {
        self.duplicate(index).map_err(io::Error::other)
    }
}

/// How many connections must be able to wait while they are made: there may be more than may come now.
pub(super) fn room_for(backlog: i32, pending: &[Pending]) -> i32 {
    backlog.max(i32::try_from(pending.len()).unwrap_or(i32::MAX))
}

/// Takes the connections that wait, and ends them.
fn refuse_waiting(listener: &OwnedFd) -> io::Result<()> {
    loop {
        match unix::accept(listener) {
            Ok(waiting) => repair::close_hard(waiting.as_fd())?,
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}
