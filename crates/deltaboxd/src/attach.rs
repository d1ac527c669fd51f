//! Streams of a session: a WebSocket for both directions, a plain body for output alone.
//!
//! The library's calls on a session wait, so each stream has a thread that reads its events and, once input comes,
//! one that writes it; short bounded queues join them to the socket. A client that does not read stops the thread,
//! and with it nothing but its own stream.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use bytes::Bytes;
use deltabox::{Events, Session, SessionEvent};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::sync::mpsc;

use crate::frame::{FromSession, MAX_PAYLOAD, ToSession};

/// Frames between a thread and the socket.
const QUEUE: usize = 4;

/// How often a thread without events looks whether its client is still there.
const IDLE: Duration = Duration::from_millis(200);

/// Reads events. Without `wait` it ends with what there is now.
pub(crate) fn follow(mut events: Events, wait: bool) -> io::Result<mpsc::Receiver<FromSession>> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    std::thread::Builder::new()
        .name("session-output".into())
        .spawn(move || {
            let patience = if wait { IDLE } else { Duration::ZERO };
            while !sender.is_closed() {
                match events.next(Some(patience)) {
                    Some(event) => {
                        if forward(&sender, event).is_none() {
                            return;
                        }
                    }
                    None if wait => {}
                    None => return,
                }
            }
        })?;
    Ok(receiver)
}

/// `None` when nothing more is to be sent.
fn forward(sender: &mpsc::Sender<FromSession>, event: SessionEvent) -> Option<()> {
    match event {
        SessionEvent::Output { stream, bytes } => {
            let mut rest = Bytes::from(bytes);
            while !rest.is_empty() {
                let piece = rest.split_to(rest.len().min(MAX_PAYLOAD));
                let frame = FromSession::Output(stream, piece);
                sender.blocking_send(frame).ok()?;
            }
            Some(())
        }
        SessionEvent::Missed { .. } => sender.blocking_send(event.into()).ok(),
        SessionEvent::Exit { .. } | SessionEvent::RolledBack { .. } => {
            // A client that went away does not want to know.
            let _ = sender.blocking_send(event.into());
            None
        }
    }
}

/// The frames as the body of an answer, each with its length.
pub(crate) fn body(mut frames: mpsc::Receiver<FromSession>) -> Body {
    let stream = futures_util::stream::poll_fn(move |cx| {
        frames
            .poll_recv(cx)
            .map(|frame| frame.map(|frame| Ok::<_, io::Error>(frame.encode_with_length())))
    });
    Body::from_stream(stream)
}

/// Carries frames both ways until the session's end, or until the client leaves.
pub(crate) async fn serve(
    socket: WebSocket,
    session: Arc<Session>,
    frames: mpsc::Receiver<FromSession>,
) {
    let (mut sink, source) = socket.split();
    let outcome = tokio::select! {
        sent = send_frames(&mut sink, frames) => sent,
        received = receive_frames(source, session) => received,
    };
    let close = match outcome {
        Ok(()) => CloseFrame {
            code: close_code::NORMAL,
            reason: "".into(),
        },
        Err(why) => CloseFrame {
            code: close_code::UNSUPPORTED,
            reason: why.into(),
        },
    };
    // The client may have left already.
    let _ = sink.send(Message::Close(Some(close))).await;
}

type Outcome = Result<(), String>;

async fn send_frames(
    sink: &mut SplitSink<WebSocket, Message>,
    mut frames: mpsc::Receiver<FromSession>,
) -> Outcome {
    while let Some(frame) = frames.recv().await {
        if sink.send(Message::Binary(frame.encode())).await.is_err() {
            break;
        }
    }
    Ok(())
}

async fn receive_frames(mut source: SplitStream<WebSocket>, session: Arc<Session>) -> Outcome {
    let mut input = None;
    while let Some(Ok(message)) = source.next().await {
        let bytes = match message {
            Message::Binary(bytes) => bytes,
            Message::Text(_) => return Err("only binary messages are understood".into()),
            Message::Ping(_) | Message::Pong(_) => continue,
            Message::Close(_) => break,
        };
        match ToSession::decode(bytes).map_err(|e| e.to_string())? {
            ToSession::Stdin(bytes) => {
                if input.is_none() {
                    input = Some(writer(session.clone()).map_err(|e| e.to_string())?);
                }
                let Some(writer) = &input else { continue };
                // It ended: the command reads no more.
                let _ = writer.send(bytes).await;
            }
            ToSession::Resize(size) => control(&session, move |s| s.resize(size)).await,
            ToSession::Signal(number) => control(&session, move |s| s.signal(number)).await,
        }
    }
    Ok(())
}

/// A thread that writes to the session's input, and ends when that cannot be written to any more.
fn writer(session: Arc<Session>) -> io::Result<mpsc::Sender<Bytes>> {
    let (sender, mut receiver) = mpsc::channel::<Bytes>(QUEUE);
    std::thread::Builder::new()
        .name("session-input".into())
        .spawn(move || {
            while let Some(bytes) = receiver.blocking_recv() {
                let written = match bytes.is_empty() {
                    true => session.close_stdin(),
                    false => session.write(&bytes),
                };
                if written.is_err() {
                    return;
                }
            }
        })?;
    Ok(sender)
}

/// A resize or signal that comes too late is no error: the stream tells of the end.
async fn control(
    session: &Arc<Session>,
    act: impl FnOnce(&Session) -> deltabox::Result<()> + Send + 'static,
) {
    let session = session.clone();
    let done = tokio::task::spawn_blocking(move || act(&session)).await;
    if let Ok(Err(why)) = done {
        tracing::debug!(%why, "a resize or signal had no effect");
    }
}
