//! What only the processes themselves can tell: one batch of questions in each of their threads.
//!
//! The batches of all threads run at once, and while they run the engine looks at what it can see without them.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use crate::attributes::{self, Attributes};
use crate::error::{During, Result};
use crate::ids::{HostPid, InnerPid};
use crate::remote::{Batch, FlightId, Outcome, Remote, Standing};
use crate::stop::{Stopped, StoppedThread};
use crate::sys::process;
use crate::sysv;
use crate::threads;
use crate::whereabouts::{self, Whereabouts};

/// The questions to a process and its first thread.
struct First {
    batch: Standing,
    process: attributes::Questions,
    thread: threads::Questions,
    system_v: sysv::Questions,
    whereabouts: whereabouts::Questions,
}

/// The questions to any other thread.
struct Other {
    batch: Standing,
    thread: threads::Questions,
}

impl First {
    fn new(ambient_too: bool, bounding: u64) -> Self {
        let mut batch = Batch::new();
        let process = attributes::Questions::ask(&mut batch, ambient_too, bounding);
        let thread = threads::Questions::ask(&mut batch);
        let system_v = sysv::Questions::ask(&mut batch);
        let whereabouts = whereabouts::Questions::ask(&mut batch);
        Self {
            batch: Standing::new(batch),
            process,
            thread,
            system_v,
            whereabouts,
        }
    }
}

/// What is to be asked of processes with bounding sets of at most these capabilities.
pub(crate) struct Questionnaire {
    bounding: u64,
    plain: First,
    with_ambient: First,
}

impl Questionnaire {
    /// The one for such processes, which all who ask for it share.
    pub(crate) fn of(bounding: u64) -> Arc<Self> {
        // Two at most: sandboxes are all alike, and processes that are no sandbox's yet may have all capabilities.
        static MADE: Mutex<Vec<Arc<Questionnaire>>> = Mutex::new(Vec::new());
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = made.iter().find(|known| known.bounding == bounding) {
            return Arc::clone(known);
        }
        let new = Arc::new(Self {
            bounding,
            plain: First::new(false, bounding),
            with_ambient: First::new(true, bounding),
        });
        made.push(Arc::clone(&new));
        new
    }

    fn to(&self, host: HostPid) -> io::Result<&First> {
        Ok(match process::inheritable(host)? {
            0 => &self.plain,
            _ => &self.with_ambient,
        })
    }
}

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
    /// Where it stands.
    pub(crate) whereabouts: Whereabouts,
}

/// Questions that a process is answering.
pub(crate) struct Interview<'q> {
    questions: &'q First,
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

impl<'q> Interview<'q> {
    /// Sets the threads of a stopped process going.
    pub(crate) fn begin(stopped: &mut Stopped, questionnaire: &'q Questionnaire) -> Result<Self> {
        let pid = stopped.remote.pid();
        Self::launch(stopped, questionnaire).during(pid, "asking for the attributes")
    }

    fn launch(
        Stopped { remote, threads }: &mut Stopped,
        questionnaire: &'q Questionnaire,
    ) -> io::Result<Self> {
        remote.clear_flights()?;
        let host = remote.host();
        let questions = questionnaire.to(host)?;
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
            whereabouts,
            ..
        } = questions;
        Ok(Self {
            attributes: process.attributes(outcome, remote)?,
            program_break: process.program_break(outcome)?,
            threads: BTreeMap::from([(remote.pid(), thread.answers(outcome)?)]),
            system_v: system_v.answers(outcome),
            whereabouts: whereabouts.answers(outcome),
        })
    }
}

/// Asks a process and its threads, and waits for the answers. It may have any capabilities.
pub(crate) fn ask(stopped: &mut Stopped) -> Result<Answers> {
    let questionnaire = Questionnaire::of(u64::MAX);
    Interview::begin(stopped, &questionnaire)?.end(&mut stopped.remote)
}
