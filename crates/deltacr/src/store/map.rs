//! A persistent map from page numbers to stored pages.

use std::ops::Range;
use std::sync::Arc;

use crate::store::{Fresh, PageBytes};
use crate::sys::arena::{BLOCK, Block};

/// Leaves below one inner node.
const FAN: usize = 64;
/// Pages below one inner node: 16 MiB.
const SPAN: u64 = (FAN * BLOCK) as u64;

/// A map from page numbers (address or offset divided by 4096) to stored pages.
///
/// A radix tree whose nodes are shared with the maps it was cloned from: cloning is O(1), a change
/// copies the path to what it changes, and comparing two maps skips what they share.
#[derive(Clone, Debug, Default)]
pub struct PageMap {
    /// Inner nodes by the number of the span they cover, ascending.
    nodes: Arc<Vec<(u64, Arc<Node>)>>,
}

#[derive(Clone, Debug)]
struct Node {
    leaves: [Option<Arc<Block>>; FAN],
}

impl Default for Node {
    fn default() -> Self {
        Self {
            leaves: [const { None }; FAN],
        }
    }
}

/// Where a page lies: inner node, leaf, place.
fn locate(page: u64) -> (u64, usize, usize) {
    let (leaf, at) = (page / BLOCK as u64, (page % BLOCK as u64) as usize);
    (leaf / FAN as u64, (leaf % FAN as u64) as usize, at)
}

/// A bit for each place of the leaf that begins at page `first` which lies in `range`.
fn mask_of(range: &Range<u64>, first: u64) -> u64 {
    let from = range.start.saturating_sub(first).min(64);
    let to = range.end.saturating_sub(first).min(64);
    let below = |n: u64| if n >= 64 { u64::MAX } else { (1 << n) - 1 };
    below(to) & !below(from)
}

/// Whether `a` is sure to hold the same as `b`.
fn shared<T>(a: Option<&Arc<T>>, b: Option<&Arc<T>>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        _ => false,
    }
}

impl PageMap {
    /// A map that holds nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether no page is held.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// How many pages are held. Costs a walk over the map.
    pub fn len(&self) -> u64 {
        let leaves = self
            .nodes
            .iter()
            .flat_map(|(_, n)| n.leaves.iter().flatten());
        leaves.map(|l| u64::from(l.mask().count_ones())).sum()
    }

    /// The contents of a page.
    pub fn get(&self, page: u64) -> Option<&[u8; 4096]> {
        let (key, leaf, at) = locate(page);
        self.leaf(key, leaf)?.page(at)
    }

    fn leaf(&self, key: u64, leaf: usize) -> Option<&Arc<Block>> {
        self.node(key)?.leaves[leaf].as_ref()
    }

    fn node(&self, key: u64) -> Option<&Arc<Node>> {
        let at = self.nodes.binary_search_by_key(&key, |(k, _)| *k).ok()?;
        Some(&self.nodes[at].1)
    }

    fn node_mut(&mut self, key: u64) -> &mut Node {
        let nodes = Arc::make_mut(&mut self.nodes);
        let at = match nodes.binary_search_by_key(&key, |(k, _)| *k) {
            Ok(at) => at,
            Err(at) => {
                nodes.insert(at, (key, Arc::default()));
                at
            }
        };
        Arc::make_mut(&mut nodes[at].1)
    }

    /// Holds a fresh page from now on.
    pub(crate) fn put(&mut self, page: u64, fresh: &mut Fresh, index: usize) {
        let (key, leaf, at) = locate(page);
        let place = &mut self.node_mut(key).leaves[leaf];
        let block = place.get_or_insert_with(|| Arc::new(Block::of(fresh)));
        Arc::make_mut(block).put(at, fresh, index);
    }

    /// Holds the page that another map of the same store holds at `from`, if it holds one.
    pub(crate) fn share(&mut self, page: u64, other: &Self, from: u64) {
        let (key, leaf, at) = locate(from);
        let Some(source) = other.leaf(key, leaf).filter(|b| b.mask() & 1 << at != 0) else {
            self.remove(page..page + 1);
            return;
        };
        let (key, leaf, to) = locate(page);
        let place = &mut self.node_mut(key).leaves[leaf];
        let block = place.get_or_insert_with(|| Arc::new(Block::beside(source)));
        Arc::make_mut(block).share(to, source, at);
    }

    /// Holds at `page` too what it holds at `from`, if it holds something there.
    pub(crate) fn repeat(&mut self, page: u64, from: u64) {
        let (key, leaf, at) = locate(from);
        let Some(source) = self.leaf(key, leaf).cloned() else {
            return;
        };
        if source.mask() & 1 << at == 0 {
            return;
        }
        let (to_key, to_leaf, to) = locate(page);
        let place = &mut self.node_mut(to_key).leaves[to_leaf];
        let block = place.get_or_insert_with(|| Arc::new(Block::beside(&source)));
        if (to_key, to_leaf) == (key, leaf) {
            drop(source);
            Arc::make_mut(block).repeat(to, at);
        } else {
            Arc::make_mut(block).share(to, &source, at);
        }
    }

