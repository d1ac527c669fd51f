//! Real programs in the middle of work: checkpointed at random moments, changed, rolled back in place, made again, forked,
//! and verified each time. The dice are the same on every run; how long the programs' steps take is not.
//!
//! A few rounds each; `DELTABOX_ROUNDS=200` for a long run, with other dice if `DELTABOX_SEED` is set. What is not installed is left out with a message.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use deltabox::{CheckpointId, Sandbox};

use crate::lab::{Lab, Outcome, PYTHON, Program, installed, write_file};
use crate::walk::Dice;

const FRAME: &str = include_str!("../programs/work/frame.py");
const SERVERS: &str = include_str!("../programs/work/servers.py");
const TOOLS: &str = include_str!("../programs/work/tools.py");
const IN_PYTHON: &str = include_str!("../programs/work/python.py");
const IN_JAVASCRIPT: &str = include_str!("../programs/work/node.js");
const IN_GO: &str = include_str!("../programs/work/work.go");
const IN_JAVA: &str = include_str!("../programs/work/Work.java");

/// The most checkpoints that are kept at a time.
const NODES: usize = 12;
/// The longest pause before a round, in milliseconds.
const PAUSE: usize = 40;

/// A number from the environment.
pub(crate) fn number(name: &str, otherwise: usize) -> usize {
    let told = std::env::var(name).ok();
    told.map_or(otherwise, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is a number"))
    })
}

/// A checkpoint, and the number that the program had been told before it.
struct Node {
    id: CheckpointId,
    mark: u64,
    token: String,
}

/// A program at work in a sandbox, with checkpoints of it.
struct AtWork {
    lab: Lab,
    sandbox: Arc<Sandbox>,
    program: Program,
    nodes: Vec<Node>,
    dice: Dice,
    /// What it was told last, in the state that it is in.
    token: String,
}

/// How a round begins.
#[derive(Clone, Copy, Debug)]
enum Mode {
    GoOn,
    InPlace,
    MadeAgain,
    Forked,
}

const MODES: [Mode; 4] = [Mode::GoOn, Mode::InPlace, Mode::MadeAgain, Mode::Forked];

impl AtWork {
    fn begin(files: &[(&str, &[u8])], argv: &[&str]) -> Outcome<Self> {
        let lab = Lab::new();
        let sandbox = lab.sandbox();
        for (path, content) in files {
            write_file(&sandbox, path, content);
        }
        let mut program = Program::start(&sandbox, argv)?;
        let first = program.hear()?;
        if first != "ready" {
            return Err(format!("{first} instead of ready"));
        }
        Ok(Self {
            lab,
            sandbox,
            program,
            nodes: Vec::new(),
            dice: Dice::new(number("DELTABOX_SEED", 4711) as u64),
            token: "0".to_owned(),
        })
    }

    fn checkpoint(&mut self) -> Outcome {
        let report = self.sandbox.checkpoint(None);
        self.nodes.push(Node {
            id: report.map_err(|e| format!("checkpoint: {e}"))?.id,
            mark: self.program.mark(),
            token: self.token.clone(),
        });
        if self.nodes.len() > NODES {
            let old = self.nodes.remove(self.dice.roll(NODES));
            let deleted = self.sandbox.delete(old.id);
            deleted.map_err(|e| format!("delete: {e}"))?;
        }
        Ok(())
    }

    fn roll_back(&mut self) -> Outcome {
        let node = &self.nodes[self.dice.roll(self.nodes.len())];
        let report = self.sandbox.rollback(node.id);
        let report = report.map_err(|e| format!("rollback: {e}"))?;
        if let Some(why) = report.fallback {
            return Err(format!("it could not be undone in place: {why}"));
        }
        self.program.went_back(node.mark);
        self.token.clone_from(&node.token);
        Ok(())
    }

    fn fork(&mut self, number: usize) -> Outcome {
        let node = &self.nodes[self.dice.roll(self.nodes.len())];
        let fork = &self.lab.fork(&self.sandbox, node.id, 1)?[0];
        let mut program = self.program.in_fork(fork, node.mark)?;
        verify(&mut program, &node.token)?;
        tell(&mut program, &number.to_string())?;
        work_on(&mut program)?;
        verify(&mut program, &number.to_string())?;
        let removed = self.lab.host.remove(fork.name());
        removed.map_err(|e| format!("removing the fork: {e}"))
    }

    fn round(&mut self, number: usize, mode: Mode) -> Outcome {
        std::thread::sleep(Duration::from_millis(self.dice.roll(PAUSE) as u64));
        match mode {
            Mode::GoOn => {}
            Mode::InPlace => self.roll_back()?,
            Mode::MadeAgain => {
                let kill = self.sandbox.run(&["sh", "-c", "kill -9 -1"]);
                kill.map_err(|e| format!("kill: {e}"))?;
                self.roll_back()?;
            }
            Mode::Forked => self.fork(number)?,
        }
        verify(&mut self.program, &self.token)?;
        if self.dice.roll(3) == 0 {
            work_on(&mut self.program)?;
        }
        self.token = number.to_string();
        tell(&mut self.program, &self.token)?;
        std::thread::sleep(Duration::from_millis(self.dice.roll(PAUSE) as u64));
        self.checkpoint()
    }

