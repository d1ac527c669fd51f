//! Making snapshots of layers again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use deltalog::BlockReader;
use imbl::{OrdMap, OrdSet};

use super::read::{Changed, Layer};
use super::records::{Attributes, Content, Inode, NamedEntry, Numbering, Place};
use crate::base::Base;
use crate::data::{BLOCK, BLOCK_LEN, Block, DataStore};
use crate::error::{Error, Result};
use crate::file::{FileBody, StoredBlock};
use crate::node::{
    Body, DIRECTORY, DirBody, Entry, Ino, Link, Name, Node, NodeRef, REGULAR, ROOT, SYMLINK,
};
use crate::tree::Tree;
use crate::view::{MAX_NAME, View};
use crate::volume::{Options, Snapshot, Volume, check_ids};
use crate::xattr::Xattrs;

/// Blocks that are copied at a time.
const COPY: u64 = 256;

/// A tree of volumes that is being made of layers on disk, and has no mount yet: what is looked up in a mount would take
/// the numbers of inodes that a layer still to be loaded knows.
#[derive(Debug)]
pub struct Loader {
    options: Options,
    numbering: Option<Numbering>,
    tree: Option<Arc<Tree>>,
    /// Inodes of the base that are others now, and where they were.
    changed: BTreeMap<Ino, PathBuf>,
}

impl Loader {
    /// Nothing is loaded yet.
    ///
    /// # Errors
    /// The id map does not hold `nobody`.
    pub fn new(options: Options) -> Result<Self> {
        check_ids(options.ids)?;
        Ok(Self {
            options,
            numbering: None,
            tree: None,
            changed: BTreeMap::new(),
        })
    }

    /// The snapshot that the layer in `dir` was written of. `before` is the one that it was written against.
    ///
    /// # Errors
    /// The layer is damaged, or is over another base, or over files of the base that have changed since. Others can
    /// still be loaded.
    pub fn load(&mut self, dir: &Path, before: Option<&Snapshot>) -> Result<Snapshot> {
        let layer = Layer::read(dir)?;
        let blocks = layer.blocks(dir)?;
        let tree = self.tree(&layer, dir)?;
        for inode in &layer.base {
            if !tree.base.know(inode) {
                return Err(damaged(
                    &layer,
                    format!("no base inode {} can be", inode.ino),
                ));
            }
            if let Some(path) = tree.base.changed(inode) {
                self.changed.insert(inode.ino, path);
            }
        }
        let blocks = copy_blocks(&tree.data, &blocks, tree.next_epoch())?;
        let state = State {
            layer: &layer,
            dir,
            base: &tree.base,
            changed: &self.changed,
            blocks: &blocks,
        };
        let nodes = before.map(|before| before.view().nodes().clone());
        let nodes = state.nodes(nodes.unwrap_or_default())?;
        let orphans = layer.orphans.iter().copied().collect::<OrdSet<Ino>>();
        let view = View::stored(tree, nodes, orphans);
        Ok(Snapshot::new(view, layer.numbering.free.rank))
    }

    /// The tree, made with the first layer.
    fn tree(&mut self, layer: &Layer, dir: &Path) -> Result<Arc<Tree>> {
        let tree = match &self.tree {
            Some(tree) => Arc::clone(tree),
            None => self.make_tree(Some(layer.numbering.keys))?,
        };
        let numbering = layer.numbering;
        if tree.base.root_host() != Some(numbering.root) {
            return Err(Error::BaseChanged {
                layer: dir.to_owned(),
                what: "it is another directory".to_owned(),
            });
        }
        if self
            .numbering
            .is_some_and(|first| first.keys != numbering.keys)
        {
            return Err(damaged(layer, "it belongs to another tree of volumes"));
        }
        self.numbering = Some(numbering);
        tree.base.reserve(numbering.free);
        Ok(Arc::clone(self.tree.insert(tree)))
    }

    fn make_tree(&self, keys: Option<(u64, u64)>) -> Result<Arc<Tree>> {
        let base = |what, source| Error::Base { what, source };
        let root = self.options.base.try_clone();
        let root = root.map_err(|source| base("keeping it open", source))?;
        let hidden = &self.options.hidden;
        let made = match keys {
            Some(keys) => Base::with_keys(root, hidden, keys),
            None => Base::new(root, hidden),
        };
        let made = made.map_err(|errno| base("looking at the directory", errno.into()))?;
        let data = DataStore::create(&self.options.data_dir).map_err(|source| Error::Data {
            path: self.options.data_dir.clone(),
            source,
        })?;
        Ok(Arc::new(Tree::new(made, data)))
    }

