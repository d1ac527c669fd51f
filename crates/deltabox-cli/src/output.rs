//! Where the output of a command goes: to our own streams, or as JSON lines to standard output.

use std::io;

use deltabox::Stream;
use deltaboxd::api::{End, Missed};
use serde::Serialize;
use tokio::io::{AsyncWrite, AsyncWriteExt, Stderr, Stdout};

use crate::failure::Failure;
use crate::show;
use crate::units::size;

/// The destination of one command's output.
pub(crate) struct Output {
    stdout: Stdout,
    stderr: Stderr,
    json: Option<[Text; 2]>,
}

/// A piece of output as a JSON line.
#[derive(Serialize)]
struct Piece<'a> {
    stream: Stream,
    text: &'a str,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self {
            stdout: tokio::io::stdout(),
            stderr: tokio::io::stderr(),
            json: json.then(Default::default),
        }
    }

    /// Returns when the bytes have left us, so that a slow reader slows the command down.
    pub(crate) async fn write(&mut self, stream: Stream, bytes: &[u8]) -> Result<(), Failure> {
        if let Some(texts) = &mut self.json {
            let text = texts[index(stream)].add(bytes);
            return self
                .line(&Piece {
                    stream,
                    text: &text,
                })
                .await;
        }
        match stream {
            Stream::Stdout => flush(&mut self.stdout, bytes).await?,
            Stream::Stderr => flush(&mut self.stderr, bytes).await?,
        }
        Ok(())
    }

    /// A gap is said: output that silently lacks a part is worse than none.
    pub(crate) async fn missed(&mut self, missed: &Missed) -> Result<(), Failure> {
        if self.json.is_some() {
            return self.line(missed).await;
        }
        show::note(&format!(
            "{} of output were dropped here: nobody read them in time",
            size(missed.missed)
        ));
        Ok(())
    }

    /// As JSON the end is a line too.
    pub(crate) async fn end(&mut self, end: &End) -> Result<(), Failure> {
        let Some(texts) = &mut self.json else {
            return Ok(());
        };
        let rests = [Stream::Stdout, Stream::Stderr].map(|s| (s, texts[index(s)].finish()));
        for (stream, text) in rests {
            if !text.is_empty() {
                self.line(&Piece {
                    stream,
                    text: &text,
                })
                .await?;
            }
        }
        self.line(end).await
    }

    async fn line(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        Ok(flush(&mut self.stdout, &line).await?)
    }
}

fn index(stream: Stream) -> usize {
    match stream {
        Stream::Stdout => 0,
        Stream::Stderr => 1,
    }
}

async fn flush(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

/// Bytes that come in pieces, as text; a character that was cut in two is put together again.
#[derive(Default)]
struct Text {
    cut: Vec<u8>,
}

impl Text {
    /// The text so far; what is not UTF-8 becomes U+FFFD.
    fn add(&mut self, bytes: &[u8]) -> String {
        self.cut.extend_from_slice(bytes);
        let begun = begun_character(&self.cut);
        let rest = self.cut.split_off(self.cut.len() - begun);
        let text = String::from_utf8_lossy(&self.cut).into_owned();
        self.cut = rest;
        text
    }

    fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.cut)).into_owned()
    }
}

/// How many bytes at the end begin a character that is not complete.
fn begun_character(bytes: &[u8]) -> usize {
    let tail = &bytes[bytes.len().saturating_sub(3)..];
    (1..=tail.len())
        .rev()
        .find(|&n| {
            let end = &tail[tail.len() - n..];
            matches!(std::str::from_utf8(end), Err(e) if e.valid_up_to() == 0 && e.error_len().is_none())
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_cut_anywhere_are_put_together_again() {
        let whole = "a é € 😀 end";
        let (mut text, mut seen) = (Text::default(), String::new());
        for byte in whole.bytes() {
            seen.push_str(&text.add(&[byte]));
        }
        assert_eq!(seen + &text.finish(), whole);
    }

    #[test]
    fn what_is_not_text_is_replaced_and_does_not_wait() {
        let mut text = Text::default();
        assert_eq!(text.add(b"a\xff\xfeb"), "a\u{fffd}\u{fffd}b");
        assert_eq!(text.add(b"\xe2\x82"), "");
        assert_eq!(text.finish(), "\u{fffd}");
    }
}
