//! Softmax, layer normalization and reductions.

use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    lower::Lowered,
    plan::{Builder, NoPlan},
};
use cutover_graph::{
    Node, ValueId,
    ops::{BatchNorm, InstanceNorm, LayerNorm, Lrn, Reduce, ReduceFunction, Softmax, SoftmaxFunction, normalize_axis},
};
use cutover_kernels::cpu::{
    IsaLevel,
    elementwise::Source,
    normalize,
    reduce::{self, Reduction},
};

pub(in crate::cpu) struct SoftmaxStep {
    rows: usize,
    width: usize,
    logarithm: bool,
    input: Option<Buffer>,
    output: Buffer,
}

pub(in crate::cpu) struct StridedSoftmaxStep {
    outer: usize,
    axis: usize,
    inner: usize,
    logarithm: bool,
    input: Buffer,
    output: Buffer,
}

pub(in crate::cpu) struct LayerNormStep {
    rows: usize,
    width: usize,
    gamma: Option<Buffer>,
    beta: Option<Buffer>,
    epsilon: f32,
    root_mean_square: bool,
    input: Buffer,
    output: Buffer,
}

/// Planes of channels, less a mean and over a deviation: their statistics are given, or those of each group of channels.
pub(in crate::cpu) struct ChannelNormStep {
    images: usize,
    channels: usize,
    groups: usize,
    plane: usize,
    epsilon: f32,
    input: Buffer,
    scale: Buffer,
    bias: Buffer,
    /// Mean and variance of every channel.
    statistics: Option<[Buffer; 2]>,
    output: Buffer,
}

/// Over the squares of neighbouring channels.
pub(in crate::cpu) struct LrnStep {
    images: usize,
    channels: usize,
    pixels: usize,
    op: Lrn,
    input: Buffer,
    output: Buffer,
}

pub(in crate::cpu) struct ReduceStep {
    pub reduction: Reduction,
    pub outer: usize,
    pub axis: usize,
    pub inner: usize,
    pub input: Buffer,
    pub output: Buffer,
}

pub(in crate::cpu) fn lower_softmax(builder: &mut Builder<'_>, node: &Node, op: &Softmax) -> Result<bool, NoPlan> {
    let (&[Some(x)], output) = (&node.inputs[..], node.outputs[0]) else { return Ok(false) };
    let logarithm = match op.function {
        SoftmaxFunction::Softmax => false,
        SoftmaxFunction::LogSoftmax => true,
        SoftmaxFunction::Hardmax => return Ok(false),
    };
    let shape = builder.shape(x);
    if !builder.is_float(x) || shape.element_count() == 0 {
        return Ok(false);
    }
    let Ok(axis) = normalize_axis(op.axis, shape.rank().max(1)) else { return Ok(false) };
    let (outer, rest) = shape.split_at(axis.min(shape.rank()));
    let outer: usize = outer.iter().product();
    let (width, inner): (usize, usize) = match op.coerced {
        true => (rest.iter().product(), 1),
        false => (rest.first().copied().unwrap_or(1), rest.iter().skip(1).product()),
    };
    let input = builder.plain(x)?;
    if inner > 1 {
        let to = builder.new_plain(output)?;
        let step = StridedSoftmaxStep { outer, axis: width, inner, logarithm, input, output: to };
        builder.push(Lowered::StridedSoftmax(step), &[input], &[to]);
        return Ok(true);
    }
    let in_place = builder.may_overwrite(x, input);
    let to = if in_place {
        builder.hold_plain(output, input);
        input
    } else {
        builder.new_plain(output)?
    };
    let step = SoftmaxStep { rows: outer, width, logarithm, input: (!in_place).then_some(input), output: to };
    builder.push(Lowered::Softmax(step), &[input], &[to]);
    Ok(true)
}

