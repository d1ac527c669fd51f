//! A host of its own for every test, and programs inside that are spoken to line by line.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use deltabox::{
    CheckpointId, CommandSpec, Gears, Host, HostConfig, RunOutput, Sandbox, SandboxSpec, Session,
    SessionEvent, SessionId, Stream,
};

/// Long enough for a busy machine; only a hang takes this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What went wrong, in words; gathered so that one test can tell of several modes.
pub(crate) type Outcome<T = ()> = Result<T, String>;

/// A host; its drop ends the sandboxes, then the directory goes.
pub(crate) struct Lab {
    pub(crate) host: Host,
    dir: tempfile::TempDir,
    gears: Gears,
}

impl Lab {
    pub(crate) fn new() -> Self {
        Self::with(Gears::default())
    }

    /// Whose checkpoints and rollbacks work in their second gear from these amounts on.
    pub(crate) fn with(gears: Gears) -> Self {
        Self::open(tempfile::tempdir().unwrap(), gears)
    }

    fn open(dir: tempfile::TempDir, gears: Gears) -> Self {
        let host = Host::open(HostConfig {
            state_dir: dir.path().join("state"),
            gears,
            ..HostConfig::default()
        })
        .unwrap();
        Self { host, dir, gears }
    }

    /// Ends the host, and opens another one on what it leaves.
    pub(crate) fn restarted(self) -> Self {
        self.restarted_with(|| ())
    }

    /// The same; between the two something else is done.
    pub(crate) fn restarted_with(self, between: impl FnOnce()) -> Self {
        let Self { host, dir, gears } = self;
        drop(host);
        between();
        Self::open(dir, gears)
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub(crate) fn sandbox(&self) -> Arc<Sandbox> {
        self.create(SandboxSpec::default())
    }

    pub(crate) fn create(&self, spec: SandboxSpec) -> Arc<Sandbox> {
        self.host.create(spec).unwrap()
    }

    /// Sandboxes with the state of a checkpoint.
    pub(crate) fn fork(
        &self,
        sandbox: &Sandbox,
        id: CheckpointId,
        n: usize,
    ) -> Outcome<Vec<Arc<Sandbox>>> {
        self.host
            .fork(sandbox.name(), Some(id), n, &[])
            .map_err(|e| format!("fork: {e}"))
    }
}

/// A path that is a Python of the machine itself, readable by every user inside.
pub(crate) const PYTHON: &str = "/usr/bin/python3";

/// Whether a program is there; tells it in the test's output if not.
pub(crate) fn installed(path: &str) -> bool {
    let there = std::path::Path::new(path).exists();
    if !there {
        eprintln!("{path} is not installed: nothing was tested with it");
    }
    there
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

/// Puts a file into the sandbox.
pub(crate) fn write_file(sandbox: &Sandbox, path: &str, content: &[u8]) {
    let session = sandbox
        .spawn(CommandSpec {
            argv: ["sh", "-c", "cat > \"$0\" && chmod 755 \"$0\"", path]
                .map(str::to_owned)
                .into(),
            stdin: true,
            ..CommandSpec::default()
        })
        .unwrap();
    session.write(content).unwrap();
    session.close_stdin().unwrap();
    assert_eq!(ended(&session), Ok(0), "writing {path}");
}

/// Waits for the end of a session's command.
pub(crate) fn ended(session: &Arc<Session>) -> Outcome<i32> {
    let mut events = session.events(0);
    loop {
        match events.next(Some(PATIENCE)) {
            Some(SessionEvent::Exit { status, .. }) => return Ok(status),
            Some(SessionEvent::RolledBack { epoch }) => {
                return Err(format!("rolled back at epoch {epoch}"));
            }
            Some(_) => {}
            None => return Err("it does not end".to_owned()),
        }
    }
}

/// A program that answers lines with lines.
pub(crate) struct Program {
    pub(crate) session: Arc<Session>,
    /// The byte of the session's output up to which was listened.
    at: u64,
}

impl Program {
    pub(crate) fn start(sandbox: &Sandbox, argv: &[&str]) -> Outcome<Self> {
        let spec = CommandSpec {
            argv: argv.iter().map(|a| (*a).to_owned()).collect(),
            stdin: true,
            ..CommandSpec::default()
        };
        let session = sandbox.spawn(spec).map_err(|e| format!("start: {e}"))?;
        Ok(Self { session, at: 0 })
    }

    /// The same program in a fork of its sandbox, listened to up to `mark`.
    pub(crate) fn in_fork(&self, fork: &Sandbox, mark: u64) -> Outcome<Self> {
        Self::found(fork, self.session.info().id, mark)
    }

    /// The program that is a session of a sandbox, listened to up to `mark`.
    pub(crate) fn found(sandbox: &Sandbox, id: SessionId, mark: u64) -> Outcome<Self> {
        let session = sandbox.session(id).map_err(|e| e.to_string())?;
        Ok(Self { session, at: mark })
    }

    /// Up to where was listened: to be given to [`Program::went_back`].
    pub(crate) fn mark(&self) -> u64 {
        self.at
    }

    /// The sandbox was rolled back to when the program had been listened to up to `mark`.
    pub(crate) fn went_back(&mut self, mark: u64) {
        self.at = mark;
    }

    pub(crate) fn say(&self, line: &str) -> Outcome {
        self.session
            .write(format!("{line}\n").as_bytes())
            .map_err(|e| format!("saying {line:?}: {e}"))
    }

    /// The next line of standard output, without its end.
    pub(crate) fn hear(&mut self) -> Outcome<String> {
        let (mut line, mut errors) = (Vec::new(), Vec::new());
        let mut events = self.session.events(self.at);
        loop {
            match events.next(Some(PATIENCE)) {
                Some(SessionEvent::Output {
                    stream: Stream::Stderr,
                    bytes,
                }) => {
                    self.at += bytes.len() as u64;
                    errors.extend(bytes);
                }
                Some(SessionEvent::Output { bytes, .. }) => {
                    if let Some(end) = bytes.iter().position(|b| *b == b'\n') {
                        self.at += end as u64 + 1;
                        line.extend(&bytes[..end]);
                        return Ok(text(&line));
                    }
                    self.at += bytes.len() as u64;
                    line.extend(bytes);
                }
                Some(SessionEvent::Missed { bytes }) => self.at += bytes,
                other => {
                    let what = other.map_or("silence".to_owned(), |e| format!("{e:?}"));
                    let (line, errors) = (text(&line), text(&errors));
                    return Err(format!("{what} instead of an answer: {line}{errors}"));
                }
            }
        }
    }

    pub(crate) fn ask(&mut self, line: &str) -> Outcome<String> {
        self.say(line)?;
        self.hear().map_err(|e| format!("{line:?}: {e}"))
    }

    /// Asks for what must be answered with PASS.
    pub(crate) fn pass(&mut self, line: &str) -> Outcome {
        match self.ask(line)? {
            answer if answer == "PASS" => Ok(()),
            answer => Err(answer),
        }
    }

    /// Kills it with all its descendants and waits for its end.
    pub(crate) fn kill(&self) -> Outcome {
        self.session.kill().map_err(|e| format!("kill: {e}"))?;
        ended(&self.session).map(drop)
    }
}
