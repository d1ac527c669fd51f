//! Taking down the memory of a stopped process.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::error::{During, Result};
use crate::mem::advice::{Advised, Told};
use crate::mem::ahead::Copies;
use crate::mem::harvest::{Work, Written, count};
use crate::mem::pages::outside;
use crate::mem::pages_to_come::Promise;
use crate::mem::scan::{Change, Scan};
use crate::mem::spare::{self, Spare};
use crate::mem::vmas;
use crate::mem::{
    AddressSpace, Backing, Memory, PAGE, Pages, Tracker, VERSIONED, Vma, addresses_of, merged,
    pages_of, tracker,
};
use crate::remote::Remote;
use crate::snapshot::Snapshot;
use crate::store::{Fresh, PageMap};
use crate::sys::pagemap::{self, Pagemap, category};
use crate::sys::vm;

impl Memory<'_> {
    /// Takes down the memory of a stopped process that was scanned in the same stop. It becomes the
    /// state that the tracker knows; a process without a tracker gets one.
    ///
    /// Pages that are as they were share their storage with the last known state, or with `like`:
    /// the state of another process that this one was forked from.
    ///
    /// Sorting the pages, and reading them where they are many, is left to the returned work, which can be done while the process
    /// runs on; the pages of the state are known when it is done. It is to be done before the process is scanned again.
    ///
    /// # Errors
    /// The memory could not be read, or there is no room to keep it. The tracker then knows what it
    /// knew before.
    pub fn capture(
        &self,
        remote: &mut Remote,
        tracker: &mut Option<Tracker>,
        mut scan: Scan,
        like: Option<&AddressSpace>,
    ) -> Result<(Arc<AddressSpace>, Work)> {
        for vma in &scan.vmas {
            if let Backing::Shm(key) = vma.backing {
                self.shared
                    .capture(key)
                    .during(scan.pid, "reading the shared memory")?;
            }
        }
        let advised = advised(remote, &mut scan)?;
        let (pages, promise) = Pages::to_come(scan.pid);
        let copies = tracker.as_mut().map(|t| t.ahead_mut().take_copies());
        let copies = copies.unwrap_or_default();
        let work = self.read(remote, &scan, copies, like, promise)?;
        let state = Arc::new(AddressSpace {
            vmas: scan.vmas,
            guards: scan.guards,
            layout: scan.layout,
            auxv: scan.auxv,
            advised,
            pages,
        });
        let mut pagemap = scan.pagemap;
        tracker::reset(
            remote,
            tracker,
            Arc::clone(&state),
            scan.reset,
            &mut pagemap,
            self.gears.protect,
        )?;
        Ok((state, work))
    }

    /// Reads the pages that were written, or takes a snapshot that they can be read from.
    fn read(
        &self,
        remote: &mut Remote,
        scan: &Scan,
        copies: Copies,
        like: Option<&AddressSpace>,
        promise: Promise,
    ) -> Result<Work> {
        let mut pages = scan.known.clone();
        keep_private(&mut pages, &scan.vmas);
        let dropped = |(_, change): &&(Range<u64>, Change)| *change == Change::Dropped;
        for (range, _) in scan.changes.iter().filter(dropped) {
            pages.remove(pages_of(range));
        }
        let is_copied = |change: Change| change == Change::Copied && !copies.is_empty();
        let copied = runs(scan, is_copied).into_iter().map(|run| run.pages);
        let copied = copied.collect();
        let mut written = runs(scan, |change| {
            change != Change::Dropped && !is_copied(change)
        });
        let mut unread = None;
        if let Some(mut snapshot) = self.snapshot(remote, scan, &written)? {
            let told = shared(&mut snapshot, written);
            let (shared, own) = told.during(scan.pid, "looking at its snapshot")?;
            written = own;
            unread = Some((shared, snapshot));
        }
        let mut fresh = self
            .store
            .allocate(count(&written))
            .during(scan.pid, "finding room for the memory")?;
        read(remote, &written, &mut fresh)?;
        Ok(Work {
            pid: scan.pid,
            store: self.store.clone(),
            pages,
            like: like.map(|like| like.pages.clone()),
            read: (written, fresh),
            copied: (copied, copies),
            unread,
            promise,
        })
    }
}

impl Memory<'_> {
    /// Takes a snapshot, if that is better than reading the written pages at once.
    fn snapshot(
        &self,
        remote: &mut Remote,
        scan: &Scan,
        written: &[Written],
    ) -> Result<Option<Snapshot>> {
        let pages = count(written) as u64;
        if pages < self.gears.snapshot || !self.has_room(pages) {
            return Ok(None);
        }
        let doing = "taking a snapshot";
        let ranges: Vec<_> = written.iter().map(|run| addresses_of(&run.pages)).collect();
        let left_out = left_out(&scan.vmas);
        let clean = outside(&scan.clean, &left_out);
        let spares = spare::find(remote, &clean, &ranges).during(scan.pid, doing)?;
        let spared = spares.iter().map(Spare::pages).sum();
        if !self
            .gears
            .wants_snapshot(pages, scan.present.saturating_sub(spared))
        {
            return Ok(None);
        }
        spare::keep_back(remote, &spares).during(scan.pid, doing)?;
        let mut taken = Snapshot::take(remote, self.env, &left_out);
        let child = taken.as_mut().ok().map(|snapshot| snapshot.maps().0);
        spare::give_back(remote, &spares, child).during(scan.pid, doing)?;
        match taken {
            Ok(snapshot) => Ok(Some(snapshot)),
            Err(e) => {
                tracing::debug!(error = %e, "no snapshot of process {}", scan.pid);
                Ok(None)
            }
        }
    }
}