pub(in crate::cpu) fn lower_layer_norm(builder: &mut Builder<'_>, node: &Node, op: &LayerNorm) -> Result<bool, NoPlan> {
    let (Some(&Some(x)), output) = (node.inputs.first(), node.outputs[0]) else { return Ok(false) };
    let shape = builder.shape(x);
    let Ok(axis) = normalize_axis(op.axis, shape.rank()) else { return Ok(false) };
    let width: usize = shape[axis..].iter().product();
    let others = [node.inputs.get(1).copied().flatten(), node.inputs.get(2).copied().flatten()];
    let fits = |id: cutover_graph::ValueId| builder.is_float(id) && builder.shape(id).element_count() == width;
    if !builder.is_float(x) || node.outputs.len() > 1 || width == 0 || !others.into_iter().flatten().all(fits) {
        return Ok(false);
    }
    let input = builder.plain(x)?;
    let [gamma, beta] = others;
    let gamma = gamma.map(|g| builder.plain(g)).transpose()?;
    let beta = beta.map(|b| builder.plain(b)).transpose()?;
    let to = builder.new_plain(output)?;
    let rows = shape[..axis].iter().product();
    let reads: Vec<Buffer> = [Some(input), gamma, beta].into_iter().flatten().collect();
    let step = LayerNormStep {
        rows,
        width,
        gamma,
        beta,
        epsilon: op.epsilon,
        root_mean_square: !op.centred,
        input,
        output: to,
    };
    builder.push(Lowered::LayerNorm(step), &reads, &[to]);
    Ok(true)
}

pub(in crate::cpu) fn lower_batch_norm(builder: &mut Builder<'_>, node: &Node, op: &BatchNorm) -> Result<bool, NoPlan> {
    // Statistics of the batch itself, and of single elements, are the reference's.
    if op.training.is_some() || op.per_element {
        return Ok(false);
    }
    let &[Some(x), Some(scale), Some(bias), Some(mean), Some(variance)] = &node.inputs[..] else { return Ok(false) };
    if op.training.is_some() || op.per_element || node.outputs.len() != 1 {
        return Ok(false);
    }
    lower_channel_norm(builder, node, x, [scale, bias], Some([mean, variance]), None, op.epsilon)
}

pub(in crate::cpu) fn lower_instance_norm(
    builder: &mut Builder<'_>,
    node: &Node,
    op: &InstanceNorm,
) -> Result<bool, NoPlan> {
    let &[Some(x), Some(scale), Some(bias)] = &node.inputs[..] else { return Ok(false) };
    lower_channel_norm(builder, node, x, [scale, bias], None, op.groups, op.epsilon)
}

fn lower_channel_norm(
    builder: &mut Builder<'_>,
    node: &Node,
    x: ValueId,
    [scale, bias]: [ValueId; 2],
    statistics: Option<[ValueId; 2]>,
    groups: Option<usize>,
    epsilon: f32,
) -> Result<bool, NoPlan> {
    let shape = builder.shape(x);
    let mut parameters = [scale, bias].into_iter().chain(statistics.into_iter().flatten());
    let fits = |id: ValueId| builder.is_float(id) && builder.shape(id).element_count() == shape[1];
    if !builder.is_float(x) || shape.element_count() == 0 || !parameters.all(fits) {
        return Ok(false);
    }
    let (images, channels, plane) = builder.image(x);
    let groups = groups.unwrap_or(channels);
    if groups == 0 || !channels.is_multiple_of(groups) {
        return Ok(false);
    }
    let input = builder.plain(x)?;
    let (scale, bias) = (builder.plain(scale)?, builder.plain(bias)?);
    let statistics = match statistics {
        Some([mean, variance]) => Some([builder.plain(mean)?, builder.plain(variance)?]),
        None => None,
    };
    let output = builder.new_plain(node.outputs[0])?;
    let reads: Vec<Buffer> = [input, scale, bias].into_iter().chain(statistics.into_iter().flatten()).collect();
    let step = ChannelNormStep { images, channels, groups, plane, epsilon, input, scale, bias, statistics, output };
    builder.push(Lowered::ChannelNorm(step), &reads, &[output]);
    Ok(true)
}

