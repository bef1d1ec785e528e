//! What moves elements, or only looks at them otherwise.

use crate::{
    RunError,
    cpu::{
        frame::{Buffer, Frame, Worker},
        lower::Lowered,
        plan::{Builder, NoPlan, Strided},
    },
};
use cutover_graph::{
    Node, OpError, ValueId,
    ops::{Concat, DepthSpace, Gather, Split, Transpose, normalize_axis},
};
use cutover_kernels::cpu::{
    BLOCK, IsaLevel,
    movement::{self, Word},
};
use cutover_tensor::{DType, Shape};

/// Runs of bytes from rows of one buffer to rows of another.
pub(in crate::cpu) struct Copy {
    rows: usize,
    width: usize,
    from: Buffer,
    from_start: usize,
    from_stride: usize,
    to: Buffer,
    to_start: usize,
    to_stride: usize,
}

/// A strided view, made contiguous.
pub(in crate::cpu) struct CopyStrided {
    pub from: Strided,
    pub shape: Vec<usize>,
    /// Bytes of an element.
    pub size: usize,
    pub to: Buffer,
}

/// Rows of `width` bytes chosen by index along an axis.
pub(in crate::cpu) struct GatherStep {
    outer: usize,
    extent: usize,
    width: usize,
    count: usize,
    table: Buffer,
    indices: Buffer,
    index_type: DType,
    /// Whether negative indices count from the end.
    from_end: bool,
    output: Buffer,
    /// For errors.
    node: String,
    op: &'static str,
}

impl Copy {
    /// Contiguous rows of `width` bytes to rows `to_stride` apart.
    pub fn rows(rows: usize, width: usize, from: Buffer, to: Buffer, to_start: usize, to_stride: usize) -> Copy {
        Copy { rows, width, from, from_start: 0, from_stride: width, to, to_start, to_stride }
    }

    /// All of a buffer.
    pub fn whole(from: Buffer, to: Buffer, bytes: usize) -> Copy {
        Copy { rows: 1, width: bytes, from, from_start: 0, from_stride: bytes, to, to_start: 0, to_stride: bytes }
    }

    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>) {
        if self.width == 0 {
            return;
        }
        let from = frame.bytes(self.from);
        // Few long rows are cut, so that every thread has some.
        let pieces = (worker.parts * 4).div_ceil(self.rows.max(1)).min(self.width.div_ceil(4096)).max(1);
        for unit in worker.share(self.rows * pieces) {
            let (row, piece) = (unit / pieces, unit % pieces);
            let part = super::super::pool::share(self.width, piece, pieces);
            let source = self.from_start + row * self.from_stride;
            frame.write(
                self.to,
                self.to_start + row * self.to_stride + part.start,
                &from[source + part.start..source + part.end],
            );
        }
    }
}

impl CopyStrided {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        match self.size {
            1 => self.copy::<u8>(frame, worker, level),
            2 => self.copy::<u16>(frame, worker, level),
            4 => self.copy::<u32>(frame, worker, level),
            _ => self.copy::<u64>(frame, worker, level),
        }
    }

    fn copy<T: Word>(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let count: usize = self.shape.iter().product();
        let Some(input) = frame.words::<T>(self.from.buffer).get(self.from.offset..) else { return };
        let output = frame.words_output(self.to);
        movement::copy_strided(level, &self.shape, &self.from.strides, input, worker.share(count), output);
    }
}

impl GatherStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>) -> Result<(), RunError> {
        let (table, indices) = (frame.bytes(self.table), frame.bytes(self.indices));
        for unit in worker.share(self.outer * self.count) {
            let (outer, at) = (unit / self.count, unit % self.count);
            let given = match self.index_type {
                DType::I64 => i64::from_le_bytes(indices[at * 8..][..8].try_into().expect("eight bytes")),
                _ => i64::from(i32::from_le_bytes(indices[at * 4..][..4].try_into().expect("four bytes"))),
            };
            let wrapped = if given < 0 && self.from_end { given + self.extent as i64 } else { given };
            let Some(index) = usize::try_from(wrapped).ok().filter(|&i| i < self.extent) else {
                let source = OpError::input(format!("index {given} of an axis of {}", self.extent));
                return Err(RunError::Op { node: self.node.clone(), op: self.op.to_string(), source });
            };
            let from = (outer * self.extent + index) * self.width;
            frame.write(self.output, unit * self.width, &table[from..from + self.width]);
        }
        Ok(())
    }
}

