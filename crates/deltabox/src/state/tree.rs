//! The tree of checkpoints of one sandbox.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::report::{CheckpointId, CheckpointInfo, CheckpointState, Tree};

/// One checkpoint: where it stands in the tree, and what it holds.
pub(crate) struct Node<T> {
    pub(crate) parent: Option<CheckpointId>,
    pub(crate) message: Option<String>,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) processes: usize,
    pub(crate) content: T,
    pub(crate) disk: Disk,
}

/// What is on disk of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Disk {
    /// Nothing.
    Nothing,
    /// All of it.
    Durable {
        /// The one that it is written against.
        before: Option<CheckpointId>,
        /// What it takes, in bytes.
        bytes: u64,
    },
    /// Nothing, for this reason.
    Failed(String),
}

impl Disk {
    fn describe(&self) -> CheckpointState {
        match self {
            Self::Nothing => CheckpointState::Warm,
            Self::Durable { .. } => CheckpointState::Durable,
            Self::Failed(reason) => CheckpointState::Failed {
                reason: reason.clone(),
            },
        }
    }
}

impl<T> Node<T> {
    /// A node made now, whose parent the tree will set.
    pub(crate) fn new(message: Option<String>, processes: usize, content: T) -> Self {
        let created = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        Self {
            parent: None,
            message,
            created,
            processes,
            content,
            disk: Disk::Nothing,
        }
    }
}

/// Checkpoints by id, and the one that the present state comes from.
pub(crate) struct Checkpoints<T> {
    nodes: BTreeMap<CheckpointId, Node<T>>,
    current: Option<CheckpointId>,
}

impl<T> Default for Checkpoints<T> {
    fn default() -> Self {
        Self {
            nodes: BTreeMap::new(),
            current: None,
        }
    }
}

impl<T> Checkpoints<T> {
    pub(crate) fn current(&self) -> Option<CheckpointId> {
        self.current
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// How many are on disk.
    pub(crate) fn durable(&self) -> usize {
        let durable = |node: &&Node<T>| matches!(node.disk, Disk::Durable { .. });
        self.nodes.values().filter(durable).count()
    }

    /// All checkpoints, older ones first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&CheckpointId, &Node<T>)> {
        self.nodes.iter()
    }

    pub(crate) fn get(&self, id: CheckpointId) -> Option<&Node<T>> {
        self.nodes.get(&id)
    }

    /// The children of a checkpoint, newest first.
    pub(crate) fn children(&self, id: CheckpointId) -> impl Iterator<Item = &Node<T>> {
        let newer = self.nodes.range(id..).rev().map(|(_, node)| node);
        newer.filter(move |node| node.parent == Some(id))
    }

    /// Adds a checkpoint of the present state.
    pub(crate) fn add(&mut self, id: CheckpointId, node: Node<T>) {
        self.nodes.insert(
            id,
            Node {
                parent: self.current,
                ..node
            },
        );
        self.current = Some(id);
    }

    /// Puts a checkpoint in its place in the tree, where `node` says.
    pub(crate) fn put(&mut self, id: CheckpointId, node: Node<T>) {
        self.nodes.insert(id, node);
    }

    /// Notes what is on disk of a checkpoint, if it is still there.
    pub(crate) fn set_disk(&mut self, id: CheckpointId, disk: Disk) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.disk = disk;
        }
    }

    /// The nearest ancestor of a checkpoint that is durable.
    pub(crate) fn durable_ancestor(&self, id: CheckpointId) -> Option<CheckpointId> {
        let mut at = self.nodes.get(&id)?.parent;
        while let Some(id) = at {
            let node = self.nodes.get(&id)?;
            if matches!(node.disk, Disk::Durable { .. }) {
                return Some(id);
            }
            at = node.parent;
        }
        None
    }

    /// The present state comes from this checkpoint now.
    pub(crate) fn move_to(&mut self, id: CheckpointId) {
        self.current = Some(id);
    }

    /// Takes a checkpoint out. Its children, and the present state, become its parent's.
    pub(crate) fn remove(&mut self, id: CheckpointId) -> Option<Node<T>> {
        let node = self.nodes.remove(&id)?;
        for child in self
            .nodes
            .values_mut()
            .filter(|child| child.parent == Some(id))
        {
            child.parent = node.parent;
        }
        if self.current == Some(id) {
            self.current = node.parent;
        }
        Some(node)
    }

    /// The tree for people, parents before children.
    pub(crate) fn describe(&self) -> Tree {
        // Ids only grow, so a parent's is below its children's.
        let nodes = self.nodes.iter().map(|(id, node)| CheckpointInfo {
            id: *id,
            parent: node.parent,
            message: node.message.clone(),
            created: node.created,
            processes: node.processes,
            current: self.current == Some(*id),
            state: node.disk.describe(),
        });
        Tree {
            nodes: nodes.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u64) -> CheckpointId {
        CheckpointId(n)
    }

    fn tree() -> Checkpoints<()> {
        let mut tree = Checkpoints::default();
        tree.add(id(1), Node::new(None, 0, ()));
        tree.add(id(2), Node::new(None, 0, ()));
        tree.add(id(3), Node::new(None, 0, ()));
        tree.move_to(id(2));
        tree.add(id(4), Node::new(None, 0, ()));
        tree
    }

    fn parent(tree: &Checkpoints<()>, n: u64) -> Option<u64> {
        tree.get(id(n)).unwrap().parent.map(|p| p.0)
    }

    #[test]
    fn a_checkpoint_is_a_child_of_what_the_state_came_from() {
        let tree = tree();
        let parents: Vec<_> = (1..=4).map(|n| parent(&tree, n)).collect();
        assert_eq!(parents, [None, Some(1), Some(2), Some(2)]);
        assert_eq!(tree.current(), Some(id(4)));
    }

    #[test]
    fn children_of_a_deleted_checkpoint_go_to_its_parent() {
        let mut tree = tree();
        assert!(tree.remove(id(2)).is_some());
        assert_eq!((parent(&tree, 3), parent(&tree, 4)), (Some(1), Some(1)));
        assert!(tree.remove(id(4)).is_some());
        assert_eq!(tree.current(), Some(id(1)));
        assert!(tree.remove(id(4)).is_none());
    }

    #[test]
    fn the_root_can_be_deleted() {
        let mut tree = tree();
        assert!(tree.remove(id(1)).is_some());
        assert_eq!(parent(&tree, 2), None);
        let described = tree.describe();
        assert_eq!(described.nodes.len(), 3);
        assert_eq!(described.nodes.iter().filter(|n| n.current).count(), 1);
    }
}
