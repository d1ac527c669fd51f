//! Putting descriptors at their numbers in a process' table.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::BorrowedFd;

use crate::remote::{Arg, Batch, Remote};
use crate::sys;

/// Descriptors that one round gives to the process.
const ROUND: usize = 100;

/// A descriptor to be put at a number that is free.
pub(crate) struct Wanted<'a> {
    pub(crate) fd: i32,
    pub(crate) file: BorrowedFd<'a>,
    pub(crate) cloexec: bool,
}

/// Sets close-on-exec.
pub(crate) fn set_cloexec(remote: &mut Remote, fds: &[(i32, bool)]) -> io::Result<()> {
    for part in fds.chunks(500) {
        let mut batch = Batch::new();
        for &(fd, cloexec) in part {
            mark(&mut batch, fd, cloexec);
        }
        run_all(remote, &batch)?;
    }
    Ok(())
}

/// Puts the files at their numbers, all of which must be free.
pub(crate) fn install(remote: &mut Remote, wanted: &[Wanted<'_>]) -> io::Result<()> {
    let Some(highest) = wanted.iter().map(|w| w.fd).max() else {
        return Ok(());
    };
    // A table may hold numbers above a limit that was lowered later.
    let room = highest as u64 + 2 * ROUND as u64;
    let limit = sys::fd::descriptor_limit(remote.host())?;
    if limit.0 < room {
        let raise = |to| sys::fd::set_descriptor_limit(remote.host(), to);
        // Who may not raise the hard one makes do with it.
        raise((room, room.max(limit.1))).or_else(|_| raise((limit.1, limit.1)))?;
    }
    let result = wanted
        .chunks(ROUND)
        .try_for_each(|round| install_round(remote, round));
    if limit.0 < room {
        sys::fd::set_descriptor_limit(remote.host(), limit)?;
    }
    result
}

fn install_round(remote: &mut Remote, wanted: &[Wanted<'_>]) -> io::Result<()> {
    let files: Vec<_> = wanted.iter().map(|w| w.file).collect();
    let given = remote.give_fds(&files)?;
    let goals: Vec<_> = wanted.iter().map(|w| w.fd).collect();
    let mut batch = Batch::new();
    let mut aside = None;
    for step in moves(&given, &goals) {
        match step {
            Move::Aside(from) => {
                aside = Some(batch.must(libc::SYS_dup, &[from.into()]));
                batch.must(libc::SYS_close, &[from.into()]);
            }
            Move::To(from, to) => {
                let from = match (from, aside) {
                    (Some(number), _) => Arg::from(number),
                    (None, Some(copy)) => Arg::from(copy),
                    (None, None) => return Err(io::Error::other("no descriptor was set aside")),
                };
                batch.must(libc::SYS_dup3, &[from, to.into(), libc::O_CLOEXEC.into()]);
                batch.must(libc::SYS_close, &[from]);
            }
        }
    }
    for plain in wanted.iter().filter(|w| !w.cloexec) {
        mark(&mut batch, plain.fd, false);
    }
    run_all(remote, &batch)
}

fn mark(batch: &mut Batch, fd: i32, cloexec: bool) {
    let flag = if cloexec { libc::FD_CLOEXEC } else { 0 };
    batch.must(
        libc::SYS_fcntl,
        &[fd.into(), libc::F_SETFD.into(), flag.into()],
    );
}

/// Runs a batch in which every call must succeed.
pub(crate) fn run_all(remote: &mut Remote, batch: &Batch) -> io::Result<()> {
    if batch.is_empty() {
        return Ok(());
    }
    let outcome = remote.run(batch)?;
    batch
        .ids()
        .try_for_each(|call| outcome.result(call).map(drop))
}

/// One step of a rearrangement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    /// Duplicate this number to any free one, and close it.
    Aside(i32),
    /// Move from a number, or from where the last one set aside is, to a number.
    To(Option<i32>, i32),
}

/// The steps that bring the files at `given` to `goals`, without ever covering one that is not
/// at its goal yet.
fn moves(given: &[i32], goals: &[i32]) -> Vec<Move> {
    let pairs = given.iter().copied().zip(goals.iter().copied());
    let mut pending: Vec<_> = pairs.filter(|(from, to)| from != to).collect();
    let mut occupied: BTreeSet<_> = pending.iter().map(|&(from, _)| from).collect();
    let mut steps = Vec::new();
    while !pending.is_empty() {
        let before = pending.len();
        pending.retain(|&(from, to)| {
            let free = !occupied.contains(&to);
            if free {
                steps.push(Move::To(Some(from), to));
                occupied.remove(&from);
            }
            !free
        });
        if pending.len() == before {
            // Only rings are left: open one up, walk round it, and close it.
            let (first, last) = pending.remove(0);
            steps.push(Move::Aside(first));
            let mut hole = first;
            while let Some(at) = pending.iter().position(|&(_, to)| to == hole) {
                let (from, to) = pending.remove(at);
                steps.push(Move::To(Some(from), to));
                occupied.remove(&from);
                hole = from;
            }
            occupied.remove(&first);
            steps.push(Move::To(None, last));
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn replay(given: &[i32], goals: &[i32]) -> BTreeMap<i32, usize> {
        let mut table: BTreeMap<_, _> = given.iter().copied().zip(0..).collect();
        let mut aside = None;
        for step in moves(given, goals) {
            match step {
                Move::Aside(from) => aside = table.remove(&from),
                Move::To(from, to) => {
                    let file = from.map_or_else(|| aside.take(), |n| table.remove(&n));
                    assert_eq!(table.insert(to, file.unwrap()), None, "a file was covered");
                }
            }
        }
        table
    }

    proptest! {
        #[test]
        fn every_file_reaches_its_number_and_none_is_covered(
            (given, goals) in (0..30_usize).prop_flat_map(|n| {
                let numbers = proptest::sample::subsequence((0..40).collect::<Vec<i32>>(), n);
                (numbers.clone().prop_shuffle(), numbers.prop_shuffle())
            })
        ) {
            let wanted: BTreeMap<_, _> = goals.iter().copied().zip(0..).collect();
            prop_assert_eq!(replay(&given, &goals), wanted);
        }
    }
}
