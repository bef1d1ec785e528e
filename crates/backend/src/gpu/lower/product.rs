//! Matrix products.

use super::{
    super::{
        code::{self, Operand, Text, broadcast_strides, coordinates, float, position, stored, wrapped},
        plan::{BufferId, Builder, Main, Unable},
    },
    bytes,
    elementwise::{activation_text, is_float, unary_text},
    tiles, written,
};
use crate::{Precision, Work};
use cutover_graph::{
    Node, ValueId,
    ops::{FusedGemm, FusedMatMul, Gemm, MatMul},
};
use cutover_kernels::wgsl;
use cutover_tensor::{DType, Tensor};
use std::fmt::Write;

/// Rows of a product that an invocation computes at most.
const ROWS: usize = 16;

/// Invocations of a group for `count` columns: the size with the fewest that are idle.
pub(super) fn group_size(b: &Builder<'_>, count: usize) -> usize {
    let sizes: &[usize] = if b.gpu.is_imitated { &[64, 56, 48, 40, 32, 24, 16, 8] } else { &[64, 128, 32] };
    let idle = |size: &usize| count.div_ceil(*size) * size;
    // Of equal ones the first.
    sizes.iter().copied().min_by_key(idle).unwrap_or(64)
}

/// How a product is dealt out where a subgroup shares what it loads: octets of rows, and four columns an invocation.
pub(super) struct Lanes {
    pub group: usize,
    pub octets: usize,
}

/// Multiplications of a subgroup that take as long as loading four neighbouring elements an invocation, four that lie anywhere, and storing
/// four. Measured on Mesa 22.3: 10, 30 and 48 ns, where a multiplication and an addition take 0.3.
pub(super) const LOAD_QUAD: usize = 32;
pub(super) const LOAD_FOUR: usize = 100;
const STORE_QUAD: usize = 160;

impl Lanes {
    /// The division with the least estimated work for a product of `rows` by `columns` with sums of `depth`, `matrices` of them. `loads` is
    /// what four elements cost of the first factor and of the second; idle cores cost as much as busy ones.
    pub fn of([rows, columns, depth, matrices]: [usize; 4], loads: [usize; 2], most_octets: usize) -> Lanes {
        const SHARES: usize = 4;
        let mut best = (usize::MAX, Lanes { group: 8, octets: 1 });
        for octets in 1..=most_octets {
            for group in [64, 56, 48, 40, 32, 24, 16, 8] {
                let shares = columns.div_ceil(group * 4) * rows.div_ceil(8 * octets) * matrices;
                let round = octets * loads[0] + 4 * loads[1] + 128 * octets;
                let of_group = depth.div_ceil(4) * round + 8 * octets * STORE_QUAD;
                let work = shares.max(SHARES) * of_group * group;
                if work < best.0 {
                    best = (work, Lanes { group, octets });
                }
            }
        }
        best.1
    }
}

/// Rows that an invocation computes of `count`.
pub(super) fn rows(count: usize) -> usize {
    // As few blocks as `ROWS` allows, of one size.
    count.div_ceil(count.div_ceil(ROWS)).max(1)
}

/// One factor: what its elements are, and where matrix `z` has them.
pub(super) struct Factor {
    pub operand: Operand,
    /// Batch extents of the result and this factor's strides along them.
    pub batch: Vec<usize>,
    pub row: usize,
    pub column: usize,
    /// Whether it lies in the blocks that a subgroup reads, one behind the other, whatever `row` and `column` say: of a first factor
    /// `[m / 8][k / 4][8][4]`, of a second `[n / 32][k][32]`, and terms come by fours.
    pub in_blocks: bool,
}

impl Factor {
    /// Whether four neighbours of a row lie as one of the fours that its memory can be read in.
    fn has_quads(&self) -> bool {
        let strides = self.batch.iter().chain([&self.row]);
        self.in_blocks
            || self.column == 1
                && strides.copied().all(|stride| stride.is_multiple_of(4))
                && is_read_by_quads(&self.operand)
    }
}

fn is_read_by_quads(operand: &Operand) -> bool {
    matches!(operand, Operand::Buffer(_, DType::F32))
}

/// The product of two factors: where it goes, as what, and what becomes of its sums.
pub(super) struct Product<'a> {
    pub to: BufferId,
    pub dtype: DType,
    /// Rows, columns, and the terms of a sum.
    pub sizes: [usize; 3],
    /// Extents of the axes along which there is a matrix each.
    pub batch: &'a [usize],
    pub left: &'a Factor,
    pub right: &'a Factor,
    pub epilogue: &'a Epilogue,
}

