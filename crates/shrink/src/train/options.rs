//! What a training is to do, and what it says while it does it: without candle, so that a recipe can be read where nothing can be trained.

use crate::{
    Observation, ShrinkError,
    quantize::{Calibration, QuantizeReport, StaticOptions, quantize_static},
};
use cutover_graph::Graph;
use serde::{Deserialize, Serialize};
use std::{path::PathBuf, time::Duration};

/// How a graph's weights are trained. A table of a recipe; whatever is left out has its default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Fit {
    /// Passes over all samples.
    pub epochs: usize,
    /// Steps of the optimizer instead of passes, where it is given.
    pub steps: Option<usize>,
    /// Samples of a step.
    pub batch: usize,
    /// The learning rate at its highest.
    pub rate: f64,
    pub schedule: Schedule,
    /// The share of all steps in which the rate rises from 0 to its highest, in `[0, 1)`.
    pub warmup: f64,
    /// AdamW's, applied to weights of two dimensions or more: not to biases and the scales of norms.
    pub weight_decay: f64,
    /// Gradients whose norm over all weights is larger are shortened to it; 0 for never.
    pub clip_norm: f64,
    /// What logits are divided by before teacher and student are compared; above 0.
    pub temperature: f64,
    pub losses: Losses,
    /// Ends when the held-out metric has not risen for so many evaluations; 0 for never.
    pub patience: usize,
    /// Steps between evaluations on what is held out, and between checkpoints; 0 for once an epoch.
    pub every: usize,
    /// The share of the samples, the last ones, that a recipe trains without and judges by, in `[0, 1)`, rounded down; none of
    /// them where data is held out in a file of its own.
    pub held_out: f64,
    /// Of the order of samples and of what is drawn anew.
    pub seed: u64,
    /// Folder of the checkpoints. A run that finds one there of the same training goes on from it.
    pub checkpoints: Option<PathBuf>,
    /// Names of weights that stay as they are.
    pub frozen: Vec<String>,
    /// Trains for integers: what quantization will round is rounded in training too.
    pub quantize: Option<FakeQuantize>,
    /// Ends after so many minutes, with the best weights so far.
    pub minutes: Option<f64>,
}

/// The weight of each loss in their sum; 0 leaves one out. Those that compare with a teacher need one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Losses {
    /// Kullback–Leibler divergence from the teacher's classes to the student's, both at the temperature `T`, times `T²` (Hinton et al. 2015).
    pub soft: f64,
    /// Cross-entropy with the labels.
    pub labels: f64,
    /// Mean squared difference of the outputs.
    pub mse: f64,
    /// One less the cosine between rows of the outputs along their last axis.
    pub cosine: f64,
    /// Inner values to compare, through a learned projection where their widths differ (Romero et al. 2015).
    pub features: Vec<Feature>,
}

/// A value of the student that is to become like one of the teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Feature {
    pub student: String,
    pub teacher: String,
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

/// How the rate goes on after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    Constant,
    /// To 0 along half a cosine.
    #[default]
    Cosine,
    /// To 0 along a line.
    Linear,
}

/// Rounding as static quantization will round, through which gradients pass as if it were not there (Jacob et al. 2018).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct FakeQuantize {
    /// Of weights, 2 to 8.
    pub weight_bits: u32,
    /// Of activations, 2 to 8; `None` leaves them alone.
    pub activation_bits: Option<u32>,
    /// A scale for each output channel of a weight, or one for all.
    pub per_channel: bool,
    /// Whether the zero point of activations is 0.
    pub symmetric: bool,
    /// Names of nodes that stay in floats.
    pub exclude: Vec<String>,
    /// The share of the steps after which the ranges of activations stay as they are, in `[0, 1]`.
    pub freeze: f64,
}

