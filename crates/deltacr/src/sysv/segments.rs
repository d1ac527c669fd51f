//! Segments of System V shared memory.
//!
//! A segment that was removed while it is attached goes when nobody has it attached any more, and nothing takes its removal back. So
//! what a rollback cannot keep, kept processes must let go of before it can be made again; and how a segment is removed, and who
//! may attach it, is settled when all have attached what they are to have.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};

use super::{Named, Resource, SystemV, can_stay, lines, named, visit};
use crate::env::Environment;
use crate::error::{During, Result};
use crate::ids::HostPid;
use crate::mem::{SharedObjects, ShmKey, Vma, mapped_file};
use crate::owners::Owners;
use crate::sys::ipc::{self, Rights};

/// Bits of a segment's mode, as `/proc/sysvipc/shm` shows it.
const REMOVED: u32 = 0o1000;
const LOCKED: u32 = 0o2000;
const RIGHTS: u32 = 0o777;

/// A segment, but for what it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Segment {
    /// In bytes.
    size: u64,
    /// It goes when nobody has it attached any more.
    removed: bool,
    /// It is not swapped out.
    locked: bool,
}

/// Which segments processes have attached, and where the memory of each can be opened.
#[derive(Default)]
pub(crate) struct Attached(BTreeMap<i32, String>);

impl Attached {
    /// Notes what a process has attached.
    pub(crate) fn note(&mut self, host: HostPid, vmas: &[Vma]) {
        for vma in vmas {
            if let Some(id) = vma.segment() {
                let path = || mapped_file(host, &vma.range());
                self.0.entry(id).or_insert_with(path);
            }
        }
    }

    /// Forgets segments that nobody has attached any more.
    pub(crate) fn forget(&mut self, ids: &BTreeSet<i32>) {
        self.0.retain(|id, _| !ids.contains(id));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The segments that there are and that cannot be made what an image has: those who have them attached are to let go of them.
pub(crate) fn doomed(env: &dyn Environment, wanted: &SystemV) -> Result<BTreeSet<i32>> {
    let all = visit(env, read).during_tree("reading System V shared memory")?;
    let doomed = all.iter().filter(|one| {
        let mut goals = wanted.segments.iter();
        !goals.any(|goal| can_stay(goal, one))
    });
    Ok(doomed.map(|one| one.id).collect())
}

/// When all processes have attached what they are to have: settles who may do what with the segments, and which are removed.
pub(crate) fn finish(env: &dyn Environment, wanted: &SystemV) -> Result<()> {
    if wanted.segments.is_empty() {
        return Ok(());
    }
    visit(env, |owners| {
        let now = read(owners)?;
        wanted.segments.iter().try_for_each(|goal| {
            let one = now.iter().find(|one| one.id == goal.id);
            let one = one.ok_or_else(|| io::Error::other(format!("{} is gone", goal.id)))?;
            if (one.mode, one.owner) != (goal.mode, goal.owner) {
                ipc::set_segment_rights(goal.id, goal.rights(owners))?;
            }
            if one.holds.locked != goal.holds.locked {
                ipc::lock_segment(goal.id, goal.holds.locked)?;
            }
            match goal.holds.removed && !one.holds.removed {
                true => ipc::remove_segment(goal.id),
                false => Ok(()),
            }
        })
    })
    .during_tree("settling System V shared memory")
}

pub(super) fn read(owners: &Owners) -> io::Result<Vec<Named<Segment>>> {
    // key, id, mode, size, creator, last user, attachments, then owner and creator
    let segment = |line: &Vec<i64>| {
        let mode = line[2] as u32;
        let holds = Segment {
            size: line[3] as u64,
            removed: mode & REMOVED != 0,
            locked: mode & LOCKED != 0,
        };
        let found = named(owners, line, 7, holds);
        Named {
            mode: mode & RIGHTS,
            ..found
        }
    };
    Ok(lines("shm")?.iter().map(segment).collect())
}

/// Lets everybody attach these.
pub(super) fn open_up(
    owners: &Owners,
    segments: &[Named<Segment>],
    to_attach: &BTreeSet<i32>,
) -> io::Result<()> {
    let closed = segments.iter().filter(|one| to_attach.contains(&one.id));
    closed.into_iter().try_for_each(|one| {
        let rights = Rights {
            mode: RIGHTS,
            ..one.rights(owners)
        };
        ipc::set_segment_rights(one.id, rights)
    })
}

/// Shows the memory of segments to the registry. To attach one leaves traces, so it is opened where a process has it already.
pub(super) fn show(
    shared: &SharedObjects,
    attached: &Attached,
    segments: &[Named<Segment>],
) -> io::Result<Vec<ShmKey>> {
    let show = |one: &Named<Segment>| {
        let file = match attached.0.get(&one.id) {
            Some(path) => File::open(path),
            None => ipc::segment_file(one.id),
        };
        file.and_then(|file| shared.show_segment(one.id, file))
            .map_err(|e| io::Error::other(format!("segment {}: {e}", one.id)))
    };
    segments.iter().map(show).collect()
}

impl Resource for Segment {
    fn make(named: &Named<Self>) -> io::Result<i32> {
        let size = usize::try_from(named.holds.size).map_err(io::Error::other)?;
        ipc::new_segment(named.key, size, RIGHTS)
    }

    fn remove(id: i32) -> io::Result<()> {
        ipc::remove_segment(id)
    }

    fn fill(_: &Named<Self>, _: Rights, _: Option<&Self>) -> io::Result<()> {
        // The registry does, and `finish`.
        Ok(())
    }

    fn fits(&self, now: &Self) -> bool {
        self.size == now.size && (self.removed || !now.removed)
    }
}
