//! Windows over spatial axes, any number of them: pooling, and convolution where no other kernel takes it.

use super::{
    super::{
        code::{self, Function, Text, float},
        plan::{Builder, Unable},
    },
    elementwise::{activation_text, is_float},
    reduce::finish,
    written::{self, Rows},
};
use cutover_graph::{
    Node,
    ops::{AveragePool, Conv, ConvTranspose, GlobalPool, GlobalPoolFunction, LpPool, MaxPool, Window, WindowAxis},
};
use cutover_kernels::cuda::RowFunction;
use cutover_tensor::{DType, Shape};

/// Nested loops over the taps of a window at the coordinates `o2, o3, …`; inside, `at` is the tap's place in its plane, and `tap` which
/// tap it is. Taps in the padding are skipped, `outside` is run for them.
pub(super) fn taps(axes: &[WindowAxis], inside: &str, outside: &str) -> String {
    let mut text = String::new();
    let mut end = String::new();
    let (mut at, mut tap) = ("0u".to_string(), "0u".to_string());
    for (axis, of) in axes.iter().enumerate() {
        let WindowAxis { input, kernel, stride, dilation, pad_begin, pad_end, .. } = *of;
        text += &format!(
            "for (var t{axis} = 0u; t{axis} < {kernel}u; t{axis} = t{axis} + 1u) {{\nlet p{axis} = o{} * {stride}u + t{axis} * {dilation}u;\n",
            axis + 2
        );
        // Beyond the padding there is nothing to count.
        text += &format!("if (p{axis} >= {}u) {{ continue; }}\n", input + pad_begin + pad_end);
        end.push_str("}\n");
        at = format!("({at}) * {input}u + p{axis} - {pad_begin}u");
        tap = format!("({tap}) * {kernel}u + t{axis}");
    }
    let is_inside = |(axis, of): (usize, &WindowAxis)| {
        let low = (of.pad_begin > 0).then(|| format!("p{axis} >= {}u", of.pad_begin));
        low.into_iter().chain([format!("p{axis} < {}u", of.input + of.pad_begin)])
    };
    let conditions: Vec<String> = axes.iter().enumerate().flat_map(is_inside).collect();
    text += &format!(
        "if (!({})) {{ {outside} continue; }}\nlet at = {at};\nlet tap = {tap};\n{inside}\n{end}",
        conditions.join(" && ")
    );
    text
}

fn axes(window: &Window, input: &Shape, kernel: &[usize]) -> Result<Vec<WindowAxis>, Unable> {
    if input.rank() < 3 {
        return Err("no spatial axis".into());
    }
    window.axes(&input[2..], kernel).map_err(|error| error.to_string().into())
}

fn kernel(window: &Window) -> Result<Vec<usize>, Unable> {
    window.kernel_shape.clone().ok_or_else(|| "a window without a shape".into())
}

pub(super) fn lower_max_pool(b: &mut Builder<'_>, node: &Node, op: &MaxPool) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (shape, dtype) = (b.shape(x), b.dtype(x));
    let axes = axes(&op.window, &shape, &kernel(&op.window)?)?;
    let operand = b.reread(x)?;
    let plane: usize = shape[2..].iter().product();
    let least = match dtype {
        dtype if is_float(dtype) => "-infinity()".to_string(),
        DType::I8 => "-128".to_string(),
        DType::U8 => "0u".to_string(),
        dtype => return Err(format!("no kernel for {dtype}").into()),
    };
    let above = if is_float(dtype) { "x > best || is_nan(x)" } else { "x > best" };
    let inside = format!("let x = $0(start + at);\nif (!found || {above}) {{ best = x; place = at; found = true; }}");
    let body = |result: &str| {
        format!(
            "{}let start = (o0 * {}u + o1) * {plane}u;\nvar best = {least};\nvar found = false;\nvar place = 0u;\n{}{result}",
            code::coordinates(&b.shape(output), "i", "o"),
            shape[1],
            taps(&axes, &inside, "")
        )
    };
    let values = Function::new(dtype, body("return best;"), vec![operand.clone()]);
    let indices = node.outputs.get(1).map(|&indices| {
        if op.column_major_indices && axes.len() > 1 {
            let mut place = "0u".to_string();
            let mut inner = plane;
            let mut parts = Vec::new();
            for axis in &axes {
                inner /= axis.input;
                parts.push((format!("place / {inner}u % {}u", axis.input), axis.input));
            }
            for (part, extent) in parts.iter().rev() {
                place = format!("({place}) * {extent}u + {part}");
            }
            (indices, body(&format!("if (!found) {{ return -1li; }}\nreturn i64(start + {place});")))
        } else {
            (indices, body("if (!found) { return -1li; }\nreturn i64(start + place);"))
        }
    });
    finish(b, output, values)?;
    if let Some((indices, body)) = indices {
        finish(b, indices, Function::new(DType::I64, body, vec![operand]))?;
    }
    Ok(())
}

