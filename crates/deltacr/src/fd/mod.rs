//! Open files of a process tree: capture, and reconcile in place or into new processes.
//!
//! The unit is the *open file object*, shared by the slots of one or more descriptor tables. A
//! restore pairs the objects that should be there with those that are ([`plan`]): what can stay
//! stays, with its contents and settings put right; what is missing is made anew; only slots
//! that differ are touched.

mod capture;
mod epoll;
mod event;
mod fdinfo;
mod guise;
mod inside;
mod install;
mod lease;
mod lock;
mod make;
mod model;
mod path;
mod pipe;
mod plan;
mod process;
mod procfs;
mod restore;
mod settle;
mod socket;
mod table;
mod tty;
mod unread;
mod watch;

use std::collections::BTreeMap;

use crate::ids::InnerPid;
use crate::remote::Remote;

pub use capture::{capture, survey};
pub use inside::look_inside;
pub use model::Descriptors;
pub use path::Prepared;
pub(crate) use path::Removed;
pub(crate) use procfs::{stays, told_of};
pub use restore::{check, restore};
pub(crate) use table::KnownSlots;
pub(crate) use tty::make_master;

/// The stopped processes of a tree.
pub type Procs<'a> = BTreeMap<InnerPid, &'a mut Remote>;
