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
    Expect(u64, u64),
    Remove(u64),
    Evict,
}

fn steps() -> impl Strategy<Value = Step> {
    let n = 0..8_u64;
    prop_oneof![
        4 => (n.clone(), 0..130_u64, 0..50_u64).prop_map(|(n, b, c)| Step::Put(n, b, c)),
        4 => n.clone().prop_map(Step::Get),
        1 => (n.clone(), any::<bool>()).prop_map(|(n, p)| Step::Pin(n, p)),
        1 => (n.clone(), 0..9_u64).prop_map(|(n, uses)| Step::Expect(n, uses)),
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
                Step::Expect(n, uses) => pool.expect(id(n), uses),
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
fn what_is_expected_to_be_used_stays_until_it_was_and_not_for_ever() {
    let mut pool = Pool::new(LIMITS);
    // Said before there is anything.
    pool.expect(id(1), 2);
    for n in 1..=4 {
        put(&mut pool, n, 10);
    }
    assert_eq!(put(&mut pool, 5, 10), [2]);
    pool.expect(id(3), 5);
    assert_eq!(put(&mut pool, 6, 10), [4]);
    // What was taken back, or has happened, counts no more than what happened.
    pool.expect(id(3), 0);
    assert_eq!(put(&mut pool, 7, 10), [3]);
    let last = (8..40).find(|n| put(&mut pool, *n, 10) == [1]);
    assert!(last.is_some_and(|n| n > 9), "{last:?}");
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
