//! The Open Inference Protocol v2: health, metadata, inference.

use crate::{
    Body, Failure,
    protocol::{InferRequest, InferResponse, OutputTensor, TensorMetadata, datatype},
};
use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    routing::{get, post},
};
use cutover_runtime::{Answer, Host, InferError, Request, backend::Binding};
use serde_json::{Value as AnyJson, json};
use tokio::sync::oneshot;

pub fn routes() -> Router<Host> {
    Router::new()
        .route("/v2", get(server))
        .route("/v2/health/live", get(async || Json(json!({ "live": true }))))
        .route("/v2/health/ready", get(ready))
        .route("/v2/models/{name}", get(model))
        .route("/v2/models/{name}/ready", get(model_ready))
        .route("/v2/models/{name}/infer", post(infer))
        .route("/v2/models/{name}/versions/{version}", get(version))
        .route("/v2/models/{name}/versions/{version}/ready", get(version_ready))
        .route("/v2/models/{name}/versions/{version}/infer", post(infer_version))
}

async fn server() -> Json<AnyJson> {
    Json(json!({ "name": "cutover", "version": env!("CARGO_PKG_VERSION"), "extensions": ["cutover_feedback"] }))
}
