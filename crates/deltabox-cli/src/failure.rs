//! How a command that failed says so.

use std::io;

use deltaboxd::api::{ErrorBody, ErrorDetail};
use deltaboxd::client;

use crate::units::visible;

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The service refused, or could not be reached.
    Service(client::Error),
    /// Something of ours.
    Other(anyhow::Error),
    /// Nobody reads our output any more; not worth a word.
    NobodyReads,
    /// It has been said already; only the code is left.
    Told(u8),
}

impl Failure {
    /// Says it on standard error and gives the exit code.
    pub(crate) fn report(self, json: bool) -> u8 {
        let (code, message, status) = match &self {
            Self::NobodyReads => return 0,
            Self::Told(status) => return *status,
            Self::Service(e) => (e.code(), e.to_string(), exit_code(e.code())),
            Self::Other(e) => ("failed", format!("{e:#}"), 1),
        };
        match json {
            true => {
                let error = ErrorDetail {
                    code: code.to_owned(),
                    message,
                };
                let body = serde_json::to_string(&ErrorBody { error });
                eprintln!("{}", body.unwrap_or_default());
            }
            false => eprintln!("deltabox: {}", lines(&message)),
        }
        status
    }
}

/// Like a shell and env(1), so that scripts can tell a command that did not start from one that failed.
fn exit_code(code: &str) -> u8 {
    match code {
        "command_not_found" => 127,
        "command_not_executable" => 126,
        _ => 1,
    }
}

/// A message may have lines (the log of a service that did not start), but nothing else that drives a terminal.
fn lines(message: &str) -> String {
    let lines: Vec<_> = message.trim_end().split('\n').map(visible).collect();
    lines.join("\n")
}

impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Self {
        Self::Service(error)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::NobodyReads,
            _ => Self::Other(error.into()),
        }
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::Other(error.into())
    }
}
