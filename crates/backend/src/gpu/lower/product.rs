//! Matrix products, and convolutions as such.

use super::{
    super::{
        code::{self, Operand, Text, broadcast_strides, coordinates, float, position, stored, wrapped},
        plan::{BufferId, Builder, Unable},
    },
    elementwise::{activation_text, is_float, unary_text},
};
use crate::Work;
use cutover_graph::{
    Constant, Node, ValueId,
    ops::{Conv, FusedGemm, FusedMatMul, Gemm, MatMul},
};
use cutover_kernels::wgsl;
use cutover_tensor::{DType, Tensor};
use std::fmt::Write;

/// Rows of a product that an invocation computes at most.
const ROWS: usize = 16;

/// Invocations of a group for `count` columns: the size with the fewest that are idle.
fn group_size(b: &Builder<'_>, count: usize) -> usize {
    let sizes: &[usize] = if b.gpu.is_imitated { &[64, 56, 48, 40, 32, 24, 16, 8] } else { &[64, 128, 32] };
    let idle = |size: &usize| count.div_ceil(*size) * size;
    // Of equal ones the first.
    sizes.iter().copied().min_by_key(idle).unwrap_or(64)
}

/// How a product of `rows` by `columns`, `matrices` of them, is dealt out where a subgroup shares what it loads.
struct Lanes {
    group: usize,
    wide: usize,
    octets: usize,
}

impl Lanes {
    /// The division with the least estimated work: a load counts as forty multiplications, and idle cores as much as busy ones.
    fn of(rows: usize, columns: usize, matrices: usize) -> Lanes {
        const LOAD: usize = 40;
        const SHARES: usize = 4;
        let mut best = (usize::MAX, Lanes { group: 8, wide: 1, octets: 1 });
        for (octets, wide) in [(4, 7), (4, 4), (4, 2), (4, 1), (2, 8), (2, 4), (2, 1), (1, 8), (1, 4), (1, 1)] {
            for group in [64, 56, 48, 40, 32, 24, 16, 8] {
                let shares = columns.div_ceil(group * wide) * rows.div_ceil(8 * octets) * matrices;
                let of_group = (octets + wide) * LOAD + 8 * octets * wide;
                let work = shares.max(SHARES) * of_group * group;
                if work < best.0 {
                    best = (work, Lanes { group, wide, octets });
                }
            }
        }
        best.1
    }
}

/// Rows that an invocation computes of `count`.
fn rows(count: usize) -> usize {
    // As few blocks as `ROWS` allows, of one size.
    count.div_ceil(count.div_ceil(ROWS)).max(1)
}

/// One factor: what its elements are, and where matrix `z` has them.
struct Factor {
    operand: Operand,
    /// Batch extents of the result and this factor's strides along them.
    batch: Vec<usize>,
    row: usize,
    column: usize,
}

/// What is done to a sum before it is stored.
struct Epilogue {
    alpha: f32,
    beta: f32,
    /// What is added, by the result's index: statements, index, operand.
    added: Option<(String, String, Operand)>,
    /// Of the variable `x`.
    function: String,
}

pub(super) fn lower_matmul(b: &mut Builder<'_>, node: &Node, op: &MatMul) -> Result<(), Unable> {
    let epilogue = epilogue(b, node, 1.0, 1.0, activation_text(op.activation, "x"))?;
    let shapes = [b.shape(super::input(node, 0)?).to_vec(), b.shape(super::input(node, 1)?).to_vec()];
    multiply(b, node, shapes, [false, false], epilogue)
}

pub(super) fn lower_fused_matmul(b: &mut Builder<'_>, node: &Node, op: &FusedMatMul) -> Result<(), Unable> {
    if op.a.batch || op.b.batch {
        return Err("a batch that is not the first axis".into());
    }
    let function = op.function.map_or(Some("x".to_string()), |function| unary_text(function, "x"));
    let function = function.ok_or("a function of whole numbers")?;
    let epilogue = Epilogue { alpha: op.alpha, beta: 1.0, added: None, function };
    let shapes = [b.shape(super::input(node, 0)?).to_vec(), b.shape(super::input(node, 1)?).to_vec()];
    multiply(b, node, shapes, [op.a.transpose, op.b.transpose], epilogue)
}

