//! Matrix products: MatMul and Gemm, weights packed once, everything else packed per run.

use super::{
    activation, attention, elementwise,
    half::{self, Form},
};
use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    lower::Lowered,
    plan::{Builder, NoPlan, Strided},
};
use cutover_graph::{Node, ValueId, ops};
use cutover_kernels::cpu::{
    Activation, IsaLevel, Output, Residual, bf16,
    gemm::{self, Bias, Matrix},
    half::HalfType,
};
use std::ops::Range;

/// Where a batch of matrices lies: matrix `i` starts at `offset + starts[i]`.
pub(super) struct Operand {
    pub buffer: Buffer,
    pub offset: usize,
    pub starts: Vec<usize>,
    pub row_stride: usize,
    pub column_stride: usize,
}

/// Packs every B of a batch.
pub(in crate::cpu) struct PackB {
    b: Operand,
    k: usize,
    n: usize,
    packed: Buffer,
}

/// A product for every matrix of a batch.
pub(in crate::cpu) struct Product {
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: Operand,
    /// Packed; matrix `i` of the batch uses the one at `b_index[i]`.
    b: Weights,
    b_index: Vec<usize>,
    bias: Bound,
    residual: Option<Buffer>,
    activation: Activation,
    output: Buffer,
}

/// Packed B.
#[derive(Clone, Copy)]
pub(super) struct Weights {
    buffer: Buffer,
    form: Form,
}

/// A bias of one value per column, or per row.
enum Bound {
    None,
    Column(Buffer),
    Row(Buffer),
}

impl Operand {
    pub fn matrix<'a>(&self, frame: &'a Frame<'_>, index: usize) -> Matrix<'a> {
        let data = &frame.floats(self.buffer)[self.offset + self.starts[index]..];
        Matrix { data, row_stride: self.row_stride, column_stride: self.column_stride }
    }
}

/// The strided view that `id` is, and its shape.
pub(super) fn view(builder: &mut Builder<'_>, id: ValueId) -> Result<(Strided, Vec<usize>), NoPlan> {
    let shape = builder.shape(id).to_vec();
    let held = builder.held(id).clone();
    match held.strided.filter(|_| held.plain.is_none()) {
        Some(strided) => Ok((strided, shape)),
        None => {
            let strides = builder.shape(id).strides().to_vec();
            Ok((Strided { buffer: builder.plain(id)?, offset: 0, strides }, shape))
        }
    }
}

