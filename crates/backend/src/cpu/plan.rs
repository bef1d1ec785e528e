//! Concrete steps for one set of input shapes, and how they are made.

use super::{
    Device,
    frame::{Buffer, Frame, Place, Placed, Worker},
    lower::{self, Lowered},
    weights::{Packed, Recipe},
};
use crate::{ResourceError, RunError};
use cutover_graph::{
    Fact, Graph, Node, NodeId, Plan, TensorFact, ValueId,
    ops::{Facts, InferContext},
    plan::arena::{Interval, place},
};
use cutover_tensor::{DType, Shape, Tensor};
use std::{collections::HashMap, sync::Arc};

/// Alignment of arena buffers: a cache line, an AVX-512 register.
const ALIGNMENT: usize = 64;

/// All that a run of one set of input shapes needs.
pub(super) struct ShapePlan {
    /// Shapes of the inputs it is for.
    pub inputs: Vec<Shape>,
    pub outputs: Vec<PlannedOutput>,
    pub steps: Vec<PlannedStep>,
    pub placed: Vec<Placed>,
    pub arena_bytes: usize,
    /// Floats that each thread needs beside the arena.
    pub workspace_len: usize,
}

pub(super) struct PlannedOutput {
    pub dtype: DType,
    pub shape: Shape,
}

/// A step, and whose it is.
pub(super) struct PlannedStep {
    pub lowered: Lowered,
    pub node: NodeId,
    pub kernel: &'static str,
}

/// How a value is held. Any of them may be made from another when a step asks for it.
#[derive(Clone, Default)]
pub(super) struct Held {
    /// Row-major.
    pub plain: Option<Buffer>,
    /// `[n][ceil(c/16)][pixels][16]`, for images.
    pub blocked: Option<Buffer>,
    /// A strided view of another value's row-major buffer, not copied yet.
    pub strided: Option<Strided>,
}

/// Element `(i, j, …)` is at `offset + Σ index · stride`.
#[derive(Clone)]
pub(super) struct Strided {
    pub buffer: Buffer,
    pub offset: usize,
    pub strides: Vec<usize>,
}

struct Building {
    placed: Option<Place>,
    bytes: usize,
    first: usize,
    last: usize,
    /// Values that are held in it and still have readers to come.
    holders: Vec<ValueId>,
}

/// Why no static plan can be made.
pub(super) enum NoPlan {
    /// A shape or a kind of value that only data decides: the graph runs node by node.
    Dynamic,
    Error(RunError),
}

impl From<RunError> for NoPlan {
    fn from(error: RunError) -> NoPlan {
        NoPlan::Error(error)
    }
}

/// Makes a [`ShapePlan`]: each node's lowering asks for buffers and adds steps.
pub(super) struct Builder<'a> {
    pub graph: &'a Graph,
    pub device: &'a Device,
    /// By value; concrete.
    facts: Vec<Option<TensorFact>>,
    held: Vec<Held>,
    /// Readers to come, graph outputs among them.
    readers: Vec<usize>,
    buffers: Vec<Building>,
    steps: Vec<PlannedStep>,
    packed: HashMap<Recipe, Buffer>,
    workspace_len: usize,
    current: NodeId,
    kernel: &'static str,
}

