//! Convolutions, on blocked images.

use super::{
    activation, expanded,
    half::{self, Form},
    layout::per_image,
};
use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    lower::{Lowered, elementwise},
    plan::{Builder, NoPlan},
};
use crate::{Numerics, cpu::MemoryUse};
use cutover_graph::{
    Node, OpError, ValueId,
    ops::{Conv, ConvTranspose, WindowAxis},
};
use cutover_kernels::cpu::{
    Activation, BLOCK, IsaLevel, Residual,
    conv::{self, ConvShape, Operands},
    conv_first::{self, FirstShape},
    depthwise::{self, DepthwiseShape},
    half::HalfType,
    winograd::{self, WinogradTile},
};

type Axis = conv::Axis;

/// Inputs of up to so many channels are read plain: blocking them would be mostly padding.
const FIRST_CHANNELS: usize = 8;

pub(in crate::cpu) struct ConvStep {
    shape: ConvShape,
    /// Direct, or by tiles of Winograd's.
    tile: Option<WinogradTile>,
    operands: Operands,
    /// What the filter of f32 operands is held in, if not f32; of one group, direct.
    half: Option<HalfType>,
    images: usize,
    input: Buffer,
    filter: Buffer,
    bias: Option<Buffer>,
    residual: Option<Buffer>,
    activation: Activation,
    output: Buffer,
}

pub(in crate::cpu) struct FirstStep {
    shape: FirstShape,
    images: usize,
    input: Buffer,
    filter: Buffer,
    bias: Option<Buffer>,
    activation: Activation,
    output: Buffer,
}

pub(in crate::cpu) struct DepthwiseStep {
    shape: DepthwiseShape,
    images: usize,
    input: Buffer,
    filter: Buffer,
    bias: Option<Buffer>,
    residual: Option<Buffer>,
    activation: Activation,
    output: Buffer,
}

fn axis(axis: &WindowAxis) -> Axis {
    Axis {
        input: axis.input,
        output: axis.output,
        kernel: axis.kernel,
        stride: axis.stride,
        dilation: axis.dilation,
        pad_before: axis.pad_begin,
        pad_after: axis.pad_end,
    }
}

/// Height and width of one or two spatial axes.
pub(super) fn two_axes(axes: &[WindowAxis]) -> Option<(Axis, Axis)> {
    match axes {
        [width] => Some((Axis::UNIT, axis(width))),
        [height, width] => Some((axis(height), axis(width))),
        _ => None,
    }
}

/// Depth, height and width of up to three spatial axes.
pub(super) fn three_axes(axes: &[WindowAxis]) -> [Axis; 3] {
    let mut three = [Axis::UNIT; 3];
    let lacking = 3 - axes.len();
    three[lacking..].iter_mut().zip(axes).for_each(|(to, from)| *to = axis(from));
    three
}

pub(super) fn of_op(node: &Node) -> impl Fn(OpError) -> NoPlan + '_ {
    |source| NoPlan::Error(crate::RunError::Op { node: node.name.clone(), op: node.op.name(), source })
}

fn input(node: &Node, index: usize) -> Option<ValueId> {
    node.inputs.get(index).copied().flatten()
}

