//! Making the connections that are missing.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::model::{Socket, State};
use super::plan::socket;
use super::{options, repair, unix};
use crate::error::{During, Result};
use crate::fd::restore::{Restore, named};
use crate::sys::socket as sys;

impl Restore<'_, '_> {
    /// Makes the connections that are missing: those that were accepted first, then those that wait.
    pub(in crate::fd) fn make_connections(&mut self) -> Result<()> {
        let target = self.target;
        for (index, object) in target.objects.iter().enumerate() {
            let Some(image) = socket(target, index) else {
                continue;
            };
            let missing = self.plan.reuse[index].is_none() && !self.handles.contains_key(&index);
            let peer = image.peer().and_then(|peer| socket(target, peer));
            let waits = peer.is_some_and(Socket::listens);
            if missing && self.is_connection(index) && !waits {
                self.make_connection(index, image)
                    .during(object.home.0, "making a connection")
                    .map_err(named(object))?;
            }
        }
        self.make_waiting()
    }

    fn make_connection(&mut self, index: usize, image: &Socket) -> io::Result<()> {
        let target = self.target;
        let peer = image
            .peer()
            .and_then(|peer| Some((peer, socket(target, peer)?)));
        let made = match (&image.state, peer) {
            (State::Connected { .. }, Some((other, peer)))
                if peer.peer() == Some(index) && other != index =>
            {
                let (end, other_end) = self.make_pair((index, image), (other, peer))?;
                self.handles.insert(other, other_end);
                end
            }
            (State::Connected { .. }, Some((other, _))) if other == index && image.is_tcp() => {
                let end = self.fresh(image)?;
                repair::connect_to_itself(&self.net()?, end.as_fd(), image)?;
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
            (State::Orphaned | State::Abandoned, _) => self.make_orphan(index, image)?,
            (State::Cut, _) => {
                let end = self.fresh(image)?;
                repair::make_cut(&self.net()?, &end, image)?;
                end
            }
            (State::Ended, _) => {
                let ends = [self.fresh(image)?, self.fresh(image)?];
                repair::make_ended(&self.net()?, image, ends)?
            }
            _ => {
                let (pid, fd) = target.objects[index].home;
                self.notes.push(format!(
                    "process {pid}, descriptor {fd}: the connection to the outside is cut"
                ));
                let end = self.fresh(image)?;
                repair::make_cut(&self.net()?, &end, image)?;
                end
            }
        };
        self.handles.insert(index, made);
        Ok(())
    }

    fn make_pair(
        &mut self,
        (index, image): (usize, &Socket),
        (other, peer): (usize, &Socket),
    ) -> io::Result<(OwnedFd, OwnedFd)> {
        if image.domain != libc::AF_UNIX {
            let (a, b) = (self.fresh(image)?, self.fresh(peer)?);
            repair::connect_pair(&self.net()?, (a.as_fd(), image), (b.as_fd(), Some(peer)))?;
            return Ok((a, b));
        }
        if image.has_own_name() && peer.has_own_name() {
            return self.make_named_pair((index, image), (other, peer));
        }
        let accepted = if let Some(listener) = self.listener_of(peer) {
            self.make_accepted(Some(index), listener, peer)?
        } else if let Some(listener) = self.listener_of(image) {
            self.make_accepted(Some(other), listener, image)?
                .map(|(b, a)| (a, b))
        } else {
            None
        };
        let (a, b) = match accepted {
            Some(pair) => pair,
            None => self.fresh_pair(index, image)?,
        };
        self.set_up(a.as_fd(), index, image)?;
        self.set_up(b.as_fd(), other, peer)?;
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
                    State::Listening { pending, .. } => !pending
                        .iter()
                        .filter_map(|p| p.client)
                        .any(|client| self.plan.reuse[client].is_some()),
                    _ => false,
                };
                free && (&listener.local, listener.kind) == (&accepted.local, accepted.kind)
            })
        })
    }

    /// Connects from the process of one end, if somebody has that, and accepts from the listening socket of the other. `None`
    /// where the name does not lead to that socket (any more).
    fn make_accepted(
        &mut self,
        connecting: Option<usize>,
        listener: usize,
        accepted: &Socket,
    ) -> io::Result<Option<(OwnedFd, OwnedFd)>> {
        let Some(at) = socket(self.target, listener) else {
            return Ok(None);
        };
        let Ok(end) = self.dial(connecting, (listener, at), accepted.maker) else {
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

    /// Two unix sockets that are connected to each other, by the process that made the one with this image.
    fn fresh_pair(&mut self, index: usize, image: &Socket) -> io::Result<(OwnedFd, OwnedFd)> {
        let (home, _) = self.target.objects[index].home;
        self.as_maker(image.maker, home, |remote, guise| {
            unix::pair(remote, guise, image.kind)
        })
    }

    /// Gives a connected unix socket its options, and its name if that is its own.
    fn set_up(&mut self, end: BorrowedFd<'_>, index: usize, image: &Socket) -> io::Result<()> {
        options::set(end, image)?;
        match image.has_own_name() {
            true => unix::bind(self.env, self.host_of(index)?, end, image.bound()),
            false => Ok(()),
        }
    }

    /// One end of a connection whose other end is closed.
    fn make_orphan(&mut self, index: usize, image: &Socket) -> io::Result<OwnedFd> {
        let (end, other) = if image.domain == libc::AF_UNIX {
            let accepted = match self.listener_of(image) {
                Some(listener) => self.make_accepted(None, listener, image)?,
                None => None,
            };
            let (other, end) = match accepted {
                Some(pair) => pair,
                None => self.fresh_pair(index, image)?,
            };
            self.set_up(end.as_fd(), index, image)?;
            (end, other)
        } else {
            let (a, b) = (self.fresh(image)?, self.fresh(image)?);
            repair::connect_pair(&self.net()?, (a.as_fd(), image), (b.as_fd(), None))?;
            (a, b)
        };
        if image.state == State::Abandoned {
            // It is closed without having read this.
            sys::send(end.as_fd(), &[0], &[])?;
        }
        self.feeders.push((index, other));
        Ok(end)
    }
}
