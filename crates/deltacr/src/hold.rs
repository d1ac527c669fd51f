//! Holding a whole tree: freeze, seize every thread, thaw; seized threads go on standing still.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use crate::env::Environment;
use crate::error::{During, Error, Result};
use crate::freeze::{Freezer, glance};
use crate::ids::{HostPid, InnerPid};
use crate::mem::Layout;
use crate::procfs::{Procfs, Stat};
use crate::remote::Remote;
use crate::stop::{Stopped, StoppedThread};
use crate::sys::ptrace::{self, Stop};

/// How long a thread that cannot stop (it waits for its `vfork` child, say) holds up all others
/// before they are let go for another try.
const PATIENCE: Duration = Duration::from_millis(20);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(1);

/// How often it is looked for who did not stop.
const LOOKS: u32 = 20;

/// What the engine remembers of a process from one visit to the next.
pub(crate) struct Acquaintance {
    pub(crate) pid: InnerPid,
    /// With the pid, tells a process from a later one.
    start: u64,
    /// When the process was first born.
    birth: u64,
    pub(crate) area: Option<u64>,
    threads: HashMap<HostPid, InnerPid>,
}

/// All processes that the engine met, by their number outside.
pub(crate) type Acquaintances = HashMap<HostPid, Acquaintance>;

/// What a sandbox's processes are found and frozen by; opened once.
pub(crate) struct Grounds {
    pub(crate) procfs: Procfs,
    pub(crate) freezer: Freezer,
}

impl Grounds {
    pub(crate) fn open(env: &dyn Environment) -> Result<Self> {
        Ok(Self {
            procfs: Procfs::open(env).during_tree("opening /proc of the sandbox")?,
            freezer: Freezer::open(env.cgroup()).during_tree("opening the freezer")?,
        })
    }
}

/// A process that stands still, with what `/proc` tells of it.
pub(crate) struct HeldProcess {
    pub(crate) stopped: Stopped,
    pub(crate) stat: Stat,
    /// The bounds of its address space but for the program break.
    pub(crate) bounds: Layout,
    /// When it was first born, in clock ticks after boot; it may have been made again since.
    pub(crate) birth: u64,
    /// The signal by which its user had stopped it (job control), if so. The kernel takes the stop up again when the
    /// process is let go.
    pub(crate) user_stop: Option<i32>,
    /// It is to ignore `SIGTRAP` when it is let go. A batch's end makes the kernel forget that.
    pub(crate) ignores_trap: bool,
    /// A stop signal that it is to get when it is let go.
    pub(crate) stop_with: Option<i32>,
}

/// A tree that stands still, traced by the calling thread. Let go when dropped.
pub(crate) struct Held {
    pub(crate) procfs: Procfs,
    pub(crate) processes: BTreeMap<InnerPid, HeldProcess>,
    pub(crate) zombies: BTreeMap<InnerPid, Stat>,
    /// What is known of init's dead children.
    pub(crate) deaths: Deaths,
    /// When the processes began to stand still.
    pub(crate) since: Instant,
}

/// Whether init, which reports a child's death before it reaps it, has reported all deaths there were when the processes
/// stood still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deaths {
    /// It has.
    Reported,
    /// A child of init's is dead and not reaped, so it may not have been reported either.
    Pending,
}

impl Held {
    /// Holds every process of the sandbox's cgroup.
    pub(crate) fn tree(
        grounds: &mut Grounds,
        known: &mut Acquaintances,
        timeout: Duration,
    ) -> Result<Self> {
        let Grounds { procfs, freezer } = grounds;
        let start = Instant::now();
        // Seized threads that did not stop yet: they are this thread's until they do.
        let mut late = HashSet::new();
        loop {
            let since = Instant::now();
            let left = timeout.saturating_sub(start.elapsed());
            if !freezer.freeze(left).during_tree("freezing the processes")? {
                return Err(not_frozen(freezer, timeout));
            }
            match seize_all(procfs, known, freezer, &mut late)? {
                Some(processes) => {
                    // From here on it is let go when it is dropped.
                    let mut held = Self {
                        procfs: procfs.clone(),
                        processes,
                        zombies: BTreeMap::new(),
                        deaths: Deaths::Reported,
                        since,
                    };
                    held.find_dead()?;
                    return Ok(held);
                }
                None if start.elapsed() > timeout => return Err(not_frozen(freezer, timeout)),
                None => std::thread::sleep(PAUSE),
            }
        }
    }

