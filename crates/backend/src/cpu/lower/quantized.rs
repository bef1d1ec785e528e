//! Quantized networks on integers: what stands between a dequantization and a quantization becomes one kernel.
//!
//! A dequantized value is not computed when its node comes: it is held as the quantized bytes with their scale and zero point, and made floats only
//! where a kernel asks for floats. A convolution, product, sum, pool or function of one value whose operands are held so, and whose only reader
//! is a quantization, writes that one's result. Images between integer kernels are channels-last, held as strided views.

use super::{
    conv::two_axes,
    movement::{self, view},
};
use crate::{
    RunError,
    cpu::{
        frame::{Buffer, Frame, Worker},
        lower::Lowered,
        plan::{Builder, Dequantized, NoPlan, Strided},
        weights::Recipe,
    },
};
use cutover_graph::{
    Identity, Node, NodeId, Op, ValueId,
    ops::{
        Activation as Fused, AveragePool, Concat, Conv, EvalContext, Gemm, GlobalPool, GlobalPoolFunction, Inputs,
        MatMul, MaxPool, UnaryFunction, Wide, Window, normalize_axis,
    },
};
use cutover_kernels::cpu::{
    IsaLevel,
    conv::Axis,
    quantized::{self, DEPTHWISE_TERMS, Quantization, WindowOp},
    quantized_product::{self as product, Epilogue, ProductShape, Quantized},
};
use cutover_tensor::{DType, Tensor, Value};

/// Bytes of a buffer.
#[derive(Clone, Copy)]
struct Bytes {
    buffer: Buffer,
    signed: bool,
}

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
    in_bytes: bool,
    finish: Finish,
    output: Buffer,
}

enum Finish {
    Sums,
    Floats { scale: Number<f32>, factors: Buffer, bias: Option<Buffer>, low: f32, high: f32 },
    Bytes { factors: Buffer, offsets: Buffer, low: f32, high: f32, zero_point: i32 },
}

pub(in crate::cpu) struct WindowStep {
    shape: ProductShape,
    input: Bytes,
    zero_point: i32,
    op: WindowKind,
    output: Buffer,
}

enum WindowKind {
    Depthwise { weights: Buffer, factors: Buffer, offsets: Buffer, low: f32, high: f32, zero_point: i32 },
    Max,
    Average { count_padding: bool, factor: f32, to: Quantization },
}

/// A function of every element.
pub(in crate::cpu) struct MapStep {
    map: Map,
    len: usize,
    output: Buffer,
}

enum Map {
    Quantize(Buffer, Quantization),
    Dequantize(Bytes, i32, f32),
    LookUp(Buffer, Box<[u8; 256]>),
    Add([(Bytes, i32, f32); 2], Quantization),
    /// The least and greatest of each thread's part, two floats apart.
    Range(Buffer),
    /// Of the ranges, the scale and the zero point; then the bytes.
    Dynamic {
        input: Buffer,
        ranges: Buffer,
        scale: Buffer,
        zero_point: Buffer,
    },
}

fn input(node: &Node, index: usize) -> Option<ValueId> {
    node.inputs.get(index).copied().flatten()
}

fn is_byte(dtype: DType) -> bool {
    matches!(dtype, DType::U8 | DType::I8)
}

/// One scale of f32 above 0, and one zero point of bytes of `dtype`.
fn quantization(
    builder: &Builder<'_>,
    scale: Option<ValueId>,
    zero_point: Option<ValueId>,
    dtype: DType,
) -> Option<Quantization> {
    let scale = builder.known_tensor(scale?).filter(|t| t.element_count() == 1 && t.dtype() == DType::F32)?;
    let scale = scale.to_vec::<f32>().ok()?[0];
    let zero_point = match zero_point {
        None => 0,
        Some(id) => {
            let point = builder.known_tensor(id).filter(|t| t.element_count() == 1 && t.dtype() == dtype)?;
            integers(&point)?[0]
        }
    };
    (is_byte(dtype) && scale.is_finite() && scale > 0.0).then_some(Quantization {
        scale,
        zero_point,
        signed: dtype == DType::I8,
    })
}

/// Of a quantization of f32 to bytes, divided in f32.
fn quantization_of(builder: &Builder<'_>, node: &Node) -> Option<Quantization> {
    let Op::QuantizeLinear(op) = &node.op else { return None };
    let (x, output) = (input(node, 0)?, node.outputs[0]);
    let single = builder.is_float(x) && op.precision.is_none_or(|precision| precision == DType::F32);
    quantization(builder, input(node, 1), input(node, 2), builder.fact(output).dtype).filter(|_| single)
}

fn integers(tensor: &Tensor) -> Option<Vec<i32>> {
    match Wide::of(tensor).ok()? {
        Wide::Int(values) => Some(values.into_iter().map(|v| v as i32).collect()),
        _ => None,
    }
}

// Dequantization and quantization alone.

