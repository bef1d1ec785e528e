//! The best elements of a line, and tensors of one value.

use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    lower::Lowered,
    plan::{Builder, NoPlan},
};
use cutover_graph::{
    Node,
    ops::{ConstantOfShape, TopK, normalize_axis},
};
use cutover_tensor::DType;
use std::cmp::Ordering;

pub(in crate::cpu) struct TopKStep {
    dtype: DType,
    largest: bool,
    outer: usize,
    extent: usize,
    inner: usize,
    k: usize,
    input: Buffer,
    values: Buffer,
    indices: Buffer,
}

pub(in crate::cpu) struct FillStep {
    count: usize,
    value: Vec<u8>,
    output: Buffer,
}

pub(in crate::cpu) fn lower_top_k(builder: &mut Builder<'_>, node: &Node, op: &TopK) -> Result<bool, NoPlan> {
    let (&[Some(x), _], &[values, indices]) = (&node.inputs[..], &node.outputs[..]) else { return Ok(false) };
    let (shape, dtype) = (builder.shape(x), builder.fact(x).dtype);
    let Ok(axis) = normalize_axis(op.axis, shape.rank()) else { return Ok(false) };
    let (extent, k) = (shape[axis], builder.shape(values)[axis]);
    if !matches!(dtype, DType::F32 | DType::I32 | DType::I64) || k > extent || u32::try_from(extent).is_err() {
        return Ok(false);
    }
    let (outer, inner) = (shape[..axis].iter().product(), shape[axis + 1..].iter().product());
    let input = builder.plain(x)?;
    let (values, indices) = (builder.new_plain(values)?, builder.new_plain(indices)?);
    builder.need_workspace(extent);
    let step = TopKStep { dtype, largest: op.largest, outer, extent, inner, k, input, values, indices };
    builder.push(Lowered::TopK(step), &[input], &[values, indices]);
    Ok(true)
}

pub(in crate::cpu) fn lower_fill(builder: &mut Builder<'_>, node: &Node, op: &ConstantOfShape) -> Result<bool, NoPlan> {
    let output = node.outputs[0];
    let value = op.value.bytes().to_vec();
    if op.value.dtype().bits() < 8 || value.is_empty() || value.len() > 16 {
        return Ok(false);
    }
    let to = builder.new_plain(output)?;
    let step = FillStep { count: builder.shape(output).element_count(), value, output: to };
    builder.push(Lowered::Fill(step), &[], &[to]);
    Ok(true)
}

impl TopKStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>) {
        match self.dtype {
            // Numbers compare as numbers, so that zeros of both signs are equal; NaN is larger than all.
            DType::F32 => self.select(frame, worker, f32::from_le_bytes, |a, b| {
                a.partial_cmp(b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
            }),
            DType::I32 => self.select(frame, worker, i32::from_le_bytes, Ord::cmp),
            _ => self.select(frame, worker, i64::from_le_bytes, Ord::cmp),
        }
    }

    fn select<T, const N: usize>(
        &self,
        frame: &Frame<'_>,
        worker: &mut Worker<'_>,
        read: impl Fn([u8; N]) -> T,
        order: impl Fn(&T, &T) -> Ordering,
    ) {
        let TopKStep { largest, extent, inner, k, .. } = *self;
        let (elements, _) = frame.bytes(self.input).as_chunks::<N>();
        if k == 0 {
            return;
        }
        for unit in worker.share(self.outer * inner) {
            let (outer, lane) = (unit / inner, unit % inner);
            let element = |at: u32| elements[(outer * extent + at as usize) * inner + lane];
            // Of equal ones the first comes first.
            let better = |&a: &u32, &b: &u32| {
                let order = order(&read(element(a)), &read(element(b)));
                (if largest { order.reverse() } else { order }).then(a.cmp(&b))
            };
            let line = &mut worker.indices()[..extent];
            line.iter_mut().zip(0..).for_each(|(at, i)| *at = i);
            if k < extent {
                line.select_nth_unstable_by(k - 1, better);
            }
            line[..k].sort_unstable_by(better);
            for (rank, &at) in line[..k].iter().enumerate() {
                let to = (outer * k + rank) * inner + lane;
                frame.write(self.values, to * N, &element(at));
                frame.write(self.indices, to * 8, &i64::from(at).to_le_bytes());
            }
        }
    }
}

impl FillStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>) {
        const BLOCK_BYTES: usize = 1024;
        let width = self.value.len();
        let mut block = [0u8; BLOCK_BYTES];
        let per_block = BLOCK_BYTES / width;
        block.chunks_exact_mut(width).for_each(|element| element.copy_from_slice(&self.value));
        let mine = worker.share(self.count);
        for start in mine.clone().step_by(per_block) {
            let count = per_block.min(mine.end - start);
            frame.write(self.output, start * width, &block[..count * width]);
        }
    }
}
