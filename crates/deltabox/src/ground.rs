//! What sandboxes are made on: names, ranges of ids, directories and control groups of a host.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;

use deltacr::{Phases, Stopwatch, TreeImage};
use deltafs::{IdMap, Snapshot, Volume};
use parking_lot::Mutex;
use rustix::fs::Advice;

use crate::cgroup::{Cgroup, Hierarchies};
use crate::container::{Container, IDS, Parts};
use crate::error::{Error, Result};
use crate::names;
use crate::sandbox::{Directory, Sandbox};
use crate::spec::SandboxSpec;
use crate::state::Common;
use crate::templates::{Template, Templates};

/// The first id that is given to sandboxes: far above those of users.
const FIRST_ID: u32 = 1_000_000;

/// How many ranges of ids there are for the sandboxes of this machine.
const RANGES: u32 = 60_000;

/// See the module's description.
pub(crate) struct Ground {
    pub(crate) state_dir: PathBuf,
    pub(crate) hierarchies: Hierarchies,
    pub(crate) cgroup_parent: String,
    pub(crate) common: Arc<Common>,
    table: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    sandboxes: BTreeMap<String, Place>,
    /// Sandboxes without a name that were begun so far.
    nameless: u64,
}

/// A name that is taken, and the range of ids that goes with it.
struct Place {
    range: u32,
    /// `None` while it is being created or removed, as long as nobody has asked for it, and if it is on disk only.
    sandbox: Option<Arc<Sandbox>>,
}

impl Table {
    fn take(&mut self, name: &str) -> Result<u32> {
        let used: BTreeSet<u32> = self.sandboxes.values().map(|p| p.range).collect();
        let range = (0..RANGES)
            .find(|r| !used.contains(r))
            .ok_or_else(|| Error::Invalid("there are too many sandboxes".to_owned()))?;
        let place = Place {
            range,
            sandbox: None,
        };
        self.sandboxes.insert(name.to_owned(), place);
        Ok(range)
    }
}

impl Ground {
    pub(crate) fn new(
        state_dir: PathBuf,
        hierarchies: Hierarchies,
        cgroup_parent: String,
        common: Arc<Common>,
    ) -> Self {
        Self {
            state_dir,
            hierarchies,
            cgroup_parent,
            common,
            table: Arc::default(),
        }
    }

    /// The sandbox of this name.
    pub(crate) fn get(&self, name: &str) -> Option<Arc<Sandbox>> {
        self.table.lock().sandboxes.get(name)?.sandbox.clone()
    }

    /// The templates of their checkpoints.
    pub(crate) fn templates(&self) -> &Templates {
        &self.common.templates
    }

    /// All sandboxes, by name.
    pub(crate) fn list(&self) -> Vec<Arc<Sandbox>> {
        let table = self.table.lock();
        let places = table.sandboxes.values();
        places.filter_map(|p| p.sandbox.clone()).collect()
    }

    /// Takes a sandbox out. Its name stays taken until the reservation is dropped.
    pub(crate) fn take_out(&self, name: &str) -> Option<(Arc<Sandbox>, Reserved)> {
        let mut table = self.table.lock();
        let place = table.sandboxes.get_mut(name)?;
        let sandbox = place.sandbox.take()?;
        Some((sandbox, self.reserved(name.to_owned(), place.range)))
    }

    fn reserved(&self, name: String, range: u32) -> Reserved {
        Reserved {
            table: Arc::clone(&self.table),
            name,
            range,
            kept: false,
        }
    }

    /// Takes a name and a range of ids.
    pub(crate) fn reserve(&self, name: Option<&str>) -> Result<Reserved> {
        if let Some(name) = name {
            names::check_name(name)?;
        }
        let mut table = self.table.lock();
        let name = match name {
            Some(name) if table.sandboxes.contains_key(name) => {
                return Err(Error::NameTaken(name.to_owned()));
            }
            Some(name) => name.to_owned(),
            None => names::choose(|n| table.sandboxes.contains_key(n)),
        };
        let range = table.take(&name)?;
        Ok(self.reserved(name, range))
    }

