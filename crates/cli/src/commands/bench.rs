//! `cutover bench`.

use super::{DeviceArguments, ModelArguments};
use crate::{
    Verdict,
    output::{Printer, bytes, table},
};
use anyhow::{Context, Result, bail};
use cutover::{
    DType, Tensor, TensorView,
    backend::{Binding, OpTiming, Profiler, RunContext},
    graph::Bindings,
};
use serde_json::{Value as Json, json};
use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, Instant},
};

#[derive(clap::Args)]
#[command(after_help = "Example: cutover bench model.onnx --threads 2 --seconds 3 --shape image=1x3x224x224\n\n\
    Inputs are random: floats within -1 and 1, integers below 1000, ones where the name holds 'mask', zeros where it \
    holds 'type'. Dimensions that no --shape gives are 1.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    device: DeviceArguments,
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

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        if !(self.seconds > 0.0 && self.seconds <= 86_400.0) {
            bail!("--seconds {}: expected more than 0 and at most 86400", self.seconds);
        }
        let start = Instant::now();
        let backend = self.device.backend.backend(&self.device.options())?;
        let model = self.model.open()?.compile_on(&*backend, &self.device.options().compile)?;
        let mut session = model.session()?;
        let load_ms = ms(start.elapsed());
        let inputs = random_inputs(&model.signature().inputs, &self.shapes, self.seed)?;
        let views = || {
            inputs.iter().map(|(name, tensor)| (name.as_str(), tensor.view())).collect::<Vec<(&str, TensorView<'_>)>>()
        };
        let start = Instant::now();
        session.run(views())?;
        let first_ms = ms(start.elapsed());
        for _ in 0..WARM_UP_RUNS {
            session.run(views())?;
        }
        let profile = Profile::default();
        let context =
            RunContext { profiler: self.profile.then_some(&profile as &dyn Profiler), ..RunContext::default() };
        let mut latencies = Vec::new();
        let end = Instant::now() + Duration::from_secs_f64(self.seconds);
        while latencies.is_empty() || Instant::now() < end {
            let start = Instant::now();
            session.run_with(views(), &context)?;
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
            format!("{title}\n{}\n{profile}", table(&["", "value"], rows, true))
        })?;
        Ok(Verdict::Yes)
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Inputs of the declared types; `--shape` gives what varies.
fn random_inputs(bindings: &[Binding], given: &[String], seed: u64) -> Result<Vec<(String, Tensor)>> {
    let mut shapes: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for text in given {
        let (name, dims) =
            text.split_once('=').with_context(|| format!("--shape {text}: expected NAME=1x3x224x224"))?;
        let dims = dims.split('x').filter(|d| !d.is_empty()).map(str::parse).collect::<Result<Vec<usize>, _>>();
        let dims = dims.with_context(|| format!("--shape {text}: expected NAME=1x3x224x224"))?;
        if !bindings.iter().any(|b| b.name == name) {
            let names: Vec<_> = bindings.iter().map(|b| b.name.as_str()).collect();
            bail!("--shape {text}: the model has no input '{name}'; it has {}", names.join(", "));
        }
        shapes.insert(name, dims);
    }
    // A symbol means the same in every input: what one shape says of it holds for those not given.
    let mut symbols = Bindings::new();
    for binding in bindings {
        let (Some(dims), Some(declared)) =
            (shapes.get(binding.name.as_str()), binding.fact.as_tensor().and_then(|f| f.shape.as_ref()))
        else {
            continue;
        };
        for (dim, &extent) in declared.iter().zip(dims) {
            if let Some(symbol) = dim.as_symbol() {
                symbols.insert(symbol.clone(), extent as i64);
            }
        }
    }
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut inputs = Vec::new();
    for binding in bindings {
        let fact = binding
            .fact
            .as_tensor()
            .with_context(|| format!("input '{}' is a {}: only tensors can be made up", binding.name, binding.fact))?;
        let shape = match (shapes.get(binding.name.as_str()), &fact.shape) {
            (Some(shape), _) => shape.clone(),
            (None, Some(dims)) => {
                let mut all = std::collections::BTreeSet::new();
                dims.iter().for_each(|d| d.collect_symbols(&mut all));
                let mut bound = symbols.clone();
                for symbol in all {
                    bound.entry(symbol).or_insert(1);
                }
                let extent = |d: &cutover::graph::Dim| d.eval(&bound).and_then(|v| usize::try_from(v).ok());
                dims.iter()
                    .map(extent)
                    .collect::<Option<_>>()
                    .with_context(|| format!("input '{}': give its --shape", binding.name))?
            }
            (None, None) => bail!("input '{}' has no declared rank: give its --shape", binding.name),
        };
        inputs.push((binding.name.clone(), random_tensor(&binding.name, fact.dtype, shape, &mut random)?));
    }
    Ok(inputs)
}

pub(super) fn random_tensor(name: &str, dtype: DType, shape: Vec<usize>, random: &mut Random) -> Result<Tensor> {
    let mut tensor = Tensor::zeros(dtype, shape)?;
    let count = tensor.element_count();
    let name = name.to_lowercase();
    let fixed = if name.contains("mask") {
        Some(1u64)
    } else if name.contains("type") {
        Some(0)
    } else {
        None
    };
    let limit = |bits: usize, signed: bool| {
        if bits > 8 {
            1000
        } else if signed {
            128
        } else {
            256
        }
    };
    macro_rules! fill {
        ($make:expr) => {{
            let values: Vec<u8> = (0..count).flat_map(|_| $make(random).to_le_bytes()).collect();
            tensor.bytes_mut().copy_from_slice(&values);
        }};
    }
    let whole = |random: &mut Random, bits, signed| fixed.unwrap_or_else(|| random.next() % limit(bits, signed));
    let unit = |random: &mut Random| 2.0 * random.unit() - 1.0;
    match dtype {
        DType::F32 => fill!(|r: &mut Random| fixed.map_or_else(|| unit(r), |v| v as f64) as f32),
        DType::F64 => fill!(|r: &mut Random| fixed.map_or_else(|| unit(r), |v| v as f64)),
        DType::F16 => fill!(|r: &mut Random| cutover::tensor::f16::from_f64(unit(r))),
        DType::BF16 => fill!(|r: &mut Random| cutover::tensor::bf16::from_f64(unit(r))),
        DType::I8 => fill!(|r: &mut Random| whole(r, 8, true) as i8),
        DType::U8 => fill!(|r: &mut Random| whole(r, 8, false) as u8),
        DType::I16 => fill!(|r: &mut Random| whole(r, 16, true) as i16),
        DType::U16 => fill!(|r: &mut Random| whole(r, 16, false) as u16),
        DType::I32 => fill!(|r: &mut Random| whole(r, 32, true) as i32),
        DType::U32 => fill!(|r: &mut Random| whole(r, 32, false) as u32),
        DType::I64 => fill!(|r: &mut Random| whole(r, 64, true) as i64),
        DType::U64 => fill!(|r: &mut Random| whole(r, 64, false)),
        DType::Bool => fill!(|r: &mut Random| (fixed.unwrap_or_else(|| r.next() & 1) & 1) as u8),
        other => bail!("input '{name}' is of type {other}, for which none is made up"),
    }
    Ok(tensor)
}

/// xorshift64*: fast, seeded, and all that made-up inputs need.
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11
    }

    fn unit(&mut self) -> f64 {
        self.next() as f64 / (1u64 << 53) as f64
    }
}

/// The largest resident set of this process so far.
fn peak_rss_bytes() -> u64 {
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