pub(super) fn lower_gemm(b: &mut Builder<'_>, node: &Node, op: &Gemm, fused: Option<&FusedGemm>) -> Result<(), Unable> {
    let function = match fused {
        None => Some(activation_text(op.activation, "x")),
        Some(fused) => unary_text(fused.function, "x"),
    };
    let epilogue = epilogue(b, node, op.alpha, op.beta, function.ok_or("a function of whole numbers")?)?;
    let shapes = [b.shape(super::input(node, 0)?).to_vec(), b.shape(super::input(node, 1)?).to_vec()];
    multiply(b, node, shapes, [op.transpose_a, op.transpose_b], epilogue)
}

fn epilogue(b: &mut Builder<'_>, node: &Node, alpha: f32, beta: f32, function: String) -> Result<Epilogue, Unable> {
    let added = match node.inputs.get(2).copied().flatten() {
        None => None,
        Some(id) => {
            let (statements, index) = code::broadcast(&b.shape(id), &b.shape(node.outputs[0]));
            Some((statements, index, b.reread(id)?))
        }
    };
    Ok(Epilogue { alpha, beta, added, function })
}

/// `node`'s first two inputs, of these shapes, multiplied; `transposed` says of each whether its last two axes change places.
fn multiply(
    b: &mut Builder<'_>,
    node: &Node,
    shapes: [Vec<usize>; 2],
    transposed: [bool; 2],
    epilogue: Epilogue,
) -> Result<(), Unable> {
    let ids = [super::input(node, 0)?, super::input(node, 1)?];
    let output = node.outputs[0];
    let dtype = b.dtype(output);
    if !is_float(dtype) || ids.iter().any(|&id| b.dtype(id) != dtype) {
        return Err(format!("no kernel for {dtype}").into());
    }
    let [mut left, mut right] = shapes;
    // A vector is a row on the left, a column on the right; its strides are the same.
    if left.len() == 1 {
        left.insert(0, 1);
    }
    if right.len() == 1 {
        right.push(1);
    }
    let swapped = |shape: &[usize], transposed: bool| {
        let [rows, columns] = [shape[shape.len() - 2], shape[shape.len() - 1]];
        if transposed { [columns, rows] } else { [rows, columns] }
    };
    let ([m, k], [_, n]) = (swapped(&left, transposed[0]), swapped(&right, transposed[1]));
    if k == 0 {
        return Err("a sum of nothing".into());
    }
    let mut batch: Vec<usize> = Vec::new();
    let (of_left, of_right) = (&left[..left.len() - 2], &right[..right.len() - 2]);
    for axis in 0..of_left.len().max(of_right.len()) {
        let at = |of: &[usize]| (of.len() + axis).checked_sub(of_left.len().max(of_right.len())).map_or(1, |at| of[at]);
        batch.push(match (at(of_left), at(of_right)) {
            (1, right) => right,
            (left, _) => left,
        });
    }
    let strides = |of: &[usize], matrix: usize| {
        let own = broadcast_strides(of, &batch);
        own.into_iter().map(|stride| stride * matrix).collect::<Vec<_>>()
    };
    let (batch_left, batch_right) = (strides(of_left, m * k), strides(of_right, k * n));
    // The rows of the first factor may lie anyhow; of the second, what neighbours read lies together.
    let a = Factor {
        operand: b.reread(ids[0])?,
        batch: batch_left,
        row: if transposed[0] { 1 } else { k },
        column: if transposed[0] { m } else { 1 },
    };
    let mut second = Factor { operand: Operand::Literal(String::new(), dtype), batch: batch_right, row: n, column: 1 };
    second.operand = match (transposed[1], b.constant(ids[1])) {
        (false, _) => b.reread(ids[1])?,
        (true, Some(constant)) if of_right.is_empty() => b.upload(&constant, "transposed", transposed_bytes)?,
        (true, _) => {
            (second.row, second.column) = (1, k);
            b.reread(ids[1])?
        }
    };
    // Several matrices against one second factor are one of more rows.
    let is_one = second.batch.iter().all(|&stride| stride == 0) && !transposed[0];
    let is_dense = of_left == &batch[..];
    let (m, batch) = if is_one && is_dense { (m * batch.iter().product::<usize>(), Vec::new()) } else { (m, batch) };
    product(b, output, [m, n, k], &batch, &a, &second, &epilogue)
}

