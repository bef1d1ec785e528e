//! Weights that are held in 16 bits (`--precision bf16`, `f16`): which ones, how they are packed, and how a step gets them back as the f32s that
//! its kernel reads; and what is computed with in bfloat16, where the processor multiplies pairs of it.
//!
//! A worker widens as much as one call of the kernel reads, in its workspace: a few panels of a product, one block of outputs of a convolution.

use crate::cpu::{
    frame::{Buffer, Frame},
    plan::Builder,
};
use cutover_graph::ValueId;
use cutover_kernels::cpu::{
    IsaLevel,
    conv::Operands,
    half::{self, HalfType},
};

/// Constants of fewer elements stay f32: they weigh nothing.
const LEAST_ELEMENTS: usize = 1024;

/// The type that the constant `id` is held in, if not f32: what was asked for, unless a weight would become infinite.
pub(super) fn of_weights(builder: &Builder<'_>, id: ValueId) -> Option<HalfType> {
    let (of, tensor) = (builder.half?, &builder.constant(id)?.tensor);
    let (floats, _) = tensor.bytes().as_chunks();
    let is_held = floats.len() >= LEAST_ELEMENTS && floats.iter().all(|&bytes| of.holds(f32::from_ne_bytes(bytes)));
    is_held.then_some(of)
}

/// What a convolution with the weights `id` has its operands in.
pub(super) fn operands(builder: &Builder<'_>, id: ValueId) -> Operands {
    match of_weights(builder, id) {
        Some(HalfType::Bf16) if builder.device.level.has_bf16() => Operands::Bf16,
        _ => Operands::F32,
    }
}

/// Floats of memory for so many halves.
pub(super) fn len_in_floats(halves: usize) -> usize {
    halves.div_ceil(2)
}

/// As part of a recipe.
pub(super) fn name(of: Option<HalfType>) -> &'static str {
    match of {
        None => "f32",
        Some(HalfType::F16) => "f16",
        Some(HalfType::Bf16) => "bf16",
    }
}

/// Halves `start ..` of packed weights from as many floats.
pub(super) fn narrow(level: IsaLevel, of: HalfType, from: &[f32], packed: &mut [f32], start: usize) {
    half::narrow(level, of, from, &mut bytemuck::cast_slice_mut(packed)[start..][..from.len()]);
}

/// Halves `start ..` of packed weights as the floats `to`.
pub(super) fn widen(level: IsaLevel, of: HalfType, frame: &Frame<'_>, packed: Buffer, start: usize, to: &mut [f32]) {
    half::widen(level, of, &frame.words::<u16>(packed)[start..][..to.len()], to);
}
