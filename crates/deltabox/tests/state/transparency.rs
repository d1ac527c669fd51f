//! A program that is checkpointed fifty times a second does what it does without: the same output, no call interrupted that would
//! not have been, no wake-up and no signal lost, no wait over too early or never.
//!
//! Some seconds; `DELTABOX_SECONDS=60` for a minute.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use deltabox::{CommandSpec, SandboxSpec, SessionEvent, Stream};

use crate::lab::{Lab, Outcome, PATIENCE, output, text, write_file};
use crate::work::number;

/// Between two checkpoints.
const PERIOD: Duration = Duration::from_millis(20);

/// What the program printed, sorted by lines, for its threads print when they are done.
fn steady(sandbox: &deltabox::Sandbox, seconds: u64) -> Outcome<Vec<String>> {
    let argv = ["/steady".to_owned(), seconds.to_string()].into();
    let spec = CommandSpec {
        argv,
        ..CommandSpec::default()
    };
    let session = sandbox.spawn(spec).map_err(|e| e.to_string())?;
    let (mut told, mut errors) = (Vec::new(), Vec::new());
    let mut events = session.events(0);
    loop {
        match events.next(Some(PATIENCE + Duration::from_secs(2 * seconds))) {
            Some(SessionEvent::Output {
                stream: Stream::Stdout,
                bytes,
            }) => told.extend(bytes),
            Some(SessionEvent::Output { bytes, .. }) => errors.extend(bytes),
            Some(SessionEvent::Exit { status: 0, .. }) => break,
            other => return Err(format!("{other:?}: {}{}", text(&told), text(&errors))),
        }
    }
    let mut lines: Vec<String> = text(&told).lines().map(str::to_owned).collect();
    lines.sort_unstable();
    Ok(lines)
}

#[test]
fn a_program_cannot_tell_that_it_is_checkpointed() -> Outcome {
    let seconds = number("DELTABOX_SECONDS", 3) as u64;
    let lab = Lab::new();
    let sandbox = lab.host.create(SandboxSpec::default()).unwrap();
    write_file(
        &sandbox,
        "/steady.c",
        include_bytes!("../programs/steady.c"),
    );
    output(&sandbox, "cc -O1 -o /steady /steady.c -lpthread");
    let alone = steady(&sandbox, seconds)?;
    let done = AtomicBool::new(false);
    let (checkpointed, checkpoints) = std::thread::scope(|scope| {
        let checkpoints = scope.spawn(|| {
            let mut made = 0;
            while !done.load(Ordering::Acquire) {
                let id = sandbox.checkpoint(None).map_err(|e| e.to_string())?.id;
                sandbox.delete(id).map_err(|e| e.to_string())?;
                made += 1;
                std::thread::sleep(PERIOD);
            }
            Outcome::Ok(made)
        });
        let checkpointed = steady(&sandbox, seconds);
        done.store(true, Ordering::Release);
        (checkpointed, checkpoints.join().unwrap())
    });
    eprintln!("{} checkpoints", checkpoints?);
    assert_eq!(checkpointed?, alone);
    Ok(())
}
