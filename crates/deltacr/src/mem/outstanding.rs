//! Which pages of a process are still to be given back, and where they are to go by now.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::mem::PAGE;
use crate::sys::arena::BLOCK;

/// Ranges of addresses, each with the page that belongs at its beginning. The process may move and drop parts of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outstanding {
    /// By first address: the address after the last, and the number of the first page in the page map.
    runs: BTreeMap<u64, (u64, u64)>,
}

/// Neighbouring pages that are given back together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) range: Range<u64>,
    /// The number of the first in the page map.
    pub(crate) page: u64,
}

impl Outstanding {
    /// All pages of these ranges, which are at home.
    pub(crate) fn of(ranges: &[Range<u64>]) -> Self {
        let runs = ranges.iter().map(|r| (r.start, (r.end, r.start / PAGE)));
        Self {
            runs: runs.collect(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The pages around an address that lie in one block of the page map.
    pub(crate) fn around(&self, address: u64) -> Option<Part> {
        let (&start, &(end, page)) = self.runs.range(..=address).next_back()?;
        (address < end).then(|| {
            let wanted = page + (address - start) / PAGE;
            block(start, end, page, wanted)
        })
    }

    /// The first pages at or after an address; from the beginning again if there are none.
    pub(crate) fn next(&self, address: u64) -> Option<Part> {
        if let Some(part) = self.around(address) {
            return Some(part);
        }
        let after = self.runs.range(address..).next();
        let (&start, &(end, page)) = after.or_else(|| self.runs.iter().next())?;
        Some(block(start, end, page, page))
    }

    /// The pages of a range need not be given back any more.
    pub(crate) fn remove(&mut self, range: &Range<u64>) {
        drop(self.take(range));
    }

    /// What belonged in one range belongs in another now, whatever was to be there.
    pub(crate) fn relocate(&mut self, from: u64, to: u64, len: u64) {
        let moved = self.take(&(from..from.saturating_add(len)));
        self.remove(&(to..to.saturating_add(len)));
        for (start, (end, page)) in moved {
            let place = |address: u64| address.wrapping_sub(from).wrapping_add(to);
            self.runs.insert(place(start), (place(end), page));
        }
    }

    fn take(&mut self, range: &Range<u64>) -> Vec<(u64, (u64, u64))> {
        let first = self.runs.range(..range.start).next_back();
        let first = first.filter(|(_, (end, _))| *end > range.start);
        let begin = first.map_or(range.start, |(start, _)| *start);
        let touched: Vec<_> = self.runs.range(begin..range.end.max(begin)).collect();
        let touched: Vec<_> = touched.into_iter().map(|(s, r)| (*s, *r)).collect();
        let mut taken = Vec::new();
        for (start, (end, page)) in touched {
            self.runs.remove(&start);
            let inside = start.max(range.start)..end.min(range.end);
            let page_at = |address: u64| page + (address - start) / PAGE;
            if start < inside.start {
                self.runs.insert(start, (inside.start, page));
            }
            if inside.end < end {
                self.runs.insert(inside.end, (end, page_at(inside.end)));
            }
            taken.push((inside.start, (inside.end, page_at(inside.start))));
        }
        taken
    }
}

/// The part of a run that lies in the same block of the page map as the page `wanted`.
fn block(start: u64, end: u64, page: u64, wanted: u64) -> Part {
    let block = wanted / BLOCK as u64 * BLOCK as u64;
    let first = block.max(page);
    let last = (block + BLOCK as u64).min(page + (end - start) / PAGE);
    let at = start + (first - page) * PAGE;
    Part {
        range: at..at + (last - first) * PAGE,
        page: first,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::mem::pages_of;

    #[derive(Clone, Debug)]
    enum Step {
        Remove(Range<u64>),
        Move(u64, u64, u64),
        Around(u64),
        Next(u64),
    }

    fn steps() -> impl Strategy<Value = Step> {
        let page = 0..600_u64;
        let range = (page.clone(), 1..90_u64).prop_map(|(at, len)| at..at + len);
        prop_oneof![
            range.prop_map(Step::Remove),
            // What moves does not overlap the place that it moves to.
            (page.clone(), 600..1200_u64, 1..200_u64).prop_map(|(f, t, l)| Step::Move(f, t, l)),
            (600..1200_u64, page.clone(), 1..200_u64).prop_map(|(f, t, l)| Step::Move(f, t, l)),
            page.clone().prop_map(Step::Around),
            (0..1300_u64).prop_map(Step::Next),
        ]
    }

    /// What is to be where, page by page.
    type Model = BTreeMap<u64, u64>;

    fn contents(outstanding: &Outstanding) -> Model {
        let runs = outstanding.runs.iter();
        runs.flat_map(|(start, (end, page))| (start / PAGE..end / PAGE).zip(*page..))
            .collect()
    }

    fn is_right(part: &Part, model: &Model) {
        assert!(!part.range.is_empty());
        let pages = pages_of(&part.range);
        assert!(pages.end - pages.start <= BLOCK as u64);
        for (at, page) in pages.zip(part.page..) {
            assert_eq!(model.get(&at), Some(&page));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn pages_are_known_by_where_they_are_to_go(script in prop::collection::vec(steps(), 1..30)) {
            let ranges = [3 * PAGE..200 * PAGE, 200 * PAGE..201 * PAGE, 300 * PAGE..500 * PAGE];
            let mut outstanding = Outstanding::of(&ranges);
            let mut model: Model = ranges.iter().flat_map(pages_of).map(|p| (p, p)).collect();
            for step in script {
                match step {
                    Step::Remove(pages) => {
                        outstanding.remove(&(pages.start * PAGE..pages.end * PAGE));
                        model.retain(|at, _| !pages.contains(at));
                    }
                    Step::Move(from, to, len) => {
                        outstanding.relocate(from * PAGE, to * PAGE, len * PAGE);
                        let moved: Vec<_> = (from..from + len).map(|at| model.remove(&at)).collect();
                        for (at, page) in (to..).zip(moved) {
                            model.remove(&at);
                            model.extend(page.map(|page| (at, page)));
                        }
                    }
                    Step::Around(at) => match outstanding.around(at * PAGE + 5) {
                        Some(part) => {
                            is_right(&part, &model);
                            prop_assert!(pages_of(&part.range).contains(&at));
                        }
                        None => prop_assert!(!model.contains_key(&at)),
                    },
                    Step::Next(at) => match outstanding.next(at * PAGE) {
                        Some(part) => is_right(&part, &model),
                        None => prop_assert!(model.is_empty()),
                    },
                }
                prop_assert_eq!(contents(&outstanding), model.clone());
                prop_assert_eq!(outstanding.is_empty(), model.is_empty());
            }
        }
    }
}
