//! Durable checkpoints: they outlive the host, whatever became of it, and are never shown when they are damaged.
#![cfg(target_os = "linux")]

mod common;

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

#[test]
fn a_checkpoint_in_the_middle_can_be_deleted_and_all_others_stay_whole() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let sh = shell(&sandbox);
    let mut ids = Vec::new();
    for n in 1..=5 {
        tell(
            &sandbox,
            sh,
            &format!(
                "x{n}={n}; echo {n} > /f{n}; rm -f /f{}; echo line {n}",
                n - 2
            ),
        );
        ids.push(durable(&sandbox));
    }
    sandbox.rollback(ids[1]).unwrap();
    tell(&sandbox, sh, "x9=9; echo 9 > /f9");
    ids.push(durable(&sandbox));
    sandbox.delete(ids[1]).unwrap();
    assert!(!fixture.checkpoint_dir(&name, ids[1]).exists());
    drop(sandbox);
    let fixture = fixture.restarted();
    // From disk, too: the first goes, on which all others build.
    let sandbox = fixture.host.get(&name).unwrap();
    sandbox.delete(ids[0]).unwrap();
    sandbox.delete(ids[3]).unwrap();
    compacted(&fixture);
    drop(sandbox);
    let fixture = fixture.restarted();
    // The second is what two others share, and complete by now.
    let expected = [
        (ids[1], None, true),
        (ids[2], Some(ids[1]), false),
        (ids[4], Some(ids[2]), false),
        (ids[5], Some(ids[1]), false),
    ];
    assert_eq!(on_disk(&fixture), expected);
    let sandbox = fixture.host.get(&name).unwrap();
    let check = "echo $x1$x2$x3$x4$x5$x9; echo /f[0-9]*";
    for (id, expected) in [
        (2, "123\n/f2 /f3"),
        (4, "12345\n/f4 /f5"),
        (5, "129\n/f1 /f2 /f9"),
    ] {
        sandbox.rollback(ids[id]).unwrap();
        assert_eq!(
            tell(&sandbox, sh, check),
            expected,
            "checkpoint {}",
            ids[id]
        );
    }
    assert!(matches!(
        sandbox.rollback(ids[0]),
        Err(Error::NoCheckpoint { .. })
    ));
    // Only one is left that builds on the second.
    sandbox.delete(ids[5]).unwrap();
    compacted(&fixture);
    let expected = [(ids[2], None, false), (ids[4], Some(ids[2]), false)];
    assert_eq!(on_disk(&fixture), expected);
    assert_eq!(states(&fixture, &name).len(), 2);
    drop(sandbox);
    let fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    sandbox.rollback(ids[4]).unwrap();
    assert_eq!(tell(&sandbox, sh, check), "12345\n/f4 /f5");
}

#[test]
fn a_deleted_checkpoint_that_is_damaged_is_named_by_what_builds_on_it() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let shared = durable(&sandbox);
    let branches = [1, 2].map(|_| {
        sandbox.rollback(shared).unwrap();
        durable(&sandbox)
    });
    sandbox.delete(shared).unwrap();
    compacted(&fixture);
    drop(sandbox);
    let deleted = fixture
        .checkpoint_dir(&name, shared)
        .with_extension("deleted");
    for cut in [0, 1, 24, 25, 200] {
        let path = deleted.join("files.meta");
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1 - cut.min(whole.len() - 1)]).unwrap();
        let layers = fixture.host.layers(Some(&name), true).unwrap();
        let damage = layers.iter().find(|l| l.id == shared && l.deleted);
        let damage = damage.unwrap().damage.clone().unwrap();
        assert!(damage.contains("files.meta"), "{damage}");
        fs::write(&path, &whole).unwrap();
    }
    let path = deleted.join("files.meta");
    fs::write(&path, &fs::read(&path).unwrap()[..100]).unwrap();
    let fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    for branch in branches {
        let refused = sandbox.rollback(branch).unwrap_err().to_string();
        assert!(
            refused.contains("files.meta") && refused.contains(&shared.to_string()),
            "{refused}"
        );
    }
    // It stays for as long as there is one that needs it.
    sandbox.delete(branches[0]).unwrap();
    compacted(&fixture);
    assert!(deleted.exists());
    sandbox.delete(branches[1]).unwrap();
    compacted(&fixture);
    assert!(!deleted.exists());
}

