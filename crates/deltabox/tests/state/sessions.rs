//! Sessions belong to the state: they come, go and speak as the checkpoint had them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use deltabox::{CommandSpec, Error, Events, Sandbox, Session, SessionEvent, WindowSize};

use crate::lab::{Lab, Outcome, PATIENCE, Program, ended, output, text};

fn sh(script: &str) -> CommandSpec {
    CommandSpec {
        argv: ["sh", "-c", script].map(str::to_owned).into(),
        stdin: true,
        ..CommandSpec::default()
    }
}

/// A bash on a terminal, spoken to in a way that its echo cannot be taken for its answer.
struct Shell {
    session: Arc<Session>,
    questions: u32,
}

impl Shell {
    fn start(sandbox: &Sandbox) -> Self {
        let session = sandbox
            .spawn(CommandSpec {
                argv: ["bash", "--norc"].map(str::to_owned).into(),
                tty: Some(WindowSize {
                    rows: 24,
                    cols: 300,
                }),
                ..CommandSpec::default()
            })
            .unwrap();
        Self {
            session,
            questions: 0,
        }
    }

    /// What a word expands to.
    fn ask(&mut self, word: &str) -> String {
        self.questions += 1;
        let mut events = self.session.events(self.session.info().output);
        let (question, number) = (self.questions, self.questions + 1000);
        let line = format!("echo \"<$(({question}+1000)):{word}>\"\n");
        self.session.write(line.as_bytes()).unwrap();
        let seen = until(&mut events, &format!("<{number}:"), ">");
        seen.trim().to_owned()
    }

    fn tell(&mut self, line: &str) {
        self.session.write(format!("{line}\n").as_bytes()).unwrap();
        self.ask("");
    }
}

/// What stands between two texts in the output.
fn until(events: &mut Events, begin: &str, end: &str) -> String {
    let mut seen = Vec::new();
    loop {
        match events.next(Some(PATIENCE)) {
            Some(SessionEvent::Output { bytes, .. }) => seen.extend(bytes),
            other => panic!("{other:?} instead of {begin:?} after {:?}", text(&seen)),
        }
        let all = text(&seen);
        let rest = all.split_once(begin).map(|(_, rest)| rest);
        if let Some((inner, _)) = rest.and_then(|rest| rest.split_once(end)) {
            return inner.to_owned();
        }
    }
}

/// The event that ends a stream, whatever comes before it.
fn last(events: &mut Events) -> SessionEvent {
    loop {
        match events.next(Some(PATIENCE)) {
            Some(SessionEvent::Output { .. } | SessionEvent::Missed { .. }) => {}
            Some(end) => return end,
            None => panic!("the stream hangs"),
        }
    }
}

/// The death is noted by a thread that waits for whoever starts a command, so it may come in the middle of the rollback.
#[test]
fn a_death_that_is_noted_late_is_none_of_a_rolled_back_session() {
    const ROUNDS: usize = 200;
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut program = Program::start(&sandbox, &["cat"]).unwrap();
    assert_eq!(program.ask("one").unwrap(), "one");
    let (id, mark) = (sandbox.checkpoint(None).unwrap().id, program.mark());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // Its end may be that of the future that it belongs to.
                    let _ = sandbox.run(&["true"]);
                }
            });
        }
        let rounds: Outcome = (0..ROUNDS).try_for_each(|_| {
            program
                .session
                .signal(libc::SIGKILL)
                .map_err(|e| e.to_string())?;
            sandbox.rollback(id).map_err(|e| e.to_string())?;
            program.went_back(mark);
            program.ask("two").map(drop)
        });
        over.store(true, Ordering::Relaxed);
        rounds.unwrap();
    });
}

#[test]
fn a_shell_on_a_terminal_keeps_variables_directory_and_functions() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut shell = Shell::start(&sandbox);
    shell.tell("x=first; cd /usr; hello() { echo \"hello $1\"; }; set -o noclobber");
    let id = sandbox.checkpoint(None).unwrap().id;
    let state = "$x $PWD $(hello you) $-";
    let before = shell.ask(state);
    assert!(before.starts_with("first /usr hello you"), "{before}");
    for _ in 0..3 {
        shell.tell("x=second; cd /tmp; unset -f hello; set +o noclobber");
        assert!(shell.ask("$x $PWD").starts_with("second /tmp"));
        sandbox.rollback(id).unwrap();
        assert_eq!(shell.ask(state), before);
    }
}

#[test]
fn jobs_of_a_shell_come_back_with_their_pids_and_states() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut shell = Shell::start(&sandbox);
    shell.tell("sleep 3000 & (while :; do sleep 0.05; done) & sleep 4000 &");
    shell.tell("kill -STOP %3; sleep 0.2");
    let id = sandbox.checkpoint(None).unwrap().id;
    let state = "$(jobs -l | tr '\\n' ';')";
    let before = shell.ask(state);
    assert!(before.contains("Stopped"), "{before}");
    shell.tell("kill -9 %1 %2; wait %1 %2; kill -9 %3; sleep 5000 &");
    sandbox.rollback(id).unwrap();
    assert_eq!(shell.ask(state), before);
    shell.tell("kill %1; wait %1; status=$?");
    let after = shell.ask("$status");
    assert_eq!(
        after, "143",
        "a job that came back can be killed and waited for"
    );
}

