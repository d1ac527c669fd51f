//! The command line.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use deltabox::{CheckpointId, HostConfig, SessionId};

use crate::units::{parse_duration, parse_size};

/// Sandboxes whose whole state (files, processes, memory, sessions) can be checkpointed, rolled back and forked.
#[derive(Debug, Parser)]
#[command(name = "deltabox", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Write JSON instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Where the service keeps its state and its socket
    #[arg(
        long,
        global = true,
        env = "DELTABOX_STATE_DIR",
        default_value = "/var/lib/deltabox",
        value_name = "DIR"
    )]
    pub(crate) state_dir: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a sandbox and print its name
    Create(Create),
    /// Run a command in a sandbox; the exit code is the command's
    Exec(Exec),
    /// Open a shell in a sandbox
    Shell(Shell),
    /// Follow a session that runs already: its output so far, then live
    Attach(Attach),
    /// Print what a session has written
    Logs(Logs),
    /// Kill a session's command and all its descendants, or signal its process group
    Kill(Kill),
    /// Checkpoint a sandbox and print the checkpoint's id
    Checkpoint(Checkpoint),
    /// Make a checkpoint durable that was made without; waits until it is on disk
    Persist(NameAndId),
    /// Give a sandbox the state of a checkpoint back
    Rollback(NameAndId),
    /// Make new sandboxes with the state of one, and print their names
    Fork(Fork),
    /// Say what is known of the forks of a checkpoint to come
    Hint(Hint),
    /// Draw a sandbox's checkpoints
    Tree(Name),
    /// Show which files and processes differ between two checkpoints
    Diff(Diff),
    /// Forget a checkpoint; its children become its parent's
    Delete(NameAndId),
    /// List the sandboxes
    Ls,
    /// Show a sandbox and its sessions
    Inspect(Name),
    /// End sandboxes and remove all that belongs to them
    Rm(Names),
    /// End the processes of sandboxes; a rollback makes them run again
    Stop(Names),
    /// Durable checkpoints as they are on disk
    Layer {
        #[command(subcommand)]
        command: LayerCommand,
    },
    /// Say which kernel features are there, and what to do about those that are not
    Doctor,
    /// Search a tree of states of a real project, verify every rollback, and measure
    Demo(crate::demo::Demo),
    /// The service that hosts the sandboxes; other commands start it when none runs
    Service {
        #[command(subcommand)]
        command: ServiceCommand,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum LayerCommand {
    /// List them, with what they take on disk
    Ls(Sandbox),
    /// Read and check every byte of them; the exit code is 1 if one is damaged
    Verify(Sandbox),
}

#[derive(Debug, Args)]
pub(crate) struct Sandbox {
    /// Those of this sandbox only
    pub(crate) name: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServiceCommand {
    /// Host the sandboxes in the foreground until SIGTERM or `service stop`
    Run {
        /// In a session of its own, as other commands start it
        #[arg(long, hide = true)]
        background: bool,
        #[command(flatten)]
        ready: Ready,
    },
    /// Say whether the service runs
    Status,
    /// End all sandboxes, then the service
    Stop,
}

/// What is kept ready for forks. A service that other commands start takes it from the environment.
#[derive(Debug, Args)]
pub(crate) struct Ready {
    /// The most blank sandboxes that are kept ready; 0 keeps none
    #[arg(long, env = "DELTABOX_WARM", value_name = "N")]
    warm: Option<usize>,
    /// The most templates, which hold the memory of checkpoints for their forks to share; 0 keeps none
    #[arg(long, env = "DELTABOX_TEMPLATES", value_name = "N")]
    templates: Option<usize>,
    /// The most memory that templates may hold together, as 512M or 4G
    #[arg(long, env = "DELTABOX_TEMPLATE_MEMORY", value_parser = parse_size, value_name = "SIZE")]
    template_memory: Option<u64>,
    /// Whether processes of forks that are likely are born in advance
    #[arg(long, env = "DELTABOX_EARLY_BIRTHS", value_name = "BOOL")]
    early_births: Option<bool>,
    /// How many pages of each step such a process gets for itself in advance; 0 for none
    #[arg(long, env = "DELTABOX_EARLY_PAGES", value_name = "N")]
    early_pages: Option<u64>,
}

impl Ready {
    /// For a host that keeps its state in this directory.
    pub(crate) fn config(&self, state_dir: PathBuf) -> HostConfig {
        let usual = HostConfig::default();
        HostConfig {
            state_dir,
            warm: self.warm.unwrap_or(usual.warm),
            templates: self.templates.unwrap_or(usual.templates),
            template_bytes: self.template_memory.unwrap_or(usual.template_bytes),
            early_births: self.early_births.unwrap_or(usual.early_births),
            early_pages: self.early_pages.unwrap_or(usual.early_pages),
            ..usual
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Its name; chosen for you if absent
    #[arg(long, short)]
    pub(crate) name: Option<String>,
    /// The directory that its files begin as; never written to
    #[arg(long, short, default_value = "/", value_name = "DIR")]
    pub(crate) base: PathBuf,
    /// Memory limit, as 512M or 2G
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub(crate) memory: Option<u64>,
    /// The most processes and threads
    #[arg(long, value_name = "N")]
    pub(crate) pids: Option<u64>,
    /// Processor time, in processors: 1.5
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<f64>,
    /// What its files may take besides the base, as 512M or 2G; writers find the disk full then
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub(crate) disk: Option<u64>,
    /// The most files and directories besides those of the base
    #[arg(long, value_name = "N")]
    pub(crate) inodes: Option<u64>,
    /// Monotonic clocks of its own, which go on where they were when a durable checkpoint is restored after a reboot
    #[arg(long)]
    pub(crate) time_namespace: bool,
    /// The host name inside; the sandbox's name if absent
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Send standard input to the command
    #[arg(long, short)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// Print the session's id and do not wait
    #[arg(long, short, conflicts_with = "interactive")]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) surroundings: Surroundings,
    /// Kill the command and all its descendants after this time (seconds, or as 10m); the exit code is 124 then
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    pub(crate) timeout: Option<Duration>,
    /// The sandbox
    pub(crate) name: String,
    /// The command and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Surroundings {
    /// Set an environment variable; without a value, pass ours on
    #[arg(long = "env", short, value_name = "K=V")]
    env: Vec<String>,
    /// The working directory
    #[arg(long, short, value_name = "DIR")]
    pub(crate) workdir: Option<PathBuf>,
    /// A user of the sandbox, or a number, optionally with :group
    #[arg(long, short, value_name = "USER")]
    pub(crate) user: Option<String>,
}

impl Surroundings {
    /// The variables, those without a value taken from our environment.
    pub(crate) fn env(&self) -> BTreeMap<String, String> {
        let pair = |text: &String| match text.split_once('=') {
            Some((key, value)) => Some((key.to_owned(), value.to_owned())),
            None => Some((text.clone(), std::env::var(text).ok()?)),
        };
        self.env.iter().filter_map(pair).collect()
    }
}

#[derive(Debug, Args)]
pub(crate) struct Shell {
    #[command(flatten)]
    pub(crate) surroundings: Surroundings,
    /// The sandbox
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Attach {
    /// The sandbox
    pub(crate) name: String,
    /// The session, as s3
    pub(crate) session: SessionId,
    /// Send standard input to it
    #[arg(long, short)]
    pub(crate) interactive: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// The sandbox
    pub(crate) name: String,
    /// The session, as s3
    pub(crate) session: SessionId,
    /// Go on until it ends
    #[arg(long, short)]
    pub(crate) follow: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// The sandbox
    pub(crate) name: String,
    /// The session, as s3
    pub(crate) session: SessionId,
    /// Send this signal (a number) to the process group instead
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=64))]
    pub(crate) signal: Option<i32>,
}

#[derive(Debug, Args)]
pub(crate) struct Checkpoint {
    /// The sandbox
    pub(crate) name: String,
    /// What to call it
    #[arg(long, short, value_name = "TEXT")]
    pub(crate) message: Option<String>,
    /// Wait until it is on disk; it outlives the service then, and the machine's power
    #[arg(long)]
    pub(crate) durable: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Fork {
    /// The sandbox; with @ID as it was at that checkpoint, else as it is now
    #[arg(value_name = "NAME[@ID]", value_parser = parse_source)]
    pub(crate) source: Source,
    /// How many
    #[arg(short, default_value_t = 1, value_name = "N", value_parser = parse_count)]
    pub(crate) n: usize,
    /// The name of a new sandbox, once for each; chosen for you if absent
    #[arg(long = "name", value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Tell them apart, which share even their random numbers: in /run/deltabox/generation, and in the environment of commands
    #[arg(long)]
    pub(crate) seed_rng: bool,
}

/// A sandbox, now or at a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) checkpoint: Option<CheckpointId>,
}

fn parse_source(text: &str) -> Result<Source, String> {
    let (name, checkpoint) = match text.split_once('@') {
        Some((name, id)) => (name, Some(id.parse()?)),
        None => (text, None),
    };
    Ok(Source {
        name: name.to_owned(),
        checkpoint,
    })
}

fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("a number from 1 on is wanted".into()),
        Ok(n) => Ok(n),
    }
}

