//! Products with weights of a few bits in blocks: of a few rows by a kernel that reads the weights at their bits, of more by tiles of them that are
//! widened as they are read, on tensor cores where less than f32 is asked for.

use super::{
    super::{
        super::{
            code::{Operand, Text},
            device::Solution,
            plan::{BufferId, Builder, Unable, Written},
        },
        product::{Epilogue, element},
    },
    Names, halves, only, precision, worth_trying,
};
use crate::{Precision, Work};
use cutover_graph::{Constant, ValueId, ops::MatMulNBits};
use cutover_kernels::cuda::{self, BlockedProduct, Element, Order};
use cutover_tensor::{DType, Tensor};
use std::fmt::Write;

const BLOCKED: Names = Names {
    full: "blocked product by hand",
    tf32: "blocked product by hand, tf32",
    f16: "blocked product by hand, f16",
    bf16: "blocked product by hand, bf16",
};

/// `a · weights` for `m` rows, the weights, scales and zero points as the model has them.
pub(in super::super) fn blocked_product(
    b: &mut Builder<'_>,
    op: &MatMulNBits,
    (a, m): (ValueId, usize),
    [weights, scales]: [&Constant; 2],
    points: Option<&Constant>,
    (to, epilogue, work): (BufferId, &Epilogue, Work),
) -> Result<bool, Unable> {
    let &MatMulNBits { n, k, bits, block_size: block, .. } = op;
    let Some(device) = b.gpu.written else { return Ok(false) };
    let Operand::Buffer(floats, DType::F32) = b.reread(a)? else { return Ok(false) };
    let is_known = scales.tensor.dtype() == DType::F32 && points.is_none_or(|p| p.tensor.dtype() == DType::U8);
    let has_zero_points = points.is_some();
    let few = |functions| BlockedProduct {
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
    let is_few = few(cuda::Functions::default()).kernel(device).is_ok();
    let of = match b.precision {
        Precision::F16 if !is_few => Element::F16,
        Precision::BF16 if !is_few => Element::BF16,
        _ => Element::F32,
    };
    let precision = if of == Element::F32 { precision(b) } else { cuda::Precision::Full };
    let many = |functions| cuda::Product {
        m,
        n,
        k,
        batch: Vec::new(),
        a: cuda::Operand::Array { order: Order::ByK, leading: k, batch: Vec::new() },
        b: cuda::Operand::Function { order: Order::ByK },
        elements: [of; 2],
        result: Element::F32,
        precision,
        channel_is_row: false,
        functions,
    };
    let divides = matches!(bits, 2 | 4 | 8) && (block * bits).is_multiple_of(8);
    let is_solved = is_few || divides && many(cuda::Functions::default()).candidates(device).is_ok();
    if !is_known || !is_solved {
        return Ok(false);
    }
    let as_it_is = |tensor: &Tensor| tensor.bytes().to_vec();
    let mut of_weights = Vec::new();
    for constant in [weights, scales].into_iter().chain(points) {
        match b.upload(constant, "as it is", as_it_is)? {
            Operand::Buffer(buffer, _) => of_weights.push(buffer),
            _ => return Ok(false),
        }
    }
    let left = if of == Element::F32 { floats } else { halves(b, a, of)? };
    let mut text = Text::default();
    let functions = element(&mut text, DType::F32, epilogue)
        + "fn finish(i: u32, channel: u32, sum: f32) -> f32 { return element(i, 0.0, sum); }\n";
    let (functions, output) = (&functions, to);
    let name = |solution: &Solution| BLOCKED.of(of, solution);
    let inputs = &[&[left][..], if is_few { &of_weights } else { &[] }].concat();
    let more: &[BufferId] = if is_few { &[] } else { &of_weights };
    let widened = widened(op, has_zero_points);
    let solutions = |mut functions: cuda::Functions, most: usize| {
        if is_few {
            return only(few(functions).kernel(device));
        }
        for (of, name) in [("u8", "packed"), ("float", "scales"), ("u8", "zero_points")].into_iter().take(more.len()) {
            functions.pointers.push((format!("const {of}*"), name.to_string()));
        }
        functions.text += &widened;
        let product = many(functions);
        let tiles = worth_trying(product.candidates(device)?, most);
        tiles.map(|tile| Ok(Solution::Written(product.kernel_of(device, tile)?))).collect()
    };
    let solutions = &solutions;
    Ok(b.push_written(Written { text, functions, inputs, more, output, solutions, name: &name, work }))
}

/// `b_at`: a weight less its zero point, times its scale.
fn widened(op: &MatMulNBits, has_zero_points: bool) -> String {
    let &MatMulNBits { k, bits, block_size: block, .. } = op;
    let (blocks, mask) = (k.div_ceil(block), (1 << bits) - 1);
    let zero = match has_zero_points {
        false => format!("{}u", 1 << (bits - 1)),
        true => {
            let row = (blocks * bits).div_ceil(8);
            format!("o.zero_points[n * {row}u + block * {bits}u / 8u] >> block * {bits}u % 8u & {mask}u")
        }
    };
    let mut text = String::new();
    let _ = writeln!(
        text,
        "__device__ __forceinline__ float b_at(const Operands& o, u32, u32 k, u32 n) {{
    const u32 block = k / {block}u, at = n * {blocks}u + block, bit = k % {block}u * {bits}u;
    const u32 q = o.packed[size_t(at) * {}u + bit / 8u] >> bit % 8u & {mask}u, zero = {zero};
    return float(i32(q) - i32(zero)) * o.scales[at];
}}",
        block * bits / 8
    );
    text
}
