//! The Open Inference Protocol v2: health, metadata, inference.

use crate::{
    Bytes, Failure, parse,
    protocol::{InferRequest, InferResponse, KEYS, OutputTensor, TensorMetadata, datatype},
};
use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    routing::{get, post},
};
use cutover_runtime::{
    Answer, Host, InferError, Request, StreamStep,
    backend::{Binding, Cancellation},
};
use serde_json::{Map, Value as AnyJson, json};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

pub fn routes() -> Router<Host> {
    Router::new()
        .route("/v2", get(server))
        .route("/v2/health/live", get(async || Json(json!({ "live": true }))))
        .route("/v2/health/ready", get(ready))
        .route("/v2/models/{name}", get(model))
        .route("/v2/models/{name}/ready", get(model))
        .route("/v2/models/{name}/infer", post(infer))
        .route("/v2/models/{name}/versions/{version}", get(version))
        .route("/v2/models/{name}/versions/{version}/ready", get(version))
        .route("/v2/models/{name}/versions/{version}/infer", post(infer_version))
}

async fn server() -> Json<AnyJson> {
    Json(json!({ "name": "cutover", "version": env!("CARGO_PKG_VERSION"), "extensions": ["cutover_feedback"] }))
}

async fn ready(State(host): State<Host>) -> Json<AnyJson> {
    let models: Vec<String> = host.status().models.into_iter().map(|m| m.name).collect();
    Json(json!({ "ready": true, "models": models }))
}

async fn model(State(host): State<Host>, Path(name): Path<String>) -> Result<Json<AnyJson>, Failure> {
    metadata(&host, &name, None)
}

async fn version(
    State(host): State<Host>,
    Path((name, version)): Path<(String, String)>,
) -> Result<Json<AnyJson>, Failure> {
    metadata(&host, &name, Some(&version))
}

fn metadata(host: &Host, name: &str, version: Option<&str>) -> Result<Json<AnyJson>, Failure> {
    let (_, signature) = host.signature(name, version)?;
    let of = |bindings: &[Binding]| bindings.iter().flat_map(tensor_metadata).collect::<Vec<_>>();
    Ok(Json(json!({
        "name": name,
        "versions": host.versions(name)?,
        "platform": "cutover",
        "ready": true,
        "inputs": of(&signature.inputs),
        "outputs": of(&signature.outputs),
    })))
}

/// The tensors that an input or output is: maps, and sequences of them, are their values and their keys.
fn tensor_metadata(binding: &Binding) -> Vec<TensorMetadata> {
    if let Some((key, value)) = binding.table() {
        let name = binding.name.clone();
        let values = TensorMetadata { name: name.clone(), datatype: datatype(value), shape: vec![-1, -1] };
        return vec![values, TensorMetadata { name: name + KEYS, datatype: datatype(key), shape: vec![-1] }];
    }
    let fact = binding.fact.as_tensor();
    vec![TensorMetadata {
        name: binding.name.clone(),
        datatype: fact.map_or("unknown", |f| datatype(f.dtype)),
        shape: fact
            .and_then(|f| f.shape.as_ref())
            .map(|dims| dims.iter().map(|d| d.as_const().unwrap_or(-1)).collect())
            .unwrap_or_default(),
    }]
}

async fn infer(
    State(host): State<Host>,
    Path(name): Path<String>,
    Bytes(body): Bytes,
) -> Result<Json<InferResponse>, Failure> {
    answer(host, name, None, body).await
}

async fn infer_version(
    State(host): State<Host>,
    Path((name, version)): Path<(String, String)>,
    Bytes(body): Bytes,
) -> Result<Json<InferResponse>, Failure> {
    answer(host, name, Some(version), body).await
}

async fn answer(
    host: Host,
    name: String,
    version: Option<String>,
    body: bytes::Bytes,
) -> Result<Json<InferResponse>, Failure> {
    let bad = |message: String| Failure::new(StatusCode::BAD_REQUEST, message);
    let request: InferRequest = parse(&body)?;
    let inputs = request.inputs.iter().map(|input| input.decode()).collect::<Result<_, _>>().map_err(bad)?;
    let parameter = |key: &str| request.parameters.get(key);
    let deadline = match parameter("timeout") {
        None => None,
        // Microseconds, as in Triton.
        Some(us) => match us.as_u64().and_then(|us| Instant::now().checked_add(Duration::from_micros(us))) {
            Some(deadline) => Some(deadline),
            None => return Err(bad(format!("parameter 'timeout' is {us}, expected a number of microseconds"))),
        },
    };
    let cancellation = CancelOnDrop::default();
    let request = Request {
        id: request.id,
        key: parameter("cutover_key").and_then(AnyJson::as_str).map(str::to_string),
        version,
        inputs,
        outputs: request.outputs.map(|outputs| outputs.into_iter().map(|o| o.name).collect()),
        deadline,
        cancellation: Some(Arc::clone(&cancellation.0)),
        stream: stream(&request.parameters).map_err(bad)?,
    };
    drop(body);
    let (sender, receiver) = oneshot::channel();
    host.submit(&name, request, move |answer| drop(sender.send(answer)));
    let Answer { id, version, outputs, .. } = receiver.await.unwrap_or(Err(InferError::ShuttingDown))?;
    let outputs: Result<Vec<_>, _> =
        outputs.iter().map(|(name, value)| OutputTensor::encode_all(name, value)).collect();
    let outputs = outputs.map_err(|message| Failure::new(StatusCode::NOT_IMPLEMENTED, message))?;
    let outputs = outputs.into_iter().flatten().collect();
    Ok(Json(InferResponse { model_name: name, model_version: version, id, outputs }))
}

/// A client that hangs up takes its request with it, at the next node of the model or while it waits.
#[derive(Default)]
struct CancelOnDrop(Arc<Cancellation>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// The stream of a request, by the parameters of Triton's sequence extension: `sequence_id`, `sequence_start`, `sequence_end`.
fn stream(parameters: &Map<String, AnyJson>) -> Result<Option<StreamStep>, String> {
    let flag = |key: &str| match parameters.get(key) {
        None => Ok(false),
        Some(value) => value.as_bool().ok_or_else(|| format!("parameter '{key}' is {value}, expected true or false")),
    };
    let id = match parameters.get("sequence_id") {
        None => return Ok(None),
        Some(AnyJson::String(id)) => id.clone(),
        Some(AnyJson::Number(number)) => number.to_string(),
        Some(other) => return Err(format!("parameter 'sequence_id' is {other}, expected a text or a number")),
    };
    Ok(Some(StreamStep { id, start: flag("sequence_start")?, end: flag("sequence_end")? }))
}

impl From<InferError> for Failure {
    fn from(error: InferError) -> Failure {
        let status = match &error {
            InferError::UnknownModel(_) | InferError::UnknownVersion { .. } => StatusCode::NOT_FOUND,
            InferError::Input(_) => StatusCode::BAD_REQUEST,
            InferError::Overloaded { .. }
            | InferError::TooManyStreams { .. }
            | InferError::Outage { .. }
            | InferError::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
            InferError::Deadline | InferError::Cancelled => StatusCode::GATEWAY_TIMEOUT,
            InferError::StreamRestart { .. } => StatusCode::CONFLICT,
            InferError::Failed { .. } | InferError::Crashed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Failure::new(status, error.to_string())
    }
}
