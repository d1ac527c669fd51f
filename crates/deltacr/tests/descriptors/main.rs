//! Every kind of descriptor, in real processes: captured, changed by the process, restored.

mod events;
mod harness;
mod plain;
mod sockets;
