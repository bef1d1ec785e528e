//! Which indices go: so many of every group alike, or the least of all; and what that leaves to compute.

use super::{
    axes::{AxisId, KeptIndices},
    dependency::Dependencies,
    importance::Group,
};
use crate::Sample;
use cutover_graph::{Bindings, Dim, Graph, Op};
use cutover_tensor::Value;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Whose importance is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// Every group loses the same share.
    #[default]
    Uniform,
    /// All indices of all groups are ranked together, each against the mean of its group.
    Global,
}

/// With global ranking no group loses more than this.
const GLOBAL_SHARE_MAX: f64 = 0.9;

/// The indices of every group that stay when a share of `ratio` of all goes. Indices of weights come out as multiples of `multiple`, or of
/// the largest half, quarter, … of it that is at most a quarter of the group: small layers have no use for wide vectors. One always stays.
pub fn select(groups: &[Group], ratio: f64, scope: Scope, multiple: usize) -> KeptIndices {
    let threshold = match scope {
        Scope::Uniform => None,
        Scope::Global => {
            let mut all: Vec<f64> = groups.iter().flat_map(|group| &group.scores).copied().collect();
            all.sort_by(f64::total_cmp);
            all.get(((all.len() as f64 * ratio) as usize).min(all.len().saturating_sub(1))).copied()
        }
    };
    let mut kept = KeptIndices::new();
    for group in groups {
        let size = group.size as f64;
        let stay = match threshold {
            None => size * (1.0 - ratio),
            Some(threshold) => {
                let above = group.scores.iter().filter(|&&score| score >= threshold).count() as f64;
                above.max(size * (1.0 - GLOBAL_SHARE_MAX))
            }
        };
        let step = step(group, multiple);
        let count = ((stay / step as f64).round() as usize * step).clamp(step.min(group.size), group.size);
        if count < group.size {
            let mut order: Vec<usize> = (0..group.size).collect();
            order.sort_by(|&a, &b| group.scores[b].total_cmp(&group.scores[a]).then(a.cmp(&b)));
            order.truncate(count);
            order.sort_unstable();
            kept.insert(group.axis, order);
        }
    }
    kept
}

/// Indices of a group go in steps of so many.
fn step(group: &Group, multiple: usize) -> usize {
    let (mut a, mut b) = (multiple.max(1), group.width.max(1));
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let mut step = multiple.max(1) / a;
    while step > 1 && step * 4 > group.size {
        step /= 2;
    }
    step
}

impl Dependencies {
    /// Multiplications of all products, of floats and of integers, in one run, where open extents are as in `bindings` (1 where that
    /// does not say) and groups have lost what `kept` says.
    pub fn operations(&self, kept: &KeptIndices, bindings: &Bindings) -> u64 {
        let count = |atom: AxisId| kept.get(&atom).map(Vec::len);
        let extent = |axis: AxisId| known(&self.axes.extent_with(axis, &count), bindings);
        let all = |axes: &[AxisId]| axes.iter().map(|&axis| extent(axis)).product::<f64>();
        let mut sum = 0.0;
        for (_, node) in self.graph.nodes() {
            let axes = |index: usize| node.inputs.get(index).copied().flatten().and_then(|v| self.of.get(&v));
            let (Some(a), Some(b), Some(y)) = (axes(0), axes(1), self.of.get(&node.outputs[0])) else { continue };
            sum += match &node.op {
                Op::Conv(_) | Op::ConvInteger(_) => all(y) * all(&b[1..]),
                Op::ConvTranspose(_) => all(a) * all(&b[1..]),
                Op::MatMul(_) | Op::MatMulInteger(_) | Op::MatMulNBits(_) => {
                    all(y) * a.last().map_or(1.0, |&inner| extent(inner))
                }
                Op::Gemm(gemm) => all(y) * a.get(usize::from(!gemm.transpose_a)).map_or(1.0, |&inner| extent(inner)),
                // Of the input's features and of the units before, for every step, sample and direction.
                Op::Recurrent(_) => {
                    let [directions, rows, features] = b[..] else { continue };
                    let inner = extent(features) + y.last().map_or(0.0, |&units| extent(units));
                    all(&a[..a.len().min(2)]) * extent(directions) * extent(rows) * inner
                }
                Op::Einsum(einsum) => self.letters(&einsum.equation, a, b).map_or(0.0, |axes| all(&axes)),
                _ => 0.0,
            };
        }
        sum as u64
    }

    /// One axis for each letter of two terms.
    fn letters(&self, equation: &str, a: &[AxisId], b: &[AxisId]) -> Option<Vec<AxisId>> {
        let equation: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
        let (from, _) = equation.split_once("->")?;
        let (first, second) = from.split_once(',')?;
        let letters = first.chars().zip(a).chain(second.chars().zip(b));
        Some(letters.map(|(letter, &axis)| (letter, axis)).collect::<BTreeMap<_, _>>().into_values().collect())
    }
}

fn known(dim: &Dim, bindings: &Bindings) -> f64 {
    dim.eval(bindings).map_or(1.0, |n| n.max(0) as f64)
}

/// The open extents of `graph`'s inputs as `sample` has them.
pub fn bindings(graph: &Graph, sample: &Sample) -> Bindings {
    let mut bindings = Bindings::new();
    for &input in graph.inputs() {
        let value = graph.value(input);
        let tensor = sample.iter().find(|(name, _)| *name == value.name).map(|(_, value)| value);
        let (Some(Value::Tensor(tensor)), Some(shape)) =
            (tensor, value.fact.as_tensor().and_then(|f| f.shape.as_ref()))
        else {
            continue;
        };
        for (dim, &extent) in shape.iter().zip(tensor.shape().dims()) {
            if let Some(symbol) = dim.as_symbol() {
                bindings.entry(symbol.clone()).or_insert(extent as i64);
            }
        }
    }
    bindings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prune::axes::Axes;

    fn group(scores: Vec<f64>, width: usize) -> Group {
        let axis = Axes::default().add(Dim::from(scores.len()));
        Group { axis, size: scores.len(), width, nodes: Vec::new(), scores }
    }

    #[test]
    fn the_least_go_in_steps() {
        let scores: Vec<f64> = (0..64).map(f64::from).collect();
        let count = |size: usize, width: usize, ratio: f64, multiple: usize| {
            let group = group(scores[..size].to_vec(), width);
            select(std::slice::from_ref(&group), ratio, Scope::Uniform, multiple)
                .get(&group.axis)
                .map_or(size, Vec::len)
        };
        // Size, width of each, share, multiple; and what stays.
        for (size, width, ratio, multiple, stay) in [
            (64, 1, 0.5, 8, 32),
            (64, 1, 0.3, 8, 48),
            (64, 1, 0.3, 1, 45),
            (12, 32, 0.5, 8, 6),
            (12, 4, 0.25, 8, 10),
            (16, 1, 0.3, 8, 12),
            (3, 1, 0.9, 8, 1),
            (64, 1, 1.0, 1, 1),
            (64, 1, 0.0, 8, 64),
        ] {
            assert_eq!(count(size, width, ratio, multiple), stay, "{size} of {width}, {ratio}, {multiple}");
        }
        let own = group(vec![3.0, 0.0, 2.0, 1.0], 1);
        assert_eq!(select(std::slice::from_ref(&own), 0.5, Scope::Uniform, 1)[&own.axis], [0, 2]);
    }
}
