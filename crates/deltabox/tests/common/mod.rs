//! A host with a state directory of its own, and what is done with sandboxes in every test.

#![allow(dead_code, reason = "each test program uses a part")]

pub(crate) mod driver;

use std::sync::Arc;
use std::time::Duration;

use deltabox::{
    CommandSpec, Events, Host, HostConfig, RunOutput, Sandbox, SandboxSpec, Session, SessionEvent,
    Stream,
};

/// Long enough for a busy machine; only a hang takes this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A host; its drop ends the sandboxes, then the directory goes.
pub(crate) struct Fixture {
    pub(crate) host: Host,
    pub(crate) dir: tempfile::TempDir,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::open(HostConfig {
            state_dir: dir.path().join("state"),
            ..HostConfig::default()
        })
        .unwrap();
        Self { host, dir }
    }

    pub(crate) fn sandbox(&self) -> Arc<Sandbox> {
        self.host.create(SandboxSpec::default()).unwrap()
    }
}

/// A command line for `sh -c`.
pub(crate) fn sh(script: &str) -> CommandSpec {
    CommandSpec {
        argv: vec!["sh".into(), "-c".into(), script.into()],
        ..CommandSpec::default()
    }
}

/// Runs a script to its end and returns its output without the last newline; it must succeed.
pub(crate) fn output(sandbox: &Sandbox, script: &str) -> String {
    let RunOutput {
        status,
        stdout,
        stderr,
    } = sandbox.run(&["sh", "-c", script]).unwrap();
    let (stdout, stderr) = (text(&stdout), text(&stderr));
    assert_eq!(status, 0, "{script}: {stdout}{stderr}");
    stdout.trim_end().to_owned()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// How a session ended, with all that it wrote.
pub(crate) struct Ended {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) missed: u64,
    pub(crate) status: i32,
    pub(crate) timed_out: bool,
}

/// Waits for the end of a session.
pub(crate) fn wait(session: &Arc<Session>) -> Ended {
    let mut events = session.events(0);
    let mut ended = Ended {
        stdout: vec![],
        stderr: vec![],
        missed: 0,
        status: 0,
        timed_out: false,
    };
    loop {
        match events.next(Some(PATIENCE)).expect("the session hangs") {
            SessionEvent::Output { stream, bytes } => match stream {
                Stream::Stdout => ended.stdout.extend(bytes),
                Stream::Stderr => ended.stderr.extend(bytes),
            },
            SessionEvent::Missed { bytes } => ended.missed += bytes,
            SessionEvent::Exit { status, timed_out } => {
                (ended.status, ended.timed_out) = (status, timed_out);
                return ended;
            }
            SessionEvent::RolledBack { epoch } => panic!("rolled back at {epoch}"),
        }
    }
}

/// Reads until the output contains `wanted`; returns all of it so far.
pub(crate) fn read_until(events: &mut Events, wanted: &str) -> String {
    let mut seen = Vec::new();
    while !text(&seen).contains(wanted) {
        match events.next(Some(PATIENCE)) {
            Some(SessionEvent::Output { bytes, .. }) => seen.extend(bytes),
            other => panic!("{other:?} instead of {wanted:?} after {:?}", text(&seen)),
        }
    }
    text(&seen)
}
