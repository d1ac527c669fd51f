//! The DeltaBox service: HTTP/JSON over a Unix socket in the state directory, and its client.
//!
//! [`server::run`] hosts the sandboxes of one state directory until it is told to stop. [`client::Client`] speaks to
//! it, and [`client::start`] starts one where none runs. The interface is described by the OpenAPI document that the
//! service serves at `/v1/openapi.json`.

pub mod api;
mod app;
mod attach;
pub mod client;
mod expected;
mod failure;
pub mod frame;
mod metrics;
mod routes;
pub mod server;
