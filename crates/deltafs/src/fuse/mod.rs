//! A thin FUSE transport: the wire format, the mount and its threads, and the handlers of the requests.
//!
//! What a general library does not give is what makes it fast: neither files nor directories are "opened" at
//! all (`FUSE_NO_OPEN_SUPPORT`), and the kernel keeps entries, attributes, listings and pages until it is told otherwise.

mod absent;
mod barrier;
mod company;
mod control;
mod crew;
mod data_ops;
mod desk;
mod init;
mod kernel;
mod name_ops;
mod notify;
mod outer;
mod ring;
mod server;
mod session;
mod settle;
mod wire;

pub(crate) use absent::Absent;
pub(crate) use barrier::Barrier;
pub(crate) use kernel::Kernel;
pub(crate) use notify::Notice;
pub(crate) use server::Server;

pub use desk::{Channel, Service};
pub use ring::io_uring_is_offered;
pub use session::Session;
pub(crate) use settle::{Settler, refresh_size};
