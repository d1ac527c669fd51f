//! All sandboxes of one state directory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use deltacr::Stopwatch;
use deltafs::{IdMap, Options, Volume};
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::cgroup::{self, Cgroup, Hierarchies};
use crate::container::{Container, IDS, Parts};
use crate::doctor;
use crate::error::{Doing, Error, Result};
use crate::names;
use crate::report::{CheckpointId, Feature};
use crate::sandbox::{Directory, Sandbox};
use crate::spec::SandboxSpec;
use crate::state::{Common, Content};

/// The first id that is given to sandboxes: far above those of users.
const FIRST_ID: u32 = 1_000_000;

/// How many ranges of ids there are for the sandboxes of this machine.
const RANGES: u32 = 60_000;

/// Threads that serve the files of one sandbox.
const FILE_THREADS: usize = 2;

/// Where a [`Host`] keeps its state.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Holds everything that belongs to the sandboxes. Made if it is not there; hidden inside them.
    pub state_dir: PathBuf,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::from("/var/lib/deltabox"),
        }
    }
}

/// Hosts sandboxes. One process at a time per state directory (a lock file sees to it).
pub struct Host {
    state_dir: PathBuf,
    hierarchies: Hierarchies,
    cgroup_parent: String,
    common: Arc<Common>,
    table: Mutex<Table>,
    cleaned_up: Vec<String>,
    /// Locked as long as it is open.
    _lock: File,
}

#[derive(Default)]
struct Table {
    sandboxes: BTreeMap<String, Place>,
}

/// A name that is taken, and the range of ids that goes with it.
struct Place {
    range: u32,
    /// `None` while it is being created or removed.
    sandbox: Option<Arc<Sandbox>>,
}

impl Host {
    /// Opens a state directory; ends and removes what a host that was killed left behind.
    pub fn open(config: HostConfig) -> Result<Self> {
        let state_dir = prepare(&config.state_dir)?;
        let lock = lock(&state_dir)?;
        let hierarchies = Hierarchies::find()
            .doing("reading /proc/self/mountinfo")?
            .ok_or_else(|| {
                Error::Invalid(
                    "no cgroup version 2 hierarchy is mounted; mount one: \
                     mount -t cgroup2 none /sys/fs/cgroup/unified"
                        .to_owned(),
                )
            })?;
        let cgroup_parent = cgroup::parent_name(&state_dir);
        let cleaned_up = clean_up(&state_dir, &hierarchies, &cgroup_parent)?;
        Ok(Self {
            state_dir,
            hierarchies,
            cgroup_parent,
            common: Arc::default(),
            table: Mutex::default(),
            cleaned_up,
            _lock: lock,
        })
    }

    /// What [`Host::open`] cleaned up, one sentence each.
    pub fn cleaned_up(&self) -> &[String] {
        &self.cleaned_up
    }

    /// Creates a sandbox and starts it.
    pub fn create(&self, spec: SandboxSpec) -> Result<Arc<Sandbox>> {
        names::check_spec(&spec)?;
        let place = self.reserve(spec.name.as_deref())?;
        let (base, hidden) = names::check_base(&spec.base, &self.state_dir)?;
        let base_dir = open_directory(&base)?;
        // A fork has its source's host name.
        let hostname = spec.hostname.clone().unwrap_or_else(|| place.name.clone());
        let spec = SandboxSpec {
            base,
            hostname: Some(hostname),
            ..spec
        };
        let sandbox = self.build(&place, spec, |ids, data_dir| {
            Ok(Volume::create(Options {
                base: base_dir,
                hidden,
                ids,
                data_dir,
                threads: FILE_THREADS,
            })?)
        })?;
        let sandbox = Arc::new(sandbox);
        place.keep(Arc::clone(&sandbox));
        Ok(sandbox)
    }

