//! The image of a socket.

use serde::{Deserialize, Serialize};

/// A socket of the unix or an internet family.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Socket {
    /// Inode number at capture.
    pub(crate) inode: u64,
    /// `AF_UNIX`, `AF_INET`, `AF_INET6` or `AF_NETLINK`.
    pub(crate) domain: i32,
    /// `SOCK_STREAM`, `SOCK_DGRAM`, `SOCK_SEQPACKET` or `SOCK_RAW`.
    pub(crate) kind: i32,
    pub(crate) protocol: i32,
    pub(crate) options: Vec<Setting>,
    /// The address bound to, as the kernel's bytes; empty when there is none.
    pub(crate) local: Vec<u8>,
    /// The peer's address of an internet socket that is connected; empty when it is not.
    pub(crate) remote: Vec<u8>,
    /// Inode number of the file that a unix socket is bound to (its lower 32 bits).
    pub(crate) file: Option<u64>,
    pub(crate) state: State,
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
    /// Listening, with the other sides of connections that wait to be accepted, in the order of their coming
    /// where that is known.
    Listening { backlog: i32, pending: Vec<usize> },
    /// Connected to an object of the tree (an index into its objects). The connection may go one
    /// way only (datagrams) or wait to be accepted.
    Connected { peer: usize },
    /// The peer has closed its side; what it sent is in the queue.
    Orphaned,
    /// Both sides have closed the connection, and nothing is left to read.
    Ended,
    /// Connected to what is not in the tree.
    Outside,
}

/// A datagram, or a part of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Message {
    pub(crate) bytes: Vec<u8>,
    /// The sender's address; empty if it has none.
    pub(crate) from: Vec<u8>,
}

impl Socket {
    /// Whether messages have no bounds.
    pub(crate) fn is_stream(&self) -> bool {
        self.kind == libc::SOCK_STREAM
    }

    pub(crate) fn is_tcp(&self) -> bool {
        self.domain != libc::AF_UNIX && self.is_stream()
    }

    pub(crate) fn peer(&self) -> Option<usize> {
        match self.state {
            State::Connected { peer } => Some(peer),
            _ => None,
        }
    }

    /// The objects that this one names.
    pub(crate) fn related(&self) -> Vec<usize> {
        match &self.state {
            State::Connected { peer } => vec![*peer],
            State::Listening { pending, .. } => pending.clone(),
            _ => Vec::new(),
        }
    }

    /// Gives the objects that it names new numbers; `number` says false of those that are gone.
    pub(crate) fn renumber(&mut self, number: impl Fn(&mut usize) -> bool) {
        let orphaned = match &mut self.state {
            State::Connected { peer } => !number(peer),
            State::Listening { pending, .. } => {
                pending.retain_mut(number);
                false
            }
            _ => false,
        };
        if orphaned {
            self.state = State::Orphaned;
        }
    }
}
