//! Nodes that hand one of their inputs on unchanged go.

use super::{Pass, Subject};
use crate::{
    Node, NodeId, Op, Patch, ValueId,
    ops::{BinaryFunction, Wide},
};

pub(super) struct RemoveNoOps;

impl Pass for RemoveNoOps {
    fn name(&self) -> &'static str {
        "remove-no-ops"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        let (handed_on, output) = (handed_on(subject, node)?, node.outputs[0]);
        // A second output (a mask) must be of no use, and no broadcasting or reshaping may hide in the node.
        let others_used = node.outputs[1..].iter().any(|&o| subject.is_output(o) || !subject.users(o).is_empty());
        let exact = matches!(node.op, Op::Identity(_)) || subject.same_type(handed_on, output);
        if others_used || !exact {
            return None;
        }
        let mut patch = Patch::new();
        patch.replace(output, handed_on);
        Some(patch)
    }
}

/// The input that the output equals, provided that both have one type and shape.
fn handed_on(subject: &Subject, node: &Node) -> Option<ValueId> {
    let first = subject.input(node, 0);
    let holds = match &node.op {
        Op::Identity(_) | Op::Reshape(_) | Op::Squeeze(_) | Op::Unsqueeze(_) | Op::Flatten(_) => true,
        // With the shape unchanged, nothing was repeated.
        Op::Expand(_) | Op::Tile(_) => true,
        Op::Cast(_) => true,
        Op::Dropout(_) => match subject.input(node, 2) {
            Some(training) => subject.fact(training)?.constant_value()?.iter().all(|&v| v == 0),
            None => true,
        },
        Op::Transpose(op) => {
            let rank = subject.shape(first?)?.len();
            op.permutation(rank).ok()?.into_iter().eq(0..rank)
        }
        // As many elements as before, and none in reverse: all of them in order.
        Op::Slice(_) => match subject.input(node, 4) {
            Some(steps) => subject.integers(steps)?.iter().all(|&step| step > 0),
            None => true,
        },
        Op::Concat(_) | Op::Variadic(_) => node.inputs.len() == 1,
        Op::Clip(_) => subject.input(node, 1).is_none() && subject.input(node, 2).is_none(),
        Op::Binary(op) => return neutral(subject, node, op.function),
        _ => false,
    };
    first.filter(|_| holds)
}

/// The operand beside a neutral element: `x + 0`, `x - 0`, `x · 1`, `x / 1`, `x ^ 1`, `x ∧ 1`, `x ∨ 0`.
fn neutral(subject: &Subject, node: &Node, function: BinaryFunction) -> Option<ValueId> {
    use BinaryFunction::*;
    let (operand, constant) = subject.split_constant(node)?;
    let is_second = subject.input(node, 1) == Some(constant);
    let neutral = match function {
        Add | Or => 0.0,
        Sub if is_second => 0.0,
        Mul | And => 1.0,
        Div | Pow if is_second => 1.0,
        _ => return None,
    };
    let all = match Wide::of(&subject.constant(constant)?.tensor).ok()? {
        Wide::Float(v) => v.iter().all(|&v| v == neutral),
        Wide::Int(v) => v.iter().all(|&v| v == neutral as i128),
        Wide::Bool(v) => v.iter().all(|&v| v == (neutral == 1.0)),
    };
    all.then_some(operand)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{Binary, Cast, Concat, Dropout, Expand, Identity, Reshape, Slice, Transpose, Unary, UnaryFunction},
        passes::testing::{Builder, check},
    };
    use cutover_tensor::DType;

    #[test]
    fn what_changes_nothing_goes() {
        let mut b = Builder::new(1);
        let x = b.symbolic_input("x", &["N", "4"]);
        let (one, zero) = (b.scalar(1.0), b.scalar(0.0));
        let (shape, ones) = (b.integers(&[0, 4]), b.integers(&[1, 1]));
        let (starts, ends) = (b.integers(&[0]), b.integers(&[i64::MAX]));
        let mut y = b.node(Identity, &[x]);
        y = b.nodes(Dropout { seed: 0, mask_as_data: false }, &[y], 2)[0];
        y = b.node(Cast::to(DType::F32), &[y]);
        y = b.node(Reshape { allow_zero: false }, &[y, shape]);
        y = b.node(Transpose { permutation: Some(vec![0, 1]) }, &[y]);
        y = b.node(Slice, &[y, starts, ends]);
        y = b.node(Concat { axis: 0 }, &[y]);
        y = b.node(Expand, &[y, ones]);
        y = b.node(Binary { function: BinaryFunction::Mul }, &[one, y]);
        y = b.node(Binary { function: BinaryFunction::Sub }, &[y, zero]);
        y = b.node(Unary { function: UnaryFunction::Neg }, &[y]);
        assert_eq!(check(&[&RemoveNoOps], b.finish(&[y]), 0.0), ["Neg"]);
    }

    #[test]
    fn what_changes_something_stays() {
        let mut b = Builder::new(1);
        let x = b.input("x", &[1, 4]);
        let (one, zero, ones) = (b.scalar(1.0), b.scalar(0.0), b.weight(&[3, 1]));
        let ones = b.node(Binary { function: BinaryFunction::Pow }, &[ones, zero]);
        let (starts, ends, axes, steps) =
            (b.integers(&[-1]), b.integers(&[i64::MIN]), b.integers(&[1]), b.integers(&[-1]));
        let mut y = b.node(Slice, &[x, starts, ends, axes, steps]);
        y = b.node(Binary { function: BinaryFunction::Sub }, &[zero, y]);
        y = b.node(Binary { function: BinaryFunction::Div }, &[one, y]);
        // Broadcasts.
        y = b.node(Binary { function: BinaryFunction::Mul }, &[y, ones]);
        let graph = b.finish(&[y]);
        assert_eq!(check(&[&RemoveNoOps], graph, 0.0), ["Pow", "Slice", "Sub", "Div", "Mul"]);
    }

    #[test]
    fn outputs_keep_their_names() {
        let mut b = Builder::new(1);
        let x = b.input("x", &[4]);
        let same = b.node(Identity, &[x]);
        let neg = b.node(Unary { function: UnaryFunction::Neg }, &[same]);
        let out = b.node(Identity, &[neg]);
        let twice = b.node(Identity, &[out]);
        // An output that is an input, and two outputs that are one value, each need a node.
        let graph = b.finish(&[same, out, twice]);
        assert_eq!(check(&[&RemoveNoOps], graph, 0.0).len(), 3);
    }
}
