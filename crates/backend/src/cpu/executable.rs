//! A compiled plan, and its sessions.

use super::{
    Device, NAME, dynamic,
    frame::{Frame, Place, Worker},
    lower,
    plan::{self, NoPlan, ShapePlan},
    pool::{Barrier, BreakOnPanic},
};
use crate::{
    CompileError, Executable, Footprint, Input, OpTiming, Output, PlacedNode, Placement, ResourceError, RunContext,
    RunError, Session, SessionMemory, Signature, Support, binding,
};
use cutover_graph::{Bindings, Fact, Plan};
use cutover_tensor::{DType, Shape, Tensor, TensorView, Value};
use memmap2::MmapMut;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool, atomic::Ordering},
    time::Instant,
};

/// Shape plans that are kept; the one used longest ago goes first.
const SHAPES_KEPT: usize = 16;

pub(super) struct CpuExecutable {
    device: Arc<Device>,
    plan: Plan,
    /// Names of the nodes' operators, for profiles and errors.
    op_names: BTreeMap<cutover_graph::NodeId, String>,
    signature: Signature,
    placement: Placement,
    footprint: Footprint,
    /// The latest used last.
    shapes: Mutex<Vec<Arc<ShapePlan>>>,
    /// Set once a run has shown that only data decides the shapes.
    is_dynamic: AtomicBool,
}

impl CpuExecutable {
    pub fn new(device: Arc<Device>, plan: &Plan) -> Result<Arc<CpuExecutable>, CompileError> {
        let graph = plan.graph();
        let signature = Signature::of(graph);
        let op_names = graph.nodes().map(|(id, node)| (id, node.op.name())).collect();
        let mut executable = CpuExecutable {
            device,
            plan: plan.clone(),
            op_names,
            signature,
            placement: Placement::default(),
            footprint: Footprint::default(),
            shapes: Mutex::default(),
            is_dynamic: AtomicBool::new(false),
        };
        executable.placement = executable.place();
        // Static shapes are planned and their weights packed now; symbolic ones at 1, to know the footprint, as far as that goes.
        let mut symbols = BTreeSet::new();
        let facts = executable.signature.inputs.iter().filter_map(|b| b.fact.as_tensor());
        facts.filter_map(|f| f.shape.as_ref()).flatten().for_each(|d| d.collect_symbols(&mut symbols));
        let is_static = symbols.is_empty();
        let ones: Bindings = symbols.into_iter().map(|s| (s, 1)).collect();
        let shapes = executable.signature.inputs.iter().map(|b| {
            let fact = b.fact.as_tensor()?;
            Some((fact.dtype, binding::shape_of(fact.shape.as_ref()?, &ones)?))
        });
        if let Some(shapes) = shapes.collect::<Option<Vec<_>>>() {
            match plan::build(plan, &executable.device, &shapes) {
                Ok(shape_plan) => {
                    executable.footprint = footprint(plan, Some(&shape_plan));
                    executable.note_fallbacks(&shape_plan);
                    if is_static {
                        executable.shapes = Mutex::new(vec![Arc::new(shape_plan)]);
                    }
                }
                Err(NoPlan::Error(RunError::Resource(error))) if is_static => return Err(error.into()),
                _ => executable.footprint = footprint(plan, None),
            }
        } else {
            executable.footprint = footprint(plan, None);
        }
        Ok(Arc::new(executable))
    }

    fn place(&self) -> Placement {
        let graph = self.plan.graph();
        let place = |&id: &cutover_graph::NodeId| {
            let node = graph.node(id);
            let dtype = node.outputs.first().map(|&o| match &graph.value(o).fact {
                Fact::Tensor(fact) => fact.dtype.to_string(),
                other => other.to_string(),
            });
            let (kernel, reason) = match lower::support(graph, node) {
                Support::Native { kernel } => (kernel.to_string(), String::new()),
                Support::Fallback { reason } | Support::No { reason } => ("reference".to_string(), reason),
            };
            let (node, op) = (node.name.clone(), node.op.name());
            PlacedNode { node, op, backend: NAME, kernel, dtype: dtype.unwrap_or_default(), reason }
        };
        Placement { nodes: self.plan.order().iter().map(place).collect() }
    }

