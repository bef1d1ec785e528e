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

/// How weights are held and computed with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::cpu) enum Form {
    F32,
    /// In 16 bits, widened a piece at a time.
    Half(HalfType),
    /// In bfloat16, by the pair, as they are multiplied.
    Pairs,
}

impl Form {
    /// What a convolution has its operands in.
    pub fn operands(self) -> Operands {
        if self == Form::Pairs { Operands::Bf16 } else { Operands::F32 }
    }

    /// As part of a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Form::F32 => "f32",
            Form::Half(HalfType::F16) => "f16",
            Form::Half(HalfType::Bf16) | Form::Pairs => "bf16",
        }
    }
}

/// The form of the constant `id`: what was asked for, unless a weight would become infinite. Looks at every element.
pub(super) fn form(builder: &Builder<'_>, id: ValueId) -> Form {
    let (Some(of), Some(constant)) = (builder.half, builder.constant(id)) else { return Form::F32 };
    let (floats, _) = constant.tensor.bytes().as_chunks();
    if floats.len() < LEAST_ELEMENTS || !floats.iter().all(|&bytes| of.holds(f32::from_ne_bytes(bytes))) {
        return Form::F32;
    }
    match of {
        HalfType::Bf16 if builder.device.level.has_bf16() => Form::Pairs,
        of => Form::Half(of),
    }
}

/// Floats of memory for so many halves.
pub(super) fn len_in_floats(halves: usize) -> usize {
    halves.div_ceil(2)
}

/// Halves `start ..` of packed weights from as many floats.
pub(super) fn narrow(level: IsaLevel, of: HalfType, from: &[f32], packed: &mut [f32], start: usize) {
    half::narrow(level, of, from, &mut bytemuck::cast_slice_mut(packed)[start..][..from.len()]);
}

/// Halves `start ..` of packed weights as the floats `to`.
pub(super) fn widen(level: IsaLevel, of: HalfType, frame: &Frame<'_>, packed: Buffer, start: usize, to: &mut [f32]) {
    half::widen(level, of, &frame.words::<u16>(packed)[start..][..to.len()], to);
}
