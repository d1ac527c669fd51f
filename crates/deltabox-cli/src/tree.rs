//! Draws the tree of checkpoints.
//!
//! A line of checkpoints without branches goes straight down; only branches are indented. So a search of a thousand
//! steps stays readable where it did not branch.

use std::collections::{BTreeMap, BTreeSet};

use deltabox::{CheckpointId, CheckpointInfo, Tree};

/// One line: the lines that lead to a checkpoint, and the checkpoint.
#[derive(Debug)]
pub(crate) struct Row<'a> {
    pub(crate) lead: String,
    pub(crate) node: &'a CheckpointInfo,
}

/// The lines of the drawing, from top to bottom.
pub(crate) fn rows(tree: &Tree) -> Vec<Row<'_>> {
    let known: BTreeSet<CheckpointId> = tree.nodes.iter().map(|node| node.id).collect();
    let mut children: BTreeMap<Option<CheckpointId>, Vec<&CheckpointInfo>> = BTreeMap::new();
    for node in &tree.nodes {
        let parent = node.parent.filter(|parent| known.contains(parent));
        children.entry(parent).or_default().push(node);
    }
    let mut rows = Vec::with_capacity(tree.nodes.len());
    // What is still to be drawn, the next one last: a stack of our own, as a tree may be deeper than ours.
    let mut pending = Vec::new();
    push_children(&mut pending, children.remove(&None), "");
    while let Some(Pending { node, lead, below }) = pending.pop() {
        rows.push(Row { lead, node });
        push_children(&mut pending, children.remove(&Some(node.id)), &below);
    }
    rows
}

struct Pending<'a> {
    node: &'a CheckpointInfo,
    /// Before the checkpoint itself.
    lead: String,
    /// Before what comes from it.
    below: String,
}

fn push_children<'a>(
    pending: &mut Vec<Pending<'a>>,
    children: Option<Vec<&'a CheckpointInfo>>,
    indent: &str,
) {
    let children = children.unwrap_or_default();
    let last = children.len().saturating_sub(1);
    for (i, &node) in children.iter().enumerate().rev() {
        let (branch, trunk) = match i {
            _ if last == 0 => ("", ""),
            i if i == last => ("└─", "  "),
            _ => ("├─", "│ "),
        };
        pending.push(Pending {
            node,
            lead: format!("{indent}{branch}"),
            below: format!("{indent}{trunk}"),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use deltabox::CheckpointState;

    fn tree(edges: &[(u64, Option<u64>)]) -> Tree {
        let node = |&(id, parent): &(u64, Option<u64>)| CheckpointInfo {
            id: CheckpointId(id),
            parent: parent.map(CheckpointId),
            message: None,
            created: 0,
            processes: 0,
            current: false,
            state: CheckpointState::Warm,
        };
        Tree {
            nodes: edges.iter().map(node).collect(),
        }
    }

    fn drawn(edges: &[(u64, Option<u64>)]) -> String {
        rows(&tree(edges))
            .iter()
            .map(|row| format!("{}{}\n", row.lead, row.node.id))
            .collect()
    }

    #[test]
    fn branches_are_indented_and_straight_lines_are_not() {
        let edges = [
            (1, None),
            (2, Some(1)),
            (3, Some(2)),
            (4, Some(3)),
            (5, Some(2)),
            (6, Some(5)),
            (7, Some(6)),
            (8, Some(6)),
        ];
        let expected = "c1\nc2\n├─c3\n│ c4\n└─c5\n  c6\n  ├─c7\n  └─c8\n";
        assert_eq!(drawn(&edges), expected);
    }

    #[test]
    fn several_roots_and_unknown_parents_are_all_drawn() {
        assert_eq!(drawn(&[(4, Some(1)), (5, None)]), "├─c4\n└─c5\n");
        assert_eq!(drawn(&[]), "");
    }

    #[test]
    fn a_line_of_100_000_checkpoints_is_drawn() {
        let edges: Vec<_> = (1..=100_000)
            .map(|id| (id, (id > 1).then(|| id - 1)))
            .collect();
        assert_eq!(rows(&tree(&edges)).len(), 100_000);
    }
}
