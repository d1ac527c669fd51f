//! What the library tells of sandboxes, sessions, checkpoints and their differences.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Names a checkpoint: unique in a state directory, never used again. Written `c17`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckpointId(pub u64);

/// Names a session of a sandbox; a fork keeps the numbers of its source. Written `s3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

macro_rules! id_text {
    ($type:ident, $letter:literal, $what:literal) => {
        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!($letter, "{}"), self.0)
            }
        }
        impl std::str::FromStr for $type {
            type Err = String;
            fn from_str(s: &str) -> Result<Self, String> {
                s.strip_prefix($letter)
                    .and_then(|n| n.parse().ok())
                    .map(Self)
                    .ok_or_else(|| format!(concat!("{:?} is not ", $what), s))
            }
        }
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?
                    .parse()
                    .map_err(serde::de::Error::custom)
            }
        }
    };
}
id_text!(CheckpointId, "c", "a checkpoint (they look like c17)");
id_text!(SessionId, "s", "a session (they look like s3)");

/// How a sandbox is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum SandboxState {
    /// Its processes run.
    Running,
    /// Its processes were ended by `stop`; checkpoints can be rolled back to.
    Stopped,
    /// A rollback failed past repair; checkpoints can still be rolled back to.
    Failed {
        /// What failed.
        reason: String,
    },
}

/// What a sandbox is and how it is doing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxInfo {
    /// Its name.
    pub name: String,
    /// How it is.
    #[serde(flatten)]
    pub state: SandboxState,
    /// The base directory.
    pub base: PathBuf,
    /// The checkpoint that the present state comes from.
    pub current: Option<CheckpointId>,
    /// How often it was rolled back.
    pub epoch: u64,
    /// Seconds since 1970.
    pub created: u64,
    /// The checkpoints of its tree.
    pub checkpoints: usize,
    /// How many of them are on disk, and good as far as is known.
    pub durable: usize,
    /// Processes alive, without init.
    pub processes: usize,
    /// Bytes of file data that its tree of checkpoints holds.
    pub file_bytes: u64,
    /// Bytes of memory pages that its tree of checkpoints holds.
    pub page_bytes: u64,
    /// What the sandbox does without, and why (limits whose cgroup controller is missing, say).
    pub warnings: Vec<String>,
}

/// A command or shell that was started in a sandbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionInfo {
    /// Its number.
    pub id: SessionId,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The pid inside.
    pub pid: i32,
    /// Whether it is on a pseudo-terminal.
    pub tty: bool,
    /// The exit status when it has ended: 0-255, 128+n for signal n.
    pub exit: Option<i32>,
    /// Bytes of output so far (standard output and error together).
    pub output: u64,
}

/// Which stream a piece of output came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output, or a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Something that happened in a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    /// Output.
    Output {
        /// From where.
        stream: Stream,
        /// What.
        bytes: Vec<u8>,
    },
    /// The reader was too slow, or came too late: the log has dropped this many bytes of output before the next event.
    Missed {
        /// How many.
        bytes: u64,
    },
    /// The command ended; nothing follows.
    Exit {
        /// 0-255, 128+n for signal n.
        status: i32,
        /// Whether the time that [`crate::CommandSpec::timeout`] allows had passed.
        timed_out: bool,
    },
    /// The sandbox was rolled back, or removed, and this session's future with it; nothing follows.
    RolledBack {
        /// The sandbox's epoch from now on.
        epoch: u64,
    },
}

/// How long the parts of a checkpoint or rollback took; in JSON pairs of a name and seconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Phases(#[serde(with = "phases")] pub Vec<(String, Duration)>);

impl From<deltacr::Phases> for Phases {
    fn from(phases: deltacr::Phases) -> Self {
        let named = |(name, time): (&str, Duration)| (name.to_owned(), time);
        Self(phases.into_iter().map(named).collect())
    }
}

/// A checkpoint that was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckpointReport {
    /// Its name.
    pub id: CheckpointId,
    /// How long the processes stood still.
    #[serde(with = "seconds")]
    pub stop: Duration,
    /// From the call to its return.
    #[serde(with = "seconds")]
    pub total: Duration,
    /// The parts, in order.
    pub phases: Phases,
    /// Memory pages copied.
    pub pages: u64,
    /// Processes carried.
    pub processes: usize,
}

