//! From a model and data to a smaller model and the evidence: balance, calibrate, quantize, measure, and give back what costs too much.

use crate::{
    Comparison, HalfOptions, Kept, Observation, Product, Progress, Question, Sample, ShrinkError, compare,
    compare::largest,
    constant_bytes, half_weights,
    observe::{Probe, observe},
    plain,
    quantize::{
        BlockOptions, Calibration, DynamicOptions, QuantizeReport, Range, StaticOptions, correct_bias, equalize,
        quantize_dynamic, quantize_static, quantize_weights, smooth, static_questions,
    },
    runner::Runner,
};
use cutover_backend::{Backend, OpTiming, Profiler, RunContext};
use cutover_graph::{Graph, ValueId};
use cutover_tensor::Value;
use serde::{Deserialize, Serialize};
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// How a model is made smaller.
#[derive(Clone, Debug)]
pub enum Method {
    /// Weights as f16, the arithmetic as before.
    Half,
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
    /// Every layer is quantized.
    #[default]
    Size,
    /// A layer that is no faster in integers on this backend stays in floats.
    Latency,
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

/// The model with one layer quantized, against the original.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    pub node: String,
    /// Of the worst output.
    #[serde(with = "crate::number")]
    pub sqnr_db: f64,
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

/// Samples that a layer's sensitivity is measured on: the search runs the model once for every layer and sample.
const SENSITIVITY_SAMPLES: usize = 8;

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
    let slower = HashSet::new();
    let mut search =
        Search { original, prepared: &prepared, observations: &observations, quantization, data, backend, slower };
    if quantization.target == Target::Latency {
        search.slower = search.slower_in_integers(progress)?;
    }
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
            tried: vec![tried.clone()],
            within_budget: true,
            ranges: search.ranges()?,
            layer_sqnr_db: Vec::new(),
        },
    };
    if let Some(budget) = quantization.budget {
        shrunk.report.within_budget = tried.2.meets(budget)?;
        if !shrunk.report.within_budget {
            search.give_back(&mut shrunk, budget, progress)?;
        }
    }
    if quantization.detail {
        shrunk.report.layer_sqnr_db = search.layer_noise(&shrunk.graph)?;
    }
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

struct Search<'a> {
    original: &'a Graph,
    prepared: &'a Graph,
    observations: &'a HashMap<ValueId, Observation>,
    quantization: &'a Quantization,
    data: &'a Data,
    backend: &'a Arc<dyn Backend>,
    /// Layers that stay in floats because integers are no faster.
    slower: HashSet<String>,
}

/// Runs of which a layer's time is the shortest.
const TIMED_RUNS: usize = 9;

