//! Knowing which pages a process wrote since a known state.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::error::{During, Result};
use crate::mem::ahead::Ahead;
use crate::mem::lazy::Lazy;
use crate::mem::{AddressSpace, PAGE, merged, overlap};
use crate::procfs::OpenFiles;
use crate::remote::{Batch, Remote};
use crate::sys::pagemap::{self, Pagemap};
use crate::sys::uffd;

/// Written runs less than this far apart are write-protected by one call: the span of one
/// page table.
const NEAR: u64 = 2 << 20;

/// How an error names the beginning.
const DOING: &str = "starting to track written pages";

/// Tracks which pages of a process are written, by a `userfaultfd` with asynchronous write
/// protection that was made in the process and is kept by us only. Dropping it ends the tracking.
#[derive(Debug)]
pub struct Tracker {
    uffd: OwnedFd,
    base: Arc<AddressSpace>,
    /// What is given back while the process runs. Its ranges are not tracked: they count as written.
    lazy: Option<Lazy>,
    /// What was taken from the record of written pages since the base.
    ahead: Ahead,
    /// How many page faults the process had had when it was last asked.
    faults: u64,
}

impl Tracker {
    /// The state that the process was in when its written pages were last forgotten. Everything
    /// written since is found by a scan.
    pub fn base(&self) -> &Arc<AddressSpace> {
        &self.base
    }

    /// Begins to track a stopped process, which is in state `base`.
    pub(crate) fn attach(remote: &mut Remote, base: Arc<AddressSpace>) -> Result<Self> {
        let pid = remote.pid();
        let made = Self::make(remote, base).and_then(|made| {
            // Why none was made.
            made.ok_or_else(|| io::Error::from_raw_os_error(libc::EMFILE))
        });
        made.during(pid, DOING)
    }

    /// The same; none if the process may have no more descriptors, not even for a moment.
    fn attach_if_room(remote: &mut Remote, base: Arc<AddressSpace>) -> Result<Option<Self>> {
        let pid = remote.pid();
        Self::make(remote, base).during(pid, DOING)
    }

    fn make(remote: &mut Remote, base: Arc<AddressSpace>) -> io::Result<Option<Self>> {
        let mut make = Batch::new();
        let flags = libc::O_CLOEXEC | pagemap::USER_MODE_ONLY;
        let made = make.call(libc::SYS_userfaultfd, &[flags.into()]);
        let there = match remote.with_numbers(|remote| remote.run(&make)?.result(made)) {
            Err(e) if e.raw_os_error() == Some(libc::EMFILE) => return Ok(None),
            there => there? as i32,
        };
        let uffd = remote.take_fd(there);
        let mut close = Batch::new();
        close.call(libc::SYS_close, &[there.into()]);
        remote.run(&close)?;
        let uffd = uffd?;
        pagemap::enable_write_tracking(uffd.as_fd())?;
        Ok(Some(Self {
            uffd,
            base,
            lazy: None,
            ahead: Ahead::default(),
            faults: 0,
        }))
    }

    /// Tracks these mappings too. Fails with `ENOMEM` if the process has another address space
    /// now: it ran another program.
    fn extend(&self, vmas: &[Range<u64>]) -> io::Result<()> {
        for range in merged(vmas.to_vec(), 0) {
            if self.track(&range)? {
                continue;
            }
            for vma in vmas.iter().filter(|v| overlap(v, &range).is_some()) {
                if !self.track(vma)? {
                    // It counts as written each time.
                    tracing::debug!("writes to {vma:x?} cannot be tracked");
                }
            }
        }
        Ok(())
    }

    /// Whether the process, of which `files` are open, is likely to have written `least` pages since it was last asked: each
    /// costs it a page fault. So do others, and those that were given back.
    pub(crate) fn is_worth_a_look(&mut self, files: &OpenFiles, least: u64) -> bool {
        let vmas = self.base.vmas.iter();
        let plain = vmas.filter(|vma| vma.is_private() && vma.is_anonymous());
        let bytes: u64 = plain.map(|vma| vma.end - vma.start).sum();
        if bytes / PAGE < least {
            return false;
        }
        let Ok(faults) = files.page_faults() else {
            return false;
        };
        let before = std::mem::replace(&mut self.faults, faults);
        self.lazy.is_some() || faults.saturating_sub(before) >= least
    }

    /// What was taken from the record of written pages since the base.
    pub(crate) fn ahead(&self) -> &Ahead {
        &self.ahead
    }

    pub(crate) fn ahead_mut(&mut self) -> &mut Ahead {
        &mut self.ahead
    }