pub(in crate::cpu) fn lower(builder: &mut Builder<'_>, node: &Node, op: &Conv) -> Result<bool, NoPlan> {
    let (Some(x), Some(w)) = (input(node, 0), input(node, 1)) else { return Ok(false) };
    let (bias, residual, output) = (input(node, 2), input(node, 3), node.outputs[0]);
    let (x_shape, w_shape) = (builder.shape(x), builder.shape(w));
    if !builder.is_float(x)
        || builder.constant(w).is_none()
        || !(3..=4).contains(&x_shape.rank())
        || builder.shape(output).element_count() == 0
    {
        return Ok(false);
    }
    if x_shape.element_count() == 0 || residual.is_some_and(|r| builder.shape(r) != builder.shape(output)) {
        return Ok(false);
    }
    let axes = op.window.axes(&x_shape[2..], &w_shape[2..]).map_err(of_op(node))?;
    let Some((height, width)) = two_axes(&axes) else { return Ok(false) };
    let (channels_in, channels_out, images) = (x_shape[1], w_shape[0], x_shape[0]);
    let fused = activation(op.activation);
    let bias = bias.map(|b| builder.plain(b)).transpose()?;
    let first = op.group == 1 && channels_in <= FIRST_CHANNELS && builder.held(x).blocked.is_none();
    if first {
        let shape = FirstShape { channels_in, channels_out, height, width };
        let filter = pack(
            builder,
            w,
            &format!("first {channels_in} {channels_out} {w_shape}"),
            conv_first::packed_first_len(&shape),
            |w, p| {
                conv_first::pack_first(&shape, w, p);
            },
        )?;
        let (input, to) = (builder.plain(x)?, builder.new_blocked(output)?);
        let alone = residual.is_none();
        let activation = if alone { fused } else { Activation::Identity };
        let step = FirstStep { shape, images, input, filter, bias, activation, output: to };
        builder.push(Lowered::FirstConv(step), &reads([input, filter], [bias, None]), &[to]);
        if let Some(residual) = residual {
            let residual = builder.blocked(residual)?;
            elementwise::add_in_place(builder, to, residual, fused);
        }
        return Ok(true);
    }
    if op.group == channels_in && channels_out == channels_in && op.group > 1 {
        let shape = DepthwiseShape { channels: channels_in, height, width };
        let filter = pack_depthwise(builder, w, &shape)?;
        let input = builder.blocked(x)?;
        let residual = residual.map(|r| builder.blocked(r)).transpose()?;
        let to = builder.new_blocked(output)?;
        let step = DepthwiseStep { shape, images, input, filter, bias, residual, activation: fused, output: to };
        builder.push(Lowered::Depthwise(step), &reads([input, filter], [bias, residual]), &[to]);
        return Ok(true);
    }
    let shape = ConvShape { channels_in, channels_out, groups: op.group, height, width, transposed: false };
    if !shape.supported() {
        return Ok(false);
    }
    let form = half::form(builder, w);
    if residual.is_none()
        && !matches!(form, Form::Half(_))
        && expanded::lower(builder, &shape, form.operands(), images, [x, w, output], bias, fused)?
    {
        return Ok(true);
    }
    let residual = residual.map(|r| builder.blocked(r)).transpose()?;
    push_conv(builder, x, w, form, shape, images, bias, residual, fused, output)
}

pub(in crate::cpu) fn lower_transposed(
    builder: &mut Builder<'_>,
    node: &Node,
    op: &ConvTranspose,
) -> Result<bool, NoPlan> {
    let (Some(x), Some(w)) = (input(node, 0), input(node, 1)) else { return Ok(false) };
    let output = node.outputs[0];
    let (x_shape, w_shape, y_shape) = (builder.shape(x), builder.shape(w), builder.shape(output));
    if !builder.is_float(x) || builder.constant(w).is_none() || !(3..=4).contains(&x_shape.rank()) {
        return Ok(false);
    }
    if x_shape.element_count() == 0 || y_shape.element_count() == 0 {
        return Ok(false);
    }
    let axes = op.axes(&x_shape[2..], &w_shape[2..], &y_shape[2..]).map_err(of_op(node))?;
    let Some((height, width)) = two_axes(&axes) else { return Ok(false) };
    let shape = ConvShape {
        channels_in: x_shape[1],
        channels_out: y_shape[1],
        groups: op.group,
        height,
        width,
        transposed: true,
    };
    if !shape.supported() {
        return Ok(false);
    }
    let bias = input(node, 2).map(|b| builder.plain(b)).transpose()?;
    let form = half::form(builder, w);
    push_conv(builder, x, w, form, shape, x_shape[0], bias, None, Activation::Identity, output)
}

fn push_conv(
    builder: &mut Builder<'_>,
    x: ValueId,
    w: ValueId,
    form: Form,
    shape: ConvShape,
    images: usize,
    bias: Option<Buffer>,
    residual: Option<Buffer>,
    activation: Activation,
    output: ValueId,
) -> Result<bool, NoPlan> {
    let operands = form.operands();
    let half = match form {
        Form::Half(of) if shape.groups == 1 => Some(of),
        _ => None,
    };
    let tile = match builder.numerics {
        // Transformed filters lose more by rounding than filters do.
        _ if half.is_some() => None,
        // Transformed filters are larger than filters.
        _ if builder.device.memory == MemoryUse::Lean => None,
        Numerics::Strict => None,
        Numerics::Default => winograd::choose(&shape, operands, WinogradTile::Four),
        Numerics::Relaxed => winograd::choose(&shape, operands, WinogradTile::Six),
    };
    if let Some(tile) = tile {
        builder.need_workspace(winograd::winograd_workspace_len(tile, &shape, operands));
    }
    let name = match (tile, operands) {
        (None, Operands::F32) => None,
        (None, Operands::Bf16) => Some("convolution in bf16"),
        (Some(_), Operands::F32) => Some("Winograd convolution"),
        (Some(_), Operands::Bf16) => Some("Winograd convolution in bf16"),
    };
    if let Some(name) = name {
        builder.name_kernel(name);
    }
    let filter = match tile.filter(|tile| tile.keeps_filter(operands)) {
        None if let Some(of) = half => pack_half(builder, of, w, &shape)?,
        None => pack_direct(builder, w, &shape, operands)?,
        Some(tile) => {
            let (level, len) = (builder.device.level, winograd::packed_winograd_len(tile, &shape, operands));
            // Rounding in `f64` is the same on every instruction set.
            let how = format!("winograd {tile:?} {operands:?} {}", builder.shape(w));
            pack_blocks(builder, w, how, &shape, len, |shape, w, p| {
                winograd::pack_winograd(level, tile, shape, operands, w, p);
            })?
        }
    };
    let input = match tile {
        None => builder.image_in(x, operands)?,
        Some(_) => builder.blocked(x)?,
    };
    let to = builder.new_blocked(output)?;
    let step = ConvStep { shape, tile, operands, half, images, input, filter, bias, residual, activation, output: to };
    builder.push(Lowered::Conv(step), &reads([input, filter], [bias, residual]), &[to]);
    Ok(true)
}

