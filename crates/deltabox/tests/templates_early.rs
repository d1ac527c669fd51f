//! Processes of forks that are born before anybody asks for them.

mod common;

use std::time::Instant;

use common::PATIENCE;
use common::driver::{FILL, SUM, ask, change, python, sums};
use deltabox::{Host, HostConfig, SandboxSpec};

/// A host that bears processes of forks early, however busy the machine is.
fn early_host(dir: &tempfile::TempDir) -> Host {
    let config = HostConfig {
        state_dir: dir.path().join("state"),
        warm: 2,
        early_pressure: 101.0,
        ..HostConfig::default()
    };
    Host::open(config).unwrap()
}

/// Waits until two blank sandboxes are ready, and their processes with them.
fn await_early(host: &Host, births: u64) {
    let begun = Instant::now();
    while host.warm().ready < 2 || host.warm().early_births < births {
        assert!(begun.elapsed() < PATIENCE, "{:?}", host.warm());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn forks_take_up_what_was_born_before_they_were_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let host = early_host(&dir);
    let source = host.create(SandboxSpec::default()).unwrap();
    let id = python(&source).info().id;
    for line in [FILL, "N = []"] {
        ask(&source, id, line);
        ask(&source, id, &format!(">{line}"));
    }
    let first = source.checkpoint(None).unwrap().id;
    let at_first = sums(&source, id);
    change(&source, id, 5);
    let second = source.checkpoint(None).unwrap().id;
    let at_second = sums(&source, id);

    host.expect_forks(source.name(), first, 2).unwrap();
    await_early(&host, 2);
    let info = host.warm();
    // What the step between the two wrote to, and no more.
    assert!((20..400).contains(&info.early_pages), "{info:?}");
    assert!(host.list().len() == 1);
    let forks = host.fork(source.name(), Some(first), 2, &[]).unwrap();
    assert_eq!(host.warm().early_taken, 2);
    for (n, fork) in forks.iter().enumerate() {
        assert_eq!(sums(fork, id), at_first);
        change(fork, id, 50 + n);
    }
    assert_ne!(sums(&forks[0], id), sums(&forks[1], id));
    assert_eq!(forks[0].info().processes, 2);

    // They serve a checkpoint that is much like theirs,
    await_early(&host, 4);
    let fork = &host.fork(source.name(), Some(second), 1, &[]).unwrap()[0];
    assert_eq!(host.warm().early_taken, 3);
    assert_eq!(sums(fork, id), at_second);
    // and make way where there is a better template.
    let forks = host.fork(source.name(), Some(second), 2, &[]).unwrap();
    assert!(host.warm().early_ended > 0, "{:?}", host.warm());
    for fork in &forks {
        assert_eq!(sums(fork, id), at_second);
    }
}

#[test]
fn what_was_born_early_and_died_is_born_again() {
    let dir = tempfile::tempdir().unwrap();
    let host = early_host(&dir);
    let source = host.create(SandboxSpec::default()).unwrap();
    let session = python(&source).info();
    ask(&source, session.id, FILL);
    let sum = ask(&source, session.id, SUM);
    let checkpoint = source.checkpoint(None).unwrap().id;
    host.expect_forks(source.name(), checkpoint, 2).unwrap();
    await_early(&host, 2);
    // The control groups of one host have a common parent.
    let template = host.template_processes()[0];
    let group = std::fs::read_to_string(format!("/proc/{template}/cgroup")).unwrap();
    let begin = group.find("deltabox-").unwrap();
    let parent = group[begin..].split('/').next().unwrap();
    let mut killed = 0;
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(status) = std::fs::read_to_string(entry.path().join("status")) else {
            continue;
        };
        let number = format!("\t{}", session.pid);
        let numbers = status.lines().find(|line| line.starts_with("NSpid:"));
        let cgroup = std::fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let of_program = status.contains("\tpython3\n");
        if !of_program
            && numbers.is_some_and(|line| line.ends_with(&number))
            && cgroup.contains(parent)
        {
            let pid = entry.file_name().to_str().unwrap().parse().unwrap();
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            killed += 1;
        }
    }
    assert_eq!(killed, 2);
    let forks = host.fork(source.name(), Some(checkpoint), 2, &[]).unwrap();
    // More may have been born since, for the next forks.
    assert!(host.templates().births >= 4);
    for fork in &forks {
        assert_eq!(ask(fork, session.id, SUM), sum);
    }
}
