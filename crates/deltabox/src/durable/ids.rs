//! Checkpoint ids that are never given twice, whatever becomes of the service.

use std::fs;
use std::path::{Path, PathBuf};

use deltalog::{Format, LogReader, LogWriter, sync_directory};
use parking_lot::Mutex;

use crate::error::{Doing, Error, Result};
use crate::report::CheckpointId;

const FORMAT: Format = Format {
    kind: *b"IDS ",
    version: 1,
};

/// The one record: no id from here on was given to anyone (8 bytes).
const FREE: u32 = 1;

/// Ids that are set aside at a time; a service that is killed loses as many at most.
const AHEAD: u64 = 1024;

/// Where ids come from.
pub(crate) struct Ids {
    path: PathBuf,
    state: Mutex<State>,
}

struct State {
    next: u64,
    /// No id from here on may be given before the file says so.
    reserved: u64,
}

impl Ids {
    /// Ids of a state directory whose highest durable checkpoint is `highest`. Returns a sentence if the file was damaged, or
    /// cannot be written.
    pub(crate) fn open(state_dir: &Path, highest: u64) -> (Self, Option<String>) {
        let path = state_dir.join("ids");
        let (next, sentence) = match read(&path) {
            Ok(next) => (next, None),
            Err(e) => {
                // Nobody knows how far it went; nobody has gone this far.
                let next = highest + 1_000_000;
                let sentence = format!("Checkpoint ids go on with c{next}, for {e}.");
                (next, Some(sentence))
            }
        };
        let next = next.max(highest + 1);
        let ids = Self {
            path,
            state: Mutex::new(State {
                next,
                reserved: next,
            }),
        };
        // So that the first checkpoint need not; it can, should the disk be full now.
        let reserved = ids.reserve(&mut ids.state.lock());
        let full = reserved.err().map(|e| {
            format!("No checkpoint can be made until the disk takes a note of its id: {e}.")
        });
        (ids, sentence.or(full))
    }

    /// An id that was never given.
    ///
    /// # Errors
    /// The disk has been refusing for a long time to keep a note of them.
    pub(crate) fn next(&self) -> Result<CheckpointId> {
        let mut state = self.state.lock();
        if state.reserved - state.next <= AHEAD / 2
            && let Err(e) = self.reserve(&mut state)
        {
            if state.next == state.reserved {
                return Err(e);
            }
            tracing::warn!("setting checkpoint ids aside: {e}");
        }
        state.next += 1;
        Ok(CheckpointId(state.next - 1))
    }

    /// Gives back what was set aside and not given. To be called while the state directory is still ours.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        match self.write(state.next) {
            Ok(()) => state.reserved = state.next,
            Err(e) => tracing::warn!("keeping the next checkpoint id: {e}"),
        }
    }

    fn reserve(&self, state: &mut State) -> Result<()> {
        let reserved = state.next + AHEAD;
        self.write(reserved)?;
        state.reserved = reserved;
        Ok(())
    }

    fn write(&self, free: u64) -> Result<()> {
        let new = self.path.with_extension("new");
        match fs::remove_file(&new) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).doing(format!("removing {}", new.display()))?;
            }
            _ => {}
        }
        let mut log = LogWriter::create(&new, FORMAT)?;
        log.append(FREE, &free.to_le_bytes())?;
        log.finish()?;
        fs::rename(&new, &self.path).doing(format!("renaming {}", new.display()))?;
        Ok(self.path.parent().map_or(Ok(()), sync_directory)?)
    }
}

fn read(path: &Path) -> Result<u64> {
    if !path.exists() {
        return Ok(1);
    }
    let mut log = LogReader::open(path, FORMAT)?;
    let record = log.next_record()?.filter(|record| record.tag == FREE);
    let free = record.and_then(|record| Some(u64::from_le_bytes(record.payload.try_into().ok()?)));
    let free = free.ok_or_else(|| Error::from(log.damaged("its record is missing")))?;
    log.next_record()?;
    Ok(free)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_id_comes_twice_whether_the_service_ended_or_was_killed() {
        let dir = tempfile::tempdir().unwrap();
        let mut given = std::collections::BTreeSet::new();
        for killed in [false, true, true, false, true] {
            let (ids, sentence) = Ids::open(dir.path(), 0);
            assert_eq!(sentence, None);
            for _ in 0..2000 {
                assert!(given.insert(ids.next().unwrap()));
            }
            if !killed {
                ids.close();
            }
        }
        assert_eq!(given.first(), Some(&CheckpointId(1)));
    }

    #[test]
    fn a_damaged_file_is_told_of_and_leaves_what_was_given_alone() {
        let dir = tempfile::tempdir().unwrap();
        Ids::open(dir.path(), 0).0.close();
        let path = dir.path().join("ids");
        let mut bytes = fs::read(&path).unwrap();
        bytes[45] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let (ids, sentence) = Ids::open(dir.path(), 77);
        assert!(sentence.unwrap().contains("ids"));
        assert!(ids.next().unwrap() > CheckpointId(10_000));
    }
}
