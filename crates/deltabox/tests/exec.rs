//! Commands in a sandbox: streams, exit statuses, users, time limits.

mod common;

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use common::*;
use deltabox::{CommandSpec, Error, SessionEvent};

#[test]
fn output_errors_and_status_of_a_command_come_out() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let got = sandbox
        .run(&["sh", "-c", "echo out; echo err >&2; exit 7"])
        .unwrap();
    assert_eq!(
        (got.status, text(&got.stdout), text(&got.stderr)),
        (7, "out\n".into(), "err\n".into())
    );
}

#[test]
fn a_command_ended_by_a_signal_has_status_128_and_the_signal() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let killed = sandbox.run(&["sh", "-c", "kill -TERM $$"]).unwrap();
    assert_eq!(killed.status, 128 + 15);
    let session = sandbox.spawn(sh("sleep 1000 & wait")).unwrap();
    session.signal(9).unwrap();
    assert_eq!(wait(&session).status, 128 + 9);
    assert_eq!(
        sandbox.session(session.id()).unwrap().info().exit,
        Some(137)
    );
}

#[test]
fn input_reaches_the_command_and_its_end_is_seen() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let mut command = sh("wc -c; cat /dev/stdin; echo done > /dev/stderr");
    command.stdin = true;
    command.user = Some("nobody".into());
    let session = sandbox.spawn(command).unwrap();
    // More than a pipe holds.
    session.write(&vec![b'x'; 300_000]).unwrap();
    session.close_stdin().unwrap();
    let ended = wait(&session);
    assert_eq!(text(&ended.stdout).trim(), "300000");
    assert_eq!(text(&ended.stderr).trim(), "done");
    assert!(matches!(session.write(b"x"), Err(Error::Invalid(_))));
}

#[test]
fn without_input_standard_input_is_empty() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    assert_eq!(
        output(&sandbox, "wc -c; readlink /proc/self/fd/0"),
        "0\n/dev/null"
    );
}

#[test]
fn what_cannot_be_started_says_why_and_leaves_nothing() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let fails = |command: CommandSpec| match sandbox.spawn(command) {
        Err(e) => e,
        Ok(session) => panic!("{:?} was started", session.info()),
    };
    let not_found = fails(CommandSpec {
        argv: vec!["no-such-program".into()],
        ..CommandSpec::default()
    });
    assert!(
        matches!(&not_found, Error::Spawn { source, .. } if source.kind() == io::ErrorKind::NotFound),
        "{not_found}"
    );
    let not_executable = fails(CommandSpec {
        argv: vec!["/etc/passwd".into()],
        ..CommandSpec::default()
    });
    assert!(
        matches!(&not_executable, Error::Spawn { source, .. } if source.kind() == io::ErrorKind::PermissionDenied),
        "{not_executable}"
    );
    let mut nowhere = sh("true");
    nowhere.cwd = Some("/no/such/dir".into());
    let message = fails(nowhere).to_string();
    assert!(message.contains("/no/such/dir"), "{message}");
    let mut nobody = sh("true");
    nobody.user = Some("no-such-user".into());
    let message = fails(nobody).to_string();
    assert!(message.contains("no-such-user"), "{message}");
    let mut long = sh("true");
    long.argv.push("x".repeat(1 << 20));
    assert!(matches!(fails(long), Error::Invalid(_)));
    assert_eq!(sandbox.sessions().len(), 0);
    // The last one is still on its way out of the kernel, perhaps.
    let gone = std::iter::repeat_with(|| {
        std::thread::sleep(std::time::Duration::from_millis(20));
        sandbox.info().processes
    });
    assert!(gone.take(500).any(|n| n == 0));
    assert_eq!(output(&sandbox, "echo works"), "works");
}

#[test]
fn environment_directory_and_user_are_as_asked_for() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let run = |command: CommandSpec| {
        let ended = wait(&sandbox.spawn(command).unwrap());
        assert_eq!(ended.status, 0, "{}", text(&ended.stderr));
        text(&ended.stdout).trim_end().to_owned()
    };
    let mut command = sh("echo $GREETING:$HOME:$PATH; pwd; id -u; id -g; id -G; umask");
    command.env = BTreeMap::from([("GREETING".into(), "hi you".into())]);
    command.cwd = Some("/tmp".into());
    assert_eq!(
        run(command.clone()),
        "hi you:/root:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n/tmp\n0\n0\n0\n0022"
    );
    command.user = Some("1234:56".into());
    assert!(run(command.clone()).ends_with("/tmp\n1234\n56\n56\n0022"));
    // Users of the sandbox's own files, not of the host's.
    output(
        &sandbox,
        "echo 'ann:x:4711:4712::/home/ann:/bin/bash' >> /etc/passwd; echo 'team:x:99:ann' >> /etc/group",
    );
    let mut command = sh("id -u; id -G; touch /tmp/mine; stat -c %u /tmp/mine; echo $HOME");
    command.user = Some("ann".into());
    assert_eq!(run(command), "4711\n4712 99\n4711\n/home/ann");
}

