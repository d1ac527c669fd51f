//! `deltabox-bench`: what DeltaBox's operations cost, beside the least that the kernel lets them cost.
//!
//! See `docs/benchmarks.md` for what each row means.

mod dialogue;
mod floor;
mod operation;
mod processes;
mod rows;
mod stage;
mod suites;
mod sys;
mod workload;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use rows::Rows;
use tempfile::TempDir;

/// Checkpoints and rollbacks make and drop many small things while programs stand still.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures DeltaBox on this machine. Needs root.
#[derive(Debug, Parser)]
#[command(name = "deltabox-bench", version)]
struct Cli {
    /// Fewer repetitions, for a first look
    #[arg(long, global = true)]
    quick: bool,
    /// Also write the rows to a file, as a JSON array
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only cases whose name contains this
    #[arg(long, global = true, value_name = "TEXT")]
    case: Option<String>,
    /// Where the state of the sandboxes is kept while they are measured; a temporary directory if absent
    #[arg(long, global = true, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Debug, Subcommand)]
enum Suite {
    /// Checkpoint and rollback
    Cr,
    /// Durable checkpoints, and restarts
    Durable,
    /// Forks
    Fork,
    /// Many sandboxes alive at the same time
    Many,
    /// Steps that write to much memory
    Large,
    /// DeltaFS beside overlayfs
    Fs,
    /// Many threads, descriptors, mappings and processes
    Scale,
}

/// What all suites are told.
struct Options {
    quick: bool,
    case: Option<String>,
    state_dir: Option<PathBuf>,
}

impl Options {
    /// Whether a case was asked for.
    fn wants(&self, case: &str) -> bool {
        self.case.as_deref().is_none_or(|text| case.contains(text))
    }

    /// A directory that is removed at the end.
    fn temporary_dir(&self) -> Result<TempDir> {
        let mut name = tempfile::Builder::new();
        name.prefix("deltabox-bench-");
        match &self.state_dir {
            Some(parent) => name.tempdir_in(parent),
            None => name.tempdir(),
        }
        .context("making a temporary directory")
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let options = Options {
        quick: cli.quick,
        case: cli.case,
        state_dir: cli.state_dir,
    };
    let mut rows = Rows::default();
    match cli.suite {
        Suite::Cr => suites::cr::run(&options, &mut rows)?,
        Suite::Durable => suites::durable::run(&options, &mut rows)?,
        Suite::Fork => suites::fork::run(&options, &mut rows)?,
        Suite::Large => suites::large::run(&options, &mut rows)?,
        Suite::Scale => suites::scale::run(&options, &mut rows)?,
        Suite::Many => suites::many::run(&options, &mut rows)?,
        Suite::Fs => suites::fs::run_suite(&options, &mut rows)?,
    }
    println!("{}", rows.table());
    if let Some(path) = cli.json {
        let text = serde_json::to_string_pretty(&rows)?;
        fs::write(&path, text).with_context(|| format!("writing the rows to {path:?}"))?;
    }
    Ok(())
}
