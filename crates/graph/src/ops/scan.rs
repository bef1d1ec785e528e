//! A graph over the elements of sequences, with state.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Subgraph, normalize_axis,
    stacked::{Stack, element, stacked_fact},
    subgraph::{Run, captured, either, own_inputs},
};
use crate::{Dim, Fact, Graph, ImportError, OpError};
use cutover_tensor::{Tensor, Value};

/// ONNX's `Scan`. Inputs: the states, the tensors whose elements are scanned, what the body captures. The body takes states and
/// elements, and gives states and elements of the outputs. One axis and direction for each tensor scanned and each output stacked.
#[derive(Clone, Debug, PartialEq)]
pub struct Scan {
    pub body: Subgraph,
    pub inputs: Vec<Scanned>,
    pub outputs: Vec<Scanned>,
}

/// How a tensor is gone through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    pub axis: i64,
    pub backwards: bool,
}

impl Scan {
    fn states(&self) -> usize {
        self.body.formal() - self.inputs.len()
    }
}

impl Operator for Scan {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let batched = node.opset < 9;
        // Before opset 9 the first input says how long each sequence of the batch is.
        if batched && node.has_input(0) {
            return Err(node.unsupported("sequence lengths, which opset 9 did away with"));
        }
        node.expect_inputs(1..=usize::MAX)?;
        let own = node.inputs.len() - usize::from(batched);
        let body = node.subgraph("body")?;
        let scanned = node.count("num_scan_inputs", 0)?;
        let (formal, outputs) = (body.formal(), body.graph().outputs().len());
        let states = own.checked_sub(scanned).filter(|&states| scanned > 0 && formal == own && outputs >= states);
        let Some(states) = states else {
            return Err(node.corrupt(format!(
                "scans {scanned} of its {own} inputs; its body has {formal} inputs and {outputs} outputs"
            )));
        };
        let directions = if batched { ["directions", ""] } else { ["scan_input_directions", "scan_output_directions"] };
        let [inputs, outputs] =
            [("scan_input_axes", directions[0], scanned), ("scan_output_axes", directions[1], outputs - states)]
                .map(|(axes, directions, count)| axes_and_directions(node, axes, directions, count));
        let scan = Scan { body, inputs: inputs?, outputs: outputs? };
        if !batched {
            return Ok(scan.into());
        }
        node.remove_first_input();
        let captured = scan.body.captured();
        over_batch(scan, states, captured).map_err(|e| node.corrupt(e.to_string()))
    }

    fn export(&self) -> Spelling {
        let axes = |all: &[Scanned]| all.iter().map(|s| s.axis).collect::<Vec<_>>();
        let directions = |all: &[Scanned]| all.iter().map(|s| i64::from(s.backwards)).collect::<Vec<_>>();
        Spelling::new("Scan")
            .with("body", self.body.clone())
            .with("num_scan_inputs", self.inputs.len() as i64)
            .with("scan_input_axes", axes(&self.inputs))
            .with("scan_input_directions", directions(&self.inputs))
            .with("scan_output_axes", axes(&self.outputs))
            .with("scan_output_directions", directions(&self.outputs))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let states = self.states();
        if own_inputs(&inputs, &[&self.body])? != self.body.formal() {
            return Err(OpError::input("another number of inputs than its body has"));
        }
        let extent = self.inputs.iter().enumerate().find_map(|(at, scanned)| {
            let shape = inputs.tensor(states + at).ok()?.shape.as_ref()?;
            Some(shape[normalize_axis(scanned.axis, shape.len()).ok()?].clone())
        });
        let extent = extent.unwrap_or_else(|| context.fresh("length"));
        let output = |at: usize| {
            let stem = format!("output{at}");
            let made = self.body.output_fact(at, context, &stem)?;
            if let Some(scanned) = at.checked_sub(states).map(|at| self.outputs[at]) {
                return stacked_fact(&made, scanned.axis, extent.clone());
            }
            let initial = inputs.get(at).ok_or_else(|| OpError::input(format!("input {at} is missing")))?;
            either(initial, &made, context, &stem).map_err(|e| OpError::input(format!("output {at} {e}")))
        };
        (0..context.outputs).map(output).collect()
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        context.counting(|context| self.eval_with(inputs, context, &mut |_, given| self.body.iterate(given, context)))
    }
}

