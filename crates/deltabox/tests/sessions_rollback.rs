//! Sessions are part of the state: what a rollback and a fork do to them and to their clients.

mod common;

use common::*;
use deltabox::{CommandSpec, Error, SessionEvent, WindowSize};

fn cat() -> CommandSpec {
    CommandSpec {
        stdin: true,
        ..sh("while read line; do echo got $line; done")
    }
}

#[test]
fn a_log_ends_where_it_ended_at_the_checkpoint_on_each_branch() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let session = sandbox.spawn(cat()).unwrap();
    let say = |word: &str| {
        let mut events = session.events(u64::MAX);
        session.write(format!("{word}\n").as_bytes()).unwrap();
        read_until(&mut events, &format!("got {word}\n"));
    };
    let log = || {
        let mut events = session.events(0);
        let mut all = Vec::new();
        while let Some(event) = events.next(Some(std::time::Duration::ZERO)) {
            match event {
                SessionEvent::Output { bytes, .. } => all.extend(bytes),
                other => panic!("{other:?}"),
            }
        }
        text(&all)
    };
    say("root");
    let root = sandbox.checkpoint(None).unwrap().id;
    say("left");
    let left = sandbox.checkpoint(None).unwrap().id;
    sandbox.rollback(root).unwrap();
    assert_eq!(log(), "got root\n");
    say("right");
    say("more");
    let right = sandbox.checkpoint(None).unwrap().id;
    sandbox.rollback(left).unwrap();
    assert_eq!(log(), "got root\ngot left\n");
    sandbox.rollback(right).unwrap();
    assert_eq!(log(), "got root\ngot right\ngot more\n");
    say("on");
}

#[test]
fn sessions_and_readers_of_an_abandoned_future_end_with_its_epoch() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let old = sandbox.spawn(cat()).unwrap();
    let id = sandbox.checkpoint(None).unwrap().id;
    let new = sandbox.spawn(sh("echo hi; sleep 1000")).unwrap();
    let mut new_reader = new.events(0);
    read_until(&mut new_reader, "hi");
    let mut old_reader = old.events(0);
    let epoch = sandbox.rollback(id).unwrap().epoch;
    let over = SessionEvent::RolledBack { epoch };
    assert_eq!(new_reader.next(Some(PATIENCE)), Some(over.clone()));
    assert_eq!(new_reader.next(None), None);
    assert_eq!(old_reader.next(Some(PATIENCE)), Some(over));
    assert!(matches!(
        sandbox.session(new.id()),
        Err(Error::NoSession { .. })
    ));
    assert!(new.write(b"x").is_err());
    // The old one goes on for those who look anew; numbers are not used again.
    old.write(b"x\n").unwrap();
    read_until(&mut old.events(0), "got x");
    let next = sandbox.spawn(sh("true")).unwrap();
    assert!(next.id() > new.id());
    assert_eq!(wait(&next).status, 0);
}

#[test]
fn an_ended_session_comes_back_and_takes_input() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let session = sandbox.spawn(cat()).unwrap();
    session.write(b"one\n").unwrap();
    read_until(&mut session.events(0), "got one");
    let id = sandbox.checkpoint(None).unwrap().id;
    session.close_stdin().unwrap();
    assert_eq!(wait(&session).status, 0);
    sandbox.rollback(id).unwrap();
    assert_eq!(session.info().exit, None);
    session.write(b"two\n").unwrap();
    read_until(&mut session.events(0), "got two");
    session.close_stdin().unwrap();
    let ended = wait(&session);
    assert_eq!(
        (ended.status, &*text(&ended.stdout)),
        (0, "got one\ngot two\n")
    );
}

#[test]
fn input_that_was_not_read_at_the_checkpoint_is_there_again() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let mut command = sh("echo on; until [ -e /tmp/go ]; do sleep 0.05; done; cat");
    command.stdin = true;
    let session = sandbox.spawn(command).unwrap();
    read_until(&mut session.events(0), "on");
    session.write(b"unread ").unwrap();
    let id = sandbox.checkpoint(None).unwrap().id;
    session.write(b"later").unwrap();
    sandbox.rollback(id).unwrap();
    session.close_stdin().unwrap();
    output(&sandbox, "touch /tmp/go");
    assert_eq!(text(&wait(&session).stdout), "on\nunread ");
}

#[test]
fn a_shell_on_a_terminal_comes_back_after_its_end() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let session = sandbox
        .spawn(CommandSpec {
            argv: ["bash", "--norc", "--noprofile", "--noediting", "-i"]
                .map(String::from)
                .to_vec(),
            env: [("PS1".to_owned(), "ready> ".to_owned())].into(),
            tty: Some(WindowSize { rows: 24, cols: 80 }),
            ..CommandSpec::default()
        })
        .unwrap();
    let type_line = |line: &str| {
        let mut events = session.events(u64::MAX);
        session.write(format!("{line}\n").as_bytes()).unwrap();
        read_until(&mut events, "ready>")
    };
    read_until(&mut session.events(0), "ready>");
    type_line("x=kept");
    let id = sandbox.checkpoint(None).unwrap().id;
    type_line("x=changed");
    sandbox.rollback(id).unwrap();
    assert!(type_line("echo x is $x").contains("x is kept"));
    session.write(b"exit\n").unwrap();
    assert_eq!(wait(&session).status, 0);
    sandbox.rollback(id).unwrap();
    assert!(type_line("echo again $x; sleep 1000 & jobs").contains("again kept"));
}

#[test]
fn a_fork_has_the_sessions_of_its_source_with_logs_of_its_own() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let session = sandbox.spawn(cat()).unwrap();
    session.write(b"before\n").unwrap();
    read_until(&mut session.events(0), "got before");
    let id = sandbox.checkpoint(None).unwrap().id;
    let forks = f.host.fork(sandbox.name(), Some(id), 2, &[]).unwrap();
    for (n, fork) in forks.iter().enumerate() {
        let session = fork.session(session.id()).unwrap();
        session.write(format!("fork {n}\n").as_bytes()).unwrap();
        let seen = read_until(&mut session.events(0), &format!("got fork {n}\n"));
        assert_eq!(seen, format!("got before\ngot fork {n}\n"));
    }
    session.write(b"source\n").unwrap();
    let seen = read_until(&mut session.events(0), "got source");
    assert_eq!(seen, "got before\ngot source\n");
}
