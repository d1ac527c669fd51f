//! Durable checkpoints, and what it takes to go on from one after the host has ended.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use deltabox::{CheckpointId, Host, HostConfig};

use crate::Options;
use crate::rows::{Rows, Samples};
use crate::workload::{ALL, Running, Workload};

const SUITE: &str = "durable";

/// Files that change between two checkpoints.
const FILES: [u32; 2] = [10, 1000];

/// Measures all cases.
pub(crate) fn run(options: &Options, rows: &mut Rows) -> Result<()> {
    let repetitions = if options.quick { 5 } else { 30 };
    for workload in &ALL {
        for files in FILES {
            let case = format!("{}, {files} files", workload.name);
            if options.wants(&case) {
                eprintln!("{case} ...");
                let measured = Measured::of(workload, files, repetitions, options);
                measured.with_context(|| case.clone())?.tell(&case, rows);
            }
        }
    }
    Ok(())
}

#[derive(Default)]
struct Measured {
    checkpoint: Samples,
    floor: Samples,
    bytes: Samples,
    first: Samples,
    open: Samples,
    read: Samples,
    rollback: Samples,
    delete: Samples,
}

impl Measured {
    fn of(workload: &Workload, files: u32, repetitions: u32, options: &Options) -> Result<Self> {
        let dir = options.temporary_dir()?;
        let open = || {
            Host::open(HostConfig {
                state_dir: dir.path().to_owned(),
                warm: 0,
                ..HostConfig::default()
            })
        };
        let host = open()?;
        let running = workload.start(&host)?;
        running.change_files(files, 0)?;
        let mut measured = Self::default();
        let first = running.sandbox.checkpoint_durable(None)?;
        measured.first.time(first.total);
        let mut known = Vec::new();
        for number in 1..=repetitions {
            known.push((
                number,
                measured.checkpoint(&running, files, number, dir.path())?,
            ));
        }
        let name = running.sandbox.name().to_owned();
        let mut host = Some(host);
        for (number, id) in known.iter().rev().take(3) {
            drop(host.take());
            let begun = Instant::now();
            let opened = open()?;
            measured.open.time(begun.elapsed());
            let begun = Instant::now();
            let sandbox = opened.get(&name)?;
            measured.read.time(begun.elapsed());
            measured.rollback.time(sandbox.rollback(*id)?.total);
            running.fork(sandbox).expect(*number)?;
            host = Some(opened);
        }
        let sandbox = open_sandbox(host.as_ref(), &name)?;
        for (_, id) in known.iter().take(repetitions as usize / 2) {
            let begun = Instant::now();
            sandbox.delete(*id)?;
            measured.delete.time(begun.elapsed());
        }
        Ok(measured)
    }

    fn checkpoint(
        &mut self,
        running: &Running,
        files: u32,
        number: u32,
        state_dir: &Path,
    ) -> Result<CheckpointId> {
        running.change_files(files, number)?;
        running.step(number)?;
        let made = running.sandbox.checkpoint_durable(None)?;
        self.checkpoint.time(made.total);
        let of_sandbox = state_dir.join("checkpoints").join(running.sandbox.name());
        let written = size_of(&of_sandbox.join(made.id.to_string()))?;
        self.bytes.mib(written);
        let begun = Instant::now();
        write_out(state_dir, written)?;
        self.floor.time(begun.elapsed());
        Ok(made.id)
    }

    fn tell(&self, case: &str, rows: &mut Rows) {
        let floor = Some(&self.floor);
        rows.add(
            SUITE,
            case,
            "durable checkpoint",
            "ms",
            &self.checkpoint,
            floor,
        );
        rows.add(SUITE, case, "written", "MiB", &self.bytes, None);
        rows.add(SUITE, case, "the first one", "ms", &self.first, None);
        rows.add(SUITE, case, "restart: open", "ms", &self.open, None);
        rows.add(SUITE, case, "restart: read all", "ms", &self.read, None);
        rows.add(SUITE, case, "restart: rollback", "ms", &self.rollback, None);
        rows.add(
            SUITE,
            case,
            "delete, with one that builds on it",
            "ms",
            &self.delete,
            None,
        );
    }
}

fn open_sandbox(host: Option<&Host>, name: &str) -> Result<std::sync::Arc<deltabox::Sandbox>> {
    Ok(host.context("the host has ended")?.get(name)?)
}

fn size_of(dir: &Path) -> Result<u64> {
    let files = fs::read_dir(dir)?.map(|file| Ok(file?.metadata()?.len()));
    files.sum()
}

/// The least that puts so many bytes on the disk so that a power cut does not undo it: one file, written, flushed, renamed.
fn write_out(dir: &Path, bytes: u64) -> Result<()> {
    let (new, done) = (dir.join("floor.new"), dir.join("floor"));
    let mut file = File::create(&new)?;
    file.write_all(&vec![1; usize::try_from(bytes)?])?;
    file.sync_all()?;
    fs::rename(&new, &done)?;
    File::open(dir)?.sync_all()?;
    Ok(())
}
