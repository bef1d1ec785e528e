//! What a model costs on a GPU that a processor imitates (Mesa's lavapipe), beside our own kernels of the lowest rung on the same processor:
//! the process's CPU time a run, user and system, in turns, so that other work on the machine falls on both alike.
//!
//!     cargo run -p cutover-backend --features wgpu --example imitated -- model.onnx [rounds] [extent]
//!
//! Symbols are 1, but those of an input's second axis, a text's length, `extent`; floats random, integers 0. Of the GPU it says too how far its
//! answers are from the processor's, and with `PROFILE` set which kernels the time goes to. Only Linux says what a process took.

mod support;

use cutover_backend::{
    Backend, CompileOptions, CpuOptions, Numerics, OpTiming, Profiler, RunContext, SessionMemory, WgpuOptions, cpu,
    wgpu,
};
use cutover_graph::{Plan, onnx, passes::declutter};
use std::{collections::BTreeMap, error::Error, sync::Arc, sync::Mutex};
use support::{difference, random_inputs, run};

/// A run's CPU time is measured over as many runs as take this long together.
const SECONDS: f64 = 1.0;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().ok_or("which model?")?;
    let rounds: usize = arguments.next().map_or(Ok(5), |n| n.parse())?;
    let extent: i64 = arguments.next().map_or(Ok(1), |n| n.parse())?;
    let graph = onnx::import(model.as_ref(), &onnx::ImportOptions::default())?;
    let plan = Plan::new(declutter(graph, &Default::default())?.0)?;
    let scalar = CpuOptions { threads: 1, isa: Some("scalar".to_string()), ..CpuOptions::default() };
    let ways: Vec<(&str, Arc<dyn Backend>, Numerics)> = vec![
        ("wgpu", wgpu(WgpuOptions::default())?, Numerics::Default),
        ("cpu, scalar", cpu(scalar.clone())?, Numerics::Default),
        ("cpu, scalar, direct sums", cpu(scalar)?, Numerics::Strict),
    ];
    let (inputs, outputs) =
        (random_inputs(&plan, |_, axis| Ok(if axis == 1 { extent } else { 1 }))?, plan.graph().outputs().len());
    let mut sessions = Vec::new();
    for (name, backend, numerics) in &ways {
        let options = CompileOptions { numerics: *numerics, ..CompileOptions::default() };
        let mut session = backend.compile(&plan, &options)?.session(SessionMemory::default())?;
        let before = cpu_seconds()?;
        let first = run(&mut *session, &inputs, outputs, &RunContext::default())?;
        println!("{name}: the first run took {:.0} ms", 1e3 * (cpu_seconds()? - before));
        sessions.push((session, first));
    }
    for (a, b) in sessions[0].1.iter().zip(&sessions[1].1) {
        println!("the answers differ by {:.1e}", difference(a, b)?);
    }
    let mut taken = vec![Vec::new(); ways.len()];
    for _ in 0..rounds {
        for ((session, _), taken) in sessions.iter_mut().zip(&mut taken) {
            let (begin, mut runs) = (cpu_seconds()?, 0);
            while cpu_seconds()? - begin < SECONDS {
                run(&mut **session, &inputs, outputs, &RunContext::default())?;
                runs += 1;
            }
            taken.push(1e3 * (cpu_seconds()? - begin) / f64::from(runs));
        }
    }
    for ((name, ..), taken) in ways.iter().zip(&taken) {
        println!("{name}: {:.1} ms of CPU time a run", median(taken));
    }
    for at in 1..ways.len() {
        let ratios: Vec<f64> = taken[at].iter().zip(&taken[0]).map(|(other, gpu)| other / gpu).collect();
        println!("{} over wgpu: {:.2}", ways[at].0, median(&ratios));
    }
    if std::env::var_os("PROFILE").is_some() {
        let profile = Profile::default();
        run(&mut *sessions[0].0, &inputs, outputs, &RunContext { profiler: Some(&profile), ..RunContext::default() })?;
        let mut kernels: Vec<_> = profile.0.into_inner()?.into_iter().collect();
        kernels.sort_by(|a, b| b.1.total_cmp(&a.1));
        kernels.iter().for_each(|(kernel, ms)| println!("{ms:9.2} ms {kernel}"));
    }
    Ok(())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// User and system time of this process, all its threads.
fn cpu_seconds() -> Result<f64, Box<dyn Error>> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    // Linux counts hundredths of a second here, whatever the kernel's own clock.
    Ok(ticks as f64 / 100.0)
}

#[derive(Default)]
struct Profile(Mutex<BTreeMap<String, f64>>);

impl Profiler for Profile {
    fn record(&self, timing: OpTiming<'_>) {
        if let Ok(mut kernels) = self.0.lock() {
            *kernels.entry(timing.kernel.to_string()).or_default() += 1e3 * timing.duration.as_secs_f64();
        }
    }
}
