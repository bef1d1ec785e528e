//! One round of a cell, in a process of its own: what it needs of memory is then its own, and what it breaks too.

use super::{
    document::{Arrivals, Measured, Phases, Round, WorkDone},
    machine::{self, Energy},
    one::{LADDER, peak_rss_bytes, views},
    profile::Profile,
    requests::{Wall, schedule, serve},
    warm_up::warm_up,
};
use crate::made_up::{Extents, Random, batch_of, first_that_runs, parse_shapes};
use anyhow::{Result, bail};
use cutover::{
    CompiledModel, Device, DeviceOptions, Model, Session,
    backend::{Backend, CompileOptions, Phase, PhaseObserver, RunContext},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Mutex,
    time::{Duration, Instant},
};

/// Runs that are timed node by node, or phase by phase, after the round.
const PROFILED_RUNS: usize = 5;
/// How long requests are waited for that came too fast, in rounds.
const DRAIN_ROUNDS: f64 = 1.0;

/// What the process is told, on its standard input.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Spec {
    pub model: PathBuf,
    pub backend: String,
    pub precision: String,
    pub numerics: String,
    pub memory: String,
    pub threads: Option<usize>,
    pub isa: Option<String>,
    pub adapter: Option<String>,
    pub strict: bool,
    pub batch: Option<usize>,
    pub shapes: Vec<String>,
    pub seed: u64,
    /// Of measuring; warming up may take as long again.
    pub seconds: f64,
    /// The round ends with so many latencies.
    pub samples_max: usize,
    pub rate: Option<f64>,
    pub arrivals: Arrivals,
    /// Whether work and phases are looked at too.
    pub detail: bool,
}

impl Spec {
    fn options(&self) -> Result<DeviceOptions> {
        let wrong = anyhow::Error::msg;
        let compile = CompileOptions {
            precision: crate::commands::precision(&self.precision).map_err(wrong)?,
            numerics: crate::commands::numerics(&self.numerics).map_err(wrong)?,
        };
        Ok(DeviceOptions {
            threads: self.threads,
            isa: self.isa.clone(),
            memory: crate::commands::memory(&self.memory).map_err(wrong)?,
            strict: self.strict,
            adapter: self.adapter.clone(),
            compile,
        })
    }

