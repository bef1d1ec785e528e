//! Problems as the kernels that were written by hand for NVIDIA's GPUs take them. Each function here says whether there is a kernel for its
//! problem; where there is none, the caller's generated one is to be had.
//!
//! With a precision below f32, constant factors are held in 16 bits. What a matrix product multiplies with them stays f32 in memory, and is
//! narrowed by a kernel before it; pictures are held in 16 bits, by channels ([`channels`]), from one convolution to the next, and narrowed
//! as they are read where their channels do not fill 16 bytes. Sums are of f32.

mod attention;
mod blocks;
mod bytes;
mod channels;
mod conv;
mod recurrent;
mod rows;

use super::{
    super::{
        code::{Function, Operand, Text},
        device::{LibraryFactor, LibraryFunction, LibraryProduct, Solution},
        plan::{BufferId, Builder, Unable, Written},
    },
    elementwise::activation_text,
    product::{Added, Factor, Product, element},
};
use crate::Precision;
use cutover_graph::{Constant, ValueId, ops::Activation};
use cutover_kernels::cuda::{self, Element, Refused, Tile};
use cutover_tensor::{DType, Tensor};
use std::rc::Rc;

pub(super) use attention::{Attention, Rows as AttentionRows, attention};
pub(super) use blocks::blocked_product;
pub(super) use bytes::{convolution_of_bytes, has_convolution_of_bytes, has_product_of_bytes, product_of_bytes};
pub(super) use conv::{convolution, convolution_by_channels, of_windows};
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

const LIBRARY: Names = Names {
    full: "matrix product by cuBLASLt",
    tf32: "matrix product by cuBLASLt, tf32",
    f16: "matrix product by cuBLASLt, f16",
    bf16: "matrix product by cuBLASLt, bf16",
};

impl Names {
    /// The name of `solution` for factors of such elements. Of a few rows f32 stays f32, whatever was asked for.
    fn of(&self, factors: Element, solution: &Solution) -> &'static str {
        let is_tf32 = match solution {
            Solution::Written(kernel) => kernel.launches.iter().any(|launch| launch.entry.contains("_tf32_")),
            Solution::Library(product) => product.tf32,
        };
        match factors {
            Element::F16 => self.f16,
            Element::BF16 => self.bf16,
            _ if is_tf32 => self.tf32,
            _ => self.full,
        }
    }
}

/// The tiles of `candidates` that are worth a measurement, best first: at most `most`, none predicted to be half again as slow as the best.
fn worth_trying(candidates: Vec<(Tile, f64)>, most: usize) -> impl Iterator<Item = Tile> {
    let bound = candidates.first().map_or(0.0, |(_, clocks)| 1.5 * clocks);
    candidates.into_iter().take(most).take_while(move |(_, clocks)| *clocks <= bound).map(|(tile, _)| tile)
}

