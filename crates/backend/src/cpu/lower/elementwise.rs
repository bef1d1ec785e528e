//! Functions of every element, in whatever layout the operands are.

use super::activation as fused;
use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    lower::Lowered,
    plan::{Builder, NoPlan},
};
use cutover_graph::{
    Node, ValueId,
    ops::{self, Binary, BinaryFunction, Unary, UnaryFunction, Variadic, VariadicFunction},
};
use cutover_kernels::cpu::{Activation, BLOCK, IsaLevel, elementwise, elementwise::Source};

pub(in crate::cpu) struct UnaryStep {
    function: elementwise::Unary,
    len: usize,
    /// The output itself where it is changed in place.
    input: Option<Buffer>,
    output: Buffer,
}

pub(in crate::cpu) struct BinaryStep {
    function: elementwise::Binary,
    shape: Vec<usize>,
    a: Operand,
    b: Operand,
    activation: Activation,
    output: Buffer,
}

#[derive(Clone)]
struct Operand {
    /// `None` for the output itself.
    buffer: Option<Buffer>,
    offset: usize,
    strides: Vec<usize>,
}

pub(in crate::cpu) fn unary_kernel(function: UnaryFunction) -> Option<elementwise::Unary> {
    use UnaryFunction::*;
    use elementwise::Unary as K;
    Some(match function {
        Abs => K::Abs,
        Neg => K::Neg,
        Sign => K::Sign,
        Floor => K::Floor,
        Ceil => K::Ceil,
        Round => K::Round,
        Sqrt => K::Sqrt,
        Reciprocal => K::Reciprocal,
        Exp => K::Exp,
        Log => K::Log,
        UnaryFunction::Erf => K::Erf,
        Softplus => K::Softplus,
        Softsign => K::Softsign,
        Mish => K::Mish,
        Elu { alpha } => K::Activation(Activation::Elu { alpha }),
        other => K::Activation(fused(Some(other.activation()?))),
    })
}

pub(in crate::cpu) fn binary_kernel(function: BinaryFunction) -> Option<elementwise::Binary> {
    use elementwise::Binary as K;
    Some(match function {
        BinaryFunction::Add => K::Add,
        BinaryFunction::Sub => K::Sub,
        BinaryFunction::Mul => K::Mul,
        BinaryFunction::Div => K::Div,
        BinaryFunction::Pow => K::Pow,
        BinaryFunction::PRelu => K::PRelu,
        _ => return None,
    })
}

pub(in crate::cpu) fn lower_unary(builder: &mut Builder<'_>, node: &Node, op: &Unary) -> Result<bool, NoPlan> {
    let (Some(&Some(x)), Some(function)) = (node.inputs.first(), unary_kernel(op.function)) else { return Ok(false) };
    map(builder, x, node.outputs[0], function)
}

pub(in crate::cpu) fn lower_clip(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let Some(&Some(x)) = node.inputs.first() else { return Ok(false) };
    let bound = |index: usize, open: f32| match node.inputs.get(index).copied().flatten() {
        None => Some(open),
        Some(id) => builder.scalar(id),
    };
    let (Some(low), Some(high)) = (bound(1, f32::NEG_INFINITY), bound(2, f32::INFINITY)) else { return Ok(false) };
    map(builder, x, node.outputs[0], elementwise::Unary::Activation(Activation::Clip { low, high }))
}

/// `output = function(x)`, in place where nothing else reads `x`.
fn map(builder: &mut Builder<'_>, x: ValueId, output: ValueId, function: elementwise::Unary) -> Result<bool, NoPlan> {
    if !builder.is_float(x) {
        return Ok(false);
    }
    // The lanes of a last block that is not full are zeros, which later convolutions multiply: no infinity may come of them.
    let finite = !matches!(function, elementwise::Unary::Log | elementwise::Unary::Reciprocal);
    let blocked = builder.held(x).blocked.filter(|_| builder.held(x).plain.is_none());
    let blocked = blocked.filter(|_| finite || builder.image(x).1.is_multiple_of(BLOCK));
    let input = match blocked {
        Some(buffer) => buffer,
        None => builder.plain(x)?,
    };
    let in_place = builder.may_overwrite(x, input);
    let to = match (in_place, blocked.is_some()) {
        (true, true) => {
            builder.hold_blocked(output, input);
            input
        }
        (true, false) => {
            builder.hold_plain(output, input);
            input
        }
        (false, true) => builder.new_blocked(output)?,
        (false, false) => builder.new_plain(output)?,
    };
    let len = match blocked {
        Some(_) => blocked_len(builder, x),
        None => builder.shape(x).element_count(),
    };
    let step = UnaryStep { function, len, input: (!in_place).then_some(input), output: to };
    builder.push(Lowered::Unary(step), &[input], &[to]);
    Ok(true)
}

