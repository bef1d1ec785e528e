//! Which kernels a model's run launches on a GPU, and how many of them were written by hand.
//!
//!     cargo run -p cutover-backend --features cuda --example kernels -- cuda model.onnx [f32|f16|bf16|tf32] [extent]
//!
//! Symbols are `extent`, or 1, inputs zeros. On the imitation of CUDA (`LD_LIBRARY_PATH` holds its folder, `target/emulate/cuda`) nothing of the table is a
//! measurement, but it is the plan that a GPU would run.

use cutover_backend::{
    Backend, CompileOptions, Input, OpTiming, Output, Precision, Profiler, RunContext, SessionMemory, binding::shape_of,
};
use cutover_graph::{Bindings, Plan, onnx, passes::declutter};
use cutover_tensor::{Tensor, Value};
use std::{
    collections::BTreeMap,
    error::Error,
    sync::{Arc, Mutex},
};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [backend, model, rest @ ..] = arguments.as_slice() else {
        return Err("which backend, which model?".into());
    };
    let precision = match rest.first().map_or("f32", String::as_str) {
        "f32" => Precision::F32,
        "f16" => Precision::F16,
        "bf16" => Precision::BF16,
        "tf32" => Precision::Tf32,
        other => return Err(format!("no precision '{other}'").into()),
    };
    let extent: i64 = rest.get(1).map_or(Ok(1), |extent| extent.parse())?;
    let gpu = open(backend)?;
    let graph = onnx::import(model.as_ref(), &onnx::ImportOptions::default())?;
    let plan = Plan::new(declutter(graph, &Default::default())?.0)?;
    let mut inputs = Vec::new();
    for &id in plan.graph().inputs() {
        let fact = plan.graph().value(id).fact.as_tensor().ok_or("an input that is no tensor")?.clone();
        let mut ones = std::collections::BTreeSet::new();
        let dims = fact.shape.as_ref().ok_or("an input of unknown rank")?;
        dims.iter().for_each(|dim| dim.collect_symbols(&mut ones));
        let ones: Bindings = ones.into_iter().map(|symbol| (symbol, extent)).collect();
        let shape = shape_of(dims, &ones).ok_or("an input of unknown shape")?;
        let bytes = vec![0; shape.iter().product::<usize>() * fact.dtype.bits() / 8];
        inputs.push(Value::Tensor(Tensor::from_bytes(fact.dtype, shape, &bytes)?));
    }
    let cpu = cutover_backend::cpu(cutover_backend::CpuOptions { threads: 1, ..Default::default() })?;
    let both = cutover_backend::partition(gpu, cpu, false);
    let executable = both.compile(&plan, &CompileOptions { precision, ..CompileOptions::default() })?;
    let mut outputs: Vec<Output<'_>> = plan.graph().outputs().iter().map(|_| Output::Allocate(None)).collect();
    let kernels = Kernels::default();
    let context = RunContext { profiler: Some(&kernels), ..RunContext::default() };
    let given: Vec<Input<'_>> = inputs.iter().map(Input::Value).collect();
    executable.session(SessionMemory::default())?.run(&given, &mut outputs, &context)?;
    let kernels = kernels.0.into_inner()?;
    let all: usize = kernels.values().sum();
    let by_hand: usize = kernels.iter().filter(|(name, _)| name.contains("by hand")).map(|(_, count)| count).sum();
    println!("{model}: {by_hand} of {all} kernels are written by hand");
    kernels.iter().for_each(|(name, count)| println!("{count:5} {name}"));
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

#[derive(Default)]
struct Kernels(Mutex<BTreeMap<String, usize>>);

impl Profiler for Kernels {
    fn record(&self, timing: OpTiming<'_>) {
        if let Ok(mut kernels) = self.0.lock() {
            *kernels.entry(timing.kernel.to_string()).or_default() += 1;
        }
    }
}
