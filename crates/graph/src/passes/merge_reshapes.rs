//! Chains of Reshape, Flatten, Squeeze and Unsqueeze become one Reshape, to a constant shape wherever the facts can spell it.
//!
//! With 0 for an extent that stays and -1 for one other, a constant spells most symbolic shapes: the chain that computed the shape at run
//! time is then of no use.

use super::{Pass, Subject};
use crate::{Constant, Dim, Node, NodeId, Op, Patch, PatchValue, ValueId, ops::Reshape};
use cutover_tensor::Tensor;

pub(super) struct MergeReshapes;

impl Pass for MergeReshapes {
    fn name(&self) -> &'static str {
        "merge-reshapes"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        if !is_reshape(node) {
            return None;
        }
        let input = subject.input(node, 0)?;
        let mut root = input;
        while let Some((_, producer)) = subject.producer(root).filter(|(_, n)| is_reshape(n)) {
            root = subject.input(producer, 0)?;
        }
        let output = node.outputs[0];
        if subject.same_type(root, output) {
            let mut patch = Patch::new();
            patch.replace(output, root);
            return Some(patch);
        }
        let is_settled = match &node.op {
            Op::Reshape(_) => subject.constant(subject.input(node, 1)?).is_some(),
            _ => true,
        };
        if root == input && is_settled {
            return None;
        }
        let mut patch = Patch::new();
        let reshaped = reshape(subject, &mut patch, &node.name, root, subject.shape(output)?)?;
        patch.replace(output, reshaped);
        Some(patch)
    }
}

fn is_reshape(node: &Node) -> bool {
    matches!(node.op, Op::Reshape(_) | Op::Squeeze(_) | Op::Unsqueeze(_) | Op::Flatten(_))
}

/// Adds `value` under `shape` to `patch`; `None` where a constant cannot spell the shape.
pub(super) fn reshape(
    subject: &Subject,
    patch: &mut Patch,
    name: &str,
    value: ValueId,
    shape: &[Dim],
) -> Option<PatchValue> {
    let spelled = spell(subject.shape(value), shape)?;
    let target = Constant::new(Tensor::from_vec([spelled.len()], spelled).ok()?);
    let target = patch.constant(format!("{name}.shape"), target);
    Some(patch.node(name, Reshape { allow_zero: false }, &[Some(value.into()), Some(target)]))
}

/// `to` as the constant operand of a Reshape of `from`. One extent may be what is left, if it is known to be that.
fn spell(from: Option<&[Dim]>, to: &[Dim]) -> Option<Vec<i64>> {
    let count = |dims: &[Dim]| dims.iter().fold(Dim::Const(1), |n, d| n * d.clone());
    let mut open = from.is_some_and(|from| count(from) != count(to));
    let spelled = to.iter().enumerate().map(|(axis, dim)| match dim.as_const() {
        Some(extent) => (extent > 0).then_some(extent),
        None if from.and_then(|from| from.get(axis)) == Some(dim) => Some(0),
        None => (!std::mem::replace(&mut open, true)).then_some(-1),
    });
    spelled.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{Concat, Flatten, Gather, Shape, Squeeze, Unary, UnaryFunction, Unsqueeze},
        passes::testing::{Builder, check},
    };

    #[test]
    fn chains_merge() {
        let mut b = Builder::new(1);
        let x = b.symbolic_input("x", &["N", "4", "6"]);
        let (axis, flat, split) = (b.integers(&[1]), b.integers(&[0, -1]), b.integers(&[0, 8, 3]));
        let mut y = b.node(Unsqueeze, &[x, axis]);
        y = b.node(Squeeze, &[y, axis]);
        y = b.node(Flatten { axis: 1 }, &[y]);
        y = b.node(Reshape { allow_zero: false }, &[y, split]);
        y = b.node(Reshape { allow_zero: false }, &[y, flat]);
        y = b.node(Unary { function: UnaryFunction::Neg }, &[y]);
        assert_eq!(check(&[&MergeReshapes], b.finish(&[y]), 0.0), ["Reshape", "Neg"]);
    }

    #[test]
    fn a_chain_back_to_the_start_goes() {
        let mut b = Builder::new(1);
        let x = b.symbolic_input("x", &["N", "4"]);
        let axis = b.integers(&[0]);
        let y = b.node(Unsqueeze, &[x, axis]);
        let y = b.node(Squeeze, &[y, axis]);
        let y = b.node(Unary { function: UnaryFunction::Neg }, &[y]);
        assert_eq!(check(&[&MergeReshapes], b.finish(&[y]), 0.0), ["Neg"]);
    }

    #[test]
    fn a_computed_shape_becomes_constant() {
        let mut b = Builder::new(1);
        let x = b.symbolic_input("x", &["N", "S", "24"]);
        let shape = b.node(Shape { start: 0, end: None }, &[x]);
        let (i0, i1, rest) = (b.integers(&[0]), b.integers(&[1]), b.integers(&[4, 6]));
        let n = b.node(Gather { axis: 0 }, &[shape, i0]);
        let s = b.node(Gather { axis: 0 }, &[shape, i1]);
        let target = b.node(Concat { axis: 0 }, &[n, s, rest]);
        let y = b.node(Reshape { allow_zero: false }, &[x, target]);
        // Two symbols that move cannot be spelled.
        let swapped = b.node(Concat { axis: 0 }, &[s, n, rest]);
        let z = b.node(Reshape { allow_zero: false }, &[x, swapped]);
        let left = check(&[&MergeReshapes], b.finish(&[y, z]), 0.0);
        assert_eq!(left, ["Shape", "Gather", "Gather", "Concat", "Reshape", "Reshape"]);
    }
}