#[test]
fn what_is_removed_frees_its_space_and_stays_away() {
    let fixture = Fixture::new();
    let (kept, gone) = (fixture.sandbox(), fixture.sandbox());
    durable(&kept);
    let ids = [durable(&gone), durable(&gone)];
    let names = [kept.name().to_owned(), gone.name().to_owned()];
    gone.delete(ids[1]).unwrap();
    assert!(!fixture.checkpoint_dir(&names[1], ids[1]).exists());
    fixture.host.remove(&names[1]).unwrap();
    let checkpoints = fixture.state_dir().join("checkpoints");
    assert_eq!(fs::read_dir(&checkpoints).unwrap().count(), 1);
    drop((kept, gone));
    let fixture = fixture.restarted();
    assert_eq!(fixture.host.infos().len(), 1);
    // One that is on disk only.
    fixture.host.remove(&names[0]).unwrap();
    assert_eq!(fs::read_dir(&checkpoints).unwrap().count(), 0);
    assert!(fixture.host.infos().is_empty());
    fixture
        .host
        .create(deltabox::SandboxSpec {
            name: Some(names[0].clone()),
            ..Default::default()
        })
        .unwrap();
    assert!(fixture.restarted().host.infos().is_empty());
}

#[test]
fn a_damaged_file_is_named_and_only_what_builds_on_it_is_lost() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let sh = shell(&sandbox);
    tell(&sandbox, sh, "x=1; echo 1 > /f; echo out");
    let first = durable(&sandbox);
    tell(&sandbox, sh, "x=2; echo 2 > /f; echo more");
    let second = durable(&sandbox);
    sandbox.rollback(first).unwrap();
    tell(&sandbox, sh, "x=3");
    let third = durable(&sandbox);
    drop(sandbox);
    let mut fixture = fixture;
    let files = [
        "manifest",
        "files.meta",
        "files.data",
        "processes",
        "pages.meta",
        "pages.data",
        "sessions",
    ];
    for file in files {
        let path = fixture.checkpoint_dir(&name, second).join(file);
        let good = fs::read(&path).unwrap();
        for damage in ["flipped", "torn", "missing"] {
            match damage {
                "flipped" => {
                    let mut bytes = good.clone();
                    bytes[good.len() / 2] ^= 0x20;
                    fs::write(&path, bytes).unwrap();
                }
                "torn" => fs::write(&path, &good[..good.len() - 1]).unwrap(),
                _ => fs::remove_file(&path).unwrap(),
            }
            fixture = fixture.restarted();
            let layers = fixture.host.layers(Some(&name), true).unwrap();
            let bad: Vec<_> = layers.iter().filter(|l| l.damage.is_some()).collect();
            assert_eq!(bad.len(), 1, "{file} {damage}");
            assert_eq!(bad[0].id, second);
            assert!(bad[0].damage.as_ref().unwrap().contains(file));
            let sandbox = fixture.host.get(&name).unwrap();
            let refused = sandbox.rollback(second).unwrap_err();
            assert!(matches!(refused, Error::Unusable { .. }), "{refused}");
            assert!(refused.to_string().contains(file), "{refused}");
            let shown = states(&fixture, &name);
            assert!(matches!(&shown[1], (id, CheckpointState::Failed { .. }) if *id == second));
            sandbox.rollback(third).unwrap();
            assert_eq!(tell(&sandbox, sh, "echo $x; cat /f"), "3\n1");
            drop(sandbox);
            fs::write(&path, &good).unwrap();
        }
    }
    fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    sandbox.rollback(second).unwrap();
    assert_eq!(tell(&sandbox, sh, "echo $x; cat /f"), "2\n2");
    // The first one is what the others build on.
    let path = fixture.checkpoint_dir(&name, first).join("pages.data");
    drop(sandbox);
    let mut bytes = fs::read(&path).unwrap();
    bytes[0] ^= 1;
    fs::write(&path, bytes).unwrap();
    fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    for id in [first, second, third] {
        let refused = sandbox.rollback(id).unwrap_err().to_string();
        assert!(refused.contains("pages.data"), "{refused}");
    }
    sandbox.delete(third).unwrap();
    fixture.host.remove(&name).unwrap();
    assert!(fixture.host.infos().is_empty());
}

