//! `cutover bench`.

use super::{DeviceArguments, ModelArguments, swap::Swap};
use crate::{
    Verdict,
    made_up::{Extents, first_that_runs, parse_shapes},
    output::{Printer, bytes, table},
    tensors::Named,
};
use anyhow::{Result, bail};
use cutover::{
    TensorView,
    backend::{OpTiming, Peak, Profiler, RunContext, Work},
};
use serde_json::{Value as Json, json};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    path::PathBuf,
    sync::Mutex,
    time::{Duration, Instant},
};

#[derive(clap::Args)]
#[command(after_help = "Example: cutover bench model.onnx --threads 2 --seconds 3 --shape image=1x3x224x224\n\
    \x20        cutover bench --swap v1.cutover v2.cutover --swaps 100 --json\n\n\
    Inputs are random: floats within -1 and 1, integers below 1000, ones where the name holds 'mask', zeros where it \
    holds 'type'. What varies and no --shape gives is assumed, and the output says so: 1 for batches, 224 for images' \
    height and width, 32 for sequences; where the model refuses those, other usual ones. Integers that the model \
    refuses are 0.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    device: DeviceArguments,
    /// Swaps two versions of one model under load, and measures what callers notice.
    #[arg(long, requires = "other", conflicts_with_all = ["shapes", "profile"])]
    swap: bool,
    /// The other version, for --swap.
    #[arg(requires = "swap")]
    other: Option<PathBuf>,
    /// Swaps with a load each; every tenth is followed by two rollbacks.
    #[arg(long, default_value_t = 50, requires = "swap")]
    swaps: u64,
    /// Threads that ask without pause while versions are swapped.
    #[arg(long, default_value_t = 2, requires = "swap")]
    clients: usize,
    /// Time between two swaps.
    #[arg(long, default_value_t = 250, requires = "swap", value_name = "MS")]
    pause_ms: u64,
    /// How long to measure, after warming up.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// An input's shape, e.g. image=1x3x224x224; once for every input whose dimensions vary.
    #[arg(long = "shape", value_name = "NAME=SHAPE")]
    shapes: Vec<String>,
    /// Seed of the inputs.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Measures every node too, and prints the time by operator and by node, and how near each comes to what the machine can do.
    #[arg(long)]
    profile: bool,
}

const WARM_UP_RUNS: usize = 3;