#[test]
fn a_foreground_job_can_be_interrupted_after_a_rollback() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut shell = Shell::start(&sandbox);
    let mut events = shell.session.events(0);
    let job = b"sh -c 'echo run\"\"ning; exec sleep 3000'\n";
    shell.session.write(job).unwrap();
    until(&mut events, "running", "\n");
    let id = sandbox.checkpoint(None).unwrap().id;
    for _ in 0..3 {
        shell.session.write(&[3]).unwrap();
        assert_eq!(shell.ask("$?"), "130");
        sandbox.rollback(id).unwrap();
    }
}

#[test]
fn the_size_of_a_terminal_comes_back() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut shell = Shell::start(&sandbox);
    assert_eq!(shell.ask("$(stty size)"), "24 300");
    let id = sandbox.checkpoint(None).unwrap().id;
    shell
        .session
        .resize(WindowSize {
            rows: 50,
            cols: 299,
        })
        .unwrap();
    assert_eq!(shell.ask("$(stty size)"), "50 299");
    sandbox.rollback(id).unwrap();
    assert_eq!(shell.ask("$(stty size)"), "24 300");
}

#[test]
fn a_session_born_since_ends_with_the_new_epoch_and_is_gone() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let id = sandbox.checkpoint(None).unwrap().id;
    let session = sandbox.spawn(sh("echo begun; sleep 3000")).unwrap();
    let mut events = session.events(0);
    until(&mut events, "begun", "\n");
    let epoch = sandbox.rollback(id).unwrap().epoch;
    assert_eq!(last(&mut events), SessionEvent::RolledBack { epoch });
    assert_eq!(sandbox.epoch(), epoch);
    assert!(matches!(
        sandbox.session(session.info().id),
        Err(Error::NoSession { .. })
    ));
    assert!(sandbox.sessions().iter().all(|s| s.id != session.info().id));
    assert!(session.write(b"x").is_err(), "its input is gone too");
    assert_eq!(
        output(
            &sandbox,
            "ps -e -o comm= 2>/dev/null | grep -c sleep || true"
        ),
        "0"
    );
}

#[test]
fn a_stream_of_a_session_that_survives_ends_and_can_be_read_on() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut program = Program::start(&sandbox, &["cat"]).unwrap();
    assert_eq!(program.ask("one").unwrap(), "one");
    let id = sandbox.checkpoint(None).unwrap().id;
    let mut stream = program.session.events(0);
    let epoch = sandbox.rollback(id).unwrap().epoch;
    assert_eq!(last(&mut stream), SessionEvent::RolledBack { epoch });
    assert_eq!(program.ask("two").unwrap(), "two");
}

#[test]
fn a_log_ends_where_it_ended_on_whatever_branch() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut program = Program::start(&sandbox, &["cat"]).unwrap();
    let mut nodes = Vec::new();
    for word in ["zero", "one", "two"] {
        assert_eq!(program.ask(word).unwrap(), word);
        nodes.push((sandbox.checkpoint(None).unwrap().id, program.mark()));
    }
    for (back, word) in [(0, "left"), (2, "right"), (1, "middle"), (2, "again")] {
        let (id, mark) = nodes[back];
        sandbox.rollback(id).unwrap();
        program.went_back(mark);
        assert_eq!(program.session.info().output, mark);
        assert_eq!(program.ask(word).unwrap(), word);
        program.went_back(0);
        let log: Vec<String> = (0..back + 2).map(|_| program.hear().unwrap()).collect();
        let mut wanted = vec!["zero", "one", "two"];
        wanted.truncate(back + 1);
        wanted.push(word);
        assert_eq!(log, wanted);
    }
}

#[test]
fn a_command_that_ended_since_runs_again() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut program = Program::start(
        &sandbox,
        &["sh", "-c", "echo ready; read x; echo got $x; exit 7"],
    )
    .unwrap();
    assert_eq!(program.hear().unwrap(), "ready");
    let (id, mark) = (sandbox.checkpoint(None).unwrap().id, program.mark());
    for word in ["one", "two"] {
        assert_eq!(program.ask(word).unwrap(), format!("got {word}"));
        assert_eq!(ended(&program.session), Ok(7));
        sandbox.rollback(id).unwrap();
        program.went_back(mark);
        assert_eq!(program.session.info().exit, None);
    }
    assert_eq!(program.ask("three").unwrap(), "got three");
}

