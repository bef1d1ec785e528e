//! Errors of this crate, by who must act.

use cutover_backend::{CompileError, ResourceError, RunError};
use cutover_graph::{GraphError, ImportError, onnx::ExportError};
use cutover_package::{PackageError, input::InputError};

/// What keeps a host from doing as it was told. Whatever was served before is still served.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("there is no model '{0}'")]
    UnknownModel(String),
    #[error("the package is of model '{package}', it was to be deployed as '{asked}'")]
    WrongModel { asked: String, package: String },
    #[error("model '{model}': a rollout of version {candidate} is under way; promote it or roll it back first")]
    Busy { model: String, candidate: String },
    #[error("model '{model}': version {version} is in service already")]
    AlreadyServing { model: String, version: String },
    #[error("model '{model}': another version is called {version} already; give this one a name of its own")]
    VersionTaken { model: String, version: String },
    #[error("model '{model}': version {version} has security epoch {package}, the version in service has {device}")]
    SecurityEpoch { model: String, version: String, package: u64, device: u64 },
    #[error("model '{0}': there is no earlier version to go back to")]
    NothingBefore(String),
    #[error("model '{0}': no rollout is under way")]
    NoRollout(String),
    #[error("version {version} of model '{model}' was not admitted: {source}")]
    Admission { model: String, version: String, source: AdmissionError },
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the strategy: {0}")]
    Strategy(String),
    #[error(
        "version {version} of model '{model}' does not fit beside the one in service ({needed} bytes beside {resident}, and the budget is \
         {budget}); deploying it as 'sequential' unloads the one in service first, for about {outage_s:.1} s without answers"
    )]
    OnlySequential { model: String, version: String, needed: u64, resident: u64, budget: u64, outage_s: f64 },
    #[error("version {version} of model '{model}' lacks what its checklist requires: {missing}")]
    Checklist { model: String, version: String, missing: String },
}

/// Why a version may not take traffic on this device.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    #[error(transparent)]
    Import(#[from] ImportError),
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error("no backend compiles it: {0}")]
    Compile(#[from] CompileError),
    #[error(transparent)]
    Resource(#[from] ResourceError),
    #[error("needs {needed} bytes beside the {resident} in use, and the budget is {budget}")]
    Memory { needed: u64, resident: u64, budget: u64 },
    #[error("its inputs or outputs differ from those of the version in service: {0}")]
    Signature(String),
    #[error("golden vectors: {0}")]
    Golden(String),
    #[error("a request takes {median_ms:.3} ms here, and the package allows {limit_ms:.3} ms")]
    Latency { median_ms: f64, limit_ms: f64 },
    #[error(transparent)]
    Package(#[from] PackageError),
}

/// What is wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot read or write {path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error("the store at {path} is held by another process{holder}")]
    Held { path: String, holder: String },
    #[error(
        "the store at {path} is of format {found}, this build reads up to {newest}: it was written by newer software"
    )]
    Format { path: String, found: u64, newest: u64 },
    #[error("the store's state: {0}")]
    State(String),
    #[error("{needed} bytes are to be written beside the {stored} that the store has, and its quota is {quota}")]
    Quota { needed: u64, stored: u64, quota: u64 },
    #[error("object {digest} in the store is damaged: {message}")]
    Damaged { digest: String, message: String },
    #[error(transparent)]
    Input(#[from] InputError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error(transparent)]
    Import(#[from] ImportError),
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum InferError {
    #[error("there is no model '{0}'")]
    UnknownModel(String),
    #[error("model '{model}' has no version '{version}' in service")]
    UnknownVersion { model: String, version: String },
    /// The caller's inputs do not fit the model.
    #[error("{0}")]
    Input(String),
    #[error("too many requests are waiting ({waiting}, the limit)")]
    Overloaded { waiting: usize },
    #[error("the deadline passed")]
    Deadline,
    #[error("it was cancelled")]
    Cancelled,
    /// The caller's state is of a version that no longer answers: begin the stream again, with fresh state.
    #[error("stream '{stream}' must be started again: {reason}")]
    StreamRestart { stream: String, reason: String },
    #[error("{open} streams are open (the limit)")]
    TooManyStreams { open: usize },
    /// Announced before it began: the model's next version does not fit beside the one in service.
    #[error("model '{model}' is being replaced by version {version}, which takes about {expected_s:.1} s")]
    Outage { model: String, version: String, expected_s: f64 },
    /// The version could not compute an answer.
    #[error("version {version}: {message}")]
    Failed { version: String, message: String },
    /// It panicked, or lost its device.
    #[error("version {version} crashed: {message}")]
    Crashed { version: String, message: String },
    #[error("the host is shutting down")]
    ShuttingDown,
}

impl InferError {
    /// Whether the caller must change the request.
    pub fn is_callers(&self) -> bool {
        matches!(self, InferError::UnknownModel(_) | InferError::UnknownVersion { .. } | InferError::Input(_))
    }

    /// Whether the version is to blame, and another might answer.
    pub(crate) fn is_versions(&self) -> bool {
        matches!(self, InferError::Failed { .. } | InferError::Crashed { .. })
    }

    pub(crate) fn of_run(error: RunError, version: &str) -> InferError {
        match error {
            RunError::InputCount { .. } | RunError::Input { .. } | RunError::Symbol { .. } => {
                InferError::Input(error.to_string())
            }
            RunError::Deadline { .. } => InferError::Deadline,
            RunError::Cancelled { .. } => InferError::Cancelled,
            RunError::DeviceLost(_) => InferError::Crashed { version: version.to_string(), message: error.to_string() },
            other => InferError::Failed { version: version.to_string(), message: other.to_string() },
        }
    }
}

/// Why a label was not counted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FeedbackError {
    #[error("there is no model '{0}'")]
    UnknownModel(String),
    #[error("no recent answer has id '{0}'")]
    UnknownId(String),
    #[error("the answer '{id}' has {classes} classes, {labels} labels came")]
    Count { id: String, classes: usize, labels: usize },
}
