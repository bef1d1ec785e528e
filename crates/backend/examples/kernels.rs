//! Which kernels a model's run launches on a GPU, how many of them were written by hand, and how far its answers are from the processor's in f32.
//!
//!     cargo run -p cutover-backend --features cuda --example kernels -- cuda model.onnx [f32|f16|bf16|tf32] [symbol=extent …]
//!
//! Symbols are 1 where nothing else is said, floats random, integers 0. On the imitation of CUDA (`LD_LIBRARY_PATH` holds its folder,
//! `target/emulate/cuda`) nothing here is a measurement, but it is the plan that a GPU would run.

use cutover_backend::{
    Backend, CompileOptions, Input, OpTiming, Output, Precision, Profiler, RunContext, SessionMemory, binding::shape_of,
};
use cutover_graph::{Bindings, Plan, onnx, passes::declutter};
use cutover_tensor::{DType, Tensor, Value};
use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    sync::{Arc, Mutex},
};

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
    let inputs = random_inputs(&plan, &said)?;
    let cpu = cutover_backend::cpu(cutover_backend::CpuOptions { threads: 1, ..Default::default() })?;
    let expected = run(&cpu, &plan, &inputs, Precision::F32, None)?;
    let kernels = Kernels::default();
    let both = cutover_backend::partition(open(backend)?, cpu, false);
    let actual = run(&both, &plan, &inputs, precision, Some(&kernels))?;
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

fn random_inputs(plan: &Plan, said: &[&String]) -> Result<Vec<Value>, Box<dyn Error>> {
    let mut state = 1u64;
    let mut unit = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let graph = plan.graph();
    let mut inputs = Vec::new();
    for &id in graph.inputs() {
        let fact = graph.value(id).fact.as_tensor().ok_or("an input that is no tensor")?;
        let dims = fact.shape.as_ref().ok_or("an input of unknown rank")?;
        let mut symbols = BTreeSet::new();
        dims.iter().for_each(|dim| dim.collect_symbols(&mut symbols));
        let extent = |symbol: &str| {
            let said = said.iter().filter_map(|said| said.split_once('=')).find(|(name, _)| *name == symbol);
            said.map_or(Ok(1), |(_, extent)| extent.parse())
        };
        let extents = symbols.into_iter().map(|symbol| Ok((symbol.clone(), extent(symbol.as_ref())?)));
        let extents: Bindings = extents.collect::<Result<_, std::num::ParseIntError>>()?;
        let shape = shape_of(dims, &extents).ok_or("an input of unknown shape")?;
        let count: usize = shape.iter().product();
        inputs.push(Value::Tensor(match fact.dtype {
            DType::F32 => Tensor::from_vec(shape, (0..count).map(|_| unit()).collect::<Vec<f32>>())?,
            dtype => Tensor::from_bytes(dtype, shape, &vec![0; count * dtype.bits() / 8])?,
        }));
    }
    Ok(inputs)
}

fn run(
    backend: &Arc<dyn Backend>,
    plan: &Plan,
    inputs: &[Value],
    precision: Precision,
    profiler: Option<&dyn Profiler>,
) -> Result<Vec<Value>, Box<dyn Error>> {
    let executable = backend.compile(plan, &CompileOptions { precision, ..CompileOptions::default() })?;
    let mut outputs: Vec<Output<'_>> = plan.graph().outputs().iter().map(|_| Output::Allocate(None)).collect();
    let given: Vec<Input<'_>> = inputs.iter().map(Input::Value).collect();
    let context = RunContext { profiler, ..RunContext::default() };
    executable.session(SessionMemory::default())?.run(&given, &mut outputs, &context)?;
    let value = |output| match output {
        Output::Allocate(Some(value)) => Ok(value),
        _ => Err("an output is missing".into()),
    };
    outputs.into_iter().map(value).collect()
}

/// The largest difference, over the largest element.
fn difference(a: &Value, b: &Value) -> Result<f32, Box<dyn Error>> {
    let (Value::Tensor(a), Value::Tensor(b)) = (a, b) else { return Err("an output is no tensor".into()) };
    if a.dtype() != DType::F32 {
        return Ok(if a.bytes() == b.bytes() { 0.0 } else { f32::INFINITY });
    }
    let (a, b) = (a.to_vec::<f32>()?, b.to_vec::<f32>()?);
    let scale = b.iter().fold(f32::MIN_POSITIVE, |most, v| most.max(v.abs()));
    let apart = |(a, b): (&f32, &f32)| {
        if (a - b).is_nan() && a.to_bits() != b.to_bits() { f32::INFINITY } else { (a - b).abs() }
    };
    Ok(a.iter().zip(&b).map(apart).fold(0.0, f32::max) / scale)
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
