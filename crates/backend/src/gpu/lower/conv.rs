//! Convolutions with constant filters: by Winograd's minimal filtering, as products, and as direct sums.

use super::{
    super::{
        code::{Operand, Text},
        plan::{BufferId, Builder, Unable},
    },
    bytes, depthwise,
    elementwise::{activation_text, is_float},
    product::{
        Added, Epilogue, Factor, LOAD_FOUR, LOAD_QUAD, Lanes, Product, columns_in_blocks, element, finish, group_size,
        multiply_into, multiply_into_columns, rows, rows_in_blocks, store_row,
    },
    tiles, written,
};
use crate::{Numerics, Precision, Work};
use cutover_graph::{
    Constant, Node, ValueId,
    ops::{Conv, WindowAxis},
};
use cutover_kernels::{
    cpu::{
        conv::{Axis, ConvShape, Operands},
        winograd::{self, WinogradTile},
    },
    wgsl,
};
use cutover_tensor::{DType, Shape, Tensor};
use std::fmt::Write;

/// A convolution over one or two axes.
pub(super) struct Problem {
    pub x: Operand,
    pub filters: ValueId,
    /// What they are, where that is known.
    pub constant: Option<Constant>,
    pub samples: usize,
    pub groups: usize,
    /// Channels of a group, in and out.
    pub inner: usize,
    pub per_group: usize,
    pub vertical: WindowAxis,
    pub horizontal: WindowAxis,
    pub to: BufferId,
    /// Of the results in memory.
    pub dtype: DType,
    pub epilogue: Epilogue,
    pub work: Work,
}

impl Problem {
    /// The product that gives its results.
    fn product<'a>(
        &'a self,
        sizes: [usize; 3],
        batch: &'a [usize],
        left: &'a Factor,
        right: &'a Factor,
    ) -> Product<'a> {
        Product { to: self.to, dtype: self.dtype, sizes, batch, left, right, epilogue: &self.epilogue }
    }

    pub fn pixels(&self) -> usize {
        self.vertical.output * self.horizontal.output
    }

    pub fn channels(&self) -> usize {
        self.per_group * self.groups
    }
}

/// A convolution over one or two axes; `false` for others, and where its filters are not constant and no kernel was written by hand.
pub(super) fn lower(b: &mut Builder<'_>, node: &Node, op: &Conv) -> Result<bool, Unable> {
    let (x, w, output) = (super::input(node, 0)?, super::input(node, 1)?, node.outputs[0]);
    let (shape, filters, dtype) = (b.shape(x), b.shape(w), b.dtype(x));
    if !is_float(dtype) || b.dtype(w) != dtype || !matches!(shape.rank(), 3 | 4) || filters[1..].contains(&0) {
        return Ok(false);
    }
    let axes = op.window.axes(&shape[2..], &filters[2..]).map_err(|error| error.to_string())?;
    let one = WindowAxis { input: 1, output: 1, kernel: 1, stride: 1, dilation: 1, pad_begin: 0, pad_end: 0 };
    let [vertical, horizontal] = if axes.len() == 2 { [axes[0], axes[1]] } else { [one, axes[0]] };
    let (inner, per_group) = (filters[1], filters[0] / op.group);
    let operations = 2 * (b.count(output) * inner * vertical.kernel * horizontal.kernel) as u64;
    let bytes = 4 * (b.count(x) + b.count(w) + b.count(output)) as u64;
    let bias = match node.inputs.get(2).copied().flatten() {
        Some(bias) => Some((b.operand(bias)?, filters[0])),
        None => None,
    };
    let mut added = Vec::new();
    if let Some(residual) = node.inputs.get(3).copied().flatten() {
        // Seen by planes, whatever way it lies.
        let operand = if b.by_channels(residual).is_some() { b.operand(residual)? } else { b.reread(residual)? };
        added.push(Added { statements: String::new(), index: "i".into(), factor: 1.0, operand });
    }
    let epilogue = Epilogue { alpha: 1.0, bias, added, function: activation_text(op.activation, "x") };
    if bytes::lower_conv(b, node, &op.window, op.group, &epilogue)? {
        return Ok(true);
    }
    let constant = b.constant(w).or_else(|| bytes::dequantized_constant(b, w)).map(|constant| b.weights(constant));
    if constant.is_none() && b.gpu.written.is_none() {
        return Ok(false);
    }
    let (to, stored_as) = b.output_stored(output)?;
    let mut problem = Problem {
        x: b.operand(x)?,
        filters: w,
        constant: constant.clone(),
        samples: shape[0],
        groups: op.group,
        inner,
        per_group,
        vertical,
        horizontal,
        to,
        dtype: stored_as,
        epilogue,
        work: Work { operations, bytes, ..Work::default() },
    };
    if written::convolution_by_channels(b, &problem, [x, output])? {
        return Ok(true);
    }
    // Of a few channels a group, as depthwise, a subgroup has nothing to share: there an element is read a few times, as the byte it is.
    let is_few = b.gpu.has_lanes && per_group < 4;
    if !(is_few && op.group > 1 && bytes::is_dequantized(b, x)) {
        problem.x = b.reread(x)?;
    }
    if written::convolution(b, &problem)? {
        return Ok(true);
    }
    let Some(filters) = constant.filter(|_| horizontal.kernel <= 32 && vertical.kernel <= 32) else {
        return Ok(false);
    };
    if is_pointwise(&problem) {
        return as_product(b, &problem, &filters).map(|()| true);
    }
    if let Some(tile) = tile_for(b, &problem) {
        return by_tiles(b, &problem, &filters, tile).map(|()| true);
    }
    if b.gpu.has_lanes && is_worth_unfolding(b, &problem) {
        return unfolded(b, &problem, &filters).map(|()| true);
    }
    if shared(b, &problem, &filters)? {
        return Ok(true);
    }
    if is_few
        && problem.horizontal.output.is_multiple_of(4)
        && let Some(quantized) = bytes::quantized(b, output)?
    {
        problem.epilogue = quantized.after(&problem.epilogue);
        problem.dtype = b.dtype(quantized.output);
        problem.to = b.output_bytes(quantized.output);
        b.fuse([quantized.node]);
    }
    match b.gpu.has_lanes {
        true if is_few && depthwise::fits(&problem) => depthwise::convolve(b, &problem, &filters),
        true if is_few => direct_few(b, &problem, &filters),
        true => direct_lanes(b, &problem, &filters),
        false => direct(b, &problem, &filters),
    }?;
    Ok(true)
}

