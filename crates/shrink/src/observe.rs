//! What the values of a model are like on real inputs: their ranges, how they are distributed, and what of it each channel has.

use crate::{ShrinkError, runner::Runner};
use cutover_backend::{Backend, RunContext};
use cutover_graph::{Graph, ValueId};
use cutover_tensor::{DType, Tensor, Value};
use std::{collections::HashMap, sync::Arc};

/// A model's inputs by name.
pub type Sample = Vec<(String, Value)>;

/// Told of work done: what, how much of it, and how much there is.
pub type Progress<'a> = &'a dyn Fn(&str, usize, usize);

/// Bins of a histogram. TensorRT's calibration takes as many.
const BINS: usize = 2048;

/// Runs a graph for what some of its inner values are.
pub(crate) struct Probe {
    runner: Runner,
    /// Outputs of the graph itself; the probed values follow.
    own: usize,
}

impl Probe {
    /// `values` are probed in this order.
    pub fn new(graph: &Graph, values: &[ValueId], backend: &Arc<dyn Backend>) -> Result<Probe, ShrinkError> {
        let mut graph = graph.clone();
        let own = graph.outputs().len();
        graph.set_outputs([graph.outputs(), values].concat());
        Ok(Probe { runner: Runner::new(&graph, backend)?, own })
    }

    /// The probed values.
    pub fn run(&mut self, sample: &Sample, number: usize) -> Result<Vec<Value>, ShrinkError> {
        Ok(self.runner.run(sample, number, &RunContext::default())?.split_off(self.own))
    }
}

/// What is asked of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    pub value: ValueId,
    /// The axis of its channels, counted from the front, or from the back where it is negative.
    pub channel_axis: i64,
    /// Whether `Xᵀ·X` is summed over all rows of the last axis.
    pub gram: bool,
}

/// What was seen of a value over all samples.
#[derive(Clone, Debug)]
pub struct Observation {
    pub low: f32,
    pub high: f32,
    /// Counts over `[low, high]` in bins of one width.
    pub histogram: Vec<u64>,
    /// Largest magnitude in each channel.
    pub channel_max: Vec<f32>,
    /// Mean of each channel.
    pub channel_mean: Vec<f64>,
    /// `Σ xᵀ·x` over rows `x`, row-major; empty where it was not asked for.
    pub gram: Vec<f32>,
    elements: usize,
}

impl Observation {
    fn new() -> Observation {
        Observation {
            low: f32::INFINITY,
            high: f32::NEG_INFINITY,
            histogram: Vec::new(),
            channel_max: Vec::new(),
            channel_mean: Vec::new(),
            gram: Vec::new(),
            elements: 0,
        }
    }

    /// As if `range` were all that was seen.
    pub fn of_range(range: crate::quantize::Range) -> Observation {
        Observation { low: range.low, high: range.high, ..Observation::new() }
    }

    pub fn elements(&self) -> usize {
        self.elements
    }

