//! Checkpoints of a program that is never idle: what is done for them ahead of the stop shows nowhere.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use deltabox::{CommandSpec, Events, Gears, Host, HostConfig, Sandbox, SandboxSpec, Session};

const PYTHON: &str = "/usr/bin/python3";

/// Does to its 24 MiB all that can be done to memory, one thing after another, and keeps count of what is in each page.
const PROGRAM: &str = r"
import ctypes, mmap, os, random, select, signal, subprocess, sys
PAGE, PAGES = 4096, 6144
M = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
START = ctypes.addressof(ctypes.c_char.from_buffer(M))
model = bytearray(PAGES)
libc = ctypes.CDLL(None, use_errno=True)
size, address = ctypes.c_size_t, ctypes.c_void_p
for name, kinds in {
    'mmap': [address, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long],
    'munmap': [address, size],
    'mremap': [address, size, size, ctypes.c_int, address],
    'mprotect': [address, size, ctypes.c_int],
    'madvise': [address, size, ctypes.c_int],
    'ptrace': [ctypes.c_long] * 4,
}.items():
    call = getattr(libc, name)
    call.argtypes, call.restype = kinds, ctypes.c_long

def do(name, *args):
    result = getattr(libc, name)(*args)
    assert result != -1, (name, args, ctypes.get_errno())
    return result

def at(page):
    return START + page * PAGE

def fresh(page, count):
    do('mmap', at(page), count * PAGE, 3, 0x32, -1, 0)

def write(page, count, value):
    M[page * PAGE + 8:(page + count) * PAGE:PAGE] = bytes([value]) * count

def step(n):
    page, count, value = random.randrange(PAGES - 600), random.randrange(1, 300), random.randrange(1, 256)
    here = slice(page, page + count)
    kind = n % 16
    if kind < 8:
        count *= 2
        write(page, count, value)
        model[page:page + count] = bytes([value]) * count
    elif kind == 8:
        do('madvise', at(page), count * PAGE, 4)
        model[here] = bytes(count)
    elif kind == 9:
        fresh(page, count)
        model[here] = bytes(count)
    elif kind == 10:
        do('munmap', at(page), count * PAGE)
        fresh(page, count)
        model[here] = bytes(count)
    elif kind == 11 or kind == 12:
        count = min(count, 60)
        here = slice(page, page + count)
        there = slice(page + 300, page + 300 + count)
        if libc.mremap(at(page), count * PAGE, count * PAGE, 3, at(page + 300)) == -1:
            # It lies in several mappings, and may have been moved in part.
            fresh(page + 300, count)
            model[here] = bytes(count)
        fresh(page, count)
        model[there] = model[here]
        model[here] = bytes(count)
    elif kind == 13:
        do('mprotect', at(page), count * PAGE, 1)
        do('mprotect', at(page), count * PAGE, 3)
    elif kind == 14 and n % 64 == 14:
        child = os.fork()
        if child == 0:
            write(page, count, value)
            os._exit(M[8::PAGE] != model[:page] + bytes([value]) * count + model[page + count:])
        assert os.waitpid(child, 0)[1] == 0
    elif kind == 15 and n % 256 == 15:
        subprocess.run(['/bin/true'], check=True)

traced = None
write(0, PAGES, 7)
model[:] = bytes([7]) * PAGES
print('ready', flush=True)
for n in range(1 << 40):
    if select.select([0], [], [], 0)[0]:
        command = os.read(0, 100).decode().strip()
        if command == 'trace':
            traced = os.fork()
            if traced == 0:
                do('ptrace', 0, 0, 0, 0)
                os.kill(os.getpid(), signal.SIGSTOP)
            os.waitpid(traced, os.WUNTRACED)
        elif command == 'untrace':
            os.kill(traced, signal.SIGKILL)
            os.waitpid(traced, 0)
        bad = [page for page, byte in enumerate(M[8::PAGE]) if byte != model[page]]
        print('<%s: %d of %d are wrong %s>' % (command, len(bad), PAGES, bad[:5]), flush=True)
    step(n)
";

/// The program in a sandbox whose checkpoints leave little to the stop.
struct Program {
    _host: (Host, tempfile::TempDir),
    sandbox: Arc<Sandbox>,
    session: Arc<Session>,
    events: Events,
}

impl Program {
    /// `None` if there is no Python on this machine.
    fn start(gears: Gears) -> Option<Self> {
        if !std::path::Path::new(PYTHON).exists() {
            eprintln!("{PYTHON} is not installed: nothing was tested with it");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let config = HostConfig {
            state_dir: dir.path().join("state"),
            gears,
            ..HostConfig::default()
        };
        let host = Host::open(config).unwrap();
        let sandbox = host.create(SandboxSpec::default()).unwrap();
        let command = CommandSpec {
            argv: vec![PYTHON.into(), "-c".into(), PROGRAM.into()],
            stdin: true,
            ..CommandSpec::default()
        };
        let session = sandbox.spawn(command).unwrap();
        let mut events = session.events(0);
        read_until(&mut events, "ready\n");
        Some(Self {
            _host: (host, dir),
            sandbox,
            session,
            events,
        })
    }

    /// Tells it something; it looks at all its memory before it answers.
    fn tell(&mut self, command: &str) {
        let told = self.session.write(format!("{command}\n").as_bytes());
        told.unwrap_or_else(|e| panic!("{e}: {}", text(&wait(&self.session).stderr)));
        let answer = read_until(&mut self.events, ">\n");
        let right = format!("<{command}: 0 of ");
        assert!(answer.contains(&right), "{answer}");
    }

    fn go_back(&mut self, id: deltabox::CheckpointId) {
        let report = self.sandbox.rollback(id).unwrap();
        assert_eq!(report.fallback, None);
        self.session = self.sandbox.session(self.session.info().id).unwrap();
        self.events = self.session.events(self.session.info().output);
        self.tell("back");
    }

    /// A checkpoint that is refused when everything for it was done that is done ahead.
    fn be_refused(&mut self) {
        self.tell("trace");
        let refused = self.sandbox.checkpoint(None).unwrap_err().to_string();
        assert!(refused.contains("traced by process"), "{refused}");
        self.tell("untrace");
    }
}

fn go_through(gears: Gears) {
    let Some(mut program) = Program::start(gears) else {
        return;
    };
    let sandbox = Arc::clone(&program.sandbox);
    let mut all = vec![sandbox.checkpoint(None).unwrap().id];
    for round in 0..24_usize {
        std::thread::sleep(Duration::from_millis(15));
        if round % 4 == 1 {
            program.be_refused();
        }
        if round % 4 != 3 {
            all.push(sandbox.checkpoint(None).unwrap().id);
        }
        if round % 8 == 5 {
            program.be_refused();
        }
        if round % 2 == 1 {
            program.go_back(all[(round * 7) % all.len()]);
        } else {
            program.tell("check");
        }
    }
    for id in all.iter().rev() {
        program.go_back(*id);
    }
    program.session.kill().unwrap();
    program.go_back(all[all.len() / 2]);
}

/// From some pages on everything is done in second gear.
const LOW: Gears = Gears {
    protect: 32,
    sort_later: 256,
    snapshot: 300,
    ahead: 300,
    lazy: 4096,
};

#[test]
fn a_busy_program_is_taken_back_to_the_moment_of_each_stop() {
    go_through(LOW);
}

#[test]
fn a_busy_program_of_which_nothing_is_copied_ahead_is_too() {
    go_through(Gears {
        ahead: u64::MAX,
        ..LOW
    });
}
