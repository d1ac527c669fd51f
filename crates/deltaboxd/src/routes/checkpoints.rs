//! Checkpoints: made, listed, compared, returned to, forgotten.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use deltabox::{CheckpointReport, Difference, Host, LayerReport, RollbackReport, Tree};
use serde::Deserialize;

use super::checkpoint_id;
use super::extract::{At, Body, Params};
use crate::api::{CheckpointRequest, HintReport, HintRequest, RollbackRequest};
use crate::app::App;
use crate::failure::Answer;

pub(super) async fn tree(
    State(app): State<App>,
    At(name): At<String>,
    headers: HeaderMap,
) -> Answer<Json<Tree>> {
    app.ask("tree", name, &headers, Host::tree).await.map(Json)
}

pub(super) async fn create(
    State(app): State<App>,
    At(name): At<String>,
    headers: HeaderMap,
    Body(request): Body<CheckpointRequest>,
) -> Answer<(StatusCode, Json<CheckpointReport>)> {
    let report = app
        .call_on_running("checkpoint", name, &headers, move |sandbox| {
            match request.durable {
                true => sandbox.checkpoint_durable(request.message),
                false => sandbox.checkpoint(request.message),
            }
        })
        .await?;
    app.metrics.checkpoint_stop(report.stop);
    Ok((StatusCode::CREATED, Json(report)))
}

pub(super) async fn remove(
    State(app): State<App>,
    At((name, id)): At<(String, String)>,
    headers: HeaderMap,
) -> Answer<StatusCode> {
    let id = checkpoint_id(&id)?;
    app.call_on("delete", name, &headers, move |sandbox| sandbox.delete(id))
        .await
        .map(|()| StatusCode::NO_CONTENT)
}

pub(super) async fn persist(
    State(app): State<App>,
    At((name, id)): At<(String, String)>,
    headers: HeaderMap,
) -> Answer<StatusCode> {
    let id = checkpoint_id(&id)?;
    app.call_on("persist", name, &headers, move |sandbox| {
        sandbox.persist(id)
    })
    .await
    .map(|()| StatusCode::NO_CONTENT)
}

pub(super) async fn hint(
    State(app): State<App>,
    At((name, id)): At<(String, String)>,
    headers: HeaderMap,
    Body(request): Body<HintRequest>,
) -> Answer<Json<HintReport>> {
    let id = checkpoint_id(&id)?;
    let hint = move |host: &Host, name: &str| {
        if let Some(forks) = request.forks {
            host.expect_forks(name, id, forks)?;
        }
        let template = match request.pin {
            Some(pinned) => host.pin_template(name, id, pinned)?,
            None => host.has_template(id),
        };
        Ok(HintReport { template })
    };
    app.ask("hint", name, &headers, hint).await.map(Json)
}

pub(super) async fn rollback(
    State(app): State<App>,
    At(name): At<String>,
    headers: HeaderMap,
    Body(request): Body<RollbackRequest>,
) -> Answer<Json<RollbackReport>> {
    app.call_on("rollback", name, &headers, move |sandbox| {
        sandbox.rollback(request.checkpoint)
    })
    .await
    .map(Json)
}

#[derive(Deserialize)]
pub(super) struct Which {
    sandbox: Option<String>,
    #[serde(default)]
    verify: bool,
}

pub(super) async fn layers(
    State(app): State<App>,
    Params(which): Params<Which>,
) -> Answer<Json<Vec<LayerReport>>> {
    app.call("layers", move |host| {
        host.layers(which.sandbox.as_deref(), which.verify)
    })
    .await
    .map(Json)
}

#[derive(Deserialize)]
pub(super) struct Between {
    from: String,
    to: String,
}

pub(super) async fn diff(
    State(app): State<App>,
    At(name): At<String>,
    headers: HeaderMap,
    Params(between): Params<Between>,
) -> Answer<Json<Difference>> {
    let (from, to) = (checkpoint_id(&between.from)?, checkpoint_id(&between.to)?);
    app.call_on("diff", name, &headers, move |sandbox| {
        sandbox.diff(from, to)
    })
    .await
    .map(Json)
}
