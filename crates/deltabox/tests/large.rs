//! Steps that write to much memory: nobody sees that it is copied later than it was checkpointed.

mod common;

use std::sync::Arc;

use common::*;
use deltabox::{CommandSpec, Events, Sandbox, SandboxSpec, Session};

const PYTHON: &str = "/usr/bin/python3";

/// Holds 48 MiB. Each command changes or tells something of it, and is answered with a line.
const PROGRAM: &str = r"
import ctypes, mmap, os, signal, subprocess, sys, time, zlib
SIZE = 48 << 20
M = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
kept = []
def fill(n):
    for at in range(0, SIZE, 4096):
        M[at:at + 16] = b'%8d%8d' % (n, at)
def told():
    return '%08x' % zlib.crc32(M)
for line in sys.stdin:
    command, n = line.split()
    n = int(n)
    if command == 'fill':
        fill(n)
        print(told(), flush=True)
    elif command == 'tell':
        print(told(), flush=True)
    elif command == 'spoil':
        # All that a program does to its memory and to its family.
        child = os.fork()
        if child == 0:
            fill(n + 1)
            os.execv('/bin/true', ['true'])
        ghost = os.fork()
        if ghost == 0:
            M[0:4] = b'ghost'[:4]
            time.sleep(1000)
        fill(n + 2)
        os.kill(ghost, signal.SIGKILL)
        os.waitpid(ghost, 0)
        os.waitpid(child, 0)
        other = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        other[:] = b'x' * len(other)
        # Python must not unmap it: parts of it will be elsewhere.
        kept.append(other)
        at = ctypes.addressof(ctypes.c_char.from_buffer(other))
        moved = libc.mremap(at, 4 << 20, 6 << 20, 1, None)
        libc.munmap(moved, 1 << 20)
        M.madvise(mmap.MADV_DONTNEED, 0, 8 << 20)
        subprocess.run(['true'], check=True)
        print('spoiled', flush=True)
    elif command == 'census':
        # Who else is there, and which number the next process gets.
        others = set(map(int, filter(str.isdigit, os.listdir('/proc')))) - {1, os.getpid()}
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        print(sorted(others), child, flush=True)
";

/// The program in a sandbox.
struct Program {
    _f: Fixture,
    sandbox: Arc<Sandbox>,
    session: Arc<Session>,
    events: Events,
}

impl Program {
    /// `None` if there is no Python on this machine.
    fn start() -> Option<Self> {
        Self::start_in(SandboxSpec::default())
    }

    fn start_in(spec: SandboxSpec) -> Option<Self> {
        if !std::path::Path::new(PYTHON).exists() {
            eprintln!("{PYTHON} is not installed: nothing was tested with it");
            return None;
        }
        let f = Fixture::new();
        let sandbox = f.host.create(spec).unwrap();
        let command = CommandSpec {
            argv: vec![PYTHON.into(), "-c".into(), PROGRAM.into()],
            stdin: true,
            ..CommandSpec::default()
        };
        let session = sandbox.spawn(command).unwrap();
        let events = session.events(0);
        Some(Self {
            _f: f,
            sandbox,
            session,
            events,
        })
    }

    fn ask(&mut self, command: &str, n: u32) -> String {
        self.session
            .write(format!("{command} {n}\n").as_bytes())
            .unwrap();
        read_until(&mut self.events, "\n").trim_end().to_owned()
    }

    /// After a rollback the old events are over.
    fn went_back(&mut self) {
        self.session = self.sandbox.session(self.session.info().id).unwrap();
        self.events = self.session.events(self.session.info().output);
    }
}

#[test]
fn a_checkpoint_of_much_memory_is_of_its_moment_whatever_happens_at_once() {
    let Some(mut program) = Program::start() else {
        return;
    };
    let sandbox = Arc::clone(&program.sandbox);
    let mut states = Vec::new();
    for n in 0..6 {
        let told = program.ask("fill", 100 * n);
        states.push((sandbox.checkpoint(None).unwrap().id, told));
        if n % 2 == 0 {
            assert_eq!(program.ask("spoil", 100 * n), "spoiled");
        }
        if n % 3 == 0 {
            // The next one follows at once.
            states.push((sandbox.checkpoint(None).unwrap().id, program.ask("tell", 0)));
        }
    }
    // To the newest first, which may not be complete.
    for (id, told) in states.iter().rev().chain(&states) {
        let report = sandbox.rollback(*id).unwrap();
        assert_eq!(report.fallback, None);
        program.went_back();
        assert_eq!(&program.ask("tell", 0), told, "{id}");
    }
    for (id, _) in &states {
        sandbox.complete(*id).unwrap();
    }
}

