//! Which layers are quantized: those that win something by it, and of these as many as the budget lets.

use crate::{
    Budget, CalibratedRange, Data, Evaluation, LayerCost, Method, Observation, Product, Progress, Quantization,
    Sensitivity, ShrinkError, Shrunk, Target, evaluate, half_weights, latencies,
    observe::Probe,
    quantize::{
        BlockOptions, DynamicOptions, QuantizeReport, Range, StaticOptions, quantize_dynamic, quantize_static,
        quantize_weights,
    },
    runner::{Runner, memory},
};
use cutover_backend::{Backend, OpTiming, Profiler, RunContext};
use cutover_graph::{Graph, ValueId, onnx::encode};
use cutover_tensor::Value;
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

/// Samples that a layer's sensitivity is measured on: the search runs the model once for every layer and sample.
const SENSITIVITY_SAMPLES: usize = 8;
/// As many where labels are counted, whose share is coarse in a few.
const LABELLED_SAMPLES: usize = 64;
/// Runs of which a node's time is the shortest.
const TIMED_RUNS: usize = 9;
/// Weights of so many elements take fewer bytes as integers, whatever their scales and nodes take.
const SURELY_SMALLER: usize = 1 << 12;
/// A layer that breaks a chain of integers has to save this share of the file.
const SIZE_SHARE: f64 = 1e-3;

pub(crate) struct Search<'a> {
    pub original: &'a Graph,
    pub prepared: &'a Graph,
    pub observations: &'a HashMap<ValueId, Observation>,
    pub quantization: &'a Quantization,
    pub data: &'a Data,
    pub backend: &'a Arc<dyn Backend>,
    /// Layers that stay in floats because integers win nothing there.
    pub unprofitable: HashSet<String>,
}

/// A quantized graph, and what is known of it: how many layers the budget kept in floats, bytes of constants, and what it lost.
type Found = (Graph, QuantizeReport, (usize, u64, Evaluation));

