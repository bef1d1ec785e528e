//! Integers that stand for floats: between the two, and sums of their products, which are exact.

use super::{
    super::{
        code::{self, Function, Operand, Text, integer},
        plan::{Builder, Unable},
    },
    bytes::{self, Bytes, Finish},
    elementwise::is_float,
    product::{Added, Epilogue},
    reduce::finish,
};
use cutover_graph::{
    Node, ValueId,
    ops::{ConvInteger, DequantizeLinear, Granularity, QuantizeLinear, Window, normalize_axis},
};
use cutover_tensor::DType;
use std::rc::Rc;

pub(super) fn given(node: &Node, index: usize) -> Option<ValueId> {
    node.inputs.get(index).copied().flatten()
}

/// The least and the largest that `dtype` holds.
pub(super) fn bounds(dtype: DType) -> Result<(i64, i64), Unable> {
    Ok(match dtype {
        DType::I8 => (-128, 127),
        DType::U8 => (0, 255),
        DType::I16 => (-32768, 32767),
        DType::U16 => (0, 65535),
        other => return Err(format!("no kernel for {other}").into()),
    })
}

/// The index of the scale that element `i` of a tensor of `x`'s shape has.
fn scale_index(b: &Builder<'_>, granularity: Granularity, x: ValueId, scale: ValueId) -> Result<String, Unable> {
    let (shape, scales) = (b.shape(x), b.shape(scale));
    if scales.rank() == 0 || scales.rank() == 1 && scales[0] == 1 {
        return Ok("0u".to_string());
    }
    let axis = normalize_axis(granularity.axis, shape.rank()).map_err(|error| error.to_string())?;
    let (inner, extent) = (shape[axis + 1..].iter().product::<usize>(), shape[axis]);
    Ok(match granularity.block_size {
        0 => format!("i / {inner}u % {extent}u"),
        block => format!(
            "i / {}u * {}u + i / {inner}u % {extent}u / {block}u * {inner}u + i % {inner}u",
            extent * inner,
            scales[axis] * inner
        ),
    })
}

pub(super) fn lower_quantize(b: &mut Builder<'_>, node: &Node, op: &QuantizeLinear) -> Result<(), Unable> {
    let (x, scale, output) = (super::input(node, 0)?, super::input(node, 1)?, node.outputs[0]);
    let dtype = b.dtype(output);
    if !matches!(op.precision, None | Some(DType::F32)) || b.dtype(x) == DType::F64 {
        return Err("a precision other than f32".into());
    }
    let index = scale_index(b, op.granularity, x, scale)?;
    let mut ids = vec![x, scale];
    ids.extend(given(node, 2));
    let operands = b.operands(&ids)?;
    let zero = if ids.len() > 2 { "i32($2(at))" } else { "0" };
    let text = quantized_text(dtype, "f32($0(i))", "f32($1(at))", zero)?;
    b.define(output, format!("let at = {index};\n{text}"), operands)?;
    bytes::keep_picture(b, output)
}

/// Statements that return `x` in steps of `scale` from `zero` on, expressions all.
pub(super) fn quantized_text(dtype: DType, x: &str, scale: &str, zero: &str) -> Result<String, Unable> {
    let (low, high) = bounds(dtype)?;
    let of = code::value_type(dtype).unwrap_or("i32");
    // Far beyond any bound, and still exact in 32 bits.
    Ok(format!(
        "let y = quotient_of({x}, {scale});\nlet steps = i32(clamp(round(select(y, 0.0, is_nan(y))), -1000000000.0, 1000000000.0));\nreturn {of}(clamp(steps + {zero}, {low}, {high}));"
    ))
}