#[test]
fn a_checkpoint_of_much_memory_is_rolled_back_to_at_once() {
    let Some(mut program) = Program::start() else {
        return;
    };
    let sandbox = Arc::clone(&program.sandbox);
    for n in 0..4 {
        let told = program.ask("fill", n);
        let id = sandbox.checkpoint(None).unwrap().id;
        sandbox.rollback(id).unwrap();
        program.went_back();
        assert_eq!(program.ask("tell", 0), told);
        let _ = program.ask("fill", n + 50);
        let forks = program._f.host.fork(sandbox.name(), Some(id), 1, &[]);
        let fork = Arc::clone(&forks.unwrap()[0]);
        let session = fork.session(program.session.info().id).unwrap();
        let mut events = session.events(session.info().output);
        session.write(b"tell 0\n").unwrap();
        assert_eq!(read_until(&mut events, "\n").trim_end(), told);
        sandbox.rollback(id).unwrap();
        program.went_back();
        sandbox.delete(id).unwrap();
        assert_eq!(program.ask("tell", 0), told);
    }
}

#[test]
fn memory_that_is_still_to_come_back_is_there_for_whatever_happens_first() {
    let Some(mut program) = Program::start() else {
        return;
    };
    let sandbox = Arc::clone(&program.sandbox);
    let told = program.ask("fill", 1);
    let id = sandbox.checkpoint(None).unwrap().id;
    for n in 0..3 {
        let back = |program: &mut Program| {
            let report = sandbox.rollback(id).unwrap();
            assert_eq!(report.fallback, None);
            program.went_back();
        };
        // Children, moves, drops and other programs at once.
        program.ask("fill", 100 + n);
        back(&mut program);
        assert_eq!(program.ask("spoil", 200 + n), "spoiled");
        back(&mut program);
        assert_eq!(program.ask("tell", 0), told);
        // A checkpoint at once is of the state that is coming back.
        program.ask("fill", 300 + n);
        back(&mut program);
        let same = sandbox.checkpoint(None).unwrap().id;
        let kept = sandbox.complete(same).unwrap();
        assert!(kept.stored < 1000, "{kept:?}");
        program.ask("fill", 400 + n);
        sandbox.rollback(same).unwrap();
        program.went_back();
        assert_eq!(program.ask("tell", 0), told);
        sandbox.delete(same).unwrap();
        // Its end at once needs nothing back, and it comes back from that as well.
        program.ask("fill", 500 + n);
        back(&mut program);
        program.session.kill().unwrap();
        back(&mut program);
        assert_eq!(program.ask("tell", 0), told);
    }
}

#[test]
fn a_killed_command_does_not_take_the_checkpoint_with_it() {
    let Some(mut program) = Program::start() else {
        return;
    };
    let sandbox = Arc::clone(&program.sandbox);
    let told = program.ask("fill", 7);
    let id = sandbox.checkpoint(None).unwrap().id;
    assert!(sandbox.info().processes <= 1);
    program.session.kill().unwrap();
    sandbox.complete(id).unwrap();
    sandbox.rollback(id).unwrap();
    program.went_back();
    assert_eq!(program.ask("tell", 0), told);
}

#[test]
fn near_the_limit_of_memory_nobody_is_killed_for_a_second_copy() {
    let spec = SandboxSpec {
        memory: Some(76 << 20),
        ..SandboxSpec::default()
    };
    let Some(mut program) = Program::start_in(spec) else {
        return;
    };
    let sandbox = Arc::clone(&program.sandbox);
    for n in 0..3 {
        let told = program.ask("fill", 10 * n);
        let id = sandbox.checkpoint(None).unwrap().id;
        program.ask("fill", 10 * n + 1);
        sandbox.rollback(id).unwrap();
        program.went_back();
        assert_eq!(program.ask("tell", 0), told);
    }
}

#[test]
fn nobody_inside_sees_that_memory_is_being_copied() {
    let Some(mut program) = Program::start() else {
        return;
    };
    let sandbox = Arc::clone(&program.sandbox);
    let first = program.ask("census", 0);
    let number = first.strip_prefix("[] ").unwrap().parse::<i32>().unwrap();
    for n in 1..=8 {
        program.ask("fill", n);
        let report = sandbox.checkpoint(None).unwrap();
        assert!(report.pages > 12_000, "{report:?}");
        // The copying goes on, or is over. Either way there is nobody but the program, and no number is missing.
        let expected = format!("[] {}", number + n as i32);
        assert_eq!(program.ask("census", 0), expected);
        assert_eq!(sandbox.info().processes, 1);
    }
}

#[test]
fn no_number_is_missing_after_memory_was_given_back() {
    let Some(mut program) = Program::start() else {
        return;
    };
    let sandbox = Arc::clone(&program.sandbox);
    let mut number = None;
    for n in 0..4 {
        program.ask("fill", 2 * n);
        let id = sandbox.checkpoint(None).unwrap().id;
        program.ask("fill", 2 * n + 1);
        let report = sandbox.rollback(id).unwrap();
        assert!(report.pages > 12_000, "{report:?}");
        program.went_back();
        // Whoever drops the old pages may be there still, but far from the numbers that others get.
        let census = program.ask("census", 0);
        let (_, next) = census.rsplit_once(' ').unwrap();
        let next: i32 = next.parse().unwrap();
        assert_eq!(next, number.map_or(next, |before| before + 1), "{census}");
        number = Some(next);
    }
}
