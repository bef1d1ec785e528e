//! Quantization after training: a float graph to a standard one that computes with integers, or keeps its weights as such.
//!
//! All transformations start from a [`crate::plain`] graph and give one that any ONNX engine opens: `QuantizeLinear` and
//! `DequantizeLinear` around operators ([`quantize_static`]), `DynamicQuantizeLinear` with `MatMulInteger` ([`quantize_dynamic`]), or
//! `MatMulNBits` and `GatherBlockQuantized` of ONNX Runtime's domain ([`quantize_weights`]). [`smooth`], [`equalize`] and [`correct_bias`]
//! change the float graph first, so that less is lost.

mod affine;
mod balance;
mod bias;
mod blocks;
mod dynamic;
mod gptq;
mod qdq;
mod range;

pub use affine::{ActivationType, Affine, Channels, QuantizedWeight, WeightRange};
pub use balance::{equalize, smooth};
pub use bias::correct_bias;
pub use blocks::{BlockOptions, quantize_weights};
pub use dynamic::{DynamicOptions, quantize_dynamic};
#[cfg_attr(not(feature = "train"), expect(unused_imports, reason = "training alone looks at it from outside"))]
pub(crate) use qdq::Placement;
pub use qdq::{StaticOptions, quantize_static, static_questions};
pub use range::{Calibration, Range};

/// What a transformation did to a graph.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QuantizeReport {
    /// Names of the nodes that compute with integers now, or read integer weights.
    pub quantized: Vec<String>,
    /// Nodes that could have been, and why they were not.
    pub kept: Vec<crate::Kept>,
    /// Bytes of all constants.
    pub bytes_before: u64,
    pub bytes_after: u64,
}
