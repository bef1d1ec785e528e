//! Selections that shapes and constants decide: what is known before the run, padding, repetition, reversal; and choice between two.

use super::movement::{is_word, view};
use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    lower::Lowered,
    plan::{Builder, NoPlan, Strided},
};
use crate::known;
use cutover_graph::{Node, Op, ValueId};
use cutover_kernels::cpu::{
    IsaLevel, elementwise,
    movement::{self, Run, Word},
};
use cutover_tensor::Value;

/// Bytes that a plan may hold for one value that constants decide.
const KNOWN_BYTES: usize = 1 << 20;

/// Elements of a selection that a plan lists the sources of.
const SELECTED: usize = 1 << 24;

/// An output put together from runs of the input.
pub(in crate::cpu) struct RunsStep {
    runs: Vec<Run>,
    count: usize,
    /// Bytes of an element, and those of the element where there is no source.
    size: usize,
    fill: [u8; 8],
    input: Buffer,
    output: Buffer,
}

pub(in crate::cpu) struct ChooseStep {
    shape: Vec<usize>,
    size: usize,
    /// The condition and what it chooses from.
    operands: [Strided; 3],
    output: Buffer,
}

/// Whether the operator only moves elements, as its other inputs say.
pub(super) fn moves(op: &Op) -> bool {
    matches!(
        op,
        Op::Pad(_)
            | Op::Tile(_)
            | Op::Slice(_)
            | Op::Expand(_)
            | Op::Transpose(_)
            | Op::DepthSpace(_)
            | Op::ReverseSequence(_)
            | Op::Trilu(_)
            | Op::Gather(_)
            | Op::GatherElements(_)
            | Op::GatherNd(_)
    )
}

/// What depends on constants and shapes alone is computed now.
pub(super) fn lower_known(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    if let Op::ConstantOfShape(op) = &node.op {
        let output = node.outputs[0];
        let value = op.value.clone();
        if !is_word(builder, output) {
            return Ok(false);
        }
        let buffer = builder.new_constant(value);
        let strides = vec![0; builder.shape(output).rank()];
        builder.hold_strided(output, Strided { buffer, offset: 0, strides });
        return Ok(true);
    }
    // Operators that nothing but a constant could be made of; whatever draws numbers is not among them.
    let plain = matches!(node.op, Op::Range(_) | Op::EyeLike(_) | Op::OneHot(_) | Op::Shape(_) | Op::Size(_))
        || moves(&node.op)
        || super::any_type_kernel(&node.op).is_some();
    let small = |&id: &ValueId| builder.bytes(id) <= KNOWN_BYTES && builder.fact(id).dtype.bits() >= 8;
    if !plain || !node.outputs.iter().all(small) {
        return Ok(false);
    }
    let fact = |id: ValueId| builder.fact(id);
    let Some(tensors) = known::outputs(node, KNOWN_BYTES, fact, |id| builder.known_tensor(id)) else {
        return Ok(false);
    };
    for (tensor, &output) in tensors.into_iter().zip(&node.outputs) {
        builder.hold_constant(output, tensor);
    }
    Ok(true)
}

