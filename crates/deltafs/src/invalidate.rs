//! What the kernel must drop when a mount is switched from one view to another: exactly what differs.

use std::collections::{BTreeSet, HashSet};

use imbl::ordmap::DiffItem;

use crate::fuse::{Absent, Kernel, Notice};
use crate::node::{Body, DIRECTORY, DirBody, EntryKey, Ino, Link, Name, Node, NodeRef, ROOT};
use crate::view::View;

/// More changed ranges of one file than this are dropped as one.
const MAX_RANGES: usize = 16;

/// What the kernel is to be told of a switch.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) notices: Vec<Notice>,
    /// Inodes that keep showing a wrong size or link count until somebody asks for their attributes. The kernel
    /// trusts the size it has in appends, in mappings and in reads before it, and a link count of 0.
    pub(crate) refresh: Vec<Ino>,
    /// Directories that got another name, as parent and name: their dentries, in which somebody may stand, find
    /// their new place when they are looked up.
    pub(crate) look_up: Vec<(Ino, Name)>,
}

/// The inodes of a volume that something will have in use after a rollback.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InUse {
    /// Files that are mapped or run.
    pub files: BTreeSet<u64>,
    /// What is open (with `O_PATH` too), stood in, or somebody's root.
    pub others: BTreeSet<u64>,
}

/// The part of a switch that may wait until the sandbox runs again: all but what is in use.
#[derive(Debug)]
pub(crate) struct Rest {
    old: View,
    new: View,
    /// Inodes that the kernel has been told of.
    told: HashSet<Ino>,
    /// Where walks begin: the root and the directories in use. Nobody may walk from them before everything was compared.
    pub(crate) starts: HashSet<Ino>,
}

/// The two states, and what the kernel may have cached of the one that is left.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Switch<'a> {
    pub(crate) old: &'a View,
    pub(crate) new: &'a View,
    pub(crate) kernel: &'a Kernel,
}

/// Files that nothing has in use, of which the kernel is told last.
#[derive(Debug, Default)]
pub(crate) struct Later {
    changed: Vec<Changed>,
    /// All directories in which one of the two states has a name for one of them.
    pub(crate) behind: HashSet<Ino>,
}

/// One inode that differs: its two versions, as far as the states have it.
#[derive(Debug)]
struct Changed {
    ino: Ino,
    before: Option<NodeRef>,
    after: Option<NodeRef>,
}

impl Switch<'_> {
    /// Whether more than `few` inodes differ.
    pub(crate) fn exceeds(&self, few: usize) -> bool {
        self.old.nodes().diff(self.new.nodes()).nth(few).is_some()
    }

    /// The versions of one inode, if they differ.
    fn changed_inode(&self, ino: Ino) -> Option<Changed> {
        let (before, after) = (self.old.nodes().get(&ino), self.new.nodes().get(&ino));
        let same = match (before, after) {
            (Some(before), Some(after)) => before == after,
            (before, after) => before.is_none() && after.is_none(),
        };
        (!same).then(|| Changed {
            ino,
            before: self.old.node(ino).ok(),
            after: self.new.node(ino).ok(),
        })
    }

    /// Whether one of the states has a directory of this number.
    fn has_dir(&self, ino: Ino) -> bool {
        // An inode that both have is of the same kind in both.
        let node = self.new.node(ino).or_else(|_| self.old.node(ino));
        node.is_ok_and(|node| node.meta.kind() == DIRECTORY)
    }

    /// Adds the directories above a directory, as both states have them.
    fn add_above(&self, dir: Ino, to: &mut HashSet<Ino>) {
        for view in [self.old, self.new] {
            let mut at = dir;
            while at != ROOT
                && let Ok(parent) = view.parent(at)
            {
                to.insert(parent);
                at = parent;
            }
        }
    }

    fn changed(&self) -> impl Iterator<Item = Changed> {
        let items = self.old.nodes().diff(self.new.nodes());
        items.map(|item| match item {
            DiffItem::Add(ino, after) => Changed {
                ino: *ino,
                before: self.old.node(*ino).ok(),
                after: Some(after.clone()),
            },
            DiffItem::Remove(ino, before) => Changed {
                ino: *ino,
                before: Some(before.clone()),
                after: self.new.node(*ino).ok(),
            },
            DiffItem::Update {
                old: (ino, before),
                new: (_, after),
            } => Changed {
                ino: *ino,
                before: Some(before.clone()),
                after: Some(after.clone()),
            },
        })
    }
}

impl Changed {
    fn versions(&self) -> impl Iterator<Item = &NodeRef> {
        self.before.iter().chain(&self.after)
    }

    fn is_dir(&self) -> bool {
        // Not by the body, which lies elsewhere in memory: this is asked for every inode that differs.
        self.versions().any(|node| node.meta.kind() == DIRECTORY)
    }

    /// Whether it may have names that are not known.
    fn is_loose(&self) -> bool {
        self.versions()
            .any(|node| node.meta.nlink as usize != node.names.len())
    }

    /// The names that one state has and the other has not.
    fn lost_names(&self) -> impl Iterator<Item = &Link> {
        let keeps = |link: &&Link| {
            let after = self.after.as_ref();
            !after.is_some_and(|node| node.names.contains(link))
        };
        self.before
            .iter()
            .flat_map(|node| &node.names)
            .filter(keeps)
    }
}

impl Later {
    fn add(&mut self, changed: Changed) {
        // Mostly the names of the two versions are of one directory.
        let mut last = None;
        for link in changed.versions().flat_map(|node| &node.names) {
            if last.replace(link.parent) != Some(link.parent) {
                self.behind.insert(link.parent);
            }
        }
        self.changed.push(changed);
    }

