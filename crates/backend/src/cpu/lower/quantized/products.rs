//! Convolutions and products of quantized values by constant weights, on one integer kernel.

use super::{maps::quantize_by_range, windows::depthwise, *};

/// A number that is known now, or read when the step runs.
#[derive(Clone, Copy)]
enum Number<T> {
    Known(T),
    At(Buffer),
}

pub(in crate::cpu) struct ProductStep {
    shape: ProductShape,
    input: Bytes,
    zero_point: Number<i32>,
    weights: Buffer,
    form: Form,
    finish: Finish,
    output: Buffer,
}

impl ProductStep {
    pub fn operations(&self) -> u64 {
        operations(&self.shape)
    }
}

enum Finish {
    Sums,
    Floats { scale: Number<f32>, factors: Buffer, bias: Option<Buffer>, low: f32, high: f32 },
    Bytes { factors: Buffer, offsets: Buffer, low: f32, high: f32, zero_point: i32 },
}

/// Weights as integers less their zero points, `[m][k]`, and a scale for each m.
pub(super) struct Weights {
    pub values: Vec<i16>,
    pub scales: Vec<f32>,
    pub constants: Vec<Constant>,
}

/// How the weights' axes lie.
#[derive(Clone, Copy)]
enum Order {
    /// `[m, …]`.
    Rows,
    /// `[k, m]`.
    Columns,
}

fn weights(
    builder: &Builder<'_>,
    w: ValueId,
    scale: Option<ValueId>,
    zero_point: Option<ValueId>,
    m: usize,
    order: Order,
) -> Option<Weights> {
    let constant = builder.graph.constant(w)?;
    let tensor = &constant.tensor;
    if !is_byte(tensor.dtype()) || m == 0 {
        return None;
    }
    let mut constants = vec![constant.clone()];
    let points = match zero_point {
        None => vec![0],
        Some(id) => {
            let points = builder.known_tensor(id).filter(|t| t.dtype() == tensor.dtype())?;
            let integers = integers(&points)?;
            constants.push(Constant::new(points));
            integers
        }
    };
    let scales = match scale {
        None => vec![1.0],
        Some(id) => builder.known_tensor(id)?.to_vec::<f32>().ok()?,
    };
    let fits = |count: usize| count == 1 || count == m;
    if !fits(points.len()) || !fits(scales.len()) {
        return None;
    }
    let raw = tensor.bytes();
    let k = raw.len() / m;
    let value = |byte: u8| if tensor.dtype() == DType::I8 { i16::from(byte as i8) } else { i16::from(byte) };
    let point = |row: usize| points[if points.len() == 1 { 0 } else { row }] as i16;
    let mut values = vec![0i16; m * k];
    match order {
        Order::Rows => {
            for (row, (to, from)) in values.chunks_exact_mut(k.max(1)).zip(raw.chunks_exact(k.max(1))).enumerate() {
                let point = point(row);
                to.iter_mut().zip(from).for_each(|(to, &byte)| *to = value(byte) - point);
            }
        }
        // In squares that stay in the first-level cache on both sides.
        Order::Columns => {
            const SIDE: usize = 64;
            for (rows, columns) in (0..m).step_by(SIDE).flat_map(|r| (0..k).step_by(SIDE).map(move |c| (r, c))) {
                for row in rows..m.min(rows + SIDE) {
                    let point = point(row);
                    let to = &mut values[row * k..][columns..k.min(columns + SIDE)];
                    let from = raw[columns * m + row..].iter().step_by(m);
                    to.iter_mut().zip(from).for_each(|(to, &byte)| *to = value(byte) - point);
                }
            }
        }
    }
    let scales = if scales.len() == 1 { vec![scales[0]; m] } else { scales };
    Some(Weights { values, scales, constants })
}

/// The weights that a dequantization with a scale for each of axis `axis`, or one in all, makes floats of.
fn dequantized_weights(builder: &Builder<'_>, id: ValueId, axis: usize, m: usize, order: Order) -> Option<Weights> {
    let (producer, _) = builder.graph.producer(id)?;
    let node = builder.graph.node(producer);
    let Op::DequantizeLinear(op) = &node.op else { return None };
    let (w, scale) = (input(node, 0)?, input(node, 1)?);
    let rank = builder.shape(w).rank();
    let per_tensor = builder.shape(scale).element_count() == 1;
    let fits =
        per_tensor || (op.granularity.block_size == 0 && normalize_axis(op.granularity.axis, rank).ok()? == axis);
    if !fits {
        return None;
    }
    weights(builder, w, Some(scale), input(node, 2), m, order)
}

