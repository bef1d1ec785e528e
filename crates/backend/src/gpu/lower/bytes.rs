//! Products of bytes: exact sums, four terms a word, of what a convolution or a matrix product meets.
//!
//! Both factors are packed by fours along the axis that is summed over, as signed bytes: of unsigned ones, and their zero points, 128 is
//! taken. With these `a` and `b`, `Σ (a − p)(b − q) = Σ a·b − p Σ b − q Σ a + k·p·q`; the sums of one factor are made once. A dequantized
//! value (`DequantizeLinear`, whatever shape it is seen under) is a factor too, so a network of quantizations multiplies bytes.

mod channels;

pub(super) use channels::keep_picture;

use super::{
    super::{
        code::{self, Function, Operand, Text, float},
        plan::{BufferId, Builder, Unable},
    },
    product::{Epilogue, LOAD_FOUR, Lanes, batch_of, element, group_size, stored_float},
    quantized::{bounds, given, is_byte},
    reduce::computed,
    written,
};
use crate::{Work, attention::Known};
use cutover_graph::{
    Constant, Node, NodeId, Op, ValueId,
    ops::{Window, WindowAxis, normalize_axis},
};
use cutover_kernels::wgsl;
use cutover_tensor::{DType, Tensor};

/// Terms of a sum: products of bytes stay below 2^16.
const MOST_TERMS: usize = 1 << 15;

/// A value of the graph, or something that was computed for one.
#[derive(Clone)]
pub(super) enum Given {
    Value(ValueId),
    /// One number, where it is a zero point.
    Computed(Operand),
}

/// Bytes, and the one zero point or one for each row or column that is taken from them.
#[derive(Clone)]
pub(super) struct Bytes {
    of: Given,
    dtype: DType,
    zero: Option<Given>,
}

impl Bytes {
    pub fn new(b: &Builder<'_>, id: ValueId, zero: Option<ValueId>) -> Bytes {
        Bytes { of: Given::Value(id), dtype: b.dtype(id), zero: zero.map(Given::Value) }
    }

    /// Unsigned bytes that were computed, and their zero point.
    pub fn computed(bytes: Operand, zero: Operand) -> Bytes {
        Bytes { of: Given::Computed(bytes), dtype: DType::U8, zero: Some(Given::Computed(zero)) }
    }

    /// Whether there is one zero point, or `count` in a row.
    fn has_zeros(&self, b: &Builder<'_>, count: usize) -> bool {
        match self.zero {
            Some(Given::Value(id)) => b.count(id) == 1 || b.shape(id).rank() == 1 && b.count(id) == count,
            _ => true,
        }
    }

    fn is_constant(&self, b: &Builder<'_>) -> bool {
        matches!(self.of, Given::Value(id) if b.constant(id).is_some())
    }

    /// What is taken from unsigned bytes so that they are signed ones.
    fn shift(&self) -> i32 {
        if self.dtype == DType::U8 { 128 } else { 0 }
    }
}

/// A value that a dequantization gives.
pub(super) struct Dequantized {
    pub id: ValueId,
    pub bytes: Bytes,
    pub scale: ValueId,
    /// That a scale and a zero point is for each of; one for all without it.
    pub axis: Option<usize>,
}

impl Dequantized {
    /// The bytes, and their zero point.
    fn pair(&self) -> (ValueId, Option<ValueId>) {
        let zero = match self.bytes.zero {
            Some(Given::Value(id)) => Some(id),
            _ => None,
        };
        (self.id, zero)
    }
}

/// Where the bytes of `id` come from, seen as floats: with one scale, through other shapes as well.
pub(super) fn dequantized(b: &Builder<'_>, id: ValueId) -> Option<Dequantized> {
    let node = b.graph.node(b.graph.producer(id)?.0);
    match &node.op {
        Op::DequantizeLinear(op) => {
            let (x, scale, zero) = (given(node, 0)?, given(node, 1)?, given(node, 2));
            let is_f32 = [scale, id].iter().all(|&id| b.dtype(id) == DType::F32);
            let axis = match b.count(scale) {
                1 => None,
                _ => Some(normalize_axis(op.granularity.axis, b.shape(x).rank()).ok()?),
            };
            let fits = is_byte(b.dtype(x)) && is_f32 && (axis.is_none() || op.granularity.block_size == 0);
            fits.then(|| Dequantized { id: x, bytes: Bytes::new(b, x, zero), scale, axis })
        }
        Op::Reshape(_) | Op::Flatten(_) | Op::Squeeze(_) | Op::Unsqueeze(_) | Op::Identity(_) => {
            dequantized(b, given(node, 0)?).filter(|of| of.axis.is_none())
        }
        _ => None,
    }
}

