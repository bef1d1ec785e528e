//! Transposes merge with each other, go into products that read either way, and become a Reshape where only axes of extent 1 move.

use super::{Pass, Subject, merge_reshapes::reshape};
use crate::{
    Node, NodeId, Op, Patch, PatchValue, ValueId,
    ops::{Gemm, Transpose},
};

pub(super) struct MergeTransposes;

impl Pass for MergeTransposes {
    fn name(&self) -> &'static str {
        "merge-transposes"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        match &node.op {
            Op::Transpose(op) => merge(subject, node, op),
            Op::Gemm(op) => into_gemm(subject, node, op.clone()),
            Op::MatMul(op) => {
                // Of matrices, the general product is the same sum.
                let is_matrix = |index| Some(subject.shape(subject.input(node, index)?)?.len() == 2);
                let transposed = |index| transposed(subject, subject.input(node, index)?);
                let applies = is_matrix(0)? && is_matrix(1)? && (transposed(0).is_some() || transposed(1).is_some());
                let gemm =
                    Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b: false, activation: op.activation };
                if applies { into_gemm(subject, node, gemm) } else { None }
            }
            _ => None,
        }
    }
}

fn merge(subject: &Subject, node: &Node, op: &Transpose) -> Option<Patch> {
    let (input, output) = (subject.input(node, 0)?, node.outputs[0]);
    let shape = subject.shape(input)?;
    let permutation = op.permutation(shape.len()).ok()?;
    let mut patch = Patch::new();
    if let Some((_, before)) = subject.producer(input)
        && let Op::Transpose(first) = &before.op
    {
        let first = first.permutation(shape.len()).ok()?;
        let permutation = permutation.iter().map(|&axis| first[axis]).collect();
        let input = subject.input(before, 0)?;
        let merged = Transpose { permutation: Some(permutation) };
        let merged = patch.node(&node.name, merged, &[Some(input.into())]);
        patch.replace(output, merged);
        return Some(patch);
    }
    let is_one = |axis: usize| shape[axis].as_const() == Some(1);
    let moved: Vec<usize> = permutation.into_iter().filter(|&axis| !is_one(axis)).collect();
    if !moved.is_sorted() {
        return None;
    }
    let reshaped = reshape(subject, &mut patch, &node.name, input, subject.shape(output)?)?;
    patch.replace(output, reshaped);
    Some(patch)
}

/// The matrix whose transposition `value` is.
fn transposed(subject: &Subject, value: ValueId) -> Option<ValueId> {
    let (_, node) = subject.producer(value)?;
    let Op::Transpose(op) = &node.op else { return None };
    let input = subject.input(node, 0)?;
    let is_swap = subject.shape(input)?.len() == 2 && op.permutation(2).ok()? == [1, 0];
    is_swap.then_some(input)
}

fn into_gemm(subject: &Subject, node: &Node, mut gemm: Gemm) -> Option<Patch> {
    let mut inputs: Vec<Option<PatchValue>> = node.inputs.iter().map(|i| i.map(PatchValue::from)).collect();
    let mut any = false;
    for (index, input) in inputs.iter_mut().take(2).enumerate() {
        if let Some(matrix) = transposed(subject, subject.input(node, index)?) {
            *input = Some(matrix.into());
            let flag = if index == 0 { &mut gemm.transpose_a } else { &mut gemm.transpose_b };
            *flag = !*flag;
            any = true;
        }
    }
    let mut patch = Patch::new();
    let product = patch.node(&node.name, gemm, &inputs);
    patch.replace(node.outputs[0], product);
    any.then_some(patch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{MatMul, Unary, UnaryFunction},
        passes::testing::{Builder, check},
    };

    fn transpose(permutation: &[usize]) -> Transpose {
        Transpose { permutation: Some(permutation.to_vec()) }
    }

    #[test]
    fn transposes_merge() {
        let left = |second: &[usize]| {
            let mut b = Builder::new(1);
            let x = b.symbolic_input("x", &["N", "3", "4", "5"]);
            let y = b.node(transpose(&[0, 2, 3, 1]), &[x]);
            let y = b.node(transpose(second), &[y]);
            let y = b.node(Unary { function: UnaryFunction::Neg }, &[y]);
            check(&[&MergeTransposes, &super::super::remove_no_ops::RemoveNoOps], b.finish(&[y]), 0.0)
        };
        assert_eq!(left(&[0, 3, 1, 2]), ["Neg"]);
        assert_eq!(left(&[1, 3, 0, 2]), ["Transpose", "Neg"]);
    }

    #[test]
    fn moving_ones_is_reshaping() {
        let left = |permutation: &[usize]| {
            let mut b = Builder::new(1);
            let x = b.symbolic_input("x", &["N", "1", "4", "1"]);
            let y = b.node(transpose(permutation), &[x]);
            check(&[&MergeTransposes], b.finish(&[y]), 0.0)
        };
        assert_eq!(left(&[0, 2, 1, 3]), ["Reshape"]);
        assert_eq!(left(&[2, 0, 1, 3]), ["Transpose"]);
    }

    #[test]
    fn products_read_either_way() {
        let mut b = Builder::new(1);
        let x = b.symbolic_input("x", &["N", "4"]);
        let (w, v) = (b.input("w", &[6, 4]), b.input("v", &[3, 6]));
        let t = b.node(Transpose { permutation: None }, &[w]);
        let y = b.node(MatMul { activation: None }, &[x, t]);
        let y = b.node(Transpose { permutation: None }, &[y]);
        let t = b.node(transpose(&[1, 0]), &[v]);
        let gemm = Gemm { alpha: 0.5, beta: 1.0, transpose_a: true, transpose_b: false, activation: None };
        let y = b.node(gemm, &[y, t]);
        assert_eq!(check(&[&MergeTransposes], b.finish(&[y]), 1e-6), ["Gemm", "Gemm"]);
    }
}
