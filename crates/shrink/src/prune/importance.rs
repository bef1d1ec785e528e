//! How much each index of each atom matters.

use super::{axes::AxisId, dependency::Dependencies};
use crate::{Data, Progress, Sample, ShrinkError, observe::Probe};
use cutover_backend::Backend;
use cutover_graph::{Op, ValueId};
use cutover_tensor::{DType, Value};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

/// What says that a channel or a head matters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Criterion {
    /// Σ|w| over all weights that go with it (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017; over coupled layers as in
    /// DepGraph).
    L1,
    /// √Σw² over the same.
    #[default]
    L2,
    /// Mean magnitude, over calibration data, of what layers read of it (mean activation of Molchanov et al., "Pruning Convolutional Neural
    /// Networks for Resource Efficient Inference", ICLR 2017).
    Activation,
    /// `(Σ w · ∂L/∂w)²` over the weights that go with it, the mean over samples: how much the loss changes, to first order, when all of them
    /// become zero (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019). The loss is the cross-entropy with the
    /// labels, and without labels the mean square of the first output. Needs the feature `train`.
    Taylor,
}

/// Indices that go or stay together: an atom that weights have.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    pub axis: AxisId,
    pub size: usize,
    /// Indices of weights that go with each: the width of a head, 1 for a channel.
    pub width: usize,
    /// The products that make it, or where there is none, read it; in the order of the model.
    pub nodes: Vec<String>,
    /// The importance of each index, none negative, their mean 1; all 1 where all are 0.
    pub scores: Vec<f64>,
}

/// Float weights, and for each axis and index there the atoms' indices it belongs to.
struct Weight {
    value: ValueId,
    places: Vec<Vec<Vec<(AxisId, usize)>>>,
}

impl Dependencies {
    /// The atoms that may lose indices and are in the weights of products, without scores, in the order of the model.
    pub fn groups(&self) -> Vec<Group> {
        let mut found: BTreeMap<AxisId, Group> = BTreeMap::new();
        let mut order = Vec::new();
        for (_, node) in self.graph.nodes().filter(|(_, node)| is_product(&node.op)) {
            let constants = node.inputs.iter().take(2).flatten().filter(|&&v| self.graph.constant(v).is_some());
            for &weight in constants {
                let made = node.outputs.iter().filter_map(|y| self.of.get(y)).flatten();
                let made: HashSet<AxisId> =
                    made.flat_map(|&axis| self.axes.atoms(axis)).map(|(atom, _)| atom).collect();
                for &axis in self.of.get(&weight).into_iter().flatten() {
                    for (atom, width) in self.axes.atoms(axis) {
                        let size = self.axes.extent(atom).as_const().unwrap_or(0).max(0) as usize;
                        let group = found.entry(atom).or_insert_with(|| {
                            order.push(atom);
                            Group { axis: atom, size, width, nodes: Vec::new(), scores: Vec::new() }
                        });
                        group.width = group.width.max(width);
                        if made.contains(&atom) && !group.nodes.contains(&node.name) {
                            group.nodes.push(node.name.clone());
                        }
                    }
                }
            }
        }
        order.into_iter().filter_map(|atom| found.remove(&atom)).collect()
    }

    /// Gives every group the scores of `criterion`; of activations and losses over `data`.
    ///
    /// # Errors
    /// A weight or an activation that is not finite, by name; no samples where some are needed; gradients in a build without the feature `train`,
    /// or of an operator that has none, by name.
    pub fn score(
        &self,
        groups: &mut [Group],
        criterion: Criterion,
        backend: &Arc<dyn Backend>,
        data: &Data,
        progress: Progress<'_>,
    ) -> Result<(), ShrinkError> {
        let sums = match criterion {
            Criterion::L1 => self.weight_sums(f64::abs)?,
            Criterion::L2 => self.weight_sums(|w| w * w)?,
            Criterion::Activation => self.activation_sums(backend, &data.samples, progress)?,
            Criterion::Taylor => self.loss_changes(data, progress)?,
        };
        for group in groups {
            let none = || vec![0.0; group.size];
            let mut scores = sums.get(&group.axis).cloned().unwrap_or_else(none);
            if criterion == Criterion::L2 {
                scores.iter_mut().for_each(|s| *s = s.sqrt());
            }
            let mean = scores.iter().sum::<f64>() / scores.len().max(1) as f64;
            scores.iter_mut().for_each(|s| *s = if mean > 0.0 { *s / mean } else { 1.0 });
            group.scores = scores;
        }
        Ok(())
    }

