//! Problems as the kernels that were written by hand for NVIDIA's GPUs take them. Each function here says whether there is a kernel for its
//! problem; where there is none, the caller's generated one is to be had.
//!
//! With a precision below f32, constant factors are held in 16 bits; the other factor stays f32 in memory and is narrowed as a product reads it
//! (by a kernel before a matrix product, inside a convolution). Sums are of f32, and so is what comes out.

mod conv;
mod recurrent;
mod rows;

use super::{
    super::{
        code::{Function, Operand, Text},
        plan::{BufferId, Builder, Unable, Written},
    },
    product::{Factor, Product, element},
};
use crate::Precision;
use cutover_graph::{Constant, ValueId};
use cutover_kernels::cuda::{self, Element};
use cutover_tensor::{DType, Tensor};
use std::rc::Rc;

pub(super) use conv::convolution;
pub(super) use recurrent::{Recurrence, recurrence};
pub(in super::super) use rows::transposed;
pub(super) use rows::{Rows, rows};

/// Constants of fewer elements stay f32: they weigh nothing.
const LEAST_ELEMENTS: usize = 1024;

/// The same kernel's name in every precision.
struct Names {
    full: &'static str,
    tf32: &'static str,
    f16: &'static str,
    bf16: &'static str,
}

const PRODUCT: Names = Names {
    full: "matrix product by hand",
    tf32: "matrix product by hand, tf32",
    f16: "matrix product by hand, f16",
    bf16: "matrix product by hand, bf16",
};

impl Names {
    /// The name of `kernel` for factors of such elements. Of a few rows f32 stays f32, whatever was asked for.
    fn of(&self, factors: Element, kernel: &cuda::Kernel) -> &'static str {
        let is_tf32 = || kernel.launches.iter().any(|launch| launch.entry.contains("_tf32_"));
        match factors {
            Element::F16 => self.f16,
            Element::BF16 => self.bf16,
            _ if is_tf32() => self.tf32,
            _ => self.full,
        }
    }
}

/// What floats of `dtype` are in the device's memory.
fn stored(dtype: DType) -> Option<Element> {
    match dtype {
        DType::F32 | DType::BF16 => Some(Element::F32),
        DType::F16 => Some(Element::F16),
        _ => None,
    }
}

/// How products of f32 are computed.
fn precision(b: &Builder<'_>) -> cuda::Precision {
    if b.precision == Precision::Tf32 { cuda::Precision::Tf32 } else { cuda::Precision::Full }
}

/// The 16 bits that constant factors are held in, if any were asked for and `id` is such a factor: large enough to matter, and finite as such.
fn half_of(b: &Builder<'_>, id: ValueId) -> Option<(Constant, Element)> {
    let element = match b.precision {
        Precision::F16 => Element::F16,
        Precision::BF16 => Element::BF16,
        Precision::F32 | Precision::Tf32 => return None,
    };
    let constant = b.constant(id).filter(|constant| constant.tensor.dtype() == DType::F32)?;
    let (floats, _) = constant.tensor.bytes().as_chunks();
    let holds = |&bytes: &[u8; 4]| {
        let value = f32::from_le_bytes(bytes);
        !value.is_finite() || widened(narrowed(value, element), element).is_finite()
    };
    (floats.len() >= LEAST_ELEMENTS && floats.iter().all(holds)).then_some((constant, element))
}

fn narrowed(value: f32, element: Element) -> u16 {
    if element == Element::F16 { half::f16::from_f32(value).to_bits() } else { half::bf16::from_f32(value).to_bits() }
}

fn widened(bits: u16, element: Element) -> f32 {
    if element == Element::F16 { half::f16::from_bits(bits).to_f32() } else { half::bf16::from_bits(bits).to_f32() }
}

/// `constant` in 16 bits on the device.
fn upload_half(b: &mut Builder<'_>, constant: &Constant, element: Element) -> Result<BufferId, Unable> {
    let halves = |tensor: &Tensor| {
        let (floats, _) = tensor.bytes().as_chunks();
        floats.iter().flat_map(|&bytes| narrowed(f32::from_le_bytes(bytes), element).to_le_bytes()).collect()
    };
    let recipe = if element == Element::F16 { "f16" } else { "bf16" };
    match b.upload(constant, recipe, halves)? {
        Operand::Buffer(buffer, _) => Ok(buffer),
        _ => Err("a constant that is not in memory".into()),
    }
}

