//! Has a session do something and waits until it is done.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use deltabox::{Sandbox, SessionEvent, SessionId};

const PATIENCE: Duration = Duration::from_secs(60);

/// Types a line that makes the session print `<<`, an answer and `>>` together, which the line itself does not contain;
/// returns the answer.
pub(crate) fn ask(sandbox: &Sandbox, id: SessionId, line: &str) -> Result<String> {
    let session = sandbox.session(id)?;
    let mut events = session.events(session.info().output);
    session.write(format!("{line}\n").as_bytes())?;
    let until = Instant::now() + PATIENCE;
    let mut heard = Vec::new();
    while Instant::now() < until {
        match events.next(Some(Duration::from_millis(200))) {
            Some(SessionEvent::Output { bytes, .. }) => heard.extend_from_slice(&bytes),
            Some(SessionEvent::Missed { .. }) | None => {}
            Some(end) => bail!("the session ended ({end:?}) instead of answering {line:?}"),
        }
        if let Some(answer) = answer(&String::from_utf8_lossy(&heard)) {
            return Ok(answer.to_owned());
        }
    }
    let heard = String::from_utf8_lossy(&heard);
    bail!("no answer to {line:?} in {PATIENCE:?}, only {heard:?}")
}

fn answer(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once("<<")?;
    rest.split_once(">>").map(|(answer, _)| answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_ends_at_its_mark() {
        assert_eq!(answer("$ x\r\n<<12>>\r\n$ "), Some("12"));
        assert_eq!(answer("<<12"), None);
    }
}
