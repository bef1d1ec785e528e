//! Elements and slices that indices in the data choose: gathered, or scattered into a copy.

use super::{movement, typed::element_type};
use crate::{
    RunError,
    cpu::{
        frame::{Buffer, Frame, Worker},
        lower::Lowered,
        plan::{Builder, NoPlan},
    },
};
use cutover_graph::{
    Node, Op, OpError, ValueId,
    ops::{ScatterPlace, ScatterReduction, normalize_axis},
};
use cutover_kernels::cpu::{
    IsaLevel, Output,
    typed::{self, ElementType},
};
use cutover_tensor::DType;
use std::ops::Range;

/// Where in a tensor of `shape` the part of each index, or tuple of indices, lies.
struct Target {
    shape: Vec<usize>,
    strides: Vec<usize>,
    kind: Kind,
    indices: Buffer,
    index_type: DType,
}

enum Kind {
    /// Index `[i₀, …]` stands for itself with the index instead of `i` at `axis`; `extents` are those of the indices.
    Elements { axis: usize, extents: Vec<usize> },
    /// Tuples of `tuple` indices along the axes from `first`; `per_batch` of them for each element of the axes before.
    Slices { first: usize, tuple: usize, per_batch: usize },
}

/// Parts of `width` elements, moved one way or the other.
pub(in crate::cpu) struct IndexedStep {
    target: Target,
    count: usize,
    width: usize,
    ty: ElementType,
    /// What the parts come from, or the updates.
    input: Buffer,
    output: Buffer,
    /// `None` where parts are gathered.
    scatter: Option<ScatterReduction>,
    node: String,
    op: String,
}

fn input(node: &Node, index: usize) -> Option<ValueId> {
    node.inputs.get(index).copied().flatten()
}

pub(in crate::cpu) fn lower(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    // What constants choose needs no look at indices in the run.
    if super::select::lower_runs(builder, node)? {
        return Ok(true);
    }
    let (Some(x), Some(indices), output) = (input(node, 0), input(node, 1), node.outputs[0]) else { return Ok(false) };
    let (shape, index_shape) = (builder.shape(x), builder.shape(indices));
    let index_type = builder.fact(indices).dtype;
    let Some(ty) = element_type(builder.fact(x).dtype) else { return Ok(false) };
    if !matches!(index_type, DType::I64 | DType::I32) || shape.element_count() == 0 {
        return Ok(false);
    }
    let elements = |axis: i64| -> Option<(Kind, usize, usize)> {
        let axis = normalize_axis(axis, shape.rank()).ok()?;
        let within = |a: usize| a == axis || index_shape[a] <= shape[a];
        let fits = index_shape.rank() == shape.rank() && (0..shape.rank()).all(within);
        fits.then(|| (Kind::Elements { axis, extents: index_shape.to_vec() }, index_shape.element_count(), 1))
    };
    let slices = |first: usize| -> Option<(Kind, usize, usize)> {
        let tuple = *index_shape.last()?;
        let leading = &index_shape[..index_shape.rank() - 1];
        let width = shape.get(first + tuple..)?.iter().product();
        if first > leading.len() || leading[..first] != shape[..first] {
            return None;
        }
        let per_batch = leading[first..].iter().product();
        Some((Kind::Slices { first, tuple, per_batch }, leading.iter().product(), width))
    };
    let (kind, scatter) = match &node.op {
        Op::GatherElements(op) => (elements(op.axis), None),
        Op::GatherNd(op) => (slices(op.batch_dims), None),
        Op::Scatter(op) => match op.place {
            ScatterPlace::Elements { axis } => (elements(axis), Some(op.reduction)),
            ScatterPlace::Slices => (slices(0), Some(op.reduction)),
        },
        _ => return Ok(false),
    };
    let Some((kind, count, width)) = kind else { return Ok(false) };
    let size = ty.size();
    let moved = match scatter {
        None => output,
        Some(_) => match input(node, 2) {
            Some(updates) => updates,
            None => return Ok(false),
        },
    };
    // Anything else is for the reference to refuse.
    if builder.shape(moved).element_count() != count * width || builder.fact(moved).dtype != builder.fact(x).dtype {
        return Ok(false);
    }
    let from = builder.plain(x)?;
    let index_buffer = builder.plain(indices)?;
    let strides = shape.strides().to_vec();
    let target = Target { shape: shape.to_vec(), strides, kind, indices: index_buffer, index_type };
    let input = if scatter.is_some() { builder.plain(moved)? } else { from };
    let to = builder.new_plain(output)?;
    if scatter.is_some() {
        let bytes = builder.bytes(output);
        builder.push(Lowered::Copy(movement::Copy::whole(from, to, bytes)), &[from], &[to]);
        // What is there, while it is combined with an update.
        builder.need_workspace((width * size).div_ceil(size_of::<f32>()));
    }
    let (name, op) = (node.name.clone(), node.op.name());
    let step = IndexedStep { target, count, width, ty, input, output: to, scatter, node: name, op };
    builder.push(Lowered::Indexed(step), &[input, index_buffer], &[to]);
    Ok(true)
}

/// Writes a part; of one element, mostly, for which a call would take longer than the move.
fn put(frame: &Frame<'_>, to: Buffer, at: usize, part: &[u8]) {
    match *part {
        [a, b, c, d] => frame.write(to, at, &[a, b, c, d]),
        [a, b, c, d, e, f, g, h] => frame.write(to, at, &[a, b, c, d, e, f, g, h]),
        _ => frame.write(to, at, part),
    }
}

