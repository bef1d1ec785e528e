//! A region with the plans for the shapes it was run on, and how one of them is run.

use super::{
    Device,
    frame::{Frame, Worker},
    plan::{self, NoPlan, PlannedStep, Region, Setting, ShapePlan, could_be_known},
    pool::{Barrier, BreakOnPanic, parts},
    program::{Names, Run},
    weights::pages,
};
use crate::{Input, OpTiming, Output, ResourceError, RunContext, RunError, SessionMemory, binding};
use cutover_graph::{Fact, TensorFact};
use cutover_tensor::{DType, Tensor, TensorView, Value};
use memmap2::MmapMut;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

/// Inputs of a segment whose elements are tried one by one for whether shapes follow from them.
const KNOWN_TRIED: usize = 128;

pub(super) struct Segment {
    pub region: Region,
    /// For each input, whether shapes follow from its elements. Those of more inputs are found out with time.
    known: Mutex<Vec<bool>>,
    /// The latest used last.
    plans: Mutex<Vec<Arc<ShapePlan>>>,
}

impl Segment {
    pub fn new(region: Region) -> Segment {
        let known = Mutex::new(vec![false; region.inputs.len()]);
        Segment { region, known, plans: Mutex::default() }
    }

    /// Makes the plan for inputs of which this is known.
    pub fn plan(&self, setting: Setting<'_>, device: &Device, inputs: &[TensorFact]) -> Result<ShapePlan, NoPlan> {
        let of_shapes = |fact: &TensorFact, known: bool| match known {
            true => fact.clone(),
            false => TensorFact { value: None, ..fact.clone() },
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let facts = |known: &[bool]| -> Vec<TensorFact> {
            inputs.iter().zip(known).map(|(fact, &known)| of_shapes(fact, known)).collect()
        };
        match plan::build(setting, device, &self.region, facts(&known)) {
            Err(NoPlan::Undecided(_)) => {}
            done => return done,
        }
        // With all elements there are; then without those that nothing follows from.
        let before = known.clone();
        let could = |fact: &TensorFact| {
            fact.value.is_some() && could_be_known(&Fact::Tensor(TensorFact { value: None, ..fact.clone() }))
        };
        known.iter_mut().zip(inputs).for_each(|(known, fact)| *known |= could(fact));
        plan::infer(setting, &self.region, &facts(&known))?;
        let added: Vec<usize> = (0..known.len()).filter(|&i| known[i] && !before[i]).collect();
        for at in added.into_iter().take(KNOWN_TRIED) {
            known[at] = false;
            known[at] = plan::infer(setting, &self.region, &facts(&known)).is_err();
        }
        let plan = plan::build(setting, device, &self.region, facts(&known))?;
        let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter_mut().zip(known).for_each(|(all, known)| *all |= known);
        Ok(plan)
    }

    /// Keeps `plan` for runs to come; the one used longest ago goes where there are too many.
    pub fn keep(&self, plan: Arc<ShapePlan>, device: &Device) {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if plans.len() >= device.memory.shapes_kept() {
            plans.remove(0);
        }
        plans.push(plan);
    }

    /// Whether it was run, or planned for good.
    pub fn has_plan(&self) -> bool {
        !self.plans.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// The plan for these inputs: a kept one, or a new one.
    fn plan_for(&self, setting: Setting<'_>, device: &Device, inputs: &[Input<'_>]) -> Result<Arc<ShapePlan>, NoPlan> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = plans.iter().rposition(|plan| is_for(plan, inputs)) {
            let plan = plans.remove(at);
            plans.push(Arc::clone(&plan));
            return Ok(plan);
        }
        drop(plans);
        let fact = |input: &Input<'_>| fact_of(tensor(input));
        let plan = Arc::new(self.plan(setting, device, &inputs.iter().map(fact).collect::<Vec<_>>())?);
        self.keep(Arc::clone(&plan), device);
        Ok(plan)
    }

    /// Runs it on its inputs, in their order.
    pub fn run(
        &self,
        setting: Setting<'_>,
        device: &Device,
        names: &Names,
        inputs: &[Input<'_>],
        outputs: &mut [Output<'_>],
        run: &mut Run<'_>,
    ) -> Result<(), NoPlan> {
        for (&id, input) in self.region.inputs.iter().zip(inputs) {
            let cutover_graph::Value { name, fact, .. } = setting.graph.value(id);
            if fact.as_tensor().is_none_or(|fact| dtype(input) != Some(fact.dtype)) {
                return Err(binding::mismatch(name, fact, input).into());
            }
        }
        let plan = self.plan_for(setting, device, inputs)?;
        let held_bytes = run.held_bytes;
        let walk = Walk { plan: &plan, device, names, context: run.context };
        let name = |at: usize| setting.graph.value(self.region.outputs[at]).name.as_str();
        let result = run.memory.run(&walk, inputs, outputs, &name, held_bytes);
        run.memory.addresses.owned.clear();
        Ok(result?)
    }
}

fn dtype(input: &Input<'_>) -> Option<DType> {
    match input {
        Input::View(view) => Some(view.dtype()),
        Input::Value(value) => value.as_tensor().map(Tensor::dtype),
    }
}

/// What enters a segment is checked to be tensors.
fn tensor<'a>(input: &Input<'a>) -> TensorView<'a> {
    match input {
        Input::View(view) => *view,
        Input::Value(Value::Tensor(tensor)) => tensor.view(),
        Input::Value(other) => unreachable!("a {} in a segment", other.kind()),
    }
}

fn fact_of(view: TensorView<'_>) -> TensorFact {
    let shape = TensorFact::of_constant_shape(view.dtype(), view.shape());
    match could_be_known(&Fact::Tensor(shape.clone())) {
        true => TensorFact::of_tensor(&view.to_tensor()),
        false => shape,
    }
}

