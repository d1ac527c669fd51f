//! Holding a whole tree: its threads are seized, and stand still until they are let go.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::catch::{Catcher, Caught, is_dead};
use crate::env::Environment;
use crate::error::{During, Error, Result};
use crate::freeze::Freezer;
use crate::ids::{HostPid, InnerPid};
use crate::limits::Room;
use crate::mem::Layout;
use crate::procfs::{OpenFiles, Procfs, Stat};
use crate::remote::Remote;
use crate::stop::{Stopped, StoppedThread};
use crate::waits::Waits;

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(1);

/// How often it is looked for who did not stop.
const LOOKS: u32 = 20;

/// The code segment of 64-bit user mode.
const CS_64: u64 = 0x33;

/// Of so many processes what is read at every visit stays open,
const KEEP_OPEN: usize = 16;
/// up to so many files of each,
const OF_EACH: u64 = 14;
/// as long as that is at most this part of what this process may have open.
const PART: u64 = 16;

/// What the engine remembers of a process from one visit to the next.
pub(crate) struct Acquaintance {
    pub(crate) pid: InnerPid,
    /// With the pid, tells a process from a later one.
    pub(crate) start: u64,
    /// When the process was first born.
    pub(crate) birth: u64,
    pub(crate) area: Option<u64>,
    pub(crate) threads: HashMap<HostPid, InnerPid>,
    pub(crate) files: OpenFiles,
    /// What the files may be kept open by.
    _keep: Option<Keep>,
}

impl Acquaintance {
    /// Whether it had one thread.
    pub(crate) fn is_single(&self) -> bool {
        self.threads.len() == 1
    }
}

/// The right to keep files of a process open; all engines have the same number of them.
pub(crate) struct Keep(());

impl Keep {
    fn taken() -> &'static AtomicU64 {
        static TAKEN: AtomicU64 = AtomicU64::new(0);
        &TAKEN
    }

    /// How many there are.
    fn all() -> u64 {
        static ALL: OnceLock<u64> = OnceLock::new();
        *ALL.get_or_init(|| {
            let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
            limit.current.map_or(u64::MAX, |most| most / PART / OF_EACH)
        })
    }

    fn take() -> Option<Self> {
        let more = |taken| (taken < Self::all()).then_some(taken + 1);
        let took = Self::taken().fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        took.ok().map(|_| Self(()))
    }
}

impl Drop for Keep {
    fn drop(&mut self) {
        Self::taken().fetch_sub(1, Ordering::Relaxed);
    }
}

/// All processes that the engine met, by their number outside.
pub(crate) type Acquaintances = HashMap<HostPid, Acquaintance>;

/// What a sandbox's processes are found and frozen by, and the limits that they are born with; opened once.
pub(crate) struct Grounds {
    pub(crate) procfs: Procfs,
    pub(crate) freezer: Freezer,
    pub(crate) room: Arc<Room>,
}

impl Grounds {
    pub(crate) fn open(env: &dyn Environment) -> Result<Self> {
        let room = Room::of(env.init_pid()).during_tree("reading the limits of init")?;
        Ok(Self {
            room: Arc::new(room),
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
    /// Those that [`Held::find_dead`] found.
    pub(crate) zombies: BTreeMap<InnerPid, Stat>,
    /// What it found of init's dead children.
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
        known: &Acquaintances,
        waits: &mut Waits,
        timeout: Duration,
    ) -> Result<Self> {
        let Grounds {
            procfs, freezer, ..
        } = grounds;
        let start = Instant::now();
        let mut catcher = Catcher::new(procfs, freezer, known, waits);
        if let Some(processes) = catcher.running() {
            return Ok(Self::caught(procfs, processes, start));
        }
        loop {
            let since = Instant::now();
            let left = timeout.saturating_sub(start.elapsed());
            let frozen = catcher.freezer.freeze(left);
            if !frozen.during_tree("freezing the processes")? {
                return Err(not_frozen(catcher.freezer, timeout));
            }
            match catcher.frozen()? {
                Some(processes) => return Ok(Self::caught(procfs, processes, since)),
                None if start.elapsed() > timeout => {
                    return Err(not_frozen(catcher.freezer, timeout));
                }
                None => std::thread::sleep(PAUSE),
            }
        }
    }

    /// A tree that was stopped; from here on it is let go when it is dropped.
    fn caught(procfs: &Procfs, processes: Caught, since: Instant) -> Self {
        Self {
            procfs: procfs.clone(),
            processes,
            zombies: BTreeMap::new(),
            deaths: Deaths::Reported,
            since,
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

    /// Finds the zombies, and whether init has children to bury. Those that are held may be busy meanwhile.
    pub(crate) fn find_dead(&mut self) -> Result<()> {
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

    /// Refuses processes that could not even be asked what they are.
    pub(crate) fn refuse_32_bit(&self) -> Result<()> {
        let speaks = |process: &HeldProcess| {
            let mut threads = process.stopped.threads.iter();
            threads.all(|thread| thread.regs.cs == CS_64)
        };
        match self.processes.iter().find(|(_, process)| !speaks(process)) {
            None => Ok(()),
            Some((pid, process)) => Err(Error::Unsupported {
                pid: *pid,
                name: String::from_utf8_lossy(&process.stat.name).into_owned(),
                what: "it is a 32-bit program; run its 64-bit build".to_owned(),
            }),
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
            let few = self.processes.len() <= KEEP_OPEN;
            let keep = few.then(Keep::take).flatten();
            let files = match &keep {
                Some(_) => process.stopped.remote.files().clone(),
                None => OpenFiles::default(),
            };
            let acquaintance = Acquaintance {
                pid: *pid,
                start: process.stat.start,
                birth: process.birth,
                area: process.stopped.remote.area_address(),
                threads,
                files,
                _keep: keep,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_kept_open_than_there_is_room_for() {
        let kept: Vec<Keep> = std::iter::from_fn(Keep::take).take(1 << 20).collect();
        assert_eq!(kept.len() as u64, Keep::all());
        assert!(Keep::take().is_none());
        drop(kept);
        assert!(Keep::take().is_some());
    }
}