fn blocked_len(builder: &Builder<'_>, id: ValueId) -> usize {
    let (n, c, pixels) = builder.image(id);
    n * c.next_multiple_of(BLOCK) * pixels
}

pub(in crate::cpu) fn lower_binary(builder: &mut Builder<'_>, node: &Node, op: &Binary) -> Result<bool, NoPlan> {
    let (&[Some(a), Some(b)], output) = (&node.inputs[..], node.outputs[0]) else { return Ok(false) };
    // Squares and roots are what powers mostly are.
    if op.function == BinaryFunction::Pow && builder.is_float(a) {
        let known = match builder.scalar(b) {
            Some(2.0) => Some(elementwise::Unary::Square),
            Some(0.5) => Some(elementwise::Unary::Sqrt),
            _ => None,
        };
        if let Some(function) = known.filter(|_| builder.shape(a) == builder.shape(output)) {
            return map(builder, a, output, function);
        }
    }
    match binary_kernel(op.function) {
        Some(function) => combine(builder, function, a, b, output),
        None => Ok(false),
    }
}

pub(in crate::cpu) fn lower_variadic(builder: &mut Builder<'_>, node: &Node, op: &Variadic) -> Result<bool, NoPlan> {
    let function = match op.function {
        VariadicFunction::Sum => elementwise::Binary::Add,
        VariadicFunction::Min => elementwise::Binary::Min,
        VariadicFunction::Max => elementwise::Binary::Max,
        VariadicFunction::Mean => return Ok(false),
    };
    match &node.inputs[..] {
        &[Some(a), Some(b)] => combine(builder, function, a, b, node.outputs[0]),
        _ => Ok(false),
    }
}

/// `output = function(a, b)` after broadcasting.
fn combine(
    builder: &mut Builder<'_>,
    function: elementwise::Binary,
    a: ValueId,
    b: ValueId,
    output: ValueId,
) -> Result<bool, NoPlan> {
    let shape = builder.shape(output);
    let large = [a, b].iter().any(|&v| builder.shape(v).rank() > shape.rank());
    if !builder.is_float(a)
        || !builder.is_float(b)
        || large
        || shape.rank() > elementwise::MAX_RANK
        || shape.element_count() == 0
    {
        return Ok(false);
    }
    if let Some(done) = combine_blocked(builder, function, a, b, output)? {
        return Ok(done);
    }
    let of = |builder: &mut Builder<'_>, id: ValueId| -> Result<Operand, NoPlan> {
        let own = builder.shape(id);
        let held = builder.held(id).clone();
        let (buffer, offset, own_strides) = match held.strided {
            Some(view) if held.plain.is_none() => (view.buffer, view.offset, view.strides),
            _ => (builder.plain(id)?, 0, own.strides().to_vec()),
        };
        let lead = shape.rank() - own.rank();
        let stride = |axis: usize| if axis < lead || own[axis - lead] == 1 { 0 } else { own_strides[axis - lead] };
        Ok(Operand { buffer: Some(buffer), offset, strides: (0..shape.rank()).map(stride).collect() })
    };
    let (mut left, mut right) = (of(builder, a)?, of(builder, b)?);
    let reads = [left.buffer, right.buffer].map(|b| b.expect("set above"));
    let mut to = None;
    for (id, operand) in [(a, &mut left), (b, &mut right)] {
        let held = builder.held(id).plain;
        let whole = builder.shape(id) == shape && held == operand.buffer && operand.offset == 0;
        if to.is_none() && a != b && whole && held.is_some_and(|buffer| builder.may_overwrite(id, buffer)) {
            to = operand.buffer.take();
        }
    }
    let to = match to {
        Some(buffer) => {
            builder.hold_plain(output, buffer);
            buffer
        }
        None => builder.new_plain(output)?,
    };
    let step =
        BinaryStep { function, shape: shape.to_vec(), a: left, b: right, activation: Activation::Identity, output: to };
    builder.push(Lowered::Binary(step), &reads, &[to]);
    Ok(true)
}