#[test]
fn a_base_that_changed_is_told_of_and_one_that_matters_is_refused() {
    let fixture = Fixture::new();
    let base = base(&fixture);
    let spec = deltabox::SandboxSpec {
        base: base.clone(),
        ..Default::default()
    };
    let sandbox = fixture.host.create(spec).unwrap();
    let name = sandbox.name().to_owned();
    output(&sandbox, "cat /notes; echo more >> /partly");
    let id = durable(&sandbox);
    drop(sandbox);
    fs::write(base.join("notes"), "others").unwrap();
    let fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    let report = sandbox.rollback(id).unwrap();
    assert!(
        report.notes.iter().any(|note| note.contains("/notes")),
        "{report:?}"
    );
    assert_eq!(output(&sandbox, "cat /partly"), "first\nmore");
    drop(sandbox);
    fs::write(base.join("partly"), "a first line that is another\n").unwrap();
    let fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    let refused = sandbox.rollback(id).unwrap_err().to_string();
    assert!(refused.contains("/partly"), "{refused}");
}

/// A base of its own with a shell: busybox is one file.
fn base(fixture: &Fixture) -> PathBuf {
    let base = fixture.dir.path().join("base");
    for dir in ["bin", "proc", "dev", "sys", "tmp", "etc", "root"] {
        fs::create_dir_all(base.join(dir)).unwrap();
    }
    let script = "for f in /bin/sh /bin/cat /bin/echo; do echo $f; \
        ldd $f | grep -o '/[^ ]*' ; done | sort -u";
    let files = std::process::Command::new("sh")
        .args(["-c", script])
        .output()
        .unwrap();
    for file in text(&files.stdout).lines() {
        let to = base.join(file.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, to).unwrap();
    }
    fs::write(base.join("notes"), "notes").unwrap();
    fs::write(base.join("partly"), "first\n").unwrap();
    base
}

#[test]
fn a_long_output_is_written_once() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let sh = shell(&sandbox);
    let session = sandbox.spawn(common::sh("seq 1 200000")).unwrap();
    let whole = wait(&session).stdout;
    let id = session.id();
    let first = durable(&sandbox);
    let second = durable(&sandbox);
    let size = |id| {
        let path = fixture.checkpoint_dir(&name, id).join("sessions");
        fs::metadata(path).unwrap().len()
    };
    assert!(size(first) > whole.len() as u64);
    assert!(size(second) < 10_000, "{}", size(second));
    drop((session, sandbox));
    let fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    sandbox.rollback(second).unwrap();
    assert!(log(&sandbox, id).as_bytes() == whole);
    assert_eq!(tell(&sandbox, sh, "echo here"), "here");
}

#[test]
fn a_handle_of_a_sandbox_whose_host_has_ended_writes_nothing() {
    let fixture = Fixture::new();
    let sandbox: Arc<Sandbox> = fixture.sandbox();
    let id = sandbox.checkpoint(None).unwrap().id;
    let fixture = fixture.restarted();
    assert!(sandbox.persist(id).is_err());
    assert!(fixture.host.layers(None, false).unwrap().is_empty());
}

