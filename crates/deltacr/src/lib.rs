//! DeltaCR: incremental, in-place checkpoint and rollback of live process trees.
//!
//! Stock kernel, no CRIU, no cooperation of the programs. See `docs/deltacr.md`.

pub mod env;
mod error;
pub mod ids;
pub mod remote;
pub mod stop;
mod sys;

pub use error::{During, Error, Result};
