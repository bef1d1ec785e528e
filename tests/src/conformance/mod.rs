//! The ONNX project's own node cases (`tests/onnx/`, Apache-2.0), run on a backend.
//!
//! What a backend can't do yet is written in `tests/onnx/expected.toml` with its reason, and fails here as soon as it passes.
//! Nothing but that data and `tests/onnx/cases.toml` knows a case's name.

mod archive;
mod compare;
mod expected;
mod operators;

pub use archive::{Case, Cases, DataSet};
pub use expected::Expected;
pub use operators::{OnGpu, page};

use compare::Judge;
use cutover::{
    Error, Model, OpenOptions, Value,
    backend::{Backend, CompileOptions, PlacedNode, RunContext},
    graph::{Fact, Node, onnx},
};
use std::{
    collections::BTreeMap,
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
    /// One for each node of the model as imported.
    pub operators: Vec<Used>,
}

/// An operator in a case.
#[derive(Clone, Debug)]
pub struct Used {
    /// `domain.Name`, without the default domain.
    pub name: String,
    /// Of its first result.
    pub dtype: String,
    pub placed: Placed,
}

/// Which kernels ran a case or a node; the least of a case's nodes counts for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Placed {
    /// The backend's own, one for each node.
    #[default]
    Native,
    /// The backend's own, several for a node.
    Composed,
    /// The reference evaluation of the operator.
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

fn placed(node: &PlacedNode) -> Placed {
    if node.reason.is_empty() { Placed::Native } else { Placed::Fallback }
}

/// Where a node of the model ran: as it is, or as the nodes that it was composed of, which bear its name before theirs. What was folded or
/// fused away took nobody's help.
fn placed_of(node: &str, placed: &BTreeMap<&str, Placed>) -> Placed {
    let is_part = |name: &str| name.strip_prefix(node).is_some_and(|rest| rest.starts_with('/'));
    let parts = placed.range(node..).take_while(|(name, _)| name.starts_with(node)).filter(|(name, _)| is_part(name));
    match placed.get(node) {
        Some(&own) => own,
        None => parts.map(|(_, &part)| part.max(Placed::Composed)).max().unwrap_or_default(),
    }
}

fn check(case: &Case, backend: &dyn Backend, judge: &Judge, outcome: &mut Outcome) -> Result<(), String> {
    let text = |error: Error| error.to_string();
    let options = OpenOptions::default();
    let graph = onnx::import_bytes(case.model.clone().into(), None, &options.import).map_err(|e| e.to_string())?;
    let used = |node: &Node| {
        let fact = node.outputs.first().map(|&output| &graph.value(output).fact);
        let dtype = match fact {
            Some(Fact::Tensor(fact)) => fact.dtype.to_string(),
            Some(Fact::Sequence(_)) => "sequence".to_string(),
            Some(Fact::Optional(_)) => "optional".to_string(),
            Some(Fact::Map { .. }) => "map".to_string(),
            None => String::new(),
        };
        (node.name.clone(), Used { name: node.op.name(), dtype, placed: Placed::default() })
    };
    let mut operators: Vec<(String, Used)> = graph.nodes().map(|(_, node)| used(node)).collect();
    outcome.operators = operators.iter().map(|(_, used)| used.clone()).collect();
    let model = Model::from_graph(graph, &options.passes).map_err(text)?;
    let compiled = model.compile_on(backend, &CompileOptions::default()).map_err(text)?;
    let placed: BTreeMap<&str, Placed> =
        compiled.placement().nodes.iter().map(|node| (node.node.as_str(), placed(node))).collect();
    operators.iter_mut().for_each(|(node, used)| used.placed = placed_of(node, &placed));
    let parts = operators.iter().map(|(_, used)| used.placed).chain(placed.values().copied());
    outcome.placed = parts.max().unwrap_or_default();
    outcome.operators = operators.into_iter().map(|(_, used)| used).collect();
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
        let expected: Vec<Value> =
            expected.map(|(file, binding)| read(file, &binding.fact)).collect::<Result<_, _>>()?;
        let answers: Vec<(&str, &Value)> = answers.iter().collect();
        judge.compare(&case.name, &inputs, &answers, &expected)?;
    }
    Ok(())
}
