//! Users and groups, as the sandbox's own `/etc/passwd` and `/etc/group` name them. Both files are input.

use std::io;
use std::os::fd::BorrowedFd;

use crate::container::{IDS, read_file};
use crate::error::{Doing, Error, Result};

/// The most bytes of either file that are read.
const LIMIT: usize = 1 << 20;

/// The most supplementary groups of a user.
const MAX_GROUPS: usize = 256;

/// Who a command runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    /// `/` if the user has none.
    pub(crate) home: Vec<u8>,
    /// `/bin/sh` if the user has none.
    pub(crate) shell: Vec<u8>,
}

/// Looks up `user` or `user:group`, each a name or a number; root if `None`.
pub(crate) fn look_up(root: BorrowedFd<'_>, spec: Option<&str>) -> Result<Identity> {
    let read = |path: &str| match read_file(root, path, LIMIT) {
        Ok(bytes) => Ok(bytes),
        // An image of one static program needs neither.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).doing(format!("reading /{path} of the sandbox")),
    };
    resolve(
        spec.unwrap_or("0"),
        &read("etc/passwd")?,
        &read("etc/group")?,
    )
}

fn fields(file: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    file.split(|&b| b == b'\n')
        .map(|line| line.split(|&b| b == b':').collect())
}

fn number(bytes: &[u8]) -> Option<u32> {
    let n = std::str::from_utf8(bytes).ok()?.parse().ok()?;
    (n < IDS).then_some(n)
}

fn resolve(spec: &str, passwd: &[u8], group: &[u8]) -> Result<Identity> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    let by_number = number(user.as_bytes());
    let entry = fields(passwd).find(|f| match (f.first(), f.get(2)) {
        (Some(name), Some(id)) => match by_number {
            Some(wanted) => number(id) == Some(wanted),
            None => *name == user.as_bytes(),
        },
        _ => false,
    });
    let field = |n: usize| entry.as_ref().and_then(|e| e.get(n)).copied();
    let uid = by_number.or_else(|| number(field(2)?)).ok_or_else(|| {
        Error::Invalid(format!(
            "the sandbox has no user {user:?} in its /etc/passwd (and it is no number below {IDS})"
        ))
    })?;
    let gid = match wanted_group {
        None => field(3).and_then(number).unwrap_or(0),
        Some(wanted) => number(wanted.as_bytes())
            .or_else(|| {
                fields(group)
                    .find(|f| f.first() == Some(&wanted.as_bytes()))
                    .and_then(|f| number(f.get(2)?))
            })
            .ok_or_else(|| {
                Error::Invalid(format!(
                    "the sandbox has no group {wanted:?} in its /etc/group (and it is no number below {IDS})"
                ))
            })?,
    };
    let groups = match (wanted_group, field(0)) {
        (None, Some(name)) => fields(group)
            .filter(|f| {
                f.get(3)
                    .is_some_and(|members| members.split(|&b| b == b',').any(|m| m == name))
            })
            .filter_map(|f| number(f.get(2)?))
            .take(MAX_GROUPS)
            .collect(),
        _ => Vec::new(),
    };
    let path = |n: usize, default: &[u8]| {
        field(n)
            .filter(|p| p.starts_with(b"/") && !p.contains(&0))
            .unwrap_or(default)
            .to_vec()
    };
    Ok(Identity {
        uid,
        gid,
        groups,
        home: path(5, b"/"),
        shell: path(6, b"/bin/sh"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/bash\n\
        nobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\nshort:x\nann:x:1000:1000:::\n";
    const GROUP: &[u8] = b"root:x:0:\nadm:x:4:ann,bob\nann:x:1000:\nvideo:x:44:bob,ann\n";

    #[test]
    fn names_numbers_and_groups_are_found() {
        let ann = resolve("ann", PASSWD, GROUP).unwrap();
        assert_eq!((ann.uid, ann.gid, ann.groups), (1000, 1000, vec![4, 44]));
        assert_eq!((&*ann.home, &*ann.shell), (&b"/"[..], &b"/bin/sh"[..]));
        assert_eq!(resolve("0", PASSWD, GROUP).unwrap().home, b"/root");
        let other = resolve("4242:adm", PASSWD, GROUP).unwrap();
        assert_eq!((other.uid, other.gid, other.groups), (4242, 4, vec![]));
    }

    #[test]
    fn unknown_ones_are_named() {
        for spec in ["bob", "ann:nogroup", "short", "70000", "-1", ""] {
            let Err(Error::Invalid(why)) = resolve(spec, PASSWD, GROUP) else {
                panic!("{spec} was found");
            };
            assert!(why.contains("has no"), "{why}");
        }
    }

    proptest! {
        #[test]
        fn no_file_makes_the_parser_panic(passwd: Vec<u8>, group: Vec<u8>, spec: String) {
            let _ = resolve(&spec, &passwd, &group);
        }
    }
}
