//! The image of a socket.

use serde::{Deserialize, Serialize};

use crate::ids::InnerPid;

/// A socket of the unix, an internet, the packet or the netlink family.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Socket {
    /// Inode number at capture.
    pub(crate) inode: u64,
    /// `AF_UNIX`, `AF_INET`, `AF_INET6`, `AF_PACKET` or `AF_NETLINK`.
    pub(crate) domain: i32,
    /// `SOCK_STREAM`, `SOCK_DGRAM`, `SOCK_SEQPACKET` or `SOCK_RAW`.
    pub(crate) kind: i32,
    pub(crate) protocol: i32,
    pub(crate) options: Vec<Setting>,
    /// The classic filter of what it receives; empty if it has none.
    pub(crate) filter: Vec<u8>,
    /// The address bound to, as the kernel's bytes; empty when there is none.
    pub(crate) local: Vec<u8>,
    /// The peer's address of an internet socket that is connected; empty when it is not.
    pub(crate) remote: Vec<u8>,
    /// Inode number of the file that a unix socket is bound to.
    pub(crate) file: Option<u64>,
    pub(crate) state: State,
    /// Whom a unix socket takes its peer for (`SO_PEERCRED`).
    pub(crate) maker: Option<Maker>,
    /// Bytes that a connection to the outside has carried, both ways.
    pub(crate) moved: u64,
    /// Directions shut down on this side: 1 for receiving, 2 for sending.
    pub(crate) shutdown: u8,
    /// What was sent to this socket and not received yet, wherever it waits.
    pub(crate) queue: Vec<Message>,
}

/// A socket option that is not as the system sets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Setting {
    pub(crate) level: i32,
    pub(crate) name: i32,
    pub(crate) value: Vec<u8>,
}

/// How a socket stands to others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum State {
    /// Neither listening nor connected.
    Idle,
    /// Listening, with the connections that wait to be accepted, in the order of their coming where that is known.
    Listening { backlog: i32, pending: Vec<Pending> },
    /// Connected to an object of the tree (an index into its objects). The connection may go one
    /// way only (datagrams) or wait to be accepted.
    Connected { peer: usize },
    /// The peer has closed its side; what it sent is in the queue.
    Orphaned,
    /// So has it, without having read all that was sent to it, of which the next call tells (`ECONNRESET`).
    Abandoned,
    /// It has ended with an error that the next call tells of.
    Cut,
    /// Both sides have closed the connection, and nothing is left to read.
    Ended,
    /// Connected to what is not in the tree.
    Outside,
}

/// A connection that waits to be accepted. Its end that is to be accepted is nobody's yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pending {
    /// The other end (an index into the image's objects); none if that is closed.
    pub(crate) client: Option<usize>,
    /// The addresses that a closed other end had and was connected to; empty if it had none.
    pub(crate) from: Vec<u8>,
    pub(crate) to: Vec<u8>,
    /// What it has sent, if that is `known`. Descriptors are not among it.
    pub(crate) queue: Vec<Message>,
    /// Whether what it has sent is known. It can only be read by accepting the connection.
    pub(crate) known: bool,
    /// Whether its other end has cut it rather than closed it.
    pub(crate) cut: bool,
    /// Who has connected, by a unix socket.
    pub(crate) maker: Option<Maker>,
}

/// Who made a socket pair, connected to a unix socket, or made one listen; as the sandbox counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Maker {
    /// The process; 0 where it has ended and its number is not known.
    pub(crate) pid: InnerPid,
    pub(crate) user: u32,
    pub(crate) group: u32,
}

impl Pending {
    /// One from a socket that has sent nothing yet.
    pub(crate) fn quiet(client: usize) -> Self {
        Self {
            client: Some(client),
            known: true,
            ..Self::default()
        }
    }

    /// Whether all that matters of it is who has connected.
    pub(crate) fn is_quiet(&self) -> bool {
        self.client.is_some() && self.known && self.queue.is_empty()
    }
}

/// A datagram, or a part of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Message {
    pub(crate) bytes: Vec<u8>,
    /// The sender's address; empty if it has none.
    pub(crate) from: Vec<u8>,
    /// The files in flight with it (`SCM_RIGHTS`), by index into the image's objects.
    pub(crate) rights: Vec<usize>,
}

impl Socket {
    /// Whether messages have no bounds.
    pub(crate) fn is_stream(&self) -> bool {
        self.kind == libc::SOCK_STREAM
    }

    pub(crate) fn is_unix(&self) -> bool {
        self.domain == libc::AF_UNIX
    }

    /// Whether its name is its own, and not that of the socket which it was accepted from.
    pub(crate) fn has_own_name(&self) -> bool {
        self.kind == libc::SOCK_DGRAM && !self.local.is_empty()
    }

    /// What a unix socket is bound to: name and file.
    pub(crate) fn bound(&self) -> (&[u8], Option<u64>) {
        (&self.local, self.file)
    }

    pub(crate) fn is_tcp(&self) -> bool {
        !self.is_unix() && self.is_stream()
    }

    /// Whether what waits in it is part of the image. What the kernel tells by netlink can be asked again, and packets that
    /// nobody expects may be lost as on any network.
    pub(crate) fn keeps_queue(&self) -> bool {
        self.is_unix() || self.is_tcp() || self.is_udp()
    }

    pub(crate) fn is_udp(&self) -> bool {
        let datagrams = matches!(self.protocol, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE);
        let inet = matches!(self.domain, libc::AF_INET | libc::AF_INET6);
        inet && datagrams && self.kind == libc::SOCK_DGRAM
    }

    /// Whether its filter cannot be changed.
    pub(crate) fn is_locked(&self) -> bool {
        let mut settings = self.options.iter();
        settings.any(|s| {
            (s.level, s.name) == (libc::SOL_SOCKET, libc::SO_LOCK_FILTER) && s.value != [0; 4]
        })
    }

    pub(crate) fn listens(&self) -> bool {
        matches!(self.state, State::Listening { .. })
    }

    pub(crate) fn peer(&self) -> Option<usize> {
        match self.state {
            State::Connected { peer } => Some(peer),
            _ => None,
        }
    }

    /// The objects in flight that wait in it.
    pub(crate) fn in_flight(&self) -> impl Iterator<Item = usize> + '_ {
        self.queue.iter().flat_map(|m| m.rights.iter().copied())
    }

    /// Whether what waits in two sockets, of two images, is the same. Of files in flight that cannot be told.
    pub(crate) fn has_same_queue(&self, other: &Self) -> bool {
        self.queue == other.queue && self.in_flight().next().is_none()
    }

    /// The sockets that this one names.
    pub(crate) fn related(&self) -> Vec<usize> {
        match &self.state {
            State::Connected { peer } => vec![*peer],
            State::Listening { pending, .. } => pending.iter().filter_map(|p| p.client).collect(),
            _ => Vec::new(),
        }
    }

    /// Gives the objects that it names new numbers; `number` says false of those that are gone.
    pub(crate) fn renumber(&mut self, number: impl Fn(&mut usize) -> bool) {
        for message in &mut self.queue {
            message.rights.retain_mut(&number);
        }
        let orphaned = match &mut self.state {
            State::Connected { peer } => !number(peer),
            State::Listening { pending, .. } => {
                for one in pending {
                    if !one.client.as_mut().is_none_or(&number) {
                        (one.client, one.known) = (None, false);
                    }
                }
                false
            }
            _ => false,
        };
        if orphaned {
            self.state = State::Orphaned;
        }
    }
}
