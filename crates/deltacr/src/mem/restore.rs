//! Taking a stopped process' memory to an earlier state, in place.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::error::{During, Error, Result};
use crate::mem::lazy;
use crate::mem::pages::{common, outside, put_back};
use crate::mem::plan::{Move, Plan, Step, plan};
use crate::mem::scan::Scan;
use crate::mem::tracker::Reset;
use crate::mem::{
    AddressSpace, Backing, Memory, Tracker, VERSIONED, Vma, addresses_of, layout, merged, overlap,
    pages_of, tracker, vmas,
};
use crate::openings::{self, Wanted};
use crate::remote::{Arg, Batch, CallId, Remote};
use crate::store::PageMap;

/// `MADV_GUARD_INSTALL` and `MADV_GUARD_REMOVE` (Linux 6.13).
const MADV_GUARD: [i32; 2] = [102, 103];
/// Descriptors that the process holds at once while files are mapped.
const FILES_AT_ONCE: usize = 64;
/// Mappings from this size on are not charged to the memory that the kernel has promised: they are
/// reservations, most of which is never touched.
const RESERVATION: u64 = 1 << 30;

impl Memory<'_> {
    /// Takes the memory of a stopped process, which was scanned in the same stop, to the state
    /// `target`. It becomes the state that the tracker knows; a process without a tracker gets one.
    /// Also builds the memory of a process whose program was just started anew.
    ///
    /// Of much memory a part may be given back later, while the process runs on; the tracker sees to it. Not so the pages of
    /// the addresses `hot`.
    ///
    /// Shared memory objects get their contents by [`SharedObjects::restore`], once for the tree.
    ///
    /// # Errors
    /// A step failed. The process' memory is then between the states, so it is to be built anew; it
    /// has no tracker any more.
    ///
    /// [`SharedObjects::restore`]: crate::mem::SharedObjects::restore
    pub fn restore(
        &self,
        remote: &mut Remote,
        tracker: &mut Option<Tracker>,
        mut scan: Scan,
        target: &Arc<AddressSpace>,
        hot: &[u64],
    ) -> Result<()> {
        let mut held = tracker.take();
        let taken = |area: &Range<u64>| {
            let mut vmas = target.vmas.iter();
            vmas.any(|v| overlap(&v.range(), area).is_some())
        };
        if taken(&remote.area()) {
            let cleared = remote.clear_of(taken);
            cleared.during(scan.pid, "moving the engine's area out of the way")?;
        }
        let plan = plan(&scan.vmas, &target.vmas).map_err(|vma| Error::Corrupt {
            pid: scan.pid,
            what: format!("the kernel does not map {:?} of that size", vma.backing),
        })?;
        // What was made just now may open all files that it is to have mapped.
        self.remap(remote, &plan, scan.base.is_none())?;
        let pages = target.pages.get()?;
        let runs = runs_to_put_back(&scan, target, pages, &plan.fresh);
        let guards = guards_to_change(&scan, target, &plan.fresh);
        set_guards(remote, &guards.1, false)?;
        let later = self.leave_for_later(remote, target, &runs, (&scan, hot))?;
        let ranges = later.as_ref().map_or(&[][..], |later| &later.ranges);
        let ranges = ranges.to_vec();
        let runs = outside(&runs, &ranges.iter().map(pages_of).collect::<Vec<_>>());
        put_back(remote, target, pages, &runs)?;
        if let Some(tracks) = &held {
            unmark_files(tracks, &target.vmas, &guards.0);
        }
        set_guards(remote, &guards.0, true)?;
        if let Some(later) = later {
            let mut tracks = match held {
                Some(tracks) => tracks,
                None => Tracker::attach(remote, Arc::clone(target))?,
            };
            let lazy = lazy::begin(
                remote,
                &tracks,
                later,
                &plan.fresh,
                &target.pages,
                (self.env, self.orphans),
            )?;
            tracks.set_lazy(lazy);
            held = Some(tracks);
        }
        let auxv = (scan.auxv != target.auxv).then_some(&target.auxv[..]);
        if auxv.is_some() || scan.layout != target.layout {
            layout::write(remote, &target.layout, auxv)?;
        }
        *tracker = held;
        let mut reset = to_reset(&scan, target, &plan.fresh, &runs);
        reset.untracked = outside(&merged(reset.untracked, 0), &ranges);
        reset.stale = outside(&reset.stale, &ranges);
        let base = Arc::clone(target);
        tracker::reset(
            remote,
            tracker,
            base,
            reset,
            &mut scan.pagemap,
            self.gears.protect,
        )
    }

    /// Which ranges are to be given back when the process runs: none with pages that it needs at once, those of the addresses
    /// `hot` and guards.
    fn leave_for_later(
        &self,
        remote: &Remote,
        target: &AddressSpace,
        runs: &[Range<u64>],
        (scan, hot): (&Scan, &[u64]),
    ) -> Result<Option<lazy::Plan>> {
        let pages: u64 = runs.iter().map(|run| run.end - run.start).sum();
        if pages < self.gears.lazy || !self.has_room(pages) {
            return Ok(None);
        }
        let mut avoid: Vec<_> = hot.iter().map(|at| *at..at.saturating_add(1)).collect();
        // To lock a page is to wait for it.
        avoid.extend(target.advised.locked());
        avoid.extend(scan.guards.iter().chain(&target.guards).cloned());
        lazy::plan(remote, target, runs, &avoid, self.gears.lazy)
            .during(scan.pid, "looking for memory to be given back later")
    }

    fn remap(&self, remote: &mut Remote, plan: &Plan<'_>, new: bool) -> Result<()> {
        Remap::new(remote).all(&plan.unmap, &BTreeMap::new())?;
        move_specials(remote, &plan.moves)?;
        let (segments, change): (Vec<_>, Vec<_>) =
            plan.change.iter().cloned().partition(Step::attaches);
        self.attach(remote, &segments)?;
        let mut rest = &change[..];
        while !rest.is_empty() {
            let (keys, steps) = file_keys(rest);
            let (now, later) = rest.split_at(steps);
            let mut numbers = match new {
                true => self.open_inside(remote, &keys)?,
                false => BTreeMap::new(),
            };
            self.pass(remote, &keys, &mut numbers)?;
            Remap::new(remote).all(now, &numbers)?;
            rest = later;
        }
        Ok(())
    }

    /// Has the process open what it can of its files by itself.
    fn open_inside(&self, remote: &mut Remote, keys: &Keys<'_>) -> Result<Numbers> {
        let (mut names, mut wanted) = (Vec::new(), Vec::new());
        for (key, vma) in keys {
            if let Backing::File(file) = &vma.backing
                && file.device == VERSIONED
            {
                names.push(*key);
                wanted.push(Wanted {
                    path: file.path.as_bytes(),
                    inode: file.inode,
                    // As `open` does.
                    flags: if vma.shared {
                        OFlags::RDWR
                    } else {
                        OFlags::RDONLY
                    },
                });
            }
        }
        let doing = "having it open the files to be mapped";
        let opened = openings::open(remote, self.env, &wanted).during(remote.pid(), doing)?;
        let opened = names.into_iter().zip(opened);
        Ok(opened.filter_map(|(key, fd)| Some((key, fd?))).collect())
    }

    /// Opens the other files, and passes them to the process.
    fn pass(&self, remote: &mut Remote, keys: &Keys<'_>, numbers: &mut Numbers) -> Result<()> {
        let (mut names, mut files) = (Vec::new(), Vec::new());
        for (key, vma) in keys.iter().filter(|(key, _)| !numbers.contains_key(*key)) {
            names.push(*key);
            files.push(self.open(vma).during(remote.pid(), &opening(vma))?);
        }
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let given = remote.give_fds(&fds);
        let given = given.during(remote.pid(), "passing mapped files")?;
        numbers.extend(names.into_iter().zip(given));
        Ok(())
    }

    fn open(&self, vma: &Vma) -> std::io::Result<OwnedFd> {
        match &vma.backing {
            Backing::File(file) if vma.shared => vmas::reopen(self.env, file, libc::O_RDWR)
                .or_else(|e| match vma.prot & libc::PROT_WRITE {
                    0 => vmas::reopen(self.env, file, libc::O_RDONLY),
                    _ => Err(e),
                }),
            Backing::File(file) => vmas::reopen(self.env, file, libc::O_RDONLY),
            Backing::Shm(key) => self.shared.open(*key, libc::O_RDWR),
            Backing::Anonymous | Backing::Special(_) => {
                Err(std::io::ErrorKind::InvalidInput.into())
            }
        }
    }
}

