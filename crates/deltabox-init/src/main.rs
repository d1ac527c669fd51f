//! PID 1 of a DeltaBox sandbox.
//!
//! The supervisor starts this program as real root with one descriptor: the control socket. It builds the sandbox's
//! mounts ([`setup`], [`mounts`]), makes init in new namespaces, and ends. Init ([`serve`]) then starts commands
//! ([`child`]) and reaps, until the supervisor closes the socket; the kernel ends the whole pid namespace with it.
//!
//! Told otherwise by its first message, it stays outside and is a [`template`].

mod child;
mod mounts;
mod serve;
mod setup;
mod sys;
mod template;

use std::process::ExitCode;

use deltabox_init::{Reply, Step};

/// Why something was not done.
#[derive(Debug)]
pub(crate) struct Failure {
    step: Step,
    what: String,
    errno: i32,
}

impl From<Failure> for Reply {
    fn from(failure: Failure) -> Self {
        Self::Failed {
            step: failure.step,
            errno: failure.errno,
            what: failure.what.into_bytes(),
        }
    }
}

/// Adds step and object to an error.
pub(crate) trait At<T> {
    fn at(self, step: Step, what: &str) -> Result<T, Failure>;
}

impl<T, E: Into<std::io::Error>> At<T> for Result<T, E> {
    fn at(self, step: Step, what: &str) -> Result<T, Failure> {
        self.map_err(|e| Failure {
            step,
            what: what.to_owned(),
            errno: e.into().raw_os_error().unwrap_or(libc::EINVAL),
        })
    }
}

fn main() -> ExitCode {
    match setup::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
