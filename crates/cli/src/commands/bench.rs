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
    backend::{OpTiming, Profiler, RunContext},
};
use serde_json::{Value as Json, json};
use std::{
    collections::BTreeMap,
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
    /// Measures every node too, and prints the time by operator and by node.
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
            "profile": self.profile.then(|| profile.json(runs)),
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
            let profile = if self.profile { profile.text(runs) } else { String::new() };
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

/// The largest resident set of this process so far.
pub(super) fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Time by node.
#[derive(Default)]
struct Profile(Mutex<BTreeMap<(String, String, String), (Duration, usize)>>);

impl Profiler for Profile {
    fn record(&self, timing: OpTiming<'_>) {
        let mut nodes = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let key = (timing.node.to_string(), timing.op.to_string(), timing.kernel.to_string());
        let (total, count) = nodes.entry(key).or_default();
        *total += timing.duration;
        *count += 1;
    }
}

impl Profile {
    /// `(node, operator, kernel, milliseconds of one run)`, the longest first.
    fn nodes(&self, runs: usize) -> Vec<(String, String, String, f64)> {
        let nodes = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let one = |((node, op, kernel), (total, _)): (&(String, String, String), &(Duration, usize))| {
            (node.clone(), op.clone(), kernel.clone(), ms(*total) / runs as f64)
        };
        let mut nodes: Vec<_> = nodes.iter().map(one).collect();
        nodes.sort_by(|a, b| b.3.total_cmp(&a.3));
        nodes
    }

    /// `(operator and kernel, nodes, milliseconds of one run)`, the longest first.
    fn ops(&self, runs: usize) -> Vec<(String, usize, f64)> {
        let mut ops: BTreeMap<String, (usize, f64)> = BTreeMap::new();
        for (_, op, kernel, ms) in self.nodes(runs) {
            let (count, total) = ops.entry(format!("{op} ({kernel})")).or_default();
            *count += 1;
            *total += ms;
        }
        let mut ops: Vec<_> = ops.into_iter().map(|(op, (count, ms))| (op, count, ms)).collect();
        ops.sort_by(|a, b| b.2.total_cmp(&a.2));
        ops
    }

    fn json(&self, runs: usize) -> Json {
        json!({
            "ops": self.ops(runs).into_iter().map(|(op, nodes, ms)| json!({ "op": op, "nodes": nodes, "ms": ms })).collect::<Vec<_>>(),
            "nodes": self.nodes(runs).into_iter().map(|(node, op, kernel, ms)| {
                json!({ "node": node, "op": op, "kernel": kernel, "ms": ms })
            }).collect::<Vec<_>>(),
        })
    }

    fn text(&self, runs: usize) -> String {
        let total: f64 = self.nodes(runs).iter().map(|n| n.3).sum();
        let share = |ms: f64| format!("{:.1} %", 100.0 * ms / total.max(1e-9));
        let ops = self
            .ops(runs)
            .into_iter()
            .map(|(op, nodes, ms)| vec![op, nodes.to_string(), format!("{ms:.3}"), share(ms)]);
        let nodes = self.nodes(runs).into_iter().take(30);
        let nodes =
            nodes.map(|(node, op, kernel, ms)| vec![node, format!("{op} ({kernel})"), format!("{ms:.3}"), share(ms)]);
        let ops = table(&["operator (kernel)", "nodes", "ms", "share"], ops.collect(), true);
        let nodes = table(&["node (the 30 longest)", "operator (kernel)", "ms", "share"], nodes.collect(), true);
        format!("\n{ops}\n\n{nodes}\n")
    }
}