pub(super) fn lower_dequantize(b: &mut Builder<'_>, node: &Node, op: &DequantizeLinear) -> Result<(), Unable> {
    let (x, scale, output) = (super::input(node, 0)?, super::input(node, 1)?, node.outputs[0]);
    if !matches!(b.dtype(x), DType::I8 | DType::U8 | DType::I16 | DType::U16 | DType::I32) {
        return Err(format!("no kernel for {}", b.dtype(x)).into());
    }
    let index = scale_index(b, op.granularity, x, scale)?;
    let mut ids = vec![x, scale];
    ids.extend(given(node, 2));
    let operands = b.operands(&ids)?;
    let zero = if ids.len() > 2 { " - i32($2(at))" } else { "" };
    let result = code::wrapped(b.dtype(output), &format!("f32(i32($0(i)){zero}) * $1(at)"));
    b.define(output, format!("let at = {index};\nreturn {result};"), operands)
}

/// Which element of `parameter`, one for each row or column of a matrix, belongs to element `i` of `matrix`, where that is `[.., m, n]`.
fn side_index(b: &Builder<'_>, parameter: ValueId, shape: &[usize], is_row: bool, i: &str) -> Result<String, Unable> {
    let count = b.count(parameter);
    let rank = b.shape(parameter).rank();
    let (rows, columns) = (if shape.len() > 1 { shape[shape.len() - 2] } else { 1 }, shape[shape.len() - 1]);
    match (count, rank, is_row) {
        (1, ..) => Ok("0u".to_string()),
        (count, 1, true) if count == rows => Ok(format!("({i}) / {columns}u % {rows}u")),
        (count, 1, false) if count == columns => Ok(format!("({i}) % {columns}u")),
        _ => Err("zero points or scales of several axes".into()),
    }
}

pub(super) fn is_byte(dtype: DType) -> bool {
    matches!(dtype, DType::I8 | DType::U8)
}

/// A sum of products of two byte matrices less their zero points, as the statements that leave it in `sum`, an i32, of the result's
/// element `i`; operands of indices from 0 on.
fn matrix_sum(
    b: &mut Builder<'_>,
    [x, y]: [ValueId; 2],
    zeros: [Option<ValueId>; 2],
    to: &[usize],
) -> Result<(String, Vec<Operand>), Unable> {
    let (left, right) = (b.shape(x), b.shape(y));
    if left.rank() < 2 || right.rank() < 2 || !is_byte(b.dtype(x)) || !is_byte(b.dtype(y)) {
        return Err("a factor that is no matrix of bytes".into());
    }
    let (k, n) = (left[left.rank() - 1], right[right.rank() - 1]);
    let m = left[left.rank() - 2];
    // Products of bytes stay below 2^16.3.
    if k == 0 || k > 1 << 14 {
        return Err(format!("a sum of {k} products").into());
    }
    let batch = &to[..to.len() - 2];
    let strides = |shape: &[usize], matrix: usize| -> Vec<usize> {
        let own = code::broadcast_strides(&shape[..shape.len() - 2], batch);
        own.into_iter().map(|stride| stride * matrix).collect()
    };
    let mut operands = vec![b.reread(x)?, b.reread(y)?];
    let mut zero = |b: &mut Builder<'_>, id: Option<ValueId>, shape: &[usize], is_row: bool, i: &str| match id {
        None => Ok::<_, Unable>("0".to_string()),
        Some(id) => {
            let index = side_index(b, id, shape, is_row, i)?;
            operands.push(b.operand(id)?);
            Ok(format!("i32(${}({index}))", operands.len() - 1))
        }
    };
    let of_left = zero(b, zeros[0], &left, true, "from_left")?;
    let of_right = zero(b, zeros[1], &right, false, "from_right")?;
    let text = format!(
        "let z = i / {}u;\n{}let from_left = {} + i / {n}u % {m}u * {k}u;\nlet from_right = {} + i % {n}u;\nlet zero_left = {of_left};\nlet zero_right = {of_right};\nvar sum = 0;\nfor (var k = 0u; k < {k}u; k = k + 1u) {{ sum = sum + (i32($0(from_left + k)) - zero_left) * (i32($1(from_right + k * {n}u)) - zero_right); }}\n",
        m * n,
        code::coordinates(batch, "z", "z"),
        code::position(&strides(&left, m * k), 0, "z"),
        code::position(&strides(&right, k * n), 0, "z"),
    );
    Ok((text, operands))
}

