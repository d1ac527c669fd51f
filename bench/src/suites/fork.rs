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
        for (fan, ready) in FANS
            .into_iter()
            .flat_map(|fan| READY.map(|ready| (fan, ready)))
        {
            let name = format!("{}, {fan} at once, {}", workload.name, ready.name());
            if options.wants(&name) {
                eprintln!("{name} ...");
                let measured = measure(options, workload, fan, ready);
                measured.with_context(|| name.clone())?.tell(&name, rows);
            }
        }
    }
    Ok(())
}

/// What is there before a fork is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ready {
    /// Nothing.
    Cold,
    /// Blank sandboxes, and a template.
    Warm,
    /// The processes in them, too.
    Born,
    /// With the pages that the step after the checkpoint wrote to.
    Touched,
}

const READY: [Ready; 4] = [Ready::Cold, Ready::Warm, Ready::Born, Ready::Touched];

impl Ready {
    fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Born => "born early",
            Self::Touched => "touched early",
        }
    }

    /// Processes of forks that are copies of a template so far.
    fn copies(self, stage: &Stage) -> u64 {
        match self {
            Self::Cold | Self::Warm => stage.templates().births,
            // Others are born meanwhile, for the next forks.
            Self::Born | Self::Touched => stage.warm().early_taken,
        }
    }

    fn stage(self, options: &Options, fan: usize) -> Result<Stage> {
        match self {
            Self::Cold => Stage::open(options),
            Self::Warm => Stage::with(options, fan, false, 0),
            Self::Born => Stage::with(options, fan, true, 0),
            Self::Touched => Stage::with(options, fan, true, 2048),
        }
    }
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
    step: Samples,
}

fn measure(options: &Options, workload: &Workload, fan: usize, ready: Ready) -> Result<Measured> {
    let stage = ready.stage(options, fan)?;
    let source = workload.start(&stage)?;
    let id = source.sandbox.checkpoint(None)?.id;
    // What the next step writes to.
    source.step(2)?;
    source.sandbox.checkpoint(None)?;
    source.sandbox.rollback(id)?;
    let sources: BTreeSet<i32> = inside_all()?.into_iter().collect();
    let mut measured = Measured::default();
    for _ in 0..repetitions(options, workload, fan) {
        if ready != Ready::Cold {
            get_ready(&stage, source.sandbox.name(), id, fan)?;
        }
        measured.once((&stage, ready), &source, id, fan, &sources)?;
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
        (stage, ready): (&Stage, Ready),
        source: &Running,
        id: CheckpointId,
        fan: usize,
        sources: &BTreeSet<i32>,
    ) -> Result<()> {
        let before = ready.copies(stage);
        let begun = Instant::now();
        let forks = stage.fork(source.sandbox.name(), Some(id), fan, &[])?;
        let time = begun.elapsed();
        self.total.time(time);
        self.each.time(time / fan as u32);
        self.copies
            .count((ready.copies(stage) - before) / fan as u64);
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
            let begun = Instant::now();
            source.fork(fork.clone()).step(1)?;
            self.step.time(begun.elapsed());
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
        add("first step of a child", "ms", &self.step);
        add("copies of a template", "processes", &self.copies);
        for (phase, samples) in &self.phases {
            add(&format!("child: {phase}"), "ms", samples);
        }
    }
}
