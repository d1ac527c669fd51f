//! What one thread, descriptor, mapping or process more costs: programs that have few and many of them.

use anyhow::{Context, Result};

use crate::Options;
use crate::floor::Floor;
use crate::operation::Operation;
use crate::processes::Programs;
use crate::rows::{Rows, Samples};
use crate::stage::Stage;
use crate::workload::{MANY, Many, Workload};

const SUITE: &str = "scale";

/// Measures all cases.
pub(crate) fn run(options: &Options, rows: &mut Rows) -> Result<()> {
    let repetitions = if options.quick { 5 } else { 30 };
    for many in &MANY {
        let workloads = many.workloads.iter();
        let mut measured = Vec::new();
        for workload in workloads.filter(|workload| options.wants(workload.name)) {
            eprintln!("{} ...", workload.name);
            let one = Measured::of(workload, repetitions, options);
            let one = one.with_context(|| workload.name.to_owned())?;
            one.tell(workload.name, rows);
            measured.push(one);
        }
        if let [few, more] = &measured[..] {
            tell_slope(many, few, more, rows);
        }
    }
    Ok(())
}

#[derive(Default)]
struct Measured {
    stop: Samples,
    checkpoint: Operation,
    rollback: Operation,
    floor: Floor,
}

impl Measured {
    fn of(workload: &Workload, repetitions: u32, options: &Options) -> Result<Self> {
        let stage = Stage::open(options)?;
        let running = workload.start(&stage)?;
        running.sandbox.checkpoint(None)?;
        let mut measured = Self::default();
        for number in 0..repetitions {
            running.step(2 * number)?;
            let made = running.sandbox.checkpoint(None)?;
            running.step(2 * number + 1)?;
            let undone = running.sandbox.rollback(made.id)?;
            running.expect(2 * number)?;
            measured.stop.time(made.stop);
            let checkpoint = &mut measured.checkpoint;
            checkpoint.add(made.total, &made.phases, made.pages);
            let rollback = &mut measured.rollback;
            rollback.add(undone.total, &undone.phases, undone.pages);
        }
        for number in 0..repetitions {
            running.step(number)?;
            measured.floor.measure(&Programs::find()?)?;
        }
        Ok(measured)
    }

    fn tell(&self, case: &str, rows: &mut Rows) {
        let floor = &self.floor;
        let (stop, rollback) = (&self.stop, &self.rollback.total);
        rows.add(
            SUITE,
            case,
            "checkpoint stop",
            "ms",
            stop,
            Some(&floor.checkpoint),
        );
        rows.add(
            SUITE,
            case,
            "rollback",
            "ms",
            rollback,
            Some(&floor.rollback),
        );
        self.checkpoint.tell(SUITE, case, "checkpoint", rows);
        self.rollback.tell(SUITE, case, "rollback", rows);
    }
}

/// What one more costs, by the medians.
fn tell_slope(many: &Many, few: &Measured, more: &Measured, rows: &mut Rows) {
    let items = f64::from(many.counts[1] - many.counts[0]);
    let case = format!("one {}", many.item);
    let each = |few: &Samples, more: &Samples| more.slope(few, items);
    let floor = (&few.floor, &more.floor);
    let stop = each(&few.stop, &more.stop);
    let least = each(&floor.0.checkpoint, &floor.1.checkpoint);
    rows.add(SUITE, &case, "checkpoint stop", "us", &stop, Some(&least));
    let rollback = each(&few.rollback.total, &more.rollback.total);
    let least = each(&floor.0.rollback, &floor.1.rollback);
    rows.add(SUITE, &case, "rollback", "us", &rollback, Some(&least));
}
