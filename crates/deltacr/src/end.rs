//! Deaths: processes that are not in the state to come are killed, and taken off their parents' hands.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::birth::spawn;
use crate::error::{During, Result};
use crate::freeze::Freezer;
use crate::hold::{Deaths, Grounds, Held};
use crate::ids::{HostPid, InnerPid};
use crate::image::TreeImage;
use crate::keepers;
use crate::sys::process;
use crate::sys::ptrace;

/// How long dead processes may take to be gone.
const TIMEOUT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_micros(50);

/// Kills every held process that is not to be kept, and does away with the zombies that are not to last.
/// Returns how many were killed.
pub(crate) fn others(
    held: &mut Held,
    keep: &BTreeSet<InnerPid>,
    target: &TreeImage,
) -> Result<usize> {
    let lasting = keepers::lasting_zombies(held, target, keep);
    let doomed: Vec<InnerPid> = held
        .processes
        .keys()
        .filter(|pid| !keep.contains(pid))
        .copied()
        .collect();
    for pid in &doomed {
        let remote = &held.processes[pid].stopped.remote;
        process::pidfd_signal(remote.pidfd(), libc::SIGKILL).during(*pid, "killing it")?;
    }
    for pid in &doomed {
        let process = held.processes.remove(pid).expect("it was just found");
        let threads: Vec<HostPid> = process.stopped.threads.iter().map(|t| t.host).collect();
        spawn::kill(&process.stopped.remote, &threads).during(*pid, "killing it")?;
    }
    let unreaped = !doomed.is_empty() || held.deaths == Deaths::Pending;
    if unreaped || held.zombies.keys().any(|pid| !lasting.contains(pid)) {
        bury(held, keep, &lasting)?;
        // Init reports before it reaps.
        held.deaths = Deaths::Reported;
    }
    Ok(doomed.len())
}

/// Makes the parents wait for their dead children; init does by itself.
fn bury(held: &mut Held, keep: &BTreeSet<InnerPid>, lasting: &BTreeSet<InnerPid>) -> Result<()> {
    let end = Instant::now() + TIMEOUT;
    loop {
        let mut of_parent: BTreeMap<InnerPid, Vec<InnerPid>> = BTreeMap::new();
        let mut left = Vec::new();
        for pid in held
            .procfs
            .processes()
            .during_tree("listing the processes")?
        {
            if pid.0 == 1 || keep.contains(&pid) || lasting.contains(&pid) {
                continue;
            }
            if let Ok(stat) = held.procfs.stat(pid) {
                left.push(pid);
                of_parent.entry(stat.parent).or_default().push(pid);
            }
        }
        for (parent, children) in &of_parent {
            if let Some(remote) = held.remote(*parent) {
                spawn::reap(remote, children)
                    .during(*parent, "taking dead children off its hands")?;
            }
        }
        if left.is_empty() {
            held.zombies.retain(|pid, _| lasting.contains(pid));
            return Ok(());
        }
        if Instant::now() > end {
            return Err(io::Error::from(io::ErrorKind::TimedOut))
                .during(left[0], "waiting for the end");
        }
        // One that died before it could be held may still be this thread's: its parent cannot wait for it before.
        ptrace::reap_tracees().during_tree("waiting for the processes' end")?;
        std::thread::sleep(PAUSE);
    }
}

/// Kills everything in the sandbox's cgroup, and waits until it is gone. The calling thread may trace any of it.
///
/// Not by `cgroup.kill`: Linux 6.18 afterwards kills every process that init makes right in that cgroup
/// (`CLONE_INTO_CGROUP`), since it compares the count of kills of the parent's cgroup with that of the child's.
pub(crate) fn all(grounds: &mut Grounds) -> Result<()> {
    let Grounds {
        procfs, freezer, ..
    } = grounds;
    let end = Instant::now() + TIMEOUT;
    loop {
        kill_listed(freezer).during_tree("killing the processes")?;
        ptrace::reap_tracees().during_tree("waiting for the processes' end")?;
        // The dead stay listed until init has waited for them.
        let left = procfs.processes().during_tree("listing the processes")?;
        if left.iter().all(|pid| pid.0 == 1) {
            return Ok(());
        }
        if Instant::now() > end {
            let pid = left.into_iter().find(|pid| pid.0 != 1).unwrap_or_default();
            return Err(io::Error::from(io::ErrorKind::TimedOut))
                .during(pid, "waiting for the end");
        }
        std::thread::sleep(PAUSE);
    }
}

/// Kills what the cgroup lists, frozen meanwhile so that nothing is born unseen; the frozen die, too.
fn kill_listed(freezer: &mut Freezer) -> io::Result<()> {
    if freezer.members()?.is_empty() {
        return Ok(());
    }
    // Not waiting until everything is frozen: what is not is killed in the next round.
    freezer.begin()?;
    let killed = freezer.members().map(|members| {
        for host in members {
            // It may be gone already.
            let _ = process::pidfd_open(host)
                .and_then(|pidfd| process::pidfd_signal(pidfd.as_fd(), libc::SIGKILL));
        }
    });
    freezer.thaw()?;
    killed
}
