//! `deltabox demo`: a tree search over a real project, files and live processes included, with every rollback verified.

mod actions;
mod copies;
mod explore;
mod figures;
mod instance;
mod project;
mod record;
mod talk;
mod uct;
mod world;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use deltabox::{Host, HostConfig, SandboxSpec};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::failure::Failure;
use crate::show;
use crate::units::time;
use actions::Task;
use copies::Copies;
use explore::Explored;
use figures::{Row, Summary};
use instance::Instance;
use project::{Project, Python};
use world::{Place, World};

/// How many forks of the best node are made.
const FORKS: usize = 8;

/// The options of `deltabox demo`.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Search with the recorded commands of a SWE-bench instance, by number (from 0 on) or id
    #[arg(long, value_name = "FILE[:INDEX|:ID]")]
    instance: Option<String>,
    /// States to reach
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=2000))]
    nodes: u16,
    /// Another seed gives another search
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Work on Python's standard library, which needs no download
    #[arg(long, conflicts_with = "instance")]
    offline: bool,
    /// Leave out the same search with full copies, which takes most of the time
    #[arg(long)]
    no_copies: bool,
}

/// What the demo reports.
#[derive(Serialize)]
struct Report {
    project: String,
    files: usize,
    nodes: usize,
    deepest: usize,
    first_score: f64,
    best_score: f64,
    /// Rollbacks and forks to verify, and those that were right.
    asked: usize,
    right: usize,
    wrong: Vec<String>,
    fallbacks: Vec<String>,
    rows: Vec<Row>,
    /// Seconds that checkpoints and rollbacks took together.
    state_seconds: f64,
    /// The same with full copies.
    copies_state_seconds: Option<f64>,
    /// `cp -a` of the work tree on the host's own filesystem.
    copy_outside: Option<Summary>,
    /// Seconds of the whole demo.
    seconds: f64,
}

/// Runs the demo in a state directory of its own beside `state_dir`; fails if any verification does.
pub(crate) fn demo(state_dir: &Path, json: bool, options: Demo) -> Result<u8, Failure> {
    let python = Python::find()?;
    let project = match &options.instance {
        Some(text) => Project::recorded(Instance::read(text)?, &python)?,
        None => {
            let (project, why) = Project::open(&python, options.offline);
            if let Some(why) = why {
                show::note(&format!(
                    "Django cannot be had ({why:#}); the standard library serves instead"
                ));
            }
            project
        }
    };
    let report = perform(state_dir, &project, &python, &options)?;
    match json {
        true => show::json(&report)?,
        false => tell(&report)?,
    }
    for wrong in &report.wrong {
        show::note(wrong);
    }
    Ok(if report.wrong.is_empty() { 0 } else { 1 })
}

fn perform(state_dir: &Path, project: &Project, python: &Python, options: &Demo) -> Result<Report> {
    let begun = Instant::now();
    let stage = Stage::open(state_dir)?;
    watch_for_interrupts();
    let nodes = usize::from(options.nodes);
    let bar = progress(nodes + FORKS, options.no_copies);
    bar.set_message(format!("unpacking {}", project.title));
    let world = stage.furnish("demo", project, python)?;
    bar.set_message("looking for defects that the tests notice");
    let task = Task::prepare(&world, project, options.seed).context("breaking the project")?;
    let mut explored = explore::explore(&world, &task, nodes, options.seed, &bar)?;
    explored.fork_best(&stage.host, &world, &task, FORKS, &bar)?;
    stage.host.remove("demo")?;
    let copies = match options.no_copies {
        true => None,
        false => {
            bar.set_message("full copies: unpacking");
            let world = stage.furnish("copies", project, python)?;
            task.spoil(&world)?;
            let mut copies = Copies {
                outside: copies::outside(project, &stage.dir)?,
                ..Copies::default()
            };
            copies.repeat(world, &task, &explored.search, FORKS, &bar)?;
            Some(copies)
        }
    };
    bar.finish_and_clear();
    Ok(report(project, explored, copies, begun.elapsed()))
}

