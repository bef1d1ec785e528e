//! Kernels for one set of input shapes, and how they are made.

use super::{
    code::{self, Binding, Function, GROUP, Operand, Text},
    device::{Candidate, Device, Driver, Limits, Solution, Weight},
    lower,
    stock::{Problem, Solutions, Solved, Stock, Stocked},
};
use crate::{
    CompileOptions, Numerics, Precision, ResourceError, RunError, Work,
    attention::{Attention, Known},
};
use cutover_graph::{
    Constant, Fact, Graph, Node, NodeId, Op, Plan, TensorFact, ValueId,
    ops::{Facts, InferContext},
    plan::arena::{Interval, place},
};
use cutover_kernels::cuda::Argument;
use cutover_tensor::{DType, Shape, Tensor};
use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
    sync::Arc,
};

/// A range of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BufferId(pub u32);

/// Functions that one kernel is made of at most.
const FUSED: usize = 24;

/// Bytes at the arena's begin where kernels say what they found wrong.
pub(crate) const FAULT_BYTES: usize = 256;

/// A [`ShapePlan`] with its kernels and weights on a device: all that a run of one set of input shapes needs.
pub(crate) struct Ready<D: Driver> {
    pub plan: ShapePlan,
    pub pipelines: Vec<Arc<D::Pipeline>>,
    pub weights: Vec<Arc<Weight<D>>>,
}

/// What a run of one set of input shapes does, whatever the device.
pub(crate) struct ShapePlan {
    /// Types and shapes, and the elements of those inputs that shapes were computed from.
    pub key: Vec<TensorFact>,
    /// By input: where it goes, if any kernel reads it.
    pub inputs: Vec<Option<Range>>,
    pub outputs: Vec<PlannedOutput>,
    pub steps: Vec<Step>,
    pub arena_bytes: u64,
    /// Outputs as they come back, behind the faults.
    pub staging_bytes: u64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    pub offset: u64,
    pub bytes: u64,
}

pub(crate) struct PlannedOutput {
    pub dtype: DType,
    pub shape: Shape,
    pub from: Source,
    /// Whether an element is a byte there, of types that may also be a word.
    pub is_bytes: bool,
}

/// Where an output is.
pub(crate) enum Source {
    /// Shapes alone determine it.
    Host(Tensor),
    /// In the arena, or a weight, and in the staging buffer at an offset.
    Device { place: Place, staged_at: u64, bytes: u64 },
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    Arena(Range),
    /// By its number among the plan's.
    Weight(usize),
    /// A range of a weight.
    PartOfWeight(usize, Range),
}

/// One dispatch.
pub(crate) struct Step {
    /// By its number among the plan's.
    pub pipeline: usize,
    pub bindings: Vec<Place>,
    pub groups: [u32; 3],
    pub node: String,
    pub op: String,
    pub kernel: &'static str,
    pub work: Work,
}

/// Why no plan can be made.
pub(crate) enum NoPlan {
    /// This node can't be run here.
    Refused {
        node: NodeId,
        reason: String,
    },
    /// The shapes of this node's results, or what its kernel is, follow from elements of inputs, or of what the graph computes.
    Undecided {
        node: NodeId,
        reason: String,
    },
    Error(RunError),
}

impl<E: Into<RunError>> From<E> for NoPlan {
    fn from(error: E) -> NoPlan {
        NoPlan::Error(error.into())
    }
}

/// Why a node has no kernel.
pub(crate) enum Unable {
    Because(String),
    /// It follows from elements that are not known yet.
    Unknown(String),
    Error(ResourceError),
}

impl From<ResourceError> for Unable {
    fn from(error: ResourceError) -> Unable {
        Unable::Error(error)
    }
}

impl From<&str> for Unable {
    fn from(reason: &str) -> Unable {
        Unable::Because(reason.to_string())
    }
}

impl From<String> for Unable {
    fn from(reason: String) -> Unable {
        Unable::Because(reason)
    }
}

struct Building {
    bytes: usize,
    weight: Option<usize>,
}

struct PlannedStep {
    pipeline: usize,
    /// And what of it, `[begin, end]` in bytes, where that is not all.
    bindings: Vec<(BufferId, Option<[usize; 2]>)>,
    groups: [u32; 3],
    node: NodeId,
    kernel: &'static str,
    work: Work,
}

/// Makes a [`ShapePlan`]: each node's lowering defines functions and adds kernels.
pub(crate) struct Builder<'a> {
    pub graph: &'a Graph,
    pub gpu: &'a Limits,
    pub numerics: Numerics,
    pub precision: Precision,
    stock: &'a mut dyn Stock,
    constants: &'a [Option<Fact>],
    facts: Vec<Option<Fact>>,
    held: Vec<Option<Operand>>,
    /// What was computed while planning.
    evaluated: HashMap<ValueId, Constant>,
    /// Values that are in memory in 16 bits too, for products of such.
    narrowed: HashMap<ValueId, BufferId>,
    /// Pictures that are in memory by channels: of floats in 16 bits, of bytes as signed ones, four a word.
    by_channels: HashMap<ValueId, BufferId>,
    /// By value: the nodes that read it.
    uses: Vec<Vec<NodeId>>,
    is_output: Vec<bool>,
    /// Nodes whose results the steps of others give.
    fused: HashSet<NodeId>,
    /// By the product that ends it.
    attentions: HashMap<NodeId, Attention>,
    buffers: Vec<Building>,
    steps: Vec<PlannedStep>,
    current: NodeId,
    pub kernel: &'static str,
}

