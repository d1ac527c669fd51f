//! DeltaFS beside overlayfs and a plain directory: ordinary work on the same files, and what only a volume can do.

mod bare;
mod base;
mod sites;
mod switch;
mod workloads;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::Options;
use crate::rows::{Rows, Samples};
use bare::Answers;
use base::Packages;
use sites::{Ground, KINDS, Kind, Site};
use workloads::{Tree, Workload};

const SUITE: &str = "fs";

/// Bytes of the large file: 1 GiB, or what the quick run makes do with.
const LARGE: [u64; 2] = [256 << 20, 1 << 30];

/// Measures all cases.
pub(crate) fn run_suite(options: &Options, rows: &mut Rows) -> Result<()> {
    crate::sys::own_mounts().context("taking a mount namespace of its own")?;
    let dir = options.temporary_dir()?;
    let all = workloads::ALL.iter().chain([&workloads::FIRST_WRITE]);
    let wanted: Vec<&Workload> = all.filter(|w| options.wants(w.name)).collect();
    if !wanted.is_empty() {
        beside_overlayfs(options, &dir, &wanted, rows)?;
    }
    switch::run(options, dir.path(), rows)
}

fn beside_overlayfs(
    options: &Options,
    dir: &TempDir,
    wanted: &[&Workload],
    rows: &mut Rows,
) -> Result<()> {
    eprintln!("making the base ...");
    let base = dir.path().join("base");
    std::fs::create_dir(&base)?;
    let packages = base::fill(&base, LARGE[usize::from(!options.quick)])?;
    let answers = Arc::new(Answers::read(&base, base::REPOSITORY)?);
    let ground = Ground {
        base: &base,
        dir: dir.path(),
        answers: Some(&answers),
    };
    let warm = KINDS.map(|kind| Site::open(kind, &ground, true));
    let warm: Vec<Site> = warm.into_iter().collect::<Result<_>>()?;
    let possible = |w: &&&Workload| workloads::is_possible(w, &packages);
    for workload in wanted.iter().filter(possible) {
        eprintln!("{} ...", workload.name);
        let mut samples = KINDS.map(|_| Samples::default());
        let repetitions = workload.repetitions[usize::from(!options.quick)];
        // One after another, beginning with another one each time: what disturbs the machine disturbs all alike.
        for repetition in 0..=repetitions {
            for turn in 0..KINDS.len() {
                let which = (turn + repetition as usize) % KINDS.len();
                let kind = KINDS[which];
                if !workload.runs_on(kind) {
                    continue;
                }
                let time = once(workload, kind, &warm[which], ground, &packages);
                let time = time.with_context(|| format!("{} on {kind:?}", workload.name))?;
                if repetition > 0 {
                    samples[which].time(time);
                }
            }
        }
        report(workload.name, &samples, rows);
    }
    Ok(())
}

/// Adds the rows of one workload. What was not run has no samples, and what has none gets no row.
fn report(case: &str, samples: &[Samples; KINDS.len()], rows: &mut Rows) {
    let [native, overlay, delta, deep, bare, keeping] = samples;
    for (metric, samples) in [
        ("native", native),
        ("deltafs", delta),
        ("deltafs, depth 1,000", deep),
        ("bare FUSE", bare),
        ("bare FUSE, kept in a file", keeping),
    ] {
        rows.add(SUITE, case, metric, "ms", samples, Some(overlay));
    }
    rows.add(SUITE, case, "overlayfs", "ms", overlay, None);
    for (metric, floor) in [
        ("deltafs, beside bare FUSE", bare),
        ("deltafs, beside bare FUSE, kept in a file", keeping),
    ] {
        if !floor.is_empty() {
            rows.add(SUITE, case, metric, "ms", delta, Some(floor));
        }
    }
}

fn once(
    workload: &Workload,
    kind: Kind,
    warm: &Site,
    ground: Ground<'_>,
    packages: &Packages,
) -> Result<std::time::Duration> {
    if workload.tree == Tree::Warm || kind == Kind::Native {
        return (workload.run)(warm.root(), packages);
    }
    let fresh = Site::open(kind, &ground, false)?;
    (workload.run)(fresh.root(), packages)
}

/// Runs a program to its end; what it prints is not shown.
fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("running {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Git in a directory, without any configuration but what is needed.
fn git(dir: &Path) -> Command {
    let mut git = Command::new("git");
    git.arg("-C").arg(dir);
    for setting in [
        "user.name=bench",
        "user.email=bench@localhost",
        "gc.auto=0",
        "advice.detachedHead=false",
    ] {
        git.args(["-c", setting]);
    }
    git.env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null");
    git
}
