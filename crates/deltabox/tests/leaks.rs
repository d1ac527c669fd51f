//! Nothing of a sandbox is left when it is gone, however it went.

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use common::*;
use deltabox::{Error, Host, HostConfig, SandboxSpec, SessionEvent};

/// Tells the process that this test program starts anew what to do.
const ROLE: &str = "DELTABOX_TEST_STATE_DIR";

/// Everything that a sandbox could leave: mounts of this process, processes and control groups of this state
/// directory, files, open descriptors. Other tests run beside this one in processes of their own (and this file's in
/// one thread after another, by the lock of [`alone`]).
fn traces(state_dir: &Path) -> BTreeSet<String> {
    let mut traces = BTreeSet::new();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    traces.extend(mounts.lines().map(|m| format!("mount {m}")));
    let mut dirs = vec![state_dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            traces.insert(format!("file {}", entry.path().display()));
            if entry.file_type().unwrap().is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap() {
        traces.extend(groups_of(&hierarchy.unwrap().path(), state_dir));
    }
    traces.extend(groups_of(Path::new("/sys/fs/cgroup"), state_dir));
    for fd in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        if let Ok(to) = std::fs::read_link(fd.path()) {
            let to = to.to_string_lossy().into_owned();
            // Made once for the process.
            if !to.contains("memfd:deltabox-init") && !to.starts_with("/proc") {
                traces.insert(format!("fd {} {to}", fd.path().display()));
            }
        }
    }
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let children = task.path().join("children");
        let children = std::fs::read_to_string(children).unwrap_or_default();
        traces.extend(children.split_whitespace().map(|c| format!("child {c}")));
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if name.starts_with("deltafs") || name.starts_with("io ") {
            traces.insert(format!("thread {name}"));
        }
    }
    traces
}

fn groups_of(hierarchy: &Path, state_dir: &Path) -> Vec<String> {
    use sha2::{Digest, Sha256};
    use std::os::unix::ffi::OsStrExt;
    let state_dir = state_dir.canonicalize().unwrap();
    let digest = Sha256::digest(state_dir.as_os_str().as_bytes());
    let hex: String = digest[..6].iter().map(|b| format!("{b:02x}")).collect();
    let parent = hierarchy.join(format!("deltabox-{hex}"));
    let Ok(entries) = std::fs::read_dir(&parent) else {
        return vec![];
    };
    entries
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| format!("cgroup {}", e.path().display()))
        .collect()
}

fn alone() -> std::sync::MutexGuard<'static, ()> {
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    LOCK.lock().unwrap_or_else(|e| e.into_inner())
}

#[test]
fn a_removed_sandbox_leaves_nothing() {
    let _alone = alone();
    let f = Fixture::new();
    let state = f.dir.path().join("state");
    // What is made once.
    f.sandbox();
    f.host.remove("box1").unwrap();
    let before = traces(&state);
    for _ in 0..3 {
        let spec = SandboxSpec {
            memory: Some(1 << 30),
            pids: Some(100),
            cpus: Some(1.0),
            ..SandboxSpec::default()
        };
        let sandbox = f.host.create(spec).unwrap();
        output(
            &sandbox,
            "echo x > /tmp/x; mkdir -p /a/b; nohup sleep 1000 >/dev/null 2>&1 &",
        );
        let mut shell = sh("cat");
        shell.stdin = true;
        let reader = sandbox.spawn(shell).unwrap();
        reader.write(b"hello").unwrap();
        read_until(&mut reader.events(0), "hello");
        let mut terminal = sh("echo on; sleep 1000");
        terminal.tty = Some(deltabox::WindowSize { rows: 1, cols: 80 });
        read_until(&mut sandbox.spawn(terminal).unwrap().events(0), "on");
        assert!(traces(&state).len() > before.len() + 5);
        let mut events = reader.events(u64::MAX);
        f.host.remove(sandbox.name()).unwrap();
        // Who waits is told, who still holds it gets an error.
        assert!(matches!(
            events.next(Some(PATIENCE)),
            Some(SessionEvent::RolledBack { .. })
        ));
        assert!(matches!(
            sandbox.run(&["true"]),
            Err(Error::NotRunning { .. })
        ));
        assert!(reader.write(b"x").is_err());
        reader.kill().unwrap_err();
    }
    let after = traces(&state);
    let left: Vec<_> = after.difference(&before).collect();
    assert!(left.is_empty(), "{left:#?}");
}

