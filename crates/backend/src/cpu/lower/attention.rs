//! Attention: a product of queries and keys, its softmax, and the product with values, as one step that never holds all scores.
//!
//! A unit of work is a block of queries of one head: its scores stay in the cache from the product that makes them to the one that reads them. Rows are divided by the sums of
//! their exponentials after the second product: the result differs from that of the operators one by one by rounding, and rounds less.

use super::{
    Lowered,
    product::{Operand, batch_shape, starts, view},
};
use crate::{
    attention::{self, Attention},
    cpu::{
        frame::{Buffer, Frame, Worker},
        plan::{Builder, NoPlan, Strided},
    },
};
use cutover_graph::{Node, NodeId, Op, ValueId, ops};
use cutover_kernels::cpu::{
    Activation, IsaLevel, Output, Residual,
    elementwise::Source,
    gemm::{self, Bias, Gemm, Matrix},
    normalize::{self, RowAddend, Softmax},
};
use cutover_tensor::Shape;

/// Scores that a unit holds at most, give or take.
const SCORES_LEN: usize = 16 * 1024;

/// Queries of a unit at most: enough to read keys and values seldom.
const UNIT_QUERIES: usize = 96;

pub(in crate::cpu) struct AttentionStep {
    /// Queries, keys, width of both, and width of the values.
    sizes: [usize; 4],
    scale: f32,
    /// By head of every sample: queries `[s, h]`, keys `[h, t]`, values `[t, v]`.
    queries: Operand,
    keys: Operand,
    values: Operand,
    mask: Option<Mask>,
    output: Operand,
}

/// What is added to scores: a row of `t` for every query, or one for all.
struct Mask {
    buffer: Buffer,
    /// By head of every sample.
    starts: Vec<usize>,
    by_query: bool,
}

/// If the product `node` begins an attention, notes it for the product that ends it, which will run it. Nothing else reads what is between them.
pub(super) fn begin(builder: &mut Builder<'_>, node: &Node, op: &ops::MatMul) -> bool {
    let Some(found) = attention::find(builder, node, op) else { return false };
    builder.fuse(found.between.clone());
    for id in [Some(found.queries), Some(found.keys), found.mask].into_iter().flatten() {
        builder.keep(id);
    }
    builder.defer_attention(found);
    true
}

impl attention::Known for Builder<'_> {
    fn shape(&self, id: ValueId) -> Shape {
        self.shape(id)
    }

    fn is_float(&self, id: ValueId) -> bool {
        self.is_float(id)
    }

    fn is_constant(&self, id: ValueId) -> bool {
        self.constant(id).is_some()
    }

    fn scalar(&self, id: ValueId) -> Option<f32> {
        self.scalar(id)
    }

    fn only_reader(&self, id: ValueId) -> Option<(NodeId, &Node)> {
        self.only_reader(id)
    }
}

/// Runs the attention that the product `node` ends.
pub(super) fn end(builder: &mut Builder<'_>, node: &Node, attention: Attention) -> Result<bool, NoPlan> {
    let Attention { queries, keys, values, scale, mask, .. } = attention;
    for id in [Some(queries), Some(keys), mask].into_iter().flatten() {
        builder.release(id);
    }
    let output = node.outputs[0];
    let y_shape = builder.shape(output).to_vec();
    let lead = y_shape.len() - 2;
    let (q, q_shape) = view(builder, queries)?;
    let (k, k_shape) = view(builder, keys)?;
    let (v, v_shape) = view(builder, values)?;
    let leads = |shape: &[usize]| shape[..shape.len() - 2].to_vec();
    let batch = batch_shape(&batch_shape(&leads(&q_shape), &leads(&k_shape)), &leads(&v_shape));
    let operand = |view: Strided, shape: &[usize]| {
        let rank = shape.len();
        let starts = starts(&batch, &shape[..rank - 2], &view.strides);
        let (row_stride, column_stride) = (view.strides[rank - 2], view.strides[rank - 1]);
        Operand { buffer: view.buffer, offset: view.offset, starts, row_stride, column_stride }
    };
    let sizes = [y_shape[lead], k_shape[k_shape.len() - 1], q_shape[q_shape.len() - 1], y_shape[lead + 1]];
    let [s, _, _, width] = sizes;
    let mask = match mask {
        None => None,
        Some(id) => {
            let mut shape = builder.shape(id).to_vec();
            while shape.len() < 2 {
                shape.insert(0, 1);
            }
            let strides = Shape::new(&shape).strides().to_vec();
            let (of_heads, by_query) = (&shape[..shape.len() - 2], shape[shape.len() - 2] == s && s > 1);
            let starts = starts(&batch, of_heads, &strides);
            Some(Mask { buffer: builder.plain(id)?, starts, by_query })
        }
    };
    // Where all that follows is a transposition to `[b, s, n, v]`, values are written there.
    let turned = y_shape.len() == 4
        && builder.only_reader(output).is_some_and(|(_, reader)| match &reader.op {
            Op::Transpose(op) => op.permutation.as_deref() == Some(&[0, 2, 1, 3]),
            _ => false,
        });
    let (to, strides) = if turned {
        let n = y_shape[1];
        let to = builder.new_floats(y_shape.iter().product())?;
        (to, vec![s * n * width, width, n * width, 1])
    } else {
        (builder.new_plain(output)?, Shape::new(&y_shape).strides().to_vec())
    };
    let written = Strided { buffer: to, offset: 0, strides };
    if turned {
        builder.hold_strided(output, written.clone());
    }
    let step = AttentionStep {
        sizes,
        scale,
        queries: operand(q, &q_shape),
        keys: operand(k, &k_shape),
        values: operand(v, &v_shape),
        mask,
        output: operand(written, &y_shape),
    };
    builder.need_workspace(step.parts(builder.device.level).iter().sum());
    builder.name_kernel("attention");
    let operands = [step.queries.buffer, step.keys.buffer, step.values.buffer];
    let reads: Vec<Buffer> = operands.into_iter().chain(step.mask.as_ref().map(|mask| mask.buffer)).collect();
    builder.push(Lowered::Attention(step), &reads, &[to]);
    Ok(true)
}