fn transposed_bytes(tensor: &Tensor) -> Vec<u8> {
    let bytes = super::super::executable::to_device(tensor);
    let size = code::storage_bytes(tensor.dtype());
    let [rows, columns] = [tensor.shape()[0], tensor.shape()[1]];
    let mut moved = Vec::with_capacity(bytes.len());
    for column in 0..columns {
        for row in 0..rows {
            moved.extend_from_slice(&bytes[(row * columns + column) * size..][..size]);
        }
    }
    moved
}

fn product(
    b: &mut Builder<'_>,
    output: ValueId,
    [m, n, k]: [usize; 3],
    batch: &[usize],
    left: &Factor,
    right: &Factor,
    epilogue: &Epilogue,
) -> Result<(), Unable> {
    let (to, dtype) = (b.output(output)?, b.dtype(output));
    multiply_into(b, to, dtype, [m, n, k], batch, left, right, epilogue)
}

/// The product of two factors in the buffer `to`.
fn multiply_into(
    b: &mut Builder<'_>,
    to: BufferId,
    dtype: DType,
    [m, n, k]: [usize; 3],
    batch: &[usize],
    left: &Factor,
    right: &Factor,
    epilogue: &Epilogue,
) -> Result<(), Unable> {
    let count: usize = batch.iter().product();
    let mut text = Text::default();
    let mut kernel = String::new();
    for (name, factor, row, column) in [("a_at", left, "m", "k"), ("b_at", right, "k", "n")] {
        let load = text.function(&factor.operand);
        let statements = if batch.is_empty() { String::new() } else { coordinates(batch, "z", "z") };
        let begin = if batch.is_empty() { "0u".to_string() } else { position(&factor.batch, 0, "z") };
        let _ = writeln!(
            kernel,
            "fn {name}(z: u32, {row}: u32, {column}: u32) -> f32 {{\n{statements}return {load}({begin} + {row} * {}u + {column} * {}u);\n}}",
            factor.row, factor.column
        );
    }
    kernel += &finish(&mut text, to, dtype, epilogue);
    let lanes = b.gpu.has_lanes.then(|| Lanes::of(m, n, count));
    let (template, group, rows, wide) = match &lanes {
        Some(lanes) => (wgsl::PRODUCT_LANES, lanes.group, 8 * lanes.octets, lanes.wide),
        None => (wgsl::PRODUCT, group_size(b, n), rows(m), 1),
    };
    let numbers = [("N", n), ("M", m), ("K", k), ("ROWS", rows), ("GROUP", group), ("LAST_ROW", m - 1)];
    let numbers = [&numbers[..], &[("OCTETS", rows / 8), ("WIDE", wide)]].concat();
    let parameters: Vec<(&str, String)> = numbers.into_iter().map(|(name, value)| (name, value.to_string())).collect();
    kernel += &wgsl::expand(template, &parameters);
    let groups = [n.div_ceil(group * wide), m.div_ceil(rows), count].map(|n| n as u32);
    let work = Work { operations: 2 * (count * m * n * k) as u64, bytes: 4 * (count * (m * k + k * n + m * n)) as u64 };
    b.push(text, &kernel, groups, "matrix product", work)
}

/// `finish(i, x)`: the result's element `i`, of the sum `x`.
fn finish(text: &mut Text, to: BufferId, dtype: DType, epilogue: &Epilogue) -> String {
    let array = text.bind(to, code::storage_type(dtype), true);
    let mut body = match epilogue.alpha {
        1.0 => "var x = sum;\n".to_string(),
        alpha => format!("var x = sum * {};\n", float(alpha)),
    };
    if let Some((statements, index, operand)) = &epilogue.added {
        let load = text.function(operand);
        let factor = if epilogue.beta == 1.0 { String::new() } else { format!("{} * ", float(epilogue.beta)) };
        let _ = writeln!(body, "{{\n{statements}x = x + {factor}{load}({index});\n}}");
    }
    let element = stored(dtype, &wrapped(dtype, &epilogue.function));
    format!("fn finish(i: u32, sum: f32) {{\n{body}{array}[i] = {element};\n}}\n")
}

