//! What differs between two snapshots, as paths.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use imbl::ordmap::DiffItem;

use crate::node::{Body, DirBody, Ino, Name, NodeRef};
use crate::view::View;
use crate::volume::Snapshot;

/// One difference between two states of a volume.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// Where, from the root, with a leading `/`; in the later state if it is there.
    pub path: PathBuf,
    /// What happened to it.
    pub kind: ChangeKind,
}

/// What happened to a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// Content, mode, owner, modification time or extended attributes are others, or it is another inode, as when an editor
    /// puts a new file in the place of the old one. A directory whose entries alone have changed is not modified.
    Modified,
    /// It is gone.
    Deleted,
    /// It is the inode that had another path.
    Renamed {
        /// The path it had.
        from: PathBuf,
    },
}

/// Tells what differs from `a` to `b`, by path; costs what differs. What is below a directory
/// that came or went is listed too; what is below a renamed one is not.
pub fn diff(a: &Snapshot, b: &Snapshot) -> Vec<Change> {
    let (a, b) = (a.view(), b.view());
    let mut found = Found::default();
    for item in a.nodes().diff(b.nodes()) {
        let ino = match item {
            DiffItem::Add(ino, _)
            | DiffItem::Remove(ino, _)
            | DiffItem::Update { old: (ino, _), .. } => *ino,
        };
        found.inode(ino, a, b);
    }
    found.changes(a, b)
}

/// The names that went and came, by inode.
#[derive(Debug, Default)]
struct Found {
    gone: BTreeMap<Ino, Vec<PathBuf>>,
    come: BTreeMap<Ino, Vec<PathBuf>>,
    modified: Vec<PathBuf>,
}

impl Found {
    fn inode(&mut self, ino: Ino, a: &View, b: &View) {
        let (Some(path_a), Some(path_b)) = (a.path(ino), b.path(ino)) else {
            return;
        };
        let (Ok(before), Ok(after)) = (a.node(ino), b.node(ino)) else {
            return;
        };
        if is_modified(&before, &after) {
            self.modified.push(absolute(&path_b));
        }
        if let (Body::Dir(before), Body::Dir(after)) = (&before.body, &after.body) {
            self.entries(ino, (a, before, &path_a), (b, after, &path_b));
        }
    }

    fn entries(
        &mut self,
        dir: Ino,
        a: (&View, &DirBody, &OsString),
        b: (&View, &DirBody, &OsString),
    ) {
        for item in a.1.entries.diff(&b.1.entries) {
            let key = match item {
                DiffItem::Add(key, _)
                | DiffItem::Remove(key, _)
                | DiffItem::Update { old: (key, _), .. } => key,
            };
            let before = a.0.lookup(dir, &key.name).ok().flatten();
            let after = b.0.lookup(dir, &key.name).ok().flatten();
            if before == after {
                continue;
            }
            if let Some(ino) = before {
                add_tree(&mut self.gone, a.0, ino, join(a.2, &key.name), b.0);
            }
            if let Some(ino) = after {
                add_tree(&mut self.come, b.0, ino, join(b.2, &key.name), a.0);
            }
        }
    }

    fn changes(mut self, a: &View, b: &View) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut push = |path: PathBuf, kind| changes.push(Change { path, kind });
        for (ino, mut paths) in std::mem::take(&mut self.come) {
            let mut before = self.gone.remove(&ino).unwrap_or_default();
            paths.sort();
            before.sort();
            let renamed = paths.len().min(before.len());
            for (path, from) in paths.drain(..renamed).zip(before.drain(..renamed)) {
                push(path, ChangeKind::Renamed { from });
            }
            paths
                .into_iter()
                .for_each(|path| push(path, ChangeKind::Added));
            before
                .into_iter()
                .for_each(|path| push(path, ChangeKind::Deleted));
        }
        for (ino, paths) in self.gone {
            // A directory that went may have held what lives on elsewhere: that shows as come.
            let moved = a.path(ino).is_some() && b.path(ino).is_some() && paths.is_empty();
            if !moved {
                paths
                    .into_iter()
                    .for_each(|path| push(path, ChangeKind::Deleted));
            }
        }
        self.modified
            .into_iter()
            .for_each(|path| push(path, ChangeKind::Modified));
        changes.sort();
        changes.dedup();
        changes.dedup_by(merge_replaced);
        changes
    }
}

/// Takes a path that went and came, as another inode, for modified. Of one path the deletion is sorted behind the addition.
fn merge_replaced(next: &mut Change, kept: &mut Change) -> bool {
    let replaced = next.path == kept.path
        && next.kind == ChangeKind::Deleted
        && matches!(kept.kind, ChangeKind::Added | ChangeKind::Modified);
    if replaced {
        kept.kind = ChangeKind::Modified;
    }
    replaced
}

/// Records an inode and all that is below it, unless it is a directory that the other state has too: what is below
/// that has merely moved along with it.
fn add_tree(
    into: &mut BTreeMap<Ino, Vec<PathBuf>>,
    view: &View,
    ino: Ino,
    path: OsString,
    other: &View,
) {
    let mut todo = vec![(ino, path)];
    let mut seen = HashSet::new();
    while let Some((ino, path)) = todo.pop() {
        into.entry(ino).or_default().push(absolute(&path));
        let Ok(node) = view.node(ino) else { continue };
        if !node.is_dir() || !seen.insert(ino) || other.path(ino).is_some() {
            continue;
        }
        let mut below = HashMap::new();
        let _ = view.list(&node, 0, |listed| {
            below.insert(listed.key.name.clone(), listed.ino);
            true
        });
        todo.extend(
            below
                .into_iter()
                .map(|(name, ino)| (ino, join(&path, &name))),
        );
    }
}

fn is_modified(before: &NodeRef, after: &NodeRef) -> bool {
    let (old, new) = (&before.meta, &after.meta);
    if (old.mode, old.uid, old.gid) != (new.mode, new.uid, new.gid)
        || !before.xattrs.is_same(&after.xattrs)
    {
        return true;
    }
    match (&before.body, &after.body) {
        (Body::Dir(_), Body::Dir(_)) => false,
        (Body::File(a), Body::File(b)) => old.mtime != new.mtime || !a.is_same_version(b),
        _ => old.mtime != new.mtime,
    }
}

fn join(dir: &OsString, name: &Name) -> OsString {
    let mut bytes = dir.clone().into_vec();
    if !bytes.is_empty() {
        bytes.push(b'/');
    }
    bytes.extend_from_slice(name);
    OsString::from_vec(bytes)
}

fn absolute(path: &OsString) -> PathBuf {
    let mut absolute = PathBuf::from("/");
    absolute.push(path);
    absolute
}
