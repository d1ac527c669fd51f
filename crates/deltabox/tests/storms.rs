//! Operations on a sandbox in which everything happens at once: nothing hangs, and nothing is lost.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use std::time::Duration;

use common::*;
use deltabox::{CommandSpec, Error, Sandbox, SandboxSpec};

const PYTHON: &str = "/usr/bin/python3";

/// Checkpoints the sandbox over and over until `work` is done.
fn while_checkpointing<T>(sandbox: &Sandbox, work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let checkpoints = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                let id = sandbox.checkpoint(None).unwrap().id;
                sandbox.delete(id).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        done.store(true, Ordering::Release);
        checkpoints.join().unwrap();
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A sandbox, if there is a Python on this machine.
fn python_sandbox() -> Option<(Fixture, Arc<Sandbox>)> {
    if !std::path::Path::new(PYTHON).exists() {
        eprintln!("{PYTHON} is not installed: nothing was tested with it");
        return None;
    }
    let f = Fixture::new();
    let sandbox = f.sandbox();
    Some((f, sandbox))
}

/// Runs a script that can be written to, for a limited time.
fn python(script: &str) -> CommandSpec {
    CommandSpec {
        argv: vec![PYTHON.into(), "-c".into(), script.into()],
        stdin: true,
        timeout: Some(PATIENCE / 2),
        ..CommandSpec::default()
    }
}

/// Answers what it is told.
fn cat() -> CommandSpec {
    CommandSpec {
        argv: vec!["cat".into()],
        stdin: true,
        ..CommandSpec::default()
    }
}

/// Runs a Python script under checkpoints; it must print `ok`.
fn survives(script: &str) {
    let Some((_f, sandbox)) = python_sandbox() else {
        return;
    };
    let session = sandbox.spawn(python(script)).unwrap();
    let ended = while_checkpointing(&sandbox, || wait(&session));
    let told = (text(&ended.stdout), text(&ended.stderr));
    assert!(!ended.timed_out, "a signal was lost: {told:?}");
    assert_eq!((told.0.as_str(), ended.status), ("ok\n", 0), "{}", told.1);
}

#[test]
fn commands_started_during_checkpoints_and_rollbacks_do_not_block_them() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let id = sandbox.checkpoint(None).unwrap().id;
    while_checkpointing(&sandbox, || {
        for _ in 0..40 {
            match sandbox.run(&["true"]) {
                Ok(output) => assert_eq!(output.status, 0),
                Err(e) => panic!("{e}"),
            }
        }
    });
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                match sandbox.run(&["true"]) {
                    Ok(_) | Err(Error::Epoch { .. }) => {}
                    Err(e) => panic!("{e}"),
                }
            }
        });
        for _ in 0..40 {
            let result = sandbox.rollback(id);
            if result.is_err() {
                done.store(true, Ordering::Release);
            }
            assert_eq!(result.unwrap().fallback, None);
        }
        done.store(true, Ordering::Release);
    });
    assert_eq!(output(&sandbox, "echo alive"), "alive");
}

#[test]
fn queued_signals_are_all_delivered() {
    survives(
        r"
import os, signal, time
r, w = os.pipe()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
N = 5000
child = os.fork()
if child == 0:
    os.set_blocking(w, False)
    signal.set_wakeup_fd(w, warn_on_full_buffer=False)
    signal.signal(signal.SIGRTMIN, lambda *_: None)
    os.kill(os.getppid(), signal.SIGUSR2)
    got = 0
    while got < N:
        got += os.read(r, 4096).count(signal.SIGRTMIN)
    print('ok', flush=True)
    os._exit(0)
signal.sigwait([signal.SIGUSR2])
for i in range(N):
    os.kill(child, signal.SIGRTMIN)
    if i % 100 == 0:
        time.sleep(0.005)
os.waitpid(child, 0)
",
    );
}

#[test]
fn trap_signals_of_the_programs_own_are_not_taken_for_the_engines() {
    survives(
        r"
import os, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
child = os.fork()
parent = os.getppid()
if child == 0:
    signal.signal(signal.SIGTRAP, lambda *_: os.kill(parent, signal.SIGUSR1))
    parent = os.getppid()
    os.kill(parent, signal.SIGUSR1)
    while True:
        # Not pause(2), before which a signal may come.
        time.sleep(0.01)
for i in range(1000):
    signal.sigwait([signal.SIGUSR1])
    os.kill(child, signal.SIGTRAP)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
print('ok', flush=True)
",
    );
}

