//! Checkpoint and rollback of steps that write to much memory, and long trees of checkpoints.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use deltabox::{CommandSpec, Host, Sandbox, SandboxSpec, SessionId};

use crate::Options;
use crate::dialogue::ask;
use crate::floor::Floor;
use crate::operation::Operation;
use crate::processes::Programs;
use crate::rows::{Rows, Samples};
use crate::stage::Stage;
use crate::workload::{ALL, search_path};

const SUITE: &str = "large";

/// Size of the program's memory, and how much of it each step writes to, in MiB.
const SWEEP: [(u32, u32); 6] = [
    (128, 1),
    (128, 16),
    (128, 64),
    (512, 1),
    (512, 64),
    (512, 256),
];

/// Holds `argv[1]` MiB of random bytes, and writes to every page of the first `argv[2]` MiB when it is told a number.
/// `touch N` reads those pages, tells whether they are those of step N, writes to them, and tells how long that took. `stray N` reads
/// them 256 KiB at a time, in an order of its own that is the same each time.
const PROGRAM: &str = r"
import random, sys, time
M = bytearray(int(sys.argv[1]) << 20)
for i in range(0, len(M), 1 << 20):
    M[i:i + (1 << 20)] = random.randbytes(1 << 20)
end, pages = int(sys.argv[2]) << 20, int(sys.argv[2]) << 8
order = list(range(0, end, 1 << 18))
random.Random(1).shuffle(order)
for line in sys.stdin:
    *touch, number = line.split()
    wanted = bytes([int(number) % 251]) * pages
    if touch == ['stray']:
        begun = time.perf_counter()
        same = all(M[at + 8:at + (1 << 18):4096] == wanted[:64] for at in order)
        print('<<%d %.6f>>' % (same, time.perf_counter() - begun), flush=True)
    elif touch:
        begun = time.perf_counter()
        same = M[8:end:4096] == wanted
        M[16:end:4096] = wanted
        print('<<%d %.6f>>' % (same, time.perf_counter() - begun), flush=True)
    else:
        M[8:end:4096] = wanted
        print('<<done>>', flush=True)
";

/// Measures all cases.
pub(crate) fn run(options: &Options, rows: &mut Rows) -> Result<()> {
    for (size, written) in SWEEP {
        let name = format!("python {size} MB, {written} MB a step");
        if options.wants(&name) && !(options.quick && size > 128) {
            eprintln!("{name} ...");
            let measured = measure(options, size, written);
            measured.with_context(|| name.clone())?.tell(&name, rows);
        }
    }
    let name = "python 128 MB, 64 MB read in an order of its own";
    if options.wants(name) {
        eprintln!("{name} ...");
        strays(options, name, rows)?;
    }
    let (checkpoints, depth) = if options.quick {
        (600, 100)
    } else {
        (10_000, 1000)
    };
    let name = format!("{checkpoints} checkpoints, depth {depth}");
    if options.wants(&name) {
        eprintln!("{name} ...");
        long_tree(options, &name, checkpoints, depth, rows)?;
    }
    Ok(())
}

/// The program, in a sandbox.
struct Program {
    sandbox: Arc<Sandbox>,
    session: SessionId,
}

impl Program {
    fn start(host: &Host, size: u32, written: u32) -> Result<Self> {
        let sandbox = host.create(SandboxSpec::default())?;
        let mut command = CommandSpec {
            argv: ["python3", "-I", "-c", PROGRAM].map(str::to_owned).to_vec(),
            stdin: true,
            ..CommandSpec::default()
        };
        let sizes = [size, written].map(|mib| mib.to_string());
        command.argv.extend(sizes);
        command.env.insert("PATH".into(), search_path());
        let session = sandbox.spawn(command)?.info().id;
        let program = Self { sandbox, session };
        program.step(0)?;
        Ok(program)
    }

    fn step(&self, number: u32) -> Result<()> {
        ask(&self.sandbox, self.session, &number.to_string()).map(drop)
    }

    /// How long the program takes to read and write all that it wrote in step `number`, its last.
    fn touch(&self, number: u32) -> Result<Duration> {
        self.timed("touch", number)
    }

    fn timed(&self, how: &str, number: u32) -> Result<Duration> {
        let answer = ask(&self.sandbox, self.session, &format!("{how} {number}"))?;
        let (same, seconds) = answer.split_once(' ').context("not an answer")?;
        ensure!(same == "1", "the memory is not that of step {number}");
        Ok(Duration::from_secs_f64(seconds.parse()?))
    }
}

#[derive(Default)]
struct Measured {
    stop: Samples,
    complete: Samples,
    stored: Samples,
    checkpoint: Operation,
    rollback: Operation,
    touch: Samples,
    both: Samples,
    /// Touching when all is there.
    touch_present: Samples,
    /// Copying back, and touching when all is there.
    both_eager: Samples,
    floor: Floor,
}

