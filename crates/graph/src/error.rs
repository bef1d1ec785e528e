//! Errors of this crate, by who must act.

use cutover_tensor::TensorError;

/// What an operator says of its attributes or inputs; whoever runs it adds the node's name.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OpError {
    /// The model or the caller gave an input or attribute that the operator's definition does not admit.
    #[error("{0}")]
    Input(String),
    /// Valid ONNX that this build does not compute.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// Larger than a limit or than memory.
    #[error("resource limit: {0}")]
    Resource(String),
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

impl OpError {
    pub fn input(message: impl Into<String>) -> OpError {
        OpError::Input(message.into())
    }

    pub fn unsupported(message: impl Into<String>) -> OpError {
        OpError::Unsupported(message.into())
    }
}

/// A graph that breaks one of its rules, with the node that does.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GraphError {
    #[error("node '{node}' ({op}): {source}")]
    Op { node: String, op: String, source: OpError },
    #[error("the graph has a cycle through node '{node}'")]
    Cycle { node: String },
    #[error("{rule}: {detail}")]
    Rule { rule: &'static str, detail: String },
    #[error("pass '{pass}' broke the graph at its step {step}: {source}")]
    Pass { pass: String, step: usize, source: Box<GraphError> },
}

/// Why a file is not a model that can be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error("cannot read {path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error("not a valid ONNX file: {0}")]
    Decode(String),
    /// Contradicts itself or its own sizes; `place` names the node, op or tensor.
    #[error("{place}: {message}")]
    Corrupt { place: String, message: String },
    #[error("node '{node}': operator {op} (opset {opset}) is not supported{hint}")]
    UnknownOp { node: String, op: String, opset: i64, hint: String },
    #[error("{place}: not supported: {message}")]
    Unsupported { place: String, message: String },
    /// Above one of the importer's limits.
    #[error("{place}: {what} is {actual}, above the limit of {limit}")]
    Limit { place: String, what: &'static str, actual: u64, limit: u64 },
    #[error(transparent)]
    Graph(#[from] GraphError),
}
