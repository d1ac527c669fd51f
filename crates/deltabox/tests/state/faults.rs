//! What cannot be done is refused in plain words, and the sandbox goes on as if nothing had been asked.

use deltabox::{CheckpointId, Error, FileChange, Sandbox, SandboxSpec, SandboxState};

use crate::lab::{Lab, PYTHON, Program, output};

/// Those that the checkpoint does not have, neither in place nor when all processes are made again.
#[test]
fn semaphores_and_queues_made_since_go_with_a_rollback() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut program = Program::start(&sandbox, &["sh", "-c", "echo ready; exec cat"]).unwrap();
    assert_eq!(program.hear().unwrap(), "ready");
    let id = sandbox.checkpoint(None).unwrap().id;
    let make = "import ctypes\nlibc = ctypes.CDLL(None)\n\
                for _ in range(3): libc.semget(0, 2, 0o1600); libc.msgget(0, 0o1600)";
    let count = "cat /proc/sysvipc/sem /proc/sysvipc/msg | grep -vc key";
    for kill in ["true", "kill -9 -1"] {
        assert_eq!(sandbox.run(&[PYTHON, "-c", make]).unwrap().status, 0);
        assert_eq!(output(&sandbox, count), "6");
        let with = sandbox.checkpoint(None).unwrap().id;
        let _ = sandbox.run(&["sh", "-c", kill]);
        sandbox.rollback(id).unwrap();
        assert_eq!(output(&sandbox, &format!("{count} || true")), "0");
        sandbox.rollback(with).unwrap();
        assert_eq!(output(&sandbox, count), "6");
        sandbox.rollback(id).unwrap();
    }
}

/// In place, and made again after its death; also one that may only enter what everybody may.
#[test]
fn a_process_stands_in_a_removed_directory_again() {
    for user in ["0", "65534"] {
        let lab = Lab::new();
        let sandbox = lab.sandbox();
        let script = "mkdir /tmp/gone && cd /tmp/gone && rmdir /tmp/gone && echo ready && \
            while read -r line; do eval \"$line\"; ls; readlink /proc/self/cwd; done";
        let argv = ["setpriv", "--reuid", user, "bash", "-c", script];
        let mut program = Program::start(&sandbox, &argv).unwrap();
        assert_eq!(program.hear().unwrap(), "ready");
        let id = sandbox.checkpoint(None).unwrap().id;
        let mark = program.mark();
        let back = |program: &mut Program, id| {
            assert_eq!(sandbox.rollback(id).unwrap().fallback, None, "user {user}");
            program.went_back(mark);
            assert_eq!(program.ask("true").unwrap(), "/tmp/gone (deleted)");
        };
        back(&mut program, id);
        assert_eq!(program.ask("cd /").unwrap(), "bin");
        back(&mut program, id);
        output(&sandbox, "kill -9 -1 || true");
        back(&mut program, id);
        let gone = output(&sandbox, "ls -d /tmp/gone 2>&1 | grep -c cannot");
        assert_eq!(gone, "1");
    }
}

/// Numbers go back with a rollback that makes processes again, so that on another branch a thread gets that of a process.
#[test]
fn a_process_is_made_again_whose_number_is_a_threads_by_now() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let script = "import os, signal, sys, threading\n\
        def fork():\n  pid = os.fork()\n  return pid or signal.pause()\n\
        def end(pid):\n  os.kill(pid, 9)\n  return os.waitpid(pid, 0)[0]\n\
        def thread():\n  one = threading.Thread(target=signal.pause, daemon=True)\n  one.start()\n  return one.native_id\n\
        for line in sys.stdin: print(eval(line), flush=True)";
    let mut program = Program::start(&sandbox, &[PYTHON, "-c", script]).unwrap();
    let first = program.ask("fork()").unwrap();
    let (one, mark_of_one) = (sandbox.checkpoint(None).unwrap().id, program.mark());
    let second = program.ask("fork()").unwrap();
    let (two, mark_of_two) = (sandbox.checkpoint(None).unwrap().id, program.mark());
    program.ask(&format!("end({first})")).unwrap();
    sandbox.rollback(one).unwrap();
    program.went_back(mark_of_one);
    assert_eq!(program.ask("thread()").unwrap(), second);
    assert_eq!(sandbox.rollback(two).unwrap().fallback, None);
    program.went_back(mark_of_two);
    for child in [first, second] {
        assert_eq!(program.ask(&format!("end({child})")).unwrap(), child);
    }
}

