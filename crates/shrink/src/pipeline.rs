//! From a model and data to a smaller model and the evidence: balance, calibrate, quantize, measure, and give back what costs too much.

use crate::{
    Comparison, HalfOptions, Kept, Observation, Product, Progress, Question, Sample, ShrinkError, compare,
    compare::largest,
    constant_bytes,
    observe::observe,
    plain,
    quantize::{
        BlockOptions, Calibration, DynamicOptions, Range, StaticOptions, correct_bias, equalize, smooth,
        static_questions,
    },
    runner::Runner,
    search::Search,
};
use cutover_backend::{Backend, RunContext};
use cutover_graph::{Graph, ValueId};
use cutover_tensor::Value;
use serde::{Deserialize, Serialize};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

/// How a model is made smaller.
#[derive(Clone, Debug)]
pub enum Method {
    /// Weights in 16 bits, the arithmetic as before.
    Half(HalfOptions),
    /// Integers, ranges found by every run.
    Dynamic(DynamicOptions),
    /// Integers, ranges found by calibration.
    Static(StaticOptions),
    /// Weights of few bits in blocks, activations in floats.
    Weights(BlockOptions),
}

/// How a model is quantized: balanced, calibrated, converted, and measured, in this order.
#[derive(Clone, Debug)]
pub struct Quantization {
    pub method: Method,
    /// SmoothQuant's strength.
    pub smooth: Option<f32>,
    /// Cross-layer equalization.
    pub equalize: bool,
    /// Bias correction; of static quantization.
    pub correct_bias: bool,
    /// GPTQ; of weights in blocks.
    pub gptq: bool,
    pub target: Target,
    /// Whether histograms of activations and the noise at every layer are gathered, for a report to draw.
    pub detail: bool,
    /// What the result must keep; layers go back to floats, the most sensitive first, until it does.
    pub budget: Option<Budget>,
}

/// What is to be won.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// Every layer is quantized, but one that is so small that its scales take what its weights win.
    #[default]
    Size,
    /// A layer that is no faster in integers on this backend stays in floats.
    Latency,
    /// One that lessens not what the compiled model and a session take stays in floats.
    Memory,
}

/// What a shrunk model has to keep, over all samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Budget {
    /// Accuracy on labels may change by no less than this: −0.005 for half a point.
    AccuracyChange(f64),
    /// Share of rows whose largest element stays where it was.
    Agreement(f64),
    /// Signal to quantization noise of the worst output, in dB.
    SqnrDb(f64),
    /// Mean cosine of the worst output's rows.
    Cosine(f64),
}

impl std::str::FromStr for Budget {
    type Err = String;

    /// `accuracy>=-0.5%`, `agreement>=99%`, `sqnr>=20`, `cosine>=0.995`.
    fn from_str(text: &str) -> Result<Budget, String> {
        let usage = || format!("'{text}': expected accuracy>=-0.5%, agreement>=99%, sqnr>=20 or cosine>=0.995");
        let (metric, bound) = text.split_once(">=").ok_or_else(usage)?;
        let bound = bound.trim();
        let number = |text: &str| text.trim().parse::<f64>().ok().filter(|v| v.is_finite());
        let value = match bound.strip_suffix('%') {
            Some(percent) => number(percent).map(|v| v / 100.0),
            None => number(bound),
        };
        let value = value.ok_or_else(usage)?;
        match metric.trim() {
            "accuracy" if (-1.0..=1.0).contains(&value) => Ok(Budget::AccuracyChange(value)),
            "agreement" if (0.0..=1.0).contains(&value) => Ok(Budget::Agreement(value)),
            "sqnr" => Ok(Budget::SqnrDb(value)),
            "cosine" if (-1.0..=1.0).contains(&value) => Ok(Budget::Cosine(value)),
            _ => Err(usage()),
        }
    }
}

impl TryFrom<String> for Budget {
    type Error = String;

    fn try_from(text: String) -> Result<Budget, String> {
        text.parse()
    }
}

impl From<Budget> for String {
    fn from(budget: Budget) -> String {
        budget.to_string()
    }
}

impl std::fmt::Display for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Budget::AccuracyChange(least) => write!(f, "accuracy>={}%", least * 100.0),
            Budget::Agreement(least) => write!(f, "agreement>={}%", least * 100.0),
            Budget::SqnrDb(least) => write!(f, "sqnr>={least}"),
            Budget::Cosine(least) => write!(f, "cosine>={least}"),
        }
    }
}

/// Samples, and the class of every row where that is known.
#[derive(Clone, Debug, Default)]
pub struct Data {
    pub samples: Vec<Sample>,
    /// For each sample, a class for each row of the first output.
    pub labels: Option<Vec<Vec<i64>>>,
}

impl Data {
    /// The first `count` samples, or all there are.
    pub fn first(&self, count: usize) -> Data {
        let count = count.min(self.samples.len());
        let labels = self.labels.as_ref().map(|labels| labels[..count.min(labels.len())].to_vec());
        Data { samples: self.samples[..count].to_vec(), labels }
    }
}