pub(super) fn lower_average_pool(b: &mut Builder<'_>, node: &Node, op: &AveragePool) -> Result<(), Unable> {
    let outside = if op.count_include_pad { "count = count + 1.0;" } else { "" };
    let inside = "total = total + $0(start + at);\ncount = count + 1.0;";
    lower_sums(b, node, &op.window, inside, outside, "total / max(count, 1.0)")
}

pub(super) fn lower_lp_pool(b: &mut Builder<'_>, node: &Node, op: &LpPool) -> Result<(), Unable> {
    let inside = format!("total = total + pow_of(abs($0(start + at)), {});", float(op.p as f32));
    lower_sums(b, node, &op.window, &inside, "", &format!("pow_of(total, {})", float(1.0 / op.p as f32)))
}

fn lower_sums(
    b: &mut Builder<'_>,
    node: &Node,
    window: &Window,
    inside: &str,
    outside: &str,
    result: &str,
) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (shape, dtype) = (b.shape(x), b.dtype(x));
    if !is_float(dtype) {
        return Err(format!("no kernel for {dtype}").into());
    }
    let axes = axes(window, &shape, &kernel(window)?)?;
    let plane: usize = shape[2..].iter().product();
    let operand = b.reread(x)?;
    let body = format!(
        "{}let start = (o0 * {}u + o1) * {plane}u;\nvar total = 0.0;\nvar count = 0.0;\n{}return {};",
        code::coordinates(&b.shape(output), "i", "o"),
        shape[1],
        taps(&axes, inside, outside),
        code::wrapped(dtype, result)
    );
    finish(b, output, Function::new(dtype, body, vec![operand]))
}

pub(super) fn lower_global_pool(b: &mut Builder<'_>, node: &Node, op: &GlobalPool) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (shape, dtype) = (b.shape(x), b.dtype(x));
    if !is_float(dtype) {
        return Err(format!("no kernel for {dtype}").into());
    }
    let (rows, extent) = (shape[0] * shape[1], shape[2..].iter().product::<usize>());
    let operand = b.operands(&[x])?.remove(0);
    let of_row = match op.function {
        GlobalPoolFunction::Average => Some(RowFunction::Mean),
        GlobalPoolFunction::Max => Some(RowFunction::Max),
        GlobalPoolFunction::Lp { .. } => None,
    };
    if let Some(function) = of_row {
        let (length, to, name) = (extent, b.output(output)?, "global pool by hand");
        let finish = |_: &mut Text| format!("return {};", code::wrapped(dtype, "x"));
        if written::rows(b, &Rows { x: &operand, rows, length, function, term: "x", to, dtype, name }, finish) {
            return Ok(());
        }
    }
    let sums = |term: &str, result: &str| {
        let result = code::wrapped(dtype, result);
        super::reduce::sum(dtype, operand.clone(), &[rows, extent], &[false, true], term, &result, Vec::new())
    };
    let function = match op.function {
        GlobalPoolFunction::Average => sums("x", &format!("total / {}", float(extent as f32))),
        GlobalPoolFunction::Lp { p } => {
            let term = format!("pow_of(abs(x), {})", float(p as f32));
            sums(&term, &format!("pow_of(total, {})", float(1.0 / p as f32)))
        }
        GlobalPoolFunction::Max => {
            let body = format!(
                "var best = $0(i * {extent}u);\nfor (var r = 1u; r < {extent}u; r = r + 1u) {{ best = max_of(best, $0(i * {extent}u + r)); }}\nreturn best;"
            );
            Function::new(dtype, body, vec![operand.clone()])
        }
    };
    finish(b, output, function)
}