/// The floats of a constant, dequantized or not.
fn floats(builder: &Builder<'_>, id: ValueId, count: usize) -> Option<Vec<f32>> {
    let tensor = builder.known_tensor(id).or_else(|| evaluate(builder, id))?;
    (tensor.element_count() == count).then(|| tensor.to_vec::<f32>().ok()).flatten()
}

/// A product's operands, once they are found.
struct Operands {
    shape: ProductShape,
    input: Bytes,
    zero_point: Number<i32>,
    weights: Weights,
}

/// The step of a product, with its weights packed.
fn push(builder: &mut Builder<'_>, operands: Operands, finish: Finish, output: Buffer) -> Result<(), NoPlan> {
    let Operands { shape, input, zero_point, weights } = operands;
    let level = builder.device.level;
    let known = match zero_point {
        Number::Known(value) => Some(value),
        Number::At(_) => None,
    };
    let form = Form::of(level, &shape, &weights.values, input.signed, known);
    let how = format!(
        "integers {} {} {} {}x{} {form:?} {}",
        shape.channels_in,
        shape.channels_out,
        shape.groups,
        shape.height.kernel,
        shape.width.kernel,
        level.name()
    );
    let recipe = Recipe { constants: weights.constants, how };
    let packed = builder.pack(recipe, product::packed_len(level, &shape, form), |packed| {
        product::pack(level, &shape, &weights.values, form, packed);
    })?;
    builder.need_workspace(product::workspace_len(level, &shape, form));
    let mut reads = vec![input.buffer, packed];
    if let Number::At(buffer) = zero_point {
        reads.push(buffer);
    }
    match &finish {
        Finish::Sums => {}
        Finish::Floats { scale, factors, bias, .. } => {
            reads.push(*factors);
            reads.extend(bias.iter());
            if let Number::At(buffer) = scale {
                reads.push(*buffer);
            }
        }
        Finish::Bytes { factors, offsets, .. } => reads.extend([*factors, *offsets]),
    }
    let step = ProductStep { shape, input, zero_point, weights: packed, form, finish, output };
    builder.push(Lowered::IntegerProduct(step), &reads, &[output]);
    Ok(())
}

/// Adds a product of a quantized `x` whose result is `real`: bytes where its only reader quantizes it and the activation is a clamp, floats otherwise.
/// Images are channels-last.
fn finish_real(
    builder: &mut Builder<'_>,
    operands: Operands,
    from: Quantization,
    bias: Option<Vec<f32>>,
    activation: Option<Fused>,
    real: ValueId,
    is_image: bool,
) -> Result<(), NoPlan> {
    let bounds = clamps(activation);
    let shape = builder.shape(real);
    let strides = if is_image { channels_last(&shape) } else { shape.strides().to_vec() };
    let scales = operands.weights.scales.iter();
    if let Some(sink) = bounds.and_then(|bounds| sink(builder, real, bounds)) {
        let (factors, offsets) = requantization(&operands.weights.scales, from.scale, bias.as_deref(), sink.to.scale);
        let finish = Finish::Bytes {
            factors: constant(builder, factors)?,
            offsets: constant(builder, offsets)?,
            low: sink.low,
            high: sink.high,
            zero_point: sink.to.zero_point,
        };
        let buffer = builder.new_bytes(shape.element_count())?;
        builder.name_kernel(if is_image { "integer convolution" } else { "integer product" });
        push(builder, operands, finish, buffer)?;
        builder.hold_strided(sink.value, Strided { buffer, offset: 0, strides });
        builder.fuse(sink.nodes);
        return Ok(());
    }
    let factors = scales.copied().collect();
    let bias = bias.map(|bias| constant(builder, bias)).transpose()?;
    let (low, high) = bounds.unwrap_or((f32::NEG_INFINITY, f32::INFINITY));
    let finish =
        Finish::Floats { scale: Number::Known(from.scale), factors: constant(builder, factors)?, bias, low, high };
    let buffer = builder.new_floats(shape.element_count())?;
    builder.name_kernel(if is_image { "integer convolution" } else { "integer product" });
    push(builder, operands, finish, buffer)?;
    if bounds.is_none() {
        elementwise::activate_in_place(builder, buffer, activation);
    }
    builder.hold_strided(real, Strided { buffer, offset: 0, strides });
    Ok(())
}