fn is_for(plan: &ShapePlan, inputs: &[Input<'_>]) -> bool {
    plan.input_shapes.iter().zip(&plan.inputs).zip(inputs).all(|((shape, fact), input)| {
        let view = tensor(input);
        shape[..] == *view.shape() && (fact.value.is_none() || fact.value == fact_of(view).value)
    })
}

/// What a session's runs reuse.
pub(super) struct Memory {
    pub budget: SessionMemory,
    /// Buffers, then every thread's workspace. Every segment has all of it while it runs: nothing is in it between them.
    arena: Option<MmapMut>,
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
unsafe impl Send for Memory {}

impl Memory {
    pub fn new(budget: SessionMemory) -> Memory {
        Memory { budget, arena: None, addresses: Addresses::default() }
    }

    /// The arena of at least `bytes`, and where it begins; `held_bytes` are taken by other things.
    fn reserve(
        &mut self,
        bytes: usize,
        huge: bool,
        held_bytes: u64,
        context: &RunContext<'_>,
    ) -> Result<*mut u8, RunError> {
        let limit = self.budget.budget_bytes.unwrap_or(u64::MAX).min(context.limits.arena_bytes);
        let needed = held_bytes.saturating_add(bytes as u64);
        if needed > limit {
            return Err(ResourceError::Memory { what: "a session's arena", needed, available: limit }.into());
        }
        if self.arena.as_ref().is_none_or(|arena| arena.len() < bytes) {
            // The old one first: both together may be more than there is.
            self.arena = None;
            let map = pages(bytes, huge).map_err(|error| {
                RunError::Resource(ResourceError::System { what: "a session's arena", message: error.to_string() })
            })?;
            self.arena = Some(map);
        }
        Ok(self.arena.as_mut().map_or(std::ptr::null_mut(), |arena| arena.as_mut_ptr()))
    }

    fn run<'n>(
        &mut self,
        walk: &Walk<'_>,
        inputs: &[Input<'_>],
        outputs: &mut [Output<'_>],
        name: &dyn Fn(usize) -> &'n str,
        held_bytes: u64,
    ) -> Result<(), RunError> {
        let Walk { plan, device, context, .. } = *walk;
        let workspace_bytes = plan.workspace_len * size_of::<f32>();
        let made = outputs.iter().zip(&plan.outputs).filter(|(output, _)| !matches!(output, Output::Write(_)));
        let made_bytes = made.map(|(_, planned)| planned.bytes as u64).fold(held_bytes, u64::saturating_add);
        let (bytes, huge) = (plan.arena_bytes + workspace_bytes * device.pool.threads(), device.memory.is_huge());
        let arena = self.reserve(bytes, huge, made_bytes, context)?;
        let Addresses { inputs: input_at, outputs: output_at, owned } = &mut self.addresses;
        input_at.clear();
        output_at.clear();
        owned.clear();
        for input in inputs {
            let view = tensor(input);
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
        for (index, (output, planned)) in outputs.iter_mut().zip(&plan.outputs).enumerate() {
            if let Output::Write(view) = output {
                binding::check_result(name(index), planned.dtype, &planned.shape, view)?;
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
            Frame { placed: &plan.placed, arena, inputs: input_at, outputs: output_at, error: Mutex::new(None) };
        walk.run(&frame, workspace_bytes);
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

/// A plan being run.
#[derive(Clone, Copy)]
struct Walk<'a> {
    plan: &'a ShapePlan,
    device: &'a Device,
    names: &'a Names,
    context: &'a RunContext<'a>,
}

impl Walk<'_> {
    /// Every thread walks the steps, computes parts of each, and meets the others after it.
    fn run(&self, frame: &Frame<'_>, workspace_bytes: usize) {
        let Walk { plan, device, names, context } = *self;
        let barrier = Barrier::default();
        let task = |thread: usize, threads: usize| {
            let _guard = BreakOnPanic(&barrier);
            // SAFETY: the arena has a workspace for each of the pool's threads behind the buffers, 64-byte aligned; this is this thread's.
            let workspace = unsafe {
                let start = frame.arena.add(plan.arena_bytes + thread * workspace_bytes);
                std::slice::from_raw_parts_mut(start.cast::<f32>(), workspace_bytes / size_of::<f32>())
            };
            let mut worker = Worker { part: 0, parts: parts(threads), workspace };
            for (index, step) in plan.steps.iter().enumerate() {
                if thread == 0
                    && (context.deadline.is_some() || context.cancellation.is_some())
                    && let Err(error) = context.check(&names.of(step.node).node)
                {
                    frame.fail(error, &barrier);
                }
                let start = context.profiler.filter(|_| thread == 0).map(|profiler| (profiler, Instant::now()));
                let mut begun = if threads == 1 { Some(0) } else { device.pool.begin_part(index, thread, threads) };
                while let Some(part) = begun {
                    worker.part = part;
                    if let Err(error) = step.lowered.run(frame, &mut worker, device.level) {
                        frame.fail(error, &barrier);
                    }
                    begun = device.pool.begin_part(index, thread, threads);
                }
                if !barrier.wait(threads) {
                    return;
                }
                if let Some((profiler, start)) = start {
                    let (name, duration) = (names.of(step.node), start.elapsed());
                    let PlannedStep { kernel, work, .. } = *step;
                    profiler.record(OpTiming { node: &name.node, op: &name.op, kernel, duration, work });
                }
            }
        };
        match plan.is_small {
            true => task(0, 1),
            false => device.pool.run(&task),
        }
    }
}