    /// Says of the nodes that fell back for their attributes or shapes that they did.
    fn note_fallbacks(&mut self, shapes: &ShapePlan) {
        let steps = shapes.steps.iter().filter(|step| matches!(step.lowered, lower::Lowered::Fallback(_)));
        let fallen: BTreeSet<_> = steps.map(|step| step.node).collect();
        for (id, placed) in self.plan.order().iter().zip(&mut self.placement.nodes) {
            if fallen.contains(id) && placed.reason.is_empty() {
                placed.kernel = "reference".to_string();
                placed.reason = "no kernel for these attributes or shapes".to_string();
            }
        }
    }

    /// The plan for inputs of these shapes: a kept one, or a new one. `None` where only data decides.
    fn shape_plan(&self, inputs: &[Input<'_>]) -> Result<Option<Arc<ShapePlan>>, RunError> {
        if self.is_dynamic.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let is_for = |plan: &ShapePlan| {
            plan.inputs.iter().zip(inputs).all(|(a, b)| view(b).is_some_and(|b| a[..] == *b.shape()))
        };
        let mut shapes = self.shapes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = shapes.iter().position(|plan| is_for(plan)) {
            let plan = shapes.remove(at);
            shapes.push(Arc::clone(&plan));
            return Ok(Some(plan));
        }
        drop(shapes);
        let of = |input: &Input<'_>| view(input).map(|v| (v.dtype(), Shape::new(v.shape())));
        let Some(concrete) = inputs.iter().map(of).collect::<Option<Vec<(DType, Shape)>>>() else { return Ok(None) };
        match plan::build(&self.plan, &self.device, &concrete) {
            Ok(plan) => {
                let plan = Arc::new(plan);
                let mut shapes = self.shapes.lock().unwrap_or_else(PoisonError::into_inner);
                if shapes.len() >= SHAPES_KEPT {
                    shapes.remove(0);
                }
                shapes.push(Arc::clone(&plan));
                Ok(Some(plan))
            }
            Err(NoPlan::Dynamic) => {
                self.is_dynamic.store(true, Ordering::Relaxed);
                Ok(None)
            }
            Err(NoPlan::Error(error)) => Err(error),
        }
    }
}

fn view<'a>(input: &'a Input<'_>) -> Option<TensorView<'a>> {
    match input {
        Input::View(view) => Some(*view),
        Input::Value(value) => value.as_tensor().map(Tensor::view),
    }
}

/// What a plan's weights take: packed ones, and those that are used as they are.
fn footprint(plan: &Plan, shapes: Option<&ShapePlan>) -> Footprint {
    let Some(shapes) = shapes else {
        let graph = plan.graph();
        let constants = graph.values().filter_map(|(id, _)| graph.constant(id));
        let weight_bytes = constants.map(|c| c.tensor.bytes().len() as u64).sum();
        return Footprint { weight_bytes, ..Footprint::default() };
    };
    let mut footprint = Footprint { session_bytes: shapes.arena_bytes as u64, ..Footprint::default() };
    for placed in &shapes.placed {
        match &placed.place {
            Place::Packed(packed) => {
                footprint.weight_bytes += packed.bytes();
                // This plan holds one reference; another executable's plan would hold one more.
                if Arc::strong_count(packed) > 1 {
                    footprint.shared_bytes += packed.bytes();
                }
            }
            Place::Constant(tensor) => footprint.weight_bytes += tensor.bytes().len() as u64,
            _ => {}
        }
    }
    footprint
}

impl Executable for CpuExecutable {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn footprint(&self) -> Footprint {
        self.footprint
    }

    fn placement(&self) -> &Placement {
        &self.placement
    }