/// The processes' first steps and checkpoints are not measured: they copy everything.
fn measure(options: &Options, size: u32, written: u32) -> Result<Measured> {
    let stage = Stage::open(options)?;
    let program = Program::start(&stage, size, written)?;
    let sandbox = &program.sandbox;
    let mut measured = Measured::default();
    let base = sandbox.checkpoint(None)?.id;
    for i in 0..if options.quick { 5 } else { 20 } {
        program.step(2 * i)?;
        let begun = Instant::now();
        let checkpoint = sandbox.checkpoint(None)?;
        let kept = sandbox.complete(checkpoint.id)?;
        measured.complete.time(begun.elapsed());
        measured.stored.count(kept.stored);
        measured.stop.time(checkpoint.stop);
        measured
            .checkpoint
            .add(checkpoint.total, &checkpoint.phases, checkpoint.pages);
        program.step(2 * i + 1)?;
        let rollback = sandbox.rollback(checkpoint.id)?;
        let touch = program.touch(2 * i)?;
        measured
            .rollback
            .add(rollback.total, &rollback.phases, rollback.pages);
        measured.touch.time(touch);
        measured.both.time(rollback.total + touch);
        sandbox.rollback(base)?;
        sandbox.delete(checkpoint.id)?;
    }
    // From here on the written pages of all memory are known.
    let last = sandbox.checkpoint(None)?.id;
    sandbox.complete(last)?;
    for i in 0..if options.quick { 5 } else { 20 } {
        program.step(i)?;
        let times = measured.floor.measure(&Programs::find()?)?;
        let touch = program.touch(i)?;
        measured.touch_present.time(touch);
        measured.both_eager.time(times.rollback + touch);
    }
    Ok(measured)
}

impl Measured {
    fn tell(&self, case: &str, rows: &mut Rows) {
        let floor = &self.floor;
        let mut add = |metric: &str, samples: &Samples, floor: &Samples| {
            rows.add(SUITE, case, metric, "ms", samples, Some(floor));
        };
        add("checkpoint stop", &self.stop, &floor.checkpoint);
        add(
            "checkpoint total",
            &self.checkpoint.total,
            &floor.checkpoint,
        );
        add("checkpoint complete", &self.complete, &floor.checkpoint);
        add("rollback", &self.rollback.total, &floor.rollback);
        add("touching all after", &self.touch, &self.touch_present);
        add("rollback and touching", &self.both, &self.both_eager);
        rows.add(SUITE, case, "pages stored", "pages", &self.stored, None);
        self.checkpoint.tell(SUITE, case, "checkpoint", rows);
        self.rollback.tell(SUITE, case, "rollback", rows);
    }
}

/// What it buys that the order is known in which a program touches its memory after a rollback.
fn strays(options: &Options, name: &str, rows: &mut Rows) -> Result<()> {
    let stage = Stage::open(options)?;
    let program = Program::start(&stage, 128, 64)?;
    let sandbox = &program.sandbox;
    let base = sandbox.checkpoint(None)?.id;
    let (mut first, mut later) = (Samples::default(), Samples::default());
    for i in 0..if options.quick { 5 } else { 20 } {
        program.step(2 * i)?;
        let checkpoint = sandbox.checkpoint(None)?.id;
        sandbox.complete(checkpoint)?;
        for round in 0..3 {
            program.step(2 * i + 1)?;
            sandbox.rollback(checkpoint)?;
            let time = program.timed("stray", 2 * i)?;
            if round == 0 { &mut first } else { &mut later }.time(time);
        }
        sandbox.rollback(base)?;
        sandbox.delete(checkpoint)?;
    }
    let metric = "reading after the first rollback";
    rows.add(SUITE, name, metric, "ms", &first, None);
    let metric = "reading after later rollbacks";
    rows.add(SUITE, name, metric, "ms", &later, Some(&first));
    Ok(())
}

/// The first and the last operations of a tree of many checkpoints.
fn long_tree(
    options: &Options,
    name: &str,
    checkpoints: u32,
    depth: u32,
    rows: &mut Rows,
) -> Result<()> {
    let stage = Stage::open(options)?;
    let running = ALL[0].start(&stage)?;
    let sandbox = &running.sandbox;
    let root = sandbox.checkpoint(None)?.id;
    let part = checkpoints / 10;
    let mut stops = [Samples::default(), Samples::default()];
    let mut rollbacks = [Samples::default(), Samples::default()];
    let which = |i: u32| match i {
        i if i < part => Some(0),
        i if i >= checkpoints - part => Some(1),
        _ => None,
    };
    for i in 0..checkpoints {
        if i % depth == depth - 1 {
            sandbox.rollback(root)?;
        }
        running.step(i)?;
        let made = sandbox.checkpoint(None)?;
        if i % 10 == 0 {
            running.step(i + 1)?;
            let undone = sandbox.rollback(made.id)?;
            running.expect(i)?;
            if let Some(part) = which(i) {
                rollbacks[part].time(undone.total);
            }
        }
        if let Some(part) = which(i) {
            stops[part].time(made.stop);
        }
    }
    ensure!(sandbox.info().checkpoints as u32 == checkpoints + 1);
    let [first, latest] = &stops;
    rows.add(SUITE, name, "last tenth: stop", "ms", latest, Some(first));
    let [first, latest] = &rollbacks;
    rows.add(
        SUITE,
        name,
        "last tenth: rollback",
        "ms",
        latest,
        Some(first),
    );
    Ok(())
}
