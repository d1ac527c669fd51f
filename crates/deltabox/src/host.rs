//! All sandboxes of one state directory.

mod awaken;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use deltafs::{Options, Volume};
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, Mode, OFlags};

use deltacr::mem::Gears;

use crate::cgroup::{self, Hierarchies};
use crate::compactor::Running;
use crate::doctor;
use crate::dormant::Dormant;
use crate::durable::{Archive, Ids};
use crate::error::{Doing, Error, Result};
use crate::generation::Generation;
use crate::ground::{Ground, Reserved};
use crate::names;
use crate::report::{CheckpointId, CompactionInfo, Feature, TemplatesInfo, WarmInfo};
use crate::sandbox::Sandbox;
use crate::spec::SandboxSpec;
use crate::state::{Common, Content};
use crate::templates::{Limits, Template, Templates};
use crate::warm::{Early, Warm};

/// Threads that serve the files of one sandbox.
const FILE_THREADS: usize = 2;

/// How often to try to lock the state directory,
const LOCK_TRIES: u32 = 20;
/// and how long to wait in between.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Where a [`Host`] keeps its state.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Holds everything that belongs to the sandboxes. Made if it is not there; hidden inside them.
    pub state_dir: PathBuf,
    /// How many blank sandboxes may be kept ready for forks, at most. 0 keeps none.
    pub warm: usize,
    /// Whether processes of forks that are likely are born in those blank sandboxes in advance, if there is a template.
    pub early_births: bool,
    /// To how many pages such a process is made to write in advance, of those that each of the last steps after its checkpoint wrote to.
    /// 0 to none.
    pub early_pages: u64,
    /// In how much of the last ten seconds, in percent, somebody may have waited for a processor for that to be done.
    pub early_pressure: f64,
    /// How many templates may be kept: processes that hold the memory of a checkpoint for its forks to share. 0 keeps none.
    pub templates: usize,
    /// How many bytes the templates may hold together.
    pub template_bytes: u64,
    /// From how much changed memory on checkpoints copy, and rollbacks give back, while the processes run.
    pub gears: Gears,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::from("/var/lib/deltabox"),
            warm: 16,
            early_births: true,
            early_pages: 2048,
            early_pressure: 90.0,
            templates: 16,
            template_bytes: 4 << 30,
            gears: Gears::default(),
        }
    }
}

/// Hosts sandboxes. One process at a time per state directory (a lock file sees to it).
pub struct Host {
    ground: Arc<Ground>,
    warm: Warm,
    compactor: Running,
    /// Sandboxes that are on disk only.
    dormant: Mutex<BTreeMap<String, Arc<Dormant>>>,
    cleaned_up: Vec<String>,
    /// Locked as long as this lives.
    lock: File,
}

impl Host {
    /// Opens a state directory; ends and removes what a host that was killed left behind.
    /// Raises the limit of open files of this process, for each sandbox takes some twenty.
    pub fn open(config: HostConfig) -> Result<Self> {
        raise_open_files();
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
        let mut cleaned_up = clean_up(&state_dir, &hierarchies, &cgroup_parent)?;
        let (archive, sentences) = Archive::open(&state_dir)?;
        cleaned_up.extend(sentences);
        let stored = archive.list()?;
        let (ids, sentence) = Ids::open(&state_dir, awaken::highest(&stored));
        cleaned_up.extend(sentence);
        let limits = Limits {
            number: config.templates,
            bytes: config.template_bytes,
        };
        let group = hierarchies
            .unified
            .join(&cgroup_parent)
            .join(names::TEMPLATES);
        let templates = Templates::new(group, limits);
        let common = Arc::new(Common::new(templates, config.gears, archive, ids));
        let ground = Arc::new(Ground::new(state_dir, hierarchies, cgroup_parent, common));
        let early = Early {
            births: config.early_births,
            pages: config.early_pages,
            pressure: config.early_pressure,
        };
        let mut host = Self {
            warm: Warm::start(Arc::clone(&ground), config.warm, early)?,
            compactor: Running::start(Arc::clone(&ground))?,
            ground,
            dormant: Mutex::default(),
            cleaned_up,
            lock,
        };
        let kept = host.find_dormant(stored);
        host.cleaned_up.extend(kept);
        Ok(host)
    }

    /// What [`Host::open`] cleaned up, one sentence each.
    pub fn cleaned_up(&self) -> &[String] {
        &self.cleaned_up
    }