/// A tensor as `[outer][terms][inner]`, whose middle axis is summed over.
#[derive(Clone, Copy, Debug)]
struct Extents {
    outer: usize,
    terms: usize,
    inner: usize,
}

impl Extents {
    fn words(&self) -> usize {
        self.terms.div_ceil(4)
    }

    /// `tensor`'s elements as words `[outer][words][inner]`.
    fn pack(&self, tensor: &Tensor) -> Vec<u8> {
        let (flip, words) = (if tensor.dtype() == DType::U8 { 0x80 } else { 0 }, self.words());
        let mut packed = vec![0; 4 * self.outer * words * self.inner];
        for (at, &byte) in tensor.bytes().iter().enumerate() {
            let (outer, term, inner) = (at / (self.terms * self.inner), at / self.inner % self.terms, at % self.inner);
            packed[4 * ((outer * words + term / 4) * self.inner + inner) + term % 4] = byte ^ flip;
        }
        packed
    }
}

/// A factor in memory, packed.
struct Packed {
    operand: Operand,
    extents: Extents,
}

fn pack(b: &mut Builder<'_>, bytes: &Bytes, extents: Extents, recipe: &'static str) -> Result<Packed, Unable> {
    let constant = match bytes.of {
        Given::Value(id) => b.constant(id),
        Given::Computed(_) => None,
    };
    if let Some(constant) = constant {
        let Operand::Buffer(buffer, _) = b.upload(&constant, recipe, |tensor| extents.pack(tensor))? else {
            return Err("a factor in memory".into());
        };
        return Ok(Packed { operand: Operand::Buffer(buffer, DType::U32), extents });
    }
    let operand = match &bytes.of {
        Given::Value(id) => b.operand(*id)?,
        Given::Computed(operand) => operand.clone(),
    };
    let (Extents { outer, terms, inner }, words) = (extents, extents.words());
    let flip = if bytes.shift() == 0 { "" } else { " ^ 0x80u" };
    let mut body = format!(
        "let word = i / {inner}u % {words}u;\nlet begin = (i / {}u * {terms}u + word * 4u) * {inner}u + i % {inner}u;\nvar packed = 0u;\n",
        words * inner
    );
    for j in 0..4 {
        let one = format!("packed = packed | ((u32($0(begin + {}u)){flip}) & 0xffu) << {}u;", j * inner, 8 * j);
        body += &match j < terms && terms.is_multiple_of(4) {
            true => format!("{one}\n"),
            false => format!("if (word * 4u + {j}u < {terms}u) {{ {one} }}\n"),
        };
    }
    let function = Function::new(DType::U32, body + "return packed;", vec![operand]);
    Ok(Packed { operand: computed(b, function, outer * words * inner)?, extents })
}

/// A zero point less the shift of its bytes, as an expression of `index`, the row's or column's number; `None` where it is 0.
fn zero_text(b: &mut Builder<'_>, text: &mut Text, bytes: &Bytes, index: &str) -> Result<Option<String>, Unable> {
    let shift = bytes.shift();
    let (operand, count) = match &bytes.zero {
        None if shift == 0 => return Ok(None),
        None => return Ok(Some(format!("i32({})", -shift))),
        Some(Given::Computed(operand)) => (operand.clone(), 1),
        Some(Given::Value(id)) => {
            let id = *id;
            if let Some(tensor) = b.known(id) {
                let first = tensor.bytes().first().copied().unwrap_or_default();
                let zero = if shift == 0 { i32::from(first as i8) } else { i32::from(first) };
                if tensor.bytes().iter().all(|&byte| byte == first) {
                    return Ok((zero != shift).then(|| format!("i32({})", zero - shift)));
                }
            }
            (b.reread(id)?, b.count(id))
        }
    };
    let index = if count == 1 { "0u" } else { index };
    Ok(Some(format!("(i32({}({index})) - {shift})", text.function(&operand))))
}

/// The sum over the terms of every line of a factor: `[outer][inner]`.
fn sums(b: &mut Builder<'_>, of: &Packed) -> Result<Operand, Unable> {
    let (Extents { outer, inner, .. }, words) = (of.extents, of.extents.words());
    let body = format!(
        "let begin = i / {inner}u * {}u + i % {inner}u;\nvar sum = 0;\nfor (var w = 0u; w < {words}u; w = w + 1u) {{ sum = sum + dot4I8Packed($0(begin + w * {inner}u), 0x01010101u); }}\nreturn sum;",
        words * inner
    );
    computed(b, Function::new(DType::I32, body, vec![of.operand.clone()]), outer * inner)
}

