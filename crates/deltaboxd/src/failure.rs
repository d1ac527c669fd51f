//! How errors are answered: a status for HTTP, a code for programs, a message with its causes for people.

use std::error::Error as StdError;
use std::io::ErrorKind;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use deltabox::Error;

use crate::api::{ErrorBody, ErrorDetail};

/// An error, ready to be sent.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: StatusCode,
    code: &'static str,
    message: String,
}

/// The result of answering a request.
pub(crate) type Answer<T> = std::result::Result<T, Failure>;

impl Failure {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
        }
    }

    /// The request itself makes no sense.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", message)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = ErrorBody {
            error: ErrorDetail {
                code: self.code.to_owned(),
                message: self.message,
            },
        };
        (self.status, Json(body)).into_response()
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let (status, code) = classify(&error);
        Self::new(status, code, with_causes(&error))
    }
}

fn classify(error: &Error) -> (StatusCode, &'static str) {
    match error {
        Error::NoSandbox(_) => (StatusCode::NOT_FOUND, "no_sandbox"),
        Error::NoCheckpoint { .. } => (StatusCode::NOT_FOUND, "no_checkpoint"),
        Error::NoSession { .. } => (StatusCode::NOT_FOUND, "no_session"),
        Error::NameTaken(_) => (StatusCode::CONFLICT, "name_taken"),
        Error::Epoch { .. } => (StatusCode::CONFLICT, "epoch"),
        Error::NotRunning { .. } => (StatusCode::CONFLICT, "not_running"),
        Error::Invalid(_) => (StatusCode::BAD_REQUEST, "invalid"),
        Error::Spawn { source, .. } => (StatusCode::UNPROCESSABLE_ENTITY, spawn_code(source)),
        Error::NotDurable { .. } if error.is_disk_full() => {
            (StatusCode::INSUFFICIENT_STORAGE, "not_durable")
        }
        Error::NotDurable { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "not_durable"),
        Error::Unusable { .. } => (StatusCode::CONFLICT, "unusable"),
        _ if error.is_disk_full() => (StatusCode::INSUFFICIENT_STORAGE, "disk_full"),
        Error::Processes(_) => (StatusCode::CONFLICT, "processes"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
    }
}

fn spawn_code(source: &std::io::Error) -> &'static str {
    match source.kind() {
        ErrorKind::NotFound => "command_not_found",
        ErrorKind::PermissionDenied => "command_not_executable",
        _ => "spawn",
    }
}

/// The error and its causes on one line; a cause that the message tells already is not told again.
fn with_causes(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let error = Error::Spawn {
            program: "nope".into(),
            source: std::io::Error::from_raw_os_error(2),
        };
        let failure = Failure::from(error);
        assert_eq!(failure.code, "command_not_found");
        assert_eq!(failure.message.matches("No such file").count(), 1);
    }
}
