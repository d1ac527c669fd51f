//! What only the processes themselves can tell: one batch of questions in each of their threads.
//!
//! The batches of all threads run at once, and while they run the engine looks at what it can see without them.

use std::collections::BTreeMap;
use std::io;
use std::sync::LazyLock;

use crate::attributes::{self, Attributes};
use crate::error::{During, Result};
use crate::ids::{HostPid, InnerPid};
use crate::remote::{Batch, FlightId, Outcome, Remote};
use crate::stop::{Stopped, StoppedThread};
use crate::sysv;
use crate::threads;

/// The questions to a process and its first thread.
struct First {
    batch: Batch,
    process: attributes::Questions,
    thread: threads::Questions,
    system_v: sysv::Questions,
}

/// The questions to any other thread.
struct Other {
    batch: Batch,
    thread: threads::Questions,
}

static FIRST: LazyLock<First> = LazyLock::new(|| {
    let mut batch = Batch::new();
    let process = attributes::Questions::ask(&mut batch);
    let thread = threads::Questions::ask(&mut batch);
    let system_v = sysv::Questions::ask(&mut batch);
    First {
        batch,
        process,
        thread,
        system_v,
    }
});

static OTHER: LazyLock<Other> = LazyLock::new(|| {
    let mut batch = Batch::new();
    let thread = threads::Questions::ask(&mut batch);
    Other { batch, thread }
});

/// What a process answered.
pub(crate) struct Answers {
    pub(crate) attributes: Attributes,
    /// Where its heap ends, which nothing else tells.
    pub(crate) program_break: u64,
    pub(crate) threads: BTreeMap<InnerPid, threads::Answers>,
    /// What is there of the whole sandbox.
    /// Whether there are System V semaphores or message queues.
    pub(crate) system_v: bool,
}

/// Questions that a process is answering.
pub(crate) struct Interview {
    first: FlightId,
    others: Vec<(Thread, Option<FlightId>)>,
}

#[derive(Clone, Copy)]
struct Thread {
    tid: InnerPid,
    host: HostPid,
}

impl From<&StoppedThread> for Thread {
    fn from(thread: &StoppedThread) -> Self {
        Self {
            tid: thread.tid,
            host: thread.host,
        }
    }
}

impl Interview {
    /// Sets the threads of a stopped process going.
    pub(crate) fn begin(stopped: &mut Stopped) -> Result<Self> {
        let pid = stopped.remote.pid();
        Self::launch(stopped).during(pid, "asking for the attributes")
    }

    fn launch(Stopped { remote, threads }: &mut Stopped) -> io::Result<Self> {
        remote.clear_flights()?;
        let host = remote.host();
        let first = remote.launch(host, &FIRST.batch)?;
        let first = first.ok_or(io::ErrorKind::ArgumentListTooLong)?;
        let mut others = Vec::with_capacity(threads.len().saturating_sub(1));
        for thread in threads.iter().filter(|thread| thread.host != host) {
            others.push((thread.into(), remote.launch(thread.host, &OTHER.batch)?));
        }
        Ok(Self { first, others })
    }

    /// Waits for the answers.
    pub(crate) fn end(self, remote: &mut Remote) -> Result<Answers> {
        let pid = remote.pid();
        self.land(remote).during(pid, "reading the attributes")
    }

    fn land(mut self, remote: &mut Remote) -> io::Result<Answers> {
        let outcome = remote.land(&self.first, &FIRST.batch)?;
        let mut answers = Answers::of(remote, &outcome)?;
        loop {
            let mut waiting = Vec::new();
            for (thread, flight) in self.others {
                match flight {
                    Some(flight) => {
                        let outcome = remote.land(&flight, &OTHER.batch)?;
                        let answer = OTHER.thread.answers(&outcome)?;
                        answers.threads.insert(thread.tid, answer);
                    }
                    None => waiting.push(thread),
                }
            }
            if waiting.is_empty() {
                return Ok(answers);
            }
            // There are more than have room at once.
            remote.clear_flights()?;
            self.others = Vec::with_capacity(waiting.len());
            for thread in waiting {
                let flight = remote.launch(thread.host, &OTHER.batch)?;
                self.others.push((thread, flight));
            }
        }
    }
}

impl Answers {
    fn of(remote: &Remote, outcome: &Outcome) -> io::Result<Self> {
        let first = FIRST.thread.answers(outcome)?;
        Ok(Self {
            attributes: FIRST.process.attributes(outcome, remote.host())?,
            program_break: FIRST.process.program_break(outcome)?,
            threads: BTreeMap::from([(remote.pid(), first)]),
            system_v: FIRST.system_v.answers(outcome),
        })
    }
}

/// Asks a process and its threads, and waits for the answers.
pub(crate) fn ask(stopped: &mut Stopped) -> Result<Answers> {
    Interview::begin(stopped)?.end(&mut stopped.remote)
}
