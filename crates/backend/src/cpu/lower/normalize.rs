//! Softmax, layer normalization and reductions.

use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    lower::Lowered,
    plan::{Builder, NoPlan},
};
use cutover_graph::{
    Node,
    ops::{LayerNorm, Reduce, ReduceFunction, Softmax, SoftmaxFunction, normalize_axis},
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