pub(super) fn lower_matmul_integer(b: &mut Builder<'_>, node: &Node) -> Result<(), Unable> {
    let ids = [super::input(node, 0)?, super::input(node, 1)?];
    let zeros = [given(node, 2), given(node, 3)];
    let output = node.outputs[0];
    let [x, y] = [0, 1].map(|at| Bytes::new(b, ids[at], zeros[at]));
    let shapes = ids.map(|id| b.shape(id));
    if bytes::multiply(b, [&x, &y], [&shapes[0], &shapes[1]], false, output, |_, _| Ok(Finish::Sums))? {
        return Ok(());
    }
    let to = b.shape(output);
    let (text, operands) = matrix_sum(b, ids, zeros, &to)?;
    finish(b, output, Function::new(DType::I32, text + "return sum;", operands))
}

/// `sum` in units of a factor, as the result's type: the statements after those that leave it there.
fn requantized(b: &Builder<'_>, output: ValueId, factor: &str, zero: &str) -> Result<String, Unable> {
    let (low, high) = bounds(b.dtype(output))?;
    let of = code::value_type(b.dtype(output)).unwrap_or("i32");
    Ok(format!(
        "let steps = i32(clamp(round(f32(sum) * ({factor})), -1000000000.0, 1000000000.0));\nreturn {of}(clamp(steps + {zero}, {low}, {high}));"
    ))
}

pub(super) fn lower_qlinear_matmul(b: &mut Builder<'_>, node: &Node) -> Result<(), Unable> {
    let ids = [super::input(node, 0)?, super::input(node, 3)?];
    let zeros = [given(node, 2), given(node, 5)];
    let output = node.outputs[0];
    let to = b.shape(output);
    if b.count(super::input(node, 1)?) == 1 {
        let [x, y] = [0, 1].map(|at| Bytes::new(b, ids[at], zeros[at]));
        let shapes = ids.map(|id| b.shape(id));
        let to_bytes = |b: &mut Builder<'_>, text: &mut Text| to_bytes(b, text, node, "n", None);
        if bytes::multiply(b, [&x, &y], [&shapes[0], &shapes[1]], false, output, to_bytes)? {
            return Ok(());
        }
    }
    let (mut text, mut operands) = matrix_sum(b, ids, zeros, &to)?;
    let mut load = |b: &mut Builder<'_>, at: usize, index: &str| {
        let id = super::input(node, at)?;
        if b.dtype(id) != DType::F32 && at != 7 {
            return Err(Unable::Because(format!("scales of {}", b.dtype(id))));
        }
        operands.push(b.operand(id)?);
        Ok(format!("${}({index})", operands.len() - 1))
    };
    let rows = side_index(b, super::input(node, 1)?, &to, true, "i")?;
    let columns = side_index(b, super::input(node, 4)?, &to, false, "i")?;
    let factor = format!("{} * {} / {}", load(b, 1, &rows)?, load(b, 4, &columns)?, load(b, 6, "0u")?);
    let zero = format!("i32({})", load(b, 7, "0u")?);
    text += &requantized(b, output, &factor, &zero)?;
    finish(b, output, Function::new(b.dtype(output), text, operands))
}

