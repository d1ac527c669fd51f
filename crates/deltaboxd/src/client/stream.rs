//! The streams of a session, seen from the client.

use std::path::Path;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use http_body_util::BodyExt;
use hyper::Method;
use hyper::body::Incoming;
use tokio::net::UnixStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error as SocketError, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::http::{connect, exchange, refused};
use super::{Error, Result};
use crate::api::EPOCH_HEADER;
use crate::frame::{FromSession, MAX_PAYLOAD, ToSession};

type Socket = WebSocketStream<UnixStream>;

/// The output of a session.
#[derive(Debug)]
pub struct Output {
    body: Incoming,
    buffer: BytesMut,
}

impl Output {
    pub(super) async fn open(socket: &Path, path: &str, epoch: Option<u64>) -> Result<Self> {
        let answer = exchange(socket, Method::GET, path, epoch, Vec::new()).await?;
        Ok(Self {
            body: answer.into_body(),
            buffer: BytesMut::new(),
        })
    }

    /// The next frame; `None` after the last one.
    pub async fn next(&mut self) -> Result<Option<FromSession>> {
        loop {
            if let Some(frame) = FromSession::take(&mut self.buffer).map_err(Error::broken)? {
                return Ok(Some(frame));
            }
            match self.body.frame().await {
                Some(frame) => {
                    if let Ok(data) = frame.map_err(Error::broken)?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(Error::broken("the output ended within a frame")),
            }
        }
    }
}

/// Both directions of a session.
#[derive(Debug)]
pub struct Attached {
    sink: SplitSink<Socket, Message>,
    source: SplitStream<Socket>,
}

/// The direction to the session.
#[derive(Debug)]
pub struct ToSessionSink(SplitSink<Socket, Message>);

/// The direction from the session.
#[derive(Debug)]
pub struct FromSessionStream(SplitStream<Socket>);

impl Attached {
    pub(super) async fn open(socket: &Path, path: &str, epoch: Option<u64>) -> Result<Self> {
        let stream = connect(socket).await?;
        let mut request = format!("ws://deltabox{path}")
            .into_client_request()
            .map_err(Error::broken)?;
        if let Some(epoch) = epoch {
            request.headers_mut().insert(EPOCH_HEADER, epoch.into());
        }
        match client_async(request, stream).await {
            Ok((socket, _)) => {
                let (sink, source) = socket.split();
                Ok(Self { sink, source })
            }
            Err(SocketError::Http(answer)) => {
                let body = answer.body().as_deref().unwrap_or_default();
                Err(refused(answer.status(), body))
            }
            Err(other) => Err(Error::broken(other)),
        }
    }

    /// The two directions, to be used at the same time.
    pub fn split(self) -> (ToSessionSink, FromSessionStream) {
        (ToSessionSink(self.sink), FromSessionStream(self.source))
    }
}

impl ToSessionSink {
    /// Sends a frame; waits while the session does not take it.
    pub async fn send(&mut self, frame: ToSession) -> Result<()> {
        match frame {
            ToSession::Stdin(bytes) if bytes.len() > MAX_PAYLOAD => {
                for piece in bytes.chunks(MAX_PAYLOAD) {
                    self.send_one(ToSession::Stdin(Bytes::copy_from_slice(piece)))
                        .await?;
                }
                Ok(())
            }
            frame => self.send_one(frame).await,
        }
    }

    async fn send_one(&mut self, frame: ToSession) -> Result<()> {
        let message = Message::Binary(frame.encode());
        self.0.send(message).await.map_err(Error::broken)
    }
}

impl FromSessionStream {
    /// The next frame; `None` after the last one.
    pub async fn next(&mut self) -> Result<Option<FromSession>> {
        while let Some(message) = self.0.next().await {
            match message.map_err(Error::broken)? {
                Message::Binary(bytes) => {
                    return FromSession::decode(bytes).map(Some).map_err(Error::broken);
                }
                Message::Close(Some(close)) if close.code != CloseCode::Normal => {
                    return Err(Error::broken(close.reason));
                }
                _ => {}
            }
        }
        Ok(None)
    }
}
