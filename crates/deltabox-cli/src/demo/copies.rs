//! The same search without DeltaBox: a node is a copy of the tree, and going back is to restore it, to start the
//! processes again and to repeat what made their state.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use deltabox::Sandbox;
use indicatif::ProgressBar;

use super::actions::{Action, Task};
use super::figures::Times;
use super::project::Project;
use super::talk::check_interrupt;
use super::uct::Search;
use super::world::{Place, World, sh, unpack_outside};

/// Copies made on the host's own filesystem.
const OUTSIDE: usize = 3;

/// What it took.
#[derive(Default)]
pub(super) struct Copies {
    pub(super) checkpoints: Times,
    pub(super) rollbacks: Times,
    pub(super) forks: Times,
    /// Copies of the tree alone, on the host's own filesystem.
    pub(super) outside: Times,
}

impl Copies {
    /// Takes the steps of a search again, in their order, in a world that was prepared in the same way.
    pub(super) fn repeat(
        &mut self,
        mut world: World,
        task: &Task<'_>,
        search: &Search<Action>,
        forks: usize,
        bar: &ProgressBar,
    ) -> Result<()> {
        let (sandbox, place) = (world.sandbox.clone(), world.place.clone());
        task.score(&world)?;
        self.keep(&world, 0)?;
        for (number, node) in search.nodes.iter().enumerate().skip(1) {
            check_interrupt()?;
            bar.set_message(format!("full copies: node {number}"));
            let (Some(parent), Some(action)) = (node.parent, &node.action) else {
                continue;
            };
            let begun = Instant::now();
            world.end()?;
            sh(&sandbox, &["rm -rf $0", &place.work], None)?;
            world = revive(&sandbox, &place, search, parent)?;
            self.rollbacks.add(begun.elapsed());
            task.act(&world, action, number as u64)?;
            task.score(&world)?;
            self.keep(&world, number)?;
            bar.inc(1);
        }
        let best = search.best();
        for i in 1..=forks {
            check_interrupt()?;
            bar.set_message(format!("full copies: fork {i} of {forks}"));
            let place = Place {
                work: format!("/forks/{i}"),
                port: place.port + i as u16,
            };
            let begun = Instant::now();
            revive(&sandbox, &place, search, best)?;
            self.forks.add(begun.elapsed());
            bar.inc(1);
        }
        Ok(())
    }

    fn keep(&mut self, world: &World, node: usize) -> Result<()> {
        let begun = Instant::now();
        let copy = "mkdir -p /copies && cp -a $0 /copies/$1";
        sh(
            &world.sandbox,
            &[copy, &world.place.work, &node.to_string()],
            None,
        )?;
        self.checkpoints.add(begun.elapsed());
        Ok(())
    }

    /// All that was done to keep and restore states during the search.
    pub(super) fn state_time(&self) -> Duration {
        self.checkpoints.total() + self.rollbacks.total()
    }
}

/// Makes the state of a node out of its copy.
fn revive(
    sandbox: &Arc<Sandbox>,
    place: &Place,
    search: &Search<Action>,
    node: usize,
) -> Result<World> {
    let copy = "mkdir -p /forks && cp -a /copies/$1 $0";
    sh(sandbox, &[copy, &place.work, &node.to_string()], None)?;
    let world = World::start(sandbox, place)?;
    for step in search.path(node).into_iter().skip(1) {
        world.live(step as u64)?;
    }
    Ok(world)
}

/// What a copy of the unpacked project takes on the host's own filesystem, below `dir`.
pub(super) fn outside(project: &Project, dir: &Path) -> Result<Times> {
    let dir = tempfile::Builder::new().prefix("copies-").tempdir_in(dir);
    let dir = dir.context("making a directory for copies")?;
    let from = dir.path().join("tree");
    std::fs::create_dir(&from)?;
    unpack_outside(project, &from)?;
    let mut times = Times::default();
    for i in 0..OUTSIDE {
        let begun = Instant::now();
        let mut copy = Command::new("cp");
        copy.arg("-a")
            .arg(&from)
            .arg(dir.path().join(i.to_string()));
        let status = copy.status().context("running cp")?;
        times.add(begun.elapsed());
        ensure!(status.success(), "cp -a of {from:?} failed: {status}");
    }
    Ok(times)
}
