//! Bias correction: what rounding a weight adds to a channel's mean is taken off its bias.
//!
//! Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019), section 4.2, with input means that
//! were observed.

use super::{Channels, QuantizedWeight, WeightRange};
use crate::{
    Observation, ShrinkError,
    edit::{Product, ProductKind, constant, floats, rewire},
};
use cutover_graph::{Graph, ValueId};
use cutover_tensor::{Tensor, TensorError};
use std::collections::HashMap;

/// Corrects the biases of `graph`, still of floats, for the weights that [`super::quantize_static`] will round in the same way. A convolution without
/// a bias gets one; a `MatMul` has none of its own and stays. The mean of a padded input counts as if nothing were padded.
pub fn correct_bias(
    graph: &mut Graph,
    observations: &HashMap<ValueId, Observation>,
    per_channel: bool,
    range: WeightRange,
) -> Result<(), ShrinkError> {
    for product in Product::all(graph) {
        let Some(observation) = observations.get(&product.input) else { continue };
        let (shape, weights) = floats(graph, product.weight).expect("a weight of floats");
        let (ProductKind::Conv { .. } | ProductKind::Gemm) = product.kind else { continue };
        let own = product.bias(graph);
        let mut bias = match own.map(|bias| floats(graph, bias)) {
            None => vec![0.0; shape[product.channel_axis]],
            Some(Some((dims, values))) if dims == [shape[product.channel_axis]] => values,
            Some(_) => continue,
        };
        let channels = if per_channel { Channels::along(&shape, product.channel_axis) } else { Channels::ONE };
        let rounded = QuantizedWeight::new(&weights, channels, range).rounded(channels);
        let output = Channels::along(&shape, product.channel_axis);
        let inputs = |element: usize| input_channel(&product, &shape, element);
        for (i, (w, r)) in weights.iter().zip(&rounded).enumerate() {
            let Some(&mean) = observation.channel_mean.get(inputs(i)) else { continue };
            bias[output.of(i)] += (f64::from(w - r) * mean) as f32;
        }
        let stem = own.map_or_else(|| graph.node(product.node).name.clone() + ".bias", |b| graph.value(b).name.clone());
        let at = |source: TensorError| ShrinkError::Tensor { name: stem.clone(), source };
        let tensor = Tensor::from_vec([bias.len()], bias).map_err(at)?;
        let corrected = constant(graph, &format!("{stem}.corrected"), tensor);
        match own {
            Some(old) => rewire(graph, product.node, old, corrected),
            None => {
                let inputs = &mut graph.node_mut(product.node).inputs;
                inputs.resize(2, None);
                inputs.push(Some(corrected));
            }
        }
    }
    crate::edit::sweep(graph);
    graph.verify()?;
    Ok(())
}

/// The channel of the input that an element of the weight multiplies.
fn input_channel(product: &Product, shape: &[usize], element: usize) -> usize {
    match product.kind {
        ProductKind::Conv { group } => {
            let taps: usize = shape[2..].iter().product();
            let output = element / (shape[1] * taps).max(1);
            output / (shape[0] / group).max(1) * shape[1] + element / taps.max(1) % shape[1].max(1)
        }
        _ if product.channel_axis == 0 => element % shape[1],
        _ => element / shape[1].max(1),
    }
}