    /// An empty tree, to be filled by births.
    pub(crate) fn empty(grounds: &Grounds) -> Self {
        Self {
            procfs: grounds.procfs.clone(),
            processes: BTreeMap::new(),
            zombies: BTreeMap::new(),
            deaths: Deaths::Reported,
            since: Instant::now(),
        }
    }

    fn find_dead(&mut self) -> Result<()> {
        for pid in self
            .procfs
            .processes()
            .during_tree("listing the processes")?
        {
            if pid.0 == 1 || self.processes.contains_key(&pid) {
                continue;
            }
            // One that was reaped meanwhile is none.
            let Ok(stat) = self.procfs.stat(pid) else {
                continue;
            };
            if stat.parent.0 == 1 {
                self.deaths = Deaths::Pending;
            } else if stat.state == b'Z' {
                self.zombies.insert(pid, stat);
            }
        }
        Ok(())
    }

    pub(crate) fn remote(&mut self, pid: InnerPid) -> Option<&mut Remote> {
        self.processes.get_mut(&pid).map(|p| &mut p.stopped.remote)
    }

    /// What a process is. Those that are not among `born` are as they were when they were stopped.
    pub(crate) fn stat(&self, pid: InnerPid, born: &BTreeSet<InnerPid>) -> Result<Stat> {
        match self.processes.get(&pid) {
            Some(process) if !born.contains(&pid) => Ok(process.stat.clone()),
            _ => self.procfs.stat(pid).during(pid, "reading what it is"),
        }
    }

    pub(crate) fn threads(&self) -> impl Iterator<Item = &StoppedThread> {
        self.processes.values().flat_map(|p| &p.stopped.threads)
    }

    /// The processes that were there at the last visit.
    pub(crate) fn met_before(&self, known: &Acquaintances) -> HashSet<HostPid> {
        let processes = self.processes.values();
        processes
            .map(|p| (p.stopped.remote.host(), p.stat.start))
            .filter(|(host, start)| known.get(host).is_some_and(|k| k.start == *start))
            .map(|(host, _)| host)
            .collect()
    }

    /// Whether a process was killed since it was held: what is done with it fails.
    pub(crate) fn has_casualties(&self) -> bool {
        self.processes
            .values()
            .any(|process| is_dead(process.stopped.remote.host()))
    }

    /// Forgets processes that will be killed.
    pub(crate) fn abandon(&mut self) {
        self.processes.clear();
    }

    /// Lets everything run on.
    pub(crate) fn release(&mut self) -> Result<()> {
        let mut result = Ok(());
        for (pid, mut process) in std::mem::take(&mut self.processes) {
            if process.ignores_trap
                && let Err(e) = process.stopped.remote.ignore_trap()
                && e.raw_os_error() != Some(libc::ESRCH)
            {
                result = Err(e).during(pid, "making it ignore SIGTRAP again");
            }
            if let Some(signal) = process.stop_with {
                let _ = crate::sys::process::pidfd_signal(process.stopped.remote.pidfd(), signal);
            }
            if let Err(e) = process.stopped.release().during(pid, "letting go") {
                result = Err(e);
            }
        }
        result
    }

    /// Notes for the next visit where the areas are and which thread is which.
    pub(crate) fn remember(&self, known: &mut Acquaintances) {
        known.clear();
        for (pid, process) in &self.processes {
            let threads = process
                .stopped
                .threads
                .iter()
                .map(|thread| (thread.host, thread.tid))
                .collect();
            let acquaintance = Acquaintance {
                pid: *pid,
                start: process.stat.start,
                birth: process.birth,
                area: process.stopped.remote.area_address(),
                threads,
            };
            known.insert(process.stopped.remote.host(), acquaintance);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.release();
    }
}

/// A frozen process and its threads, not seized yet.
struct Found {
    pid: InnerPid,
    host: HostPid,
    area: Option<u64>,
    stat: Stat,
    bounds: Layout,
    birth: u64,
    threads: Vec<(HostPid, InnerPid)>,
}

/// Whether a process is gone or a zombie.
fn is_dead(host: HostPid) -> bool {
    let stat = fs::read(format!("/proc/{host}/stat")).ok();
    let stat = stat.and_then(|text| crate::procfs::parse_stat(&text));
    stat.is_none_or(|stat| matches!(stat.state, b'Z' | b'X'))
}

/// `None` if some thread could not stop although the tree was frozen, or was killed meanwhile; then all run again.
fn seize_all(
    procfs: &Procfs,
    known: &Acquaintances,
    freezer: &mut Freezer,
    late: &mut HashSet<HostPid>,
) -> Result<Option<BTreeMap<InnerPid, HeldProcess>>> {
    let found = find(freezer, procfs, known).and_then(|found| {
        let mut seized = Vec::new();
        let all = found
            .iter()
            .flatten()
            .try_for_each(|process| seize(process, &mut seized, late));
        if let Err(e) = all {
            let _ = freezer.thaw();
            *late = let_go(&seized);
            return none_if_killed(found.iter().flatten(), e);
        }
        Ok(found)
    });
    freezer.thaw().during_tree("thawing the processes")?;
    let Some(found) = found? else {
        return Ok(None);
    };
    let threads: Vec<HostPid> = found
        .iter()
        .flat_map(|p| p.threads.iter().map(|(host, _)| *host))
        .collect();
    let stops = await_all(&threads);
    if stops.len() < threads.len() || stops.values().any(|stop| matches!(stop, Stop::Gone(_))) {
        *late = let_go(&threads);
        return Ok(None);
    }
    let mut processes = BTreeMap::new();
    for process in &found {
        match hold(process, &stops).during(process.pid, "reading the registers") {
            Ok(held) => processes.insert(process.pid, held),
            Err(e) => {
                for (_, held) in processes {
                    // What cannot be let go now is when this thread ends.
                    let _ = held.stopped.release();
                }
                *late = let_go(&threads);
                return none_if_killed(found.iter(), e);
            }
        };
    }
    Ok(Some(processes))
}

/// An error that a death explains is none.
fn none_if_killed<'a, T>(
    mut found: impl Iterator<Item = &'a Found>,
    error: Error,
) -> Result<Option<T>> {
    if error.is_death() || found.any(|process| is_dead(process.host)) {
        return Ok(None);
    }
    Err(error)
}

