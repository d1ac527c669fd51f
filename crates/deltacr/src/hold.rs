//! Holding a whole tree: freeze, seize every thread, thaw; seized threads go on standing still.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use crate::env::Environment;
use crate::error::{During, Error, Result};
use crate::freeze::Freezer;
use crate::ids::{HostPid, InnerPid};
use crate::procfs::{Procfs, Stat};
use crate::remote::Remote;
use crate::stop::{Stopped, StoppedThread, hold_thread};
use crate::sys::ptrace::{self, Stop};

/// How long a thread that cannot stop (it waits for its `vfork` child, say) holds up all others
/// before they are let go for another try.
const PATIENCE: Duration = Duration::from_millis(20);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(1);

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

/// A process that stands still, with what `/proc` tells of it.
pub(crate) struct HeldProcess {
    pub(crate) stopped: Stopped,
    pub(crate) stat: Stat,
    /// When it was first born, in clock ticks after boot; it may have been made again since.
    pub(crate) birth: u64,
    /// The signal by which its user had stopped it (job control), if so. The kernel takes the stop up again when the
    /// process is let go.
    pub(crate) user_stop: Option<i32>,
    /// A stop signal that it is to get when it is let go.
    pub(crate) stop_with: Option<i32>,
}

/// A tree that stands still, traced by the calling thread. Let go when dropped.
pub(crate) struct Held {
    pub(crate) procfs: Procfs,
    pub(crate) processes: BTreeMap<InnerPid, HeldProcess>,
    pub(crate) zombies: BTreeMap<InnerPid, Stat>,
}