/// A selection whose sources are known: the operator's own evaluation, of the positions instead of the elements, says which.
pub(super) fn lower_runs(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let (Some(&Some(x)), output) = (node.inputs.first(), node.outputs[0]) else { return Ok(false) };
    let (count, from_count) = (builder.shape(output).element_count(), builder.shape(x).element_count());
    if !moves(&node.op) || !is_word(builder, x) || count.max(from_count) > SELECTED {
        return Ok(false);
    }
    let mut others = Vec::with_capacity(node.inputs.len());
    let mut fill = [0; 8];
    for (index, input) in node.inputs.iter().enumerate().skip(1) {
        let Some(id) = *input else {
            others.push(None);
            continue;
        };
        let Some(tensor) = builder.known_tensor(id) else { return Ok(false) };
        if index == 2 && matches!(node.op, Op::Pad(_)) {
            if tensor.element_count() != 1 || tensor.dtype() != builder.fact(x).dtype {
                return Ok(false);
            }
            fill[..tensor.bytes().len()].copy_from_slice(tensor.bytes());
            others.push(None);
            continue;
        }
        others.push(Some(Value::Tensor(tensor)));
    }
    let Ok(sources) = known::sources(node, builder.shape(x), others, &builder.shape(output)) else { return Ok(false) };
    let mut runs: Vec<Run> = Vec::new();
    let mut last = None;
    for (to, source) in sources.into_iter().enumerate() {
        let from = if source == 0 { Run::FILL } else { (source - 1) as u32 };
        let goes_on = match (last, from) {
            (Some(Run::FILL), Run::FILL) => true,
            (Some(last), from) => last != Run::FILL && from != Run::FILL && from == last + 1,
            (None, _) => false,
        };
        if !goes_on {
            runs.push(Run { to: to as u32, from });
        }
        last = Some(from);
    }
    let size = builder.fact(x).dtype.bits() / 8;
    let input = builder.plain(x)?;
    let to = builder.new_plain(output)?;
    builder.push(Lowered::Runs(RunsStep { runs, count, size, fill, input, output: to }), &[input], &[to]);
    Ok(true)
}

impl RunsStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>) {
        let [a, b, c, d, ..] = self.fill;
        match self.size {
            1 => self.copy::<u8>(frame, worker, a),
            2 => self.copy(frame, worker, u16::from_ne_bytes([a, b])),
            4 => self.copy(frame, worker, u32::from_ne_bytes([a, b, c, d])),
            _ => self.copy(frame, worker, u64::from_ne_bytes(self.fill)),
        }
    }

    fn copy<T: Word>(&self, frame: &Frame<'_>, worker: &Worker<'_>, fill: T) {
        let (input, output) = (frame.words(self.input), frame.words_output(self.output));
        movement::copy_runs(input, fill, &self.runs, worker.share(self.count), output);
    }
}

pub(super) fn lower_where(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let (&[Some(condition), Some(x), Some(y)], output) = (&node.inputs[..], node.outputs[0]) else { return Ok(false) };
    let shape = builder.shape(output).to_vec();
    if !is_word(builder, x) || shape.len() > elementwise::MAX_RANK {
        return Ok(false);
    }
    let size = builder.fact(x).dtype.bits() / 8;
    let mut operands = Vec::with_capacity(3);
    for id in [condition, x, y] {
        operands.push(broadcast_view(builder, id, &shape)?);
    }
    let Ok(operands) = <[Strided; 3]>::try_from(operands) else { return Ok(false) };
    let to = builder.new_plain(output)?;
    let reads: Vec<Buffer> = operands.iter().map(|o| o.buffer).collect();
    builder.push(Lowered::Choose(ChooseStep { shape, size, operands, output: to }), &reads, &[to]);
    Ok(true)
}

impl ChooseStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        match self.size {
            1 => self.choose::<u8>(frame, worker, level),
            2 => self.choose::<u16>(frame, worker, level),
            4 => self.choose::<u32>(frame, worker, level),
            _ => self.choose::<u64>(frame, worker, level),
        }
    }

    fn choose<T: Word>(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let [condition, x, y] = &self.operands;
        let range = worker.share(self.shape.iter().product());
        let strides = [&condition.strides[..], &x.strides[..], &y.strides[..]];
        let truths = &frame.bytes(condition.buffer)[condition.offset..];
        let of = |view: &Strided| &frame.words::<T>(view.buffer)[view.offset..];
        let output = frame.words_output(self.output);
        movement::choose(level, &self.shape, strides, truths, (of(x), of(y)), range, output);
    }
}

/// The view of `x` along which an axis of `shape` that it does not have, or has once, is not stepped.
pub(super) fn broadcast_view(builder: &mut Builder<'_>, x: ValueId, shape: &[usize]) -> Result<Strided, NoPlan> {
    let own = builder.shape(x);
    let from = view(builder, x)?;
    let lead = shape.len() - own.rank();
    let stride = |axis: usize| if axis < lead || own[axis - lead] == 1 { 0 } else { from.strides[axis - lead] };
    let strides = (0..shape.len()).map(stride).collect();
    Ok(Strided { strides, ..from })
}
