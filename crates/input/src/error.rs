//! What is wrong with raw samples, or with what says how they become inputs.

use cutover_tensor::TensorError;

/// Why raw samples are no inputs of a model.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error("preprocessing of input '{input}': {message}")]
    Description { input: String, message: String },
    #[error("the model's inputs are made of {what}, and this build has no feature `{feature}`")]
    Feature { what: &'static str, feature: &'static str },
    #[error("texts need a tokenizer.json, and the model comes without one")]
    NoTokenizer,
    #[error("tokenizer.json: {0}")]
    Tokenizer(String),
    #[error("'{name}' is nothing that inputs are made of here: {names}")]
    Unknown { name: String, names: String },
    #[error("'{0}' holds no sample")]
    Empty(String),
    /// `number` counts from 1.
    #[error("sample {number} of '{name}': {message}")]
    Sample { name: String, number: usize, message: String },
    #[error(transparent)]
    Tensor(#[from] TensorError),
}