/// What became of the memory pages that a checkpoint copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptPages {
    /// Stored.
    pub stored: u64,
    /// Not stored: zero.
    pub zero: u64,
    /// Not stored: as the checkpoint before has them, or the parent of a process that was forked since.
    pub same: u64,
    /// Not stored: as another page that was copied at the same time.
    pub repeated: u64,
}

/// A rollback that was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RollbackReport {
    /// The checkpoint whose state the sandbox has now.
    pub id: CheckpointId,
    /// The sandbox's epoch from now on.
    pub epoch: u64,
    /// From the request until the processes ran again.
    #[serde(with = "seconds")]
    pub total: Duration,
    /// The parts, in order.
    pub phases: Phases,
    /// Memory pages written back.
    pub pages: u64,
    /// Processes undone in place.
    pub kept: usize,
    /// Processes built again.
    pub rebuilt: usize,
    /// Processes killed because they were born since.
    pub killed: usize,
    /// Whether undoing in place failed, why, and the whole tree was built again instead.
    pub fallback: Option<String>,
    /// Network connections and the like that could not be given back.
    pub notes: Vec<String>,
}

/// The blank sandboxes that are kept ready for forks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmInfo {
    /// The most that may be kept.
    pub limit: usize,
    /// How many are ready.
    pub ready: usize,
    /// Forks that found one.
    pub hits: u64,
    /// Forks that found none.
    pub misses: u64,
    /// How many were made.
    pub made: u64,
    /// How many were given up unused.
    pub dropped: u64,
    /// Processes of forks that were born in them in advance.
    pub early_births: u64,
    /// How many of those a fork took up.
    pub early_taken: u64,
    /// How many had to go, for their blank sandbox was used for another checkpoint.
    pub early_ended: u64,
    /// Pages that such processes wrote to in advance.
    pub early_pages: u64,
    /// How often such processes were not born, for the processors had other work.
    pub stood_back: u64,
}

/// The templates: processes that hold the memory of checkpoints for their forks to share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TemplatesInfo {
    /// The most that may be kept.
    pub limit: usize,
    /// The most bytes that they may hold.
    pub limit_bytes: u64,
    /// How many there are.
    pub number: usize,
    /// Bytes that they hold, which they share among themselves, and with forks that are alive.
    pub bytes: u64,
    /// How many of them are kept whatever comes.
    pub pinned: usize,
    /// Age of the oldest in seconds.
    pub oldest: f64,
    /// Forks whose checkpoint had one.
    pub hits: u64,
    /// Forks whose checkpoint had none when they were asked for.
    pub misses: u64,
    /// Forks and rollbacks for which a relative's served.
    pub relatives: u64,
    /// Processes that were forked from one.
    pub births: u64,
    /// How many were made.
    pub made: u64,
    /// How many of those were made as copies of another.
    pub derived: u64,
    /// How many were given up for others, or for want of memory.
    pub evicted: u64,
}

/// One checkpoint in the tree.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// Its name.
    pub id: CheckpointId,
    /// The checkpoint before it.
    pub parent: Option<CheckpointId>,
    /// What the caller called it.
    pub message: Option<String>,
    /// Seconds since 1970.
    pub created: u64,
    /// Processes in it.
    pub processes: usize,
    /// Whether the sandbox's present state comes from it.
    pub current: bool,
    /// Where it is kept.
    #[serde(flatten)]
    pub state: CheckpointState,
}

/// Where a checkpoint is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum CheckpointState {
    /// In memory: it ends with the service.
    Warm,
    /// On disk: it outlives the service, and the machine's power.
    Durable,
    /// It was to be durable and is not, or what is on disk cannot be used.
    Failed {
        /// What is wrong.
        reason: String,
    },
}

/// A durable checkpoint as it is on disk. Bytes are those that the checkpoint it builds on does not have.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerReport {
    /// The sandbox that it is of.
    pub sandbox: String,
    /// Its name.
    pub id: CheckpointId,
    /// The durable checkpoint that it builds on.
    pub parent: Option<CheckpointId>,
    /// Seconds since 1970; zero if it cannot be read.
    pub created: u64,
    /// Files and directories that differ.
    pub inodes: u64,
    /// Bytes of file data.
    pub file_bytes: u64,
    /// Processes.
    pub processes: u64,
    /// Bytes of memory.
    pub page_bytes: u64,
    /// Whether every byte was read and checked.
    pub verified: bool,
    /// What is wrong with it, if anything was found.
    pub damage: Option<String>,
    /// Whether it was deleted, and is there for what builds on it until that is merged with it.
    #[serde(default)]
    pub deleted: bool,
}

