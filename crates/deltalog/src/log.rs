//! Record logs.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::checksum;
use crate::error::{Doing, Error, Result};

const MAGIC: [u8; 8] = *b"DELTALOG";
/// Magic, kind, version, checksum of these.
const HEADER: usize = 24;
/// Length, tag, checksum.
const FRAME: usize = 16;
/// The tag of the last record.
const END: u32 = u32::MAX;
/// The most bytes of a record.
const MAX_RECORD: u32 = 64 << 20;

/// What kind of log a file is, and how its records are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Four letters that tell the kind.
    pub kind: [u8; 4],
    /// The version of its records. One that is not this is refused.
    pub version: u32,
}

impl Format {
    fn header(self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&self.kind);
        header[12..16].copy_from_slice(&self.version.to_le_bytes());
        let sum = checksum(0, &header[..16]);
        header[16..].copy_from_slice(&sum.to_le_bytes());
        header
    }
}

/// The checksum of a record that begins at byte `at`.
fn record_sum(at: u64, len: u32, tag: u32, payload: &[u8]) -> u64 {
    let mut head = [0; 16];
    head[..4].copy_from_slice(&len.to_le_bytes());
    head[4..8].copy_from_slice(&tag.to_le_bytes());
    head[8..].copy_from_slice(&checksum(at, payload).to_le_bytes());
    checksum(at, &head)
}

/// Writes a log, from its first record to its last.
#[derive(Debug)]
pub struct LogWriter {
    path: PathBuf,
    file: BufWriter<File>,
    at: u64,
    records: u64,
}

impl LogWriter {
    /// Makes the file, which must not exist.
    ///
    /// # Errors
    /// It exists, or the disk refuses.
    pub fn create(path: &Path, format: Format) -> Result<Self> {
        let file = File::create_new(path).doing("making", path)?;
        let mut file = BufWriter::with_capacity(1 << 18, file);
        file.write_all(&format.header()).doing("writing", path)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            at: HEADER as u64,
            records: 0,
        })
    }

    /// Adds a record. Tags are for the reader to tell kinds of records apart; the highest one is reserved.
    ///
    /// # Errors
    /// It is longer than 64 MiB, or the disk refuses.
    pub fn append(&mut self, tag: u32, payload: &[u8]) -> Result<()> {
        let len = u32::try_from(payload.len())
            .ok()
            .filter(|len| *len <= MAX_RECORD && (tag != END || payload.len() == 8));
        let len = len.ok_or_else(|| Error::Encode {
            path: self.path.clone(),
            why: format!("it has {} bytes and the tag {tag}", payload.len()),
        })?;
        let sum = record_sum(self.at, len, tag, payload);
        for part in [
            &len.to_le_bytes()[..],
            &tag.to_le_bytes(),
            &sum.to_le_bytes(),
            payload,
        ] {
            self.file.write_all(part).doing("writing", &self.path)?;
        }
        self.at += (FRAME + payload.len()) as u64;
        self.records += 1;
        Ok(())
    }

    /// Adds a value: a MessagePack map by field names, so that a reader whose fields differ notices.
    ///
    /// # Errors
    /// As [`LogWriter::append`], or the value cannot be encoded.
    pub fn append_value<T: Serialize>(&mut self, tag: u32, value: &T) -> Result<()> {
        let payload = rmp_serde::to_vec_named(value).map_err(|e| self.unencodable(&e))?;
        self.append(tag, &payload)
    }

    /// Adds a value without the names of its fields.
    ///
    /// # Errors
    /// As [`LogWriter::append_value`].
    pub fn append_compact<T: Serialize>(&mut self, tag: u32, value: &T) -> Result<()> {
        let payload = rmp_serde::to_vec(value).map_err(|e| self.unencodable(&e))?;
        self.append(tag, &payload)
    }

    fn unencodable(&self, why: &rmp_serde::encode::Error) -> Error {
        Error::Encode {
            path: self.path.clone(),
            why: why.to_string(),
        }
    }

    /// Adds the last record, and has all of it on disk. A log without it is a torn one.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn finish(mut self) -> Result<u64> {
        let records = self.records;
        self.append(END, &records.to_le_bytes())?;
        self.file.flush().doing("writing", &self.path)?;
        let file = self.file.get_ref();
        file.sync_all().doing("writing out", &self.path)?;
        Ok(self.at)
    }
}

/// Reads a log from its first record on.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    file: BufReader<File>,
    at: u64,
    records: u64,
}

/// One record of a log.
#[derive(Debug)]
pub struct Record {
    /// What kind of record it is.
    pub tag: u32,
    /// What it holds.
    pub payload: Vec<u8>,
    path: PathBuf,
    at: u64,
}

impl LogReader {
    /// Opens a log of this format.
    ///
    /// # Errors
    /// It is missing, damaged, or of another format.
    pub fn open(path: &Path, format: Format) -> Result<Self> {
        let file = File::open(path).doing("opening", path)?;
        let mut reader = Self {
            path: path.to_owned(),
            file: BufReader::with_capacity(1 << 18, file),
            at: 0,
            records: 0,
        };
        let mut header = [0; HEADER];
        reader.fill(&mut header, "its header is cut off")?;
        let sum = checksum(0, &header[..16]);
        if header[16..] != sum.to_le_bytes() || header[..8] != MAGIC {
            return Err(reader.damaged("its header is wrong"));
        }
        if header[8..12] != format.kind {
            let found = String::from_utf8_lossy(&header[8..12]).into_owned();
            return Err(reader.damaged(format!("it is a log of another kind ({found:?})")));
        }
        let found = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
        if found != format.version {
            return Err(Error::Version {
                path: path.to_owned(),
                found,
                supported: format.version,
            });
        }
        reader.at = HEADER as u64;
        Ok(reader)
    }