impl Target {
    fn given(&self, frame: &Frame<'_>, at: usize) -> i64 {
        match self.index_type {
            DType::I64 => frame.words::<u64>(self.indices)[at] as i64,
            _ => i64::from(frame.words::<u32>(self.indices)[at] as i32),
        }
    }

    fn index(&self, given: i64, axis: usize) -> Result<usize, OpError> {
        let extent = self.shape[axis];
        let wrapped = if given < 0 { given.saturating_add(extent as i64) } else { given };
        let index = usize::try_from(wrapped).ok().filter(|&i| i < extent);
        index.ok_or_else(|| OpError::input(format!("index {given} of an axis of {extent}")))
    }

    /// Shows `visit` every part of `units`, in order, and its first element.
    fn each(&self, frame: &Frame<'_>, units: Range<usize>, mut visit: impl FnMut(usize, usize)) -> Result<(), OpError> {
        match &self.kind {
            Kind::Elements { axis, extents } => {
                let last = extents.len() - 1;
                let mut unit = units.start;
                while unit < units.end {
                    // A row of indices at a time: where it lies is found once.
                    let (mut rest, first) = (unit / extents[last], unit % extents[last]);
                    let mut start = 0;
                    for a in (0..last).rev() {
                        if a != *axis {
                            start += rest % extents[a] * self.strides[a];
                        }
                        rest /= extents[a];
                    }
                    let count = (extents[last] - first).min(units.end - unit);
                    for at in 0..count {
                        let index = self.index(self.given(frame, unit + at), *axis)? * self.strides[*axis];
                        let along = if *axis == last { 0 } else { first + at };
                        visit(unit + at, start + index + along);
                    }
                    unit += count;
                }
            }
            &Kind::Slices { first, tuple, per_batch } => {
                let batch: usize = self.shape[first..].iter().product();
                for unit in units {
                    let mut start = unit / per_batch.max(1) * batch;
                    for i in 0..tuple {
                        start += self.index(self.given(frame, unit * tuple + i), first + i)? * self.strides[first + i];
                    }
                    visit(unit, start);
                }
            }
        }
        Ok(())
    }
}

impl IndexedStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) -> Result<(), RunError> {
        let failed = |source: OpError| RunError::Op { node: self.node.clone(), op: self.op.clone(), source };
        let bytes = self.width * self.ty.size();
        let Some(reduction) = self.scatter else {
            let from = frame.bytes(self.input);
            let gather = |unit: usize, start: usize| {
                put(frame, self.output, unit * bytes, &from[start * self.ty.size()..][..bytes]);
            };
            return self.target.each(frame, worker.share(self.count), gather).map_err(failed);
        };
        // Two updates may be for one element: the last one stands, and sums have an order.
        if worker.part != 0 {
            return Ok(());
        }
        let updates = frame.bytes(self.input);
        let scatter = |unit: usize, start: usize| {
            let (start, update) = (start * self.ty.size(), &updates[unit * bytes..][..bytes]);
            match reduction {
                ScatterReduction::Replace => put(frame, self.output, start, update),
                reduction => self.combine(frame, worker, level, reduction, start, update),
            }
        };
        self.target.each(frame, 0..self.count, scatter).map_err(failed)
    }

    fn combine(
        &self,
        frame: &Frame<'_>,
        worker: &mut Worker<'_>,
        level: IsaLevel,
        reduction: ScatterReduction,
        start: usize,
        update: &[u8],
    ) {
        use ScatterReduction as S;
        let room = worker.workspace.as_mut_ptr().cast::<u8>();
        assert!(update.len() <= size_of_val(worker.workspace));
        // SAFETY: the workspace is as long as just checked, and nothing else uses it meanwhile.
        let there = unsafe {
            std::ptr::copy_nonoverlapping(frame.bytes(self.output)[start..].as_ptr(), room, update.len());
            std::slice::from_raw_parts(room, update.len())
        };
        let operand = |bytes| typed::Operand { ty: self.ty, bytes, strides: &[1] };
        let operands = [operand(there), operand(update)];
        let whole: Output<'_, u8> = frame.words_output(self.output);
        let (shape, range, to) = ([self.width], 0..self.width, whole.skip(start));
        let float = matches!(self.ty, ElementType::F16 | ElementType::Bf16 | ElementType::F32 | ElementType::F64);
        let result: Result<(), std::convert::Infallible> = if float {
            typed::map(level, &shape, operands, range, self.ty, to, |[a, b]: [f64; 2]| {
                Ok(match reduction {
                    S::Replace => b,
                    S::Add => a + b,
                    S::Multiply => a * b,
                    _ if a.is_nan() || b.is_nan() => f64::NAN,
                    S::Maximum => a.max(b),
                    S::Minimum => a.min(b),
                })
            })
        } else {
            // Truths are combined as 0 and 1: their sum is true where either is.
            typed::map(level, &shape, operands, range, self.ty, to, |[a, b]: [i128; 2]| {
                Ok(match reduction {
                    S::Replace => b,
                    S::Add => a.wrapping_add(b),
                    S::Multiply => a.wrapping_mul(b),
                    S::Maximum => a.max(b),
                    S::Minimum => a.min(b),
                })
            })
        };
        let Ok(()) = result;
    }
}
