//! What goes over the wire besides the library's own types.

use std::path::{Path, PathBuf};

use deltabox::{CheckpointId, SessionInfo, TemplatesInfo, WarmInfo};
use serde::{Deserialize, Serialize};

/// The header in which a request names the restore epoch that it expects; refused with 409 if that is over.
pub const EPOCH_HEADER: &str = "deltabox-epoch";

/// The service's socket in its state directory.
pub fn socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join("deltabox.sock")
}

/// What the service is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceInfo {
    /// The version of DeltaBox.
    pub version: String,
    /// The service's process.
    pub pid: u32,
    /// Where it keeps its state.
    pub state_dir: PathBuf,
    /// Since when it runs, in seconds since 1970.
    pub started: u64,
    /// What it found left behind by a service that was killed, and removed; one sentence each.
    pub cleaned_up: Vec<String>,
}

/// The body of `POST /v1/sandboxes/{name}/checkpoints`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointRequest {
    /// What to call it.
    pub message: Option<String>,
    /// Answer when it is on disk, so that it outlives the service.
    pub durable: bool,
}

/// The body of `POST /v1/sandboxes/{name}/rollback`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RollbackRequest {
    /// The checkpoint to go back to.
    pub checkpoint: CheckpointId,
}

/// The body of `POST /v1/sandboxes/{name}/fork`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ForkRequest {
    /// The state to fork; as the sandbox is now if absent.
    pub checkpoint: Option<CheckpointId>,
    /// How many sandboxes.
    pub n: usize,
    /// Their names; made from the source's if empty.
    pub names: Vec<String>,
    /// Tell them apart, which share even the state of random number generators: in `/run/deltabox/generation`, and in the environment of
    /// commands that are started later.
    pub seed_rng: bool,
}

impl Default for ForkRequest {
    fn default() -> Self {
        Self {
            checkpoint: None,
            n: 1,
            names: Vec::new(),
            seed_rng: false,
        }
    }
}

/// The body of `POST …/checkpoints/{id}/hint`: what the caller knows of the forks to come. What is absent stays as it is.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HintRequest {
    /// Keep the template of the checkpoint whatever comes, and make it if there is none; or no longer.
    pub pin: Option<bool>,
    /// So many forks of it are likely to be asked for at a time: they are made ready as far as that can be done.
    pub forks: Option<usize>,
}

/// The answer to it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct HintReport {
    /// Whether there is a template of the checkpoint.
    pub template: bool,
}

/// What is kept ready for forks.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ReadyInfo {
    /// Blank sandboxes.
    pub warm: WarmInfo,
    /// Templates.
    pub templates: TemplatesInfo,
}

/// The body of `POST …/sessions/{id}/signal`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignalRequest {
    /// The signal's number: 2 is SIGINT.
    pub signal: i32,
}

/// A session that was started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartedSession {
    /// What it is.
    #[serde(flatten)]
    pub session: SessionInfo,
    /// The sandbox's restore epoch that it was started in: requests that mean this session should name it.
    pub epoch: u64,
}

/// A gap in a stream of a session: the reader was too slow or came too late, and the log had to drop output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missed {
    /// How many bytes.
    pub missed: u64,
}

/// How a stream of a session ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "end", rename_all = "snake_case")]
pub enum End {
    /// The command ended.
    Exit {
        /// 0-255, 128+n for signal n.
        status: i32,
        /// Whether its time had run out.
        timed_out: bool,
    },
    /// The sandbox was rolled back or removed, and the session's future with it.
    RolledBack {
        /// The sandbox's epoch from then on.
        epoch: u64,
    },
}

/// The body of every answer that is not a success.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// For programs: `no_sandbox`, `epoch`, ….
    pub code: String,
    /// For people, with the causes.
    pub message: String,
}
