//! Much output, full disks, many threads, and long random walks.

use super::*;

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
