//! A copy-on-write snapshot of a stopped process' memory: a process of its own that only waits.
//!
//! Copying page tables takes a twentieth of the time of copying pages, so of much memory a snapshot is taken while the
//! process stands still, and the pages are read from it while the process runs on. Whoever kills it makes the checkpoint
//! fail, not wrong.

use std::fs::File;
use std::io;

use crate::ids::HostPid;
use crate::orphan::{Orphan, Orphans, Purpose};
use crate::remote::{Batch, Remote};

/// The memory of a process as it was. Ends with its process when dropped.
#[derive(Debug)]
pub(crate) struct Snapshot {
    orphan: Orphan,
    /// `/proc/PID/mem`. Unlike `process_vm_readv(2)`, which pins pages and must not pin shared ones, reading it does
    /// not make copies of the pages in the snapshot.
    memory: File,
}

impl Snapshot {
    /// Takes a snapshot of a stopped process, but of the ranges that it keeps from its children (`MADV_DONTFORK`,
    /// `MADV_WIPEONFORK`).
    ///
    /// # Errors
    /// No process can be made in the sandbox, or the original died.
    pub(crate) fn take(original: &mut Remote, all: &Orphans) -> io::Result<Self> {
        let mut wait = Batch::new();
        // Neither a signal to the session or group of the original, nor the end of its terminal is meant for it.
        wait.call(libc::SYS_setsid, &[]);
        wait.call(libc::SYS_pause, &[]);
        wait.call(libc::SYS_exit_group, &[0.into()]);
        let purpose = Purpose {
            share: 0,
            calls: &wait,
            place: None,
        };
        let orphan = Orphan::make(original, all, &purpose)?;
        let memory = File::open(format!("/proc/{}/mem", orphan.host()))?;
        Ok(Self { orphan, memory })
    }

    /// The snapshot's process.
    pub(crate) fn host(&self) -> HostPid {
        self.orphan.host()
    }

    /// To read the memory by (at the offset of the address).
    pub(crate) fn memory(&self) -> &File {
        &self.memory
    }
}