/// A shrunk model, and how it came about.
pub struct Shrunk {
    pub graph: Graph,
    pub report: ShrinkReport,
}

/// The evidence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShrinkReport {
    pub bytes_before: u64,
    pub bytes_after: u64,
    pub quantized: Vec<String>,
    pub kept: Vec<Kept>,
    /// Inputs that SmoothQuant changed, and pairs that were equalized.
    pub smoothed: usize,
    pub equalized: usize,
    pub evaluation: Evaluation,
    /// Layers by what quantizing each alone does, the worst first; empty where the budget was met without.
    pub sensitivity: Vec<Sensitivity>,
    pub target: Target,
    /// What the target costs, layer by layer in the order of the model; of the layers where that was in doubt.
    pub costs: Vec<LayerCost>,
    /// Every setting that was tried: layers kept in floats, bytes, and what it gave.
    pub tried: Vec<(usize, u64, Evaluation)>,
    /// Whether the budget is met; `true` where there is none.
    pub within_budget: bool,
    /// With [`Quantization::detail`], of static quantization: what activations were like, in the order of the model.
    pub ranges: Vec<CalibratedRange>,
    /// With [`Quantization::detail`]: products in the order of the model, and the signal to noise of what they give, all that comes before included, in
    /// dB; those that give what they gave are left out.
    pub layer_sqnr_db: Vec<(String, f64)>,
}

/// An activation and the range chosen for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CalibratedRange {
    pub value: String,
    pub seen: Range,
    pub chosen: Range,
    /// Counts over what was seen, in bins of one width.
    pub histogram: Vec<u64>,
}

/// The model with one layer quantized, against the original, on a few samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    pub node: String,
    pub evaluation: Evaluation,
}

/// What the model costs with a layer in floats and in integers, all else alike: bytes of the file, seconds of a run or bytes of memory, as
/// [`Target`] says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerCost {
    pub node: String,
    pub floats: f64,
    pub integers: f64,
}

/// What was lost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub comparison: Comparison,
    /// Share of rows whose largest element is the label's, before and after.
    pub accuracy: Option<(f64, f64)>,
}

impl Evaluation {
    /// Of the worst output.
    pub fn sqnr_db(&self) -> f64 {
        self.comparison.outputs.iter().map(|o| o.sqnr_db).fold(f64::INFINITY, f64::min)
    }

    /// Of noise to signal, of the worst output.
    pub(crate) fn noise(&self) -> f64 {
        10f64.powf(-self.sqnr_db() / 10.0)
    }

    /// Whether that is within `budget`.
    ///
    /// # Errors
    /// A metric that was not measured.
    pub fn meets(&self, budget: Budget) -> Result<bool, ShrinkError> {
        let outputs = &self.comparison.outputs;
        let none = |what: &str| ShrinkError::Option(format!("a budget of {what} needs {what} to be measured"));
        Ok(match budget {
            Budget::AccuracyChange(least) => {
                let (before, after) = self.accuracy.ok_or_else(|| none("accuracy (labels)"))?;
                after - before >= least
            }
            Budget::Agreement(least) => {
                let agreement = outputs.iter().filter_map(|o| o.top1_agreement).reduce(f64::min);
                agreement.ok_or_else(|| none("agreement (an output of classes)"))? >= least
            }
            Budget::SqnrDb(least) => self.sqnr_db() >= least,
            Budget::Cosine(least) => outputs.iter().all(|o| o.cosine_mean >= least),
        })
    }
}

/// Carries out `quantization` on `original`, measured on `backend`.
///
/// # Errors
/// Data that does not fit; options out of range; a budget whose metric can't be measured. A budget that can't be met is no error: the report says so.
pub fn shrink(
    original: &Graph,
    quantization: &Quantization,
    data: &Data,
    backend: &Arc<dyn Backend>,
    progress: Progress<'_>,
) -> Result<Shrunk, ShrinkError> {
    if data.samples.is_empty() {
        return Err(ShrinkError::NoSamples);
    }
    let bytes_before = constant_bytes(original);
    let mut prepared = plain(original.clone())?;
    let equalized = if quantization.equalize { equalize(&mut prepared)? } else { 0 };
    let smoothed = match quantization.smooth {
        None => 0,
        Some(alpha) => {
            let questions = product_inputs(&prepared);
            let observations = observe(&prepared, &questions, false, backend, &data.samples, progress)?;
            smooth(&mut prepared, &observations, alpha)?
        }
    };
    let observations = observations(&prepared, quantization, backend, data, progress)?;
    if let (Method::Static(options), true) = (&quantization.method, quantization.correct_bias) {
        correct_bias(&mut prepared, &observations, options.per_channel, options.weights)?;
    }
    let unprofitable = HashSet::new();
    let mut search = Search {
        original,
        prepared: &prepared,
        observations: &observations,
        quantization,
        data,
        backend,
        unprofitable,
    };
    let costs = search.layer_costs(progress)?;
    search.unprofitable = search.without_gain(&costs)?;
    let (graph, report, tried) = search.first()?;
    let mut shrunk = Shrunk {
        graph,
        report: ShrinkReport {
            bytes_before,
            bytes_after: report.bytes_after,
            quantized: report.quantized,
            kept: report.kept,
            smoothed,
            equalized,
            evaluation: tried.2.clone(),
            sensitivity: Vec::new(),
            target: quantization.target,
            costs: Vec::new(),
            tried: vec![tried.clone()],
            within_budget: true,
            ranges: search.ranges()?,
            layer_sqnr_db: Vec::new(),
        },
    };
    if let Some(budget) = quantization.budget {
        shrunk.report.within_budget = tried.2.meets(budget)?;
        if !shrunk.report.within_budget {
            search.give_back(&mut shrunk, budget, &costs, progress)?;
        }
    }
    if quantization.detail {
        shrunk.report.layer_sqnr_db = search.layer_noise(&shrunk.graph)?;
    }
    shrunk.report.costs = costs;
    Ok(shrunk)
}