/// A problem for kernels that were written by hand, or a library, where the device has some.
pub(super) struct Written<'a> {
    /// What the kernels call, in WGSL: `functions`, which follow `text`.
    pub text: Text,
    pub functions: &'a str,
    /// The family's inputs, and what the pointers that `solutions` add behind those of the functions are.
    pub inputs: &'a [BufferId],
    pub more: &'a [BufferId],
    pub output: BufferId,
    pub solutions: Solutions<'a>,
    /// What the solution that was chosen is called.
    pub name: &'a dyn Fn(&Solution) -> &'static str,
    pub work: Work,
}

/// What a kernel begins with, and its groups.
pub(super) struct Main {
    pub text: String,
    pub groups: [u32; 3],
}

/// The faults' own range.
pub(crate) const FAULTS: BufferId = BufferId(0);

/// Lowers the plan for inputs of which `inputs` is known.
pub(crate) fn build<D: Driver>(
    plan: &Plan,
    device: &Device<D>,
    options: &CompileOptions,
    constants: &[Option<Fact>],
    inputs: &[TensorFact],
) -> Result<Ready<D>, NoPlan> {
    let mut stock = Stocked { device, pipelines: Vec::new(), weights: Vec::new() };
    let plan = build_from(plan, device.driver.limits(), options, &mut stock, constants, inputs)?;
    Ok(Ready { plan, pipelines: stock.pipelines, weights: stock.weights })
}

fn build_from(
    plan: &Plan,
    gpu: &Limits,
    options: &CompileOptions,
    stock: &mut dyn Stock,
    constants: &[Option<Fact>],
    inputs: &[TensorFact],
) -> Result<ShapePlan, NoPlan> {
    let graph = plan.graph();
    let count = graph.value_count();
    let mut builder = Builder {
        graph,
        gpu,
        numerics: options.numerics,
        precision: options.precision,
        stock,
        constants,
        facts: infer(plan, constants, inputs)?,
        held: vec![None; count],
        evaluated: HashMap::new(),
        narrowed: HashMap::new(),
        by_channels: HashMap::new(),
        uses: vec![Vec::new(); count],
        is_output: vec![false; count],
        fused: HashSet::new(),
        attentions: HashMap::new(),
        buffers: vec![Building { bytes: FAULT_BYTES, weight: None }],
        steps: Vec::new(),
        current: NodeId::default(),
        kernel: "",
    };
    let mut entering = Vec::new();
    for &id in graph.inputs() {
        let dtype = builder.dtype(id);
        let (bytes, held): (usize, fn(BufferId, DType) -> Operand) = match code::is_byte(dtype) {
            true => (builder.count(id), Operand::Bytes),
            false => (builder.byte_len(id)?, Operand::Buffer),
        };
        let buffer = builder.add(bytes);
        builder.held[id.index()] = Some(held(buffer, dtype));
        entering.push(buffer);
    }
    for &id in plan.order() {
        graph.node(id).inputs.iter().flatten().for_each(|input| builder.uses[input.index()].push(id));
    }
    for output in graph.outputs() {
        builder.is_output[output.index()] = true;
    }
    for &id in plan.order() {
        builder.current = id;
        let node = graph.node(id);
        if !builder.fused.contains(&id) && node.outputs.iter().any(|&output| builder.is_read(output)) {
            builder.lower(node).map_err(|unable| match unable {
                Unable::Because(reason) => NoPlan::Refused { node: id, reason },
                Unable::Unknown(reason) => NoPlan::Undecided { node: id, reason },
                Unable::Error(error) => NoPlan::Error(error.into()),
            })?;
        }
    }
    builder.finish(inputs, &entering)
}

/// Concrete facts of everything, from those of the inputs.
fn infer(plan: &Plan, constants: &[Option<Fact>], inputs: &[TensorFact]) -> Result<Vec<Option<Fact>>, NoPlan> {
    let graph = plan.graph();
    let mut facts: Vec<Option<Fact>> = vec![None; graph.value_count()];
    for (&id, fact) in graph.inputs().iter().zip(inputs) {
        facts[id.index()] = Some(Fact::Tensor(fact.clone()));
    }
    for &id in plan.order() {
        let node = graph.node(id);
        let fact = |v: ValueId| facts[v.index()].as_ref().or(constants[v.index()].as_ref());
        let known: Vec<Option<&Fact>> = node.inputs.iter().map(|input| input.and_then(fact)).collect();
        let context = InferContext { node: &node.name, outputs: node.outputs.len() };
        let inferred = node.op.infer(Facts(&known), &context).map_err(|source| RunError::Op {
            node: node.name.clone(),
            op: node.op.name(),
            source,
        })?;
        let is_concrete = |fact: &Fact| fact.as_tensor().is_some_and(|fact| fact.constant_shape().is_some());
        if inferred.len() < node.outputs.len() || !inferred.iter().take(node.outputs.len()).all(is_concrete) {
            let reason = "its shape follows from what a run computes".to_string();
            return Err(NoPlan::Undecided { node: id, reason });
        }
        for (&output, fact) in node.outputs.iter().zip(inferred) {
            facts[output.index()] = Some(fact);
        }
    }
    Ok(facts)
}