/// The definition, one output element an invocation: for what the product kernels don't take.
pub(super) fn lower_conv(b: &mut Builder<'_>, node: &Node, op: &Conv) -> Result<(), Unable> {
    let (x, w, output) = (super::input(node, 0)?, super::input(node, 1)?, node.outputs[0]);
    let (shape, filters, dtype) = (b.shape(x), b.shape(w), b.dtype(x));
    if !is_float(dtype) || b.dtype(w) != dtype {
        return Err(format!("no kernel for {dtype}").into());
    }
    let axes = axes(&op.window, &shape, &filters[2..])?;
    let mut operands = vec![b.reread(x)?, b.reread(w)?];
    let mut begin = "0.0".to_string();
    if let Some(bias) = node.inputs.get(2).copied().flatten() {
        begin = format!("${}(o1)", operands.len());
        operands.push(b.operand(bias)?);
    }
    let mut residual = String::new();
    if let Some(added) = node.inputs.get(3).copied().flatten() {
        residual = format!("total = total + ${}(i);\n", operands.len());
        operands.push(b.reread(added)?);
    }
    let (inner, per_group) = (filters[1], filters[0] / op.group);
    let (plane, kernel): (usize, usize) = (shape[2..].iter().product(), filters[2..].iter().product());
    let inside = format!(
        "for (var c = 0u; c < {inner}u; c = c + 1u) {{ total = fma($0(start + c * {plane}u + at), $1((o1 * {inner}u + c) * {kernel}u + tap), total); }}"
    );
    let body = format!(
        "{}let start = (o0 * {}u + o1 / {per_group}u * {inner}u) * {plane}u;\nvar total = {begin};\n{}{residual}return {};",
        code::coordinates(&b.shape(output), "i", "o"),
        shape[1],
        taps(&axes, &inside, ""),
        code::wrapped(dtype, &activation_text(op.activation, "total"))
    );
    finish(b, output, Function::new(dtype, body, operands))
}

/// Each output element asks which inputs reach it.
pub(super) fn lower_conv_transpose(b: &mut Builder<'_>, node: &Node, op: &ConvTranspose) -> Result<(), Unable> {
    let (x, w, output) = (super::input(node, 0)?, super::input(node, 1)?, node.outputs[0]);
    let (shape, filters, dtype, to) = (b.shape(x), b.shape(w), b.dtype(x), b.shape(output));
    if !is_float(dtype) || b.dtype(w) != dtype {
        return Err(format!("no kernel for {dtype}").into());
    }
    let mut operands = vec![b.reread(x)?, b.reread(w)?];
    let mut begin = "0.0".to_string();
    if let Some(bias) = node.inputs.get(2).copied().flatten() {
        begin = "$2(o1)".to_string();
        operands.push(b.operand(bias)?);
    }
    let axes = op.axes(&shape[2..], &filters[2..], &to[2..]).map_err(|error| error.to_string())?;
    let (per_group, inner) = (filters[1], shape[1] / op.group);
    let (plane, kernel): (usize, usize) = (shape[2..].iter().product(), filters[2..].iter().product());
    let (mut loops, mut end) = (String::new(), String::new());
    let (mut at, mut tap) = ("0u".to_string(), "0u".to_string());
    for (axis, of) in axes.iter().enumerate() {
        let WindowAxis { input, kernel: extent, stride, dilation, pad_begin: pad, .. } = *of;
        loops += &format!(
            "for (var t{axis} = 0u; t{axis} < {extent}u; t{axis} = t{axis} + 1u) {{\nlet p{axis} = o{} + {pad}u - t{axis} * {dilation}u;\nif (o{} + {pad}u < t{axis} * {dilation}u || p{axis} % {stride}u != 0u || p{axis} / {stride}u >= {input}u) {{ continue; }}\n",
            axis + 2,
            axis + 2
        );
        end += "}\n";
        at = format!("({at}) * {input}u + p{axis} / {stride}u");
        tap = format!("({tap}) * {extent}u + t{axis}");
    }
    let body = format!(
        "{}let group = o1 / {per_group}u;\nvar total = {begin};\n{loops}let at = {at};\nlet tap = {tap};\nfor (var c = 0u; c < {inner}u; c = c + 1u) {{\nlet at_channel = group * {inner}u + c;\ntotal = fma($0((o0 * {}u + at_channel) * {plane}u + at), $1((at_channel * {per_group}u + o1 % {per_group}u) * {kernel}u + tap), total);\n}}\n{end}return {};",
        code::coordinates(&to, "i", "o"),
        shape[1],
        code::wrapped(dtype, "total")
    );
    finish(b, output, Function::new(dtype, body, operands))
}
