//! `deltabox`: sandboxes for agents from the command line.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage; `exec` and its like give the command's own.

mod args;
mod commands;
mod demo;
mod exec;
mod failure;
mod output;
mod service;
mod show;
mod terminal;
mod tree;
mod units;

use std::process::ExitCode;

use args::{Cli, Command, ServiceCommand};
use clap::Parser;
use failure::Failure;

/// Checkpoints and rollbacks make and drop many small things while programs stand still.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.global.json;
    match run(cli) {
        Ok(code) => exit(code),
        Err(failure) => exit(failure.report(json)),
    }
}

/// Leaves at once: a thread may still wait for standard input, which nobody will type any more.
fn exit(code: u8) -> ExitCode {
    std::process::exit(code.into())
}

fn run(cli: Cli) -> Result<u8, Failure> {
    let Cli { global, command } = cli;
    match command {
        Command::Doctor => commands::doctor(global.json),
        Command::Demo(options) => demo::demo(&global.state_dir, global.json, options),
        Command::Service {
            command: ServiceCommand::Run { background, ready },
        } => service::run(&global.state_dir, background, &ready),
        command => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(commands::run(&global, command)),
    }
}
