//! Durable checkpoints: they outlive the host, whatever became of it, and are never shown when they are damaged.
#![cfg(target_os = "linux")]

#[path = "../common/mod.rs"]
mod common;
mod damage;
mod deletion;
mod load;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use common::{Fixture, output, read_until, sh, text, wait};
use deltabox::{
    CheckpointId, CheckpointState, CommandSpec, Error, Host, HostConfig, Sandbox, SandboxState,
    SessionId, WindowSize,
};

impl Fixture {
    fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn checkpoint_dir(&self, sandbox: &str, id: CheckpointId) -> PathBuf {
        let dir = self.state_dir().join("checkpoints").join(sandbox);
        dir.join(id.to_string())
    }

    /// Ends the host, and opens another one on the same state directory.
    fn restarted(self) -> Self {
        let Self { host, dir } = self;
        drop(host);
        let host = Host::open(HostConfig {
            state_dir: dir.path().join("state"),
            ..HostConfig::default()
        })
        .unwrap();
        Self { host, dir }
    }
}

fn durable(sandbox: &Sandbox) -> CheckpointId {
    sandbox.checkpoint_durable(None).unwrap().id
}

/// Waits until nothing is to be merged any more.
fn compacted(fixture: &Fixture) {
    let end = std::time::Instant::now() + common::PATIENCE;
    while fixture.host.compaction().waiting > 0 {
        let info = fixture.host.compaction();
        assert!(std::time::Instant::now() < end, "it does not end: {info:?}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(fixture.host.compaction().failures, 0);
}

/// What is on disk, checked: each checkpoint, what it builds on, and whether it was deleted.
fn on_disk(fixture: &Fixture) -> Vec<(CheckpointId, Option<CheckpointId>, bool)> {
    let layers = fixture.host.layers(None, true).unwrap();
    assert!(layers.iter().all(|l| l.damage.is_none()), "{layers:?}");
    let layers = layers.into_iter();
    layers.map(|l| (l.id, l.parent, l.deleted)).collect()
}

fn states(fixture: &Fixture, name: &str) -> Vec<(CheckpointId, CheckpointState)> {
    let tree = fixture.host.tree(name).unwrap();
    tree.nodes.into_iter().map(|n| (n.id, n.state)).collect()
}

/// A shell that answers; its variable tells which state it is in.
fn shell(sandbox: &Sandbox) -> SessionId {
    let session = sandbox
        .spawn(CommandSpec {
            stdin: true,
            ..sh("while read line; do eval \"$line\"; done")
        })
        .unwrap();
    session.id()
}

/// Has the shell run a line, and returns what it writes.
fn tell(sandbox: &Sandbox, shell: SessionId, line: &str) -> String {
    let session = sandbox.session(shell).unwrap();
    let mut events = session.events(session.info().output);
    session
        .write(format!("{line}; echo END\n").as_bytes())
        .unwrap();
    let seen = read_until(&mut events, "END\n");
    seen.trim_end_matches("END\n").trim_end().to_owned()
}

fn log(sandbox: &Sandbox, id: SessionId) -> String {
    let session = sandbox.session(id).unwrap();
    let end = session.info().output as usize;
    let mut events = session.events(0);
    let mut seen = String::new();
    while seen.len() < end {
        match events.next(Some(common::PATIENCE)) {
            Some(deltabox::SessionEvent::Output { bytes, .. }) => seen.push_str(&text(&bytes)),
            other => panic!("{other:?} after {seen:?}"),
        }
    }
    seen
}

#[test]
fn files_memory_and_output_come_back_after_a_restart() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let sh = shell(&sandbox);
    tell(&sandbox, sh, "x=one; echo one > /file; cd /tmp");
    let first = durable(&sandbox);
    tell(
        &sandbox,
        sh,
        "x=two; echo two > /file; cd /usr; echo second branch",
    );
    let warm = sandbox.checkpoint(None).unwrap().id;
    let second = durable(&sandbox);
    let logs = log(&sandbox, sh);
    assert_eq!(
        states(&fixture, &name),
        [
            (first, CheckpointState::Durable),
            (warm, CheckpointState::Warm),
            (second, CheckpointState::Durable)
        ]
    );
    drop(sandbox);

    let fixture = fixture.restarted();
    assert!(
        fixture
            .host
            .cleaned_up()
            .iter()
            .any(|s| s.contains("Kept the 2 durable"))
    );
    let info = fixture.host.info(&name).unwrap();
    assert_eq!(info.state, SandboxState::Stopped);
    assert_eq!(info.checkpoints, 2);
    assert!(fixture.host.list().is_empty());
    assert_eq!(fixture.host.infos().len(), 1);
    let sandbox = fixture.host.get(&name).unwrap();
    assert_eq!(sandbox.info().state, SandboxState::Stopped);
    for (id, x, cwd) in [
        (second, "two", "/usr"),
        (first, "one", "/tmp"),
        (second, "two", "/usr"),
    ] {
        let report = sandbox.rollback(id).unwrap();
        assert_eq!(report.fallback, None);
        assert_eq!(report.notes, Vec::<String>::new());
        if id == second {
            assert_eq!(log(&sandbox, sh), logs);
        }
        assert_eq!(
            tell(&sandbox, sh, "echo $x; cat /file; pwd"),
            format!("{x}\n{x}\n{cwd}")
        );
    }
    let later = sandbox.checkpoint(None).unwrap().id;
    assert!(later > second, "{later} was given before");
}

#[test]
fn a_fork_of_a_sandbox_on_disk_runs_and_leaves_it_alone() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let sh = shell(&sandbox);
    tell(&sandbox, sh, "x=kept; echo data > /data");
    let id = durable(&sandbox);
    drop(sandbox);
    let fixture = fixture.restarted();
    let forks = fixture.host.fork(&name, Some(id), 2, &[]).unwrap();
    for fork in &forks {
        assert_eq!(tell(fork, sh, "echo $x; cat /data"), "kept\ndata");
    }
    let of_fork = durable(&forks[1]);
    let fork = forks[1].name().to_owned();
    drop(forks);
    let fixture = fixture.restarted();
    assert_eq!(states(&fixture, &name), [(id, CheckpointState::Durable)]);
    let sandbox = fixture.host.get(&fork).unwrap();
    sandbox.rollback(of_fork).unwrap();
    assert_eq!(tell(&sandbox, sh, "echo $x; cat /data"), "kept\ndata");
}

#[test]
fn a_terminal_comes_back_after_a_restart() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let command = CommandSpec {
        tty: Some(WindowSize { rows: 30, cols: 90 }),
        argv: ["bash", "--norc"].map(String::from).into(),
        ..CommandSpec::default()
    };
    let session = sandbox.spawn(command).unwrap();
    let (id, mut events) = (session.id(), session.events(0));
    session.write(b"x=secret; echo re''ady\n").unwrap();
    read_until(&mut events, "ready");
    let checkpoint = durable(&sandbox);
    drop((events, session, sandbox));
    let fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    sandbox.rollback(checkpoint).unwrap();
    let session = sandbox.session(id).unwrap();
    let mut events = session.events(session.info().output);
    session.write(b"echo \"<$x>\"; stty size\n").unwrap();
    let seen = read_until(&mut events, "30 90");
    assert!(seen.contains("<secret>"), "{seen}");
}