pub(super) fn lower_dequantize(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let (Some(x), output) = (input(node, 0), node.outputs[0]) else { return Ok(false) };
    let constant = |id: &ValueId| builder.graph.constant(*id).is_some();
    if node.inputs.iter().flatten().all(constant) && builder.is_float(output) {
        builder.defer(output);
        return Ok(true);
    }
    let dtype = builder.fact(x).dtype;
    match quantization(builder, input(node, 1), input(node, 2), dtype).filter(|_| builder.is_float(output)) {
        Some(from) => {
            let view = view(builder, x)?;
            builder.hold_dequantized(output, Dequantized { view, from });
            Ok(true)
        }
        None => super::typed::lower_scaled(builder, node),
    }
}

/// Makes floats of what is held as bytes.
pub(in crate::cpu) fn dequantize(builder: &mut Builder<'_>, id: ValueId, held: Dequantized) -> Result<Buffer, NoPlan> {
    let shape = builder.shape(id);
    let buffer = contiguous(builder, &held.view, &shape)?;
    let to = builder.new_plain(id)?;
    let from = held.from;
    let map = Map::Dequantize(Bytes { buffer, signed: from.signed }, from.zero_point, from.scale);
    let step = MapStep { map, len: shape.element_count(), output: to };
    let kernel = builder.name_kernel("dequantization");
    builder.push(Lowered::Map(step), &[buffer], &[to]);
    builder.name_kernel(kernel);
    Ok(to)
}

/// The same bytes under the shape of `output`.
pub(super) fn hold_view(
    builder: &mut Builder<'_>,
    output: ValueId,
    of: ValueId,
    held: Dequantized,
) -> Result<(), NoPlan> {
    let (from, to) = (builder.shape(of), builder.shape(output));
    let view = match from == to {
        true => held.view,
        false => {
            let buffer = contiguous(builder, &held.view, &from)?;
            Strided { buffer, offset: 0, strides: to.strides().to_vec() }
        }
    };
    builder.hold_dequantized(output, Dequantized { view, from: held.from });
    Ok(())
}

/// The bytes of a view, row-major.
fn contiguous(builder: &mut Builder<'_>, view: &Strided, shape: &[usize]) -> Result<Buffer, NoPlan> {
    copied(builder, view, shape, &(0..shape.len()).collect::<Vec<_>>())
}

/// The bytes of a view with its axes in another order; the view's own buffer if it has them so.
fn copied(builder: &mut Builder<'_>, view: &Strided, shape: &[usize], order: &[usize]) -> Result<Buffer, NoPlan> {
    let turned: Vec<usize> = order.iter().map(|&a| shape[a]).collect();
    let strides: Vec<usize> = order.iter().map(|&a| view.strides[a]).collect();
    let wanted = cutover_tensor::Shape::new(&turned).strides().to_vec();
    if view.offset == 0 && (0..turned.len()).all(|a| turned[a] == 1 || strides[a] == wanted[a]) {
        return Ok(view.buffer);
    }
    let to = builder.new_bytes(turned.iter().product())?;
    let from = Strided { strides, ..view.clone() };
    let kernel = builder.name_kernel("layout");
    let buffer = view.buffer;
    builder.push(Lowered::CopyStrided(movement::CopyStrided { from, shape: turned, size: 1, to }), &[buffer], &[to]);
    builder.name_kernel(kernel);
    Ok(to)
}

/// Channels last, in the strides of `[n, c, …]`.
fn channels_last(shape: &[usize]) -> Vec<usize> {
    let order = last_order(shape.len());
    let turned: Vec<usize> = order.iter().map(|&a| shape[a]).collect();
    let strides = cutover_tensor::Shape::new(&turned).strides().to_vec();
    let mut own = vec![0; shape.len()];
    order.iter().zip(strides).for_each(|(&axis, stride)| own[axis] = stride);
    own
}

fn last_order(rank: usize) -> Vec<usize> {
    [0].into_iter().chain(2..rank).chain([1]).collect()
}

/// The bytes that an image is held as, channels-last from now on.
fn image(builder: &mut Builder<'_>, id: ValueId) -> Result<Option<(Buffer, Quantization)>, NoPlan> {
    let Some(held) = builder.dequantized(id) else { return Ok(None) };
    let shape = builder.shape(id);
    let buffer = copied(builder, &held.view, &shape, &last_order(shape.rank()))?;
    let view = Strided { buffer, offset: 0, strides: channels_last(&shape) };
    builder.hold_dequantized(id, Dequantized { view, from: held.from });
    Ok(Some((buffer, held.from)))
}

pub(super) fn lower_quantize(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let (Some(x), output) = (input(node, 0), node.outputs[0]) else { return Ok(false) };
    let Some(to) = quantization_of(builder, node) else { return super::typed::lower_scaled(builder, node) };
    if let Some(held) = builder.dequantized(x) {
        if held.from == to {
            builder.hold_strided(output, held.view);
            return Ok(true);
        }
        let table = table(held.from, to, Some);
        return look_up(builder, x, held, table, output);
    }
    let shape = builder.shape(x);
    // In whatever order the floats are held: quantization keeps it.
    let strided = builder.held(x).strided.clone().filter(|view| {
        let order = last_order(shape.rank());
        shape.rank() >= 3
            && builder.held(x).plain.is_none()
            && view.offset == 0
            && order.len() == shape.rank()
            && view.strides == channels_last(&shape)
    });
    let from = match &strided {
        Some(view) => view.buffer,
        None => builder.plain(x)?,
    };
    let output_buffer = match strided {
        Some(view) => {
            let buffer = builder.new_bytes(shape.element_count())?;
            builder.hold_strided(output, Strided { buffer, ..view });
            buffer
        }
        None => builder.new_plain(output)?,
    };
    let step = MapStep { map: Map::Quantize(from, to), len: shape.element_count(), output: output_buffer };
    builder.push(Lowered::Map(step), &[from], &[output_buffer]);
    Ok(true)
}

