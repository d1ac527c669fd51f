//! Taking down the memory of a stopped process.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::error::{During, Result};
use crate::mem::scan::{Change, Scan};
use crate::mem::{AddressSpace, Backing, Memory, PAGE, Tracker, Vma, pages_of, tracker};
use crate::remote::Remote;
use crate::store::{Fresh, PageMap, is_zero};
use crate::sys::vm;

impl Memory<'_> {
    /// Takes down the memory of a stopped process that was scanned in the same stop. It becomes the
    /// state that the tracker knows; a process without a tracker gets one.
    ///
    /// Pages that are as they were share their storage with the last known state, or with `like`:
    /// the state of another process that this one was forked from.
    ///
    /// # Errors
    /// The memory could not be read, or there is no room to keep it. The tracker then knows what it
    /// knew before.
    pub fn capture(
        &self,
        remote: &mut Remote,
        tracker: &mut Option<Tracker>,
        scan: Scan,
        like: Option<&AddressSpace>,
    ) -> Result<Arc<AddressSpace>> {
        for vma in &scan.vmas {
            if let Backing::Shm(key) = vma.backing {
                self.shared
                    .capture(key)
                    .during(scan.pid, "reading the shared memory")?;
            }
        }
        let pages = self.pages(remote, &scan, like)?;
        let state = Arc::new(AddressSpace {
            vmas: scan.vmas,
            guards: scan.guards,
            layout: scan.layout,
            auxv: scan.auxv,
            pages,
        });
        let mut pagemap = scan.pagemap;
        tracker::reset(
            remote,
            tracker,
            Arc::clone(&state),
            scan.reset,
            &mut pagemap,
        )?;
        Ok(state)
    }

    fn pages(&self, remote: &Remote, scan: &Scan, like: Option<&AddressSpace>) -> Result<PageMap> {
        let mut pages = scan
            .base
            .as_ref()
            .map(|b| b.pages.clone())
            .unwrap_or_default();
        keep_private(&mut pages, &scan.vmas);
        for (range, _) in changes(scan, Change::Dropped) {
            pages.remove(pages_of(range));
        }
        let written = written(scan);
        let count = written
            .iter()
            .map(|w| w.pages.end - w.pages.start)
            .sum::<u64>();
        let mut fresh = self
            .store
            .allocate(count as usize)
            .during(scan.pid, "finding room for the memory")?;
        read(remote, &written, &mut fresh)?;
        let mut sorter = Sorter {
            pages,
            like: like.map(|l| &l.pages),
            fresh,
        };
        let mut index = 0;
        for run in &written {
            for page in run.pages.clone() {
                sorter.page(page, index, run.vma.is_anonymous());
                index += 1;
            }
        }
        Ok(sorter.pages)
    }
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

fn changes(scan: &Scan, which: Change) -> impl Iterator<Item = &(Range<u64>, Change)> {
    scan.changes.iter().filter(move |(_, c)| *c == which)
}

/// A run of pages to be read, all in one mapping.
struct Written<'a> {
    pages: Range<u64>,
    vma: &'a Vma,
}

fn written(scan: &Scan) -> Vec<Written<'_>> {
    let mut vmas = scan.vmas.iter().peekable();
    changes(scan, Change::Written)
        .filter_map(|(range, _)| {
            while vmas.next_if(|v| v.end <= range.start).is_some() {}
            Some(Written {
                pages: pages_of(range),
                vma: vmas.peek()?,
            })
        })
        .collect()
}

/// Reads the runs, one after another, into the fresh pages.
fn read(remote: &Remote, runs: &[Written<'_>], fresh: &mut Fresh) -> Result<()> {
    let (pid, host) = (remote.pid(), remote.host());
    let doing = "reading the memory";
    let all = runs.iter().flat_map(|run| {
        let readable = run.vma.prot & libc::PROT_READ != 0;
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

/// Sorts pages that were read into a map.
struct Sorter<'a> {
    pages: PageMap,
    like: Option<&'a PageMap>,
    fresh: Fresh,
}

impl Sorter<'_> {
    fn page(&mut self, page: u64, index: usize, anonymous: bool) {
        let new = self.fresh.page(index);
        if anonymous && is_zero(new) {
            self.pages.remove(page..page + 1);
        } else if self.pages.get(page) == Some(new) {
            // It was written, but with what it held.
        } else if let Some(like) = self.like.filter(|l| l.get(page) == Some(new)) {
            self.pages.share(page, like, page);
        } else {
            self.pages.put(page, &mut self.fresh, index);
        }
    }
}