    /// Does not track this range any more.
    pub(crate) fn leave(&self, range: &Range<u64>) -> io::Result<()> {
        uffd::unregister(self.uffd.as_fd(), range)
    }

    /// Part of the memory is given back while the process runs.
    pub(crate) fn set_lazy(&mut self, lazy: Lazy) {
        self.lazy = Some(lazy);
    }

    /// Whether memory may still be to be given back.
    #[cfg(test)]
    pub(crate) fn is_lazy(&self) -> bool {
        self.lazy.is_some()
    }

    /// The process runs on from a rollback. To be called by the thread that made it.
    pub(crate) fn run_on(&mut self) {
        self.lazy.iter_mut().for_each(Lazy::run_on);
    }

    /// Waits until all memory is back.
    pub(crate) fn finish(&mut self) {
        if let Some(lazy) = &mut self.lazy {
            lazy.finish();
        }
    }

    /// The process stands still: what was given back while it ran is from now on like all its memory.
    pub(crate) fn end_lazy(&mut self, remote: &mut Remote) -> Result<()> {
        let lazy = self.lazy.take();
        lazy.map_or(Ok(()), |lazy| lazy.end(remote, self.uffd.as_fd()))
    }

    /// Tracks this range from now on, all pages of which count as written, whatever was known of them.
    pub(crate) fn track_anew(&self, range: &Range<u64>, pagemap: &mut Pagemap) -> io::Result<()> {
        if !self.track(range)? {
            return Ok(());
        }
        let mut marked = Vec::new();
        if let Err(error) = pagemap.marked(range.clone(), &mut marked) {
            self.leave(range)?;
            return Err(error);
        }
        marked.iter().for_each(|run| self.unmark(run));
        Ok(())
    }

    /// From now on all pages of the range count as written.
    pub(crate) fn unmark(&self, range: &Range<u64>) {
        if uffd::unprotect(self.uffd.as_fd(), range).is_err() {
            // A part of it is gone or cannot be tracked. So none of it is, which takes the marks from the rest; where that fails, there
            // is nothing that is tracked.
            let _ = self.leave(range);
        }
    }

    /// Tells whether the kernel can track this range; it cannot with some of its special mappings.
    fn track(&self, range: &Range<u64>) -> io::Result<bool> {
        match pagemap::track_writes(self.uffd.as_fd(), range) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOMEM) => Err(e),
            Err(_) => Ok(false),
        }
    }
}

/// What is to be done to make a process count as unchanged.
#[derive(Debug, Default)]
pub(crate) struct Reset {
    /// Private mappings that are not tracked yet.
    pub(crate) untracked: Vec<Range<u64>>,
    /// Runs of pages that count as written.
    pub(crate) written: Vec<Range<u64>>,
    /// Runs of pages that are marked as not written, though nobody tracks them. A mapping that is moved loses its tracking and its marks; if it
    /// joins another, that loses its tracking as well, but not its marks. Such a page may be written without losing its mark.
    pub(crate) stale: Vec<Range<u64>>,
}

/// Makes the process, which is in state `base` and has this page map, count as unchanged from now on, but for its written
/// pages if they are fewer than `protect`. If that fails, or the process may have no more descriptors, it is left without a tracker, so
/// that everything counts as changed.
pub(crate) fn reset(
    remote: &mut Remote,
    tracker: &mut Option<Tracker>,
    base: Arc<AddressSpace>,
    reset: Reset,
    pagemap: &mut Pagemap,
    protect: u64,
) -> Result<()> {
    let pid = remote.pid();
    let kept = tracker.take().map(|t| Tracker {
        uffd: t.uffd,
        base: Arc::clone(&base),
        lazy: t.lazy,
        ahead: Ahead::default(),
        faults: t.faults,
    });
    let new = match kept.filter(|t| t.extend(&reset.untracked).is_ok()) {
        Some(kept) => kept,
        None => {
            let Some(new) = Tracker::attach_if_room(remote, base)? else {
                return Ok(());
            };
            let extended = new.extend(&reset.untracked);
            extended.during(pid, "tracking written pages")?;
            new
        }
    };
    let doing = "forgetting the written pages";
    for run in merged(reset.stale, 0) {
        new.unmark(&run);
    }
    let written = merged(reset.written, 0);
    let bytes: u64 = written.iter().map(|run| run.end - run.start).sum();
    if bytes / PAGE >= protect {
        for range in merged(written, NEAR) {
            pagemap.protect_written(range).during(pid, doing)?;
        }
    }
    *tracker = Some(new);
    Ok(())
}
