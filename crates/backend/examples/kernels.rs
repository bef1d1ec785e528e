//! Which kernels a model's run launches on a GPU, how many of them were written by hand, and how far its answers are from the processor's in f32.
//!
//!     cargo run -p cutover-backend --features cuda --example kernels -- cuda model.onnx [f32|f16|bf16|tf32] [symbol=extent …]
//!
//! Symbols are 1 where nothing else is said, floats random, integers 0. On the imitation of CUDA (`LD_LIBRARY_PATH` holds its folder,
//! `target/emulate/cuda`) nothing here is a measurement, but it is the plan that a GPU would run.

mod support;

use cutover_backend::{Backend, CompileOptions, OpTiming, Precision, Profiler, RunContext, SessionMemory};
use cutover_graph::{Plan, onnx, passes::declutter};
use cutover_tensor::Value;
use std::{
    collections::BTreeMap,
    error::Error,
    sync::{Arc, Mutex},
};
use support::{difference, random_inputs, run};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [backend, model, rest @ ..] = arguments.as_slice() else { return Err("which backend, which model?".into()) };
    let (said, precisions): (Vec<&String>, Vec<&String>) = rest.iter().partition(|argument| argument.contains('='));
    let precision = match precisions.first().map_or("f32", |name| name.as_str()) {
        "f32" => Precision::F32,
        "f16" => Precision::F16,
        "bf16" => Precision::BF16,
        "tf32" => Precision::Tf32,
        other => return Err(format!("no precision '{other}'").into()),
    };
    let graph = onnx::import(model.as_ref(), &onnx::ImportOptions::default())?;
    let plan = Plan::new(declutter(graph, &Default::default())?.0)?;
    let extent = |symbol: &str, _: usize| {
        let said = said.iter().filter_map(|said| said.split_once('=')).find(|(name, _)| *name == symbol);
        said.map_or(Ok(1), |(_, extent)| Ok(extent.parse()?))
    };
    let inputs = random_inputs(&plan, extent)?;
    let cpu = cutover_backend::cpu(cutover_backend::CpuOptions { threads: 1, ..Default::default() })?;
    let expected = run_on(&cpu, &plan, &inputs, Precision::F32, None)?;
    let kernels = Kernels::default();
    let both = cutover_backend::partition(open(backend)?, cpu, false);
    let actual = run_on(&both, &plan, &inputs, precision, Some(&kernels))?;
    let kernels = kernels.0.into_inner()?;
    let all: usize = kernels.values().sum();
    let by_hand: usize = kernels.iter().filter(|(name, _)| name.contains("by hand")).map(|(_, count)| count).sum();
    println!("{model}: {by_hand} of {all} kernels are written by hand");
    kernels.iter().for_each(|(name, count)| println!("{count:5} {name}"));
    for (a, b) in actual.iter().zip(&expected) {
        println!("the answers differ by {:.1e} of the largest", difference(a, b)?);
    }
    Ok(())
}

fn open(backend: &str) -> Result<Arc<dyn Backend>, Box<dyn Error>> {
    match backend {
        #[cfg(feature = "cuda")]
        "cuda" => Ok(cutover_backend::cuda(cutover_backend::CudaOptions::default())?),
        #[cfg(feature = "wgpu")]
        "wgpu" => Ok(cutover_backend::wgpu(cutover_backend::WgpuOptions::default())?),
        other => Err(format!("this build has no {other}").into()),
    }
}

fn run_on(
    backend: &Arc<dyn Backend>,
    plan: &Plan,
    inputs: &[Value],
    precision: Precision,
    profiler: Option<&dyn Profiler>,
) -> Result<Vec<Value>, Box<dyn Error>> {
    let executable = backend.compile(plan, &CompileOptions { precision, ..CompileOptions::default() })?;
    let mut session = executable.session(SessionMemory::default())?;
    let context = RunContext { profiler, ..RunContext::default() };
    run(&mut *session, inputs, plan.graph().outputs().len(), &context)
}

#[derive(Default)]
struct Kernels(Mutex<BTreeMap<String, usize>>);

impl Profiler for Kernels {
    fn record(&self, timing: OpTiming<'_>) {
        if let Ok(mut kernels) = self.0.lock() {
            *kernels.entry(timing.kernel.to_string()).or_default() += 1;
        }
    }
}
