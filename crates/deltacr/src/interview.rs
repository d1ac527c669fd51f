//! What only the processes themselves can tell: one batch of questions in each of their threads.
//!
//! The batches of all threads run at once, and while they run the engine looks at what it can see without them.

use std::collections::BTreeMap;
use std::io;
use std::sync::LazyLock;

use crate::attributes::{self, Attributes};
use crate::error::{During, Result};
use crate::ids::{HostPid, InnerPid};
use crate::remote::{Batch, FlightId, Outcome, Remote, Standing};
use crate::stop::{Stopped, StoppedThread};
use crate::sys::process;
use crate::sysv;
use crate::threads;

/// The questions to a process and its first thread.
struct First {
    batch: Standing,
    process: attributes::Questions,
    thread: threads::Questions,
    system_v: sysv::Questions,
}

/// The questions to any other thread.
struct Other {
    batch: Standing,
    thread: threads::Questions,
}

impl First {
    fn new(ambient_too: bool) -> Self {
        let mut batch = Batch::new();
        let process = attributes::Questions::ask(&mut batch, ambient_too);
        let thread = threads::Questions::ask(&mut batch);
        let system_v = sysv::Questions::ask(&mut batch);
        Self {
            batch: Standing::new(batch),
            process,
            thread,
            system_v,
        }
    }

    /// What is to be asked of this process.
    fn of(host: HostPid) -> io::Result<&'static Self> {
        Ok(match process::inheritable(host)? {
            0 => &FIRST,
            _ => &FIRST_WITH_AMBIENT,
        })
    }
}

static FIRST: LazyLock<First> = LazyLock::new(|| First::new(false));
static FIRST_WITH_AMBIENT: LazyLock<First> = LazyLock::new(|| First::new(true));

static OTHER: LazyLock<Other> = LazyLock::new(|| {
    let mut batch = Batch::new();
    let thread = threads::Questions::ask(&mut batch);
    Other {
        batch: Standing::new(batch),
        thread,
    }
});

/// What a process answered.
pub(crate) struct Answers {
    pub(crate) attributes: Attributes,
    /// Where its heap ends, which nothing else tells.
    pub(crate) program_break: u64,
    pub(crate) threads: BTreeMap<InnerPid, threads::Answers>,
    /// Whether there are System V semaphores, message queues or segments in the sandbox.
    pub(crate) system_v: bool,
}

/// Questions that a process is answering.
pub(crate) struct Interview {
    questions: &'static First,
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
        let questions = First::of(host)?;
        let first = remote.launch(host, &questions.batch)?;
        let first = first.ok_or(io::ErrorKind::ArgumentListTooLong)?;
        let mut others = Vec::with_capacity(threads.len().saturating_sub(1));
        for thread in threads.iter().filter(|thread| thread.host != host) {
            others.push((thread.into(), remote.launch(thread.host, &OTHER.batch)?));
        }
        Ok(Self {
            questions,
            first,
            others,
        })
    }

    /// Waits for the answers.
    pub(crate) fn end(self, remote: &mut Remote) -> Result<Answers> {
        let pid = remote.pid();
        self.land(remote).during(pid, "reading the attributes")
    }

    fn land(mut self, remote: &mut Remote) -> io::Result<Answers> {
        let outcome = remote.land(&self.first, &self.questions.batch)?;
        let mut answers = Answers::of(remote, self.questions, &outcome)?;
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
                let threads = answers.threads.iter();
                let gists = threads.map(|(tid, answer)| (*tid, answer.gist));
                answers.attributes.note_others(gists);
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
    fn of(remote: &Remote, questions: &First, outcome: &Outcome) -> io::Result<Self> {
        let First {
            process,
            thread,
            system_v,
            ..
        } = questions;
        Ok(Self {
            attributes: process.attributes(outcome, remote)?,
            program_break: process.program_break(outcome)?,
            threads: BTreeMap::from([(remote.pid(), thread.answers(outcome)?)]),
            system_v: system_v.answers(outcome),
        })
    }
}

/// Asks a process and its threads, and waits for the answers.
pub(crate) fn ask(stopped: &mut Stopped) -> Result<Answers> {
    Interview::begin(stopped)?.end(&mut stopped.remote)
}
