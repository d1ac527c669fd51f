//! Which templates are kept: bounded in number and bytes, the least useful go first.
//!
//! Greedy dual size with frequency: what is kept is worth its uses times what it costs to make again for each byte, on top of
//! what the last one was worth that had to go; so the worth of what is not used any more is overtaken. With equal costs
//! and uses that is least recently used.
//!
//! What is kept consists of parts, which others may have as well; each part counts once, as long as anybody has it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::report::CheckpointId;

/// See the module's description.
pub(super) struct Pool<T> {
    pub(super) limits: Limits,
    kept: BTreeMap<CheckpointId, Kept<T>>,
    /// What stays whatever comes, once it is there.
    pinned: BTreeSet<CheckpointId>,
    /// What the last one was worth that had to go.
    water: f64,
    /// How often something was used, to tell the older of two of the same worth.
    uses: u64,
}

/// The most that is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) number: usize,
    pub(crate) bytes: u64,
}

/// Memory of so many bytes. Clones are the same memory.
#[derive(Clone, Debug)]
pub(super) struct Part(Arc<u64>);

impl Part {
    pub(super) fn new(bytes: u64) -> Self {
        Self(Arc::new(bytes))
    }
}

/// How many bytes the parts have together, each counted once.
fn bytes_of<'a>(parts: impl Iterator<Item = &'a Part>) -> u64 {
    let distinct: BTreeMap<_, _> = parts.map(|p| (Arc::as_ptr(&p.0), *p.0)).collect();
    distinct.values().sum()
}

struct Kept<T> {
    what: T,
    /// The last is its own.
    parts: Vec<Part>,
    cost: Duration,
    uses: u64,
    last_use: u64,
    worth: f64,
}

impl<T> Kept<T> {
    fn used(&mut self, uses: u64, water: f64, now: u64) {
        self.uses += uses;
        self.last_use = now;
        let own = self.parts.last().map_or(0, |part| *part.0);
        let per_byte = self.cost.as_secs_f64() / own.max(1) as f64;
        self.worth = water + self.uses as f64 * per_byte;
    }
}

