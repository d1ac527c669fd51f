//! Sessions on disk: what they are, and of their output what the checkpoint before does not have.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use deltalog::{Format, LogReader, LogWriter, Record};
use serde::{Deserialize, Serialize};

use super::SESSIONS;
use crate::error::{Doing, Result};
use crate::log::{Piece, View};
use crate::report::{SessionId, Stream};
use crate::session::{Exit, Session};
use crate::sessions::Shared;
use crate::sessions_image::{Kept, Restored, SessionsImage};

const FORMAT: Format = Format {
    kind: *b"SESS",
    version: 1,
};

/// An [`Entry`].
const SESSION: u32 = 1;
/// Output of the last session.
const STDOUT: u32 = 2;
/// The same.
const STDERR: u32 = 3;
/// The offset (8 bytes) up to which the output of the last session is gone.
const MISSED: u32 = 4;

/// A session.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    id: SessionId,
    argv: Vec<String>,
    pid: i32,
    terminal: Option<u32>,
    /// As the sandbox counts.
    owner: u32,
    exit: Option<(i32, bool)>,
    left: Option<Duration>,
    timed_out: bool,
    input: Vec<u8>,
    /// Its output goes on where that of the checkpoint before ends.
    continues: bool,
}

/// Writes the sessions of a checkpoint. `before` are those of the checkpoint that it differs from.
pub(super) fn write(
    image: &SessionsImage,
    before: Option<&SessionsImage>,
    dir: &Path,
) -> Result<()> {
    let mut log = LogWriter::create(&dir.join(SESSIONS), FORMAT)?;
    for (id, kept) in image.iter() {
        let session = &kept.session;
        let doing = || session.doing("reading the output of");
        let before = before.and_then(|before| Some(&before.get(*id)?.view));
        let mut output = session.state.lock().log.since(&kept.view, before);
        log.append_value(
            SESSION,
            &Entry {
                id: *id,
                argv: session.argv.clone(),
                pid: session.pid,
                terminal: session.terminal,
                owner: session.owner,
                exit: kept.exit.map(|exit| (exit.status, exit.timed_out)),
                left: kept.left,
                timed_out: kept.timed_out,
                input: kept.input.clone(),
                continues: output.continues,
            },
        )?;
        // Not locked for all of it, which the command would wait for.
        let mut next = || session.state.lock().log.read_on(&mut output);
        while let Some(piece) = next().doing(doing())? {
            match piece {
                Piece::Output(Stream::Stdout, bytes, _) => log.append(STDOUT, &bytes)?,
                Piece::Output(Stream::Stderr, bytes, _) => log.append(STDERR, &bytes)?,
                Piece::Missed(_, next) => log.append(MISSED, &next.to_le_bytes())?,
            }
        }
    }
    log.finish()?;
    Ok(())
}

/// Reads sessions of checkpoints; a session is the same one in all of them.
pub(crate) struct SessionReader<'a> {
    shared: &'a Arc<Shared>,
    known: BTreeMap<SessionId, Arc<Session>>,
}

impl<'a> SessionReader<'a> {
    /// The sessions will belong to this sandbox.
    pub(crate) fn new(shared: &'a Arc<Shared>) -> Self {
        Self {
            shared,
            known: BTreeMap::new(),
        }
    }

    /// The highest number of a session.
    pub(crate) fn last(&self) -> u64 {
        self.known.keys().next_back().map_or(0, |id| id.0)
    }

    /// The sessions of the checkpoint in a directory.
    ///
    /// # Errors
    /// The file is damaged, or the disk refuses its output.
    pub(crate) fn read(
        &mut self,
        dir: &Path,
        before: Option<&SessionsImage>,
    ) -> Result<SessionsImage> {
        let mut image = BTreeMap::new();
        let mut last: Option<(SessionId, Kept)> = None;
        let mut log = LogReader::open(&dir.join(SESSIONS), FORMAT)?;
        while let Some(record) = log.next_record()? {
            if record.tag == SESSION {
                image.extend(last.take());
                last = Some(self.session(&record, before)?);
                continue;
            }
            let Some((_, kept)) = &last else {
                return Err(record.damaged("no session came before it").into());
            };
            output(&kept.session, &record)?;
        }
        image.extend(last);
        for kept in image.values_mut() {
            kept.view = kept.session.state.lock().log.view().clone();
        }
        Ok(SessionsImage::of(image))
    }

    /// A session whose log shows what it showed in the checkpoint before, ready for more.
    fn session(
        &mut self,
        record: &Record,
        before: Option<&SessionsImage>,
    ) -> Result<(SessionId, Kept)> {
        let entry: Entry = record.value()?;
        let before = before.and_then(|before| before.get(entry.id));
        let view = match (entry.continues, before) {
            (false, _) => View::default(),
            (true, Some(before)) => before.view.clone(),
            (true, None) => {
                return Err(record
                    .damaged("the checkpoint before has no such session")
                    .into());
            }
        };
        let exit = entry
            .exit
            .map(|(status, timed_out)| Exit { status, timed_out });
        let session = match self.known.get(&entry.id) {
            Some(session) => Arc::clone(session),
            None => {
                let session = Arc::new(self.shared.restored(Restored {
                    id: entry.id,
                    argv: entry.argv,
                    pid: entry.pid,
                    terminal: entry.terminal,
                    owner: entry.owner,
                }));
                self.known.insert(entry.id, Arc::clone(&session));
                session
            }
        };
        if exit.is_none() {
            self.shared.open_master(&session)?;
        }
        session.state.lock().log.restore(&view);
        let kept = Kept {
            session,
            view,
            exit,
            left: entry.left,
            timed_out: entry.timed_out,
            input: entry.input,
        };
        Ok((entry.id, kept))
    }
}

fn output(session: &Session, record: &Record) -> Result<()> {
    let log = &mut session.state.lock().log;
    match record.tag {
        STDOUT => log.append(Stream::Stdout, &record.payload),
        STDERR => log.append(Stream::Stderr, &record.payload),
        MISSED => match <[u8; 8]>::try_from(&record.payload[..]) {
            Ok(next) => log.skip_to(u64::from_le_bytes(next)),
            Err(_) => return Err(record.damaged("it is no offset").into()),
        },
        tag => {
            return Err(record
                .damaged(format!("it has the unknown tag {tag}"))
                .into());
        }
    }
    Ok(())
}

/// Reads the sessions of a checkpoint and checks every byte of them.
pub(super) fn verify(dir: &Path) -> Result<()> {
    let mut log = LogReader::open(&dir.join(SESSIONS), FORMAT)?;
    while let Some(record) = log.next_record()? {
        if record.tag == SESSION {
            record.value::<Entry>()?;
        }
    }
    Ok(())
}