/// One tap that meets every pixel.
fn is_pointwise(p: &Problem) -> bool {
    let is = |axis: &WindowAxis| axis.kernel == 1 && axis.stride == 1 && axis.input == axis.output;
    p.groups == 1 && is(&p.vertical) && is(&p.horizontal)
}

/// `filters · x` of every sample.
fn as_product(b: &mut Builder<'_>, p: &Problem, constant: &Constant) -> Result<(), Unable> {
    let (pixels, rows) = (p.pixels(), p.channels());
    let in_blocks = b.gpu.has_lanes && constant.tensor.dtype() == DType::F32 && p.inner.is_multiple_of(4);
    let filters = match in_blocks {
        true => b.upload(constant, "rows by 8", |filters| rows_in_blocks(&floats(filters), rows))?,
        false => b.upload(constant, "plain", super::super::executable::to_device)?,
    };
    let left = Factor { operand: filters, batch: vec![0], row: p.inner, column: 1, in_blocks };
    let batch = vec![p.inner * pixels];
    let right = Factor { operand: p.x.clone(), batch, row: pixels, column: 1, in_blocks: false };
    multiply_into(b, &p.product([p.channels(), pixels, p.inner], &[p.samples], &left, &right))
}

/// The tile that Winograd's filtering is estimated fastest with, as on a processor; `None` where a direct sum is.
fn tile_for(b: &Builder<'_>, p: &Problem) -> Option<WinogradTile> {
    let is_whole = p.inner.is_multiple_of(4) && p.per_group.is_multiple_of(4);
    // Coefficients of filters in 16 bits would be no filters in 16 bits.
    if b.precision == Precision::F16
        || b.numerics == Numerics::Strict
        || p.groups != 1
        || p.dtype != DType::F32
        || !is_whole
    {
        return None;
    }
    let axis = |axis: &WindowAxis| Axis {
        input: axis.input,
        output: axis.output,
        kernel: axis.kernel,
        stride: axis.stride,
        dilation: axis.dilation,
        pad_before: axis.pad_begin,
        pad_after: axis.pad_end,
    };
    let shape = ConvShape {
        channels_in: p.inner,
        channels_out: p.per_group,
        groups: 1,
        height: axis(&p.vertical),
        width: axis(&p.horizontal),
        transposed: false,
    };
    let tile = winograd::choose(&shape, Operands::F32, WinogradTile::Four)?;
    // The coefficients have to fit in, as a whole.
    let floats = coefficients(tile) * tiles(p, tile).next_multiple_of(8) * p.inner.max(p.per_group);
    (4 * floats as u64 <= b.gpu.binding_bytes).then_some(tile)
}