/// A convolution over one or two axes by the product kernel; `false` for others.
pub(super) fn lower_conv(b: &mut Builder<'_>, node: &Node, op: &Conv) -> Result<bool, Unable> {
    let (x, w, output) = (super::input(node, 0)?, super::input(node, 1)?, node.outputs[0]);
    let (shape, filters, to, dtype) = (b.shape(x), b.shape(w), b.shape(output), b.dtype(x));
    let Some(constant) = b.constant(w) else { return Ok(false) };
    if !is_float(dtype) || !matches!(shape.rank(), 3 | 4) || filters[1..].contains(&0) {
        return Ok(false);
    }
    let axes = op.window.axes(&shape[2..], &filters[2..]).map_err(|error| error.to_string())?;
    let one = cutover_graph::ops::WindowAxis {
        input: 1,
        output: 1,
        kernel: 1,
        stride: 1,
        dilation: 1,
        pad_begin: 0,
        pad_end: 0,
    };
    let [vertical, horizontal] = if axes.len() == 2 { [axes[0], axes[1]] } else { [one, axes[0]] };
    if horizontal.kernel > 32 || vertical.kernel > 32 {
        return Ok(false);
    }
    let (inner, per_group, taps) = (filters[1], filters[0] / op.group, vertical.kernel * horizontal.kernel);
    let pixels = vertical.output * horizontal.output;
    // Of a few channels a group, as depthwise, a subgroup has nothing to share.
    let lanes = (b.gpu.has_lanes && per_group >= 4).then(|| Lanes::of(per_group, pixels, shape[0] * op.group));
    let (template, group, rows, wide) = match &lanes {
        Some(lanes) => (wgsl::CONV_LANES, lanes.group, 8 * lanes.octets, lanes.wide),
        None => (wgsl::CONV, group_size(b, pixels), rows(per_group), 1),
    };
    let blocks = per_group.div_ceil(rows);
    let packed = pack(&constant, op.group, rows)?;
    let weights = b.upload(&packed, "plain", super::super::executable::to_device)?;
    let operand = b.reread(x)?;
    let bias = match node.inputs.get(2).copied().flatten() {
        Some(bias) => Some(b.operand(bias)?),
        None => None,
    };
    let residual = match node.inputs.get(3).copied().flatten() {
        Some(residual) => Some(b.reread(residual)?),
        None => None,
    };
    let buffer = b.output(output)?;
    let mut text = Text::default();
    let (load_x, load_w) = (text.function(&operand), text.function(&weights));
    let array = text.bind(buffer, code::storage_type(dtype), true);
    let mut kernel =
        format!("fn x_at(i: u32) -> f32 {{ return {load_x}(i); }}\nfn w_at(i: u32) -> f32 {{ return {load_w}(i); }}\n");
    let mut body = "var x = sum;\n".to_string();
    if let Some(bias) = &bias {
        let _ = writeln!(body, "x = x + {}(channel);", text.function(bias));
    }
    if let Some(residual) = &residual {
        let _ = writeln!(body, "x = x + {}(i);", text.function(residual));
    }
    let element = stored(dtype, &wrapped(dtype, &activation_text(op.activation, "x")));
    let _ = writeln!(kernel, "fn finish(i: u32, channel: u32, sum: f32) {{\n{body}{array}[i] = {element};\n}}");
    // Where the last window ends inside the input, no tap is outside.
    let last =
        |axis: &cutover_graph::ops::WindowAxis| (axis.output - 1) * axis.stride + (axis.kernel - 1) * axis.dilation;
    let is_inside = |axis: &cutover_graph::ops::WindowAxis| axis.pad_begin == 0 && last(axis) < axis.input;
    let condition = match (is_inside(&vertical), is_inside(&horizontal)) {
        (true, true) => "true",
        (true, false) => "is_column{s}",
        (false, true) => "is_y",
        (false, false) => "is_y && is_column{s}",
    };
    let mut parameters = vec![("IS_INSIDE", condition.to_string())];
    let numbers = [
        ("ROWS", rows),
        ("OCTETS", rows / 8),
        ("WIDE", wide),
        ("GROUP", group),
        ("GROUPS", op.group),
        ("BLOCKS", blocks),
        ("PER_GROUP", per_group),
        ("INNER", inner),
        ("CHANNELS", to[1]),
        ("PIXELS", pixels),
        ("IN_H", vertical.input),
        ("IN_W", horizontal.input),
        ("OUT_W", horizontal.output),
        ("KERNEL_Y", vertical.kernel),
        ("KERNEL_X", horizontal.kernel),
        ("STRIDE_Y", vertical.stride),
        ("STRIDE_X", horizontal.stride),
        ("DILATION_Y", vertical.dilation),
        ("DILATION_X", horizontal.dilation),
        ("PAD_Y", vertical.pad_begin),
        ("PAD_X", horizontal.pad_begin),
    ];
    parameters.extend(numbers.map(|(name, value)| (name, value.to_string())));
    kernel += &wgsl::expand(template, &parameters);
    let groups = [pixels.div_ceil(group * wide), blocks, shape[0] * op.group].map(|n| n as u32);
    let operations = 2 * (b.count(output) * inner * taps) as u64;
    let bytes = 4 * (b.count(x) + b.count(w) + b.count(output)) as u64;
    b.push(text, &kernel, groups, "convolution", Work { operations, bytes })?;
    Ok(true)
}