#[test]
fn a_script_without_a_first_line_and_a_login_shell_run() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    output(
        &sandbox,
        "echo 'echo arg $1' > /tmp/script; chmod +x /tmp/script",
    );
    let got = sandbox.run(&["/tmp/script", "one"]).unwrap();
    assert_eq!(text(&got.stdout), "arg one\n");
    let session = sandbox
        .spawn(CommandSpec {
            stdin: true,
            ..CommandSpec::default()
        })
        .unwrap();
    session.write(b"echo $0 in $PWD; exit 3\n").unwrap();
    let ended = wait(&session);
    assert!(
        text(&ended.stdout).ends_with(" in /\n"),
        "{}",
        text(&ended.stdout)
    );
    assert_eq!(ended.status, 3);
}

#[test]
fn when_time_is_up_the_whole_tree_is_killed_and_nothing_else() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let other = sandbox.spawn(sh("sleep 1000")).unwrap();
    // Children, a background job, one that left session and parent, and one that ignores signals.
    let mut command = sh(
        "sleep 1001 & (setsid sleep 1002 &) ; (trap '' TERM HUP INT; setsid sh -c 'sleep 1003; true' & ) ; \
         echo started; sleep 1004",
    );
    command.timeout = Some(Duration::from_millis(700));
    let session = sandbox.spawn(command).unwrap();
    let ended = wait(&session);
    assert_eq!(text(&ended.stdout), "started\n");
    assert!(ended.timed_out);
    assert_eq!(ended.status, 137);
    // The killed ones may be on their way out.
    let left = "for i in 1 2 3 4 5 6 7 8 9; do l=$(pgrep -a sleep); [ \"$l\" = \"${l#*100[1-4]}\" ] && break; sleep 0.2; done; echo \"$l\"";
    let left = output(&sandbox, left);
    assert!(
        left.contains("sleep 1000") && left.lines().count() == 1,
        "{left}"
    );
    assert_eq!(other.info().exit, None);
}

#[test]
fn a_command_that_ends_in_time_is_not_said_to_be_late() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let mut command = sh("exit 4");
    command.timeout = Some(Duration::from_secs(1000));
    let ended = wait(&sandbox.spawn(command).unwrap());
    assert_eq!((ended.status, ended.timed_out), (4, false));
}

#[test]
fn killing_a_session_ends_its_descendants() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let session = sandbox
        .spawn(sh("sleep 1000 & echo on; sleep 1000"))
        .unwrap();
    read_until(&mut session.events(0), "on");
    session.kill().unwrap();
    assert_eq!(wait(&session).status, 137);
    output(&sandbox, "! pgrep sleep || { sleep 1; ! pgrep sleep; }");
}

#[test]
fn a_gigabyte_of_output_is_bounded_and_its_end_is_kept() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let session = sandbox
        .spawn(sh(
            "head -c 1000000000 /dev/zero | tr '\\0' x; echo the end",
        ))
        .unwrap();
    // Nobody reads, so nobody is waited for.
    let begun = std::time::Instant::now();
    while session.info().exit.is_none() {
        assert!(begun.elapsed() < PATIENCE, "the command waits");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(session.info().output, 1_000_000_008);
    let late = wait(&session);
    assert!(late.missed > 900_000_000, "{} missed", late.missed);
    assert_eq!(late.missed + late.stdout.len() as u64, 1_000_000_008);
    assert!(late.stdout.len() <= 64 << 20);
    assert!(late.stdout.ends_with(b"xxthe end\n"));
    let logs = f.dir.path().join("state/sandboxes/box1/logs");
    for log in std::fs::read_dir(logs).unwrap() {
        assert!(log.unwrap().metadata().unwrap().len() <= 64 << 20);
    }
}

