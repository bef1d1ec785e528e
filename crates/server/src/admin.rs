//! What changes who serves: deploy, promote, roll back; and feedback, status and history.

use crate::{Body, Failure};
use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    routing::{get, post},
};
use cutover_runtime::{Call, FeedbackError, Host, HostError, Label, StoreError, Strategy};
use serde::Deserialize;
use serde_json::{Value as AnyJson, json};
use std::path::PathBuf;

pub fn routes() -> Router<Host> {
    Router::new()
        .route("/cutover/v1/status", get(status))
        .route("/cutover/v1/call", post(call))
        .route("/cutover/v1/models/{name}/deploy", post(deploy))
        .route("/cutover/v1/models/{name}/promote", post(promote))
        .route("/cutover/v1/models/{name}/rollback", post(rollback))
        .route("/cutover/v1/models/{name}/history", get(history))
        .route("/cutover/v1/models/{name}/checklist", get(checklist))
}

/// Clients may post these wherever they may ask.
pub fn feedback_routes() -> Router<Host> {
    Router::new().route("/cutover/v1/models/{name}/feedback", post(feedback))
}

#[derive(Deserialize)]
struct DeployRequest {
    /// A path on this machine.
    package: PathBuf,
    #[serde(default = "Strategy::canary")]
    strategy: Strategy,
}

/// One label, or many at once.
#[derive(Deserialize)]
#[serde(untagged)]
enum FeedbackRequest {
    Many { labels: Vec<Labelled> },
    One(Labelled),
}

#[derive(Deserialize)]
struct Labelled {
    /// Of the request that was answered.
    id: String,
    label: Classes,
}

/// The right class, or one for each sample of the request.
#[derive(Deserialize)]
#[serde(untagged)]
enum Classes {
    One(u32),
    Many(Vec<u32>),
}

/// All that the command asks for, in one form.
async fn call(State(host): State<Host>, Body(call): Body<Call>) -> Result<Json<AnyJson>, Failure> {
    let answer = tokio::task::spawn_blocking(move || host.call(call)).await;
    let answer = answer.unwrap_or_else(|_| Err("the operation panicked; nothing was changed by it".to_string()));
    answer.map(Json).map_err(|message| Failure::new(StatusCode::CONFLICT, message))
}

async fn status(State(host): State<Host>) -> Json<AnyJson> {
    Json(json!(host.status()))
}

async fn deploy(
    State(host): State<Host>,
    Path(name): Path<String>,
    Body(request): Body<DeployRequest>,
) -> Result<Json<AnyJson>, Failure> {
    let id = blocking(move || host.deploy(&name, &request.package, request.strategy)).await?;
    Ok(Json(json!({ "rollout": id })))
}

async fn promote(State(host): State<Host>, Path(name): Path<String>) -> Result<Json<AnyJson>, Failure> {
    blocking(move || host.promote(&name).map(|()| active(&host, &name))).await.map(Json)
}

async fn rollback(State(host): State<Host>, Path(name): Path<String>) -> Result<Json<AnyJson>, Failure> {
    blocking(move || host.rollback(&name).map(|()| active(&host, &name))).await.map(Json)
}

fn active(host: &Host, name: &str) -> AnyJson {
    let model = host.status().models.into_iter().find(|m| m.name == name);
    json!({ "active": model.map(|m| m.active.version) })
}

async fn history(State(host): State<Host>, Path(name): Path<String>) -> Result<Json<AnyJson>, Failure> {
    let entries = blocking(move || host.history(&name)).await?;
    Ok(Json(json!(entries)))
}

async fn checklist(State(host): State<Host>, Path(name): Path<String>) -> Result<Json<AnyJson>, Failure> {
    let checklist = blocking(move || host.checklist(&name)).await?;
    Ok(Json(json!(checklist)))
}

async fn feedback(
    State(host): State<Host>,
    Path(name): Path<String>,
    Body(request): Body<FeedbackRequest>,
) -> Result<Json<AnyJson>, Failure> {
    let count = |Labelled { id, label }: Labelled| {
        let classes = match label {
            Classes::One(class) => vec![class],
            Classes::Many(classes) => classes,
        };
        host.feedback(&name, &id, &Label { classes })
    };
    match request {
        FeedbackRequest::One(labelled) => {
            count(labelled)?;
            Ok(Json(json!({ "counted": 1, "refused": [] })))
        }
        // Some may be too late while the others count: each is told for itself.
        FeedbackRequest::Many { labels } => {
            let total = labels.len();
            let refused: Vec<String> =
                labels.into_iter().filter_map(|l| count(l).err()).map(|e| e.to_string()).collect();
            Ok(Json(json!({ "counted": total - refused.len(), "refused": refused })))
        }
    }
}

/// Deploying reads files and compiles: not on tokio's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(_) => {
            Err(Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "the operation panicked; nothing was changed by it"))
        }
    }
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Failure {
        let status = match &error {
            HostError::UnknownModel(_) => StatusCode::NOT_FOUND,
            HostError::VersionTaken { .. }
            | HostError::SecurityEpoch { .. }
            | HostError::Busy { .. }
            | HostError::AlreadyServing { .. }
            | HostError::NothingBefore(_)
            | HostError::NoRollout(_)
            | HostError::OnlySequential { .. }
            | HostError::Checklist { .. } => StatusCode::CONFLICT,
            HostError::WrongModel { .. } | HostError::Strategy(_) | HostError::Package(_) => StatusCode::BAD_REQUEST,
            HostError::Admission { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            HostError::Store(StoreError::Quota { .. }) => StatusCode::INSUFFICIENT_STORAGE,
            HostError::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Failure::new(status, error.to_string())
    }
}

impl From<FeedbackError> for Failure {
    fn from(error: FeedbackError) -> Failure {
        let status = match &error {
            FeedbackError::UnknownModel(_) | FeedbackError::UnknownId(_) => StatusCode::NOT_FOUND,
            FeedbackError::Count { .. } => StatusCode::BAD_REQUEST,
        };
        Failure::new(status, error.to_string())
    }
}