/// The only way that a family has.
fn only(kernel: Result<cuda::Kernel, Refused>) -> Result<Vec<Solution>, Refused> {
    Ok(vec![Solution::Written(kernel?)])
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

/// The 16 bits that `constant`, of `least` elements, is held in, if any were asked for and it is finite as such.
fn half_of(b: &Builder<'_>, constant: Option<Constant>, least: usize) -> Option<(Constant, Element)> {
    let element = match b.precision {
        Precision::F16 => Element::F16,
        Precision::BF16 => Element::BF16,
        Precision::F32 | Precision::Tf32 => return None,
    };
    let constant = constant.filter(|constant| constant.tensor.dtype() == DType::F32)?;
    let (floats, _) = constant.tensor.bytes().as_chunks();
    let holds = |&bytes: &[u8; 4]| {
        let value = f32::from_le_bytes(bytes);
        !value.is_finite() || widened(narrowed(value, element), element).is_finite()
    };
    (floats.len() >= least && floats.iter().all(holds)).then_some((constant, element))
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
    let Some((constant, element)) = half_of(b, b.constant(ids[1]), LEAST_ELEMENTS) else { return Ok(false) };
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
    let library = by_library(product, [&first, &second], elements[0], result, precision);
    let (library, added) = library.map_or((None, Vec::new()), |(library, added)| (Some(library), added));
    let solutions = |functions: cuda::Functions, most: usize| {
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
        let tiles = worth_trying(product.candidates(device)?, most);
        let kernels = tiles.map(|tile| Ok(Solution::Written(product.kernel_of(device, tile)?)));
        library.clone().map(|library| Ok(Solution::Library(library))).into_iter().chain(kernels).collect()
    };
    let mut text = Text::default();
    let functions = element(&mut text, dtype, epilogue)
        + &format!(
            "fn finish(i: u32, channel: u32, sum: f32) -> f32 {{ return element(i, bias_of(i / {n}u), sum); }}\n"
        );
    let name = |solution: &Solution| match solution {
        Solution::Written(_) => PRODUCT.of(elements[0], solution),
        Solution::Library(_) => LIBRARY.of(elements[0], solution),
    };
    let inputs: Vec<BufferId> = factors.into_iter().chain(added).collect();
    b.push_written(Written {
        text,
        functions: &functions,
        inputs: &inputs,
        more: &[],
        output: to,
        solutions: &solutions,
        name: &name,
        work: product.work(),
    })
}

/// Multiplications from which on a library is asked first.
const LIBRARY_WORK: usize = 1 << 26;

/// The product as a library takes it, its bias and its residual: where it is large, and what is done to its sums is no more than libraries do.
fn by_library(
    product: &Product<'_>,
    factors: [&cuda::Operand; 2],
    element: Element,
    result: Element,
    precision: cuda::Precision,
) -> Option<(LibraryProduct, Vec<BufferId>)> {
    let &Product { sizes: [m, n, k], batch, epilogue, .. } = product;
    let count = match *batch {
        [] => 1,
        [count] => count,
        _ => return None,
    };
    let factor = |operand: &cuda::Operand| match operand {
        cuda::Operand::Array { order, leading, batch } => {
            Some(LibraryFactor { order: *order, leading: *leading, stride: batch.first().copied().unwrap_or(0) })
        }
        cuda::Operand::Function { .. } => None,
    };
    let is = |activation| epilogue.function == activation_text(Some(activation), "x");
    let function = match epilogue.function.as_str() {
        "x" => LibraryFunction::None,
        _ if is(Activation::Relu) => LibraryFunction::Relu,
        _ if is(Activation::GeluTanh) => LibraryFunction::GeluTanh,
        _ => return None,
    };
    // For each column, and for each element of the result.
    let (mut bias, mut residual) = (None, None);
    for Added { statements, index, factor, operand } in &epilogue.added {
        match operand {
            Operand::Buffer(buffer, of) if *of == product.dtype && statements.is_empty() => match index.as_str() {
                "i" if residual.is_none() => residual = Some((*buffer, *factor)),
                index if bias.is_none() && *factor == 1.0 && index == format!("i % {n}u") => bias = Some(*buffer),
                _ => return None,
            },
            _ => return None,
        }
    }
    // What the device holds as something else is rounded by our own kernels.
    let is_known = matches!((product.dtype, result), (DType::F32, Element::F32) | (DType::F16, Element::F16));
    let is_large = m.min(n).min(k) >= 16 && count * m * n * k >= LIBRARY_WORK;
    let [a, b] = factors.map(factor);
    let library = LibraryProduct {
        m,
        n,
        k,
        count,
        a: a?,
        b: b?,
        element,
        result,
        tf32: precision == cuda::Precision::Tf32,
        alpha: epilogue.alpha,
        beta: residual.map_or(0.0, |(_, factor)| factor),
        has_bias: bias.is_some(),
        function,
    };
    let residual = residual.map(|(buffer, _)| buffer);
    (is_known && is_large && epilogue.bias.is_none()).then_some((library, bias.into_iter().chain(residual).collect()))
}
