//! A view made from a layer on disk.

use std::sync::Arc;

use imbl::{OrdMap, OrdSet};

use super::View;
use crate::node::{Ino, NodeRef};
use crate::tree::Tree;

impl View {
    /// The state in which these inodes differ from the base. Nothing is to be written into it, but into branches of it.
    pub(crate) fn stored(
        tree: Arc<Tree>,
        nodes: OrdMap<Ino, NodeRef>,
        orphans: OrdSet<Ino>,
    ) -> Self {
        let mut view = Self {
            nodes,
            orphans,
            ..Self::new(tree)
        };
        view.count_usage();
        view
    }
}
