//! Which templates are kept: bounded in number and bytes, the least useful go first.
//!
//! Greedy dual size with frequency: what is kept is worth what it costs to make again for each byte, the more the oftener it was used
//! (by the root of that: a search moves on, and what was used most is its past), on top of what the last one was worth that had to go;
//! so the worth of what is not used any more is overtaken. With equal costs and uses that is least recently used. Uses that are expected
//! count twice until they happen; what is expected and does not happen is overtaken in the same way.
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
    /// How often what is kept under a number, or will be, is expected to be used.
    expected: BTreeMap<CheckpointId, u64>,
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
    /// Sets what it is worth, where so many uses are expected.
    fn weigh(&mut self, expected: u64, water: f64) {
        let uses = (self.uses as f64).sqrt() + 2.0 * (expected as f64).sqrt();
        let own = self.parts.last().map_or(0, |part| *part.0);
        let per_byte = self.cost.as_secs_f64() / own.max(1) as f64;
        self.worth = water + uses * per_byte;
    }
}

impl<T> Pool<T> {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            kept: BTreeMap::new(),
            pinned: BTreeSet::new(),
            expected: BTreeMap::new(),
            water: 0.0,
            uses: 0,
        }
    }

    /// Uses what is kept under a number, as often as is told.
    pub(super) fn get(&mut self, id: CheckpointId, uses: u64) -> Option<&T> {
        let kept = self.kept.get_mut(&id)?;
        kept.uses += uses;
        self.uses += 1;
        kept.last_use = self.uses;
        let left = self.expected.get(&id).map_or(0, |n| n.saturating_sub(uses));
        self.expect(id, left);
        self.peek(id)
    }

    /// What is kept under a number, or will be, is expected to be used so often next.
    pub(super) fn expect(&mut self, id: CheckpointId, uses: u64) {
        match uses {
            0 => self.expected.remove(&id),
            _ => self.expected.insert(id, uses),
        };
        if let Some(kept) = self.kept.get_mut(&id) {
            kept.weigh(uses, self.water);
        }
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
            uses: 1,
            last_use: self.uses,
            worth: 0.0,
        };
        kept.weigh(self.expected.get(&id).copied().unwrap_or(0), self.water);
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
mod search;
#[cfg(test)]
mod tests;