pub(in crate::cpu) fn lower_lrn(builder: &mut Builder<'_>, node: &Node, op: &Lrn) -> Result<bool, NoPlan> {
    let (&[Some(x)], output) = (&node.inputs[..], node.outputs[0]) else { return Ok(false) };
    if !builder.is_float(x) || builder.shape(x).rank() < 2 || builder.shape(x).element_count() == 0 {
        return Ok(false);
    }
    let (images, channels, pixels) = builder.image(x);
    let (input, output) = (builder.plain(x)?, builder.new_plain(output)?);
    let step = LrnStep { images, channels, pixels, op: op.clone(), input, output };
    builder.push(Lowered::Lrn(step), &[input], &[output]);
    Ok(true)
}

pub(in crate::cpu) fn reduction(function: ReduceFunction) -> Option<Reduction> {
    Some(match function {
        ReduceFunction::Sum => Reduction::Sum,
        ReduceFunction::Mean => Reduction::Mean,
        ReduceFunction::Max => Reduction::Max,
        ReduceFunction::Min => Reduction::Min,
        ReduceFunction::Prod => Reduction::Product,
        ReduceFunction::L1 => Reduction::SumOfMagnitudes,
        ReduceFunction::L2 => Reduction::Euclidean,
        ReduceFunction::SumSquare => Reduction::SumOfSquares,
        _ => return None,
    })
}

pub(in crate::cpu) fn lower_reduce(builder: &mut Builder<'_>, node: &Node, op: &Reduce) -> Result<bool, NoPlan> {
    let (Some(&Some(x)), output) = (node.inputs.first(), node.outputs[0]) else { return Ok(false) };
    let Some(reduction) = reduction(op.function) else { return Ok(false) };
    let axes = match node.inputs.get(1).copied().flatten() {
        None => Vec::new(),
        Some(id) => match builder.integers(id) {
            Some(axes) => axes,
            None => return Ok(false),
        },
    };
    let shape = builder.shape(x);
    let Ok(reduced) = op.reduced(&axes, shape.rank()) else { return Ok(false) };
    if !builder.is_float(x) || shape.element_count() == 0 {
        return Ok(false);
    }
    // Axes of extent 1 belong to either side; the others must be neighbours.
    let wide: Vec<usize> = (0..shape.rank()).filter(|&a| reduced[a] && shape[a] > 1).collect();
    let (Some(&first), Some(&last)) = (wide.first(), wide.last()) else {
        if op.function == ReduceFunction::Sum || op.function == ReduceFunction::Mean {
            builder.hold_view(output, x)?;
            return Ok(true);
        }
        return Ok(false);
    };
    if (first..=last).any(|a| !reduced[a] && shape[a] > 1) {
        return Ok(false);
    }
    let product = |dims: &[usize]| dims.iter().product::<usize>();
    let (outer, axis, inner) = (product(&shape[..first]), product(&shape[first..=last]), product(&shape[last + 1..]));
    let input = builder.plain(x)?;
    let to = builder.new_plain(output)?;
    builder.push(Lowered::Reduce(ReduceStep { reduction, outer, axis, inner, input, output: to }), &[input], &[to]);
    Ok(true)
}

impl SoftmaxStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let input = self.input.map_or(Source::Output, |b| Source::Slice(frame.floats(b)));
        let problem =
            normalize::Softmax { width: self.width, input, scale: 1.0, addend: None, logarithm: self.logarithm };
        normalize::softmax(level, &problem, worker.share(self.rows), frame.output(self.output));
    }
}

impl StridedSoftmaxStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let input = Source::Slice(frame.floats(self.input));
        let StridedSoftmaxStep { axis, inner, logarithm, .. } = *self;
        let problem = normalize::StridedSoftmax { axis, inner, input, logarithm };
        normalize::softmax_strided(level, &problem, worker.share(self.outer), frame.output(self.output));
    }
}