pub(in crate::cpu::lower) fn lower_conv(builder: &mut Builder<'_>, node: &Node, op: &Conv) -> Result<bool, NoPlan> {
    let (Some(x), Some(w), output) = (input(node, 0), input(node, 1), node.outputs[0]) else { return Ok(false) };
    if builder.dequantized(x).is_none() || input(node, 3).is_some() {
        return Ok(false);
    }
    let w_shape = builder.shape(w);
    let Some(shape) = geometry(builder, &op.window, op.group, x, &w_shape[2..], output) else { return Ok(false) };
    let m = shape.channels_out;
    let Some(weights) = dequantized_weights(builder, w, 0, m, Order::Rows).filter(|_| shape.is_exact()) else {
        return Ok(false);
    };
    let bias = match input(node, 2) {
        None => None,
        Some(id) => match floats(builder, id, m) {
            Some(bias) => Some(bias),
            None => return Ok(false),
        },
    };
    let is_depthwise = shape.groups == shape.channels_in && m == shape.channels_in && m > 1;
    let bounds = clamps(op.activation);
    if is_depthwise && bounds.is_none() {
        return Ok(false);
    }
    let Some((buffer, from)) = image(builder, x)? else { return Ok(false) };
    if let Some(bounds) = bounds.filter(|_| is_depthwise) {
        let sink = sink(builder, output, bounds);
        if let Some(sink) = sink.filter(|_| shape.height.kernel * shape.width.kernel <= DEPTHWISE_TERMS) {
            return depthwise(builder, shape, buffer, from, weights, bias, sink).map(|()| true);
        }
    }
    let input = Bytes { buffer, signed: from.signed };
    let operands = Operands { shape, input, zero_point: Number::Known(from.zero_point), weights };
    finish_real(builder, operands, from, bias, op.activation, output, true)?;
    Ok(true)
}

pub(in crate::cpu::lower) fn lower_gemm(builder: &mut Builder<'_>, node: &Node, op: &Gemm) -> Result<bool, NoPlan> {
    let (Some(a), Some(b), output) = (input(node, 0), input(node, 1), node.outputs[0]) else { return Ok(false) };
    if op.transpose_a || op.alpha != 1.0 || (op.beta != 1.0 && input(node, 2).is_some()) {
        return Ok(false);
    }
    let n = builder.shape(output)[1];
    let (axis, order) = if op.transpose_b { (0, Order::Rows) } else { (1, Order::Columns) };
    lower_product(builder, a, b, input(node, 2), op.activation, output, n, axis, order)
}

pub(in crate::cpu::lower) fn lower_matmul(builder: &mut Builder<'_>, node: &Node, op: &MatMul) -> Result<bool, NoPlan> {
    let (Some(a), Some(b), output) = (input(node, 0), input(node, 1), node.outputs[0]) else { return Ok(false) };
    if builder.shape(b).rank() != 2 || builder.shape(a).rank() < 2 {
        return Ok(false);
    }
    let n = builder.shape(b)[1];
    lower_product(builder, a, b, input(node, 2), op.activation, output, n, 1, Order::Columns)
}

fn lower_product(
    builder: &mut Builder<'_>,
    a: ValueId,
    b: ValueId,
    addend: Option<ValueId>,
    activation: Option<Fused>,
    output: ValueId,
    n: usize,
    axis: usize,
    order: Order,
) -> Result<bool, NoPlan> {
    let Some(held) = builder.dequantized(a) else { return Ok(false) };
    let a_shape = builder.shape(a);
    let k = a_shape[a_shape.rank() - 1];
    let count = builder.shape(output).element_count();
    if count == 0 || k == 0 {
        return Ok(false);
    }
    let shape = ProductShape::matrices(count / n, k, n);
    let Some(weights) = dequantized_weights(builder, b, axis, n, order).filter(|_| shape.is_exact()) else {
        return Ok(false);
    };
    let bias = match addend {
        None => None,
        // One for each column, whatever the axes before it.
        Some(id) if builder.shape(id).last() != Some(&n) => return Ok(false),
        Some(id) => match floats(builder, id, n) {
            Some(bias) => Some(bias),
            None => return Ok(false),
        },
    };
    let buffer = contiguous(builder, &held.view, &a_shape)?;
    let input = Bytes { buffer, signed: held.from.signed };
    let operands = Operands { shape, input, zero_point: Number::Known(held.from.zero_point), weights };
    finish_real(builder, operands, held.from, bias, activation, output, false)?;
    Ok(true)
}