#[test]
fn a_sandbox_that_could_not_be_made_leaves_nothing() {
    let _alone = alone();
    let f = Fixture::new();
    let state = f.dir.path().join("state");
    output(&f.sandbox(), "true");
    let before = traces(&state);
    let with = |change: &dyn Fn(&mut SandboxSpec)| {
        let mut spec = SandboxSpec::default();
        change(&mut spec);
        match f.host.create(spec) {
            Err(e) => e.to_string(),
            Ok(_) => panic!("it was created"),
        }
    };
    let message = with(&|s| s.base = "/no/such/base".into());
    assert!(message.contains("/no/such/base"), "{message}");
    let message = with(&|s| s.base = "/etc/passwd".into());
    assert!(message.contains("not a directory"), "{message}");
    let message = with(&|s| s.base = state.clone());
    assert!(message.contains("state directory"), "{message}");
    let message = with(&|s| s.name = Some("box1".into()));
    assert!(message.contains("exists already"), "{message}");
    let message = with(&|s| s.name = Some("../x".into()));
    assert!(message.contains("cannot be a sandbox's name"), "{message}");

    let message = with(&|s| s.hostname = Some("a b".into()));
    assert!(message.contains("host name"), "{message}");
    let after = traces(&state);
    let left: Vec<_> = after.difference(&before).collect();
    assert!(left.is_empty(), "{left:#?}");
}

#[test]
fn dropping_the_host_ends_everything() {
    let _alone = alone();
    let f = Fixture::new();
    let state = f.dir.path().join("state");
    let sandbox = f.sandbox();
    sandbox.spawn(sh("sleep 1000")).unwrap();
    let Fixture { host, dir } = f;
    drop((sandbox, host));
    let left: Vec<_> = traces(&state)
        .into_iter()
        .filter(|t| t.starts_with("cgroup") || t.starts_with("child") || t.contains("box1"))
        .collect();
    assert!(left.is_empty(), "{left:#?}");
    // And the next one can open it.
    let host = Host::open(HostConfig {
        state_dir: state,
        ..HostConfig::default()
    })
    .unwrap();
    assert!(host.cleaned_up().is_empty(), "{:?}", host.cleaned_up());
    drop((host, dir));
}

#[test]
fn many_sandboxes_come_and_go_at_the_same_time() {
    let _alone = alone();
    let f = Fixture::new();
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let host = &f.host;
            scope.spawn(move || {
                for round in 0..3 {
                    let name = format!("t{thread}-{round}");
                    let sandbox = host
                        .create(SandboxSpec {
                            name: Some(name.clone()),
                            ..SandboxSpec::default()
                        })
                        .unwrap();
                    assert_eq!(output(&sandbox, "hostname"), name);
                    host.remove(&name).unwrap();
                }
            });
        }
    });
    assert!(f.host.list().is_empty());
}

/// Not a test: what the process does that the next test starts and kills.
#[test]
fn helper_that_is_killed() {
    let Some(state_dir) = std::env::var_os(ROLE) else {
        return;
    };
    let host = Host::open(HostConfig {
        state_dir: state_dir.into(),
        ..HostConfig::default()
    })
    .unwrap();
    let sandbox = host.create(SandboxSpec::default()).unwrap();
    let mut command = sh("setsid sleep 1000 & echo child $$; sleep 1000");
    command.user = Some("nobody".into());
    let session = sandbox.spawn(command).unwrap();
    read_until(&mut session.events(0), "child");
    println!("\nREADY");
    std::thread::sleep(PATIENCE);
}

#[test]
fn what_a_killed_host_left_is_cleaned_up_by_the_next_and_said() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper_that_is_killed", "--nocapture"])
        .env(ROLE, &state)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready = lines.any(|l| l.unwrap().contains("READY"));
    let open = || {
        Host::open(HostConfig {
            state_dir: state.clone(),
            ..HostConfig::default()
        })
    };
    // As long as it lives, the directory is its own.
    let refused = open().err().map(|e| e.to_string());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(ready);
    let refused = refused.expect("two hosts on one state directory");
    assert!(refused.contains(&child.id().to_string()), "{refused}");
    let host = open().unwrap();
    let said = host.cleaned_up().join(" ");
    assert!(said.contains("box1"), "{said}");
    assert_eq!(
        std::fs::read_dir(state.join("sandboxes")).unwrap().count(),
        0
    );
    assert!(groups_of(Path::new("/sys/fs/cgroup/unified"), &state).is_empty());
    assert!(groups_of(Path::new("/sys/fs/cgroup"), &state).is_empty());
    // The name is free again.
    let sandbox = host.create(SandboxSpec::default()).unwrap();
    assert_eq!(output(&sandbox, "pgrep sleep | wc -l"), "0");
}