#[test]
fn a_checkpoint_that_cannot_be_written_says_why_and_can_be_written_later() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let sh = shell(&sandbox);
    tell(&sandbox, sh, "x=1");
    let checkpoints = fixture.state_dir().join("checkpoints");
    fs::remove_dir(&checkpoints).unwrap();
    fs::write(&checkpoints, "in the way").unwrap();
    let id = match sandbox.checkpoint_durable(None) {
        Err(Error::NotDurable { id, source }) => {
            assert!(source.to_string().contains("checkpoints"), "{source}");
            id
        }
        other => panic!("{other:?}"),
    };
    let shown = states(&fixture, &name);
    assert!(
        matches!(&shown[0].1, CheckpointState::Failed { reason } if reason.contains("checkpoints"))
    );
    tell(&sandbox, sh, "x=2");
    sandbox.rollback(id).unwrap();
    assert_eq!(tell(&sandbox, sh, "echo $x"), "1");
    fs::remove_file(&checkpoints).unwrap();
    fs::create_dir(&checkpoints).unwrap();
    sandbox.persist(id).unwrap();
    sandbox.persist(id).unwrap();
    assert_eq!(states(&fixture, &name), [(id, CheckpointState::Durable)]);
    drop(sandbox);
    let fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    sandbox.rollback(id).unwrap();
    assert_eq!(tell(&sandbox, sh, "echo $x"), "1");
}

#[test]
fn many_threads_checkpoint_delete_and_remove_at_the_same_time() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let _shell = shell(&sandbox);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for round in 0..10 {
                    let Ok(made) = sandbox.checkpoint_durable(None) else {
                        return;
                    };
                    if round % 3 == 1 {
                        let _ = sandbox.delete(made.id);
                    }
                }
            });
        }
        std::thread::sleep(std::time::Duration::from_millis(150));
        fixture.host.remove(&name).unwrap();
    });
    assert!(fixture.host.layers(None, false).unwrap().is_empty());
    assert!(fixture.restarted().host.infos().is_empty());
}

/// What a checkpoint of the walk must give back.
#[derive(Clone)]
struct Known {
    id: CheckpointId,
    durable: bool,
    value: u32,
}

#[test]
fn a_random_walk_of_checkpoints_deletions_rollbacks_and_restarts_finds_every_state_again() {
    let mut fixture = Fixture::new();
    let mut sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let sh = shell(&sandbox);
    let mut known: Vec<Known> = Vec::new();
    let mut random = 0x2545_f491_u32;
    let mut draw = |below: usize| {
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        random as usize % below
    };
    let mut value = 0;
    tell(&sandbox, sh, "v=0; echo 0 > /v; echo seed > /deep");
    for step in 1..=120_u32 {
        match draw(10) {
            0..=2 => {
                value = step;
                let other = draw(6);
                tell(
                    &sandbox,
                    sh,
                    &format!(
                        "v={step}; echo {step} > /v; echo {step} > /f{other}; rm -f /f{}; mv /f{other} /g{other}; \
                         echo {step} >> /deep; echo said {step}",
                        (other + 1) % 6
                    ),
                );
            }
            3..=5 => known.push(Known {
                id: durable(&sandbox),
                durable: true,
                value,
            }),
            6 => known.push(Known {
                id: sandbox.checkpoint(None).unwrap().id,
                durable: false,
                value,
            }),
            7 if !known.is_empty() => {
                let gone = known.swap_remove(draw(known.len()));
                sandbox.delete(gone.id).unwrap();
            }
            8 if !known.is_empty() => {
                let to = known[draw(known.len())].clone();
                sandbox.rollback(to.id).unwrap();
                value = to.value;
                check(&sandbox, sh, value);
            }
            9 if known.iter().any(|k| k.durable) => {
                drop(sandbox);
                fixture = fixture.restarted();
                known.retain(|k| k.durable);
                for layer in fixture.host.layers(Some(&name), true).unwrap() {
                    assert_eq!(layer.damage, None);
                }
                sandbox = fixture.host.get(&name).unwrap();
                let to = known[draw(known.len())].clone();
                sandbox.rollback(to.id).unwrap();
                value = to.value;
                check(&sandbox, sh, value);
            }
            _ => {}
        }
        let mut listed: Vec<_> = states(&fixture, &name)
            .into_iter()
            .map(|(id, _)| id)
            .collect();
        let mut expected: Vec<_> = known.iter().map(|k| k.id).collect();
        listed.sort();
        expected.sort();
        assert_eq!(listed, expected, "step {step}");
    }
    for to in &known {
        sandbox.rollback(to.id).unwrap();
        check(&sandbox, sh, to.value);
    }
}

