//! Data types, shapes, buffers and values: what every other room of Cutover speaks in.
//!
//! A [`Tensor`] is contiguous, row-major and immutable once shared; strides exist only inside a backend's lowering.
//! This crate knows no operator, no file format and no device.

mod buffer;
mod dtype;
mod shape;
pub mod small_float;
mod tensor;
mod value;

pub use buffer::{ALIGNMENT, Buffer, StableBytes};
pub use dtype::{DType, Element};
pub use shape::Shape;
pub use tensor::{Tensor, TensorView, TensorViewMut};
pub use value::{MapKeys, Value};

pub use half::{bf16, f16};

/// Why a tensor could not be made or read as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    #[error("expected element type {expected}, got {actual}")]
    DType { expected: DType, actual: DType },
    #[error("shape {shape} of {dtype} needs {expected} bytes, got {actual}")]
    ByteLength { shape: Shape, dtype: DType, expected: usize, actual: usize },
    #[error("shape {shape} of {dtype} is larger than this machine can address")]
    TooLarge { shape: Shape, dtype: DType },
    #[error("there is no memory for shape {shape} of {dtype}")]
    OutOfMemory { shape: Shape, dtype: DType },
    #[error("data of {dtype} starts at an address that is not a multiple of its alignment, {alignment}")]
    Misaligned { dtype: DType, alignment: usize },
    #[error("bytes {start}..{end} lie outside a buffer of {len} bytes")]
    OutOfBounds { start: usize, end: usize, len: usize },
    #[error("cannot see {from} elements as shape {to}")]
    Reshape { from: usize, to: Shape },
}
