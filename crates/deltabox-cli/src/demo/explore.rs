//! The search with DeltaBox: every node a checkpoint, every move a rollback, every rollback verified.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use deltabox::{CheckpointId, CheckpointReport, Host, Sandbox};
use indicatif::ProgressBar;

use super::actions::{Action, Task};
use super::figures::Times;
use super::record::Record;
use super::talk::check_interrupt;
use super::uct::Search;
use super::world::World;

/// What the search found, and what it took.
pub(super) struct Explored {
    pub(super) search: Search<Action>,
    ids: Vec<CheckpointId>,
    records: Vec<Record>,
    pub(super) stops: Times,
    pub(super) checkpoints: Times,
    pub(super) rollbacks: Times,
    pub(super) forks: Times,
    /// Each verification that failed, in words.
    pub(super) wrong: Vec<String>,
    /// Rollbacks and forks that were to be verified.
    pub(super) asked: usize,
    /// Those whose state was what it had to be.
    pub(super) right: usize,
    /// Rollbacks that had to build the whole tree again, and why.
    pub(super) fallbacks: Vec<String>,
}

/// Grows the tree to `nodes` nodes.
pub(super) fn explore(
    world: &World,
    task: &Task<'_>,
    nodes: usize,
    seed: u64,
    bar: &ProgressBar,
) -> Result<Explored> {
    let score = task.score(world)?;
    let mut explored = Explored {
        search: Search::new(seed, score, task.first()),
        ids: Vec::new(),
        records: Vec::new(),
        stops: Times::default(),
        checkpoints: Times::default(),
        rollbacks: Times::default(),
        forks: Times::default(),
        wrong: Vec::new(),
        asked: 0,
        right: 0,
        fallbacks: Vec::new(),
    };
    explored.keep(world, task, "the broken project")?;
    bar.inc(1);
    while explored.search.nodes.len() < nodes {
        check_interrupt()?;
        let Some((parent, action)) = explored.search.select() else {
            break;
        };
        let node = explored.search.nodes.len();
        bar.set_message(format!("node {node}: back to node {parent}"));
        explored.go_back(world, task, parent)?;
        bar.set_message(format!("node {node}: {}", action.describe()));
        task.act(world, &action, node as u64)?;
        let score = task.score(world)?;
        let untried = task.untried(&explored.search, parent, &action);
        explored.keep(world, task, &action.describe())?;
        explored.search.add(parent, action, score, untried);
        bar.inc(1);
    }
    Ok(explored)
}

impl Explored {
    /// Checkpoints the present state as the next node, and writes down what it is.
    fn keep(&mut self, world: &World, task: &Task<'_>, message: &str) -> Result<()> {
        let report: CheckpointReport = world
            .sandbox
            .checkpoint(Some(message.to_owned()))
            .with_context(|| format!("checkpointing node {}", self.ids.len()))?;
        self.stops.add(report.stop);
        self.checkpoints.add(report.total);
        self.ids.push(report.id);
        let record = Record::take(world, task.project).context("recording the state")?;
        self.records.push(record);
        Ok(())
    }

    fn go_back(&mut self, world: &World, task: &Task<'_>, node: usize) -> Result<()> {
        let id = self.ids[node];
        let report = world
            .sandbox
            .rollback(id)
            .with_context(|| format!("rolling back to node {node} ({id})"))?;
        self.rollbacks.add(report.total);
        self.fallbacks.extend(
            report
                .fallback
                .map(|why| format!("to node {node} ({id}): {why}")),
        );
        self.verify(
            world,
            task,
            node,
            &format!("rollback to node {node} ({id})"),
        )
    }

    fn verify(&mut self, world: &World, task: &Task<'_>, node: usize, what: &str) -> Result<()> {
        self.asked += 1;
        let now = Record::take(world, task.project).with_context(|| format!("after the {what}"))?;
        let differences = self.records[node].differences(&now);
        match differences.is_empty() {
            true => self.right += 1,
            false => self
                .wrong
                .push(format!("{what}: {}", differences.join("; "))),
        }
        Ok(())
    }

    /// Forks the best node `n` ways, verifies each while all of them run, and removes them.
    pub(super) fn fork_best(
        &mut self,
        host: &Host,
        world: &World,
        task: &Task<'_>,
        n: usize,
        bar: &ProgressBar,
    ) -> Result<()> {
        let best = self.search.best();
        let id = self.ids[best];
        let mut forks = Vec::new();
        for i in 1..=n {
            check_interrupt()?;
            bar.set_message(format!("fork {i} of {n}"));
            match self.fork(host, world, id) {
                Ok(fork) => forks.push(fork),
                Err(why) => {
                    self.asked += 1;
                    self.wrong.push(format!("{why:#}"));
                }
            }
        }
        for (i, fork) in forks.iter().enumerate() {
            check_interrupt()?;
            bar.set_message(format!("verifying fork {} of {n}", i + 1));
            let what = format!("fork {} ({}) of node {best} ({id})", i + 1, fork.name());
            if let Err(why) = self.verify(&world.in_fork(fork.clone()), task, best, &what) {
                self.wrong.push(format!("{why:#}"));
            }
            bar.inc(1);
        }
        for fork in &forks {
            host.remove(fork.name())?;
        }
        Ok(())
    }

    fn fork(&mut self, host: &Host, world: &World, id: CheckpointId) -> Result<Arc<Sandbox>> {
        let begun = Instant::now();
        let forks = host
            .fork(world.sandbox.name(), Some(id), 1, &[])
            .with_context(|| format!("forking {id}"))?;
        self.forks.add(begun.elapsed());
        forks.into_iter().next().context("a fork made no sandbox")
    }

    /// Paths in the tree that was searched.
    pub(super) fn files(&self) -> usize {
        self.records.first().map_or(0, Record::files)
    }

    /// All that DeltaBox did for the search: checkpoints and rollbacks.
    pub(super) fn state_time(&self) -> Duration {
        self.checkpoints.total() + self.rollbacks.total()
    }
}
