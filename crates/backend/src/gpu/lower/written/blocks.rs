//! Products of a few rows with weights of a few bits in blocks.

use super::{
    super::{
        super::{
            code::{Operand, Text},
            plan::{BufferId, Builder, Unable, Written},
        },
        product::{Epilogue, element},
    },
    only,
};
use crate::Work;
use cutover_graph::{Constant, ops::MatMulNBits};
use cutover_kernels::cuda::{self, BlockedProduct, Element};
use cutover_tensor::{DType, Tensor};

/// `a · weights` for `m` rows, the weights, scales and zero points as the model has them.
pub(in super::super) fn blocked_product(
    b: &mut Builder<'_>,
    op: &MatMulNBits,
    (a, m): (&Operand, usize),
    [weights, scales]: [&Constant; 2],
    points: Option<&Constant>,
    (to, epilogue, work): (BufferId, &Epilogue, Work),
) -> Result<bool, Unable> {
    let &MatMulNBits { n, k, bits, block_size: block, .. } = op;
    let (Some(device), Operand::Buffer(a, DType::F32)) = (b.gpu.written, a) else { return Ok(false) };
    let is_known = scales.tensor.dtype() == DType::F32 && points.is_none_or(|p| p.tensor.dtype() == DType::U8);
    let has_zero_points = points.is_some();
    let of = |functions| BlockedProduct {
        m,
        n,
        k,
        bits,
        block,
        has_zero_points,
        element: Element::F32,
        scale: Element::F32,
        functions,
    };
    if !is_known || of(cuda::Functions::default()).kernel(device).is_err() {
        return Ok(false);
    }
    let as_it_is = |tensor: &Tensor| tensor.bytes().to_vec();
    let mut inputs = vec![*a];
    for constant in [weights, scales].into_iter().chain(points) {
        match b.upload(constant, "as it is", as_it_is)? {
            Operand::Buffer(buffer, _) => inputs.push(buffer),
            _ => return Ok(false),
        }
    }
    let mut text = Text::default();
    let functions = element(&mut text, DType::F32, epilogue)
        + "fn finish(i: u32, channel: u32, sum: f32) -> f32 { return element(i, 0.0, sum); }\n";
    let solutions = |functions: cuda::Functions, _: usize| only(of(functions).kernel(device));
    let (functions, inputs, solutions) = (&functions, &inputs, &solutions);
    let name = &|_: &_| "blocked product by hand";
    Ok(b.push_written(Written { text, functions, inputs, more: &[], output: to, solutions, name, work }))
}