/// What becomes of the sums.
pub(super) enum Finish<'a> {
    /// They are the result.
    Sums,
    /// Floats, by a factor that is an expression of `row` and `n`, then as any product's.
    Floats { factor: String, epilogue: &'a Epilogue },
    /// Bytes again: a factor, a zero point, and what is added to the sum before, as expressions of `row` and `n`.
    Bytes { factor: String, zero: String, added: Option<String> },
}

/// A product, once its factors are found: expressions of `z`, `m`, `n` and `k`.
struct Sums<'a> {
    /// Rows, columns and words of a sum.
    sizes: [usize; 3],
    terms: usize,
    matrices: usize,
    /// Statements that return a word of row `m`, and one of column `n`.
    factors: [String; 2],
    /// Both where they are arrays of a line of words for each row, and each column.
    lines: Option<[Lines; 2]>,
    /// Of rows and of columns.
    zeros: [Option<String>; 2],
    /// Of a row's terms, and of a column's; asked for only where the other one's zero points are not 0.
    sums: [Option<String>; 2],
    finish: Finish<'a>,
    output: ValueId,
    work: Work,
}

/// A factor whose lines, of as many words as a sum has, follow each other.
pub(super) struct Lines {
    pub buffer: BufferId,
    /// Extents of the batch, and words from matrix to matrix along each.
    pub batch: (Vec<usize>, Vec<usize>),
}

/// What is stored, as an expression of `total`, `i`, `row` and `n`.
fn value_text(finish: &Finish<'_>, dtype: DType) -> Result<String, Unable> {
    Ok(match finish {
        Finish::Sums => "total".to_string(),
        Finish::Floats { factor, .. } => {
            stored_float(dtype, &format!("element(i, bias_of(row), f32(total) * ({factor}))"))
        }
        Finish::Bytes { factor, zero, added } => {
            let (low, high) = bounds(dtype)?;
            let of = code::value_type(dtype).unwrap_or("i32");
            let added = added.as_ref().map_or(String::new(), |added| format!(" + {added}"));
            format!(
                "{of}(clamp(i32(clamp(round(f32(total{added}) * ({factor})), -1000000000.0, 1000000000.0)) + {zero}, {low}, {high}))"
            )
        }
    })
}