/// Usual extents, the likeliest first.
const LADDER: &[Extents] = &[
    Extents { batch: 1, spatial: 224, sequence: 32 },
    Extents { batch: 1, spatial: 256, sequence: 512 },
    Extents { batch: 1, spatial: 64, sequence: 4000 },
    Extents { batch: 1, spatial: 32, sequence: 8 },
];

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        if !(self.seconds > 0.0 && self.seconds <= 86_400.0) {
            bail!("--seconds {}: expected more than 0 and at most 86400", self.seconds);
        }
        if let Some(other) = self.other {
            let swap = Swap {
                versions: &[self.model.model.clone(), other],
                device: self.device.backend,
                options: &self.device.options(),
                swaps: self.swaps.clamp(1, 1_000_000),
                clients: self.clients.clamp(1, 256),
                pause: Duration::from_millis(self.pause_ms),
            };
            return swap.run(printer);
        }
        let start = Instant::now();
        let backend = self.device.backend.backend(&self.device.options())?;
        let model = self.model.open()?.compile_on(&*backend, &self.device.options().compile)?;
        let signature = model.signature();
        let shapes = parse_shapes(&self.shapes, &signature.inputs)?;
        let mut session = Some(model.session()?);
        let load_ms = ms(start.elapsed());
        let attempt = |inputs: &Named| {
            // After a failed try, a fresh one: the first answer must cost what it costs.
            let mut session = session.take().map_or_else(|| model.session(), Ok)?;
            let start = Instant::now();
            session.run(views(inputs))?;
            Ok((session, ms(start.elapsed())))
        };
        let (made_up, (mut session, first_ms)) =
            first_that_runs(&signature.inputs, &shapes, self.seed, LADDER, attempt)?;
        let inputs = &made_up.inputs;
        let note = made_up.note(&signature.inputs);
        for _ in 0..WARM_UP_RUNS {
            session.run(views(inputs))?;
        }
        let profile = Profile::default();
        let context =
            RunContext { profiler: self.profile.then_some(&profile as &dyn Profiler), ..RunContext::default() };
        let mut latencies = Vec::new();
        let end = Instant::now() + Duration::from_secs_f64(self.seconds);
        while latencies.is_empty() || Instant::now() < end {
            let start = Instant::now();
            session.run_with(views(inputs), &context)?;
            latencies.push(ms(start.elapsed()));
        }
        let runs = latencies.len();
        let mean = latencies.iter().sum::<f64>() / runs as f64;
        latencies.sort_by(f64::total_cmp);
        let quantile = |q: f64| latencies[((q * runs as f64).ceil() as usize).clamp(1, runs) - 1];
        let info = backend.describe();
        let peak = peak_rss_bytes();
        let highest = self.profile.then(|| backend.measure_peak()).flatten();
        let shapes: BTreeMap<&str, Vec<usize>> = inputs.iter().map(|(n, t)| (n.as_str(), t.shape().to_vec())).collect();
        let document = json!({
            "model": self.model.name(),
            "backend": info.backend,
            "device": info.device,
            "isa": info.isa,
            "precision": self.device.precision_name(),
            "threads": info.threads,
            "inputs": shapes,
            "assumed": made_up.assumed,
            "integers_below": made_up.integers_below,
            "runs": runs,
            "load_ms": load_ms,
            "first_ms": first_ms,
            "latency_ms": {
                "min": latencies[0], "median": quantile(0.5), "mean": mean, "p90": quantile(0.9), "p99": quantile(0.99),
            },
            "peak_rss_bytes": peak,
            "profile": self.profile.then(|| profile.json(runs, highest)),
        });
        printer.print(&document, || {
            let row = |name: &str, value: String| vec![name.to_string(), value];
            let rows = vec![
                row("runs", runs.to_string()),
                row("load ms", format!("{load_ms:.2}")),
                row("first ms", format!("{first_ms:.2}")),
                row("min ms", format!("{:.3}", latencies[0])),
                row("median ms", format!("{:.3}", quantile(0.5))),
                row("mean ms", format!("{mean:.3}")),
                row("p90 ms", format!("{:.3}", quantile(0.9))),
                row("p99 ms", format!("{:.3}", quantile(0.99))),
                row("peak memory", bytes(peak)),
            ];
            let title = format!("{} on {} ({}, {} threads)", self.model.name(), info.backend, info.isa, info.threads);
            let profile = if self.profile { profile.text(runs, highest) } else { String::new() };
            let note = note.map(|note| format!("{note}\n")).unwrap_or_default();
            format!("{title}\n{note}{}\n{profile}", table(&["", "value"], rows, true))
        })?;
        Ok(Verdict::Yes)
    }
}