/// Bytes of the quantized image `x`, channels-last.
fn quantized_image(builder: &mut Builder<'_>, x: ValueId) -> Result<Buffer, NoPlan> {
    let (view, shape) = (view(builder, x)?, builder.shape(x));
    copied(builder, &view, &shape, &last_order(shape.rank()))
}

/// One zero point: known, or in a buffer.
fn zero_point(builder: &mut Builder<'_>, id: Option<ValueId>) -> Result<Option<Number<i32>>, NoPlan> {
    let Some(id) = id else { return Ok(Some(Number::Known(0))) };
    if builder.shape(id).element_count() != 1 {
        return Ok(None);
    }
    if let Some(values) = builder.known_tensor(id).and_then(|t| integers(&t)) {
        return Ok(Some(Number::Known(values[0])));
    }
    Ok(Some(Number::At(builder.plain(id)?)))
}

pub(in crate::cpu::lower) fn lower_conv_integer(
    builder: &mut Builder<'_>,
    node: &Node,
    op: &cutover_graph::ops::ConvInteger,
) -> Result<bool, NoPlan> {
    let (Some(x), Some(w), output) = (input(node, 0), input(node, 1), node.outputs[0]) else { return Ok(false) };
    let (dtype, w_shape) = (builder.fact(x).dtype, builder.shape(w));
    if w_shape.rank() != builder.shape(x).rank() || w_shape.rank() < 3 {
        return Ok(false);
    }
    let shape = geometry(builder, &op.window, op.group, x, &w_shape[2..], output);
    let Some(shape) = shape.filter(|s| is_byte(dtype) && s.is_exact()) else { return Ok(false) };
    let weights = weights(builder, w, None, input(node, 3), shape.channels_out, Order::Rows);
    let (Some(weights), Some(zero_point)) = (weights, zero_point(builder, input(node, 2))?) else { return Ok(false) };
    let input = Bytes { buffer: quantized_image(builder, x)?, signed: dtype == DType::I8 };
    let to = builder.shape(output);
    let buffer = builder.new_floats(to.element_count())?;
    push(builder, Operands { shape, input, zero_point, weights }, Finish::Sums, buffer)?;
    builder.hold_strided(output, Strided { buffer, offset: 0, strides: channels_last(&to) });
    Ok(true)
}

pub(in crate::cpu::lower) fn lower_qlinear_conv(
    builder: &mut Builder<'_>,
    node: &Node,
    op: &cutover_graph::ops::QLinearConv,
) -> Result<bool, NoPlan> {
    let (Some(x), Some(w), output) = (input(node, 0), input(node, 3), node.outputs[0]) else { return Ok(false) };
    let w_shape = builder.shape(w);
    if w_shape.rank() < 3 || w_shape.rank() != builder.shape(x).rank() {
        return Ok(false);
    }
    let shape = geometry(builder, &op.window, op.group, x, &w_shape[2..], output).filter(ProductShape::is_exact);
    let from = quantization(builder, input(node, 1), input(node, 2), builder.fact(x).dtype);
    let to = quantization(builder, input(node, 6), input(node, 7), builder.fact(output).dtype);
    let (Some(shape), Some(from), Some(to)) = (shape, from, to) else { return Ok(false) };
    let weights = weights(builder, w, input(node, 4), input(node, 5), shape.channels_out, Order::Rows);
    let Some(weights) = weights else { return Ok(false) };
    let bias = match input(node, 8) {
        None => None,
        Some(id) => {
            let known = builder.known_tensor(id).and_then(|t| integers(&t)).filter(|b| b.len() == shape.channels_out);
            let Some(bias) = known else { return Ok(false) };
            Some(
                bias.iter()
                    .zip(&weights.scales)
                    .map(|(&b, w)| (b as f64 * f64::from(from.scale) * f64::from(*w)) as f32)
                    .collect::<Vec<f32>>(),
            )
        }
    };
    let buffer = quantized_image(builder, x)?;
    let shape_to = builder.shape(output);
    let view = requantized(builder, shape, buffer, from, weights, bias, to, channels_last(&shape_to))?;
    builder.hold_strided(output, view);
    Ok(true)
}