impl LayerNormStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let problem = normalize::LayerNorm {
            width: self.width,
            input: Source::Slice(frame.floats(self.input)),
            residual: None,
            gamma: self.gamma.map(|b| frame.floats(b)),
            beta: self.beta.map(|b| frame.floats(b)),
            epsilon: self.epsilon,
            root_mean_square: self.root_mean_square,
        };
        normalize::layer_norm(level, &problem, worker.share(self.rows), frame.output(self.output));
    }
}

impl ChannelNormStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>) {
        let ChannelNormStep { channels, groups, plane, .. } = *self;
        let input = frame.floats(self.input);
        let (scale, bias) = (frame.floats(self.scale), frame.floats(self.bias));
        let epsilon = f64::from(self.epsilon);
        let of_group = channels / groups;
        for unit in worker.share(self.images * groups) {
            let first = unit % groups * of_group;
            let group = &input[unit * of_group * plane..][..of_group * plane];
            let own = self.statistics.is_none().then(|| mean_and_variance(group));
            for (channel, x) in (first..).zip(group.chunks_exact(plane)) {
                let (mean, variance) = match (own, self.statistics) {
                    (None, Some([mean, variance])) => {
                        (frame.floats(mean)[channel].into(), frame.floats(variance)[channel].into())
                    }
                    (own, _) => own.unwrap_or_default(),
                };
                let factor = f64::from(scale[channel]) / (variance + epsilon).sqrt();
                let (mean, factor, bias) = (mean as f32, factor as f32, bias[channel]);
                let to = (unit * of_group + channel - first) * plane;
                let mut piece = [0f32; 256];
                for (at, x) in x.chunks(piece.len()).enumerate() {
                    piece.iter_mut().zip(x).for_each(|(y, x)| *y = (x - mean) * factor + bias);
                    frame.write_floats(self.output, to + at * piece.len(), &piece[..x.len()]);
                }
            }
        }
    }
}

/// In `f64`, in a fixed order.
fn mean_and_variance(values: &[f32]) -> (f64, f64) {
    fn sum(values: &[f32], of: impl Fn(f64) -> f64) -> f64 {
        const LANES: usize = 8;
        let (whole, rest) = values.as_chunks::<LANES>();
        let mut sums = [0f64; LANES];
        whole.iter().for_each(|chunk| sums.iter_mut().zip(chunk).for_each(|(sum, &x)| *sum += of(x.into())));
        sums.iter().sum::<f64>() + rest.iter().map(|&x| of(x.into())).sum::<f64>()
    }
    let count = values.len() as f64;
    let mean = sum(values, |x| x) / count;
    (mean, sum(values, |x| (x - mean) * (x - mean)) / count)
}

impl LrnStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>) {
        let LrnStep { channels, pixels, .. } = *self;
        let Lrn { alpha, beta, bias, size } = self.op;
        let input = frame.floats(self.input);
        let factor = alpha / size as f32;
        for unit in worker.share(self.images * channels) {
            let (image, channel) = (unit / channels, unit % channels);
            let low = channel.saturating_sub(size.saturating_sub(1) / 2);
            let high = channel.saturating_add(size / 2).min(channels - 1);
            let plane = |channel: usize| &input[(image * channels + channel) * pixels..][..pixels];
            let mut piece = [0f32; 256];
            for start in (0..pixels).step_by(piece.len()) {
                let piece = &mut piece[..256.min(pixels - start)];
                piece.fill(0.0);
                for neighbour in low..=high {
                    let x = &plane(neighbour)[start..][..piece.len()];
                    piece.iter_mut().zip(x).for_each(|(sum, x)| *sum += x * x);
                }
                let x = &plane(channel)[start..];
                piece.iter_mut().zip(x).for_each(|(y, x)| *y = x / (bias + factor * *y).powf(beta));
                frame.write_floats(self.output, unit * pixels + start, piece);
            }
        }
    }
}

impl ReduceStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let problem = reduce::Reduce {
            reduction: self.reduction,
            axis: self.axis,
            inner: self.inner,
            input: frame.floats(self.input),
        };
        reduce::reduce(level, &problem, worker.share(self.outer), frame.output(self.output));
    }
}
