//! Pools over up to three axes, on blocked images where they are blocked already.

use super::{conv::three_axes, layout::per_image};
use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    lower::{Lowered, normalize},
    plan::{Builder, NoPlan},
};
use cutover_graph::{
    Node,
    ops::{AveragePool, GlobalPool, GlobalPoolFunction, MaxPool, Window},
};
use cutover_kernels::cpu::{
    BLOCK, IsaLevel,
    conv::Axis,
    layout::blocked_len,
    pool::{self, Pool, Pooling},
    reduce::Reduction,
};

pub(in crate::cpu) struct PoolStep {
    pooling: Pooling,
    images: usize,
    channels: usize,
    axes: [Axis; 3],
    blocked: bool,
    input: Buffer,
    output: Buffer,
}

pub(in crate::cpu) struct GlobalStep {
    maximum: bool,
    images: usize,
    channels: usize,
    pixels: usize,
    input: Buffer,
    output: Buffer,
}

pub(in crate::cpu) fn lower_max(builder: &mut Builder<'_>, node: &Node, op: &MaxPool) -> Result<bool, NoPlan> {
    if node.outputs.len() > 1 {
        return Ok(false);
    }
    lower(builder, node, &op.window, Pooling::Max)
}

pub(in crate::cpu) fn lower_average(builder: &mut Builder<'_>, node: &Node, op: &AveragePool) -> Result<bool, NoPlan> {
    lower(builder, node, &op.window, Pooling::Average { count_padding: op.count_include_pad })
}

fn lower(builder: &mut Builder<'_>, node: &Node, window: &Window, pooling: Pooling) -> Result<bool, NoPlan> {
    let (Some(&Some(x)), output) = (node.inputs.first(), node.outputs[0]) else { return Ok(false) };
    let shape = builder.shape(x);
    let Some(kernel) = &window.kernel_shape else { return Ok(false) };
    if !builder.is_float(x)
        || !(3..=5).contains(&shape.rank())
        || shape.element_count() == 0
        || builder.shape(output).element_count() == 0
    {
        return Ok(false);
    }
    let axes = window
        .axes(&shape[2..], kernel)
        .map_err(|source| NoPlan::Error(crate::RunError::Op { node: node.name.clone(), op: node.op.name(), source }))?;
    let axes = three_axes(&axes);
    let blocked = builder.held(x).blocked.is_some();
    let (input, to) = match blocked {
        true => (builder.blocked(x)?, builder.new_blocked(output)?),
        false => (builder.plain(x)?, builder.new_plain(output)?),
    };
    let step = PoolStep { pooling, images: shape[0], channels: shape[1], axes, blocked, input, output: to };
    builder.push(Lowered::Pool(step), &[input], &[to]);
    Ok(true)
}

pub(in crate::cpu) fn lower_global(builder: &mut Builder<'_>, node: &Node, op: &GlobalPool) -> Result<bool, NoPlan> {
    let (Some(&Some(x)), output) = (node.inputs.first(), node.outputs[0]) else { return Ok(false) };
    let maximum = match op.function {
        GlobalPoolFunction::Average => false,
        GlobalPoolFunction::Max => true,
        GlobalPoolFunction::Lp { .. } => return Ok(false),
    };
    if !builder.is_float(x) || builder.shape(x).rank() < 3 || builder.shape(x).element_count() == 0 {
        return Ok(false);
    }
    let (images, channels, pixels) = builder.image(x);
    if builder.held(x).blocked.is_none() {
        let (input, to) = (builder.plain(x)?, builder.new_plain(output)?);
        let reduction = if maximum { Reduction::Max } else { Reduction::Mean };
        let step =
            normalize::ReduceStep { reduction, outer: images * channels, axis: pixels, inner: 1, input, output: to };
        builder.push(Lowered::Reduce(step), &[input], &[to]);
        return Ok(true);
    }
    let (input, to) = (builder.blocked(x)?, builder.new_blocked(output)?);
    let step = GlobalStep { maximum, images, channels, pixels, input, output: to };
    builder.push(Lowered::GlobalPool(step), &[input], &[to]);
    Ok(true)
}

impl PoolStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let PoolStep { pooling, channels, axes: [depth, height, width], .. } = *self;
        let lanes = if self.blocked { channels.next_multiple_of(BLOCK) } else { channels };
        let len = |of: fn(&Axis) -> usize| self.axes.iter().fold(lanes, |len, axis| len * of(axis));
        let (from, to) = (len(|axis| axis.input), len(|axis| axis.output));
        let problem = |image: usize| {
            let input = &frame.floats(self.input)[image * from..][..from];
            Pool { pooling, channels, depth, height, width, input }
        };
        let units = match self.blocked {
            true => pool::pool_blocked_units(&problem(0)),
            false => pool::pool_plain_units(&problem(0)),
        };
        for (image, units) in per_image(self.images, units, worker) {
            let output = frame.output_at(self.output, image * to, to);
            match self.blocked {
                true => pool::pool_blocked(level, &problem(image), units, output),
                false => pool::pool_plain(level, &problem(image), units, output),
            }
        }
    }
}

impl GlobalStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let (from, to) = (blocked_len(self.channels, self.pixels), self.channels.next_multiple_of(BLOCK));
        for (image, blocks) in per_image(self.images, to / BLOCK, worker) {
            let input = &frame.floats(self.input)[image * from..][..from];
            let output = frame.output_at(self.output, image * to, to);
            match self.maximum {
                true => pool::global_max_blocked(level, self.pixels, input, blocks, output),
                false => pool::global_average_blocked(level, self.pixels, input, blocks, output),
            }
        }
    }
}