fn reads(always: [Buffer; 2], sometimes: [Option<Buffer>; 2]) -> Vec<Buffer> {
    always.into_iter().chain(sometimes.into_iter().flatten()).collect()
}

/// Packs the weights `w` of a direct convolution.
pub(super) fn pack_direct(
    builder: &mut Builder<'_>,
    w: ValueId,
    shape: &ConvShape,
    operands: Operands,
) -> Result<Buffer, NoPlan> {
    let (level, len) = (builder.device.level, operands.words(conv::packed_filter_len(shape)));
    let ConvShape { groups, transposed, .. } = *shape;
    let how = format!("conv {} groups {groups} transposed {transposed} {operands:?}", builder.shape(w));
    let fill = |shape: &ConvShape, weights: &[f32], packed: &mut [f32]| match operands {
        Operands::F32 => conv::pack_filter(shape, weights, packed),
        Operands::Bf16 => conv::pack_filter_bf16(level, shape, weights, packed),
    };
    if groups == 1 && !transposed {
        return pack_blocks(builder, w, how, shape, len, fill);
    }
    pack(builder, w, &how, len, |w, p| fill(shape, w, p))
}

/// Packs the weights `w` of a depthwise convolution.
pub(super) fn pack_depthwise(builder: &mut Builder<'_>, w: ValueId, shape: &DepthwiseShape) -> Result<Buffer, NoPlan> {
    let how = format!("depthwise {}", builder.shape(w));
    pack(builder, w, &how, depthwise::packed_depthwise_len(shape), |w, p| depthwise::pack_depthwise(shape, w, p))
}

/// Packs the weights `w`, of one group, by blocks of outputs: those of some are packed as the whole of a convolution with fewer outputs.
fn pack_blocks(
    builder: &mut Builder<'_>,
    w: ValueId,
    how: String,
    shape: &ConvShape,
    len: usize,
    fill: impl Fn(&ConvShape, &[f32], &mut [f32]) + Sync,
) -> Result<Buffer, NoPlan> {
    let constant = builder.constant(w).expect("checked by the caller").clone();
    let each = shape.channels_in * shape.height.kernel * shape.width.kernel;
    builder.pack_floats(constant, how, len, shape.channels_out.div_ceil(BLOCK), |weights, blocks, packed| {
        let outputs = blocks.start * BLOCK..shape.channels_out.min(blocks.end * BLOCK);
        let part = ConvShape { channels_out: outputs.len(), ..*shape };
        fill(&part, &weights[outputs.start * each..outputs.end * each], packed);
    })
}

/// Packs the weights `w`, which is a constant.
fn pack(
    builder: &mut Builder<'_>,
    w: ValueId,
    how: &str,
    len: usize,
    fill: impl Fn(&[f32], &mut [f32]) + Sync,
) -> Result<Buffer, NoPlan> {
    let constant = builder.constant(w).expect("checked by the caller").clone();
    builder.pack_floats(constant, how.to_string(), len, 1, |weights, _, packed| fill(weights, packed))
}

/// As [`pack`], of a filter that is held in 16 bits.
fn pack_half(builder: &mut Builder<'_>, of: HalfType, w: ValueId, shape: &ConvShape) -> Result<Buffer, NoPlan> {
    builder.name_kernel(match of {
        HalfType::F16 => "convolution, weights in f16",
        HalfType::Bf16 => "convolution, weights in bf16",
    });
    builder.need_workspace(conv::packed_filter_len(&of_one_block(shape, 0)));
    let how = format!("conv {} transposed {} {}", builder.shape(w), shape.transposed, Form::Half(of).name());
    let (level, len) = (builder.device.level, conv::packed_filter_len(shape));
    pack(builder, w, &how, half::len_in_floats(len), |w, packed| {
        let mut filter = vec![0.0; len];
        conv::pack_filter(shape, w, &mut filter);
        half::narrow(level, of, &filter, packed, 0);
    })
}

