//! Checkpoints and rollbacks of a volume, by the number of files changed and the depth of the chain of checkpoints.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use deltafs::{InUse, Snapshot, Volume};

use super::SUITE;
use super::sites::{Ground, Kind, Site};
use crate::Options;
use crate::rows::{Rows, Samples};

/// Files of each directory.
const PER_DIRECTORY: u32 = 100;

/// What a step does to each of its files.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Overwrite,
    Lengthen,
    Delete,
}

/// Measures all cases.
pub(super) fn run(options: &Options, dir: &Path, rows: &mut Rows) -> Result<()> {
    for files in [10, 100_000] {
        let name = format!("checkpoint, {files} files changed");
        if options.wants(&name) {
            eprintln!("{name} ...");
            checkpoint(options, dir, files, &name, rows)?;
        }
    }
    for depth in [1, 1_000] {
        for (step, what) in [
            (Step::Overwrite, "overwritten"),
            (Step::Lengthen, "lengthened"),
            (Step::Delete, "deleted"),
        ] {
            for files in [10, 10_000] {
                let name = format!("rollback, {files} files {what}, depth {depth}");
                if options.wants(&name) && (depth == 1 || step == Step::Overwrite) {
                    eprintln!("{name} ...");
                    Case { files, depth, step }.measure(options, dir, &name, rows)?;
                }
            }
        }
    }
    Ok(())
}

fn repetitions(options: &Options, files: u32) -> u32 {
    match (options.quick, files > 1000) {
        (true, true) => 3,
        (true, false) => 10,
        (false, true) => 10,
        (false, false) => 50,
    }
}

fn open(dir: &Path) -> Result<Site> {
    let base = dir.join("empty");
    if !base.exists() {
        fs::create_dir(&base)?;
    }
    let ground = Ground {
        base: &base,
        dir,
        answers: None,
    };
    Site::open(Kind::Delta, &ground, false)
}

fn path(site: &Site, file: u32) -> std::path::PathBuf {
    let dir = file / PER_DIRECTORY;
    site.root().join(format!("{dir}/{file}"))
}

fn write_all(site: &Site, files: u32, text: &str) -> Result<()> {
    for file in 0..files {
        let path = path(site, file);
        if file.is_multiple_of(PER_DIRECTORY)
            && let Some(dir) = path.parent()
        {
            fs::create_dir_all(dir)?;
        }
        fs::write(path, text)?;
    }
    Ok(())
}

fn checkpoint(
    options: &Options,
    dir: &Path,
    files: u32,
    name: &str,
    rows: &mut Rows,
) -> Result<()> {
    let site = open(dir)?;
    let (mut cut, mut flushed) = (Samples::default(), Samples::default());
    for _ in 0..repetitions(options, files) {
        write_all(&site, files, "a few bytes")?;
        let begun = Instant::now();
        site.volume()?.sync()?;
        flushed.time(begun.elapsed());
        let begun = Instant::now();
        let snapshot = site.volume()?.checkpoint();
        cut.time(begun.elapsed());
        drop(snapshot);
    }
    rows.add(SUITE, name, "flush", "ms", &flushed, None);
    rows.add(SUITE, name, "checkpoint", "ms", &cut, None);
    Ok(())
}

struct Case {
    files: u32,
    depth: u32,
    step: Step,
}

impl Case {
    fn measure(&self, options: &Options, dir: &Path, name: &str, rows: &mut Rows) -> Result<()> {
        let site = open(dir)?;
        write_all(&site, self.files, "first")?;
        let mut chain: Vec<Snapshot> = Vec::new();
        for _ in 1..self.depth {
            fs::write(site.root().join("counter"), chain.len().to_string())?;
            chain.push(site.volume()?.checkpoint());
        }
        let target = site.volume()?.checkpoint();
        let (mut switch, mut look) = (Samples::default(), Samples::default());
        for _ in 0..repetitions(options, self.files) {
            self.step(&site)?;
            let begun = Instant::now();
            // Nothing has any of the files open.
            let held = InUse::default;
            let volume = site.volume()?;
            volume.rollback_sparing(&target, Volume::FEW, held)?;
            switch.time(begun.elapsed());
            look.time(self.look(&site)?);
        }
        rows.add(SUITE, name, "rollback", "ms", &switch, None);
        rows.add(
            SUITE,
            name,
            "first look at the files after it",
            "ms",
            &look,
            None,
        );
        Ok(())
    }

    fn step(&self, site: &Site) -> Result<()> {
        match self.step {
            Step::Overwrite => write_all(site, self.files, "other"),
            Step::Lengthen => write_all(site, self.files, "other, and longer"),
            Step::Delete => {
                for file in 0..self.files {
                    fs::remove_file(path(site, file))?;
                }
                Ok(())
            }
        }
    }

    /// Asks for the size of every file that the step changed, as the program inside might.
    fn look(&self, site: &Site) -> Result<Duration> {
        let begun = Instant::now();
        for file in 0..self.files {
            let found = fs::metadata(path(site, file))?.len();
            ensure!(
                found == 5,
                "file {file} has {found} bytes after the rollback"
            );
        }
        Ok(begun.elapsed())
    }
}