pub(in crate::cpu) fn lower_matmul(builder: &mut Builder<'_>, node: &Node, op: &ops::MatMul) -> Result<bool, NoPlan> {
    let (Some(&Some(a)), Some(&Some(b))) = (node.inputs.first(), node.inputs.get(1)) else { return Ok(false) };
    let (addend, output) = (node.inputs.get(2).copied().flatten(), node.outputs[0]);
    let (a_shape, b_shape, y_shape) = (builder.shape(a), builder.shape(b), builder.shape(output));
    if !builder.is_float(a)
        || !builder.is_float(b)
        || a_shape.rank() == 0
        || b_shape.rank() == 0
        || y_shape.element_count() == 0
    {
        return Ok(false);
    }
    if let Some(begun) = builder.take_attention() {
        return attention::end(builder, node, begun);
    }
    if attention::begin(builder, node, op) {
        return Ok(true);
    }
    let k = a_shape[a_shape.rank() - 1];
    let fused = activation(op.activation);
    // Weights: one matrix for all rows.
    if b_shape.rank() == 2 && builder.constant(b).is_some() {
        let (m, n) = (y_shape.element_count() / b_shape[1], b_shape[1]);
        let packed = pack_constant(builder, b, k, n, false)?;
        let a = builder.plain(a)?;
        let a = Operand { buffer: a, offset: 0, starts: vec![0], row_stride: k, column_stride: 1 };
        return finish(builder, Dims { m, n, k, alpha: 1.0 }, a, packed, vec![0], addend, fused, output, &y_shape);
    }
    let (mut left, mut left_shape) = view(builder, a)?;
    let (mut right, mut right_shape) = view(builder, b)?;
    if left_shape.len() == 1 {
        left_shape.insert(0, 1);
        left.strides.insert(0, 0);
    }
    if right_shape.len() == 1 {
        right_shape.push(1);
        right.strides.push(0);
    }
    let (m, n) = (left_shape[left_shape.len() - 2], right_shape[right_shape.len() - 1]);
    let batch = batch_shape(&left_shape[..left_shape.len() - 2], &right_shape[..right_shape.len() - 2]);
    let starts = |view: &Strided, shape: &[usize]| starts(&batch, &shape[..shape.len() - 2], &view.strides);
    let (a_starts, b_starts) = (starts(&left, &left_shape), starts(&right, &right_shape));
    let rank = |view: &Strided| view.strides.len();
    let operand = |view: Strided, starts: Vec<usize>| {
        let (row_stride, column_stride) = (view.strides[rank(&view) - 2], view.strides[rank(&view) - 1]);
        Operand { buffer: view.buffer, offset: view.offset, starts, row_stride, column_stride }
    };
    // A matrix that several of the batch share is packed once.
    let mut distinct = b_starts.clone();
    distinct.sort_unstable();
    distinct.dedup();
    let b_index = b_starts.iter().map(|s| distinct.binary_search(s).expect("it is among them")).collect();
    let packed = match builder.constant(b) {
        Some(_) if distinct.len() == 1 && right_shape.len() == 2 => pack_constant(builder, b, k, n, false)?,
        _ => Weights { buffer: pack(builder, operand(right, distinct), k, n)?, form: Form::F32 },
    };
    let a = operand(left, a_starts);
    finish(builder, Dims { m, n, k, alpha: 1.0 }, a, packed, b_index, addend, fused, output, &y_shape)
}

pub(in crate::cpu) fn lower_gemm(builder: &mut Builder<'_>, node: &Node, op: &ops::Gemm) -> Result<bool, NoPlan> {
    let (Some(&Some(a)), Some(&Some(b))) = (node.inputs.first(), node.inputs.get(1)) else { return Ok(false) };
    let (addend, output) = (node.inputs.get(2).copied().flatten(), node.outputs[0]);
    let y_shape = builder.shape(output);
    if !builder.is_float(a)
        || !builder.is_float(b)
        || y_shape.element_count() == 0
        || (addend.is_some() && op.beta != 1.0)
    {
        return Ok(false);
    }
    let (left, left_shape) = view(builder, a)?;
    let (m, n) = (y_shape[0], y_shape[1]);
    let k = left_shape[usize::from(!op.transpose_a)];
    let (rows, columns) = (left.strides[0], left.strides[1]);
    let (row_stride, column_stride) = if op.transpose_a { (columns, rows) } else { (rows, columns) };
    let a = Operand { buffer: left.buffer, offset: left.offset, starts: vec![0], row_stride, column_stride };
    let packed = match builder.constant(b) {
        Some(_) => pack_constant(builder, b, k, n, op.transpose_b)?,
        None => {
            let (right, _) = view(builder, b)?;
            let (rows, columns) = (right.strides[0], right.strides[1]);
            let (row_stride, column_stride) = if op.transpose_b { (columns, rows) } else { (rows, columns) };
            let b = Operand { buffer: right.buffer, offset: right.offset, starts: vec![0], row_stride, column_stride };
            Weights { buffer: pack(builder, b, k, n)?, form: Form::F32 }
        }
    };
    let fused = activation(op.activation);
    finish(builder, Dims { m, n, k, alpha: op.alpha }, a, packed, vec![0], addend, fused, output, &y_shape)
}

struct Dims {
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
}

