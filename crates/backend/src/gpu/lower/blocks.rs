//! Products with weights of a few bits in blocks, read at their bits where they are multiplied.

use super::{
    super::{
        code::{self, Operand, Text, float, stored},
        plan::{Builder, Unable},
    },
    product::{Added, Epilogue, element, group_size, rows},
    quantized::given,
    written,
};
use crate::Work;
use cutover_graph::{Constant, Node, ops::MatMulNBits};
use cutover_kernels::wgsl;
use cutover_tensor::{DType, Tensor};

/// f32 by constant weights whose blocks follow each other.
pub(super) fn lower(b: &mut Builder<'_>, node: &Node, op: &MatMulNBits) -> Result<(), Unable> {
    let (a, w, scales) = (super::input(node, 0)?, super::input(node, 1)?, super::input(node, 2)?);
    let output = node.outputs[0];
    let &MatMulNBits { n, k, bits, block_size, .. } = op;
    let (blocks, each, words) = (k.div_ceil(block_size), 32 / bits, block_size * bits / 32);
    if given(node, 4).is_some() {
        return Err("blocks that do not follow each other".into());
    }
    let (Some(elements), Some(scales)) = (b.constant(w), b.constant(scales)) else {
        return Err("weights that a run computes".into());
    };
    if *b.shape(w) != [n, blocks, block_size * bits / 8] || b.dtype(output) != DType::F32 {
        return Err("weights of another shape, or a product of another type than f32".into());
    }
    let points = match given(node, 3) {
        None => None,
        Some(id) => Some(b.constant(id).ok_or("zero points that a run computes")?),
    };
    let mut added = Vec::new();
    if let Some(bias) = given(node, 5) {
        let (statements, index) = code::broadcast(&b.shape(bias), &b.shape(output));
        added.push(Added { statements, index, factor: 1.0, operand: b.reread(bias)? });
    }
    let epilogue = Epilogue { alpha: 1.0, bias: None, added, function: "x".to_string() };
    let m = b.count(output) / n;
    let bytes = 4 * (m * k + m * n + n * blocks) + n * blocks * block_size * bits / 8;
    let work = Work { operations: 2 * (m * n * k) as u64, bytes: bytes as u64, ..Work::default() };
    let (operand, to) = (b.reread(a)?, b.output(output)?);
    let by_hand = (to, &epilogue, work);
    if written::blocked_product(b, op, (a, m), [&elements, &scales], points.as_ref(), by_hand)? {
        return Ok(());
    }
    let points = points.map(|constant| {
        let points = zero_points(&constant.tensor, op, blocks).ok_or("zero points of another number or type")?;
        by_columns(&constant, points, [n, blocks])
    });
    let scales = by_columns(&scales, scales.tensor.to_vec::<f32>().map_err(|error| error.to_string())?, [n, blocks])?;
    // `[n][word]` as `[word][n]`, so that neighbours read neighbours.
    let weights = b.upload(&elements, "words by columns", |tensor| {
        let row = blocks * words;
        let mut moved = Vec::with_capacity(tensor.bytes().len());
        for word in 0..row {
            (0..n).for_each(|n| moved.extend_from_slice(&tensor.bytes()[4 * (n * row + word)..][..4]));
        }
        moved
    })?;
    let Operand::Buffer(weights, _) = weights else { return Err("weights in memory".into()) };
    let scales = b.upload(&scales, "plain", super::super::executable::to_device)?;
    let mut text = Text::default();
    let load_a = text.function(&operand);
    let load_w = text.function(&Operand::Buffer(weights, DType::U32));
    let load_scale = text.function(&scales);
    let zero = match points.transpose()? {
        None => float((1 << (bits - 1)) as f32),
        Some(points) => {
            let points = b.upload(&points, "plain", super::super::executable::to_device)?;
            format!("{}(i)", text.function(&points))
        }
    };
    let element = element(&mut text, DType::F32, &epilogue);
    let store = text.store(to, "f32");
    // What fills the last block up is multiplied by nothing.
    let of_a = match k.is_multiple_of(block_size) {
        true => format!("return {load_a}(m * {k}u + k);"),
        false => format!("return select(0.0, {load_a}(m * {k}u + min(k, {}u)), k < {k}u);", k - 1),
    };
    let value = stored(DType::F32, "element(i, 0.0, x)");
    let mut kernel = format!(
        "{element}fn a_at(m: u32, k: u32) -> f32 {{ {of_a} }}\nfn w_at(i: u32) -> u32 {{ return {load_w}(i); }}\nfn scale_at(i: u32) -> f32 {{ return {load_scale}(i); }}\nfn zero_at(i: u32) -> f32 {{ return {zero}; }}\nfn finish(i: u32, x: f32) {{ {store}(i, {value}); }}\n"
    );
    let (rows, group) = (rows(m), group_size(b, n));
    let numbers = [
        ("BITS", bits),
        ("EACH", each),
        ("MASK", (1 << bits) - 1),
        ("ROWS", rows),
        ("GROUP", group),
        ("M", m),
        ("N", n),
        ("LAST_ROW", m - 1),
        ("BLOCKS", blocks),
        ("WORDS_OF_BLOCK", words),
    ];
    let parameters: Vec<(&str, String)> = numbers.into_iter().map(|(name, value)| (name, value.to_string())).collect();
    kernel += &wgsl::expand(wgsl::PRODUCT_BLOCKS, &parameters);
    let groups = [n.div_ceil(group), m.div_ceil(rows), 1].map(|n| n as u32);
    b.push(text, &kernel, groups, "blocked product", work)
}

/// What there is for each of `[n, blocks]`, as `[blocks][n]`.
fn by_columns(of: &Constant, values: Vec<f32>, [n, blocks]: [usize; 2]) -> Result<Constant, Unable> {
    if values.len() != n * blocks {
        return Err(format!("expected {n} by {blocks} scales, got {}", values.len()).into());
    }
    let moved: Vec<f32> = (0..blocks)
        .flat_map(|block| (0..n).map(move |n| (n, block)))
        .map(|(n, block)| values[n * blocks + block])
        .collect();
    let tensor = Tensor::from_vec([blocks, n], moved).map_err(|error| error.to_string())?;
    Ok(Constant::derived(tensor, &format!("{blocks} blocks of {n} columns"), &[of.identity()]))
}

/// `[n][blocks]`, packed as the elements are, every row from a byte of its own, or as floats.
fn zero_points(tensor: &Tensor, op: &MatMulNBits, blocks: usize) -> Option<Vec<f32>> {
    if tensor.dtype() == DType::F32 {
        return tensor.to_vec().ok();
    }
    let (row, bytes) = ((blocks * op.bits).div_ceil(8), tensor.bytes());
    if tensor.dtype() != DType::U8 || bytes.len() != op.n * row {
        return None;
    }
    let at = |n: usize, block: usize| {
        let bit = block * op.bits;
        f32::from(bytes[n * row + bit / 8] >> (bit % 8) & (u8::MAX >> (8 - op.bits)))
    };
    Some((0..op.n).flat_map(|n| (0..blocks).map(move |block| (n, block))).map(|(n, block)| at(n, block)).collect())
}
