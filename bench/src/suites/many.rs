//! Many sandboxes alive at the same time: what each takes, idle, and how fast they come and go.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use deltabox::{CommandSpec, Sandbox};

use crate::Options;
use crate::processes::{inside_all, pss};
use crate::rows::{Rows, Samples};
use crate::stage::Stage;
use crate::workload::FORKED;

const SUITE: &str = "many";

/// Sandboxes alive at the end.
const COUNT: usize = 1000;
/// The same for a first look.
const FEW: usize = 100;
/// Forks of one call.
const FAN: usize = 20;
/// How long idle sandboxes are watched.
const IDLE: Duration = Duration::from_secs(5);
/// Those of which the memory is looked at closely.
const LOOKED_AT: usize = 50;

/// What runs beside the bash: 10 MB that it has written.
const PYTHON: &str = "import random, time; M = random.randbytes(10 << 20); print('ready', flush=True); time.sleep(1e9)";

/// Measures the only case.
pub(crate) fn run(options: &Options, rows: &mut Rows) -> Result<()> {
    let count = if options.quick { FEW } else { COUNT };
    let case = format!("{count} times idle bash and 10 MB Python");
    if !options.wants(&case) {
        return Ok(());
    }
    eprintln!("{case} ...");
    let stage = Stage::open(options)?;
    let source = FORKED[0].start(&stage)?.sandbox;
    start_python(&source)?;
    let id = source.checkpoint(None)?.id;
    let mut add = |metric: &str, unit, samples: &Samples| {
        rows.add(SUITE, &case, metric, unit, samples, None);
    };

    let before = Usage::now()?;
    let (mut each, begun) = (Samples::default(), Instant::now());
    let mut alive = Vec::with_capacity(count);
    while alive.len() < count {
        let fan = FAN.min(count - alive.len());
        let begun = Instant::now();
        alive.extend(stage.fork(source.name(), Some(id), fan, &[])?);
        each.time(begun.elapsed() / fan as u32);
    }
    add("fork per child", "ms", &each);
    add("forks", "/s", &rate(count, begun));
    let usage = Usage::now()?;
    add(
        "memory of the machine per sandbox",
        "MiB",
        &usage.memory_since(&before, count),
    );
    add(
        "threads of the service per sandbox",
        "threads",
        &share(usage.threads - before.threads, count),
    );
    add(
        "descriptors of the service per sandbox",
        "descriptors",
        &share(usage.descriptors - before.descriptors, count),
    );
    let mut memory = Samples::default();
    for pid in inside_all()?.iter().rev().take(2 * LOOKED_AT) {
        memory.mib(pss(*pid)?);
    }
    add("PSS of a process", "MiB", &memory);

    let before = Usage::now()?;
    std::thread::sleep(IDLE);
    let usage = Usage::now()?;
    let mut idle = Samples::default();
    idle.time((usage.processor - before.processor) / IDLE.as_secs() as u32);
    add(
        "processor time of the service, all idle, per second",
        "ms",
        &idle,
    );

    let (mut command, mut checkpoint) = (Samples::default(), Samples::default());
    for sandbox in alive.iter().step_by((count / LOOKED_AT).max(1)) {
        let begun = Instant::now();
        ensure!(
            sandbox.run(&["true"])?.status == 0,
            "{} is broken",
            sandbox.name()
        );
        command.time(begun.elapsed());
        let begun = Instant::now();
        sandbox.checkpoint(None)?;
        checkpoint.time(begun.elapsed());
    }
    add("a command in one", "ms", &command);
    add("the first checkpoint of one", "ms", &checkpoint);

    let begun = Instant::now();
    for sandbox in &alive {
        stage.remove(sandbox.name())?;
    }
    add("removals", "/s", &rate(count, begun));
    Ok(())
}

fn start_python(sandbox: &Sandbox) -> Result<()> {
    let session = sandbox.spawn(CommandSpec {
        argv: ["python3", "-I", "-c", PYTHON].map(str::to_owned).to_vec(),
        ..CommandSpec::default()
    })?;
    let begun = Instant::now();
    while session.info().output == 0 {
        ensure!(session.info().exit.is_none(), "Python has ended");
        ensure!(
            begun.elapsed() < Duration::from_secs(60),
            "Python does not start"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn rate(count: usize, since: Instant) -> Samples {
    let mut samples = Samples::default();
    samples.value(count as f64 / since.elapsed().as_secs_f64());
    samples
}

fn share(all: u64, count: usize) -> Samples {
    let mut samples = Samples::default();
    samples.value(all as f64 / count as f64);
    samples
}

/// What this process, which is the service here, and the machine use.
struct Usage {
    /// Bytes of memory that can be had.
    available: u64,
    threads: u64,
    descriptors: u64,
    /// Of this process.
    processor: Duration,
}

impl Usage {
    fn now() -> Result<Self> {
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let available = meminfo
            .lines()
            .find_map(|l| l.strip_prefix("MemAvailable:"));
        let kib = available.and_then(|l| l.trim().strip_suffix(" kB"));
        let kib: u64 = kib
            .context("meminfo tells no MemAvailable")?
            .trim()
            .parse()?;
        let stat = fs::read_to_string("/proc/self/stat")?;
        let fields: Vec<_> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let ticks = |at: usize| {
            fields
                .get(at)
                .and_then(|f| f.parse::<u64>().ok())
                .unwrap_or_default()
        };
        Ok(Self {
            available: kib << 10,
            threads: fs::read_dir("/proc/self/task")?.count() as u64,
            descriptors: fs::read_dir("/proc/self/fd")?.count() as u64,
            // utime and stime, in hundredths of a second.
            processor: Duration::from_millis(10 * (ticks(11) + ticks(12))),
        })
    }

    fn memory_since(&self, before: &Self, count: usize) -> Samples {
        let mut samples = Samples::default();
        samples.mib(before.available.saturating_sub(self.available) / count as u64);
        samples
    }
}
