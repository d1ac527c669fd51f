//! What a checkpoint holds of a process tree.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::attributes::Attributes;
use crate::error::Result;
use crate::fd::Descriptors;
use crate::files::Place;
use crate::ids::InnerPid;
use crate::mem::{
    AddressSpace, BASE, Backing, Holding, Kept, PAGE, SharedMemory, ShmKey, VERSIONED,
    addresses_of, merged, pages_of,
};
use crate::procfs::Stat;
use crate::signals::Queue;
use crate::sysv::SystemV;
use crate::threads::ThreadImage;
use crate::timers::Timer;

/// PID 1 of a sandbox.
pub(crate) const INIT: InnerPid = InnerPid(1);

/// A process tree at a checkpoint. Immutable; what did not change is shared with other images.
#[derive(Clone)]
pub struct TreeImage {
    pub(crate) processes: BTreeMap<InnerPid, Arc<ProcessImage>>,
    /// Ended, and not yet waited for by their parents.
    pub(crate) zombies: BTreeMap<InnerPid, Stat>,
    pub(crate) descriptors: Arc<Descriptors>,
    pub(crate) shared: Arc<SharedMemory>,
    pub(crate) system_v: SystemV,
}

/// One process at a checkpoint.
#[derive(Serialize, Deserialize)]
pub(crate) struct ProcessImage {
    pub(crate) stat: Stat,
    /// When it was born, in clock ticks after boot; a process that is made again keeps it.
    pub(crate) birth: u64,
    pub(crate) command: String,
    pub(crate) user_stop: Option<i32>,
    pub(crate) exe: Place,
    pub(crate) cwd: Place,
    /// Its root directory, if it is not the sandbox's (chroot(2)).
    pub(crate) root: Option<Place>,
    pub(crate) attributes: Attributes,
    pub(crate) timers: Vec<Timer>,
    pub(crate) pending: Queue,
    /// The first one is the process' first.
    pub(crate) threads: Vec<ThreadImage>,
    pub(crate) memory: Arc<AddressSpace>,
}

/// A process of an image, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessSummary {
    /// Its number inside.
    pub pid: InnerPid,
    /// Its parent's.
    pub parent: InnerPid,
    /// Its command line, or its name where that is empty.
    pub command: String,
    /// Tells a process from another that had the same number: when it was started, in clock ticks after boot.
    pub start: u64,
}

impl TreeImage {
    /// A tree without processes.
    pub fn empty() -> Self {
        Self {
            processes: BTreeMap::new(),
            zombies: BTreeMap::new(),
            descriptors: Arc::new(Descriptors::default()),
            shared: Arc::new(SharedMemory::default()),
            system_v: SystemV::default(),
        }
    }

    /// Waits until all of it is known: the memory may still be being copied. Tells what became of the pages.
    ///
    /// # Errors
    /// Memory is lost, so that the image cannot be given back.
    pub fn complete(&self) -> Result<Kept> {
        self.processes.values().map(|p| p.memory.pages.kept()).sum()
    }

    /// Why it cannot be given back, if memory is lost. Does not wait for what is still being copied.
    pub fn loss(&self) -> Option<String> {
        let all = self.processes.values().map(|p| &p.memory.pages);
        all.filter(|pages| pages.are_known())
            .find_map(|pages| pages.get().err())
            .map(|e| e.to_string())
    }

    /// Whether a process has this object mapped so that its writes go there.
    pub(crate) fn is_mapped_for_writing(&self, key: ShmKey) -> bool {
        let mut mapped = self.processes.values().flat_map(|p| &p.memory.vmas);
        mapped.any(|vma| {
            vma.shared && vma.prot & libc::PROT_WRITE != 0 && vma.backing == Backing::Shm(key)
        })
    }

    /// The processes that can be forked of a template directly, which makes children of init that lead no session of the sandbox yet:
    /// those that are to lead their own.
    pub fn firstborn(&self, template: &Holding) -> Vec<InnerPid> {
        let pids = self.processes.keys().copied();
        pids.filter(|pid| self.begins_as_copy(*pid, template))
            .collect()
    }

    pub(crate) fn begins_as_copy(&self, pid: InnerPid, template: &Holding) -> bool {
        let stat = &self.processes[&pid].stat;
        let mut children = self.processes.values().filter(|p| p.stat.parent == pid);
        stat.parent == INIT
            && stat.session == pid
            && stat.exit_signal == libc::SIGCHLD
            && children.all(|child| child.stat.session != INIT)
            && template.has(pid)
    }

    /// A number that none of its processes, threads, groups and sessions has, nor one of `others`.
    pub fn free_number(&self, others: impl Iterator<Item = InnerPid>) -> InnerPid {
        let mut taken = BTreeSet::from([InnerPid(0), INIT]);
        for (pid, p) in &self.processes {
            taken.extend([*pid, p.stat.group, p.stat.session]);
            taken.extend(p.threads.iter().map(|t| t.tid));
        }
        taken.extend(self.zombies.keys().copied());
        taken.extend(others);
        let free = (2..).map(InnerPid).find(|n| !taken.contains(n));
        free.expect("numbers do not run out")
    }

