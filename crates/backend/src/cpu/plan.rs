//! Concrete steps for one region and one set of input shapes, and how they are made.

use super::{
    Device,
    frame::{Buffer, Place, Placed},
    lower::{self, Lowered},
    weights::{Packed, Recipe},
};
use crate::{CompileOptions, Numerics, Precision, ResourceError, RunError, Work, attention::Attention};
use cutover_graph::{
    Constant, Fact, Graph, Node, NodeId, TensorFact, ValueId,
    ops::{Facts, InferContext},
    plan::arena::{Interval, place},
};
use cutover_kernels::cpu::{conv::Operands, half::HalfType, quantized::Quantization};
use cutover_tensor::{DType, Shape, Tensor};
use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::Arc,
};

/// Alignment of arena buffers: a cache line, an AVX-512 register.
const ALIGNMENT: usize = 64;

/// Bytes that the steps of a plan read and write, up to which waking threads takes longer than they save.
const SMALL_BYTES: usize = 64 << 10;

/// Nodes that are compiled together, in the order they run.
#[derive(Debug, PartialEq)]
pub(super) struct Region {
    pub nodes: Vec<NodeId>,
    /// Values that come from outside, constants not among them.
    pub inputs: Vec<ValueId>,
    pub outputs: Vec<ValueId>,
}

/// A graph that regions are cut from, with what is known of it before a run.
#[derive(Clone, Copy)]
pub(super) struct Setting<'a> {
    pub graph: &'a Graph,
    /// By value.
    pub constants: &'a [Option<Fact>],
    pub options: CompileOptions,
}

/// All that a run of one set of input shapes needs.
pub(super) struct ShapePlan {
    /// What the inputs are that it is for: their types and shapes, and the elements of those that shapes were computed from.
    pub inputs: Vec<TensorFact>,
    pub input_shapes: Vec<Shape>,
    pub outputs: Vec<PlannedOutput>,
    /// Whether one thread is done before others are awake.
    pub is_small: bool,
    pub steps: Vec<PlannedStep>,
    pub placed: Vec<Placed>,
    pub arena_bytes: usize,
    /// Floats that each thread needs beside the arena.
    pub workspace_len: usize,
}

pub(super) struct PlannedOutput {
    pub dtype: DType,
    pub shape: Shape,
    pub bytes: usize,
}

/// A step, and whose it is.
pub(super) struct PlannedStep {
    pub lowered: Lowered,
    pub node: NodeId,
    pub kernel: &'static str,
    pub work: Work,
}

/// How a value is held. Any of them may be made from another when a step asks for it.
#[derive(Clone, Default)]
pub(super) struct Held {
    /// Row-major.
    pub plain: Option<Buffer>,
    /// `[n][ceil(c/16)][pixels][16]`, for images.
    pub blocked: Option<Buffer>,
    /// As blocked, rounded to bfloat16, in words of two channels.
    pub narrowed: Option<Buffer>,
    /// A strided view of another value's row-major buffer, not copied yet.
    pub strided: Option<Strided>,
    /// The quantized bytes that it is made of, not made yet.
    pub dequantized: Option<Dequantized>,
    /// The dequantization of a constant, not computed yet.
    pub is_deferred: bool,
}

