//! Convolutions as products with unfolded images: those over three axes, and those whose weights only a run knows.

use super::{
    activation,
    conv::{of_op, three_axes},
    layout::per_image,
};
use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    lower::Lowered,
    plan::{Builder, NoPlan},
};
use cutover_graph::{Node, ops::Conv};
use cutover_kernels::cpu::{
    Activation, IsaLevel, Residual,
    conv::Axis,
    gemm::{self, Bias, Matrix},
    unfold::{self, Unfold},
};

/// Floats of unfolded columns that a thread holds at a time, as far as one panel is not more.
const COLUMNS_LEN: usize = 128 << 10;

/// Panels of columns at most that are one unit of work.
const UNIT_PANELS: usize = 8;

/// `[images, groups · channels, …]` with weights `[groups · m, channels, …]`: of every image and group the product of the weights, a row
/// per output channel, with the columns that the windows see.
pub(in crate::cpu) struct UnfoldedStep {
    images: usize,
    groups: usize,
    /// Of one group.
    channels: usize,
    m: usize,
    axes: [Axis; 3],
    input: Buffer,
    weights: Buffer,
    bias: Option<Buffer>,
    residual: Option<Buffer>,
    activation: Activation,
    output: Buffer,
}

pub(in crate::cpu) fn lower(builder: &mut Builder<'_>, node: &Node, op: &Conv) -> Result<bool, NoPlan> {
    let input = |index: usize| node.inputs.get(index).copied().flatten();
    let (Some(x), Some(w), output) = (input(0), input(1), node.outputs[0]) else { return Ok(false) };
    let (x_shape, w_shape, y_shape) = (builder.shape(x), builder.shape(w), builder.shape(output));
    let is_of_floats = builder.is_float(x) && builder.is_float(w);
    let is_residual = |id| builder.shape(id) == y_shape;
    if !is_of_floats
        || !(3..=5).contains(&x_shape.rank())
        || [&x_shape, &w_shape, &y_shape].iter().any(|shape| shape.element_count() == 0)
        || !input(3).is_none_or(is_residual)
    {
        return Ok(false);
    }
    let spatial = op.window.axes(&x_shape[2..], &w_shape[2..]).map_err(of_op(node))?;
    let axes = three_axes(&spatial);
    let (groups, channels, m) = (op.group, w_shape[1], w_shape[0] / op.group);
    let bias = input(2).map(|id| builder.plain(id)).transpose()?;
    let residual = input(3).map(|id| builder.plain(id)).transpose()?;
    let (input, weights) = (builder.plain(x)?, builder.plain(w)?);
    let to = builder.new_plain(output)?;
    let step = UnfoldedStep {
        images: x_shape[0],
        groups,
        channels,
        m,
        axes,
        input,
        weights,
        bias,
        residual,
        activation: activation(op.activation),
        output: to,
    };
    let (rows, _) = step.matrix();
    let width = gemm::panel_width(builder.device.level);
    let columns = rows.saturating_mul(width * step.unit_panels(width));
    builder.need_workspace(columns.saturating_add(gemm::gemm_workspace_len(rows)));
    let reads: Vec<Buffer> = [Some(input), Some(weights), bias, residual].into_iter().flatten().collect();
    builder.push(Lowered::Unfolded(step), &reads, &[to]);
    Ok(true)
}

impl UnfoldedStep {
    /// Rows and columns of an unfolded image.
    fn matrix(&self) -> (usize, usize) {
        let problem = Unfold { channels: self.channels, axes: self.axes, input: &[] };
        (problem.rows(), problem.columns())
    }

    fn unit_panels(&self, panel_width: usize) -> usize {
        let (rows, columns) = self.matrix();
        (COLUMNS_LEN / (rows * panel_width)).clamp(1, UNIT_PANELS.min(columns.div_ceil(panel_width)))
    }

    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) {
        let UnfoldedStep { images, groups, channels, m, axes, .. } = *self;
        let ((k, columns), width) = (self.matrix(), gemm::panel_width(level));
        let (panels, unit_panels) = (gemm::panel_count(level, columns), self.unit_panels(width));
        let pixels: usize = axes.iter().map(|axis| axis.input).product();
        let (input, weights) = (frame.floats(self.input), frame.floats(self.weights));
        let mine = per_image(images * groups, panels.div_ceil(unit_panels), worker);
        let (packed, workspace) = worker.workspace.split_at_mut(k * width * unit_panels);
        for (index, units) in mine {
            let (first_row, from) = (index % groups * m, index * channels * pixels);
            let problem = Unfold { channels, axes, input: &input[from..][..channels * pixels] };
            for first in units.map(|unit| unit * unit_panels) {
                let range = first..panels.min(first + unit_panels);
                let (start, n) = (first * width, columns.min(range.end * width) - first * width);
                unfold::unfold(level, &problem, range, packed);
                // The first of these columns in the first row of this group's results, and what lies between that and their last.
                let (at, len) = (index * m * columns + start, (m - 1) * columns + n);
                let product = gemm::Gemm {
                    m,
                    n,
                    k,
                    a: Matrix::row_major(&weights[first_row * k..][..m * k], k),
                    b: packed,
                    alpha: 1.0,
                    bias: self.bias.map_or(Bias::None, |b| Bias::Row(&frame.floats(b)[first_row..][..m])),
                    residual: self.residual.map_or(Residual::None, |r| Residual::Slice(&frame.floats(r)[at..][..len])),
                    activation: self.activation,
                    output_stride: columns,
                };
                let output = frame.output_at(self.output, at, len);
                gemm::gemm(level, &product, 0..m, 0..gemm::panel_count(level, n), output, workspace);
            }
        }
    }
}
