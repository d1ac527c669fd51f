//! Stopping a tree that runs: every thread is seized and waited for.
//!
//! Mostly it suffices to stop whoever is there, and to look again until there is nobody new. Where processes are born faster
//! than that, the whole cgroup is frozen first.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use crate::error::{During, Error, Result};
use crate::freeze::{Freezer, glance};
use crate::hold::{Acquaintance, Acquaintances, HeldProcess};
use crate::ids::{HostPid, InnerPid};
use crate::mem::Layout;
use crate::procfs::{self, OpenFiles, Procfs, Stat};
use crate::stop::{Stopped, let_run, task_ids};
use crate::sys::ptrace::{self, Stop};
use crate::waits::Waits;

/// How long a thread that cannot stop (it waits for its `vfork` child, say) holds up all others
/// before they are let go for another try.
const PATIENCE: Duration = Duration::from_millis(20);
/// For so long, another thread of a process whose first thread has ended may be about to take its place (`execve`), or on its way
/// out as well.
const DYING: Duration = Duration::from_millis(50);
/// How often it is looked for new threads before the cgroup is frozen.
const ROUNDS: usize = 3;

/// The processes of a tree, all of whose threads stand still.
pub(crate) type Caught = BTreeMap<InnerPid, HeldProcess>;

/// What stops a tree.
pub(crate) struct Catcher<'a> {
    procfs: &'a Procfs,
    pub(crate) freezer: &'a mut Freezer,
    known: &'a Acquaintances,
    /// Threads that were seized and did not stop in time: they are this thread's until they do.
    late: HashSet<HostPid>,
    /// What those who are let go have waited for is put down here: the next stop does not tell.
    waits: &'a mut Waits,
    begun: Instant,
}

/// A process and its threads.
struct Found {
    pid: InnerPid,
    host: HostPid,
    area: Option<u64>,
    stat: Stat,
    bounds: Layout,
    birth: u64,
    threads: Vec<(HostPid, InnerPid)>,
    files: OpenFiles,
}

impl<'a> Catcher<'a> {
    pub(crate) fn new(
        procfs: &'a Procfs,
        freezer: &'a mut Freezer,
        known: &'a Acquaintances,
        waits: &'a mut Waits,
    ) -> Self {
        Self {
            procfs,
            freezer,
            known,
            late: HashSet::new(),
            waits,
            begun: Instant::now(),
        }
    }

    /// Stops everybody without the freezer. `None` if that does not work out, for whatever reason: all run again, and
    /// [`Catcher::frozen`] knows better.
    pub(crate) fn running(&mut self) -> Option<Caught> {
        let mut seized = Vec::new();
        let caught = self.stop_all(&mut seized);
        if caught.is_none() {
            self.let_go(&seized);
        }
        caught
    }

    fn stop_all(&mut self, seized: &mut Vec<HostPid>) -> Option<Caught> {
        let mut new: Vec<HostPid> = Vec::new();
        for host in self.freezer.members().ok()? {
            match self.known.get(&host).is_some_and(Acquaintance::is_single) {
                true => new.push(host),
                false => new.extend(task_ids(host).ok()?),
            }
        }
        let mut stops = HashMap::with_capacity(new.len());
        for _ in 0..ROUNDS {
            for host in &new {
                ptrace::seize_plainly(*host).ok()?;
                seized.push(*host);
                ptrace::interrupt(*host).ok()?;
            }
            stops.extend(await_all(&new)?);
            // Who stands still starts no threads and no processes.
            let found = self.find().ok()??;
            let threads = found.iter().flat_map(|process| &process.threads);
            let unseen = threads.map(|(host, _)| *host);
            new = unseen.filter(|host| !stops.contains_key(host)).collect();
            if new.is_empty() {
                return hold_all(&found, &stops).ok();
            }
        }
        None
    }

    /// Stops everybody; the cgroup is frozen, and is not any more when this returns. `None` if some thread could not stop
    /// all the same, or was killed meanwhile; then all run again.
    pub(crate) fn frozen(&mut self) -> Result<Option<Caught>> {
        let found = self.find().and_then(|found| {
            let mut seized = Vec::new();
            let mut processes = found.iter().flatten();
            match processes.try_for_each(|process| self.seize(process, &mut seized)) {
                Ok(()) => Ok(found),
                Err(e) => {
                    let _ = self.freezer.thaw();
                    self.let_go(&seized);
                    none_if_killed(found.iter().flatten(), e)
                }
            }
        });
        self.freezer.thaw().during_tree("thawing the processes")?;
        let Some(found) = found? else {
            return Ok(None);
        };
        let threads = found.iter().flat_map(|process| &process.threads);
        let threads: Vec<HostPid> = threads.map(|(host, _)| *host).collect();
        let Some(stops) = await_all(&threads) else {
            self.let_go(&threads);
            return Ok(None);
        };
        match hold_all(&found, &stops) {
            Ok(caught) => Ok(Some(caught)),
            Err(e) => {
                self.let_go(&threads);
                none_if_killed(found.iter(), e)
            }
        }
    }

    fn seize(&self, process: &Found, seized: &mut Vec<HostPid>) -> Result<()> {
        for (host, _) in &process.threads {
            match ptrace::seize_plainly(*host) {
                Err(_) if self.late.contains(host) => {}
                other => other.map_err(|source| refusal(process, source))?,
            }
            seized.push(*host);
            ptrace::interrupt(*host).during(process.pid, "stopping a thread")?;
        }
        Ok(())
    }