/// What a snapshot is to have no part of. Files of the sandbox's own filesystem: what the process wrote to its private mappings of them is
/// little, and is read eagerly. And segments of System V, for a snapshot's would count as attached.
fn left_out(vmas: &[Vma]) -> Vec<Range<u64>> {
    let own = vmas.iter().filter(|vma| match &vma.backing {
        Backing::File(file) => file.device == VERSIONED,
        Backing::Shm(key) => key.segment().is_some(),
        _ => false,
    });
    merged(own.map(Vma::range).collect(), 0)
}

/// What was asked for the memory: looked up of a process that is met for the first time, and of those that had asked for something
/// and have changed their mappings. Marks mappings that grow by themselves or may be dropped.
fn advised(remote: &Remote, scan: &mut Scan) -> Result<Advised> {
    if let Some(base) = &scan.base
        && (base.advised.is_idle() || base.vmas == scan.vmas)
    {
        return Ok(base.advised.clone());
    }
    let Told {
        advised,
        grow,
        droppable,
    } = Told::by(remote)?;
    vmas::mark(&mut scan.vmas, &grow, |vma| vma.grows_down = true);
    vmas::mark(&mut scan.vmas, &droppable, |vma| vma.droppable = true);
    Ok(advised.within(&scan.vmas))
}

/// Forgets the pages of whatever is mapped no more.
fn keep_private(pages: &mut PageMap, vmas: &[Vma]) {
    let mut from = 0;
    for vma in vmas.iter().filter(|v| v.is_private()) {
        let kept = pages_of(&vma.range());
        pages.remove(from..kept.start);
        from = kept.end;
    }
    pages.remove(from..u64::MAX);
}

/// The runs of pages with such changes.
fn runs(scan: &Scan, which: impl Fn(Change) -> bool) -> Vec<Written> {
    let mut vmas = scan.vmas.iter().peekable();
    let changes = scan.changes.iter().filter(|(_, change)| which(*change));
    changes
        .filter_map(|(range, _)| {
            while vmas.next_if(|v| v.end <= range.start).is_some() {}
            let vma = vmas.peek()?;
            Some(Written {
                pages: pages_of(range),
                anonymous: vma.is_anonymous(),
                readable: vma.prot & libc::PROT_READ != 0,
            })
        })
        .collect()
}

/// Tells apart the pages that a snapshot has and those that the process keeps from its children. A mapping is copied
/// whole or not at all, so one page of each is looked for.
fn shared(
    snapshot: &mut Snapshot,
    written: Vec<Written>,
) -> io::Result<(Vec<Written>, Vec<Written>)> {
    let (maps, pagemap) = snapshot.maps();
    let mut part = Part {
        range: 0..0,
        shared: false,
    };
    let (mut shared, mut own) = (Vec::new(), Vec::new());
    for run in written {
        let addresses = addresses_of(&run.pages);
        let mut at = addresses.start;
        while at < addresses.end {
            if !part.range.contains(&at) {
                part = Part::around(maps, pagemap, at)?;
            }
            let end = part.range.end.min(addresses.end);
            let list = if part.shared { &mut shared } else { &mut own };
            list.push(Written {
                pages: pages_of(&(at..end)),
                ..run.clone()
            });
            at = end;
        }
    }
    Ok((shared, own))
}

/// A mapping of a snapshot, or a gap between two.
struct Part {
    range: Range<u64>,
    /// The pages that the process has there are there.
    shared: bool,
}

impl Part {
    /// The part that holds an address; the process has a page there.
    fn around(maps: &File, pagemap: &mut Pagemap, at: u64) -> io::Result<Self> {
        let Some(mapping) = pagemap::mapping(maps, at)? else {
            return Ok(Self {
                range: at..u64::MAX,
                shared: false,
            });
        };
        if mapping.start > at {
            return Ok(Self {
                range: at..mapping.start,
                shared: false,
            });
        }
        let there = category::PRESENT | category::SWAPPED;
        let mut found = Vec::new();
        pagemap.scan(at..at + PAGE, there, 0, &mut found)?;
        Ok(Self {
            range: at..mapping.end,
            shared: !found.is_empty(),
        })
    }
}

/// Reads the runs, one after another, into the fresh pages.
fn read(remote: &Remote, runs: &[Written], fresh: &mut Fresh) -> Result<()> {
    let (pid, host) = (remote.pid(), remote.host());
    let doing = "reading the memory";
    let all = runs.iter().flat_map(|run| {
        let readable = run.readable;
        run.pages.clone().map(move |page| (readable, page * PAGE))
    });
    let all = all
        .enumerate()
        .map(|(index, (readable, at))| (readable, (index, at)));
    let easy = all
        .clone()
        .filter(|(readable, _)| *readable)
        .map(|(_, p)| p);
    let read = vm::read_pages(host, easy, fresh).is_ok();
    // What the process itself may not read is read by its tracer's right.
    let mut memory = None;
    for (_, (index, at)) in all.filter(|(readable, _)| !read || !*readable) {
        let memory = match &mut memory {
            Some(file) => file,
            none => none.insert(File::open(format!("/proc/{host}/mem")).during(pid, doing)?),
        };
        let into = fresh.page_mut(index);
        memory.read_exact_at(into, at).during(pid, doing)?;
    }
    Ok(())
}
