//! Attention as exporters and compositions spell it, found among the operators that it is written as:
//! `MatMul` → (`Mul` or `Div` by a number) → (`Add` of a mask) → `Softmax` → `MatMul`.
//!
//! What a backend makes of it is the backend's.

use cutover_graph::{
    Node, NodeId, Op, ValueId,
    ops::{BinaryFunction, MatMul, SoftmaxFunction, normalize_axis},
};
use cutover_tensor::Shape;

/// What a plan in the making knows of its values.
pub(crate) trait Known {
    fn shape(&self, id: ValueId) -> Shape;

    /// Whether it is of a type that attention is computed in.
    fn is_float(&self, id: ValueId) -> bool;

    fn is_constant(&self, id: ValueId) -> bool;

    /// The one f32 that `id` is.
    fn scalar(&self, id: ValueId) -> Option<f32>;

    /// The node that alone reads `id`, which is no output.
    fn only_reader(&self, id: ValueId) -> Option<(NodeId, &Node)>;
}

/// `softmax(queries · keys · scale + mask) · values`, along the last axis of the scores.
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    /// `[.., s, h]`
    pub queries: ValueId,
    /// `[.., h, t]`
    pub keys: ValueId,
    /// `[.., t, v]`
    pub values: ValueId,
    pub scale: f32,
    /// `[t]` to `[.., s, t]`, with extents of the scores' or 1.
    pub mask: Option<ValueId>,
    /// The nodes between the two products, which nothing else reads.
    pub between: Vec<NodeId>,
    /// The second product.
    pub last: NodeId,
}

fn input(node: &Node, index: usize) -> Option<ValueId> {
    node.inputs.get(index).copied().flatten()
}

/// The attention that the product `node` begins, if it does.
pub(crate) fn find(known: &impl Known, node: &Node, op: &MatMul) -> Option<Attention> {
    let (queries, keys) = (input(node, 0)?, input(node, 1)?);
    let scores_shape = known.shape(node.outputs[0]);
    let rank = scores_shape.rank();
    let is_matrices = |id| known.is_float(id) && !known.is_constant(id) && known.shape(id).rank() >= 2;
    if op.activation.is_some() || rank < 3 || ![queries, keys].into_iter().all(is_matrices) {
        return None;
    }
    let mut mask = input(node, 2);
    let mut scale = 1.0;
    let mut between = Vec::new();
    let mut value = node.outputs[0];
    loop {
        let (id, reader) = known.only_reader(value)?;
        let other = |of: ValueId| reader.inputs.iter().flatten().copied().find(|&i| i != of);
        match &reader.op {
            Op::Binary(op) if op.function == BinaryFunction::Mul && mask.is_none() => {
                scale *= known.scalar(other(value)?)?;
            }
            Op::Binary(op) if op.function == BinaryFunction::Div && mask.is_none() => {
                // x / c is x · 1/c to the last bit where 1/c is a power of two, and to the one before elsewhere.
                scale *= 1.0 / known.scalar(other(value).filter(|_| input(reader, 0) == Some(value))?)?;
            }
            Op::Binary(op) if op.function == BinaryFunction::Add && mask.is_none() => mask = Some(other(value)?),
            Op::Softmax(op) if op.function == SoftmaxFunction::Softmax => {
                if normalize_axis(op.axis, rank).ok()? != rank - 1 {
                    return None;
                }
                between.push(id);
                value = reader.outputs[0];
                break;
            }
            _ => return None,
        }
        if between.len() > 2 || known.shape(reader.outputs[0]) != scores_shape || !scale.is_finite() {
            return None;
        }
        between.push(id);
        value = reader.outputs[0];
    }
    let (last, reader) = known.only_reader(value)?;
    let Op::MatMul(MatMul { activation: None }) = &reader.op else { return None };
    let &[Some(probabilities), Some(values)] = &reader.inputs[..] else { return None };
    let y_shape = known.shape(reader.outputs[0]);
    let fits = probabilities == value
        && is_matrices(values)
        && y_shape.rank() == rank
        && y_shape[..rank - 1] == scores_shape[..rank - 1]
        && y_shape.element_count() > 0
        && scores_shape.element_count() > 0;
    let is_mask = |id: ValueId| {
        let shape = known.shape(id);
        // Rows as long as the scores', of samples, heads and queries or for all of them.
        let trailing = &scores_shape[rank - shape.rank().min(rank)..];
        known.is_float(id)
            && (1..=rank).contains(&shape.rank())
            && shape.last() == scores_shape.last()
            && shape.iter().zip(trailing).all(|(&of_mask, &of_scores)| of_mask == of_scores || of_mask == 1)
    };
    let widths = known.shape(queries).last().copied()? > 0;
    (fits && widths && mask.is_none_or(is_mask)).then_some(Attention {
        queries,
        keys,
        values,
        scale,
        mask,
        between,
        last,
    })
}
