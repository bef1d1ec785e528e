//! What a version must show on this device before it takes traffic.

use crate::error::AdmissionError;
use cutover_backend::{
    Backend, CompileError, CompileOptions, Executable, Input, Output, RunContext, SessionMemory, Signature,
};
use cutover_graph::{Graph, Plan, passes};
use cutover_package::{Golden, GoldenTolerance};
use cutover_tensor::Value;
use std::sync::Arc;

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

/// Whether it fits beside what is resident.
pub(crate) fn fits(executable: &dyn Executable, resident: u64, budget: Option<u64>) -> Result<(), AdmissionError> {
    let footprint = executable.footprint();
    let needed = (footprint.weight_bytes - footprint.shared_bytes.min(footprint.weight_bytes))
        .saturating_add(footprint.session_bytes);
    match budget {
        Some(budget) if resident.saturating_add(needed) > budget => {
            Err(AdmissionError::Memory { needed, resident, budget })
        }
        _ => Ok(()),
    }
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

/// Runs the golden inputs and compares.
pub(crate) fn golden(
    executable: &Arc<dyn Executable>,
    golden: &Golden,
    tolerance: GoldenTolerance,
) -> Result<(), AdmissionError> {
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
    let mut outputs: Vec<Output<'_>> = signature.outputs.iter().map(|_| Output::Allocate(None)).collect();
    let mut session = executable.clone().session(SessionMemory::default())?;
    let run = session.run(&inputs, &mut outputs, &RunContext::default());
    run.map_err(|e| AdmissionError::Golden(e.to_string()))?;
    let answered: Vec<_> = signature
        .outputs
        .iter()
        .zip(outputs)
        .filter_map(|(binding, output)| match output {
            Output::Allocate(Some(Value::Tensor(tensor))) => Some((binding.name.clone(), tensor)),
            // Golden vectors hold maps as tables.
            Output::Allocate(Some(value)) => value.as_table().map(|(_, table)| (binding.name.clone(), table)),
            _ => None,
        })
        .collect();
    golden.compare(&answered, tolerance).map_err(AdmissionError::Golden)
}
