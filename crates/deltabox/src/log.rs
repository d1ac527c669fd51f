//! The output of a session: the newest bytes, on disk, in as many branches as there are checkpoints.
//!
//! Little output is kept in memory, and so needs no file; most commands write little. The file is a ring: byte `n` ever written lies at `n % CAPACITY`. What the present state of the session shows of it
//! is a list of runs. A checkpoint keeps the list (a persistent vector: O(1)), a rollback takes it back; what another
//! branch wrote in between stays where it is until the ring comes round to it. So a log shows, after going back *and
//! forth* in the tree, exactly the output of the branch it is on.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use imbl::Vector;

use crate::report::Stream;

/// Bytes of output that are kept.
pub(crate) const CAPACITY: u64 = 64 << 20;

/// The most runs in a list: bounds the memory of a command that writes to both its streams by turns, byte by byte.
const MAX_RUNS: usize = 1 << 20;

/// Output of one stream that lies in one piece, in the session's order and in the file's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// The session's output byte that it begins with.
    offset: u64,
    /// The file's byte (of all ever written) that it begins with.
    place: u64,
    len: u64,
    stream: Stream,
}

/// What a log shows: kept by a checkpoint.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    runs: Vector<Run>,
    end: u64,
    /// No run has a place below this.
    lowest: u64,
}

/// What a reader gets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Output, and the offset after it.
    Output(Stream, Vec<u8>, u64),
    /// This many bytes are gone; and the offset of the first that is there.
    Missed(u64, u64),
}

/// Bytes that are kept in memory.
const SMALL: usize = 8 << 10;

/// Where the bytes are.
enum Store {
    Memory(Vec<u8>),
    File(File),
}

impl Store {
    /// The same bytes once more.
    fn share(&self) -> io::Result<Self> {
        match self {
            Self::Memory(bytes) => Ok(Self::Memory(bytes.clone())),
            Self::File(file) => Ok(Self::File(file.try_clone()?)),
        }
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Self::Memory(kept) => {
                let from = kept.get(at as usize..).and_then(|k| k.get(..bytes.len()));
                bytes.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
            Self::File(file) => file.read_exact_at(bytes, at),
        }
    }
}

/// A log and its file. The file, and its directory, is made when it is needed; the file is removed with the log.
pub(crate) struct Log {
    path: PathBuf,
    store: Store,
    /// Bytes ever written to the file.
    written: u64,
    view: View,
    capacity: u64,
    /// Up to so many bytes there is no file.
    small: usize,
}

