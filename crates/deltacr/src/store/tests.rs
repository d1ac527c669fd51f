use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use proptest::prelude::*;

use super::{PageMap, PageStore};

#[derive(Clone, Debug)]
enum Step {
    Put(Range<u64>, u8),
    Remove(Range<u64>),
    Share(Range<u64>, u64, usize),
    Fork(usize),
    Drop(usize),
}

fn ranges() -> impl Strategy<Value = Range<u64>> {
    let start = prop_oneof![0..200_u64, 4000..4200_u64, (1 << 35)..(1 << 35) + 300_u64];
    (start, 1..150_u64).prop_map(|(s, n)| s..s + n)
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (ranges(), any::<u8>()).prop_map(|(r, b)| Step::Put(r, b)),
        2 => ranges().prop_map(Step::Remove),
        1 => (ranges(), 0..5000_u64, any::<usize>()).prop_map(|(r, f, n)| Step::Share(r, f, n)),
        1 => any::<usize>().prop_map(Step::Fork),
        1 => any::<usize>().prop_map(Step::Drop),
    ]
}

type Model = BTreeMap<u64, u8>;

fn put(store: &PageStore, map: &mut PageMap, range: Range<u64>, byte: u8) {
    let mut fresh = store.allocate((range.end - range.start) as usize).unwrap();
    for (i, page) in range.enumerate() {
        fresh.page_mut(i).fill(byte);
        map.put(page, &mut fresh, i);
    }
}

fn apply(store: &PageStore, all: &mut Vec<(PageMap, Model)>, at: usize, step: Step) {
    let at = at % all.len();
    let (map, model) = &mut all[at];
    match step {
        Step::Put(range, byte) => {
            put(store, map, range.clone(), byte);
            model.extend(range.map(|p| (p, byte)));
        }
        Step::Remove(range) => {
            map.remove(range.clone());
            model.retain(|p, _| !range.contains(p));
        }
        Step::Share(range, from, other) => {
            let (source, contents) = all[other % all.len()].clone();
            let (map, model) = &mut all[at];
            for (i, page) in range.enumerate() {
                let from = from + i as u64;
                map.share(page, &source, from);
                match contents.get(&from) {
                    Some(byte) => model.insert(page, *byte),
                    None => model.remove(&page),
                };
            }
        }
        Step::Fork(which) => {
            let copy = all[which % all.len()].clone();
            all.push(copy);
        }
        Step::Drop(which) if all.len() > 1 => {
            all.swap_remove(which % all.len());
        }
        Step::Drop(_) => {}
    }
}

fn check(map: &PageMap, model: &Model) {
    let held: Vec<(u64, u8)> = map
        .pages(0..u64::MAX)
        .map(|(p, bytes)| {
            assert!(bytes.iter().all(|b| *b == bytes[0]));
            (p, bytes[0])
        })
        .collect();
    let expected: Vec<(u64, u8)> = model.iter().map(|(p, b)| (*p, *b)).collect();
    assert_eq!(held, expected);
    assert_eq!(map.len(), model.len() as u64);
    let in_runs: Vec<u64> = map.runs(0..u64::MAX).flatten().collect();
    assert_eq!(in_runs, model.keys().copied().collect::<Vec<_>>());
    let part = 100..4100;
    let in_part: Vec<u64> = map.runs(part.clone()).flatten().collect();
    let expected: Vec<u64> = model.range(part).map(|(p, _)| *p).collect();
    assert_eq!(in_part, expected);
}

fn check_diff(a: &(PageMap, Model), b: &(PageMap, Model)) {
    let mut told = Vec::new();
    a.0.diff(&b.0, 0..u64::MAX, |run| told.extend(run));
    assert!(told.is_sorted_by(|a, b| a < b));
    for page in a.1.keys().chain(b.1.keys()) {
        let differs = a.1.get(page) != b.1.get(page);
        // The same bytes may lie in two slots, but different bytes never in one.
        assert!(!differs || told.binary_search(page).is_ok(), "page {page}");
    }
    for page in told {
        assert!(a.1.contains_key(&page) || b.1.contains_key(&page));
    }
    assert_eq!(a.0 == b.0, a.1 == b.1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn maps_hold_what_a_plain_map_holds_and_leak_nothing(
        script in prop::collection::vec((any::<usize>(), steps()), 1..40)
    ) {
        let store = PageStore::new();
        let mut all = vec![(PageMap::new(), Model::new())];
        for (at, step) in script {
            apply(&store, &mut all, at, step);
        }
        for (map, model) in &all {
            check(map, model);
        }
        for pair in all.windows(2) {
            check_diff(&pair[0], &pair[1]);
        }
        drop(all);
        prop_assert_eq!(store.pages(), 0);
    }
}

#[test]
fn a_clone_shares_what_was_not_changed() {
    let store = PageStore::new();
    let mut first = PageMap::new();
    put(&store, &mut first, 0..10_000, 1);
    let mut second = first.clone();
    put(&store, &mut second, 5000..5003, 2);
    assert_eq!(store.pages(), 10_003);
    let mut told = Vec::new();
    first.diff(&second, 0..u64::MAX, |run| told.extend(run));
    assert_eq!(told, [5000, 5001, 5002]);
    drop(first);
    assert_eq!(store.pages(), 10_000);
}

#[test]
fn pages_may_be_stored_and_dropped_by_many_threads() {
    let store = PageStore::new();
    let mut common = PageMap::new();
    put(&store, &mut common, 0..1000, 7);
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (store, mut map) = (Arc::clone(&store), common.clone());
            scope.spawn(move || {
                for round in 0..50 {
                    let start = thread * 100 + round;
                    put(&store, &mut map, start..start + 50, round as u8);
                    map.remove(start + 10..start + 20);
                }
                assert_eq!(map.get(999).unwrap()[0], 7);
            });
        }
    });
    assert_eq!(store.pages(), 1000);
    drop(common);
    assert_eq!(store.pages(), 0);
}

#[test]
fn prepared_pages_are_the_next_to_be_used() {
    let store = PageStore::new();
    store.prepare(1000).unwrap();
    let fresh = store.allocate(1000).unwrap();
    assert_eq!(store.pages(), 1000);
    drop(fresh);
    assert_eq!(store.pages(), 0);
}
