//! Which names the kernel may remember to be absent.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

use parking_lot::Mutex;

use crate::node::Ino;

/// More names than this are not counted: then every name may be one of them. They take up to 40 MB.
const MAX_NAMES: usize = 1 << 20;

/// The names that were answered with "not there" since the kernel last knew better. It may say yes for a name that is not
/// one of them, never no for one that is: the kernel does not tell what it forgets.
#[derive(Debug, Default)]
pub(crate) struct Absent {
    hasher: RandomState,
    names: Mutex<Names>,
}

#[derive(Debug, Default)]
struct Names {
    /// Keyed hashes of names, by directory. A collision is not to be expected.
    by_dir: HashMap<Ino, HashSet<u64>>,
    count: usize,
    uncounted: bool,
}

impl Absent {
    /// The kernel is about to be told that there is no such name.
    pub(super) fn add(&self, dir: Ino, name: &[u8]) {
        let mut names = self.names.lock();
        if names.uncounted {
            return;
        }
        let hash = self.hasher.hash_one(name);
        if names.by_dir.entry(dir).or_default().insert(hash) {
            names.count += 1;
        }
        if names.count > MAX_NAMES {
            *names = Names {
                uncounted: true,
                ..Names::default()
            };
        }
    }

    /// The kernel knows that the name is there, or has dropped what it knew.
    pub(crate) fn remove(&self, dir: Ino, name: &[u8]) {
        let mut names = self.names.lock();
        let Some(of_dir) = names.by_dir.get_mut(&dir) else {
            return;
        };
        let found = of_dir.remove(&self.hasher.hash_one(name));
        if of_dir.is_empty() {
            names.by_dir.remove(&dir);
        }
        names.count -= usize::from(found);
    }

    /// The kernel has forgotten the directory.
    pub(super) fn forget(&self, dir: Ino) {
        let mut names = self.names.lock();
        if let Some(of_dir) = names.by_dir.remove(&dir) {
            names.count -= of_dir.len();
        }
    }

    /// Whether the kernel may take any name of the directory for absent.
    pub(crate) fn may_hold_any(&self, dir: Ino) -> bool {
        let names = self.names.lock();
        names.uncounted || names.by_dir.contains_key(&dir)
    }

    /// Whether the kernel may take the name for absent.
    pub(crate) fn may_hold(&self, dir: Ino, name: &[u8]) -> bool {
        let names = self.names.lock();
        let known = |of_dir: &HashSet<u64>| of_dir.contains(&self.hasher.hash_one(name));
        names.uncounted || names.by_dir.get(&dir).is_some_and(known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_absent_until_it_is_there_or_its_directory_is_forgotten() {
        let absent = Absent::default();
        absent.add(5, b"a");
        absent.add(5, b"b");
        absent.add(6, b"a");
        absent.remove(5, b"a");
        assert!(!absent.may_hold(5, b"a") && absent.may_hold(5, b"b") && absent.may_hold(6, b"a"));
        absent.remove(5, b"b");
        absent.forget(6);
        assert!(!absent.may_hold_any(5) && !absent.may_hold_any(6));
        assert_eq!(absent.names.lock().count, 0);
    }

    #[test]
    fn too_many_names_make_every_name_one_of_them() {
        let absent = Absent::default();
        for index in 0..=MAX_NAMES {
            absent.add(5, &index.to_ne_bytes());
        }
        assert!(absent.may_hold(7, b"never told"));
    }
}
