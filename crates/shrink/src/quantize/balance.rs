//! Moves magnitude between a layer and the one before it, where it takes fewer steps: the float model computes the same.

use super::Channels;
use crate::{
    Observation, ShrinkError,
    edit::{Product, ProductKind, add, constant, floats, is_homogeneous, rewire},
};
use cutover_graph::{
    Graph, NodeId, Op, ValueId,
    ops::{Binary, BinaryFunction},
};
use cutover_tensor::{Tensor, TensorError};
use std::collections::HashMap;

/// SmoothQuant: outliers in channels of an activation go into the weights. Channel `j` of the input is divided by
/// `s_j = max|x_j|^α / max|w_j|^(1−α)` and row `j` of the weights multiplied by it.
///
/// Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (ICML 2023), equation 4. As there, what
/// layer norms give is smoothed: the division is folded into the norm where only these products read it, and is a `Mul` before them elsewhere. Returns how many inputs were smoothed.
///
/// # Errors
/// `alpha` outside `[0, 1]`.
pub fn smooth(
    graph: &mut Graph,
    observations: &HashMap<ValueId, Observation>,
    alpha: f32,
) -> Result<usize, ShrinkError> {
    if !(0.0..=1.0).contains(&alpha) {
        return Err(ShrinkError::Option(format!("a smoothing strength of {alpha}: expected 0 to 1")));
    }
    let mut readers: HashMap<ValueId, Vec<Product>> = HashMap::new();
    let after_norm =
        |value| graph.producer(value).is_some_and(|(node, _)| matches!(graph.node(node).op, Op::LayerNorm(_)));
    for product in Product::all(graph) {
        if !matches!(product.kind, ProductKind::Conv { .. }) && after_norm(product.input) {
            readers.entry(product.input).or_default().push(product);
        }
    }
    let mut inputs: Vec<ValueId> = readers.keys().copied().collect();
    inputs.sort();
    let mut smoothed = 0;
    for input in inputs {
        let products = &readers[&input];
        let Some(observation) = observations.get(&input) else { continue };
        let activations = &observation.channel_max;
        let mut rows = vec![0f32; activations.len()];
        let fits = products.iter().all(|product| {
            let (shape, values) = floats(graph, product.weight).expect("a weight of floats");
            let inner = Channels::along(&shape, 1 - product.channel_axis);
            let fits = inner.count == rows.len();
            if fits {
                values.iter().enumerate().for_each(|(i, w)| rows[inner.of(i)] = rows[inner.of(i)].max(w.abs()));
            }
            fits
        });
        // A weight that others read too would have to be there twice.
        let uses = graph.uses();
        if !fits || products.iter().any(|p| uses[p.weight.index()].len() > 1) {
            continue;
        }
        let factor = |(&x, &w): (&f32, &f32)| {
            let s = x.max(1e-5).powf(alpha) / w.max(1e-5).powf(1.0 - alpha);
            if s.is_finite() && s > 0.0 { s } else { 1.0 }
        };
        let factors: Vec<f32> = activations.iter().zip(&rows).map(factor).collect();
        let divided: Vec<f32> = factors.iter().map(|s| 1.0 / s).collect();
        let nodes: Vec<NodeId> = products.iter().map(|p| p.node).collect();
        if !fold_into_norm(graph, input, &nodes, &divided)? {
            let stem = format!("{}.smoothed", graph.value(input).name);
            let at = |source: TensorError| ShrinkError::Tensor { name: stem.clone(), source };
            let scale = Tensor::from_vec([divided.len()], divided).map_err(at)?;
            let scale = constant(graph, &format!("{stem}.factor"), scale);
            let product = Binary { function: BinaryFunction::Mul };
            let scaled = add(graph, &stem, product.into(), &[input, scale])?;
            nodes.iter().for_each(|&node| rewire(graph, node, input, scaled));
        }
        for product in products {
            scale_weight(graph, product.node, product.weight, 1 - product.channel_axis, &factors)?;
        }
        smoothed += 1;
    }
    crate::edit::sweep(graph);
    graph.verify()?;
    Ok(smoothed)
}

/// Multiplies the gain and bias of the layer norm that makes `value`, if only `readers` read it.
fn fold_into_norm(graph: &mut Graph, value: ValueId, readers: &[NodeId], factors: &[f32]) -> Result<bool, ShrinkError> {
    let uses = graph.uses();
    let Some((node, 0)) = graph.producer(value) else { return Ok(false) };
    let alone = uses[value.index()].iter().all(|reader| readers.contains(reader)) && !graph.outputs().contains(&value);
    let Op::LayerNorm(_) = &graph.node(node).op else { return Ok(false) };
    let parameters: Vec<ValueId> = graph.node(node).inputs[1..].iter().flatten().copied().collect();
    let fits = |&p: &ValueId| floats(graph, p).is_some_and(|(shape, _)| shape == [factors.len()]);
    if !alone || !parameters.iter().all(fits) {
        return Ok(false);
    }
    for parameter in parameters {
        scale_weight(graph, node, parameter, 0, factors)?;
    }
    Ok(true)
}