/// Adds the product, with the addend fused where the kernel can.
fn finish(
    builder: &mut Builder<'_>,
    dims: Dims,
    a: Operand,
    b: Weights,
    b_index: Vec<usize>,
    addend: Option<ValueId>,
    fused: Activation,
    output: ValueId,
    y_shape: &[usize],
) -> Result<bool, NoPlan> {
    let Dims { m, n, k, alpha } = dims;
    let (mut bias, mut residual, mut later) = (Bound::None, None, None);
    if let Some(id) = addend {
        let shape = builder.shape(id);
        let last = shape.last().copied().unwrap_or(1);
        let single = a.starts.len() == 1;
        if shape.element_count() == n && last == n {
            bias = Bound::Column(builder.plain(id)?);
        } else if single && n > 1 && last == 1 && shape.element_count() == m && shape.rank() == 2 {
            bias = Bound::Row(builder.plain(id)?);
        } else if shape[..] == *y_shape {
            residual = Some(builder.plain(id)?);
        } else {
            later = Some(id);
        }
    }
    let to = builder.new_plain(output)?;
    builder.need_workspace(match b.form {
        Form::Pairs => bf16::gemm_bf16_workspace_len(k),
        _ => gemm::gemm_workspace_len(k) + widened_panels(builder.device.level, b, m, n, k).1,
    });
    let activation = if later.is_some() { Activation::Identity } else { fused };
    let extra = match &bias {
        Bound::None => None,
        Bound::Column(b) | Bound::Row(b) => Some(*b),
    };
    let reads: Vec<Buffer> = [Some(a.buffer), Some(b.buffer), extra, residual].into_iter().flatten().collect();
    let step = Product { m, n, k, alpha, a, b, b_index, bias, residual, activation, output: to };
    builder.push(Lowered::Product(step), &reads, &[to]);
    if let Some(addend) = later {
        elementwise::add_broadcast(builder, to, y_shape, addend, fused)?;
    }
    Ok(true)
}

/// The constant matrix `id` as packed B of `k × n`; `transposed` where it is held as `n × k`.
pub(super) fn pack_constant(
    builder: &mut Builder<'_>,
    id: ValueId,
    k: usize,
    n: usize,
    transposed: bool,
) -> Result<Weights, NoPlan> {
    let constant = builder.constant(id).expect("checked by the caller").clone();
    let (level, form) = (builder.device.level, half::form(builder, id));
    let how = format!("b {k} {n} {transposed} {} {}", form.name(), level.name());
    let len = gemm::packed_b_len(level, k, n);
    if form == Form::F32 {
        let (panels, width) = (gemm::panel_count(level, n), gemm::panel_width(level));
        let buffer = builder.pack_floats(constant, how, len, panels, |data, panels, packed| {
            let columns = panels.start * width..n.min(panels.end * width);
            let (first, stride) = if transposed { (columns.start * k, k) } else { (columns.start, n) };
            let (row_stride, column_stride) = if transposed { (1, stride) } else { (stride, 1) };
            // What begins past the end is read by nobody: there is nothing then.
            let matrix = Matrix { data: data.get(first..).unwrap_or_default(), row_stride, column_stride };
            gemm::pack_b(level, matrix, k, columns.len(), 0..panels.len(), Output::new(packed));
        })?;
        return Ok(Weights { buffer, form });
    }
    let Form::Half(of) = form else {
        builder.name_kernel("matrix product in bf16");
        let (how, len) = (format!("pairs {how}"), bf16::packed_b_bf16_len(level, k, n));
        let buffer = builder.pack_floats(constant, how, len, 1, |data, _, packed| {
            let matrix = if transposed { Matrix::transposed(data, k) } else { Matrix::row_major(data, n) };
            bf16::pack_b_bf16(level, matrix, k, n, packed);
        })?;
        return Ok(Weights { buffer, form });
    };
    builder.name_kernel(match of {
        HalfType::F16 => "matrix product, weights in f16",
        HalfType::Bf16 => "matrix product, weights in bf16",
    });
    let buffer = builder.pack_floats(constant, how, half::len_in_floats(len), 1, |data, _, packed| {
        let (width, row) = (gemm::panel_width(level), if transposed { k } else { 1 });
        let mut panel = vec![0.0; width * k];
        for first in (0..n).step_by(width) {
            let matrix = match transposed {
                true => Matrix::transposed(&data[first * row..], k),
                false => Matrix::row_major(&data[first * row..], n),
            };
            gemm::pack_b(level, matrix, k, width.min(n - first), 0..1, Output::new(&mut panel));
            half::narrow(level, of, &panel, packed, first * k);
        }
    })?;
    Ok(Weights { buffer, form })
}

