//! Writing a layer.

use std::collections::HashMap;
use std::path::Path;

use deltalog::{BlockWriter, LogWriter};
use imbl::OrdMap;
use imbl::ordmap::DiffItem;

use super::records::{
    Attributes, BASE, BLOCKS, Content, ENTRIES, FORMAT, GONE, INODE, Inode, NUMBERING, Named,
    NamedEntry, Numbering, ORPHANS, Place, Run, SUMS,
};
use super::{DATA, LayerInfo, META};
use crate::base::Free;
use crate::data::{BLOCK, BLOCK_LEN, Block, DataStore};
use crate::error::{Error, Result};
use crate::file::{FileBody, StoredBlock};
use crate::node::{Body, DirBody, Entry, Ino, Node, NodeRef};
use crate::volume::Snapshot;
use crate::xattr::Xattrs;

/// How many small things one record holds at most.
const BATCH: usize = 4096;

impl Snapshot {
    /// Writes what differs from `before` (from the base, if that is `None`) into a directory that has no layer yet.
    /// When this returns the two files are on disk; their names are so when the directory is.
    ///
    /// # Errors
    /// The disk refuses; or `before`, which must have been saved or loaded itself, was not.
    pub fn save(&self, dir: &Path, before: Option<&Self>) -> Result<LayerInfo> {
        let base = &self.view().tree().base;
        let first = match before {
            Some(before) if before.looked_up() == 0 => return Err(Error::ForeignSnapshot),
            Some(before) => before.looked_up(),
            None => Free::FIRST_RANK,
        };
        let (known, free) = base.looked_up_since(first);
        let mut log = LogWriter::create(&dir.join(META), FORMAT)?;
        let numbering = Numbering {
            keys: base.keys(),
            free,
            root: base.root_host().unwrap_or_default(),
        };
        log.append_compact(NUMBERING, &numbering)?;
        for batch in known.chunks(BATCH) {
            log.append_compact(BASE, &batch)?;
        }
        let mut saver = Saver {
            log,
            blocks: BlockWriter::create(&dir.join(DATA))?,
            store: &self.view().tree().data,
            written: HashMap::new(),
            info: LayerInfo {
                base_inodes: known.len() as u64,
                ..LayerInfo::default()
            },
        };
        saver.state(self, before)?;
        let info = saver.finish()?;
        self.set_looked_up(free.rank);
        Ok(info)
    }
}

struct Saver<'a> {
    log: LogWriter,
    blocks: BlockWriter,
    store: &'a DataStore,
    /// Numbers in the block file, by position in the store: files may share blocks.
    written: HashMap<u64, u64>,
    info: LayerInfo,
}