/// Of images of which one is blocked: both blocked, or the other one value per channel or in all.
fn combine_blocked(
    builder: &mut Builder<'_>,
    function: elementwise::Binary,
    a: ValueId,
    b: ValueId,
    output: ValueId,
) -> Result<Option<bool>, NoPlan> {
    let shape = builder.shape(output);
    let only_blocked = |id: ValueId| builder.held(id).blocked.is_some() && builder.held(id).plain.is_none();
    if shape.rank() < 3 || !(only_blocked(a) || only_blocked(b)) {
        return Ok(None);
    }
    let (n, c, pixels) = builder.image(output);
    let blocks = c.div_ceil(BLOCK);
    // As in `map`: zero divided by zero, or raised to a negative power, must not enter the lanes beyond the last channel.
    if matches!(function, elementwise::Binary::Div | elementwise::Binary::Pow) && !c.is_multiple_of(BLOCK) {
        return Ok(None);
    }
    // Axes: images, blocks, pixels, lanes.
    let full = vec![blocks * pixels * BLOCK, pixels * BLOCK, BLOCK, 1];
    let mut operands = Vec::with_capacity(2);
    for id in [a, b] {
        let own = builder.shape(id);
        let operand = if own == shape {
            Operand { buffer: Some(builder.blocked(id)?), offset: 0, strides: full.clone() }
        } else if own.element_count() == 1 {
            Operand { buffer: Some(builder.plain(id)?), offset: 0, strides: vec![0; 4] }
        } else if own.rank() == shape.rank()
            && own[1] == c
            && own[2..].iter().all(|&d| d == 1)
            && (own[0] == n || own[0] == 1)
        {
            let image = if own[0] == 1 { 0 } else { blocks * BLOCK };
            Operand { buffer: Some(builder.blocked(id)?), offset: 0, strides: vec![image, BLOCK, 0, 1] }
        } else {
            return Ok(None);
        };
        operands.push(operand);
    }
    let reads: Vec<Buffer> = operands.iter().filter_map(|o| o.buffer).collect();
    let mut to = None;
    for (id, operand) in [a, b].into_iter().zip(&mut operands) {
        let whole = builder.shape(id) == shape;
        if to.is_none() && a != b && whole && operand.buffer.is_some_and(|buffer| builder.may_overwrite(id, buffer)) {
            to = operand.buffer.take();
        }
    }
    let to = match to {
        Some(buffer) => {
            builder.hold_blocked(output, buffer);
            buffer
        }
        None => builder.new_blocked(output)?,
    };
    let right = operands.pop().expect("two operands");
    let left = operands.pop().expect("two operands");
    let shape = vec![n, blocks, pixels, BLOCK];
    let step = BinaryStep { function, shape, a: left, b: right, activation: Activation::Identity, output: to };
    builder.push(Lowered::Binary(step), &reads, &[to]);
    Ok(Some(true))
}

/// `to = activation(to + addend)`, for buffers of one layout.
pub(super) fn add_in_place(builder: &mut Builder<'_>, to: Buffer, addend: Buffer, activation: Activation) {
    let len = builder.floats(to);
    let operand = |buffer| Operand { buffer, offset: 0, strides: vec![1] };
    let step = BinaryStep {
        function: elementwise::Binary::Add,
        shape: vec![len],
        a: operand(None),
        b: operand(Some(addend)),
        activation,
        output: to,
    };
    builder.push(Lowered::Binary(step), &[to, addend], &[to]);
}

/// `to = activation(to + addend)` where `addend` broadcasts to `shape`, which is that of `to`.
pub(super) fn add_broadcast(
    builder: &mut Builder<'_>,
    to: Buffer,
    shape: &[usize],
    addend: ValueId,
    activation: Activation,
) -> Result<(), NoPlan> {
    let buffer = builder.plain(addend)?;
    let own = builder.shape(addend);
    let own_strides = own.strides();
    let lead = shape.len() - own.rank();
    let stride = |axis: usize| if axis < lead || own[axis - lead] == 1 { 0 } else { own_strides[axis - lead] };
    let strides: Vec<usize> = (0..shape.len()).map(stride).collect();
    let full = cutover_tensor::Shape::new(shape).strides().to_vec();
    let step = BinaryStep {
        function: elementwise::Binary::Add,
        shape: shape.to_vec(),
        a: Operand { buffer: None, offset: 0, strides: full },
        b: Operand { buffer: Some(buffer), offset: 0, strides },
        activation,
        output: to,
    };
    builder.push(Lowered::Binary(step), &[to, buffer], &[to]);
    Ok(())
}

/// `to = activation(to)`.
pub(super) fn activate_in_place(builder: &mut Builder<'_>, to: Buffer, activation: Option<ops::Activation>) {
    let function = elementwise::Unary::Activation(fused(activation));
    let step = UnaryStep { function, len: builder.floats(to), input: None, output: to };
    builder.push(Lowered::Unary(step), &[to], &[to]);
}

impl UnaryStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let input = self.input.map_or(Source::Output, |b| Source::Slice(frame.floats(b)));
        elementwise::unary(level, self.function, input, worker.share(self.len), frame.output(self.output));
    }
}

impl BinaryStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let operand = |o: &Operand| frame_operand(frame, o);
        let (a, b) = (operand(&self.a), operand(&self.b));
        let a = elementwise::Operand { source: a, strides: &self.a.strides };
        let b = elementwise::Operand { source: b, strides: &self.b.strides };
        let range = worker.share(self.shape.iter().product());
        elementwise::binary(level, self.function, &self.shape, a, b, self.activation, range, frame.output(self.output));
    }
}

fn frame_operand<'a>(frame: &'a Frame<'_>, operand: &Operand) -> Source<'a> {
    operand.buffer.map_or(Source::Output, |b| Source::Slice(&frame.floats(b)[operand.offset..]))
}