fn push(b: &mut Builder<'_>, mut text: Text, sums: &Sums<'_>) -> Result<(), Unable> {
    let &Sums { sizes: [m, n, words], terms, matrices, ref factors, ref zeros, output, .. } = sums;
    let dtype = b.stored_as(output);
    let mut corrected = "sum".to_string();
    for (zero, of_other) in [(&zeros[0], &sums.sums[1]), (&zeros[1], &sums.sums[0])] {
        if let (Some(zero), Some(of_other)) = (zero, of_other) {
            corrected += &format!(" - {zero} * {of_other}");
        }
    }
    if let [Some(a), Some(b)] = zeros {
        corrected += &format!(" + {a} * {b} * {terms}");
    }
    let value = value_text(&sums.finish, dtype)?;
    let mut kernel = match &sums.finish {
        Finish::Floats { epilogue, .. } => element(&mut text, dtype, epilogue),
        _ => String::new(),
    };
    if let Some(lines) = &sums.lines {
        let element = format!(
            "{kernel}fn finish(i: u32, channel: u32, sum: i32) -> i32 {{\nlet row = i / {n}u;\nlet z = row / {m}u;\nlet m = row % {m}u;\nlet n = i % {n}u;\nlet total = {corrected};\nreturn bitcast<i32>({value});\n}}\n"
        );
        let is_word = code::storage_bytes(dtype) == 4;
        if is_word && written::has_product_of_bytes(b, [m, n, words], lines) {
            let to = b.output(output)?;
            return written::product_of_bytes(b, text, &element, [m, n, words], lines, (to, sums.work));
        }
    }
    let of = code::storage_type(dtype);
    kernel += &format!(
        "fn a_at(z: u32, m: u32, k: u32) -> u32 {{\n{}\n}}\nfn b_at(z: u32, k: u32, n: u32) -> u32 {{\n{}\n}}\nfn result(z: u32, m: u32, n: u32, sum: i32) -> {of} {{\nlet row = z * {m}u + m;\nlet i = row * {n}u + n;\nlet total = {corrected};\nreturn {value};\n}}\n",
        factors[0], factors[1]
    );
    let results = [0, 1, 2, 3].map(|j| format!("result(z, m, n + {j}u, s{j})"));
    let stores = match (n.is_multiple_of(4), dtype) {
        (true, DType::F32) => {
            let store = text.store(b.output(output)?, "vec4<f32>");
            format!("{store}(i / 4u, vec4<f32>({}));", results.join(", "))
        }
        (true, dtype) if code::is_byte(dtype) => {
            let store = text.store(b.output_bytes(output), "u32");
            let [x, y, z, w] = results.map(|result| code::byte(dtype, &result));
            format!("{store}(i / 4u, {x} | ({y} << 8u) | ({z} << 16u) | ({w} << 24u));")
        }
        _ => {
            let store = text.store(b.output_stored(output)?.0, of);
            let one =
                |(j, result): (usize, &String)| format!("if (n + {j}u < {n}u) {{ {store}(i + {j}u, {result}); }}");
            results.iter().enumerate().map(one).collect::<Vec<_>>().join("\n")
        }
    };
    kernel += &format!(
        "fn finish(z: u32, m: u32, n: u32, s0: i32, s1: i32, s2: i32, s3: i32) {{\nlet i = (z * {m}u + m) * {n}u + n;\n{stores}\n}}\n"
    );
    let has_lanes = b.gpu.has_lanes;
    let lanes = has_lanes.then(|| Lanes::of([m, n, 4 * words, matrices], [LOAD_FOUR / 4, LOAD_FOUR / 4], 2));
    let (template, group, rows) = match &lanes {
        Some(lanes) => (wgsl::PRODUCT_BYTES_LANES, lanes.group, 8 * lanes.octets),
        // As few blocks of rows as four each allow, of one size.
        None => (wgsl::PRODUCT_BYTES, group_size(b, n.div_ceil(4)), m.div_ceil(m.div_ceil(4))),
    };
    let numbers = [
        ("N", n),
        ("M", m),
        ("WORDS", words),
        ("ROWS", rows),
        ("GROUP", group),
        ("LAST_ROW", m - 1),
        ("OCTETS", rows / 8),
    ];
    let parameters: Vec<(&str, String)> = numbers.into_iter().map(|(name, value)| (name, value.to_string())).collect();
    kernel += &wgsl::expand(template, &parameters);
    let groups = [n.div_ceil(group * 4), m.div_ceil(rows), matrices].map(|n| n as u32);
    let name = if b.kernel == "convolution" { "integer convolution" } else { b.kernel };
    let name = if name == "matrix product" { "integer product" } else { name };
    b.push(text, &kernel, groups, name, sums.work)
}