    /// Measures one round.
    pub fn measure(&self) -> Result<Measured> {
        let options = self.options()?;
        let backend = self.backend.parse::<Device>()?.backend(&options)?;
        let start = Instant::now();
        let opened = Model::open(&self.model)?;
        let open_ms = ms(start.elapsed());
        let batch = batch_of(&opened.signature().inputs, self.batch)?;
        let start = Instant::now();
        let model = opened.compile_on(&*backend, &options.compile)?;
        let compile_ms = ms(start.elapsed());
        drop(opened);

        let signature = model.signature();
        let shapes = parse_shapes(&self.shapes, &signature.inputs)?;
        let ladder: Vec<Extents> = LADDER.iter().map(|extents| Extents { batch, ..*extents }).collect();
        let attempt = |inputs: &_| {
            let mut session = model.session()?;
            let start = Instant::now();
            session.run(views(inputs))?;
            Ok((session, ms(start.elapsed())))
        };
        let (made_up, (mut session, first_ms)) =
            first_that_runs(&signature.inputs, &shapes, self.seed, &ladder, attempt)?;
        let inputs = views(&made_up.inputs);
        let mut run = || -> Result<()> { Ok(session.run(inputs.iter().copied()).map(drop)?) };
        let round = Duration::from_secs_f64(self.seconds);
        let warmed = warm_up(round, &mut run)?;

        let device = crate::commands::device_of(&model, &*backend);
        let (energy, gpu_energy) = (Energy::start(), machine::gpu_energy(&device));
        let start = Instant::now();
        let (mut latencies_ms, mut unanswered) = (Vec::new(), 0);
        let mut seconds = None;
        match self.rate {
            None => {
                while latencies_ms.is_empty() || (start.elapsed() < round && latencies_ms.len() < self.samples_max) {
                    let start = Instant::now();
                    run()?;
                    latencies_ms.push(ms(start.elapsed()));
                }
            }
            Some(rate) => {
                let mut random = Random::new(self.seed ^ 0xA771_7A15);
                let due = schedule(rate, self.arrivals, self.seconds, self.samples_max, &mut random);
                let served = serve(&due, round.mul_f64(1.0 + DRAIN_ROUNDS), &Wall(Instant::now()), &mut run)?;
                (latencies_ms, unanswered, seconds) = (served.latencies_ms, served.unanswered, Some(served.seconds));
            }
        }
        let seconds = seconds.unwrap_or_else(|| start.elapsed().as_secs_f64());
        let energy_j = energy.and_then(|energy| energy.joules());
        let (gpu_energy_j, no_gpu_energy) = match gpu_energy.map(|energy| energy.map(|energy| energy())) {
            Some(Ok(joules)) => (joules, None),
            Some(Err(reason)) => (None, Some(format!("energy of the GPU: {reason}"))),
            None => (None, None),
        };
        let peak_rss_bytes = peak_rss_bytes();
        let (work, phases) = match self.detail {
            true => (work(&*backend, &mut session, &inputs)?, phases(&mut session, &inputs)?),
            false => (None, None),
        };
        let (nodes, nodes_elsewhere) = placed(&model, &self.backend);
        let chosen = model.choice().map(|choice| format!("chosen: {}", choice.device.backend));
        let notes = made_up
            .note(&signature.inputs)
            .into_iter()
            .chain(elsewhere(nodes_elsewhere, nodes))
            .chain(chosen)
            .chain(no_gpu_energy);
        let shapes = made_up.inputs.iter().map(|(name, tensor)| (name.clone(), tensor.shape().to_vec()));
        Ok(Measured {
            device: device.device,
            isa: device.isa,
            batch,
            inputs: shapes.collect::<BTreeMap<_, _>>(),
            notes: notes.collect(),
            nodes,
            nodes_elsewhere,
            round: Round {
                runs: latencies_ms.len() - unanswered,
                median_ms: 0.0,
                open_ms,
                compile_ms,
                first_ms,
                warm_up_runs: warmed.runs,
                is_steady: warmed.is_steady,
                seconds,
                peak_rss_bytes,
                energy_j,
                gpu_energy_j,
                unanswered,
            },
            latencies_ms,
            work,
            phases,
        })
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Nodes, and those that another backend than `asked` runs.
fn placed(model: &CompiledModel, asked: &str) -> (usize, usize) {
    let nodes = &model.placement().nodes;
    let elsewhere = nodes.iter().filter(|node| asked != "auto" && node.backend != asked).count();
    (nodes.len(), elsewhere)
}

fn elsewhere(nodes_elsewhere: usize, nodes: usize) -> Option<String> {
    (nodes_elsewhere > 0).then(|| format!("{nodes_elsewhere} of {nodes} nodes run on another backend"))
}

type Views<'a> = [(&'a str, cutover::TensorView<'a>)];

/// What a run has to do, by its nodes, and the least time for that at the device's peak; `None` where nobody counts.
fn work(backend: &dyn Backend, session: &mut Session, inputs: &Views<'_>) -> Result<Option<WorkDone>> {
    let profile = Profile::default();
    let context = RunContext { profiler: Some(&profile), ..RunContext::default() };
    session.run_with(inputs.iter().copied(), &context)?;
    let steps = profile.work();
    let (operations, bytes) = steps.iter().fold((0, 0), |(o, b), work| (o + work.products(), b + work.bytes));
    if operations == 0 && bytes == 0 {
        return Ok(None);
    }
    let peak = backend.measure_peak();
    // What has no counted products is bound by what nobody counted.
    let least =
        peak.filter(|_| operations > 0).map(|peak| steps.iter().filter_map(|work| peak.share(*work, 1.0)).sum());
    Ok(Some(WorkDone {
        operations,
        bytes,
        peak_operations_per_second: peak.map(|peak| peak.operations_per_second),
        peak_bytes_per_second: peak.map(|peak| peak.bytes_per_second),
        least_seconds: least,
    }))
}

/// Time by phase of a run.
#[derive(Default)]
struct Seen(Mutex<BTreeMap<Phase, Duration>>);

impl PhaseObserver for Seen {
    fn record(&self, phase: Phase, duration: Duration) {
        let mut seen = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *seen.entry(phase).or_default() += duration;
    }
}

/// Where the time of a run goes, medians over a few; `None` where the backend does not tell.
fn phases(session: &mut Session, inputs: &Views<'_>) -> Result<Option<Phases>> {
    let mut runs: Vec<[Option<f64>; 4]> = Vec::new();
    for _ in 0..PROFILED_RUNS {
        let seen = Seen::default();
        let context = RunContext { phases: Some(&seen), ..RunContext::default() };
        let start = Instant::now();
        session.run_with(inputs.iter().copied(), &context)?;
        let total = ms(start.elapsed());
        let seen = seen.0.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        if seen.is_empty() {
            return Ok(None);
        }
        let of = |phase| seen.get(&phase).copied().map(ms);
        let host = (total - seen.values().copied().map(ms).sum::<f64>()).max(0.0);
        runs.push([of(Phase::CopyIn), of(Phase::Kernels), of(Phase::CopyOut), Some(host)]);
    }
    let median = |at: usize| {
        let values: Vec<f64> = runs.iter().filter_map(|run| run[at]).collect();
        (!values.is_empty()).then(|| super::statistics::median(&values))
    };
    Ok(Some(Phases { copy_in_ms: median(0), kernels_ms: median(1), copy_out_ms: median(2), host_ms: median(3) }))
}

/// The process of a cell: reads what to measure, and prints what it measured, or why it could not.
pub(super) fn process() -> Result<()> {
    let spec: Spec = serde_json::from_reader(std::io::stdin().lock())?;
    let answer: Result<Measured, String> = spec.measure().map_err(|error| crate::chain(&error));
    println!("{}", serde_json::to_string(&answer)?);
    if answer.as_ref().is_ok_and(|measured| measured.latencies_ms.is_empty()) {
        bail!("a round without a run");
    }
    Ok(())
}
