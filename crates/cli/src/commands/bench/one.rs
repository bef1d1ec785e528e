//! One model on one backend: `cutover bench MODEL`.

use super::profile::Profile;
use crate::{
    Verdict,
    commands::{DeviceArguments, ModelArguments, choice_json, device_of},
    made_up::{Extents, batch_of, first_that_runs, parse_shapes},
    output::{Printer, bytes, table},
    tensors::Named,
};
use anyhow::Result;
use cutover::{
    TensorView,
    backend::{Profiler, RunContext},
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// What is measured.
pub(super) struct One {
    pub model: ModelArguments,
    pub device: DeviceArguments,
    pub batch: Option<usize>,
    pub shapes: Vec<String>,
    pub seconds: f64,
    pub seed: u64,
    pub profile: bool,
}

const WARM_UP_RUNS: usize = 3;

/// Usual extents, the likeliest first.
pub(super) const LADDER: &[Extents] = &[
    Extents { batch: 1, spatial: 224, sequence: 32 },
    Extents { batch: 1, spatial: 256, sequence: 512 },
    Extents { batch: 1, spatial: 64, sequence: 4000 },
    Extents { batch: 1, spatial: 32, sequence: 8 },
];

impl One {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let start = Instant::now();
        let backend = self.device.backend.backend(&self.device.options())?;
        let model = self.model.open()?.compile_on(&*backend, &self.device.options().compile)?;
        let signature = model.signature();
        let shapes = parse_shapes(&self.shapes, &signature.inputs)?;
        let batch = batch_of(&signature.inputs, self.batch)?;
        let ladder: Vec<Extents> = LADDER.iter().map(|extents| Extents { batch, ..*extents }).collect();
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
            first_that_runs(&signature.inputs, &shapes, self.seed, &ladder, attempt)?;
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
        let info = device_of(&model, &*backend);
        let peak = peak_rss_bytes();
        let highest = self.profile.then(|| backend.measure_peak()).flatten();
        let shapes: BTreeMap<&str, Vec<usize>> = inputs.iter().map(|(n, t)| (n.as_str(), t.shape().to_vec())).collect();
        let document = json!({
            "model": self.model.name(),
            "backend": info.backend,
            "choice": choice_json(&model),
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
            let chosen = model.choice().map(|choice| format!("chosen: {choice}"));
            let note: String = note.into_iter().chain(chosen).map(|note| format!("{note}\n")).collect();
            format!("{title}\n{note}{}\n{profile}", table(&["", "value"], rows, true))
        })?;
        Ok(Verdict::Yes)
    }
}

pub(super) fn views(inputs: &Named) -> Vec<(&str, TensorView<'_>)> {
    inputs.iter().map(|(name, tensor)| (name.as_str(), tensor.view())).collect()
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The largest resident set of this process so far.
pub(crate) fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}