/// Filters as `[group][block][input channel][tap][rows]`, what a block lacks filled with zeros.
fn pack(filters: &Constant, groups: usize, rows: usize) -> Result<Constant, Unable> {
    let tensor = &filters.tensor;
    let (shape, size) = (tensor.shape(), tensor.dtype().bits() / 8);
    let (per_group, depth) = (shape[0] / groups, shape[1..].iter().product::<usize>());
    let blocks = per_group.div_ceil(rows);
    let mut packed = Vec::with_capacity(groups * blocks * depth * rows * size);
    for (group, block) in (0..groups).flat_map(|group| (0..blocks).map(move |block| (group, block))) {
        for at in 0..depth {
            for row in block * rows..(block + 1) * rows {
                match row < per_group {
                    true => {
                        let from = ((group * per_group + row) * depth + at) * size;
                        packed.extend_from_slice(&tensor.bytes()[from..from + size]);
                    }
                    false => packed.extend(std::iter::repeat_n(0, size)),
                }
            }
        }
    }
    let tensor = Tensor::from_bytes(tensor.dtype(), [groups * blocks * depth * rows], &packed);
    let tensor = tensor.map_err(|error| error.to_string())?;
    Ok(Constant::derived(tensor, &format!("rows of {rows} in {groups} groups"), &[filters.identity()]))
}

/// `x · Wᵀ + b` for the matrices `W [directions, rows, features]` of a recurrent operator: `[directions, count, rows]`.
pub(super) fn inputs_of_gates(
    b: &mut Builder<'_>,
    x: ValueId,
    w: ValueId,
    bias: Option<ValueId>,
    [directions, count, features, rows]: [usize; 4],
) -> Result<Operand, Unable> {
    let x = b.reread(x)?;
    let (operand, row, column) = match b.constant(w) {
        Some(constant) => {
            let packed = super::recurrent::columns_of(&constant, [directions, rows, features])?;
            (b.upload(&packed, "plain", super::super::executable::to_device)?, rows, 1)
        }
        None => (b.reread(w)?, 1, features),
    };
    let left = Factor { operand: x, batch: vec![0], row: features, column: 1 };
    let right = Factor { operand, batch: vec![rows * features], row, column };
    let added = match bias {
        None => None,
        Some(bias) => {
            let index = format!("i / {}u * {}u + i % {rows}u", count * rows, 2 * rows);
            Some((String::new(), index, b.operand(bias)?))
        }
    };
    let epilogue = Epilogue { alpha: 1.0, beta: 1.0, added, function: "x".to_string() };
    let to = b.scratch(directions * count * rows);
    multiply_into(b, to, DType::F32, [count, rows, features], &[directions], &left, &right, &epilogue)?;
    Ok(Operand::Buffer(to, DType::F32))
}
