//! A graph compiled: its schedule, and how a run goes through it.
//!
//! The graphs inside operators are programs too, run by the same session in the same memory.

use super::{
    Device, eager, lower,
    plan::{self, NoPlan, Setting, ShapePlan, Undecided},
    schedule::{Piece, Schedule},
    segment::{Memory, Segment},
};
use crate::{
    CompileOptions, Input, OpTiming, Output, PlacedNode, ResourceError, RunContext, RunError, Support, Work, binding,
    compose,
};
use cutover_graph::{
    Bindings, Fact, GraphError, Node, NodeId, OpError, Plan, TensorFact, ValueId,
    ops::{EvalContext, Inputs},
};
use cutover_tensor::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

pub(super) struct Program {
    device: Arc<Device>,
    plan: Plan,
    options: CompileOptions,
    /// Whether it is a graph inside an operator.
    is_body: bool,
    /// The programs of a node's graphs.
    bodies: BTreeMap<NodeId, Vec<Program>>,
    names: Names,
    /// By value: constants, and what is known of them.
    constants: Vec<Option<Value>>,
    facts: Vec<Option<Fact>>,
    /// By value: which input of the graph it is.
    input_at: Vec<Option<usize>>,
    schedule: Mutex<Arc<Schedule>>,
    /// Kernels that the first plan chose by shapes; the reference's evaluation where there is none for a node's attributes or shapes.
    chosen: OnceLock<BTreeMap<NodeId, &'static str>>,
}

/// Names of nodes and their operators, for profiles and errors.
pub(super) struct Names(BTreeMap<NodeId, Name>);

pub(super) struct Name {
    pub node: String,
    pub op: String,
}

impl Names {
    /// # Panics
    /// If the node is of another graph.
    pub fn of(&self, node: NodeId) -> &Name {
        &self.0[&node]
    }
}

/// A run and what it holds.
pub(super) struct Run<'a> {
    pub context: &'a RunContext<'a>,
    pub memory: &'a mut Memory,
    /// Bytes of values between the pieces of the programs that are running.
    pub held_bytes: u64,
    /// How long bodies of nodes took.
    pub inside: Duration,
    /// How often bodies of nodes ran.
    pub trips: u64,
}

impl Run<'_> {
    fn limit_bytes(&self) -> u64 {
        self.memory.budget.budget_bytes.unwrap_or(u64::MAX).min(self.context.limits.arena_bytes)
    }

    fn hold(&mut self, bytes: u64) -> Result<(), RunError> {
        let (needed, available) = (self.held_bytes.saturating_add(bytes), self.limit_bytes());
        if needed > available {
            return Err(ResourceError::Memory { what: "a run, for its results,", needed, available }.into());
        }
        self.held_bytes = needed;
        Ok(())
    }
}

impl Program {
    pub fn new(
        device: &Arc<Device>,
        plan: &Plan,
        options: CompileOptions,
        is_body: bool,
    ) -> Result<Program, GraphError> {
        let plan = compose::compose(plan)?;
        let graph = plan.graph();
        let mut bodies = BTreeMap::new();
        for (id, node) in graph.nodes() {
            let compile = |of: &cutover_graph::ops::Subgraph| {
                Program::new(device, &Plan::new(of.graph().clone())?, options, true)
            };
            let programs = node.op.subgraphs().into_iter().map(compile).collect::<Result<Vec<_>, _>>()?;
            if !programs.is_empty() {
                bodies.insert(id, programs);
            }
        }
        let count = graph.value_count();
        let (mut constants, mut facts, mut input_at) = (vec![None; count], vec![None; count], vec![None; count]);
        for (id, _) in graph.values() {
            if let Some(constant) = graph.constant(id) {
                constants[id.index()] = Some(Value::Tensor(constant.tensor.clone()));
                facts[id.index()] = Some(Fact::Tensor(TensorFact::of_tensor(&constant.tensor)));
            }
        }
        graph.inputs().iter().enumerate().for_each(|(at, id)| input_at[id.index()] = Some(at));
        let name = |(id, node): (NodeId, &Node)| (id, Name { node: node.name.clone(), op: node.op.name() });
        let names = Names(graph.nodes().map(name).collect());
        let schedule = Schedule::guess(&plan, Setting { graph, constants: &facts, options }, is_body);
        Ok(Program {
            device: Arc::clone(device),
            plan,
            options,
            is_body,
            bodies,
            names,
            constants,
            facts,
            input_at,
            schedule: Mutex::new(Arc::new(schedule)),
            chosen: OnceLock::new(),
        })
    }