/// Matrices `[.., m, k]` by `[.., k, n]`, or by `[n, k]` if `is_transposed`, into `to`, of the values of `output`. `finish` makes what becomes
/// of the sums. `false` where there is no such kernel for them.
pub(super) fn multiply<'a>(
    b: &mut Builder<'_>,
    [left, right]: [&Bytes; 2],
    shapes: [&[usize]; 2],
    is_transposed: bool,
    output: ValueId,
    finish: impl FnOnce(&mut Builder<'_>, &mut Text) -> Result<Finish<'a>, Unable>,
) -> Result<bool, Unable> {
    let [of_left, of_right] = shapes;
    let is_matrix = |shape: &[usize]| shape.len() >= 2 && !shape.contains(&0);
    if ![of_left, of_right].into_iter().all(is_matrix) || ![left, right].iter().all(|of| is_byte(of.dtype)) {
        return Ok(false);
    }
    let (lead_left, [m, k]) = parts(of_left);
    let (lead_right, [height, width]) = parts(of_right);
    let n = if is_transposed { height } else { width };
    let has_zeros = left.has_zeros(b, m) && right.has_zeros(b, n);
    if k > MOST_TERMS || !has_zeros || is_transposed && !lead_right.is_empty() {
        return Ok(false);
    }
    let batch = batch_of(lead_left, lead_right);
    let rows_of = |lead: &[usize]| lead.iter().product::<usize>();
    let a = pack(b, left, Extents { outer: rows_of(lead_left) * m, terms: k, inner: 1 }, "bytes by rows")?;
    // Kernels written by hand read a line for each column; a constant can be packed so.
    let is_turned = !is_transposed && lead_right.is_empty() && b.gpu.written.is_some() && right.is_constant(b);
    let has_lines = is_transposed || is_turned;
    let columns = match has_lines {
        true => Extents { outer: n, terms: k, inner: 1 },
        false => Extents { outer: rows_of(lead_right), terms: k, inner: n },
    };
    let w = match (&right.of, is_turned) {
        (Given::Value(id), true) => pack_turned(b, *id, columns)?,
        _ => pack(b, right, columns, if is_transposed { "bytes by rows" } else { "bytes by columns" })?,
    };
    let words = k.div_ceil(4);
    let mut text = Text::default();
    let zeros = [zero_text(b, &mut text, left, "m")?, zero_text(b, &mut text, right, "n")?];
    let begin = |lead: &[usize], matrix: usize| {
        let strides: Vec<usize> = code::broadcast_strides(lead, &batch).into_iter().map(|s| s * matrix).collect();
        match batch.is_empty() {
            true => (String::new(), "0u".to_string()),
            false => (code::coordinates(&batch, "z", "z"), code::position(&strides, 0, "z")),
        }
    };
    let load = [text.function(&a.operand), text.function(&w.operand)];
    let (statements, at) = begin(lead_left, m * words);
    let of_a = format!("{statements}return {}({at} + m * {words}u + k);", load[0]);
    let (statements, at) = begin(lead_right, words * n);
    let of_b = match has_lines {
        true => format!("return {}(n * {words}u + k);", load[1]),
        false => format!("{statements}return {}({at} + k * {n}u + n);", load[1]),
    };
    let mut of_sums = [None, None];
    let mut helpers = String::new();
    for (side, (packed, lead, count)) in [(&a, lead_left, m), (&w, lead_right, n)].into_iter().enumerate() {
        if zeros[1 - side].is_none() {
            continue;
        }
        let operand = sums(b, packed)?;
        let (statements, at) = begin(lead, count);
        let (name, of) = (["row_sum", "column_sum"][side], ["m", "n"][side]);
        let load = text.function(&operand);
        helpers += &format!("fn {name}(z: u32, {of}: u32) -> i32 {{\n{statements}return {load}({at} + {of});\n}}\n");
        of_sums[side] = Some(format!("{name}(z, {of})"));
    }
    text.define(&helpers);
    let matrices = batch.iter().product::<usize>();
    let finish = finish(b, &mut text)?;
    let bytes = (a.extents.outer + w.extents.outer * w.extents.inner) * k + 4 * b.count(output);
    let integer_operations = 2 * (matrices * m * n * k) as u64;
    let work = Work { integer_operations, bytes: bytes as u64, ..Work::default() };
    let sizes = [m, n, words];
    let lines = match (&a.operand, &w.operand) {
        (&Operand::Buffer(a, _), &Operand::Buffer(w, _)) if has_lines => {
            let strides: Vec<usize> =
                code::broadcast_strides(lead_left, &batch).iter().map(|s| s * m * words).collect();
            let none = vec![0; batch.len()];
            Some([
                Lines { buffer: a, batch: (batch.clone(), strides) },
                Lines { buffer: w, batch: (batch.clone(), none) },
            ])
        }
        _ => None,
    };
    let factors = [of_a, of_b];
    let of = Sums { sizes, terms: k, matrices, factors, lines, zeros, sums: of_sums, finish, output, work };
    push(b, text, &of).map(|()| true)
}

/// A constant `[terms, columns]` with a line for each column.
fn pack_turned(b: &mut Builder<'_>, id: ValueId, extents: Extents) -> Result<Packed, Unable> {
    let constant = b.constant(id).ok_or("a factor that a run computes")?;
    let Extents { outer: columns, terms, .. } = extents;
    let operand = b.upload(&constant, "columns of bytes by rows", |tensor| {
        let bytes = tensor.bytes();
        let turned: Vec<u8> = (0..columns).flat_map(|n| (0..terms).map(move |k| bytes[k * columns + n])).collect();
        // Of so many bytes, whatever their order.
        Tensor::from_bytes(tensor.dtype(), [columns, terms], &turned)
            .map(|turned| extents.pack(&turned))
            .unwrap_or_default()
    })?;
    match operand {
        Operand::Buffer(buffer, _) => Ok(Packed { operand: Operand::Buffer(buffer, DType::U32), extents }),
        _ => Err("a factor in memory".into()),
    }
}

