//! The definition: every operator by its own plain evaluation, one node after the other.
//!
//! This is what other backends are tested against, so it has nothing to be clever with: no arena, no fusion, no layout, no
//! thread. It allocates every result and drops it after its last use.

use crate::{
    Backend, CompileError, CompileOptions, DeviceInfo, Executable, Footprint, Input, Output, PlacedNode, Placement,
    Precision, ResourceError, RunContext, RunError, RunLimits, Session, SessionMemory, Signature, Support,
    binding::{bind_inputs, check_outputs, check_result, shape_of},
    contract::{OpTiming, Work},
};
use cutover_graph::{
    Bindings, Fact, Graph, Node, NodeId, OpError, Plan, Source, TensorFact, ValueId,
    ops::{EvalContext, Facts, InferContext, Inputs},
};
use cutover_tensor::Value;
use std::{cell::Cell, collections::BTreeSet, sync::Arc, time::Instant};

/// The reference backend.
pub fn reference() -> Arc<dyn Backend> {
    Arc::new(Reference)
}

const NAME: &str = "reference";

struct Reference;

struct ReferenceExecutable {
    plan: Plan,
    signature: Signature,
    placement: Placement,
    footprint: Footprint,
    /// Indexed by [`ValueId::index`]; the constants of the plan.
    constants: Vec<Option<Value>>,
    steps: Vec<Step>,
}

struct Step {
    node: NodeId,
    op: String,
    /// Values that nothing after this step reads.
    release: Vec<ValueId>,
}

struct ReferenceSession {
    executable: Arc<ReferenceExecutable>,
    memory: SessionMemory,
}

impl Backend for Reference {
    fn describe(&self) -> DeviceInfo {
        DeviceInfo { backend: NAME, device: "any".to_string(), isa: "scalar".to_string(), threads: 1 }
    }

    fn supports(&self, _: &Graph, _: &Node) -> Support {
        Support::Native { kernel: NAME }
    }

    fn compile(&self, plan: &Plan, options: &CompileOptions) -> Result<Arc<dyn Executable>, CompileError> {
        if options.precision != Precision::F32 {
            let message = format!("the reference backend computes as the model says, not in {:?}", options.precision);
            return Err(CompileError::Options(message));
        }
        let graph = plan.graph();
        let constants = graph.values().map(|(_, value)| match &value.source {
            Source::Constant(constant) => Some(Value::Tensor(constant.tensor.clone())),
            _ => None,
        });
        let steps = steps(plan);
        Ok(Arc::new(ReferenceExecutable {
            signature: Signature::of(graph),
            placement: Placement { nodes: steps.iter().map(|step| place(graph, step)).collect() },
            footprint: footprint(graph, &steps),
            constants: constants.collect(),
            plan: plan.clone(),
            steps,
        }))
    }
}

fn steps(plan: &Plan) -> Vec<Step> {
    let graph = plan.graph();
    let mut live: BTreeSet<ValueId> = graph.outputs().iter().copied().collect();
    let mut steps: Vec<Step> = Vec::with_capacity(plan.order().len());
    // Backwards: the first reader met is the last to run. Outputs nobody reads go at once.
    for &node in plan.order().iter().rev() {
        let Node { op, inputs, outputs, .. } = graph.node(node);
        let release = outputs.iter().chain(inputs.iter().flatten()).copied();
        let release = release.filter(|&v| graph.constant(v).is_none() && live.insert(v)).collect();
        steps.push(Step { node, op: op.name(), release });
    }
    steps.reverse();
    steps
}

fn place(graph: &Graph, step: &Step) -> PlacedNode {
    let node = graph.node(step.node);
    let dtype = match node.outputs.first().map(|&output| &graph.value(output).fact) {
        Some(Fact::Tensor(fact)) => fact.dtype.to_string(),
        Some(other) => other.to_string(),
        None => String::new(),
    };
    let (node, op) = (node.name.clone(), step.op.clone());
    PlacedNode { node, op, backend: NAME, kernel: NAME.to_string(), dtype, reason: String::new() }
}