/// For every byte, that of a function of its value.
fn table(from: Quantization, to: Quantization, f: impl Fn(f32) -> Option<f32>) -> Option<Box<[u8; 256]>> {
    let (low, high) = to.bounds();
    let mut table = Box::new([0; 256]);
    for byte in 0..=255u8 {
        let value = if from.signed { i32::from(byte as i8) } else { i32::from(byte) };
        let y = (f((value - from.zero_point) as f32 * from.scale)? / to.scale).round_ties_even();
        let y = if y.is_nan() { 0.0 } else { y.clamp(low, high) };
        table[usize::from(byte)] = (y as i32 + to.zero_point) as u8;
    }
    Some(table)
}

/// The bytes of `x`, each as a table says, in the layout they are held in, as the quantized `output`.
fn look_up(
    builder: &mut Builder<'_>,
    x: ValueId,
    held: Dequantized,
    table: Option<Box<[u8; 256]>>,
    output: ValueId,
) -> Result<bool, NoPlan> {
    let (Some(table), shape) = (table, builder.shape(x)) else { return Ok(false) };
    let view = dense(builder, held.view, &shape)?;
    let buffer = builder.new_bytes(shape.element_count())?;
    let from = view.buffer;
    builder.hold_strided(output, Strided { buffer, ..view });
    let step = MapStep { map: Map::LookUp(from, table), len: shape.element_count(), output: buffer };
    builder.push(Lowered::Map(step), &[from], &[buffer]);
    Ok(true)
}

/// A view of all of a buffer and nothing else: the one there is, if it is row-major or channels-last, or a copy.
fn dense(builder: &mut Builder<'_>, view: Strided, shape: &[usize]) -> Result<Strided, NoPlan> {
    if view.offset == 0 && shape.len() >= 3 && view.strides == channels_last(shape) {
        return Ok(view);
    }
    let buffer = contiguous(builder, &view, shape)?;
    Ok(Strided { buffer, offset: 0, strides: cutover_tensor::Shape::new(shape).strides().to_vec() })
}

// What is between them.

/// The quantization that is a value's only reader, by way of clamps.
struct Sink {
    /// Its result.
    value: ValueId,
    to: Quantization,
    /// Bounds of the rounded quotient, the clamps' among them.
    low: f32,
    high: f32,
    nodes: Vec<NodeId>,
}

fn sink(builder: &Builder<'_>, output: ValueId, bounds: (f32, f32)) -> Option<Sink> {
    let (mut low, mut high) = bounds;
    let mut value = output;
    let mut nodes = Vec::new();
    loop {
        let (id, node) = builder.only_reader(value)?;
        nodes.push(id);
        match &node.op {
            Op::QuantizeLinear(_) if node.inputs[0] == Some(value) => {
                let to = quantization_of(builder, node)?;
                let (least, most) = to.bounds();
                let within = |bound: f32| (bound / to.scale).round_ties_even().clamp(least, most);
                return Some(Sink { value: node.outputs[0], to, low: within(low), high: within(high), nodes });
            }
            Op::Unary(op) if op.function == UnaryFunction::Relu => (low, high) = (low.max(0.0), high.max(0.0)),
            Op::Clip(_) if node.inputs[0] == Some(value) => {
                let bound = |index: usize, open: f32| match input(node, index) {
                    None => Some(open),
                    Some(id) => builder.scalar(id),
                };
                let (least, most) = (bound(1, f32::NEG_INFINITY)?, bound(2, f32::INFINITY)?);
                let clip = |x: f32| x.max(least).min(most);
                (low, high) = (clip(low), clip(high));
            }
            _ => return None,
        }
        value = node.outputs[0];
    }
}

/// The bounds that an activation is, if it is no more than that.
fn clamps(activation: Option<Fused>) -> Option<(f32, f32)> {
    match activation {
        None => Some((f32::NEG_INFINITY, f32::INFINITY)),
        Some(Fused::Relu) => Some((0.0, f32::INFINITY)),
        Some(Fused::Clip { low, high }) => Some((low, high)),
        Some(_) => None,
    }
}