fn parts(shape: &[usize]) -> (&[usize], [usize; 2]) {
    let (lead, matrix) = shape.split_at(shape.len() - 2);
    (lead, [matrix[0], matrix[1]])
}

/// A convolution of an image of bytes by constant filters of bytes. As [`multiply`]; filters whose zero points are not in the middle of their range
/// are left to others, and groups of one channel where no kernel was written for them.
pub(super) fn convolve<'a>(
    b: &mut Builder<'_>,
    [x, w]: [(ValueId, Option<ValueId>); 2],
    window: &Window,
    groups: usize,
    output: ValueId,
    finish: impl FnOnce(&mut Builder<'_>, &mut Text) -> Result<Finish<'a>, Unable>,
) -> Result<bool, Unable> {
    let (shape, filters) = (b.shape(x.0), b.shape(w.0));
    let (image, constant) = (Bytes::new(b, x.0, x.1), Bytes::new(b, w.0, w.1));
    let is_bytes = [&image, &constant].iter().all(|of| is_byte(of.dtype));
    if !is_bytes || !matches!(shape.rank(), 3 | 4) || b.constant(w.0).is_none() || filters.contains(&0) {
        return Ok(false);
    }
    let axes = window.axes(&shape[2..], &filters[2..]).map_err(|error| error.to_string())?;
    let one = WindowAxis { input: 1, output: 1, kernel: 1, stride: 1, dilation: 1, pad_begin: 0, pad_end: 0 };
    let [down, right] = if axes.len() == 2 { [axes[0], axes[1]] } else { [one, axes[0]] };
    let (channels, per_group, taps) = (filters[1], filters[0] / groups, down.kernel * right.kernel);
    let (plane, pixels) = (down.input * right.input, down.output * right.output);
    let has_zeros = image.has_zeros(b, 1) && constant.has_zeros(b, filters[0]);
    if channels * taps > MOST_TERMS || !has_zeros {
        return Ok(false);
    }
    let integer_operations = 2 * (b.count(output) * channels * taps) as u64;
    let bytes = (b.count(x.0) + b.count(w.0) + 4 * b.count(output)) as u64;
    let work = Work { integer_operations, bytes, ..Work::default() };
    let windows = channels::Windows { samples: shape[0], groups, inner: channels, per_group, down, right };
    if channels::is_there(b, &windows, b.dtype(output)) {
        return channels::convolve(b, [&image, &constant], [x.0, w.0], &windows, (output, work), finish);
    }
    if channels < 2 {
        return Ok(false);
    }
    let mut text = Text::default();
    let channel = format!("(z % {groups}u * {per_group}u + m)");
    let zeros = [zero_text(b, &mut text, &constant, &channel)?, zero_text(b, &mut text, &image, "0u")?];
    // Sums of what a window meets would be sums for every pixel.
    if zeros[0].is_some() {
        return Ok(false);
    }
    let extents = Extents { outer: shape[0] * groups, terms: channels, inner: plane };
    let words = extents.words();
    let image = pack(b, &image, extents, "bytes by channels")?;
    let extents = Extents { outer: filters[0], terms: channels, inner: taps };
    let packed = pack(b, &constant, extents, "bytes by channels")?;
    let load = [text.function(&packed.operand), text.function(&image.operand)];
    let of_a = format!("return {}({channel} * {}u + k);", load[0], words * taps);
    let is_inside = |axis: &WindowAxis| {
        axis.pad_begin == 0 && (axis.output - 1) * axis.stride + (axis.kernel - 1) * axis.dilation < axis.input
    };
    let begin = format!("(z * {words}u + k / {taps}u) * {plane}u");
    let of_b = if taps == 1 && pixels == plane && is_inside(&down) && is_inside(&right) {
        format!("return {}({begin} + n);", load[1])
    } else {
        let at = |name: &str, from: &str, tap: &str, axis: &WindowAxis| {
            format!("let {name} = {from} * {}u + {tap} * {}u - {}u;\n", axis.stride, axis.dilation, axis.pad_begin)
        };
        let tap = [format!("k % {taps}u / {}u", right.kernel), format!("k % {taps}u % {}u", right.kernel)];
        let place = at("y", &format!("n / {}u", right.output), &tap[0], &down)
            + &at("x", &format!("n % {}u", right.output), &tap[1], &right);
        let loaded = format!("{}({begin} + y * {}u + x)", load[1], right.input);
        match is_inside(&down) && is_inside(&right) {
            true => format!("{place}return {loaded};"),
            // What lies above or left of the input wraps around and is beyond its other edge. Padding holds the zero point.
            false => {
                let zero = zeros[1].clone().unwrap_or("0".to_string());
                format!(
                    "{place}if (y < {}u && x < {}u) {{ return {loaded}; }}\nreturn (u32({zero}) & 0xffu) * 0x01010101u;",
                    down.input, right.input
                )
            }
        }
    };
    let row_sums = match &zeros[1] {
        None => None,
        Some(_) => {
            // Over the taps too.
            let of_taps = sums(b, &packed)?;
            let body = format!(
                "var sum = 0;\nfor (var t = 0u; t < {taps}u; t = t + 1u) {{ sum = sum + $0(i * {taps}u + t); }}\nreturn sum;"
            );
            let of_filters = computed(b, Function::new(DType::I32, body, vec![of_taps]), filters[0])?;
            Some(format!("{}({channel})", text.function(&of_filters)))
        }
    };
    let finish = finish(b, &mut text)?;
    let matrices = shape[0] * groups;
    let of = Sums {
        sizes: [per_group, pixels, words * taps],
        terms: channels * taps,
        matrices,
        factors: [of_a, of_b],
        lines: None,
        zeros,
        sums: [row_sums, None],
        finish,
        output,
        work,
    };
    push(b, text, &of).map(|()| true)
}

