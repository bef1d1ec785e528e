//! Batch normalisation and constant factors per channel go into the weights of the convolution before them; a batch normalisation that
//! stands alone becomes a product and a sum.
//!
//! With `a = scale / √(variance + epsilon)` the weights are `a · W` and the bias `(B − mean) · a + bias`, computed in double precision and
//! rounded once.

use super::{Pass, Subject, subject::is_binary};
use crate::{
    Constant, Dim, Node, NodeId, Op, Patch, PatchValue, ValueId,
    ops::{BatchNorm, Binary, BinaryFunction, Wide, broadcast_index},
};
use cutover_tensor::{DType, Tensor};

pub(super) struct FoldScales;

impl Pass for FoldScales {
    fn name(&self) -> &'static str {
        "fold-scales"
    }

    fn propose(&self, subject: &Subject, id: NodeId) -> Option<Patch> {
        let node = subject.node(id);
        if let Op::BatchNorm(op) = &node.op {
            let affine = Affine::of_batch_norm(subject, node, op)?;
            let input = subject.input(node, 0)?;
            return into_weights(subject, node, input, &affine).or_else(|| alone(subject, node, input, &affine));
        }
        let (input, affine) = Affine::of_product(subject, node)?;
        into_weights(subject, node, input, &affine)
    }
}

/// `y = factor · x + offset`, for every channel.
struct Affine {
    factor: Vec<f64>,
    offset: Vec<f64>,
}

impl Affine {
    fn of_batch_norm(subject: &Subject, node: &Node, op: &BatchNorm) -> Option<Affine> {
        if op.training.is_some() || op.per_element {
            return None;
        }
        let parameter = |index| subject.floats(subject.input(node, index)?);
        let (scale, bias, mean, variance) = (parameter(1)?, parameter(2)?, parameter(3)?, parameter(4)?);
        if [&bias, &mean, &variance].iter().any(|p| p.len() != scale.len()) {
            return None;
        }
        let deviation = variance.iter().map(|v| (v + f64::from(op.epsilon)).sqrt());
        let factor: Vec<f64> = scale.iter().zip(deviation).map(|(scale, deviation)| scale / deviation).collect();
        let offset = bias.iter().zip(&mean).zip(&factor).map(|((bias, mean), factor)| bias - mean * factor).collect();
        Some(Affine { factor, offset }).filter(|a: &Affine| a.factor.iter().chain(&a.offset).all(|v| v.is_finite()))
    }

    /// A product with, or division by, a constant that has one element for every channel, or one for all.
    fn of_product(subject: &Subject, node: &Node) -> Option<(ValueId, Affine)> {
        let divides = is_binary(node, BinaryFunction::Div);
        if !divides && !is_binary(node, BinaryFunction::Mul) {
            return None;
        }
        let (input, constant) = subject.split_constant(node)?;
        if divides && subject.input(node, 1) != Some(constant) || !subject.same_type(input, node.outputs[0]) {
            return None;
        }
        let factor = per_channel(subject, constant, input)?;
        let factor: Vec<f64> = if divides { factor.into_iter().map(|v| 1.0 / v).collect() } else { factor };
        let offset = vec![0.0; factor.len()];
        factor.iter().all(|v| v.is_finite()).then_some((input, Affine { factor, offset }))
    }
}

/// The elements of `constant` for every channel of `value` (`[n, c, …]`), where broadcasting depends on the channel alone.
pub(super) fn per_channel(subject: &Subject, constant: ValueId, value: ValueId) -> Option<Vec<f64>> {
    let shape = subject.shape(value)?;
    let channels = usize::try_from(shape.get(1)?.as_const()?).ok()?;
    let tensor = &subject.constant(constant)?.tensor;
    let lead = shape.len().checked_sub(tensor.shape().rank())?;
    let on_channels = |(axis, &extent): (usize, &usize)| extent == 1 || (axis + lead == 1 && extent == channels);
    let elements = Wide::floats(tensor).ok()?;
    let fits = elements.len() <= channels && tensor.shape().iter().enumerate().all(on_channels);
    fits.then(|| (0..channels).map(|c| elements[if elements.len() == 1 { 0 } else { c }]).collect())
}

