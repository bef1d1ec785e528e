//! Softmax and normalisations: a few numbers of every row, then a function of each element that whoever reads it may compute.

use super::{
    super::{
        code::{self, Function, Operand, Text, float},
        plan::{Builder, Unable},
    },
    elementwise::is_float,
    reduce::{around, computed, sum},
    written::{self, Rows},
};
use cutover_graph::{
    Node,
    ops::{BatchNorm, InstanceNorm, LayerNorm, LpNorm, LpNormOrder, Lrn, Softmax, SoftmaxFunction, normalize_axis},
};
use cutover_kernels::cuda::RowFunction;
use cutover_tensor::DType;

fn floats_only(dtype: DType) -> Result<(), Unable> {
    if is_float(dtype) { Ok(()) } else { Err(format!("no kernel for {dtype}").into()) }
}

pub(super) fn lower_softmax(b: &mut Builder<'_>, node: &Node, op: &Softmax) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (shape, dtype) = (b.shape(x), b.dtype(x));
    floats_only(dtype)?;
    let (outer, extent, inner) = match (op.coerced, shape.rank()) {
        (_, 0) => (1, 1, 1),
        (true, rank) => {
            let first = if op.axis == rank as i64 { Ok(rank) } else { normalize_axis(op.axis, rank) };
            let first = first.map_err(|error| error.to_string())?;
            (shape[..first].iter().product(), shape[first..].iter().product(), 1)
        }
        (false, rank) => around(&shape, normalize_axis(op.axis, rank).map_err(|error| error.to_string())?),
    };
    let x = b.reread(x)?;
    let of_row = match op.function {
        SoftmaxFunction::Softmax => Some(RowFunction::Softmax),
        SoftmaxFunction::LogSoftmax => Some(RowFunction::LogSoftmax),
        SoftmaxFunction::Hardmax => None,
    };
    if let Some(function) = of_row.filter(|_| inner == 1) {
        let (rows, length, to, name) = (outer, extent, b.output(output)?, "softmax by hand");
        let finish = |_: &mut Text| format!("return {};", code::wrapped(dtype, "x"));
        if written::rows(b, &Rows { x: &x, rows, length, function, term: "x", to, dtype, name }, finish) {
            return Ok(());
        }
    }
    let line = format!("let start = i / {inner}u * {}u + i % {inner}u;\n", extent * inner);
    let each = |statement: &str| {
        format!("for (var r = 0u; r < {extent}u; r = r + 1u) {{\nlet x = $0(start + r * {inner}u);\n{statement}\n}}\n")
    };
    let of_line = format!("i / {}u * {inner}u + i % {inner}u", extent * inner);
    if op.function == SoftmaxFunction::Hardmax {
        let body = format!(
            "{line}var best = $0(start);\nvar at = 0u;\n{}return at;",
            each("if (x > best) { best = x; at = r; }")
        );
        let at = computed(b, Function::new(DType::U32, body, vec![x]), outer * inner)?;
        let body = format!("return select(0.0, 1.0, i / {inner}u % {extent}u == $0({of_line}));");
        return b.define(output, body, vec![at]);
    }
    let largest = format!("{line}var best = $0(start);\n{}return best;", each("best = max_of(best, x);"));
    let largest = computed(b, Function::new(DType::F32, largest, vec![x.clone()]), outer * inner)?;
    let total = format!(
        "{line}let largest = $1(i);\nvar total = 0.0;\n{}return {};",
        each("total = total + exp_of(x - largest);"),
        if op.function == SoftmaxFunction::Softmax { "1.0 / total" } else { "log_of(total)" }
    );
    let total = computed(b, Function::new(DType::F32, total, vec![x.clone(), largest.clone()]), outer * inner)?;
    let result = match op.function {
        SoftmaxFunction::Softmax => "exp_of($0(i) - $1(line)) * $2(line)",
        _ => "$0(i) - $1(line) - $2(line)",
    };
    let body = format!("let line = {of_line};\nreturn {};", code::wrapped(dtype, result));
    b.define(output, body, vec![x, largest, total])
}

