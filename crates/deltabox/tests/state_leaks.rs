//! Nothing may be left of a sandbox: a program of its own, so that nobody else opens or starts anything meanwhile.
#![cfg(target_os = "linux")]

#[path = "state/lab.rs"]
#[allow(dead_code, reason = "only a part is used here")]
mod lab;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use deltabox::{Host, HostConfig, SandboxSpec};
use lab::{PYTHON, Program, output};

/// What a supervisor can leave behind.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    /// Kind of each descriptor of this process (not its number).
    descriptors: Vec<String>,
    threads: usize,
    /// Descendants of this process.
    processes: BTreeSet<i32>,
    /// Lines of the mount table that concern us.
    mounts: Vec<String>,
    cgroups: BTreeSet<String>,
    files: BTreeSet<String>,
}

impl Holdings {
    fn now(state_dir: &Path) -> Self {
        Self {
            descriptors: descriptors(),
            threads: fs::read_dir("/proc/self/task").unwrap().count(),
            processes: descendants(),
            mounts: mounts(state_dir),
            cgroups: cgroups(),
            files: walk(state_dir),
        }
    }
}

fn descriptors() -> Vec<String> {
    let mut kinds: Vec<String> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|e| fs::read_link(e.unwrap().path()).ok())
        .map(|target| target.to_string_lossy().into_owned())
        // The listing itself.
        .filter(|target| !target.ends_with("/fd"))
        .map(|target| target.split('[').next().unwrap_or_default().to_owned())
        .collect();
    kinds.sort();
    kinds
}

fn descendants() -> BTreeSet<i32> {
    let parents: Vec<(i32, i32)> = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|e| {
            let pid: i32 = e.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?;
            Some((pid, parent.parse().ok()?))
        })
        .collect();
    let mut found = BTreeSet::from([std::process::id().cast_signed()]);
    loop {
        let before = found.len();
        found.extend(
            parents
                .iter()
                .filter(|(_, parent)| found.contains(parent))
                .map(|(pid, _)| *pid)
                .collect::<Vec<_>>(),
        );
        if found.len() == before {
            return found;
        }
    }
}

fn mounts(state_dir: &Path) -> Vec<String> {
    let directory = state_dir.to_string_lossy().into_owned();
    fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .filter(|line| line.contains(&directory) || line.contains("deltafs"))
        .map(str::to_owned)
        .collect()
}

/// Control groups that are called after the sandboxes of this process.
fn cgroups() -> BTreeSet<String> {
    let own = |path: &String| path.contains(&name());
    walk(Path::new("/sys/fs/cgroup"))
        .into_iter()
        .filter(own)
        .collect()
}

/// How the sandboxes of this process are called.
fn name() -> String {
    format!("leak-test-{}", std::process::id())
}

fn walk(directory: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                open.push(entry.path());
            }
            found.insert(entry.path().to_string_lossy().into_owned());
        }
    }
    found
}

/// A life of a sandbox with all that a supervisor does for it.
fn live(host: &Host) {
    let sandbox = host
        .create(SandboxSpec {
            name: Some(name()),
            ..SandboxSpec::default()
        })
        .unwrap();
    let script = "import os, socket, sys, threading\npair = socket.socketpair()\npipe = os.pipe()\n\
        threading.Thread(target=lambda: os.read(pipe[0], 1), daemon=True).start()\nos.fork()\n\
        for line in sys.stdin: print(line.strip(), flush=True)";
    let mut program = Program::start(&sandbox, &[PYTHON, "-c", script]).unwrap();
    assert_eq!(program.ask("one").unwrap(), "one");
    let first = sandbox.checkpoint(None).unwrap().id;
    output(&sandbox, "echo changed > /etc/changed");
    let second = sandbox.checkpoint(None).unwrap().id;
    sandbox.rollback(first).unwrap();
    program.kill().unwrap();
    sandbox.rollback(second).unwrap();
    let names = [1, 2].map(|number| format!("{}-{number}", name()));
    let forks = host.fork(sandbox.name(), Some(first), 2, &names).unwrap();
    assert!(
        !cgroups().is_empty() && descendants().len() > 1,
        "nothing is counted"
    );
    sandbox.delete(first).unwrap();
    for gone in forks.iter().chain([&sandbox]) {
        host.remove(gone.name()).unwrap();
    }
}

#[test]
fn nothing_is_left_of_removed_sandboxes() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = dir.path().join("state");
    let host = Host::open(HostConfig {
        state_dir: state_dir.clone(),
        // Blank sandboxes are kept ready whenever there is time.
        warm: 0,
        ..HostConfig::default()
    })
    .unwrap();
    // The first life may open what the supervisor keeps for all.
    live(&host);
    let before = Holdings::now(&state_dir);
    for _ in 0..3 {
        live(&host);
    }
    assert_eq!(Holdings::now(&state_dir), before);
}