fn opening(vma: &Vma) -> String {
    match &vma.backing {
        Backing::File(file) => format!("opening {} to map it again, for the memory", file.path),
        _ => "opening the shared memory".to_owned(),
    }
}

/// Names what a mapping needs a descriptor of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum FileKey {
    File {
        device: u64,
        inode: u64,
        shared: bool,
    },
    Shm(crate::mem::ShmKey),
}

/// Files to be mapped, each by a mapping of it.
type Keys<'a> = BTreeMap<FileKey, &'a Vma>;
/// The descriptors that the process has of them.
type Numbers = BTreeMap<FileKey, i32>;

/// The files that the first steps map, and how many steps those are.
fn file_keys<'a>(steps: &[Step<'a>]) -> (Keys<'a>, usize) {
    let mut keys = Keys::new();
    for (index, step) in steps.iter().enumerate() {
        let Step::Map(_, vma) = step else { continue };
        let Some(key) = FileKey::of(vma) else {
            continue;
        };
        if keys.len() == FILES_AT_ONCE && !keys.contains_key(&key) {
            return (keys, index);
        }
        keys.entry(key).or_insert(vma);
    }
    (keys, steps.len())
}

impl FileKey {
    fn of(vma: &Vma) -> Option<Self> {
        match &vma.backing {
            Backing::File(file) => Some(Self::File {
                device: file.device,
                inode: file.inode,
                shared: vma.shared,
            }),
            Backing::Shm(key) => Some(Self::Shm(*key)),
            Backing::Anonymous | Backing::Special(_) => None,
        }
    }
}