#[derive(Debug, Args)]
pub(crate) struct Hint {
    /// The sandbox
    pub(crate) name: String,
    /// The checkpoint, as c3
    pub(crate) id: CheckpointId,
    /// Keep what its forks share whatever comes, and make it now
    #[arg(long, conflicts_with = "unpin")]
    pub(crate) pin: bool,
    /// Keep it no longer
    #[arg(long)]
    pub(crate) unpin: bool,
    /// So many forks are likely to be asked for at a time: they are made ready
    #[arg(long, value_name = "N")]
    pub(crate) forks: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// The sandbox
    pub(crate) name: String,
    /// The checkpoint to begin with, as c3
    pub(crate) from: CheckpointId,
    /// The checkpoint to compare it to
    pub(crate) to: CheckpointId,
}

#[derive(Debug, Args)]
pub(crate) struct NameAndId {
    /// The sandbox
    pub(crate) name: String,
    /// The checkpoint, as c3
    pub(crate) id: CheckpointId,
}

#[derive(Debug, Args)]
pub(crate) struct Name {
    /// The sandbox
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Names {
    /// The sandboxes
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(words: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["deltabox"], words].concat())
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_commands_own_options_stay_its_own() {
        for words in [
            &["exec", "-it", "box", "--", "ls", "--json", "-d"][..],
            &["exec", "-it", "box", "ls", "--json", "-d"],
        ] {
            let cli = parse(words).unwrap();
            assert!(!cli.global.json);
            let Command::Exec(exec) = cli.command else {
                panic!("{cli:?} is no exec")
            };
            assert!(exec.interactive && exec.tty && !exec.detach);
            assert_eq!(exec.command, ["ls", "--json", "-d"]);
        }
    }

    #[test]
    fn a_fork_may_name_a_checkpoint() {
        assert_eq!(parse_source("web").unwrap().checkpoint, None);
        let source = parse_source("web@c3").unwrap();
        assert_eq!(
            (source.name.as_str(), source.checkpoint),
            ("web", Some(CheckpointId(3)))
        );
        assert!(parse_source("web@3").is_err());
        assert!(parse(&["fork", "web", "-n", "0"]).is_err());
    }

    #[test]
    fn wrong_usage_exits_with_2() {
        for words in [
            &["exec", "box"][..],
            &["rollback", "box", "7"],
            &["create", "--memory", "lots"],
            &["frobnicate"],
        ] {
            assert_eq!(parse(words).unwrap_err().exit_code(), 2);
        }
    }
}
