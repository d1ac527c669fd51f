//! Processes that have together what a process has for itself: a memory or a table of descriptors, shared by `clone(2)` without being
//! threads.
//!
//! They are refused. What one of them gets back the other would get back once more; and when they are made again nothing joins
//! them, for sharing comes of `clone` alone, and the `execve` that gives a process its program ends it.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::error::{During, Error, Result};
use crate::hold::Held;
use crate::ids::{HostPid, InnerPid};
use crate::mem::Layout;
use crate::sys::process::{self, Share};

/// Refuses a tree with such processes, one of which `is_new`: those that were looked at before have not come to share anything
/// since.
pub(crate) fn refuse(held: &Held, is_new: impl Fn(HostPid) -> bool) -> Result<()> {
    // An `execve` gives a process both for itself, and its stack another place.
    let mut families: BTreeMap<[u64; 3], Vec<(InnerPid, HostPid)>> = BTreeMap::new();
    for (pid, process) in &held.processes {
        let Layout {
            start_code,
            start_stack,
            env_end,
            ..
        } = process.bounds;
        let family = families.entry([start_code, start_stack, env_end]);
        let one = (*pid, process.stopped.remote.host());
        family.or_default().push(one);
    }
    families.retain(|_, family| family.len() > 1 && family.iter().any(|one| is_new(one.1)));
    for mut family in families.into_values() {
        for (share, what) in [
            (Share::Memory, "address space"),
            (Share::Descriptors, "descriptor table"),
        ] {
            if let Some((pid, other)) = twins(&mut family, share)? {
                let stat = &held.processes[&pid].stat;
                return Err(Error::Unsupported {
                    pid,
                    name: String::from_utf8_lossy(&stat.name).into_owned(),
                    what: format!("it has its {what} together with process {other}"),
                });
            }
        }
    }
    Ok(())
}

/// Two that share something.
fn twins(family: &mut [(InnerPid, HostPid)], share: Share) -> Result<Option<(InnerPid, InnerPid)>> {
    let mut failed = None;
    family.sort_by(|(pid, a), (_, b)| {
        let order = process::compare(share, *a, *b);
        order.unwrap_or_else(|e| {
            failed = Some((*pid, e));
            Ordering::Equal
        })
    });
    if let Some((pid, e)) = failed {
        return Err(e).during(pid, "comparing it with others");
    }
    for pair in family.windows(2) {
        let [(pid, a), (other, b)] = *pair else {
            continue;
        };
        let order = process::compare(share, a, b);
        if order.during(pid, "comparing it with others")? == Ordering::Equal {
            return Ok(Some((pid.max(other), pid.min(other))));
        }
    }
    Ok(None)
}