#[test]
fn a_command_that_had_ended_stays_ended_with_status_and_output() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let session = sandbox.spawn(sh("echo done; exit 9")).unwrap();
    assert_eq!(ended(&session), Ok(9));
    let id = sandbox.checkpoint(None).unwrap().id;
    sandbox.rollback(id).unwrap();
    assert_eq!(ended(&session), Ok(9));
    assert_eq!(until(&mut session.events(0), "do", "\n"), "ne");
    let info = sandbox.session(session.info().id).unwrap().info();
    assert_eq!((info.exit, info.output), (Some(9), 5));
}

#[test]
fn input_that_was_not_read_yet_is_read_once() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let script = "echo ready; while [ ! -e /go ]; do sleep 0.02; done; read a; read b; echo $a-$b";
    let mut program = Program::start(&sandbox, &["sh", "-c", script]).unwrap();
    assert_eq!(program.hear().unwrap(), "ready");
    program.say("early").unwrap();
    let (id, mark) = (sandbox.checkpoint(None).unwrap().id, program.mark());
    for late in ["one", "two", "three"] {
        program.say(late).unwrap();
        output(&sandbox, ": > /go");
        assert_eq!(program.hear().unwrap(), format!("early-{late}"));
        sandbox.rollback(id).unwrap();
        program.went_back(mark);
    }
}

#[test]
fn closed_input_stays_closed_and_open_input_is_open_again() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut open = Program::start(&sandbox, &["sh", "-c", "echo ready; cat; echo end"]).unwrap();
    let script = "echo ready; cat; echo end; while :; do sleep 0.1; done";
    let mut closed = Program::start(&sandbox, &["sh", "-c", script]).unwrap();
    assert_eq!(open.hear().unwrap(), "ready");
    assert_eq!(closed.hear().unwrap(), "ready");
    closed.session.close_stdin().unwrap();
    assert_eq!(closed.hear().unwrap(), "end");
    let (id, mark) = (sandbox.checkpoint(None).unwrap().id, open.mark());
    open.session.close_stdin().unwrap();
    assert_eq!(open.hear().unwrap(), "end");
    sandbox.rollback(id).unwrap();
    open.went_back(mark);
    assert_eq!(open.ask("through cat").unwrap(), "through cat");
    assert!(closed.say("x").is_err());
}

#[test]
fn a_command_that_waits_for_its_output_learns_of_the_rollback() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let id = sandbox.checkpoint(None).unwrap().id;
    std::thread::scope(|scope| {
        let run = scope.spawn(|| sandbox.run(&["sh", "-c", ": > /begun; sleep 3000"]));
        while output(&sandbox, "ls /begun 2>/dev/null || true").is_empty() {}
        let epoch = sandbox.rollback(id).unwrap().epoch;
        let result = run.join().unwrap();
        assert!(
            matches!(result, Err(Error::Epoch { actual, .. }) if actual == epoch),
            "{result:?}"
        );
    });
}

#[test]
fn a_fork_and_its_source_do_not_hear_each_other() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut source = Program::start(&sandbox, &["cat"]).unwrap();
    assert_eq!(source.ask("common").unwrap(), "common");
    let id = sandbox.checkpoint(None).unwrap().id;
    let forks = lab.fork(&sandbox, id, 2).unwrap();
    let mut programs: Vec<Program> = forks
        .iter()
        .map(|f| source.in_fork(f, source.mark()).unwrap())
        .collect();
    assert_eq!(source.ask("source").unwrap(), "source");
    for (number, program) in programs.iter_mut().enumerate() {
        let word = format!("fork {number}");
        assert_eq!(program.ask(&word).unwrap(), word);
        program.went_back(0);
        let log = [program.hear().unwrap(), program.hear().unwrap()];
        assert_eq!(log, ["common".to_owned(), word]);
        let length = program.session.info().output;
        assert_eq!(length, "common\nfork 0\n".len() as u64);
    }
    lab.host.remove(sandbox.name()).unwrap();
    assert_eq!(programs[1].ask("alone").unwrap(), "alone");
}

#[test]
fn streams_can_be_opened_by_name_in_a_fork_and_after_a_restart() -> Outcome {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let script = "while read line; do eval \"$line\"; done";
    let mut program = Program::start(&sandbox, &["sh", "-c", script])?;
    let line = "echo by name > /dev/stdout";
    assert_eq!(program.ask(line)?, "by name");
    let id = sandbox.checkpoint_durable(None).unwrap().id;
    let mark = program.mark();
    let fork = &lab.fork(&sandbox, id, 1)?[0];
    assert_eq!(program.in_fork(fork, mark)?.ask(line)?, "by name");
    let (name, session) = (sandbox.name().to_owned(), program.session.info().id);
    let lab = lab.restarted();
    let sandbox = lab.host.get(&name).unwrap();
    sandbox.rollback(id).unwrap();
    let mut program = Program::found(&sandbox, session, mark)?;
    assert_eq!(program.ask(line)?, "by name");
    Ok(())
}
