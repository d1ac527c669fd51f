//! Which templates are kept: bounded in number and bytes, the least useful go first.
//!
//! Greedy dual size with frequency: what is kept is worth its uses times what it costs to make again for each byte, on top of
//! what the last one was worth that had to go; so the worth of what is not used any more is overtaken. With equal costs
//! and uses that is least recently used.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::report::CheckpointId;

/// See the module's description.
pub(super) struct Pool<T> {
    pub(super) limits: Limits,
    kept: BTreeMap<CheckpointId, Kept<T>>,
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

struct Kept<T> {
    what: T,
    bytes: u64,
    cost: Duration,
    uses: u64,
    last_use: u64,
    worth: f64,
    pinned: bool,
}

impl<T> Kept<T> {
    fn used(&mut self, water: f64, now: u64) {
        self.uses += 1;
        self.last_use = now;
        let per_byte = self.cost.as_secs_f64() / self.bytes.max(1) as f64;
        self.worth = water + self.uses as f64 * per_byte;
    }
}

impl<T> Pool<T> {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            kept: BTreeMap::new(),
            water: 0.0,
            uses: 0,
        }
    }

    /// Uses what is kept under a number.
    pub(super) fn get(&mut self, id: CheckpointId) -> Option<&T> {
        let kept = self.kept.get_mut(&id)?;
        self.uses += 1;
        kept.used(self.water, self.uses);
        Some(&kept.what)
    }

    /// What is kept under a number, without using it.
    pub(super) fn peek(&self, id: CheckpointId) -> Option<&T> {
        self.kept.get(&id).map(|kept| &kept.what)
    }

    /// Whether something of this size could be kept at all, beside what is pinned.
    pub(super) fn could_hold(&self, bytes: u64) -> bool {
        let pinned = || self.kept.values().filter(|k| k.pinned);
        let left = self
            .limits
            .bytes
            .checked_sub(pinned().map(|k| k.bytes).sum());
        pinned().count() < self.limits.number && left.is_some_and(|left| bytes <= left)
    }

    /// Keeps something, which took `cost` to make, in place of what was kept under its number. Returns what has to go for it;
    /// if there is no room, that is itself.
    pub(super) fn put(&mut self, id: CheckpointId, what: T, bytes: u64, cost: Duration) -> Vec<T> {
        let mut gone: Vec<T> = self.remove(id).into_iter().collect();
        if !self.could_hold(bytes) {
            gone.push(what);
            return gone;
        }
        while self.kept.len() >= self.limits.number || self.bytes() + bytes > self.limits.bytes {
            gone.extend(self.evict());
        }
        self.uses += 1;
        let mut kept = Kept {
            what,
            bytes,
            cost,
            uses: 0,
            last_use: 0,
            worth: 0.0,
            pinned: false,
        };
        kept.used(self.water, self.uses);
        self.kept.insert(id, kept);
        gone
    }

    /// Takes out what is worth least and not pinned.
    pub(super) fn evict(&mut self) -> Option<T> {
        let loose = self.kept.iter().filter(|(_, k)| !k.pinned);
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

    /// Keeps it whatever comes, or no longer. Returns whether it is there.
    pub(super) fn pin(&mut self, id: CheckpointId, pinned: bool) -> bool {
        let kept = self.kept.get_mut(&id);
        kept.map(|kept| kept.pinned = pinned).is_some()
    }

    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.kept.values().map(|kept| kept.bytes).sum()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.kept.values().map(|kept| &kept.what)
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
        pool.put(id(n), n, bytes, Duration::from_millis(bytes))
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
            // What is kept, how large it is, and whether it is pinned.
            let mut model: BTreeMap<u64, (u64, bool)> = BTreeMap::new();
            for step in script {
                let mut gone = Vec::new();
                match step {
                    Step::Put(n, bytes, cost) => {
                        gone = pool.put(id(n), n, bytes, Duration::from_millis(cost));
                        let old = model.remove(&n);
                        if old.is_some() {
                            gone.remove(0);
                        }
                        model.insert(n, (bytes, false));
                    }
                    Step::Get(n) => {
                        prop_assert_eq!(pool.get(id(n)).copied(), model.contains_key(&n).then_some(n));
                    }
                    Step::Pin(n, pinned) => {
                        prop_assert_eq!(pool.pin(id(n), pinned), model.contains_key(&n));
                        model.entry(n).and_modify(|(_, p)| *p = pinned);
                    }
                    Step::Remove(n) => {
                        prop_assert_eq!(pool.remove(id(n)), model.remove(&n).map(|_| n));
                    }
                    Step::Evict => {
                        gone.extend(pool.evict());
                        prop_assert_eq!(gone.is_empty(), model.values().all(|(_, pinned)| *pinned));
                    }
                }
                for n in gone {
                    let (_, pinned) = model.remove(&n).unwrap();
                    prop_assert!(!pinned);
                }
                let kept: BTreeSet<u64> = pool.iter().copied().collect();
                prop_assert_eq!(kept, model.keys().copied().collect::<BTreeSet<_>>());
                prop_assert_eq!(pool.bytes(), model.values().map(|(bytes, _)| bytes).sum::<u64>());
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
            pool.get(id(n));
        }
        assert_eq!(put(&mut pool, 5, 10), [1]);
    }

    #[test]
    fn what_is_costly_for_its_size_stays_longer_but_not_for_ever() {
        let mut pool = Pool::new(LIMITS);
        pool.put(id(1), 1, 10, Duration::from_millis(50));
        pool.put(id(2), 2, 10, Duration::from_millis(10));
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
        assert!(pool.pin(id(1), true));
        assert!(!pool.could_hold(41) && pool.could_hold(40));
        assert_eq!(put(&mut pool, 3, 41), [3]);
        assert!(put(&mut pool, 4, 40).is_empty());
    }
}
