//! The frames of a session's stream: a channel byte, then the payload.
//!
//! On a WebSocket one binary message is one frame. In the body of `GET …/output` the channel is followed by the
//! payload's length, 4 bytes, big-endian. Numbers 0 to 2 are those of the standard streams.

use bytes::{BufMut, Bytes, BytesMut};
use deltabox::{SessionEvent, Stream, WindowSize};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::{End, Missed, SignalRequest};

/// The longest payload that either side sends or accepts, in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// What a client sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToSession {
    /// Channel 0: standard input; an empty payload ends it.
    Stdin(Bytes),
    /// Channel 4: the terminal's new size, in JSON.
    Resize(WindowSize),
    /// Channel 5: a signal for the process group, in JSON.
    Signal(i32),
}

/// What the service sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromSession {
    /// Channel 1 (standard output, or a terminal) or 2 (standard error).
    Output(Stream, Bytes),
    /// Channel 3: how it ended, in JSON; nothing follows.
    End(End),
    /// Channel 6: a gap before the next output, in JSON.
    Missed(Missed),
}

/// Why a frame was not understood.
#[derive(Debug, thiserror::Error)]
pub enum BadFrame {
    /// No channel byte.
    #[error("an empty frame")]
    Empty,
    /// A channel that this side does not read.
    #[error("a frame on channel {0}, which is not one that may be sent")]
    Channel(u8),
    /// A length that is not accepted.
    #[error("a frame of {0} bytes; at most {MAX_PAYLOAD} are accepted")]
    TooLong(usize),
    /// A payload that is not the JSON that its channel carries.
    #[error("the payload of channel {channel} is not understood: {source}")]
    Payload {
        /// The channel.
        channel: u8,
        /// Why.
        source: serde_json::Error,
    },
}

impl ToSession {
    /// The frame as one message.
    pub fn encode(&self) -> Bytes {
        match self {
            Self::Stdin(bytes) => message(0, bytes),
            Self::Resize(size) => message(4, &json(size)),
            Self::Signal(signal) => message(5, &json(&SignalRequest { signal: *signal })),
        }
    }

    /// Reads one message.
    pub fn decode(message: Bytes) -> Result<Self, BadFrame> {
        let (channel, payload) = split(message)?;
        match channel {
            0 => Ok(Self::Stdin(payload)),
            4 => Ok(Self::Resize(parse(channel, &payload)?)),
            5 => Ok(Self::Signal(
                parse::<SignalRequest>(channel, &payload)?.signal,
            )),
            other => Err(BadFrame::Channel(other)),
        }
    }
}

impl FromSession {
    /// The frame as one message.
    pub fn encode(&self) -> Bytes {
        let (channel, payload) = self.parts();
        message(channel, &payload)
    }

    /// The frame as a part of a body, with its length.
    pub fn encode_with_length(&self) -> Bytes {
        let (channel, payload) = self.parts();
        let mut out = BytesMut::with_capacity(5 + payload.len());
        out.put_u8(channel);
        out.put_u32(u32::try_from(payload.len()).expect("output comes in pieces far below 4 GiB"));
        out.put_slice(&payload);
        out.freeze()
    }

    /// Reads one message.
    pub fn decode(message: Bytes) -> Result<Self, BadFrame> {
        let (channel, payload) = split(message)?;
        Self::from_parts(channel, payload)
    }

    /// Takes one frame with its length from the front of `buffer`; `None` while it is not complete.
    pub fn take(buffer: &mut BytesMut) -> Result<Option<Self>, BadFrame> {
        let Some((header, _)) = buffer.split_first_chunk::<5>() else {
            return Ok(None);
        };
        let [channel, length @ ..] = *header;
        let length = u32::from_be_bytes(length) as usize;
        if length > MAX_PAYLOAD {
            return Err(BadFrame::TooLong(length));
        }
        if buffer.len() < 5 + length {
            return Ok(None);
        }
        let payload = buffer.split_to(5 + length).freeze().slice(5..);
        Self::from_parts(channel, payload).map(Some)
    }