impl Product<'_> {
    /// Matrices.
    fn count(&self) -> usize {
        self.batch.iter().product()
    }

    pub fn work(&self) -> Work {
        let ([m, n, k], count) = (self.sizes, self.count());
        let bytes = 4 * (count * (m * k + k * n + m * n)) as u64;
        Work { operations: 2 * (count * m * n * k) as u64, bytes, ..Work::default() }
    }
}

/// What is done to a sum before it is stored.
#[derive(Clone)]
pub(super) struct Epilogue {
    pub alpha: f32,
    /// Added to a whole row, after that: an element for each, over and over; and how many there are.
    pub bias: Option<(Operand, usize)>,
    pub added: Vec<Added>,
    /// Of the variable `x`.
    pub function: String,
}

/// An operand times `factor`, at an index of its own that follows from the result's, `i`, by statements.
#[derive(Clone)]
pub(super) struct Added {
    pub statements: String,
    pub index: String,
    pub factor: f32,
    pub operand: Operand,
}

pub(super) fn lower_matmul(b: &mut Builder<'_>, node: &Node, op: &MatMul) -> Result<(), Unable> {
    let epilogue = epilogue(b, node, 1.0, 1.0, activation_text(op.activation, "x"))?;
    if bytes::lower_product(b, node, false, &epilogue)? {
        return Ok(());
    }
    let shapes = [b.shape(super::input(node, 0)?).to_vec(), b.shape(super::input(node, 1)?).to_vec()];
    multiply(b, node, shapes, [false, false], epilogue)
}

pub(super) fn lower_fused_matmul(b: &mut Builder<'_>, node: &Node, op: &FusedMatMul) -> Result<(), Unable> {
    if op.a.batch || op.b.batch {
        return Err("a batch that is not the first axis".into());
    }
    let function = op.function.map_or(Some("x".to_string()), |function| unary_text(function, "x"));
    let function = function.ok_or("a function of whole numbers")?;
    let epilogue = Epilogue { alpha: op.alpha, bias: None, added: Vec::new(), function };
    let shapes = [b.shape(super::input(node, 0)?).to_vec(), b.shape(super::input(node, 1)?).to_vec()];
    multiply(b, node, shapes, [op.a.transpose, op.b.transpose], epilogue)
}

pub(super) fn lower_gemm(b: &mut Builder<'_>, node: &Node, op: &Gemm, fused: Option<&FusedGemm>) -> Result<(), Unable> {
    let function = match fused {
        None => Some(activation_text(op.activation, "x")),
        Some(fused) => unary_text(fused.function, "x"),
    };
    let epilogue = epilogue(b, node, op.alpha, op.beta, function.ok_or("a function of whole numbers")?)?;
    if !op.transpose_a && bytes::lower_product(b, node, op.transpose_b, &epilogue)? {
        return Ok(());
    }
    let shapes = [b.shape(super::input(node, 0)?).to_vec(), b.shape(super::input(node, 1)?).to_vec()];
    multiply(b, node, shapes, [op.transpose_a, op.transpose_b], epilogue)
}

