//! Raw system calls of the engine, each behind a safe function.

pub(crate) mod arena;
pub(crate) mod fd;
pub(crate) mod ipc;
pub(crate) mod keeper;
pub(crate) mod lend;
pub(crate) mod pagemap;
pub(crate) mod process;
pub(crate) mod ptrace;
pub(crate) mod socket;
pub(crate) mod uffd;
pub(crate) mod vm;