fn requantized(
    builder: &mut Builder<'_>,
    shape: ProductShape,
    buffer: Buffer,
    from: Quantization,
    weights: Weights,
    bias: Option<Vec<f32>>,
    to: Quantization,
    strides: Vec<usize>,
) -> Result<Strided, NoPlan> {
    let (factors, offsets) = requantization(&weights.scales, from.scale, bias.as_deref(), to.scale);
    let (low, high) = to.bounds();
    let (factors, offsets) = (constant(builder, factors)?, constant(builder, offsets)?);
    let finish = Finish::Bytes { factors, offsets, low, high, zero_point: to.zero_point };
    let input = Bytes { buffer, signed: from.signed };
    let output = builder.new_bytes(shape.rows() * shape.channels_out)?;
    push(builder, Operands { shape, input, zero_point: Number::Known(from.zero_point), weights }, finish, output)?;
    Ok(Strided { buffer: output, offset: 0, strides })
}

/// Rows, terms and columns of a product of `a` by one matrix `b`.
fn matrices(builder: &Builder<'_>, a: ValueId, b: ValueId, output: ValueId) -> Option<ProductShape> {
    let (a, b, count) = (builder.shape(a), builder.shape(b), builder.shape(output).element_count());
    if b.rank() != 2 || a.rank() < 2 || count == 0 || b.element_count() == 0 {
        return None;
    }
    Some(ProductShape::matrices(count / b[1], b[0], b[1])).filter(ProductShape::is_exact)
}

pub(in crate::cpu::lower) fn lower_qlinear_matmul(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let (Some(a), Some(b), output) = (input(node, 0), input(node, 3), node.outputs[0]) else { return Ok(false) };
    let shape = matrices(builder, a, b, output);
    let from = quantization(builder, input(node, 1), input(node, 2), builder.fact(a).dtype);
    let to = quantization(builder, input(node, 6), input(node, 7), builder.fact(output).dtype);
    let (Some(shape), Some(from), Some(to)) = (shape, from, to) else { return Ok(false) };
    let weights = weights(builder, b, input(node, 4), input(node, 5), shape.channels_out, Order::Columns);
    let Some(weights) = weights else { return Ok(false) };
    let buffer = builder.plain(a)?;
    let strides = builder.shape(output).strides().to_vec();
    let view = requantized(builder, shape, buffer, from, weights, None, to, strides)?;
    builder.hold_strided(output, view);
    Ok(true)
}

/// A product of integers; with the cast, the scales and the bias that follow it, where they do.
pub(in crate::cpu::lower) fn lower_matmul_integer(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let (Some(a), Some(b), output) = (input(node, 0), input(node, 1), node.outputs[0]) else { return Ok(false) };
    let dtype = builder.fact(a).dtype;
    let Some(shape) = matrices(builder, a, b, output).filter(|_| is_byte(dtype)) else { return Ok(false) };
    let weights = weights(builder, b, None, input(node, 3), shape.channels_out, Order::Columns);
    let (Some(weights), Some(zero_point)) = (weights, zero_point(builder, input(node, 2))?) else { return Ok(false) };
    let input = Bytes { buffer: builder.plain(a)?, signed: dtype == DType::I8 };
    let operands = Operands { shape, input, zero_point, weights };
    if let Some(scaled) = scaled(builder, output, shape.channels_out) {
        let scale = match scaled.scale {
            None => Number::Known(1.0),
            Some(id) => Number::At(builder.plain(id)?),
        };
        let factors = constant(builder, scaled.factors)?;
        let bias = scaled.bias.map(|bias| constant(builder, bias)).transpose()?;
        let (low, high) = (f32::NEG_INFINITY, f32::INFINITY);
        let to = builder.new_plain(scaled.value)?;
        push(builder, operands, Finish::Floats { scale, factors, bias, low, high }, to)?;
        builder.fuse(scaled.nodes);
        return Ok(true);
    }
    let to = builder.new_plain(output)?;
    push(builder, operands, Finish::Sums, to)?;
    Ok(true)
}

