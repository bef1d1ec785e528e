//! Errors of backends, by who must act.

use cutover_graph::{Fact, GraphError, OpError};
use cutover_tensor::{DType, Shape};

/// Why a plan could not be compiled.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CompileError {
    #[error("node '{node}' ({op}): {reason}")]
    Unsupported { node: String, op: String, reason: String },
    #[error("{0}")]
    Options(String),
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(transparent)]
    Resource(#[from] ResourceError),
}

/// The device has less than was asked for.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ResourceError {
    #[error("{what} needs {needed} bytes, {available} are available")]
    Memory { what: &'static str, needed: u64, available: u64 },
    #[error("{what}: {message}")]
    System { what: &'static str, message: String },
}

/// Why a run gave no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RunError {
    #[error("{expected} inputs expected, {actual} given")]
    InputCount { expected: usize, actual: usize },
    #[error("{expected} output places expected, {actual} given")]
    OutputCount { expected: usize, actual: usize },
    /// An input contradicts the model's declared type or shape.
    #[error("input '{name}': expected {expected}, got {actual}")]
    Input { name: String, expected: Fact, actual: String },
    /// Two inputs give one symbolic dimension different values.
    #[error(
        "input '{name}' (axis {axis}) makes dimension '{symbol}' {actual}, but it was {earlier} in input '{earlier_name}'"
    )]
    Symbol { name: String, axis: usize, symbol: String, actual: i64, earlier: i64, earlier_name: String },
    /// The caller's buffer for an output is not of the output's type and shape.
    #[error("output '{name}': the result is {dtype} {shape}, the buffer is {actual}")]
    Output { name: String, dtype: DType, shape: Shape, actual: String },
    /// A sequence, map or optional was to be written into a buffer.
    #[error("output '{name}' is a {kind}: only tensors can be written into a buffer, ask for a new value")]
    OutputKind { name: String, kind: String },
    #[error("node '{node}' ({op}): {source}")]
    Op { node: String, op: String, source: OpError },
    /// The backend does not run this node, which only these inputs have shown.
    #[error("node '{node}' ({op}): {reason}")]
    Unsupported { node: String, op: String, reason: String },
    #[error("the deadline passed before node '{node}'")]
    Deadline { node: String },
    #[error("cancelled before node '{node}'")]
    Cancelled { node: String },
    #[error(transparent)]
    Resource(#[from] ResourceError),
    #[error("the device was lost: {0}")]
    DeviceLost(String),
}
