//! From a model and data to a smaller model and the evidence: balance, calibrate, quantize, measure, and give back what costs too much.

use crate::{
    Comparison, HalfOptions, Kept, Observation, Product, Progress, Question, Sample, ShrinkError, compare,
    compare::{largest, session},
    constant_bytes, half_weights,
    observe::observe,
    plain,
    quantize::{
        BlockOptions, Calibration, DynamicOptions, QuantizeReport, StaticOptions, correct_bias, equalize,
        quantize_dynamic, quantize_static, quantize_weights, smooth, static_questions,
    },
};
use cutover_backend::{Backend, Input, Output, RunContext, Session, Signature};
use cutover_graph::{Graph, ValueId};
use cutover_tensor::Value;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
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

/// What is done, in this order.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub method: Method,
    /// SmoothQuant's strength.
    pub smooth: Option<f32>,
    /// Cross-layer equalization.
    pub equalize: bool,
    /// Bias correction; of static quantization.
    pub correct_bias: bool,
    /// GPTQ; of weights in blocks.
    pub gptq: bool,
    /// What the result must keep; layers go back to floats, the most sensitive first, until it does.
    pub budget: Option<Budget>,
}

/// What a shrunk model has to keep, over all samples.
#[derive(Clone, Copy, Debug, PartialEq)]
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
#[derive(Clone, Debug, PartialEq)]
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
}

/// The model with one layer quantized, against the original.
#[derive(Clone, Debug, PartialEq)]
pub struct Sensitivity {
    pub node: String,
    /// Of the worst output.
    pub sqnr_db: f64,
}

/// What was lost.
#[derive(Clone, Debug, PartialEq)]
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

    fn meets(&self, budget: Budget) -> Result<bool, ShrinkError> {
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

/// Carries out `recipe` on `original`, measured on `backend`.
///
/// # Errors
/// Data that does not fit; options out of range; a budget whose metric can't be measured. A budget that can't be met is no error: the report says so.
pub fn shrink(
    original: &Graph,
    recipe: &Recipe,
    data: &Data,
    backend: &Arc<dyn Backend>,
    progress: Progress<'_>,
) -> Result<Shrunk, ShrinkError> {
    if data.samples.is_empty() {
        return Err(ShrinkError::NoSamples);
    }
    let bytes_before = constant_bytes(original);
    let mut prepared = plain(original.clone())?;
    let equalized = if recipe.equalize { equalize(&mut prepared)? } else { 0 };
    let smoothed = match recipe.smooth {
        None => 0,
        Some(alpha) => {
            let questions = product_inputs(&prepared);
            let observations = observe(&prepared, &questions, false, backend, &data.samples, progress)?;
            smooth(&mut prepared, &observations, alpha)?
        }
    };
    let observations = observations(&prepared, recipe, backend, data, progress)?;
    if let (Method::Static(options), true) = (&recipe.method, recipe.correct_bias) {
        correct_bias(&mut prepared, &observations, options.per_channel, options.weights)?;
    }
    let search = Search { original, prepared: &prepared, observations: &observations, recipe, data, backend };
    let (graph, report, mut tried) = search.first()?;
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
        },
    };
    let Some(budget) = recipe.budget else { return Ok(shrunk) };
    shrunk.report.within_budget = tried.2.meets(budget)?;
    if shrunk.report.within_budget {
        return Ok(shrunk);
    }
    let sensitivity = search.sensitivity(&shrunk.report.quantized, progress)?;
    let rounds = 1 + sensitivity.len().max(1).ilog2() as usize;
    // The fewest of the most sensitive layers that have to stay, by bisection: `few` do not suffice, `many` would, as far as is known.
    let (mut few, mut many) = (0, sensitivity.len() + 1);
    while many - few > 1 {
        let count = few + (many - few) / 2;
        let exclude: HashSet<String> = sensitivity[..count].iter().map(|s| s.node.clone()).collect();
        let (graph, report) = search.quantize(&exclude)?;
        tried = (count, report.bytes_after, search.evaluate(&graph)?);
        shrunk.report.tried.push(tried.clone());
        progress("search", (shrunk.report.tried.len() - 1).min(rounds), rounds);
        if !tried.2.meets(budget)? {
            few = count;
            continue;
        }
        many = count;
        let QuantizeReport { quantized, kept, bytes_after, .. } = report;
        let evaluation = tried.2;
        shrunk.report = ShrinkReport { quantized, kept, bytes_after, evaluation, within_budget: true, ..shrunk.report };
        shrunk.graph = graph;
    }
    shrunk.report.sensitivity = sensitivity;
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
    recipe: &Recipe,
    backend: &Arc<dyn Backend>,
    data: &Data,
    progress: Progress<'_>,
) -> Result<HashMap<ValueId, Observation>, ShrinkError> {
    let (questions, histograms) = match &recipe.method {
        Method::Static(options) => {
            (static_questions(graph, &options.exclude)?, options.calibration != Calibration::MinMax)
        }
        Method::Weights(options) if recipe.gptq => (options.questions(graph), false),
        _ => return Ok(HashMap::new()),
    };
    observe(graph, &questions, histograms, backend, &data.samples, progress)
}