/// Weights as integers less their zero points, `[m][k]`, and a scale for each m.
struct Weights {
    values: Vec<i16>,
    scales: Vec<f32>,
    identities: Vec<Identity>,
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
    let mut identities = vec![constant.identity()];
    let points = match zero_point {
        None => vec![0],
        Some(id) => {
            let points = builder.known_tensor(id).filter(|t| t.dtype() == tensor.dtype())?;
            identities.push(Identity::of_tensor(&points));
            integers(&points)?
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
    let raw = integers(tensor)?;
    let k = raw.len() / m;
    let at = |row: usize, column: usize| match order {
        Order::Rows => raw[row * k + column],
        Order::Columns => raw[column * m + row],
    };
    let point = |row: usize| points[if points.len() == 1 { 0 } else { row }];
    let values = (0..m).flat_map(|row| (0..k).map(move |column| (row, column)));
    let values = values.map(|(row, column)| (at(row, column) - point(row)) as i16).collect();
    let scales = if scales.len() == 1 { vec![scales[0]; m] } else { scales };
    Some(Weights { values, scales, identities })
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

/// What the dequantization of a constant gives.
pub(in crate::cpu) fn evaluate(builder: &Builder<'_>, id: ValueId) -> Option<Tensor> {
    let (producer, _) = builder.graph.producer(id)?;
    let node = builder.graph.node(producer);
    if !matches!(node.op, Op::DequantizeLinear(_)) {
        return None;
    }
    let constant = |input: &Option<ValueId>| match *input {
        None => Some(None),
        Some(id) => builder.graph.constant(id).map(|c| Some(Value::Tensor(c.tensor.clone()))),
    };
    let values = node.inputs.iter().map(constant).collect::<Option<Vec<_>>>()?;
    let borrowed: Vec<Option<&Value>> = values.iter().map(Option::as_ref).collect();
    let results = node.op.eval(Inputs(&borrowed), &EvalContext::default()).ok()?;
    results.into_iter().next()?.into_tensor()
}

fn constant(builder: &mut Builder<'_>, values: Vec<f32>) -> Result<Buffer, NoPlan> {
    let tensor = Tensor::from_vec([values.len()], values);
    let tensor = tensor.map_err(|e| {
        NoPlan::Error(RunError::Op { node: String::new(), op: "constant".to_string(), source: e.into() })
    })?;
    Ok(builder.new_constant(tensor))
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
    let in_bytes = product::packs_bytes(level, &weights.values);
    let how = format!(
        "integers {} {} {} {}x{} {in_bytes} {}",
        shape.channels_in,
        shape.channels_out,
        shape.groups,
        shape.height.kernel,
        shape.width.kernel,
        level.name()
    );
    let recipe = Recipe { identities: weights.identities, how };
    let packed = builder.pack(recipe, product::packed_len(level, &shape, in_bytes), |packed| {
        product::pack(level, &shape, &weights.values, in_bytes, packed);
    })?;
    builder.need_workspace(product::workspace_len(level, &shape));
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
    let step = ProductStep { shape, input, zero_point, weights: packed, in_bytes, finish, output };
    builder.push(Lowered::IntegerProduct(step), &reads, &[output]);
    Ok(())
}

/// Adds a product of a quantized `x` whose result is `real`: bytes where its only reader quantizes it, floats otherwise. `shape_of` is that of the
/// output; images are channels-last.
fn finish_real(
    builder: &mut Builder<'_>,
    operands: Operands,
    from: Quantization,
    bias: Option<Vec<f32>>,
    bounds: (f32, f32),
    real: ValueId,
    is_image: bool,
) -> Result<(), NoPlan> {
    let shape = builder.shape(real);
    let strides = if is_image { channels_last(&shape) } else { shape.strides().to_vec() };
    let scales = operands.weights.scales.iter();
    if let Some(sink) = sink(builder, real, bounds) {
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
    let (low, high) = bounds;
    let finish =
        Finish::Floats { scale: Number::Known(from.scale), factors: constant(builder, factors)?, bias, low, high };
    let buffer = builder.new_floats(shape.element_count())?;
    builder.name_kernel(if is_image { "integer convolution" } else { "integer product" });
    push(builder, operands, finish, buffer)?;
    builder.hold_strided(real, Strided { buffer, offset: 0, strides });
    Ok(())
}

/// Factor and offset of each channel's sums, from the scales of weights, input and result and the bias.
fn requantization(weights: &[f32], from: f32, bias: Option<&[f32]>, to: f32) -> (Vec<f32>, Vec<f32>) {
    let factor = |w: &f32| (f64::from(from) * f64::from(*w) / f64::from(to)) as f32;
    let offset = |m: usize| bias.map_or(0.0, |bias| (f64::from(bias[m]) / f64::from(to)) as f32);
    (weights.iter().map(factor).collect(), (0..weights.len()).map(offset).collect())
}

/// The geometry of a convolution of `[n, c, …]`.
fn geometry(
    builder: &Builder<'_>,
    window: &Window,
    group: usize,
    x: ValueId,
    kernel: &[usize],
    output: ValueId,
) -> Option<ProductShape> {
    let (shape, to) = (builder.shape(x), builder.shape(output));
    if !(3..=4).contains(&shape.rank()) || shape.element_count() == 0 || to.element_count() == 0 {
        return None;
    }
    let axes = window.axes(&shape[2..], kernel).ok()?;
    let (height, width) = two_axes(&axes)?;
    Some(ProductShape { images: shape[0], height, width, channels_in: shape[1], channels_out: to[1], groups: group })
}

pub(super) fn lower_conv(builder: &mut Builder<'_>, node: &Node, op: &Conv) -> Result<bool, NoPlan> {
    let (Some(x), Some(w), output) = (input(node, 0), input(node, 1), node.outputs[0]) else { return Ok(false) };
    let (Some(bounds), None) = (clamps(op.activation), input(node, 3)) else { return Ok(false) };
    if builder.dequantized(x).is_none() {
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
    let Some((buffer, from)) = image(builder, x)? else { return Ok(false) };
    if shape.groups == shape.channels_in && m == shape.channels_in && m > 1 {
        let sink = sink(builder, output, bounds);
        if let Some(sink) = sink.filter(|_| shape.height.kernel * shape.width.kernel <= DEPTHWISE_TERMS) {
            return depthwise(builder, shape, buffer, from, weights, bias, sink).map(|()| true);
        }
    }
    let input = Bytes { buffer, signed: from.signed };
    let operands = Operands { shape, input, zero_point: Number::Known(from.zero_point), weights };
    finish_real(builder, operands, from, bias, bounds, output, true)?;
    Ok(true)
}

fn depthwise(
    builder: &mut Builder<'_>,
    shape: ProductShape,
    buffer: Buffer,
    from: Quantization,
    weights: Weights,
    bias: Option<Vec<f32>>,
    sink: Sink,
) -> Result<(), NoPlan> {
    let (channels, taps) = (shape.channels_in, shape.height.kernel * shape.width.kernel);
    let how = format!("integer depthwise {channels} {taps}");
    let packed = builder.pack(Recipe { identities: weights.identities, how }, channels * (taps + 1), |packed| {
        // By taps, and the sum of each channel's at the end.
        let (body, sums) = packed.split_at_mut(channels * taps);
        for (i, to) in body.iter_mut().enumerate() {
            *to = weights.values[i % channels * taps + i / channels].into();
        }
        for (channel, sum) in sums.iter_mut().enumerate() {
            *sum = weights.values[channel * taps..][..taps].iter().map(|&w| f32::from(w)).sum();
        }
    })?;
    let (factors, offsets) = requantization(&weights.scales, from.scale, bias.as_deref(), sink.to.scale);
    let (factors, offsets) = (constant(builder, factors)?, constant(builder, offsets)?);
    let op = WindowKind::Depthwise {
        weights: packed,
        factors,
        offsets,
        low: sink.low,
        high: sink.high,
        zero_point: sink.to.zero_point,
    };
    let input = Bytes { buffer, signed: from.signed };
    builder.name_kernel("integer depthwise convolution");
    push_window(builder, WindowStep { shape, input, zero_point: from.zero_point, op, output: buffer }, sink.value)?;
    builder.fuse(sink.nodes);
    Ok(())
}

/// Adds a step over windows whose result is the quantized image `value`.
fn push_window(builder: &mut Builder<'_>, step: WindowStep, value: ValueId) -> Result<Strided, NoPlan> {
    let shape = builder.shape(value);
    let buffer = builder.new_bytes(shape.element_count())?;
    let mut reads = vec![step.input.buffer];
    if let WindowKind::Depthwise { weights, factors, offsets, .. } = step.op {
        reads.extend([weights, factors, offsets]);
    }
    builder.push(Lowered::IntegerWindow(WindowStep { output: buffer, ..step }), &reads, &[buffer]);
    let view = Strided { buffer, offset: 0, strides: channels_last(&shape) };
    if builder.fact(value).dtype != DType::F32 {
        builder.hold_strided(value, view.clone());
    }
    Ok(view)
}

pub(super) fn lower_gemm(builder: &mut Builder<'_>, node: &Node, op: &Gemm) -> Result<bool, NoPlan> {
    let (Some(a), Some(b), output) = (input(node, 0), input(node, 1), node.outputs[0]) else { return Ok(false) };
    if op.transpose_a || op.alpha != 1.0 || (op.beta != 1.0 && input(node, 2).is_some()) {
        return Ok(false);
    }
    let n = builder.shape(output)[1];
    let (axis, order) = if op.transpose_b { (0, Order::Rows) } else { (1, Order::Columns) };
    lower_product(builder, a, b, input(node, 2), clamps(op.activation), output, n, axis, order)
}

pub(super) fn lower_matmul(builder: &mut Builder<'_>, node: &Node, op: &MatMul) -> Result<bool, NoPlan> {
    let (Some(a), Some(b), output) = (input(node, 0), input(node, 1), node.outputs[0]) else { return Ok(false) };
    if builder.shape(b).rank() != 2 || builder.shape(a).rank() < 2 {
        return Ok(false);
    }
    let n = builder.shape(b)[1];
    lower_product(builder, a, b, input(node, 2), clamps(op.activation), output, n, 1, Order::Columns)
}

fn lower_product(
    builder: &mut Builder<'_>,
    a: ValueId,
    b: ValueId,
    addend: Option<ValueId>,
    bounds: Option<(f32, f32)>,
    output: ValueId,
    n: usize,
    axis: usize,
    order: Order,
) -> Result<bool, NoPlan> {
    let (Some(held), Some(bounds)) = (builder.dequantized(a), bounds) else { return Ok(false) };
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
    finish_real(builder, operands, held.from, bias, bounds, output, false)?;
    Ok(true)
}

/// A function of one value between dequantization and quantization, and what follows it as long as that is one too: a table.
pub(super) fn lower_function(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let Some(x) = input(node, 0) else { return Ok(false) };
    let Some(held) = builder.dequantized(x) else { return Ok(false) };
    let bytes = (0..=255u8).map(|b| if held.from.signed { i32::from(b as i8) } else { i32::from(b) });
    let values: Vec<f32> = bytes.map(|b| (b - held.from.zero_point) as f32 * held.from.scale).collect();
    let Ok(mut values) = Tensor::from_vec([256], values) else { return Ok(false) };
    let (mut node, mut of) = (node, x);
    let mut nodes = Vec::new();
    loop {
        // A clip's bounds, and nothing that has elements of its own.
        let mut operands = vec![Some(Value::Tensor(values))];
        for id in &node.inputs[1..] {
            let known = id.map(|id| builder.known_tensor(id).filter(|t| t.element_count() == 1));
            match known {
                None => operands.push(None),
                Some(Some(tensor)) if matches!(node.op, Op::Clip(_)) => operands.push(Some(Value::Tensor(tensor))),
                Some(_) => return Ok(false),
            }
        }
        if !matches!(node.op, Op::Unary(_) | Op::Clip(_)) || node.inputs[0] != Some(of) {
            return Ok(false);
        }
        let borrowed: Vec<Option<&Value>> = operands.iter().map(Option::as_ref).collect();
        let Ok(results) = node.op.eval(Inputs(&borrowed), &EvalContext::default()) else { return Ok(false) };
        let Some(tensor) = results.into_iter().next().and_then(Value::into_tensor) else { return Ok(false) };
        values = tensor;
        of = node.outputs[0];
        let Some((id, reader)) = builder.only_reader(of) else { return Ok(false) };
        nodes.push(id);
        if matches!(reader.op, Op::QuantizeLinear(_)) && reader.inputs[0] == Some(of) {
            let output = reader.outputs[0];
            let Some(to) = quantization_of(builder, reader) else { return Ok(false) };
            let Ok(values) = values.to_vec::<f32>() else { return Ok(false) };
            let from = held.from;
            // By the byte that stands for the value.
            let index = |x: f32| ((x / from.scale).round() as i32 + from.zero_point) as u8;
            let table = table(from, to, |x| values.get(usize::from(index(x))).copied());
            builder.name_kernel("table");
            let done = look_up(builder, x, held, table, output)?;
            if done {
                builder.fuse(nodes);
            }
            return Ok(done);
        }
        node = reader;
    }
}

pub(super) fn lower_add(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let (&[Some(a), Some(b)], output) = (&node.inputs[..], node.outputs[0]) else { return Ok(false) };
    let (Some(left), Some(right)) = (builder.dequantized(a), builder.dequantized(b)) else { return Ok(false) };
    let shape = builder.shape(output);
    if builder.shape(a) != shape || builder.shape(b) != shape {
        return Ok(false);
    }
    let Some(sink) = sink(builder, output, (f32::NEG_INFINITY, f32::INFINITY)) else { return Ok(false) };
    let clamped = (sink.low, sink.high) != sink.to.bounds();
    if clamped {
        return Ok(false);
    }
    // Both channels-last if one is.
    let is_last =
        |held: &Dequantized| shape.rank() >= 3 && held.view.offset == 0 && held.view.strides == channels_last(&shape);
    let last = is_last(&left) || is_last(&right);
    let order = if last { last_order(shape.rank()) } else { (0..shape.rank()).collect() };
    let strides = if last { channels_last(&shape) } else { shape.strides().to_vec() };
    let mut operands = Vec::with_capacity(2);
    for held in [&left, &right] {
        let buffer = copied(builder, &held.view, &shape, &order)?;
        operands.push((Bytes { buffer, signed: held.from.signed }, held.from.zero_point, held.from.scale));
    }
    let Ok(operands) = <[_; 2]>::try_from(operands) else { return Ok(false) };
    let reads = operands.map(|(bytes, ..)| bytes.buffer);
    let buffer = builder.new_bytes(shape.element_count())?;
    let step = MapStep { map: Map::Add(operands, sink.to), len: shape.element_count(), output: buffer };
    builder.name_kernel("integer sum");
    builder.push(Lowered::Map(step), &reads, &[buffer]);
    builder.hold_strided(sink.value, Strided { buffer, offset: 0, strides });
    builder.fuse(sink.nodes);
    Ok(true)
}

pub(super) fn lower_max_pool(builder: &mut Builder<'_>, node: &Node, op: &MaxPool) -> Result<bool, NoPlan> {
    let (Some(x), 1, Some(kernel)) = (input(node, 0), node.outputs.len(), &op.window.kernel_shape) else {
        return Ok(false);
    };
    let output = node.outputs[0];
    let channels = builder.shape(x).get(1).copied().unwrap_or(0);
    let Some(shape) = geometry(builder, &op.window, channels, x, kernel, output) else { return Ok(false) };
    let Some((buffer, from)) = image(builder, x)? else { return Ok(false) };
    let input = Bytes { buffer, signed: from.signed };
    let step = WindowStep { shape, input, zero_point: from.zero_point, op: WindowKind::Max, output: buffer };
    builder.name_kernel("integer pool");
    let view = push_window(builder, step, output)?;
    builder.hold_dequantized(output, Dequantized { view, from });
    Ok(true)
}

pub(super) fn lower_average_pool(builder: &mut Builder<'_>, node: &Node, op: &AveragePool) -> Result<bool, NoPlan> {
    let (Some(x), Some(kernel), output) = (input(node, 0), &op.window.kernel_shape, node.outputs[0]) else {
        return Ok(false);
    };
    let channels = builder.shape(x).get(1).copied().unwrap_or(0);
    let shape = geometry(builder, &op.window, channels, x, kernel, output);
    average(builder, x, output, shape, op.count_include_pad)
}

pub(super) fn lower_global_pool(builder: &mut Builder<'_>, node: &Node, op: &GlobalPool) -> Result<bool, NoPlan> {
    let (Some(x), output) = (input(node, 0), node.outputs[0]) else { return Ok(false) };
    let shape = builder.shape(x);
    if op.function != GlobalPoolFunction::Average || shape.rank() < 3 || shape.element_count() == 0 {
        return Ok(false);
    }
    let pixels: usize = shape[2..].iter().product();
    let width = Axis { input: pixels, output: 1, kernel: pixels, ..Axis::UNIT };
    let (images, channels) = (shape[0], shape[1]);
    let shape = ProductShape {
        images,
        height: Axis::UNIT,
        width,
        channels_in: channels,
        channels_out: channels,
        groups: channels,
    };
    average(builder, x, output, Some(shape), false)
}

fn average(
    builder: &mut Builder<'_>,
    x: ValueId,
    output: ValueId,
    shape: Option<ProductShape>,
    count_padding: bool,
) -> Result<bool, NoPlan> {
    let (Some(shape), Some(_)) = (shape, builder.dequantized(x)) else { return Ok(false) };
    let Some(sink) = sink(builder, output, (f32::NEG_INFINITY, f32::INFINITY)) else { return Ok(false) };
    if (sink.low, sink.high) != sink.to.bounds() {
        return Ok(false);
    }
    let Some((buffer, from)) = image(builder, x)? else { return Ok(false) };
    let op = WindowKind::Average { count_padding, factor: from.scale / sink.to.scale, to: sink.to };
    let input = Bytes { buffer, signed: from.signed };
    builder.name_kernel("integer pool");
    push_window(builder, WindowStep { shape, input, zero_point: from.zero_point, op, output: buffer }, sink.value)?;
    builder.fuse(sink.nodes);
    Ok(true)
}

pub(super) fn lower_concat(builder: &mut Builder<'_>, node: &Node, op: &Concat) -> Result<bool, NoPlan> {
    let Some(inputs) = node.inputs.iter().copied().collect::<Option<Vec<ValueId>>>() else { return Ok(false) };
    let Some(held) = inputs.iter().map(|&id| builder.dequantized(id)).collect::<Option<Vec<Dequantized>>>() else {
        return Ok(false);
    };
    let output = node.outputs[0];
    let shape = builder.shape(output);
    let Ok(axis) = normalize_axis(op.axis, shape.rank()) else { return Ok(false) };
    let sink = sink(builder, output, (f32::NEG_INFINITY, f32::INFINITY));
    let Some(sink) = sink.filter(|s| (s.low, s.high) == s.to.bounds()).filter(|_| shape.element_count() > 0) else {
        return Ok(false);
    };
    // Channels-last images are joined so.
    let is_last = |(held, &id): (&Dequantized, &ValueId)| {
        let own = builder.shape(id);
        own.rank() >= 3 && held.view.offset == 0 && held.view.strides == channels_last(&own)
    };
    let last = shape.rank() >= 3 && held.iter().zip(&inputs).any(is_last);
    let order: Vec<usize> = if last { last_order(shape.rank()) } else { (0..shape.rank()).collect() };
    let strides = if last { channels_last(&shape) } else { shape.strides().to_vec() };
    let at = order.iter().position(|&a| a == axis).unwrap_or(axis);
    let turned: Vec<usize> = order.iter().map(|&a| shape[a]).collect();
    let (rows, inner): (usize, usize) = (turned[..at].iter().product(), turned[at + 1..].iter().product());
    builder.name_kernel("integer concatenation");
    let to = builder.new_bytes(shape.element_count())?;
    let mut start = 0;
    for (held, id) in held.into_iter().zip(inputs) {
        let own = builder.shape(id);
        let count = own.element_count();
        if count == 0 {
            continue;
        }
        let mut from = copied(builder, &held.view, &own, &order)?;
        if held.from != sink.to {
            let Some(table) = table(held.from, sink.to, Some) else { return Ok(false) };
            let other = builder.new_bytes(count)?;
            let step = MapStep { map: Map::LookUp(from, table), len: count, output: other };
            builder.push(Lowered::Map(step), &[from], &[other]);
            from = other;
        }
        let width = own[axis] * inner;
        let copy = movement::Copy::rows(rows, width, from, to, start, shape[axis] * inner);
        builder.push(Lowered::Copy(copy), &[from], &[to]);
        start += width;
    }
    builder.hold_strided(sink.value, Strided { buffer: to, offset: 0, strides });
    builder.fuse(sink.nodes);
    Ok(true)
}

// Operators of quantized values.

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

pub(super) fn lower_conv_integer(
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

pub(super) fn lower_qlinear_conv(
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

pub(super) fn lower_qlinear_matmul(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
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
pub(super) fn lower_matmul_integer(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
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

pub(super) fn lower_dynamic(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let (Some(x), &[y, scale, zero_point]) = (input(node, 0), &node.outputs[..]) else { return Ok(false) };
    let len = builder.shape(x).element_count();
    if !builder.is_float(x) || len == 0 {
        return Ok(false);
    }
    let from = builder.plain(x)?;
    let ranges = builder.new_floats(2 * builder.device.pool.threads())?;
    builder.push(Lowered::Map(MapStep { map: Map::Range(from), len, output: ranges }), &[from], &[ranges]);
    let (to, scale, zero_point) = (builder.new_plain(y)?, builder.new_plain(scale)?, builder.new_plain(zero_point)?);
    let map = Map::Dynamic { input: from, ranges, scale, zero_point };
    let step = MapStep { map, len, output: to };
    builder.push(Lowered::Map(step), &[from, ranges], &[to, scale, zero_point]);
    Ok(true)
}

// Runs.

impl Bytes {
    fn of<'a>(&self, frame: &'a Frame<'_>, zero_point: i32) -> Quantized<'a> {
        Quantized { bytes: frame.bytes(self.buffer), signed: self.signed, zero_point }
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
            bytes: self.in_bytes,
            epilogue,
        };
        let (rows, panels) = (self.shape.rows(), product::panels(level, &self.shape));
        let tile = product::cut(level).rows;
        let tiles = rows.div_ceil(tile);
        // Rows are shared where there are many, panels of columns otherwise; either way each output is one thread's.
        let by_rows = self.shape.groups > 1 || tiles >= 4 * worker.threads || panels < worker.threads;
        let (rows, panels) = if by_rows {
            let mine = worker.share(tiles);
            ((mine.start * tile).min(rows)..(mine.end * tile).min(rows), 0..panels)
        } else {
            (0..rows, worker.share(panels))
        };
        product::product(level, &problem, rows, panels, frame.words_output(self.output), worker.workspace);
    }
}

impl WindowStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let op = match self.op {
            WindowKind::Depthwise { weights, factors, offsets, low, high, zero_point } => WindowOp::Depthwise {
                weights: frame.floats(weights),
                factors: frame.floats(factors),
                offsets: frame.floats(offsets),
                low,
                high,
                zero_point,
            },
            WindowKind::Max => WindowOp::Max,
            WindowKind::Average { count_padding, factor, to } => WindowOp::Average { count_padding, factor, to },
        };
        let input = self.input.of(frame, self.zero_point);
        let pixels = worker.share(self.shape.rows());
        quantized::windows(level, &self.shape, op, input, pixels, frame.words_output(self.output));
    }
}

impl MapStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let range = worker.share(self.len);
        match &self.map {
            &Map::Quantize(input, to) => {
                quantized::quantize(level, frame.floats(input), to, range, frame.words_output(self.output));
            }
            &Map::Dequantize(input, zero_point, scale) => {
                quantized::dequantize(level, input.of(frame, zero_point), scale, range, frame.output(self.output));
            }
            Map::LookUp(input, table) => {
                quantized::look_up(table, frame.bytes(*input), range, frame.words_output(self.output));
            }
            &Map::Add([(a, zero_a, scale_a), (b, zero_b, scale_b)], to) => {
                let operands = [a.of(frame, zero_a), b.of(frame, zero_b)];
                quantized::add(level, operands, [scale_a, scale_b], to, range, frame.words_output(self.output));
            }
            &Map::Range(input) => {
                let (low, high) = quantized::range_of(level, frame.floats(input), range);
                frame.write(self.output, worker.thread * 8, &low.to_ne_bytes());
                frame.write(self.output, worker.thread * 8 + 4, &high.to_ne_bytes());
            }
            &Map::Dynamic { input, ranges, scale, zero_point } => {
                let parts = &frame.floats(ranges)[..2 * worker.threads];
                let low = parts.iter().step_by(2).copied().fold(0.0, f32::min);
                let high = parts.iter().skip(1).step_by(2).copied().fold(0.0, f32::max);
                let step = if high == low { 1.0 } else { (high - low) / 255.0 };
                let point = (-low / step).round_ties_even().clamp(0.0, 255.0) as u8;
                let to = Quantization { scale: step, zero_point: point.into(), signed: false };
                quantized::quantize(level, frame.floats(input), to, range, frame.words_output(self.output));
                if worker.thread == 0 {
                    frame.write(scale, 0, &step.to_ne_bytes());
                    frame.write(zero_point, 0, &[point]);
                }
            }
        }
    }
}
