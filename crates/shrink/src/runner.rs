//! A compiled graph that is run on samples.

use crate::{Sample, ShrinkError, prune::bindings};
use cutover_backend::{Backend, Binding, CompileOptions, Input, Output, RunContext, Session, SessionMemory, Signature};
use cutover_graph::{
    Dim, Fact, Graph, Plan, TensorFact,
    passes::{PassOptions, declutter},
};
use cutover_tensor::Value;
use std::sync::Arc;

/// The graph as whoever opens the model runs it: constants folded, operators fused.
pub(crate) fn opened(graph: &Graph) -> Result<Graph, ShrinkError> {
    Ok(declutter(graph.clone(), &PassOptions::default())?.0)
}

pub(crate) struct Runner {
    session: Box<dyn Session>,
    signature: Signature,
}

impl Runner {
    pub fn new(graph: &Graph, backend: &Arc<dyn Backend>) -> Result<Runner, ShrinkError> {
        let executable = backend.compile(&Plan::new(opened(graph)?)?, &CompileOptions::default())?;
        let signature = executable.signature().clone();
        Ok(Runner { session: executable.session(SessionMemory::default())?, signature })
    }

    pub fn outputs(&self) -> &[Binding] {
        &self.signature.outputs
    }

    /// The graph's outputs, in order. Errors name the sample by its `number`.
    pub fn run(&mut self, sample: &Sample, number: usize, context: &RunContext<'_>) -> Result<Vec<Value>, ShrinkError> {
        let refuse = |message| ShrinkError::Sample { sample: number, message };
        let find = |name: &String| sample.iter().find(|(n, _)| n == name).map(|(_, value)| Input::Value(value));
        let missing = |name: &String| refuse(format!("has no input '{name}'"));
        let inputs = self.signature.inputs.iter().map(|b| find(&b.name).ok_or_else(|| missing(&b.name)));
        let inputs: Vec<Input<'_>> = inputs.collect::<Result<_, _>>()?;
        let mut outputs: Vec<Output<'_>> = self.outputs().iter().map(|_| Output::Allocate(None)).collect();
        let done = self.session.run(&inputs, &mut outputs, context);
        done.map_err(|source| ShrinkError::Run { sample: number, source })?;
        let values = outputs.into_iter().zip(self.outputs()).map(|(output, binding)| match output {
            Output::Allocate(Some(value)) => Ok(value),
            _ => Err(refuse(format!("the run gave no '{}'", binding.name))),
        });
        values.collect()
    }
}

/// Bytes of the compiled graph with one session, at the shapes of `sample`.
pub(crate) fn memory(graph: &Graph, sample: &Sample, backend: &Arc<dyn Backend>) -> Result<u64, ShrinkError> {
    let bindings = bindings(graph, sample);
    let mut graph = opened(graph)?;
    for input in graph.inputs().to_vec() {
        if let Fact::Tensor(TensorFact { shape: Some(shape), .. }) = &mut graph.value_mut(input).fact {
            shape.iter_mut().for_each(|dim| *dim = dim.substitute(&|s| bindings.get(s).copied().map(Dim::Const)));
        }
    }
    for id in graph.topological_order()? {
        let node = graph.node(id);
        let facts = graph.infer(&node.name, &node.op, &node.inputs, node.outputs.len())?;
        for (output, fact) in node.outputs.clone().into_iter().zip(facts) {
            graph.value_mut(output).fact = fact;
        }
    }
    let footprint = backend.compile(&Plan::new(graph)?, &CompileOptions::default())?.footprint();
    Ok(footprint.weight_bytes + footprint.session_bytes)
}
