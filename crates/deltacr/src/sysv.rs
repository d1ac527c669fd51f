//! System V semaphores, message queues and shared memory. They are no process' own and go on without any.
//!
//! Processes are only asked whether there are some. The rest a thread of ours does that visits the sandbox's namespace.

mod segments;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::AsFd;

use serde::{Deserialize, Serialize};

use crate::env::{Environment, Namespace};
use crate::error::{During, Result};
use crate::mem::SharedObjects;
use crate::owners::Owners;
use crate::remote::{Batch, CallId, DataRef, Outcome, Remote};
use crate::sys::ipc::{self, Rights};
use crate::sys::process;

use segments::Segment;
pub(crate) use segments::{Attached, doomed, finish};

/// `SEM_INFO`, the size of the `struct seminfo` that it fills, and where that has the number of sets (`semusz`).
const SEMAPHORES: (i32, usize, usize) = (19, 40, 28);
/// `MSG_INFO`, the size of the `struct msginfo` that it fills, and where that has the number of queues (`msgpool`).
const QUEUES: (i32, usize, usize) = (12, 32, 0);
/// `SHM_INFO`, the size of the `struct shm_info` that it fills, and where that has the number of segments (`used_ids`).
const SEGMENTS: (i32, usize, usize) = (14, 48, 0);

/// Where in a batch the questions are.
pub(crate) struct Questions {
    semaphores: (CallId, DataRef),
    queues: (CallId, DataRef),
    segments: (CallId, DataRef),
}

impl Questions {
    /// Adds the questions to a batch.
    pub(crate) fn ask(b: &mut Batch) -> Self {
        let (info, size, _) = SEMAPHORES;
        let sets = b.output(size);
        let args = [0.into(), 0.into(), info.into(), sets.into()];
        let semaphores = (b.call(libc::SYS_semctl, &args), sets);
        let mut control = |nr, (info, size, _): (i32, usize, usize)| {
            let told = b.output(size);
            (b.call(nr, &[0.into(), info.into(), told.into()]), told)
        };
        let queues = control(libc::SYS_msgctl, QUEUES);
        let segments = control(libc::SYS_shmctl, SEGMENTS);
        Self {
            semaphores,
            queues,
            segments,
        }
    }

    /// Whether there are any in the sandbox.
    pub(crate) fn answers(&self, o: &Outcome) -> bool {
        // A kernel without them has none.
        let any = |(call, data): (CallId, DataRef), at| {
            o.result(call).is_ok() && o.int(data.at(at, 4)) != 0
        };
        any(self.semaphores, SEMAPHORES.2)
            || any(self.queues, QUEUES.2)
            || any(self.segments, SEGMENTS.2)
    }
}

/// Whether there are any in the sandbox, as one of its processes has it.
pub(crate) fn are_there(remote: &mut Remote) -> Result<bool> {
    let mut batch = Batch::new();
    let questions = Questions::ask(&mut batch);
    let outcome = remote.run(&batch);
    let outcome = outcome.during(remote.pid(), "asking for System V objects")?;
    Ok(questions.answers(&outcome))
}

/// All semaphores, message queues and segments of a sandbox at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SystemV {
    sets: Vec<Named<Set>>,
    queues: Vec<Named<Queue>>,
    #[serde(default)]
    segments: Vec<Named<Segment>>,
}

/// What both have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Named<T> {
    id: i32,
    key: i32,
    mode: u32,
    owner: (u32, u32),
    creator: (u32, u32),
    holds: T,
}

/// A set of semaphores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Set {
    values: Vec<u16>,
}

/// A message queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Queue {
    /// The most bytes that may wait in it.
    capacity: u64,
    /// Each with its type.
    messages: Vec<(i64, Vec<u8>)>,
}

impl SystemV {
    pub(crate) fn is_empty(&self) -> bool {
        self.sets.is_empty() && self.queues.is_empty() && self.segments.is_empty()
    }
}

impl<T> Named<T> {
    fn rights(&self, owners: &Owners) -> Rights {
        Rights {
            mode: self.mode,
            owner: owners.outside(self.owner),
        }
    }

    /// Whether `other` is the same one, whatever it holds.
    fn is(&self, other: &Self) -> bool {
        (self.id, self.key, self.creator) == (other.id, other.key, other.creator)
    }
}

/// Reads what there is. What the segments hold goes to `shared`.
pub(crate) fn capture(
    env: &dyn Environment,
    shared: &SharedObjects,
    attached: &Attached,
) -> Result<SystemV> {
    visit(env, |owners| {
        let found = read(owners)?;
        segments::show(shared, attached, &found.segments)?
            .into_iter()
            .try_for_each(|key| shared.capture(key))?;
        Ok(found)
    })
    .during_tree("reading System V semaphores, message queues and shared memory")
}

/// Makes what there is the same as in an image, and shows the segments to `shared`, which is to fill them. Those that are
/// `to_attach` can be attached by everybody until [`finish`] is called.
pub(crate) fn restore(
    env: &dyn Environment,
    wanted: &SystemV,
    (shared, attached): (&SharedObjects, &Attached),
    to_attach: &BTreeSet<i32>,
) -> Result<()> {
    visit(env, |owners| {
        let now = read(owners)?;
        settle(owners, "sem_next_id", &now.sets, &wanted.sets)?;
        settle(owners, "msg_next_id", &now.queues, &wanted.queues)?;
        settle(owners, "shm_next_id", &now.segments, &wanted.segments)?;
        segments::open_up(owners, &wanted.segments, to_attach)?;
        segments::show(shared, attached, &wanted.segments).map(drop)
    })
    .during_tree("restoring System V semaphores, message queues and shared memory")
}

