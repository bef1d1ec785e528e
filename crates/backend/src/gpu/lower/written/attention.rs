//! Attention without a matrix of scores.

use super::{
    super::super::{
        code::{self, Operand, Text},
        plan::{BufferId, Builder, Written},
    },
    Names, only, stored,
};
use crate::{Precision, Work};
use cutover_kernels::cuda::{self, Element};
use cutover_tensor::DType;

const ATTENTION: Names = Names {
    full: "attention by hand",
    tf32: "attention by hand",
    f16: "attention by hand, f16",
    bf16: "attention by hand, bf16",
};

/// An attention over `batch`, at most two axes of it.
pub(in super::super) struct Attention<'a> {
    pub batch: &'a [usize],
    pub queries: usize,
    pub keys: usize,
    /// Elements of a row of the queries and keys, and of the values and the result.
    pub depth: usize,
    pub width: usize,
    pub scale: f32,
    /// Queries, keys, values.
    pub factors: [Rows<'a>; 3],
    /// What is added to the scores, a row for each query.
    pub mask: Option<Rows<'a>>,
    pub to: BufferId,
    /// Of the result: where each axis of the batch begins, and its rows.
    pub strides: (&'a [usize], usize),
    pub dtype: DType,
    pub work: Work,
}

/// Matrices whose rows lie together.
#[derive(Clone, Copy)]
pub(in super::super) struct Rows<'a> {
    pub operand: &'a Operand,
    /// By axis of the batch.
    pub batch: &'a [usize],
    pub row: usize,
}

/// Where batch, head and row are; no batch is one.
fn strides(batch: &[usize], row: usize) -> cuda::Strides {
    match *batch {
        [] => [0, 0, row],
        [head] => [0, head, row],
        [batch, head, ..] => [batch, head, row],
    }
}

pub(in super::super) fn attention(b: &mut Builder<'_>, of: &Attention<'_>) -> bool {
    let &Attention { batch, queries, keys, depth, width, scale, ref factors, mask, to, .. } = of;
    let (Some(device), Some(memory)) = (b.gpu.written, stored(of.dtype)) else { return false };
    let extents = match *batch {
        [] => [1, 1],
        [heads] => [1, heads],
        [batch, heads] => [batch, heads],
        _ => return false,
    };
    let mut inputs = Vec::new();
    for rows in factors {
        match rows.operand {
            Operand::Buffer(buffer, dtype) if *dtype == of.dtype => inputs.push(*buffer),
            _ => return false,
        }
    }
    let mut text = Text::default();
    let mut functions = "fn finish(i: u32, channel: u32, x: f32) -> f32 { return x; }\n".to_string();
    if let Some(mask) = mask {
        let [of_batch, of_head, of_row] = strides(mask.batch, mask.row);
        let at = code::position(&[of_batch, of_head, of_row, 1], 0, "a");
        functions += &format!(
            "fn mask_at(a0: u32, a1: u32, a2: u32, a3: u32) -> f32 {{ return {}({at}); }}\n",
            text.function(mask.operand)
        );
    }
    let kernel = |element: Element, functions: cuda::Functions| cuda::Attention {
        batch: extents[0],
        heads: extents[1],
        // Heads that share keys have them at the same place.
        key_heads: extents[1],
        queries,
        keys,
        depth,
        width,
        strides: factors.map(|rows| strides(rows.batch, rows.row)),
        output_strides: strides(of.strides.0, of.strides.1),
        scale,
        causal_offset: None,
        has_mask: mask.is_some(),
        element,
        memory,
        functions,
    };
    // On tensor cores where less than f32 is asked for, and rows fill 16 bytes.
    let element = match b.precision {
        Precision::F16 if of.dtype == DType::F32 => Element::F16,
        Precision::BF16 if of.dtype == DType::F32 => Element::BF16,
        _ => memory,
    };
    let is_there = kernel(element, cuda::Functions::default()).kernel(device).is_ok();
    let element = if is_there { element } else { memory };
    let solutions = |functions: cuda::Functions, _: usize| only(kernel(element, functions).kernel(device));
    let (functions, inputs, work) = (&functions, &inputs, of.work);
    let (name, solutions) = (&|solution: &_| ATTENTION.of(element, solution), &solutions);
    b.push_written(Written { text, functions, inputs, more: &[], output: to, solutions, name, work })
}