    /// The next record; `None` after the last one, behind which nothing may be.
    ///
    /// # Errors
    /// The log is damaged or torn off.
    pub fn next_record(&mut self) -> Result<Option<Record>> {
        let mut frame = [0; FRAME];
        self.fill(&mut frame, "it is torn off: the last record is missing")?;
        let word = |at: usize| {
            u32::from_le_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]])
        };
        let (len, tag) = (word(0), word(4));
        if len > MAX_RECORD {
            return Err(self.damaged("a record has an impossible length"));
        }
        // Grows as bytes come, so that a wrong length takes no memory that the file does not fill.
        let mut payload = Vec::new();
        let taken = Read::by_ref(&mut self.file)
            .take(len.into())
            .read_to_end(&mut payload);
        if taken.doing("reading", &self.path)? != len as usize {
            return Err(self.damaged("a record is torn off"));
        }
        if frame[8..] != record_sum(self.at, len, tag, &payload).to_le_bytes() {
            return Err(self.damaged("the checksum of a record is wrong"));
        }
        let at = self.at;
        if tag == END {
            return self.end(&payload).map(|()| None);
        }
        self.at += (FRAME + payload.len()) as u64;
        self.records += 1;
        Ok(Some(Record {
            tag,
            payload,
            path: self.path.clone(),
            at,
        }))
    }

    fn end(&mut self, payload: &[u8]) -> Result<()> {
        if payload != self.records.to_le_bytes() {
            return Err(self.damaged("records are missing"));
        }
        let more = self.file.read(&mut [0]).doing("reading", &self.path)?;
        match more {
            0 => Ok(()),
            _ => Err(self.damaged("something follows the last record")),
        }
    }

    /// Damage found where the reader stands.
    pub fn damaged(&self, what: impl Into<String>) -> Error {
        Error::damaged(&self.path, self.at, what)
    }

    fn fill(&mut self, into: &mut [u8], torn: &str) -> Result<()> {
        match self.file.read_exact(into) {
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Err(self.damaged(torn)),
            other => other.doing("reading", &self.path),
        }
    }
}

impl Record {
    /// The value in it, written by [`LogWriter::append_value`] or [`LogWriter::append_compact`].
    ///
    /// # Errors
    /// It holds something else.
    pub fn value<T: DeserializeOwned>(&self) -> Result<T> {
        rmp_serde::from_slice(&self.payload).map_err(|e| self.damaged(e.to_string()))
    }

    /// Damage found in this record.
    pub fn damaged(&self, what: impl Into<String>) -> Error {
        Error::damaged(&self.path, self.at, what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format = Format {
        kind: *b"TEST",
        version: 3,
    };

    fn write(path: &Path, records: &[(u32, Vec<u8>)]) {
        let mut log = LogWriter::create(path, FORMAT).unwrap();
        for (tag, payload) in records {
            log.append(*tag, payload).unwrap();
        }
        log.finish().unwrap();
    }

    /// All records up to the end, or up to the first error.
    fn read(path: &Path) -> (Vec<(u32, Vec<u8>)>, Result<()>) {
        let mut records = Vec::new();
        let mut log = match LogReader::open(path, FORMAT) {
            Ok(log) => log,
            Err(e) => return (records, Err(e)),
        };
        loop {
            match log.next_record() {
                Ok(Some(record)) => records.push((record.tag, record.payload)),
                Ok(None) => return (records, Ok(())),
                Err(e) => return (records, Err(e)),
            }
        }
    }

    fn sample() -> Vec<(u32, Vec<u8>)> {
        vec![(1, b"one".to_vec()), (2, vec![]), (7, vec![9; 300])]
    }

    #[test]
    fn a_log_cut_at_any_byte_is_torn_and_gives_only_whole_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        write(&path, &sample());
        let whole = std::fs::read(&path).unwrap();
        assert!(read(&path).1.is_ok());
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (records, end) = read(&path);
            assert!(matches!(end, Err(Error::Damaged { .. })), "cut at {cut}");
            assert_eq!(records, sample()[..records.len()], "cut at {cut}");
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        write(&path, &sample());
        let whole = std::fs::read(&path).unwrap();
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &bytes).unwrap();
            let (records, end) = read(&path);
            assert!(end.is_err(), "bit {bit}");
            assert_eq!(records, sample()[..records.len()], "bit {bit}");
        }
    }

    #[test]
    fn records_that_changed_places_or_came_twice_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        write(&path, &[(1, b"abc".to_vec()), (1, b"def".to_vec())]);
        let whole = std::fs::read(&path).unwrap();
        let (header, rest) = whole.split_at(HEADER);
        let (first, rest) = rest.split_at(FRAME + 3);
        let (second, end) = rest.split_at(FRAME + 3);
        for parts in [
            &[header, second, first, end][..],
            &[header, first, first, end],
            &[header, first, end],
            &[header, first, second, end, first],
        ] {
            std::fs::write(&path, parts.concat()).unwrap();
            assert!(matches!(read(&path).1, Err(Error::Damaged { .. })));
        }
    }

    #[test]
    fn another_version_is_told_from_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let newer = Format {
            version: 4,
            ..FORMAT
        };
        LogWriter::create(&path, newer).unwrap().finish().unwrap();
        let refused = LogReader::open(&path, FORMAT).unwrap_err();
        assert!(matches!(
            refused,
            Error::Version {
                found: 4,
                supported: 3,
                ..
            }
        ));
    }
}
