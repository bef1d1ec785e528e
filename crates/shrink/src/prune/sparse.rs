//! Single weights set to zero: the shapes stay, so nothing is faster unless an engine has kernels for zeros. The CPU backend has none.

use crate::{Product, ProductKind, ShrinkError, prune::rewrite::set_constant};
use cutover_graph::Graph;
use cutover_tensor::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// Which weights of products become zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sparsity {
    /// The smallest magnitudes of all layers together (Han et al., "Learning both Weights and Connections", NeurIPS 2015).
    Global { ratio: f64 },
    /// The smallest magnitudes of each layer.
    PerLayer { ratio: f64 },
    /// Of every `of` weights in a row along the axis that is summed over, the `keep` largest stay (Mishra et al., "Accelerating Sparse Deep
    /// Neural Networks", 2021; 2:4 on NVIDIA's tensor cores). Rows that do not divide keep their rest.
    Pattern { keep: usize, of: usize },
}

/// What became zero.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SparsityReport {
    /// For each layer: its name, weights, and how many of them are zero now.
    pub layers: Vec<(String, usize, usize)>,
}

impl SparsityReport {
    /// Share of all weights of products that are zero.
    pub fn zeros(&self) -> f64 {
        let (weights, zeros) = self.layers.iter().fold((0, 0), |(w, z), layer| (w + layer.1, z + layer.2));
        zeros as f64 / weights.max(1) as f64
    }
}

/// Sets weights to zero.
///
/// # Errors
/// A ratio outside 0 to 1, a pattern that keeps none or more than there are, a weight that is not finite.
pub fn sparsify(
    graph: &mut Graph,
    sparsity: Sparsity,
    exclude: &HashSet<String>,
) -> Result<SparsityReport, ShrinkError> {
    match sparsity {
        Sparsity::Global { ratio } | Sparsity::PerLayer { ratio } => super::check_share("the share of zeros", ratio)?,
        Sparsity::Pattern { keep, of } if keep == 0 || keep > of => {
            return Err(ShrinkError::Option(format!("a pattern of {keep}:{of}: expected e.g. 2:4, at least one kept")));
        }
        Sparsity::Pattern { .. } => {}
    }
    let mut products = Product::all(graph);
    products.retain(|product| !exclude.contains(&graph.node(product.node).name));
    let mut seen = HashSet::new();
    products.retain(|product| seen.insert(product.weight));
    if products.is_empty() {
        return Err(ShrinkError::Option("no layer has weights that may become zero".to_string()));
    }
    let threshold = match sparsity {
        Sparsity::Global { ratio } => {
            let mut all = Vec::new();
            for product in &products {
                all.extend(product.weights(graph)?.1.into_iter().map(f32::abs));
            }
            smallest(all, ratio)
        }
        _ => None,
    };
    let mut report = SparsityReport::default();
    for product in products {
        let (shape, mut values) = product.weights(graph)?;
        match sparsity {
            Sparsity::Global { .. } => clear(&mut values, threshold),
            Sparsity::PerLayer { ratio } => {
                let own = smallest(values.iter().map(|v| v.abs()).collect(), ratio);
                clear(&mut values, own);
            }
            Sparsity::Pattern { keep, of } => pattern(&mut values, &shape, &product, keep, of),
        }
        let zeros = values.iter().filter(|v| **v == 0.0).count();
        let node = graph.node(product.node).name.clone();
        report.layers.push((node, values.len(), zeros));
        let name = graph.value(product.weight).name.clone();
        let tensor = Tensor::from_vec(shape, values).map_err(|source| ShrinkError::Tensor { name, source })?;
        set_constant(graph, product.weight, tensor);
    }
    Ok(report)
}

/// The largest of the `ratio` smallest magnitudes.
fn smallest(mut magnitudes: Vec<f32>, ratio: f64) -> Option<f32> {
    let count = (magnitudes.len() as f64 * ratio).round() as usize;
    let at = count.checked_sub(1)?;
    Some(*magnitudes.select_nth_unstable_by(at, f32::total_cmp).1)
}

fn clear(values: &mut [f32], up_to: Option<f32>) {
    if let Some(up_to) = up_to {
        values.iter_mut().filter(|v| v.abs() <= up_to).for_each(|v| *v = 0.0);
    }
}

/// Along the axis that the product sums over: input channels of a convolution, the inner axis of a matrix.
fn pattern(values: &mut [f32], shape: &[usize], product: &Product, keep: usize, of: usize) {
    let axis = if matches!(product.kind, ProductKind::Conv { .. }) { 1 } else { 1 - product.channel_axis };
    let inner: usize = shape[axis + 1..].iter().product();
    let extent = shape[axis];
    for block in values.chunks_exact_mut((extent * inner).max(1)) {
        for column in 0..inner {
            for start in (0..extent / of * of).step_by(of) {
                let mut places: Vec<usize> = (start..start + of).map(|i| i * inner + column).collect();
                places.sort_by(|&a, &b| block[b].abs().total_cmp(&block[a].abs()));
                places[keep..].iter().for_each(|&place| block[place] = 0.0);
            }
        }
    }
}
