//! Sandboxes.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use deltabox::{Host, Sandbox, SandboxInfo, SandboxSpec};

use super::extract::{At, Body};
use crate::api::ForkRequest;
use crate::app::{App, check_epoch, expected_epoch};
use crate::failure::Answer;

pub(super) async fn list(State(app): State<App>) -> Answer<Json<Vec<SandboxInfo>>> {
    app.call("list", |host| Ok(host.infos())).await.map(Json)
}

pub(super) async fn create(
    State(app): State<App>,
    Body(spec): Body<SandboxSpec>,
) -> Answer<(StatusCode, Json<SandboxInfo>)> {
    app.call("create", move |host| Ok(host.create(spec)?.info()))
        .await
        .map(|info| (StatusCode::CREATED, Json(info)))
}

pub(super) async fn get(
    State(app): State<App>,
    At(name): At<String>,
    headers: HeaderMap,
) -> Answer<Json<SandboxInfo>> {
    app.ask("inspect", name, &headers, Host::info)
        .await
        .map(Json)
}

pub(super) async fn remove(
    State(app): State<App>,
    At(name): At<String>,
    headers: HeaderMap,
) -> Answer<StatusCode> {
    app.ask("remove", name, &headers, Host::remove)
        .await
        .map(|()| StatusCode::NO_CONTENT)
}

pub(super) async fn stop(
    State(app): State<App>,
    At(name): At<String>,
    headers: HeaderMap,
) -> Answer<Json<SandboxInfo>> {
    app.call_on("stop", name, &headers, |sandbox: &Sandbox| {
        sandbox.stop()?;
        Ok(sandbox.info())
    })
    .await
    .map(Json)
}

pub(super) async fn fork(
    State(app): State<App>,
    At(name): At<String>,
    headers: HeaderMap,
    Body(request): Body<ForkRequest>,
) -> Answer<(StatusCode, Json<Vec<SandboxInfo>>)> {
    let expected = expected_epoch(&headers)?;
    app.call("fork", move |host| {
        check_epoch(&*host.get(&name)?, expected)?;
        let ForkRequest {
            checkpoint,
            n,
            names,
            seed_rng,
        } = request;
        let forks = host.fork_as(&name, checkpoint, n, &names, seed_rng)?;
        Ok(forks.iter().map(|sandbox| sandbox.info()).collect())
    })
    .await
    .map(|infos| (StatusCode::CREATED, Json(infos)))
}