/// Quantized bytes and what floats they stand for.
#[derive(Clone)]
pub(super) struct Dequantized {
    pub view: Strided,
    pub from: Quantization,
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

/// Why no plan can be made.
pub(super) enum NoPlan {
    /// A shape that the region's inputs do not decide.
    Undecided(Undecided),
    Error(RunError),
}

/// Nodes whose results have shapes that those of a region's inputs, and their small integers, do not decide.
#[derive(Debug, Default)]
pub(super) struct Undecided {
    /// They follow from elements that the region computes itself: decided once those are there.
    pub late: Vec<NodeId>,
    /// Only running the node tells.
    pub interpreted: Vec<NodeId>,
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
    pub numerics: Numerics,
    /// What weights of products are held in, where not f32.
    pub half: Option<HalfType>,
    constants: &'a [Option<Fact>],
    /// By value; concrete tensors. Constants are in `constants`.
    facts: Vec<Option<Fact>>,
    held: Vec<Held>,
    /// Readers to come, the region's outputs among them.
    readers: Vec<usize>,
    buffers: Vec<Building>,
    steps: Vec<PlannedStep>,
    /// By address.
    packed: HashMap<*const Packed, Buffer>,
    /// For weights that a file does not align, one after the other.
    aligned: Vec<f32>,
    /// What was computed of constants while planning.
    evaluated: HashMap<ValueId, Constant>,
    /// The region's nodes that read each value, and whether something outside of it does.
    uses: Vec<Vec<NodeId>>,
    is_output: Vec<bool>,
    /// Nodes whose results the steps of others give.
    fused: HashSet<NodeId>,
    /// By the node that ends it.
    attentions: HashMap<NodeId, Attention>,
    workspace_len: usize,
    current: NodeId,
    kernel: &'static str,
}

/// Lowers `region` for inputs of which `inputs` is known: concrete shapes, and elements where shapes follow from them.
pub(super) fn build(
    setting: Setting<'_>,
    device: &Device,
    region: &Region,
    inputs: Vec<TensorFact>,
) -> Result<ShapePlan, NoPlan> {
    let graph = setting.graph;
    let count = graph.value_count();
    let facts = infer(setting, region, &inputs)?;
    let mut builder = Builder {
        graph,
        device,
        numerics: setting.options.numerics,
        half: match setting.options.precision {
            // Refused where it was asked for.
            Precision::F32 | Precision::Tf32 => None,
            Precision::F16 => Some(HalfType::F16),
            Precision::BF16 => Some(HalfType::Bf16),
        },
        constants: setting.constants,
        facts,
        held: vec![Held::default(); count],
        readers: vec![0; count],
        buffers: Vec::new(),
        steps: Vec::new(),
        packed: HashMap::new(),
        aligned: Vec::new(),
        evaluated: HashMap::new(),
        uses: vec![Vec::new(); count],
        is_output: vec![false; count],
        fused: HashSet::new(),
        attentions: HashMap::new(),
        workspace_len: 0,
        current: region.nodes[0],
        kernel: "",
    };
    for (index, &id) in region.inputs.iter().enumerate() {
        let buffer = builder.add(Some(Place::Input(index)), byte_len(builder.fact(id).dtype, &builder.shape(id))?);
        builder.hold_plain(id, buffer);
    }
    for &id in &region.nodes {
        for input in graph.node(id).inputs.iter().flatten() {
            builder.readers[input.index()] += 1;
            builder.uses[input.index()].push(id);
        }
    }
    for output in &region.outputs {
        builder.readers[output.index()] += 1;
        builder.is_output[output.index()] = true;
    }
    for &id in &region.nodes {
        builder.current = id;
        let node = graph.node(id);
        let wanted = node.outputs.iter().any(|o| builder.readers[o.index()] > 0);
        if wanted && !builder.fused.contains(&id) && !node.outputs.iter().all(|o| builder.is_known(*o)) {
            builder.lower(node)?;
        }
        for input in node.inputs.iter().flatten() {
            builder.readers[input.index()] -= 1;
        }
    }
    builder.finish(region, inputs)
}

/// Concrete facts of everything a region computes, from those of its inputs.
pub(super) fn infer(setting: Setting<'_>, region: &Region, inputs: &[TensorFact]) -> Result<Vec<Option<Fact>>, NoPlan> {
    let graph = setting.graph;
    let mut facts: Vec<Option<Fact>> = vec![None; graph.value_count()];
    for (&id, fact) in region.inputs.iter().zip(inputs) {
        facts[id.index()] = Some(Fact::Tensor(fact.clone()));
    }
    let mut undecided = Undecided::default();
    let mut made: HashSet<ValueId> = HashSet::new();
    for &id in &region.nodes {
        let node = graph.node(id);
        let fact = |v: ValueId| facts[v.index()].as_ref().or(setting.constants[v.index()].as_ref());
        let known: Vec<Option<&Fact>> = node.inputs.iter().map(|input| input.and_then(fact)).collect();
        if node.inputs.iter().zip(&known).any(|(input, fact)| input.is_some() && fact.is_none()) {
            continue;
        }
        let context = InferContext { node: &node.name, outputs: node.outputs.len() };
        let inferred = node.op.infer(Facts(&known), &context).map_err(|source| RunError::Op {
            node: node.name.clone(),
            op: node.op.name(),
            source,
        })?;
        if inferred.iter().take(node.outputs.len()).all(is_concrete) && inferred.len() >= node.outputs.len() {
            for (&output, fact) in node.outputs.iter().zip(inferred) {
                facts[output.index()] = Some(fact);
                made.insert(output);
            }
            continue;
        }
        let waits = |input: &&ValueId| made.contains(input) && fact(**input).is_some_and(could_be_known);
        match node.inputs.iter().flatten().any(|input| waits(&input)) {
            true => undecided.late.push(id),
            false => undecided.interpreted.push(id),
        }
    }
    if undecided.is_empty() { Ok(facts) } else { Err(NoPlan::Undecided(undecided)) }
}

/// Whether a plan can be made with it: a tensor of fixed-size elements, and the extents are numbers.
fn is_concrete(fact: &Fact) -> bool {
    let extents = |fact: &TensorFact| fact.shape.iter().flatten().all(|d| d.as_const().is_some_and(|d| d >= 0));
    fact.as_tensor().is_some_and(|fact| fact.shape.is_some() && extents(fact) && fact.dtype != DType::String)
}

/// Whether these elements are such as shapes follow from, and not known yet.
pub(super) fn could_be_known(fact: &Fact) -> bool {
    fact.as_tensor().is_some_and(|fact| {
        let is_list = fact.rank().is_some_and(|rank| rank <= 1);
        // Of floats, the scales of a `Resize`.
        (matches!(fact.dtype, DType::I64 | DType::I32 | DType::Bool) || fact.dtype == DType::F32 && is_list)
            && fact.constant_count().is_some_and(|count| count <= TensorFact::VALUE_LIMIT)
            && fact.constant_value().is_none()
    })
}

impl Undecided {
    pub fn is_empty(&self) -> bool {
        self.late.is_empty() && self.interpreted.is_empty()
    }
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
    fn lower(&mut self, node: &Node) -> Result<(), NoPlan> {
        self.kernel = lower::kernel_name(self.graph, node);
        if lower::lower(self, node)? || lower::lower_any_type(self, node)? {
            return Ok(());
        }
        self.kernel = "reference";
        lower::fallback::lower(self, node)
    }