/// A product of integers, as floats.
pub(in crate::cpu::lower) fn lower_matmul_integer_to_float(
    builder: &mut Builder<'_>,
    node: &Node,
) -> Result<bool, NoPlan> {
    let (Some(a), Some(b), Some(a_scale), output) = (input(node, 0), input(node, 1), input(node, 2), node.outputs[0])
    else {
        return Ok(false);
    };
    let dtype = builder.fact(a).dtype;
    let single = builder.is_float(output) && builder.is_float(a_scale) && builder.shape(a_scale).element_count() == 1;
    let Some(shape) = matrices(builder, a, b, output).filter(|_| is_byte(dtype) && single) else { return Ok(false) };
    let weights = weights(builder, b, input(node, 3), input(node, 5), shape.channels_out, Order::Columns);
    let (Some(weights), Ok(bias)) = (weights, bias_of(builder, input(node, 6), shape.channels_out)) else {
        return Ok(false);
    };
    let Some(zero_point) = zero_point(builder, input(node, 4))? else { return Ok(false) };
    let input = Bytes { buffer: builder.plain(a)?, signed: dtype == DType::I8 };
    let scale = match builder.scalar(a_scale) {
        Some(scale) => Number::Known(scale),
        None => Number::At(builder.plain(a_scale)?),
    };
    scaled_product(builder, Operands { shape, input, zero_point, weights }, scale, bias, output)?;
    Ok(true)
}

/// A product of floats, quantized by the range that they have, and integers.
pub(in crate::cpu::lower) fn lower_dynamic_matmul(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let (Some(a), Some(b), output) = (input(node, 0), input(node, 1), node.outputs[0]) else { return Ok(false) };
    let Some(shape) = matrices(builder, a, b, output).filter(|_| builder.is_float(a)) else { return Ok(false) };
    let weights = weights(builder, b, input(node, 2), input(node, 3), shape.channels_out, Order::Columns);
    let (Some(weights), Ok(bias)) = (weights, bias_of(builder, input(node, 4), shape.channels_out)) else {
        return Ok(false);
    };
    let count = builder.shape(a).element_count();
    let buffers = [builder.new_bytes(count)?, builder.new_floats(1)?, builder.new_bytes(1)?];
    let [buffer, scale, zero_point] = buffers;
    quantize_by_range(builder, a, buffers)?;
    let input = Bytes { buffer, signed: false };
    let operands = Operands { shape, input, zero_point: Number::At(zero_point), weights };
    scaled_product(builder, operands, Number::At(scale), bias, output)?;
    Ok(true)
}

/// A constant bias of `n` columns, if there is one; an error where it is something else.
fn bias_of(builder: &Builder<'_>, bias: Option<ValueId>, n: usize) -> Result<Option<Vec<f32>>, ()> {
    bias.map(|id| floats(builder, id, n).ok_or(())).transpose()
}

/// The floats `sums · (scale · weights' scales) + bias`.
fn scaled_product(
    builder: &mut Builder<'_>,
    operands: Operands,
    scale: Number<f32>,
    bias: Option<Vec<f32>>,
    output: ValueId,
) -> Result<(), NoPlan> {
    let factors = constant(builder, operands.weights.scales.clone())?;
    let bias = bias.map(|bias| constant(builder, bias)).transpose()?;
    let (low, high) = (f32::NEG_INFINITY, f32::INFINITY);
    let to = builder.new_plain(output)?;
    push(builder, operands, Finish::Floats { scale, factors, bias, low, high }, to)
}

/// What makes floats of sums: `sums · (scale · factors) + bias`.
struct Scaled {
    /// One float, if it is not known.
    scale: Option<ValueId>,
    factors: Vec<f32>,
    bias: Option<Vec<f32>>,
    value: ValueId,
    nodes: Vec<NodeId>,
}

