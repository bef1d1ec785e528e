//! Kernels over windows of one channel each: depthwise convolutions and pools.

use super::{products::Weights, *};

pub(in crate::cpu) struct WindowStep {
    shape: ProductShape,
    input: Bytes,
    zero_point: i32,
    op: WindowKind,
    output: Buffer,
}

impl WindowStep {
    /// Of products; pools have none.
    pub fn operations(&self) -> u64 {
        match self.op {
            WindowKind::Depthwise { .. } => operations(&self.shape),
            _ => 0,
        }
    }
}

enum WindowKind {
    Depthwise { weights: Buffer, factors: Buffer, offsets: Buffer, low: f32, high: f32, zero_point: i32 },
    Max,
    Average { count_padding: bool, factor: f32, to: Quantization },
}

pub(super) fn depthwise(
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
    let packed = builder.pack(Recipe { constants: weights.constants, how }, channels * (taps + 1), |packed| {
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

pub(in crate::cpu::lower) fn lower_max_pool(
    builder: &mut Builder<'_>,
    node: &Node,
    op: &MaxPool,
) -> Result<bool, NoPlan> {
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

pub(in crate::cpu::lower) fn lower_average_pool(
    builder: &mut Builder<'_>,
    node: &Node,
    op: &AveragePool,
) -> Result<bool, NoPlan> {
    let (Some(x), Some(kernel), output) = (input(node, 0), &op.window.kernel_shape, node.outputs[0]) else {
        return Ok(false);
    };
    let channels = builder.shape(x).get(1).copied().unwrap_or(0);
    let shape = geometry(builder, &op.window, channels, x, kernel, output);
    average(builder, x, output, shape, op.count_include_pad)
}

pub(in crate::cpu::lower) fn lower_global_pool(
    builder: &mut Builder<'_>,
    node: &Node,
    op: &GlobalPool,
) -> Result<bool, NoPlan> {
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
    let Some(sink) = open_sink(builder, output) else { return Ok(false) };
    let Some((buffer, from)) = image(builder, x)? else { return Ok(false) };
    let op = WindowKind::Average { count_padding, factor: from.scale / sink.to.scale, to: sink.to };
    let input = Bytes { buffer, signed: from.signed };
    builder.name_kernel("integer pool");
    push_window(builder, WindowStep { shape, input, zero_point: from.zero_point, op, output: buffer }, sink.value)?;
    builder.fuse(sink.nodes);
    Ok(true)
}

impl WindowStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let input = self.input.of(frame, self.zero_point);
        let pixels = worker.share(self.shape.rows());
        let (shape, output) = (self.shape, frame.words_output(self.output));
        let op = match self.op {
            WindowKind::Depthwise { weights, factors, offsets, low, high, zero_point } => {
                let (weights, factors, offsets) = (frame.floats(weights), frame.floats(factors), frame.floats(offsets));
                let problem = Depthwise { shape, input, weights, factors, offsets, low, high, zero_point };
                return quantized_depthwise::depthwise(level, &problem, pixels, output);
            }
            WindowKind::Max => WindowOp::Max,
            WindowKind::Average { count_padding, factor, to } => WindowOp::Average { count_padding, factor, to },
        };
        quantized::windows(level, &shape, op, input, pixels, output);
    }
}