    /// Takes a name and a range of ids.
    fn reserve(&self, name: Option<&str>) -> Result<Reserved<'_>> {
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
        let range = (0..RANGES)
            .find(|r| table.sandboxes.values().all(|p| p.range != *r))
            .ok_or_else(|| Error::Invalid("there are too many sandboxes".to_owned()))?;
        let place = Place {
            range,
            sandbox: None,
        };
        table.sandboxes.insert(name.clone(), place);
        Ok(Reserved {
            host: self,
            name,
            range,
            kept: false,
        })
    }

    /// `files` makes the volume, given the ids and the directory for its data.
    fn build(
        &self,
        place: &Reserved<'_>,
        spec: SandboxSpec,
        files: impl FnOnce(IdMap, PathBuf) -> Result<Volume>,
    ) -> Result<Sandbox> {
        let mut watch = Stopwatch::start();
        let dir = Directory::new(self.sandbox_dir(&place.name));
        let data = dir.join("files");
        fs::create_dir_all(&data).doing(format!("making {}", data.display()))?;
        let first_id = self.first_id(place.range);
        let volume = files(
            IdMap {
                outside_first: first_id,
                count: IDS,
            },
            data,
        )?;
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
            first_id,
            root: volume.mount(),
            cgroup,
        })?;
        watch.lap("container");
        let common = Arc::clone(&self.common);
        let sandbox = Sandbox::assemble(
            place.name.clone(),
            &spec,
            first_id,
            container,
            volume,
            dir,
            common,
        )?;
        watch.lap("sessions");
        sandbox.note_phases(watch.phases);
        Ok(sandbox)
    }

    fn sandbox_dir(&self, name: &str) -> PathBuf {
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

    /// The sandbox of this name.
    pub fn get(&self, name: &str) -> Result<Arc<Sandbox>> {
        self.table
            .lock()
            .sandboxes
            .get(name)
            .and_then(|p| p.sandbox.clone())
            .ok_or_else(|| Error::NoSandbox(name.to_owned()))
    }

    /// All sandboxes, by name.
    pub fn list(&self) -> Vec<Arc<Sandbox>> {
        let table = self.table.lock();
        table
            .sandboxes
            .values()
            .filter_map(|p| p.sandbox.clone())
            .collect()
    }

    /// Ends a sandbox and removes all that belongs to it. Forks of it are not touched.
    pub fn remove(&self, name: &str) -> Result<()> {
        let (sandbox, range) = {
            let mut table = self.table.lock();
            let place = table
                .sandboxes
                .get_mut(name)
                .ok_or_else(|| Error::NoSandbox(name.to_owned()))?;
            let sandbox = place
                .sandbox
                .take()
                .ok_or_else(|| Error::NoSandbox(name.to_owned()))?;
            (sandbox, place.range)
        };
        // Frees the name at the end, whatever happens.
        let _place = Reserved {
            host: self,
            name: name.to_owned(),
            range,
            kept: false,
        };
        sandbox.close()
    }

    /// Makes `n` new sandboxes with the state of `source` at `id`, or as it is now (which makes a checkpoint of it).
    /// They are called `names`, or names made from the source's if that is empty. Each has a tree of checkpoints of its own,
    /// which is empty.
    ///
    /// # Errors
    /// None of them is left if one cannot be made.
    pub fn fork(
        &self,
        source: &str,
        id: Option<CheckpointId>,
        n: usize,
        names: &[String],
    ) -> Result<Vec<Arc<Sandbox>>> {
        if !names.is_empty() && names.len() != n {
            let wrong = format!("{n} forks were asked for, and {} names given", names.len());
            return Err(Error::Invalid(wrong));
        }
        let origin = self.get(source)?;
        let id = id.map_or_else(|| origin.checkpoint(None).map(|made| made.id), Ok)?;
        let (content, spec) = origin.origin(id)?;
        let places = (0..n).map(|i| match names.get(i) {
            Some(name) => self.reserve(Some(name)),
            None => self.reserve_like(source),
        });
        let places = places.collect::<Result<Vec<_>>>()?;
        let forks = in_parallel(places, |place| {
            let sandbox = self.fork_one(&place, &origin, &content, spec.clone())?;
            // In this order: of those that are given up, the sandbox goes before its name is free.
            Ok((Arc::new(sandbox), place))
        })?;
        Ok(forks
            .into_iter()
            .map(|(sandbox, place)| {
                place.keep(Arc::clone(&sandbox));
                sandbox
            })
            .collect())
    }

    fn fork_one(
        &self,
        place: &Reserved<'_>,
        origin: &Sandbox,
        content: &Content,
        spec: SandboxSpec,
    ) -> Result<Sandbox> {
        let sandbox = self.build(place, spec, |ids, _| origin.fork_volume(content, ids))?;
        sandbox.populate(content)?;
        Ok(sandbox)
    }

    /// Takes the first name made of another and a number that is free.
    fn reserve_like(&self, source: &str) -> Result<Reserved<'_>> {
        let mut number = 1;
        loop {
            match self.reserve(Some(&names::numbered(source, number))) {
                Err(Error::NameTaken(_)) => number += 1,
                other => return other,
            }
        }
    }

    /// Ends all sandboxes.
    pub fn shutdown(&self) {
        for sandbox in self.list() {
            if let Err(e) = self.remove(sandbox.name()) {
                tracing::warn!("ending sandbox {:?}: {e}", sandbox.name());
            }
        }
    }

    /// Says which kernel features are there and what to do about those that are not. Needs no state directory.
    pub fn doctor() -> Vec<Feature> {
        doctor::examine()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.shutdown();
        cgroup::remove_parent(&self.hierarchies, &self.cgroup_parent);
    }
}

