//! A sum after a product becomes the product's own: a constant its bias, another tensor a convolution's residual.

use super::{
    Pass, Subject,
    fold_scales::{broadcast_to, is_wide_float, per_channel},
    subject::is_binary,
};
use crate::{
    Constant, Node, NodeId, Op, Patch, PatchValue, ValueId,
    ops::{BinaryFunction, Gemm, Wide},
};
use cutover_tensor::DType;

pub(super) struct FuseBias;

impl Pass for FuseBias {
    fn name(&self) -> &'static str {
        "fuse-bias"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        let (sum, subtracts) = (is_binary(node, BinaryFunction::Add), is_binary(node, BinaryFunction::Sub));
        if !sum && !subtracts {
            return None;
        }
        let (input, added) = subject.split_constant(node)?;
        // `c - x` is no sum of the product.
        if subtracts && subject.input(node, 1) != Some(added) || !subject.same_type(input, node.outputs[0]) {
            return None;
        }
        let dtype = subject.dtype(input).filter(|&d| is_wide_float(Some(d)))?;
        let (_, product) = subject.sole_producer(input)?;
        let sign = if subtracts { -1.0 } else { 1.0 };
        let mut patch = Patch::new();
        let (op, bias, shape) = match &product.op {
            Op::Conv(op) if op.activation.is_none() && subject.input(product, 3).is_none() => {
                let channels = per_channel(subject, added, input)?;
                (product.op.clone(), with_old_bias(subject, product, &channels, sign)?, vec![channels.len()])
            }
            Op::ConvTranspose(_) => {
                let channels = per_channel(subject, added, input)?;
                (product.op.clone(), with_old_bias(subject, product, &channels, sign)?, vec![channels.len()])
            }
            Op::MatMul(op) if op.activation.is_none() && is_matrices(subject, product) => {
                let columns = per_column(subject, added, input)?;
                (product.op.clone(), with_old_bias(subject, product, &columns, sign)?, vec![columns.len()])
            }
            Op::Gemm(op) if op.activation.is_none() => {
                let columns = per_column(subject, added, input)?;
                let beta = f64::from(op.beta);
                let bias = match subject.input(product, 2) {
                    None => columns.iter().map(|c| sign * c).collect(),
                    Some(old) => {
                        let old = per_column(subject, old, input)?;
                        old.iter().zip(&columns).map(|(old, c)| beta * old + sign * c).collect()
                    }
                };
                (Gemm { beta: 1.0, ..op.clone() }.into(), bias, vec![columns.len()])
            }
            _ => return None,
        };
        let tensor = Wide::Float(bias).narrow(dtype, shape).ok()?;
        let bias = patch.constant(format!("{}.bias", product.name), Constant::new(tensor));
        let inputs = [0, 1].map(|index| subject.input(product, index).map(PatchValue::from));
        let fused = patch.node(&product.name, op, &[inputs[0], inputs[1], Some(bias)]);
        patch.replace(node.outputs[0], fused);
        Some(patch)
    }
}

fn is_matrices(subject: &Subject, product: &Node) -> bool {
    (0..2).all(|i| subject.input(product, i).and_then(|v| subject.shape(v)).is_some_and(|s| s.len() >= 2))
}

/// `sign · added` beside the constant bias that the product has in its third input, if any.
fn with_old_bias(subject: &Subject, product: &Node, added: &[f64], sign: f64) -> Option<Vec<f64>> {
    let Some(old) = subject.input(product, 2) else { return Some(added.iter().map(|c| sign * c).collect()) };
    let old = subject.floats(old).filter(|old| old.len() == added.len())?;
    Some(old.iter().zip(added).map(|(old, c)| old + sign * c).collect())
}

/// The elements of `constant` for every place on the last axis of `value`, where broadcasting depends on that axis alone.
fn per_column(subject: &Subject, constant: ValueId, value: ValueId) -> Option<Vec<f64>> {
    let columns = usize::try_from(subject.shape(value)?.last()?.as_const()?).ok()?;
    let tensor = &subject.constant(constant)?.tensor;
    let is_row = matches!(tensor.shape().dims(), [lead @ .., last] if lead.iter().all(|&d| d == 1) && [1, columns].contains(last));
    let row = tensor.reshape([tensor.element_count()]).ok()?;
    (is_row || tensor.shape().rank() == 0).then(|| Wide::floats(&broadcast_to(&row, &[columns])?).ok())?
}

pub(super) struct FuseResidual;

impl Pass for FuseResidual {
    fn name(&self) -> &'static str {
        "fuse-residual"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        if !is_binary(node, BinaryFunction::Add) {
            return None;
        }
        let (a, b) = (subject.input(node, 0)?, subject.input(node, 1)?);
        if subject.dtype(a) != Some(DType::F32) {
            return None;
        }
        let convolution = |value: ValueId| {
            let (id, producer) = subject.sole_producer(value)?;
            let fits = matches!(&producer.op, Op::Conv(op) if op.activation.is_none());
            (fits && subject.input(producer, 3).is_none()).then_some((id, producer))
        };
        // Of two convolutions, the later one: the other's result is there by then.
        let (product, product_id, residual) = match (convolution(a), convolution(b)) {
            (Some((x, _)), Some((y, producer))) if y > x => (producer, y, a),
            (Some((x, producer)), _) => (producer, x, b),
            (None, Some((y, producer))) => (producer, y, a),
            (None, None) => return None,
        };
        let output = node.outputs[0];
        if residual_depends(subject, residual, product_id)
            || !subject.same_type(residual, output)
            || !subject.same_type(a, b)
        {
            return None;
        }
        let mut patch = Patch::new();
        let mut inputs: Vec<Option<PatchValue>> =
            (0..3).map(|i| subject.input(product, i).map(PatchValue::from)).collect();
        inputs.push(Some(residual.into()));
        let fused = patch.node(&product.name, product.op.clone(), &inputs);
        patch.replace(output, fused);
        Some(patch)
    }
}

