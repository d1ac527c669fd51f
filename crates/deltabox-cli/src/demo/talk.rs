//! Running commands in a sandbox, and asking its persistent sessions.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use deltabox::{CommandSpec, Events, Sandbox, Session, SessionEvent, SessionId};

use super::project::last_lines;

/// What a command may take before the demo gives it up.
const PATIENCE: Duration = Duration::from_secs(180);
/// Output beyond this is read and dropped.
const MOST_OUTPUT: usize = 64 << 20;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Lets all that waits for a sandbox end with an error soon.
pub(super) fn interrupt() {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Fails once the user has pressed Ctrl-C.
pub(super) fn check_interrupt() -> Result<()> {
    match INTERRUPTED.load(Ordering::Relaxed) {
        true => bail!("interrupted"),
        false => Ok(()),
    }
}

/// How a command ended, and what it wrote to both streams.
pub(super) struct Ended {
    pub(super) status: i32,
    pub(super) output: String,
}

impl Ended {
    /// The output of a command that must not fail.
    pub(super) fn ok(self, what: &str) -> Result<String> {
        match self.status {
            0 => Ok(self.output),
            status => bail!(
                "{what} failed in the sandbox with status {status}: {}",
                last_lines(self.output.trim(), 5)
            ),
        }
    }
}

/// Runs a command to its end; `input` becomes its standard input.
pub(super) fn run(
    sandbox: &Sandbox,
    mut command: CommandSpec,
    input: Option<&mut dyn Read>,
) -> Result<Ended> {
    command.stdin = input.is_some();
    command.timeout.get_or_insert(PATIENCE);
    let session = sandbox.spawn(command)?;
    if let Some(input) = input {
        feed(&session, input)?;
    }
    let mut listener = Listener::new(&session, 0);
    let status = loop {
        if let Some(status) = listener.hear()? {
            break status;
        }
    };
    Ok(Ended {
        status,
        output: String::from_utf8_lossy(&listener.heard).into_owned(),
    })
}

fn feed(session: &Session, input: &mut dyn Read) -> Result<()> {
    let mut piece = vec![0; 1 << 16];
    loop {
        check_interrupt()?;
        match input.read(&mut piece).context("reading what to unpack")? {
            0 => return Ok(session.close_stdin()?),
            n => session.write(&piece[..n])?,
        }
    }
}

/// Types a line into a session and returns what it answers between two marks. `line` gets the opening and the closing
/// mark, and must have the session print them, each on a line of its own, without containing them as they are printed.
pub(super) fn ask(
    sandbox: &Sandbox,
    id: SessionId,
    line: impl FnOnce(u64) -> String,
) -> Result<String> {
    static QUESTIONS: AtomicU64 = AtomicU64::new(1000);
    let number = QUESTIONS.fetch_add(1, Ordering::Relaxed);
    let session = sandbox.session(id)?;
    let mut listener = Listener::new(&session, session.info().output);
    let line = line(number);
    session.write(line.as_bytes())?;
    let (open, close) = (format!("<<{number}\n"), format!(">>{number}\n"));
    loop {
        if let Some(answer) = between(&listener.text(), &open, &close) {
            return Ok(answer);
        }
        if let Some(status) = listener.hear()? {
            bail!(
                "{} ended with status {status} instead of answering {line:?}",
                session.info().argv.join(" ")
            );
        }
    }
}

fn between(text: &str, open: &str, close: &str) -> Option<String> {
    let (_, rest) = text.split_once(open)?;
    rest.split_once(close).map(|(answer, _)| answer.to_owned())
}

/// Collects what a session writes.
struct Listener {
    events: Events,
    heard: Vec<u8>,
    until: Instant,
}

impl Listener {
    fn new(session: &Arc<Session>, offset: u64) -> Self {
        Self {
            events: session.events(offset),
            heard: Vec::new(),
            until: Instant::now() + PATIENCE,
        }
    }

    /// Waits for more; the exit status when nothing more will come.
    fn hear(&mut self) -> Result<Option<i32>> {
        check_interrupt()?;
        match self.events.next(Some(Duration::from_millis(200))) {
            Some(SessionEvent::Output { bytes, .. }) => {
                let room = MOST_OUTPUT.saturating_sub(self.heard.len());
                self.heard
                    .extend_from_slice(&bytes[..bytes.len().min(room)]);
            }
            Some(SessionEvent::Exit { status, .. }) => return Ok(Some(status)),
            Some(SessionEvent::RolledBack { epoch }) => {
                bail!("the session was rolled back at epoch {epoch} while it answered")
            }
            Some(SessionEvent::Missed { .. }) => {}
            None if Instant::now() > self.until => bail!(
                "no answer from the sandbox in {PATIENCE:?}; it wrote: {}",
                last_lines(self.text().trim(), 5)
            ),
            None => {}
        }
        Ok(None)
    }

    /// What was heard, with a terminal's line ends as a file's.
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.heard).replace("\r\n", "\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_what_stands_between_the_marks() {
        let text = "$ printf '<<%s\\n' 7\n<<7\none\ntwo\n>>7\n$ ";
        assert_eq!(
            between(text, "<<7\n", ">>7\n").as_deref(),
            Some("one\ntwo\n")
        );
        assert_eq!(between("<<7\none", "<<7\n", ">>7\n"), None);
    }
}