impl Search<'_> {
    /// What the target is to lessen: bytes of the file, the sum of the shortest times of all nodes in seconds, or bytes of the compiled graph with one
    /// session.
    fn cost(&self, graph: &Graph) -> Result<f64, ShrinkError> {
        Ok(match self.quantization.target {
            Target::Size => encode(graph)?.len() as f64,
            Target::Latency => self.run_time(graph)?.as_secs_f64(),
            Target::Memory => {
                let sample = self.data.samples.first().ok_or(ShrinkError::NoSamples)?;
                memory(graph, sample, self.backend)? as f64
            }
        })
    }

    /// What every product costs in floats and in integers, all others in integers (of weights in blocks, which know nothing of each other: in
    /// floats). For [`Target::Size`] of small weights only: there is no doubt of others.
    pub fn layer_costs(&self, progress: Progress<'_>) -> Result<Vec<LayerCost>, ShrinkError> {
        let alone = match self.quantization.method {
            Method::Half(_) => return Ok(Vec::new()),
            Method::Weights(_) => true,
            Method::Static(_) | Method::Dynamic(_) => false,
        };
        let names = self.products();
        let in_doubt = |product: &Product| {
            let elements = self.prepared.constant(product.weight).map_or(0, |c| c.tensor.element_count());
            self.quantization.target != Target::Size || elements < SURELY_SMALLER
        };
        let name = |product: &Product| self.prepared.node(product.node).name.clone();
        let mut layers: Vec<String> = Product::all(self.prepared).iter().filter(|p| in_doubt(p)).map(name).collect();
        if layers.is_empty() {
            return Ok(Vec::new());
        }
        let (all, report) = self.quantize(&HashSet::new())?;
        layers.retain(|name| report.quantized.contains(name));
        let base = self.cost(if alone { self.prepared } else { &all })?;
        let mut costs = Vec::new();
        for (done, node) in layers.iter().enumerate() {
            let kept = match alone {
                true => names.iter().filter(|name| *name != node).cloned().collect(),
                false => HashSet::from([node.clone()]),
            };
            let other = self.cost(&self.quantize(&kept)?.0)?;
            let (floats, integers) = if alone { (base, other) } else { (other, base) };
            costs.push(LayerCost { node: node.clone(), floats, integers });
            progress("layers", done + 1, layers.len());
        }
        Ok(costs)
    }

    /// The layers that cost no less in integers, if the model as a whole costs less with those in floats; all of them, if integers win nothing at
    /// all.
    pub fn without_gain(&self, costs: &[LayerCost]) -> Result<HashSet<String>, ShrinkError> {
        if costs.is_empty() {
            return Ok(HashSet::new());
        }
        let least = if self.quantization.target == Target::Size { SIZE_SHARE } else { 0.0 };
        let loses = |cost: &&LayerCost| cost.integers - cost.floats >= least * cost.integers;
        let mut losing: Vec<&LayerCost> = costs.iter().filter(loses).collect();
        losing.sort_by(|a, b| (a.integers - a.floats).total_cmp(&(b.integers - b.floats)).reverse());
        let names = |costs: &[&LayerCost]| costs.iter().map(|cost| cost.node.clone()).collect::<HashSet<_>>();
        // Quantizing and dequantizing between layers costs too: only the whole tells.
        let mut candidates: Vec<HashSet<String>> = Vec::new();
        let mut count = losing.len();
        while count > 0 {
            candidates.push(names(&losing[..count]));
            count /= 2;
        }
        if self.quantization.target != Target::Size {
            candidates.push(self.products().into_iter().collect());
        }
        let mut best = (HashSet::new(), self.quantize(&HashSet::new())?.0);
        for kept in candidates {
            let graph = self.quantize(&kept)?.0;
            if self.is_cheaper(&graph, &best.1)? {
                best = (kept, graph);
            }
        }
        Ok(best.0)
    }

    fn is_cheaper(&self, graph: &Graph, than: &Graph) -> Result<bool, ShrinkError> {
        if self.quantization.target == Target::Latency {
            let [before, after] = latencies(than, graph, self.backend, &self.data.samples, Duration::from_secs(2))?;
            return Ok(after < before);
        }
        Ok(self.cost(graph)? < self.cost(than)?)
    }

    /// The sum of the shortest times of all nodes in a few runs.
    fn run_time(&self, graph: &Graph) -> Result<Duration, ShrinkError> {
        let mut runner = Runner::new(graph, self.backend)?;
        let mut shortest: HashMap<String, Duration> = HashMap::new();
        for run in 0..=TIMED_RUNS {
            let times = Times::default();
            let number = run % self.data.samples.len();
            let context = RunContext { profiler: Some(&times), ..RunContext::default() };
            runner.run(&self.data.samples[number], number, &context)?;
            for (node, time) in times.0.into_inner().unwrap_or_default() {
                shortest.entry(node).and_modify(|shortest| *shortest = time.min(*shortest)).or_insert(time);
            }
        }
        Ok(shortest.values().sum())
    }

    /// Names of all products, in the order of the model.
    fn products(&self) -> Vec<String> {
        Product::all(self.prepared).iter().map(|p| self.prepared.node(p.node).name.clone()).collect()
    }

    /// With these layers in floats.
    fn with_floats(&self, kept: &[String]) -> Result<Found, ShrinkError> {
        let (graph, report) = self.quantize(&kept.iter().cloned().collect())?;
        let evaluation = evaluate(self.original, &graph, self.data, self.backend)?;
        let tried = (kept.len(), report.bytes_after, evaluation);
        Ok((graph, report, tried))
    }

    /// With every layer quantized that wins something by it.
    pub fn first(&self) -> Result<Found, ShrinkError> {
        self.with_floats(&[])
    }

    /// Gives layers back to floats, as few as meet the budget: of the most sensitive first, or of those first that lose the most for what they win.
    /// Of the two, what costs less is taken.
    pub fn give_back(
        &self,
        shrunk: &mut Shrunk,
        budget: Budget,
        costs: &[LayerCost],
        progress: Progress<'_>,
    ) -> Result<(), ShrinkError> {
        let sensitivity = self.sensitivity(&shrunk.report.quantized, progress)?;
        let gain = |node: &str| match costs.iter().find(|cost| cost.node == node) {
            Some(cost) => (cost.floats - cost.integers).max(0.0),
            None => self.weight_bytes(node),
        };
        let by_loss: Vec<String> = sensitivity.iter().map(|layer| layer.node.clone()).collect();
        let mut by_worth: Vec<(f64, String)> = sensitivity
            .iter()
            .map(|layer| (layer.evaluation.noise() / gain(&layer.node).max(f64::MIN_POSITIVE), layer.node.clone()))
            .collect();
        by_worth.sort_by(|a, b| b.0.total_cmp(&a.0));
        let by_worth: Vec<String> = by_worth.into_iter().map(|(_, node)| node).collect();
        let mut best: Option<Found> = None;
        for order in [&by_loss, &by_worth] {
            let Some(found) = self.fewest(order, shrunk, budget, progress)? else { continue };
            let cheaper = match &best {
                None => true,
                Some(best) => self.is_cheaper(&found.0, &best.0)?,
            };
            if cheaper {
                best = Some(found);
            }
            if by_loss == by_worth {
                break;
            }
        }
        let own = &mut shrunk.report;
        if let Some((graph, report, tried)) = best {
            let QuantizeReport { quantized, kept, bytes_after, .. } = report;
            (own.quantized, own.kept, own.bytes_after, own.evaluation) = (quantized, kept, bytes_after, tried.2);
            own.within_budget = true;
            shrunk.graph = graph;
        }
        own.sensitivity = sensitivity;
        Ok(())
    }

    /// The fewest layers from the front of `order` that have to be floats, by bisection.
    fn fewest(
        &self,
        order: &[String],
        shrunk: &mut Shrunk,
        budget: Budget,
        progress: Progress<'_>,
    ) -> Result<Option<Found>, ShrinkError> {
        let rounds = 1 + order.len().max(1).ilog2() as usize;
        // `few` do not suffice, `many` would, as far as is known.
        let (mut few, mut many, mut round, mut best) = (0, order.len() + 1, 0, None);
        while many - few > 1 {
            let count = few + (many - few) / 2;
            let found = self.with_floats(&order[..count])?;
            shrunk.report.tried.push(found.2.clone());
            round += 1;
            progress("search", round.min(rounds), rounds);
            match found.2.2.meets(budget)? {
                true => (many, best) = (count, Some(found)),
                false => few = count,
            }
        }
        Ok(best)
    }

    /// Bytes of a layer's weight in floats.
    fn weight_bytes(&self, node: &str) -> f64 {
        let of = |product: &Product| self.prepared.node(product.node).name == node;
        let product = Product::all(self.prepared).into_iter().find(of);
        let constant = product.and_then(|product| self.prepared.constant(product.weight));
        constant.map_or(0.0, |constant| constant.tensor.bytes().len() as f64)
    }

    /// What was chosen for every activation, where a report wants to draw it.
    pub fn ranges(&self) -> Result<Vec<CalibratedRange>, ShrinkError> {
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
    pub fn layer_noise(&self, graph: &Graph) -> Result<Vec<(String, f64)>, ShrinkError> {
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
            if self.unprofitable.contains(&kept.name) {
                kept.reason = match self.quantization.target {
                    Target::Size => "it takes no fewer bytes in integers",
                    Target::Latency => "it is no faster in integers here",
                    Target::Memory => "it takes no less memory in integers here",
                }
                .to_string();
            } else if exclude.contains(&kept.name) {
                kept.reason = "the budget needs it in floats".to_string();
            }
        }
        Ok((graph, report))
    }

    fn quantize_all_but(&self, exclude: &HashSet<String>) -> Result<(Graph, QuantizeReport), ShrinkError> {
        let all = |own: &HashSet<String>| own.iter().chain(exclude).chain(&self.unprofitable).cloned().collect();
        match &self.quantization.method {
            Method::Half(options) => {
                let (graph, report) = half_weights(self.prepared.clone(), options)?;
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

    /// What each of `layers` does when it alone is quantized, the worst first: by the share of labels that are missed, then by noise.
    fn sensitivity(&self, layers: &[String], progress: Progress<'_>) -> Result<Vec<Sensitivity>, ShrinkError> {
        let names = self.products();
        let products: Vec<&String> = names.iter().filter(|name| layers.contains(name)).collect();
        let most = if self.data.labels.is_some() { LABELLED_SAMPLES } else { SENSITIVITY_SAMPLES };
        let data = self.data.first(most);
        let mut all = Vec::new();
        for (done, &node) in products.iter().enumerate() {
            let others = names.iter().filter(|other| *other != node).cloned().collect();
            let (graph, _) = self.quantize(&others)?;
            let evaluation = evaluate(self.original, &graph, &data, self.backend)?;
            all.push(Sensitivity { node: node.clone(), evaluation });
            progress("sensitivity", done + 1, products.len());
        }
        let missed = |layer: &Sensitivity| layer.evaluation.accuracy.map_or(0.0, |(before, after)| before - after);
        all.sort_by(|a, b| {
            missed(b).total_cmp(&missed(a)).then(a.evaluation.sqnr_db().total_cmp(&b.evaluation.sqnr_db()))
        });
        Ok(all)
    }
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