/// A convolution that is read once cannot feed what it is added to; it could only be added to itself.
fn residual_depends(subject: &Subject, residual: ValueId, product: NodeId) -> bool {
    subject.producer(residual).is_some_and(|(id, _)| id == product)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{Binary, Conv, MatMul, Padding, Window},
        passes::testing::{Builder, check},
    };

    fn conv() -> Conv {
        let padding = Padding::Explicit { begin: vec![1, 1], end: vec![1, 1] };
        let window = Window { kernel_shape: None, strides: vec![], dilations: vec![], padding, ceil_mode: false };
        Conv { window, group: 1, activation: None }
    }

    const ADD: Binary = Binary { function: BinaryFunction::Add };
    const SUB: Binary = Binary { function: BinaryFunction::Sub };
    /// Two biases are added before they are rounded.
    const ROUNDING: f64 = 1e-6;

    #[test]
    fn constants_become_biases() {
        for with_bias in [false, true] {
            let mut b = Builder::new(5);
            let x = b.symbolic_input("x", &["N", "3", "5", "6"]);
            let (w, old, added) = (b.weight(&[4, 3, 3, 3]), b.weight(&[4]), b.weight(&[1, 4, 1, 1]));
            let y = b.node(conv(), &[&[x, w][..], &[old][..usize::from(with_bias)]].concat());
            let y = b.node(ADD, &[added, y]);
            let y = b.node(SUB, &[y, added]);
            assert_eq!(check(&[&FuseBias], b.finish(&[y]), ROUNDING), ["Conv"]);

            let mut b = Builder::new(5);
            let x = b.symbolic_input("x", &["N", "S", "6"]);
            let (w, old, added) = (b.weight(&[6, 4]), b.weight(&[4]), b.weight(&[1, 1, 4]));
            let y = b.node(MatMul { activation: None }, &[&[x, w][..], &[old][..usize::from(with_bias)]].concat());
            let y = b.node(ADD, &[y, added]);
            assert_eq!(check(&[&FuseBias], b.finish(&[y]), ROUNDING), ["MatMul"]);

            let mut b = Builder::new(5);
            let x = b.symbolic_input("x", &["N", "6"]);
            let (w, old, added) = (b.weight(&[4, 6]), b.weight(&[1, 4]), b.scalar(0.75));
            let gemm = Gemm { alpha: 0.5, beta: 0.25, transpose_a: false, transpose_b: true, activation: None };
            let y = b.node(gemm, &[&[x, w][..], &[old][..usize::from(with_bias)]].concat());
            let y = b.node(SUB, &[y, added]);
            assert_eq!(check(&[&FuseBias], b.finish(&[y]), ROUNDING), ["Gemm"]);
        }
    }

    #[test]
    fn what_is_no_bias_stays_a_sum() {
        let mut b = Builder::new(5);
        let x = b.input("x", &[3, 6]);
        let (w, rows, larger) = (b.weight(&[6, 4]), b.weight(&[3, 1]), b.weight(&[2, 1, 4]));
        let y = b.node(MatMul { activation: None }, &[x, w]);
        let y = b.node(ADD, &[y, rows]);
        let z = b.node(MatMul { activation: None }, &[x, w]);
        let z = b.node(ADD, &[z, larger]);
        let u = b.node(MatMul { activation: None }, &[x, w]);
        let u = b.node(SUB, &[rows, u]);
        let left = check(&[&FuseBias], b.finish(&[y, z, u]), 0.0);
        assert_eq!(left, ["MatMul", "Add", "MatMul", "Add", "MatMul", "Sub"]);
    }

    #[test]
    fn residuals_go_into_the_later_convolution() {
        let mut b = Builder::new(5);
        let x = b.symbolic_input("x", &["N", "4", "5", "5"]);
        let (v, w) = (b.weight(&[4, 4, 3, 3]), b.weight(&[4, 4, 3, 3]));
        let y = b.node(conv(), &[x, v]);
        let z = b.node(conv(), &[x, w]);
        let y = b.node(ADD, &[y, z]);
        let y = b.node(ADD, &[x, y]);
        // The second sum finds a convolution that has its residual.
        assert_eq!(check(&[&FuseResidual], b.finish(&[y]), ROUNDING), ["Conv", "Conv", "Add"]);
    }

    #[test]
    fn a_residual_of_another_shape_or_of_itself_is_left() {
        let mut b = Builder::new(5);
        let (x, z) = (b.input("x", &[2, 4, 5, 5]), b.input("z", &[1, 4, 1, 1]));
        let w = b.weight(&[4, 4, 3, 3]);
        let y = b.node(conv(), &[x, w]);
        let y = b.node(ADD, &[y, z]);
        let u = b.node(conv(), &[y, w]);
        let u = b.node(ADD, &[u, u]);
        assert_eq!(check(&[&FuseResidual], b.finish(&[u]), 0.0), ["Conv", "Add", "Conv", "Add"]);
    }
}