impl AttentionStep {
    fn unit_queries(&self) -> usize {
        let [s, t, ..] = self.sizes;
        let most = (SCORES_LEN / t).clamp(1, UNIT_QUERIES);
        s.div_ceil(s.div_ceil(most))
    }

    /// Floats of the workspace: scores, the inverses of their rows' sums, packed keys, packed values, and what products need.
    fn parts(&self, level: IsaLevel) -> [usize; 5] {
        let [_, t, h, width] = self.sizes;
        let products = gemm::gemm_workspace_len(h).max(gemm::gemm_workspace_len(t));
        let queries = self.unit_queries();
        [queries * t, queries, gemm::packed_b_len(level, h, t), gemm::packed_b_len(level, t, width), products]
    }

    pub fn operations(&self) -> u64 {
        let [s, t, h, width] = self.sizes;
        2 * (self.queries.starts.len() * s * t * (h + width)) as u64
    }

    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) {
        let [s, t, h, width] = self.sizes;
        let (each, heads) = (self.unit_queries(), self.queries.starts.len());
        let blocks = s.div_ceil(each);
        let units = worker.share(heads * blocks);
        let [scores, inverses, keys, values, _] = self.parts(level);
        let (scores, rest) = worker.workspace.split_at_mut(scores);
        let (inverses, rest) = rest.split_at_mut(inverses);
        let (keys, rest) = rest.split_at_mut(keys);
        let (values, workspace) = rest.split_at_mut(values);
        let mut packed = None;
        for unit in units {
            let (head, block) = (unit / blocks, unit % blocks);
            let first = s * block / blocks;
            let rows = s * (block + 1) / blocks - first;
            // Heads in groups share keys and values.
            let of = (self.keys.starts[head], self.values.starts[head]);
            if packed.replace(of) != Some(of) {
                let panels = |n: usize| 0..gemm::panel_count(level, n);
                gemm::pack_b(level, self.keys.matrix(frame, head), h, t, panels(t), Output::new(keys));
                let matrix = self.values.matrix(frame, head);
                gemm::pack_b(level, matrix, t, width, panels(width), Output::new(values));
            }
            let product = |a, b, n, k, output_stride| Gemm {
                m: rows,
                n,
                k,
                a,
                b,
                alpha: 1.0,
                bias: Bias::None,
                residual: Residual::None,
                activation: Activation::Identity,
                output_stride,
            };
            let queries = self.queries.matrix(frame, head);
            let queries = Matrix { data: &queries.data[first * queries.row_stride..], ..queries };
            let problem = product(queries, &*keys, t, h, t);
            let panels = gemm::panel_count(level, t);
            gemm::gemm(level, &problem, 0..rows, 0..panels, Output::new(scores), workspace);
            let addend = self.mask.as_ref().map(|mask| {
                let data = &frame.floats(mask.buffer)[mask.starts[head]..];
                match mask.by_query {
                    true => RowAddend { data: &data[first * t..][..rows * t], rows_each: 1 },
                    false => RowAddend { data: &data[..t], rows_each: rows },
                }
            });
            let softmax = Softmax { width: t, input: Source::Output, scale: self.scale, addend, logarithm: false };
            let inverses = &mut inverses[..rows];
            normalize::softmax_exponentials(level, &softmax, 0..rows, Output::new(scores), inverses);
            let stride = self.output.row_stride;
            let problem = product(Matrix::row_major(scores, t), &*values, width, t, stride);
            let start = self.output.starts[head] + first * stride;
            let output = || frame.output_at(self.output.buffer, start, (rows - 1) * stride + width);
            gemm::gemm(level, &problem, 0..rows, 0..gemm::panel_count(level, width), output(), workspace);
            normalize::scale_rows(level, inverses, width, stride, output());
        }
    }
}