    fn add(&mut self, tensor: &Tensor, question: &Question) -> Result<(), String> {
        let values = tensor.as_slice::<f32>().map_err(|e| e.to_string())?;
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(format!("element {at} is {}", values[at]));
        }
        for &value in values {
            (self.low, self.high) = (self.low.min(value), self.high.max(value));
        }
        self.elements += values.len();
        let shape = tensor.shape().dims();
        let rank = shape.len() as i64;
        let axis = if question.channel_axis < 0 { question.channel_axis + rank } else { question.channel_axis };
        let Some(&channels) = usize::try_from(axis).ok().and_then(|axis| shape.get(axis)) else { return Ok(()) };
        let inner: usize = shape[axis as usize + 1..].iter().product();
        if self.channel_max.is_empty() {
            (self.channel_max, self.channel_mean) = (vec![0.0; channels], vec![0.0; channels]);
        }
        if self.channel_max.len() != channels {
            return Err(format!("has {channels} channels, it had {} before", self.channel_max.len()));
        }
        for (i, run) in values.chunks_exact(inner.max(1)).enumerate() {
            let channel = i % channels;
            for &value in run {
                self.channel_max[channel] = self.channel_max[channel].max(value.abs());
                self.channel_mean[channel] += f64::from(value);
            }
        }
        if question.gram {
            self.add_gram(values, shape.last().copied().unwrap_or(1));
        }
        Ok(())
    }

    fn add_gram(&mut self, values: &[f32], width: usize) {
        self.gram.resize(width * width, 0.0);
        // Eight rows at a time: the matrix is read and written once for all of them.
        for rows in values.chunks(8 * width.max(1)) {
            for (i, sums) in self.gram.chunks_exact_mut(width).enumerate() {
                for row in rows.chunks_exact(width) {
                    let x = row[i];
                    sums.iter_mut().zip(row).for_each(|(sum, y)| *sum += x * y);
                }
            }
        }
    }

    fn count(&mut self, tensor: &Tensor) {
        let Ok(values) = tensor.as_slice::<f32>() else { return };
        self.histogram.resize(BINS, 0);
        let scale = BINS as f32 / (self.high - self.low).max(f32::MIN_POSITIVE);
        for value in values {
            self.histogram[(((value - self.low) * scale) as usize).min(BINS - 1)] += 1;
        }
    }
}

/// Runs `graph` over `samples` and observes the f32 values that are asked for; histograms take a second run over all of them.
///
/// # Errors
/// No samples; a sample that does not fit the model; a NaN or an infinity, with the value and the sample it came in.
pub fn observe(
    graph: &Graph,
    questions: &[Question],
    histograms: bool,
    backend: &Arc<dyn Backend>,
    samples: &[Sample],
    progress: Progress<'_>,
) -> Result<HashMap<ValueId, Observation>, ShrinkError> {
    if samples.is_empty() {
        return Err(ShrinkError::NoSamples);
    }
    let values: Vec<ValueId> = questions.iter().map(|q| q.value).collect();
    let mut probe = Probe::new(graph, &values, backend)?;
    let mut observations: Vec<Observation> = values.iter().map(|_| Observation::new()).collect();
    let rounds = 1 + usize::from(histograms);
    for round in 0..rounds {
        for (number, sample) in samples.iter().enumerate() {
            let probed = probe.run(sample, number)?;
            for ((observation, question), value) in observations.iter_mut().zip(questions).zip(&probed) {
                let Value::Tensor(tensor) = value else { continue };
                if tensor.dtype() != DType::F32 {
                    continue;
                }
                match round {
                    0 => observation.add(tensor, question).map_err(|message| {
                        let message = format!("value '{}': {message}", graph.value(question.value).name);
                        ShrinkError::Sample { sample: number, message }
                    })?,
                    _ => observation.count(tensor),
                }
            }
            progress("calibration", round * samples.len() + number + 1, rounds * samples.len());
        }
    }
    for observation in &mut observations {
        let per_channel = observation.elements / observation.channel_max.len().max(1);
        observation.channel_mean.iter_mut().for_each(|sum| *sum /= per_channel.max(1) as f64);
        if observation.elements == 0 {
            (observation.low, observation.high) = (0.0, 0.0);
        }
    }
    Ok(values.into_iter().zip(observations).collect())
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// What is observed of these values.
    pub fn observed(values: &[f32]) -> Observation {
        let tensor = Tensor::from_vec([values.len()], values.to_vec()).unwrap();
        let mut graph = Graph::new("model");
        let value = graph.add_input("x", cutover_graph::TensorFact::unknown_rank(DType::F32));
        let mut observation = Observation::new();
        observation.add(&tensor, &Question { value, channel_axis: -1, gram: false }).unwrap();
        if observation.elements == 0 {
            (observation.low, observation.high) = (0.0, 0.0);
        }
        observation.count(&tensor);
        observation
    }
}
