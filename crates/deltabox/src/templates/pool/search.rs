//! What a search pays for templates that it makes again, beside what it would pay if the least recently used went first.

use std::cell::RefCell;

use super::*;

const LIMITS: Limits = Limits {
    number: 16,
    bytes: 300,
};

/// Nodes of a search.
const NODES: u64 = 400;

/// The same numbers each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        let next = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = next.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// Whoever keeps templates.
trait Keeper {
    /// Uses one; whether it was there.
    fn fork(&self, n: u64, bytes: u64, cost: Duration) -> bool;
    /// Hears that there will be forks.
    fn expect(&self, n: u64, forks: u64);
}

struct Ours {
    pool: RefCell<Pool<u64>>,
    heeds: bool,
}

fn ours(heeds: bool) -> Ours {
    let pool = RefCell::new(Pool::new(LIMITS));
    Ours { pool, heeds }
}

impl Keeper for Ours {
    fn fork(&self, n: u64, bytes: u64, cost: Duration) -> bool {
        let mut pool = self.pool.borrow_mut();
        let there = pool.get(CheckpointId(n), 1).is_some();
        if !there {
            pool.put(CheckpointId(n), n, vec![Part::new(bytes)], cost);
        }
        there
    }

    fn expect(&self, n: u64, forks: u64) {
        if self.heeds {
            self.pool.borrow_mut().expect(CheckpointId(n), forks);
        }
    }
}

/// Keeps what was used last: numbers and sizes.
#[derive(Default)]
struct LastUsed(RefCell<Vec<(u64, u64)>>);

impl Keeper for LastUsed {
    fn fork(&self, n: u64, bytes: u64, _: Duration) -> bool {
        let mut kept = self.0.borrow_mut();
        let at = kept.iter().position(|(k, _)| *k == n);
        let there = at.map(|at| kept.remove(at)).is_some();
        kept.push((n, bytes));
        while kept.len() > LIMITS.number || kept.iter().map(|k| k.1).sum::<u64>() > LIMITS.bytes {
            kept.remove(0);
        }
        there
    }

    fn expect(&self, _: u64, _: u64) {}
}

/// The nodes, and what making their templates has cost so far.
struct Search<'a> {
    keeper: &'a dyn Keeper,
    sizes: Vec<u64>,
    dice: Dice,
    cost: u64,
}

impl<'a> Search<'a> {
    fn new(keeper: &'a dyn Keeper, seed: u64) -> Self {
        let mut dice = Dice(seed);
        Self {
            keeper,
            sizes: (0..NODES).map(|_| 1 + dice.roll(30)).collect(),
            dice,
            cost: 0,
        }
    }

    fn fork(&mut self, n: u64) {
        let bytes = self.sizes[n as usize];
        let millis = 5 + 2 * bytes;
        if !self.keeper.fork(n, bytes, Duration::from_millis(millis)) {
            self.cost += millis;
        }
    }

    /// The newest nodes are forked; some are come back to much later. Most of those, and a few that are not come back to, are told
    /// before.
    fn deepens(mut self) -> u64 {
        let mut promised = Vec::new();
        for newest in 8..NODES {
            for _ in 0..3 {
                let age = self.dice.roll(3);
                self.fork(newest - age);
            }
            if self.dice.roll(4) == 0 {
                let (when, luck) = (newest + 5 + self.dice.roll(30), self.dice.roll(5));
                if luck != 0 {
                    self.keeper.expect(newest, 4);
                }
                if luck != 1 {
                    promised.push((when, newest));
                }
            }
            let due: Vec<_> = promised
                .extract_if(.., |(when, _)| *when == newest)
                .collect();
            for (_, node) in due {
                (0..4).for_each(|_| self.fork(node));
            }
        }
        self.cost
    }

    /// Few nodes are forked again and again, most hardly ever.
    fn repeats(mut self) -> u64 {
        for _ in 0..2000 {
            let node = (0..4).fold(NODES, |below, _| 1 + self.dice.roll(below));
            self.fork(node * 7919 % NODES);
        }
        self.cost
    }
}

/// The costs of some searches together.
fn total(keeper: impl Fn() -> Box<dyn Keeper>, search: fn(Search<'_>) -> u64) -> u64 {
    (1..9)
        .map(|seed| search(Search::new(&*keeper(), seed)))
        .sum()
}

#[test]
fn a_search_that_says_what_it_comes_back_to_makes_fewer_templates_again() {
    let by_last_use = total(|| Box::new(LastUsed::default()), |s| s.deepens());
    let [heeding, deaf] =
        [true, false].map(|heeds| total(|| Box::new(ours(heeds)), |s| s.deepens()));
    assert!(
        heeding * 100 < by_last_use * 98 && heeding * 100 < deaf * 98,
        "{heeding} ms with hints, {deaf} ms without, {by_last_use} ms by last use"
    );
}

#[test]
fn nodes_that_are_forked_again_and_again_are_made_again_more_seldom_than_by_last_use() {
    let by_last_use = total(|| Box::new(LastUsed::default()), |s| s.repeats());
    let ours = total(|| Box::new(ours(true)), |s| s.repeats());
    assert!(
        ours * 100 < by_last_use * 98,
        "{ours} ms, {by_last_use} ms by last use"
    );
}