/// The mean of every one of `rows` rows of `extent` elements, and `1 / √(variance + epsilon)`.
fn moments(
    b: &mut Builder<'_>,
    x: &Operand,
    rows: usize,
    extent: usize,
    epsilon: f32,
    centred: bool,
) -> Result<(Operand, Operand), Unable> {
    let (shape, reduced, count) = ([rows, extent], [false, true], float(extent as f32));
    let mean = match centred {
        true => {
            let mean = sum(DType::F32, x.clone(), &shape, &reduced, "x", &format!("total / {count}"), Vec::new());
            computed(b, mean, rows)?
        }
        false => Operand::Literal("0.0".to_string(), DType::F32),
    };
    let inverse = format!("1.0 / sqrt(total / {count} + {})", float(epsilon));
    let term = "(x - $1(i)) * (x - $1(i))";
    let inverse = sum(DType::F32, x.clone(), &shape, &reduced, term, &inverse, vec![mean.clone()]);
    let inverse = computed(b, inverse, rows)?;
    Ok((mean, inverse))
}

fn norm_of_row(centred: bool, epsilon: f32) -> RowFunction {
    if centred { RowFunction::LayerNorm { epsilon } } else { RowFunction::RmsNorm { epsilon } }
}

pub(super) fn lower_layer_norm(b: &mut Builder<'_>, node: &Node, op: &LayerNorm) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (shape, dtype) = (b.shape(x), b.dtype(output));
    floats_only(dtype)?;
    let axis = normalize_axis(op.axis, shape.rank()).map_err(|error| error.to_string())?;
    let (rows, extent) = (shape[..axis].iter().product(), shape[axis..].iter().product::<usize>());
    let operand = b.reread(x)?;
    if node.outputs.len() == 1 {
        let mut scaled = Vec::new();
        for (input, sign) in [(1, "*"), (2, "+")] {
            let Some(id) = node.inputs.get(input).copied().flatten() else { continue };
            scaled.push((code::broadcast(&b.shape(id), &shape), sign, b.operand(id)?));
        }
        let finish = |text: &mut Text| {
            let mut body = "var y = x;\n".to_string();
            for ((statements, index), sign, operand) in &scaled {
                body += &format!("{{\n{statements}y = y {sign} {}({index});\n}}\n", text.function(operand));
            }
            body + &format!("return {};", code::wrapped(dtype, "y"))
        };
        let function = norm_of_row(op.centred, op.epsilon);
        let (length, to, name) = (extent, b.output(output)?, "layer normalization by hand");
        if written::rows(b, &Rows { x: &operand, rows, length, function, term: "x", to, dtype, name }, finish) {
            return Ok(());
        }
    }
    let (mean, inverse) = moments(b, &operand, rows, extent, op.epsilon, op.centred)?;
    let mut operands = vec![operand, mean.clone(), inverse.clone()];
    let mut body = format!("let row = i / {extent}u;\nvar y = ($0(i) - $1(row)) * $2(row);\n");
    for (input, sign) in [(1, "*"), (2, "+")] {
        let Some(id) = node.inputs.get(input).copied().flatten() else { continue };
        let (statements, index) = code::broadcast(&b.shape(id), &shape);
        body += &format!("{{\n{statements}y = y {sign} ${}({index});\n}}\n", operands.len());
        operands.push(b.operand(id)?);
    }
    b.define(output, body + &format!("return {};", code::wrapped(dtype, "y")), operands)?;
    let statistics = if op.centred { vec![mean, inverse] } else { vec![inverse] };
    for (&output, operand) in node.outputs.iter().skip(1).zip(statistics) {
        b.define(output, "return $0(i);", vec![operand])?;
    }
    Ok(())
}