    /// Creates a sandbox and starts it.
    pub fn create(&self, spec: SandboxSpec) -> Result<Arc<Sandbox>> {
        names::check_spec(&spec)?;
        let place = self.ground.reserve(spec.name.as_deref())?;
        let (base, hidden) = names::check_base(&spec.base, &self.ground.state_dir)?;
        let base_dir = open_directory(&base)?;
        // A fork has its source's host name.
        let hostname = spec.hostname.clone().unwrap_or_else(|| place.name.clone());
        let spec = SandboxSpec {
            base,
            hostname: Some(hostname),
            ..spec
        };
        let _busy = self.warm.pause();
        let blank = self.ground.blank(place, spec, |ids, data_dir| {
            fs::create_dir_all(&data_dir).doing(format!("making {}", data_dir.display()))?;
            Ok(Volume::create(Options {
                base: base_dir,
                hidden,
                ids,
                data_dir,
                threads: FILE_THREADS,
            })?)
        })?;
        let (sandbox, place) = self.ground.settle(blank)?;
        let sandbox = Arc::new(sandbox);
        place.keep(Arc::clone(&sandbox));
        Ok(sandbox)
    }

    /// The sandbox of this name. One that is on disk only is read from there, which takes as long as what its checkpoints
    /// hold is large; it is stopped then, and a rollback makes it run.
    pub fn get(&self, name: &str) -> Result<Arc<Sandbox>> {
        if let Some(sandbox) = self.ground.get(name) {
            return Ok(sandbox);
        }
        match self.find(name) {
            Some(dormant) => self.awaken(&dormant),
            None => Err(Error::NoSandbox(name.to_owned())),
        }
    }

    /// All sandboxes but those that are on disk only, by name.
    pub fn list(&self) -> Vec<Arc<Sandbox>> {
        self.ground.list()
    }

    /// Ends a sandbox and removes all that belongs to it. Forks of it are not touched.
    pub fn remove(&self, name: &str) -> Result<()> {
        if let Some(dormant) = self.find(name) {
            return self.remove_dormant(&dormant);
        }
        // The name stays taken until nothing is left of it.
        let (ended, _place) = self.end(name)?;
        let removed = self.ground.common.archive.remove_all(name);
        ended.and(removed)
    }

    /// Ends a sandbox; how that went, and the name, which is free with the reservation's end. Durable checkpoints stay, and none
    /// are made any more.
    fn end(&self, name: &str) -> Result<(Result<()>, Reserved)> {
        let (sandbox, place) = self
            .ground
            .take_out(name)
            .ok_or_else(|| Error::NoSandbox(name.to_owned()))?;
        self.warm.forget(&sandbox);
        sandbox.forget_templates();
        let closed = sandbox.close();
        sandbox.wait_for_disk();
        Ok((closed, place))
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
        self.fork_as(source, id, n, names, false)
    }

    /// The same. With `seed_rng` each fork is told apart from the others, which share even the state of random number generators: the file
    /// `/run/deltabox/generation` in it holds its number in this call and 128 random bits, and commands that are started in it have
    /// both in `DELTABOX_FORK` and `DELTABOX_GENERATION`.
    ///
    /// # Errors
    /// As above; or the file cannot be written.
    pub fn fork_as(
        &self,
        source: &str,
        id: Option<CheckpointId>,
        n: usize,
        names: &[String],
        seed_rng: bool,
    ) -> Result<Vec<Arc<Sandbox>>> {
        if !names.is_empty() && names.len() != n {
            let wrong = format!("{n} forks were asked for, and {} names given", names.len());
            return Err(Error::Invalid(wrong));
        }
        let origin = self.get(source)?;
        let _busy = self.warm.pause();
        let id = id.map_or_else(|| origin.checkpoint(None).map(|made| made.id), Ok)?;
        let (content, spec) = origin.origin(id)?;
        let places = (0..n).map(|i| match names.get(i) {
            Some(name) => self.ground.reserve(Some(name)),
            None => self.ground.reserve_like(source),
        });
        let places = places.collect::<Result<Vec<_>>>()?;
        let templates = self.ground.templates();
        let template = match origin.takes_templates() {
            true => templates.get(content.origin(id, origin.family()), n),
            false => None,
        };
        let numbered = (1..).zip(places).collect();
        let forks = in_parallel(numbered, |(number, place)| {
            let template = template.as_deref();
            let number = seed_rng.then_some(number);
            self.fork_one((place, number), &origin, &content, spec.clone(), template)
        })?;
        self.warm.expect(&origin, id, n, false);
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
        (place, number): (Reserved, Option<usize>),
        origin: &Arc<Sandbox>,
        content: &Content,
        spec: SandboxSpec,
        template: Option<&Template>,
    ) -> Result<(Arc<Sandbox>, Reserved)> {
        let blank = match self.warm.take(origin) {
            Some(blank) => self.ground.dedicate(blank, place, content.files())?,
            None => self
                .ground
                .blank(place, spec, |ids, _| origin.fork_volume(content, ids))?,
        };
        // In this order: of one that is given up, the sandbox goes before its name is free.
        let (sandbox, place) = self.ground.settle(blank)?;
        if let Some(number) = number {
            let generation = Generation::new(number).doing("choosing a fork's generation")?;
            sandbox.set_generation(generation)?;
        }
        let early = sandbox.populate(content, origin.family(), template)?;
        self.warm.note_early(early);
        Ok((Arc::new(sandbox), place))
    }