/// What every matrix product reads.
fn product_inputs(graph: &Graph) -> Vec<Question> {
    let mut inputs: Vec<(ValueId, i64)> = Product::all(graph).iter().map(|p| (p.input, p.input_axis())).collect();
    inputs.sort();
    inputs.dedup();
    inputs.into_iter().map(|(value, channel_axis)| Question { value, channel_axis, gram: false }).collect()
}

fn observations(
    graph: &Graph,
    quantization: &Quantization,
    backend: &Arc<dyn Backend>,
    data: &Data,
    progress: Progress<'_>,
) -> Result<HashMap<ValueId, Observation>, ShrinkError> {
    let (questions, histograms) = match &quantization.method {
        Method::Static(options) => (
            static_questions(graph, &options.exclude)?,
            quantization.detail || options.calibration != Calibration::MinMax,
        ),
        Method::Weights(options) if quantization.gptq => (options.questions(graph), false),
        _ => return Ok(HashMap::new()),
    };
    observe(graph, &questions, histograms, backend, &data.samples, progress)
}

/// What `graph` lost against `original`, over all samples.
///
/// # Errors
/// Samples or labels that do not fit.
pub fn evaluate(
    original: &Graph,
    graph: &Graph,
    data: &Data,
    backend: &Arc<dyn Backend>,
) -> Result<Evaluation, ShrinkError> {
    let comparison = compare(original, graph, backend, &data.samples)?;
    let accuracy = match data.labels {
        None => None,
        Some(_) => Some((accuracy(original, data, backend)?, accuracy(graph, data, backend)?)),
    };
    Ok(Evaluation { comparison, accuracy })
}

/// Share of rows whose largest element is the label's.
fn accuracy(graph: &Graph, data: &Data, backend: &Arc<dyn Backend>) -> Result<f64, ShrinkError> {
    let mut runner = Runner::new(graph, backend)?;
    let (mut right, mut rows) = (0, 0);
    for (number, (sample, labels)) in data.samples.iter().zip(data.labels.iter().flatten()).enumerate() {
        let outputs = runner.run(sample, number, &RunContext::default())?;
        let refuse = |message| ShrinkError::Sample { sample: number, message };
        let Some(Value::Tensor(scores)) = outputs.first() else {
            return Err(refuse("the model's first output is no tensor".to_string()));
        };
        let scores = scores.to_vec::<f32>().map_err(|e| refuse(format!("scores: {e}")))?;
        if labels.is_empty() || !scores.len().is_multiple_of(labels.len()) || scores.len() < 2 * labels.len() {
            return Err(refuse(format!("{} labels for {} scores", labels.len(), scores.len())));
        }
        for (row, &label) in scores.chunks_exact(scores.len() / labels.len()).zip(labels) {
            if usize::try_from(label).map_or(true, |l| l >= row.len()) {
                return Err(refuse(format!("a label of {label}, the model has classes 0 to {}", row.len() - 1)));
            }
            right += usize::from(largest(row) as i64 == label);
            rows += 1;
        }
    }
    Ok(right as f64 / rows.max(1) as f64)
}

/// Median latency of a run of each graph, taking turns so that the machine's drift falls on both alike.
pub fn latencies(
    before: &Graph,
    after: &Graph,
    backend: &Arc<dyn Backend>,
    samples: &[Sample],
    within: Duration,
) -> Result<[Duration; 2], ShrinkError> {
    let mut runners = [Runner::new(before, backend)?, Runner::new(after, backend)?];
    let mut times = [Vec::new(), Vec::new()];
    let begun = Instant::now();
    // The first round warms up.
    let mut round = 0;
    while round < 4 || (begun.elapsed() < within && round < 10_000) {
        let number = round % samples.len().max(1);
        let sample = samples.get(number).ok_or(ShrinkError::NoSamples)?;
        for (runner, times) in runners.iter_mut().zip(&mut times) {
            let start = Instant::now();
            runner.run(sample, number, &RunContext::default())?;
            if round > 0 {
                times.push(start.elapsed());
            }
        }
        round += 1;
    }
    Ok(times.map(|mut times| {
        times.sort();
        times[times.len() / 2]
    }))
}
