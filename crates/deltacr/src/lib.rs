//! DeltaCR: incremental, in-place checkpoint and rollback of live process trees.
//!
//! Stock kernel, no CRIU, no cooperation of the programs. See `docs/deltacr.md`.

mod attributes;
pub mod env;
mod error;
pub mod fd;
mod freeze;
pub mod ids;
pub mod mem;
mod procfs;
pub mod remote;
mod resume;
mod signals;
pub mod stop;
pub mod store;
mod sys;
mod threads;

pub use error::{During, Error, Result};