/// Whether arithmetic on weights of this type is worth rounding to it.
pub(super) fn is_wide_float(dtype: Option<DType>) -> bool {
    matches!(dtype, Some(DType::F32 | DType::F64))
}

fn into_weights(subject: &Subject, node: &Node, input: ValueId, affine: &Affine) -> Option<Patch> {
    let (_, product) = subject.sole_producer(input)?;
    let channel_axis = match &product.op {
        Op::Conv(op) if op.activation.is_none() && subject.input(product, 3).is_none() => 0,
        Op::ConvTranspose(op) if op.group == 1 => 1,
        _ => return None,
    };
    let (weight, bias) = (subject.input(product, 1)?, subject.input(product, 2));
    let dtype = subject.dtype(weight).filter(|&d| is_wide_float(Some(d)))?;
    let shape = subject.constant(weight)?.tensor.shape().clone();
    let channels = affine.factor.len();
    if shape.get(channel_axis) != Some(&channels) {
        return None;
    }
    let bias_elements = match bias {
        Some(bias) => subject.floats(bias).filter(|b| b.len() == channels)?,
        None => vec![0.0; channels],
    };
    let per_channel: usize = shape[channel_axis + 1..].iter().product();
    let scaled = subject.floats(weight)?.into_iter().enumerate();
    let scaled: Vec<f64> = scaled.map(|(i, w)| w * affine.factor[i / per_channel % channels]).collect();
    let moved = bias_elements.iter().zip(&affine.factor).zip(&affine.offset).map(|((b, f), o)| b * f + o);
    let moved: Vec<f64> = moved.collect();
    let has_bias = bias.is_some() || affine.offset.iter().any(|&o| o != 0.0);
    let narrow = |v: Vec<f64>, shape: &[usize]| Wide::Float(v).narrow(dtype, shape).ok();
    let name = |value: ValueId| subject.graph().value(value).name.clone();
    let mut patch = Patch::new();
    let mut inputs = vec![subject.input(product, 0).map(PatchValue::from)];
    inputs.push(Some(patch.constant(name(weight), Constant::new(narrow(scaled, &shape)?))));
    if has_bias {
        let stem = bias.map_or_else(|| format!("{}.bias", product.name), name);
        inputs.push(Some(patch.constant(stem, Constant::new(narrow(moved, &[channels])?))));
    }
    let folded = patch.node(&product.name, product.op.clone(), &inputs);
    patch.replace(node.outputs[0], folded);
    Some(patch)
}

/// `x · factor + offset`, both `[c, 1, …]`.
fn alone(subject: &Subject, node: &Node, input: ValueId, affine: &Affine) -> Option<Patch> {
    let dtype = subject.dtype(input).filter(|&d| is_wide_float(Some(d)))?;
    let extents = subject.shape(input)?;
    let channels = affine.factor.len();
    if extents.get(1)? != &Dim::from(channels) {
        return None;
    }
    let mut shape = vec![1; extents.len() - 1];
    shape[0] = channels;
    let narrow = |v: &[f64]| Wide::Float(v.to_vec()).narrow(dtype, shape.as_slice()).ok().map(Constant::new);
    let mut patch = Patch::new();
    let factor = patch.constant(format!("{}.factor", node.name), narrow(&affine.factor)?);
    let offset = patch.constant(format!("{}.offset", node.name), narrow(&affine.offset)?);
    let binary = |function| Binary { function };
    let inputs = [Some(input.into()), Some(factor)];
    let scaled = patch.node(format!("{}.scaled", node.name), binary(BinaryFunction::Mul), &inputs);
    let moved = patch.node(&node.name, binary(BinaryFunction::Add), &[Some(scaled), Some(offset)]);
    patch.replace(node.outputs[0], moved);
    Some(patch)
}

