//! What a version must show on this device before it takes traffic.

use crate::error::AdmissionError;
use cutover_backend::{
    Backend, Binding, CompileError, CompileOptions, Executable, Input, Output, RunContext, RunError, Session,
    SessionMemory, Signature,
};
use cutover_graph::{Graph, Plan, passes};
use cutover_package::{Golden, GoldenTolerance, input::Preprocessing};
use cutover_tensor::{Tensor, Value};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

/// Compiles `graph` on the first of `backends` that can.
pub(crate) fn compile(graph: Graph, backends: &[Arc<dyn Backend>]) -> Result<Arc<dyn Executable>, AdmissionError> {
    let (graph, _) = passes::declutter(graph, &passes::PassOptions::default())?;
    let plan = Plan::new(graph)?;
    let mut refused = CompileError::Options("the host was given no backend".to_string());
    for backend in backends {
        match backend.compile(&plan, &CompileOptions::default()) {
            Ok(executable) => return Ok(executable),
            Err(error) => {
                tracing::info!(backend = backend.describe().backend, %error, "backend refuses the model");
                refused = error;
            }
        }
    }
    Err(refused.into())
}

/// Whether clients of the version in service can be clients of this one: the same names, types and ranks.
pub(crate) fn same_signature(serving: &Signature, candidate: &Signature) -> Result<(), AdmissionError> {
    let spell = |signature: &Signature| {
        let binding = |b: &cutover_backend::Binding| match b.fact.as_tensor() {
            Some(fact) => format!(
                "{} {} of rank {}",
                b.name,
                fact.dtype,
                fact.rank().map_or("any".to_string(), |r| r.to_string())
            ),
            None => format!("{} {}", b.name, b.fact),
        };
        let list = |bindings: &[cutover_backend::Binding]| bindings.iter().map(binding).collect::<Vec<_>>().join(", ");
        (list(&signature.inputs), list(&signature.outputs))
    };
    let (serving, candidate) = (spell(serving), spell(candidate));
    if serving.0 != candidate.0 {
        return Err(AdmissionError::Signature(format!("inputs {}, serving {}", candidate.0, serving.0)));
    }
    if serving.1 != candidate.1 {
        return Err(AdmissionError::Signature(format!("outputs {}, serving {}", candidate.1, serving.1)));
    }
    Ok(())
}

/// Whether clients that send pictures and texts can go on to do so.
pub(crate) fn same_raw_inputs(
    serving: Option<&Preprocessing>,
    candidate: Option<&Preprocessing>,
) -> Result<(), AdmissionError> {
    let is_known = |name: &str| candidate.is_some_and(|candidate| candidate.names().any(|known| known == name));
    match serving.and_then(|serving| serving.names().find(|name| !is_known(name))) {
        Some(name) => {
            let message = format!("it makes no input of what is called '{name}', as the version in service does");
            Err(AdmissionError::Signature(message))
        }
        None => Ok(()),
    }
}

/// What running the golden inputs showed.
pub(crate) struct Ran {
    /// Warm: its memory is in place.
    pub session: Box<dyn Session>,
    /// By how much the first run was slower than the median.
    pub first: Duration,
    pub median: Duration,
    pub runs: usize,
}

/// Runs the golden inputs, compares the answers, and runs them again until it is warm and its time is known.
pub(crate) fn golden(
    executable: &Arc<dyn Executable>,
    golden: &Golden,
    tolerance: GoldenTolerance,
) -> Result<Ran, AdmissionError> {
    /// Warm-up and measurement end after so many runs, or so much time.
    const RUNS: usize = 16;
    const TIME: Duration = Duration::from_millis(200);
    if golden.outputs.is_empty() {
        return Err(AdmissionError::Golden("the package has none".to_string()));
    }
    let signature = executable.signature();
    let mut inputs = Vec::with_capacity(signature.inputs.len());
    for binding in &signature.inputs {
        let found = golden.inputs.iter().find(|(name, _)| *name == binding.name);
        let (_, tensor) = found.ok_or_else(|| AdmissionError::Golden(format!("none for input '{}'", binding.name)))?;
        inputs.push(Input::View(tensor.view()));
    }
    let mut session = executable.clone().session(SessionMemory::default())?;
    let mut times = Vec::with_capacity(RUNS);
    let start = Instant::now();
    while times.len() < RUNS && (times.is_empty() || start.elapsed() < TIME) {
        let mut outputs: Vec<Output<'_>> = signature.outputs.iter().map(|_| Output::Allocate(None)).collect();
        let began = Instant::now();
        let run = catch_unwind(AssertUnwindSafe(|| session.run(&inputs, &mut outputs, &RunContext::default())));
        let took = began.elapsed();
        let run = run.unwrap_or_else(|_| Err(RunError::DeviceLost("it panicked".to_string())));
        run.map_err(|e| AdmissionError::Golden(e.to_string()))?;
        if times.is_empty() {
            golden.compare(&answered(signature, outputs), tolerance).map_err(AdmissionError::Golden)?;
        }
        times.push(took);
    }
    let first = times[0];
    times.sort();
    Ok(Ran { session, first, median: times[times.len() / 2], runs: times.len() })
}

fn answered(signature: &Signature, outputs: Vec<Output<'_>>) -> Vec<(String, Tensor)> {
    let outputs = signature.outputs.iter().zip(outputs);
    let tensor = |(binding, output): (&Binding, Output<'_>)| match output {
        Output::Allocate(Some(Value::Tensor(tensor))) => Some((binding.name.clone(), tensor)),
        // Golden vectors hold maps as tables.
        Output::Allocate(Some(value)) => value.as_table().map(|(_, table)| (binding.name.clone(), table)),
        _ => None,
    };
    outputs.filter_map(tensor).collect()
}