    /// Takes the first name made of another and a number that is free.
    pub(crate) fn reserve_like(&self, source: &str) -> Result<Reserved> {
        let mut number = 1;
        loop {
            match self.reserve(Some(&names::numbered(source, number))) {
                Err(Error::NameTaken(_)) => number += 1,
                other => return other,
            }
        }
    }

    /// Takes a range of ids for a sandbox that nobody has asked for yet. What it is called meanwhile is no sandbox's name.
    pub(crate) fn reserve_nameless(&self) -> Result<Reserved> {
        let mut table = self.table.lock();
        table.nameless += 1;
        let name = names::nameless(table.nameless);
        let range = table.take(&name)?;
        Ok(self.reserved(name, range))
    }

    /// Takes the name of a sandbox that is on disk only, and its ids if nobody has them; whether there are any.
    pub(crate) fn hold(&self, name: &str, first_id: Option<u32>) -> bool {
        let mut table = self.table.lock();
        let Ok(mut range) = table.take(name) else {
            return false;
        };
        let begin = (self.first_id(0) - FIRST_ID) / IDS;
        if let Some(nth) = first_id.and_then(|id| Some(id.checked_sub(FIRST_ID)? / IDS % RANGES)) {
            let wanted = (nth + RANGES - begin) % RANGES;
            if table.sandboxes.values().all(|p| p.range != wanted) {
                range = wanted;
            }
        }
        if let Some(place) = table.sandboxes.get_mut(name) {
            place.range = range;
        }
        true
    }

    /// The name and ids of a sandbox that is on disk only. The name stays taken whatever becomes of it.
    pub(crate) fn held(&self, name: &str) -> Option<Reserved> {
        let range = self.table.lock().sandboxes.get(name)?.range;
        let mut reserved = self.reserved(name.to_owned(), range);
        reserved.kept = true;
        Some(reserved)
    }

    /// Gives the name of a sandbox back that was on disk only.
    pub(crate) fn release(&self, name: &str) {
        self.table.lock().sandboxes.remove(name);
    }

    pub(crate) fn sandbox_dir(&self, name: &str) -> PathBuf {
        self.state_dir.join("sandboxes").join(name)
    }