impl Saver<'_> {
    fn state(&mut self, now: &Snapshot, before: Option<&Snapshot>) -> Result<()> {
        let nothing = OrdMap::new();
        let before = before.map_or(&nothing, |before| before.view().nodes());
        let mut gone: Vec<Ino> = Vec::new();
        for item in before.diff(now.view().nodes()) {
            match item {
                DiffItem::Add(ino, node) => self.inode(*ino, node, None)?,
                DiffItem::Update { old, new } => self.inode(*new.0, new.1, Some(old.1))?,
                DiffItem::Remove(ino, _) => gone.push(*ino),
            }
        }
        self.info.gone = gone.len() as u64;
        for batch in gone.chunks(BATCH) {
            self.log.append_compact(GONE, &batch)?;
        }
        let orphans: Vec<Ino> = now.view().orphans().iter().copied().collect();
        for batch in orphans.chunks(BATCH) {
            self.log.append_compact(ORPHANS, &batch)?;
        }
        Ok(())
    }

    fn inode(&mut self, ino: Ino, node: &NodeRef, before: Option<&NodeRef>) -> Result<()> {
        self.info.inodes += 1;
        let names = node.names.iter();
        let names = names
            .map(|link| (link.parent, link.name.to_vec()))
            .collect();
        // Who changed its type is another inode; but nothing here rests on that.
        let before = before.filter(|before| before.meta.kind() == node.meta.kind());
        let (relative, meta) = (before.is_some(), &node.meta);
        let record = Inode::new(ino, relative, meta, names, attributes(node), content(node));
        self.log.append_compact(INODE, &record)?;
        match (&node.body, before.map(|before| &before.body)) {
            (Body::File(file), Some(Body::File(before))) => self.file(file, before),
            (Body::File(file), _) => self.file(file, &FileBody::default()),
            (Body::Dir(dir), Some(Body::Dir(before))) => self.dir(dir, before),
            (Body::Dir(dir), _) => self.dir(dir, &DirBody::default()),
            (Body::Symlink(_) | Body::Special, _) => Ok(()),
        }
    }

    fn file(&mut self, file: &FileBody, before: &FileBody) -> Result<()> {
        let mut runs: Vec<Run> = Vec::new();
        for (block, change) in file.blocks_since(before) {
            let place = match change {
                StoredBlock::Data(slot) => Place::Data(self.block(&slot)?),
                StoredBlock::Hole => Place::Hole,
                StoredBlock::Gone => Place::Gone,
            };
            match runs.last_mut().filter(|run| run.goes_on_with(block, place)) {
                Some(run) => run.len += 1,
                None => runs.push(Run {
                    block,
                    len: 1,
                    place,
                }),
            }
        }
        for batch in runs.chunks(BATCH) {
            self.log.append_compact(BLOCKS, &batch)?;
        }
        Ok(())
    }

    fn block(&mut self, slot: &Block) -> Result<u64> {
        if let Some(number) = self.written.get(&slot.position()) {
            return Ok(*number);
        }
        let mut bytes = [0; BLOCK_LEN];
        let read = self.store.read(&mut bytes, slot.position());
        read.map_err(|source| Error::Blocks {
            what: "from the block file into a layer",
            source,
        })?;
        let number = self.blocks.push(&bytes)?;
        self.written.insert(slot.position(), number);
        Ok(number)
    }

    fn dir(&mut self, dir: &DirBody, before: &DirBody) -> Result<()> {
        let stored = |entry: &Entry| match entry {
            Entry::Inode { ino, dirent_type } => NamedEntry::Inode(*ino, *dirent_type),
            Entry::Whiteout => NamedEntry::Whiteout,
        };
        let changes = before.entries.diff(&dir.entries).map(|item| {
            let (key, entry) = match item {
                DiffItem::Add(key, entry) => (key, stored(entry)),
                DiffItem::Update { new, .. } => (new.0, stored(new.1)),
                DiffItem::Remove(key, _) => (key, NamedEntry::Gone),
            };
            Named {
                name: key.name.to_vec(),
                entry,
            }
        });
        let changes: Vec<Named> = changes.collect();
        for batch in changes.chunks(BATCH) {
            self.log.append_compact(ENTRIES, &batch)?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<LayerInfo> {
        self.info.data_bytes = self.blocks.len() * BLOCK;
        let sums = self.blocks.finish()?;
        for batch in sums.chunks(BATCH) {
            let bytes: Vec<u8> = batch.iter().flat_map(|sum| sum.to_le_bytes()).collect();
            self.log.append(SUMS, &bytes)?;
        }
        self.log.finish()?;
        Ok(self.info)
    }
}

impl Run {
    fn goes_on_with(&self, block: u64, place: Place) -> bool {
        let next = match self.place {
            Place::Data(first) => Place::Data(first + self.len),
            other => other,
        };
        self.block + self.len == block && next == place
    }
}

fn attributes(node: &Node) -> Attributes {
    match &node.xattrs {
        Xattrs::Base(inode) => Attributes::Base(inode.ino()),
        Xattrs::Own(map) => {
            let all = map.iter().flat_map(|map| map.iter());
            Attributes::Own(all.map(|(n, v)| (n.clone(), v.clone())).collect())
        }
    }
}

fn content(node: &Node) -> Content {
    match &node.body {
        Body::File(file) => Content::File {
            size: file.size,
            base: file.stored_base(),
        },
        Body::Dir(dir) => Content::Dir {
            base: dir.base.as_ref().map(|base| base.ino()),
        },
        Body::Symlink(target) => Content::Symlink(target.to_vec()),
        Body::Special => Content::Special,
    }
}
