//! What the kernel offers, found out by trying it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use deltafs::{IdMap, Options, Volume};
use rustix::fs::{Mode, OFlags};

use crate::cgroup::{self, Hierarchies};
use crate::container::{self, IDS};
use crate::host::{Host, HostConfig};
use crate::report::Feature;
use crate::spec::SandboxSpec;
use crate::sys::probe;

/// A pid that is free in a sandbox that has just begun.
const CHOSEN_PID: i32 = 4321;

/// Tries everything.
pub(crate) fn examine() -> Vec<Feature> {
    let mut features = vec![
        feature(
            "root",
            is_root(),
            "real root of the machine",
            "run it as root (sudo): it mounts filesystems and traces processes of other users",
        ),
        feature(
            "write tracking (userfaultfd WP_ASYNC)",
            probe::write_tracking(),
            "finds the memory that a step has changed",
            "needs Linux 6.7 or newer with CONFIG_USERFAULTFD, on x86-64",
        ),
        feature(
            "page scan (PAGEMAP_SCAN)",
            probe::page_scan(),
            "lists changed memory in one call",
            "needs Linux 6.7 or newer with CONFIG_PROC_PAGE_MONITOR",
        ),
    ];
    let scratch = Scratch::new();
    features.extend(files(&scratch));
    features.extend(groups());
    features.push(feature(
        "sandbox (user, pid, mount, net, ipc, uts and cgroup namespaces, seccomp)",
        sandbox(&scratch),
        "a whole sandbox was started, a process with a chosen pid born in it, and removed",
        "needs CONFIG_USER_NS, CONFIG_PID_NS, CONFIG_NET_NS, CONFIG_SECCOMP_FILTER and CONFIG_CHECKPOINT_RESTORE, and \
         sysctls user.max_user_namespaces and the like above 0; in a container: --privileged",
    ));
    features.push(rings());
    features.extend(controllers());
    features
}

fn feature(name: &str, tried: io::Result<()>, good: &str, advice: &str) -> Feature {
    Feature {
        name: name.to_owned(),
        present: tried.is_ok(),
        required: true,
        detail: match tried {
            Ok(()) => good.to_owned(),
            Err(e) => format!("{e}; {advice}"),
        },
    }
}

fn is_root() -> io::Result<()> {
    let map = fs::read_to_string("/proc/self/uid_map")?;
    let whole = map.split_whitespace().collect::<Vec<_>>() == ["0", "0", "4294967295"];
    match (rustix::process::geteuid().is_root(), whole) {
        (true, true) => Ok(()),
        (true, false) => Err(io::Error::other("root of a user namespace only")),
        _ => Err(io::Error::other("not root")),
    }
}

/// A directory for the tries, removed afterwards.
struct Scratch(io::Result<PathBuf>);

impl Scratch {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("deltabox-doctor-{}", std::process::id()));
        let made = fs::create_dir_all(path.join("base")).and_then(|()| path.canonicalize());
        Self(made)
    }

    fn path(&self) -> io::Result<&Path> {
        match &self.0 {
            Ok(path) => Ok(path),
            Err(e) => Err(io::Error::new(
                e.kind(),
                format!("no scratch directory: {e}"),
            )),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Ok(path) = &self.0 {
            // Only scratch; nothing depends on it.
            let _ = fs::remove_dir_all(path);
        }
    }
}

