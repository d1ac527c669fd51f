//! Operations on a sandbox in which everything happens at once: nothing hangs, and nothing is lost.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use std::time::Duration;

use common::*;
use deltabox::{Error, Sandbox};

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

/// Runs a Python script under checkpoints; it must print `ok`.
fn survives(script: &str) {
    if !std::path::Path::new(PYTHON).exists() {
        eprintln!("{PYTHON} is not installed: nothing was tested with it");
        return;
    }
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let mut command = sh("");
    command.argv = vec![PYTHON.into(), "-c".into(), script.into()];
    command.timeout = Some(PATIENCE / 2);
    let session = sandbox.spawn(command).unwrap();
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
