//! A client of the service: one method a request, in the library's own types.

mod http;
pub mod start;
mod stream;

use std::path::{Path, PathBuf};

use deltabox::{
    CheckpointId, CheckpointReport, CommandSpec, Difference, LayerReport, RollbackReport,
    SandboxInfo, SandboxSpec, SessionId, SessionInfo, Tree, WindowSize,
};
use hyper::Method;

pub use stream::{Attached, FromSessionStream, Output, ToSessionSink};

use crate::api::{
    CheckpointRequest, ForkRequest, HintReport, HintRequest, ReadyInfo, RollbackRequest,
    ServiceInfo, SignalRequest, StartedSession, socket_path,
};

/// The result of a request.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request was not answered with what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No service answers on the socket.
    #[error("the service does not answer at {path:?}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The service could not be started.
    #[error("the service could not be started: {0}")]
    Start(String),
    /// The service refused, or failed in doing it.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// For programs: `no_sandbox`, `epoch`, ….
        code: String,
        /// For people.
        message: String,
    },
    /// The connection broke, or carried something that is not the protocol.
    #[error("the connection to the service broke: {0}")]
    Broken(String),
}

impl Error {
    /// The service's code, where it answered.
    pub fn code(&self) -> &str {
        match self {
            Self::Connect { .. } => "no_service",
            Self::Start(_) => "no_start",
            Self::Refused { code, .. } => code,
            Self::Broken(_) => "broken",
        }
    }

    fn broken(why: impl std::fmt::Display) -> Self {
        Self::Broken(why.to_string())
    }
}

/// A service at a socket. Every request has a connection of its own, so methods may be called at the same time.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// A session as requests name it.
#[derive(Clone, Debug)]
pub struct SessionRef {
    /// The sandbox.
    pub sandbox: String,
    /// The session.
    pub id: SessionId,
    /// The restore epoch that it belongs to; requests are refused if that is over. `None` takes any.
    pub epoch: Option<u64>,
}

impl SessionRef {
    fn path(&self, rest: &str) -> String {
        format!("{}/sessions/{}{rest}", sandbox(&self.sandbox), self.id)
    }
}

fn sandbox(name: &str) -> String {
    format!("/v1/sandboxes/{}", http::escape(name))
}