fn scaled(builder: &Builder<'_>, sums: ValueId, n: usize) -> Option<Scaled> {
    let (cast, node) = builder.only_reader(sums)?;
    if !matches!(&node.op, Op::Cast(op) if op.to == DType::F32) {
        return None;
    }
    let real = node.outputs[0];
    let (multiply, node) = builder.only_reader(real)?;
    let times = other_operand(node, real, cutover_graph::ops::BinaryFunction::Mul)?;
    let columns = |id: ValueId| {
        let tensor = builder.known_tensor(id).filter(|t| t.dtype() == DType::F32)?;
        let shape = tensor.shape().clone();
        let fits = shape.element_count() == 1 || (shape.element_count() == n && shape.last() == Some(&n));
        let values = tensor.to_vec::<f32>().ok().filter(|_| fits)?;
        Some(if values.len() == 1 { vec![values[0]; n] } else { values })
    };
    let is_single = |id: ValueId| builder.shape(id).element_count() == 1 && builder.is_float(id);
    let is_there = |id: ValueId| builder.held(id).plain.is_some() || builder.known_tensor(id).is_some();
    let (scale, factors) = match columns(times) {
        Some(factors) => (None, factors),
        None => {
            let (producer, _) = builder.graph.producer(times)?;
            match &builder.graph.node(producer).op {
                Op::Binary(op) if op.function == cutover_graph::ops::BinaryFunction::Mul => {
                    let &[Some(a), Some(b)] = &builder.graph.node(producer).inputs[..] else { return None };
                    match (columns(a), columns(b)) {
                        (None, Some(factors)) if is_single(a) && is_there(a) => (Some(a), factors),
                        (Some(factors), None) if is_single(b) && is_there(b) => (Some(b), factors),
                        _ => return None,
                    }
                }
                _ if is_single(times) && is_there(times) => (Some(times), vec![1.0; n]),
                _ => return None,
            }
        }
    };
    let shape = builder.shape(sums);
    let mut done = Scaled { scale, factors, bias: None, value: node.outputs[0], nodes: vec![cast, multiply] };
    if builder.shape(done.value) != shape {
        return None;
    }
    if let Some((add, node)) = builder.only_reader(done.value)
        && let Some(addend) = other_operand(node, done.value, cutover_graph::ops::BinaryFunction::Add)
        && builder.shape(node.outputs[0]) == shape
        && let Some(bias) = columns(addend)
    {
        done.bias = Some(bias);
        done.value = node.outputs[0];
        done.nodes.push(add);
    }
    Some(done)
}

/// The other operand of such a node.
fn other_operand(node: &Node, one: ValueId, function: cutover_graph::ops::BinaryFunction) -> Option<ValueId> {
    let (Op::Binary(op), &[Some(a), Some(b)]) = (&node.op, &node.inputs[..]) else { return None };
    match op.function == function && a != b {
        true if a == one => Some(b),
        true if b == one => Some(a),
        _ => None,
    }
}

impl ProductStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) {
        let zero_point = match self.zero_point {
            Number::Known(value) => value,
            Number::At(buffer) => {
                let byte = frame.bytes(buffer)[0];
                if self.input.signed { i32::from(byte as i8) } else { i32::from(byte) }
            }
        };
        let epilogue = match self.finish {
            Finish::Sums => Epilogue::Sums,
            Finish::Floats { scale, factors, bias, low, high } => {
                let scale = match scale {
                    Number::Known(scale) => scale,
                    Number::At(buffer) => frame.floats(buffer)[0],
                };
                let bias = bias.map(|b| frame.floats(b));
                Epilogue::Floats { scale, factors: frame.floats(factors), bias, low, high }
            }
            Finish::Bytes { factors, offsets, low, high, zero_point } => {
                let (factors, offsets) = (frame.floats(factors), frame.floats(offsets));
                Epilogue::Bytes { factors, offsets, low, high, zero_point }
            }
        };
        let problem = product::Product {
            shape: self.shape,
            input: self.input.of(frame, zero_point),
            weights: frame.floats(self.weights),
            form: self.form,
            epilogue,
        };
        let (rows, panels) = (self.shape.rows(), product::panels(level, &self.shape));
        let tile = product::rows_together(level, self.form);
        let tiles = rows.div_ceil(tile);
        // Rows are shared where there are many, panels of columns otherwise; either way each output is one thread's.
        let by_rows = self.shape.groups > 1 || tiles >= 4 * worker.parts || panels < worker.parts;
        let (rows, panels) = if by_rows {
            let mine = worker.share(tiles);
            ((mine.start * tile).min(rows)..(mine.end * tile).min(rows), 0..panels)
        } else {
            (0..rows, worker.share(panels))
        };
        product::product(level, &problem, rows, panels, frame.words_output(self.output), worker.workspace);
    }
}