impl Log {
    /// An empty log that will be in a file of this path.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self::with_capacity(path, CAPACITY, SMALL)
    }

    fn with_capacity(path: PathBuf, capacity: u64, small: usize) -> Self {
        Self {
            path,
            store: Store::Memory(Vec::new()),
            written: 0,
            view: View::default(),
            capacity,
            small,
        }
    }

    /// What it shows now.
    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    /// Bytes of output so far.
    pub(crate) fn end(&self) -> u64 {
        self.view.end
    }

    /// Shows what it showed then.
    pub(crate) fn restore(&mut self, view: &View) {
        self.view = view.clone();
        self.forget();
    }

    /// Adds output. What cannot be written (a full disk) counts as missed, with all before it.
    pub(crate) fn append(&mut self, stream: Stream, bytes: &[u8]) {
        let begin = self.view.end;
        if let Err(e) = self.write(stream, bytes) {
            tracing::warn!("writing {}: {e}", self.path.display());
            self.view.runs = Vector::new();
            self.view.end = begin + bytes.len() as u64;
        }
    }

    fn write(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let at = self.written % self.capacity;
            let n = rest.len().min((self.capacity - at) as usize);
            let (now, later) = rest.split_at(n);
            self.put(now, at)?;
            self.note(stream, n as u64);
            rest = later;
        }
        self.forget();
        Ok(())
    }

    fn put(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        if let Store::Memory(kept) = &mut self.store {
            if self.written as usize + bytes.len() <= self.small {
                kept.extend_from_slice(bytes);
                return Ok(());
            }
            let file = make(&self.path)?;
            file.write_all_at(kept, 0)?;
            self.store = Store::File(file);
        }
        match &self.store {
            Store::File(file) => file.write_all_at(bytes, at),
            Store::Memory(_) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn note(&mut self, stream: Stream, len: u64) {
        let run = Run {
            offset: self.view.end,
            place: self.written,
            len,
            stream,
        };
        self.written += len;
        self.view.end += len;
        match self.view.runs.back_mut() {
            Some(last) if last.stream == stream && last.place + last.len == run.place => {
                last.len += len;
            }
            _ => {
                if self.view.runs.is_empty() {
                    self.view.lowest = run.place;
                }
                self.view.runs.push_back(run);
            }
        }
    }

    /// Drops what the ring has overwritten, and runs past the limit.
    fn forget(&mut self) {
        while self.view.runs.len() > MAX_RUNS {
            self.view.runs.pop_front();
        }
        let oldest = self.written.saturating_sub(self.capacity);
        if oldest <= self.view.lowest {
            return;
        }
        // A little more than must be, so that the walk through the runs is rare.
        let oldest = (oldest + self.capacity / 16).min(self.written);
        // Branches make places go up and down along the list, so that a run in the middle may be the gone one: then
        // all before it is dropped with it, for a log has no holes.
        if let Some(gone) = self.view.runs.iter().rposition(|r| r.place < oldest) {
            let mut kept = self.view.runs.split_off(gone);
            if let Some(first) = kept.front_mut() {
                let cut = (oldest - first.place).min(first.len);
                first.offset += cut;
                first.place += cut;
                first.len -= cut;
            }
            if kept.front().is_some_and(|r| r.len == 0) {
                kept.pop_front();
            }
            self.view.runs = kept;
        }
        self.view.lowest = oldest;
    }

    /// What follows `offset`, at most `limit` bytes of one stream; `None` at the end.
    pub(crate) fn read(&self, offset: u64, limit: usize) -> io::Result<Option<Piece>> {
        let runs = &self.view.runs;
        let first = runs.front().map_or(self.view.end, |r| r.offset);
        if offset < first {
            return Ok(Some(Piece::Missed(first - offset, first)));
        }
        if offset >= self.view.end {
            return Ok(None);
        }
        let index = match runs.binary_search_by(|r| r.offset.cmp(&offset)) {
            Ok(i) => i,
            Err(i) => i.saturating_sub(1),
        };
        let Some(run) = runs.get(index) else {
            return Ok(None);
        };
        let skip = offset - run.offset;
        let place = run.place + skip;
        let at = place % self.capacity;
        let n = (run.len - skip).min(limit as u64).min(self.capacity - at);
        let mut bytes = vec![0; n as usize];
        self.store.read_exact_at(&mut bytes, at)?;
        Ok(Some(Piece::Output(run.stream, bytes, offset + n)))
    }

    /// Shows nothing, and goes on at this offset: what was before is gone.
    pub(crate) fn skip_to(&mut self, offset: u64) {
        self.view = View {
            end: offset,
            ..View::default()
        };
    }

    /// Where to begin to read what `view` shows of it: behind what `before` shows, if `view` goes on where that ends.
    pub(crate) fn since(&self, view: &View, before: Option<&View>) -> Since {
        let before = before.filter(|before| before.end > 0 && view.goes_on(before));
        Since {
            continues: before.is_some(),
            offset: before.map_or(0, |before| before.end),
            view: view.clone(),
        }
    }

    /// The next piece. Between two calls the ring may overwrite what was still to come: that is missed then.
    pub(crate) fn read_on(&self, since: &mut Since) -> io::Result<Option<Piece>> {
        let piece = self.borrow(&since.view)?.read(since.offset, 1 << 20)?;
        if let Some(Piece::Output(_, _, next) | Piece::Missed(_, next)) = &piece {
            since.offset = *next;
        }
        Ok(piece)
    }

    /// A log of its own that shows what `view` shows of this one, in a file of path `to`.
    pub(crate) fn copy(&self, view: &View, to: &Path) -> io::Result<Self> {
        Self::copy_from(&*self.borrow(view)?, to)
    }

    /// The log as `view` shows it.
    fn borrow(&self, view: &View) -> io::Result<Borrowed> {
        let mut source = Self::with_capacity(self.path.clone(), self.capacity, self.small);
        source.store = self.store.share()?;
        source.written = self.written;
        source.restore(view);
        Ok(Borrowed(source))
    }

    fn copy_from(source: &Self, to: &Path) -> io::Result<Self> {
        let mut copy = Self::with_capacity(to.to_owned(), source.capacity, source.small);
        let mut offset = 0;
        while let Some(piece) = source.read(offset, 1 << 20)? {
            match piece {
                Piece::Missed(_, next) => {
                    copy.view.end = next;
                    offset = next;
                }
                Piece::Output(stream, bytes, next) => {
                    copy.append(stream, &bytes);
                    offset = next;
                }
            }
        }
        Ok(copy)
    }
}

/// Makes a log's file, and the directory that it is in.
fn make(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    match (options.open(path), path.parent()) {
        (Err(e), Some(dir)) if e.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(dir)?;
            options.open(path)
        }
        (opened, _) => opened,
    }
}

/// A log that does not own its file.
struct Borrowed(Log);

impl std::ops::Deref for Borrowed {
    type Target = Log;

    fn deref(&self) -> &Log {
        &self.0
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.0.store = Store::Memory(Vec::new());
    }
}

/// How far a view of a log was read.
pub(crate) struct Since {
    /// Whether it began where the earlier view ends.
    pub(crate) continues: bool,
    offset: u64,
    view: View,
}