    fn all_rounds(mut self) -> Outcome {
        let told = self
            .checkpoint()
            .and_then(|()| work_on(&mut self.program))
            .map_err(|e| format!("at first: {e}"));
        told?;
        for round in 1..=number("DELTABOX_ROUNDS", 4) {
            // Each of them in any four rounds, in an order that changes.
            let mode = MODES[(round + round / MODES.len()) % MODES.len()];
            self.round(round, mode)
                .map_err(|e| format!("round {round}, {mode:?}: {e}"))?;
        }
        work_on(&mut self.program)?;
        verify(&mut self.program, &self.token)
    }
}

fn verify(program: &mut Program, token: &str) -> Outcome {
    match program.ask("get")? {
        got if got == token => Ok(()),
        got => Err(format!("{got} instead of {token}")),
    }
}

fn tell(program: &mut Program, token: &str) -> Outcome {
    done(program, &format!("set {token}"))
}

/// Waits until the work has got further.
fn work_on(program: &mut Program) -> Outcome {
    done(program, "go")
}

fn done(program: &mut Program, line: &str) -> Outcome {
    match program.ask(line)? {
        answer if answer == "done" => Ok(()),
        answer => Err(format!("{line}: {answer}")),
    }
}

/// A work of one of the Python files, if all these programs are there.
fn python(theme: &str, name: &str, needs: &[&str]) -> Outcome {
    if !needs.iter().all(|path| installed(path)) {
        return Ok(());
    }
    let text = format!("{FRAME}\n\n{theme}\n\nmain()\n");
    let files = [("/work.py", text.as_bytes())];
    AtWork::begin(&files, &[PYTHON, "/work.py", name])?.all_rounds()
}

/// Whether Python has a module; tells it in the test's output if not.
fn has_module(name: &str) -> bool {
    let there = Command::new(PYTHON)
        .args(["-c", &format!("import {name}")])
        .output()
        .is_ok_and(|output| output.status.success());
    if !there {
        eprintln!("Python has no {name}: nothing was tested with it");
    }
    there
}

#[test]
fn bash_with_jobs() -> Outcome {
    python(TOOLS, "bash", &["/bin/bash"])
}

#[test]
fn git_that_commits_clones_and_collects() -> Outcome {
    python(TOOLS, "git", &[])
}

#[test]
fn make_and_gcc() -> Outcome {
    python(TOOLS, "make", &["/usr/bin/make", "/usr/bin/gcc"])
}

#[test]
fn tmux_with_two_windows() -> Outcome {
    python(TOOLS, "tmux", &["/usr/bin/tmux"])
}

#[test]
fn chromium_without_a_window() -> Outcome {
    python(TOOLS, "chromium", &["/usr/bin/chromium"])
}

#[test]
fn redis_under_its_benchmark() -> Outcome {
    python(SERVERS, "redis", &["/usr/bin/redis-benchmark"])
}

#[test]
fn nginx_with_clients_that_stay() -> Outcome {
    python(SERVERS, "nginx", &["/usr/sbin/nginx"])
}

#[test]
fn streams_of_bytes_through_tcp() -> Outcome {
    python(SERVERS, "streams", &[])
}

#[test]
fn sqlite_with_two_writers() -> Outcome {
    python(SERVERS, "sqlite", &[])
}

#[test]
fn postgres_under_pgbench() -> Outcome {
    python(SERVERS, "postgres", &["/usr/lib/postgresql"])
}

#[test]
fn asyncio_with_twenty_clients() -> Outcome {
    python(IN_PYTHON, "asyncio_clients", &[])
}

#[test]
fn multiprocessing_pool() -> Outcome {
    python(IN_PYTHON, "pool", &[])
}

#[test]
fn numpy_in_threads() -> Outcome {
    match has_module("numpy") {
        true => python(IN_PYTHON, "numbers", &[]),
        false => Ok(()),
    }
}

#[test]
fn jupyter_kernel() -> Outcome {
    match has_module("ipykernel, jupyter_client") {
        true => python(IN_PYTHON, "jupyter", &[]),
        false => Ok(()),
    }
}

#[test]
fn node_with_clients_that_stay_and_worker_threads() -> Outcome {
    if !installed("/usr/bin/node") {
        return Ok(());
    }
    let files = [("/work.js", IN_JAVASCRIPT.as_bytes())];
    AtWork::begin(&files, &["node", "/work.js"])?.all_rounds()
}

#[test]
fn go_with_channels_timers_and_garbage() -> Outcome {
    if !installed("/usr/bin/go") {
        return Ok(());
    }
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let program = built_in_go(dir.path())?;
    AtWork::begin(&[("/program", &program)], &["/program"])?.all_rounds()
}

fn built_in_go(dir: &Path) -> Outcome<Vec<u8>> {
    let failed = |e: std::io::Error| format!("building: {e}");
    std::fs::write(dir.join("work.go"), IN_GO).map_err(failed)?;
    let build = Command::new("/usr/bin/go")
        .args(["build", "-o", "work", "work.go"])
        .current_dir(dir)
        .env("GOCACHE", dir.join("cache"))
        .output()
        .map_err(failed)?;
    if !build.status.success() {
        return Err(String::from_utf8_lossy(&build.stderr).into_owned());
    }
    std::fs::read(dir.join("work")).map_err(failed)
}

#[test]
fn java_with_queues_timers_and_garbage() -> Outcome {
    if !installed("/usr/bin/javac") {
        return Ok(());
    }
    let files = [("/Work.java", IN_JAVA.as_bytes())];
    AtWork::begin(&files, &["java", "-Xmx128m", "/Work.java"])?.all_rounds()
}