/// `scale · scale` of two factors, of which the second may have one for each row or column, `index`.
pub(super) fn factor_text(
    b: &mut Builder<'_>,
    text: &mut Text,
    scales: [ValueId; 2],
    index: &str,
) -> Result<String, Unable> {
    let mut one = |b: &mut Builder<'_>, id: ValueId| match b.known(id).filter(|of| of.element_count() == 1) {
        Some(scale) => Ok::<_, Unable>(float(scale.to_vec::<f32>().map_err(|error| error.to_string())?[0])),
        None => {
            let operand = b.reread(id)?;
            let index = if b.count(id) == 1 { "0u" } else { index };
            Ok(format!("{}({index})", text.function(&operand)))
        }
    };
    Ok(format!("{} * {}", one(b, scales[0])?, one(b, scales[1])?))
}

/// A quantization to bytes of one scale and zero point, both known, which alone reads what is quantized.
pub(super) struct Quantized {
    pub node: NodeId,
    pub output: ValueId,
    /// Its scale and zero point, and the least and the largest byte.
    numbers: [String; 4],
}

/// The quantization of `id`, where what gives `id` may give its bytes at once.
pub(super) fn quantized(b: &Builder<'_>, id: ValueId) -> Result<Option<Quantized>, Unable> {
    let Some((node_id, node)) = b.only_reader(id) else { return Ok(None) };
    let Op::QuantizeLinear(op) = &node.op else { return Ok(None) };
    let (x, scale, zero, output) = (given(node, 0), given(node, 1), given(node, 2), node.outputs[0]);
    let one = |id: ValueId| b.known(id).filter(|tensor| tensor.element_count() == 1 && tensor.shape().rank() < 2);
    let Some(scale) = scale.and_then(one).filter(|scale| scale.dtype() == DType::F32) else { return Ok(None) };
    let zero = match zero.map(one) {
        None => 0.0,
        Some(Some(zero)) if zero.dtype() == b.dtype(output) && is_byte(zero.dtype()) => match zero.bytes()[0] {
            byte if zero.dtype() == DType::I8 => f32::from(byte as i8),
            byte => f32::from(byte),
        },
        Some(_) => return Ok(None),
    };
    if x != Some(id) || !is_byte(b.dtype(output)) || !matches!(op.precision, None | Some(DType::F32)) {
        return Ok(None);
    }
    let scale = scale.to_vec::<f32>().map_err(|error| error.to_string())?[0];
    let (low, high) = bounds(b.dtype(output))?;
    Ok(Some(Quantized { node: node_id, output, numbers: [scale, zero, low as f32, high as f32].map(float) }))
}

impl Quantized {
    /// What an epilogue of floats does, and the quantization after it.
    pub fn after(&self, epilogue: &Epilogue) -> Epilogue {
        let ([scale, zero, low, high], x) = (&self.numbers, &epilogue.function);
        let function = format!("clamp(steps_of(quotient_of({x}, {scale})) + {zero}, {low}, {high})");
        Epilogue { function, ..epilogue.clone() }
    }
}

