//! How users and groups of the sandbox show outside (user_namespaces(7)).

use std::fs;
use std::io;

use crate::env::Environment;

/// The maps of a sandbox.
#[derive(Debug)]
pub(crate) struct Owners {
    users: Vec<Range>,
    groups: Vec<Range>,
}

/// Ids that follow each other, inside and outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    inside: u32,
    outside: u32,
    count: u32,
}

impl Owners {
    /// Those of init, which every process of the sandbox has.
    pub(crate) fn of(env: &dyn Environment) -> io::Result<Self> {
        let read = |map: &str| -> io::Result<Vec<Range>> {
            let text = fs::read_to_string(format!("/proc/{}/{map}", env.init_pid()))?;
            let ranges: Option<Vec<_>> = text.lines().map(range).collect();
            ranges.ok_or_else(|| io::ErrorKind::InvalidData.into())
        };
        Ok(Self {
            users: read("uid_map")?,
            groups: read("gid_map")?,
        })
    }

    /// A user and a group as the sandbox counts. Those that it does not know are nobody.
    pub(crate) fn inside(&self, (user, group): (u32, u32)) -> (u32, u32) {
        let find = |ranges: &[Range], id| {
            let found = ranges
                .iter()
                .find_map(|r| shift(id, r.outside, r.inside, r.count));
            found.unwrap_or(NOBODY)
        };
        (find(&self.users, user), find(&self.groups, group))
    }

    /// The opposite.
    pub(crate) fn outside(&self, (user, group): (u32, u32)) -> (u32, u32) {
        let find = |ranges: &[Range], id| {
            let found = ranges
                .iter()
                .find_map(|r| shift(id, r.inside, r.outside, r.count));
            found.unwrap_or(NOBODY)
        };
        (find(&self.users, user), find(&self.groups, group))
    }
}

const NOBODY: u32 = 65534;

fn shift(id: u32, from: u32, to: u32, count: u32) -> Option<u32> {
    let at = id.checked_sub(from).filter(|at| *at < count)?;
    to.checked_add(at)
}

/// `         0     100000      65536`
fn range(line: &str) -> Option<Range> {
    let mut numbers = line.split_whitespace().map(|word| word.parse().ok());
    Some(Range {
        inside: numbers.next()??,
        outside: numbers.next()??,
        count: numbers.next()??,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_go_in_and_out_and_strangers_are_nobody() {
        let users = vec![range("0 100000 65536").unwrap()];
        let owners = Owners {
            groups: users.clone(),
            users,
        };
        assert_eq!(owners.inside((100_000, 100_007)), (0, 7));
        assert_eq!(owners.outside((0, 7)), (100_000, 100_007));
        assert_eq!(owners.inside((0, 165_536)), (NOBODY, NOBODY));
        assert_eq!(range("0 x 1"), None);
    }
}