fn hold(process: &Found, stops: &HashMap<HostPid, Stop>) -> io::Result<HeldProcess> {
    let user_stop = match stops.get(&process.host) {
        Some(Stop::GroupStopped(signal)) => Some(*signal),
        _ => None,
    };
    let stopped = Stopped::hold(process.pid, process.host, &process.threads, process.area)?;
    Ok(HeldProcess {
        stopped,
        stat: process.stat.clone(),
        bounds: process.bounds,
        birth: process.birth,
        user_stop,
        ignores_trap: process.stat.ignores_trap,
        stop_with: None,
    })
}

fn seize(process: &Found, seized: &mut Vec<HostPid>, late: &HashSet<HostPid>) -> Result<()> {
    for (host, _) in &process.threads {
        match ptrace::seize(*host) {
            Err(_) if late.contains(host) => {}
            other => other.map_err(|source| refusal(process, source))?,
        }
        seized.push(*host);
        ptrace::interrupt(*host).during(process.pid, "stopping a thread")?;
    }
    Ok(())
}

fn refusal(process: &Found, source: io::Error) -> Error {
    let name = String::from_utf8_lossy(&process.stat.name).into_owned();
    let tracer = fs::read(format!("/proc/{}/status", process.host))
        .ok()
        .and_then(|s| {
            String::from_utf8_lossy(&s)
                .lines()
                .find_map(|l| l.strip_prefix("TracerPid:")?.trim().parse::<i32>().ok())
        });
    match tracer {
        Some(tracer) if tracer != 0 => {
            let tracer = HostPid(tracer).inner().unwrap_or(InnerPid(tracer));
            let what = format!("it is traced by process {tracer}; end the debugger first");
            Error::Unsupported {
                pid: process.pid,
                name,
                what,
            }
        }
        _ => Error::Process {
            doing: "tracing".to_owned(),
            pid: process.pid,
            source,
        },
    }
}

/// How each thread stopped, of those that did in time.
fn await_all(threads: &[HostPid]) -> HashMap<HostPid, Stop> {
    let mut stops = HashMap::with_capacity(threads.len());
    let end = Instant::now() + PATIENCE;
    let mut glances = 0;
    loop {
        for host in threads {
            if !stops.contains_key(host)
                && let Ok(Some(stop)) = ptrace::wait(*host, false)
            {
                stops.insert(*host, stop);
            }
        }
        if stops.len() == threads.len() || Instant::now() > end {
            return stops;
        }
        glance(&mut glances);
    }
}

/// Lets threads run on that were seized and interrupted. Returns those that have not stopped yet, which are let go by the
/// kernel when this thread ends.
fn let_go(threads: &[HostPid]) -> HashSet<HostPid> {
    let end = Instant::now() + PATIENCE;
    let mut left: HashSet<HostPid> = threads.iter().copied().collect();
    while !left.is_empty() && Instant::now() < end {
        left.retain(|host| {
            // It stopped in an earlier wait already; or it stops, or is found dead, now.
            if ptrace::detach(*host).is_ok() {
                return false;
            }
            match ptrace::wait(*host, false) {
                Ok(None) => true,
                Ok(Some(Stop::Gone(_))) | Err(_) => false,
                Ok(Some(_)) => ptrace::detach(*host).is_err(),
            }
        });
        std::thread::yield_now();
    }
    left
}