    /// The files of the base that have changed since the layers that were loaded were written, by inode number and path.
    /// What only they show has changed with them.
    pub fn changed_base(&self) -> &BTreeMap<u64, PathBuf> {
        &self.changed
    }

    /// Mounts the tree's first volume. It shows the base; roll it back to a snapshot before anything uses it.
    ///
    /// # Errors
    /// As [`Volume::create`].
    pub fn mount(self) -> Result<Volume> {
        let tree = match &self.tree {
            Some(tree) => Arc::clone(tree),
            None => self.make_tree(None)?,
        };
        Volume::first(View::new(tree), self.options.ids, self.options.threads)
    }
}

/// Copies all blocks of a layer into the block file, checked.
fn copy_blocks(store: &Arc<DataStore>, from: &BlockReader, epoch: u64) -> Result<Vec<Block>> {
    let failed = |source| Error::Blocks {
        what: "from a layer into the block file",
        source,
    };
    let count = usize::try_from(from.len()).unwrap_or(usize::MAX);
    let slots = store.allocate(count, epoch).map_err(failed)?;
    let mut buffer = vec![0; COPY as usize * BLOCK_LEN];
    let mut first = 0;
    for some in slots.chunks(COPY as usize) {
        let bytes = &mut buffer[..some.len() * BLOCK_LEN];
        from.read(first, bytes)?;
        first += some.len() as u64;
        let mut rest = &*bytes;
        // Most places follow each other.
        for run in some.chunk_by(|a, b| a.position() + BLOCK == b.position()) {
            let (run_bytes, more) = rest.split_at(run.len() * BLOCK_LEN);
            rest = more;
            store.write(run_bytes, run[0].position()).map_err(failed)?;
        }
    }
    Ok(slots)
}

/// What the inodes of a layer are made with.
struct State<'a> {
    layer: &'a Layer,
    dir: &'a Path,
    base: &'a Arc<Base>,
    changed: &'a BTreeMap<Ino, PathBuf>,
    blocks: &'a [Block],
}

