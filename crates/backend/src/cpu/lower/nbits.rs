//! Products with matrices of a few bits an element, packed once and never widened in memory.

use super::Lowered;
use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    plan::{Builder, NoPlan},
    weights::Recipe,
};
use cutover_graph::{Node, ValueId, ops::MatMulNBits};
use cutover_kernels::cpu::{
    IsaLevel,
    nbits::{self, Blocked, BlockedShape},
};
use cutover_tensor::{DType, Tensor};

pub(in crate::cpu) struct NBitsStep {
    shape: BlockedShape,
    a: Buffer,
    weights: Buffer,
    bias: Option<Buffer>,
    output: Buffer,
}

impl NBitsStep {
    pub fn operations(&self) -> u64 {
        2 * (self.shape.rows * self.shape.n * self.shape.k) as u64
    }
}

/// Takes f32 by constant weights whose blocks follow each other.
pub(super) fn lower(builder: &mut Builder<'_>, node: &Node, op: &MatMulNBits) -> Result<bool, NoPlan> {
    let input = |index: usize| node.inputs.get(index).copied().flatten();
    let (Some(a), Some(b), Some(scales), None) = (input(0), input(1), input(2), input(4)) else { return Ok(false) };
    let (output, count) = (node.outputs[0], builder.shape(node.outputs[0]).element_count());
    let rows = count / op.n;
    if !builder.is_float(a) || count == 0 {
        return Ok(false);
    }
    let (k, n, bits, block) = (op.k, op.n, op.bits, op.block_size);
    let shape = BlockedShape { rows, k, n, bits, block, has_zero_points: input(3).is_some() };
    // What contradicts the operator's definition is left to its evaluation, which says so.
    let constant = |id: ValueId, dtype: DType, elements: usize| {
        builder.graph.constant(id).filter(|c| c.tensor.dtype() == dtype && c.tensor.element_count() == elements)
    };
    let blocks = shape.blocks();
    let bytes = [blocks, block, bits].into_iter().try_fold(n, usize::checked_mul).map(|bits| bits / 8);
    let elements = bytes.and_then(|bytes| constant(b, DType::U8, bytes));
    let Some(elements) = elements else { return Ok(false) };
    let Some(scales) = constant(scales, DType::F32, n * blocks) else { return Ok(false) };
    let mut constants = vec![elements.clone(), scales.clone()];
    let (elements, scales) = (elements.tensor.clone(), scales.tensor.to_vec::<f32>());
    let Ok(scales) = scales else { return Ok(false) };
    let zero_points = match input(3) {
        None => None,
        Some(id) => {
            let points =
                builder.graph.constant(id).and_then(|c| Some((c.clone(), zero_points(&c.tensor, op, blocks)?)));
            let Some((constant, points)) = points else { return Ok(false) };
            constants.push(constant);
            Some(points)
        }
    };
    let bias = match input(5) {
        Some(id) if builder.shape(id).element_count() == n && builder.is_float(id) => Some(builder.plain(id)?),
        Some(_) => return Ok(false),
        None => None,
    };
    let level = builder.device.level;
    let how = format!("{bits} bits {n} {k} {block} {} {}", zero_points.is_some(), level.name());
    let weights = builder.pack(Recipe { constants, how }, nbits::packed_len(level, &shape), |packed| {
        nbits::pack(level, &shape, elements.bytes(), &scales, zero_points.as_deref(), packed);
    })?;
    let a = builder.plain(a)?;
    let to = builder.new_plain(output)?;
    let reads: Vec<Buffer> = [a, weights].into_iter().chain(bias).collect();
    builder.push(Lowered::NBits(NBitsStep { shape, a, weights, bias, output: to }), &reads, &[to]);
    Ok(true)
}

/// `[n][blocks]`, packed as the elements are, every row from a byte of its own, or as floats.
fn zero_points(tensor: &Tensor, op: &MatMulNBits, blocks: usize) -> Option<Vec<f32>> {
    match tensor.dtype() {
        DType::F32 if tensor.element_count() == op.n * blocks => tensor.to_vec::<f32>().ok(),
        DType::U8 => {
            let (row, bytes) = ((blocks * op.bits).div_ceil(8), tensor.bytes());
            let mask = u8::MAX >> (8 - op.bits);
            let at = |n: usize, block: usize| {
                let bit = block * op.bits;
                f32::from(bytes[n * row + bit / 8] >> (bit % 8) & mask)
            };
            let all = (0..op.n).flat_map(|n| (0..blocks).map(move |block| (n, block)));
            (bytes.len() == op.n * row).then(|| all.map(|(n, block)| at(n, block)).collect())
        }
        _ => None,
    }
}

impl NBitsStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let NBitsStep { shape, a, weights, bias, output } = self;
        let bias = bias.map(|bias| frame.floats(bias));
        let problem = Blocked { shape: *shape, a: frame.floats(*a), weights: frame.floats(*weights), bias };
        let panels = nbits::panels(level, shape);
        // Each thread reads its own part of the weights, unless there are too few panels to share.
        let (rows, panels) = match panels < worker.parts && shape.rows > panels {
            true => (worker.share(shape.rows), 0..panels),
            false => (0..shape.rows, worker.share(panels)),
        };
        nbits::blocked_product(level, &problem, rows, panels, frame.output(*output));
    }
}
