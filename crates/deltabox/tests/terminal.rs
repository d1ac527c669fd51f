//! Shells on a terminal.

mod common;

use std::sync::Arc;

use common::*;
use deltabox::{CommandSpec, Events, Sandbox, Session, WindowSize};

const SIZE: WindowSize = WindowSize {
    rows: 33,
    cols: 111,
};

/// A bash that says `ready` when it waits for input.
fn bash(sandbox: &Sandbox) -> (Arc<Session>, Events) {
    let session = sandbox
        .spawn(CommandSpec {
            argv: ["bash", "--norc", "--noprofile", "--noediting", "-i"]
                .map(String::from)
                .to_vec(),
            env: [("PS1".to_owned(), "ready> ".to_owned())].into(),
            tty: Some(SIZE),
            ..CommandSpec::default()
        })
        .unwrap();
    let mut events = session.events(0);
    read_until(&mut events, "ready>");
    (session, events)
}

/// Types a line and reads up to the next prompt.
fn type_line(session: &Session, events: &mut Events, line: &str) -> String {
    session.write(format!("{line}\n").as_bytes()).unwrap();
    read_until(events, "ready>")
}

#[test]
fn the_terminal_has_its_size_name_and_owner() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let (session, mut events) = bash(&sandbox);
    let got = type_line(
        &session,
        &mut events,
        "stty size; tty; stat -c %U:%G:%a $(tty); echo $TERM",
    );
    assert!(got.contains("33 111"), "{got}");
    assert!(got.contains("/dev/pts/0"), "{got}");
    assert!(got.contains("root:tty:620"), "{got}");
    assert!(got.contains("xterm-256color"), "{got}");
    // As it is opened by name.
    let got = type_line(
        &session,
        &mut events,
        "echo by-name > /dev/tty; echo by-number > /dev/pts/0",
    );
    assert!(
        got.contains("by-name") && got.contains("by-number"),
        "{got}"
    );
    session.resize(WindowSize { rows: 5, cols: 6 }).unwrap();
    session.write(b"stty size\n").unwrap();
    read_until(&mut events, "5 6");
}

#[test]
fn job_control_works() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let (session, mut events) = bash(&sandbox);
    type_line(&session, &mut events, "sleep 1000 &");
    let got = type_line(&session, &mut events, "jobs");
    assert!(got.contains("Running"), "{got}");
    // Another one in the foreground, stopped by Ctrl-Z.
    session
        .write(b"sh -c 'echo be''gun; exec sleep 1001'\n")
        .unwrap();
    read_until(&mut events, "begun");
    session.write(&[26]).unwrap();
    let got = read_until(&mut events, "ready>");
    assert!(got.contains("Stopped"), "{got}");
    let got = type_line(&session, &mut events, "bg; jobs");
    assert!(got.matches("Running").count() == 2, "{got}");
    type_line(&session, &mut events, "kill %1 %2; wait");
    let got = type_line(&session, &mut events, "echo left=$(jobs -r | wc -l)");
    assert!(got.contains("left=0"), "{got}");
}

#[test]
fn control_c_interrupts_the_foreground_command_only() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let (session, mut events) = bash(&sandbox);
    session
        .write(b"sh -c 'echo be''gun; exec sleep 1000'\n")
        .unwrap();
    read_until(&mut events, "begun");
    session.write(&[3]).unwrap();
    read_until(&mut events, "ready>");
    let got = type_line(&session, &mut events, "echo status $?");
    assert!(got.contains("status 130"), "{got}");
}

#[test]
fn end_of_file_ends_the_shell() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let (session, mut events) = bash(&sandbox);
    type_line(&session, &mut events, "(exit 9)");
    session.close_stdin().unwrap();
    assert_eq!(wait(&session).status, 9);
    assert!(session.write(b"x").is_err());
}

#[test]
fn all_output_before_the_end_is_there() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    for _ in 0..5 {
        let mut command = sh("seq 1 5000");
        command.tty = Some(SIZE);
        let ended = wait(&sandbox.spawn(command).unwrap());
        assert!(text(&ended.stdout).ends_with("4999\r\n5000\r\n"));
    }
}

#[test]
fn another_user_has_a_terminal_too() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let mut command = sh("id -un; echo open > $(tty); pwd");
    command.tty = Some(SIZE);
    command.user = Some("nobody".into());
    let ended = wait(&sandbox.spawn(command).unwrap());
    let got = text(&ended.stdout);
    assert_eq!((ended.status, &*got), (0, "nobody\r\nopen\r\n/\r\n"));
}