/// What the sums of an operator with named scales become, where the second factor's scales and the bias are those of `index`.
fn to_bytes<'a>(
    b: &mut Builder<'_>,
    text: &mut Text,
    node: &Node,
    index: &str,
    bias: Option<ValueId>,
) -> Result<Finish<'a>, Unable> {
    let ids = [1, 4, 6, 7].map(|at| super::input(node, at));
    let [x, w, y, zero] = ids;
    let (x, w, y, zero) = (x?, w?, y?, zero?);
    if [x, w, y].iter().any(|&id| b.dtype(id) != DType::F32) || b.count(y) != 1 || b.count(zero) != 1 {
        return Err("scales of another type than f32, or of several axes".into());
    }
    let factor = bytes::factor_text(b, text, [x, w], index)?;
    let mut load = |b: &mut Builder<'_>, id: ValueId, index: &str| {
        let operand = b.reread(id)?;
        Ok::<_, Unable>(format!("{}({index})", text.function(&operand)))
    };
    let factor = format!("{factor} / {}", load(b, y, "0u")?);
    let zero = format!("i32({})", load(b, zero, "0u")?);
    let added = bias.map(|bias| load(b, bias, index)).transpose()?;
    Ok(Finish::Bytes { factor, zero, added })
}

/// `MatMulIntegerToFloat`, and `DynamicQuantizeMatMul` with what it makes of its first factor: those bytes, their scale and zero point.
pub(super) fn lower_matmul_to_float(b: &mut Builder<'_>, node: &Node, is_dynamic: bool) -> Result<(), Unable> {
    let (x, w, output) = (super::input(node, 0)?, super::input(node, 1)?, node.outputs[0]);
    let at = if is_dynamic { [2, 3, 4] } else { [3, 5, 6] };
    let [w_scale, w_zero, bias] = at.map(|at| given(node, at));
    let w_scale = w_scale.ok_or("no scale")?;
    let (to, columns) = (b.shape(output), b.shape(w).last().copied().unwrap_or(1));
    let mut added = Vec::new();
    if let Some(bias) = bias {
        let (statements, index) = code::broadcast(&b.shape(bias), &to);
        added.push(Added { statements, index, factor: 1.0, operand: b.reread(bias)? });
    }
    if ![1, columns].contains(&b.count(w_scale)) || b.dtype(output) != DType::F32 {
        return Err("scales of several axes".into());
    }
    let epilogue = Epilogue { alpha: 1.0, bias: None, added, function: "x".to_string() };
    let right = Bytes::new(b, w, w_zero);
    let shapes = [b.shape(x), b.shape(w)];
    let shapes: [&[usize]; 2] = [&shapes[0], &shapes[1]];
    let (left, x_scale) = if is_dynamic {
        let [bytes, scale, zero] = dynamic(b, x)?;
        (Bytes::computed(bytes, zero), scale)
    } else {
        let x_scale = super::input(node, 2)?;
        if b.count(x_scale) != 1 {
            return Err("scales of several axes".into());
        }
        (Bytes::new(b, x, given(node, 4)), b.reread(x_scale)?)
    };
    let w_scale = (b.reread(w_scale)?, if b.count(w_scale) == 1 { "0u" } else { "n" });
    let finish = |_: &mut Builder<'_>, text: &mut Text| {
        let factor = format!("{}(0u) * {}({})", text.function(&x_scale), text.function(&w_scale.0), w_scale.1);
        Ok(Finish::Floats { factor, epilogue: &epilogue })
    };
    let is_lowered = bytes::multiply(b, [&left, &right], shapes, false, output, finish)?;
    if is_lowered { Ok(()) } else { Err("factors that are no matrices of bytes".into()) }
}

/// Inputs of a convolution of bytes, and what is made of its sums.
struct Windowed {
    x: ValueId,
    w: ValueId,
    x_zero: Option<ValueId>,
    w_zero: Option<ValueId>,
}

