//! What another engine fused for kernels of its own is taken apart, into operators that passes and kernels here know.

use super::{Pass, Subject};
use crate::{
    Constant, Node, NodeId, Op, Patch, PatchValue, ValueId,
    ops::{Binary, BinaryFunction, ChannelsLast, FactorOrder, FusedGemm, FusedMatMul, MatMul, Transpose, Unary},
};
use cutover_tensor::{DType, Tensor};

pub(super) struct ExpandFused;

impl Pass for ExpandFused {
    fn name(&self) -> &'static str {
        "expand-fused"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        match &node.op {
            Op::FusedMatMul(op) => matmul(subject, node, op),
            Op::FusedGemm(op) => gemm(node, op),
            Op::ChannelsLast(op) => channels_last(subject, node, op),
            _ => None,
        }
    }
}

fn transpose(patch: &mut Patch, name: String, input: PatchValue, permutation: Vec<usize>) -> PatchValue {
    patch.node(name, Transpose { permutation: Some(permutation) }, &[Some(input)])
}

/// Transposes before the product, the factor and the function after it.
fn matmul(subject: &Subject, node: &Node, op: &FusedMatMul) -> Option<Patch> {
    let mut patch = Patch::new();
    let mut factor = |index: usize, order: FactorOrder| {
        let input = subject.input(node, index)?;
        let axes: Vec<usize> = (0..subject.shape(input)?.len()).collect();
        let permutation = order.permute(&axes);
        Some(match permutation == axes {
            true => input.into(),
            false => transpose(&mut patch, format!("{}.{index}", node.name), input.into(), permutation),
        })
    };
    let (a, b) = (factor(0, op.a)?, factor(1, op.b)?);
    if op.alpha != 1.0 && subject.dtype(node.outputs[0]) != Some(DType::F32) {
        return None;
    }
    let mut y = patch.node(&node.name, MatMul { activation: None }, &[Some(a), Some(b)]);
    if op.alpha != 1.0 {
        let alpha = patch.constant(format!("{}.alpha", node.name), Constant::new(Tensor::scalar(op.alpha)));
        let op = Binary { function: BinaryFunction::Mul };
        y = patch.node(format!("{}.scaled", node.name), op, &[Some(y), Some(alpha)]);
    }
    if let Some(function) = op.function {
        y = patch.node(format!("{}.function", node.name), Unary { function }, &[Some(y)]);
    }
    patch.replace(node.outputs[0], y);
    Some(patch)
}

fn inputs(node: &Node) -> Vec<Option<PatchValue>> {
    node.inputs.iter().map(|input| input.map(PatchValue::from)).collect()
}

fn gemm(node: &Node, op: &FusedGemm) -> Option<Patch> {
    let mut patch = Patch::new();
    let product = patch.node(&node.name, op.gemm.clone(), &inputs(node));
    let y = patch.node(format!("{}.function", node.name), Unary { function: op.function }, &[Some(product)]);
    patch.replace(node.outputs[0], y);
    Some(patch)
}

/// Transposes round the operator, which then has its channels first.
fn channels_last(subject: &Subject, node: &Node, op: &ChannelsLast) -> Option<Patch> {
    let mut patch = Patch::new();
    let rank = |value: ValueId| Some(subject.shape(value)?.len()).filter(|&rank| rank > 2);
    let mut inputs = inputs(node);
    for &index in op.images() {
        let Some(image) = subject.input(node, index) else { continue };
        let first = [0, rank(image)? - 1].into_iter().chain(1..rank(image)? - 1).collect();
        inputs[index] = Some(transpose(&mut patch, format!("{}.{index}", node.name), image.into(), first));
    }
    let last = [0].into_iter().chain(2..rank(subject.input(node, 0)?)?).chain([1]).collect();
    let y = patch.node(&node.name, op.operator(), &inputs);
    let y = transpose(&mut patch, format!("{}.last", node.name), y, last);
    patch.replace(node.outputs[0], y);
    Some(patch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{Activation, ChannelsFirst, Conv, Gemm, Padding, UnaryFunction, Window},
        passes::testing::{Builder, check},
    };

    #[test]
    fn products_are_taken_apart() {
        let mut b = Builder::new(4);
        let x = b.symbolic_input("x", &["N", "N", "N"]);
        let (plain, both) = (FactorOrder::default(), FactorOrder { batch: true, transpose: true });
        let turned = FactorOrder { batch: false, transpose: true };
        let function = Some(UnaryFunction::Softsign);
        let y = b.node(FusedMatMul { a: plain, b: turned, alpha: 0.3, function }, &[x, x]);
        let w = b.node(FusedMatMul { a: both, b: turned, alpha: 1.0, function: None }, &[x, x]);
        let ops = check(&[&ExpandFused], b.finish(&[y, w]), 1e-6);
        assert!(!ops.iter().any(|op| op.contains("Fused")), "{ops:?}");
        let mut b = Builder::new(4);
        let (x, w) = (b.symbolic_input("x", &["N", "4"]), b.weight(&[4, 2]));
        let gemm = Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b: false, activation: None };
        let y = b.node(FusedGemm { gemm, function: UnaryFunction::Softplus }, &[x, w]);
        assert_eq!(check(&[&ExpandFused], b.finish(&[y]), 1e-6), ["Gemm", "Softplus"]);
    }

    #[test]
    fn channels_come_first() {
        let mut b = Builder::new(5);
        let (x, w) = (b.symbolic_input("x", &["N", "4", "N", "2"]), b.weight(&[3, 2, 2, 2]));
        let padding = Padding::SameUpper;
        let window = Window { kernel_shape: None, strides: vec![], dilations: vec![], padding, ceil_mode: false };
        let conv = Conv { window, group: 1, activation: Some(Activation::Relu) };
        let y = b.node(ChannelsLast { of: ChannelsFirst::Conv(conv) }, &[x, w]);
        assert_eq!(check(&[&ExpandFused], b.finish(&[y]), 1e-6), ["Transpose", "Conv", "Transpose"]);
    }
}
