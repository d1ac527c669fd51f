//! What the kernel must drop when a mount is switched from one view to another: exactly what differs.

use imbl::ordmap::DiffItem;

use crate::fuse::{Kernel, Notice};
use crate::node::{Body, DirBody, EntryKey, Ino, Name, NodeRef};
use crate::view::View;

/// More changed ranges of one file than this are dropped as one.
const MAX_RANGES: usize = 16;

/// What is to be done after a switch.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) notices: Vec<Notice>,
    /// Inodes that keep showing a wrong size or link count until somebody asks for their attributes. The kernel
    /// trusts the size it has in appends, in mappings and in reads before it, and a link count of 0.
    pub(crate) refresh: Vec<Ino>,
    /// Directories that got another name, as parent and name: their dentries, in which somebody may stand, find
    /// their new place when they are looked up.
    pub(crate) look_up: Vec<(Ino, Name)>,
    /// Inodes that differ.
    pub(crate) changed: usize,
}

impl Plan {
    /// Compares two views; costs what differs. What the kernel does not know needs nothing.
    pub(crate) fn between(old: &View, new: &View, kernel: &Kernel) -> Self {
        let mut plan = Self::default();
        for item in old.nodes().diff(new.nodes()) {
            let ino = match item {
                DiffItem::Add(ino, _)
                | DiffItem::Remove(ino, _)
                | DiffItem::Update { old: (ino, _), .. } => *ino,
            };
            plan.changed += 1;
            if !kernel.knows(ino) {
                continue;
            }
            match (old.node(ino), new.node(ino)) {
                (Ok(before), Ok(after)) => plan.inode(ino, &before, &after, new, kernel),
                _ => plan.notices.push(whole(ino)),
            }
        }
        plan
    }

    fn inode(&mut self, ino: Ino, before: &NodeRef, after: &NodeRef, new: &View, kernel: &Kernel) {
        if before.meta.nlink == 0 && after.meta.nlink > 0 || before.size() != after.size() {
            self.refresh.push(ino);
        }
        match (&before.body, &after.body) {
            (Body::Dir(old_dir), Body::Dir(new_dir)) => {
                self.entries(ino, old_dir, new_dir, new, kernel);
                self.notices.push(whole(ino));
            }
            (Body::File(old_file), Body::File(new_file)) => match old_file.changed_ranges(new_file)
            {
                Some(ranges) if ranges.is_empty() => self.notices.push(Notice::Attributes(ino)),
                Some(ranges) if ranges.len() <= MAX_RANGES => {
                    self.notices
                        .extend(ranges.into_iter().map(|range| Notice::Content {
                            ino,
                            start: range.start,
                            len: range.end - range.start,
                        }));
                }
                _ => self.notices.push(whole(ino)),
            },
            _ => self.notices.push(Notice::Attributes(ino)),
        }
    }

    fn entries(
        &mut self,
        parent: Ino,
        before: &DirBody,
        after: &DirBody,
        new: &View,
        kernel: &Kernel,
    ) {
        for item in before.entries.diff(&after.entries) {
            let key: &EntryKey = match item {
                DiffItem::Add(key, _)
                | DiffItem::Remove(key, _)
                | DiffItem::Update { old: (key, _), .. } => key,
            };
            let name = key.name.clone();
            if let Ok(Some(child)) = new.lookup(parent, &name)
                && kernel.knows(child)
                && new.node(child).is_ok_and(|node| node.is_dir())
            {
                self.look_up.push((parent, name.clone()));
            }
            self.notices.push(Notice::Entry { parent, name });
        }
    }
}

fn whole(ino: Ino) -> Notice {
    Notice::Content {
        ino,
        start: 0,
        len: 0,
    }
}
