//! The routes. Each module holds the handlers of one kind of resource.

mod checkpoints;
mod extract;
mod sandboxes;
mod service;
mod sessions;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use deltabox::{CheckpointId, SessionId};

use crate::app::App;
use crate::failure::{Answer, Failure};
use crate::frame::MAX_PAYLOAD;

/// The whole interface.
pub(crate) fn router(app: App) -> Router {
    let session = "/v1/sandboxes/{name}/sessions/{id}";
    let under = |path: &str| format!("{session}/{path}");
    Router::new()
        .route("/v1/version", get(service::version))
        .route("/v1/stop", post(service::stop))
        .route("/v1/doctor", get(service::doctor))
        .route("/v1/metrics", get(service::metrics))
        .route("/v1/ready", get(service::ready))
        .route("/v1/openapi.json", get(service::openapi))
        .route("/v1/layers", get(checkpoints::layers))
        .route(
            "/v1/sandboxes",
            get(sandboxes::list).post(sandboxes::create),
        )
        .route(
            "/v1/sandboxes/{name}",
            get(sandboxes::get).delete(sandboxes::remove),
        )
        .route("/v1/sandboxes/{name}/stop", post(sandboxes::stop))
        .route("/v1/sandboxes/{name}/fork", post(sandboxes::fork))
        .route(
            "/v1/sandboxes/{name}/checkpoints",
            get(checkpoints::tree).post(checkpoints::create),
        )
        .route(
            "/v1/sandboxes/{name}/checkpoints/{id}",
            delete(checkpoints::remove),
        )
        .route(
            "/v1/sandboxes/{name}/checkpoints/{id}/persist",
            post(checkpoints::persist),
        )
        .route(
            "/v1/sandboxes/{name}/checkpoints/{id}/hint",
            post(checkpoints::hint),
        )
        .route("/v1/sandboxes/{name}/rollback", post(checkpoints::rollback))
        .route("/v1/sandboxes/{name}/diff", get(checkpoints::diff))
        .route(
            "/v1/sandboxes/{name}/sessions",
            get(sessions::list).post(sessions::create),
        )
        .route(session, get(sessions::get))
        .route(&under("signal"), post(sessions::signal))
        .route(&under("resize"), post(sessions::resize))
        .route(&under("kill"), post(sessions::kill))
        .route(&under("stdin"), post(sessions::stdin))
        .route(&under("close-stdin"), post(sessions::close_stdin))
        .route(&under("output"), get(sessions::output))
        .route(&under("attach"), get(sessions::attach))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(app.clone(), open_for_work))
        .layer(DefaultBodyLimit::max(MAX_PAYLOAD))
        .with_state(app)
}

async fn open_for_work(State(app): State<App>, request: Request, next: Next) -> Response {
    match app.stop.refuse() {
        Ok(()) => next.run(request).await,
        Err(failure) => failure.into_response(),
    }
}

async fn no_route() -> Failure {
    Failure::new(
        StatusCode::NOT_FOUND,
        "no_route",
        "there is no such path; /v1/openapi.json lists them",
    )
}

async fn no_method() -> Failure {
    Failure::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "no_method",
        "this path does not take that method; /v1/openapi.json lists them",
    )
}

fn checkpoint_id(text: &str) -> Answer<CheckpointId> {
    text.parse().map_err(Failure::invalid)
}

fn session_id(text: &str) -> Answer<SessionId> {
    text.parse().map_err(Failure::invalid)
}
