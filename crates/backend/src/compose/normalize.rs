//! Normalisations by the one there is a kernel for.

use super::{Composing, known};
use cutover_graph::{
    Patch, PatchValue,
    ops::{BinaryFunction, InstanceNorm, LayerNorm, Reduce, ReduceFunction, Shape, SkipLayerNorm, UnaryFunction},
};
use cutover_tensor::Tensor;

pub(super) fn skip_layer_norm(mut composing: Composing<'_>, op: &SkipLayerNorm) -> Option<Patch> {
    if composing.is_wanted(1) || composing.is_wanted(2) {
        return None;
    }
    let (x, skip, gamma) = (composing.input(0)?, composing.input(1)?, composing.input(2)?);
    let (beta, bias) = op.beta_and_bias();
    let beta = beta.and_then(|index| composing.input(index));
    let mut sum = composing.add(x.into(), skip.into());
    if let Some(bias) = composing.input(bias) {
        sum = composing.add(sum, bias.into());
    }
    let norm = LayerNorm { axis: -1, epsilon: op.epsilon, centred: op.centred, with_deviation: false };
    let inputs: Vec<PatchValue> = [Some(sum), Some(gamma.into()), beta.map(Into::into)].into_iter().flatten().collect();
    let y = composing.op(norm, &inputs);
    composing.finish(&[Some(y), None, None, Some(sum)])
}

/// Each group of channels is one row to normalise.
pub(super) fn instance_norm(mut composing: Composing<'_>, op: &InstanceNorm) -> Option<Patch> {
    let (x, shape) = composing.floats(0)?;
    let channels = known(shape.get(1)?)?;
    let groups = op.groups.map_or(channels, |groups| groups as i64);
    if channels % groups != 0 {
        return None;
    }
    let extents = composing.op(Shape { start: 0, end: None }, &[x]);
    let rows = composing.reshape(x, &[0, groups, -1]);
    let plane = shape[2..].iter().map(known).try_fold(1i64, |all, extent| all.checked_mul(extent?));
    let width = plane.and_then(|plane| (channels / groups).checked_mul(plane)).filter(|&width| width < 1 << 31);
    let y = match width {
        Some(width) => {
            let ones = composing.constant(Tensor::from_vec([width as usize], vec![1f32; width as usize]).ok()?);
            let norm = LayerNorm { axis: -1, epsilon: op.epsilon, centred: true, with_deviation: false };
            composing.op(norm, &[rows, ones])
        }
        None => {
            let axes = composing.integers(&[-1]);
            let mean = Reduce { function: ReduceFunction::Mean, keep_dims: true, noop_with_empty_axes: false };
            let centre = composing.op(mean.clone(), &[rows, axes]);
            let centred = composing.binary(BinaryFunction::Sub, rows, centre);
            let squares = composing.mul(centred, centred);
            let variance = composing.op(mean, &[squares, axes]);
            let epsilon = composing.number(op.epsilon);
            let radicand = composing.add(variance, epsilon);
            let deviation = composing.unary(UnaryFunction::Sqrt, radicand);
            composing.binary(BinaryFunction::Div, centred, deviation)
        }
    };
    let y = composing.op(cutover_graph::ops::Reshape { allow_zero: true }, &[y, extents]);
    let mut per_channel = vec![1; shape.len() - 1];
    per_channel[0] = channels;
    let (scale, bias) = (composing.input(1)?.into(), composing.input(2)?.into());
    let scale = composing.reshape(scale, &per_channel);
    let bias = composing.reshape(bias, &per_channel);
    let y = composing.mul(y, scale);
    let y = composing.add(y, bias);
    composing.finish(&[Some(y)])
}