/// The kernel would go on with the wait by a call that the filter lets nobody make.
#[test]
fn a_refused_checkpoint_does_not_disturb_a_wait_under_a_filter() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let script = "import ctypes, os, select, socket, struct, sys\n\
        libc = ctypes.CDLL(None)\n\
        rare = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)\n\
        steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 219), (6, 0, 0, 0x50001), (6, 0, 0, 0x7fff0000)]\n\
        steps = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *step) for step in steps))\n\
        libc.prctl(22, 2, struct.pack('HxxxxxxQ', 4, ctypes.addressof(steps)))\n\
        poller = select.poll()\n\
        poller.register(0, select.POLLIN)\n\
        print(os.getpid(), flush=True)\n\
        try: print(poller.poll(1000000), sys.stdin.readline().strip(), flush=True)\n\
        except OSError as error: print(error, flush=True)";
    let mut program = Program::start(&sandbox, &[PYTHON, "-c", script]).unwrap();
    let pid = program.hear().unwrap();
    let waits = format!("until grep -q 'State:.S' /proc/{pid}/status; do :; done");
    output(&sandbox, &waits);
    for _ in 0..3 {
        assert!(sandbox.checkpoint(None).is_err());
    }
    assert_eq!(program.ask("told").unwrap(), "[(0, 1)] told");
}

#[test]
fn a_directory_that_is_called_as_if_removed_is_no_fault() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let script = "mkdir '/x (deleted)' && cd '/x (deleted)' && exec cat";
    let mut program = Program::start(&sandbox, &["sh", "-c", script]).unwrap();
    assert_eq!(program.ask("one").unwrap(), "one");
    let (id, mark) = (sandbox.checkpoint(None).unwrap().id, program.mark());
    program.kill().unwrap();
    sandbox.rollback(id).unwrap();
    program.went_back(mark);
    assert_eq!(program.ask("two").unwrap(), "two");
}

#[test]
fn an_unknown_checkpoint_is_refused_everywhere() {
    let lab = Lab::new();
    let (sandbox, other) = (lab.sandbox(), lab.sandbox());
    let own = sandbox.checkpoint(None).unwrap().id;
    let foreign = other.checkpoint(None).unwrap().id;
    assert_ne!(own, foreign, "ids are unique in a state directory");
    output(&sandbox, "echo kept > /kept");
    for id in [CheckpointId(999_999), foreign] {
        let refusals = [
            sandbox.rollback(id).map(drop),
            sandbox.diff(own, id).map(drop),
            sandbox.diff(id, own).map(drop),
            sandbox.delete(id),
            lab.host.fork(sandbox.name(), Some(id), 1, &[]).map(drop),
        ];
        for refusal in refusals {
            assert!(
                matches!(&refusal, Err(Error::NoCheckpoint { id: named, .. }) if *named == id),
                "{refusal:?}"
            );
        }
    }
    assert_eq!(sandbox.epoch(), 0);
    assert_eq!(output(&sandbox, "cat /kept"), "kept");
}

#[test]
fn a_fork_under_a_taken_name_makes_nothing() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let id = sandbox.checkpoint(None).unwrap().id;
    let names = ["free".to_owned(), sandbox.name().to_owned()];
    let refusal = lab.host.fork(sandbox.name(), Some(id), 2, &names);
    assert!(matches!(refusal, Err(Error::NameTaken(_))));
    assert_eq!(lab.host.list().len(), 1);
    assert!(lab.host.fork("nobody", None, 1, &[]).is_err());
}

/// (parent, message, current) of each checkpoint.
type Shape<'a> = Vec<(CheckpointId, Option<CheckpointId>, &'a str, bool)>;

fn assert_tree(sandbox: &Sandbox, wanted: Shape<'_>) {
    let tree = sandbox.tree();
    let got: Shape<'_> = tree
        .nodes
        .iter()
        .map(|n| {
            let message = n.message.as_deref().unwrap_or("");
            (n.id, n.parent, message, n.current)
        })
        .collect();
    assert_eq!(got, wanted);
}

#[test]
fn the_tree_has_the_shape_that_was_walked() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let make = |text: &str| sandbox.checkpoint(Some(text.to_owned())).unwrap().id;
    let a = make("a");
    let b = make("b");
    sandbox.rollback(a).unwrap();
    let c = make("c");
    assert_tree(
        &sandbox,
        vec![
            (a, None, "a", false),
            (b, Some(a), "b", false),
            (c, Some(a), "c", true),
        ],
    );
    sandbox.rollback(b).unwrap();
    let info = sandbox.info();
    assert_eq!(
        (info.current, info.checkpoints, info.epoch),
        (Some(b), 3, 2)
    );
}

#[test]
fn deleting_a_checkpoint_keeps_those_below_it() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut ids = Vec::new();
    for number in 0..4 {
        output(
            &sandbox,
            &format!("echo {number} > /number; echo {number} >> /all"),
        );
        ids.push(sandbox.checkpoint(None).unwrap().id);
    }
    sandbox.delete(ids[1]).unwrap();
    sandbox.delete(ids[0]).unwrap();
    assert_tree(
        &sandbox,
        vec![(ids[2], None, "", false), (ids[3], Some(ids[2]), "", true)],
    );
    assert!(matches!(
        sandbox.rollback(ids[1]),
        Err(Error::NoCheckpoint { .. })
    ));
    sandbox.rollback(ids[2]).unwrap();
    assert_eq!(output(&sandbox, "cat /number"), "2");
    sandbox.delete(ids[2]).unwrap();
    assert_eq!(output(&sandbox, "cat /number"), "2");
    sandbox.rollback(ids[3]).unwrap();
    assert_eq!(
        output(&sandbox, "cat /number; cat /all | tr -d '\\n'"),
        "3\n0123"
    );
    sandbox.delete(ids[3]).unwrap();
    assert!(sandbox.tree().nodes.is_empty());
    output(&sandbox, "echo 5 > /number");
    let last = sandbox.checkpoint(None).unwrap().id;
    assert!(ids.iter().all(|id| *id < last), "an id is used again");
}