    fn finish(mut self, region: &Region, inputs: Vec<TensorFact>) -> Result<ShapePlan, NoPlan> {
        // A buffer that nothing reads any more keeps its last step's time.
        let outputs = &region.outputs;
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
            PlannedOutput { dtype: fact.dtype, shape: self.shape(*id), bytes: self.bytes(*id) }
        };
        let touched = self.buffers.iter().filter(|b| b.last >= b.first).map(|b| b.bytes);
        let touched = touched.chain(self.steps.iter().map(|step| step.lowered.bytes_beside_buffers()));
        Ok(ShapePlan {
            input_shapes: region.inputs.iter().map(|&id| self.shape(id)).collect(),
            is_small: touched.fold(0, usize::saturating_add) <= SMALL_BYTES,
            inputs,
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
        let fact = self.facts[id.index()].as_ref().or(self.constants[id.index()].as_ref());
        fact.and_then(Fact::as_tensor).expect("inferred before anything is lowered")
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
        self.graph.constant(id).or_else(|| self.evaluated.get(&id)).filter(|c| c.tensor.dtype() == DType::F32)
    }

    /// The one f32 that `id` is.
    pub fn scalar(&self, id: ValueId) -> Option<f32> {
        let constant = self.constant(id)?;
        (constant.tensor.element_count() == 1).then(|| constant.tensor.to_vec::<f32>().ok()?.first().copied()).flatten()
    }

    /// The tensor that `id` is known to be before the run: a constant, what was computed of constants, or what follows from shapes.
    pub fn known_tensor(&self, id: ValueId) -> Option<Tensor> {
        if let Some(constant) = self.graph.constant(id) {
            return Some(constant.tensor.clone());
        }
        let from_shapes = || {
            let fact = self.fact(id);
            let values = fact.constant_value().filter(|_| fact.dtype != DType::F32)?;
            Tensor::from_bytes(fact.dtype, self.shape(id), &bytes_of_known(fact.dtype, &values)).ok()
        };
        self.evaluated.get(&id).map(|c| c.tensor.clone()).or_else(from_shapes)
    }

    /// Holds `id` as a constant of this plan.
    pub fn hold_constant(&mut self, id: ValueId, tensor: Tensor) {
        let tensor = tensor.aligned();
        let buffer = self.add(Some(Place::Constant(tensor.clone())), tensor.bytes().len());
        self.evaluated.insert(id, Constant::new(tensor));
        self.hold_plain(id, buffer);
    }

    /// Leaves the dequantization of a constant until somebody asks for the floats.
    pub fn defer(&mut self, id: ValueId) {
        self.held[id.index()].is_deferred = true;
    }

    /// Computes the node's inputs that were left: from here on they are constants.
    pub fn settle(&mut self, node: &Node) {
        for &id in node.inputs.iter().flatten() {
            if self.held(id).is_deferred
                && !self.evaluated.contains_key(&id)
                && let Some(tensor) = lower::quantized::evaluate(self, id)
            {
                self.evaluated.insert(id, Constant::new(tensor.aligned()));
            }
        }
    }

    /// The bytes that `id` is held as, if it is not held as floats.
    pub fn dequantized(&self, id: ValueId) -> Option<Dequantized> {
        let held = self.held(id);
        held.dequantized.clone().filter(|_| held.plain.is_none() && held.blocked.is_none())
    }

    pub fn hold_dequantized(&mut self, id: ValueId, dequantized: Dequantized) {
        self.buffers[dequantized.view.buffer.0 as usize].holders.push(id);
        self.held[id.index()].dequantized = Some(dequantized);
    }

    /// The one node that reads `id`, if no other does, nor anything outside of the region.
    pub fn only_reader(&self, id: ValueId) -> Option<(NodeId, &Node)> {
        match &self.uses[id.index()][..] {
            &[only] if !self.is_output[id.index()] => Some((only, self.graph.node(only))),
            _ => None,
        }
    }

    /// Notes that the current node's steps give these nodes' results too.
    pub fn fuse(&mut self, nodes: Vec<NodeId>) {
        self.fused.extend(nodes);
    }

    /// One more reader to come of `id`: a node whose step another node's lowering adds.
    pub fn keep(&mut self, id: ValueId) {
        self.readers[id.index()] += 1;
    }

    /// The end of a [`Builder::keep`].
    pub fn release(&mut self, id: ValueId) {
        self.readers[id.index()] -= 1;
    }

    /// Leaves an attention that the current node begins to its last product.
    pub fn defer_attention(&mut self, attention: Attention) {
        self.attentions.insert(attention.last, attention);
    }

    /// The attention that the current node ends.
    pub fn take_attention(&mut self) -> Option<Attention> {
        self.attentions.remove(&self.current)
    }

    /// Whether `buffer` is exactly as long as `id`.
    pub fn is_all_of(&self, buffer: Buffer, id: ValueId) -> bool {
        self.buffers[buffer.0 as usize].bytes == self.bytes(id)
    }

    /// A constant of this plan that is no value's.
    pub fn new_constant(&mut self, tensor: Tensor) -> Buffer {
        let tensor = tensor.aligned();
        let bytes = tensor.bytes().len();
        self.add(Some(Place::Constant(tensor)), bytes)
    }

    /// Bytes that belong to no value.
    pub fn new_bytes(&mut self, len: usize) -> Result<Buffer, NoPlan> {
        let bytes = byte_len(DType::U8, &[len])?;
        Ok(self.add(None, bytes))
    }

    /// How profiles call the steps to come; gives what they were called.
    pub fn name_kernel(&mut self, kernel: &'static str) -> &'static str {
        std::mem::replace(&mut self.kernel, kernel)
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
        if let Some(held) = held.dequantized.filter(|_| held.blocked.is_none()) {
            return lower::quantized::dequantize(self, id, held);
        }
        if held.is_deferred {
            let tensor = self.evaluated.get(&id).map(|c| c.tensor.clone());
            if let Some(tensor) = tensor.or_else(|| lower::quantized::evaluate(self, id)) {
                self.hold_constant(id, tensor);
                return self.plain(id);
            }
        }
        if let Some(constant) = self.graph.constant(id) {
            let buffer = self.new_constant(constant.tensor.clone());
            self.hold_plain(id, buffer);
            return Ok(buffer);
        }
        let kernel = self.kernel;
        let buffer = if let Some(strided) = held.strided {
            let to = self.new_plain(id)?;
            let size = self.fact(id).dtype.bits() / 8;
            let copy = lower::movement::CopyStrided { from: strided.clone(), shape: self.shape(id).to_vec(), size, to };
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

    /// `id` row-major, for a step that reads bytes: a constant of a file stays where it is, aligned or not.
    pub fn plain_bytes(&mut self, id: ValueId) -> Result<Buffer, NoPlan> {
        match self.graph.constant(id).filter(|_| self.held(id).plain.is_none()) {
            Some(constant) => {
                let tensor = constant.tensor.clone();
                let bytes = tensor.bytes().len();
                Ok(self.add(Some(Place::Constant(tensor)), bytes))
            }
            None => self.plain(id),
        }
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

    /// The image `id` as a convolution of such operands reads it, made so if it is not.
    pub fn image_in(&mut self, id: ValueId, operands: Operands) -> Result<Buffer, NoPlan> {
        match operands {
            Operands::F32 => self.blocked(id),
            Operands::Bf16 => self.narrowed(id),
        }
    }

    /// The image `id` blocked and in bfloat16, made so if it is not.
    fn narrowed(&mut self, id: ValueId) -> Result<Buffer, NoPlan> {
        if let Some(buffer) = self.held(id).narrowed {
            return Ok(buffer);
        }
        let from = self.blocked(id)?;
        let (images, channels, pixels) = self.image(id);
        let len = cutover_kernels::cpu::layout::blocked_len(channels, pixels) / 2;
        let to = self.new_floats(images.saturating_mul(len))?;
        self.held[id.index()].narrowed = Some(to);
        self.buffers[to.0 as usize].holders.push(id);
        let narrow = lower::layout::Narrow { images, channels, pixels, from, to };
        let kernel = std::mem::replace(&mut self.kernel, "rounding to bf16");
        self.push(Lowered::Narrow(narrow), &[from], &[to]);
        self.kernel = kernel;
        Ok(to)
    }

    /// A value that follows from shapes alone, as a constant of this plan.
    fn known(&mut self, id: ValueId, values: Vec<i64>) -> Result<Buffer, NoPlan> {
        let fact = self.fact(id);
        let bytes = bytes_of_known(fact.dtype, &values);
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
        let sources: Vec<Tensor> = recipe.constants.iter().map(|constant| constant.tensor.clone()).collect();
        let huge = self.device.memory.is_huge();
        let packed = self.device.weights.get(recipe, len, huge, |packed| {
            fill(packed);
            // There is one copy now; the other is the file's.
            sources.iter().for_each(Tensor::give_back);
        });
        let packed = packed.map_err(|error| {
            NoPlan::Error(ResourceError::System { what: "packed weights", message: error.to_string() }.into())
        })?;
        if let Some(&buffer) = self.packed.get(&Arc::as_ptr(&packed)) {
            return Ok(buffer);
        }
        let address = Arc::as_ptr(&packed);
        let buffer = self.add(Some(Place::Packed(packed)), len * size_of::<f32>());
        self.packed.insert(address, buffer);
        Ok(buffer)
    }

    /// As [`Builder::pack`], of one constant of f32s, by the backend's threads: `fill` gets the constant, a range of `pieces` and their part of the
    /// packed weights, in which every piece is as long.
    pub fn pack_floats(
        &mut self,
        constant: Constant,
        how: String,
        len: usize,
        pieces: usize,
        fill: impl Fn(&[f32], Range<usize>, &mut [f32]) + Sync,
    ) -> Result<Buffer, NoPlan> {
        // So much of a file is in memory beside its aligned copy.
        const PART_LEN: usize = 1 << 18;
        let Constant { tensor, .. } = constant.clone();
        let pool = &self.device.pool;
        let fill = |floats: &[f32], packed: &mut [f32]| {
            pool.share_out(packed, pieces, &|pieces, packed| fill(floats, pieces, packed));
        };
        let mut aligned = std::mem::take(&mut self.aligned);
        let buffer = self.pack(Recipe { constants: vec![constant], how }, len, |packed| match tensor.as_slice() {
            Ok(floats) => fill(floats, packed),
            Err(_) => {
                let (floats, _) = tensor.bytes().as_chunks();
                aligned.clear();
                aligned.reserve_exact(floats.len());
                for part in floats.chunks(PART_LEN) {
                    aligned.extend(part.iter().map(|&bytes| f32::from_ne_bytes(bytes)));
                    tensor.give_back();
                }
                fill(&aligned, packed);
            }
        });
        self.aligned = aligned;
        buffer
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
        let bytes = reads.iter().chain(writes).map(|b| self.buffers[b.0 as usize].bytes as u64).sum();
        let (operations, integer_operations) = (lowered.operations(), lowered.integer_operations());
        let work = Work { operations, integer_operations, bytes };
        self.steps.push(PlannedStep { lowered, node: self.current, kernel: self.kernel, work });
    }
}

fn bytes_of_known(dtype: DType, values: &[i64]) -> Vec<u8> {
    match dtype {
        DType::I64 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::I32 => values.iter().flat_map(|&v| (v as i32).to_le_bytes()).collect(),
        _ => values.iter().map(|&v| u8::from(v != 0)).collect(),
    }
}
