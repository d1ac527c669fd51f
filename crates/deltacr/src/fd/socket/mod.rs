//! Sockets: unix, TCP and UDP within the sandbox, netlink.
//!
//! Connections have two ends. They stay if both ends are where they should be; what waits in their
//! queues is then taken out and sent anew. Otherwise both ends are built again.

mod address;
mod capture;
mod connect;
mod diag;
mod inet;
mod model;
mod options;
mod plan;
mod queue;
mod repair;
mod restore;
mod settle;
mod tcp;
mod unix;
mod waiting;

pub(crate) use capture::{capture, name_makers, open_queues, relate};
pub(crate) use model::{Maker, Socket};
pub(crate) use plan::{alike, verify};
pub(crate) use waiting::read_waiting;