impl Held {
    /// Holds every process of the sandbox's cgroup.
    pub(crate) fn tree(
        env: &dyn Environment,
        known: &mut Acquaintances,
        timeout: Duration,
    ) -> Result<Self> {
        let mut freezer = Freezer::open(env.cgroup()).during_tree("opening the freezer")?;
        let procfs = Procfs::open(env).during_tree("opening /proc of the sandbox")?;
        let start = Instant::now();
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            if !freezer.freeze(left).during_tree("freezing the processes")? {
                return Err(not_frozen(env, timeout));
            }
            match seize_all(env, &procfs, known, &mut freezer)? {
                Some(processes) => {
                    let zombies = zombies(&procfs, &processes)?;
                    return Ok(Self {
                        procfs,
                        processes,
                        zombies,
                    });
                }
                None if start.elapsed() > timeout => return Err(not_frozen(env, timeout)),
                None => std::thread::sleep(PAUSE),
            }
        }
    }

    /// An empty tree, to be filled by births.
    pub(crate) fn empty(env: &dyn Environment) -> Result<Self> {
        let procfs = Procfs::open(env).during_tree("opening /proc of the sandbox")?;
        Ok(Self {
            procfs,
            processes: BTreeMap::new(),
            zombies: BTreeMap::new(),
        })
    }

    pub(crate) fn remote(&mut self, pid: InnerPid) -> Option<&mut Remote> {
        self.processes.get_mut(&pid).map(|p| &mut p.stopped.remote)
    }

    pub(crate) fn threads(&self) -> impl Iterator<Item = &StoppedThread> {
        self.processes.values().flat_map(|p| &p.stopped.threads)
    }

    /// Forgets processes that will be killed.
    pub(crate) fn abandon(&mut self) {
        self.processes.clear();
    }

    /// Lets everything run on.
    pub(crate) fn release(&mut self) -> Result<()> {
        let mut result = Ok(());
        for (pid, process) in std::mem::take(&mut self.processes) {
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
    birth: u64,
    threads: Vec<(HostPid, InnerPid)>,
}

/// `None` if some thread could not stop although the tree was frozen, or was killed meanwhile; then all run again.
fn seize_all(
    env: &dyn Environment,
    procfs: &Procfs,
    known: &Acquaintances,
    freezer: &mut Freezer,
) -> Result<Option<BTreeMap<InnerPid, HeldProcess>>> {
    let found = find(env, procfs, known).and_then(|found| {
        let mut seized = Vec::new();
        match found
            .iter()
            .try_for_each(|process| seize(process, &mut seized))
        {
            Ok(()) => Ok(found),
            Err(e) => {
                let _ = freezer.thaw();
                let_go(&seized, Duration::from_secs(1));
                Err(e)
            }
        }
    });
    freezer.thaw().during_tree("thawing the processes")?;
    let found = match found {
        Err(e) if is_death(&e) => return Ok(None),
        found => found?,
    };
    let threads: Vec<HostPid> = found
        .iter()
        .flat_map(|p| p.threads.iter().map(|(host, _)| *host))
        .collect();
    let Some(stops) = await_all(&threads) else {
        return Ok(None);
    };
    if stops.values().any(|stop| matches!(stop, Stop::Gone(_))) {
        let_go(&threads, Duration::from_secs(1));
        return Ok(None);
    }
    let mut processes = BTreeMap::new();
    for process in found {
        let pid = process.pid;
        let held = hold(process, &stops).during(pid, "reading the registers")?;
        processes.insert(pid, held);
    }
    Ok(Some(processes))
}

/// Whether it tells that a process was gone: a kill does not wait for a thaw.
fn is_death(error: &Error) -> bool {
    let (Error::Process { source, .. } | Error::Tree { source, .. }) = error else {
        return false;
    };
    source.kind() == io::ErrorKind::NotFound || source.raw_os_error() == Some(libc::ESRCH)
}

fn hold(process: Found, stops: &HashMap<HostPid, Stop>) -> io::Result<HeldProcess> {
    let threads: Vec<StoppedThread> = process
        .threads
        .iter()
        .map(|(host, tid)| hold_thread(*tid, *host))
        .collect::<io::Result<_>>()?;
    let user_stop = match stops.get(&process.host) {
        Some(Stop::GroupStopped(signal)) => Some(*signal),
        _ => None,
    };
    let stopped = Stopped::hold(process.pid, process.host, threads, process.area)?;
    Ok(HeldProcess {
        stopped,
        stat: process.stat,
        birth: process.birth,
        user_stop,
        stop_with: None,
    })
}

fn seize(process: &Found, seized: &mut Vec<HostPid>) -> Result<()> {
    for (host, _) in &process.threads {
        ptrace::seize(*host).map_err(|source| refusal(process, source))?;
        seized.push(*host);
        ptrace::interrupt(*host).during(process.pid, "stopping a thread")?;
    }
    Ok(())
}

fn refusal(process: &Found, source: io::Error) -> Error {
    let name = String::from_utf8_lossy(&process.stat.name).into_owned();
    let tracer = fs::read_to_string(format!("/proc/{}/status", process.host))
        .ok()
        .and_then(|s| {
            s.lines()
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

/// How each thread stopped; `None`, and all are running again, if one does not.
fn await_all(threads: &[HostPid]) -> Option<HashMap<HostPid, Stop>> {
    let mut stops = HashMap::with_capacity(threads.len());
    let end = Instant::now() + PATIENCE;
    loop {
        for host in threads
            .iter()
            .filter(|host| !stops.contains_key(*host))
            .copied()
            .collect::<Vec<_>>()
        {
            if let Ok(Some(stop)) = ptrace::wait(host, false) {
                stops.insert(host, stop);
            }
        }
        if stops.len() == threads.len() {
            return Some(stops);
        }
        if Instant::now() > end {
            let_go(threads, Duration::from_secs(1));
            return None;
        }
        std::thread::yield_now();
    }
}

/// Lets threads run on that were seized and interrupted; those that stop only later too. Any that
/// never stop are let go by the kernel when this thread ends.
fn let_go(threads: &[HostPid], timeout: Duration) {
    let end = Instant::now() + timeout;
    let mut left: Vec<HostPid> = threads.to_vec();
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
}

fn find(env: &dyn Environment, procfs: &Procfs, known: &Acquaintances) -> Result<Vec<Found>> {
    let list = fs::read_to_string(env.cgroup().join("cgroup.procs"))
        .during_tree("listing the processes")?;
    let mut hosts: Vec<i32> = list.lines().filter_map(|l| l.parse().ok()).collect();
    hosts.sort_unstable();
    hosts.dedup();
    let mut found = Vec::with_capacity(hosts.len());
    for host in hosts.into_iter().map(HostPid).filter(|host| host.0 != 0) {
        found.push(meet(procfs, host, known).during_tree("looking at a process")?);
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
    Ok(found)
}

fn meet(procfs: &Procfs, host: HostPid, known: &Acquaintances) -> io::Result<Found> {
    let acquaintance = known.get(&host);
    let again = acquaintance.and_then(|k| {
        let stat = procfs.stat(k.pid).ok()?;
        (stat.start == k.start).then_some((k.pid, stat))
    });
    let (pid, stat, acquaintance) = match again {
        Some((pid, stat)) => (pid, stat, acquaintance),
        None => {
            let pid = host.inner()?;
            (pid, procfs.stat(pid)?, None)
        }
    };
    let threads = threads(procfs, host, pid, acquaintance)?;
    let birth = acquaintance.map_or(stat.start, |k| k.birth);
    Ok(Found {
        birth,
        pid,
        host,
        area: acquaintance.and_then(|k| k.area),
        stat,
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

fn zombies(
    procfs: &Procfs,
    live: &BTreeMap<InnerPid, HeldProcess>,
) -> Result<BTreeMap<InnerPid, Stat>> {
    let mut zombies = BTreeMap::new();
    for pid in procfs.processes().during_tree("listing the processes")? {
        if pid.0 == 1 || live.contains_key(&pid) {
            continue;
        }
        // One that init reaped meanwhile is none.
        if let Ok(stat) = procfs.stat(pid)
            && stat.state == b'Z'
            && stat.parent.0 != 1
        {
            zombies.insert(pid, stat);
        }
    }
    Ok(zombies)
}

fn not_frozen(env: &dyn Environment, timeout: Duration) -> Error {
    let culprit = || {
        let list = fs::read_to_string(env.cgroup().join("cgroup.procs")).ok()?;
        list.lines().find_map(|host| {
            let stat = fs::read(format!("/proc/{host}/stat")).ok()?;
            let stat = crate::procfs::parse_stat(&stat)?;
            if stat.state != b'D' {
                return None;
            }
            let wchan = fs::read_to_string(format!("/proc/{host}/wchan")).unwrap_or_default();
            let pid = HostPid(host.parse().ok()?).inner().ok()?;
            let name = String::from_utf8_lossy(&stat.name).into_owned();
            Some(format!(
                "process {pid} ({name}) waits in the kernel in {wchan}"
            ))
        })
    };
    let what = culprit()
        .unwrap_or_else(|| "processes are born faster than they can be stopped".to_owned());
    Error::NotFrozen {
        waited_ms: timeout.as_millis() as u64,
        what,
    }
}