/// Gives `node` its constant `weight` multiplied along `axis`.
fn scale_weight(
    graph: &mut Graph,
    node: NodeId,
    weight: ValueId,
    axis: usize,
    factors: &[f32],
) -> Result<(), ShrinkError> {
    let (shape, mut values) = floats(graph, weight).expect("a constant of floats");
    let name = graph.value(weight).name.clone();
    let channels = Channels::along(&shape, axis);
    values.iter_mut().enumerate().for_each(|(i, w)| *w *= factors[channels.of(i)]);
    let tensor =
        Tensor::from_vec(shape, values).map_err(|source| ShrinkError::Tensor { name: name.clone(), source })?;
    let scaled = constant(graph, &format!("{name}.scaled"), tensor);
    rewire(graph, node, weight, scaled);
    Ok(())
}

/// Cross-layer equalization: between two convolutions with nothing but a ReLU between them, each channel's range of weights is made the same
/// on both sides: the first is divided by `s = √(r₁/r₂)`, the second multiplied, after Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019), equation 11.
/// Returns how many pairs were equalized. A bounded ReLU (ReLU6) does not commute with scales, so pairs across one stay.
pub fn equalize(graph: &mut Graph) -> Result<usize, ShrinkError> {
    let mut equalized = 0;
    for first in Product::all(graph) {
        let uses = graph.uses();
        let Some(second) = follower(graph, &uses, &first) else { continue };
        // An earlier pair may have given either a new weight.
        let (Some(first), Some(second)) = (Product::of(graph, first.node), Product::of(graph, second)) else {
            continue;
        };
        let only = |weight: ValueId| uses[weight.index()].len() == 1;
        let ((shape, one), (other, two)) =
            (floats(graph, first.weight).expect("a weight"), floats(graph, second.weight).expect("a weight"));
        let ProductKind::Conv { group } = second.kind else { continue };
        let bias = first.bias(graph);
        let plain = bias.is_none_or(|b| floats(graph, b).is_some_and(|(dims, _)| dims == [shape[0]]) && only(b));
        let depthwise = group == shape[0] && other[0] == group && other[1] == 1;
        if !(plain && only(first.weight) && only(second.weight) && (group == 1 || depthwise)) {
            continue;
        }
        let axis = usize::from(!depthwise);
        let (r1, r2) = (magnitudes(&one, Channels::along(&shape, 0)), magnitudes(&two, Channels::along(&other, axis)));
        if r1.len() != r2.len() {
            continue;
        }
        // What both ranges become is √(r₁·r₂).
        let divisor = |(&a, &b): (&f32, &f32)| {
            let s = (a / b).sqrt();
            if s.is_finite() && s > 0.0 { s.clamp(1e-4, 1e4) } else { 1.0 }
        };
        let divisors: Vec<f32> = r1.iter().zip(&r2).map(divisor).collect();
        let divided: Vec<f32> = divisors.iter().map(|s| 1.0 / s).collect();
        scale_weight(graph, first.node, first.weight, 0, &divided)?;
        if let Some(bias) = bias {
            scale_weight(graph, first.node, bias, 0, &divided)?;
        }
        scale_weight(graph, second.node, second.weight, axis, &divisors)?;
        equalized += 1;
    }
    crate::edit::sweep(graph);
    graph.verify()?;
    Ok(equalized)
}

/// The convolution that alone reads `first`, through a ReLU or directly.
fn follower(graph: &Graph, uses: &[Vec<NodeId>], first: &Product) -> Option<NodeId> {
    if !matches!(first.kind, ProductKind::Conv { .. }) {
        return None;
    }
    let mut value = graph.node(first.node).outputs[0];
    loop {
        let [reader] = uses[value.index()][..] else { return None };
        if graph.outputs().contains(&value) {
            return None;
        }
        if is_homogeneous(&graph.node(reader).op) {
            value = graph.node(reader).outputs[0];
            continue;
        }
        let second = Product::of(graph, reader)?;
        return (second.input == value && matches!(second.kind, ProductKind::Conv { .. })).then_some(reader);
    }
}

/// The largest magnitude in each channel.
fn magnitudes(values: &[f32], channels: Channels) -> Vec<f32> {
    let mut largest = vec![0f32; channels.count];
    values.iter().enumerate().for_each(|(i, w)| largest[channels.of(i)] = largest[channels.of(i)].max(w.abs()));
    largest
}