    /// Float constants that have atoms, but statistics of norms.
    fn weights(&self) -> Vec<Weight> {
        let statistics: HashSet<ValueId> = self
            .graph
            .nodes()
            .filter(|(_, node)| matches!(node.op, Op::BatchNorm(_)))
            .flat_map(|(_, node)| node.inputs.iter().skip(3).flatten().copied())
            .collect();
        let float = |id: &ValueId| {
            self.graph.constant(*id).is_some_and(|c| c.tensor.dtype() == DType::F32) && !statistics.contains(id)
        };
        let mut values: Vec<ValueId> = self.of.keys().copied().filter(float).collect();
        values.sort();
        let has_atoms = |value: &ValueId| self.of[value].iter().any(|&axis| !self.axes.atoms(axis).is_empty());
        let places = |value: ValueId| Weight {
            value,
            places: self.of[&value].iter().map(|&axis| self.axes.places(axis)).collect(),
        };
        values.into_iter().filter(has_atoms).map(places).collect()
    }

    fn weight_sums(&self, of: impl Fn(f64) -> f64) -> Result<BTreeMap<AxisId, Vec<f64>>, ShrinkError> {
        let mut sums: BTreeMap<AxisId, Vec<f64>> = BTreeMap::new();
        for weight in self.weights() {
            let (shape, values) = crate::edit::floats(&self.graph, weight.value).expect("floats");
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                let message = format!("element {at} is {}; expected a finite number", values[at]);
                let name = self.graph.value(weight.value).name.clone();
                return Err(ShrinkError::Weight { name, message });
            }
            self.add(&mut sums, &values, &shape, &weight.places, &of);
        }
        Ok(sums)
    }

    #[cfg(not(feature = "train"))]
    fn loss_changes(&self, _: &Data, _: Progress<'_>) -> Result<BTreeMap<AxisId, Vec<f64>>, ShrinkError> {
        let how = "cargo build --release -p cutover-cli --features train";
        Err(ShrinkError::Option(format!("criterion taylor needs gradients, and this program was built without: {how}")))
    }

    #[cfg(feature = "train")]
    fn loss_changes(&self, data: &Data, progress: Progress<'_>) -> Result<BTreeMap<AxisId, Vec<f64>>, ShrinkError> {
        let weights = self.weights();
        let values: Vec<ValueId> = weights.iter().map(|weight| weight.value).collect();
        let gradients = crate::train::Gradients::new(&self.graph, &values)?;
        let elements: Vec<_> = values.iter().filter_map(|&value| crate::edit::floats(&self.graph, value)).collect();
        let mut changes: BTreeMap<AxisId, Vec<f64>> = BTreeMap::new();
        for (number, sample) in data.samples.iter().enumerate() {
            let labels = data.labels.as_ref().and_then(|labels| labels.get(number)).map(Vec::as_slice);
            let mut sums: BTreeMap<AxisId, Vec<f64>> = BTreeMap::new();
            for ((weight, (shape, own)), found) in weights.iter().zip(&elements).zip(gradients.of(sample, labels)?) {
                let products: Vec<f32> = own.iter().zip(&found).map(|(w, g)| w * g).collect();
                if products.len() == own.len() {
                    self.add(&mut sums, &products, shape, &weight.places, &|change| change);
                }
            }
            for (atom, sums) in sums {
                let changes = changes.entry(atom).or_insert_with(|| vec![0.0; sums.len()]);
                changes.iter_mut().zip(sums).for_each(|(change, sum)| *change += sum * sum);
            }
            progress("gradients", number + 1, data.samples.len());
        }
        match changes.values().flatten().find(|change| !change.is_finite()) {
            None => Ok(changes),
            Some(change) => {
                Err(ShrinkError::Option(format!("a change of the loss is {change}; expected a finite number")))
            }
        }
    }

    /// Adds `of` every element to the atoms' indices that it belongs to.
    fn add(
        &self,
        sums: &mut BTreeMap<AxisId, Vec<f64>>,
        values: &[f32],
        shape: &[usize],
        places: &[Vec<Vec<(AxisId, usize)>>],
        of: &impl Fn(f64) -> f64,
    ) {
        for (axis, places) in places.iter().enumerate() {
            let inner: usize = shape[axis + 1..].iter().product();
            let mut along = vec![0.0; shape[axis]];
            for (i, run) in values.chunks_exact(inner.max(1)).enumerate() {
                along[i % shape[axis]] += run.iter().map(|&v| of(f64::from(v))).sum::<f64>();
            }
            for (sum, place) in along.into_iter().zip(places) {
                for &(atom, index) in place.iter().filter(|(atom, _)| self.axes.frozen(*atom).is_none()) {
                    let size = self.axes.extent(atom).as_const().unwrap_or(0).max(0) as usize;
                    sums.entry(atom).or_insert_with(|| vec![0.0; size])[index] += sum;
                }
            }
        }
    }

    /// Mean magnitudes of what products read, each value with the same weight.
    fn activation_sums(
        &self,
        backend: &Arc<dyn Backend>,
        samples: &[Sample],
        progress: Progress<'_>,
    ) -> Result<BTreeMap<AxisId, Vec<f64>>, ShrinkError> {
        if samples.is_empty() {
            return Err(ShrinkError::NoSamples);
        }
        let read = self.graph.nodes().filter(|(_, node)| is_product(&node.op));
        let mut read: Vec<ValueId> = read.flat_map(|(_, node)| node.inputs.iter().take(2).flatten().copied()).collect();
        read.sort();
        read.dedup();
        read.retain(|v| {
            crate::edit::is_f32(&self.graph, *v)
                && self.graph.constant(*v).is_none()
                && self.of.get(v).is_some_and(|axes| axes.iter().any(|&axis| !self.axes.atoms(axis).is_empty()))
        });
        let mut probe = Probe::new(&self.graph, &read, backend)?;
        let mut sums: BTreeMap<AxisId, Vec<f64>> = BTreeMap::new();
        for (number, sample) in samples.iter().enumerate() {
            for (value, seen) in read.iter().zip(probe.run(sample, number)?) {
                let Value::Tensor(tensor) = seen else { continue };
                let refuse = |message: String| {
                    let message = format!("value '{}': {message}", self.graph.value(*value).name);
                    ShrinkError::Sample { sample: number, message }
                };
                let values = tensor.to_vec::<f32>().map_err(|e| refuse(e.to_string()))?;
                if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                    return Err(refuse(format!("element {at} is {}; expected a finite number", values[at])));
                }
                let shape = tensor.shape().dims();
                // Axes without atoms, the open ones among them, have no place.
                let places: Vec<Vec<Vec<(AxisId, usize)>>> = self.of[value]
                    .iter()
                    .map(|&axis| if self.axes.atoms(axis).is_empty() { Vec::new() } else { self.axes.places(axis) })
                    .collect();
                let scale = 1.0 / (values.len().max(1) as f64);
                self.add(&mut sums, &values, shape, &places, &|v| v.abs() * scale);
            }
            progress("activations", number + 1, samples.len());
        }
        Ok(sums)
    }
}

pub(super) fn is_product(op: &Op) -> bool {
    matches!(op, Op::Conv(_) | Op::ConvTranspose(_) | Op::MatMul(_) | Op::Gemm(_) | Op::Einsum(_) | Op::Recurrent(_))
}
