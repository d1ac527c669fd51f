//! Capture of sockets: first each by itself, then how they stand to one another.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::diag::{self, UnixLine};
use super::model::{Maker, Message, Pending, Socket, State};
use super::plan::socket;
use super::{address, options, queue, tcp, unix};
use crate::env::{Environment, Namespace};
use crate::error::{During, Result};
use crate::fd::Procs;
use crate::fd::capture::{Capture, Holder};
use crate::fd::model::{Descriptors, Kind};
use crate::ids::HostPid;
use crate::sys::socket as sys;

/// Reads a socket by itself. [`relate`] does the rest.
pub(crate) fn capture(capture: &mut Capture<'_>, holder: &Holder<'_>) -> Result<Kind> {
    let handle = holder.take()?;
    let number = |name| {
        let read = sys::int_option(handle.as_fd(), libc::SOL_SOCKET, name);
        holder.during(read, "asking what the socket is")
    };
    let (domain, kind) = (number(libc::SO_DOMAIN)?, number(libc::SO_TYPE)?);
    let protocol = number(libc::SO_PROTOCOL)?;
    match (domain, kind, protocol) {
        (libc::AF_UNIX, _, _)
        | (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP)
        | (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM | libc::SOCK_RAW, _)
        | (libc::AF_PACKET, _, _)
        | (
            libc::AF_NETLINK,
            _,
            libc::NETLINK_ROUTE
            | libc::NETLINK_SOCK_DIAG
            | libc::NETLINK_KOBJECT_UEVENT
            | libc::NETLINK_GENERIC
            | libc::NETLINK_AUDIT,
        ) => {}
        _ => {
            return Err(holder.refuse(format_args!(
                "a socket of family {domain}, type {kind}, protocol {protocol}, which is not carried"
            )));
        }
    }
    let mut image = Socket {
        inode: holder.raw.file.ino,
        domain,
        kind,
        protocol,
        options: Vec::new(),
        filter: Vec::new(),
        local: Vec::new(),
        remote: Vec::new(),
        file: None,
        state: State::Idle,
        maker: None,
        moved: 0,
        shutdown: 0,
        queue: Vec::new(),
    };
    holder.during(read(handle.as_fd(), &mut image), "reading the socket")?;
    if image.listens() && holder.raw.info.rights > 0 {
        return Err(holder.refuse(
            "a socket on which a connection waits that has sent descriptors; accept it first",
        ));
    }
    if domain == libc::AF_UNIX {
        let told = holder.during(sys::peer_credentials(handle.as_fd()), "asking for the peer")?;
        image.maker = maker(capture, told)?;
        let file = unix::file_of(capture.env, handle.as_fd(), &image.local);
        image.file = holder.during(file, "asking what the socket is bound to")?;
    }
    if domain == libc::AF_PACKET {
        let heard = packet_protocol(capture.env, image.inode);
        image.protocol = holder.during(heard, "asking what the socket listens for")?;
    }
    capture.sockets.push((capture.image.objects.len(), handle));
    Ok(Kind::Socket(Box::new(image)))
}

/// Who made a socket, as the kernel tells the service.
fn maker(capture: &Capture<'_>, (pid, user, group): (HostPid, u32, u32)) -> Result<Option<Maker>> {
    if pid.0 == 0 {
        return Ok(None);
    }
    let (user, group) = capture.owners()?.inside((user, group));
    let pid = capture.member(pid).unwrap_or_default();
    Ok(Some(Maker { pid, user, group }))
}

/// Asks processes for the makers of their sockets that have ended, of which only those inside know the numbers.
pub(crate) fn name_makers(image: &mut Descriptors, procs: &mut Procs<'_>) -> Result<()> {
    for object in image.objects.iter_mut().filter(|o| !o.is_in_flight()) {
        let (pid, fd) = object.home;
        if let Kind::Socket(socket) = &mut object.kind
            && let Some(maker) = socket.maker.as_mut().filter(|maker| maker.pid.0 == 0)
            && let Some(remote) = procs.get_mut(&pid)
        {
            let told = unix::peer_process(remote, fd);
            maker.pid = told.during(pid, &format!("asking who made descriptor {fd}"))?;
        }
    }
    Ok(())
}

