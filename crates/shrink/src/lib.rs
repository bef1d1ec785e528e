//! Smaller models with measured evidence: Graph to Graph, and the training that needs.
//!
//! A transformation ([`half_weights`]) gives a graph that any ONNX engine opens and says what it changed; [`compare()`] then measures both graphs
//! on real inputs. Nothing here decides whether the loss is acceptable: that is the caller's, or a rollout's gates.

mod compare;
mod edit;
mod half;
mod number;
mod observe;
mod pipeline;
pub mod prune;
pub mod quantize;
pub mod recipe;
mod runner;
mod search;
pub mod train;

pub use compare::{Comparison, OutputComparison, compare};
pub use edit::{Product, ProductKind, constant_bytes, plain};
pub use half::{HalfFormat, HalfOptions, HalfReport, Kept, half_weights};

pub use observe::{Observation, Progress, Question, Sample, observe};

pub use pipeline::{
    Budget, CalibratedRange, Data, Evaluation, LayerCost, Method, Quantization, Sensitivity, ShrinkReport, Shrunk,
    Target, evaluate, latencies, shrink,
};

use cutover_backend::{CompileError, ResourceError, RunError};
use cutover_graph::{GraphError, ImportError, onnx::ExportError};

/// Why a model could not be shrunk or measured.
#[derive(Debug, thiserror::Error)]
pub enum ShrinkError {
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error(transparent)]
    Import(#[from] ImportError),
    #[error("constant '{name}': {source}")]
    Tensor { name: String, source: cutover_tensor::TensorError },
    /// A weight that nothing can stand for.
    #[error("weight '{name}': {message}")]
    Weight { name: String, message: String },
    #[error("calibration needs at least one sample, got none")]
    NoSamples,
    #[error("value '{value}' was not observed")]
    NotObserved { value: String },
    #[error("{0}")]
    Option(String),
    #[error("node '{node}' ({op}) can't be trained through: {message}; the model can be quantized all the same")]
    Untrainable { node: String, op: String, message: String },
    #[error("training: {0}")]
    Training(String),
    /// By whoever was told of the progress.
    #[error("training was stopped after step {step}")]
    Stopped { step: usize },
    /// The samples do not fit the model.
    #[error("sample {sample}: {message}")]
    Sample { sample: usize, message: String },
    /// The graphs are not two forms of one model.
    #[error("the graphs to compare differ in their signatures: {0}")]
    Signature(String),
    #[error("step {number} ({name}): {source}")]
    Step { number: usize, name: &'static str, source: Box<ShrinkError> },
    #[error(transparent)]
    Package(#[from] cutover_package::PackageError),
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error(transparent)]
    Resource(#[from] ResourceError),
    #[error("sample {sample}: {source}")]
    Run { sample: usize, source: RunError },
}
