//! Models of rows: linear ones, support vector machines, and what prepares rows for them.

use super::{Lowered, trees::rows_of};
use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    plan::{Builder, NoPlan},
};
use bytemuck::cast_slice;
use cutover_graph::{
    Node, ValueId,
    ops::{ClassLabels, Linear, LinearOutput, Normalizer, RowNorm, Scaler, Svm, SvmKernel},
};
use cutover_kernels::cpu::{
    IsaLevel, Output,
    rows::{self, Compare, Comparison},
};
use cutover_tensor::DType;
use std::ops::Range;

/// Numbers of another type as f32.
pub(in crate::cpu) struct ToFloats {
    from: Buffer,
    from_type: DType,
    to: Buffer,
    count: usize,
}

pub(in crate::cpu) struct ScalerStep {
    op: Scaler,
    features: usize,
    count: usize,
    x: Buffer,
    x_type: DType,
    y: Buffer,
}

pub(in crate::cpu) struct NormalizerStep {
    norm: RowNorm,
    rows: usize,
    features: usize,
    x: Buffer,
    y: Buffer,
}

pub(in crate::cpu) struct LinearStep {
    op: Linear,
    rows: usize,
    x: Buffer,
    labels: Option<Buffer>,
    scores: Buffer,
}

pub(in crate::cpu) struct SvmStep {
    op: Svm,
    rows: usize,
    x: Buffer,
    labels: Option<Buffer>,
    scores: Buffer,
}

/// Writes `elements` of integers to the start of `to`; `false` for other types.
pub(super) fn to_floats(from_type: DType, from: &[u8], elements: Range<usize>, to: &mut [f32]) -> bool {
    match from_type {
        DType::I64 => {
            let from = &cast_slice::<u8, i64>(from)[elements];
            to.iter_mut().zip(from).for_each(|(to, &x)| *to = x as f32);
        }
        DType::I32 => {
            let from = &cast_slice::<u8, i32>(from)[elements];
            to.iter_mut().zip(from).for_each(|(to, &x)| *to = x as f32);
        }
        _ => return false,
    }
    true
}

fn is_number(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64 | DType::I64 | DType::I32)
}

/// `id` in f32, row-major.
fn floats(builder: &mut Builder<'_>, id: ValueId) -> Result<Buffer, NoPlan> {
    let from = builder.plain(id)?;
    let from_type = builder.fact(id).dtype;
    if from_type == DType::F32 {
        return Ok(from);
    }
    let count = builder.shape(id).element_count();
    let to = builder.new_floats(count)?;
    builder.push(Lowered::ToFloats(ToFloats { from, from_type, to, count }), &[from], &[to]);
    Ok(to)
}

/// The buffers of labels and scores; `None` where the node names others.
fn outputs(
    builder: &mut Builder<'_>,
    node: &Node,
    labels: Option<&ClassLabels>,
) -> Result<Option<(Option<Buffer>, Buffer)>, NoPlan> {
    match (&node.outputs[..], labels) {
        (&[labels, scores], Some(ClassLabels::Ints(_))) => {
            Ok(Some((Some(builder.new_plain(labels)?), builder.new_plain(scores)?)))
        }
        (&[scores], None) => Ok(Some((None, builder.new_plain(scores)?))),
        _ => Ok(None),
    }
}

pub(in crate::cpu) fn lower_scaler(builder: &mut Builder<'_>, node: &Node, op: &Scaler) -> Result<bool, NoPlan> {
    let &[Some(x)] = &node.inputs[..] else { return Ok(false) };
    let (shape, x_type) = (builder.shape(x), builder.fact(x).dtype);
    let Some(&features) = shape.last() else { return Ok(false) };
    if !is_number(x_type) {
        return Ok(false);
    }
    let (from, to) = (builder.plain(x)?, builder.new_plain(node.outputs[0])?);
    let step = ScalerStep { op: op.clone(), features, count: shape.element_count(), x: from, x_type, y: to };
    builder.push(Lowered::Scaler(step), &[from], &[to]);
    Ok(true)
}