pub(super) fn lower_instance_norm(b: &mut Builder<'_>, node: &Node, op: &InstanceNorm) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (shape, dtype) = (b.shape(x), b.dtype(x));
    floats_only(dtype)?;
    let channels = shape[1];
    let groups = op.groups.unwrap_or(channels);
    let plane: usize = shape[2..].iter().product();
    let (rows, extent) = (shape[0] * groups, channels / groups * plane);
    let operand = b.reread(x)?;
    let (scale, bias) = (b.operand(super::input(node, 1)?)?, b.operand(super::input(node, 2)?)?);
    let counts = [b.count(super::input(node, 1)?), b.count(super::input(node, 2)?)];
    if counts != [channels; 2] {
        return Err("a scale for each group".into());
    }
    let finish = |text: &mut Text| {
        let (scale, bias) = (text.function(&scale), text.function(&bias));
        let value = code::wrapped(dtype, &format!("x * {scale}(c) + {bias}(c)"));
        format!("let c = i / {plane}u % {channels}u;\nreturn {value};")
    };
    let (function, length) = (norm_of_row(true, op.epsilon), extent);
    let (to, name) = (b.output(output)?, "channel normalization by hand");
    if written::rows(b, &Rows { x: &operand, rows, length, function, term: "x", to, dtype, name }, finish) {
        return Ok(());
    }
    let (mean, inverse) = moments(b, &operand, rows, extent, op.epsilon, true)?;
    let body = format!(
        "let row = i / {extent}u;\nlet c = i / {plane}u % {channels}u;\nreturn {};",
        code::wrapped(dtype, "($0(i) - $1(row)) * $2(row) * $3(c) + $4(c)")
    );
    b.define(output, body, vec![operand, mean, inverse, scale, bias])
}

pub(super) fn lower_batch_norm(b: &mut Builder<'_>, node: &Node, op: &BatchNorm) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (shape, dtype) = (b.shape(x), b.dtype(x));
    floats_only(dtype)?;
    if op.training.is_some() || op.per_element {
        return Err("in training, or for every element".into());
    }
    let channels = if shape.rank() < 2 { 1 } else { shape[1] };
    let plane: usize = shape.iter().skip(2).product();
    let ids = (0..5).map(|at| super::input(node, at)).collect::<Result<Vec<_>, _>>()?;
    if ids[1..].iter().any(|&id| b.count(id) != channels) {
        return Err("parameters of another extent than the channels'".into());
    }
    let operands = b.operands(&ids)?;
    let body = format!(
        "let c = i / {plane}u % {channels}u;\nlet inverse = 1.0 / sqrt($4(c) + {});\nreturn {};",
        float(op.epsilon),
        code::wrapped(dtype, "($0(i) - $3(c)) * inverse * $1(c) + $2(c)")
    );
    b.define(output, body, operands)
}

pub(super) fn lower_lrn(b: &mut Builder<'_>, node: &Node, op: &Lrn) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (shape, dtype) = (b.shape(x), b.dtype(x));
    floats_only(dtype)?;
    let (channels, plane) = (shape[1], shape[2..].iter().product::<usize>());
    let (before, after) = ((op.size - 1) / 2, op.size / 2);
    let operand = b.reread(x)?;
    let body = format!(
        "let c = i / {plane}u % {channels}u;\nvar total = 0.0;\nfor (var at = max(c, {before}u) - {before}u; at < min(c + {}u, {channels}u); at = at + 1u) {{\nlet x = $0(i + (at - c) * {plane}u);\ntotal = total + x * x;\n}}\nlet base = {} + {} * total;\nreturn {};",
        after + 1,
        float(op.bias),
        float(op.alpha / op.size as f32),
        code::wrapped(dtype, &format!("$0(i) / pow_of(base, {})", float(op.beta)))
    );
    b.define(output, body, vec![operand])
}

pub(super) fn lower_lp_norm(b: &mut Builder<'_>, node: &Node, op: &LpNorm) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (shape, dtype) = (b.shape(x), b.dtype(x));
    floats_only(dtype)?;
    let axis = normalize_axis(op.axis, shape.rank()).map_err(|error| error.to_string())?;
    let (outer, extent, inner) = around(&shape, axis);
    let operand = b.reread(x)?;
    let (term, finish) = match op.p {
        LpNormOrder::L1 => ("abs(x)", "total"),
        LpNormOrder::L2 => ("x * x", "sqrt(total)"),
    };
    let reduced = [false, true, false];
    let norm = sum(DType::F32, operand.clone(), &[outer, extent, inner], &reduced, term, finish, Vec::new());
    let norm = computed(b, norm, outer * inner)?;
    let body = format!(
        "let norm = $1(i / {}u * {inner}u + i % {inner}u);\nif (norm == 0.0) {{ return 0.0; }}\nreturn {};",
        extent * inner,
        code::wrapped(dtype, "$0(i) / norm")
    );
    b.define(output, body, vec![operand, norm])
}