/// A name and a range of ids, given back unless kept.
struct Reserved<'a> {
    host: &'a Host,
    name: String,
    range: u32,
    kept: bool,
}

impl Reserved<'_> {
    fn keep(mut self, sandbox: Arc<Sandbox>) {
        self.kept = true;
        let place = Place {
            range: self.range,
            sandbox: Some(sandbox),
        };
        self.host
            .table
            .lock()
            .sandboxes
            .insert(self.name.clone(), place);
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.host.table.lock().sandboxes.remove(&self.name);
        }
    }
}

/// Does the same work on each of `items`, on as many threads as there are processors. The first error is
/// returned when all that was begun has ended; what was made until then is dropped.
fn in_parallel<T: Send, R: Send>(
    items: Vec<T>,
    work: impl Fn(T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min(items.len());
    if threads <= 1 {
        return items.into_iter().map(work).collect();
    }
    let left = Mutex::new(items.into_iter().enumerate());
    let done = Mutex::new(Vec::new());
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while failed.lock().is_none() {
                    let Some((index, item)) = left.lock().next() else {
                        return;
                    };
                    match work(item) {
                        Ok(made) => done.lock().push((index, made)),
                        Err(e) => drop(failed.lock().get_or_insert(e)),
                    }
                }
            });
        }
    });
    let mut done = done.into_inner();
    match failed.into_inner() {
        Some(e) => Err(e),
        None => {
            done.sort_by_key(|(index, _)| *index);
            Ok(done.into_iter().map(|(_, made)| made).collect())
        }
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .doing(format!("opening {}", path.display()))
}

/// Makes the state directory; returns it without links.
fn prepare(path: &Path) -> Result<PathBuf> {
    let unusable = |why: String| Error::StateDir {
        path: path.to_owned(),
        why,
    };
    let make = || {
        fs::create_dir_all(path.join("sandboxes"))?;
        // What sandboxes write is nobody else's business.
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        path.canonicalize()
    };
    let made = make().map_err(|e| unusable(e.to_string()))?;
    if made.as_os_str().as_bytes() == b"/" {
        return Err(unusable("it is the root directory".to_owned()));
    }
    Ok(made)
}

fn lock(state_dir: &Path) -> Result<File> {
    let path = state_dir.join("lock");
    let unusable = |why: String| Error::StateDir {
        path: state_dir.to_owned(),
        why,
    };
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|e| unusable(e.to_string()))?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let owner = fs::read_to_string(&path).unwrap_or_default();
        let owner = owner.trim();
        return Err(unusable(format!(
            "another process{} uses it; end that one, or choose another state directory",
            if owner.is_empty() {
                String::new()
            } else {
                format!(" (pid {owner})")
            }
        )));
    }
    file.set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(|e| unusable(e.to_string()))?;
    Ok(file)
}

/// Ends and removes what a host that was killed left. Its mounts have gone with it, for it served them.
fn clean_up(state_dir: &Path, hierarchies: &Hierarchies, parent: &str) -> Result<Vec<String>> {
    let mut sentences = Vec::new();
    for name in hierarchies.clear(parent)? {
        sentences.push(format!(
            "Killed what was left of sandbox {name:?} and removed its control groups."
        ));
    }
    let sandboxes = state_dir.join("sandboxes");
    let doing = || format!("clearing {}", sandboxes.display());
    for entry in fs::read_dir(&sandboxes).doing(doing())? {
        let path = entry.doing(doing())?.path();
        fs::remove_dir_all(&path).doing(format!("removing {}", path.display()))?;
        sentences.push(format!("Removed the files in {}.", path.display()));
    }
    Ok(sentences)
}
