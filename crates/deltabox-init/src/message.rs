//! What is said, and its form on the wire.

use std::ops::Range;

use crate::codec::{Reader, Writer};

/// From the supervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The first message: build the sandbox. Comes with the descriptors that [`Setup`] names.
    Setup(Setup),
    /// Start a command; answered by [`Reply::Pid`]. Comes with standard input, output and error, or with the
    /// terminal alone.
    Spawn(Spawn),
    /// Make the next process or thread in the sandbox get this number; answered by [`Reply::Done`].
    SetNextPid(i32),
    /// Give birth to a waiting process with this number; answered by [`Reply::Pid`] with its number.
    Birth(i32),
    /// Send a signal to a process group; answered by [`Reply::Done`].
    Signal {
        /// The group's number inside.
        group: i32,
        /// The signal.
        signal: i32,
    },
    /// Reap every dead child and report it as an event, then answer [`Reply::Done`].
    Sync,
    /// The first message to one that is to be a template, outside every sandbox; answered by [`Reply::Done`]. It understands the
    /// requests below, and init those above.
    Template {
        /// Seccomp programs for the processes that it gives birth to, as in [`Setup`].
        filters: Vec<Vec<u8>>,
    },
    /// Map private anonymous memory at these addresses; answered by [`Reply::Done`].
    Hold(Vec<Range<u64>>),
    /// Make large pages of the small ones in these ranges, as far as that can be; answered by [`Reply::Done`].
    Collapse(Vec<Range<u64>>),
    /// Give birth to a waiting process in a sandbox, which has all that this one has mapped. Comes with a pidfd of the
    /// sandbox's init, the payload's cgroup (a directory), and the `cgroup.procs` files of the version 1 hierarchies to
    /// join. Answered by the new process with [`Reply::Pid`].
    Fork {
        /// Its number inside.
        pid: i32,
        /// A number that is free inside, for a process that ends at once.
        mother: i32,
        /// Memory that it is to have for itself at once, as if it had written to it.
        touch: Vec<Range<u64>>,
    },
    /// To a template: map these parts of files at these addresses, privately. Comes with the files. Answered by [`Reply::Done`].
    HoldFiles(Vec<FilePart>),
    /// To a template: give memory these `PROT_*` bits; answered by [`Reply::Done`].
    Protect {
        /// The bits.
        prot: i32,
        /// The memory.
        ranges: Vec<Range<u64>>,
    },
    /// To a template: undo mappings.
    Unmap(Vec<Range<u64>>),
    /// To a template: make this memory zeros.
    Empty(Vec<Range<u64>>),
    /// To a template: make another one that is like it, which serves the control socket that comes with this. Answered with
    /// its pid, as the template sees it.
    Derive,
}

/// A part of a file and where it is to be mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilePart {
    /// Where.
    pub range: Range<u64>,
    /// Where in the file it begins.
    pub offset: u64,
    /// `PROT_*` bits.
    pub prot: i32,
    /// Which of the descriptors that come with the message the file is.
    pub file: u32,
}

/// How the sandbox is to be built.
///
/// Descriptors with it, in this order: the events socket, the root mount, init's cgroup, the payload's cgroup (directories), `/proc/sys/kernel/ns_last_pid` for writing, then the `cgroup.procs` files of
/// version 1 hierarchies that the sandbox is to join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// The user and group id outside that is 0 inside.
    pub first_id: u32,
    /// How many ids are mapped.
    pub ids: u32,
    /// The host name inside.
    pub hostname: Vec<u8>,
    /// What is written to `/proc/PID/timens_offsets` of a time namespace of its own; it has none if this is empty.
    pub clock_offsets: Vec<u8>,
    /// Seccomp programs for the payload: `struct sock_filter` arrays, installed in this order.
    pub filters: Vec<Vec<u8>>,
}

/// A command to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spawn {
    /// Program and arguments.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value` each. The program is looked up in its `PATH`.
    pub env: Vec<Vec<u8>>,
    /// Working directory.
    pub cwd: Vec<u8>,
    /// User id inside.
    pub uid: u32,
    /// Group id inside.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Whether the one descriptor with it is a terminal, to become the controlling one.
    pub tty: bool,
}

