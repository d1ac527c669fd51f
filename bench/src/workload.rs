//! What runs in the sandbox while it is measured.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use deltabox::{CommandSpec, Host, Sandbox, SandboxSpec, SessionId, WindowSize};

use crate::dialogue::ask;

/// One kind of agent's sandbox.
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    program: Program,
    /// Typed once.
    setup: &'static str,
    /// Typed for each step, after `N=` with the step's number.
    step: &'static str,
}

#[derive(Clone, Copy)]
enum Program {
    /// An interactive bash on a terminal.
    Bash,
    /// A Python REPL on pipes.
    Python,
}

/// What is forked.
pub(crate) const FORKED: [Workload; 4] = [
    Workload {
        name: "idle bash",
        program: Program::Bash,
        setup: "true",
        step: "true",
    },
    Workload {
        name: "python 60 MB",
        program: Program::Python,
        setup: "import random; M = bytearray(random.randbytes(60 << 20))",
        step: "pass",
    },
    Workload {
        name: "python 64 MiB read back",
        program: Program::Python,
        setup: "import random, zlib; M = bytearray(64 << 20); \
                _ = [M.__setitem__(slice(i << 20, (i + 1) << 20), random.randbytes(1 << 20)) for i in range(64)]; \
                C = zlib.crc32(M)",
        step: READ_BACK,
    },
    Workload {
        name: "python 1 GiB read back",
        program: Program::Python,
        setup: "import random, zlib; M = bytearray(1024 << 20); \
                _ = [M.__setitem__(slice(i << 20, (i + 1) << 20), random.randbytes(1 << 20)) for i in range(1024)]; \
                C = zlib.crc32(M)",
        step: READ_BACK,
    },
];

/// Fails if a byte of the memory that the setup wrote is another.
const READ_BACK: &str = "assert zlib.crc32(M) == C";

/// All kinds.
pub(crate) const ALL: [Workload; 4] = [
    Workload {
        name: "idle bash",
        program: Program::Bash,
        setup: "true",
        step: "true",
    },
    Workload {
        name: "python 60 MB",
        program: Program::Python,
        setup: "import random; M = bytearray(random.randbytes(60 << 20))",
        // One byte in each of 1,000 pages, others in every step.
        step: "M[(N * 7919) % 15 * 4096 : 15000 * 4096 : 15 * 4096] = bytes([N % 256]) * len(range((N * 7919) % 15, 15000, 15))",
    },
    Workload {
        name: "python 8 threads",
        program: Program::Python,
        setup: "exec('import queue, threading\\n\
                I, O, M = [queue.SimpleQueue() for _ in range(7)], queue.SimpleQueue(), bytearray(7 << 20)\\n\
                def work(k):\\n  while True:\\n    n = I[k].get()\\n    \
                for p in range(40): M[(k << 20) + p * 4096] = n % 256\\n    O.put(k)\\n\
                for k in range(7): threading.Thread(target=work, args=(k,), daemon=True).start()\\n')",
        step: "[q.put(N) for q in I]; [O.get() for q in I]",
    },
    Workload {
        name: "16 processes",
        program: Program::Bash,
        setup: "for i in 1 2 3 4 5; do bash -c 'sleep 1000000 & sleep 1000000 & wait' & done; \
                until set -- /proc/[0-9]*/; [ $# -ge 17 ]; do sleep 0.1; done",
        step: "true",
    },
];

const fn python(name: &'static str, setup: &'static str) -> Workload {
    Workload {
        name,
        program: Program::Python,
        setup,
        step: "pass",
    }
}

/// Programs that have many of something.
pub(crate) const MANY: [Many; 4] = [
    Many {
        item: "thread",
        counts: [50, 500],
        workloads: [
            python(
                "50 threads",
                "import threading; E = threading.Event(); \
                _ = [threading.Thread(target=E.wait, daemon=True).start() for _ in range(50)]",
            ),
            python(
                "500 threads",
                "import threading; E = threading.Event(); \
                _ = [threading.Thread(target=E.wait, daemon=True).start() for _ in range(500)]",
            ),
        ],
    },
    Many {
        item: "descriptor",
        counts: [500, 5000],
        workloads: [
            python(
                "500 descriptors",
                "import os; F = [os.open(f'/tmp/{i}', os.O_RDWR | os.O_CREAT) for i in range(500)]",
            ),
            python(
                "5000 descriptors",
                "import os, resource; resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192)); \
                F = [os.open(f'/tmp/{i}', os.O_RDWR | os.O_CREAT) for i in range(5000)]",
            ),
        ],
    },
    Many {
        item: "mapping",
        counts: [2000, 20_000],
        // Every other one may only be read, so that the kernel does not make one of them all.
        workloads: [
            python(
                "2000 mappings",
                "import mmap; M = [mmap.mmap(-1, 4096, flags=34, prot=1 + i % 2 * 2) for i in range(2000)]",
            ),
            python(
                "20000 mappings",
                "import mmap; M = [mmap.mmap(-1, 4096, flags=34, prot=1 + i % 2 * 2) for i in range(20000)]",
            ),
        ],
    },
    Many {
        item: "process",
        counts: [8, 64],
        workloads: [
            python(
                "8 processes",
                "import subprocess; P = [subprocess.Popen(['sleep', '1000000']) for _ in range(8)]",
            ),
            python(
                "64 processes",
                "import subprocess; P = [subprocess.Popen(['sleep', '1000000']) for _ in range(64)]",
            ),
        ],
    },
];

