//! Dropping pages of a process while it runs: only what shares its memory can.

use std::io;
use std::ops::Range;

use crate::env::Environment;
use crate::orphan::{Orphan, Orphans, Purpose};
use crate::remote::{Batch, Remote};

/// A process that drops pages when it is told to, and ends. Waited for when dropped.
#[derive(Debug)]
pub(crate) struct Sweeper(Orphan);

impl Sweeper {
    /// Makes one that drops the pages of these ranges of a stopped process. `place` is where it may keep its notes: a page
    /// that nobody else uses until it has ended.
    ///
    /// # Errors
    /// No process can be made in the sandbox, or the original died.
    pub(crate) fn make(
        original: &mut Remote,
        place: u64,
        ranges: &[Range<u64>],
        (env, all): (&dyn Environment, &Orphans),
    ) -> io::Result<Self> {
        let mut sweep = Batch::new();
        sweep.call(libc::SYS_setsid, &[]);
        for range in ranges {
            let len = range.end - range.start;
            let args = [range.start.into(), len.into(), libc::MADV_DONTNEED.into()];
            sweep.call(libc::SYS_madvise, &args);
        }
        sweep.call(libc::SYS_exit_group, &[0.into()]);
        let purpose = Purpose {
            share: libc::CLONE_VM,
            calls: &sweep,
            place: Some(place),
        };
        Orphan::make(original, env, all, &purpose).map(Self)
    }

    /// Lets it begin; to be called by the thread that made it.
    pub(crate) fn begin(&mut self) {
        self.0.begin();
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.begin();
        self.0.await_end();
    }
}