/// What a packet socket listens for, in network byte order: of those that are bound by the name of a device nothing else tells.
fn packet_protocol(env: &dyn Environment, inode: u64) -> io::Result<i32> {
    let lines = std::fs::read_to_string(format!("/proc/{}/net/packet", env.init_pid()))?;
    let found = lines.lines().find_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let [_, _, _, protocol, .., found] = words.as_slice() else {
            return None;
        };
        let is_it = found.parse() == Ok(inode);
        is_it.then(|| u16::from_str_radix(protocol, 16).ok())?
    });
    Ok(found.map_or(0, u16::to_be).into())
}

fn read(handle: BorrowedFd<'_>, socket: &mut Socket) -> io::Result<()> {
    socket.options = options::read(handle, socket)?;
    socket.filter = sys::filter(handle)?;
    socket.local = sys::local_address(handle)?;
    match socket.domain {
        libc::AF_UNIX if socket.local.len() <= 2 => socket.local.clear(),
        libc::AF_INET | libc::AF_INET6 => {
            socket.remote = sys::remote_address(handle)?.unwrap_or_default();
            let connected = !socket.remote.is_empty();
            socket
                .options
                .retain(|setting| !connected || setting.matters_connected());
        }
        _ => {}
    }
    if sys::int_option(handle, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)? != 0 {
        socket.state = State::Listening {
            backlog: i32::MAX,
            pending: Vec::new(),
        };
    }
    Ok(())
}

/// Reads the queues of unix sockets, for files may be in flight in them, of which some may be sockets, in whose queues …
pub(crate) fn open_queues(capture: &mut Capture<'_>) -> Result<()> {
    let mut next = 0;
    while let Some((index, handle)) = capture.sockets.get(next) {
        let (index, object) = (*index, &capture.image.objects[*index]);
        let peeked = match &object.kind {
            Kind::Socket(socket) if socket.is_unix() && !socket.listens() => {
                queue::peek(handle.as_fd(), socket)
            }
            _ => Ok(Vec::new()),
        };
        let home = object.home;
        let doing = || format!("reading the socket behind descriptor {}", home.1);
        let mut messages = Vec::new();
        for waiting in peeked.during(home.0, &doing())? {
            let flights = waiting.rights.into_iter();
            messages.push(Message {
                bytes: waiting.bytes,
                from: waiting.from,
                rights: flights
                    .map(|file| capture.flight(file, home))
                    .collect::<Result<_>>()?,
            });
        }
        if let Kind::Socket(socket) = &mut capture.image.objects[index].kind {
            socket.queue = messages;
        }
        next += 1;
    }
    Ok(())
}

/// Finds the peers, and reads the queues of the others.
pub(crate) fn relate(capture: &mut Capture<'_>) -> Result<()> {
    let handles: HashMap<_, _> = std::mem::take(&mut capture.sockets).into_iter().collect();
    if handles.is_empty() {
        return Ok(());
    }
    let mut found: Vec<_> = handles.keys().copied().collect();
    found.sort_unstable();
    let sockets = Sockets {
        by_inode: found
            .iter()
            .map(|&i| (inode(&capture.image, i), i))
            .collect(),
        by_ends: found
            .iter()
            .filter_map(|&i| Some((address::ends(socket(&capture.image, i)?)?, i)))
            .collect(),
        unix: unix_lines(&capture.image, &found, capture.env)?,
        handles,
    };
    tell_shutdowns(capture, &found)?;
    for &index in &found {
        let related = match sockets.socket(&capture.image, index).domain {
            libc::AF_UNIX => sockets.relate_unix(&mut capture.image, index),
            libc::AF_NETLINK => Ok(()),
            _ => tcp::relate(&sockets, &mut capture.image, index),
        };
        settle(&mut capture.image, index, related)?;
    }
    for &index in &found {
        let addressed = sockets.check_addressed(&capture.image, index);
        settle(&mut capture.image, index, addressed)?;
    }
    for &index in &found {
        let read = sockets.read_queue(&mut capture.image, index);
        settle(&mut capture.image, index, read)?;
    }
    Ok(())
}

