//! Carries out a recipe: each step on what the one before made, found in the cache where it was done before.

use super::{
    Cache, Recipe, Step,
    cache::Key,
    pack::{Answers, answers, write_package},
};
use crate::{
    Data, Evaluation, Progress, ShrinkError, ShrinkReport, evaluate, latencies,
    prune::{Dependencies, KeptIndices, PruneReport, Restrictions, SparsityReport, bindings, prune, sparsify},
    runner::memory,
    shrink,
    train::{self, Fit, Point},
};
use cutover_backend::Backend;
use cutover_graph::{
    Graph, Identity,
    onnx::{ImportOptions, encode, import_bytes},
};
use cutover_package::{Manifest, input::Preprocessing};
use cutover_tensor::Value;
use serde::{Deserialize, Serialize};
use std::{
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant},
};

/// What came of a recipe.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub graph: Graph,
    pub steps: Vec<Done>,
    /// The result against the original.
    pub measured: Measured,
    /// Whether every budget of a step is met.
    pub within_budget: bool,
    /// Of the package, where one was written.
    pub manifest: Option<Manifest>,
}

/// A step that was done.
#[derive(Clone, Debug)]
pub struct Done {
    /// As a recipe calls it.
    pub name: &'static str,
    pub detail: Detail,
    pub time: Duration,
    /// Whether it was found in the cache.
    pub cached: bool,
}

/// What a step says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Detail {
    Student {
        /// How many layers the model repeats.
        of: usize,
        /// Numbers of those that stay.
        kept: Vec<usize>,
    },
    Prune(PruneReport),
    Sparsify(SparsityReport),
    FineTune {
        curve: Vec<Point>,
        metric_name: String,
        samples_per_second: f64,
    },
    Quantize(Box<ShrinkReport>),
    Verify {
        evaluation: Evaluation,
        /// The budgets that are not met.
        missed: Vec<String>,
    },
    /// Not a step of a recipe: the result against the original.
    Measured(Measured),
    Pack(Answers),
}

/// Before and after.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    pub evaluation: Evaluation,
    /// Median of a run, in turns.
    pub latency_ms: [f64; 2],
    /// Bytes of the compiled model with one session, at the first sample's shapes.
    pub memory_bytes: [u64; 2],
    /// Bytes of all constants.
    pub weight_bytes: [u64; 2],
    /// Elements of all constants.
    pub parameters: [u64; 2],
    /// Multiplications of all products in a run of the first sample.
    pub operations: [u64; 2],
}

/// Time that latencies are measured for.
const LATENCY_TIME: Duration = Duration::from_secs(3);

/// What a package says of the model besides what was done to it.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// Where the step gives none.
    pub name: String,
    /// How pictures and texts become inputs, and the `tokenizer.json` of texts.
    pub preprocessing: Preprocessing,
    pub tokenizer: Option<Vec<u8>>,
}

/// Carries out `recipe` on `original`. What comes of it is judged on `held_out` where that is given, and on `data` where not: by fine-tuning while it
/// goes on, by `verify` and at the end. With `detail`, what a report draws is gathered.
///
/// # Errors
/// Whatever a step refuses, with its number; no samples; fine-tuning in a build without it, before anything is done. A budget that is not
/// met is no error.
pub fn run(
    original: &Graph,
    about: &About,
    recipe: &Recipe,
    data: &Data,
    held_out: Option<&Data>,
    backend: &Arc<dyn Backend>,
    cache: &Cache,
    detail: bool,
    progress: Progress<'_>,
) -> Result<Outcome, ShrinkError> {
    recipe.check().map_err(ShrinkError::Option)?;
    if data.samples.is_empty() || held_out.is_some_and(|held| held.samples.is_empty()) {
        return Err(ShrinkError::NoSamples);
    }
    if let (Some(at), false) =
        (recipe.steps.iter().position(|s| matches!(s, Step::FineTune(_))), cfg!(feature = "train"))
    {
        let message = "this program was built without training; cargo build --release -p cutover-cli --features train";
        return Err(ShrinkError::Option(format!("step {} is fine-tune: {message}", at + 1)));
    }
    let bytes = encode(original)?;
    let original = &read(bytes.clone())?;
    let common = Key::new()
        .and(blake3::hash(&bytes).as_bytes())
        .and(&digest(data))
        .and(&held_out.map(digest).unwrap_or_default())
        .and(format!("{:?} {}", backend.describe(), recipe.seed).as_bytes());
    let mut run =
        Run { original, data, held_out, backend, cache, detail, progress, common, graph: original.clone(), bytes };
    let (mut steps, mut within_budget) = (Vec::new(), true);
    for (number, step) in recipe.steps.iter().enumerate() {
        if matches!(step, Step::Pack(_)) {
            continue;
        }
        let at = |source| ShrinkError::Step { number: number + 1, name: step.name(), source: Box::new(source) };
        let done = run.step(step).map_err(at)?;
        within_budget &= match &done.detail {
            Detail::Quantize(report) => report.within_budget,
            Detail::Verify { missed, .. } => missed.is_empty(),
            _ => true,
        };
        steps.push(done);
    }
    let measured = run.measured()?;
    let mut manifest = None;
    if let Some(Step::Pack(step)) = recipe.steps.last() {
        let start = Instant::now();
        let at = |source| ShrinkError::Step { number: recipe.steps.len(), name: "pack", source: Box::new(source) };
        let (answers, cached) = run.answers().map_err(at)?;
        let names: Vec<&str> = steps.iter().map(|done: &Done| done.name).collect();
        let written = write_package(step, about, &run.graph, &answers, data, &measured, &names, backend).map_err(at)?;
        manifest = Some(written);
        steps.push(Done { name: "pack", detail: Detail::Pack(answers), time: start.elapsed(), cached });
    }
    Ok(Outcome { graph: run.graph, steps, measured, within_budget, manifest })
}