/// Peak bytes of results that are alive together, every symbol at 1.
fn footprint(graph: &Graph, steps: &[Step]) -> Footprint {
    let weights = graph.values().filter_map(|(id, _)| graph.constant(id));
    let weight_bytes = weights.map(|constant| constant.tensor.bytes().len() as u64).sum();
    let bytes = |id: ValueId| match &graph.value(id).fact {
        Fact::Tensor(TensorFact { dtype, shape: Some(dims), .. }) => {
            let mut symbols = BTreeSet::new();
            dims.iter().for_each(|dim| dim.collect_symbols(&mut symbols));
            let ones: Bindings = symbols.into_iter().map(|symbol| (symbol, 1)).collect();
            let shape = shape_of(dims, &ones);
            shape.and_then(|s| dtype.byte_len(s.checked_len()?)).unwrap_or(0) as u64
        }
        _ => 0,
    };
    let mut live: u64 = graph.inputs().iter().map(|&id| bytes(id)).sum();
    let mut peak = live;
    for step in steps {
        live += graph.node(step.node).outputs.iter().map(|&id| bytes(id)).sum::<u64>();
        peak = peak.max(live);
        live = live.saturating_sub(step.release.iter().map(|&id| bytes(id)).sum());
    }
    Footprint { weight_bytes, shared_bytes: 0, session_bytes: peak }
}

impl Executable for ReferenceExecutable {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn footprint(&self) -> Footprint {
        self.footprint
    }

    fn weights(&self, visit: &mut dyn FnMut(usize, u64)) {
        let tensors = self.constants.iter().flatten().filter_map(Value::as_tensor);
        tensors.for_each(|tensor| visit(tensor.bytes().as_ptr() as usize, tensor.bytes().len() as u64));
    }

    fn placement(&self) -> &Placement {
        &self.placement
    }

    fn session(self: Arc<Self>, memory: SessionMemory) -> Result<Box<dyn Session>, ResourceError> {
        let needed = self.footprint.session_bytes;
        match memory.budget_bytes {
            Some(available) if available < needed => {
                Err(ResourceError::Memory { what: "a session", needed, available })
            }
            _ => Ok(Box::new(ReferenceSession { executable: self, memory })),
        }
    }
}

/// The values of one run, and the bytes of those it made.
struct Run<'a> {
    constants: &'a [Option<Value>],
    values: Vec<Option<Value>>,
    held_bytes: u64,
    limit_bytes: u64,
    limits: RunLimits,
    /// How often graphs inside of nodes ran.
    trips: Cell<u64>,
}