/// `tensor` broadcast to `shape`, in its own type.
pub(super) fn broadcast_to(tensor: &Tensor, shape: &[usize]) -> Option<Tensor> {
    crate::ops::select(tensor, shape, broadcast_index(tensor.shape(), shape)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{Conv, ConvTranspose, Padding, Window},
        passes::testing::{Builder, check},
    };

    /// Rounding of the weights, once each, in f32.
    const ROUNDING: f64 = 1e-6;

    fn window() -> Window {
        let padding = Padding::Explicit { begin: vec![1, 1], end: vec![1, 1] };
        Window { kernel_shape: None, strides: vec![], dilations: vec![], padding, ceil_mode: false }
    }

    fn batch_norm(b: &mut Builder, x: ValueId, channels: usize) -> ValueId {
        let [scale, bias, mean] = [(); 3].map(|()| b.weight(&[channels]));
        let variance = (0..channels).map(|_| b.random.float().abs() + 0.1).collect();
        let variance = b.constant(Tensor::from_vec([channels], variance).unwrap());
        b.node(BatchNorm { epsilon: 1e-3, training: None, per_element: false }, &[x, scale, bias, mean, variance])
    }

    #[test]
    fn batch_normalisation_goes_into_a_convolution() {
        for (group, with_bias) in [(1, false), (1, true), (2, true), (4, false)] {
            let mut b = Builder::new(3);
            let x = b.symbolic_input("x", &["N", "4", "5", "6"]);
            let w = b.weight(&[8, 4 / group, 3, 3]);
            let mut inputs = vec![x, w];
            if with_bias {
                inputs.push(b.weight(&[8]));
            }
            let y = b.node(Conv { window: window(), group, activation: None }, &inputs);
            let y = batch_norm(&mut b, y, 8);
            assert_eq!(check(&[&FoldScales], b.finish(&[y]), ROUNDING), ["Conv"]);
        }
    }

    #[test]
    fn factors_go_into_convolutions() {
        let left = |shape: &[usize], function| {
            let mut b = Builder::new(3);
            let x = b.input("x", &[2, 3, 5, 5]);
            let (w, bias, factor) = (b.weight(&[3, 4, 2, 2]), b.weight(&[4]), b.weight(shape));
            let op = ConvTranspose { window: window(), group: 1, output_padding: vec![], output_shape: None };
            let y = b.node(op, &[x, w, bias]);
            let y = b.node(Binary { function }, &[y, factor]);
            check(&[&FoldScales], b.finish(&[y]), ROUNDING)
        };
        assert_eq!(left(&[4, 1, 1], BinaryFunction::Mul), ["ConvTranspose"]);
        assert_eq!(left(&[1], BinaryFunction::Mul), ["ConvTranspose"]);
        // Along another axis than the channels.
        assert_eq!(left(&[4], BinaryFunction::Mul), ["ConvTranspose", "Mul"]);
        assert_eq!(left(&[4, 1], BinaryFunction::Mul), ["ConvTranspose", "Mul"]);
    }

    #[test]
    fn alone_it_is_a_product_and_a_sum() {
        let mut b = Builder::new(3);
        let x = b.symbolic_input("x", &["N", "4", "L"]);
        let y = batch_norm(&mut b, x, 4);
        assert_eq!(check(&[&FoldScales], b.finish(&[y]), ROUNDING), ["Mul", "Add"]);
    }

    #[test]
    fn a_convolution_that_others_read_keeps_its_weights() {
        let mut b = Builder::new(3);
        let x = b.input("x", &[1, 4, 5, 5]);
        let w = b.weight(&[4, 4, 3, 3]);
        let conv = b.node(Conv { window: window(), group: 1, activation: None }, &[x, w]);
        let y = batch_norm(&mut b, conv, 4);
        assert_eq!(check(&[&FoldScales], b.finish(&[y, conv]), ROUNDING), ["Conv", "Mul", "Add"]);
    }
}
