//! The `deltabox` program as a user meets it. Every test has a state directory of its own, and so a service.

mod durable;
mod faults;
mod harness;
mod quota;
mod state;
mod streams;
mod terminal;
mod usage;