/// Finds out which directions of UDP sockets are shut down.
fn tell_shutdowns(capture: &mut Capture<'_>, found: &[usize]) -> Result<()> {
    let objects = &mut capture.image.objects;
    let bound = |kind: &Kind| matches!(kind, Kind::Socket(s) if s.is_udp() && !address::is_free(s));
    if !found.iter().any(|&index| bound(&objects[index].kind)) {
        return Ok(());
    }
    let doing = "asking about the UDP sockets of the sandbox";
    let net = capture.env.namespace(Namespace::Net).during_tree(doing)?;
    let asking = diag::diag_socket(&net).during_tree(doing)?;
    for &index in found {
        if bound(&objects[index].kind)
            && let Kind::Socket(socket) = &mut objects[index].kind
        {
            let told = diag::udp_shutdown(asking.as_fd(), socket);
            socket.shutdown = told.during_tree(doing)?;
        }
    }
    Ok(())
}

/// Takes a refusal down as what the object is.
fn settle(image: &mut Descriptors, index: usize, result: Result<(), Relation>) -> Result<()> {
    match result {
        Ok(()) => Ok(()),
        Err(Relation::Refused(what)) => {
            image.objects[index].kind = Kind::Refused { what };
            Ok(())
        }
        Err(Relation::Failed(e)) => {
            let (pid, fd) = image.objects[index].home;
            let doing = format!("reading the socket behind descriptor {fd}");
            Err(e).during(pid, &doing)
        }
    }
}

/// What was sent through a connection is read by accepting it, by a descriptor of the socket where it waits.
pub(super) fn check_reachable(pending: &[Pending], in_flight: bool) -> Result<(), Relation> {
    match in_flight && pending.iter().any(|one| !one.known) {
        true => Err(Relation::Refused(
            "a listening socket on which a connection waits that has sent data or is closed".into(),
        )),
        false => Ok(()),
    }
}

/// Why a socket could not be read in full.
pub(crate) enum Relation {
    /// It cannot be carried.
    Refused(String),
    Failed(io::Error),
}