struct Run<'a> {
    original: &'a Graph,
    data: &'a Data,
    held_out: Option<&'a Data>,
    backend: &'a Arc<dyn Backend>,
    cache: &'a Cache,
    detail: bool,
    progress: Progress<'a>,
    /// Of what all steps depend on.
    common: Key,
    /// As the steps so far left it, and as a file.
    graph: Graph,
    bytes: Vec<u8>,
}

impl Run<'_> {
    /// What results are judged on.
    fn judging(&self) -> &Data {
        self.held_out.unwrap_or(self.data)
    }

    fn key(&self, what: &[u8]) -> Key {
        self.common.clone().and(blake3::hash(&self.bytes).as_bytes()).and(what)
    }

    /// What `key` names, made by `make` where it is not there.
    fn cached(
        &self,
        key: &Key,
        make: impl FnOnce() -> Result<(Option<Graph>, Detail), ShrinkError>,
    ) -> Result<(Option<Graph>, Detail, bool), ShrinkError> {
        if let Some((graph, detail)) = self.cache.load(key) {
            return Ok((graph, detail, true));
        }
        let (graph, detail) = make()?;
        let bytes = graph.as_ref().map(encode).transpose()?;
        self.cache
            .store(key, bytes.as_deref(), &detail)
            .map_err(|e| ShrinkError::Option(format!("cannot write to the cache: {e}")))?;
        // Read back, as it would be from the cache: the steps that follow see the same.
        Ok((bytes.map(read).transpose()?, detail, false))
    }

    fn step(&mut self, step: &Step) -> Result<Done, ShrinkError> {
        let start = Instant::now();
        // What a report draws is gathered as a model is quantized, and nowhere else.
        let detail = self.detail && matches!(step, Step::Quantize(_));
        let key = self.key(&serde_json::to_vec(&(step, detail)).map_err(|e| ShrinkError::Option(e.to_string()))?);
        let (graph, detail, cached) = self.cached(&key, || self.make(step, &key))?;
        if let Some(graph) = graph {
            self.bytes = encode(&graph)?;
            self.graph = graph;
        }
        Ok(Done { name: step.name(), detail, time: start.elapsed(), cached })
    }

    fn make(&self, step: &Step, key: &Key) -> Result<(Option<Graph>, Detail), ShrinkError> {
        let graph = &self.graph;
        match step {
            Step::Student(step) => {
                let (student, of) = train::student_of(graph, &step.layers)?;
                Ok((Some(student), Detail::Student { of, kept: step.layers.clone() }))
            }
            Step::Prune(step) => {
                self.nodes_exist(&step.exclude)?;
                let options = step.options().map_err(ShrinkError::Option)?;
                let (pruned, report) = prune(graph, &options, self.data, self.backend, self.progress)?;
                Ok((Some(pruned), Detail::Prune(report)))
            }
            Step::Sparsify(step) => {
                self.nodes_exist(&step.exclude)?;
                let mut sparse = graph.clone();
                let exclude = step.exclude.iter().cloned().collect();
                let report = sparsify(&mut sparse, step.sparsity().map_err(ShrinkError::Option)?, &exclude)?;
                Ok((Some(sparse), Detail::Sparsify(report)))
            }
            Step::FineTune(fit) => self.fine_tune(fit, key),
            Step::Quantize(step) => {
                self.nodes_exist(&step.exclude)?;
                step.check().map_err(ShrinkError::Option)?;
                let shrunk = shrink(graph, &step.quantization(self.detail), self.data, self.backend, self.progress)?;
                Ok((Some(shrunk.graph), Detail::Quantize(Box::new(shrunk.report))))
            }
            Step::Verify(step) => {
                graph.verify()?;
                let evaluation = evaluate(self.original, graph, self.judging(), self.backend)?;
                let mut missed = Vec::new();
                for &budget in &step.budget {
                    if !evaluation.meets(budget)? {
                        missed.push(budget.to_string());
                    }
                }
                Ok((None, Detail::Verify { evaluation, missed }))
            }
            Step::Pack(_) => Err(ShrinkError::Option("pack is the last step only".to_string())),
        }
    }

    fn nodes_exist(&self, names: &[String]) -> Result<(), ShrinkError> {
        match names.iter().find(|name| !self.graph.nodes().any(|(_, node)| node.name == **name)) {
            None => Ok(()),
            Some(name) => {
                let message = "the model has no such node here; `cutover inspect` shows those it has";
                Err(ShrinkError::Option(format!("exclude '{name}': {message}")))
            }
        }
    }

    /// Trains the graph to answer as the original does.
    fn fine_tune(&self, fit: &Fit, key: &Key) -> Result<(Option<Graph>, Detail), ShrinkError> {
        let options = Fit { checkpoints: fit.checkpoints.clone().or_else(|| self.cache.work(key)), ..fit.clone() };
        let count = self.data.samples.len();
        let parts = match self.held_out {
            Some(_) => None,
            None => Some(split(self.data, count - (fit.held_out * count as f64) as usize)),
        };
        let (own, held) = match &parts {
            Some((own, held)) => (own, Some(held).filter(|held| !held.samples.is_empty())),
            None => (self.data, self.held_out),
        };
        let mut told = |at: &train::Progress| {
            let metric = at.metric.map_or(String::new(), |metric| format!(", {} {metric:.4}", at.metric_name));
            (self.progress)(&format!("fine-tuning: loss {:.4}{metric}", at.loss), at.step, at.steps);
            ControlFlow::Continue(())
        };
        let fitted = train::fit(&self.graph, Some(self.original), own, held, &options, self.backend, &mut told)?;
        let detail = Detail::FineTune {
            curve: fitted.curve,
            metric_name: fitted.metric_name.to_string(),
            samples_per_second: fitted.samples_per_second,
        };
        Ok((Some(fitted.graph), detail))
    }

    fn measured(&self) -> Result<Measured, ShrinkError> {
        let make = || {
            let (before, after) = (self.original, &self.graph);
            let sample = self.data.samples.first().ok_or(ShrinkError::NoSamples)?;
            let evaluation = evaluate(before, after, self.judging(), self.backend)?;
            (self.progress)("measuring", 1, 2);
            let times = latencies(before, after, self.backend, &self.data.samples, LATENCY_TIME)?;
            (self.progress)("measuring", 2, 2);
            let parameters = |graph: &Graph| {
                let constants = graph.values().filter_map(|(id, _)| graph.constant(id));
                constants.map(|c| c.tensor.element_count() as u64).sum()
            };
            let operations = |graph: &Graph| {
                let all = Dependencies::new(graph.clone(), &Restrictions::default());
                all.operations(&KeptIndices::new(), &bindings(graph, sample))
            };
            let measured = Measured {
                evaluation,
                latency_ms: times.map(|time| time.as_secs_f64() * 1e3),
                memory_bytes: [memory(before, sample, self.backend)?, memory(after, sample, self.backend)?],
                weight_bytes: [crate::constant_bytes(before), crate::constant_bytes(after)],
                parameters: [parameters(before), parameters(after)],
                operations: [operations(before), operations(after)],
            };
            Ok((None, Detail::Measured(measured)))
        };
        match self.cached(&self.key(b"measured"), make)? {
            (_, Detail::Measured(measured), _) => Ok(measured),
            _ => Err(ShrinkError::Option("the cache holds something else under this name".to_string())),
        }
    }

    fn answers(&self) -> Result<(Answers, bool), ShrinkError> {
        let sample = self.data.samples.first().ok_or(ShrinkError::NoSamples)?;
        let make = || Ok((None, Detail::Pack(answers(self.original, &self.graph, sample)?)));
        match self.cached(&self.key(b"answers"), make)? {
            (_, Detail::Pack(answers), cached) => Ok((answers, cached)),
            _ => Err(ShrinkError::Option("the cache holds something else under this name".to_string())),
        }
    }
}

fn read(bytes: Vec<u8>) -> Result<Graph, ShrinkError> {
    Ok(import_bytes(bytes.into(), None, &ImportOptions::default())?)
}

/// The first `count` samples, and the others.
fn split(data: &Data, count: usize) -> (Data, Data) {
    let labels = |part: &dyn Fn(&[Vec<i64>]) -> Vec<Vec<i64>>| data.labels.as_deref().map(part);
    let first = Data { samples: data.samples[..count].to_vec(), labels: labels(&|all| all[..count].to_vec()) };
    let rest = Data { samples: data.samples[count..].to_vec(), labels: labels(&|all| all[count..].to_vec()) };
    (first, rest)
}

fn digest(data: &Data) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for sample in &data.samples {
        for (name, value) in sample {
            hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
            match value {
                Value::Tensor(tensor) => hasher.update(&Identity::of_tensor(tensor).0),
                other => hasher.update(format!("{other:?}").as_bytes()),
            };
        }
        hasher.update(b"\n");
    }
    hasher.update(format!("{:?}", data.labels).as_bytes());
    *hasher.finalize().as_bytes()
}