    /// Hosts begin at different ranges, so that their sandboxes seldom share one (which only shares the kernel's limits
    /// per user).
    fn first_id(&self, range: u32) -> u32 {
        let begin = self
            .cgroup_parent
            .bytes()
            .fold(0_u32, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
        FIRST_ID + (begin % RANGES + range) % RANGES * IDS
    }

    /// Makes a container. `files` makes its volume, given the ids and a directory for data.
    pub(crate) fn blank(
        &self,
        place: Reserved,
        spec: SandboxSpec,
        files: impl FnOnce(IdMap, PathBuf) -> Result<Volume>,
    ) -> Result<Blank> {
        let mut watch = Stopwatch::start();
        let dir = Directory::new(self.sandbox_dir(&place.name));
        let first_id = self.first_id(place.range);
        let ids = IdMap {
            outside_first: first_id,
            count: IDS,
        };
        let volume = files(ids, dir.join("files"))?;
        volume.set_quota(spec.quota());
        watch.lap("volume");
        let cgroup = Cgroup::create(
            &self.hierarchies,
            &self.cgroup_parent,
            &place.name,
            first_id,
            &spec,
        )?;
        watch.lap("cgroup");
        let container = Container::start(Parts {
            name: &place.name,
            hostname: spec.hostname.as_deref().unwrap_or(&place.name),
            clocks: spec.time_namespace,
            first_id,
            root: volume.mount(),
            cgroup,
        })?;
        watch.lap("container");
        Ok(Blank {
            container,
            volume,
            dir,
            place,
            spec,
            first_id,
            phases: watch.phases,
        })
    }

    /// Makes a blank that nobody has asked for a sandbox. It shows the files of `from` as yet.
    pub(crate) fn nameless_blank(
        &self,
        spec: SandboxSpec,
        from: impl FnOnce(IdMap) -> Result<Volume>,
    ) -> Result<Blank> {
        let place = self.reserve_nameless()?;
        self.blank(place, spec, |ids, _| from(ids))
    }

    /// Makes a blank the sandbox that `place` was reserved for, which it shall be with these files.
    pub(crate) fn dedicate(
        &self,
        blank: Blank,
        place: Reserved,
        files: &Snapshot,
    ) -> Result<Blank> {
        let mut watch = Stopwatch::start();
        blank.volume.rollback(files)?;
        watch.lap("volume");
        let dir = Directory::new(self.sandbox_dir(&place.name));
        Ok(Blank {
            place: place.with_ids_of(blank.place),
            dir,
            phases: watch.phases,
            ..blank
        })
    }

    /// Has the kernel look at the files that the processes of an image will have mapped, and read the parts that they will have
    /// copies of, unless they get those from a template. Errors do not matter: whoever needs a file will meet them again.
    pub(crate) fn read_ahead(blank: &Blank, image: &TreeImage, template: Option<&Template>) {
        let parts = image.copied_parts().unwrap_or_default();
        for inode in image.mapped_inodes() {
            let flags = libc::O_RDONLY | libc::O_NONBLOCK;
            let root = blank.container.root();
            let Ok(file) = blank.volume.open_inode_in(root, inode, flags) else {
                continue;
            };
            if template.is_some_and(|template| template.holding().has_file(inode)) {
                continue;
            }
            for part in parts.get(&inode).into_iter().flatten() {
                let len = NonZeroU64::new(part.end - part.start);
                let _ = rustix::fs::fadvise(&file, part.start, len, Advice::WillNeed);
            }
        }
    }

    /// Makes a sandbox of a blank.
    pub(crate) fn settle(&self, blank: Blank) -> Result<(Sandbox, Reserved)> {
        let mut watch = Stopwatch::start();
        let sandbox = Sandbox::assemble(
            blank.place.name.clone(),
            &blank.spec,
            blank.first_id,
            blank.container,
            blank.volume,
            blank.dir,
            Arc::clone(&self.common),
        )?;
        watch.lap("sessions");
        sandbox.note_phases(blank.phases);
        sandbox.note_phases(watch.phases);
        Ok((sandbox, blank.place))
    }
}

/// A container with files, in which only init runs. What it consists of goes in this order.
pub(crate) struct Blank {
    container: Container,
    volume: Volume,
    dir: Directory,
    place: Reserved,
    spec: SandboxSpec,
    first_id: u32,
    /// How long the parts of its making took.
    phases: Phases,
}

impl Blank {
    /// Where its processes will be.
    pub(crate) fn container(&self) -> &Container {
        &self.container
    }
}

/// A name and a range of ids, given back unless kept.
pub(crate) struct Reserved {
    table: Arc<Mutex<Table>>,
    pub(crate) name: String,
    range: u32,
    kept: bool,
}

impl Reserved {
    pub(crate) fn keep(mut self, sandbox: Arc<Sandbox>) {
        self.kept = true;
        let place = Place {
            range: self.range,
            sandbox: Some(sandbox),
        };
        let mut table = self.table.lock();
        table.sandboxes.insert(self.name.clone(), place);
    }

    /// This name, with the range of ids of another, whose name is free then.
    fn with_ids_of(mut self, mut other: Self) -> Self {
        let mut table = self.table.lock();
        table.sandboxes.remove(&other.name);
        other.kept = true;
        self.range = other.range;
        if let Some(place) = table.sandboxes.get_mut(&self.name) {
            place.range = self.range;
        }
        drop(table);
        self
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.kept {
            self.table.lock().sandboxes.remove(&self.name);
        }
    }
}