/// Makes a process change its mappings, many in one stop.
struct Remap<'r> {
    remote: &'r mut Remote,
    batch: Batch,
    calls: Vec<(CallId, String)>,
}

impl<'r> Remap<'r> {
    fn new(remote: &'r mut Remote) -> Self {
        Self {
            remote,
            batch: Batch::new(),
            calls: Vec::new(),
        }
    }

    /// Runs all steps, and closes the descriptors that served for them.
    fn all(&mut self, steps: &[Step<'_>], fds: &BTreeMap<FileKey, i32>) -> Result<()> {
        for step in steps {
            self.step(step, fds)?;
        }
        for fd in fds.values() {
            self.add(libc::SYS_close, &[(*fd).into()], || {
                "closing a mapped file".to_owned()
            })?;
        }
        self.flush()
    }

    fn step(&mut self, step: &Step<'_>, fds: &BTreeMap<FileKey, i32>) -> Result<()> {
        let len = |r: &Range<u64>| Arg::from(r.end - r.start);
        match step {
            Step::Unmap(r) => self.add(libc::SYS_munmap, &[r.start.into(), len(r)], || {
                format!("unmapping {r:#x?}")
            }),
            Step::Protect(r, prot) => {
                let args = [r.start.into(), len(r), (*prot).into()];
                self.add(libc::SYS_mprotect, &args, || format!("protecting {r:#x?}"))
            }
            Step::Map(r, vma) => {
                let fd = FileKey::of(vma).and_then(|key| fds.get(&key).copied());
                let args = [
                    r.start.into(),
                    len(r),
                    vma.prot.into(),
                    map_flags(vma).into(),
                    fd.unwrap_or(-1).into(),
                    vma.offset_at(r.start).into(),
                ];
                self.add(libc::SYS_mmap, &args, || {
                    format!("mapping {:?} at {r:#x?}", vma.backing)
                })
            }
        }
    }

    fn add(&mut self, nr: i64, args: &[Arg], doing: impl FnOnce() -> String) -> Result<()> {
        if !self.batch.fits(1, 0) {
            self.flush()?;
        }
        self.calls.push((self.batch.call(nr, args), doing()));
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() {
            return Ok(());
        }
        let pid = self.remote.pid();
        let outcome = self
            .remote
            .run(&batch)
            .during(pid, "changing the mappings")?;
        for (call, doing) in self.calls.drain(..) {
            outcome.result(call).during(pid, &doing)?;
        }
        Ok(())
    }
}

fn map_flags(vma: &Vma) -> i32 {
    let mut flags = libc::MAP_FIXED;
    flags |= match (vma.shared, vma.droppable) {
        (true, _) => libc::MAP_SHARED,
        (false, true) => libc::MAP_DROPPABLE,
        (false, false) => libc::MAP_PRIVATE,
    };
    if vma.is_anonymous() {
        flags |= libc::MAP_ANONYMOUS;
    }
    if vma.grows_down {
        flags |= libc::MAP_GROWSDOWN;
    }
    if vma.end - vma.start >= RESERVATION {
        flags |= libc::MAP_NORESERVE;
    }
    flags
}

fn move_specials(remote: &mut Remote, moves: &[Move]) -> Result<()> {
    if moves.is_empty() {
        return Ok(());
    }
    let pid = remote.pid();
    let doing = "moving the vDSO";
    let mut batch = Batch::new();
    let mut calls = Vec::new();
    for step in moves {
        let len = step.from.end - step.from.start;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let args = [
            step.from.start.into(),
            len.into(),
            len.into(),
            flags.into(),
            step.to.into(),
        ];
        calls.push(batch.must(libc::SYS_mremap, &args));
    }
    let outcome = remote.run(&batch).during(pid, doing)?;
    for call in calls {
        outcome.result(call).during(pid, doing)?;
    }
    Ok(())
}

fn private_ranges(vmas: &[Vma]) -> Vec<Range<u64>> {
    let private = vmas.iter().filter(|v| v.is_private());
    merged(private.map(Vma::range).collect(), 0)
}

/// The runs of pages whose contents must be put back, ascending: in mappings that were kept, those
/// which changed since the base or differ between the base and the target; in fresh mappings, those
/// that the target holds, but for what the kernel may drop: what a program keeps there (the state of a random
/// number generator) it does not want to be there twice.
fn runs_to_put_back(
    scan: &Scan,
    target: &AddressSpace,
    pages: &PageMap,
    fresh: &[Range<u64>],
) -> Vec<Range<u64>> {
    let mut differing: Vec<Range<u64>> = scan.changes.iter().map(|(r, _)| r.clone()).collect();
    scan.known
        .diff(pages, 0..u64::MAX / crate::mem::PAGE, |run| {
            differing.push(addresses_of(&run));
        });
    let kept = outside(&private_ranges(&target.vmas), fresh);
    let mut runs = common(&merged(differing, 0), &kept);
    let dropped = target.vmas.iter().filter(|vma| vma.droppable);
    let dropped: Vec<_> = dropped.map(Vma::range).collect();
    for range in outside(fresh, &dropped) {
        let held = pages.runs(pages_of(&range));
        runs.extend(held.map(|pages| addresses_of(&pages)));
    }
    let runs = runs.iter().map(pages_of).collect();
    merged(runs, 0)
}

type Ranges = Vec<Range<u64>>;

/// The guard pages to install and to remove.
fn guards_to_change(scan: &Scan, target: &AddressSpace, fresh: &[Range<u64>]) -> (Ranges, Ranges) {
    if scan.guards.is_empty() && target.guards.is_empty() {
        return (Ranges::new(), Ranges::new());
    }
    let mapped: Vec<_> = target.vmas.iter().map(Vma::range).collect();
    let here = merged(common(&scan.guards, &outside(&mapped, fresh)), 0);
    let wanted = merged(target.guards.clone(), 0);
    (outside(&wanted, &here), outside(&here, &wanted))
}

/// Takes the marks of tracking from where guard pages are to be installed in private mappings of files: the kernel keeps such a mark when it
/// empties a page there, finds that the page is not empty, and tries again for ever.
fn unmark_files(tracker: &Tracker, vmas: &[Vma], install: &[Range<u64>]) {
    let files = vmas.iter().filter(|v| v.is_private() && !v.is_anonymous());
    let files: Vec<_> = files.map(Vma::range).collect();
    for range in common(install, &files) {
        tracker.unmark(&range);
    }
}

fn set_guards(remote: &mut Remote, ranges: &[Range<u64>], install: bool) -> Result<()> {
    let (advice, what) = match install {
        true => (MADV_GUARD[0], "installing"),
        false => (MADV_GUARD[1], "removing"),
    };
    let mut remap = Remap::new(remote);
    for r in ranges {
        let args = [r.start.into(), (r.end - r.start).into(), advice.into()];
        remap.add(libc::SYS_madvise, &args, || {
            format!("{what} guard pages at {r:#x?}")
        })?;
    }
    remap.flush()
}

/// What makes the process count as unchanged once it is in the target state.
fn to_reset(
    scan: &Scan,
    target: &AddressSpace,
    fresh: &[Range<u64>],
    put_back: &[Range<u64>],
) -> Reset {
    let touched = |vma: &&Vma| {
        let mut new = fresh.iter().chain(&scan.reset.untracked);
        vma.is_private() && new.any(|r| overlap(r, &vma.range()).is_some())
    };
    let untracked = target.vmas.iter().filter(touched).map(Vma::range).collect();
    let mut written = scan.reset.written.clone();
    written.extend(put_back.iter().map(addresses_of));
    // What is mapped anew has no marks.
    let stale = outside(&merged(scan.reset.stale.clone(), 0), fresh);
    Reset {
        untracked,
        written,
        stale: common(&stale, &private_ranges(&target.vmas)),
    }
}
