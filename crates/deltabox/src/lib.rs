//! DeltaBox: sandboxes whose whole state (files, processes, memory, sessions) can be checkpointed,
//! rolled back and forked in about a millisecond, on a stock Linux kernel.
//!
//! ```no_run
//! # fn main() -> deltabox::Result<()> {
//! let host = deltabox::Host::open(deltabox::HostConfig::default())?;
//! let sandbox = host.create(deltabox::SandboxSpec::default())?;
//! let before = sandbox.checkpoint(None)?.id;
//! sandbox.run(&["rm", "-rf", "/usr"])?;
//! sandbox.rollback(before)?;
//! # Ok(()) }
//! ```

mod cgroup;
mod clocks;
mod compactor;
mod container;
mod descendants;
mod doctor;
mod dormant;
mod durable;
mod early;
mod error;
mod generation;
mod ground;
mod host;
mod log;
mod memory;
mod names;
mod readers;
mod report;
mod sandbox;
mod seccomp;
mod session;
mod sessions;
mod sessions_image;
mod sessions_table;
mod spawn;
mod spec;
mod state;
mod streams;
mod sys;
mod templates;
mod users;
mod warm;

pub use deltacr::mem::Gears;
pub use error::{Error, Result};
pub use host::{Host, HostConfig};
pub use report::*;
pub use sandbox::{RunOutput, Sandbox};
pub use session::{Events, Session};
pub use spec::*;
