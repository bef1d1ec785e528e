//! A compiled plan, its sessions, and how a run goes.

use super::{
    code,
    device::{Device, Driver, Weight, lock},
    plan::{self, NoPlan, PlannedOutput, Ready, ShapePlan, Source, Step},
};
use crate::{
    CompileError, CompileOptions, Executable, Footprint, Input, OpTiming, Output, Phase, PhaseObserver, PlacedNode,
    Placement, ResourceError, RunContext, RunError, Session, SessionMemory, Signature,
    binding::{self, bind_inputs, check_outputs, check_result},
};
use cutover_graph::{Bindings, Fact, NodeId, OpError, Plan, TensorFact};
use cutover_tensor::{DType, Tensor, TensorView, Value};
use std::{
    borrow::Cow,
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Instant,
};

/// Plans of shapes that an executable keeps, and arenas that a session does.
const SHAPES_KEPT: usize = 16;
const ARENAS_KEPT: usize = 2;

pub(super) struct GpuExecutable<D: Driver> {
    device: Arc<Device<D>>,
    options: CompileOptions,
    plan: Plan,
    signature: Signature,
    /// By value: what is known of constants.
    constants: Vec<Option<Fact>>,
    plans: Mutex<Vec<Arc<Ready<D>>>>,
    placement: Placement,
    footprint: Footprint,
    /// The first plan's weights, for as long as the executable is.
    weights: Vec<Arc<Weight<D>>>,
}

impl<D: Driver> GpuExecutable<D> {
    pub fn new(
        device: Arc<Device<D>>,
        plan: &Plan,
        options: &CompileOptions,
    ) -> Result<Arc<GpuExecutable<D>>, CompileError> {
        let graph = plan.graph();
        let fact = |id| graph.constant(id).map(|c| Fact::Tensor(TensorFact::of_tensor(&c.tensor)));
        let mut executable = GpuExecutable {
            device,
            options: *options,
            signature: Signature::of(graph),
            constants: graph.values().map(|(id, _)| fact(id)).collect(),
            plan: plan.clone(),
            plans: Mutex::default(),
            placement: Placement::default(),
            footprint: Footprint::default(),
            weights: Vec::new(),
        };
        let first = executable.first()?;
        if let Some((first, is_static)) = first {
            let beside = executable.device.driver.beside(&first);
            let weight_bytes = first.weights.iter().map(|weight| weight.bytes).sum::<u64>() + beside.weight_bytes;
            let shared = first.weights.iter().filter(|weight| Arc::strong_count(weight) > 1);
            let shared_bytes = shared.map(|weight| weight.bytes).sum();
            let session_bytes = first.plan.arena_bytes + first.plan.staging_bytes + beside.session_bytes;
            executable.footprint = Footprint { weight_bytes, shared_bytes, session_bytes };
            executable.weights = first.weights.clone();
            if is_static {
                lock(&executable.plans).push(Arc::new(first));
            }
        }
        executable.place();
        Ok(Arc::new(executable))
    }

    /// The plan of static shapes, or else of every symbol at 1, as far as that tells anything.
    fn first(&self) -> Result<Option<(Ready<D>, bool)>, CompileError> {
        let mut symbols = BTreeSet::new();
        let facts: Option<Vec<&TensorFact>> = self.signature.inputs.iter().map(|b| b.fact.as_tensor()).collect();
        let Some(facts) = facts else { return Ok(None) };
        facts.iter().filter_map(|f| f.shape.as_ref()).flatten().for_each(|dim| dim.collect_symbols(&mut symbols));
        let is_static = symbols.is_empty();
        let ones: Bindings = symbols.into_iter().map(|symbol| (symbol, 1)).collect();
        let concrete = facts.iter().map(|fact| {
            let shape = binding::shape_of(fact.shape.as_ref()?, &ones)?;
            Some(TensorFact::of_constant_shape(fact.dtype, &shape))
        });
        let Some(concrete) = concrete.collect::<Option<Vec<_>>>() else { return Ok(None) };
        match self.build(&concrete) {
            Ok(plan) => Ok(Some((plan, is_static))),
            Err(NoPlan::Refused { node, reason }) => {
                let node = self.plan.graph().node(node);
                Err(CompileError::Unsupported { node: node.name.clone(), op: node.op.name(), reason })
            }
            Err(NoPlan::Error(RunError::Resource(error))) if is_static => Err(error.into()),
            // Elements of the inputs may decide it, or a run will say it.
            Err(NoPlan::Undecided { .. } | NoPlan::Error(_)) => Ok(None),
        }
    }

    fn build(&self, inputs: &[TensorFact]) -> Result<Ready<D>, NoPlan> {
        plan::build(&self.plan, &self.device, &self.options, &self.constants, inputs)
    }

