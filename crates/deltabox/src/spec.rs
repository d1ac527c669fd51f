//! What a caller asks for: sandboxes and commands.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use deltafs::Quota;
use serde::{Deserialize, Serialize};

/// A sandbox to create.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SandboxSpec {
    /// Its name: 1 to 64 of `a-z A-Z 0-9 _ . -`, beginning with a letter or digit. Chosen by DeltaBox if `None`.
    pub name: Option<String>,
    /// The read-only directory that the sandbox's files begin as.
    pub base: PathBuf,
    /// Memory limit in bytes.
    pub memory: Option<u64>,
    /// The most processes and threads at a time.
    pub pids: Option<u64>,
    /// Processor time, in processors: 1.5 is one and a half.
    pub cpus: Option<f64>,
    /// The host name inside; the sandbox's name if `None`.
    pub hostname: Option<String>,
    /// Bytes that its files may take besides the base; writers get `ENOSPC` beyond. Checkpoints do not count.
    pub disk: Option<u64>,
    /// Files and directories that it may have besides those of the base.
    pub inodes: Option<u64>,
    /// Monotonic clocks of its own, so that they go on where they were when a durable checkpoint is restored after a reboot.
    pub time_namespace: Option<ClockOffsets>,
}

/// By how many nanoseconds clocks inside a sandbox are ahead of the host's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClockOffsets {
    /// `CLOCK_MONOTONIC` and its like.
    pub monotonic: i64,
    /// `CLOCK_BOOTTIME` and its like.
    pub boottime: i64,
}

impl SandboxSpec {
    /// What its files may take.
    pub(crate) fn quota(&self) -> Quota {
        Quota {
            bytes: self.disk,
            inodes: self.inodes,
        }
    }
}

impl Default for SandboxSpec {
    fn default() -> Self {
        Self {
            name: None,
            base: PathBuf::from("/"),
            memory: None,
            pids: None,
            cpus: None,
            hostname: None,
            disk: None,
            inodes: None,
            time_namespace: None,
        }
    }
}

/// A command to run in a sandbox.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CommandSpec {
    /// Program and arguments. The program is looked up in the `PATH` of `env`. Empty: the user's login shell.
    pub argv: Vec<String>,
    /// Added to the sandbox's standard environment (`PATH`, `HOME`, `LANG`, `TERM` on a terminal).
    pub env: BTreeMap<String, String>,
    /// Working directory; if `None`, the user's home on a terminal, `/` otherwise.
    pub cwd: Option<PathBuf>,
    /// A user of the sandbox's `/etc/passwd` or a number, optionally with `:group`; root if `None`.
    pub user: Option<String>,
    /// The command and all its descendants are killed after this time.
    #[serde(with = "seconds")]
    pub timeout: Option<Duration>,
    /// On a pseudo-terminal of this size instead of on three pipes.
    pub tty: Option<WindowSize>,
    /// Whether input will be sent; without, standard input is empty.
    pub stdin: bool,
}

/// The size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

mod seconds {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::time::Duration;

    pub(super) fn serialize<S: Serializer>(d: &Option<Duration>, s: S) -> Result<S::Ok, S::Error> {
        d.map(|d| d.as_secs_f64()).serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Option<Duration>, D::Error> {
        Option::<f64>::deserialize(d)?
            .map(|s| Duration::try_from_secs_f64(s).map_err(serde::de::Error::custom))
            .transpose()
    }
}