#[test]
fn a_command_waits_for_a_slow_reader_and_goes_on_when_it_leaves() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let session = sandbox.spawn(sh("head -c 200000000 /dev/zero")).unwrap();
    let mut slow = session.events(0);
    let gone = session.events(0);
    // What is seen here can only be too little output, never too much: the command had time to write more.
    std::thread::sleep(Duration::from_secs(1));
    assert!(session.info().output < 64 << 20);
    let mut seen = 0;
    while seen < 20_000_000 {
        match slow.next(Some(PATIENCE)) {
            Some(SessionEvent::Output { bytes, .. }) => seen += bytes.len(),
            other => panic!("{other:?} after {seen} bytes"),
        }
    }
    drop(gone);
    loop {
        match slow.next(Some(PATIENCE)) {
            Some(SessionEvent::Output { bytes, .. }) => seen += bytes.len(),
            Some(SessionEvent::Exit { status: 0, .. }) => break,
            other => panic!("{other:?} after {seen} bytes"),
        }
    }
    assert_eq!(seen, 200_000_000);
}

#[test]
fn readers_can_begin_anywhere_and_be_many() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let session = sandbox
        .spawn(sh("echo 0123456789; sleep 0.2; echo more"))
        .unwrap();
    let readers: Vec<_> = [0, 5, 100]
        .into_iter()
        .map(|offset| {
            let mut events = session.events(offset);
            std::thread::spawn(move || read_until(&mut events, "more\n"))
        })
        .collect();
    let seen: Vec<_> = readers.into_iter().map(|r| r.join().unwrap()).collect();
    assert_eq!(seen[0], "0123456789\nmore\n");
    assert!(seen[1].ends_with("more\n"));
    wait(&session);
    let mut events = session.events(5);
    assert_eq!(read_until(&mut events, "more"), "56789\nmore\n");
    assert!(matches!(events.next(None), Some(SessionEvent::Exit { .. })));
    assert_eq!(events.next(None), None);
}

#[test]
fn a_background_command_outlives_its_session_and_keeps_its_pipes() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let session = sandbox
        .spawn(sh(
            "(while sleep 0.05; do echo tick; [ -e /tmp/stop ] && touch /tmp/stopped && exit; done) & echo first",
        ))
        .unwrap();
    assert_eq!(wait(&session).status, 0);
    let before = session.info().output;
    output(
        &sandbox,
        "sleep 0.3; touch /tmp/stop; until [ -e /tmp/stopped ]; do sleep 0.05; done",
    );
    assert!(
        session.info().output > before,
        "its later output is logged too"
    );
}

#[test]
fn orphans_are_reaped() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let script = "for i in 1 2 3 4 5 6 7 8; do (sleep 0.05 &) ; done; sleep 0.5; ! grep -l '^State:.Z' /proc/[0-9]*/status";
    output(&sandbox, script);
    assert_eq!(sandbox.info().processes, 0);
}

#[test]
fn only_the_newest_ended_sessions_are_remembered() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    for _ in 0..258 {
        wait(&sandbox.spawn(sh("echo x")).unwrap());
    }
    let known = sandbox.sessions();
    assert_eq!(known.len(), 256);
    assert_eq!(known.last().unwrap().id.0, 258);
    assert!(matches!(
        sandbox.session("s1".parse().unwrap()),
        Err(Error::NoSession { .. })
    ));
}

/// Root inside may stop a process that init has only begun to make.
#[test]
fn a_command_that_is_stopped_while_it_starts_is_killed_and_the_next_one_starts() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    // Stops the first copy of init that it sees.
    let stopper = r#"
import os, signal
def name(pid):
    try:
        return open(f"/proc/{pid}/comm").read()
    except OSError:
        return None
def send(pid, number):
    try:
        os.kill(int(pid), number)
    except ProcessLookupError:
        pass
def is_there(pid):
    return name(pid) is not None
def is_stopped(pid):
    try:
        return ") T " in open(f"/proc/{pid}/stat").read()
    except OSError:
        return False
init = name(1)
print("ready", flush=True)
while True:
    for pid in os.listdir("/proc"):
        if pid.isdigit() and pid != "1" and name(pid) == init:
            send(pid, signal.SIGSTOP)
            while is_there(pid) and not is_stopped(pid):
                pass
            if name(pid) == init:
                raise SystemExit
            # It was its own program by then.
            send(pid, signal.SIGCONT)
"#;
    let session = sandbox
        .spawn(CommandSpec {
            argv: vec!["/usr/bin/python3".into(), "-c".into(), stopper.into()],
            ..CommandSpec::default()
        })
        .unwrap();
    read_until(&mut session.events(0), "ready");
    let caught = (0..1000).find_map(|_| sandbox.run(&["true"]).err());
    let error = caught
        .expect("no command was stopped while it started")
        .to_string();
    assert!(error.contains("timed out"), "{error}");
    assert_eq!(output(&sandbox, "echo next"), "next");
    let id = sandbox.checkpoint(None).unwrap().id;
    sandbox.rollback(id).unwrap();
    assert_eq!(output(&sandbox, "echo and the next"), "and the next");
}