impl From<io::Error> for Relation {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// The sockets of a tree, while their relations are found.
pub(crate) struct Sockets {
    by_inode: HashMap<u64, usize>,
    unix: HashMap<u64, UnixLine>,
    /// TCP sockets by their own and their peer's address.
    pub(super) by_ends: HashMap<address::Ends, usize>,
    /// Duplicates, by object; closed when the capture is done.
    pub(crate) handles: HashMap<usize, OwnedFd>,
}

impl Sockets {
    pub(crate) fn socket<'a>(&self, image: &'a Descriptors, index: usize) -> &'a Socket {
        match &image.objects[index].kind {
            Kind::Socket(socket) => socket,
            // Refused by now; what is asked of it does not matter any more.
            _ => &REFUSED,
        }
    }

    /// Every socket of the tree.
    pub(crate) fn all(&self) -> impl Iterator<Item = usize> + '_ {
        self.handles.keys().copied()
    }

    fn relate_unix(&self, image: &mut Descriptors, index: usize) -> Result<(), Relation> {
        // Not of the sandbox's network namespace: a connection from there that was accepted here, say.
        let Some(line) = self.unix.get(&inode(image, index)) else {
            return Err(Relation::Refused(
                "a unix socket that was made outside the tree".into(),
            ));
        };
        let handle = self.handles[&index].as_fd();
        let connected = sys::remote_address(handle)?.is_some();
        let waiting = self.waiting_unix(&line.pending)?;
        let in_flight = image.objects[index].is_in_flight();
        let Kind::Socket(socket) = &mut image.objects[index].kind else {
            return Ok(());
        };
        socket.shutdown = line.shutdown;
        match (&mut socket.state, line.peer) {
            (State::Listening { pending, backlog }, _) => {
                *backlog = i32::try_from(line.backlog).unwrap_or(i32::MAX);
                *pending = waiting;
                check_reachable(pending, in_flight)?;
            }
            (state, Some(peer)) => match self.by_inode.get(&peer) {
                Some(&peer) => *state = State::Connected { peer },
                None => *state = self.pending_or_outside(peer, socket.inode),
            },
            (state, None) if connected || line.shutdown == 3 && socket.kind != libc::SOCK_DGRAM => {
                *state = State::Orphaned;
            }
            _ => {}
        }
        if socket.state == State::Orphaned && socket.is_stream() && sys::has_error(handle)? {
            socket.state = State::Abandoned;
        }
        if socket.state == State::Outside {
            return Err(Relation::Refused(
                "a unix socket connected to a process outside the tree".into(),
            ));
        }
        Ok(())
    }

    /// A peer without a descriptor of the tree: it waits to be accepted, or is closed, or is outside.
    fn pending_or_outside(&self, peer: u64, inode: u64) -> State {
        let listener = self
            .unix
            .iter()
            .find(|(_, line)| line.pending.contains(&inode));
        match (peer, listener.map(|(ino, _)| self.by_inode.get(ino))) {
            (0, Some(Some(&peer))) => State::Connected { peer },
            (0, None) => State::Orphaned,
            _ => State::Outside,
        }
    }

    /// What sends datagrams to a unix socket that is not connected to it could not be told where, if that had no name: it was the
    /// other end of a pair once.
    fn check_addressed(&self, image: &Descriptors, index: usize) -> Result<(), Relation> {
        let sender = self.socket(image, index);
        let peer = sender.peer().map(|peer| self.socket(image, peer));
        let addressed = peer.is_none_or(|peer| {
            peer.peer() == Some(index) || peer.listens() || !peer.local.is_empty()
        });
        match !sender.is_unix() || addressed {
            true => Ok(()),
            false => Err(Relation::Refused(
                "a unix socket connected to one without a name, which has left it".into(),
            )),
        }
    }

    /// The connections that wait at a unix socket, by the inode numbers of their other ends.
    fn waiting_unix(&self, inodes: &[u64]) -> io::Result<Vec<Pending>> {
        let client = |inode| match self.by_inode.get(inode) {
            Some(&client) if sys::unsent(self.handles[&client].as_fd())? == 0 => {
                Ok(Pending::quiet(client))
            }
            client => Ok(Pending {
                client: client.copied(),
                ..Pending::default()
            }),
        };
        inodes.iter().map(client).collect()
    }

    /// The peer, unless the connection waits to be accepted.
    fn other_end(&self, image: &Descriptors, index: usize) -> Option<usize> {
        let peer = self.socket(image, index).peer()?;
        match &image.objects[peer].kind {
            Kind::Socket(socket) if matches!(socket.state, State::Listening { .. }) => None,
            Kind::Socket(_) => Some(peer),
            // A listener that is refused is the peer of who waits at it, too.
            _ => None,
        }
    }

    fn read_queue(&self, image: &mut Descriptors, index: usize) -> Result<(), Relation> {
        let handle = self.handles[&index].as_fd();
        let other_end = self.other_end(image, index);
        let Kind::Socket(socket) = &mut image.objects[index].kind else {
            return Ok(());
        };
        if socket.is_stream() && !socket.listens() && sys::has_urgent(handle)? {
            return Err(Relation::Refused(
                "a socket with an urgent byte that waits (MSG_OOB)".into(),
            ));
        }
        if socket.listens() || socket.is_unix() || !socket.keeps_queue() {
            return Ok(());
        }
        if socket.is_tcp() {
            let bytes = match other_end {
                Some(peer) => tcp::between(self.handles[&peer].as_fd(), handle)?,
                None => queue::peek_bytes(handle)?,
            };
            if !bytes.is_empty() {
                socket.queue.push(Message {
                    bytes,
                    ..Message::default()
                });
            }
            return Ok(());
        }
        let waiting = queue::peek(handle, socket)?.into_iter();
        socket.queue = waiting
            .map(|message| Message {
                bytes: message.bytes,
                from: message.from,
                rights: Vec::new(),
            })
            .collect();
        Ok(())
    }
}

static REFUSED: Socket = Socket {
    inode: 0,
    domain: 0,
    kind: 0,
    protocol: 0,
    options: Vec::new(),
    filter: Vec::new(),
    local: Vec::new(),
    remote: Vec::new(),
    file: None,
    state: State::Idle,
    maker: None,
    moved: 0,
    shutdown: 0,
    queue: Vec::new(),
};

fn inode(image: &Descriptors, index: usize) -> u64 {
    match &image.objects[index].kind {
        Kind::Socket(socket) => socket.inode,
        _ => 0,
    }
}

fn unix_lines(
    image: &Descriptors,
    found: &[usize],
    env: &dyn Environment,
) -> Result<HashMap<u64, UnixLine>> {
    let unix = |&index: &usize| match &image.objects[index].kind {
        Kind::Socket(socket) => socket.domain == libc::AF_UNIX,
        _ => false,
    };
    if !found.iter().any(unix) {
        return Ok(HashMap::new());
    }
    env.namespace(Namespace::Net)
        .and_then(|net| diag::unix_sockets(&net))
        .during_tree("listing the unix sockets of the sandbox")
}