/// Lowers `plan` for inputs of `shapes`.
pub(super) fn build(plan: &Plan, device: &Device, inputs: &[(DType, Shape)]) -> Result<ShapePlan, NoPlan> {
    let graph = plan.graph();
    let count = graph.value_count();
    let Some(&first) = plan.order().first() else { return Err(NoPlan::Dynamic) };
    let mut builder = Builder {
        graph,
        device,
        facts: vec![None; count],
        held: vec![Held::default(); count],
        readers: vec![0; count],
        buffers: Vec::new(),
        steps: Vec::new(),
        packed: HashMap::new(),
        workspace_len: 0,
        current: first,
        kernel: "",
    };
    for (id, value) in graph.values() {
        if let Some(constant) = graph.constant(id) {
            builder.facts[id.index()] = Some(TensorFact::of_tensor(&constant.tensor));
        }
        // Containers and strings have no place in an arena.
        let is_plain = value.fact.as_tensor().is_some_and(|fact| fact.dtype != DType::String);
        if !is_plain && !matches!(value.source, cutover_graph::Source::Removed) {
            return Err(NoPlan::Dynamic);
        }
    }
    for (index, (&id, (dtype, shape))) in graph.inputs().iter().zip(inputs).enumerate() {
        builder.facts[id.index()] = Some(TensorFact::of_constant_shape(*dtype, shape));
        let buffer = builder.add(Some(Place::Input(index)), byte_len(*dtype, shape)?);
        builder.hold_plain(id, buffer);
    }
    builder.infer(plan)?;
    for (_, node) in graph.nodes() {
        node.inputs.iter().flatten().for_each(|v| builder.readers[v.index()] += 1);
    }
    graph.outputs().iter().for_each(|v| builder.readers[v.index()] += 1);
    for &id in plan.order() {
        builder.current = id;
        let node = graph.node(id);
        let wanted = node.outputs.iter().any(|o| builder.readers[o.index()] > 0);
        if wanted && !node.outputs.iter().all(|o| builder.is_known(*o)) {
            builder.lower(node)?;
        }
        for input in node.inputs.iter().flatten() {
            builder.readers[input.index()] -= 1;
        }
    }
    builder.finish(inputs)
}

fn byte_len(dtype: DType, shape: &[usize]) -> Result<usize, NoPlan> {
    let count = Shape::new(shape).checked_len();
    let bytes = count.and_then(|n| dtype.byte_len(n)).filter(|&b| b < isize::MAX as usize / 4);
    bytes.ok_or_else(|| {
        let error = ResourceError::Memory { what: "a tensor", needed: u64::MAX, available: isize::MAX as u64 };
        NoPlan::Error(error.into())
    })
}