fn files(scratch: &Scratch) -> [Feature; 2] {
    let volume = || -> io::Result<Volume> {
        let path = scratch.path()?;
        let base = rustix::fs::open(
            path.join("base"),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Volume::create(Options {
            base,
            hidden: Vec::new(),
            ids: IdMap {
                outside_first: 0,
                count: IDS,
            },
            data_dir: path.to_owned(),
            threads: 1,
        })
        .map_err(io::Error::other)
    };
    let volume = volume();
    let handle = match &volume {
        Ok(volume) => rustix::fs::fstat(volume.mount())
            .map_err(io::Error::from)
            .and_then(|root| volume.open_inode(root.st_ino, libc::O_PATH | libc::O_DIRECTORY))
            .map(drop),
        Err(_) => Err(io::Error::other("not tried without FUSE")),
    };
    [
        feature(
            "FUSE",
            volume.map(drop),
            "a DeltaFS was mounted",
            "needs CONFIG_FUSE_FS (modprobe fuse) and /dev/fuse; in a container: --device /dev/fuse and --privileged",
        ),
        feature(
            "file handles (open_by_handle_at)",
            handle,
            "opens files that have lost their name",
            "needs CONFIG_FHANDLE and CAP_DAC_READ_SEARCH",
        ),
    ]
}

/// What takes a control group and a process in it.
fn groups() -> Vec<Feature> {
    let found = Hierarchies::find().and_then(|h| {
        h.ok_or_else(|| io::Error::other("no cgroup version 2 hierarchy is mounted"))
    });
    let mount = "mount -t cgroup2 none /sys/fs/cgroup/unified, or boot with systemd.unified_cgroup_hierarchy=1; \
                 freezing and killing need Linux 5.14 or newer";
    let group = found.and_then(Group::new);
    let (group, idle) = match &group {
        Ok(group) => (Ok(group), container::start_idle(group.fd.as_fd())),
        Err(e) => (
            Err(io::Error::other(e.to_string())),
            Err(io::Error::other("not tried without a control group")),
        ),
    };
    let with_child = |try_it: &dyn Fn(i32) -> io::Result<()>| match &idle {
        Ok((pid, _)) => try_it(*pid),
        Err(e) => Err(io::Error::other(format!("no process to try it on: {e}"))),
    };
    let freeze = group.as_ref().map_or_else(
        |e| Err(io::Error::other(e.to_string())),
        |group| {
            cgroup::freeze(&group.path, true)
                .and_then(|()| cgroup::freeze(&group.path, false))
                .map_err(io::Error::other)
        },
    );
    let born = with_child(&|_| Ok(()));
    let mut features = vec![
        feature(
            "cgroup v2 freezer",
            freeze,
            "stops all processes of a sandbox at once",
            mount,
        ),
        feature(
            "birth in a control group (clone3)",
            born,
            "a process was started in one",
            "needs Linux 5.7 or newer and write access to the cgroup hierarchy",
        ),
        feature(
            "ptrace (PTRACE_SEIZE, PTRACE_O_SUSPEND_SECCOMP)",
            with_child(&probe::seize),
            "looks into processes and restores them",
            "needs CONFIG_CHECKPOINT_RESTORE, and that this process has no seccomp filter itself; \
             in a container: --security-opt seccomp=unconfined",
        ),
        feature(
            "descriptors of others (pidfd_getfd)",
            with_child(&|pid| probe::take_descriptor(pid).map(drop)),
            "copies descriptors out of processes",
            "needs Linux 5.6 or newer",
        ),
        feature(
            "comparison of kernel objects (kcmp)",
            with_child(&probe::compare),
            "finds descriptors that share one open file",
            "needs CONFIG_KCMP or CONFIG_CHECKPOINT_RESTORE",
        ),
    ];
    let killed = group.map(|group| cgroup::kill_all(&group.path).map_err(io::Error::other));
    features.push(feature(
        "cgroup.kill",
        killed.unwrap_or_else(Err),
        "ends all processes of a sandbox at once",
        mount,
    ));
    if let Ok((pid, control)) = idle {
        // Ends by itself without its socket, if it was not killed.
        drop(control);
        container::reap(pid);
    }
    features
}

/// A control group for the tries, removed afterwards.
struct Group {
    path: PathBuf,
    fd: OwnedFd,
}

impl Group {
    fn new(hierarchies: Hierarchies) -> io::Result<Self> {
        let name = format!("deltabox-doctor-{}", std::process::id());
        let path = hierarchies.unified.join(name);
        match fs::create_dir(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let fd = rustix::fs::open(
            &path,
            OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY,
            Mode::empty(),
        )?;
        Ok(Self { path, fd })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir(&self.path) {
            tracing::warn!("removing {}: {e}", self.path.display());
        }
    }
}

fn sandbox(scratch: &Scratch) -> io::Result<()> {
    let host = Host::open(HostConfig {
        state_dir: scratch.path()?.join("state"),
        ..HostConfig::default()
    })
    .map_err(io::Error::other)?;
    let sandbox = host
        .create(SandboxSpec {
            base: scratch.path()?.join("base"),
            ..SandboxSpec::default()
        })
        .map_err(io::Error::other)?;
    let container = sandbox.container();
    container.birth(CHOSEN_PID)?;
    container.set_next_pid(CHOSEN_PID + 1)
}

fn rings() -> Feature {
    let present = deltafs::io_uring_is_offered();
    let detail = match present {
        true => "files that are touched for the first time cost a sixth to a half less",
        false => {
            "files are served by /dev/fuse, which makes those that are touched for the first time slower; to turn it on for all \
             of the machine (Linux 6.14 or newer, at most 16 processors): \
             echo Y > /sys/module/fuse/parameters/enable_uring"
        }
    };
    Feature {
        name: "FUSE over io_uring".to_owned(),
        present,
        required: false,
        detail: detail.to_owned(),
    }
}

fn controllers() -> [Feature; 3] {
    let hierarchies = Hierarchies::find().ok().flatten();
    [
        ("memory", "memory"),
        ("pids", "process"),
        ("cpu", "processor"),
    ]
    .map(|(controller, what)| {
        let present = hierarchies.as_ref().is_some_and(|h| h.has(controller));
        Feature {
            name: format!("{what} limit (cgroup controller {controller})"),
            present,
            required: false,
            detail: if present {
                format!("sandboxes can have a {what} limit")
            } else {
                format!(
                    "sandboxes run without a {what} limit and say so; enable the {controller} controller in \
                     /sys/fs/cgroup/cgroup.subtree_control to have one"
                )
            },
        }
    })
}
