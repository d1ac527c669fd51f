//! Forks of running programs, swept over how many are made by one call.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use deltabox::CheckpointId;

use crate::Options;
use crate::processes::{inside_all, pss};
use crate::rows::{Rows, Samples};
use crate::stage::Stage;
use crate::workload::{FORKED, Running, Workload};

const SUITE: &str = "fork";

/// Sandboxes made by one call.
const FANS: [usize; 4] = [1, 4, 16, 64];

/// Measures all cases.
pub(crate) fn run(options: &Options, rows: &mut Rows) -> Result<()> {
    for workload in &FORKED {
        if options.quick && workload.is_large() {
            continue;
        }
        for (fan, warm) in FANS.into_iter().flat_map(|fan| [(fan, false), (fan, true)]) {
            let state = if warm { "warm" } else { "cold" };
            let name = format!("{}, {fan} at once, {state}", workload.name);
            if options.wants(&name) {
                eprintln!("{name} ...");
                let measured = measure(options, workload, fan, warm);
                measured.with_context(|| name.clone())?.tell(&name, rows);
            }
        }
    }
    Ok(())
}

const PATIENCE: Duration = Duration::from_secs(60);

fn repetitions(options: &Options, workload: &Workload, fan: usize) -> usize {
    let forks = match (options.quick, workload.is_large()) {
        (true, _) => 16,
        (false, true) => 32,
        (false, false) => 192,
    };
    (forks / fan).clamp(3, 20)
}

#[derive(Default)]
struct Measured {
    total: Samples,
    each: Samples,
    phases: Vec<(String, Samples)>,
    pss: Samples,
    copies: Samples,
}

fn measure(options: &Options, workload: &Workload, fan: usize, warm: bool) -> Result<Measured> {
    let stage = Stage::with_warm(options, if warm { fan } else { 0 })?;
    let source = workload.start(&stage)?;
    let id = source.sandbox.checkpoint(None)?.id;
    let sources: BTreeSet<i32> = inside_all()?.into_iter().collect();
    let mut measured = Measured::default();
    for _ in 0..repetitions(options, workload, fan) {
        if warm {
            get_ready(&stage, source.sandbox.name(), id, fan)?;
        }
        measured.once(&stage, &source, id, fan, &sources)?;
    }
    Ok(measured)
}

/// Waits until all is there that can be made before a fork.
fn get_ready(stage: &Stage, source: &str, id: CheckpointId, fan: usize) -> Result<()> {
    stage.expect_forks(source, id, fan)?;
    let begun = Instant::now();
    while stage.warm().ready < fan {
        ensure!(begun.elapsed() < PATIENCE, "sandboxes are not made ready");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

impl Measured {
    /// Forks, has every fork do its step, and removes them.
    fn once(
        &mut self,
        stage: &Stage,
        source: &Running,
        id: CheckpointId,
        fan: usize,
        sources: &BTreeSet<i32>,
    ) -> Result<()> {
        let before = stage.templates().births;
        let begun = Instant::now();
        let forks = stage.fork(source.sandbox.name(), Some(id), fan, &[])?;
        let time = begun.elapsed();
        self.total.time(time);
        self.each.time(time / fan as u32);
        self.copies
            .count((stage.templates().births - before) / fan as u64);
        let mut bytes = 0;
        for pid in inside_all()? {
            if !sources.contains(&pid) {
                bytes += pss(pid)?;
            }
        }
        self.pss.mib(bytes / fan as u64);
        for fork in forks {
            for (name, time) in fork.making().0 {
                self.phase(name).time(time);
            }
            source.fork(fork.clone()).step(1)?;
            let ran = fork.run(&["true"])?;
            ensure!(ran.status == 0, "{} does not run commands", fork.name());
            stage.remove(fork.name())?;
        }
        Ok(())
    }

    fn phase(&mut self, name: String) -> &mut Samples {
        let at = self.phases.iter().position(|(known, _)| *known == name);
        let at = at.unwrap_or_else(|| {
            self.phases.push((name, Samples::default()));
            self.phases.len() - 1
        });
        &mut self.phases[at].1
    }

    fn tell(&self, case: &str, rows: &mut Rows) {
        let mut add = |metric: &str, unit, samples| {
            rows.add(SUITE, case, metric, unit, samples, None);
        };
        add("fork", "ms", &self.total);
        add("fork per child", "ms", &self.each);
        add("PSS per child", "MiB", &self.pss);
        add("copies of a template", "processes", &self.copies);
        for (phase, samples) in &self.phases {
            add(&format!("child: {phase}"), "ms", samples);
        }
    }
}
