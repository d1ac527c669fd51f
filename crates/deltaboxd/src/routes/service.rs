//! The service itself.

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use deltabox::{Feature, Host};

use crate::api::{ReadyInfo, ServiceInfo};
use crate::app::App;
use crate::failure::Answer;

pub(super) async fn version(State(app): State<App>) -> Json<ServiceInfo> {
    Json(ServiceInfo::clone(&app.info))
}

pub(super) async fn stop(State(app): State<App>) -> StatusCode {
    app.stop.request();
    StatusCode::ACCEPTED
}

pub(super) async fn doctor(State(app): State<App>) -> Answer<Json<Vec<Feature>>> {
    app.call("doctor", |_| Ok(Host::doctor())).await.map(Json)
}

pub(super) async fn metrics(State(app): State<App>) -> Answer<impl IntoResponse> {
    let look = |host: &Host| {
        let forks = (host.warm(), host.templates());
        Ok((host.infos(), forks, host.compaction()))
    };
    let (sandboxes, (warm, templates), compaction) = app.call("list", look).await?;
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    let text = (app.metrics).render(&sandboxes, &warm, &templates, &compaction);
    Ok((kind, text))
}

pub(super) async fn ready(State(app): State<App>) -> Answer<Json<ReadyInfo>> {
    let look = |host: &Host| {
        Ok(ReadyInfo {
            warm: host.warm(),
            templates: host.templates(),
        })
    };
    app.call("ready", look).await.map(Json)
}

pub(super) async fn openapi() -> impl IntoResponse {
    let kind = [(header::CONTENT_TYPE, "application/json")];
    (kind, include_str!("../openapi.json"))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    #[test]
    fn every_reference_in_the_openapi_document_leads_somewhere() {
        let document: Value = serde_json::from_str(include_str!("../openapi.json")).unwrap();
        let mut pending = vec![&document];
        while let Some(value) = pending.pop() {
            match value {
                Value::Object(map) => {
                    if let Some(Value::String(reference)) = map.get("$ref") {
                        let pointer = reference.strip_prefix('#').unwrap();
                        assert!(document.pointer(pointer).is_some(), "{reference}");
                    }
                    pending.extend(map.values());
                }
                Value::Array(items) => pending.extend(items),
                _ => {}
            }
        }
    }
}
