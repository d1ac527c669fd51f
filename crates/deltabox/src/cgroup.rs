//! Control groups: one directory per sandbox, with a group for init and one for everything else.
//!
//! Version 2 freezes and kills; it also limits where its controllers are to be had, else version 1 hierarchies do.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Doing, Result};
use crate::spec::SandboxSpec;

/// How long killed processes may take to end, and frozen ones to stand still. Uninterruptible sleep is what takes long.
const PATIENCE: Duration = Duration::from_secs(10);

/// The hierarchies of this machine.
#[derive(Clone, Debug)]
pub(crate) struct Hierarchies {
    /// Where version 2 is mounted.
    pub(crate) unified: PathBuf,
    /// Version 1: controller and mount point.
    v1: Vec<(String, PathBuf)>,
}

impl Hierarchies {
    /// Finds them in `/proc/self/mountinfo`; `None` without a mounted version 2 hierarchy.
    pub(crate) fn find() -> io::Result<Option<Self>> {
        Ok(Self::parse(&fs::read_to_string("/proc/self/mountinfo")?))
    }

    fn parse(mountinfo: &str) -> Option<Self> {
        let mut unified = None;
        let mut v1 = Vec::new();
        for line in mountinfo.lines() {
            let Some((mount, fs)) = line.split_once(" - ") else {
                continue;
            };
            let (Some(at), Some(kind)) = (mount.split(' ').nth(4), fs.split(' ').next()) else {
                continue;
            };
            let at = PathBuf::from(unescape(at));
            match kind {
                "cgroup2" => unified = Some(at),
                "cgroup" => {
                    let options = fs.rsplit(' ').next().unwrap_or_default();
                    v1.extend(options.split(',').map(|o| (o.to_owned(), at.clone())));
                }
                _ => {}
            }
        }
        unified.map(|unified| Self { unified, v1 })
    }

    /// Whether version 2, or else version 1, has this controller.
    pub(crate) fn has(&self, controller: &str) -> bool {
        self.has_v2(controller) || self.v1(controller).is_some()
    }

    fn has_v2(&self, controller: &str) -> bool {
        fs::read_to_string(self.unified.join("cgroup.controllers"))
            .is_ok_and(|c| c.split_whitespace().any(|c| c == controller))
    }

    fn v1(&self, controller: &str) -> Option<&Path> {
        let (_, at) = self.v1.iter().find(|(c, _)| c == controller)?;
        Some(at)
    }

    /// All directories called `name` at the top of a hierarchy.
    fn tops<'a>(&'a self, name: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
        [&self.unified]
            .into_iter()
            .chain(self.v1.iter().map(|(_, at)| at))
            .map(move |at| at.join(name))
            .filter(|dir| dir.is_dir())
    }

    /// Kills all that is in the groups called `name` and removes them; says which sandboxes' they were.
    pub(crate) fn clear(&self, name: &str) -> Result<Vec<String>> {
        let mut sandboxes = Vec::new();
        for top in self.tops(name) {
            let doing = || format!("removing the control groups under {}", top.display());
            let v2 = top.starts_with(&self.unified);
            for entry in fs::read_dir(&top).doing(doing())?.flatten() {
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    if v2 {
                        kill_all(&entry.path())?;
                        sandboxes.push(entry.file_name().to_string_lossy().into_owned());
                    }
                    remove_tree(&entry.path()).doing(doing())?;
                }
            }
            remove_dir(&top).doing(doing())?;
        }
        Ok(sandboxes)
    }
}