/// What init was doing when a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Understanding the request.
    Request,
    /// Building the sandbox; the text says which part.
    Setup,
    /// Making the process.
    Clone,
    /// Preparing it: descriptors, terminal, limits, capabilities, filter.
    Prepare,
    /// Taking on the user's identity.
    User,
    /// Changing to its working directory.
    Cwd,
    /// Executing the program.
    Exec,
}

/// From init, in answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The first half of setup: init exists; its pid as the supervisor sees it.
    Created(i32),
    /// The request was carried out.
    Done,
    /// A process was made; its pid inside.
    Pid(i32),
    /// It was not done.
    Failed {
        /// Where it went wrong.
        step: Step,
        /// Why.
        errno: i32,
        /// On what, in words.
        what: Vec<u8>,
    },
}

/// From init, unasked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A process whose parent is init ended.
    Exited {
        /// Its pid inside.
        pid: i32,
        /// As `wait(2)` tells it.
        status: i32,
    },
}

impl Request {
    /// To the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        match self {
            Self::Setup(s) => {
                w.u8(0);
                w.u32(s.first_id);
                w.u32(s.ids);
                w.bytes(&s.hostname);
                w.bytes(&s.clock_offsets);
                w.list(&s.filters);
            }
            Self::Spawn(s) => {
                w.u8(1);
                w.list(&s.argv);
                w.list(&s.env);
                w.bytes(&s.cwd);
                w.u32(s.uid);
                w.u32(s.gid);
                w.u32(s.groups.len() as u32);
                s.groups.iter().for_each(|g| w.u32(*g));
                w.u8(s.tty.into());
            }
            Self::SetNextPid(pid) => {
                w.u8(2);
                w.i32(*pid);
            }
            Self::Birth(pid) => {
                w.u8(3);
                w.i32(*pid);
            }
            Self::Sync => w.u8(4),
            Self::Signal { group, signal } => {
                w.u8(5);
                w.i32(*group);
                w.i32(*signal);
            }
            Self::Template { filters } => {
                w.u8(6);
                w.list(filters);
            }
            Self::Hold(ranges) => {
                w.u8(7);
                w.ranges(ranges);
            }
            Self::Collapse(ranges) => {
                w.u8(8);
                w.ranges(ranges);
            }
            Self::Fork { pid, mother, touch } => {
                w.u8(9);
                w.i32(*pid);
                w.i32(*mother);
                w.ranges(touch);
            }
            Self::Unmap(ranges) => {
                w.u8(10);
                w.ranges(ranges);
            }
            Self::Empty(ranges) => {
                w.u8(11);
                w.ranges(ranges);
            }
            Self::Derive => w.u8(12),
            Self::HoldFiles(parts) => {
                w.u8(13);
                w.u32(parts.len() as u32);
                for part in parts {
                    w.u64(part.range.start);
                    w.u64(part.range.end);
                    w.u64(part.offset);
                    w.i32(part.prot);
                    w.u32(part.file);
                }
            }
            Self::Protect { prot, ranges } => {
                w.u8(14);
                w.i32(*prot);
                w.ranges(ranges);
            }
        }
        w.0
    }

    /// From the wire; `None` if it is malformed.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader(bytes);
        let request = match r.u8()? {
            0 => Self::Setup(Setup {
                first_id: r.u32()?,
                ids: r.u32()?,
                hostname: r.bytes()?,
                clock_offsets: r.bytes()?,
                filters: r.list()?,
            }),
            1 => Self::Spawn(Spawn {
                argv: r.list()?,
                env: r.list()?,
                cwd: r.bytes()?,
                uid: r.u32()?,
                gid: r.u32()?,
                groups: (0..r.count(4)?).map(|_| r.u32()).collect::<Option<_>>()?,
                tty: r.u8()? != 0,
            }),
            2 => Self::SetNextPid(r.i32()?),
            3 => Self::Birth(r.i32()?),
            4 => Self::Sync,
            5 => Self::Signal {
                group: r.i32()?,
                signal: r.i32()?,
            },
            6 => Self::Template { filters: r.list()? },
            7 => Self::Hold(r.ranges()?),
            8 => Self::Collapse(r.ranges()?),
            9 => Self::Fork {
                pid: r.i32()?,
                mother: r.i32()?,
                touch: r.ranges()?,
            },
            10 => Self::Unmap(r.ranges()?),
            11 => Self::Empty(r.ranges()?),
            12 => Self::Derive,
            13 => {
                let part = |r: &mut Reader<'_>| {
                    Some(FilePart {
                        range: r.u64()?..r.u64()?,
                        offset: r.u64()?,
                        prot: r.i32()?,
                        file: r.u32()?,
                    })
                };
                let count = r.count(32)?;
                Self::HoldFiles((0..count).map(|_| part(&mut r)).collect::<Option<_>>()?)
            }
            14 => Self::Protect {
                prot: r.i32()?,
                ranges: r.ranges()?,
            },
            _ => return None,
        };
        r.end().map(|()| request)
    }
}

