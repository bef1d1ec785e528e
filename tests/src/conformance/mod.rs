//! The ONNX project's own node cases (`tests/onnx/`, Apache-2.0), run on a backend.
//!
//! What a backend can't do yet is written in `tests/onnx/expected.toml` with its reason, and fails here as soon as it passes.
//! Nothing but that data and `tests/onnx/cases.toml` knows a case's name.

mod archive;
mod compare;
mod expected;

pub use archive::{Case, Cases, DataSet};
pub use expected::Expected;

use compare::Judge;
use cutover::{
    Error, Model, OpenOptions, Value,
    backend::{Backend, CompileOptions, RunContext},
    graph::{Fact, onnx},
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

/// What came of a case on one backend.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub name: String,
    /// Why it failed; `None` where it passed.
    pub failure: Option<String>,
    /// Where its nodes ran.
    pub placed: Placed,
    /// `operator of opset`, one for each node of the model as imported.
    pub operators: Vec<String>,
}

/// Which kernels ran a case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placed {
    /// The backend's own, one for each node.
    #[default]
    Native,
    /// At least one node by the reference evaluation of its operator.
    Fallback,
}

/// Runs `cases` on as many threads as there are cores; the outcomes are in the order of the cases.
pub fn run(cases: &[&Case], backend: &dyn Backend) -> Vec<Outcome> {
    let judge = Judge::load();
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut outcomes = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(case) = cases.get(at) else { return outcomes };
            outcomes.push((at, run_one(case, backend, &judge)));
        }
    };
    let threads = thread::available_parallelism().map_or(1, |n| n.get());
    let mut outcomes: Vec<(usize, Outcome)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|w| w.join().expect("workers catch panics")).collect()
    });
    outcomes.sort_by_key(|(at, _)| *at);
    outcomes.into_iter().map(|(_, outcome)| outcome).collect()
}

fn run_one(case: &Case, backend: &dyn Backend, judge: &Judge) -> Outcome {
    let mut outcome =
        Outcome { name: case.name.clone(), failure: None, placed: Placed::default(), operators: Vec::new() };
    let result = catch_unwind(AssertUnwindSafe(|| check(case, backend, judge, &mut outcome)));
    outcome.failure = result.unwrap_or_else(|_| Err("it panicked".to_string())).err();
    outcome
}

fn check(case: &Case, backend: &dyn Backend, judge: &Judge, outcome: &mut Outcome) -> Result<(), String> {
    let text = |error: Error| error.to_string();
    let options = OpenOptions::default();
    let graph = onnx::import_bytes(case.model.clone().into(), None, &options.import).map_err(|e| e.to_string())?;
    outcome.operators = graph.nodes().map(|(_, node)| node.op.name()).collect();
    let model = Model::from_graph(graph, &options.passes).map_err(text)?;
    let compiled = model.compile_on(backend, &CompileOptions::default()).map_err(text)?;
    let native = compiled.placement().nodes.iter().all(|node| node.reason.is_empty());
    outcome.placed = if native { Placed::Native } else { Placed::Fallback };
    let signature = compiled.signature().clone();
    let mut session = compiled.session().map_err(text)?;
    for data in &case.data {
        let read = |file: &[u8], fact: &Fact| {
            onnx::read_value(file.to_vec().into(), fact, &options.import).map_err(|e| e.to_string())
        };
        if data.inputs.len() > signature.inputs.len() || data.outputs.len() > signature.outputs.len() {
            return Err("the data has more values than the model".to_string());
        }
        let inputs = data.inputs.iter().zip(&signature.inputs);
        let inputs: Vec<Value> = inputs.map(|(file, binding)| read(file, &binding.fact)).collect::<Result<_, _>>()?;
        let named = signature.inputs.iter().map(|b| b.name.as_str()).zip(&inputs);
        let answers = session.run_values(named, &RunContext::default()).map_err(text)?;
        let expected = data.outputs.iter().zip(&signature.outputs);
        for ((name, actual), (file, binding)) in answers.iter().zip(expected) {
            let expected = read(file, &binding.fact)?;
            judge
                .compare(&case.name, actual, &expected)
                .map_err(|difference| format!("output '{name}': {difference}"))?;
        }
    }
    Ok(())
}
