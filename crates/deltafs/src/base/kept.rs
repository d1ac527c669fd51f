//! A cache of bounded weight.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::node::Ino;

/// Things kept by inode, up to a total weight; what came first goes first.
#[derive(Debug)]
pub(super) struct Kept<T> {
    items: HashMap<Ino, (Arc<T>, usize)>,
    order: VecDeque<Ino>,
    weight: usize,
    limit: usize,
}

impl<T> Kept<T> {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            items: HashMap::new(),
            order: VecDeque::new(),
            weight: 0,
            limit,
        }
    }

    pub(super) fn get(&self, ino: Ino) -> Option<Arc<T>> {
        self.items.get(&ino).map(|(item, _)| Arc::clone(item))
    }

    /// Lets go of what nobody uses now. What is used stays, so that it is not freed at any other moment than this.
    pub(super) fn let_go(&mut self) {
        let used = |(item, _): &(Arc<T>, usize)| Arc::strong_count(item) > 1;
        self.items.retain(|_, item| used(item));
        self.order.retain(|ino| self.items.contains_key(ino));
        self.weight = self.items.values().map(|(_, weight)| weight).sum();
    }

    pub(super) fn put(&mut self, ino: Ino, item: Arc<T>, weight: usize) {
        if self.items.contains_key(&ino) {
            return;
        }
        self.items.insert(ino, (item, weight));
        self.order.push_back(ino);
        self.weight += weight;
        while self.weight > self.limit
            && self.order.len() > 1
            && let Some(first) = self.order.pop_front()
            && let Some((_, weight)) = self.items.remove(&first)
        {
            self.weight -= weight;
        }
    }
}
