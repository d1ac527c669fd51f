//! System V semaphores and message queues. They are no process' own and go on without any, are not carried, and so may not be
//! there at a checkpoint; those that were made since go with the state that is given up.

use crate::error::{During, Error, Result};
use crate::ids::InnerPid;
use crate::remote::{Batch, CallId, DataRef, Outcome, Remote};

/// `IPC_RMID`
const REMOVE: i32 = 0;
/// `SEM_INFO`, `SEM_STAT`, and what they fill: `struct seminfo`, `struct semid64_ds`.
const SEMAPHORES: (i32, i32, usize, usize) = (19, 18, 40, 104);
/// Where `struct seminfo` has the number of sets (`semusz`).
const SETS: usize = 28;
/// `MSG_INFO`, `MSG_STAT`, and what they fill: `struct msginfo`, `struct msqid64_ds`.
const QUEUES: (i32, i32, usize, usize) = (12, 11, 32, 120);
/// Where `struct msginfo` has the number of queues (`msgpool`).
const POOL: usize = 0;
/// What looking at one and removing it takes of a batch's heap.
const ROOM: usize = 128;

/// Where in a batch the questions are.
pub(crate) struct Questions {
    semaphores: (CallId, DataRef),
    queues: (CallId, DataRef),
}

/// How many there are in the sandbox, and the highest place that one has in the kernel's table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Census {
    sets: i32,
    last_set: u64,
    queues: i32,
    last_queue: u64,
}

impl Questions {
    /// Adds the questions to a batch.
    pub(crate) fn ask(b: &mut Batch) -> Self {
        let (info, _, size, _) = SEMAPHORES;
        let sets = b.output(size);
        let args = [0.into(), 0.into(), info.into(), sets.into()];
        let semaphores = (b.call(libc::SYS_semctl, &args), sets);
        let (info, _, size, _) = QUEUES;
        let pool = b.output(size);
        let args = [0.into(), info.into(), pool.into()];
        let queues = (b.call(libc::SYS_msgctl, &args), pool);
        Self { semaphores, queues }
    }

    pub(crate) fn answers(&self, o: &Outcome) -> Census {
        // A kernel without them has none.
        let of = |(call, data): (CallId, DataRef), at| match o.result(call) {
            Ok(last) => (o.int(data.at(at, 4)), last),
            Err(_) => (0, 0),
        };
        let (sets, last_set) = of(self.semaphores, SETS);
        let (queues, last_queue) = of(self.queues, POOL);
        Census {
            sets,
            last_set,
            queues,
            last_queue,
        }
    }
}

impl Census {
    pub(crate) fn is_empty(self) -> bool {
        self.sets == 0 && self.queues == 0
    }

    /// Refuses a checkpoint. `pid` is any process that sees them.
    pub(crate) fn check(self, pid: InnerPid, name: &[u8]) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        Err(Error::Unsupported {
            pid,
            name: String::from_utf8_lossy(name).into_owned(),
            what: format!(
                "there are System V semaphores ({} sets) or message queues ({}), which are not carried; remove them (ipcrm -a)",
                self.sets, self.queues
            ),
        })
    }
}

/// Removes what there is, as far as the process may.
pub(crate) fn remove_all(remote: &mut Remote) -> Result<()> {
    let pid = remote.pid();
    let doing = "removing System V semaphores and message queues";
    let mut ask = Batch::new();
    let questions = Questions::ask(&mut ask);
    let outcome = remote.run(&ask).during(pid, doing)?;
    let census = questions.answers(&outcome);
    if census.is_empty() {
        return Ok(());
    }
    let mut batch = Batch::new();
    let sets = (0..=census.last_set).map(|at| (true, at));
    let queues = (0..=census.last_queue).map(|at| (false, at));
    for (is_set, at) in sets.chain(queues) {
        if !batch.fits(2, ROOM) {
            remote.run(&std::mem::take(&mut batch)).during(pid, doing)?;
        }
        // Where nothing is, the first call fails and gives no number to the second.
        if is_set {
            let (_, stat, _, size) = SEMAPHORES;
            let data = batch.output(size);
            let args = [at.into(), 0.into(), stat.into(), data.into()];
            let id = batch.call(libc::SYS_semctl, &args);
            batch.call(
                libc::SYS_semctl,
                &[id.into(), 0.into(), REMOVE.into(), 0.into()],
            );
        } else {
            let (_, stat, _, size) = QUEUES;
            let data = batch.output(size);
            let id = batch.call(libc::SYS_msgctl, &[at.into(), stat.into(), data.into()]);
            batch.call(libc::SYS_msgctl, &[id.into(), REMOVE.into(), 0.into()]);
        }
    }
    remote.run(&batch).during(pid, doing).map(drop)
}