impl Step {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Setup,
        Self::Clone,
        Self::Prepare,
        Self::User,
        Self::Cwd,
        Self::Exec,
    ];

    /// To the wire.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// From the wire.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }
}

impl Reply {
    /// To the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        match self {
            Self::Created(pid) => {
                w.u8(0);
                w.i32(*pid);
            }
            Self::Done => w.u8(1),
            Self::Pid(pid) => {
                w.u8(2);
                w.i32(*pid);
            }
            Self::Failed { step, errno, what } => {
                w.u8(3);
                w.u8(step.code());
                w.i32(*errno);
                w.bytes(what);
            }
        }
        w.0
    }

    /// From the wire; `None` if it is malformed.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader(bytes);
        let reply = match r.u8()? {
            0 => Self::Created(r.i32()?),
            1 => Self::Done,
            2 => Self::Pid(r.i32()?),
            3 => Self::Failed {
                step: Step::from_code(r.u8()?)?,
                errno: r.i32()?,
                what: r.bytes()?,
            },
            _ => return None,
        };
        r.end().map(|()| reply)
    }
}

impl Event {
    /// To the wire.
    pub fn encode(&self) -> Vec<u8> {
        let Self::Exited { pid, status } = self;
        let mut w = Writer::default();
        w.i32(*pid);
        w.i32(*status);
        w.0
    }

    /// From the wire; `None` if it is malformed.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader(bytes);
        let event = Self::Exited {
            pid: r.i32()?,
            status: r.i32()?,
        };
        r.end().map(|()| event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spawn() -> Request {
        Request::Spawn(Spawn {
            argv: vec![b"sh".to_vec(), b"-c".to_vec(), vec![]],
            env: vec![b"A=b".to_vec()],
            cwd: b"/".to_vec(),
            uid: 1,
            gid: 2,
            groups: vec![3, 4],
            tty: true,
        })
    }

    #[test]
    fn a_request_comes_back_as_it_was_sent() {
        let setup = Request::Setup(Setup {
            first_id: 7,
            ids: 65536,
            hostname: b"box".to_vec(),
            clock_offsets: b"monotonic 1 2\n".to_vec(),
            filters: vec![vec![0; 16], vec![]],
        });
        for r in [
            setup,
            spawn(),
            Request::Birth(-1),
            Request::Sync,
            Request::SetNextPid(3),
            Request::Template {
                filters: vec![vec![1; 8]],
            },
            Request::Hold(vec![4096..8192, 1 << 46..1 << 47]),
            Request::Collapse(vec![]),
            Request::Fork {
                pid: 5,
                mother: 6,
                touch: vec![4096..8192, 0..4096],
            },
            Request::Unmap(vec![4096..8192, 1 << 46..1 << 47]),
            Request::Empty(vec![]),
            Request::HoldFiles(vec![FilePart {
                range: 4096..8192,
                offset: 1 << 40,
                prot: 5,
                file: 3,
            }]),
            Request::Protect {
                prot: 1,
                ranges: vec![4096..8192, 1 << 46..1 << 47],
            },
            Request::Derive,
        ] {
            assert_eq!(Request::decode(&r.encode()), Some(r));
        }
    }

    #[test]
    fn no_cut_or_changed_message_makes_the_reader_panic() {
        let whole = spawn().encode();
        for n in 0..whole.len() {
            assert_eq!(Request::decode(&whole[..n]), None);
            let mut changed = whole.clone();
            changed[n] ^= 0xff;
            let _ = Request::decode(&changed);
            let _ = Reply::decode(&changed[n..]);
            let _ = Event::decode(&changed[n..]);
        }
    }

    #[test]
    fn a_count_larger_than_the_message_is_refused() {
        let mut m = vec![1];
        m.extend_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Request::decode(&m), None);
    }
}