impl Client {
    /// The service of a state directory, whether or not it runs.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            socket: socket_path(state_dir),
        }
    }

    /// What the service is.
    pub async fn version(&self) -> Result<ServiceInfo> {
        self.get("/v1/version").await
    }

    /// Asks the service to end all sandboxes and then itself; returns before it has.
    pub async fn stop_service(&self) -> Result<()> {
        self.send(Method::POST, "/v1/stop", None, &()).await
    }

    /// All sandboxes.
    pub async fn sandboxes(&self) -> Result<Vec<SandboxInfo>> {
        self.get("/v1/sandboxes").await
    }

    /// Creates a sandbox.
    pub async fn create(&self, spec: &SandboxSpec) -> Result<SandboxInfo> {
        self.post("/v1/sandboxes", spec).await
    }

    /// One sandbox.
    pub async fn sandbox(&self, name: &str) -> Result<SandboxInfo> {
        self.get(&sandbox(name)).await
    }

    /// Ends and removes a sandbox.
    pub async fn remove(&self, name: &str) -> Result<()> {
        self.send(Method::DELETE, &sandbox(name), None, &()).await
    }

    /// Ends a sandbox's processes.
    pub async fn stop(&self, name: &str) -> Result<SandboxInfo> {
        self.post(&format!("{}/stop", sandbox(name)), &()).await
    }

    /// Makes sandboxes with the state of another.
    pub async fn fork(&self, name: &str, request: &ForkRequest) -> Result<Vec<SandboxInfo>> {
        self.post(&format!("{}/fork", sandbox(name)), request).await
    }

    /// A sandbox's checkpoints.
    pub async fn tree(&self, name: &str) -> Result<Tree> {
        self.get(&format!("{}/checkpoints", sandbox(name))).await
    }

    /// Checkpoints a sandbox.
    pub async fn checkpoint(
        &self,
        name: &str,
        request: &CheckpointRequest,
    ) -> Result<CheckpointReport> {
        let path = format!("{}/checkpoints", sandbox(name));
        self.post(&path, request).await
    }

    /// The durable checkpoints of a sandbox, or of all, as they are on disk; checked with `verify`.
    pub async fn layers(&self, sandbox: Option<&str>, verify: bool) -> Result<Vec<LayerReport>> {
        let of = sandbox.map_or(String::new(), |name| {
            format!("&sandbox={}", http::escape(name))
        });
        self.get(&format!("/v1/layers?verify={verify}{of}")).await
    }

    /// Rolls a sandbox back.
    pub async fn rollback(&self, name: &str, checkpoint: CheckpointId) -> Result<RollbackReport> {
        let path = format!("{}/rollback", sandbox(name));
        self.post(&path, &RollbackRequest { checkpoint }).await
    }

    /// Makes a checkpoint durable; returns when it is on disk.
    pub async fn persist(&self, name: &str, id: CheckpointId) -> Result<()> {
        let path = format!("{}/checkpoints/{id}/persist", sandbox(name));
        self.send(Method::POST, &path, None, &()).await
    }

    /// Tells what is known of the forks of a checkpoint to come.
    pub async fn hint(
        &self,
        name: &str,
        id: CheckpointId,
        hint: &HintRequest,
    ) -> Result<HintReport> {
        let path = format!("{}/checkpoints/{id}/hint", sandbox(name));
        self.post(&path, hint).await
    }

    /// What is kept ready for forks.
    pub async fn ready(&self) -> Result<ReadyInfo> {
        self.get("/v1/ready").await
    }

    /// Forgets a checkpoint.
    pub async fn delete(&self, name: &str, id: CheckpointId) -> Result<()> {
        let path = format!("{}/checkpoints/{id}", sandbox(name));
        self.send(Method::DELETE, &path, None, &()).await
    }

    /// What differs between two checkpoints.
    pub async fn diff(
        &self,
        name: &str,
        from: CheckpointId,
        to: CheckpointId,
    ) -> Result<Difference> {
        self.get(&format!("{}/diff?from={from}&to={to}", sandbox(name)))
            .await
    }

    /// Starts a command. With `attach`, [`Client::attach`] must follow soon: until then the command waits when it has
    /// written much, so that nothing is missed.
    pub async fn exec(
        &self,
        name: &str,
        command: &CommandSpec,
        attach: bool,
    ) -> Result<StartedSession> {
        let path = format!("{}/sessions?attach={attach}", sandbox(name));
        self.post(&path, command).await
    }

    /// A sandbox's sessions.
    pub async fn sessions(&self, name: &str) -> Result<Vec<SessionInfo>> {
        self.get(&format!("{}/sessions", sandbox(name))).await
    }

    /// One session.
    pub async fn session(&self, session: &SessionRef) -> Result<SessionInfo> {
        self.request(Method::GET, &session.path(""), session.epoch, &())
            .await
    }

    /// Sends a signal to a session's process group.
    pub async fn signal(&self, session: &SessionRef, signal: i32) -> Result<()> {
        let body = SignalRequest { signal };
        self.send(Method::POST, &session.path("/signal"), session.epoch, &body)
            .await
    }

    /// Sets the size of a session's terminal.
    pub async fn resize(&self, session: &SessionRef, size: WindowSize) -> Result<()> {
        self.send(Method::POST, &session.path("/resize"), session.epoch, &size)
            .await
    }

    /// Kills a session's command and all its descendants.
    pub async fn kill(&self, session: &SessionRef) -> Result<()> {
        self.send(Method::POST, &session.path("/kill"), session.epoch, &())
            .await
    }

    /// A session's output from byte `offset` on; to its end with `follow`, else what there is now.
    pub async fn output(&self, session: &SessionRef, offset: u64, follow: bool) -> Result<Output> {
        let path = session.path(&format!("/output?offset={offset}&follow={follow}"));
        Output::open(&self.socket, &path, session.epoch).await
    }

    /// A session's streams, both ways, with output from byte `offset` on.
    pub async fn attach(&self, session: &SessionRef, offset: u64) -> Result<Attached> {
        let path = session.path(&format!("/attach?offset={offset}"));
        Attached::open(&self.socket, &path, session.epoch).await
    }
}
