//! Killing a command with everything that came from it.
//!
//! Looked for while nothing moves (the cgroup is frozen): the command, its session and process group, their children
//! to any depth, and processes that have left all of these but still carry the session's mark in their environment.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

use crate::cgroup;
use crate::error::Result;
use crate::report::SessionId;

/// Names the session in the environment of its processes.
pub(crate) const MARK: &str = "DELTABOX_SESSION";

/// The most bytes of an environment that are searched.
const ENVIRONMENT: u64 = 256 * 1024;

/// What `/proc/PID/status` says of one process. Numbers inside, but for `parent`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Status {
    parent: i32,
    pid: i32,
    group: i32,
    session: i32,
}

/// Kills the command with pid `leader` (inside) of `session` and its descendants in the frozen-and-thawed group
/// `payload`, but for the processes (outside) that are to be spared. The caller sees to it that no checkpoint or rollback is under way.
pub(crate) fn kill(
    payload: &Path,
    session: SessionId,
    leader: i32,
    spare: &dyn Fn(i32) -> bool,
) -> Result<()> {
    let frozen = cgroup::freeze(payload, true);
    let killed = frozen.and_then(|()| kill_frozen(payload, session, leader, spare));
    // Thawed whatever happened: a killed process must run to end.
    cgroup::freeze(payload, false).and(killed)
}

fn kill_frozen(
    payload: &Path,
    session: SessionId,
    leader: i32,
    spare: &dyn Fn(i32) -> bool,
) -> Result<()> {
    use crate::error::Doing;
    let pids = cgroup::processes(payload).doing("listing the sandbox's processes")?;
    let mark = format!("{MARK}={session}");
    let statuses: HashMap<i32, Status> = pids
        .iter()
        .filter(|&&pid| !spare(pid))
        .filter_map(|&pid| Some((pid, parse(&read(pid, "status", 16 * 1024)?))))
        .collect();
    let mut doomed: HashSet<i32> = statuses
        .iter()
        .filter(|(pid, s)| {
            [s.pid, s.group, s.session].contains(&leader) || is_marked(**pid, mark.as_bytes())
        })
        .map(|(pid, _)| *pid)
        .collect();
    loop {
        let before = doomed.len();
        for (pid, status) in &statuses {
            if doomed.contains(&status.parent) {
                doomed.insert(*pid);
            }
        }
        if doomed.len() == before {
            break;
        }
    }
    for pid in doomed.into_iter().filter_map(Pid::from_raw) {
        // Frozen processes do not end, so that the number is still its own; a zombie's is as well.
        let _ = kill_process(pid, Signal::KILL);
    }
    Ok(())
}

fn read(pid: i32, name: &str, limit: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{pid}/{name}"))
        .ok()?
        .take(limit)
        .read_to_end(&mut bytes)
        .ok()?;
    Some(bytes)
}

fn is_marked(pid: i32, mark: &[u8]) -> bool {
    read(pid, "environ", ENVIRONMENT)
        .is_some_and(|env| env.split(|&b| b == 0).any(|entry| entry == mark))
}

fn parse(status: &[u8]) -> Status {
    let mut parsed = Status::default();
    for line in status.split(|&b| b == b'\n') {
        let mut words = line
            .split(u8::is_ascii_whitespace)
            .filter(|w| !w.is_empty());
        let field = match words.next() {
            Some(b"PPid:") => &mut parsed.parent,
            Some(b"NSpid:") => &mut parsed.pid,
            Some(b"NSpgid:") => &mut parsed.group,
            Some(b"NSsid:") => &mut parsed.session,
            _ => continue,
        };
        // The last is the innermost.
        *field = words
            .next_back()
            .and_then(|w| std::str::from_utf8(w).ok()?.parse().ok())
            .unwrap_or(0);
    }
    parsed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_numbers_are_taken() {
        let text = b"Name:\tPPid: 7\nPPid:\t321\nNSpid:\t400\t5\nNSpgid:\t399\t4\nNSsid:\t398\t3\n";
        let expected = Status {
            parent: 321,
            pid: 5,
            group: 4,
            session: 3,
        };
        assert_eq!(parse(text), expected);
        assert_eq!(parse(b"NSpid:\nNSsid:\tx\n"), Status::default());
    }
}