fn epilogue(b: &mut Builder<'_>, node: &Node, alpha: f32, beta: f32, function: String) -> Result<Epilogue, Unable> {
    let mut added = Vec::new();
    if let Some(id) = node.inputs.get(2).copied().flatten() {
        let (statements, index) = code::broadcast(&b.shape(id), &b.shape(node.outputs[0]));
        added.push(Added { statements, index, factor: beta, operand: b.reread(id)? });
    }
    Ok(Epilogue { alpha, bias: None, added, function })
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
    let (of_left, of_right) = (&left[..left.len() - 2], &right[..right.len() - 2]);
    let batch = batch_of(of_left, of_right);
    let strides = |of: &[usize], matrix: usize| {
        let own = broadcast_strides(of, &batch);
        own.into_iter().map(|stride| stride * matrix).collect::<Vec<_>>()
    };
    let (batch_left, batch_right) = (strides(of_left, m * k), strides(of_right, k * n));
    let none = || Operand::Literal(String::new(), dtype);
    // The rows of the first factor may lie anyhow; of the second, what neighbours read lies together.
    let (row, column) = if transposed[0] { (1, m) } else { (k, 1) };
    let mut a = Factor { operand: none(), batch: batch_left, row, column, in_blocks: false };
    let (row, column) = if transposed[1] { (1, k) } else { (n, 1) };
    let mut second = Factor { operand: none(), batch: batch_right, row, column, in_blocks: false };
    // Several matrices against one second factor are one of more rows.
    let is_one = second.batch.iter().all(|&stride| stride == 0) && !transposed[0];
    let is_dense = of_left == &batch[..];
    let (m, batch) = if is_one && is_dense { (m * batch.iter().product::<usize>(), Vec::new()) } else { (m, batch) };
    let (to, stored_as) = b.output_stored(output)?;
    let sizes = [m, n, k];
    let product = Product { to, dtype: stored_as, sizes, batch: &batch, left: &a, right: &second, epilogue: &epilogue };
    if written::product_of_weights(b, &product, ids)? {
        return Ok(());
    }
    a.operand = b.reread(ids[0])?;
    second.operand = match b.constant(ids[1]) {
        // Kernels written by hand read either order.
        Some(constant) if transposed[1] && of_right.is_empty() && b.gpu.written.is_none() => {
            (second.row, second.column) = (n, 1);
            b.upload(&b.weights(constant), "transposed", transposed_bytes)?
        }
        Some(constant) if b.precision == Precision::F16 => {
            b.upload(&b.weights(constant), "plain", super::super::executable::to_device)?
        }
        Some(constant) if b.gpu.has_lanes && of_right.is_empty() && dtype == DType::F32 && k.is_multiple_of(4) => {
            second.in_blocks = true;
            let recipe = "columns by 32";
            b.upload(&constant, recipe, |tensor| columns_in_blocks(&super::conv::floats(tensor), k, n))?
        }
        _ => b.reread(ids[1])?,
    };
    let (left, right) = (&a, &second);
    multiply_by_any(b, &Product { to, dtype: stored_as, sizes, batch: &batch, left, right, epilogue: &epilogue })
}

/// The product by a kernel written by hand, or else a generated one.
fn multiply_by_any(b: &mut Builder<'_>, product: &Product<'_>) -> Result<(), Unable> {
    if written::product(b, product) { Ok(()) } else { multiply_into(b, product) }
}