/// As [`matrix_sum`], of a convolution.
fn window_sum(
    b: &mut Builder<'_>,
    of: &Windowed,
    window: &Window,
    group: usize,
    to: &[usize],
) -> Result<(String, Vec<Operand>), Unable> {
    let (shape, filters) = (b.shape(of.x), b.shape(of.w));
    if !is_byte(b.dtype(of.x)) || !is_byte(b.dtype(of.w)) || shape.rank() < 3 {
        return Err("operands that are no bytes".into());
    }
    let axes = window.axes(&shape[2..], &filters[2..]).map_err(|error| error.to_string())?;
    let (inner, per_group) = (filters[1], filters[0] / group);
    let (plane, kernel): (usize, usize) = (shape[2..].iter().product(), filters[2..].iter().product());
    if inner * kernel > 1 << 14 {
        return Err(format!("a sum of {} products", inner * kernel).into());
    }
    let mut operands = vec![b.reread(of.x)?, b.reread(of.w)?];
    let mut zero = |b: &mut Builder<'_>, id: Option<ValueId>, index: &str| match id {
        None => Ok::<_, Unable>("0".to_string()),
        Some(id) => {
            let index = if b.count(id) == 1 { "0u" } else { index };
            operands.push(b.operand(id)?);
            Ok(format!("i32(${}({index}))", operands.len() - 1))
        }
    };
    let (x_zero, w_zero) = (zero(b, of.x_zero, "0u")?, zero(b, of.w_zero, "o1")?);
    let inside = format!(
        "for (var c = 0u; c < {inner}u; c = c + 1u) {{ sum = sum + (i32($0(start + c * {plane}u + at)) - x_zero) * (i32($1((o1 * {inner}u + c) * {kernel}u + tap)) - w_zero); }}"
    );
    let text = format!(
        "{}let start = (o0 * {}u + o1 / {per_group}u * {inner}u) * {plane}u;\nlet x_zero = {x_zero};\nlet w_zero = {w_zero};\nvar sum = 0;\n{}",
        code::coordinates(to, "i", "o"),
        shape[1],
        super::window::taps(&axes, &inside, ""),
    );
    Ok((text, operands))
}

pub(super) fn lower_conv_integer(b: &mut Builder<'_>, node: &Node, op: &ConvInteger) -> Result<(), Unable> {
    let of = Windowed {
        x: super::input(node, 0)?,
        w: super::input(node, 1)?,
        x_zero: given(node, 2),
        w_zero: given(node, 3),
    };
    let output = node.outputs[0];
    let factors = [(of.x, of.x_zero), (of.w, of.w_zero)];
    if bytes::convolve(b, factors, &op.window, op.group, output, |_, _| Ok(Finish::Sums))? {
        return Ok(());
    }
    let to = b.shape(output);
    let (text, operands) = window_sum(b, &of, &op.window, op.group, &to)?;
    finish(b, output, Function::new(DType::I32, text + "return sum;", operands))
}

pub(super) fn lower_qlinear_conv(
    b: &mut Builder<'_>,
    node: &Node,
    window: &Window,
    group: usize,
) -> Result<(), Unable> {
    let of = Windowed {
        x: super::input(node, 0)?,
        w: super::input(node, 3)?,
        x_zero: given(node, 2),
        w_zero: given(node, 5),
    };
    let output = node.outputs[0];
    let to = b.shape(output);
    let factors = [(of.x, of.x_zero), (of.w, of.w_zero)];
    let index = format!("(row % {}u)", to[1]);
    let to_bytes = |b: &mut Builder<'_>, text: &mut Text| to_bytes(b, text, node, &index, given(node, 8));
    if bytes::convolve(b, factors, window, group, output, to_bytes)? {
        return Ok(());
    }
    let (mut text, mut operands) = window_sum(b, &of, window, group, &to)?;
    let mut load = |b: &mut Builder<'_>, at: usize, index: &str| {
        let id = super::input(node, at)?;
        let index = if b.count(id) == 1 { "0u" } else { index };
        operands.push(b.operand(id)?);
        Ok::<_, Unable>(format!("${}({index})", operands.len() - 1))
    };
    if given(node, 8).is_some() {
        text += &format!("sum = sum + {};\n", load(b, 8, "o1")?);
    }
    let factor = format!("{} * {} / {}", load(b, 1, "0u")?, load(b, 4, "o1")?, load(b, 6, "0u")?);
    let zero = format!("i32({})", load(b, 7, "0u")?);
    text += &requantized(b, output, &factor, &zero)?;
    finish(b, output, Function::new(b.dtype(output), text, operands))
}

