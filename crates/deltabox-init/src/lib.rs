//! The messages between a sandbox's init (the binary of this crate) and the supervisor.
//!
//! They travel on `SOCK_SEQPACKET` socket pairs, descriptors beside them as `SCM_RIGHTS`. Both sides treat what they
//! receive as hostile: every length is checked, every message bounded.

mod codec;
mod message;
pub mod wire;

/// Capabilities that processes in the sandbox may have, those of Docker's default: CHOWN, DAC_OVERRIDE, FOWNER, FSETID,
/// KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, NET_RAW, SYS_CHROOT, MKNOD, AUDIT_WRITE, SETFCAP.
pub const CAPABILITIES: [i32; 14] = [0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31];

pub use message::{Event, FilePart, Reply, Request, Setup, Spawn, Step};