struct Search<'a> {
    original: &'a Graph,
    prepared: &'a Graph,
    observations: &'a HashMap<ValueId, Observation>,
    recipe: &'a Recipe,
    data: &'a Data,
    backend: &'a Arc<dyn Backend>,
}

impl Search<'_> {
    fn first(&self) -> Result<(Graph, QuantizeReport, (usize, u64, Evaluation)), ShrinkError> {
        let (graph, report) = self.quantize(&HashSet::new())?;
        let evaluation = self.evaluate(&graph)?;
        let tried = (0, report.bytes_after, evaluation);
        Ok((graph, report, tried))
    }

    /// The prepared graph with all layers quantized but those.
    fn quantize(&self, exclude: &HashSet<String>) -> Result<(Graph, QuantizeReport), ShrinkError> {
        let all = |own: &HashSet<String>| own.union(exclude).cloned().collect();
        match &self.recipe.method {
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

    fn evaluate(&self, graph: &Graph) -> Result<Evaluation, ShrinkError> {
        let comparison = compare(self.original, graph, self.backend, &self.data.samples)?;
        let accuracy = match &self.data.labels {
            None => None,
            Some(labels) => Some((self.accuracy(self.original, labels)?, self.accuracy(graph, labels)?)),
        };
        Ok(Evaluation { comparison, accuracy })
    }

    fn accuracy(&self, graph: &Graph, labels: &[Vec<i64>]) -> Result<f64, ShrinkError> {
        let mut runner = Runner::new(graph, self.backend)?;
        let (mut right, mut rows) = (0, 0);
        for (number, (sample, labels)) in self.data.samples.iter().zip(labels).enumerate() {
            let outputs = runner.run(sample, number)?;
            let refuse = |message| ShrinkError::Sample { sample: number, message };
            let Some(Value::Tensor(scores)) = outputs.first() else {
                return Err(refuse("the model's first output is no tensor".to_string()));
            };
            let scores = scores.to_vec::<f32>().map_err(|e| refuse(format!("scores: {e}")))?;
            if labels.is_empty() || scores.len() % labels.len() != 0 || scores.len() < 2 * labels.len() {
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

/// Runs one graph.
struct Runner {
    session: Box<dyn Session>,
    signature: Signature,
}

impl Runner {
    fn new(graph: &Graph, backend: &Arc<dyn Backend>) -> Result<Runner, ShrinkError> {
        Ok(Runner { session: session(graph, backend)?, signature: Signature::of(graph) })
    }

    fn run(&mut self, sample: &Sample, number: usize) -> Result<Vec<Value>, ShrinkError> {
        let find = |name: &String| sample.iter().find(|(n, _)| n == name).map(|(_, value)| Input::Value(value));
        let missing = |name: &String| ShrinkError::Sample { sample: number, message: format!("has no input '{name}'") };
        let inputs = self.signature.inputs.iter().map(|b| find(&b.name).ok_or_else(|| missing(&b.name)));
        let inputs: Vec<Input<'_>> = inputs.collect::<Result<_, _>>()?;
        let mut outputs: Vec<Output<'_>> = self.signature.outputs.iter().map(|_| Output::Allocate(None)).collect();
        let done = self.session.run(&inputs, &mut outputs, &RunContext::default());
        done.map_err(|source| ShrinkError::Run { sample: number, source })?;
        let values = outputs.into_iter().filter_map(|output| match output {
            Output::Allocate(value) => value,
            _ => None,
        });
        Ok(values.collect())
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
            runner.run(sample, number)?;
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
