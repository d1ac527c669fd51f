//! The commands that ask and print; those that stream are in [`crate::exec`].

use std::io::{self, IsTerminal, Write};

use anyhow::Context;
use deltabox::{ClockOffsets, Host, SandboxInfo, SandboxSpec};
use deltaboxd::api::{CheckpointRequest, ForkRequest, HintRequest};
use deltaboxd::client::{Client, SessionRef};
use serde_json::json;

use crate::args::{Command, Create, Fork, Global, Hint, Kill, LayerCommand, Names};
use crate::failure::Failure;
use crate::{exec, service, show};

/// Runs one command against the service.
pub(crate) async fn run(global: &Global, command: Command) -> Result<u8, Failure> {
    if let Command::Service { command } = &command {
        return service::control(global, command).await;
    }
    let client = service::client(global).await?;
    let json = global.json;
    match command {
        Command::Create(args) => create(&client, json, args).await,
        Command::Exec(args) => exec::exec(&client, json, args).await,
        Command::Shell(args) => exec::shell(&client, json, args).await,
        Command::Attach(args) => exec::attach(&client, json, args).await,
        Command::Logs(args) => exec::logs(&client, json, args).await,
        Command::Kill(args) => kill(&client, args).await,
        Command::Fork(args) => fork(&client, json, args).await,
        Command::Rm(args) => rm(&client, args).await,
        Command::Stop(args) => stop(&client, json, args).await,
        Command::Checkpoint(args) => {
            let request = CheckpointRequest {
                message: args.message,
                durable: args.durable,
            };
            let report = client.checkpoint(&args.name, &request).await?;
            match json {
                true => show::json(&report)?,
                false => show::checkpoint(&report, io::stdout().is_terminal())?,
            }
            Ok(0)
        }
        Command::Rollback(args) => {
            let report = client.rollback(&args.name, args.id).await?;
            match json {
                true => show::json(&report)?,
                false => show::rollback(&args.name, &report)?,
            }
            Ok(0)
        }
        Command::Hint(args) => hint(&client, json, args).await,
        Command::Tree(args) => {
            let tree = client.tree(&args.name).await?;
            match json {
                true => show::json(&tree)?,
                false => show::drawing(&args.name, &tree)?,
            }
            Ok(0)
        }
        Command::Diff(args) => {
            let difference = client.diff(&args.name, args.from, args.to).await?;
            match json {
                true => show::json(&difference)?,
                false => show::difference(&difference)?,
            }
            Ok(0)
        }
        Command::Persist(args) => {
            client.persist(&args.name, args.id).await?;
            Ok(0)
        }
        Command::Delete(args) => {
            client.delete(&args.name, args.id).await?;
            Ok(0)
        }
        Command::Ls => {
            let list = client.sandboxes().await?;
            match json {
                true => show::json(&list)?,
                false => show::sandboxes(&list)?,
            }
            Ok(0)
        }
        Command::Layer { command } => layer(&client, json, command).await,
        Command::Inspect(args) => inspect(&client, json, &args.name).await,
        Command::Demo(_) | Command::Doctor | Command::Service { .. } => {
            unreachable!("these need no service and are run before")
        }
    }
}

/// Needs neither a service nor a state directory.
pub(crate) fn doctor(json: bool) -> Result<u8, Failure> {
    let features = Host::doctor();
    match json {
        true => show::json(&features)?,
        false => show::features(&features)?,
    }
    let usable = features.iter().all(|f| f.present || !f.required);
    Ok(if usable { 0 } else { 1 })
}

async fn create(client: &Client, json: bool, args: Create) -> Result<u8, Failure> {
    let base = std::path::absolute(&args.base)
        .with_context(|| format!("the base directory {:?}", args.base))?;
    let spec = SandboxSpec {
        name: args.name,
        base,
        memory: args.memory,
        pids: args.pids,
        cpus: args.cpus,
        hostname: args.hostname,
        disk: args.disk,
        inodes: args.inodes,
        time_namespace: args.time_namespace.then(ClockOffsets::default),
    };
    let sandbox = client.create(&spec).await?;
    for warning in &sandbox.warnings {
        show::note(warning);
    }
    show::say(json, &sandbox, || sandbox.name.clone())?;
    Ok(0)
}

async fn fork(client: &Client, json: bool, args: Fork) -> Result<u8, Failure> {
    let request = ForkRequest {
        checkpoint: args.source.checkpoint,
        n: args.n,
        names: args.names,
        seed_rng: args.seed_rng,
    };
    let forks = client.fork(&args.source.name, &request).await?;
    show::say(json, &forks, || names(&forks))?;
    Ok(0)
}

async fn hint(client: &Client, json: bool, args: Hint) -> Result<u8, Failure> {
    let request = HintRequest {
        pin: (args.pin || args.unpin).then_some(args.pin),
        forks: args.forks,
    };
    let report = client.hint(&args.name, args.id, &request).await?;
    show::say(json, &report, || match report.template {
        true => "its forks share memory".into(),
        false => "its forks share no memory yet".into(),
    })?;
    Ok(0)
}

fn names(sandboxes: &[SandboxInfo]) -> String {
    let names: Vec<_> = sandboxes.iter().map(|s| s.name.as_str()).collect();
    names.join("\n")
}

async fn inspect(client: &Client, json: bool, name: &str) -> Result<u8, Failure> {
    let sandbox = client.sandbox(name).await?;
    let sessions = client.sessions(name).await?;
    let ready = client.ready().await?;
    match json {
        true => {
            show::json(&json!({ "sandbox": sandbox, "sessions": sessions, "ready": ready }))?;
        }
        false => show::inspect(&sandbox, &sessions, &ready)?,
    }
    Ok(0)
}

async fn layer(client: &Client, json: bool, command: LayerCommand) -> Result<u8, Failure> {
    let (of, verify) = match command {
        LayerCommand::Ls(of) => (of, false),
        LayerCommand::Verify(of) => (of, true),
    };
    let layers = client.layers(of.name.as_deref(), verify).await?;
    match json {
        true => show::json(&layers)?,
        false => show::layers(&layers)?,
    }
    let damaged = layers.iter().any(|layer| layer.damage.is_some());
    Ok(if damaged { 1 } else { 0 })
}

/// All are tried; the failures are told one by one.
async fn rm(client: &Client, args: Names) -> Result<u8, Failure> {
    let mut code = 0;
    for name in &args.names {
        if let Err(why) = client.remove(name).await {
            code = Failure::from(why).report(false);
        }
    }
    match code {
        0 => Ok(0),
        code => Err(Failure::Told(code)),
    }
}

async fn stop(client: &Client, json: bool, args: Names) -> Result<u8, Failure> {
    for name in &args.names {
        let sandbox = client.stop(name).await?;
        if json {
            show::json(&sandbox)?;
        }
    }
    io::stdout().flush()?;
    Ok(0)
}

async fn kill(client: &Client, args: Kill) -> Result<u8, Failure> {
    let session = SessionRef {
        sandbox: args.name,
        id: args.session,
        epoch: None,
    };
    match args.signal {
        Some(signal) => client.signal(&session, signal).await?,
        None => client.kill(&session).await?,
    }
    Ok(0)
}