fn input(node: &Node, index: usize) -> Option<ValueId> {
    node.inputs.get(index).copied().flatten()
}

pub(in crate::cpu) fn lower_view(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let Some(x) = input(node, 0) else { return Ok(false) };
    let output = node.outputs[0];
    if builder.bytes(x) != builder.bytes(output) {
        // A reshape whose inference and facts disagree is the reference's to refuse.
        return Ok(false);
    }
    // Quantized bytes stay so under another shape.
    if let Some(held) = builder.dequantized(x) {
        super::quantized::hold_view(builder, output, x, held)?;
        return Ok(true);
    }
    // The same image needs no conversion.
    if let Some(blocked) = builder.held(x).blocked
        && builder.shape(x) == builder.shape(output)
    {
        builder.hold_blocked(output, blocked);
        return Ok(true);
    }
    builder.hold_view(output, x)?;
    Ok(true)
}

/// Whether elements can be moved as words of 1, 2, 4 or 8 bytes.
pub(super) fn is_word(builder: &Builder<'_>, id: ValueId) -> bool {
    matches!(builder.fact(id).dtype.bits(), 8 | 16 | 32 | 64)
}

/// The strided view that `id` is, of its row-major bytes if of nothing else.
pub(super) fn view(builder: &mut Builder<'_>, id: ValueId) -> Result<Strided, NoPlan> {
    let held = builder.held(id).clone();
    match held.strided.filter(|_| held.plain.is_none()) {
        Some(strided) => Ok(strided),
        None => {
            let strides = builder.shape(id).strides().to_vec();
            Ok(Strided { buffer: builder.plain(id)?, offset: 0, strides })
        }
    }
}

pub(in crate::cpu) fn lower_transpose(builder: &mut Builder<'_>, node: &Node, op: &Transpose) -> Result<bool, NoPlan> {
    let Some(x) = input(node, 0) else { return Ok(false) };
    let output = node.outputs[0];
    let Ok(permutation) = op.permutation(builder.shape(x).rank()) else { return Ok(false) };
    if !is_word(builder, x) || builder.shape(x).element_count() == 0 || permutation.len() > 16 {
        return Ok(false);
    }
    let from = view(builder, x)?;
    let strides: Vec<usize> = permutation.iter().map(|&a| from.strides[a]).collect();
    // Back to the order that it was written in.
    if strides[..] == *builder.shape(output).strides() && builder.is_all_of(from.buffer, output) {
        builder.hold_plain(output, from.buffer);
    } else {
        builder.hold_strided(output, Strided { strides, ..from });
    }
    Ok(true)
}

/// Blocks of pixels to channels and back: a permutation of the six axes that channels, rows and columns are made of.
pub(in crate::cpu) fn lower_depth_space(
    builder: &mut Builder<'_>,
    node: &Node,
    op: &DepthSpace,
) -> Result<bool, NoPlan> {
    let Some(x) = input(node, 0) else { return Ok(false) };
    let output = node.outputs[0];
    let (shape, to) = (builder.shape(x), builder.shape(output));
    if !is_word(builder, x) || shape.element_count() == 0 || shape.rank() != 4 || to.rank() != 4 {
        return Ok(false);
    }
    let b = op.block;
    let deep = if op.to_space { &shape } else { &to };
    let (n, depth, rows, columns) = (deep[0], deep[1] / (b * b), deep[2], deep[3]);
    // Where depth, row and column of the block are among the parts of the deep side's channel.
    let (parts, order) = if op.depth_first { ([depth, b, b], [1, 2, 3]) } else { ([b, b, depth], [3, 1, 2]) };
    let from = builder.plain(x)?;
    let (seen, permutation): (Vec<usize>, Vec<usize>) = match op.to_space {
        true => {
            let seen = vec![n, parts[0], parts[1], parts[2], rows, columns];
            (seen, vec![0, order[0], 4, order[1], 5, order[2]])
        }
        false => {
            let seen = vec![n, depth, rows, b, columns, b];
            let mut permutation = vec![0, 0, 0, 0, 2, 4];
            [1, 3, 5].into_iter().zip(order).for_each(|(axis, at)| permutation[at] = axis);
            (seen, permutation)
        }
    };
    let strides = Shape::new(&seen).strides();
    let strides = permutation.iter().map(|&a| strides[a]).collect();
    let made = permutation.iter().map(|&a| seen[a]).collect();
    let to = builder.new_plain(output)?;
    let size = builder.fact(x).dtype.bits() / 8;
    let copy = CopyStrided { from: Strided { buffer: from, offset: 0, strides }, shape: made, size, to };
    builder.push(Lowered::CopyStrided(copy), &[from], &[to]);
    Ok(true)
}