    /// The addresses of the first `most` pages of a process that another image has differently, which is of a later moment. Nothing of
    /// memory that is still being copied, or lost.
    pub fn changes_to(&self, later: &Self, pid: InnerPid, most: u64) -> Vec<Range<u64>> {
        let pages = |image: &Self| {
            let pages = &image.processes.get(&pid)?.memory.pages;
            pages.are_known().then(|| pages.get().ok().cloned())?
        };
        let (Some(now), Some(then)) = (pages(self), pages(later)) else {
            return Vec::new();
        };
        let mut changes = Vec::new();
        let mut left = most;
        now.diff(&then, 0..u64::MAX / PAGE, |run| {
            let end = run.end.min(run.start + left);
            left -= end - run.start;
            changes.extend((run.start < end).then(|| addresses_of(&(run.start..end))));
        });
        changes
    }

    /// How many memory pages its processes have. Waits for memory that is still being copied.
    ///
    /// # Errors
    /// Memory is lost, so that the image cannot be given back.
    pub fn pages(&self) -> Result<u64> {
        let all = self.processes.values();
        all.map(|p| Ok(p.memory.pages.get()?.len())).sum()
    }

    /// How many processes are alive in it.
    pub fn len(&self) -> usize {
        self.processes.len()
    }

    /// Whether no process is alive in it.
    pub fn is_empty(&self) -> bool {
        self.processes.is_empty()
    }

    /// The inodes of the versioned filesystem whose content its processes have in their memory: programs and mapped files.
    pub fn mapped_inodes(&self) -> BTreeSet<u64> {
        let mut inodes = BTreeSet::new();
        for process in self.processes.values() {
            inodes.extend(process.exe.inode());
            for vma in &process.memory.vmas {
                if let Backing::File(file) = &vma.backing
                    && file.device == VERSIONED
                {
                    inodes.insert(file.inode);
                }
            }
        }
        inodes
    }

    /// The files of the base that its processes have mapped from the base itself, by their numbers, which they have in the versioned
    /// filesystem as well.
    pub fn mapped_of_base(&self) -> BTreeSet<u64> {
        let vmas = self.processes.values().flat_map(|p| &p.memory.vmas);
        let files = vmas.filter_map(|vma| match &vma.backing {
            Backing::File(file) if file.device == BASE => Some(file.inode),
            _ => None,
        });
        files.collect()
    }

    /// The inodes of the versioned filesystem that its processes have open (in flight between sockets, too), stand in or have as their
    /// root.
    pub fn open_inodes(&self) -> BTreeSet<u64> {
        let mut inodes: BTreeSet<u64> = self.descriptors.inodes().collect();
        for process in self.processes.values() {
            inodes.extend(process.cwd.inode());
            inodes.extend(process.root.as_ref().and_then(Place::inode));
        }
        inodes
    }

    /// The processes and threads that must be there before descriptors and directories are given back: those that files and
    /// directories of `/proc` are about, and those that files signal.
    pub(crate) fn told_of(&self) -> BTreeSet<InnerPid> {
        let places = self
            .processes
            .values()
            .flat_map(|process| [&process.cwd].into_iter().chain(&process.root));
        let directories = places.flat_map(Place::told_of);
        self.descriptors.told_of().chain(directories).collect()
    }

    /// The parts, in bytes, of files of the versioned filesystem over which its processes have pages of their own, by inode. To make
    /// those pages the kernel reads the file's first. Waits for memory that is still being copied.
    ///
    /// # Errors
    /// Memory is lost, so that the image cannot be given back.
    pub fn copied_parts(&self) -> Result<BTreeMap<u64, Vec<Range<u64>>>> {
        let mut parts: BTreeMap<u64, Vec<Range<u64>>> = BTreeMap::new();
        for process in self.processes.values() {
            let pages = process.memory.pages.get()?;
            for vma in process.memory.vmas.iter().filter(|v| v.is_private()) {
                if let Backing::File(file) = &vma.backing
                    && file.device == VERSIONED
                {
                    let runs = pages.runs(pages_of(&vma.range()));
                    let offsets = runs.map(|run| {
                        let at = addresses_of(&run);
                        vma.offset_at(at.start)..vma.offset_at(at.end)
                    });
                    parts.entry(file.inode).or_default().extend(offsets);
                }
            }
        }
        Ok(parts
            .into_iter()
            .map(|(inode, parts)| (inode, merged(parts, 0)))
            .collect())
    }

    /// The living processes, by number.
    pub fn processes(&self) -> impl Iterator<Item = ProcessSummary> {
        self.processes.iter().map(|(pid, p)| ProcessSummary {
            pid: *pid,
            parent: p.stat.parent,
            command: p.command.clone(),
            start: p.birth,
        })
    }
}