#[test]
fn stops_by_job_control_are_neither_lost_nor_invented() {
    survives(
        r"
import os, signal
child = os.fork()
if child == 0:
    while True:
        pass
for i in range(500):
    os.kill(child, signal.SIGSTOP)
    pid, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status), status
    os.kill(child, signal.SIGCONT)
    pid, status = os.waitpid(child, os.WCONTINUED)
    assert os.WIFCONTINUED(status), status
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
print('ok', flush=True)
",
    );
}

#[test]
fn processes_that_are_killed_at_any_moment_do_not_fail_a_checkpoint() {
    survives(
        r"
import os, signal, threading
def child():
    pid = os.fork()
    if pid == 0:
        threading.Thread(target=signal.pause, daemon=True).start()
        while True:
            pass
    return pid
for i in range(60):
    pids = [child() for _ in range(3)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
print('ok', flush=True)
",
    );
}

#[test]
fn what_cannot_be_checkpointed_can_be_rolled_back() {
    let traced = r"
import ctypes, os, signal
libc = ctypes.CDLL(None)
pid = os.fork()
if pid == 0:
    libc.ptrace(0, 0, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    signal.pause()
os.waitpid(pid, 0)
libc.ptrace(7, pid, 0, 0)
print('ready', flush=True)
signal.pause()
";
    let headless = r"
import ctypes, threading, time
threading.Thread(target=lambda: (time.sleep(0.1), print('ready', flush=True), time.sleep(1000))).start()
ctypes.CDLL(None).pthread_exit(None)
";
    for script in [traced, headless] {
        let Some((f, sandbox)) = python_sandbox() else {
            return;
        };
        let witness = sandbox.spawn(cat()).unwrap();
        let id = sandbox.checkpoint(None).unwrap().id;
        let strange = sandbox.spawn(python(script)).unwrap();
        read_until(&mut strange.events(0), "ready");
        sandbox.checkpoint(None).unwrap_err();
        let done = sandbox.rollback(id).unwrap();
        assert!(done.fallback.is_some());
        witness.write(b"hello\n").unwrap();
        read_until(&mut witness.events(0), "hello");
        assert_eq!(output(&sandbox, "ls /proc | grep -c python; true"), "0");
        drop((sandbox, f));
    }
}

#[test]
fn long_queues_many_timers_and_odd_names_are_given_back() {
    let Some((_f, sandbox)) = python_sandbox() else {
        return;
    };
    let script = r"
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(15, b'\xff\xfe(', 0, 0, 0)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
for _ in range(1000):
    os.kill(os.getpid(), signal.SIGRTMIN)
class Event(ctypes.Structure):
    _fields_ = [('value', ctypes.c_void_p), ('signo', ctypes.c_int), ('notify', ctypes.c_int), ('pad', ctypes.c_char * 48)]
ids = []
for i in range(250):
    timer = ctypes.c_int()
    event = Event(i, signal.SIGRTMIN, 0)
    assert libc.syscall(222, 1, ctypes.byref(event), ctypes.byref(timer)) == 0
    ids.append(timer.value)
print('ready', flush=True)
sys.stdin.readline()
for timer in ids:
    assert libc.syscall(226, timer) == 0
n = 0
while signal.sigtimedwait([signal.SIGRTMIN], 0):
    n += 1
print('queued', n, flush=True)
sys.stdin.readline()
";
    let session = sandbox.spawn(python(script)).unwrap();
    read_until(&mut session.events(0), "ready\n");
    let id = sandbox.checkpoint(None).unwrap().id;
    for _ in 0..2 {
        let mut events = session.events(u64::MAX);
        session.write(b"\n").unwrap();
        read_until(&mut events, "queued 1000\n");
        let done = sandbox.rollback(id).unwrap();
        assert_eq!(done.fallback, None);
    }
    session.kill().unwrap();
    sandbox.rollback(id).unwrap();
    let mut events = session.events(u64::MAX);
    session.write(b"\n").unwrap();
    read_until(&mut events, "queued 1000\n");
}

#[test]
fn who_still_holds_a_removed_sandbox_does_no_harm_to_its_successor() {
    let f = Fixture::new();
    let named = || SandboxSpec {
        name: Some("phoenix".to_owned()),
        ..SandboxSpec::default()
    };
    let old = f.host.create(named()).unwrap();
    let id = old.checkpoint(None).unwrap().id;
    f.host.remove("phoenix").unwrap();
    let new = f.host.create(named()).unwrap();
    let witness = new.spawn(cat()).unwrap();
    old.run(&["true"]).unwrap_err();
    old.checkpoint(None).unwrap_err();
    old.rollback(id).unwrap_err();
    drop(old);
    witness.write(b"hello\n").unwrap();
    read_until(&mut witness.events(0), "hello");
    let id = new.checkpoint(None).unwrap().id;
    new.rollback(id).unwrap();
    assert_eq!(output(&new, "echo alive > /tmp/x; cat /tmp/x"), "alive");
    assert!(f.dir.path().join("state/sandboxes/phoenix").is_dir());
}

#[test]
fn a_parent_that_waits_for_its_vfork_child_is_waited_for() {
    let script = r"
import os, sys
os.mkfifo('/tmp/gate')
if os.fork() == 0:
    sys.stdin.readline()
    os.close(os.open('/tmp/gate', os.O_WRONLY))
    os._exit(0)
print('ready', flush=True)
# The child waits for the gate before it executes anything, and its parent for the child.
pid = os.posix_spawn('/bin/true', ['true'], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, '/tmp/gate', os.O_RDONLY, 0)])
os.waitpid(pid, 0)
print('ok', flush=True)
";
    let Some((_f, sandbox)) = python_sandbox() else {
        return;
    };
    let session = sandbox.spawn(python(script)).unwrap();
    read_until(&mut session.events(0), "ready");
    // Those three, init and the ones that count.
    let all_there = || output(&sandbox, "ls /proc | grep -c '^[0-9]'") == "7";
    assert!((0..1000).any(|_| all_there()));
    let error = sandbox.checkpoint(None).unwrap_err().to_string();
    assert!(error.contains("python3"), "{error}");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(1500));
            session.write(b"\n").unwrap();
        });
        sandbox.checkpoint(None).unwrap();
    });
    assert_eq!(text(&wait(&session).stdout), "ready\nok\n");
}