impl Builder<'_> {
    fn lower(&mut self, node: &Node) -> Result<(), Unable> {
        self.kernel = "";
        if node.outputs.iter().all(|&output| self.constant(output).is_some()) {
            return Ok(());
        }
        if node.outputs.iter().all(|&output| self.count(output) == 0) {
            for &output in &node.outputs {
                let buffer = self.add(0);
                self.held[output.index()] = Some(Operand::Buffer(buffer, self.dtype(output)));
            }
            return Ok(());
        }
        if lower::attention::lower(self, node)? {
            return Ok(());
        }
        for &id in node.inputs.iter().flatten().chain(&node.outputs) {
            self.check_size(id)?;
        }
        lower::lower(self, node)?;
        for &output in &node.outputs {
            let is_function = matches!(self.held[output.index()], Some(Operand::Function(_)));
            // Computed once where several read it, but for what is only seen otherwise than it lies.
            let is_read_twice = self.uses[output.index()].len() > 1 && !self.is_view_by_channels(node, output);
            if is_function && (is_read_twice || self.is_output[output.index()]) {
                self.in_memory(output)?;
            }
        }
        Ok(())
    }

    /// Whether `output` lies by channels, or is widened from what does.
    fn is_view_by_channels(&self, node: &Node, output: ValueId) -> bool {
        let is_widened = matches!(node.op, Op::DequantizeLinear(_));
        let from = node.inputs.first().copied().flatten().filter(|_| is_widened).unwrap_or(output);
        self.by_channels.contains_key(&from)
    }

    fn is_read(&self, id: ValueId) -> bool {
        !self.uses[id.index()].is_empty() || self.is_output[id.index()]
    }

    /// Whether kernels reach all of `id`.
    pub fn check_size(&self, id: ValueId) -> Result<(), Unable> {
        let bytes = self.count(id).saturating_mul(code::storage_bytes(self.dtype(id)));
        let most = self.gpu.tensor_bytes();
        if bytes as u64 > most {
            let name = &self.graph.value(id).name;
            return Err(format!("'{name}' takes {bytes} bytes, a kernel of this device reads {most} at most").into());
        }
        Ok(())
    }

    fn finish(mut self, inputs: &[TensorFact], entering: &[BufferId]) -> Result<ShapePlan, NoPlan> {
        let outputs: Vec<ValueId> = self.graph.outputs().to_vec();
        let mut from: Vec<Result<Tensor, BufferId>> = Vec::new();
        let mut are_bytes = Vec::new();
        for &id in &outputs {
            let in_memory = match self.constant(id) {
                Some(constant) => Err(constant.tensor),
                None => Ok(self.whole(id).map_err(|unable| match unable {
                    Unable::Because(reason) | Unable::Unknown(reason) => NoPlan::Refused { node: self.current, reason },
                    Unable::Error(error) => NoPlan::Error(error.into()),
                })?),
            };
            are_bytes.push(matches!(in_memory, Ok(Operand::Bytes(..))));
            from.push(match in_memory {
                Err(constant) => Ok(constant),
                Ok(Operand::Buffer(buffer, _) | Operand::Bytes(buffer, _)) => Err(buffer),
                Ok(_) => unreachable!("what is in memory is in a buffer"),
            });
        }
        let end = self.steps.len();
        let mut intervals = vec![Interval { size_bytes: 0, first: usize::MAX, last: 0 }; self.buffers.len()];
        let mut touch = |buffer: BufferId, at: usize| {
            let interval = &mut intervals[buffer.0 as usize];
            (interval.first, interval.last) = (interval.first.min(at), interval.last.max(at));
        };
        self.steps.iter().enumerate().for_each(|(at, step)| step.bindings.iter().for_each(|&(b, _)| touch(b, at)));
        entering.iter().for_each(|&buffer| touch(buffer, 0));
        from.iter().filter_map(|from| from.as_ref().err()).for_each(|&buffer| touch(buffer, end));
        touch(FAULTS, 0);
        touch(FAULTS, end);
        for (interval, building) in intervals.iter_mut().zip(&self.buffers) {
            let is_placed = building.weight.is_none() && interval.first != usize::MAX;
            interval.size_bytes = if is_placed { building.bytes.max(4) } else { 0 };
            interval.first = interval.first.min(interval.last);
        }
        // The faults' range is the first: everything else lies behind it.
        let placed = place(&intervals[1..], self.gpu.alignment);
        let too_large =
            || ResourceError::Memory { what: "the arena", needed: u64::MAX, available: self.gpu.buffer_bytes };
        let placed = placed.ok_or_else(|| NoPlan::Error(too_large().into()))?;
        let begin = FAULT_BYTES.next_multiple_of(self.gpu.alignment);
        let arena_bytes = (placed.total_bytes + begin) as u64;
        if arena_bytes > self.gpu.buffer_bytes {
            let available = self.gpu.buffer_bytes;
            return Err(ResourceError::Memory { what: "the arena", needed: arena_bytes, available }.into());
        }
        let range = |buffer: BufferId| {
            let at = buffer.0 as usize;
            let offset = if at == 0 { 0 } else { placed.offsets[at - 1] + begin };
            Range { offset: offset as u64, bytes: self.buffers[at].bytes.max(4).next_multiple_of(4) as u64 }
        };
        let place = |buffer: BufferId| match self.buffers[buffer.0 as usize].weight {
            Some(weight) => Place::Weight(weight),
            None => Place::Arena(range(buffer)),
        };
        let part = |(buffer, part): (BufferId, Option<[usize; 2]>)| match (place(buffer), part) {
            (whole, None) => whole,
            (Place::Arena(range), Some([begin, end])) => {
                let bytes = (end - begin).next_multiple_of(4) as u64;
                Place::Arena(Range { offset: range.offset + begin as u64, bytes })
            }
            (Place::Weight(at) | Place::PartOfWeight(at, _), Some([begin, end])) => {
                Place::PartOfWeight(at, Range { offset: begin as u64, bytes: (end - begin).next_multiple_of(4) as u64 })
            }
        };
        let mut staged = FAULT_BYTES as u64;
        let planned = outputs.iter().zip(from).zip(are_bytes).map(|((&id, from), is_bytes)| PlannedOutput {
            is_bytes,
            dtype: self.dtype(id),
            shape: self.shape(id),
            from: match from {
                Ok(tensor) => Source::Host(tensor),
                Err(buffer) => {
                    let bytes = self.buffers[buffer.0 as usize].bytes.next_multiple_of(4) as u64;
                    let staged_at = staged;
                    staged += bytes;
                    Source::Device { place: place(buffer), staged_at, bytes }
                }
            },
        });
        let planned: Vec<PlannedOutput> = planned.collect();
        let used = |buffer: &BufferId| intervals[buffer.0 as usize].size_bytes > 0;
        let is_read = |buffer: &BufferId| {
            self.steps.iter().any(|step| step.bindings.iter().any(|(bound, _)| bound == buffer))
                || planned.iter().any(|output| matches!(&output.from, Source::Device { place: Place::Arena(at), .. } if at.offset == range(*buffer).offset))
        };
        Ok(ShapePlan {
            key: inputs.to_vec(),
            inputs: entering.iter().map(|b| (used(b) && is_read(b)).then(|| range(*b))).collect(),
            outputs: planned,
            steps: self
                .steps
                .iter()
                .map(|step| Step {
                    pipeline: step.pipeline,
                    bindings: step.bindings.iter().map(|&bound| part(bound)).collect(),
                    groups: step.groups,
                    node: self.graph.node(step.node).name.clone(),
                    op: self.graph.node(step.node).op.name(),
                    kernel: step.kernel,
                    work: step.work,
                })
                .collect(),
            arena_bytes,
            staging_bytes: staged,
        })
    }

    /// A buffer of so many bytes, the last word whole: kernels read words.
    fn add(&mut self, bytes: usize) -> BufferId {
        self.buffers.push(Building { bytes: bytes.next_multiple_of(4), weight: None });
        BufferId(self.buffers.len() as u32 - 1)
    }

    fn byte_len(&self, id: ValueId) -> Result<usize, ResourceError> {
        let bytes = self.count(id).checked_mul(code::storage_bytes(self.dtype(id)));
        let available = self.gpu.tensor_bytes();
        let bytes = bytes.filter(|&bytes| bytes as u64 <= available);
        bytes.ok_or(ResourceError::Memory { what: "a tensor on the GPU", needed: u64::MAX, available })
    }

    // What lowerings ask.

    pub fn fact(&self, id: ValueId) -> &TensorFact {
        let fact = self.facts[id.index()].as_ref().or(self.constants[id.index()].as_ref());
        fact.and_then(Fact::as_tensor).expect("inferred before anything is lowered")
    }

    pub fn shape(&self, id: ValueId) -> Shape {
        self.fact(id).constant_shape().expect("inferred as concrete").into()
    }

    pub fn count(&self, id: ValueId) -> usize {
        self.shape(id).element_count()
    }

    pub fn dtype(&self, id: ValueId) -> DType {
        self.fact(id).dtype
    }

    /// What is known of `id` before the run.
    pub fn constant(&self, id: ValueId) -> Option<Constant> {
        if let Some(constant) = self.graph.constant(id).or_else(|| self.evaluated.get(&id)) {
            return Some(constant.clone());
        }
        let (values, shape) = (self.fact(id).constant_value()?, self.shape(id));
        let tensor = match self.dtype(id) {
            DType::I64 => Tensor::from_vec(shape, values).ok()?,
            DType::I32 => {
                let values = values.into_iter().map(i32::try_from).collect::<Result<Vec<_>, _>>().ok()?;
                Tensor::from_vec(shape, values).ok()?
            }
            DType::Bool => Tensor::from_bools(shape, &values.iter().map(|&v| v != 0).collect::<Vec<_>>()).ok()?,
            _ => return None,
        };
        Some(Constant::new(tensor))
    }

    pub fn known(&self, id: ValueId) -> Option<Tensor> {
        self.constant(id).map(|constant| constant.tensor)
    }

    /// The whole numbers that `id` holds, known before the run.
    pub fn integers(&self, id: ValueId) -> Option<Vec<i64>> {
        if let Some(values) = self.fact(id).constant_value() {
            return Some(values);
        }
        let tensor = self.known(id)?;
        match tensor.dtype() {
            DType::I64 => tensor.to_vec::<i64>().ok(),
            DType::I32 => Some(tensor.to_vec::<i32>().ok()?.into_iter().map(i64::from).collect()),
            _ => None,
        }
    }

    /// The nodes that read `id`.
    pub fn readers(&self, id: ValueId) -> impl Iterator<Item = &Node> {
        self.uses[id.index()].iter().map(|&node| self.graph.node(node))
    }

    /// Notes that the current node's steps, or those of one to come, give these nodes' results too.
    pub fn fuse(&mut self, nodes: impl IntoIterator<Item = NodeId>) {
        self.fused.extend(nodes);
    }

    /// Leaves an attention that the current node begins to its last product.
    pub fn defer_attention(&mut self, attention: Attention) {
        self.attentions.insert(attention.last, attention);
    }

    /// The attention that the current node ends.
    pub fn take_attention(&mut self) -> Option<Attention> {
        self.attentions.remove(&self.current)
    }

    /// Whether `id` lies in memory, row-major.
    pub fn is_in_memory(&self, id: ValueId) -> bool {
        matches!(self.held[id.index()], Some(Operand::Buffer(..) | Operand::Bytes(..)))
    }

    /// The value of `id` is `tensor`, whatever the inputs hold.
    pub fn define_constant(&mut self, id: ValueId, constant: Constant) {
        self.evaluated.insert(id, constant);
    }

    /// `id` as something that functions read.
    pub fn operand(&mut self, id: ValueId) -> Result<Operand, Unable> {
        if let Some(operand) = &self.held[id.index()] {
            return Ok(operand.clone());
        }
        let name = || self.graph.value(id).name.clone();
        let constant = self.constant(id).ok_or_else(|| Unable::Because(format!("'{}' is not computed", name())))?;
        let operand = match uniform(&constant.tensor) {
            Some(literal) => Operand::Literal(literal, constant.tensor.dtype()),
            None if code::is_byte(constant.tensor.dtype()) => {
                let bytes = |tensor: &Tensor| {
                    let mut bytes = tensor.bytes().to_vec();
                    bytes.resize(bytes.len().next_multiple_of(4), 0);
                    bytes
                };
                match self.upload(&constant, "bytes", bytes)? {
                    Operand::Buffer(buffer, dtype) => Operand::Bytes(buffer, dtype),
                    other => other,
                }
            }
            None => self.upload(&constant, "plain", super::executable::to_device)?,
        };
        self.held[id.index()] = Some(operand.clone());
        Ok(operand)
    }

    /// `constant` as a product's or convolution's weights are held: in 16 bits where that is asked for, unless something in it is
    /// beyond their range. Kernels that were written by hand narrow what they read themselves.
    pub fn weights(&self, constant: Constant) -> Constant {
        let is_wanted = self.precision == Precision::F16 && self.gpu.written.is_none();
        if !is_wanted || constant.tensor.dtype() != DType::F32 {
            return constant;
        }
        let words = constant.tensor.bytes().chunks_exact(4);
        let rounded = words.map(|word| half::f16::from_f32(f32::from_le_bytes([word[0], word[1], word[2], word[3]])));
        let rounded: Vec<half::f16> = rounded.collect();
        if rounded.iter().any(|value| value.is_infinite()) {
            return constant;
        }
        let bytes: Vec<u8> = rounded.iter().flat_map(|value| value.to_le_bytes()).collect();
        let tensor = Tensor::from_bytes(DType::F16, constant.tensor.shape().clone(), &bytes);
        tensor.map_or(constant.clone(), |tensor| Constant::derived(tensor, "f16", &[constant.identity()]))
    }

    /// `constant` on the device, in the form that `recipe` names and `bytes` makes.
    pub fn upload(
        &mut self,
        constant: &Constant,
        recipe: &'static str,
        bytes: impl Fn(&Tensor) -> Vec<u8>,
    ) -> Result<Operand, Unable> {
        let mut bytes = || bytes(&constant.tensor);
        let (weight, length) = self.stock.weight(constant.identity(), recipe, &mut bytes)?;
        if length > self.gpu.tensor_bytes() {
            return Err(format!("a constant of {length} bytes").into());
        }
        let same = |b: &Building| b.weight == Some(weight);
        let at = self.buffers.iter().position(same).unwrap_or_else(|| {
            self.buffers.push(Building { bytes: length as usize, weight: Some(weight) });
            self.buffers.len() - 1
        });
        Ok(Operand::Buffer(BufferId(at as u32), constant.tensor.dtype()))
    }

    /// `id` in memory, row-major: computed now if nobody has.
    pub fn in_memory(&mut self, id: ValueId) -> Result<Operand, Unable> {
        let operand = self.operand(id)?;
        if let Operand::Buffer(..) | Operand::Bytes(..) = operand {
            return Ok(operand);
        }
        let count = self.count(id);
        let placed = self.placed(&converted(operand, self.stored_as(id)), count)?;
        self.held[id.index()] = Some(placed.clone());
        Ok(placed)
    }

    /// The first `count` elements of `operand` in memory, bytes as such.
    pub fn placed(&mut self, operand: &Operand, count: usize) -> Result<Operand, Unable> {
        let dtype = operand.dtype();
        if !code::is_byte(dtype) {
            return Ok(Operand::Buffer(self.materialise(operand, count)?, dtype));
        }
        let buffer = self.add(count);
        if count == 0 {
            return Ok(Operand::Bytes(buffer, dtype));
        }
        let mut text = Text::default();
        let function = text.function(operand);
        let store = text.store(buffer, "u32");
        let (groups, index) = code::grid(count.div_ceil(4), GROUP);
        let byte = code::byte(dtype, &format!("{function}(min(i * 4u + j, {}u))", count - 1));
        let kernel = format!(
            "@compute @workgroup_size({GROUP})\nfn main(@builtin(global_invocation_id) at: vec3<u32>) {{\n{index}\nvar word = 0u;\nfor (var j = 0u; j < 4u; j = j + 1u) {{ word = word | ({byte} << (j * 8u)); }}\n{store}(i, word);\n}}\n"
        );
        let kernel_name = if self.kernel.is_empty() { "elementwise" } else { self.kernel };
        self.push(text, &kernel, groups, kernel_name, Work::default())?;
        Ok(Operand::Bytes(buffer, dtype))
    }

    /// The first `count` elements of `operand`, of the value `id`, in memory as what the graph says, none in less than half a word.
    pub fn copied(&mut self, id: ValueId, operand: Operand) -> Result<BufferId, Unable> {
        let (dtype, count) = (self.dtype(id), self.count(id));
        self.materialise(&converted(operand, dtype), count)
    }

    /// The first `count` elements of `operand` in memory, none in less than half a word.
    pub fn materialise(&mut self, operand: &Operand, count: usize) -> Result<BufferId, Unable> {
        let dtype = operand.dtype();
        let buffer = self.add(count * code::storage_bytes(dtype));
        if count == 0 {
            return Ok(buffer);
        }
        if let Operand::Function(function) = operand
            && lower::written::transposed(self, function, buffer)
        {
            return Ok(buffer);
        }
        let mut text = Text::default();
        let function = text.function(operand);
        let store = text.store(buffer, code::storage_type(dtype));
        let (groups, index) = code::grid(count, GROUP);
        let element = code::stored(dtype, &format!("{function}(i)"));
        let kernel = format!(
            "@compute @workgroup_size({GROUP})\nfn main(@builtin(global_invocation_id) at: vec3<u32>) {{\n{index}\n{store}(i, {element});\n}}\n"
        );
        let kernel_name = if self.kernel.is_empty() { "elementwise" } else { self.kernel };
        self.push(text, &kernel, groups, kernel_name, Work::default())?;
        Ok(buffer)
    }

    /// `id` is this function of operands. What would be too much for one kernel is computed first.
    pub fn define(&mut self, id: ValueId, body: impl Into<String>, operands: Vec<Operand>) -> Result<(), Unable> {
        let function = Function::new(self.dtype(id), body, operands);
        self.define_function(id, function)
    }

    /// As [`Builder::define`], of a function that is made already.
    pub fn define_function(&mut self, id: ValueId, mut function: Function) -> Result<(), Unable> {
        let most = self.gpu.bindings.saturating_sub(2);
        if function.buffers > most || function.depth > FUSED {
            return Err(format!("reads {} tensors, this device {most} at once", function.buffers).into());
        }
        function.depth = function.depth.max(1);
        self.held[id.index()] = Some(Operand::Function(Rc::new(function)));
        Ok(())
    }

    /// The operands of a node's inputs `ids`: functions as far as one kernel may hold them all, what is left in memory.
    pub fn operands(&mut self, ids: &[ValueId]) -> Result<Vec<Operand>, Unable> {
        let mut operands = ids.iter().map(|&id| self.operand(id)).collect::<Result<Vec<_>, _>>()?;
        let most = self.gpu.bindings.saturating_sub(2);
        loop {
            let all = Function::new(DType::F32, "", operands.clone());
            if all.buffers <= most && all.depth < FUSED {
                return Ok(operands);
            }
            let size = |operand: &Operand| if let Operand::Function(f) = operand { f.buffers + f.depth } else { 0 };
            let largest =
                (0..operands.len()).max_by_key(|&at| size(&operands[at])).filter(|&at| size(&operands[at]) > 0);
            let Some(at) = largest else { return Ok(operands) };
            let operand = self.in_memory(ids[at])?;
            // The same value may be there twice.
            (0..ids.len()).filter(|&other| ids[other] == ids[at]).for_each(|other| operands[other] = operand.clone());
        }
    }

    /// The operand of `id`, in memory if computing it takes more than a few functions: for what reads an element more than once.
    pub fn reread(&mut self, id: ValueId) -> Result<Operand, Unable> {
        let operand = self.operand(id)?;
        match operand {
            Operand::Function(_) => {
                // It is what another operator defines, not the kernel of the one that is lowered.
                let of_node = std::mem::replace(&mut self.kernel, "elementwise");
                let operand = self.in_memory(id);
                self.kernel = of_node;
                operand
            }
            other => Ok(other),
        }
    }

    /// A buffer for the whole of `id`, that a kernel to be pushed fills.
    pub fn output(&mut self, id: ValueId) -> Result<BufferId, Unable> {
        let bytes = self.byte_len(id)?;
        let buffer = self.add(bytes);
        self.held[id.index()] = Some(Operand::Buffer(buffer, self.dtype(id)));
        Ok(buffer)
    }

    /// What elements of `id` are in memory: what the graph says, or 16 bits for 32 where that is asked for. Outputs are what the graph says, and
    /// kernels that were written by hand choose what they read themselves.
    pub fn stored_as(&self, id: ValueId) -> DType {
        let is_wanted = self.precision == Precision::F16 && self.gpu.written.is_none() && !self.is_output[id.index()];
        match self.dtype(id) {
            DType::F32 if is_wanted => DType::F16,
            dtype => dtype,
        }
    }

    /// As [`Builder::output`], of such elements.
    pub fn output_stored(&mut self, id: ValueId) -> Result<(BufferId, DType), Unable> {
        self.byte_len(id)?;
        let dtype = self.stored_as(id);
        let buffer = self.add(self.count(id) * code::storage_bytes(dtype));
        self.held[id.index()] = Some(Operand::Buffer(buffer, dtype));
        Ok((buffer, dtype))
    }

    /// `id` in memory as what the graph says.
    fn whole(&mut self, id: ValueId) -> Result<Operand, Unable> {
        let operand = self.in_memory(id)?;
        let dtype = self.dtype(id);
        if operand.dtype() == dtype { Ok(operand) } else { self.placed(&converted(operand, dtype), self.count(id)) }
    }

    /// As [`Builder::output`], an element a byte.
    pub fn output_bytes(&mut self, id: ValueId) -> BufferId {
        let buffer = self.add(self.count(id));
        self.held[id.index()] = Some(Operand::Bytes(buffer, self.dtype(id)));
        buffer
    }

    /// A buffer for `count` floats that the node's own kernels hand on.
    pub fn scratch(&mut self, count: usize) -> BufferId {
        self.add(count * size_of::<f32>())
    }

    /// As [`Builder::scratch`], of numbers of 16 bits.
    pub fn scratch_halves(&mut self, count: usize) -> BufferId {
        self.add(2 * count)
    }

    /// `id` is in `buffer`, which kernels that were pushed have filled.
    pub fn hold(&mut self, id: ValueId, buffer: BufferId) {
        self.held[id.index()] = Some(Operand::Buffer(buffer, self.dtype(id)));
    }

    /// `id` is `of` under another shape.
    pub fn alias(&mut self, id: ValueId, of: ValueId) -> Result<(), Unable> {
        let operand = self.operand(of)?;
        self.held[id.index()] = Some(operand);
        Ok(())
    }

    /// Adds a dispatch of `kernel`, which follows the functions and bindings of `text`.
    pub fn push(
        &mut self,
        text: Text,
        kernel: &str,
        groups: [u32; 3],
        name: &'static str,
        work: Work,
    ) -> Result<(), Unable> {
        self.push_fastest(text, kernel, vec![Main { text: String::new(), groups }], name, work)
    }

    /// As [`Builder::push`], of several kernels that give the same and follow `common`: the fastest where the device measures, or else the first.
    pub fn push_fastest(
        &mut self,
        text: Text,
        common: &str,
        mains: Vec<Main>,
        name: &'static str,
        work: Work,
    ) -> Result<(), Unable> {
        let mut candidates = Vec::new();
        let mut bindings = Vec::new();
        for Main { text: main, groups } in mains {
            if groups.iter().any(|&n| n > self.gpu.groups) {
                continue;
            }
            let bytes = |buffer: BufferId| self.buffers[buffer.0 as usize].bytes;
            let (mut source, bound) = text.clone().finish(&format!("{common}{main}"), self.gpu, &bytes)?;
            // One buffer can't be bound for reading and for writing at once, and the arena is one.
            let is_weight = |b: &Binding| self.buffers[b.buffer.0 as usize].weight.is_some();
            let read_only: Vec<bool> = bound.iter().map(is_weight).collect();
            for (at, (binding, read_only)) in bound.iter().zip(&read_only).enumerate() {
                if !binding.writes && !read_only {
                    let head = format!("@binding({at}) var<storage, ");
                    source = source.replacen(&format!("{head}read>"), &format!("{head}read_write>"), 1);
                }
            }
            let of = |b: &Binding| b.part.map_or(bytes(b.buffer), |[begin, end]| end - begin) as u64;
            let bytes = bound.iter().map(of).collect();
            candidates.push(Candidate { source, read_only, groups, bytes });
            bindings = bound;
        }
        let most = self.gpu.bindings;
        if bindings.len() > most {
            return Err(format!("reads {} tensors, this device {most} at once", bindings.len()).into());
        }
        let may_measure = candidates.len() > 1 && self.numerics != Numerics::Strict;
        let fastest = if may_measure { self.stock.fastest(&candidates) } else { 0 };
        if candidates.is_empty() {
            return Err("more groups of invocations than the device takes".into());
        }
        let Candidate { source, read_only, groups, .. } = candidates.swap_remove(fastest);
        let pipeline = self.stock.pipeline(&source, &read_only).map_err(|message| {
            tracing::warn!("a kernel of node '{}' does not compile: {message}", self.graph.node(self.current).name);
            Unable::Because(format!("its kernel does not compile: {message}"))
        })?;
        let bindings = bindings.iter().map(|binding| (binding.buffer, binding.part)).collect();
        self.steps.push(PlannedStep { pipeline, bindings, groups, node: self.current, kernel: name, work });
        Ok(())
    }

    /// The buffer of `id`'s elements in 16 bits, where somebody has narrowed them.
    pub fn narrowed(&self, id: ValueId) -> Option<BufferId> {
        self.narrowed.get(&id).copied()
    }

    /// `buffer` holds `id`'s elements in 16 bits.
    pub fn keep_narrowed(&mut self, id: ValueId, buffer: BufferId) {
        self.narrowed.insert(id, buffer);
    }

    /// The buffer of the picture `id` by channels, in 16 bits or bytes, where it is there.
    pub fn by_channels(&self, id: ValueId) -> Option<BufferId> {
        self.by_channels.get(&id).copied()
    }

    /// `buffer` holds the picture `id` by channels, in 16 bits or bytes.
    pub fn keep_by_channels(&mut self, id: ValueId, buffer: BufferId) {
        self.by_channels.insert(id, buffer);
    }

    /// Adds the launches of what solves a problem; `false`, and nothing added, where nothing does.
    pub fn push_written(&mut self, written: Written<'_>) -> bool {
        let Written { text, functions, inputs, more, output, solutions, name, work } = written;
        let bytes_of = |buffer: BufferId| self.buffers[buffer.0 as usize].bytes;
        let Ok((source, extra)) = text.finish(functions, self.gpu, &bytes_of) else { return false };
        if extra.iter().any(|binding| binding.part.is_some()) {
            return false;
        }
        let count = |binding: &Binding| bytes_of(binding.buffer) / if binding.element == "f16" { 2 } else { 4 };
        let counts: Vec<usize> = extra.iter().map(count).collect();
        let extra: Vec<BufferId> = extra.iter().map(|binding| binding.buffer).chain(more.iter().copied()).collect();
        // The workspace is sized when the solution is known.
        let place = |argument: &Argument, workspace: BufferId| match *argument {
            Argument::Input(at) => inputs[at],
            Argument::Output(_) => output,
            Argument::Workspace => workspace,
            Argument::Extra(at) => extra[at],
        };
        let bytes = |argument: &Argument| match argument {
            Argument::Workspace => 0,
            argument => bytes_of(place(argument, FAULTS)),
        };
        let may_measure = self.numerics != Numerics::Strict;
        let problem = Problem { functions: &source, counts, solutions, bytes: &bytes, may_measure };
        let Solved { pipeline, solution, workspace_bytes } = match self.stock.solve(&problem) {
            Ok(solved) => solved,
            Err(reason) => {
                let node = &self.graph.node(self.current).name;
                tracing::debug!("'{node}' has a generated kernel: {reason}");
                return false;
            }
        };
        let workspace = self.add(workspace_bytes);
        let bindings = solution.arguments().iter().map(|argument| (place(argument, workspace), None)).collect();
        let kernel = name(&solution);
        self.steps.push(PlannedStep { pipeline, bindings, groups: [1; 3], node: self.current, kernel, work });
        true
    }

    /// A statement for where an element is met that the operator refuses: the run fails, and names the node.
    pub fn fault(&self) -> String {
        format!("fault({}u);", self.current.index() + 1)
    }
}

