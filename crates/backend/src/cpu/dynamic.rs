//! Graphs whose shapes only data decides: node by node, by reference evaluation.

use crate::{RunContext, RunError};
use cutover_graph::{
    Plan, Source, ValueId,
    ops::{EvalContext, Inputs},
};
use cutover_tensor::Value;

/// Runs `plan` on inputs in the graph's order; gives the outputs in the graph's order.
pub(super) fn run(plan: &Plan, inputs: Vec<Value>, context: &RunContext<'_>) -> Result<Vec<Value>, RunError> {
    let graph = plan.graph();
    let mut values: Vec<Option<Value>> = vec![None; graph.value_count()];
    let mut readers = vec![0usize; graph.value_count()];
    for (_, node) in graph.nodes() {
        node.inputs.iter().flatten().for_each(|v| readers[v.index()] += 1);
    }
    graph.outputs().iter().for_each(|v| readers[v.index()] += 1);
    for (&id, value) in graph.inputs().iter().zip(inputs) {
        values[id.index()] = Some(value);
    }
    for (id, value) in graph.values() {
        if let Source::Constant(constant) = &value.source {
            values[id.index()] = Some(Value::Tensor(constant.tensor.clone()));
        }
    }
    for &id in plan.order() {
        let node = graph.node(id);
        context.check(&node.name)?;
        let start = context.profiler.map(|_| std::time::Instant::now());
        let borrowed: Vec<Option<&Value>> =
            node.inputs.iter().map(|input| input.and_then(|v: ValueId| values[v.index()].as_ref())).collect();
        let limits = EvalContext {
            outputs: node.outputs.len(),
            max_elements: usize::try_from(context.limits.arena_bytes / 4).unwrap_or(usize::MAX),
            ..EvalContext::default()
        };
        let results = node.op.eval(Inputs(&borrowed), &limits).map_err(|source| RunError::Op {
            node: node.name.clone(),
            op: node.op.name(),
            source,
        })?;
        if let (Some(profiler), Some(start)) = (context.profiler, start) {
            let duration = start.elapsed();
            profiler.record(crate::OpTiming { node: &node.name, op: &node.op.name(), kernel: "reference", duration });
        }
        for (output, value) in node.outputs.iter().zip(results) {
            values[output.index()] = (readers[output.index()] > 0).then_some(value);
        }
        for input in node.inputs.iter().flatten() {
            readers[input.index()] -= 1;
            if readers[input.index()] == 0 {
                values[input.index()] = None;
            }
        }
    }
    let take = |&id: &ValueId| {
        values[id.index()].clone().ok_or_else(|| RunError::Op {
            node: graph.value(id).name.clone(),
            op: "output".to_string(),
            source: cutover_graph::OpError::input("nothing made it"),
        })
    };
    graph.outputs().iter().map(take).collect()
}
