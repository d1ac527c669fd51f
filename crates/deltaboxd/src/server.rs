//! The service's life: lock, socket, requests, the end.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use deltabox::{Host, HostConfig};
use rustix::fs::Mode;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::api::{ServiceInfo, socket_path};
use crate::app::{App, Stop};
use crate::routes::router;

/// How long a stopping service waits for answers and streams that are under way.
const GRACE: Duration = Duration::from_secs(5);

/// Hosts sandboxes as `config` tells until SIGTERM, SIGINT or `POST /v1/stop`; then ends them all.
///
/// The socket appears, readable by its owner alone, when the service is ready, and is removed when it ends.
///
/// # Errors
/// When the state directory is in use or cannot be used, the message says why.
pub fn run(config: HostConfig) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the service's threads cannot be started")?
        .block_on(host(config))
}

async fn host(config: HostConfig) -> anyhow::Result<()> {
    let state_dir = config.state_dir.clone();
    prepare(&state_dir)?;
    let socket = Socket::bind(&state_dir)?;
    let host = tokio::task::spawn_blocking(move || Host::open(config))
        .await
        .context("opening the state directory")??;
    for line in host.cleaned_up() {
        tracing::warn!("{line}");
    }
    let info = ServiceInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        state_dir,
        started: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        cleaned_up: host.cleaned_up().to_vec(),
    };
    let host = Arc::new(host);
    let (attached, detached) = mpsc::channel(1);
    let app = App::new(host.clone(), info, attached);
    stop_on_signals(&app.stop)?;
    let (listener, published) = socket.publish()?;
    tracing::info!(socket = %published.0.display(), "ready");
    let served = serve(listener, app, detached).await;
    drop(published);
    tracing::info!("stopped");
    served
}

/// Answers requests until a stop is requested, then ends the sandboxes, which ends their streams.
async fn serve(
    listener: UnixListener,
    app: App,
    mut detached: mpsc::Receiver<()>,
) -> anyhow::Result<()> {
    let (close, closed) = tokio::sync::oneshot::channel::<()>();
    let server = axum::serve(listener, router(app.clone())).with_graceful_shutdown(async {
        // The sender is dropped only by a panic, which is a reason to close as well.
        let _ = closed.await;
    });
    let server = tokio::spawn(async move { server.await });
    app.stop.requested().await;
    tracing::info!("stopping: ending all sandboxes");
    let _ = close.send(());
    let host = app.host.clone();
    let ended = tokio::task::spawn_blocking(move || host.shutdown()).await;
    drop(app);
    let rest = async {
        let served = server.await;
        while detached.recv().await.is_some() {}
        served
    };
    match tokio::time::timeout(GRACE, rest).await {
        Ok(served) => served.context("serving requests")?.context("serving")?,
        Err(_) => tracing::warn!("some requests were still under way after {GRACE:?}"),
    }
    ended.context("ending the sandboxes")
}

fn stop_on_signals(stop: &Arc<Stop>) -> anyhow::Result<()> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).context("handling signals")?;
        let stop = stop.clone();
        tokio::spawn(async move {
            signals.recv().await;
            stop.request();
        });
    }
    Ok(())
}

fn prepare(state_dir: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state_dir)
        .with_context(|| format!("the state directory {state_dir:?} cannot be made"))
}

/// A socket that listens under a name of its own until the state directory is this service's.
struct Socket {
    listener: UnixListener,
    private: Unlinked,
    public: PathBuf,
}

impl Socket {
    fn bind(state_dir: &Path) -> anyhow::Result<Self> {
        let private = state_dir.join(format!("deltabox.sock.{}", std::process::id()));
        remove_if_there(&private).with_context(|| format!("removing {private:?}"))?;
        // Nobody else may connect, from the first moment on. No other thread makes files yet.
        let before = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(&private);
        rustix::process::umask(before);
        let listener = bound.with_context(|| {
            format!("no socket can be made at {private:?} (a path may have 107 bytes at most)")
        })?;
        let private = Unlinked(private);
        fs::set_permissions(&private.0, fs::Permissions::from_mode(0o600))
            .with_context(|| format!("setting the mode of {:?}", private.0))?;
        Ok(Self {
            listener,
            private,
            public: socket_path(state_dir),
        })
    }

    /// Puts it at its public name, in place of one that a killed service left there.
    fn publish(self) -> anyhow::Result<(UnixListener, Unlinked)> {
        remove_unpublished(&self.public, &self.private.0)?;
        fs::rename(&self.private.0, &self.public)
            .with_context(|| format!("putting the socket at {:?}", self.public))?;
        Ok((self.listener, Unlinked(self.public)))
    }
}

/// Removes the sockets of services that were killed before they were ready.
fn remove_unpublished(public: &Path, own: &Path) -> anyhow::Result<()> {
    let (Some(dir), Some(name)) = (public.parent(), public.file_name()) else {
        return Ok(());
    };
    for entry in fs::read_dir(dir).with_context(|| format!("reading {dir:?}"))? {
        let path = entry.with_context(|| format!("reading {dir:?}"))?.path();
        let unpublished = path.file_stem() == Some(name) && path != own;
        if unpublished {
            remove_if_there(&path).with_context(|| format!("removing {path:?}"))?;
        }
    }
    Ok(())
}

/// A path that is removed in the end.
struct Unlinked(PathBuf);

impl Drop for Unlinked {
    fn drop(&mut self) {
        if let Err(why) = remove_if_there(&self.0) {
            tracing::warn!(path = %self.0.display(), %why, "the socket could not be removed");
        }
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
