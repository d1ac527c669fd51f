//! Reading an image.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use deltalog::{BlockReader, Error, LogReader, Result};

use super::records::{
    self, DESCRIPTORS, MAP, Map, PROCESS, RUNS, Run, SHARED, SUMS, SYSTEM_V, Whose, ZOMBIES,
};
use super::{ImageInfo, MAPS, PAGES, PROCESSES};
use crate::ids::InnerPid;
use crate::image::{ProcessImage, TreeImage};
use crate::mem::{PAGE, SharedMemory};
use crate::store::{PageMap, PageStore};

/// Pages that are read at a time.
const COPY: usize = 1024;
/// No address of a program is at or above this page.
const LAST_PAGE: u64 = 1 << 52;

impl TreeImage {
    /// Reads the image in a directory; its pages go to `store`. `before` is the one that it was written against.
    ///
    /// # Errors
    /// It is damaged; the error names the file.
    pub fn load(dir: &Path, before: Option<&Self>, store: &PageStore) -> Result<Self> {
        let mut image = read_processes(dir)?;
        let maps = Maps::read(dir)?;
        let pages = copy_pages(&maps.blocks(dir)?, store, &dir.join(PAGES))?;
        let mut held: BTreeMap<Whose, PageMap> = BTreeMap::new();
        for (map, runs) in &maps.maps {
            let from = match map.like {
                Some(like) => before.and_then(|before| before.pages_of(like)),
                None => Some(&PageMap::new()),
            };
            let mut made = from
                .cloned()
                .ok_or_else(|| maps.damaged("the image before has no such pages"))?;
            for run in runs {
                maps.apply(*run, &mut made, &pages)?;
            }
            held.insert(map.of, made);
        }
        image.give_pages(held, before);
        Ok(image)
    }

    fn give_pages(&mut self, mut held: BTreeMap<Whose, PageMap>, before: Option<&Self>) {
        for (pid, process) in &mut self.processes {
            let pages = held.remove(&Whose::Process(*pid)).unwrap_or_default();
            if let Some(process) = Arc::get_mut(process) {
                Arc::make_mut(&mut process.memory).pages = pages.into();
            }
        }
        let objects = std::mem::take(&mut Arc::make_mut(&mut self.shared).objects);
        let objects = objects.into_iter().map(|(key, object)| {
            let pages = held.remove(&Whose::Shared(key)).unwrap_or_default();
            let other = before.and_then(|before| before.shared.objects.get(&key));
            let object = Arc::unwrap_or_clone(object).with_pages(pages, other.map(|o| &**o));
            (key, Arc::new(object))
        });
        let objects = objects.collect();
        self.shared = Arc::new(SharedMemory { objects });
    }
}

/// Reads an image and checks every byte of it.
///
/// # Errors
/// It is damaged; the error names the file.
pub fn verify(dir: &Path) -> Result<ImageInfo> {
    let image = read_processes(dir)?;
    let blocks = Maps::read(dir)?.blocks(dir)?;
    blocks.verify()?;
    Ok(ImageInfo {
        processes: image.len() as u64,
        page_bytes: blocks.len() * PAGE,
    })
}

fn read_processes(dir: &Path) -> Result<TreeImage> {
    let path = dir.join(PROCESSES);
    let mut log = LogReader::open(&path, records::PROCESSES)?;
    let mut image = TreeImage::empty();
    while let Some(record) = log.next_record()? {
        match record.tag {
            PROCESS => {
                let (pid, process): (InnerPid, ProcessImage) = record.value()?;
                image.processes.insert(pid, Arc::new(process));
            }
            ZOMBIES => image.zombies = record.value()?,
            DESCRIPTORS => image.descriptors = Arc::new(record.value()?),
            SYSTEM_V => image.system_v = record.value()?,
            SHARED => image.shared = Arc::new(record.value()?),
            tag => return Err(record.damaged(format!("it has the unknown tag {tag}"))),
        }
    }
    match image.contradiction() {
        None => Ok(image),
        Some(what) => Err(Error::damaged(&path, 0, what)),
    }
}

impl TreeImage {
    /// What cannot be in it, if something cannot be.
    fn contradiction(&self) -> Option<String> {
        if let Err(e) = self.descriptors.validate() {
            return Some(e.to_string());
        }
        self.processes
            .iter()
            .find_map(|(pid, process)| {
                let wrong = process.contradiction(*pid)?;
                Some(format!("process {pid}: {wrong}"))
            })
            .or_else(|| {
                self.lost()
                    .map(|pid| format!("process {pid} has no way to init"))
            })
    }