/// What the extents before matrices are broadcast to.
pub(super) fn batch_of(left: &[usize], right: &[usize]) -> Vec<usize> {
    let rank = left.len().max(right.len());
    let at = |of: &[usize], axis: usize| (of.len() + axis).checked_sub(rank).map_or(1, |axis| of[axis]);
    let extent = |axis: usize| match (at(left, axis), at(right, axis)) {
        (1, right) => right,
        (left, _) => left,
    };
    (0..rank).map(extent).collect()
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

/// Matrices of f32, `[.., k, n]`, with their columns by 32, what a block lacks filled with zeros: `[..][n / 32][k][32]`.
pub(super) fn columns_in_blocks(values: &[f32], k: usize, n: usize) -> Vec<u8> {
    let blocks = n.div_ceil(32);
    let mut moved = vec![0.0f32; values.len() / n * blocks * 32];
    for (line, row) in values.chunks_exact(n).enumerate() {
        let (matrix, k_at) = (line / k, line % k);
        for (block, from) in row.chunks(32).enumerate() {
            moved[((matrix * blocks + block) * k + k_at) * 32..][..from.len()].copy_from_slice(from);
        }
    }
    bytemuck::cast_slice(&moved).to_vec()
}

/// A matrix of f32, `[rows, k]`, with its rows by eights and its columns by fours, what these lack filled with zeros: `[rows / 8][k / 4][8][4]`.
pub(super) fn rows_in_blocks(values: &[f32], rows: usize) -> Vec<u8> {
    let depth = values.len() / rows;
    let quads = depth.div_ceil(4);
    let mut moved = vec![0.0f32; rows.div_ceil(8) * quads * 32];
    for (row, line) in values.chunks_exact(depth).enumerate() {
        for (quad, from) in line.chunks(4).enumerate() {
            moved[((row / 8 * quads + quad) * 8 + row % 8) * 4..][..from.len()].copy_from_slice(from);
        }
    }
    bytemuck::cast_slice(&moved).to_vec()
}

/// The product of two factors in the buffer `to`.
pub(super) fn multiply_into(b: &mut Builder<'_>, product: &Product<'_>) -> Result<(), Unable> {
    multiply_to(b, product, false)
}

/// As [`multiply_into`], with columns by fours one behind the other, and the sums as they are: `[matrix][n / 4][m][4]`.
pub(super) fn multiply_into_columns(b: &mut Builder<'_>, product: &Product<'_>) -> Result<(), Unable> {
    multiply_to(b, product, true)
}

fn multiply_to(b: &mut Builder<'_>, product: &Product<'_>, in_columns: bool) -> Result<(), Unable> {
    let &Product { to, dtype, sizes: [m, n, k], batch, left, right, epilogue } = product;
    let count = product.count();
    let mut text = Text::default();
    let mut kernel = String::new();
    let has_lanes = b.gpu.has_lanes;
    for (name, factor, row, column) in [("a_at", left, "m", "k"), ("b_at", right, "k", "n")] {
        let statements = if batch.is_empty() { String::new() } else { coordinates(batch, "z", "z") };
        let begin = if batch.is_empty() { "0u".to_string() } else { position(&factor.batch, 0, "z") };
        let at = match (factor.in_blocks, name) {
            (false, _) => format!("{begin} + {row} * {}u + {column} * {}u", factor.row, factor.column),
            (true, "a_at") => {
                let within = if has_lanes { "k * 8u" } else { "k / 4u * 32u + k % 4u" };
                format!("{begin} + m / 8u * {}u + {within} + m % 8u * 4u", 8 * k)
            }
            (true, _) => format!("{begin} + n / 32u * {}u + k * 32u + n % 32u", 32 * k),
        };
        let (of, value) = match has_lanes {
            false => ("f32", format!("{}({at})", text.function(&factor.operand))),
            true => {
                let quads = if factor.has_quads() { text.quads(&factor.operand) } else { None };
                let four = || {
                    let (load, stride) = (text.function(&factor.operand), factor.column);
                    let each = (0..4).map(|j| format!("{load}(i + {}u)", j * stride)).collect::<Vec<_>>().join(", ");
                    format!("vec4<f32>({each})")
                };
                ("vec4<f32>", quads.map_or_else(four, |quad| format!("{quad}(i / 4u)")))
            }
        };
        let value = if has_lanes { format!("let i = {at};\nreturn {value}") } else { format!("return {value}") };
        let _ = writeln!(kernel, "fn {name}(z: u32, {row}: u32, {column}: u32) -> {of} {{\n{statements}{value};\n}}");
    }
    kernel += &match in_columns {
        false => finish(&mut text, to, dtype, n, epilogue, has_lanes),
        true => finish_in_columns(&mut text, to, [m, n], has_lanes),
    };
    let cost = |factor: &Factor| if factor.has_quads() { LOAD_QUAD } else { LOAD_FOUR };
    let lanes = has_lanes.then(|| Lanes::of([m, n, k, count], [cost(left), cost(right)], 2));
    let (template, group, rows, wide) = match &lanes {
        Some(lanes) => (wgsl::PRODUCT_LANES, lanes.group, 8 * lanes.octets, 4),
        None => (wgsl::PRODUCT, group_size(b, n), rows(m), 1),
    };
    let numbers = [("N", n), ("M", m), ("K", k), ("ROWS", rows), ("GROUP", group), ("LAST_ROW", m - 1)];
    let numbers = [&numbers[..], &[("OCTETS", rows / 8), ("WHOLE", k / 4 * 4), ("REST", k % 4)]].concat();
    let parameters: Vec<(&str, String)> = numbers.into_iter().map(|(name, value)| (name, value.to_string())).collect();
    let groups = [n.div_ceil(group * wide), m.div_ceil(rows), count].map(|n| n as u32);
    let mut ways = tiles::ways(b, [m, n, k, count]);
    ways.push(Main { text: wgsl::expand(template, &parameters), groups });
    let name = if b.kernel.is_empty() { "matrix product" } else { b.kernel };
    b.push_fastest(text, &kernel, ways, name, product.work())
}

/// `element(i, bias, x)`: the result's element `i`, a float, of the sum `x` and what its row adds; and `bias_of(row)`.
pub(super) fn element(text: &mut Text, dtype: DType, epilogue: &Epilogue) -> String {
    let mut body = match epilogue.alpha {
        1.0 => "var x = sum + bias;\n".to_string(),
        alpha => format!("var x = sum * {} + bias;\n", float(alpha)),
    };
    for Added { statements, index, factor, operand } in &epilogue.added {
        let load = text.function(operand);
        let factor = if *factor == 1.0 { String::new() } else { format!("{} * ", float(*factor)) };
        let _ = writeln!(body, "{{\n{statements}x = x + {factor}{load}({index});\n}}");
    }
    let bias = match &epilogue.bias {
        Some((operand, count)) => format!("{}(row % {count}u)", text.function(operand)),
        None => "0.0".to_string(),
    };
    let value = if code::is_byte(dtype) { epilogue.function.clone() } else { wrapped(dtype, &epilogue.function) };
    format!(
        "fn bias_of(row: u32) -> f32 {{ return {bias}; }}\nfn element(i: u32, bias: f32, sum: f32) -> f32 {{\n{body}return {value};\n}}\n"
    )
}

/// [`element`], and `finish(i, x)`, which stores it; with `has_lanes` `finish(row, n, x)`, which stores columns `n` to `n + 3` of a row of
/// `columns`, as far as there are such.
pub(super) fn finish(
    text: &mut Text,
    to: BufferId,
    dtype: DType,
    columns: usize,
    epilogue: &Epilogue,
    has_lanes: bool,
) -> String {
    let element = element(text, dtype, epilogue);
    if !has_lanes {
        let store = text.store(to, code::storage_type(dtype));
        let value = stored(dtype, &format!("element(i, bias_of(i / {columns}u), sum)"));
        return format!("{element}fn finish(i: u32, sum: f32) {{ {store}(i, {value}); }}\n");
    }
    let store = store_row(text, to, dtype, columns, 4, ["n", "x"]);
    format!("{element}fn finish(row: u32, n: u32, x: vec4<f32>) {{\nlet i = row * {columns}u + n;\n{store}}}\n")
}

/// As [`finish`], of a sum as it is, into `[matrix][n / 4][m][4]`.
fn finish_in_columns(text: &mut Text, to: BufferId, [m, n]: [usize; 2], has_lanes: bool) -> String {
    let quad = format!("(row / {m}u * {}u + n / 4u) * {m}u + row % {m}u", n / 4);
    if has_lanes {
        let store = text.store(to, "vec4<f32>");
        return format!("fn finish(row: u32, n: u32, x: vec4<f32>) {{ {store}({quad}, x); }}\n");
    }
    let store = text.store(to, "f32");
    format!(
        "fn finish(i: u32, x: f32) {{\nlet row = i / {n}u;\nlet n = i % {n}u;\n{store}(({quad}) * 4u + n % 4u, x);\n}}\n"
    )
}

/// `value`, a float, as an element of `dtype` in memory, of a float's type or a byte's.
pub(super) fn stored_float(dtype: DType, value: &str) -> String {
    match dtype {
        DType::U8 => format!("u32({value})"),
        DType::I8 => format!("i32({value})"),
        _ => stored(dtype, value),
    }
}

/// Statements that store `count` neighbours of row `row`, of `columns`, from column `{at}` on, element `i` of the result, of the sums `{sums}`.
/// Bytes come by fours, and so do their columns.
pub(super) fn store_row(
    text: &mut Text,
    to: BufferId,
    dtype: DType,
    columns: usize,
    count: usize,
    [at, sums]: [&str; 2],
) -> String {
    let element = |j: usize| format!("element(i + {j}u, bias, {sums}[{j}])");
    if dtype == DType::F32 && columns.is_multiple_of(4) && count == 4 {
        let store = text.store(to, "vec4<f32>");
        let each = (0..4).map(element).collect::<Vec<_>>().join(", ");
        return format!("let bias = bias_of(row);\n{store}(i / 4u, vec4<f32>({each}));\n");
    }
    if code::is_byte(dtype) {
        let store = text.store(to, "u32");
        let byte = |j: usize| format!("({} << {}u)", code::byte(dtype, &stored_float(dtype, &element(j))), 8 * j);
        let word = (0..4).map(byte).collect::<Vec<_>>().join(" | ");
        return format!("let bias = bias_of(row);\n{store}(i / 4u, {word});\n");
    }
    let store = text.store(to, code::storage_type(dtype));
    let one = |j: usize| {
        let value = stored(dtype, &element(j));
        format!("if ({at} + {j}u < {columns}u) {{ {store}(i + {j}u, {value}); }}\n")
    };
    "let bias = bias_of(row);\n".to_string() + &(0..count).map(one).collect::<String>()
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
    let left = Factor { operand: x, batch: vec![0], row: features, column: 1, in_blocks: false };
    let right = Factor { operand, batch: vec![rows * features], row, column, in_blocks: false };
    let mut added = Vec::new();
    if let Some(bias) = bias {
        let index = format!("i / {}u * {}u + i % {rows}u", count * rows, 2 * rows);
        added.push(Added { statements: String::new(), index, factor: 1.0, operand: b.operand(bias)? });
    }
    let epilogue = Epilogue { alpha: 1.0, bias: None, added, function: "x".to_string() };
    let to = b.scratch(directions * count * rows);
    let (sizes, batch) = ([count, rows, features], &[directions]);
    let dtype = DType::F32;
    multiply_by_any(b, &Product { to, dtype, sizes, batch, left: &left, right: &right, epilogue: &epilogue })?;
    Ok(Operand::Buffer(to, DType::F32))
}