    fn session(self: Arc<Self>, memory: SessionMemory) -> Result<Box<dyn Session>, ResourceError> {
        Ok(Box::new(CpuSession {
            executable: self,
            memory,
            shapes: None,
            arena: None,
            symbols: Bindings::new(),
            addresses: Addresses::default(),
        }))
    }
}

struct CpuSession {
    executable: Arc<CpuExecutable>,
    memory: SessionMemory,
    /// Of the last run.
    shapes: Option<Arc<ShapePlan>>,
    /// Buffers, then every thread's workspace.
    arena: Option<MmapMut>,
    symbols: Bindings,
    addresses: Addresses,
}

/// Where inputs and outputs of a run lie; kept so that a run allocates nothing for them.
#[derive(Default)]
struct Addresses {
    inputs: Vec<*const u8>,
    outputs: Vec<*mut u8>,
    /// Aligned copies of inputs that were not, and places for outputs that the caller gave none for.
    owned: Vec<Tensor>,
}

// SAFETY: the addresses are used only during the run that set them.
unsafe impl Send for CpuSession {}

impl Session for CpuSession {
    fn run(
        &mut self,
        inputs: &[Input<'_>],
        outputs: &mut [Output<'_>],
        context: &RunContext<'_>,
    ) -> Result<(), RunError> {
        let executable = Arc::clone(&self.executable);
        let signature = &executable.signature;
        binding::bind_inputs(signature, inputs, &mut self.symbols)?;
        binding::check_outputs(signature, outputs, &self.symbols)?;
        let is_same = |plan: &Arc<ShapePlan>| {
            plan.inputs.iter().zip(inputs).all(|(a, b)| view(b).is_some_and(|b| a[..] == *b.shape()))
        };
        let shapes = match self.shapes.take().filter(is_same) {
            Some(plan) => plan,
            None => match executable.shape_plan(inputs)? {
                Some(plan) => plan,
                None => return run_dynamic(&executable, inputs, outputs, context),
            },
        };
        let result = self.run_planned(&executable, &shapes, inputs, outputs, context);
        self.addresses.owned.clear();
        self.shapes = Some(shapes);
        result
    }
}

fn run_dynamic(
    executable: &CpuExecutable,
    inputs: &[Input<'_>],
    outputs: &mut [Output<'_>],
    context: &RunContext<'_>,
) -> Result<(), RunError> {
    let value = |input: &Input<'_>| match input {
        Input::View(view) => Value::Tensor(view.to_tensor()),
        Input::Value(value) => (*value).clone(),
    };
    let results = dynamic::run(&executable.plan, inputs.iter().map(value).collect(), context)?;
    for ((output, value), bound) in outputs.iter_mut().zip(results).zip(&executable.signature.outputs) {
        match (output, value) {
            (Output::Discard, _) => {}
            (Output::Allocate(place), value) => *place = Some(value),
            (Output::Write(view), Value::Tensor(tensor)) => {
                binding::check_result(&bound.name, tensor.dtype(), tensor.shape(), view)?;
                view.bytes_mut().copy_from_slice(tensor.bytes());
            }
            (Output::Write(_), other) => {
                return Err(RunError::OutputKind { name: bound.name.clone(), kind: other.kind().to_string() });
            }
        }
    }
    Ok(())
}

impl CpuSession {
    /// The arena of at least `bytes`, and where it begins.
    fn reserve(&mut self, bytes: usize, context: &RunContext<'_>) -> Result<*mut u8, RunError> {
        let limit = self.memory.budget_bytes.unwrap_or(u64::MAX).min(context.limits.arena_bytes);
        if bytes as u64 > limit {
            return Err(
                ResourceError::Memory { what: "a session's arena", needed: bytes as u64, available: limit }.into()
            );
        }
        if self.arena.as_ref().is_none_or(|arena| arena.len() < bytes) {
            // The old one first: both together may be more than there is.
            self.arena = None;
            let map = MmapMut::map_anon(bytes.max(1)).map_err(|error| {
                RunError::Resource(ResourceError::System { what: "a session's arena", message: error.to_string() })
            })?;
            self.arena = Some(map);
        }
        Ok(self.arena.as_mut().map_or(std::ptr::null_mut(), |arena| arena.as_mut_ptr()))
    }

    fn run_planned(
        &mut self,
        executable: &CpuExecutable,
        shapes: &ShapePlan,
        inputs: &[Input<'_>],
        outputs: &mut [Output<'_>],
        context: &RunContext<'_>,
    ) -> Result<(), RunError> {
        let pool = &executable.device.pool;
        let workspace_bytes = shapes.workspace_len * size_of::<f32>();
        let arena = self.reserve(shapes.arena_bytes + workspace_bytes * pool.threads(), context)?;
        let Addresses { inputs: input_at, outputs: output_at, owned } = &mut self.addresses;
        input_at.clear();
        output_at.clear();
        for input in inputs {
            let Some(view) = view(input) else { unreachable!("a shape plan is of tensors alone") };
            let alignment = (view.dtype().bits() / 8).clamp(1, 8);
            if (view.bytes().as_ptr() as usize).is_multiple_of(alignment) {
                input_at.push(view.bytes().as_ptr());
            } else {
                let copy = view.to_tensor();
                input_at.push(copy.bytes().as_ptr());
                owned.push(copy);
            }
        }
        let first_output = owned.len();
        for (index, (output, planned)) in outputs.iter_mut().zip(&shapes.outputs).enumerate() {
            if let Output::Write(view) = output {
                let name = &executable.signature.outputs[index].name;
                binding::check_result(name, planned.dtype, &planned.shape, view)?;
                let bytes = view.bytes_mut();
                if (bytes.as_ptr() as usize).is_multiple_of((planned.dtype.bits() / 8).clamp(1, 8)) {
                    output_at.push(bytes.as_mut_ptr());
                    continue;
                }
            }
            let mut tensor = Tensor::zeros(planned.dtype, planned.shape.clone()).map_err(|e| {
                let (what, message) = ("an output", e.to_string());
                RunError::Resource(ResourceError::System { what, message })
            })?;
            output_at.push(tensor.bytes_mut().as_mut_ptr());
            owned.push(tensor);
        }
        let frame =
            Frame { placed: &shapes.placed, arena, inputs: input_at, outputs: output_at, error: Mutex::new(None) };
        walk(executable, shapes, &frame, workspace_bytes, context);
        if let Some(error) = frame.error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let mut made = self.addresses.owned.drain(first_output..);
        for (index, output) in outputs.iter_mut().enumerate() {
            match output {
                Output::Allocate(place) => *place = made.next().map(Value::Tensor),
                Output::Discard => drop(made.next()),
                Output::Write(view) => {
                    if view.bytes().as_ptr() != self.addresses.outputs[index].cast_const()
                        && let Some(tensor) = made.next()
                    {
                        view.bytes_mut().copy_from_slice(tensor.bytes());
                    }
                }
            }
        }
        Ok(())
    }
}

/// Every thread walks the steps, and meets the others after each.
fn walk(
    executable: &CpuExecutable,
    shapes: &ShapePlan,
    frame: &Frame<'_>,
    workspace_bytes: usize,
    context: &RunContext<'_>,
) {
    let barrier = Barrier::default();
    let graph = executable.plan.graph();
    let level = executable.device.level;
    executable.device.pool.run(&|thread, threads| {
        let _guard = BreakOnPanic(&barrier);
        // SAFETY: the arena has a workspace for each of the pool's threads behind the buffers, 64-byte aligned; this is this thread's.
        let workspace = unsafe {
            let start = frame.arena.add(shapes.arena_bytes + thread * workspace_bytes);
            std::slice::from_raw_parts_mut(start.cast::<f32>(), workspace_bytes / size_of::<f32>())
        };
        let mut worker = Worker { thread, threads, workspace };
        for step in &shapes.steps {
            let name = || graph.node(step.node).name.as_str();
            if thread == 0
                && (context.deadline.is_some() || context.cancellation.is_some())
                && let Err(error) = context.check(name())
            {
                frame.fail(error, &barrier);
            }
            let start = context.profiler.filter(|_| thread == 0).map(|profiler| (profiler, Instant::now()));
            if let Err(error) = plan::run(step, frame, &mut worker, level) {
                frame.fail(error, &barrier);
            }
            if !barrier.wait(threads) {
                return;
            }
            if let Some((profiler, start)) = start {
                let op = executable.op_names.get(&step.node).map_or("", String::as_str);
                profiler.record(OpTiming { node: name(), op, kernel: step.kernel, duration: start.elapsed() });
            }
        }
    });
}