#[test]
fn a_trap_signal_that_is_ignored_goes_on_being_ignored() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let mut command =
        sh("trap '' TRAP; sleep 1000 & while read line; do kill -TRAP $$ $!; echo got $line; done");
    command.stdin = true;
    let session = sandbox.spawn(command).unwrap();
    let say = |word: &str| {
        let mut events = session.events(u64::MAX);
        session.write(format!("{word}\n").as_bytes()).unwrap();
        read_until(&mut events, &format!("got {word}\n"));
    };
    say("first");
    let id = sandbox.checkpoint(None).unwrap().id;
    say("after the checkpoint");
    sandbox.rollback(id).unwrap();
    say("after the rollback");
    session.kill().unwrap();
    sandbox.rollback(id).unwrap();
    say("made again");
    say("twice");
    let sleeps =
        "ls /proc | grep '^[0-9]*$' | while read p; do cat /proc/$p/comm; done | grep -c sleep";
    assert_eq!(output(&sandbox, sleeps), "1");
}

/// More deaths than there is room for between init and who hears of them, while commands are started.
#[test]
fn thousands_that_die_at_once_hold_up_no_command() {
    let Some((_f, sandbox)) = python_sandbox() else {
        return;
    };
    let script = "import os, sys\n\
        for _ in range(3000): os.fork() or os._exit(0)\n\
        print('ready', flush=True); sys.stdin.readline()";
    let parent = sandbox.spawn(python(script)).unwrap();
    let mut events = parent.events(0);
    read_until(&mut events, "ready\n");
    parent.write(b"die\n").unwrap();
    // Its dead children are init's from some moment on.
    while parent.info().exit.is_none() {
        assert_eq!(output(&sandbox, "echo here"), "here");
    }
    assert_eq!(wait(&parent).status, 0);
    assert_eq!(output(&sandbox, "echo here"), "here");
}
