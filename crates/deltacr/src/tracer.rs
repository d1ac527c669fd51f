//! Threads that trace. What a thread traces is its own, so that a checkpoint or rollback is done by one thread from beginning
//! to end; and when the thread ends, the kernel lets go of whatever it still traces.
//!
//! Starting a thread, and touching a new stack and heap for the first time, takes a tenth of a quick rollback. So threads
//! whose work went well, which have let go of everything, are kept for the next.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::error::{During, Error, Result};
use crate::sys::lend::{Job, lend};
use crate::sys::{process, ptrace};

/// How many threads wait for work at most.
const IDLE: usize = 8;

static WAITING: Mutex<Vec<Tracer>> = Mutex::new(Vec::new());

/// Does the work on a thread that traces nothing yet. If the work fails, nothing is traced any more when this returns.
pub(crate) fn trace<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let tracer = match waiting {
        Some(tracer) => tracer,
        None => Tracer::start().during_tree("starting a tracing thread")?,
    };
    let work = || {
        let done = work()?;
        // Somebody that was killed, say, and has not come to its end.
        let is_free = matches!(ptrace::reap_tracees(), Ok(false));
        Ok((done, is_free))
    };
    // A tracer that is not kept ends here, and with it what it traced.
    match lend(work, |job| tracer.give(job)) {
        Some(Ok(Ok((done, is_free)))) => {
            if is_free {
                tracer.keep();
            }
            Ok(done)
        }
        Some(Ok(Err(e))) => Err(e),
        Some(Err(panic)) => {
            drop(tracer);
            std::panic::resume_unwind(panic)
        }
        None => Err(Error::Tree {
            doing: "giving work to a tracing thread".to_owned(),
            source: std::io::ErrorKind::BrokenPipe.into(),
        }),
    }
}

/// A thread that does what it is given. Dropping it waits for its end.
struct Tracer {
    /// `None` when it is to end.
    jobs: Option<Sender<Job>>,
    /// `None` when its end was waited for.
    thread: Option<JoinHandle<()>>,
}

impl Tracer {
    fn start() -> std::io::Result<Self> {
        let (jobs, given) = channel::<Job>();
        let thread = std::thread::Builder::new()
            .name("deltacr".to_owned())
            .spawn(move || {
                process::sleep_precisely();
                given.into_iter().for_each(|job| job());
            })?;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    fn give(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // A job that does not arrive is dropped, of which its giver hears.
            let _ = jobs.send(job);
        }
    }

    fn keep(self) {
        let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < IDLE {
            waiting.push(self);
        }
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // Jobs catch their panics.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn current() -> Result<std::thread::ThreadId> {
        Ok(std::thread::current().id())
    }

    #[test]
    fn a_thread_is_kept_after_success_and_ends_after_failure() {
        let here = current().unwrap();
        let first = trace(current).unwrap();
        assert_ne!(first, here);
        let failed = trace(|| {
            Err::<(), _>(Error::Tree {
                doing: "failing".to_owned(),
                source: std::io::ErrorKind::Other.into(),
            })
        });
        assert!(failed.is_err());
        let panicked =
            std::panic::catch_unwind(|| trace(|| -> Result<()> { panic!("on purpose") }));
        assert!(panicked.is_err());
        trace(current).unwrap();
    }
}