/// How many panels of halves are widened for one call, and what room they take: columns that are worth packing A for, or what few rows
/// find in a cache.
fn widened_panels(level: IsaLevel, b: Weights, m: usize, n: usize, k: usize) -> (usize, usize) {
    const FEW_ROWS: usize = 3;
    const MOST_FLOATS: usize = 1 << 18;
    let panel = gemm::panel_width(level) * k;
    let columns = if m <= FEW_ROWS { 64 } else { 128 };
    let most = columns / gemm::panel_width(level);
    let panels = (MOST_FLOATS / panel.max(1)).clamp(1, most).min(gemm::panel_count(level, n));
    (panels, if matches!(b.form, Form::Half(_)) { panels * panel } else { 0 })
}

/// Packs a matrix held as `k × n`, or as `n × k` where `transposed`.
pub(super) fn pack_matrix(level: IsaLevel, data: &[f32], k: usize, n: usize, transposed: bool, packed: &mut [f32]) {
    let matrix = if transposed { Matrix::transposed(data, k) } else { Matrix::row_major(data, n) };
    gemm::pack_b(level, matrix, k, n, 0..gemm::panel_count(level, n), Output::new(packed));
}

/// Packs a batch of matrices at run time.
fn pack(builder: &mut Builder<'_>, b: Operand, k: usize, n: usize) -> Result<Buffer, NoPlan> {
    let len = gemm::packed_b_len(builder.device.level, k, n);
    let packed = builder.new_floats(len.saturating_mul(b.starts.len()))?;
    let from = b.buffer;
    builder.push(Lowered::PackB(PackB { b, k, n, packed }), &[from], &[packed]);
    Ok(packed)
}

/// The broadcast of two batches' shapes, which inference has found to agree.
pub(super) fn batch_shape(a: &[usize], b: &[usize]) -> Vec<usize> {
    let rank = a.len().max(b.len());
    let at = |shape: &[usize], axis: usize| (axis + shape.len()).checked_sub(rank).map_or(1, |i| shape[i]);
    (0..rank).map(|axis| if at(a, axis) == 1 { at(b, axis) } else { at(a, axis) }).collect()
}

/// Where each matrix of `batch` starts in an operand whose own batch is `shape`.
pub(super) fn starts(batch: &[usize], shape: &[usize], strides: &[usize]) -> Vec<usize> {
    let lead = batch.len() - shape.len();
    let stride = |axis: usize| if axis < lead || shape[axis - lead] == 1 { 0 } else { strides[axis - lead] };
    let strides: Vec<usize> = (0..batch.len()).map(stride).collect();
    ops::indices(batch).map(|index| index.iter().zip(&strides).map(|(i, s)| i * s).sum()).collect()
}

impl PackB {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let (k, n) = (self.k, self.n);
        let (panels, len) = (gemm::panel_count(level, n), gemm::packed_b_len(level, k, n));
        for (index, panels) in super::layout::per_image(self.b.starts.len(), panels, worker) {
            let packed = frame.output_at(self.packed, index * len, len);
            gemm::pack_b(level, self.b.matrix(frame, index), k, n, panels, packed);
        }
    }
}

/// Rows of a part of a product at least: enough to read B's panels seldom.
const PART_ROWS: usize = 24;