impl Session for ReferenceSession {
    fn run(
        &mut self,
        inputs: &[Input<'_>],
        outputs: &mut [Output<'_>],
        context: &RunContext<'_>,
    ) -> Result<(), RunError> {
        let ReferenceExecutable { plan, signature, constants, steps, .. } = &*self.executable;
        let graph = plan.graph();
        let mut symbols = Bindings::new();
        bind_inputs(signature, inputs, &mut symbols)?;
        check_outputs(signature, outputs, &symbols)?;
        let limit_bytes = context.limits.arena_bytes.min(self.memory.budget_bytes.unwrap_or(u64::MAX));
        let values = vec![None; constants.len()];
        let (limits, trips) = (context.limits, Cell::new(0));
        let mut run = Run { constants, values, held_bytes: 0, limit_bytes, limits, trips };
        for (&id, input) in graph.inputs().iter().zip(inputs) {
            run.hold(
                id,
                match input {
                    Input::View(view) => {
                        run.reserve(view.bytes().len() as u64)?;
                        view.to_tensor().into()
                    }
                    Input::Value(value) => (*value).clone(),
                },
            );
        }
        for step in steps {
            let node = graph.node(step.node);
            context.check(&node.name)?;
            let start = context.profiler.map(|_| Instant::now());
            run.evaluate(node, &step.op)?;
            if let (Some(profiler), Some(start)) = (context.profiler, start) {
                let timing = OpTiming {
                    node: &node.name,
                    op: &step.op,
                    kernel: NAME,
                    duration: start.elapsed(),
                    work: Work::default(),
                };
                profiler.record(timing);
            }
            step.release.iter().for_each(|&id| run.release(id));
        }
        for ((binding, &id), output) in signature.outputs.iter().zip(graph.outputs()).zip(outputs) {
            let value = run.get(id).expect("every graph output has a source");
            match output {
                Output::Discard => {}
                Output::Allocate(place) => *place = Some(value.clone()),
                Output::Write(view) => match value {
                    Value::Tensor(tensor) => {
                        check_result(&binding.name, tensor.dtype(), tensor.shape(), view)?;
                        view.bytes_mut().copy_from_slice(tensor.bytes());
                    }
                    other => {
                        let kind = other.kind().to_string();
                        return Err(RunError::OutputKind { name: binding.name.clone(), kind });
                    }
                },
            }
        }
        Ok(())
    }
}

impl Run<'_> {
    fn get(&self, id: ValueId) -> Option<&Value> {
        self.values[id.index()].as_ref().or(self.constants[id.index()].as_ref())
    }

    fn evaluate(&mut self, node: &Node, op: &str) -> Result<(), RunError> {
        let at = |source| RunError::Op { node: node.name.clone(), op: op.to_string(), source };
        self.reserve(self.result_bytes(node).map_err(at)?)?;
        let inputs: Vec<Option<&Value>> = node.inputs.iter().map(|input| input.and_then(|id| self.get(id))).collect();
        let left = self.limit_bytes.saturating_sub(self.held_bytes);
        let context = EvalContext {
            outputs: node.outputs.len(),
            max_elements: usize::try_from(left).unwrap_or(usize::MAX).min(self.limits.elements),
            max_trips: self.limits.trips,
            trips: Some(&self.trips),
        };
        let results = node.op.eval(Inputs(&inputs), &context).map_err(at)?;
        if results.len() < node.outputs.len() {
            let message = format!("gave {} results, the node names {}", results.len(), node.outputs.len());
            return Err(at(OpError::unsupported(message)));
        }
        for (&id, value) in node.outputs.iter().zip(results) {
            self.hold(id, value);
        }
        Ok(())
    }

    /// Bytes that the node's results will take, from the shapes that are at hand now; those that only the evaluation
    /// itself can tell count nothing here and are bounded by [`EvalContext::max_elements`].
    fn result_bytes(&self, node: &Node) -> Result<u64, OpError> {
        let facts: Vec<Option<Fact>> = (node.inputs.iter())
            .map(|input| input.and_then(|id| self.get(id)))
            .map(|value| Some(Fact::Tensor(TensorFact::of_tensor(value?.as_tensor()?))))
            .collect();
        let is_tensor = |(input, fact): (&Option<ValueId>, &Option<Fact>)| input.is_none() == fact.is_none();
        if !node.inputs.iter().zip(&facts).all(is_tensor) {
            return Ok(0);
        }
        let facts: Vec<Option<&Fact>> = facts.iter().map(Option::as_ref).collect();
        let context = InferContext { node: &node.name, outputs: node.outputs.len() };
        let results = node.op.infer(Facts(&facts), &context)?;
        let bytes = |fact: &Fact| {
            let fact = fact.as_tensor()?;
            let shape = shape_of(fact.shape.as_ref()?, &Bindings::new())?;
            let bytes = shape.checked_len().and_then(|n| fact.dtype.byte_len(n));
            Some(bytes.map_or(u64::MAX, |bytes| bytes as u64))
        };
        Ok(results.iter().filter_map(bytes).fold(0, u64::saturating_add))
    }

    fn reserve(&self, bytes: u64) -> Result<(), RunError> {
        let needed = self.held_bytes.saturating_add(bytes);
        if needed > self.limit_bytes {
            let available = self.limit_bytes;
            return Err(ResourceError::Memory { what: "a run, for its results,", needed, available }.into());
        }
        Ok(())
    }

    fn hold(&mut self, id: ValueId, value: Value) {
        self.held_bytes += value.byte_size();
        self.values[id.index()] = Some(value);
    }

    fn release(&mut self, id: ValueId) {
        if let Some(value) = self.values[id.index()].take() {
            self.held_bytes -= value.byte_size();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cancellation, OpTiming, Profiler};
    use cutover_graph::{
        Dim,
        ops::{Unary, UnaryFunction},
    };
    use cutover_tensor::{DType, Tensor, TensorView, TensorViewMut};
    use std::sync::Mutex;

    /// `y = relu(-x)` with `x [N]`; the graph's outputs are `y` and `x` itself.
    fn executable() -> Arc<dyn Executable> {
        let mut graph = Graph::new("test");
        let x = graph.add_input("x", TensorFact::new(DType::F32, vec![Dim::symbol("N")]));
        let mut last = x;
        for (function, output) in [(UnaryFunction::Neg, "n"), (UnaryFunction::Relu, "y")] {
            let op = Unary { function }.into();
            let node = graph.add_node(format!("make_{output}"), op, vec![Some(last)], vec![output.into()]).unwrap();
            last = graph.node(node).outputs[0];
        }
        graph.set_outputs(vec![last, x]);
        reference().compile(&Plan::new(graph).unwrap(), &CompileOptions::default()).unwrap()
    }

    fn run(x: &[f32], y: &mut [f32], context: &RunContext<'_>) -> Result<Tensor, RunError> {
        let mut session = executable().session(SessionMemory::default()).unwrap();
        let shape = [y.len()];
        let mut outputs = [Output::Write(TensorViewMut::new(&shape, y).unwrap()), Output::Allocate(None)];
        let shape = [x.len()];
        session.run(&[Input::View(TensorView::new(&shape, x).unwrap())], &mut outputs, context)?;
        match outputs {
            [_, Output::Allocate(Some(Value::Tensor(tensor)))] => Ok(tensor),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn results_go_where_the_caller_says() {
        let mut y = [9.0; 3];
        let x = run(&[1.0, -2.0, 0.5], &mut y, &RunContext::default()).unwrap();
        assert_eq!(y, [0.0, 2.0, 0.0]);
        assert_eq!(x.to_vec::<f32>().unwrap(), [1.0, -2.0, 0.5]);
        let error = run(&[1.0], &mut y, &RunContext::default()).unwrap_err();
        assert_eq!(error.to_string(), "output 'y': the result is f32 [1], the buffer is f32 [3]");
    }

    #[test]
    fn a_run_stops_at_its_deadline_cancellation_and_limit() {
        let check = |context: RunContext<'_>, expected: &str| {
            let error = run(&[1.0, 2.0], &mut [0.0; 2], &context).unwrap_err();
            assert_eq!(error.to_string(), expected);
        };
        let default = RunContext::default();
        check(RunContext { deadline: Some(Instant::now()), ..default }, "the deadline passed before node 'make_n'");
        let cancellation = Cancellation::default();
        cancellation.cancel();
        check(RunContext { cancellation: Some(&cancellation), ..default }, "cancelled before node 'make_n'");
        check(
            RunContext { limits: RunLimits { arena_bytes: 15, ..RunLimits::default() }, ..default },
            "a run, for its results, needs 16 bytes, 15 are available",
        );
    }

    #[test]
    fn a_profiler_hears_of_every_node() {
        struct Names(Mutex<Vec<String>>);
        impl Profiler for Names {
            fn record(&self, timing: OpTiming<'_>) {
                self.0.lock().unwrap().push(format!("{} {} {}", timing.node, timing.op, timing.kernel));
            }
        }
        let names = Names(Mutex::new(Vec::new()));
        run(&[1.0], &mut [0.0], &RunContext { profiler: Some(&names), ..RunContext::default() }).unwrap();
        assert_eq!(*names.0.lock().unwrap(), ["make_n Neg reference", "make_y Relu reference"]);
    }

    #[test]
    fn values_are_dropped_after_their_last_use() {
        let executable = executable();
        assert_eq!(executable.footprint(), Footprint { weight_bytes: 0, shared_bytes: 0, session_bytes: 12 });
        assert_eq!(executable.placement().nodes[1].op, "Relu");
        // `x` and `y` are outputs, `n` goes after its use: two of the three are alive at a time, plus the one being made.
        let limits = RunLimits { arena_bytes: 12, ..RunLimits::default() };
        assert!(run(&[1.0], &mut [0.0], &RunContext { limits, ..RunContext::default() }).is_ok());
    }
}