impl Scan {
    pub(super) fn eval_with<E: From<OpError>>(
        &self,
        inputs: Inputs<'_>,
        context: &EvalContext,
        run: &mut Run<'_, E>,
    ) -> Result<Vec<Value>, E> {
        let states = self.states();
        let missing = |at: usize| OpError::input(format!("input {at} is missing"));
        let mut state: Vec<Value> =
            (0..states).map(|at| inputs.get(at).cloned().ok_or_else(|| missing(at))).collect::<Result<_, OpError>>()?;
        let mut sequences: Vec<(&Tensor, usize, bool)> = Vec::new();
        for (at, scanned) in self.inputs.iter().enumerate() {
            let tensor = inputs.tensor(states + at)?;
            sequences.push((tensor, normalize_axis(scanned.axis, tensor.shape().len())?, scanned.backwards));
        }
        let length = |&(tensor, axis, _): &(&Tensor, usize, bool)| tensor.shape()[axis];
        let lengths: Vec<usize> = sequences.iter().map(length).collect();
        if lengths.iter().any(|&l| l != lengths[0]) {
            return Err(OpError::input(format!("sequences of lengths {lengths:?}: one length expected")).into());
        }
        let outer = captured(&self.body, &inputs, self.body.formal())?;
        let mut stacks: Vec<Stack> = self.outputs.iter().map(|_| Stack::default()).collect();
        for at in 0..lengths[0] {
            let mut given = std::mem::take(&mut state);
            for &(tensor, axis, backwards) in &sequences {
                let at = if backwards { lengths[0] - 1 - at } else { at };
                given.push(element(tensor, axis, at)?.into());
            }
            given.extend(outer.iter().cloned());
            self.body.check(&given)?;
            let mut made = run(0, given)?.into_iter();
            state.extend(made.by_ref().take(states));
            for (stack, value) in stacks.iter_mut().zip(made) {
                stack.push(value, context)?;
            }
        }
        let graph = self.body.graph();
        for (at, (stack, scanned)) in stacks.into_iter().zip(&self.outputs).enumerate() {
            let element = &graph.value(graph.outputs()[states + at]).fact;
            state.push(stack.finish(scanned.axis, scanned.backwards, element)?.into());
        }
        Ok(state)
    }
}

fn axes_and_directions(
    node: &mut NodeReader,
    axes: &str,
    directions: &str,
    count: usize,
) -> Result<Vec<Scanned>, ImportError> {
    let mut list = |name: &str| -> Result<Vec<i64>, ImportError> {
        let values = node.optional_ints(name)?.unwrap_or_else(|| vec![0; count]);
        if values.len() != count {
            return Err(node.corrupt(format!("attribute '{name}' has {} values, {count} expected", values.len())));
        }
        Ok(values)
    };
    let (axes, directions) = (list(axes)?, list(directions)?);
    if let Some(other) = directions.iter().find(|d| !(0..=1).contains(*d)) {
        return Err(node.corrupt(format!("a direction is {other}, expected 0 or 1")));
    }
    Ok(axes.into_iter().zip(directions).map(|(axis, d)| Scanned { axis, backwards: d == 1 }).collect())
}

/// `scan` for every sequence of a batch, the first axis of every input and output: a scan over the batch whose body is `scan`.
fn over_batch(scan: Scan, states: usize, captured: usize) -> Result<Op, OpError> {
    let inner = scan.body.graph();
    let text = |e: crate::GraphError| OpError::input(e.to_string());
    let mut graph = Graph::new(format!("{}.batch", inner.name));
    let mut arguments = Vec::new();
    for (at, &id) in inner.inputs().iter().enumerate() {
        let value = inner.value(id);
        let is_sequence = (states..scan.body.formal()).contains(&at);
        let fact = match is_sequence {
            true => {
                stacked_fact(&value.fact, scan.inputs[at - states].axis, Dim::symbol(format!("{}.length", value.name)))?
            }
            false => value.fact.clone(),
        };
        arguments.push(Some(graph.add_input(value.name.clone(), fact)));
    }
    let names: Vec<String> = inner.outputs().iter().map(|&o| format!("{}.batch", inner.value(o).name)).collect();
    let outputs = names.len();
    let formal = scan.body.formal();
    let node = graph.add_node("sequences", scan.into(), arguments, names).map_err(text)?;
    graph.set_outputs(graph.node(node).outputs.clone());
    let along = |count: usize| vec![Scanned::default(); count];
    let body = Subgraph::new(graph, captured).map_err(text)?;
    Ok(Scan { body, inputs: along(formal), outputs: along(outputs) }.into())
}