impl Fit {
    /// What no training can be asked for, whatever its data.
    ///
    /// # Errors
    /// A number out of range.
    pub fn check(&self) -> Result<(), String> {
        let losses = &self.losses;
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if !positive(self.rate) || !positive(self.temperature) || self.batch == 0 {
            return Err("rate, temperature and batch must be above 0".to_string());
        }
        if !(0.0..1.0).contains(&self.warmup) {
            return Err(format!("a warm-up over {} of all steps, expected a share in [0, 1)", self.warmup));
        }
        if !(0.0..1.0).contains(&self.held_out) {
            return Err(format!("held-out = {}: expected a share in [0, 1)", self.held_out));
        }
        let weights = [losses.soft, losses.labels, losses.mse, losses.cosine, self.weight_decay, self.clip_norm];
        if weights.iter().chain(losses.features.iter().map(|f| &f.weight)).any(|w| !w.is_finite() || *w < 0.0) {
            return Err("weights of losses, weight decay and clip norm must not be negative".to_string());
        }
        match losses.of_teacher() || losses.labels > 0.0 {
            true => Ok(()),
            false => Err("nothing to lessen: all losses have weight 0".to_string()),
        }
    }
}

impl Losses {
    /// Whether any compares with a teacher.
    pub fn of_teacher(&self) -> bool {
        self.soft + self.mse + self.cosine > 0.0 || !self.features.is_empty()
    }
}

impl Default for Fit {
    fn default() -> Self {
        Fit {
            epochs: 10,
            steps: None,
            batch: 32,
            rate: 1e-3,
            schedule: Schedule::default(),
            warmup: 0.05,
            weight_decay: 0.01,
            clip_norm: 1.0,
            temperature: 2.0,
            losses: Losses::default(),
            patience: 0,
            every: 0,
            held_out: 0.1,
            seed: 0,
            checkpoints: None,
            frozen: Vec::new(),
            quantize: None,
            minutes: None,
        }
    }
}

impl Default for Losses {
    fn default() -> Self {
        Losses { soft: 1.0, labels: 0.0, mse: 0.0, cosine: 0.0, features: Vec::new() }
    }
}

impl Default for FakeQuantize {
    fn default() -> Self {
        FakeQuantize {
            weight_bits: 8,
            activation_bits: Some(8),
            per_channel: true,
            symmetric: false,
            exclude: Vec::new(),
            freeze: 0.5,
        }
    }
}

/// Where a training is, told after every step.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// Steps done, those of a run before this one included.
    pub step: usize,
    pub steps: usize,
    /// Mean loss of the step.
    pub loss: f64,
    /// What the last evaluation gave, where there was one.
    pub metric: Option<f64>,
    /// What the metric is.
    pub metric_name: &'static str,
    pub rate: f64,
    pub samples_per_second: f64,
    /// At the speed so far; `None` before the first step.
    pub left: Option<Duration>,
}

/// A point of the curve: an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    pub step: usize,
    /// Mean over the steps since the last point.
    pub loss: f64,
    /// On what is held out.
    pub metric: Option<f64>,
    /// Spent training, this evaluation included.
    pub seconds: f64,
}

/// A trained graph and how it came about.
#[derive(Clone, Debug)]
pub struct Fitted {
    /// The student with the best weights, named and shaped as it was.
    pub graph: Graph,
    pub curve: Vec<Point>,
    /// What [`Point::metric`] is: `accuracy`, `agreement`, `cosine` or `negative loss`; higher is better.
    pub metric_name: &'static str,
    /// With [`Fit::quantize`], the range of every activation that is rounded, by the value's name: what static quantization is to use.
    pub ranges: Vec<(String, crate::quantize::Range)>,
    pub samples_per_second: f64,
}

impl Fitted {
    /// The graph in integers as training saw them, with the ranges that it found.
    ///
    /// # Errors
    /// Those of static quantization: a value that training did not round has no range.
    pub fn quantize(&self, options: &StaticOptions) -> Result<(Graph, QuantizeReport), ShrinkError> {
        let named = |name: &str| self.graph.values().find(|(_, value)| value.name == name).map(|(id, _)| id);
        let observations =
            self.ranges.iter().filter_map(|(name, range)| Some((named(name)?, Observation::of_range(*range))));
        let options = StaticOptions { calibration: Calibration::MinMax, ..options.clone() };
        quantize_static(self.graph.clone(), &observations.collect(), &options)
    }
}