pub(in crate::cpu) fn lower_normalizer(
    builder: &mut Builder<'_>,
    node: &Node,
    op: &Normalizer,
) -> Result<bool, NoPlan> {
    let &[Some(x)] = &node.inputs[..] else { return Ok(false) };
    let Some((rows, features)) = rows_of(&builder.shape(x)) else { return Ok(false) };
    if !is_number(builder.fact(x).dtype) {
        return Ok(false);
    }
    let (from, to) = (floats(builder, x)?, builder.new_plain(node.outputs[0])?);
    let step = NormalizerStep { norm: op.norm, rows, features, x: from, y: to };
    builder.push(Lowered::Normalizer(step), &[from], &[to]);
    Ok(true)
}

pub(in crate::cpu) fn lower_linear(builder: &mut Builder<'_>, node: &Node, op: &Linear) -> Result<bool, NoPlan> {
    let &[Some(x)] = &node.inputs[..] else { return Ok(false) };
    let Some((rows, _)) = rows_of(&builder.shape(x)) else { return Ok(false) };
    let labels = match &op.output {
        LinearOutput::Regression => None,
        LinearOutput::Classification(labels) => Some(labels),
    };
    if !is_number(builder.fact(x).dtype) || matches!(labels, Some(ClassLabels::Strings(_))) {
        return Ok(false);
    }
    let from = floats(builder, x)?;
    let Some((labels, scores)) = outputs(builder, node, labels)? else { return Ok(false) };
    builder.need_workspace(op.targets() + op.columns());
    let step = LinearStep { op: op.clone(), rows, x: from, labels, scores };
    let writes: Vec<Buffer> = labels.into_iter().chain([scores]).collect();
    builder.push(Lowered::Linear(step), &[from], &writes);
    Ok(true)
}

pub(in crate::cpu) fn lower_svm(builder: &mut Builder<'_>, node: &Node, op: &Svm) -> Result<bool, NoPlan> {
    let &[Some(x)] = &node.inputs[..] else { return Ok(false) };
    let Some((rows, _)) = rows_of(&builder.shape(x)) else { return Ok(false) };
    if !is_number(builder.fact(x).dtype) || matches!(op.class_labels(), Some(ClassLabels::Strings(_))) {
        return Ok(false);
    }
    let from = floats(builder, x)?;
    let Some((labels, scores)) = outputs(builder, node, op.class_labels())? else { return Ok(false) };
    builder.need_workspace(op.vector_count() + op.scratch_len() + op.columns());
    let step = SvmStep { op: op.clone(), rows, x: from, labels, scores };
    let writes: Vec<Buffer> = labels.into_iter().chain([scores]).collect();
    builder.push(Lowered::Svm(step), &[from], &writes);
    Ok(true)
}

/// Writes the scores of row `at`, and its label.
fn write_row(frame: &Frame<'_>, at: usize, scores: (Buffer, &[f32]), labels: (Option<Buffer>, i64)) {
    let (buffer, scores) = scores;
    frame.write(buffer, at * size_of_val(scores), cast_slice(scores));
    if let (Some(buffer), label) = labels {
        frame.write(buffer, at * size_of::<i64>(), &label.to_ne_bytes());
    }
}

fn label(labels: Option<&ClassLabels>, class: usize) -> i64 {
    match labels {
        // Of a linear model of one score without names the number is the class.
        Some(ClassLabels::Ints(labels)) => labels.get(class).copied().unwrap_or(class as i64),
        _ => class as i64,
    }
}

impl ToFloats {
    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>) {
        let elements = worker.share(self.count);
        let mut part = [0f32; 256];
        for start in elements.clone().step_by(part.len()) {
            let end = elements.end.min(start + part.len());
            let part = &mut part[..end - start];
            if !to_floats(self.from_type, frame.bytes(self.from), start..end, part) {
                let from = &cast_slice::<u8, f64>(frame.bytes(self.from))[start..end];
                part.iter_mut().zip(from).for_each(|(to, &x)| *to = x as f32);
            }
            frame.write(self.to, start * size_of::<f32>(), cast_slice(part));
        }
    }
}

