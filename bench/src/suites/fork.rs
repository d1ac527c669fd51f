//! Forks of a sandbox with an idle bash.

use std::time::Instant;

use anyhow::{Result, ensure};

use crate::Options;
use crate::rows::{Rows, Samples};
use crate::stage::Stage;
use crate::workload::ALL;

const SUITE: &str = "fork";

/// Sandboxes made by one call.
const FANS: [usize; 2] = [1, 8];

/// Measures all cases.
pub(crate) fn run(options: &Options, rows: &mut Rows) -> Result<()> {
    let workload = &ALL[0];
    for fan in FANS {
        let name = format!("{}, {fan} at once", workload.name);
        if !options.wants(&name) {
            continue;
        }
        eprintln!("{name} ...");
        let stage = Stage::open(options)?;
        let source = workload.start(&stage)?.sandbox;
        let id = source.checkpoint(None)?.id;
        let (mut total, mut each) = (Samples::default(), Samples::default());
        for _ in 0..if options.quick { 3 } else { 20 } {
            let begun = Instant::now();
            let forks = stage.fork(source.name(), Some(id), fan, &[])?;
            let time = begun.elapsed();
            total.time(time);
            each.time(time / fan as u32);
            for fork in forks {
                let ran = fork.run(&["true"])?;
                ensure!(ran.status == 0, "{} does not run commands", fork.name());
                stage.remove(fork.name())?;
            }
        }
        rows.add(SUITE, &name, "fork", "ms", &total, None);
        rows.add(SUITE, &name, "fork per child", "ms", &each, None);
    }
    Ok(())
}
