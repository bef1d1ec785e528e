//! A pointwise convolution with the depthwise one that reads it, as one step.

use super::{
    Lowered, activation,
    conv::{of_op, pack_depthwise, pack_direct, two_axes},
    layout::per_image,
};
use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    plan::{Builder, NoPlan},
};
use cutover_graph::{Node, NodeId, Op, ValueId, ops};
use cutover_kernels::cpu::{
    Activation, IsaLevel,
    conv::{ConvShape, Operands},
    depthwise::DepthwiseShape,
    expanded::{self, ExpandedShape},
};

/// Floats of an input image that the second-level cache holds beside what a unit needs.
const CACHED_LEN: usize = 64 * 1024;

/// Input channels up to which reading the image once more for every block of channels costs no more than writing the expanded image and
/// reading it again.
const FEW_CHANNELS: usize = 32;

pub(in crate::cpu) struct ExpandedStep {
    shape: ExpandedShape,
    operands: Operands,
    images: usize,
    input: Buffer,
    expand_filter: Buffer,
    expand_bias: Option<Buffer>,
    expand_activation: Activation,
    filter: Buffer,
    bias: Option<Buffer>,
    activation: Activation,
    output: Buffer,
}

/// The node that alone reads what a convolution of `shape` gives, if the two are one step: its sizes, and the node.
fn depthwise_after(
    builder: &Builder<'_>,
    shape: &ConvShape,
    output: ValueId,
) -> Result<Option<(NodeId, DepthwiseShape)>, NoPlan> {
    let Some((id, node)) = builder.only_reader(output) else { return Ok(None) };
    let Op::Conv(op) = &node.op else { return Ok(None) };
    let (&[Some(x), Some(w)], rest) = (&node.inputs[..2], &node.inputs[2..]) else { return Ok(None) };
    let channels = shape.channels_out;
    let bias = rest.first().copied().flatten();
    let residual = rest.get(1).copied().flatten();
    if x != output || residual.is_some() || bias.is_some_and(|bias| builder.constant(bias).is_none()) {
        return Ok(None);
    }
    let (x_shape, w_shape) = (builder.shape(x), builder.shape(w));
    let is_depthwise = op.group == channels && channels > 1 && w_shape[0] == channels && builder.constant(w).is_some();
    if !is_depthwise || builder.shape(node.outputs[0]).element_count() == 0 {
        return Ok(None);
    }
    let axes = op.window.axes(&x_shape[2..], &w_shape[2..]).map_err(of_op(node))?;
    Ok(two_axes(&axes).map(|(height, width)| (id, DepthwiseShape { channels, height, width })))
}

/// Whether one step is estimated no slower than two: their values are the same.
fn pays(shape: &ConvShape) -> bool {
    shape.input_len() <= CACHED_LEN || shape.channels_in <= FEW_CHANNELS
}

/// Lowers a convolution without a residual together with its reader, where that is a depthwise one.
pub(super) fn lower(
    builder: &mut Builder<'_>,
    shape: &ConvShape,
    operands: Operands,
    images: usize,
    [x, w, output]: [ValueId; 3],
    expand_bias: Option<Buffer>,
    expand_activation: Activation,
) -> Result<bool, NoPlan> {
    if shape.groups != 1 || !shape.is_pointwise() || !pays(shape) {
        return Ok(false);
    }
    let Some((reader, depthwise)) = depthwise_after(builder, shape, output)? else { return Ok(false) };
    let graph = builder.graph;
    let node: &Node = graph.node(reader);
    let Op::Conv(ops::Conv { activation: fused, .. }) = &node.op else { return Ok(false) };
    let bias = node.inputs.get(2).copied().flatten().map(|bias| builder.plain(bias)).transpose()?;
    let Some(&Some(depthwise_w)) = node.inputs.get(1) else { return Ok(false) };
    let expand_filter = pack_direct(builder, w, shape, operands)?;
    let filter = pack_depthwise(builder, depthwise_w, &depthwise)?;
    let shape = ExpandedShape { channels_in: shape.channels_in, depthwise };
    builder.need_workspace(expanded::expanded_workspace_len(&shape));
    builder.name_kernel(match operands {
        Operands::F32 => "expanded depthwise convolution",
        Operands::Bf16 => "expanded depthwise convolution in bf16",
    });
    let input = builder.image_in(x, operands)?;
    let to = builder.new_blocked(node.outputs[0])?;
    let activation = activation(*fused);
    let reads: Vec<Buffer> = [input, expand_filter, filter].into_iter().chain(expand_bias).chain(bias).collect();
    let step = ExpandedStep {
        shape,
        operands,
        images,
        input,
        expand_filter,
        expand_bias,
        expand_activation,
        filter,
        bias,
        activation,
        output: to,
    };
    builder.push(Lowered::Expanded(step), &reads, &[to]);
    builder.fuse(vec![reader]);
    Ok(true)
}

impl ExpandedStep {
    pub fn operations(&self) -> u64 {
        self.images as u64 * (self.shape.pointwise().operations() + self.shape.depthwise.operations())
    }

    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) {
        let from = self.operands.words(self.shape.pointwise().input_len());
        let to = self.shape.depthwise.output_len();
        for (image, units) in per_image(self.images, expanded::expanded_units(&self.shape), worker) {
            let problem = expanded::Expanded {
                shape: self.shape,
                operands: self.operands,
                input: &frame.floats(self.input)[image * from..][..from],
                expand_filter: frame.floats(self.expand_filter),
                expand_bias: self.expand_bias.map(|b| frame.floats(b)),
                expand_activation: self.expand_activation,
                filter: frame.floats(self.filter),
                bias: self.bias.map(|b| frame.floats(b)),
                activation: self.activation,
            };
            let output = frame.output_at(self.output, image * to, to);
            expanded::expanded(level, &problem, units, output, worker.workspace);
        }
    }
}
