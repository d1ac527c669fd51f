//! Forks for which processes or memory run out: an error, and nothing is left of them. The limits are those of a group around all
//! sandboxes of the host, or of the forks alone.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{PATIENCE, output, read_until, sh};
use deltabox::{CheckpointId, CommandSpec, Host, HostConfig, Sandbox, SandboxSpec};

/// The group of `name` in the hierarchy of a controller, of either version.
fn group(controller: &str, name: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let tops = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (at, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        let has_it = kind == "cgroup2" || options.split(',').any(|o| o == controller);
        (kind.starts_with("cgroup") && has_it).then(|| PathBuf::from(at))
    });
    let parents = tops.flat_map(|top| fs::read_dir(top).into_iter().flatten().flatten());
    let groups = parents.map(|parent| parent.path().join(name));
    let told = |group: &PathBuf| {
        let files = ["pids.max", "memory.max", "memory.limit_in_bytes"];
        let mut files = files.iter().filter(|file| file.starts_with(controller));
        files.any(|file| group.join(file).exists())
    };
    groups.into_iter().find(told)
}

/// A host without anything that is made in advance, so that all is made while it is short.
fn host(dir: &tempfile::TempDir, templates: usize) -> Host {
    let config = HostConfig {
        state_dir: dir.path().join("state"),
        warm: 0,
        templates,
        ..HostConfig::default()
    };
    Host::open(config).unwrap()
}

fn number(path: &Path) -> u64 {
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

/// The name is no other test's, for it is looked for among all control groups.
fn source(host: &Host, what: &str, spec: SandboxSpec) -> Arc<Sandbox> {
    let name = format!("{what}-{}", std::process::id());
    let name = Some(name);
    host.create(SandboxSpec { name, ..spec }).unwrap()
}

fn removed(host: &Host, forks: Vec<Arc<Sandbox>>, told: &str) {
    for fork in forks {
        assert_eq!(output(&fork, "cat /file"), told);
        host.remove(fork.name()).unwrap();
    }
}

#[test]
fn forks_for_which_processes_run_out_fail_whole_and_later_ones_work() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(&dir, 16);
    let spec = SandboxSpec {
        pids: Some(64),
        ..SandboxSpec::default()
    };
    let source = source(&host, "pids", spec);
    let Some(own) = group("pids", source.name()) else {
        eprintln!("skipped: {:?}", source.info().warnings);
        return;
    };
    let all = own.parent().unwrap();
    output(&source, "echo kept > /file");
    let script = "sleep 1000 & sleep 1000 & echo ready; wait";
    let session = source.spawn(sh(script)).unwrap();
    read_until(&mut session.events(0), "ready");
    let checkpoint = source.checkpoint(None).unwrap().id;
    let fork = || host.fork(source.name(), Some(checkpoint), 2, &[]);
    removed(&host, fork().unwrap(), "kept");
    let current = all.join("pids.current");
    let before = number(&current);
    let mut failed = 0;
    for left in 0..16 {
        fs::write(all.join("pids.max"), (before + left).to_string()).unwrap();
        let forks = fork();
        fs::write(all.join("pids.max"), "max").unwrap();
        match forks {
            Ok(forks) => removed(&host, forks, "kept"),
            Err(_) => failed += 1,
        }
        assert_eq!(host.list().len(), 1, "with {left} processes left");
        assert_eq!(source.info().processes, 3);
        let begun = Instant::now();
        while number(&current) > before {
            assert!(begun.elapsed() < PATIENCE, "with {left} left, some stay");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    assert!((4..16).contains(&failed), "{failed} of 16 failed");
    removed(&host, fork().unwrap(), "kept");
    source.rollback(checkpoint).unwrap();
    assert_eq!(output(&source, "cat /file"), "kept");
}

/// Holds 24 MiB.
const PROGRAM: &str = "m = bytearray(b'x') * (24 << 20); print('ready', flush=True); input()";

/// Keeps what is made beside a group to a few MiB, until told to stop.
fn squeeze(own: &Path, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let siblings = fs::read_dir(own.parent().unwrap()).unwrap().flatten();
        for sibling in siblings.map(|s| s.path()).filter(|path| path != own) {
            for limit in ["memory.max", "memory.limit_in_bytes"] {
                if sibling.join(limit).exists() {
                    // It may be gone by now.
                    let _ = fs::write(sibling.join(limit), (6 << 20).to_string());
                }
            }
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_fork_for_which_memory_runs_out_fails_whole_and_later_ones_work() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(&dir, 0);
    let spec = SandboxSpec {
        memory: Some(256 << 20),
        ..SandboxSpec::default()
    };
    let source = source(&host, "memory", spec);
    let Some(own) = group("memory", source.name()) else {
        eprintln!("skipped: {:?}", source.info().warnings);
        return;
    };
    output(&source, "echo kept > /file");
    let command = CommandSpec {
        argv: ["python3", "-c", PROGRAM].map(str::to_owned).to_vec(),
        stdin: true,
        ..CommandSpec::default()
    };
    let session = source.spawn(command).unwrap();
    read_until(&mut session.events(0), "ready");
    let checkpoint = source.checkpoint(None).unwrap().id;
    let fork = |id: CheckpointId| host.fork(source.name(), Some(id), 1, &[]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| squeeze(&own, &stop));
        let failed = (0..10).filter(|_| match fork(checkpoint) {
            Ok(forks) => {
                // It ran before it was squeezed.
                host.remove(forks[0].name()).unwrap();
                false
            }
            Err(_) => true,
        });
        let failed = failed.count();
        stop.store(true, Ordering::Relaxed);
        assert!(failed > 0, "no fork was short of memory");
    });
    assert_eq!(host.list().len(), 1);
    assert_eq!(source.info().processes, 1);
    let siblings = fs::read_dir(own.parent().unwrap()).unwrap().flatten();
    let groups = siblings.filter(|s| s.path().is_dir()).count();
    assert_eq!(groups, 1, "groups of failed forks stay");
    removed(&host, fork(checkpoint).unwrap(), "kept");
    source.rollback(checkpoint).unwrap();
    assert_eq!(output(&source, "cat /file"), "kept");
}