    /// Lets threads run on that were seized and interrupted. Those that have not stopped yet are let go by the kernel when
    /// this thread ends.
    fn let_go(&mut self, threads: &[HostPid]) {
        let end = Instant::now() + PATIENCE;
        self.late = threads.iter().copied().collect();
        while !self.late.is_empty() && Instant::now() < end {
            self.late.retain(|host| {
                // It stopped in an earlier wait already; or it stops, or is found dead, now.
                if let_run(*host, self.waits).is_ok() {
                    return false;
                }
                match ptrace::wait(*host, false) {
                    Ok(None) => true,
                    Ok(Some(Stop::Gone(_))) | Err(_) => false,
                    Ok(Some(_)) => let_run(*host, self.waits).is_err(),
                }
            });
            std::thread::yield_now();
        }
    }

    /// The processes that there are. `None` if one was killed meanwhile.
    fn find(&mut self) -> Result<Option<Vec<Found>>> {
        let hosts = self
            .freezer
            .members()
            .during_tree("listing the processes")?;
        let mut found = Vec::with_capacity(hosts.len());
        for host in hosts {
            match meet(self.procfs, host, self.known) {
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
                if self.begun.elapsed() < DYING || is_being_killed(process.host) {
                    return Ok(None);
                }
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
}

/// Takes up what was found and has stopped. If that fails, those that were taken up are let go.
fn hold_all(found: &[Found], stops: &HashMap<HostPid, Stop>) -> Result<Caught> {
    let mut caught = BTreeMap::new();
    for process in found {
        match hold(process, stops).during(process.pid, "reading the registers") {
            Ok(held) => caught.insert(process.pid, held),
            Err(e) => {
                for (_, held) in caught {
                    // What cannot be let go now is when this thread ends.
                    let _ = held.stopped.release();
                }
                return Err(e);
            }
        };
    }
    Ok(caught)
}

fn hold(process: &Found, stops: &HashMap<HostPid, Stop>) -> io::Result<HeldProcess> {
    let user_stop = match stops.get(&process.host) {
        Some(Stop::GroupStopped(signal)) => Some(*signal),
        _ => None,
    };
    for (host, _) in &process.threads {
        ptrace::set_options(*host)?;
    }
    let stopped = Stopped::hold(
        process.pid,
        process.host,
        &process.threads,
        process.area,
        process.files.clone(),
    )?;
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

/// How each thread stopped. `None` if one did not in time, or is dead.
fn await_all(threads: &[HostPid]) -> Option<HashMap<HostPid, Stop>> {
    let mut stops = HashMap::with_capacity(threads.len());
    let end = Instant::now() + PATIENCE;
    let mut glances = 0;
    loop {
        for host in threads {
            if stops.contains_key(host) {
                continue;
            }
            match ptrace::wait(*host, false) {
                Ok(Some(stop @ (Stop::Interrupted | Stop::GroupStopped(_)))) => {
                    stops.insert(*host, stop);
                }
                // It was about to get a signal. It gets it, and stops before it runs on.
                Ok(Some(Stop::Signal(signal))) => ptrace::resume_with(*host, signal).ok()?,
                Ok(Some(Stop::Gone(_))) => return None,
                Ok(Some(Stop::SystemCall | Stop::Born | Stop::Executed)) => {
                    ptrace::resume(*host).ok()?;
                }
                Ok(None) | Err(_) => {}
            }
        }
        if stops.len() == threads.len() {
            return Some(stops);
        }
        if Instant::now() > end {
            return None;
        }
        glance(&mut glances);
    }
}

fn meet(procfs: &Procfs, host: HostPid, known: &Acquaintances) -> io::Result<Found> {
    let acquaintance = known.get(&host);
    let files = OpenFiles::default();
    let again = acquaintance.and_then(|k| {
        let (stat, bounds) = procfs.stat_and_bounds(k.pid, &k.files).ok()?;
        (stat.start == k.start).then_some((k.pid, stat, bounds))
    });
    let (pid, stat, bounds, acquaintance) = match again {
        Some((pid, stat, bounds)) => (pid, stat, bounds, acquaintance),
        None => {
            let pid = host.inner()?;
            let (stat, bounds) = procfs.stat_and_bounds(pid, &files)?;
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
        files: acquaintance.map_or(files, |k| k.files.clone()),
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
    for tid in task_ids(host)?.into_iter().filter(|tid| *tid != host) {
        // The number outside may have been used again since, by a thread with another number inside.
        let inner = match known.and_then(|k| k.threads.get(&tid)) {
            Some(inner) if procfs.has_thread(pid, *inner) => *inner,
            _ => tid.inner()?,
        };
        threads.push((tid, inner));
    }
    Ok(threads)
}

/// Whether a thread of a process still has to hear that it was killed.
fn is_being_killed(host: HostPid) -> bool {
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    let pending = |tid: HostPid| {
        let status = fs::read_to_string(format!("/proc/{host}/task/{tid}/status")).ok()?;
        let mut lines = status.lines();
        let set = lines.find_map(|line| line.strip_prefix("SigPnd:"))?;
        u64::from_str_radix(set.trim(), 16).ok()
    };
    let threads = task_ids(host).unwrap_or_default().into_iter();
    threads.filter_map(pending).any(|set| set & KILL != 0)
}

/// Whether a process is gone or a zombie.
pub(crate) fn is_dead(host: HostPid) -> bool {
    let stat = fs::read(format!("/proc/{host}/stat")).ok();
    let stat = stat.and_then(|text| procfs::parse_stat(&text));
    stat.is_none_or(|stat| matches!(stat.state, b'Z' | b'X'))
}