/// `None` if one was killed meanwhile.
fn find(
    freezer: &mut Freezer,
    procfs: &Procfs,
    known: &Acquaintances,
) -> Result<Option<Vec<Found>>> {
    let hosts = freezer.members().during_tree("listing the processes")?;
    let mut found = Vec::with_capacity(hosts.len());
    for host in hosts {
        match meet(procfs, host, known) {
            Ok(process) => found.push(process),
            Err(e) if e.kind() == io::ErrorKind::NotFound || is_dead(host) => return Ok(None),
            Err(e) => return Err(e).during_tree("looking at a process"),
        }
    }
    // A parent's area is where its children have theirs.
    let areas: HashMap<InnerPid, Option<u64>> = found.iter().map(|p| (p.pid, p.area)).collect();
    for process in &mut found {
        if process.area.is_none() {
            process.area = areas.get(&process.stat.parent).copied().flatten();
        }
        if process.stat.state == b'Z' {
            let what = "its first thread has ended, and others go on".to_owned();
            let name = String::from_utf8_lossy(&process.stat.name).into_owned();
            return Err(Error::Unsupported {
                pid: process.pid,
                name,
                what,
            });
        }
    }
    Ok(Some(found))
}

fn meet(procfs: &Procfs, host: HostPid, known: &Acquaintances) -> io::Result<Found> {
    let acquaintance = known.get(&host);
    let again = acquaintance.and_then(|k| {
        let (stat, bounds) = procfs.stat_and_bounds(k.pid).ok()?;
        (stat.start == k.start).then_some((k.pid, stat, bounds))
    });
    let (pid, stat, bounds, acquaintance) = match again {
        Some((pid, stat, bounds)) => (pid, stat, bounds, acquaintance),
        None => {
            let pid = host.inner()?;
            let (stat, bounds) = procfs.stat_and_bounds(pid)?;
            (pid, stat, bounds, None)
        }
    };
    let threads = match stat.threads {
        1 => vec![(host, pid)],
        _ => threads(procfs, host, pid, acquaintance)?,
    };
    let birth = acquaintance.map_or(stat.start, |k| k.birth);
    Ok(Found {
        birth,
        pid,
        host,
        area: acquaintance.and_then(|k| k.area),
        stat,
        bounds,
        threads,
    })
}

/// The threads of a process, its first one first.
fn threads(
    procfs: &Procfs,
    host: HostPid,
    pid: InnerPid,
    known: Option<&Acquaintance>,
) -> io::Result<Vec<(HostPid, InnerPid)>> {
    let mut threads = vec![(host, pid)];
    for entry in fs::read_dir(format!("/proc/{host}/task"))? {
        let name = entry?.file_name();
        let tid = name
            .to_str()
            .and_then(|n| n.parse().ok())
            .ok_or(io::ErrorKind::InvalidData)?;
        let tid = HostPid(tid);
        if tid == host {
            continue;
        }
        // The number outside may have been used again since, by a thread with another number inside.
        let inner = match known.and_then(|k| k.threads.get(&tid)) {
            Some(inner) if procfs.has_thread(pid, *inner) => *inner,
            _ => tid.inner()?,
        };
        threads.push((tid, inner));
    }
    Ok(threads)
}

fn not_frozen(freezer: &mut Freezer, timeout: Duration) -> Error {
    let mut culprit = || {
        freezer.members().ok()?.into_iter().find_map(|host| {
            let stat = fs::read(format!("/proc/{host}/stat")).ok()?;
            let stat = crate::procfs::parse_stat(&stat)?;
            if stat.state != b'D' {
                return None;
            }
            let wchan = fs::read_to_string(format!("/proc/{host}/wchan")).unwrap_or_default();
            let pid = host.inner().ok()?;
            let name = String::from_utf8_lossy(&stat.name).into_owned();
            Some(format!(
                "process {pid} ({name}) waits in the kernel in {wchan}"
            ))
        })
    };
    // Who was thawed is awake for a moment, and then goes on waiting.
    let look = |_| {
        std::thread::sleep(PAUSE);
        culprit()
    };
    let what = (0..LOOKS)
        .find_map(look)
        .unwrap_or_else(|| "processes are born faster than they can be stopped".to_owned());
    Error::NotFrozen {
        waited_ms: timeout.as_millis() as u64,
        what,
    }
}