impl ScalerStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>) {
        let elements = worker.share(self.count);
        let bytes = frame.bytes(self.x);
        match self.x_type {
            DType::F32 => self.scale(frame, &cast_slice::<u8, f32>(bytes)[elements.clone()], elements.start),
            DType::F64 => self.scale(frame, &cast_slice::<u8, f64>(bytes)[elements.clone()], elements.start),
            DType::I32 => self.scale(frame, &cast_slice::<u8, i32>(bytes)[elements.clone()], elements.start),
            _ => {
                // No i64 beyond 2^53 is a feature; both roundings come to the nearest f32 but for a tie.
                let from = &cast_slice::<u8, i64>(bytes)[elements.clone()];
                let mut part = [0f64; 128];
                for (i, from) in from.chunks(part.len()).enumerate() {
                    part.iter_mut().zip(from).for_each(|(to, &x)| *to = x as f64);
                    self.scale(frame, &part[..from.len()], elements.start + i * part.len());
                }
            }
        }
    }

    fn scale<T: Copy + Into<f64>>(&self, frame: &Frame<'_>, x: &[T], start: usize) {
        let (offsets, scales) = (&self.op.offset, &self.op.scale);
        let mut part = [0f32; 256];
        for (i, x) in x.chunks(part.len()).enumerate() {
            let at = start + i * part.len();
            let mut feature = if scales.len() == 1 { 0 } else { at % self.features };
            for (y, &x) in part.iter_mut().zip(x) {
                *y = ((x.into() - f64::from(offsets[feature])) * f64::from(scales[feature])) as f32;
                feature = if feature + 1 == scales.len() { 0 } else { feature + 1 };
            }
            frame.write(self.y, at * size_of::<f32>(), cast_slice(&part[..x.len()]));
        }
    }
}

impl NormalizerStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>) {
        let x = frame.floats(self.x);
        let mut part = [0f32; 256];
        for row in worker.share(self.rows) {
            let start = row * self.features;
            let x = &x[start..start + self.features];
            let norm = self.norm.of(x);
            let divisor = if norm == 0.0 { 1.0 } else { norm };
            for (i, x) in x.chunks(part.len()).enumerate() {
                part.iter_mut().zip(x).for_each(|(y, &x)| *y = (f64::from(x) / divisor) as f32);
                frame.write(self.y, (start + i * part.len()) * size_of::<f32>(), cast_slice(&part[..x.len()]));
            }
        }
    }
}

impl LinearStep {
    pub fn bytes_read(&self) -> usize {
        self.rows.saturating_mul(size_of_val(&*self.op.coefficients))
    }

    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) {
        let mine = worker.share(self.rows);
        let (raw, rest) = worker.workspace.split_at_mut(self.op.targets());
        let result = &mut rest[..self.op.columns()];
        let problem = Compare {
            comparison: Comparison::Product,
            features: self.op.features(),
            x: frame.floats(self.x),
            vectors: &self.op.coefficients,
        };
        let labels = match &self.op.output {
            LinearOutput::Regression => None,
            LinearOutput::Classification(labels) => Some(labels),
        };
        for row in mine {
            rows::compare(level, &problem, row..row + 1, Output::new(raw));
            raw.iter_mut().zip(&*self.op.intercepts).for_each(|(score, intercept)| *score += intercept);
            let class = self.op.finish(raw, result);
            write_row(frame, row, (self.scores, result), (self.labels, label(labels, class)));
        }
    }
}

impl SvmStep {
    pub fn bytes_read(&self) -> usize {
        self.rows.saturating_mul(size_of_val(&*self.op.vectors))
    }

    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) {
        let mine = worker.share(self.rows);
        let (kernels, rest) = worker.workspace.split_at_mut(self.op.vector_count());
        let (scratch, rest) = rest.split_at_mut(self.op.scratch_len());
        let result = &mut rest[..self.op.columns()];
        let comparison = match self.op.kernel {
            SvmKernel::Linear => Comparison::Product,
            SvmKernel::Polynomial { gamma, coef0, degree } => Comparison::Polynomial { gamma, coef0, degree },
            SvmKernel::Radial { gamma } => Comparison::Radial { gamma },
            SvmKernel::Sigmoid { gamma, coef0 } => Comparison::Sigmoid { gamma, coef0 },
        };
        let (features, x, vectors) = (self.op.features, frame.floats(self.x), &self.op.vectors[..]);
        let problem = Compare { comparison, features, x, vectors };
        for row in mine {
            rows::compare(level, &problem, row..row + 1, Output::new(kernels));
            let class = self.op.finish(kernels, scratch, result);
            write_row(frame, row, (self.scores, result), (self.labels, label(self.op.class_labels(), class)));
        }
    }
}