    /// What the kernel must drop of inodes that it can keep, and the inodes that it must drop as a whole: those of which
    /// it would trust an old size or find an old name.
    pub(crate) fn sort(&self) -> (Vec<Notice>, Vec<Ino>) {
        let mut plan = Plan::default();
        let mut whole = Vec::new();
        for changed in &self.changed {
            match (&changed.before, &changed.after) {
                (Some(before), Some(after))
                    if before.size() == after.size() && before.names == after.names =>
                {
                    plan.inode(changed);
                }
                _ => whole.push(changed.ino),
            }
        }
        (plan.notices, whole)
    }
}

impl Rest {
    /// Compares the two states. What the plan says makes the kernel see the new one wherever a directory is walked through, but for
    /// the files that are left for later; directories never are.
    pub(crate) fn compare(&self, kernel: &Kernel, absent: &Absent) -> (Plan, Later) {
        let (old, new) = (&self.old, &self.new);
        let switch = Switch { old, new, kernel };
        let (mut plan, mut later) = (Plan::default(), Later::default());
        let mut directories = Vec::new();
        let mut all_entries = false;
        for changed in switch.changed() {
            let (is_dir, loose) = (changed.is_dir(), changed.is_loose());
            let told = self.told.contains(&changed.ino);
            if !is_dir && !loose && !told {
                later.add(changed);
                continue;
            }
            if !kernel.knows(changed.ino) {
                continue;
            }
            if !told {
                plan.inode(&changed);
            }
            let lost = changed.lost_names().map(|link| Notice::Entry {
                parent: link.parent,
                name: link.name.clone(),
            });
            plan.notices.extend(lost);
            all_entries |= !is_dir && loose;
            if is_dir {
                directories.push(changed);
            }
        }
        for dir in &directories {
            let may_be_absent = |name: &Name| absent.may_hold(dir.ino, name);
            if all_entries || absent.may_hold_any(dir.ino) {
                plan.entries(dir, |name| all_entries || may_be_absent(name));
            }
        }
        (plan, later)
    }
}

impl Plan {
    /// What makes the kernel see the new state at once; costs what differs. What the kernel does not know needs nothing.
    pub(crate) fn complete(switch: Switch<'_>) -> Self {
        let mut plan = Self::default();
        for changed in switch.changed() {
            if switch.kernel.knows(changed.ino) {
                plan.inode(&changed);
                plan.entries(&changed, |_| true);
            }
        }
        plan
    }

    /// What makes the kernel see the new state through what is `held`, the inodes that anything has open, has mapped or
    /// stands in, and how to know the directories among them; costs what is held, however much differs.
    pub(crate) fn of_held(switch: Switch<'_>, held: &InUse) -> (Self, Rest) {
        let others = held.others.iter().copied();
        let dirs = others.filter(|ino| switch.has_dir(*ino));
        let starts: HashSet<Ino> = dirs.chain([ROOT]).collect();
        let inodes = held.files.iter().chain(&held.others).chain(&starts);
        let mut told: HashSet<Ino> = inodes.copied().collect();
        // Somebody stands below them too, and may ask where.
        for dir in &starts {
            switch.add_above(*dir, &mut told);
        }
        let mut plan = Self::default();
        for changed in told.iter().filter_map(|ino| switch.changed_inode(*ino)) {
            if switch.kernel.knows(changed.ino) {
                plan.inode(&changed);
            }
        }
        // The kernel may remember that the name is not there, or is another's.
        let places = plan.look_up.iter().cloned();
        let dropped = places.map(|(parent, name)| Notice::Entry { parent, name });
        plan.notices.extend(dropped);
        let rest = Rest {
            old: switch.old.clone(),
            new: switch.new.clone(),
            told,
            starts,
        };
        (plan, rest)
    }

    /// Attributes and content.
    fn inode(&mut self, changed: &Changed) {
        let ino = changed.ino;
        let (Some(before), Some(after)) = (&changed.before, &changed.after) else {
            self.notices.push(whole(ino));
            return;
        };
        if before.meta.nlink == 0 && after.meta.nlink > 0 || before.size() != after.size() {
            self.refresh.push(ino);
        }
        match (&before.body, &after.body) {
            (Body::Dir(_), Body::Dir(_)) => {
                self.notices.push(whole(ino));
                self.place(before, after);
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

    /// A directory that got another name.
    fn place(&mut self, before: &Node, after: &Node) {
        if before.names != after.names
            && let Some(link) = after.names.first()
        {
            self.look_up.push((link.parent, link.name.clone()));
        }
    }

    /// The names of a directory that differ, as far as they are `wanted`.
    fn entries(&mut self, changed: &Changed, wanted: impl Fn(&Name) -> bool) {
        let dir = |node: &Option<NodeRef>| match node.as_ref().map(|node| &node.body) {
            Some(Body::Dir(dir)) => Some(dir.clone()),
            _ => None,
        };
        let (before, after) = (dir(&changed.before), dir(&changed.after));
        let nothing = DirBody::default();
        let before = before.as_ref().unwrap_or(&nothing);
        let after = after.as_ref().unwrap_or(&nothing);
        for item in before.entries.diff(&after.entries) {
            let key: &EntryKey = match item {
                DiffItem::Add(key, _)
                | DiffItem::Remove(key, _)
                | DiffItem::Update { old: (key, _), .. } => key,
            };
            if wanted(&key.name) {
                self.notices.push(Notice::Entry {
                    parent: changed.ino,
                    name: key.name.clone(),
                });
            }
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
