//! DeltaCR: incremental, in-place checkpoint and rollback of live process trees.
//!
//! Stock kernel, no CRIU, no cooperation of the programs. See `docs/deltacr.md`.

mod attributes;
mod background;
mod birth;
mod catch;
mod credentials;
mod describe;
mod disk;
mod end;
mod engine;
pub mod env;
mod error;
pub mod fd;
mod files;
mod freeze;
mod hold;
pub mod ids;
mod image;
mod interview;
mod keepers;
mod limits;
pub mod mem;
mod numbers;
mod openings;
mod orphan;
mod owners;
mod procfs;
mod programs;
mod reconcile;
pub mod remote;
mod resume;
mod signals;
mod snapshot;
pub mod stop;
mod stopwatch;
pub mod store;
mod sys;
mod sysv;
mod threads;
mod timers;
mod tracer;
mod twins;
mod verdict;
mod waits;
mod whereabouts;

pub use disk::{ImageInfo, verify_image};
pub use engine::{Checkpoint, Engine, Rollback, Switched};
pub use error::{During, Error, Result};
pub use hold::Deaths;
pub use image::{ProcessSummary, TreeImage};
pub use orphan::Orphans;
pub use stopwatch::{Phases, Stopwatch};