/// The product of two dequantized values, `node`'s first two inputs, if they are such; see [`multiply`].
pub(super) fn lower_product(
    b: &mut Builder<'_>,
    node: &Node,
    is_transposed: bool,
    epilogue: &Epilogue,
) -> Result<bool, Unable> {
    let [a, w] = [super::input(node, 0)?, super::input(node, 1)?];
    let (Some(left), Some(right)) = (dequantized(b, a), dequantized(b, w)) else { return Ok(false) };
    let (shapes, output) = ([b.shape(a), b.shape(w)], node.outputs[0]);
    let of_columns = if is_transposed { 0 } else { shapes[1].rank().saturating_sub(1) };
    let fits = left.axis.is_none() && right.axis.is_none_or(|axis| axis == of_columns);
    if !fits || b.dtype(output) != DType::F32 || epilogue.alpha != 1.0 {
        return Ok(false);
    }
    let factors = [&left.bytes, &right.bytes];
    let scales = [left.scale, right.scale];
    finished(b, output, epilogue, scales, "n", |b, output, finish| {
        multiply(b, factors, [&shapes[0], &shapes[1]], is_transposed, output, finish)
    })
}

/// Runs `lower` for `output`, or for the bytes that it is quantized to where nobody else reads it.
fn finished<'a>(
    b: &mut Builder<'_>,
    output: ValueId,
    epilogue: &'a Epilogue,
    scales: [ValueId; 2],
    index: &'a str,
    lower: impl FnOnce(&mut Builder<'_>, ValueId, FinishOf<'_>) -> Result<bool, Unable>,
) -> Result<bool, Unable> {
    let quantized = quantized(b, output)?;
    let after = quantized.as_ref().map(|quantized| quantized.after(epilogue));
    let epilogue = after.as_ref().unwrap_or(epilogue);
    let finish = |b: &mut Builder<'_>, text: &mut Text| {
        Ok(Finish::Floats { factor: factor_text(b, text, scales, index)?, epilogue })
    };
    let to = quantized.as_ref().map_or(output, |quantized| quantized.output);
    let is_lowered = lower(b, to, &finish)?;
    if let Some(quantized) = quantized.filter(|_| is_lowered) {
        b.fuse([quantized.node]);
    }
    Ok(is_lowered)
}

/// What makes of sums what becomes of them.
type FinishOf<'a> = &'a dyn Fn(&mut Builder<'_>, &mut Text) -> Result<Finish<'a>, Unable>;

/// The convolution of a dequantized image with dequantized filters, if they are such; see [`convolve`].
pub(super) fn lower_conv(
    b: &mut Builder<'_>,
    node: &Node,
    window: &Window,
    groups: usize,
    epilogue: &Epilogue,
) -> Result<bool, Unable> {
    let [x, w] = [super::input(node, 0)?, super::input(node, 1)?];
    let (Some(image), Some(filters)) = (dequantized(b, x), dequantized(b, w)) else { return Ok(false) };
    let is_same = b.shape(image.id) == b.shape(x) && b.shape(filters.id) == b.shape(w);
    if !is_same || image.axis.is_some() || filters.axis.is_some_and(|axis| axis != 0) {
        return Ok(false);
    }
    let (output, channels) = (node.outputs[0], b.shape(w)[0]);
    let index = format!("(row % {channels}u)");
    let scales = [image.scale, filters.scale];
    finished(b, output, epilogue, scales, &index, |b, output, finish| {
        convolve(b, [image.pair(), filters.pair()], window, groups, output, finish)
    })
}

/// Whether `id` is a dequantization, by one scale, of what lies in memory.
pub(super) fn is_dequantized(b: &Builder<'_>, id: ValueId) -> bool {
    dequantized(b, id).is_some_and(|of| of.axis.is_none() && b.is_in_memory(of.id))
}

/// What the dequantization of constants gives, where `id` is one.
pub(super) fn dequantized_constant(b: &Builder<'_>, id: ValueId) -> Option<Constant> {
    let node = b.graph.node(b.graph.producer(id)?.0);
    let is_known = |id: &ValueId| b.constant(*id).is_some();
    if !matches!(node.op, Op::DequantizeLinear(_)) || !node.inputs.iter().flatten().all(is_known) {
        return None;
    }
    let tensors = crate::known::outputs(node, usize::MAX, |id| b.fact(id), |id| b.known(id))?;
    let inputs = node.inputs.iter().flatten().filter_map(|&id| b.constant(id)).map(|constant| constant.identity());
    let inputs: Vec<_> = inputs.collect();
    Some(Constant::derived(tensors.into_iter().next()?, "dequantized", &inputs))
}
