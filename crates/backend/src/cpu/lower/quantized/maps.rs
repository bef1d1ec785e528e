//! Functions of every element: quantization and its inverse, tables, sums, and what joins quantized values.

use super::*;
use crate::cpu::lower::typed;

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

pub(in crate::cpu::lower) fn lower_dequantize(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
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
        None => typed::lower_scaled(builder, node),
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

pub(in crate::cpu::lower) fn lower_quantize(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let (Some(x), output) = (input(node, 0), node.outputs[0]) else { return Ok(false) };
    let Some(to) = quantization_of(builder, node) else { return typed::lower_scaled(builder, node) };
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

/// A function of one value between dequantization and quantization, and what follows it as long as that is one too: a table.
pub(in crate::cpu::lower) fn lower_function(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
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

pub(in crate::cpu::lower) fn lower_add(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let (&[Some(a), Some(b)], output) = (&node.inputs[..], node.outputs[0]) else { return Ok(false) };
    let (Some(left), Some(right)) = (builder.dequantized(a), builder.dequantized(b)) else { return Ok(false) };
    let shape = builder.shape(output);
    if builder.shape(a) != shape || builder.shape(b) != shape {
        return Ok(false);
    }
    let Some(sink) = open_sink(builder, output) else { return Ok(false) };
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

pub(in crate::cpu::lower) fn lower_concat(builder: &mut Builder<'_>, node: &Node, op: &Concat) -> Result<bool, NoPlan> {
    let Some(inputs) = node.inputs.iter().copied().collect::<Option<Vec<ValueId>>>() else { return Ok(false) };
    let Some(held) = inputs.iter().map(|&id| builder.dequantized(id)).collect::<Option<Vec<Dequantized>>>() else {
        return Ok(false);
    };
    let output = node.outputs[0];
    let shape = builder.shape(output);
    let Ok(axis) = normalize_axis(op.axis, shape.rank()) else { return Ok(false) };
    let Some(sink) = open_sink(builder, output).filter(|_| shape.element_count() > 0) else { return Ok(false) };
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

pub(in crate::cpu::lower) fn lower_dynamic(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let (Some(x), &[y, scale, zero_point]) = (input(node, 0), &node.outputs[..]) else { return Ok(false) };
    if !builder.is_float(x) || builder.shape(x).element_count() == 0 {
        return Ok(false);
    }
    let to = [builder.new_plain(y)?, builder.new_plain(scale)?, builder.new_plain(zero_point)?];
    quantize_by_range(builder, x, to)?;
    Ok(true)
}

/// Adds the steps that quantize `x` to u8 by the range that it has; the bytes, the scale and the zero point go to the three buffers.
pub(super) fn quantize_by_range(
    builder: &mut Builder<'_>,
    x: ValueId,
    [to, scale, zero_point]: [Buffer; 3],
) -> Result<(), NoPlan> {
    let (from, len) = (builder.plain(x)?, builder.shape(x).element_count());
    let ranges = builder.new_floats(2 * builder.device.pool.most_parts())?;
    builder.push(Lowered::Map(MapStep { map: Map::Range(from), len, output: ranges }), &[from], &[ranges]);
    let map = Map::Dynamic { input: from, ranges, scale, zero_point };
    let step = MapStep { map, len, output: to };
    builder.push(Lowered::Map(step), &[from, ranges], &[to, scale, zero_point]);
    Ok(())
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
                frame.write(self.output, worker.part * 8, &low.to_ne_bytes());
                frame.write(self.output, worker.part * 8 + 4, &high.to_ne_bytes());
            }
            &Map::Dynamic { input, ranges, scale, zero_point } => {
                let parts = &frame.floats(ranges)[..2 * worker.parts];
                let low = parts.iter().step_by(2).copied().fold(0.0, f32::min);
                let high = parts.iter().skip(1).step_by(2).copied().fold(0.0, f32::max);
                let step = if high == low { 1.0 } else { (high - low) / 255.0 };
                let point = (-low / step).round_ties_even().clamp(0.0, 255.0) as u8;
                let to = Quantization { scale: step, zero_point: point.into(), signed: false };
                quantized::quantize(level, frame.floats(input), to, range, frame.words_output(self.output));
                if worker.part == 0 {
                    frame.write(scale, 0, &step.to_ne_bytes());
                    frame.write(zero_point, 0, &[point]);
                }
            }
        }
    }
}