impl View {
    /// Whether this view shows what `before` showed, and perhaps more behind it, as far as both still have it.
    fn goes_on(&self, before: &Self) -> bool {
        let first = |view: &Self| view.runs.front().map_or(view.end, |run| run.offset);
        let mut at = first(self).max(first(before));
        if self.end < before.end || at > before.end {
            return false;
        }
        let begin = at;
        let later = |run: &&Run| run.offset + run.len > begin;
        let mut mine = self.runs.iter().skip_while(|run| !later(run));
        let mut theirs = before.runs.iter().skip_while(|run| !later(run));
        let (mut a, mut b) = (mine.next(), theirs.next());
        while at < before.end {
            let (Some(x), Some(y)) = (a, b) else {
                return false;
            };
            if x.stream != y.stream || x.place + (at - x.offset) != y.place + (at - y.offset) {
                return false;
            }
            at = (x.offset + x.len).min(y.offset + y.len);
            if x.offset + x.len == at {
                a = mine.next();
            }
            if y.offset + y.len == at {
                b = theirs.next();
            }
        }
        true
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if matches!(self.store, Store::File(_)) {
            // The sandbox's directory may have been removed already.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn log(capacity: u64, small: usize) -> (tempfile::TempDir, Log) {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::with_capacity(dir.path().join("log"), capacity, small);
        (dir, log)
    }

    /// All that can be read from the beginning: bytes that are gone, then what is there.
    fn all(log: &Log) -> (u64, Vec<(Stream, u8)>) {
        let (mut offset, mut missed, mut bytes) = (0, 0, Vec::new());
        while let Some(piece) = log.read(offset, 3).unwrap() {
            match piece {
                Piece::Missed(n, next) => {
                    assert_eq!((offset, missed), (0, 0), "only the beginning is missing");
                    (missed, offset) = (n, next);
                }
                Piece::Output(stream, b, next) => {
                    assert!(!b.is_empty() && b.len() <= 3);
                    bytes.extend(b.into_iter().map(|b| (stream, b)));
                    offset = next;
                }
            }
        }
        assert_eq!(offset, log.end());
        (missed, bytes)
    }

    #[test]
    fn a_branch_left_and_taken_up_again_shows_its_own_output() {
        let (_dir, mut log) = log(100, 0);
        log.append(Stream::Stdout, b"common ");
        let fork = log.view().clone();
        log.append(Stream::Stdout, b"first");
        let first = log.view().clone();
        log.restore(&fork);
        log.append(Stream::Stderr, b"second branch");
        log.restore(&first);
        let (missed, bytes) = all(&log);
        assert_eq!(missed, 0);
        let bytes: Vec<u8> = bytes.into_iter().map(|(_, b)| b).collect();
        assert_eq!(bytes, b"common first");
    }

    #[test]
    fn the_file_goes_with_the_log() {
        let (dir, mut log) = log(100, 0);
        log.append(Stream::Stdout, b"x");
        let copy = log
            .copy(&log.view().clone(), &dir.path().join("copy"))
            .unwrap();
        assert_eq!(all(&copy), all(&log));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        drop((log, copy));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn little_output_has_no_file_and_much_has_one_with_all_of_it() {
        let (dir, mut log) = log(100, 10);
        let files = || std::fs::read_dir(dir.path()).unwrap().count();
        log.append(Stream::Stdout, b"0123456789");
        let early = log.view().clone();
        assert_eq!((files(), all(&log).1.len()), (0, 10));
        log.append(Stream::Stderr, b"x");
        assert_eq!((files(), all(&log).1.len()), (1, 11));
        let copy = log.copy(&early, &dir.path().join("some/where")).unwrap();
        assert_eq!((files(), all(&copy).1.len()), (1, 10));
    }

    proptest! {
        #[test]
        fn a_log_is_always_an_end_of_what_its_branch_wrote(
            steps in prop::collection::vec((0_u8..4, 0_u8..40, 0_usize..8), 1..60), small in 0..65_usize,
        ) {
            let (_dir, mut log) = log(64, small);
            let mut truth = Vec::new();
            let mut marks = vec![(View::default(), truth.clone())];
            let mut byte = 0_u8;
            for (what, len, mark) in steps {
                match what {
                    0 => marks.push((log.view().clone(), truth.clone())),
                    1 => {
                        let (view, t) = &marks[mark % marks.len()];
                        log.restore(view);
                        truth = t.clone();
                    }
                    _ => {
                        let stream = if what == 2 { Stream::Stdout } else { Stream::Stderr };
                        let bytes: Vec<u8> = (0..len).map(|_| { byte = byte.wrapping_add(1); byte }).collect();
                        log.append(stream, &bytes);
                        truth.extend(bytes.into_iter().map(|b| (stream, b)));
                    }
                }
                let (missed, bytes) = all(&log);
                prop_assert_eq!(missed as usize + bytes.len(), truth.len());
                prop_assert_eq!(&truth[missed as usize..], &bytes[..]);
            }
        }
    }
}