    /// A process whose ancestors do not lead to init.
    fn lost(&self) -> Option<InnerPid> {
        let mut sound = BTreeSet::from([InnerPid(1)]);
        let mut before = 0;
        while sound.len() > before {
            before = sound.len();
            for (pid, process) in &self.processes {
                if sound.contains(&process.stat.parent) {
                    sound.insert(*pid);
                }
            }
        }
        self.processes
            .keys()
            .find(|pid| !sound.contains(pid))
            .copied()
    }
}

impl ProcessImage {
    fn contradiction(&self, pid: InnerPid) -> Option<&'static str> {
        if pid.0 <= 1 || self.threads.first().is_none_or(|first| first.tid != pid) {
            return Some("its first thread has another number");
        }
        let mut end = 0;
        for vma in &self.memory.vmas {
            let aligned = vma.start.is_multiple_of(PAGE) && vma.end.is_multiple_of(PAGE);
            if !aligned || vma.start < end || vma.end <= vma.start {
                return Some("its mappings overlap");
            }
            end = vma.end;
        }
        None
    }
}

/// `pages.meta` in memory.
struct Maps {
    path: std::path::PathBuf,
    maps: Vec<(Map, Vec<Run>)>,
    sums: Vec<u64>,
}

impl Maps {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MAPS);
        let mut log = LogReader::open(&path, records::MAPS)?;
        let mut read = Self {
            path,
            maps: Vec::new(),
            sums: Vec::new(),
        };
        while let Some(record) = log.next_record()? {
            match record.tag {
                MAP => read.maps.push((record.value()?, Vec::new())),
                RUNS => match read.maps.last_mut() {
                    Some((_, runs)) => runs.append(&mut record.value()?),
                    None => return Err(record.damaged("no page map came before it")),
                },
                SUMS => {
                    let (sums, rest) = record.payload.as_chunks();
                    if !rest.is_empty() {
                        return Err(record.damaged("half a checksum is in it"));
                    }
                    read.sums
                        .extend(sums.iter().map(|sum| u64::from_le_bytes(*sum)));
                }
                tag => return Err(record.damaged(format!("it has the unknown tag {tag}"))),
            }
        }
        Ok(read)
    }

    fn blocks(&self, dir: &Path) -> Result<BlockReader> {
        BlockReader::open(&dir.join(PAGES), self.sums.clone())
    }

    fn damaged(&self, what: &str) -> Error {
        Error::damaged(&self.path, 0, what)
    }

    /// Makes one change to a map. `pages` holds the pages of the file by their number in it.
    fn apply(&self, run: Run, map: &mut PageMap, pages: &PageMap) -> Result<()> {
        let end = run
            .page
            .checked_add(run.len)
            .filter(|end| *end <= LAST_PAGE);
        let end = end.ok_or_else(|| self.damaged("a page has an impossible number"))?;
        let Some(first) = run.block else {
            map.remove(run.page..end);
            return Ok(());
        };
        let fits = first.checked_add(run.len);
        if fits.is_none_or(|last| last > self.sums.len() as u64) {
            return Err(self.damaged("a page is missing"));
        }
        for (page, block) in (run.page..end).zip(first..) {
            map.share(page, pages, block);
        }
        Ok(())
    }
}

/// Reads all pages of a file into the store; the map has them by their number in the file.
fn copy_pages(from: &BlockReader, store: &PageStore, path: &Path) -> Result<PageMap> {
    let mut pages = PageMap::new();
    let mut buffer = vec![0; COPY * PAGE as usize];
    let mut first = 0;
    while first < from.len() {
        let count = (from.len() - first).min(COPY as u64);
        let bytes = &mut buffer[..(count * PAGE) as usize];
        from.read(first, bytes)?;
        let fresh = store.allocate(count as usize);
        let mut fresh = fresh.map_err(|source| Error::Io {
            doing: "finding memory for",
            path: path.to_owned(),
            source,
        })?;
        let (blocks, _) = bytes.as_chunks::<{ PAGE as usize }>();
        for (index, (number, block)) in (first..).zip(blocks).enumerate() {
            *fresh.page_mut(index) = *block;
            pages.put(number, &mut fresh, index);
        }
        first += count;
    }
    Ok(pages)
}
