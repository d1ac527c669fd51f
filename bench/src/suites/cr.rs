//! Checkpoint and rollback of running programs, swept over files changed and the depth of the tree.

use anyhow::{Context, Result};
use deltabox::CheckpointId;

use crate::Options;
use crate::floor::{self, Floor};
use crate::operation::Operation;
use crate::processes::Programs;
use crate::rows::{Rows, Samples};
use crate::stage::Stage;
use crate::workload::{ALL, Running, Workload};

const SUITE: &str = "cr";

/// Files changed in a step, and checkpoints above the one that is measured.
const SWEEP: [(u32, u32); 3] = [(10, 1), (10_000, 1), (10, 200)];

/// Measures all cases.
pub(crate) fn run(options: &Options, rows: &mut Rows) -> Result<()> {
    for workload in &ALL {
        for (files, depth) in SWEEP {
            let name = format!("{}, {files} files, depth {depth}", workload.name);
            if options.wants(&name) {
                eprintln!("{name} ...");
                let case = Case {
                    workload,
                    files,
                    depth,
                    repetitions: repetitions(options.quick, files),
                };
                let measured = case.measure(options);
                measured.with_context(|| name.clone())?.tell(&name, rows);
            }
        }
    }
    Ok(())
}

/// Steps before the floor is measured.
const WARM_UP: u32 = 5;

/// Writing 10,000 files takes longer than all that is measured.
fn repetitions(quick: bool, files: u32) -> u32 {
    match (quick, files > 1000) {
        (true, true) => 3,
        (true, false) => 10,
        (false, true) => 20,
        (false, false) => 100,
    }
}

struct Case<'a> {
    workload: &'a Workload,
    files: u32,
    depth: u32,
    repetitions: u32,
}

#[derive(Default)]
struct Measured {
    stop: Samples,
    checkpoint: Operation,
    rollback: Operation,
    floor: Floor,
}

impl Case<'_> {
    fn measure(&self, options: &Options) -> Result<Measured> {
        let stage = Stage::open(options)?;
        let running = self.workload.start(&stage)?;
        let base = self.descend(&running)?;
        // The floor is measured by turns, for the machine is not as quick at all times, and so in another sandbox: it empties the record of
        // written pages.
        let twin = self.workload.start(&stage)?;
        twin.sandbox.checkpoint(None)?;
        self.warm_up(&twin)?;
        let mut measured = Measured::default();
        for i in 0..self.repetitions {
            let number = 1000 + 2 * i;
            self.once(&running, base, number, &mut measured)?;
            twin.change_files(self.files, number)?;
            twin.step(number)?;
            let programs = Programs::of(twin.sandbox.name())?;
            measured.floor.measure(&programs)?;
        }
        Ok(measured)
    }

    /// Has a program do steps until it has come by all of its code: what it runs for the first time counts as written, and cannot be.
    fn warm_up(&self, twin: &Running) -> Result<()> {
        for number in 0..WARM_UP {
            twin.change_files(1, number)?;
            twin.step(number)?;
        }
        floor::forget_written(&Programs::of(twin.sandbox.name())?)
    }

    /// Makes the tree as deep as the case has it; the deepest checkpoint.
    fn descend(&self, running: &Running) -> Result<CheckpointId> {
        let mut base = running.sandbox.checkpoint(None)?.id;
        for i in 1..self.depth {
            running.step(i)?;
            running.change_files(1, i)?;
            base = running.sandbox.checkpoint(None)?.id;
        }
        Ok(base)
    }

    /// A step and a checkpoint, another step and the rollback of it; then the tree is as before.
    fn once(
        &self,
        running: &Running,
        base: CheckpointId,
        number: u32,
        measured: &mut Measured,
    ) -> Result<()> {
        running.change_files(self.files, number)?;
        running.step(number)?;
        let checkpoint = running.sandbox.checkpoint(None)?;
        running.change_files(self.files, number + 1)?;
        running.step(number + 1)?;
        let rollback = running.sandbox.rollback(checkpoint.id)?;
        running.expect(number)?;
        running.sandbox.rollback(base)?;
        running.sandbox.delete(checkpoint.id)?;
        measured.stop.time(checkpoint.stop);
        let made = &mut measured.checkpoint;
        made.add(checkpoint.total, &checkpoint.phases, checkpoint.pages);
        let undone = &mut measured.rollback;
        undone.add(rollback.total, &rollback.phases, rollback.pages);
        Ok(())
    }
}

impl Measured {
    fn tell(&self, case: &str, rows: &mut Rows) {
        let floor = &self.floor;
        let mut add = |metric: &str, unit, samples, floor| {
            rows.add(SUITE, case, metric, unit, samples, floor);
        };
        add("checkpoint stop", "ms", &self.stop, Some(&floor.checkpoint));
        add(
            "checkpoint total",
            "ms",
            &self.checkpoint.total,
            Some(&floor.checkpoint),
        );
        add(
            "rollback",
            "ms",
            &self.rollback.total,
            Some(&floor.rollback),
        );
        add("floor: stop", "ms", &floor.stop, None);
        add("floor: scan", "ms", &floor.scan, None);
        add("floor: copy out", "ms", &floor.copy_out, None);
        add("floor: copy back", "ms", &floor.copy_back, None);
        add("floor pages", "pages", &floor.pages, None);
        self.checkpoint.tell(SUITE, case, "checkpoint", rows);
        self.rollback.tell(SUITE, case, "rollback", rows);
    }
}