impl Known for Builder<'_> {
    fn shape(&self, id: ValueId) -> Shape {
        self.shape(id)
    }

    fn is_float(&self, id: ValueId) -> bool {
        matches!(self.dtype(id), DType::F32 | DType::F16)
    }

    fn is_constant(&self, id: ValueId) -> bool {
        self.constant(id).is_some()
    }

    fn scalar(&self, id: ValueId) -> Option<f32> {
        let tensor = self.known(id).filter(|tensor| tensor.element_count() == 1)?;
        match tensor.dtype() {
            DType::F32 => tensor.to_vec::<f32>().ok()?.first().copied(),
            DType::F16 => tensor.bytes().first_chunk().map(|&bytes| half::f16::from_le_bytes(bytes).to_f32()),
            _ => None,
        }
    }

    fn only_reader(&self, id: ValueId) -> Option<(NodeId, &Node)> {
        match &self.uses[id.index()][..] {
            &[only] if !self.is_output[id.index()] => Some((only, self.graph.node(only))),
            _ => None,
        }
    }
}

/// `operand`, a float in memory of `dtype`.
fn converted(operand: Operand, dtype: DType) -> Operand {
    match operand.dtype() == dtype {
        true => operand,
        false => Operand::Function(Rc::new(Function::new(dtype, "return $0(i);", vec![operand]))),
    }
}

/// The element that all of a constant's are, as WGSL writes it.
fn uniform(tensor: &Tensor) -> Option<String> {
    let size = tensor.dtype().bits() / 8;
    let bytes = tensor.bytes();
    let first = bytes.get(..size).filter(|first| size > 0 && bytes.chunks_exact(size).all(|chunk| chunk == *first))?;
    let mut wide = [0; 8];
    wide[..size].copy_from_slice(first);
    let word = u64::from_le_bytes(wide);
    Some(match tensor.dtype() {
        DType::F32 => code::float(f32::from_bits(word as u32)),
        DType::F16 => code::float(half::f16::from_bits(word as u16).to_f32()),
        DType::BF16 => code::float(half::bf16::from_bits(word as u16).to_f32()),
        DType::I8 => code::integer(DType::I8, i128::from(word as i8)),
        DType::I16 => code::integer(DType::I16, i128::from(word as i16)),
        DType::I32 => code::integer(DType::I32, i128::from(word as i32)),
        DType::I64 => code::integer(DType::I64, i128::from(word as i64)),
        dtype @ (DType::U8 | DType::U16 | DType::U32 | DType::U64 | DType::Bool) => {
            code::integer(dtype, i128::from(word))
        }
        _ => return None,
    })
}