    fn parts(&self) -> (u8, Bytes) {
        match self {
            Self::Output(Stream::Stdout, bytes) => (1, bytes.clone()),
            Self::Output(Stream::Stderr, bytes) => (2, bytes.clone()),
            Self::End(end) => (3, json(end)),
            Self::Missed(missed) => (6, json(missed)),
        }
    }

    fn from_parts(channel: u8, payload: Bytes) -> Result<Self, BadFrame> {
        match channel {
            1 => Ok(Self::Output(Stream::Stdout, payload)),
            2 => Ok(Self::Output(Stream::Stderr, payload)),
            3 => Ok(Self::End(parse(channel, &payload)?)),
            6 => Ok(Self::Missed(parse(channel, &payload)?)),
            other => Err(BadFrame::Channel(other)),
        }
    }
}

impl From<SessionEvent> for FromSession {
    fn from(event: SessionEvent) -> Self {
        match event {
            SessionEvent::Output { stream, bytes } => Self::Output(stream, bytes.into()),
            SessionEvent::Missed { bytes } => Self::Missed(Missed { missed: bytes }),
            SessionEvent::Exit { status, timed_out } => Self::End(End::Exit { status, timed_out }),
            SessionEvent::RolledBack { epoch } => Self::End(End::RolledBack { epoch }),
        }
    }
}

fn message(channel: u8, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(1 + payload.len());
    out.put_u8(channel);
    out.put_slice(payload);
    out.freeze()
}

fn split(mut message: Bytes) -> Result<(u8, Bytes), BadFrame> {
    if message.is_empty() {
        return Err(BadFrame::Empty);
    }
    let channel = message.split_to(1)[0];
    Ok((channel, message))
}

fn json(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value)
        .expect("numbers and names are always valid JSON")
        .into()
}

fn parse<T: DeserializeOwned>(channel: u8, payload: &[u8]) -> Result<T, BadFrame> {
    serde_json::from_slice(payload).map_err(|source| BadFrame::Payload { channel, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> Vec<FromSession> {
        vec![
            FromSession::Output(Stream::Stdout, Bytes::from_static(b"out\0\xff")),
            FromSession::Output(Stream::Stderr, Bytes::new()),
            FromSession::End(End::Exit {
                status: 3,
                timed_out: true,
            }),
            FromSession::End(End::RolledBack { epoch: 9 }),
            FromSession::Missed(Missed { missed: 1 << 40 }),
        ]
    }

    #[test]
    fn frames_survive_a_message_and_a_stream_cut_anywhere() {
        let mut stream = BytesMut::new();
        for frame in frames() {
            assert_eq!(FromSession::decode(frame.encode()).unwrap(), frame);
            stream.extend_from_slice(&frame.encode_with_length());
        }
        let (mut buffer, mut seen) = (BytesMut::new(), Vec::new());
        for byte in stream {
            buffer.put_u8(byte);
            seen.extend(FromSession::take(&mut buffer).unwrap());
        }
        assert_eq!(seen, frames());
        assert!(buffer.is_empty());
    }

    #[test]
    fn input_frames_come_back() {
        for frame in [
            ToSession::Stdin(Bytes::from_static(b"ls\n")),
            ToSession::Stdin(Bytes::new()),
            ToSession::Resize(WindowSize { rows: 24, cols: 80 }),
            ToSession::Signal(15),
        ] {
            assert_eq!(ToSession::decode(frame.encode()).unwrap(), frame);
        }
    }

    #[test]
    fn nonsense_is_refused_and_not_allocated_for() {
        assert!(ToSession::decode(Bytes::new()).is_err());
        assert!(ToSession::decode(Bytes::from_static(b"\x01x")).is_err());
        assert!(ToSession::decode(Bytes::from_static(b"\x04{\"rows\":70000,\"cols\":1}")).is_err());
        assert!(ToSession::decode(Bytes::from_static(b"\x05")).is_err());
        let mut huge = BytesMut::from(&b"\x01\xff\xff\xff\xff"[..]);
        assert!(FromSession::take(&mut huge).is_err());
    }
}