/// `left · right`, where constants of `right` may be in 16 bits: of the value `id`, row-major.
pub(super) fn product_of_weights(
    b: &mut Builder<'_>,
    product: &Product<'_>,
    ids: [ValueId; 2],
) -> Result<bool, Unable> {
    let Some((constant, element)) = half_of(b, ids[1]) else { return Ok(false) };
    if b.gpu.written.is_none() || product.dtype != DType::F32 {
        return Ok(false);
    }
    let right = upload_half(b, &constant, element)?;
    let left = halves(b, ids[0], element)?;
    Ok(multiply(b, product, [left, right], [element; 2]))
}

/// The elements of `id` in 16 bits: one kernel for all who ask.
fn halves(b: &mut Builder<'_>, id: ValueId, element: Element) -> Result<BufferId, Unable> {
    if let Some(buffer) = b.narrowed(id) {
        return Ok(buffer);
    }
    let (operand, count) = (b.operand(id)?, b.count(id));
    let of_node = std::mem::replace(&mut b.kernel, "rounding");
    let buffer = match element {
        Element::F16 => {
            let function = Function::new(DType::F16, "return $0(i);", vec![operand]);
            b.materialise(&Operand::Function(Rc::new(function)), count)?
        }
        _ => {
            let pair = "let first = bitcast<u32>(to_bf16($0(2u * i))) >> 16u;\nlet second = bitcast<u32>(to_bf16($0(min(2u * i + 1u, LAST))));\nreturn first | (second & 0xffff0000u);";
            let body = pair.replace("LAST", &format!("{}u", count - 1));
            let function = Function::new(DType::U32, body, vec![operand]);
            b.materialise(&Operand::Function(Rc::new(function)), count.div_ceil(2))?
        }
    };
    b.kernel = of_node;
    b.keep_narrowed(id, buffer);
    Ok(buffer)
}

/// The product, where both factors lie in memory.
pub(super) fn product(b: &mut Builder<'_>, product: &Product<'_>) -> bool {
    let of = |factor: &Factor| match factor.operand {
        Operand::Buffer(buffer, of) if of == product.dtype => Some(buffer),
        _ => None,
    };
    let (Some(left), Some(right), Some(element)) = (of(product.left), of(product.right), stored(product.dtype)) else {
        return false;
    };
    multiply(b, product, [left, right], [element; 2])
}

/// The product of two arrays of `elements`.
fn multiply(b: &mut Builder<'_>, product: &Product<'_>, factors: [BufferId; 2], elements: [Element; 2]) -> bool {
    let &Product { to, dtype, sizes: [m, n, k], batch, left, right, epilogue } = product;
    let (Some(device), Some(result)) = (b.gpu.written, stored(dtype)) else { return false };
    let array = |along_k: usize, outer: usize, factor: &Factor| {
        let (order, leading) = match (along_k, outer) {
            (1, leading) => (cuda::Order::ByK, leading),
            (leading, 1) => (cuda::Order::ByOuter, leading),
            _ => return None,
        };
        Some(cuda::Operand::Array { order, leading, batch: factor.batch.clone() })
    };
    let first = array(left.column, left.row, left);
    let (Some(first), Some(second)) = (first, array(right.row, right.column, right)) else { return false };
    let precision = if elements[0] == Element::F32 { precision(b) } else { cuda::Precision::Full };
    let problem = |functions: cuda::Functions| {
        let product = cuda::Product {
            m,
            n,
            k,
            batch: batch.to_vec(),
            a: first.clone(),
            b: second.clone(),
            elements,
            result,
            precision,
            channel_is_row: false,
            functions,
        };
        product.kernel(device)
    };
    let mut text = Text::default();
    let functions = element(&mut text, dtype, epilogue)
        + &format!(
            "fn finish(i: u32, channel: u32, sum: f32) -> f32 {{ return element(i, bias_of(i / {n}u), sum); }}\n"
        );
    let name = |kernel: &cuda::Kernel| PRODUCT.of(elements[0], kernel);
    let (inputs, work) = (&factors, product.work());
    b.push_written(Written {
        text,
        functions: &functions,
        inputs,
        more: &[],
        output: to,
        problem: &problem,
        name: &name,
        work,
    })
}
