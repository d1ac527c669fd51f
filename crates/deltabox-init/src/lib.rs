//! The messages between a sandbox's init (the binary of this crate) and the supervisor.
//!
//! They travel on `SOCK_SEQPACKET` socket pairs, descriptors beside them as `SCM_RIGHTS`. Both sides treat what they
//! receive as hostile: every length is checked, every message bounded.

mod codec;
mod message;
pub mod wire;

pub use message::{Event, FilePart, Reply, Request, Setup, Spawn, Step};
