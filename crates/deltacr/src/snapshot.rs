//! A copy-on-write snapshot of a stopped process' memory.
//!
//! Copying page tables takes a twentieth of the time of copying pages, so of much memory a snapshot is taken while the
//! process stands still, and the pages are read from it while the process runs on. Only a fork copies page tables, but
//! nobody in the sandbox sees the child: it has ended before anybody runs on, and its address space is
//! [kept](Keeper) without it.

use std::fs::File;
use std::io;
use std::ops::Range;

use crate::birth::spawn;
use crate::env::Environment;
use crate::ids::{HostPid, InnerPid};
use crate::remote::{Batch, Remote, block_signals};
use crate::sys::keeper::Keeper;
use crate::sys::pagemap::Pagemap;
use crate::sys::process;

/// What the child shares, so that nothing is copied, or closed at its end, for nothing.
const SHARED: i32 = libc::CLONE_FILES | libc::CLONE_FS;

/// The memory of a process as it was.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// `/proc/PID/mem`. Unlike `process_vm_readv(2)`, which pins pages and must not pin shared ones, reading it does
    /// not make copies of the pages in the snapshot.
    memory: File,
    maps: File,
    pagemap: Pagemap,
    _keeper: Keeper,
}

impl Snapshot {
    /// Takes a snapshot of a stopped process, but of the ranges that it keeps from its children (`MADV_DONTFORK`,
    /// `MADV_WIPEONFORK`), and of the whole mappings `left_out`. The next process in the sandbox gets the number that it would have got.
    ///
    /// # Errors
    /// No process can be made in the sandbox, the original died, or there is no `userfaultfd`.
    pub(crate) fn take(
        original: &mut Remote,
        env: &dyn Environment,
        left_out: &[Range<u64>],
    ) -> io::Result<Self> {
        let child = spawn::clone_through(original, SHARED)?;
        let taken = leave_out(original, child, left_out).and_then(|()| Self::of(child));
        let number = child.inner();
        // Nobody has waited for it, so the number is still its own.
        process::thread_signal(child, child, libc::SIGKILL)?;
        spawn::await_end(child)?;
        let number = number?;
        spawn::reap(original, &[number])?;
        if let Err(error) = env.set_next_pid(number) {
            tracing::debug!(%error, "the next process gets another number");
        }
        taken
    }

    fn of(host: HostPid) -> io::Result<Self> {
        Ok(Self {
            memory: File::open(format!("/proc/{host}/mem"))?,
            maps: File::open(format!("/proc/{host}/maps"))?,
            pagemap: Pagemap::open(host)?,
            _keeper: Keeper::of(host)?,
        })
    }

    /// To read the memory by (at the offset of the address).
    pub(crate) fn memory(&self) -> &File {
        &self.memory
    }

    /// What it has mapped, and which pages it has there.
    pub(crate) fn maps(&mut self) -> (&File, &mut Pagemap) {
        (&self.maps, &mut self.pagemap)
    }
}

/// Unmaps mappings in the child. An address space that ends writes the changes of a file that it maps, and waits for whoever serves the
/// file, which may be this process; but where this process is killed, its own end is the end of the address space, and would wait for itself.
fn leave_out(original: &Remote, child: HostPid, mappings: &[Range<u64>]) -> io::Result<()> {
    if mappings.is_empty() {
        return Ok(());
    }
    block_signals(child)?;
    let mut copy = Remote::new(InnerPid::default(), child, original.area_address())?;
    let mut rest = mappings;
    while !rest.is_empty() {
        let mut batch = Batch::new();
        let mut calls = Vec::new();
        while let Some((range, others)) = rest.split_first().filter(|_| batch.fits(1, 0)) {
            let args = [range.start.into(), (range.end - range.start).into()];
            calls.push(batch.call(libc::SYS_munmap, &args));
            rest = others;
        }
        let outcome = copy.run(&batch)?;
        calls
            .into_iter()
            .try_for_each(|call| outcome.result(call).map(drop))?;
    }
    Ok(())
}