impl Product {
    pub fn operations(&self) -> u64 {
        2 * (self.a.starts.len() * self.m * self.n * self.k) as u64
    }

    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) {
        let Product { m, n, k, .. } = *self;
        let panels = gemm::panel_count(level, n);
        let b_len = gemm::packed_b_len(level, k, n);
        let matrices = self.a.starts.len();
        // Rows are shared where there are many, since every part packs its own; panels of columns otherwise.
        let by_rows = matrices * m >= PART_ROWS * worker.parts || m > n;
        let units = if by_rows { m } else { panels };
        let mine = worker.share(matrices * units);
        let mut one = |index: usize, rows: Range<usize>, panels: Range<usize>| {
            if let Form::Half(of) = self.b.form {
                return self.run_widened(of, frame, worker.workspace, level, index, rows, panels);
            }
            let problem = gemm::Gemm {
                m,
                n,
                k,
                a: self.a.matrix(frame, index),
                b: &frame.floats(self.b.buffer)[self.b_index[index] * b_len..],
                alpha: self.alpha,
                bias: match self.bias {
                    Bound::None => Bias::None,
                    Bound::Column(b) => Bias::Column(frame.floats(b)),
                    Bound::Row(b) => Bias::Row(frame.floats(b)),
                },
                residual: self
                    .residual
                    .map_or(Residual::None, |r| Residual::Slice(&frame.floats(r)[index * m * n..][..m * n])),
                activation: self.activation,
                output_stride: n,
            };
            let output = frame.output_at(self.output, index * m * n, m * n);
            match self.b.form {
                Form::Pairs => bf16::gemm_bf16(level, &problem, rows, panels, output, worker.workspace),
                _ => gemm::gemm(level, &problem, rows, panels, output, worker.workspace),
            }
        };
        if k == 0 {
            // The kernel's A is empty then; the sum of nothing is what bias and residual leave.
            if worker.part == 0 {
                (0..matrices).for_each(|index| one(index, 0..m, 0..panels));
            }
            return;
        }
        let mut at = mine.start;
        while at < mine.end {
            let (index, first) = (at / units, at % units);
            let last = units.min(first + (mine.end - at));
            match by_rows {
                true => one(index, first..last, 0..panels),
                false => one(index, 0..m, first..last),
            }
            at += last - first;
        }
    }

    /// Rows and panels of product `index`, with weights that are held in 16 bits.
    fn run_widened(
        &self,
        of: HalfType,
        frame: &Frame<'_>,
        workspace: &mut [f32],
        level: IsaLevel,
        index: usize,
        rows: Range<usize>,
        panels: Range<usize>,
    ) {
        let Product { m, n, k, .. } = *self;
        let width = gemm::panel_width(level);
        let (together, len) = widened_panels(level, self.b, m, n, k);
        let (widened, workspace) = workspace.split_at_mut(len);
        for first in panels.clone().step_by(together) {
            let (start, end) = (first * width, n.min(panels.end.min(first + together) * width));
            let count = gemm::panel_count(level, end - start);
            let b = &mut widened[..count * width * k];
            half::widen(level, of, frame, self.b.buffer, start * k, b);
            // The columns from `start` on, as a product of their own.
            let (at, len) = (index * m * n + start, m * n - start);
            let problem = gemm::Gemm {
                m,
                n: end - start,
                k,
                a: self.a.matrix(frame, index),
                b,
                alpha: self.alpha,
                bias: match self.bias {
                    Bound::None => Bias::None,
                    Bound::Column(b) => Bias::Column(&frame.floats(b)[start..]),
                    Bound::Row(b) => Bias::Row(frame.floats(b)),
                },
                residual: self.residual.map_or(Residual::None, |r| Residual::Slice(&frame.floats(r)[at..][..len])),
                activation: self.activation,
                output_stride: n,
            };
            gemm::gemm(level, &problem, rows.clone(), 0..count, frame.output_at(self.output, at, len), workspace);
        }
    }
}