/// Two workloads that differ in how many of something they have.
pub(crate) struct Many {
    /// What they have, one of it.
    pub(crate) item: &'static str,
    pub(crate) counts: [u32; 2],
    pub(crate) workloads: [Workload; 2],
}

/// A workload that runs.
#[derive(Clone)]
pub(crate) struct Running {
    pub(crate) sandbox: Arc<Sandbox>,
    session: SessionId,
    program: Program,
    step: &'static str,
}

impl Workload {
    /// Whether it takes long.
    pub(crate) fn is_large(&self) -> bool {
        self.name.contains("GiB")
    }

    /// Starts it in a new sandbox.
    pub(crate) fn start(&self, host: &Host) -> Result<Running> {
        let sandbox = host.create(SandboxSpec::default())?;
        let mut command = CommandSpec {
            stdin: true,
            ..CommandSpec::default()
        };
        let argv: &[&str] = match self.program {
            Program::Bash => &["bash", "--noprofile", "--norc", "--noediting"],
            Program::Python => &["python3", "-I", "-q", "-i"],
        };
        command.argv = argv.iter().map(|&word| word.to_owned()).collect();
        if let Program::Bash = self.program {
            command.tty = Some(WindowSize { rows: 24, cols: 80 });
        }
        command.env.insert("PATH".into(), search_path());
        let session = sandbox.spawn(command)?.info().id;
        let running = Running {
            sandbox,
            session,
            program: self.program,
            step: self.step,
        };
        running.type_line(0, self.setup)?;
        running.sandbox.run(&["mkdir", "-p", "/work"])?;
        Ok(running)
    }
}

/// Ours first: a Python outside the standard directories is found inside too.
pub(crate) fn search_path() -> String {
    let standard = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    match std::env::var("PATH") {
        Ok(path) => format!("{standard}:{path}"),
        Err(_) => standard.to_owned(),
    }
}

impl Running {
    /// The same workload in a fork of its sandbox.
    pub(crate) fn fork(&self, sandbox: Arc<Sandbox>) -> Self {
        Self {
            sandbox,
            ..self.clone()
        }
    }

    /// Lets the program do the step of this number.
    pub(crate) fn step(&self, number: u32) -> Result<()> {
        self.type_line(number, self.step)
    }

    /// Checks that the program's last step was this one: what a rollback gave back is what it had to.
    pub(crate) fn expect(&self, number: u32) -> Result<()> {
        let line = match self.program {
            Program::Bash => "printf '<%s%s>>\\n' '<' $N",
            Program::Python => "print('<' + '<', N, '>' + '>', sep='', flush=True)",
        };
        let answer = ask(&self.sandbox, self.session, line)?;
        ensure!(
            answer == number.to_string(),
            "the program is at step {answer:?} and not at step {number}"
        );
        Ok(())
    }

    fn type_line(&self, number: u32, line: &str) -> Result<()> {
        let line = match self.program {
            Program::Bash => format!("N={number}; {line}; printf '<%s%s>>\\n' '<' $N"),
            Program::Python => {
                format!("N = {number}; {line}; print('<' + '<', N, '>' + '>', sep='', flush=True)")
            }
        };
        ask(&self.sandbox, self.session, &line).map(|_| ())
    }

    /// Writes to `count` files.
    pub(crate) fn change_files(&self, count: u32, number: u32) -> Result<()> {
        let script = format!(
            "for ((i = 0; i < {count}; i++)); do echo {number} > /work/file$i || exit; done"
        );
        let output = self.sandbox.run(&["bash", "-c", &script]);
        let output = output.context("changing files")?;
        ensure!(
            output.status == 0,
            "changing files failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }
}