pub(in crate::cpu) fn lower_slice(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let Some(x) = input(node, 0) else { return Ok(false) };
    let (shape, to) = (builder.shape(x), builder.shape(node.outputs[0]));
    let known = |index: usize| input(node, index).map(|id| builder.integers(id));
    let (Some(Some(starts)), axes, steps) = (known(1), known(3), known(4)) else { return Ok(false) };
    if matches!(axes, Some(None))
        || matches!(steps, Some(None))
        || !is_word(builder, x)
        || to.element_count() == 0
        || shape.rank() > 16
    {
        return Ok(false);
    }
    let axes = axes.flatten().unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = steps.flatten().unwrap_or_else(|| vec![1; starts.len()]);
    if steps.iter().any(|&s| s < 1) {
        return Ok(false);
    }
    let mut from = view(builder, x)?;
    for ((&axis, &start), &step) in axes.iter().zip(&starts).zip(&steps) {
        let Ok(axis) = normalize_axis(axis, shape.rank()) else { return Ok(false) };
        let extent = shape[axis] as i64;
        let start = if start < 0 { start.saturating_add(extent) } else { start }.clamp(0, extent) as usize;
        from.offset += start * from.strides[axis];
        from.strides[axis] = from.strides[axis].saturating_mul(step as usize);
    }
    // An axis of one element is not stepped along; its stride may be anything.
    (0..to.rank()).filter(|&a| to[a] == 1).for_each(|a| from.strides[a] = from.strides[a].min(1 << 40));
    builder.hold_strided(node.outputs[0], from);
    Ok(true)
}

pub(in crate::cpu) fn lower_expand(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    let Some(x) = input(node, 0) else { return Ok(false) };
    let (shape, to) = (builder.shape(x), builder.shape(node.outputs[0]));
    if !is_word(builder, x) || to.element_count() == 0 || to.rank() > 16 || shape.rank() > to.rank() {
        return Ok(false);
    }
    let from = view(builder, x)?;
    let lead = to.rank() - shape.rank();
    let stride = |axis: usize| if axis < lead || shape[axis - lead] == 1 { 0 } else { from.strides[axis - lead] };
    let strides = (0..to.rank()).map(stride).collect();
    builder.hold_strided(node.outputs[0], Strided { strides, ..from });
    Ok(true)
}

