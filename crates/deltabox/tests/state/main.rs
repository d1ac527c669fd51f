//! Checkpoint, rollback and fork of real programs in real sandboxes.
#![cfg(target_os = "linux")]

mod clocks;
mod equivalence;
mod faults;
mod images;
mod lab;
mod refusals;
mod servers;
mod sessions;
mod storm;
mod ticks;
mod transparency;
mod walk;
mod work;
