//! Writing an image.

use std::collections::HashMap;
use std::path::Path;

use deltalog::{BlockWriter, LogWriter, Result};

use super::records::{
    self, DESCRIPTORS, MAP, Map, PROCESS, RUNS, Run, SHARED, SUMS, SYSTEM_V, Whose, ZOMBIES,
};
use super::{ImageInfo, MAPS, PAGES, PROCESSES};
use crate::error;
use crate::image::TreeImage;
use crate::store::PageMap;

/// How many small things one record holds at most.
const BATCH: usize = 4096;

impl TreeImage {
    /// Writes the image into a directory that has none yet: the processes whole, of their memory what differs from
    /// `before`. When this returns the files are on disk; their names are so when the directory is.
    ///
    /// # Errors
    /// The disk refuses, or memory that was still being copied is lost.
    pub fn save(&self, dir: &Path, before: Option<&Self>) -> error::Result<ImageInfo> {
        self.save_processes(dir)?;
        let mut saver = Saver {
            log: LogWriter::create(&dir.join(MAPS), records::MAPS)?,
            blocks: BlockWriter::create(&dir.join(PAGES))?,
            written: HashMap::new(),
        };
        for map in self.maps() {
            let (whose, pages) = map?;
            let like = before.and_then(|before| before.like(whose, self));
            let nothing = PageMap::new();
            let from = like.and_then(|like| before?.pages_of(like));
            saver.map(whose, like, from.unwrap_or(&nothing), pages)?;
        }
        Ok(ImageInfo {
            processes: self.len() as u64,
            page_bytes: saver.finish()?,
        })
    }

    fn save_processes(&self, dir: &Path) -> Result<()> {
        let mut log = LogWriter::create(&dir.join(PROCESSES), records::PROCESSES)?;
        for (pid, process) in &self.processes {
            log.append_value(PROCESS, &(pid, process))?;
        }
        log.append_value(ZOMBIES, &self.zombies)?;
        log.append_value(DESCRIPTORS, &*self.descriptors)?;
        log.append_value(SHARED, &*self.shared)?;
        if !self.system_v.is_empty() {
            log.append_value(SYSTEM_V, &self.system_v)?;
        }
        log.finish()?;
        Ok(())
    }

    /// All page maps.
    fn maps(&self) -> impl Iterator<Item = error::Result<(Whose, &PageMap)>> {
        let processes = self.processes.iter();
        let processes = processes.map(|(pid, p)| Ok((Whose::Process(*pid), p.memory.pages.get()?)));
        let shared = self.shared.objects.iter();
        processes.chain(shared.map(|(key, object)| Ok((Whose::Shared(*key), &object.pages))))
    }

    /// The pages of one process or object; none if they were lost.
    pub(super) fn pages_of(&self, whose: Whose) -> Option<&PageMap> {
        match whose {
            Whose::Process(pid) => self.processes.get(&pid)?.memory.pages.get().ok(),
            Whose::Shared(key) => Some(&self.shared.objects.get(&key)?.pages),
        }
    }

    /// Which map of this image one of a later image is likely to be like: its own, or that of the parent that it was
    /// forked from.
    fn like(&self, whose: Whose, later: &Self) -> Option<Whose> {
        let parent = match whose {
            Whose::Process(pid) => Some(Whose::Process(later.processes.get(&pid)?.stat.parent)),
            Whose::Shared(_) => None,
        };
        [Some(whose), parent]
            .into_iter()
            .flatten()
            .find(|whose| self.pages_of(*whose).is_some())
    }
}

struct Saver {
    log: LogWriter,
    blocks: BlockWriter,
    /// Numbers in the block file, by where the page is kept: forked processes share pages.
    written: HashMap<usize, u64>,
}

impl Saver {
    fn map(&mut self, of: Whose, like: Option<Whose>, from: &PageMap, to: &PageMap) -> Result<()> {
        self.log.append_compact(MAP, &Map { of, like })?;
        let mut differs = Vec::new();
        from.diff(to, 0..u64::MAX, |run| differs.push(run));
        let mut runs: Vec<Run> = Vec::new();
        for page in differs.into_iter().flatten() {
            let block = match to.get(page) {
                Some(bytes) => Some(self.page(bytes)?),
                None => None,
            };
            match runs.last_mut().filter(|run| run.goes_on_with(page, block)) {
                Some(run) => run.len += 1,
                None => runs.push(Run {
                    page,
                    len: 1,
                    block,
                }),
            }
        }
        for batch in runs.chunks(BATCH) {
            self.log.append_compact(RUNS, &batch)?;
        }
        Ok(())
    }

    fn page(&mut self, bytes: &[u8; 4096]) -> Result<u64> {
        // The image holds the page, so that its place stays its own.
        let place = bytes.as_ptr().addr();
        if let Some(block) = self.written.get(&place) {
            return Ok(*block);
        }
        let block = self.blocks.push(bytes)?;
        self.written.insert(place, block);
        Ok(block)
    }

    /// Returns the bytes of pages that were written.
    fn finish(mut self) -> Result<u64> {
        let bytes = self.blocks.len() * 4096;
        let sums = self.blocks.finish()?;
        for batch in sums.chunks(BATCH) {
            let bytes: Vec<u8> = batch.iter().flat_map(|sum| sum.to_le_bytes()).collect();
            self.log.append(SUMS, &bytes)?;
        }
        self.log.finish()?;
        Ok(bytes)
    }
}