    fn place(&mut self) {
        let graph = self.plan.graph();
        let kernels = |node: &str| {
            let plans = lock(&self.plans);
            // The last is the one that gives its result.
            let step = plans.first().and_then(|ready| ready.plan.steps.iter().rfind(|step| step.node == node));
            step.map(|step| step.kernel.to_string())
        };
        let place = |&id: &NodeId| {
            let node = graph.node(id);
            let dtype = node.outputs.first().and_then(|&o| graph.value(o).fact.as_tensor()).map(|fact| fact.dtype);
            PlacedNode {
                node: node.name.clone(),
                op: node.op.name(),
                backend: D::NAME,
                kernel: kernels(&node.name).unwrap_or_else(|| "fused".to_string()),
                dtype: dtype.map(|dtype| dtype.to_string()).unwrap_or_default(),
                reason: String::new(),
            }
        };
        let nodes = self.plan.order().iter().map(place).collect();
        self.placement = Placement { nodes };
    }

    /// The plan for these inputs: a kept one, or a new one.
    fn plan_for(&self, views: &[TensorView<'_>]) -> Result<Arc<Ready<D>>, RunError> {
        let mut plans = lock(&self.plans);
        if let Some(at) = plans.iter().rposition(|ready| is_for(&ready.plan, views)) {
            let plan = plans.remove(at);
            plans.push(Arc::clone(&plan));
            return Ok(plan);
        }
        drop(plans);
        let shapes = |view: &TensorView<'_>| TensorFact::of_constant_shape(view.dtype(), view.shape());
        let mut result = self.build(&views.iter().map(shapes).collect::<Vec<_>>());
        if let Err(NoPlan::Undecided { .. } | NoPlan::Refused { .. }) = &result {
            // What shapes do not decide, elements may.
            let elements: Vec<TensorFact> = views.iter().map(|view| fact_of(*view)).collect();
            if elements.iter().any(|fact| fact.value.is_some()) {
                result = self.build(&elements);
            }
        }
        let refused = |node: NodeId, reason: String| {
            let node = self.plan.graph().node(node);
            RunError::Unsupported { node: node.name.clone(), op: node.op.name(), reason }
        };
        let plan = Arc::new(result.map_err(|error| match error {
            NoPlan::Error(error) => error,
            NoPlan::Refused { node, reason } | NoPlan::Undecided { node, reason } => refused(node, reason),
        })?);
        let mut plans = lock(&self.plans);
        if plans.len() >= SHAPES_KEPT {
            plans.remove(0);
        }
        plans.push(Arc::clone(&plan));
        Ok(plan)
    }
}

fn fact_of(view: TensorView<'_>) -> TensorFact {
    let shape = TensorFact::of_constant_shape(view.dtype(), view.shape());
    let count: usize = view.shape().iter().product();
    // Of floats, the scales of a `Resize`.
    let is_small = count <= TensorFact::VALUE_LIMIT && (view.dtype() != DType::F32 || view.shape().len() <= 1);
    if is_small { TensorFact::of_tensor(&view.to_tensor()) } else { shape }
}

fn is_for(plan: &ShapePlan, views: &[TensorView<'_>]) -> bool {
    plan.key.iter().zip(views).all(|(fact, view)| {
        let mut extents = fact.shape.iter().flatten();
        view.shape().iter().all(|&extent| extents.next().and_then(|d| d.as_const()) == i64::try_from(extent).ok())
            && extents.next().is_none()
            && (fact.value.is_none() || fact.value == fact_of(*view).value)
    })
}

impl<D: Driver> Executable for GpuExecutable<D> {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn footprint(&self) -> Footprint {
        self.footprint
    }

    fn weights(&self, visit: &mut dyn FnMut(usize, u64)) {
        self.weights.iter().for_each(|weight| visit(Arc::as_ptr(weight) as usize, weight.bytes));
    }

    fn placement(&self) -> &Placement {
        &self.placement
    }

    fn session(self: Arc<Self>, memory: SessionMemory) -> Result<Box<dyn Session>, ResourceError> {
        if let Some(available) = memory.budget_bytes
            && available < self.footprint.session_bytes
        {
            let needed = self.footprint.session_bytes;
            return Err(ResourceError::Memory { what: "a session on the GPU", needed, available });
        }
        Ok(Box::new(GpuSession { executable: self, memory, ready: Vec::new() }))
    }
}

struct GpuSession<D: Driver> {
    executable: Arc<GpuExecutable<D>>,
    memory: SessionMemory,
    /// Memory, which goes first, and the plan that it is for; used last comes last.
    ready: Vec<(D::Memory, Arc<Ready<D>>)>,
}

impl<D: Driver> Session for GpuSession<D> {
    fn run(
        &mut self,
        inputs: &[Input<'_>],
        outputs: &mut [Output<'_>],
        context: &RunContext<'_>,
    ) -> Result<(), RunError> {
        let executable = Arc::clone(&self.executable);
        let (driver, signature) = (&executable.device.driver, &executable.signature);
        let mut symbols = Bindings::new();
        bind_inputs(signature, inputs, &mut symbols)?;
        check_outputs(signature, outputs, &symbols)?;
        let views = inputs.iter().zip(&signature.inputs).map(|(input, binding)| match input {
            Input::View(view) => Ok(*view),
            Input::Value(Value::Tensor(tensor)) => Ok(tensor.view()),
            Input::Value(_) => Err(binding::mismatch(&binding.name, &binding.fact, input)),
        });
        let views = views.collect::<Result<Vec<_>, _>>()?;
        driver.check()?;
        let ready = executable.plan_for(&views)?;
        let plan = &ready.plan;
        if let Some(step) = plan.steps.first() {
            context.check(&step.node)?;
        }
        let memory = self.memory_for(&ready, context)?;
        let mut clock = PhaseClock { observer: context.phases, start: Instant::now() };
        for (at, (view, range)) in views.iter().zip(&plan.inputs).enumerate() {
            if range.is_none() {
                continue;
            }
            let mut bytes =
                if code::is_byte(view.dtype()) { Cow::Borrowed(view.bytes()) } else { view_to_device(*view) };
            if !bytes.len().is_multiple_of(4) {
                let whole = bytes.len().next_multiple_of(4);
                bytes.to_mut().resize(whole, 0);
            }
            if !bytes.is_empty() {
                driver.write(plan, memory, at, &bytes)?;
            }
        }
        let all = 0..plan.steps.len();
        if let (Some(observer), None) = (context.phases, context.profiler)
            && let Some(times) = driver.timed(&ready, memory, all.clone())?
        {
            for (phase, duration) in
                [(Phase::CopyIn, times.copies_in), (Phase::Kernels, times.kernels), (Phase::CopyOut, times.copies_out)]
            {
                observer.record(phase, duration);
            }
            return driver.read(memory, &mut |staged| hand_out(&executable, plan, staged, outputs));
        }
        if clock.is_watched() {
            // Some drivers copy with the next submission: one of no steps.
            driver.submit(&ready, memory, 0..0)?;
            driver.wait(memory)?;
            clock.end(Phase::CopyIn);
        }
        match context.profiler {
            None => driver.submit(&ready, memory, all)?,
            // One at a time, waited for.
            Some(profiler) => {
                for (at, step) in plan.steps.iter().enumerate() {
                    driver.wait(memory)?;
                    let start = Instant::now();
                    let duration = match driver.timed(&ready, memory, at..at + 1)? {
                        Some(times) => times.kernels,
                        None => {
                            driver.submit(&ready, memory, at..at + 1)?;
                            driver.wait(memory)?;
                            start.elapsed()
                        }
                    };
                    let Step { node, op, kernel, work, .. } = step;
                    profiler.record(OpTiming { node, op, kernel, duration, work: *work });
                }
                if plan.steps.is_empty() {
                    driver.submit(&ready, memory, 0..0)?;
                }
            }
        }
        if clock.is_watched() {
            driver.wait(memory)?;
            clock.end(Phase::Kernels);
        }
        driver.read(memory, &mut |staged| hand_out(&executable, plan, staged, outputs))?;
        clock.end(Phase::CopyOut);
        Ok(())
    }
}

/// Tells an observer, where there is one, what the phases of a run take.
struct PhaseClock<'a> {
    observer: Option<&'a dyn PhaseObserver>,
    start: Instant,
}

impl PhaseClock<'_> {
    fn is_watched(&self) -> bool {
        self.observer.is_some()
    }

    /// What has passed since the last phase ended was `phase`.
    fn end(&mut self, phase: Phase) {
        if let Some(observer) = self.observer {
            observer.record(phase, self.start.elapsed());
            self.start = Instant::now();
        }
    }
}

impl<D: Driver> GpuSession<D> {
    /// The memory of `plan`, kept from a run before or new.
    fn memory_for(&mut self, plan: &Arc<Ready<D>>, context: &RunContext<'_>) -> Result<&mut D::Memory, RunError> {
        let beside = self.executable.device.driver.beside(plan);
        let needed = plan.plan.arena_bytes + plan.plan.staging_bytes + beside.session_bytes;
        let available = context.limits.arena_bytes.min(self.memory.budget_bytes.unwrap_or(u64::MAX));
        if needed > available {
            return Err(ResourceError::Memory { what: "a session's arena", needed, available }.into());
        }
        if let Some(at) = self.ready.iter().position(|(_, of)| Arc::ptr_eq(of, plan)) {
            let kept = self.ready.remove(at);
            self.ready.push(kept);
        } else {
            // The old ones first: all together may be more than there is.
            let excess = (self.ready.len() + 1).saturating_sub(ARENAS_KEPT);
            self.ready.drain(..excess);
            let memory = self.executable.device.driver.memory(plan)?;
            self.ready.push((memory, Arc::clone(plan)));
        }
        let last = self.ready.len() - 1;
        Ok(&mut self.ready[last].0)
    }
}

fn hand_out<D: Driver>(
    executable: &GpuExecutable<D>,
    plan: &ShapePlan,
    staged: &[u8],
    outputs: &mut [Output<'_>],
) -> Result<(), RunError> {
    let fault = u32::from_le_bytes([staged[0], staged[1], staged[2], staged[3]]);
    if fault > 0 {
        let graph = executable.plan.graph();
        let mut nodes = graph.nodes().filter(|(id, _)| id.index() + 1 == fault as usize);
        let node = nodes.next().map(|(_, node)| node);
        return Err(RunError::Op {
            node: node.map(|node| node.name.clone()).unwrap_or_default(),
            op: node.map(|node| node.op.name()).unwrap_or_default(),
            source: OpError::input("an element is out of the range that the operator takes".to_string()),
        });
    }
    for ((output, planned), binding) in outputs.iter_mut().zip(&plan.outputs).zip(&executable.signature.outputs) {
        let PlannedOutput { dtype, shape, from, is_bytes } = planned;
        let bytes = || match from {
            Source::Host(tensor) => Cow::Borrowed(tensor.bytes()),
            Source::Device { staged_at, bytes, .. } => {
                let staged = &staged[*staged_at as usize..(*staged_at + *bytes) as usize];
                match is_bytes {
                    true => Cow::Borrowed(&staged[..shape.element_count()]),
                    false => from_device(*dtype, shape.element_count(), staged),
                }
            }
        };
        match output {
            Output::Discard => {}
            Output::Write(view) => {
                check_result(&binding.name, *dtype, shape, view)?;
                view.bytes_mut().copy_from_slice(&bytes());
            }
            Output::Allocate(place) => {
                let tensor = match from {
                    Source::Host(tensor) => Ok(tensor.clone()),
                    Source::Device { .. } => Tensor::from_bytes(*dtype, shape.clone(), &bytes()),
                };
                let tensor =
                    tensor.map_err(|error| ResourceError::System { what: "an output", message: error.to_string() })?;
                *place = Some(Value::Tensor(tensor));
            }
        }
    }
    Ok(())
}

/// A tensor's elements as device memory holds them.
pub(super) fn to_device(tensor: &Tensor) -> Vec<u8> {
    view_to_device(tensor.view()).into_owned()
}

fn view_to_device(view: TensorView<'_>) -> Cow<'_, [u8]> {
    let bytes = view.bytes();
    let words = |word: fn(&[u8]) -> u32, size: usize| {
        Cow::Owned(bytes.chunks_exact(size).flat_map(|chunk| word(chunk).to_le_bytes()).collect::<Vec<u8>>())
    };
    match view.dtype() {
        DType::Bool => words(|b| u32::from(b[0] != 0), 1),
        DType::U8 => words(|b| u32::from(b[0]), 1),
        DType::I8 => words(|b| i32::from(b[0] as i8) as u32, 1),
        DType::U16 => words(|b| u32::from(u16::from_le_bytes([b[0], b[1]])), 2),
        DType::I16 => words(|b| i32::from(i16::from_le_bytes([b[0], b[1]])) as u32, 2),
        DType::BF16 => words(|b| u32::from(u16::from_le_bytes([b[0], b[1]])) << 16, 2),
        _ => Cow::Borrowed(bytes),
    }
}

/// The `count` elements of `staged` as tensors hold them.
fn from_device(dtype: DType, count: usize, staged: &[u8]) -> Cow<'_, [u8]> {
    let narrowed = |size: usize, skip: usize| {
        let bytes = staged.chunks_exact(4).take(count).flat_map(|word| word[skip..skip + size].iter().copied());
        Cow::Owned(bytes.collect::<Vec<u8>>())
    };
    match dtype {
        DType::Bool | DType::U8 | DType::I8 => narrowed(1, 0),
        DType::U16 | DType::I16 => narrowed(2, 0),
        DType::BF16 => narrowed(2, 2),
        dtype => Cow::Borrowed(&staged[..count * code::storage_bytes(dtype)]),
    }
}
