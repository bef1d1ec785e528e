//! An activation after a product is applied by the product before it stores.

use super::{
    Pass, Subject,
    subject::{is_binary, is_unary},
};
use crate::{
    Node, NodeId, Op, Patch, PatchValue, ValueId,
    ops::{Activation, BinaryFunction, UnaryFunction},
};
use cutover_tensor::DType;

pub(super) struct FuseActivations;

impl Pass for FuseActivations {
    fn name(&self) -> &'static str {
        "fuse-activations"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        let (input, activation) = of_node(subject, node)?;
        if subject.dtype(input) != Some(DType::F32) {
            return None;
        }
        let (_, product) = subject.producer(input)?;
        let op = with_activation(&product.op, activation)?;
        let inputs: Vec<Option<PatchValue>> = product.inputs.iter().map(|i| i.map(PatchValue::from)).collect();
        let mut patch = Patch::new();
        let fused = patch.node(&product.name, op, &inputs);
        patch.replace(node.outputs[0], fused);
        Some(patch)
    }
}

/// The activation that ends in `node`, and the value it is applied to, which nothing else reads.
fn of_node(subject: &Subject, node: &Node) -> Option<(ValueId, Activation)> {
    match &node.op {
        Op::Unary(op) => {
            let input = subject.input(node, 0)?;
            subject.sole_producer(input)?;
            Some((input, op.function.activation()?))
        }
        Op::Clip(_) => {
            let input = subject.input(node, 0)?;
            subject.sole_producer(input)?;
            let bound = |index, open: f32| match subject.input(node, index) {
                Some(bound) => subject.scalar(bound).map(|v| v as f32),
                None => Some(open),
            };
            let (low, high) = (bound(1, f32::NEG_INFINITY)?, bound(2, f32::INFINITY)?);
            let activation = match (low, high) {
                (0.0, f32::INFINITY) => Activation::Relu,
                // Between bounds that cross, Clip gives the upper one, whatever the input.
                _ if low > high || low.is_nan() || high.is_nan() => return None,
                _ => Activation::Clip { low, high },
            };
            Some((input, activation))
        }
        // x · σ(x): both read the product, and nothing else does.
        Op::Binary(_) if is_binary(node, BinaryFunction::Mul) => {
            let (a, b) = (subject.input(node, 0)?, subject.input(node, 1)?);
            let gates = |gate: ValueId, input: ValueId| {
                let (_, producer) = subject.sole_producer(gate)?;
                let reads = is_unary(producer, UnaryFunction::Sigmoid) && subject.input(producer, 0) == Some(input);
                (reads && subject.users(input).len() == 2 && !subject.is_output(input))
                    .then_some((input, Activation::Silu))
            };
            gates(b, a).or_else(|| gates(a, b))
        }
        _ => None,
    }
}

fn with_activation(op: &Op, activation: Activation) -> Option<Op> {
    let activation = Some(activation);
    match op.clone() {
        Op::Conv(op) if op.activation.is_none() => Some(crate::ops::Conv { activation, ..op }.into()),
        Op::MatMul(op) if op.activation.is_none() => Some(crate::ops::MatMul { activation }.into()),
        Op::Gemm(op) if op.activation.is_none() => Some(crate::ops::Gemm { activation, ..op }.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{Binary, Clip, Conv, Gemm, MatMul, Padding, Unary, Window},
        passes::testing::{Builder, check},
    };

    #[test]
    fn products_apply_activations() {
        use UnaryFunction::*;
        let functions = [
            Relu,
            Sigmoid,
            Tanh,
            HardSwish,
            LeakyRelu { alpha: 0.2 },
            HardSigmoid { alpha: 0.25, beta: 0.5 },
            Gelu { tanh: false },
            Gelu { tanh: true },
        ];
        for function in functions {
            let mut b = Builder::new(2);
            let x = b.symbolic_input("x", &["N", "4"]);
            let (v, w, u) = (b.weight(&[4, 4]), b.weight(&[4, 4]), b.weight(&[4, 4, 1]));
            let gemm = Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b: true, activation: None };
            let y = b.node(MatMul { activation: None }, &[x, v]);
            let y = b.node(Unary { function }, &[y]);
            let y = b.node(gemm, &[y, w]);
            let y = b.node(Unary { function }, &[y]);
            let axis = b.integers(&[2]);
            let y = b.node(crate::ops::Unsqueeze, &[y, axis]);
            let padding = Padding::Explicit { begin: vec![], end: vec![] };
            let window = Window { kernel_shape: None, strides: vec![], dilations: vec![], padding, ceil_mode: false };
            let y = b.node(Conv { window, group: 1, activation: None }, &[y, u]);
            let y = b.node(Unary { function }, &[y]);
            // Intermediate results are no longer rounded.
            assert_eq!(check(&[&FuseActivations], b.finish(&[y]), 1e-6), ["MatMul", "Gemm", "Unsqueeze", "Conv"]);
        }
    }

    #[test]
    fn bounds_and_gates() {
        let mut b = Builder::new(2);
        let x = b.symbolic_input("x", &["N", "4"]);
        let (w, zero, six) = (b.weight(&[4, 4]), b.scalar(0.0), b.scalar(6.0));
        let y = b.node(MatMul { activation: None }, &[x, w]);
        let y = b.node(Clip, &[y, zero, six]);
        let y = b.node(MatMul { activation: None }, &[y, w]);
        let y = b.node(Clip, &[y, zero]);
        let y = b.node(MatMul { activation: None }, &[y, w]);
        let gate = b.node(Unary { function: UnaryFunction::Sigmoid }, &[y]);
        let y = b.node(Binary { function: BinaryFunction::Mul }, &[gate, y]);
        assert_eq!(check(&[&FuseActivations], b.finish(&[y]), 1e-6), ["MatMul", "MatMul", "MatMul"]);
    }

    #[test]
    fn what_others_read_is_not_fused() {
        let mut b = Builder::new(2);
        let x = b.symbolic_input("x", &["N", "4"]);
        let w = b.weight(&[4, 4]);
        let product = b.node(MatMul { activation: None }, &[x, w]);
        let gate = b.node(Unary { function: UnaryFunction::Sigmoid }, &[product]);
        let y = b.node(Binary { function: BinaryFunction::Mul }, &[gate, product]);
        let z = b.node(MatMul { activation: None }, &[x, w]);
        let r = b.node(Unary { function: UnaryFunction::Relu }, &[z]);
        let s = b.node(Binary { function: BinaryFunction::Mul }, &[r, z]);
        let left = check(&[&FuseActivations], b.finish(&[y, product, s]), 0.0);
        assert_eq!(left, ["MatMul", "Sigmoid", "Mul", "MatMul", "Relu", "Mul"]);
    }
}