pub(in crate::cpu) fn lower_concat(builder: &mut Builder<'_>, node: &Node, op: &Concat) -> Result<bool, NoPlan> {
    let Some(inputs) = node.inputs.iter().copied().collect::<Option<Vec<ValueId>>>() else { return Ok(false) };
    let output = node.outputs[0];
    let shape = builder.shape(output);
    let Ok(axis) = normalize_axis(op.axis, shape.rank()) else { return Ok(false) };
    let bits = builder.fact(output).dtype.bits();
    if bits < 8 || shape.element_count() == 0 {
        return Ok(false);
    }
    let blocked = |id: &ValueId| builder.held(*id).blocked.is_some();
    let whole = |id: &ValueId| builder.shape(*id)[1].is_multiple_of(BLOCK);
    if axis == 1 && shape.rank() >= 3 && inputs.iter().any(blocked) && inputs[..inputs.len() - 1].iter().all(whole) {
        let from = inputs.iter().map(|&id| builder.blocked(id)).collect::<Result<Vec<_>, _>>()?;
        let to = builder.new_blocked(output)?;
        let (images, channels, pixels) = builder.image(output);
        let bytes = |channels: usize| channels.next_multiple_of(BLOCK) * pixels * 4;
        let mut start = 0;
        for (id, from) in inputs.into_iter().zip(from) {
            let width = bytes(builder.image(id).1);
            let copy = Copy {
                rows: images,
                width,
                from,
                from_start: 0,
                from_stride: width,
                to,
                to_start: start,
                to_stride: bytes(channels),
            };
            builder.push(Lowered::Copy(copy), &[from], &[to]);
            start += width;
        }
        return Ok(true);
    }
    let rows: usize = shape[..axis].iter().product();
    let inner = shape[axis + 1..].iter().product::<usize>() * bits / 8;
    let from = inputs.iter().map(|&id| builder.plain(id)).collect::<Result<Vec<_>, _>>()?;
    let to = builder.new_plain(output)?;
    let mut start = 0;
    for (id, from) in inputs.into_iter().zip(from) {
        let width = builder.shape(id)[axis] * inner;
        let copy = Copy {
            rows,
            width,
            from,
            from_start: 0,
            from_stride: width,
            to,
            to_start: start,
            to_stride: shape[axis] * inner,
        };
        builder.push(Lowered::Copy(copy), &[from], &[to]);
        start += width;
    }
    Ok(true)
}

pub(in crate::cpu) fn lower_split(builder: &mut Builder<'_>, node: &Node, op: &Split) -> Result<bool, NoPlan> {
    let Some(x) = input(node, 0) else { return Ok(false) };
    let shape = builder.shape(x);
    let Ok(axis) = normalize_axis(op.axis, shape.rank()) else { return Ok(false) };
    let bits = builder.fact(x).dtype.bits();
    if bits < 8 || shape.element_count() == 0 {
        return Ok(false);
    }
    let rows: usize = shape[..axis].iter().product();
    let inner = shape[axis + 1..].iter().product::<usize>() * bits / 8;
    let from = builder.plain(x)?;
    let mut start = 0;
    for &output in &node.outputs {
        let width = builder.shape(output)[axis] * inner;
        let to = builder.new_plain(output)?;
        let copy = Copy {
            rows,
            width,
            from,
            from_start: start,
            from_stride: shape[axis] * inner,
            to,
            to_start: 0,
            to_stride: width,
        };
        builder.push(Lowered::Copy(copy), &[from], &[to]);
        start += width;
    }
    Ok(true)
}

pub(in crate::cpu) fn lower_gather(builder: &mut Builder<'_>, node: &Node, op: &Gather) -> Result<bool, NoPlan> {
    gather(builder, node, op.axis, true, "Gather")
}

/// Features of rows: the last axis, by indices that are none from the end.
pub(in crate::cpu) fn lower_features(builder: &mut Builder<'_>, node: &Node) -> Result<bool, NoPlan> {
    gather(builder, node, -1, false, "ai.onnx.ml.ArrayFeatureExtractor")
}

fn gather(builder: &mut Builder<'_>, node: &Node, axis: i64, from_end: bool, op: &'static str) -> Result<bool, NoPlan> {
    let (Some(x), Some(indices)) = (input(node, 0), input(node, 1)) else { return Ok(false) };
    let output = node.outputs[0];
    let shape = builder.shape(x);
    let Ok(axis) = normalize_axis(axis, shape.rank()) else { return Ok(false) };
    let bits = builder.fact(x).dtype.bits();
    if bits < 8 || builder.shape(output).element_count() == 0 {
        return Ok(false);
    }
    let (table, index) = (builder.plain_bytes(x)?, builder.plain_bytes(indices)?);
    let to = builder.new_plain(output)?;
    let step = GatherStep {
        outer: shape[..axis].iter().product(),
        extent: shape[axis],
        width: shape[axis + 1..].iter().product::<usize>() * bits / 8,
        count: builder.shape(indices).element_count(),
        table,
        indices: index,
        index_type: builder.fact(indices).dtype,
        from_end,
        output: to,
        node: node.name.clone(),
        op,
    };
    builder.push(Lowered::Gather(step), &[table, index], &[to]);
    Ok(true)
}
