//! CPU kernels, one file per family, written once over [`isa::Isa`] and compiled for every rung of the dispatch ladder.
//!
//! # How to call them
//!
//! Every kernel takes an [`IsaLevel`] first: [`IsaLevel::detect`] gives the best one, [`IsaLevel::available`] all that the
//! machine can run. Memory comes from the caller, workspaces too (each family has a `*_workspace_len` in `f32` elements).
//! Inputs are slices, the output is an [`Output`], which threads may alias as long as they write different elements.
//!
//! Large kernels compute a *range of outputs* (rows, panels, or *units* numbered from 0). The value of an output never
//! depends on how the ranges were cut: every sum is one chain in an order that the shape and the ISA fix. So any split
//! over threads, and any batch, gives the same bits.
//!
//! # Layouts
//!
//! Row-major `NCHW`, and `NCHW16c` ([`layout`]): `[ceil(C/16)][H][W][16]` per image, on every ISA. Lanes past the last
//! channel are *padding*: kernels may leave anything there, and none lets them reach a real channel.
//!
//! # What is deliberately absent
//!
//! Threads, shape inference, broadcasting rules, choice of algorithm. A misuse (a slice too short, a range outside its
//! limits) is a fault of the calling backend and panics at entry.
#![allow(unsafe_code)]
// Register tiles are arrays of arrays walked by constant bounds, several at once: iterators would hide what unrolls.
#![allow(clippy::needless_range_loop)]

pub mod bf16;
pub mod conv;
pub mod conv_first;
pub mod depthwise;
pub mod dispatch;
pub mod elementwise;
pub mod epilogue;
pub mod expanded;
pub mod gemm;
pub mod half;
pub mod isa;
pub mod layout;
pub mod movement;
pub mod nbits;
pub mod normalize;
mod pointwise;
pub mod pool;
pub mod quantized;
pub mod quantized_depthwise;
pub mod quantized_product;
pub mod recurrent;
pub mod reduce;
pub mod roofline;
pub mod rows;
pub mod sampling;
mod tile;
pub mod trees;
pub mod typed;
pub mod unfold;
pub mod vmath;
mod window;
pub mod winograd;

pub use dispatch::IsaLevel;
pub use epilogue::{Activation, Output, Residual};

/// Channels in a block of the `NCHW16c` layout, on every ISA.
pub const BLOCK: usize = 16;

#[cfg(test)]
mod testing;