fn coefficients(tile: WinogradTile) -> usize {
    (tile.outputs() + 2).pow(2)
}

fn tiles(p: &Problem, tile: WinogradTile) -> usize {
    p.samples * p.vertical.output.div_ceil(tile.outputs()) * p.horizontal.output.div_ceil(tile.outputs())
}

/// Transformed tiles times transformed filters, a product for each coefficient, transformed back.
fn by_tiles(b: &mut Builder<'_>, p: &Problem, constant: &Constant, tile: WinogradTile) -> Result<(), Unable> {
    b.kernel = "Winograd products";
    let (side, count, coefficients) = (tile.outputs(), tiles(p, tile), coefficients(tile));
    // Neighbouring invocations have neighbouring tiles, and both factors lie in blocks.
    let (rows, columns) = (count.next_multiple_of(8), p.per_group.next_multiple_of(32));
    let of_row = p.horizontal.output.div_ceil(side);
    let group = 64;
    let common = [
        ("GROUP", group),
        ("SIDE", side),
        ("POINTS", side + 2),
        ("TILES", count),
        ("TILES_OF_ROW", of_row),
        ("TILES_OF_SAMPLE", count / p.samples.max(1)),
    ];
    let expand = |template: &str, numbers: &[(&'static str, usize)]| {
        let numbers = common.iter().chain(numbers);
        let parameters: Vec<_> = numbers.map(|&(name, value)| (name, value.to_string())).collect();
        wgsl::expand(template, &parameters)
    };
    let transforms = if side == 2 { wgsl::WINOGRAD_TWO } else { wgsl::WINOGRAD_FOUR };
    let groups = |tiles: usize, quads: usize| [(tiles * quads).div_ceil(group) as u32, 1, 1];
    let spread = b.scratch(coefficients * rows * p.inner);
    let mut text = Text::default();
    let load = text.function(&p.x);
    let array = text.bind(spread, "vec4<f32>", true);
    let numbers = [
        ("CHANNELS", p.inner),
        ("QUADS", p.inner / 4),
        ("ROWS", rows),
        ("IN_H", p.vertical.input),
        ("IN_W", p.horizontal.input),
        ("PAD_Y", p.vertical.pad_begin),
        ("PAD_X", p.horizontal.pad_begin),
    ];
    let main = expand(wgsl::WINOGRAD_INPUT, &numbers).replace("coefficients[", &format!("{array}["));
    let kernel = format!("fn x_at(i: u32) -> f32 {{ return {load}(i); }}\n{transforms}{main}");
    b.push(text, &kernel, groups(rows, p.inner / 4), "Winograd tiles", Work::default())?;

    let sizes = [p.per_group, p.inner];
    let recipe = if side == 2 { "winograd two" } else { "winograd four" };
    let filters = b.upload(constant, recipe, |filters| {
        columns_in_blocks(&winograd::filter_coefficients(tile, sizes, &floats(filters)), p.inner, p.per_group)
    })?;
    let products = b.scratch(coefficients * count * p.per_group);
    let spread = Operand::Buffer(spread, DType::F32);
    let factor = |operand, floats: usize, row| Factor { operand, batch: vec![floats], row, column: 1, in_blocks: true };
    let left = factor(spread, rows * p.inner, p.inner);
    let right = factor(filters, p.inner * columns, p.per_group);
    let plain = Epilogue { alpha: 1.0, bias: None, added: Vec::new(), function: "x".to_string() };
    let (sizes, batch) = ([count, p.per_group, p.inner], &[coefficients]);
    let (to, dtype) = (products, DType::F32);
    multiply_into_columns(b, &Product { to, dtype, sizes, batch, left: &left, right: &right, epilogue: &plain })?;

    let mut text = Text::default();
    let quad = text.quads(&Operand::Buffer(products, DType::F32)).ok_or("products in memory")?;
    let (height, width) = (p.vertical.output, p.horizontal.output);
    let mut kernel = format!("fn m_at(i: u32) -> vec4<f32> {{ return {quad}(i); }}\n{transforms}");
    kernel += &element(&mut text, p.dtype, &p.epilogue);
    let store = store_row(&mut text, p.to, p.dtype, width, side, ["x", "sums"]);
    let _ = writeln!(
        kernel,
        "fn finish(row: u32, y: u32, x: u32, sums: array<f32, {side}>) {{\nlet i = (row * {height}u + y) * {width}u + x;\n{store}}}"
    );
    kernel +=
        &expand(wgsl::WINOGRAD_OUTPUT, &[("CHANNELS", p.per_group), ("QUADS", p.per_group / 4), ("OUT_H", height)]);
    b.push(text, &kernel, groups(count, p.per_group / 4), "Winograd convolution", p.work)
}

/// Output channels for which an input that is written once more, as what each tap meets, is read so much faster that it pays. Estimated from
/// what loads and stores cost where a subgroup shares what it loads.
const UNFOLDED_CHANNELS: usize = 32;

fn is_worth_unfolding(b: &Builder<'_>, p: &Problem) -> bool {
    let floats = p.samples * unfolded_depth(p) * p.pixels().next_multiple_of(32);
    p.groups == 1 && p.per_group >= UNFOLDED_CHANNELS && 4 * floats as u64 <= b.gpu.binding_bytes
}

fn unfolded_depth(p: &Problem) -> usize {
    (p.inner * p.vertical.kernel * p.horizontal.kernel).next_multiple_of(4)
}

/// What each tap meets, written out, as the second factor of a product with the filters.
fn unfolded(b: &mut Builder<'_>, p: &Problem, constant: &Constant) -> Result<(), Unable> {
    let (depth, pixels, taps) = (unfolded_depth(p), p.pixels(), p.vertical.kernel * p.horizontal.kernel);
    let width = pixels.next_multiple_of(32);
    let group = group_size(b, width / 4);
    let patches = b.scratch(p.samples * depth * width);
    let mut text = Text::default();
    let load = text.function(&p.x);
    let array = text.bind(patches, "vec4<f32>", true);
    let mut parameters = numbers(p, group, 1);
    let sizes = [("QUADS", width / 4), ("TAPS", taps), ("DEPTH", depth), ("REST", depth - p.inner * taps)];
    parameters.extend(sizes.map(|(name, n)| (name, n.to_string())));
    let main = wgsl::expand(wgsl::UNFOLD, &parameters).replace("patches[", &format!("{array}["));
    let kernel = format!("fn x_at(i: u32) -> f32 {{ return {load}(i); }}\n{main}");
    let groups = [(width / 4).div_ceil(group), p.inner, p.samples].map(|n| n as u32);
    b.push(text, &kernel, groups, "unfolding", Work::default())?;

    let rows = p.per_group;
    let filters = b.upload(constant, "rows by 8", |filters| rows_in_blocks(&floats(filters), rows))?;
    let Operand::Buffer(filters, _) = filters else { return Err("filters in memory".into()) };
    let factor = |buffer, floats: usize, row| {
        let operand = Operand::Buffer(buffer, DType::F32);
        Factor { operand, batch: vec![floats], row, column: 1, in_blocks: true }
    };
    let (left, right) = (factor(filters, 0, depth), factor(patches, depth * width, width));
    multiply_into(b, &p.product([rows, pixels, depth], &[p.samples], &left, &right))
}

/// The names and numbers that both templates of direct sums have.
fn numbers(p: &Problem, group: usize, rows: usize) -> Vec<(&'static str, String)> {
    let (vertical, horizontal) = (&p.vertical, &p.horizontal);
    let numbers = [
        ("ROWS", rows),
        ("GROUP", group),
        ("GROUPS", p.groups),
        ("PER_GROUP", p.per_group),
        ("INNER", p.inner),
        ("CHANNELS", p.channels()),
        ("PIXELS", p.pixels()),
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
    numbers.into_iter().map(|(name, value)| (name, value.to_string())).collect()
}

fn direct_lanes(b: &mut Builder<'_>, p: &Problem, constant: &Constant) -> Result<(), Unable> {
    let (pixels, taps) = (p.pixels(), p.vertical.kernel * p.horizontal.kernel);
    let (quads, matrices) = (p.inner.div_ceil(4), p.samples * p.groups);
    let lanes = Lanes::of([p.per_group, pixels, 4 * quads * taps, matrices], [LOAD_QUAD, LOAD_FOUR], 4);
    let rows = 8 * lanes.octets;
    let shape = b.shape(p.filters);
    let weights = b.upload(constant, "taps, channels by fours", |filters| by_fours(filters, &shape))?;
    let Operand::Buffer(weights, _) = weights else { return Err("filters in memory".into()) };
    let mut text = Text::default();
    let load_x = text.function(&p.x);
    let load_w = text.quads(&Operand::Buffer(weights, DType::F32)).ok_or("filters in memory")?;
    let mut kernel = format!(
        "fn x_at(i: u32) -> f32 {{ return {load_x}(i); }}\nfn w_at(i: u32) -> vec4<f32> {{ return {load_w}(i); }}\n"
    );
    kernel += &finish(&mut text, p.to, p.dtype, pixels, &p.epilogue, true);
    let is_channel = match p.inner.is_multiple_of(4) {
        true => "inside".to_string(),
        false => format!("inside & vec4<bool>(c * 4u + {{j}}u < {}u)", p.inner),
    };
    let mut parameters = vec![("IS_CHANNEL", is_channel), ("OCTETS", lanes.octets.to_string())];
    parameters.push(("QUADS", quads.to_string()));
    parameters.extend(numbers(p, lanes.group, rows));
    kernel += &wgsl::expand(wgsl::CONV_LANES, &parameters);
    let groups = [pixels.div_ceil(4 * lanes.group), p.per_group.div_ceil(rows), matrices].map(|n| n as u32);
    b.push(text, &kernel, groups, "convolution", p.work)
}

/// Four pixels of one channel an invocation.
fn direct_few(b: &mut Builder<'_>, p: &Problem, constant: &Constant) -> Result<(), Unable> {
    let (pixels, depth) = (p.pixels(), unfolded_depth(p));
    let (quads, rows) = (pixels.div_ceil(4), p.channels());
    let group = group_size(b, quads);
    let filters = b.upload(constant, "rows by fours", |filters| rows_by_fours(filters, rows))?;
    let Operand::Buffer(filters, _) = filters else { return Err("filters in memory".into()) };
    let mut text = Text::default();
    let load_x = text.function(&p.x);
    let load_w = text.quads(&Operand::Buffer(filters, DType::F32)).ok_or("filters in memory")?;
    let mut kernel = format!(
        "fn x_at(i: u32) -> f32 {{ return {load_x}(i); }}\nfn w_at(i: u32) -> vec4<f32> {{ return {load_w}(i); }}\n"
    );
    kernel += &finish(&mut text, p.to, p.dtype, pixels, &p.epilogue, true);
    let taps = p.vertical.kernel * p.horizontal.kernel;
    let mut parameters = numbers(p, group, 1);
    parameters.extend(
        [("TAPS", taps), ("TERMS", p.inner * taps), ("QUADS", depth / 4)].map(|(name, n)| (name, n.to_string())),
    );
    kernel += &wgsl::expand(wgsl::CONV_FEW_LANES, &parameters);
    let groups = [quads.div_ceil(group), rows, p.samples].map(|n| n as u32);
    b.push(text, &kernel, groups, "convolution", p.work)
}

/// As a product with what the taps meet, which is gathered as tiles are loaded; `false` where it fills none.
fn shared(b: &mut Builder<'_>, p: &Problem, constant: &Constant) -> Result<bool, Unable> {
    let (taps, pixels) = (p.vertical.kernel * p.horizontal.kernel, p.pixels());
    let depth = p.inner * taps;
    let ways = tiles::ways(b, [p.per_group, pixels, depth, p.samples * p.groups]);
    if ways.is_empty() {
        return Ok(false);
    }
    let filters = b.upload(constant, "plain", super::super::executable::to_device)?;
    let mut text = Text::default();
    let (load_x, load_w) = (text.function(&p.x), text.function(&filters));
    let at = |axis: &WindowAxis, out: &str, tap: &str| {
        format!("{out} * {}u + {tap} * {}u - {}u", axis.stride, axis.dilation, axis.pad_begin)
    };
    let (across, out) = (p.horizontal.kernel, p.horizontal.output);
    let y = at(&p.vertical, &format!("n / {out}u"), &format!("k % {taps}u / {across}u"));
    let x = at(&p.horizontal, &format!("n % {out}u"), &format!("k % {across}u"));
    let (height, width) = (p.vertical.input, p.horizontal.input);
    // What lies above or left of the input wraps around and is beyond its other edge.
    let mut kernel = format!(
        "fn a_at(z: u32, m: u32, k: u32) -> f32 {{ return {load_w}((z % {}u * {}u + m) * {depth}u + k); }}\nfn b_at(z: u32, k: u32, n: u32) -> f32 {{\nlet y = {y};\nlet x = {x};\nlet is_inside = y < {height}u && x < {width}u;\nlet i = ((z * {}u + k / {taps}u) * {height}u + y) * {width}u + x;\nreturn select(0.0, {load_x}(select(0u, i, is_inside)), is_inside);\n}}\n",
        p.groups, p.per_group, p.inner
    );
    kernel += &finish(&mut text, p.to, p.dtype, pixels, &p.epilogue, false);
    b.push_fastest(text, &kernel, ways, "convolution", p.work).map(|()| true)
}

fn direct(b: &mut Builder<'_>, p: &Problem, constant: &Constant) -> Result<(), Unable> {
    let (pixels, rows) = (p.pixels(), rows(p.per_group));
    let (group, blocks) = (group_size(b, pixels), p.per_group.div_ceil(rows));
    let packed = pack(constant, p.groups, rows)?;
    let weights = b.upload(&packed, "plain", super::super::executable::to_device)?;
    let mut text = Text::default();
    let (load_x, load_w) = (text.function(&p.x), text.function(&weights));
    let mut kernel =
        format!("fn x_at(i: u32) -> f32 {{ return {load_x}(i); }}\nfn w_at(i: u32) -> f32 {{ return {load_w}(i); }}\n");
    kernel += &finish(&mut text, p.to, p.dtype, pixels, &p.epilogue, false);
    // Where the last window ends inside the input, no tap is outside.
    let last = |axis: &WindowAxis| (axis.output - 1) * axis.stride + (axis.kernel - 1) * axis.dilation;
    let is_inside = |axis: &WindowAxis| axis.pad_begin == 0 && last(axis) < axis.input;
    let condition = match (is_inside(&p.vertical), is_inside(&p.horizontal)) {
        (true, true) => "true",
        (true, false) => "is_column{s}",
        (false, true) => "is_y",
        (false, false) => "is_y && is_column{s}",
    };
    let mut parameters = vec![("IS_INSIDE", condition.to_string()), ("BLOCKS", blocks.to_string())];
    parameters.extend(numbers(p, group, rows));
    kernel += &wgsl::expand(wgsl::CONV, &parameters);
    let groups = [pixels.div_ceil(group), blocks, p.samples * p.groups].map(|n| n as u32);
    b.push(text, &kernel, groups, "convolution", p.work)
}

/// A tensor's elements as f32.
pub(super) fn floats(tensor: &Tensor) -> Vec<f32> {
    let halves = |widen: fn([u8; 2]) -> f32| tensor.bytes().chunks_exact(2).map(|b| widen([b[0], b[1]])).collect();
    match tensor.dtype() {
        DType::F16 => halves(|bytes| half::f16::from_le_bytes(bytes).to_f32()),
        DType::BF16 => halves(|bytes| half::bf16::from_le_bytes(bytes).to_f32()),
        _ => tensor.bytes().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// Filters `[O, I, …]` as f32 `[O][tap][I, by fours]`, what a four lacks filled with zeros.
fn by_fours(filters: &Tensor, shape: &Shape) -> Vec<u8> {
    let (inner, taps) = (shape[1], shape[2..].iter().product::<usize>());
    let depth = inner.next_multiple_of(4);
    let mut packed = vec![0.0f32; shape[0] * taps * depth];
    for (at, value) in floats(filters).into_iter().enumerate() {
        let (row, tap) = (at / taps, at % taps);
        packed[(row / inner * taps + tap) * depth + row % inner] = value;
    }
    bytemuck::cast_slice(&packed).to_vec()
}

/// Filters `[rows, …]` as f32, rows filled up to fours with zeros.
pub(super) fn rows_by_fours(filters: &Tensor, rows: usize) -> Vec<u8> {
    let values = floats(filters);
    let depth = values.len() / rows;
    let mut packed = vec![0.0f32; rows * depth.next_multiple_of(4)];
    for (to, from) in packed.chunks_exact_mut(depth.next_multiple_of(4)).zip(values.chunks_exact(depth)) {
        to[..depth].copy_from_slice(from);
    }
    bytemuck::cast_slice(&packed).to_vec()
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