#[test]
fn a_difference_names_every_change_and_nothing_else() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    output(
        &sandbox,
        "mkdir /d; cd /d; echo 1 > gone; echo 1 > edited; echo 1 > moved; echo 1 > same; mkdir sub",
    );
    let before = Program::start(&sandbox, &["sleep", "3001"]).unwrap();
    let a = sandbox.checkpoint(None).unwrap().id;
    output(
        &sandbox,
        "cd /d; rm gone; echo 2 > edited; mv moved sub/there; echo 1 > new; chmod 600 edited; \
         echo x > short; rm short",
    );
    before.kill().unwrap();
    let after = Program::start(&sandbox, &["sleep", "3002"]).unwrap();
    let b = sandbox.checkpoint(None).unwrap().id;
    let difference = sandbox.diff(a, b).unwrap();
    let path = std::path::PathBuf::from;
    let under_d: Vec<&FileChange> = difference
        .files
        .iter()
        .filter(|f| !matches!(f, FileChange::Modified { path } if path.ends_with("d") || path.ends_with("sub")))
        .collect();
    assert_eq!(
        under_d,
        [
            &FileChange::Modified {
                path: path("/d/edited")
            },
            &FileChange::Deleted {
                path: path("/d/gone")
            },
            &FileChange::Added {
                path: path("/d/new")
            },
            &FileChange::Renamed {
                from: path("/d/moved"),
                to: path("/d/sub/there")
            },
        ]
    );
    let names = |list: &[deltabox::ProcessName]| -> Vec<(i32, String)> {
        list.iter().map(|p| (p.pid, p.command.clone())).collect()
    };
    assert_eq!(
        names(&difference.came),
        [(after.session.info().pid, "sleep 3002".to_owned())]
    );
    assert_eq!(
        names(&difference.went),
        [(before.session.info().pid, "sleep 3001".to_owned())]
    );
    let back = sandbox.diff(b, a).unwrap();
    assert_eq!(
        (names(&back.came), names(&back.went)),
        (names(&difference.went), names(&difference.came))
    );
    assert!(sandbox.diff(a, a).unwrap().files.is_empty());
}

#[test]
fn destroying_everything_inside_is_undone() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut program = Program::start(&sandbox, &["cat"]).unwrap();
    assert_eq!(program.ask("one").unwrap(), "one");
    let (id, mark) = (sandbox.checkpoint(None).unwrap().id, program.mark());
    sandbox
        .run(&["sh", "-c", "rm -rf /usr/bin /etc /home; kill -9 -1"])
        .unwrap();
    assert!(sandbox.run(&["ls"]).is_err(), "ls is still there");
    sandbox.rollback(id).unwrap();
    program.went_back(mark);
    assert_eq!(program.ask("two").unwrap(), "two");
    assert_eq!(
        output(&sandbox, "ls -d /etc/passwd /usr/bin/env | wc -l"),
        "2"
    );
}

#[test]
fn a_stopped_sandbox_is_told_so_and_runs_again_after_a_rollback() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut program = Program::start(&sandbox, &["cat"]).unwrap();
    assert_eq!(program.ask("one").unwrap(), "one");
    let (id, mark) = (sandbox.checkpoint(None).unwrap().id, program.mark());
    sandbox.stop().unwrap();
    assert_eq!(sandbox.info().state, SandboxState::Stopped);
    assert!(matches!(
        sandbox.run(&["true"]),
        Err(Error::NotRunning { .. })
    ));
    assert!(matches!(
        sandbox.checkpoint(None),
        Err(Error::NotRunning { .. })
    ));
    sandbox.rollback(id).unwrap();
    assert_eq!(sandbox.info().state, SandboxState::Running);
    program.went_back(mark);
    assert_eq!(program.ask("two").unwrap(), "two");
}

#[test]
fn a_fork_bomb_under_a_limit_is_checkpointed_and_undone() {
    let lab = Lab::new();
    let spec = SandboxSpec {
        pids: Some(60),
        ..SandboxSpec::default()
    };
    let sandbox = lab.host.create(spec).unwrap();
    if !sandbox.info().warnings.is_empty() {
        eprintln!("not tested: {:?}", sandbox.info().warnings);
        return;
    }
    let id = sandbox.checkpoint(None).unwrap().id;
    let bomb = "b() { b | b & }; trap '' TERM; b; sleep 3000";
    let session = Program::start(&sandbox, &["bash", "-c", bomb]).unwrap();
    while sandbox.info().processes < 50 {}
    let report = sandbox.rollback(id).unwrap();
    assert!(report.killed >= 1, "{report:?}");
    assert_eq!(sandbox.info().processes, 0);
    assert!(session.say("x").is_err());
    assert_eq!(output(&sandbox, "echo alive"), "alive");
}
