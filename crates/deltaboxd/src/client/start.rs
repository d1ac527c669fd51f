//! Starting a service where none runs, and waiting for one to end.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{Client, Error, Result};
use crate::api::ServiceInfo;

/// How long a service may take to be ready: cleaning up after a killed one takes a while.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// How long a service may take to end its sandboxes and itself.
const ENDED_WITHIN: Duration = Duration::from_secs(60);

/// The most that is shown of the log of a service that did not start, in bytes.
const LOG_SHOWN: u64 = 4096;

/// A service that answers.
#[derive(Debug)]
pub struct Started {
    /// A client of it.
    pub client: Client,
    /// What it is, if this call started it.
    pub new: Option<ServiceInfo>,
}

/// The service of `state_dir`, started by `command` if none runs. `command` must host it until it is told to stop
/// ([`crate::server::run`]); it gets the log file `service.log` as its output.
///
/// Of several callers at a time only one starts it: they take turns by a lock on `start.lock`.
///
/// # Errors
/// [`Error::Start`] with the end of the service's log when it ends before it answers.
pub async fn ensure(state_dir: &Path, command: Command) -> Result<Started> {
    let client = Client::new(state_dir);
    if answers(&client).await? {
        return Ok(Started { client, new: None });
    }
    let state_dir = state_dir.to_owned();
    let turn = tokio::task::spawn_blocking({
        let state_dir = state_dir.clone();
        move || take_turn(&state_dir)
    });
    let turn = turn.await.map_err(Error::broken)?.map_err(|why| {
        Error::Start(format!(
            "the state directory {state_dir:?} cannot be used: {why}"
        ))
    })?;
    if answers(&client).await? {
        return Ok(Started { client, new: None });
    }
    let mut log = open_log(&state_dir).map_err(|why| {
        Error::Start(format!("its log in {state_dir:?} cannot be written: {why}"))
    })?;
    let child = spawn(command, &log).map_err(|why| Error::Start(why.to_string()))?;
    wait_ready(&client, child, &mut log).await?;
    drop(turn);
    let new = Some(client.version().await?);
    Ok(Started { client, new })
}

/// Whether a service answers. A socket that may not be used is an error, not a reason to start another service. One that
/// is ending (or was killed, and its socket is not closed yet) is waited for.
async fn answers(client: &Client) -> Result<bool> {
    let begun = Instant::now();
    loop {
        let ending = match client.version().await {
            Ok(_) => return Ok(true),
            Err(Error::Connect { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(false);
            }
            Err(broken @ Error::Broken(_)) => broken,
            // It ended before it took the connection up.
            Err(Error::Connect { path, source })
                if source.kind() == io::ErrorKind::ConnectionReset =>
            {
                Error::Connect { path, source }
            }
            Err(stopping) if stopping.code() == "stopping" => stopping,
            Err(other) => return Err(other),
        };
        if begun.elapsed() > ENDED_WITHIN {
            return Err(ending);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Holds the lock until it is dropped.
fn take_turn(state_dir: &Path) -> io::Result<File> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state_dir)?;
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(state_dir.join("start.lock"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    Ok(lock)
}

/// The log, standing at its end.
fn open_log(state_dir: &Path) -> io::Result<File> {
    let mut log = OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .mode(0o600)
        .open(state_dir.join("service.log"))?;
    log.seek(SeekFrom::End(0))?;
    Ok(log)
}

fn spawn(mut command: Command, log: &File) -> io::Result<Child> {
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .current_dir("/")
        .spawn()
}

async fn wait_ready(client: &Client, mut child: Child, log: &mut File) -> Result<()> {
    let begun = Instant::now();
    let log_begin = log.metadata().map_or(0, |m| m.len());
    loop {
        if answers(client).await? {
            return Ok(());
        }
        match child.try_wait() {
            Ok(None) => {}
            Ok(Some(status)) => {
                let told = tail(log, log_begin).unwrap_or_default();
                return Err(Error::Start(match last_words(&told) {
                    "" => format!("it ended with {status}"),
                    told => told.to_owned(),
                }));
            }
            Err(why) => return Err(Error::Start(why.to_string())),
        }
        if begun.elapsed() > READY_WITHIN {
            return Err(Error::Start(format!(
                "it did not answer within {READY_WITHIN:?}; see service.log in the state directory"
            )));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn tail(log: &mut File, begin: u64) -> io::Result<String> {
    let end = log.metadata()?.len();
    log.seek(SeekFrom::Start(begin.max(end.saturating_sub(LOG_SHOWN))))?;
    let mut told = Vec::new();
    log.take(LOG_SHOWN).read_to_end(&mut told)?;
    Ok(String::from_utf8_lossy(&told).into_owned())
}

/// The error that ended the service, which it tells last; all of the text if it did not come to that.
fn last_words(log: &str) -> &str {
    let error = log.rsplit_once("deltabox: ");
    error.map_or(log, |(_, error)| error).trim()
}

/// Stops the service and waits until its process is gone. `false` when none runs.
///
/// # Errors
/// When it is still there after a minute.
pub async fn stop(state_dir: &Path) -> Result<bool> {
    let client = Client::new(state_dir);
    if !answers(&client).await? {
        return Ok(false);
    }
    let info = client.version().await?;
    let pid = i32::try_from(info.pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Error::broken(format!("{} is no process", info.pid)))?;
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(rustix::io::Errno::SRCH) => return Ok(true),
        Err(why) => return Err(Error::broken(format!("process {}: {why}", info.pid))),
    };
    client.stop_service().await?;
    let ended = tokio::task::spawn_blocking(move || {
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        let timeout = Timespec {
            tv_sec: ENDED_WITHIN.as_secs() as i64,
            tv_nsec: 0,
        };
        rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timeout)))
    });
    match ended.await.map_err(Error::broken)? {
        Ok(0) => Err(Error::broken(format!(
            "the service (process {}) still ends its sandboxes after {ENDED_WITHIN:?}",
            info.pid
        ))),
        Ok(_) => Ok(true),
        Err(why) => Err(Error::broken(why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_log_the_error_that_ended_the_service_is_told() {
        let log = "2026 INFO opening\ndeltabox: the state directory is in use\n";
        assert_eq!(last_words(log), "the state directory is in use");
        assert_eq!(last_words("Segmentation fault\n"), "Segmentation fault");
        assert_eq!(last_words("\n"), "");
    }
}