/// The shell's variable, the files and the log must be those of the step.
fn check(sandbox: &Sandbox, sh: SessionId, value: u32) {
    let last = if value == 0 {
        "seed".to_owned()
    } else {
        value.to_string()
    };
    let seen = tell(sandbox, sh, "echo $v; cat /v; tail -n1 /deep");
    assert_eq!(seen, format!("{value}\n{value}\n{last}"));
    let log = log(sandbox, sh);
    let said = log.lines().rfind(|line| line.starts_with("said "));
    assert_eq!(
        said.map(str::to_owned),
        (value > 0).then(|| format!("said {value}"))
    );
}

#[test]
fn a_flipped_or_missing_byte_anywhere_in_the_files_of_a_checkpoint_is_found() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let sh = shell(&sandbox);
    tell(&sandbox, sh, "echo content > /f");
    let id = durable(&sandbox);
    let dir = fixture.checkpoint_dir(&name, id);
    let damage = || {
        fixture
            .host
            .layers(Some(&name), true)
            .unwrap()
            .remove(0)
            .damage
    };
    assert_eq!(damage(), None);
    for file in fs::read_dir(&dir).unwrap() {
        let path = file.unwrap().path();
        let named = path.file_name().unwrap().to_str().unwrap();
        let good = fs::read(&path).unwrap();
        // The header and the first record, the last one, and places in between.
        let (begin, end) = (
            0..48.min(good.len()),
            good.len().saturating_sub(24)..good.len(),
        );
        let between = (0..good.len()).step_by(good.len() / 40 + 1);
        for at in begin.chain(end).chain(between) {
            let mut bytes = good.clone();
            bytes[at] ^= 0x80;
            for bad in [&bytes[..], &good[..at]] {
                fs::write(&path, bad).unwrap();
                let found = damage().unwrap_or_else(|| panic!("{named}, byte {at}"));
                assert!(found.contains(named), "{found}");
            }
        }
        fs::write(&path, &good).unwrap();
    }
    assert_eq!(damage(), None);
}

/// Writes a manifest anew with a change to its JSON, all checksums right.
fn tamper(manifest: &std::path::Path, change: impl FnOnce(&mut serde_json::Value)) {
    let format = deltalog::Format {
        kind: *b"MANI",
        version: 1,
    };
    let mut log = deltalog::LogReader::open(manifest, format).unwrap();
    let record = log.next_record().unwrap().unwrap();
    let mut json = serde_json::from_slice(&record.payload).unwrap();
    change(&mut json);
    fs::remove_file(manifest).unwrap();
    let mut log = deltalog::LogWriter::create(manifest, format).unwrap();
    let json = serde_json::to_vec(&json).unwrap();
    log.append(record.tag, &json).unwrap();
    log.finish().unwrap();
}

#[test]
fn a_manifest_that_makes_no_sense_here_is_refused_with_the_reason() {
    let mut fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let first = durable(&sandbox);
    let second = durable(&sandbox);
    drop(sandbox);
    let manifest = fixture.checkpoint_dir(&name, second).join("manifest");
    let good = fs::read(&manifest).unwrap();
    type Change = fn(&mut serde_json::Value);
    let changes: [(Change, &str); 5] = [
        (|m| m["kernel"] = "1.2.3".into(), "Linux 1.2.3"),
        (|m| m["parent"] = m["id"].clone(), "which is missing"),
        (|m| m["parent"] = "c77777".into(), "which is missing"),
        (|m| m["id"] = "c1000".into(), "holds checkpoint c1000"),
        (|m| m["origin"]["spec"]["colour"] = "red".into(), "colour"),
    ];
    for (change, expected) in changes {
        tamper(&manifest, change);
        fixture = fixture.restarted();
        let sandbox = fixture.host.get(&name).unwrap();
        let refused = sandbox.rollback(second).unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}");
        sandbox.rollback(first).unwrap();
        drop(sandbox);
        fs::write(&manifest, &good).unwrap();
    }
    fixture = fixture.restarted();
    fixture.host.get(&name).unwrap().rollback(second).unwrap();
}