fn views(inputs: &Named) -> Vec<(&str, TensorView<'_>)> {
    inputs.iter().map(|(name, tensor)| (name.as_str(), tensor.view())).collect()
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The median over runs of what a node's steps took together, in ms.
fn median_of_runs(durations: &[Duration], runs: usize) -> f64 {
    let steps = (durations.len() / runs).max(1);
    let mut totals: Vec<f64> = durations.chunks(steps).map(|run| run.iter().copied().map(ms).sum()).collect();
    totals.sort_by(f64::total_cmp);
    totals[totals.len() / 2]
}

/// The largest resident set of this process so far.
pub(super) fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Time by node.
#[derive(Default)]
struct Profile(Mutex<BTreeMap<(String, String, String), Steps>>);

/// The steps of a node in all runs.
#[derive(Default)]
struct Steps {
    durations: Vec<Duration>,
    work: Work,
}

impl Profiler for Profile {
    fn record(&self, timing: OpTiming<'_>) {
        let mut nodes = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let key = (timing.node.to_string(), timing.op.to_string(), timing.kernel.to_string());
        let steps = nodes.entry(key).or_default();
        steps.durations.push(timing.duration);
        steps.work.operations += timing.work.operations;
        steps.work.bytes += timing.work.bytes;
    }
}

/// What one or more nodes did in a run.
struct Line {
    /// Empty for an operator's nodes together.
    node: String,
    op: String,
    kernel: String,
    nodes: usize,
    ms: f64,
    /// All nodes have the same work in every run, or nearly.
    work: Work,
}

impl Line {
    /// Billions of operations, and of bytes, in a second.
    fn rates(&self) -> [Option<f64>; 2] {
        [self.work.operations, self.work.bytes].map(|count| (count > 0).then(|| count as f64 / self.ms.max(1e-9) / 1e6))
    }

    fn share_of_peak(&self, peak: Option<Peak>) -> Option<f64> {
        peak?.share(self.work, self.ms / 1e3)
    }
}

impl Profile {
    /// Of every node, the longest first. Times are medians over runs.
    fn nodes(&self, runs: usize) -> Vec<Line> {
        let nodes = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let one = |((node, op, kernel), steps): (&(String, String, String), &Steps)| Line {
            node: node.clone(),
            op: op.clone(),
            kernel: kernel.clone(),
            nodes: 1,
            ms: median_of_runs(&steps.durations, runs),
            work: Work { operations: steps.work.operations / runs as u64, bytes: steps.work.bytes / runs as u64 },
        };
        let mut nodes: Vec<_> = nodes.iter().map(one).collect();
        nodes.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        nodes
    }

    /// Of every operator with its kernel, the longest first.
    fn ops(&self, runs: usize) -> Vec<Line> {
        let mut ops: BTreeMap<(String, String), Line> = BTreeMap::new();
        for node in self.nodes(runs) {
            match ops.entry((node.op.clone(), node.kernel.clone())) {
                Entry::Vacant(place) => drop(place.insert(Line { node: String::new(), ..node })),
                Entry::Occupied(mut op) => {
                    let op = op.get_mut();
                    op.nodes += 1;
                    op.ms += node.ms;
                    op.work.operations += node.work.operations;
                    op.work.bytes += node.work.bytes;
                }
            }
        }
        let mut ops: Vec<_> = ops.into_values().collect();
        ops.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        ops
    }

    fn json(&self, runs: usize, peak: Option<Peak>) -> Json {
        let line = |line: Line| {
            let [gflops, gbytes] = line.rates();
            json!({
                "node": line.node, "op": line.op, "kernel": line.kernel, "nodes": line.nodes, "ms": line.ms,
                "gflops_per_second": gflops, "gbytes_per_second": gbytes, "of_peak": line.share_of_peak(peak),
            })
        };
        json!({
            "peak": peak.map(|peak| json!({
                "gflops_per_second": peak.operations_per_second / 1e9,
                "gbytes_per_second": peak.bytes_per_second / 1e9,
            })),
            "ops": self.ops(runs).into_iter().map(line).collect::<Vec<_>>(),
            "nodes": self.nodes(runs).into_iter().map(line).collect::<Vec<_>>(),
        })
    }

    fn text(&self, runs: usize, peak: Option<Peak>) -> String {
        let total: f64 = self.nodes(runs).iter().map(|n| n.ms).sum();
        let percent = |part: f64| format!("{:.1} %", 100.0 * part);
        let cells = |first: String, line: &Line| {
            let [gflops, gbytes] = line.rates().map(|rate| rate.map_or(String::new(), |rate| format!("{rate:.1}")));
            let of_peak = line.share_of_peak(peak).map_or(String::new(), percent);
            let (ms, share) = (format!("{:.3}", line.ms), percent(line.ms / total.max(1e-9)));
            vec![first, ms, share, gflops, gbytes, of_peak]
        };
        let what = |line: &Line| format!("{} ({})", line.op, line.kernel);
        let rates = ["ms", "share", "GFLOP/s", "GB/s", "of peak"];
        let ops = self.ops(runs).into_iter().map(|op| {
            let mut cells = cells(what(&op), &op);
            cells.insert(1, op.nodes.to_string());
            cells
        });
        let header: Vec<&str> = ["operator (kernel)", "nodes"].into_iter().chain(rates).collect();
        let ops = table(&header, ops.collect(), true);
        let nodes = self.nodes(runs).into_iter().take(30).map(|node| {
            let mut cells = cells(node.node.clone(), &node);
            cells.insert(1, what(&node));
            cells
        });
        let header: Vec<&str> = ["node (the 30 longest)", "operator (kernel)"].into_iter().chain(rates).collect();
        let nodes = table(&header, nodes.collect(), true);
        let peak = peak.map_or(String::new(), |peak| {
            let (gflops, gbytes) = (peak.operations_per_second / 1e9, peak.bytes_per_second / 1e9);
            format!("\nAt most {gflops:.0} GFLOP/s in registers and {gbytes:.0} GB/s from the cores' caches, measured now.\n")
        });
        format!("\n{ops}\n\n{nodes}\n{peak}")
    }
}