/// The convolution of one group that gives output channels `16 · block ..` of another.
fn of_one_block(shape: &ConvShape, block: usize) -> ConvShape {
    ConvShape { channels_out: BLOCK.min(shape.channels_out - block * BLOCK), ..*shape }
}

impl ConvStep {
    pub fn operations(&self) -> u64 {
        let of_one = match self.tile {
            None => self.shape.operations(),
            Some(tile) => winograd::winograd_operations(tile, &self.shape),
        };
        self.images as u64 * of_one
    }

    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) {
        if let Some(of) = self.half {
            return self.run_widened(of, frame, worker, level);
        }
        let ConvStep { shape, tile, operands, .. } = *self;
        let to = shape.output_len();
        let (from, units) = match tile {
            None => (operands.words(shape.input_len()), conv::conv_units(level, &shape, operands)),
            Some(tile) => (shape.input_len(), winograd::winograd_units(tile, &shape, operands)),
        };
        for (image, units) in per_image(self.images, units, worker) {
            let problem = conv::Conv {
                shape,
                operands,
                input: &frame.floats(self.input)[image * from..][..from],
                filter: frame.floats(self.filter),
                bias: self.bias.map(|b| frame.floats(b)),
                residual: self
                    .residual
                    .map_or(Residual::None, |r| Residual::Slice(&frame.floats(r)[image * to..][..to])),
                activation: self.activation,
            };
            let output = frame.output_at(self.output, image * to, to);
            match tile {
                None => conv::conv(level, &problem, units, output),
                Some(tile) => winograd::winograd(level, tile, &problem, units, output, worker.workspace),
            }
        }
    }
}

impl ConvStep {
    /// Block of outputs by block, of a filter that is held in 16 bits.
    fn run_widened(&self, of: HalfType, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) {
        let (from, to) = (self.shape.input_len(), self.shape.output_len());
        let block_units = conv::conv_units(level, &of_one_block(&self.shape, 0), Operands::F32);
        let blocks = self.shape.channels_out.div_ceil(BLOCK);
        let plane = to / blocks;
        let filter_len = conv::packed_filter_len(&of_one_block(&self.shape, 0));
        let mut held = None;
        for (image, units) in per_image(self.images, blocks * block_units, worker) {
            for block in units.start / block_units..units.end.div_ceil(block_units) {
                let filter = &mut worker.workspace[..filter_len];
                if held.replace(block) != Some(block) {
                    half::widen(level, of, frame, self.filter, block * filter_len, filter);
                }
                let first = block * block_units;
                let units = units.start.max(first) - first..units.end.min(first + block_units) - first;
                let at = image * to + block * plane;
                let problem = conv::Conv {
                    shape: of_one_block(&self.shape, block),
                    operands: Operands::F32,
                    input: &frame.floats(self.input)[image * from..][..from],
                    filter,
                    bias: self.bias.map(|b| &frame.floats(b)[block * BLOCK..]),
                    residual: self
                        .residual
                        .map_or(Residual::None, |r| Residual::Slice(&frame.floats(r)[at..][..plane])),
                    activation: self.activation,
                };
                conv::conv(level, &problem, units, frame.output_at(self.output, at, plane));
            }
        }
    }
}

impl FirstStep {
    pub fn operations(&self) -> u64 {
        self.images as u64 * self.shape.operations()
    }

    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let (from, to) = (self.shape.input_len(), self.shape.output_len());
        for (image, units) in per_image(self.images, conv_first::conv_first_units(&self.shape), worker) {
            let problem = conv_first::First {
                shape: self.shape,
                input: &frame.floats(self.input)[image * from..][..from],
                filter: frame.floats(self.filter),
                bias: self.bias.map(|b| frame.floats(b)),
                activation: self.activation,
            };
            conv_first::conv_first(level, &problem, units, frame.output_at(self.output, image * to, to));
        }
    }
}

impl DepthwiseStep {
    pub fn operations(&self) -> u64 {
        self.images as u64 * self.shape.operations()
    }

    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let (from, to) = (self.shape.input_len(), self.shape.output_len());
        for (image, units) in per_image(self.images, depthwise::depthwise_units(&self.shape), worker) {
            let problem = depthwise::Depthwise {
                shape: self.shape,
                input: &frame.floats(self.input)[image * from..][..from],
                filter: frame.floats(self.filter),
                bias: self.bias.map(|b| frame.floats(b)),
                residual: self
                    .residual
                    .map_or(Residual::None, |r| Residual::Slice(&frame.floats(r)[image * to..][..to])),
                activation: self.activation,
            };
            depthwise::depthwise(level, &problem, units, frame.output_at(self.output, image * to, to));
        }
    }
}