/// Does something in the sandbox's IPC namespace, on a thread of its own.
fn visit<T: Send>(
    env: &dyn Environment,
    act: impl FnOnce(&Owners) -> io::Result<T> + Send,
) -> io::Result<T> {
    let namespace = env.namespace(Namespace::Ipc)?;
    let owners = Owners::of(env)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            process::enter(namespace.as_fd())?;
            act(&owners)
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn read(owners: &Owners) -> io::Result<SystemV> {
    let mut found = SystemV::default();
    // key, id, mode, number of semaphores, then owner and creator
    for line in lines("sem")? {
        let values = ipc::values(line[1] as i32, line[3] as usize)?;
        found.sets.push(named(owners, &line, 4, Set { values }));
    }
    // key, id, mode, bytes, messages, last sender and receiver, then owner and creator
    for line in lines("msg")? {
        let id = line[1] as i32;
        let mut messages = Vec::new();
        while let Some(message) = ipc::message(id, Some(messages.len()), line[3] as usize)? {
            messages.push(message);
        }
        let capacity = ipc::capacity(id)?;
        let queue = Queue { capacity, messages };
        found.queues.push(named(owners, &line, 7, queue));
    }
    found.segments = segments::read(owners)?;
    Ok(found)
}

/// The lines of a list in `/proc/sysvipc`, as numbers; the third is octal.
fn lines(list: &str) -> io::Result<Vec<Vec<i64>>> {
    let text = fs::read_to_string(format!("/proc/sysvipc/{list}"))?;
    let line = |line: &str| {
        let number = |(at, word)| i64::from_str_radix(word, if at == 2 { 8 } else { 10 });
        line.split_whitespace().enumerate().map(number).collect()
    };
    let lines: Result<Vec<Vec<_>>, _> = text.lines().skip(1).map(line).collect();
    let lines = lines.map_err(io::Error::other)?;
    match lines.iter().all(|line| line.len() >= 10) {
        true => Ok(lines),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn named<T>(owners: &Owners, line: &[i64], owner: usize, holds: T) -> Named<T> {
    let user = |at: usize| {
        let id = |at: usize| line.get(at).map_or(0, |id| *id as u32);
        owners.inside((id(at), id(at + 1)))
    };
    Named {
        id: line[1] as i32,
        key: line[0] as i32,
        mode: line[2] as u32,
        owner: user(owner),
        creator: user(owner + 2),
        holds,
    }
}

/// What sets and queues have in common for those who make them.
trait Resource: Sized + PartialEq {
    fn make(named: &Named<Self>) -> io::Result<i32>;
    fn remove(id: i32) -> io::Result<()>;
    /// Makes one, which held `now`, hold what it should.
    fn fill(named: &Named<Self>, rights: Rights, now: Option<&Self>) -> io::Result<()>;
    /// Whether one that holds `now` can be made to hold this.
    fn fits(&self, now: &Self) -> bool;
}

impl Resource for Set {
    fn make(named: &Named<Self>) -> io::Result<i32> {
        ipc::new_set(named.key, named.holds.values.len(), named.mode)
    }

    fn remove(id: i32) -> io::Result<()> {
        ipc::remove_set(id)
    }

    fn fill(named: &Named<Self>, rights: Rights, _: Option<&Self>) -> io::Result<()> {
        ipc::set_set_rights(named.id, rights)?;
        ipc::set_values(named.id, &named.holds.values)
    }

    fn fits(&self, now: &Self) -> bool {
        self.values.len() == now.values.len()
    }
}

impl Resource for Queue {
    fn make(named: &Named<Self>) -> io::Result<i32> {
        ipc::new_queue(named.key, named.mode)
    }

    fn remove(id: i32) -> io::Result<()> {
        ipc::remove_queue(id)
    }

    fn fill(named: &Named<Self>, rights: Rights, now: Option<&Self>) -> io::Result<()> {
        ipc::set_queue_rights(named.id, rights, named.holds.capacity)?;
        if now.is_some_and(|now| now.messages == named.holds.messages) {
            return Ok(());
        }
        while ipc::message(named.id, None, 0)?.is_some() {}
        let mut messages = named.holds.messages.iter();
        messages.try_for_each(|(kind, bytes)| ipc::send(named.id, *kind, bytes))
    }

    fn fits(&self, _: &Self) -> bool {
        true
    }
}

/// Whether `one` can be made what it is to be, `goal`.
fn can_stay<T: Resource>(goal: &Named<T>, one: &Named<T>) -> bool {
    goal.is(one) && goal.holds.fits(&one.holds)
}

/// Makes what there is the same as what is `wanted`; `next` is the setting by which a new one gets its id.
fn settle<T: Resource>(
    owners: &Owners,
    next: &str,
    now: &[Named<T>],
    wanted: &[Named<T>],
) -> io::Result<()> {
    for one in now {
        if !wanted.iter().any(|goal| can_stay(goal, one)) {
            T::remove(one.id)?;
        }
    }
    for goal in wanted {
        match now.iter().find(|one| can_stay(goal, one)) {
            Some(one) if one == goal => {}
            Some(one) => T::fill(goal, goal.rights(owners), Some(&one.holds))?,
            None => {
                fs::write(format!("/proc/sys/kernel/{next}"), goal.id.to_string())?;
                let id = ipc::acting_as(owners.outside(goal.creator), || T::make(goal))?;
                if id != goal.id {
                    T::remove(id)?;
                    let what = format!("{} became {id}", goal.id);
                    return Err(io::Error::other(what));
                }
                T::fill(goal, goal.rights(owners), None)?;
            }
        }
    }
    Ok(())
}
