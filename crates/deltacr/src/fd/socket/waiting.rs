//! Connections that wait to be accepted.
//!
//! What was sent through one can only be read by accepting it, and then it waits no more. So a checkpoint that meets one
//! makes it anew, by the means by which a state is given back.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::address::ends_of;
use super::model::{Maker, Message, Pending, Socket, State};
use super::plan::socket;
use super::repair::{self, until};
use super::restore::room_for;
use super::tcp::{self, Info};
use super::{inet, options, queue, unix};
use crate::env::Environment;
use crate::error::{During, Result};
use crate::fd::model::{Descriptors, Kind};
use crate::fd::restore::{Restore, named, restore};
use crate::fd::{Prepared, Procs};
use crate::mem::SharedObjects;
use crate::owners::Owners;
use crate::sys::socket as sys;

/// Reads what was sent through connections that wait to be accepted. They are made anew, and wait again.
///
/// # Errors
/// Something cannot be read or not be put back; a connection of which that is true is cut.
pub(crate) fn read_waiting(
    mut image: Descriptors,
    procs: &mut Procs<'_>,
    env: &dyn Environment,
    shared: &SharedObjects,
) -> Result<Descriptors> {
    let unknown = |&at: &usize| waiting_at(&image, at).iter().any(|one| !one.known);
    let listeners: Vec<usize> = (0..image.objects.len()).filter(unknown).collect();
    if listeners.is_empty() {
        return Ok(image);
    }
    let owners = shared.owners(env)?;
    let mut failed = None;
    for &at in &listeners {
        let mut accepted = Vec::new();
        let done = accept_all(&image, at, procs, owners, &mut accepted);
        failed = failed.or(done
            .during(image.objects[at].home.0, "reading what waits")
            .err());
        set_waiting(&mut image, at, accepted);
    }
    let now = without_waiting(&image, &listeners);
    let means = (shared, &mut Prepared::default());
    restore(&now, &image, procs, env, means, &|_| Ok(()))?;
    failed.map_or(Ok(image), Err)
}

fn waiting_at(image: &Descriptors, at: usize) -> &[Pending] {
    match socket(image, at).map(|listener| &listener.state) {
        Some(State::Listening { pending, .. }) => pending,
        _ => &[],
    }
}

fn set_waiting(image: &mut Descriptors, at: usize, waiting: Vec<Pending>) {
    if let Kind::Socket(listener) = &mut image.objects[at].kind
        && let State::Listening { pending, .. } = &mut listener.state
    {
        *pending = waiting;
    }
}

/// What there is when the connections that waited at these sockets are no more.
fn without_waiting(image: &Descriptors, listeners: &[usize]) -> Descriptors {
    let mut now = image.clone();
    for &at in listeners {
        for client in waiting_at(image, at).iter().filter_map(|one| one.client) {
            if let Kind::Socket(client) = &mut now.objects[client].kind {
                client.state = State::Idle;
            }
        }
        set_waiting(&mut now, at, Vec::new());
    }
    now
}

/// Accepts all that waits at a socket, reads it and closes it.
fn accept_all(
    image: &Descriptors,
    at: usize,
    procs: &Procs<'_>,
    owners: &Owners,
    accepted: &mut Vec<Pending>,
) -> io::Result<()> {
    let Some(listening) = socket(image, at) else {
        return Ok(());
    };
    let take = |index: usize| {
        let (pid, fd) = image.objects[index].home;
        procs.get(&pid).ok_or(io::ErrorKind::NotFound)?.take_fd(fd)
    };
    let listener = take(at)?;
    let mut order = waiting_at(image, at).iter().map(|one| one.client);
    let read = loop {
        let end = match unix::accept(&listener) {
            Ok(end) => end,
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => break Ok(()),
            Err(e) => break Err(e),
        };
        let one = match listening.is_unix() {
            true => read_unix(&end, listening, order.next().flatten())
                .and_then(|one| with_maker(one, &end, procs, owners)),
            false => read_tcp(&end, image, take),
        };
        match one {
            Ok(one) => accepted.push(one),
            Err(e) => break Err(e),
        }
    };
    crate::sys::fd::set_status_flags(&listener, image.objects[at].flags)?;
    read
}

fn read_unix(end: &OwnedFd, listening: &Socket, client: Option<usize>) -> io::Result<Pending> {
    let waiting = queue::peek(end.as_fd(), listening)?.into_iter();
    let queue = waiting.map(|one| Message {
        bytes: one.bytes,
        ..Message::default()
    });
    Ok(Pending {
        client,
        from: sys::remote_address(end.as_fd())?.unwrap_or_default(),
        queue: queue.collect(),
        known: true,
        ..Pending::default()
    })
}