fn report(
    project: &Project,
    explored: Explored,
    copies: Option<Copies>,
    elapsed: Duration,
) -> Report {
    let search = &explored.search;
    let other = |of: fn(&Copies) -> &figures::Times| copies.as_ref().map(of);
    let rows = vec![
        Row::new(
            "checkpoint stop",
            &explored.stops,
            other(|c| &c.checkpoints),
        ),
        Row::new(
            "checkpoint",
            &explored.checkpoints,
            other(|c| &c.checkpoints),
        ),
        Row::new("rollback", &explored.rollbacks, other(|c| &c.rollbacks)),
        Row::new("fork", &explored.forks, other(|c| &c.forks)),
    ];
    Report {
        project: project.title.clone(),
        files: explored.files(),
        nodes: search.nodes.len(),
        deepest: search.nodes.iter().map(|n| n.depth).max().unwrap_or(0),
        first_score: search.nodes[0].score,
        best_score: search.nodes[search.best()].score,
        asked: explored.asked,
        right: explored.right,
        rows,
        state_seconds: explored.state_time().as_secs_f64(),
        copy_outside: copies.as_ref().and_then(|c| c.outside.summary()),
        copies_state_seconds: copies.map(|c| c.state_time().as_secs_f64()),
        seconds: elapsed.as_secs_f64(),
        wrong: explored.wrong,
        fallbacks: explored.fallbacks,
    }
}

fn tell(report: &Report) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let percent = |score: f64| score * 100.0;
    writeln!(
        out,
        "{}: {} paths; {} states searched, {} deep; tests passing: {:.0}% at first, {:.0}% at best",
        report.project,
        report.files,
        report.nodes,
        report.deepest,
        percent(report.first_score),
        percent(report.best_score),
    )?;
    writeln!(
        out,
        "{} of {} rollbacks and forks were, by an independent record, exactly what they had to be",
        report.right, report.asked
    )?;
    for why in &report.fallbacks {
        writeln!(out, "built again from the store: {why}")?;
    }
    writeln!(out, "\n{}", figures::table(&report.rows))?;
    let seconds = |s: f64| time(Duration::from_secs_f64(s));
    let ours = seconds(report.state_seconds);
    match report.copies_state_seconds {
        Some(copies) => writeln!(
            out,
            "all checkpoints and rollbacks of the search: {ours}; with full copies {} ({:.0}x)",
            seconds(copies),
            copies / report.state_seconds
        )?,
        None => writeln!(out, "all checkpoints and rollbacks of the search: {ours}")?,
    }
    if let Some(outside) = &report.copy_outside {
        writeln!(
            out,
            "the copies were made in a sandbox; cp -a of the tree on the host's own filesystem: {}",
            seconds(outside.p50)
        )?;
    }
    Ok(())
}

/// The host of the demo's sandboxes; ends them and removes its directory when it goes.
struct Stage {
    host: Host,
    dir: PathBuf,
}

impl Stage {
    /// A fixed place, so that the next demo cleans up after one that was killed.
    fn open(state_dir: &Path) -> Result<Self> {
        let name = state_dir
            .file_name()
            .context("the state directory is the root")?;
        let mut name = name.to_owned();
        name.push("-demo");
        let dir = state_dir.with_file_name(name);
        let host = Host::open(HostConfig {
            state_dir: dir.clone(),
            ..HostConfig::default()
        })?;
        for what in host.cleaned_up() {
            show::note(what);
        }
        Ok(Self { host, dir })
    }

    /// A sandbox with the project unpacked and its processes started.
    fn furnish(&self, name: &str, project: &Project, python: &Python) -> Result<World> {
        let sandbox = self.host.create(SandboxSpec {
            name: Some(name.into()),
            ..SandboxSpec::default()
        })?;
        let place = Place::usual();
        world::furnish(&sandbox, &place, project, python).context("setting the sandbox up")?;
        World::start(&sandbox, &place).context("starting the processes")
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.host.shutdown();
        if let Err(why) = std::fs::remove_dir_all(&self.dir) {
            show::note(&format!("{:?} could not be removed: {why}", self.dir));
        }
    }
}

/// The first Ctrl-C ends the demo in order, the second at once.
fn watch_for_interrupts() {
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async {
            if tokio::signal::ctrl_c().await.is_ok() {
                talk::interrupt();
                show::note("ending; once more to end at once");
            }
            if tokio::signal::ctrl_c().await.is_ok() {
                std::process::exit(130);
            }
        });
    });
}

/// Hidden where standard error is no terminal.
fn progress(steps: usize, no_copies: bool) -> ProgressBar {
    let steps = if no_copies { steps } else { 2 * steps - 1 };
    let bar = ProgressBar::new(steps as u64);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {wide_msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