/// Undoes the `\ooo` of mountinfo.
fn unescape(path: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((&b, tail)) = rest.split_first() {
        let octal = (b == b'\\')
            .then(|| std::str::from_utf8(tail.get(..3)?).ok())
            .flatten()
            .and_then(|o| u8::from_str_radix(o, 8).ok());
        match octal {
            Some(code) => {
                bytes.push(code);
                rest = &tail[3..];
            }
            None => {
                bytes.push(b);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The control groups of one sandbox; removed with it.
pub(crate) struct Cgroup {
    dir: PathBuf,
    v1: Vec<PathBuf>,
    /// Version 2 limits that [`Cgroup::apply`] is to set.
    pending: Vec<Limit>,
    /// The file with the limit of processes, and what it says.
    most_processes: Option<(PathBuf, String)>,
    /// What was asked for and is not to be had.
    pub(crate) warnings: Vec<String>,
    /// Another sandbox may be called so, and have groups of these names, by now.
    removed: AtomicBool,
}

impl Cgroup {
    /// Makes the groups of sandbox `name` under `parent` (a name at the top of the hierarchies). `owner` is root of the
    /// sandbox: its init gives birth into them.
    pub(crate) fn create(
        hierarchies: &Hierarchies,
        parent: &str,
        name: &str,
        owner: u32,
        spec: &SandboxSpec,
    ) -> Result<Self> {
        let top = hierarchies.unified.join(parent);
        let dir = top.join(name);
        let mut made = Self {
            dir: dir.clone(),
            v1: Vec::new(),
            pending: Vec::new(),
            most_processes: None,
            warnings: Vec::new(),
            removed: AtomicBool::new(false),
        };
        for part in [top.as_path(), &dir, &dir.join("init"), &dir.join("payload")] {
            make_dir(part).doing(format!("making the control group {}", part.display()))?;
        }
        // clone3(CLONE_INTO_CGROUP) asks for write access to this file, there and in the common ancestor. No process
        // inside can reach it: there is no cgroup filesystem in a sandbox.
        for group in [&dir, &made.payload()] {
            let procs = group.join("cgroup.procs");
            std::os::unix::fs::chown(&procs, Some(owner), Some(owner))
                .doing(format!("giving {} to the sandbox's root", procs.display()))?;
        }
        for limit in limits(spec) {
            made.limit(hierarchies, parent, name, limit)?;
        }
        Ok(made)
    }

    /// Notes a limit for version 2, or sets it by version 1, or notes that it cannot be had.
    fn limit(
        &mut self,
        hierarchies: &Hierarchies,
        parent: &str,
        name: &str,
        limit: Limit,
    ) -> Result<()> {
        let v2 = enable(&hierarchies.unified, limit.controller)
            .and_then(|()| enable(&hierarchies.unified.join(parent), limit.controller));
        match (v2, hierarchies.v1(limit.controller)) {
            (Ok(()), _) => self.pending.push(limit),
            (Err(_), Some(at)) => {
                let dir = at.join(parent).join(name);
                for part in [at.join(parent), dir.clone()] {
                    make_dir(&part)
                        .doing(format!("making the control group {}", part.display()))?;
                }
                self.v1.push(dir.clone());
                set(&dir, &limit.v1)?;
                self.note_processes(&dir, limit.v1);
            }
            (Err(why), None) => self.warnings.push(format!(
                "the {} limit is not enforced: the cgroup controller {:?} is not to be had ({why})",
                limit.what, limit.controller
            )),
        }
        Ok(())
    }

    /// Sets the version 2 limits. Only after init has started: the kernel lets nothing be born directly in a group
    /// whose children are limited, and the sandbox's builder is.
    pub(crate) fn apply(&mut self) -> Result<()> {
        for limit in std::mem::take(&mut self.pending) {
            enable(&self.dir, limit.controller).doing(format!(
                "enabling the {} controller in {}",
                limit.controller,
                self.dir.display()
            ))?;
            set(&self.payload(), &limit.v2)?;
            self.note_processes(&self.payload(), limit.v2);
        }
        Ok(())
    }

    fn note_processes(&mut self, dir: &Path, files: Vec<(&str, String)>) {
        let mut files = files.into_iter();
        if let Some((file, value)) = files.find(|(file, _)| *file == MOST_PROCESSES) {
            self.most_processes = Some((dir.join(file), value));
        }
    }

    /// Enforces the limit of processes, or lets there be any number of them.
    pub(crate) fn limit_processes(&self, whether: bool) -> io::Result<()> {
        match &self.most_processes {
            Some((file, value)) if whether => fs::write(file, value),
            Some((file, _)) => fs::write(file, "max"),
            None => Ok(()),
        }
    }

    /// The group of all processes but init.
    pub(crate) fn payload(&self) -> PathBuf {
        self.dir.join("payload")
    }

    /// Opens the sandbox's own group, init's and the payload's.
    pub(crate) fn open(&self) -> Result<[OwnedFd; 3]> {
        let open = |path: PathBuf| {
            rustix::fs::open(
                &path,
                OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY,
                Mode::empty(),
            )
            .doing(format!("opening the control group {}", path.display()))
        };
        Ok([
            open(self.dir.clone())?,
            open(self.dir.join("init"))?,
            open(self.payload())?,
        ])
    }

    /// The `cgroup.procs` of the version 1 groups to join.
    pub(crate) fn open_v1(&self) -> Result<Vec<OwnedFd>> {
        self.v1
            .iter()
            .map(|dir| {
                let path = dir.join("cgroup.procs");
                rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
                    .doing(format!("opening {}", path.display()))
            })
            .collect()
    }

    /// How many bytes of memory may still be charged; `None` if there is no limit.
    pub(crate) fn memory_left(&self) -> Option<u64> {
        let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let left = |dir: &Path, limit: &str, used: &str| {
            let limit = number(dir.join(limit))?;
            Some(limit.saturating_sub(number(dir.join(used))?))
        };
        left(&self.payload(), "memory.max", "memory.current").or_else(|| {
            let mut dirs = self.v1.iter();
            dirs.find_map(|dir| left(dir, "memory.limit_in_bytes", "memory.usage_in_bytes"))
        })
    }

    /// Kills every process, init included, and removes the groups.
    pub(crate) fn remove(&self) -> Result<()> {
        if self.removed.load(Ordering::Acquire) {
            return Ok(());
        }
        self.kill()?;
        for dir in [&self.dir].into_iter().chain(&self.v1) {
            remove_tree(dir).doing(format!("removing the control group {}", dir.display()))?;
        }
        self.removed.store(true, Ordering::Release);
        Ok(())
    }

    /// Kills every process, init included.
    pub(crate) fn kill(&self) -> Result<()> {
        kill_all(&self.dir)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Not removed yet: this is a creation that failed.
        if let Err(e) = self.remove() {
            tracing::warn!("{e}");
        }
    }
}

/// One limit in the words of both versions: file and value.
struct Limit {
    what: &'static str,
    controller: &'static str,
    v2: Vec<(&'static str, String)>,
    v1: Vec<(&'static str, String)>,
}

/// The file with the limit of processes, in both versions.
const MOST_PROCESSES: &str = "pids.max";
/// Microseconds of the period that processor time is given out in.
const PERIOD: u64 = 100_000;

fn limits(spec: &SandboxSpec) -> Vec<Limit> {
    let memory = spec.memory.map(|bytes| Limit {
        what: "memory",
        controller: "memory",
        v2: vec![
            ("memory.max", bytes.to_string()),
            ("memory.swap.max", "0".to_owned()),
        ],
        v1: vec![
            ("memory.limit_in_bytes", bytes.to_string()),
            ("memory.memsw.limit_in_bytes", bytes.to_string()),
        ],
    });
    let pids = spec.pids.map(|n| Limit {
        what: "process",
        controller: "pids",
        v2: vec![(MOST_PROCESSES, n.to_string())],
        // Init is in the version 1 group as well.
        v1: vec![(MOST_PROCESSES, (n + 1).to_string())],
    });
    let cpus = spec.cpus.map(|cpus| {
        let quota = (cpus * PERIOD as f64) as u64;
        Limit {
            what: "processor",
            controller: "cpu",
            v2: vec![("cpu.max", format!("{quota} {PERIOD}"))],
            v1: vec![
                ("cpu.cfs_period_us", PERIOD.to_string()),
                ("cpu.cfs_quota_us", quota.to_string()),
            ],
        }
    });
    [memory, pids, cpus].into_iter().flatten().collect()
}

fn set(dir: &Path, files: &[(&str, String)]) -> Result<()> {
    for (file, value) in files {
        let path = dir.join(file);
        match fs::write(&path, value) {
            // Accounting of swap may be off.
            Err(_) if file.contains("sw") => {}
            other => other.doing(format!("writing {value} to {}", path.display()))?,
        }
    }
    Ok(())
}

/// Lets the children of a group be limited by a controller.
fn enable(dir: &Path, controller: &str) -> io::Result<()> {
    let available = fs::read_to_string(dir.join("cgroup.controllers"))?;
    if !available.split_whitespace().any(|c| c == controller) {
        return Err(Errno::OPNOTSUPP.into());
    }
    fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"))
}

fn make_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Removes a group, whose last processes may still be on their way out.
fn remove_dir(path: &Path) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        match fs::remove_dir(path) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && begun.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => return other,
        }
    }
}

/// Removes a group and all below; none may have processes that stay.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    remove_dir(path)
}

/// Removes an empty parent group from every hierarchy.
pub(crate) fn remove_parent(hierarchies: &Hierarchies, parent: &str) {
    for top in hierarchies.tops(parent) {
        // Another sandbox may be in it still.
        let _ = fs::remove_dir(top);
    }
}

/// Kills every process in a group and below (`cgroup.kill`) and waits until it is empty.
pub(crate) fn kill_all(dir: &Path) -> Result<()> {
    let kill = dir.join("cgroup.kill");
    if !kill.exists() {
        return Ok(());
    }
    fs::write(&kill, "1").doing(format!("writing to {}", kill.display()))?;
    wait_for(dir, "populated 0").doing(format!("waiting for the end of all in {}", dir.display()))
}

/// Stops every process of a group, or lets them go on. Stopped when this returns.
pub(crate) fn freeze(dir: &Path, frozen: bool) -> Result<()> {
    let file = dir.join("cgroup.freeze");
    let value = if frozen { "1" } else { "0" };
    fs::write(&file, value).doing(format!("writing {value} to {}", file.display()))?;
    if frozen {
        wait_for(dir, "frozen 1").doing(format!("waiting for {} to freeze", dir.display()))?;
    }
    Ok(())
}

/// Waits until `cgroup.events` has this line.
fn wait_for(dir: &Path, line: &str) -> io::Result<()> {
    let events = fs::File::open(dir.join("cgroup.events"))?;
    let begun = Instant::now();
    loop {
        let mut buffer = [0; 256];
        let n = rustix::io::pread(&events, &mut buffer, 0)?;
        if buffer[..n]
            .split(|&b| b == b'\n')
            .any(|l| l == line.as_bytes())
        {
            return Ok(());
        }
        let Some(left) = PATIENCE.checked_sub(begun.elapsed()) else {
            return Err(Errno::TIMEDOUT.into());
        };
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(
            events.as_fd(),
            rustix::event::PollFlags::PRI,
        )];
        let left = rustix::event::Timespec::try_from(left).map_err(io::Error::other)?;
        match rustix::event::poll(&mut fds, Some(&left)) {
            Err(Errno::INTR) => {}
            other => drop(other?),
        }
    }
}

/// The processes of a group, as this process sees their pids.
pub(crate) fn processes(dir: &Path) -> io::Result<Vec<i32>> {
    Ok(fs::read(dir.join("cgroup.procs"))?
        .split(|&b| b == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok()?.parse().ok())
        .collect())
}

/// The name of the parent group of the sandboxes of a state directory.
pub(crate) fn parent_name(state_dir: &Path) -> String {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(state_dir.as_os_str().as_bytes());
    let hex: String = digest[..6].iter().map(|b| format!("{b:02x}")).collect();
    format!("deltabox-{hex}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_hierarchies_are_found() {
        let h = Hierarchies::parse(
            "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
             32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
             41 31 0:38 / /sys/fs/cgroup/a\\040b rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
        )
        .unwrap();
        assert_eq!(h.unified, Path::new("/sys/fs/cgroup/a b"));
        assert_eq!(h.v1("cpu"), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct")));
        assert_eq!(h.v1("memory"), None);
    }

    #[test]
    fn without_version_2_there_is_none() {
        assert!(Hierarchies::parse("1 2 0:1 / / rw - ext4 /dev/vda rw").is_none());
    }
}
