//! ONNX files: import into a [`Graph`](crate::Graph), and export of one.
//!
//! A file is hostile until it is read: sizes are compared with what is really there before anything is allocated for them,
//! and every error names the node, operator or tensor it is about. A model's own functions are inlined, gradients written out, and sparse
//! tensors read dense.

mod export;
mod gradient;
#[cfg(test)]
mod hostile;
mod import;
mod mapping;
mod order;
mod proto;
pub mod safetensors;
mod tensors;
mod types;
mod values;

pub use export::{ExportError, Weights, encode, encode_with, export};
pub use import::{
    ImportOptions, Limits, NEWEST_OPSET, OLDEST_OPSET, files, import, import_bytes, import_files, imported_opsets,
};
pub use values::read_value;