    /// Ends all sandboxes. Their durable checkpoints stay.
    pub fn shutdown(&self) {
        self.warm.close();
        self.compactor.close();
        for sandbox in self.list() {
            if let Err(e) = self.end(sandbox.name()).and_then(|(ended, _)| ended) {
                tracing::warn!("ending sandbox {:?}: {e}", sandbox.name());
            }
        }
    }

    /// Says that `n` forks of `source` at `id` are likely to be asked for next, so that what they need is made ready
    /// meanwhile. Each fork says the same of its like.
    pub fn expect_forks(&self, source: &str, id: CheckpointId, n: usize) -> Result<()> {
        let origin = self.get(source)?;
        origin.origin(id)?;
        self.ground.templates().expect(id, n);
        self.warm.expect(&origin, id, n, true);
        Ok(())
    }

    /// Keeps the template of a checkpoint whatever comes, until that is taken back or the checkpoint deleted; makes it if there is none.
    /// Returns whether there is one: if there is no room for it beside what is pinned already, it is made when it is needed.
    pub fn pin_template(&self, source: &str, id: CheckpointId, pinned: bool) -> Result<bool> {
        let origin = self.get(source)?;
        let (content, _) = origin.origin(id)?;
        let templates = self.ground.templates();
        templates.pin(id, pinned);
        if pinned && !templates.has(id) && origin.takes_templates() {
            let _busy = self.warm.pause();
            templates.make(content.origin(id, origin.family()));
        }
        Ok(templates.has(id))
    }

    /// Whether there is a template of a checkpoint.
    pub fn has_template(&self, id: CheckpointId) -> bool {
        self.ground.templates().has(id)
    }

    /// The templates that hold the memory of checkpoints.
    pub fn templates(&self) -> TemplatesInfo {
        self.ground.templates().info()
    }

    /// The pids of the processes that are templates, as this process sees them.
    pub fn template_processes(&self) -> Vec<i32> {
        self.ground.templates().processes()
    }

    /// The blank sandboxes that are kept ready for forks.
    pub fn warm(&self) -> WarmInfo {
        self.warm.info()
    }

    /// How deleted checkpoints on disk are merged into those that build on them.
    pub fn compaction(&self) -> CompactionInfo {
        self.ground.common.compactor.info()
    }

    /// Says which kernel features are there and what to do about those that are not. Needs no state directory.
    pub fn doctor() -> Vec<Feature> {
        doctor::examine()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.shutdown();
        self.ground.templates().close();
        self.ground.common.ids.close();
        cgroup::remove_parent(&self.ground.hierarchies, &self.ground.cgroup_parent);
        // Explicitly, for a process that is just being started may still have it open.
        if let Err(e) = rustix::fs::flock(&self.lock, FlockOperation::Unlock) {
            tracing::warn!("unlocking the state directory: {e}");
        }
    }
}

/// Lets this process have as many open files as the kernel allows one to have.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let most = fs::read_to_string("/proc/sys/fs/nr_open").ok();
    let most = most.and_then(|text| text.trim().parse::<u64>().ok());
    let now = getrlimit(Resource::Nofile);
    let most = most.max(now.maximum);
    let raised = Rlimit {
        current: most,
        maximum: most,
    };
    if let Err(e) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!("raising the limit of open files: {e}");
    }
}

/// Does the same work on each of `items`, on twice as many threads as there are processors, for much of it is waiting. The first error is
/// returned when all that was begun has ended; what was made until then is dropped.
fn in_parallel<T: Send, R: Send>(
    items: Vec<T>,
    work: impl Fn(T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (2 * threads).min(items.len());
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
    // A process that a killed owner was just starting holds it until it runs its program.
    let taken = (0..LOCK_TRIES).any(|attempt| {
        if attempt > 0 {
            std::thread::sleep(LOCK_PAUSE);
        }
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
    });
    if !taken {
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
        if !name.starts_with(names::NAMELESS) {
            sentences.push(format!(
                "Killed what was left of sandbox {name:?} and removed its control groups."
            ));
        }
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