/// How deleted checkpoints on disk are merged into those that build on them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompactionInfo {
    /// Sandboxes that wait to be looked at, or are being so.
    pub waiting: usize,
    /// Checkpoints that were written anew.
    pub merges: u64,
    /// Bytes that were written for that.
    pub written_bytes: u64,
    /// Attempts that failed.
    pub failures: u64,
}

/// The checkpoints of a sandbox, parents before children.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tree {
    /// All nodes.
    pub nodes: Vec<CheckpointInfo>,
}

/// How one path differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum FileChange {
    /// Only in the second state.
    Added {
        /// Where.
        #[serde(serialize_with = "lossy")]
        path: PathBuf,
    },
    /// In both, with different content or attributes.
    Modified {
        /// Where.
        #[serde(serialize_with = "lossy")]
        path: PathBuf,
    },
    /// Only in the first state.
    Deleted {
        /// Where.
        #[serde(serialize_with = "lossy")]
        path: PathBuf,
    },
    /// The same inode under another name.
    Renamed {
        /// The name in the first state.
        #[serde(serialize_with = "lossy")]
        from: PathBuf,
        /// The name in the second state.
        #[serde(serialize_with = "lossy")]
        to: PathBuf,
    },
}

/// A process, as a difference names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessName {
    /// The pid inside.
    pub pid: i32,
    /// Its command line, or its name where that is empty.
    pub command: String,
}

/// What differs between two states.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Difference {
    /// Paths, sorted.
    pub files: Vec<FileChange>,
    /// Processes only in the second state.
    pub came: Vec<ProcessName>,
    /// Processes only in the first state.
    pub went: Vec<ProcessName>,
}

/// One thing that the kernel must offer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Feature {
    /// What, in words.
    pub name: String,
    /// Whether it is there.
    pub present: bool,
    /// Whether DeltaBox works without it.
    pub required: bool,
    /// What was seen, and what to do if it is not there.
    pub detail: String,
}

/// A sandbox may use names that are not UTF-8; text formats show them with U+FFFD instead of failing.
fn lossy<S: serde::Serializer>(path: &std::path::Path, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(&path.to_string_lossy())
}

/// Durations are numbers of seconds in JSON.
mod seconds {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::time::Duration;

    pub(super) fn serialize<S: Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
        d.as_secs_f64().serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        Duration::try_from_secs_f64(f64::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

mod phases {
    use serde::{Deserialize, Deserializer, Serializer};
    use std::time::Duration;

    pub(super) fn serialize<S: Serializer>(
        phases: &[(String, Duration)],
        s: S,
    ) -> Result<S::Ok, S::Error> {
        s.collect_seq(phases.iter().map(|(name, d)| (name, d.as_secs_f64())))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Vec<(String, Duration)>, D::Error> {
        Vec::<(String, f64)>::deserialize(d)?
            .into_iter()
            .map(|(name, seconds)| {
                Duration::try_from_secs_f64(seconds)
                    .map(|d| (name, d))
                    .map_err(serde::de::Error::custom)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn durations_are_seconds_in_json_and_come_back() {
        let report = CheckpointReport {
            id: CheckpointId(3),
            stop: Duration::from_millis(2),
            total: Duration::from_millis(500),
            phases: Phases(vec![("freeze".into(), Duration::from_millis(1))]),
            pages: 7,
            processes: 1,
        };
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["total"], 0.5);
        assert_eq!(json["phases"][0][0], "freeze");
        let back: CheckpointReport = serde_json::from_value(json).unwrap();
        assert_eq!((back.stop, back.total), (report.stop, report.total));
        assert_eq!(back.phases.0, report.phases.0);
    }

    #[test]
    fn a_name_that_is_not_utf8_does_not_break_a_difference() {
        let path = PathBuf::from(OsStr::from_bytes(b"/bad\xff"));
        let json = serde_json::to_string(&FileChange::Added { path }).unwrap();
        assert!(json.contains('\u{fffd}'), "{json}");
    }
}