/// Notes who has connected.
fn with_maker(
    one: Pending,
    end: &OwnedFd,
    procs: &Procs<'_>,
    owners: &Owners,
) -> io::Result<Pending> {
    let (host, user, group) = sys::peer_credentials(end.as_fd())?;
    let (user, group) = owners.inside((user, group));
    let process = procs.values().find(|remote| remote.host() == host);
    let maker = process.map(|remote| Maker {
        pid: remote.pid(),
        user,
        group,
    });
    Ok(Pending { maker, ..one })
}

fn read_tcp(
    end: &OwnedFd,
    image: &Descriptors,
    take: impl Fn(usize) -> io::Result<OwnedFd>,
) -> io::Result<Pending> {
    let (from, to) = (
        tcp::peer_name(end.as_fd())?,
        sys::local_address(end.as_fd())?,
    );
    let there = ends_of(&from, &to);
    let client = (0..image.objects.len()).find(|&index| {
        socket(image, index).is_some_and(|s| s.is_tcp() && ends_of(&s.local, &s.remote) == there)
    });
    let bytes = match client {
        Some(client) => tcp::between(take(client)?.as_fd(), end.as_fd())?,
        None => queue::peek_bytes(end.as_fd())?,
    };
    let message = Message {
        bytes,
        ..Message::default()
    };
    let cut = Info::read(end.as_fd())?.state() == tcp::state::CLOSED;
    // The address is free at once when both ends are closed so.
    repair::close_hard(end.as_fd())?;
    Ok(Pending {
        client,
        from,
        to,
        queue: [message]
            .into_iter()
            .filter(|m| !m.bytes.is_empty())
            .collect(),
        known: true,
        cut,
        maker: None,
    })
}

impl Restore<'_, '_> {
    /// Makes the connections that wait, at each socket in their order.
    pub(super) fn make_waiting(&mut self) -> Result<()> {
        let target = self.target;
        for (at, object) in target.objects.iter().enumerate() {
            let Some(listening) = socket(target, at) else {
                continue;
            };
            for one in waiting_at(target, at) {
                let there = one.client.is_some_and(|c| self.plan.reuse[c].is_some());
                if !there {
                    self.make_one_waiting((at, listening), one)
                        .during(object.home.0, "making a connection that waits")
                        .map_err(named(object))?;
                }
            }
            if let State::Listening { backlog, pending } = &listening.state
                && room_for(*backlog, pending) != *backlog
            {
                self.listen_as_maker(at, listening, *backlog)
                    .during(object.home.0, "making a socket listen")?;
            }
        }
        Ok(())
    }

    fn make_one_waiting(
        &mut self,
        (at, listening): (usize, &Socket),
        one: &Pending,
    ) -> io::Result<()> {
        let end = match listening.is_unix() {
            true => self.connect_unix((at, listening), one)?,
            false => self.connect_tcp(listening, one)?,
        };
        queue::fill(end.as_fd(), &one.queue, &|_| Ok(Vec::new()))?;
        match one.client {
            Some(client) => drop(self.handles.insert(client, end)),
            None if one.cut => repair::close_hard(end.as_fd())?,
            None => {}
        }
        Ok(())
    }

    fn connect_unix(
        &mut self,
        (at, listening): (usize, &Socket),
        one: &Pending,
    ) -> io::Result<OwnedFd> {
        let end = self.dial(one.client, (at, listening), one.maker)?;
        if let Some(image) = one.client.and_then(|client| socket(self.target, client)) {
            options::set(end.as_fd(), image)?;
        }
        Ok(end)
    }

    fn connect_tcp(&mut self, listening: &Socket, one: &Pending) -> io::Result<OwnedFd> {
        let net = self.net()?;
        let image = one.client.and_then(|client| socket(self.target, client));
        let (local, remote) = image.map_or((&one.from, &one.to), |i| (&i.local, &i.remote));
        let end = self.fresh(image.unwrap_or(listening))?;
        if let Some(image) = image {
            options::set(end.as_fd(), image)?;
        }
        // What is left of an earlier connection may have the port.
        let reuse = sys::int_option(end.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
        sys::set_int_option(end.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        inet::bind_over(&net, end.as_fd(), local)?;
        sys::set_int_option(end.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse)?;
        match inet::connect_over(&net, end.as_fd(), local, remote) {
            Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {}
            result => result?,
        }
        until(|| (Info::read(end.as_fd()).ok()?.state() == tcp::state::ESTABLISHED).then_some(()))?;
        Ok(end)
    }
}