impl State<'_> {
    fn nodes(&self, mut nodes: OrdMap<Ino, NodeRef>) -> Result<OrdMap<Ino, NodeRef>> {
        for changed in &self.layer.inodes {
            let ino = changed.inode.ino;
            let before = nodes.get(&ino).filter(|_| changed.inode.relative);
            if changed.inode.relative && before.is_none() {
                return Err(self.wrong(ino, "the state before has no such inode"));
            }
            let node = self.node(changed, before.map(|before| &before.body))?;
            nodes.insert(ino, NodeRef(Arc::new(node)));
        }
        for ino in &self.layer.gone {
            nodes.remove(ino);
        }
        Ok(nodes)
    }

    fn node(&self, changed: &Changed, before: Option<&Body>) -> Result<Node> {
        let inode = &changed.inode;
        let meta = inode.meta();
        let body = match (&inode.body, meta.kind()) {
            (Content::File { .. }, REGULAR) => Body::File(self.file(changed, before)?),
            (Content::Dir { .. }, DIRECTORY) => Body::Dir(self.dir(changed, before)?),
            (Content::Symlink(target), SYMLINK) => Body::Symlink(Arc::from(&target[..])),
            (Content::Special, kind) if ![REGULAR, DIRECTORY, SYMLINK].contains(&kind) => {
                Body::Special
            }
            _ => return Err(self.wrong(inode.ino, "its content is not of its type")),
        };
        let names = inode.names.iter().map(|(parent, name)| {
            Ok(Link {
                parent: *parent,
                name: self.name(inode.ino, name)?,
            })
        });
        Ok(Node {
            meta,
            body,
            xattrs: self.xattrs(inode)?,
            names: names.collect::<Result<_>>()?,
        })
    }

    fn file(&self, changed: &Changed, before: Option<&Body>) -> Result<FileBody> {
        let ino = changed.inode.ino;
        let Content::File { size, base } = changed.inode.body else {
            return Err(self.wrong(ino, "it is no file"));
        };
        let base = match base {
            Some(stored) => {
                self.unchanged(stored.ino)?;
                let found = stored.find(self.base);
                Some(found.ok_or_else(|| self.wrong(ino, "its base is unknown"))?)
            }
            None => None,
        };
        let mut blocks = Vec::new();
        for run in &changed.runs {
            let end = run.block.checked_add(run.len);
            let end = end.ok_or_else(|| self.wrong(ino, "it has an impossible block"))?;
            for (nth, block) in (run.block..end).enumerate() {
                let change = match run.place {
                    Place::Data(first) => {
                        let slot = usize::try_from(first)
                            .ok()
                            .and_then(|first| self.blocks.get(first.checked_add(nth)?));
                        let slot = slot.ok_or_else(|| self.wrong(ino, "a block is missing"))?;
                        StoredBlock::Data(Arc::clone(slot))
                    }
                    Place::Hole => StoredBlock::Hole,
                    Place::Gone => StoredBlock::Gone,
                };
                blocks.push((block, change));
            }
        }
        let nothing = FileBody::default();
        let before = match before {
            Some(Body::File(before)) => before,
            _ => &nothing,
        };
        let made = before.with_stored(size, base, blocks);
        made.ok_or_else(|| self.wrong(ino, "it has an impossible size"))
    }

    fn dir(&self, changed: &Changed, before: Option<&Body>) -> Result<DirBody> {
        let ino = changed.inode.ino;
        let Content::Dir { base } = changed.inode.body else {
            return Err(self.wrong(ino, "it is no directory"));
        };
        let base = match base {
            Some(number) => {
                self.unchanged(number)?;
                let found = self.base.inode(number);
                Some(found.ok_or_else(|| self.wrong(ino, "its base is unknown"))?)
            }
            None => None,
        };
        let mut entries = match before {
            Some(Body::Dir(before)) => before.entries.clone(),
            _ => OrdMap::new(),
        };
        for named in &changed.entries {
            let key = self.base.key(&self.name(ino, &named.name)?);
            match named.entry {
                NamedEntry::Inode(ino, dirent_type) => {
                    entries.insert(key, Entry::Inode { ino, dirent_type })
                }
                NamedEntry::Whiteout => entries.insert(key, Entry::Whiteout),
                NamedEntry::Gone => entries.remove(&key),
            };
        }
        Ok(DirBody { base, entries })
    }

    fn xattrs(&self, inode: &Inode) -> Result<Xattrs> {
        match &inode.xattrs {
            Attributes::Base(ino) => {
                self.unchanged(*ino)?;
                let found = self.base.inode(*ino);
                let unknown = || self.wrong(inode.ino, "the base of its attributes is unknown");
                found.map(Xattrs::Base).ok_or_else(unknown)
            }
            Attributes::Own(list) if list.is_empty() => Ok(Xattrs::EMPTY),
            Attributes::Own(list) => {
                Ok(Xattrs::Own(Some(Arc::new(list.iter().cloned().collect()))))
            }
        }
    }

    fn name(&self, ino: Ino, name: &[u8]) -> Result<Name> {
        let wrong = name.is_empty()
            || name.len() > MAX_NAME
            || name.iter().any(|byte| matches!(byte, b'/' | 0))
            || matches!(name, b"." | b"..");
        match wrong {
            true => Err(self.wrong(ino, "an impossible name is in it")),
            false => Ok(Name::from(name)),
        }
    }

    /// Refuses what builds on a file of the base that is another now.
    fn unchanged(&self, ino: Ino) -> Result<()> {
        if ino == ROOT {
            return Ok(());
        }
        match self.changed.get(&ino) {
            None => Ok(()),
            Some(path) => Err(Error::BaseChanged {
                layer: self.dir.to_owned(),
                what: format!("{} is another now", path.display()),
            }),
        }
    }

    fn wrong(&self, ino: Ino, what: &str) -> Error {
        damaged(self.layer, format!("inode {ino}: {what}"))
    }
}

fn damaged(layer: &Layer, what: impl Into<String>) -> Error {
    deltalog::Error::damaged(&layer.path, 0, what).into()
}