    /// Holds no page of this range any more.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        // Looked at before anything is copied: most ranges hold nothing.
        if self.runs(range.clone()).next().is_none() {
            return;
        }
        let nodes = Arc::make_mut(&mut self.nodes);
        let begin = nodes.partition_point(|(k, _)| (k + 1) * SPAN <= range.start);
        let mut emptied = false;
        for (key, node) in &mut nodes[begin..] {
            let first = *key * SPAN;
            if first >= range.end {
                break;
            }
            let node = Arc::make_mut(node);
            for (i, place) in node.leaves.iter_mut().enumerate() {
                cut(place, mask_of(&range, first + (i * BLOCK) as u64));
            }
            emptied |= node.leaves.iter().all(Option::is_none);
        }
        if emptied {
            nodes.retain(|(_, n)| n.leaves.iter().any(Option::is_some));
        }
    }

    /// The leaves that touch a range, each with its first page and a bit for each page that is
    /// held and lies in the range; those without any are left out.
    fn leaves(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64, &Block)> {
        let begin = self
            .nodes
            .partition_point(|(k, _)| (k + 1) * SPAN <= range.start);
        let end = range.end;
        self.nodes[begin..]
            .iter()
            .take_while(move |(k, _)| k * SPAN < end)
            .flat_map(|(key, node)| {
                let leaves = node.leaves.iter().enumerate();
                leaves.filter_map(move |(i, l)| {
                    Some((key * SPAN + (i * BLOCK) as u64, l.as_deref()?))
                })
            })
            .filter_map(move |(first, block)| {
                let mask = block.mask() & mask_of(&range, first);
                (mask != 0).then_some((first, mask, block))
            })
    }

    /// The pages of a range, with their contents, ascending.
    pub fn pages(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &[u8; 4096])> {
        self.leaves(range).flat_map(|(first, mask, block)| {
            bits(mask).filter_map(move |at| Some((first + at as u64, block.page(at)?)))
        })
    }

    /// The runs of pages that are held, within a range, ascending. Runs that touch may be told as
    /// several.
    pub fn runs(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.leaves(range).flat_map(|(first, mask, _)| {
            bit_runs(mask).map(move |r| first + r.start..first + r.end)
        })
    }

    /// Tells the runs of pages, within a range, that two maps hold differently, ascending: one holds
    /// a page where the other holds none, or another. Costs what differs.
    pub fn diff(&self, other: &Self, range: Range<u64>, mut tell: impl FnMut(Range<u64>)) {
        let mut a = self.nodes.iter().peekable();
        let mut b = other.nodes.iter().peekable();
        loop {
            let key = match (a.peek(), b.peek()) {
                (None, None) => return,
                (Some((k, _)), None) | (None, Some((k, _))) => *k,
                (Some((k, _)), Some((l, _))) => *k.min(l),
            };
            let left = a.next_if(|(k, _)| *k == key).map(|(_, n)| n);
            let right = b.next_if(|(k, _)| *k == key).map(|(_, n)| n);
            let covered = key * SPAN < range.end && (key + 1) * SPAN > range.start;
            if covered && !shared(left, right) {
                diff_nodes(key * SPAN, left, right, &range, &mut tell);
            }
        }
    }
}

/// Two maps are equal if they hold the same contents at the same numbers.
impl PartialEq for PageMap {
    fn eq(&self, other: &Self) -> bool {
        let mut same = true;
        self.diff(other, 0..u64::MAX, |run| {
            same = same && run.clone().all(|page| self.get(page) == other.get(page));
        });
        same
    }
}

impl Eq for PageMap {}

fn cut(place: &mut Option<Arc<Block>>, mask: u64) {
    let Some(block) = place else { return };
    let held = block.mask();
    if held & !mask == 0 {
        *place = None;
    } else if held & mask != 0 {
        Arc::make_mut(block).remove(mask);
    }
}

fn diff_nodes(
    first: u64,
    left: Option<&Arc<Node>>,
    right: Option<&Arc<Node>>,
    range: &Range<u64>,
    tell: &mut impl FnMut(Range<u64>),
) {
    for i in 0..FAN {
        let a = left.and_then(|n| n.leaves[i].as_ref());
        let b = right.and_then(|n| n.leaves[i].as_ref());
        let first = first + (i * BLOCK) as u64;
        let within = mask_of(range, first);
        if within == 0 || shared(a, b) {
            continue;
        }
        let differs = match (a, b) {
            (Some(a), Some(b)) => a.differs(b),
            (Some(one), None) | (None, Some(one)) => one.mask(),
            (None, None) => 0,
        };
        for run in bit_runs(differs & within) {
            tell(first + run.start..first + run.end);
        }
    }
}

/// The numbers of the bits that are set, ascending.
fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let at = (mask != 0).then(|| mask.trailing_zeros() as usize)?;
        mask &= mask - 1;
        Some(at)
    })
}

/// The runs of bits that are set, ascending.
fn bit_runs(mut mask: u64) -> impl Iterator<Item = Range<u64>> {
    std::iter::from_fn(move || {
        let start = (mask != 0).then(|| u64::from(mask.trailing_zeros()))?;
        let len = u64::from((mask >> start).trailing_ones());
        mask &= u64::MAX.checked_shl((start + len) as u32).unwrap_or(0);
        Some(start..start + len)
    })
}

/// A page that is all zero.
pub(crate) fn is_zero(page: &PageBytes) -> bool {
    // Most pages show it in their first bytes.
    page[..64] == [0; 64] && page.chunks_exact(64).all(|c| c == [0; 64])
}