impl<T> Pool<T> {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            kept: BTreeMap::new(),
            pinned: BTreeSet::new(),
            water: 0.0,
            uses: 0,
        }
    }

    /// Uses what is kept under a number, as often as is told.
    pub(super) fn get(&mut self, id: CheckpointId, uses: u64) -> Option<&T> {
        let kept = self.kept.get_mut(&id)?;
        self.uses += 1;
        kept.used(uses, self.water, self.uses);
        Some(&kept.what)
    }

    /// What is kept under a number, without using it.
    pub(super) fn peek(&self, id: CheckpointId) -> Option<&T> {
        self.kept.get(&id).map(|kept| &kept.what)
    }

    /// Whether something of these parts could be kept at all, beside what is pinned.
    pub(super) fn could_hold(&self, parts: &[Part]) -> bool {
        let pinned = || self.kept.iter().filter(|(id, _)| self.pinned.contains(id));
        let all = pinned().flat_map(|(_, kept)| &kept.parts).chain(parts);
        pinned().count() < self.limits.number && bytes_of(all) <= self.limits.bytes
    }

    /// Keeps something, which took `cost` to make, in place of what was kept under its number. Returns what has to go for it;
    /// if there is no room, that is itself.
    pub(super) fn put(
        &mut self,
        id: CheckpointId,
        what: T,
        parts: Vec<Part>,
        cost: Duration,
    ) -> Vec<T> {
        let mut gone: Vec<T> = self.remove(id).into_iter().collect();
        if !self.could_hold(&parts) {
            gone.push(what);
            return gone;
        }
        while self.kept.len() >= self.limits.number
            || bytes_of(self.parts().chain(&parts)) > self.limits.bytes
        {
            gone.extend(self.evict());
        }
        self.uses += 1;
        let mut kept = Kept {
            what,
            parts,
            cost,
            uses: 0,
            last_use: 0,
            worth: 0.0,
        };
        kept.used(1, self.water, self.uses);
        self.kept.insert(id, kept);
        gone
    }

    /// Takes out what is worth least and not pinned.
    pub(super) fn evict(&mut self) -> Option<T> {
        let pinned = &self.pinned;
        let loose = self.kept.iter().filter(|(id, _)| !pinned.contains(id));
        let least = loose.min_by(|(_, a), (_, b)| {
            let worth = a.worth.total_cmp(&b.worth);
            worth.then(a.last_use.cmp(&b.last_use))
        });
        let (id, worth) = least.map(|(id, kept)| (*id, kept.worth))?;
        self.water = self.water.max(worth);
        self.remove(id)
    }

    pub(super) fn remove(&mut self, id: CheckpointId) -> Option<T> {
        self.kept.remove(&id).map(|kept| kept.what)
    }

    /// Keeps it whatever comes, once it is there, or no longer.
    pub(super) fn pin(&mut self, id: CheckpointId, pinned: bool) {
        if pinned {
            self.pinned.insert(id);
        } else {
            self.pinned.remove(&id);
        }
    }

    /// How many of those that are kept are pinned.
    pub(super) fn pinned(&self) -> usize {
        self.pinned
            .iter()
            .filter(|id| self.kept.contains_key(id))
            .count()
    }

    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }

    fn parts(&self) -> impl Iterator<Item = &Part> {
        self.kept.values().flat_map(|kept| &kept.parts)
    }

    pub(super) fn bytes(&self) -> u64 {
        bytes_of(self.parts())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (CheckpointId, &T)> {
        self.kept.iter().map(|(id, kept)| (*id, &kept.what))
    }

    pub(super) fn drain(&mut self) -> Vec<T> {
        let kept = std::mem::take(&mut self.kept);
        kept.into_values().map(|kept| kept.what).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const LIMITS: Limits = Limits {
        number: 4,
        bytes: 100,
    };

    fn id(n: u64) -> CheckpointId {
        CheckpointId(n)
    }

    fn put(pool: &mut Pool<u64>, n: u64, bytes: u64) -> Vec<u64> {
        pool.put(
            id(n),
            n,
            vec![Part::new(bytes)],
            Duration::from_millis(bytes),
        )
    }

    #[derive(Clone, Debug)]
    enum Step {
        Put(u64, u64, u64),
        Get(u64),
        Pin(u64, bool),
        Remove(u64),
        Evict,
    }

    fn steps() -> impl Strategy<Value = Step> {
        let n = 0..8_u64;
        prop_oneof![
            4 => (n.clone(), 0..130_u64, 0..50_u64).prop_map(|(n, b, c)| Step::Put(n, b, c)),
            4 => n.clone().prop_map(Step::Get),
            1 => (n.clone(), any::<bool>()).prop_map(|(n, p)| Step::Pin(n, p)),
            1 => n.prop_map(Step::Remove),
            1 => Just(Step::Evict),
        ]
    }

    proptest! {
        #[test]
        fn limits_hold_nothing_is_lost_and_the_pinned_stay(
            script in prop::collection::vec(steps(), 1..100)
        ) {
            let mut pool = Pool::new(LIMITS);
            // What is kept, and how large it is.
            let mut model: BTreeMap<u64, u64> = BTreeMap::new();
            let mut pinned = BTreeSet::new();
            for step in script {
                let mut gone = Vec::new();
                match step {
                    Step::Put(n, bytes, cost) => {
                        let parts = vec![Part::new(bytes)];
                        gone = pool.put(id(n), n, parts, Duration::from_millis(cost));
                        let old = model.remove(&n);
                        if old.is_some() {
                            gone.remove(0);
                        }
                        model.insert(n, bytes);
                        // What is new itself may have no room.
                        if gone.last() == Some(&n) {
                            gone.pop();
                            model.remove(&n);
                        }
                    }
                    Step::Get(n) => {
                        prop_assert_eq!(pool.get(id(n), 1).copied(), model.contains_key(&n).then_some(n));
                    }
                    Step::Pin(n, pin) => {
                        pool.pin(id(n), pin);
                        match pin {
                            true => pinned.insert(n),
                            false => pinned.remove(&n),
                        };
                    }
                    Step::Remove(n) => {
                        prop_assert_eq!(pool.remove(id(n)), model.remove(&n).map(|_| n));
                    }
                    Step::Evict => {
                        gone.extend(pool.evict());
                        prop_assert_eq!(gone.is_empty(), model.keys().all(|n| pinned.contains(n)));
                    }
                }
                for n in gone {
                    prop_assert!(model.remove(&n).is_some() && !pinned.contains(&n));
                }
                let kept: BTreeSet<u64> = pool.iter().map(|(_, n)| *n).collect();
                prop_assert_eq!(kept, model.keys().copied().collect::<BTreeSet<_>>());
                prop_assert_eq!(pool.bytes(), model.values().sum::<u64>());
                prop_assert_eq!(pool.pinned(), model.keys().filter(|n| pinned.contains(n)).count());
                prop_assert!(pool.len() <= LIMITS.number && pool.bytes() <= LIMITS.bytes);
            }
        }
    }

    #[test]
    fn of_equals_the_least_recently_used_goes() {
        let mut pool = Pool::new(LIMITS);
        for n in 1..=4 {
            assert!(put(&mut pool, n, 10).is_empty());
        }
        // Ever so often used, but that adds up for all of them.
        for n in [1, 3, 4, 2] {
            pool.get(id(n), 1);
        }
        assert_eq!(put(&mut pool, 5, 10), [1]);
    }

    #[test]
    fn what_is_costly_for_its_size_stays_longer_but_not_for_ever() {
        let mut pool = Pool::new(LIMITS);
        for (n, cost) in [(1, 50), (2, 10)] {
            pool.put(id(n), n, vec![Part::new(10)], Duration::from_millis(cost));
        }
        put(&mut pool, 3, 10);
        put(&mut pool, 4, 10);
        assert_eq!(put(&mut pool, 5, 10), [2]);
        let last = (6..40).find(|n| put(&mut pool, *n, 10) == [1]);
        assert!(last.is_some());
    }

    #[test]
    fn what_is_larger_than_the_limit_makes_nothing_go() {
        let mut pool = Pool::new(LIMITS);
        put(&mut pool, 1, 60);
        assert_eq!(put(&mut pool, 2, 101), [2]);
        pool.pin(id(1), true);
        assert!(!pool.could_hold(&[Part::new(41)]) && pool.could_hold(&[Part::new(40)]));
        assert_eq!(put(&mut pool, 3, 41), [3]);
        assert!(put(&mut pool, 4, 40).is_empty());
    }

    #[test]
    fn a_part_that_several_have_counts_once_and_until_the_last_has_gone() {
        let mut pool = Pool::new(LIMITS);
        let root = Part::new(60);
        let mut derived = |n: u64| {
            let parts = vec![root.clone(), Part::new(10 * n)];
            pool.put(id(n), n, parts, Duration::from_millis(1))
        };
        assert!(derived(1).is_empty() && derived(2).is_empty());
        assert!(
            pool.put(id(3), 3, vec![root.clone()], Duration::from_millis(1))
                .is_empty()
        );
        assert_eq!(pool.bytes(), 90);
        assert_eq!((pool.remove(id(3)), pool.remove(id(1))), (Some(3), Some(1)));
        assert_eq!(pool.bytes(), 80);
        pool.pin(id(2), true);
        assert!(pool.could_hold(&[root, Part::new(20)]) && !pool.could_hold(&[Part::new(21)]));
        assert_eq!(pool.remove(id(2)), Some(2));
        assert_eq!(pool.bytes(), 0);
    }
}
