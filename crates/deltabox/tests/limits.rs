//! Limits of memory, processes and processors.

mod common;

use common::*;
use deltabox::{CommandSpec, Error, SandboxSpec};

#[test]
fn a_fork_bomb_ends_at_the_process_limit_and_the_sandbox_can_be_removed() {
    let f = Fixture::new();
    let sandbox = f
        .host
        .create(SandboxSpec {
            pids: Some(40),
            ..SandboxSpec::default()
        })
        .unwrap();
    if !sandbox.info().warnings.is_empty() {
        eprintln!("skipped: {:?}", sandbox.info().warnings);
        return;
    }
    let bomb = sandbox
        // Bash tries again where a fork fails; a shell that gives up would let the bomb burn out.
        .spawn(sh(
            "exec bash -c 'bomb() { bomb | bomb & }; bomb; sleep 1000'",
        ))
        .unwrap();
    let full = std::iter::repeat_with(|| {
        std::thread::sleep(std::time::Duration::from_millis(20));
        sandbox.info().processes
    })
    .take(3000)
    .any(|n| n >= 30);
    assert!(full, "the bomb did not go off");
    assert!(sandbox.info().processes <= 40);
    bomb.kill().unwrap();
    assert_eq!(wait(&bomb).status, 137);
    f.host.remove("box1").unwrap();
    assert!(matches!(f.host.get("box1"), Err(Error::NoSandbox(_))));
}

#[test]
fn more_processes_than_allowed_is_an_error_that_says_so() {
    let f = Fixture::new();
    let sandbox = f
        .host
        .create(SandboxSpec {
            pids: Some(3),
            ..SandboxSpec::default()
        })
        .unwrap();
    if !sandbox.info().warnings.is_empty() {
        eprintln!("skipped: {:?}", sandbox.info().warnings);
        return;
    }
    let sleep = || sandbox.spawn(sleep());
    let running = [sleep().unwrap(), sleep().unwrap(), sleep().unwrap()];
    let message = match sleep() {
        Err(e) => e.to_string(),
        Ok(_) => panic!("a fourth process was started"),
    };
    assert!(message.contains("as many processes as it may"), "{message}");
    running[0].kill().unwrap();
    wait(&running[0]);
    sleep().unwrap();
}

/// A command of one process.
fn sleep() -> CommandSpec {
    CommandSpec {
        argv: vec!["sleep".into(), "1000".into()],
        ..CommandSpec::default()
    }
}

#[test]
fn a_command_that_takes_too_much_memory_is_killed_and_the_sandbox_goes_on() {
    let f = Fixture::new();
    let sandbox = f
        .host
        .create(SandboxSpec {
            memory: Some(64 << 20),
            cpus: Some(1.5),
            ..SandboxSpec::default()
        })
        .unwrap();
    if !sandbox.info().warnings.is_empty() {
        eprintln!("skipped: {:?}", sandbox.info().warnings);
        return;
    }
    let got = sandbox
        .run(&["python3", "-c", "x = b'x' * (256 << 20); print('had it')"])
        .unwrap();
    assert_eq!((got.status, text(&got.stdout)), (137, String::new()));
    assert_eq!(output(&sandbox, "echo on"), "on");
}

#[test]
fn limits_without_their_controller_are_a_warning_in_words() {
    let f = Fixture::new();
    let sandbox = f
        .host
        .create(SandboxSpec {
            memory: Some(1 << 30),
            pids: Some(100),
            cpus: Some(2.0),
            ..SandboxSpec::default()
        })
        .unwrap();
    for warning in sandbox.info().warnings {
        assert!(warning.contains("not enforced"), "{warning}");
    }
    assert_eq!(output(&sandbox, "echo on"), "on");
}
