//! Sessions: started, listed, signalled, written to, streamed.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::ws::{WebSocketUpgrade, rejection::WebSocketUpgradeRejection};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use deltabox::{CommandSpec, Host, Session, SessionInfo, WindowSize};
use serde::Deserialize;

use super::extract::{At, Body, Params, Raw};
use super::session_id;
use crate::api::{SignalRequest, StartedSession};
use crate::app::{App, check_epoch, expected_epoch};
use crate::attach;
use crate::failure::{Answer, Failure};
use crate::frame::MAX_PAYLOAD;

pub(super) async fn list(
    State(app): State<App>,
    At(name): At<String>,
    headers: HeaderMap,
) -> Answer<Json<Vec<SessionInfo>>> {
    app.ask("sessions", name, &headers, Host::sessions)
        .await
        .map(Json)
}

pub(super) async fn create(
    State(app): State<App>,
    At(name): At<String>,
    headers: HeaderMap,
    Params(start): Params<Start>,
    Body(command): Body<CommandSpec>,
) -> Answer<(StatusCode, Json<StartedSession>)> {
    let (session, epoch) = app
        .call_on_running("exec", name, &headers, |sandbox| {
            // Read before: should a rollback come between, the session is said to be of the epoch that is over, and so
            // is refused later, never taken for another one.
            let epoch = sandbox.epoch();
            Ok((sandbox.spawn(command)?, epoch))
        })
        .await?;
    if start.attach {
        app.expected.add(&session);
    }
    let session = session.info();
    let started = StartedSession { session, epoch };
    Ok((StatusCode::CREATED, Json(started)))
}

pub(super) async fn get(
    State(app): State<App>,
    At(path): At<(String, String)>,
    headers: HeaderMap,
) -> Answer<Json<SessionInfo>> {
    let session = find(&app, path, &headers).await?;
    app.call("session", move |_| Ok(session.info()))
        .await
        .map(Json)
}

pub(super) async fn signal(
    State(app): State<App>,
    At(path): At<(String, String)>,
    headers: HeaderMap,
    Body(request): Body<SignalRequest>,
) -> Answer<StatusCode> {
    act(&app, "signal", path, &headers, move |session| {
        session.signal(request.signal)
    })
    .await
}

pub(super) async fn resize(
    State(app): State<App>,
    At(path): At<(String, String)>,
    headers: HeaderMap,
    Body(size): Body<WindowSize>,
) -> Answer<StatusCode> {
    act(&app, "resize", path, &headers, move |session| {
        session.resize(size)
    })
    .await
}

pub(super) async fn kill(
    State(app): State<App>,
    At(path): At<(String, String)>,
    headers: HeaderMap,
) -> Answer<StatusCode> {
    act(&app, "kill", path, &headers, |session| session.kill()).await
}

pub(super) async fn stdin(
    State(app): State<App>,
    At(path): At<(String, String)>,
    headers: HeaderMap,
    Raw(input): Raw,
) -> Answer<StatusCode> {
    act(&app, "stdin", path, &headers, move |session| {
        session.write(&input)
    })
    .await
}

pub(super) async fn close_stdin(
    State(app): State<App>,
    At(path): At<(String, String)>,
    headers: HeaderMap,
) -> Answer<StatusCode> {
    act(&app, "stdin", path, &headers, |session| {
        session.close_stdin()
    })
    .await
}

/// What the client means to do next.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Start {
    attach: bool,
}

/// From where, and for how long.
#[derive(Deserialize)]
#[serde(default)]
pub(super) struct From {
    offset: u64,
    follow: bool,
}

impl Default for From {
    fn default() -> Self {
        Self {
            offset: 0,
            follow: true,
        }
    }
}

pub(super) async fn output(
    State(app): State<App>,
    At(path): At<(String, String)>,
    headers: HeaderMap,
    Params(from): Params<From>,
) -> Answer<Response> {
    let session = find(&app, path, &headers).await?;
    let events = match from.follow {
        true => app.expected.events(&session, from.offset),
        false => session.events(from.offset),
    };
    let frames = attach::follow(events, from.follow).map_err(no_thread)?;
    let kind = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((kind, attach::body(frames)).into_response())
}

pub(super) async fn attach(
    State(app): State<App>,
    At(path): At<(String, String)>,
    headers: HeaderMap,
    Params(from): Params<From>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Answer<Response> {
    let upgrade = upgrade.map_err(|e| Failure::invalid(e.body_text()))?;
    let session = find(&app, path, &headers).await?;
    let frames =
        attach::follow(app.expected.events(&session, from.offset), true).map_err(no_thread)?;
    let attached = app.attached.clone();
    Ok(upgrade
        .max_message_size(MAX_PAYLOAD + 1)
        .on_upgrade(async move |socket| {
            attach::serve(socket, session, frames).await;
            drop(attached);
        }))
}

/// The session that the path names, of the epoch that the headers name.
async fn find(
    app: &App,
    (name, id): (String, String),
    headers: &HeaderMap,
) -> Answer<Arc<Session>> {
    let id = session_id(&id)?;
    let expected = expected_epoch(headers)?;
    app.call_on_running("session", name, headers, move |sandbox| {
        let session = sandbox.session(id);
        // A rollback may have come between the first check and the look-up, and the number may mean another now.
        check_epoch(sandbox, expected)?;
        session
    })
    .await
}

async fn act(
    app: &App,
    operation: &'static str,
    path: (String, String),
    headers: &HeaderMap,
    work: impl FnOnce(&Session) -> deltabox::Result<()> + Send + 'static,
) -> Answer<StatusCode> {
    let session = find(app, path, headers).await?;
    app.call(operation, move |_| work(&session)).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn no_thread(why: std::io::Error) -> Failure {
    Failure::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "no_thread",
        format!("no thread could be started for the stream: {why}"),
    )
}
