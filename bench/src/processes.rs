//! Finds the processes of a sandbox from outside, without asking DeltaBox.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// The programs of a sandbox of this process.
pub(crate) struct Programs {
    /// Their pids, as the host sees them.
    pub(crate) pids: Vec<i32>,
    /// The directory of the control group that holds them and nothing else.
    pub(crate) cgroup: PathBuf,
}

impl Programs {
    /// Those of the only sandbox: all descendants of this process that live in a pid namespace of their own and are not its init.
    pub(crate) fn find() -> Result<Self> {
        Self::those(inside_all()?)
    }

    /// Those of the sandbox of this name, after which its control groups are called.
    pub(crate) fn of(name: &str) -> Result<Self> {
        let mut pids = Vec::new();
        for pid in inside_all()? {
            let mut groups = cgroup(pid)?;
            groups.pop();
            if groups.ends_with(name) {
                pids.push(pid);
            }
        }
        Self::those(pids)
    }

    fn those(pids: Vec<i32>) -> Result<Self> {
        let Some(first) = pids.first() else {
            bail!("the sandbox has no processes")
        };
        Ok(Self {
            cgroup: cgroup(*first)?,
            pids,
        })
    }

    /// The threads of a process.
    pub(crate) fn threads(pid: i32) -> Result<Vec<i32>> {
        let entries = fs::read_dir(format!("/proc/{pid}/task"))?;
        let numbers = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().parse()?));
        numbers.collect()
    }
}

/// The programs of all sandboxes of this process, as the host sees their pids.
pub(crate) fn inside_all() -> Result<Vec<i32>> {
    let all = all_processes()?;
    let ours = std::process::id() as i32;
    let descends = |pid: i32| {
        let up = |pid: &i32| all.get(pid).map(|p: &Process| p.parent);
        std::iter::successors(Some(pid), up).any(|p| p == ours)
    };
    let inside = |p: &Process| matches!(p.pids[..], [_, .., pid] if pid != 1);
    let found = all
        .iter()
        .filter(|(pid, process)| inside(process) && descends(**pid));
    Ok(found.map(|(pid, _)| *pid).collect())
}

/// A process's proportional share of the memory that it has mapped, in bytes.
pub(crate) fn pss(pid: i32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kib: u64 = kib.context("smaps_rollup has no Pss")?.trim().parse()?;
    Ok(kib << 10)
}

struct Process {
    parent: i32,
    /// Its pid in each pid namespace, the outermost first.
    pids: Vec<i32>,
}

fn all_processes() -> Result<BTreeMap<i32, Process>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Ok(pid) = name.to_string_lossy().parse::<i32>() else {
            continue;
        };
        // It may have ended meanwhile.
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else {
            continue;
        };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let numbers = |name: &str| -> Vec<i32> {
            let words = field(name).unwrap_or_default().split_whitespace();
            words.filter_map(|word| word.parse().ok()).collect()
        };
        let process = Process {
            parent: numbers("PPid:").first().copied().unwrap_or(0),
            pids: numbers("NSpid:"),
        };
        all.insert(pid, process);
    }
    Ok(all)
}

/// The directory of a process's group in the version 2 hierarchy.
fn cgroup(pid: i32) -> Result<PathBuf> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let root = mounts
        .lines()
        .filter_map(|line| line.split_once(" - cgroup2 "))
        .find_map(|(mount, _)| mount.split(' ').nth(4));
    let root = root.context("no cgroup version 2 hierarchy is mounted")?;
    let path = path.with_context(|| format!("process {pid} is in no control group"))?;
    Ok(PathBuf::from(root).join(path))
}