    fn setting(&self) -> Setting<'_> {
        Setting { graph: self.plan.graph(), constants: &self.facts, options: self.options }
    }

    fn schedule(&self) -> Arc<Schedule> {
        Arc::clone(&self.schedule.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes into account what running `schedule` has shown.
    fn learn(&self, schedule: &Arc<Schedule>, undecided: &Undecided) -> Result<(), RunError> {
        let mut current = self.schedule.lock().unwrap_or_else(PoisonError::into_inner);
        match current.corrected(&self.plan, undecided, self.is_body) {
            Some(corrected) => *current = Arc::new(corrected),
            // Another run may have learned the same.
            None if !Arc::ptr_eq(&current, schedule) => {}
            None => {
                let node = undecided.late.iter().chain(&undecided.interpreted).next();
                let name = node.map(|&id| self.names.of(id));
                return Err(RunError::Op {
                    node: name.map(|n| n.node.clone()).unwrap_or_default(),
                    op: name.map(|n| n.op.clone()).unwrap_or_default(),
                    source: OpError::unsupported("a shape that nothing decides"),
                });
            }
        }
        Ok(())
    }

    /// Plans what shapes are known of: static ones now and for good, symbolic ones at 1, to know how much they take and what falls
    /// back. Gives the plan of the first segment.
    pub fn prepare(&self) -> Result<Option<Arc<ShapePlan>>, RunError> {
        self.bodies.values().flatten().try_for_each(|body| body.prepare().map(drop))?;
        let plan = self.first_plan()?;
        let steps = plan.iter().flat_map(|plan| &plan.steps);
        let chosen = steps.filter_map(|step| match &step.lowered {
            lower::Lowered::Fallback(_) => Some((step.node, "reference")),
            lower::Lowered::Conv(_)
            | lower::Lowered::Product(_)
            | lower::Lowered::Expanded(_)
            | lower::Lowered::Attention(_) => Some((step.node, step.kernel)),
            _ => None,
        });
        // What was found first stays.
        let _ = self.chosen.set(chosen.collect());
        Ok(plan)
    }

    /// Whether all of the graph's inputs are tensors of known extents, so that it can be planned for good before it runs.
    pub fn is_static(&self) -> bool {
        let graph = self.plan.graph();
        let mut facts = graph.inputs().iter().map(|&id| graph.value(id).fact.as_tensor());
        facts.all(|fact| fact.is_some_and(|fact| fact.constant_shape().is_some()))
    }

    fn first_plan(&self) -> Result<Option<Arc<ShapePlan>>, RunError> {
        loop {
            let schedule = self.schedule();
            let Some(Piece::Segment(segment)) = schedule.pieces.first() else { return Ok(None) };
            let graph = self.plan.graph();
            let facts: Option<Vec<&TensorFact>> =
                segment.region.inputs.iter().map(|&id| graph.value(id).fact.as_tensor()).collect();
            let mut symbols = BTreeSet::new();
            let Some(facts) = facts else { return Ok(None) };
            facts.iter().filter_map(|f| f.shape.as_ref()).flatten().for_each(|d| d.collect_symbols(&mut symbols));
            let is_static = symbols.is_empty();
            let ones: Bindings = symbols.into_iter().map(|s| (s, 1)).collect();
            let concrete = facts.iter().map(|fact| {
                let shape = binding::shape_of(fact.shape.as_ref()?, &ones)?;
                Some(TensorFact::of_constant_shape(fact.dtype, &shape))
            });
            let Some(concrete) = concrete.collect::<Option<Vec<_>>>() else { return Ok(None) };
            match segment.plan(self.setting(), &self.device, &concrete) {
                Ok(plan) => {
                    let plan = Arc::new(plan);
                    // A guess is often right: a batch of one.
                    if is_static || !segment.has_plan() {
                        segment.keep(Arc::clone(&plan), &self.device);
                    }
                    return Ok(Some(plan));
                }
                Err(NoPlan::Error(RunError::Resource(error))) if is_static => return Err(error.into()),
                // Elements that only a run has may decide it.
                Err(NoPlan::Undecided(undecided)) if !self.may_be_decided(segment, &undecided) => {
                    self.learn(&schedule, &undecided)?;
                }
                Err(_) => return Ok(None),
            }
        }
    }

    /// Whether elements of the segment's inputs may be what a node waits for.
    fn may_be_decided(&self, segment: &Segment, undecided: &Undecided) -> bool {
        let could = |&id: &ValueId| plan::could_be_known(&self.plan.graph().value(id).fact);
        !undecided.is_empty() && segment.region.inputs.iter().any(could)
    }

    /// Where the nodes run, those inside operators after their own.
    pub fn place(&self, placed: &mut Vec<PlacedNode>) {
        let graph = self.plan.graph();
        let schedule = self.schedule();
        for &id in self.plan.order() {
            let node = graph.node(id);
            let dtype = node.outputs.first().map(|&o| match &graph.value(o).fact {
                Fact::Tensor(fact) => fact.dtype.to_string(),
                other => other.to_string(),
            });
            let support = match schedule.is_interpreted(id) {
                true => eager::support(&node.op),
                false => lower::support(graph, node),
            };
            let (kernel, reason) = match support {
                Support::Native { kernel } => match self.chosen.get().and_then(|chosen| chosen.get(&id)) {
                    Some(&"reference") => {
                        ("reference".to_string(), "no kernel for these attributes or shapes".to_string())
                    }
                    chosen => (chosen.copied().unwrap_or(kernel).to_string(), String::new()),
                },
                Support::Fallback { reason } | Support::No { reason } => ("reference".to_string(), reason),
            };
            let Name { node, op } = self.names.of(id);
            let (node, op, dtype) = (node.clone(), op.clone(), dtype.unwrap_or_default());
            placed.push(PlacedNode { node, op, backend: super::NAME, kernel, dtype, reason });
            for body in self.bodies.get(&id).into_iter().flatten() {
                body.place(placed);
            }
        }
    }

    /// Whether all of it is one segment.
    pub fn is_whole(&self) -> bool {
        self.schedule().is_whole
    }

    /// Bytes of the constants, those inside operators too.
    pub fn constant_bytes(&self) -> u64 {
        let own: u64 = self.constants.iter().flatten().map(Value::byte_size).sum();
        own + self.bodies.values().flatten().map(Program::constant_bytes).sum::<u64>()
    }

    /// Runs it on the graph's inputs, in their order.
    pub fn run(&self, inputs: &[Input<'_>], outputs: &mut [Output<'_>], run: &mut Run<'_>) -> Result<(), RunError> {
        let held_bytes = run.held_bytes;
        loop {
            let schedule = self.schedule();
            let done = match schedule.pieces.as_slice() {
                [Piece::Segment(segment)] if schedule.is_whole => {
                    segment.run(self.setting(), &self.device, &self.names, inputs, outputs, run)
                }
                _ => self.run_pieces(&schedule, inputs, outputs, run),
            };
            run.held_bytes = held_bytes;
            match done {
                Ok(()) => return Ok(()),
                Err(NoPlan::Error(error)) => return Err(error),
                Err(NoPlan::Undecided(undecided)) => self.learn(&schedule, &undecided)?,
            }
        }
    }

    fn run_pieces(
        &self,
        schedule: &Schedule,
        inputs: &[Input<'_>],
        outputs: &mut [Output<'_>],
        run: &mut Run<'_>,
    ) -> Result<(), NoPlan> {
        let graph = self.plan.graph();
        let mut values = Values { program: self, inputs, made: vec![None; graph.value_count()] };
        for (piece, released) in schedule.pieces.iter().zip(&schedule.released) {
            match piece {
                Piece::Segment(segment) => {
                    let given: Vec<Input<'_>> = segment.region.inputs.iter().map(|&id| values.input(id)).collect();
                    let mut places: Vec<Output<'_>> =
                        segment.region.outputs.iter().map(|_| Output::Allocate(None)).collect();
                    segment.run(self.setting(), &self.device, &self.names, &given, &mut places, run)?;
                    for (&id, place) in segment.region.outputs.iter().zip(places) {
                        let Output::Allocate(Some(value)) = place else { unreachable!("a segment makes its outputs") };
                        values.hold(id, value, run)?;
                    }
                }
                Piece::Node(id) => {
                    let node = graph.node(*id);
                    node.inputs.iter().flatten().for_each(|&id| values.own(id));
                    let results = self.interpret(*id, node, &values, run)?;
                    for (&id, value) in node.outputs.iter().zip(results) {
                        values.hold(id, value, run)?;
                    }
                }
            }
            for id in released {
                let released = values.made[id.index()].take();
                // What an input was copied for was not counted.
                let counted = released.as_ref().filter(|_| self.input_at[id.index()].is_none());
                run.held_bytes -= counted.map_or(0, Value::byte_size);
            }
        }
        for (&id, output) in graph.outputs().iter().zip(outputs) {
            if let Output::Discard = output {
                continue;
            }
            values.own(id);
            let Some(value) = values.get(id) else { unreachable!("every graph output has a source") };
            match (output, value) {
                (Output::Discard, _) => {}
                (Output::Allocate(place), value) => *place = Some(value.clone()),
                (Output::Write(view), Value::Tensor(tensor)) => {
                    binding::check_result(&graph.value(id).name, tensor.dtype(), tensor.shape(), view)?;
                    view.bytes_mut().copy_from_slice(tensor.bytes());
                }
                (Output::Write(_), other) => {
                    let kind = other.kind().to_string();
                    return Err(RunError::OutputKind { name: graph.value(id).name.clone(), kind }.into());
                }
            }
        }
        Ok(())
    }

    /// One node by itself.
    fn interpret(
        &self,
        id: NodeId,
        node: &Node,
        values: &Values<'_>,
        run: &mut Run<'_>,
    ) -> Result<Vec<Value>, RunError> {
        let Name { node: name, op } = self.names.of(id);
        run.context.check(name)?;
        let start = run.context.profiler.map(|profiler| (profiler, Instant::now(), run.inside));
        let inputs: Vec<Option<&Value>> = node.inputs.iter().map(|input| input.and_then(|id| values.get(id))).collect();
        let left = run.limit_bytes().saturating_sub(run.held_bytes);
        let limits = run.context.limits;
        let context = EvalContext {
            outputs: node.outputs.len(),
            max_elements: usize::try_from(left).unwrap_or(usize::MAX).min(limits.elements),
            max_trips: limits.trips,
            trips: None,
        };
        let bodies = self.bodies.get(&id).map(Vec::as_slice).unwrap_or_default();
        let of_body = node.op.eval_with(Inputs(&inputs), &context, &mut |which, given| {
            run.context.check(name)?;
            run.trips += 1;
            if run.trips > limits.trips {
                return Err(OpError::Resource(format!("a loop of more than {} iterations", limits.trips)).into());
            }
            let start = run.context.profiler.map(|_| (Instant::now(), run.inside));
            let results = bodies[which].run_values(&given, run);
            if let Some((start, inside)) = start {
                run.inside = inside + start.elapsed();
            }
            Ok(results?)
        });
        let results = match of_body {
            Some(results) => results,
            None => eager::eval(&node.op, Inputs(&inputs), &context).map_err(Failure::Op),
        };
        let at = |source| RunError::Op { node: name.clone(), op: op.clone(), source };
        let results = results.map_err(|failure| match failure {
            Failure::Op(source) => at(source),
            Failure::Run(error) => error,
        })?;
        if results.len() < node.outputs.len() {
            let message = format!("gave {} results, the node names {}", results.len(), node.outputs.len());
            return Err(at(OpError::unsupported(message)));
        }
        if let Some((profiler, start, inside)) = start {
            let duration = start.elapsed().saturating_sub(run.inside - inside);
            profiler.record(OpTiming {
                node: name,
                op,
                kernel: eager::kernel(&node.op),
                duration,
                work: Work::default(),
            });
        }
        Ok(results)
    }

    fn run_values(&self, given: &[Value], run: &mut Run<'_>) -> Result<Vec<Value>, RunError> {
        let graph = self.plan.graph();
        if given.len() != graph.inputs().len() {
            return Err(RunError::InputCount { expected: graph.inputs().len(), actual: given.len() });
        }
        let inputs: Vec<Input<'_>> = given.iter().map(Input::Value).collect();
        let mut outputs: Vec<Output<'_>> = graph.outputs().iter().map(|_| Output::Allocate(None)).collect();
        self.run(&inputs, &mut outputs, run)?;
        let value = |output| match output {
            Output::Allocate(Some(value)) => value,
            _ => unreachable!("every output was asked for"),
        };
        Ok(outputs.into_iter().map(value).collect())
    }
}

/// Why a node with graphs of its own failed: itself, or what one of them ran.
enum Failure {
    Op(OpError),
    Run(RunError),
}

impl From<OpError> for Failure {
    fn from(error: OpError) -> Failure {
        Failure::Op(error)
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Failure {
        Failure::Run(error)
    }
}

/// The values of a graph while it runs.
struct Values<'a> {
    program: &'a Program,
    inputs: &'a [Input<'a>],
    /// By value: what pieces made, and inputs that had to be copied.
    made: Vec<Option<Value>>,
}

impl Values<'_> {
    fn get(&self, id: ValueId) -> Option<&Value> {
        let given = || match &self.inputs[self.program.input_at[id.index()]?] {
            Input::Value(value) => Some(*value),
            Input::View(_) => None,
        };
        self.made[id.index()].as_ref().or(self.program.constants[id.index()].as_ref()).or_else(given)
    }

    /// As a segment takes it.
    fn input(&self, id: ValueId) -> Input<'_> {
        match (self.get(id), self.program.input_at[id.index()]) {
            (Some(value), _) => Input::Value(value),
            (None, Some(at)) => self.inputs[at].clone(),
            (None, None) => unreachable!("a piece runs after what it reads is made"),
        }
    }

    /// Copies an input that is the caller's memory, where it is to be had as a value.
    fn own(&mut self, id: ValueId) {
        if self.get(id).is_none()
            && let Some(at) = self.program.input_at[id.index()]
            && let Input::View(view) = &self.inputs[at]
        {
            self.made[id.index()] = Some(Value::Tensor(view.to_tensor()));
        }
    }

    fn hold(&mut self, id: ValueId, value: Value, run: &mut Run<'_>) -> Result<(), RunError> {
        run.hold(value.byte_size())?;
        self.made[id.index()] = Some(value);
        Ok(())
    }
}