/// `x` as u8, its scale, and its zero point.
pub(super) fn lower_dynamic(b: &mut Builder<'_>, node: &Node) -> Result<(), Unable> {
    let made = dynamic(b, super::input(node, 0)?)?;
    for (operand, &output) in made.into_iter().zip(&node.outputs) {
        b.define(output, "return $0(i);", vec![operand])?;
    }
    Ok(())
}

/// `x` as u8, its scale, and its zero point: the range first, by one invocation for each of a few hundred parts.
fn dynamic(b: &mut Builder<'_>, x: ValueId) -> Result<[Operand; 3], Unable> {
    let count = b.count(x);
    let operand = b.reread(x)?;
    let parts = count.div_ceil(64).min(512);
    let part = count.div_ceil(parts);
    let range = |sign: &str, of: DType, from: Operand, count: usize, part: usize| {
        let body = format!(
            "var best = 0.0;\nfor (var r = i * {part}u; r < min((i + 1u) * {part}u, {count}u); r = r + 1u) {{\nlet x = $0(r);\nif (x {sign} best) {{ best = x; }}\n}}\nreturn best;"
        );
        Function::new(of, body, vec![from])
    };
    let mut ends = Vec::new();
    for sign in ["<", ">"] {
        let of_parts = range(sign, DType::F32, operand.clone(), count, part);
        let of_parts = super::reduce::computed(b, of_parts, parts)?;
        let whole = range(sign, DType::F32, of_parts, parts, parts);
        ends.push(super::reduce::computed(b, whole, 1)?);
    }
    let scale =
        "let low = $0(0u);\nlet high = $1(0u);\nreturn select(quotient_of(high - low, 255.0), 1.0, high == low);";
    let scale = super::reduce::computed(b, Function::new(DType::F32, scale, ends.clone()), 1)?;
    let zero = "let y = quotient_of(-$0(0u), $1(0u));\nreturn u32(clamp(round(y), 0.0, 255.0));";
    let zero = super::reduce::computed(b, Function::new(DType::U8, zero, vec![ends.remove(0), scale.clone()]), 1)?;
    let body = "let y = quotient_of($0(i), $1(0u));\nreturn u32(clamp(i32(clamp(round(select(y, 0.0, is_nan(y))), -1000000.0, 1000000.0)) + i32($2(0u)), 0, 255));";
    let bytes = Function::new(DType::U8, body, vec![operand, scale.clone(), zero.clone()]);
    Ok([Operand::Function(Rc::new(bytes)), scale, zero])
}

/// On at the index, off elsewhere.
pub(super) fn lower_one_hot(b: &mut Builder<'_>, node: &Node, axis: i64) -> Result<(), Unable> {
    let (indices, values, output) = (super::input(node, 0)?, super::input(node, 2)?, node.outputs[0]);
    let (to, of) = (b.shape(output), b.dtype(indices));
    let axis = normalize_axis(axis, to.rank()).map_err(|error| error.to_string())?;
    let (_, depth, inner) = super::reduce::around(&to, axis);
    if is_float(of) || matches!(of, DType::Bool) {
        return Err(format!("indices of {of}").into());
    }
    let is_signed = !matches!(of, DType::U8 | DType::U16 | DType::U32 | DType::U64);
    let wrap = match is_signed {
        true => format!("if (at < {}) {{ at = at + {}; }}\n", integer(of, 0), integer(of, depth as i128)),
        false => String::new(),
    };
    let place = match of {
        DType::I64 => "i64(place)",
        DType::U64 => "u64(place)",
        _ if is_signed => "i32(place)",
        _ => "place",
    };
    let operands = b.operands(&[indices, values])?;
    let body = format!(
        "let place = i / {inner}u % {depth}u;\nvar at = $0(i / {}u * {inner}u + i % {inner}u);\n{wrap}return $1(select(0u, 1u, at == {place}));",
        depth * inner
    );
    b.define(output, body, operands)
}
