//! Tree search in UCT order (Kocsis and Szepesvári 2006), with progressive widening.

/// How much rarely visited nodes are preferred; scores are between 0 and 1.
const EXPLORATION: f64 = 0.7;

/// Deterministic random numbers (splitmix64), so that a search can be repeated.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`, which is not 0.
    fn below(&mut self, n: usize) -> usize {
        (self.roll() % n as u64) as usize
    }
}

/// A state that was reached.
pub(super) struct Node<A> {
    pub(super) parent: Option<usize>,
    /// What led here from the parent; `None` at the root.
    pub(super) action: Option<A>,
    /// What the test said of this state.
    pub(super) score: f64,
    pub(super) depth: usize,
    children: Vec<usize>,
    untried: Vec<A>,
    visits: f64,
    total: f64,
}

/// The tree and what is known of it.
pub(super) struct Search<A> {
    pub(super) nodes: Vec<Node<A>>,
    dice: Dice,
}

impl<A> Search<A> {
    pub(super) fn new(seed: u64, score: f64, untried: Vec<A>) -> Self {
        let mut search = Self {
            nodes: Vec::new(),
            dice: Dice::new(seed),
        };
        search.push(None, None, score, untried);
        search
    }

    /// The state to go on from and what to try there; `None` when everything was tried.
    pub(super) fn select(&mut self) -> Option<(usize, A)> {
        let open = self.open();
        let mut at = 0;
        if !open[at] {
            return None;
        }
        loop {
            let node = &self.nodes[at];
            let next = node.children.iter().copied().filter(|&c| open[c]);
            let next = next.max_by(|&a, &b| self.promise(at, a).total_cmp(&self.promise(at, b)));
            let wide = node.children.len() as f64 >= 1.5 * node.visits.sqrt();
            match next {
                Some(child) if wide || node.untried.is_empty() => at = child,
                _ => break,
            }
        }
        let untried = &mut self.nodes[at].untried;
        let pick = self.dice.below(untried.len());
        Some((at, untried.swap_remove(pick)))
    }

    /// Adds the state that an action led to, and tells its ancestors of its score.
    pub(super) fn add(&mut self, parent: usize, action: A, score: f64, untried: Vec<A>) -> usize {
        self.push(Some(parent), Some(action), score, untried)
    }

    /// The best state, of several the one reached first.
    pub(super) fn best(&self) -> usize {
        let better = |a: usize, b: usize| match self.nodes[b].score > self.nodes[a].score {
            true => b,
            false => a,
        };
        (0..self.nodes.len()).fold(0, better)
    }

    /// The states from the root to `node`, both included.
    pub(super) fn path(&self, node: usize) -> Vec<usize> {
        let mut path: Vec<_> =
            std::iter::successors(Some(node), |&n| self.nodes[n].parent).collect();
        path.reverse();
        path
    }

    fn push(
        &mut self,
        parent: Option<usize>,
        action: Option<A>,
        score: f64,
        untried: Vec<A>,
    ) -> usize {
        let new = self.nodes.len();
        self.nodes.push(Node {
            parent,
            action,
            score,
            depth: parent.map_or(0, |p| self.nodes[p].depth + 1),
            children: Vec::new(),
            untried,
            visits: 0.0,
            total: 0.0,
        });
        if let Some(parent) = parent {
            self.nodes[parent].children.push(new);
        }
        for node in self.path(new) {
            self.nodes[node].visits += 1.0;
            self.nodes[node].total += score;
        }
        new
    }

    /// The upper confidence bound of a child.
    fn promise(&self, parent: usize, child: usize) -> f64 {
        let (parent, child) = (&self.nodes[parent], &self.nodes[child]);
        child.total / child.visits + EXPLORATION * (2.0 * parent.visits.ln() / child.visits).sqrt()
    }

    /// Whether something is left to try in each node's subtree. Children come after their parents.
    fn open(&self) -> Vec<bool> {
        let mut open: Vec<_> = self.nodes.iter().map(|n| !n.untried.is_empty()).collect();
        for (at, node) in self.nodes.iter().enumerate().rev() {
            if let (true, Some(parent)) = (open[at], node.parent) {
                open[parent] = true;
            }
        }
        open
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Actions are digits; a state's score is the share of 7s in it.
    fn grow(seed: u64, n: usize) -> Search<u8> {
        let mut search = Search::new(seed, 0.0, (0..10).collect());
        while search.nodes.len() < n {
            let (parent, digit) = search.select().unwrap();
            let path = search.path(parent);
            let digits = path.iter().filter_map(|&n| search.nodes[n].action);
            let sevens = digits.chain([digit]).filter(|&d| d == 7).count();
            search.add(parent, digit, sevens as f64 / 5.0, (0..10).collect());
        }
        search
    }

    #[test]
    fn the_search_goes_where_scores_are_good() {
        let search = grow(1, 200);
        assert!(search.nodes[search.best()].score >= 0.4);
        assert!(search.nodes.iter().any(|n| n.depth >= 3));
        assert!(search.nodes[0].children.len() > 3);
    }

    #[test]
    fn the_same_seed_gives_the_same_search() {
        let shape =
            |s: &Search<u8>| -> Vec<_> { s.nodes.iter().map(|n| (n.parent, n.action)).collect() };
        assert_eq!(shape(&grow(5, 60)), shape(&grow(5, 60)));
        assert_ne!(shape(&grow(5, 60)), shape(&grow(6, 60)));
    }

    #[test]
    fn a_tree_that_was_tried_out_ends_the_search() {
        let mut search = Search::new(0, 0.0, vec![1, 2]);
        while let Some((parent, action)) = search.select() {
            search.add(parent, action, 1.0, Vec::new());
        }
        assert_eq!(search.nodes.len(), 3);
    }
}