impl Builder<'_> {
    /// Concrete facts of everything, from those of the inputs.
    fn infer(&mut self, plan: &Plan) -> Result<(), NoPlan> {
        for &id in plan.order() {
            let node = self.graph.node(id);
            let facts: Vec<Option<Fact>> =
                node.inputs.iter().map(|i| i.and_then(|i| self.facts[i.index()].clone().map(Fact::Tensor))).collect();
            if node.inputs.iter().zip(&facts).any(|(input, fact)| input.is_some() && fact.is_none()) {
                return Err(NoPlan::Dynamic);
            }
            let borrowed: Vec<Option<&Fact>> = facts.iter().map(Option::as_ref).collect();
            let context = InferContext { node: &node.name, outputs: node.outputs.len() };
            let inferred = node.op.infer(Facts(&borrowed), &context).map_err(|source| RunError::Op {
                node: node.name.clone(),
                op: node.op.name(),
                source,
            })?;
            for (&output, fact) in node.outputs.iter().zip(inferred) {
                match fact {
                    Fact::Tensor(fact) if fact.constant_shape().is_some() && fact.dtype != DType::String => {
                        self.facts[output.index()] = Some(fact);
                    }
                    _ => return Err(NoPlan::Dynamic),
                }
            }
        }
        Ok(())
    }

    fn lower(&mut self, node: &Node) -> Result<(), NoPlan> {
        self.kernel = lower::kernel_name(self.graph, node);
        if lower::lower(self, node)? {
            return Ok(());
        }
        self.kernel = "reference";
        lower::fallback::lower(self, node)
    }

    fn finish(mut self, inputs: &[(DType, Shape)]) -> Result<ShapePlan, NoPlan> {
        // A buffer that nothing reads any more keeps its last step's time.
        let outputs = self.graph.outputs().to_vec();
        let end = self.steps.len() + outputs.len();
        for (index, &id) in outputs.iter().enumerate() {
            let from = self.plain(id)?;
            let bytes = self.bytes(id);
            let building = &mut self.buffers[from.0 as usize];
            // Written straight into the caller's memory, unless that is spoken for or it was there before the run.
            if building.placed.is_none() && building.bytes == bytes {
                building.placed = Some(Place::Output(index));
                continue;
            }
            let to = self.add(Some(Place::Output(index)), bytes);
            self.kernel = "copy";
            self.push(Lowered::Copy(lower::movement::Copy::whole(from, to, bytes)), &[from], &[to]);
        }
        let arena: Vec<usize> = (0..self.buffers.len()).filter(|&i| self.buffers[i].placed.is_none()).collect();
        let interval = |&i: &usize| {
            let b = &self.buffers[i];
            Interval { size_bytes: b.bytes, first: b.first.min(end), last: b.last.max(b.first).min(end) }
        };
        let intervals: Vec<Interval> = arena.iter().map(interval).collect();
        let too_large = || ResourceError::Memory { what: "the arena", needed: u64::MAX, available: isize::MAX as u64 };
        let offsets = place(&intervals, ALIGNMENT).ok_or_else(|| NoPlan::Error(too_large().into()))?;
        for (&buffer, &offset) in arena.iter().zip(&offsets.offsets) {
            self.buffers[buffer].placed = Some(Place::Arena(offset));
        }
        let planned = |id: &ValueId| {
            let fact = self.fact(*id);
            PlannedOutput { dtype: fact.dtype, shape: self.shape(*id) }
        };
        Ok(ShapePlan {
            inputs: inputs.iter().map(|(_, shape)| shape.clone()).collect(),
            outputs: outputs.iter().map(planned).collect(),
            placed: self
                .buffers
                .into_iter()
                .map(|b| Placed { place: b.placed.unwrap_or(Place::Arena(0)), bytes: b.bytes })
                .collect(),
            steps: self.steps,
            arena_bytes: offsets.total_bytes,
            workspace_len: self.workspace_len.next_multiple_of(16),
        })
    }

    // What lowerings ask.

    pub fn fact(&self, id: ValueId) -> &TensorFact {
        self.facts[id.index()].as_ref().expect("inferred before anything is lowered")
    }

    pub fn shape(&self, id: ValueId) -> Shape {
        self.fact(id).constant_shape().expect("inferred as concrete").into()
    }

    pub fn bytes(&self, id: ValueId) -> usize {
        let fact = self.fact(id);
        fact.dtype.byte_len(self.shape(id).element_count()).expect("checked when the output was made")
    }

    pub fn is_float(&self, id: ValueId) -> bool {
        self.fact(id).dtype == DType::F32
    }

    pub fn held(&self, id: ValueId) -> &Held {
        &self.held[id.index()]
    }

    /// The elements of a small integer value that shapes determine.
    pub fn integers(&self, id: ValueId) -> Option<Vec<i64>> {
        self.fact(id).constant_value()
    }

    /// The constant tensor of f32s that `id` is.
    pub fn constant(&self, id: ValueId) -> Option<&cutover_graph::Constant> {
        self.graph.constant(id).filter(|c| c.tensor.dtype() == DType::F32)
    }

    /// The one f32 that `id` is.
    pub fn scalar(&self, id: ValueId) -> Option<f32> {
        let constant = self.constant(id)?;
        (constant.tensor.element_count() == 1).then(|| constant.tensor.to_vec::<f32>().ok()?.first().copied()).flatten()
    }

    fn is_known(&self, id: ValueId) -> bool {
        self.fact(id).constant_value().is_some() && self.fact(id).dtype != DType::F32
    }

    fn add(&mut self, placed: Option<Place>, bytes: usize) -> Buffer {
        let first = self.steps.len();
        self.buffers.push(Building { placed, bytes, first, last: first, holders: Vec::new() });
        Buffer(self.buffers.len() as u32 - 1)
    }

    pub fn new_floats(&mut self, len: usize) -> Result<Buffer, NoPlan> {
        let bytes = byte_len(DType::F32, &[len])?;
        Ok(self.add(None, bytes))
    }

    /// A buffer for `id`, row-major.
    pub fn new_plain(&mut self, id: ValueId) -> Result<Buffer, NoPlan> {
        let bytes = byte_len(self.fact(id).dtype, &self.shape(id))?;
        let buffer = self.add(None, bytes);
        self.hold_plain(id, buffer);
        Ok(buffer)
    }

    /// A buffer for the image `id`, blocked.
    pub fn new_blocked(&mut self, id: ValueId) -> Result<Buffer, NoPlan> {
        let (n, c, pixels) = self.image(id);
        let len = cutover_kernels::cpu::layout::blocked_len(c, pixels);
        let buffer = self.new_floats(n.saturating_mul(len))?;
        self.hold_blocked(id, buffer);
        Ok(buffer)
    }

    /// Images, channels and pixels of `[n, c, …]`.
    pub fn image(&self, id: ValueId) -> (usize, usize, usize) {
        let shape = self.shape(id);
        (shape[0], shape[1], shape[2..].iter().product())
    }

    pub fn hold_plain(&mut self, id: ValueId, buffer: Buffer) {
        self.held[id.index()].plain = Some(buffer);
        self.buffers[buffer.0 as usize].holders.push(id);
    }

    pub fn hold_blocked(&mut self, id: ValueId, buffer: Buffer) {
        self.held[id.index()].blocked = Some(buffer);
        self.buffers[buffer.0 as usize].holders.push(id);
        // With one pixel and whole blocks both layouts are the same bytes.
        let (_, c, pixels) = self.image(id);
        if pixels == 1 && c.is_multiple_of(cutover_kernels::cpu::BLOCK) {
            self.held[id.index()].plain = Some(buffer);
        }
    }

    pub fn hold_strided(&mut self, id: ValueId, strided: Strided) {
        self.buffers[strided.buffer.0 as usize].holders.push(id);
        self.held[id.index()].strided = Some(strided);
    }

    /// The same bytes under another shape.
    pub fn hold_view(&mut self, id: ValueId, of: ValueId) -> Result<(), NoPlan> {
        let buffer = self.plain(of)?;
        self.hold_plain(id, buffer);
        Ok(())
    }

    /// Whether the step of the current node is the last to read `id`, so that it may overwrite `buffer`, which holds it.
    pub fn may_overwrite(&self, id: ValueId, buffer: Buffer) -> bool {
        let building = &self.buffers[buffer.0 as usize];
        let current = self.graph.node(self.current).inputs.iter().flatten().filter(|&&i| i == id).count();
        building.placed.is_none()
            && current == 1
            && building
                .holders
                .iter()
                .all(|&h| if h == id { self.readers[h.index()] == 1 } else { self.readers[h.index()] == 0 })
    }

    /// `id` row-major, made so if it is not.
    pub fn plain(&mut self, id: ValueId) -> Result<Buffer, NoPlan> {
        let held = self.held(id).clone();
        if let Some(buffer) = held.plain {
            return Ok(buffer);
        }
        if let Some(values) = self.fact(id).constant_value().filter(|_| self.fact(id).dtype != DType::F32) {
            return self.known(id, values);
        }
        if let Some(constant) = self.graph.constant(id) {
            let tensor = constant.tensor.aligned();
            let bytes = tensor.bytes().len();
            let buffer = self.add(Some(Place::Constant(tensor)), bytes);
            self.hold_plain(id, buffer);
            return Ok(buffer);
        }
        let kernel = self.kernel;
        let buffer = if let Some(strided) = held.strided {
            let to = self.new_plain(id)?;
            let copy = lower::movement::CopyStrided { from: strided.clone(), shape: self.shape(id).to_vec(), to };
            self.kernel = "copy";
            self.push(Lowered::CopyStrided(copy), &[strided.buffer], &[to]);
            to
        } else {
            let from = held.blocked.expect("a value is held in some way before it is read");
            let to = self.new_plain(id)?;
            let (images, channels, pixels) = self.image(id);
            let reorder = lower::layout::Reorder { to_blocked: false, images, channels, pixels, from, to };
            self.kernel = "layout";
            self.push(Lowered::Reorder(reorder), &[from], &[to]);
            to
        };
        self.kernel = kernel;
        Ok(buffer)
    }

    /// The image `id` blocked, made so if it is not.
    pub fn blocked(&mut self, id: ValueId) -> Result<Buffer, NoPlan> {
        if let Some(buffer) = self.held(id).blocked {
            return Ok(buffer);
        }
        let from = self.plain(id)?;
        let to = self.new_blocked(id)?;
        let (images, channels, pixels) = self.image(id);
        let reorder = lower::layout::Reorder { to_blocked: true, images, channels, pixels, from, to };
        let kernel = std::mem::replace(&mut self.kernel, "layout");
        self.push(Lowered::Reorder(reorder), &[from], &[to]);
        self.kernel = kernel;
        Ok(to)
    }

    /// A value that follows from shapes alone, as a constant of this plan.
    fn known(&mut self, id: ValueId, values: Vec<i64>) -> Result<Buffer, NoPlan> {
        let fact = self.fact(id);
        let bytes: Vec<u8> = match fact.dtype {
            DType::I64 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::I32 => values.iter().flat_map(|&v| (v as i32).to_le_bytes()).collect(),
            _ => values.iter().map(|&v| u8::from(v != 0)).collect(),
        };
        let tensor = Tensor::from_bytes(fact.dtype, self.shape(id), &bytes);
        let tensor = tensor.map_err(|e| {
            NoPlan::Error(RunError::Op {
                node: self.graph.value(id).name.clone(),
                op: "constant".to_string(),
                source: e.into(),
            })
        })?;
        let buffer = self.add(Some(Place::Constant(tensor)), bytes.len());
        self.hold_plain(id, buffer);
        Ok(buffer)
    }

    /// Weights as a kernel wants them: those there are, or packed now.
    pub fn pack(&mut self, recipe: Recipe, len: usize, fill: impl FnOnce(&mut [f32])) -> Result<Buffer, NoPlan> {
        if let Some(&buffer) = self.packed.get(&recipe) {
            return Ok(buffer);
        }
        let packed: Arc<Packed> = self.device.weights.get(recipe.clone(), len, fill).map_err(|error| {
            NoPlan::Error(ResourceError::System { what: "packed weights", message: error.to_string() }.into())
        })?;
        let bytes = len * size_of::<f32>();
        let buffer = self.add(Some(Place::Packed(packed)), bytes);
        self.packed.insert(recipe, buffer);
        Ok(buffer)
    }

    /// Floats in a buffer.
    pub fn floats(&self, buffer: Buffer) -> usize {
        self.buffers[buffer.0 as usize].bytes / size_of::<f32>()
    }

    pub fn need_workspace(&mut self, len: usize) {
        self.workspace_len = self.workspace_len.max(len);
    }

    /// Adds a step that reads and writes these buffers.
    pub fn push(&mut self, lowered: Lowered, reads: &[Buffer], writes: &[Buffer]) {
        let step = self.steps.len();
        for buffer in reads.iter().chain(writes) {
            let building = &mut self.buffers[buffer.0 as usize];
            building.last = building.last.max(step);
        }
        for buffer in writes {
            let building = &mut self.buffers[buffer.0 as usize];
            building.first = building.first.min(step);
        }
        self.steps.push(PlannedStep { lowered, node: self.current, kernel: self.kernel });
    }
}

/// Runs one step's part of a thread.
pub(super) fn run(
    step: &PlannedStep,
    frame: &Frame<'_>,
    worker: &mut Worker<'_>,
    level: cutover_kernels::cpu::IsaLevel,
) -> Result<(), RunError> {
    step.lowered.run(frame, worker, level)
}
