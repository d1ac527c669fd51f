//! Sandboxes with a time namespace: their monotonic clocks are their own.

use std::sync::Arc;
use std::time::Duration;

use deltabox::{ClockOffsets, Sandbox, SandboxSpec};
use deltalog::{Format, LogReader, LogWriter};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;

use crate::lab::{Lab, Outcome, PYTHON, Program, installed};

const SECOND: i64 = 1_000_000_000;
const AHEAD: ClockOffsets = ClockOffsets {
    monotonic: 5_000 * SECOND + 7,
    boottime: 9_000 * SECOND,
};
/// How much longer than this machine the one has run that a checkpoint is said to come from.
const LONGER: i64 = 1_000_000 * SECOND;

/// Tells its clocks, in a thread that waits for a time of one of them, too.
const PROGRAM: &str = "
import sys, threading, time
changed = threading.Condition()
def wait():
    with changed:
        changed.wait(1e6)
threading.Thread(target=wait, daemon=True).start()
for line in iter(sys.stdin.readline, ''):
    print(time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME), flush=True)
";

/// The host's clock, in nanoseconds.
fn monotonic() -> i64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec * SECOND + now.tv_nsec
}

/// What the program's clocks show.
fn told(program: &mut Program) -> Outcome<[i64; 2]> {
    let line = program.ask("now")?;
    let mut clocks = line.split(' ').map(|n| n.parse().map_err(|_| line.clone()));
    let mut next = || clocks.next().unwrap_or_else(|| Err(line.clone()));
    Ok([next()?, next()?])
}

/// The program's clock is ahead of the host's by so much.
fn is_ahead(program: &mut Program, by: i64) -> Outcome {
    let before = monotonic();
    let [inside, _] = told(program)?;
    let possible = before + by..=monotonic() + by;
    assert!(
        possible.contains(&inside),
        "{inside} is not in {possible:?}"
    );
    Ok(())
}

fn sandbox(lab: &Lab, time_namespace: Option<ClockOffsets>) -> Arc<Sandbox> {
    let spec = SandboxSpec {
        time_namespace,
        ..SandboxSpec::default()
    };
    lab.host.create(spec).unwrap()
}

#[test]
fn clocks_of_its_own_go_on_through_rollbacks_forks_and_a_reboot() -> Outcome {
    if !installed(PYTHON) {
        return Ok(());
    }
    let lab = Lab::new();
    let mut plain = Program::start(&sandbox(&lab, None), &[PYTHON, "-c", PROGRAM])?;
    is_ahead(&mut plain, 0)?;
    let sandbox = sandbox(&lab, Some(AHEAD));
    let mut program = Program::start(&sandbox, &[PYTHON, "-c", PROGRAM])?;
    is_ahead(&mut program, AHEAD.monotonic)?;
    let (id, mark) = (sandbox.checkpoint_durable(None).unwrap().id, program.mark());
    program.kill()?;
    sandbox.rollback(id).unwrap();
    program.went_back(mark);
    is_ahead(&mut program, AHEAD.monotonic)?;
    for fork in lab.fork(&sandbox, id, 2)? {
        is_ahead(&mut program.in_fork(&fork, mark)?, AHEAD.monotonic)?;
    }
    let session = program.session.info().id;
    let name = sandbox.name().to_owned();
    drop((sandbox, program, plain));

    let lab = lab.restarted();
    let again = lab.host.get(&name).unwrap();
    again.rollback(id).unwrap();
    is_ahead(&mut Program::found(&again, session, mark)?, AHEAD.monotonic)?;
    drop(again);

    let place = lab.state_dir().join("checkpoints").join(&name);
    let manifest = place.join(id.to_string()).join("manifest");
    let mut read = [0, 0];
    let lab = lab.restarted_with(|| read = as_of_another_boot(&manifest));
    let again = lab.host.get(&name).unwrap();
    std::thread::sleep(Duration::from_millis(10));
    again.rollback(id).unwrap();
    let now = told(&mut Program::found(&again, session, mark)?)?;
    for (now, read) in now.into_iter().zip(read) {
        assert!(
            (read..read + 600 * SECOND).contains(&now),
            "{now}, not {read}"
        );
    }
    Ok(())
}

/// Makes a checkpoint one that was written when the machine had run longer, and before it was started again. Returns what the
/// clocks inside showed then.
fn as_of_another_boot(manifest: &std::path::Path) -> [i64; 2] {
    let format = Format {
        kind: *b"MANI",
        version: 1,
    };
    let record = LogReader::open(manifest, format).unwrap().next_record();
    let record = record.unwrap().unwrap();
    let mut json: Value = serde_json::from_slice(&record.payload).unwrap();
    json["clocks"]["boot"] = "another".into();
    let read = ["monotonic", "boottime"].map(|clock| {
        let read = json["clocks"][clock].as_i64().unwrap() + LONGER;
        json["clocks"][clock] = read.into();
        read
    });
    std::fs::remove_file(manifest).unwrap();
    let mut log = LogWriter::create(manifest, format).unwrap();
    log.append(record.tag, &serde_json::to_vec(&json).unwrap())
        .unwrap();
    log.finish().unwrap();
    [read[0] + AHEAD.monotonic, read[1] + AHEAD.boottime]
}