impl Search<'_> {
    /// The layers that take longer quantized, if the model is faster with those in floats than without.
    fn slower_in_integers(&self, progress: Progress<'_>) -> Result<HashSet<String>, ShrinkError> {
        let (all, _) = self.quantize(&HashSet::new())?;
        let (before, after) = (self.layer_times(self.prepared)?, self.layer_times(&all)?);
        progress("timing", 1, 2);
        let names = Product::all(self.prepared).into_iter().map(|p| self.prepared.node(p.node).name.clone());
        let time = |times: &HashMap<String, Duration>, name: &String| times.get(name).copied().unwrap_or_default();
        let slower: HashSet<String> = names.filter(|name| time(&after, name) >= time(&before, name)).collect();
        if slower.is_empty() {
            return Ok(slower);
        }
        // Quantizing and dequantizing between layers costs too: only the whole tells.
        let (some, _) = self.quantize(&slower)?;
        let [all, some] = latencies(&all, &some, self.backend, &self.data.samples, Duration::from_secs(2))?;
        progress("timing", 2, 2);
        Ok(if some < all { slower } else { HashSet::new() })
    }

    /// The shortest time of every node in a few runs.
    fn layer_times(&self, graph: &Graph) -> Result<HashMap<String, Duration>, ShrinkError> {
        let mut runner = Runner::new(graph, self.backend)?;
        let mut shortest: HashMap<String, Duration> = HashMap::new();
        for run in 0..TIMED_RUNS {
            let times = Times::default();
            let number = run % self.data.samples.len();
            runner.run(
                &self.data.samples[number],
                number,
                &RunContext { profiler: Some(&times), ..RunContext::default() },
            )?;
            for (node, time) in times.0.into_inner().unwrap_or_default() {
                shortest.entry(node).and_modify(|shortest| *shortest = time.min(*shortest)).or_insert(time);
            }
        }
        Ok(shortest)
    }

    fn first(&self) -> Result<(Graph, QuantizeReport, (usize, u64, Evaluation)), ShrinkError> {
        let (graph, report) = self.quantize(&HashSet::new())?;
        let evaluation = evaluate(self.original, &graph, self.data, self.backend)?;
        let tried = (0, report.bytes_after, evaluation);
        Ok((graph, report, tried))
    }

    /// Gives the most sensitive layers back to floats, the fewest that meet the budget.
    fn give_back(&self, shrunk: &mut Shrunk, budget: Budget, progress: Progress<'_>) -> Result<(), ShrinkError> {
        let sensitivity = self.sensitivity(&shrunk.report.quantized, progress)?;
        let rounds = 1 + sensitivity.len().max(1).ilog2() as usize;
        // The fewest of the most sensitive layers that have to stay, by bisection: `few` do not suffice, `many` would, as far as is known.
        let (mut few, mut many) = (0, sensitivity.len() + 1);
        while many - few > 1 {
            let count = few + (many - few) / 2;
            let exclude: HashSet<String> = sensitivity[..count].iter().map(|s| s.node.clone()).collect();
            let (graph, report) = self.quantize(&exclude)?;
            let tried = (count, report.bytes_after, evaluate(self.original, &graph, self.data, self.backend)?);
            shrunk.report.tried.push(tried.clone());
            progress("search", (shrunk.report.tried.len() - 1).min(rounds), rounds);
            if !tried.2.meets(budget)? {
                few = count;
                continue;
            }
            many = count;
            let QuantizeReport { quantized, kept, bytes_after, .. } = report;
            let own = &mut shrunk.report;
            (own.quantized, own.kept, own.bytes_after, own.evaluation) = (quantized, kept, bytes_after, tried.2);
            own.within_budget = true;
            shrunk.graph = graph;
        }
        shrunk.report.sensitivity = sensitivity;
        Ok(())
    }

    /// What was chosen for every activation, where a report wants to draw it.
    fn ranges(&self) -> Result<Vec<CalibratedRange>, ShrinkError> {
        let Method::Static(options) = &self.quantization.method else { return Ok(Vec::new()) };
        let range = |(&value, observation): (&ValueId, &Observation)| CalibratedRange {
            value: self.prepared.value(value).name.clone(),
            seen: Range { low: observation.low, high: observation.high },
            chosen: Range::of(observation, options.calibration),
            histogram: observation.histogram.clone(),
        };
        let mut observed: Vec<_> = self.observations.iter().filter(|_| self.quantization.detail).collect();
        observed.sort_by_key(|(value, _)| **value);
        Ok(observed.into_iter().map(range).collect())
    }

    /// Signal to noise of what each product gives, in floats and in `graph`, where that still has the value.
    fn layer_noise(&self, graph: &Graph) -> Result<Vec<(String, f64)>, ShrinkError> {
        let by_name: HashMap<&str, ValueId> = graph.values().map(|(id, value)| (value.name.as_str(), id)).collect();
        let both = |product: Product| {
            let node = self.prepared.node(product.node);
            let value = by_name.get(self.prepared.value(node.outputs[0]).name.as_str())?;
            graph.producer(*value)?;
            Some((node.name.clone(), node.outputs[0], *value))
        };
        let layers: Vec<_> = Product::all(self.prepared).into_iter().filter_map(both).collect();
        let of = |pick: &dyn Fn(&(String, ValueId, ValueId)) -> ValueId| layers.iter().map(pick).collect::<Vec<_>>();
        let mut before = Probe::new(self.prepared, &of(&|layer| layer.1), self.backend)?;
        let mut after = Probe::new(graph, &of(&|layer| layer.2), self.backend)?;
        let mut sums = vec![(0f64, 0f64); layers.len()];
        for (number, sample) in self.data.samples.iter().take(SENSITIVITY_SAMPLES).enumerate() {
            let (expected, actual) = (before.run(sample, number)?, after.run(sample, number)?);
            for (sum, pair) in sums.iter_mut().zip(expected.iter().zip(&actual)) {
                let (Value::Tensor(x), Value::Tensor(y)) = pair else { continue };
                let (Ok(x), Ok(y)) = (x.as_slice::<f32>(), y.as_slice::<f32>()) else { continue };
                for (&x, &y) in x.iter().zip(y) {
                    sum.0 += f64::from(x).powi(2);
                    sum.1 += (f64::from(x) - f64::from(y)).powi(2);
                }
            }
        }
        // A layer that nothing changed has no noise to speak of.
        let noisy = layers.into_iter().zip(sums).filter(|(_, (_, noise))| *noise > 0.0);
        Ok(noisy.map(|((node, ..), (signal, noise))| (node, 10.0 * (signal / noise).log10())).collect())
    }

    /// The prepared graph with all layers quantized but those.
    fn quantize(&self, exclude: &HashSet<String>) -> Result<(Graph, QuantizeReport), ShrinkError> {
        let (graph, mut report) = self.quantize_all_but(exclude)?;
        for kept in &mut report.kept {
            if self.slower.contains(&kept.name) {
                kept.reason = "it is no faster in integers here".to_string();
            } else if exclude.contains(&kept.name) {
                kept.reason = "the budget needs it in floats".to_string();
            }
        }
        Ok((graph, report))
    }

    fn quantize_all_but(&self, exclude: &HashSet<String>) -> Result<(Graph, QuantizeReport), ShrinkError> {
        let all = |own: &HashSet<String>| own.iter().chain(exclude).chain(&self.slower).cloned().collect();
        match &self.quantization.method {
            Method::Half => {
                let (graph, report) = half_weights(self.prepared.clone(), &HalfOptions::default())?;
                let (bytes_before, bytes_after) = (report.bytes_before, report.bytes_after);
                let kept = report.kept;
                Ok((graph, QuantizeReport { quantized: report.converted, kept, bytes_before, bytes_after }))
            }
            Method::Dynamic(options) => {
                let options = DynamicOptions { exclude: all(&options.exclude), ..options.clone() };
                quantize_dynamic(self.prepared.clone(), &options)
            }
            Method::Static(options) => {
                let options = StaticOptions { exclude: all(&options.exclude), ..options.clone() };
                quantize_static(self.prepared.clone(), self.observations, &options)
            }
            Method::Weights(options) => {
                let options = BlockOptions { exclude: all(&options.exclude), ..options.clone() };
                quantize_weights(self.prepared.clone(), self.observations, &options)
            }
        }
    }

    /// What each of `layers` does when it alone is quantized, the worst first.
    fn sensitivity(&self, layers: &[String], progress: Progress<'_>) -> Result<Vec<Sensitivity>, ShrinkError> {
        let products: Vec<String> = Product::all(self.prepared)
            .iter()
            .map(|p| self.prepared.node(p.node).name.clone())
            .filter(|name| layers.contains(name))
            .collect();
        let samples = &self.data.samples[..self.data.samples.len().min(SENSITIVITY_SAMPLES)];
        let mut all = Vec::new();
        for (done, node) in products.iter().enumerate() {
            let others = products.iter().filter(|other| *other != node).cloned().collect();
            let (graph, _) = self.quantize(&others)?;
            let comparison = compare(self.original, &graph, self.backend, samples)?;
            let sqnr_db = Evaluation { comparison, accuracy: None }.sqnr_db();
            all.push(Sensitivity { node: node.clone(), sqnr_db });
            progress("sensitivity", done + 1, products.len());
        }
        all.sort_by(|a, b| a.sqnr_db.total_cmp(&b.sqnr_db));
        Ok(all)
    }
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

/// How long the nodes of one run took.
#[derive(Default)]
struct Times(Mutex<HashMap<String, Duration>>);

impl Profiler for Times {
    fn record(&self, timing: OpTiming<'_>) {
        if let Ok(mut times) = self.0.lock() {
            *times.entry(timing.node.to_string()).or_default() += timing.duration;
        }
    }
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
