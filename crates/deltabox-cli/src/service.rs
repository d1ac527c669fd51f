//! The service, as commands need it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use deltaboxd::client::{Client, start};

use crate::args::{Global, Ready, ServiceCommand};
use crate::failure::Failure;
use crate::show;
use crate::units::{age, visible};

/// A client of the service, which is started if none runs.
pub(crate) async fn client(global: &Global) -> Result<Client, Failure> {
    let state_dir = absolute(&global.state_dir)?;
    let program = std::env::current_exe().context("our own program is not found")?;
    let mut command = Command::new(program);
    command.arg("--state-dir").arg(&state_dir);
    command.args(["service", "run", "--background"]);
    let started = start::ensure(&state_dir, command).await?;
    for line in started.new.iter().flat_map(|service| &service.cleaned_up) {
        eprintln!("deltabox: {}", visible(line));
    }
    Ok(started.client)
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    let path = std::path::absolute(path).with_context(|| format!("the path {path:?}"))?;
    Ok(path)
}

/// Hosts the sandboxes until it is told to stop.
pub(crate) fn run(state_dir: &Path, background: bool, ready: &Ready) -> Result<u8, Failure> {
    if background {
        // Fails only where we lead a process group already, and so are out of our starter's.
        let _ = rustix::process::setsid();
    }
    let filter = tracing_subscriber::EnvFilter::try_from_env("DELTABOX_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    deltaboxd::server::run(ready.config(absolute(state_dir)?))?;
    Ok(0)
}

/// `service status` and `service stop`, which do not start one.
pub(crate) async fn control(global: &Global, command: &ServiceCommand) -> Result<u8, Failure> {
    let state_dir = absolute(&global.state_dir)?;
    match command {
        ServiceCommand::Stop => {
            let stopped = start::stop(&state_dir).await?;
            show::say(
                global.json,
                &serde_json::json!({ "stopped": stopped }),
                || match stopped {
                    true => "stopped".into(),
                    false => "no service runs".into(),
                },
            )?;
            Ok(0)
        }
        _ => status(global, &Client::new(&state_dir)).await,
    }
}

async fn status(global: &Global, client: &Client) -> Result<u8, Failure> {
    let info = match client.version().await {
        Ok(info) => info,
        Err(deltaboxd::client::Error::Connect { path, source }) => {
            let why = format!("no service answers at {}: {source}", path.display());
            show::say(
                global.json,
                &serde_json::json!({ "running": false }),
                || why,
            )?;
            return Ok(1);
        }
        Err(other) => return Err(other.into()),
    };
    let sandboxes = client.sandboxes().await?.len();
    if global.json {
        let mut value = serde_json::to_value(&info)?;
        value["running"] = true.into();
        value["sandboxes"] = sandboxes.into();
        show::json(&value)?;
        return Ok(0);
    }
    let mut out = std::io::stdout().lock();
    let since = age(show::now(), info.started);
    writeln!(
        out,
        "running: process {}, version {}",
        info.pid, info.version
    )?;
    writeln!(out, "state:   {}", info.state_dir.display())?;
    writeln!(out, "started: {since}, sandboxes: {sandboxes}")?;
    Ok(0)
}
