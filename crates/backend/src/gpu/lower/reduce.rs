//! Many elements into one: reductions, choices along an axis, running totals, the best of a line.

use super::{
    super::{
        code::{self, Function, GROUP, Operand, Text, coordinates, float, integer, position, strides},
        plan::{Builder, Unable},
    },
    elementwise::is_float,
    written::{self, Rows},
};
use crate::Work;
use cutover_graph::{
    Node, ValueId,
    ops::{ArgReduce, Cumulate, Reduce, ReduceFunction, TopK, normalize_axis},
};
use cutover_kernels::cuda::RowFunction;
use cutover_tensor::DType;
use std::rc::Rc;

/// Elements that are summed one after the other before their sum joins the others', so that rounding does not add up.
const SUMMED: usize = 64;

/// Elements that are compared for the best of all lines at most.
const COMPARED: usize = 1 << 31;

/// Statements that give `base`, where in `shape` the elements of result `i` begin, and the expression for the `r`-th of them after it.
fn elements(shape: &[usize], reduced: &[bool]) -> (String, String, usize) {
    let all = strides(shape);
    let pick = |kept: bool| {
        let axes = (0..shape.len()).filter(move |&axis| reduced[axis] != kept);
        axes.map(|axis| (shape[axis], all[axis])).unzip::<usize, usize, Vec<_>, Vec<_>>()
    };
    let (kept, inner) = (pick(true), pick(false));
    let statements = format!("{}let base = {};\n", coordinates(&kept.0, "i", "k"), position(&kept.1, 0, "k"));
    let count: usize = inner.0.iter().product();
    // Axes that follow each other without a gap are one.
    let mut merged: Vec<(usize, usize)> = Vec::new();
    for (&extent, &stride) in inner.0.iter().zip(&inner.1).filter(|&(&extent, _)| extent != 1) {
        match merged.last_mut() {
            Some((of, last)) if *last == stride * extent => (*of, *last) = (*of * extent, stride),
            _ => merged.push((extent, stride)),
        }
    }
    let own = strides(&merged.iter().map(|m| m.0).collect::<Vec<_>>());
    let term = |(at, &(extent, stride)): (usize, &(usize, usize))| match at {
        0 => format!("r / {}u * {stride}u", own[at]),
        _ => format!("r / {}u % {extent}u * {stride}u", own[at]),
    };
    let offset: Vec<String> = merged.iter().enumerate().map(term).collect();
    let offset = if offset.is_empty() { "0u".to_string() } else { offset.join(" + ") };
    (statements, format!("base + {offset}"), count)
}

/// A sum of `term`, an expression of the element `x`, over the axes of `reduced`; `finish` is of the sum `total`.
pub(super) fn sum(
    dtype: DType,
    operand: Operand,
    shape: &[usize],
    reduced: &[bool],
    term: &str,
    finish: &str,
    others: Vec<Operand>,
) -> Function {
    let (statements, index, count) = elements(shape, reduced);
    let of = code::value_type(dtype).unwrap_or("f32");
    let zero = integer(dtype, 0);
    let body = format!(
        "{statements}var total: {of} = {zero};\nfor (var r0 = 0u; r0 < {count}u; r0 = r0 + {SUMMED}u) {{\nvar part: {of} = {zero};\nfor (var r = r0; r < min(r0 + {SUMMED}u, {count}u); r = r + 1u) {{\nlet x = $0({index});\npart = part + {term};\n}}\ntotal = total + part;\n}}\nreturn {finish};"
    );
    Function::new(dtype, body, [vec![operand], others].concat())
}

/// How many rows, and of what length, if it is the last axes that are reduced.
fn rows_of(shape: &[usize], reduced: &[bool]) -> Option<(usize, usize)> {
    let mut axes = shape.iter().zip(reduced).filter(|(extent, _)| **extent != 1);
    let is_last = axes.clone().skip_while(|(_, reduced)| !**reduced).all(|(_, reduced)| *reduced);
    let rows = axes.by_ref().take_while(|(_, reduced)| !**reduced).map(|(extent, _)| extent).product();
    is_last.then(|| (rows, shape.iter().product::<usize>() / rows))
}

/// A reduction as one of rows: of what, and what becomes of it.
fn of_row(function: ReduceFunction) -> Option<(RowFunction, &'static str, &'static str)> {
    use ReduceFunction::*;
    Some(match function {
        Sum => (RowFunction::Sum, "x", "x"),
        Mean => (RowFunction::Mean, "x", "x"),
        Max => (RowFunction::Max, "x", "x"),
        Min => (RowFunction::Min, "x", "x"),
        SumSquare => (RowFunction::Sum, "x * x", "x"),
        L1 => (RowFunction::Sum, "abs(x)", "x"),
        L2 => (RowFunction::Sum, "x * x", "sqrt(x)"),
        LogSum => (RowFunction::Sum, "x", "log_of(x)"),
        Prod | LogSumExp => return None,
    })
}

pub(super) fn lower_reduce(b: &mut Builder<'_>, node: &Node, op: &Reduce) -> Result<(), Unable> {
    use ReduceFunction::*;
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let axes = match node.inputs.get(1).copied().flatten() {
        None => Vec::new(),
        Some(axes) => b.integers(axes).ok_or_else(|| super::unknown("axes"))?,
    };
    let (shape, dtype) = (b.shape(x), b.dtype(x));
    let reduced = op.reduced(&axes, shape.rank()).map_err(|error| error.to_string())?;
    let count: usize = shape.iter().zip(&reduced).filter(|(_, reduced)| **reduced).map(|(d, _)| *d).product();
    if count == 0 {
        return Err("a reduction of nothing".into());
    }
    let float_only = matches!(op.function, L2 | LogSum | LogSumExp);
    if dtype == DType::Bool && !matches!(op.function, Max | Min) || float_only && !is_float(dtype) {
        return Err(format!("no kernel for {dtype}").into());
    }
    let operand = if op.function == LogSumExp { b.reread(x)? } else { b.operands(&[x])?.remove(0) };
    if let Some(of_row) = of_row(op.function)
        && let Some((rows, length)) = rows_of(&shape, &reduced)
        && is_float(dtype)
    {
        let (function, term, finish) = of_row;
        let (to, name) = (b.output(output)?, "reduction by hand");
        let finish = |_: &mut Text| format!("return {};", code::wrapped(dtype, finish));
        if written::rows(b, &Rows { x: &operand, rows, length, function, term, to, dtype, name }, finish) {
            return Ok(());
        }
    }
    let sums = |term: &str, finish: &str| {
        let finish = code::wrapped(dtype, finish);
        sum(dtype, operand.clone(), &shape, &reduced, term, &finish, Vec::new())
    };
    let mean = || match is_float(dtype) {
        true => Ok(format!("total / {}", float(count as f32))),
        false if count < 1 << 16 && dtype.bits() <= 16 => Ok(format!("total / {}", integer(dtype, count as i128))),
        false => Err(Unable::Because(format!("a mean of {dtype}"))),
    };
    let function = match op.function {
        Sum => sums("x", "total"),
        Mean => sums("x", &mean()?),
        SumSquare => sums("x * x", "total"),
        L1 => sums("abs(x)", "total"),
        L2 => sums("x * x", "sqrt(total)"),
        LogSum => sums("x", "log_of(total)"),
        Prod | Max | Min | LogSumExp => {
            let (statements, index, count) = elements(&shape, &reduced);
            let combine = match (op.function, dtype) {
                (Prod, _) => "best * x".to_string(),
                (Max, DType::Bool) => "best || x".to_string(),
                (Min, DType::Bool) => "best && x".to_string(),
                (Min, dtype) if is_float(dtype) => "min_of(best, x)".to_string(),
                (Min, _) => "min(best, x)".to_string(),
                (_, dtype) if is_float(dtype) => "max_of(best, x)".to_string(),
                _ => "max(best, x)".to_string(),
            };
            let first = index.replace("r / ", "0u / ");
            let mut body = format!(
                "{statements}var best = $0({first});\nfor (var r = 1u; r < {count}u; r = r + 1u) {{\nlet x = $0({index});\nbest = {combine};\n}}\n"
            );
            body += &match op.function {
                LogSumExp => format!(
                    "if (is_infinite(best)) {{ return best; }}\nvar total = 0.0;\nfor (var r = 0u; r < {count}u; r = r + 1u) {{ total = total + exp_of($0({index}) - best); }}\nreturn best + log_of(total);"
                ),
                _ => format!("return {};", code::wrapped(dtype, "best")),
            };
            Function::new(dtype, body, vec![operand.clone()])
        }
    };
    finish(b, output, function)
}

/// `id` is `function`, computed now: nobody should go through its loop twice.
pub(super) fn finish(b: &mut Builder<'_>, id: ValueId, function: Function) -> Result<(), Unable> {
    b.define(id, function.body, function.operands)?;
    b.in_memory(id).map(drop)
}

/// `function` of `count` results, computed now.
pub(super) fn computed(b: &mut Builder<'_>, function: Function, count: usize) -> Result<Operand, Unable> {
    b.placed(&Operand::Function(Rc::new(function)), count)
}

/// Outer elements, the extent of an axis, and the elements behind it.
pub(super) fn around(shape: &[usize], axis: usize) -> (usize, usize, usize) {
    (shape[..axis].iter().product(), shape[axis], shape[axis + 1..].iter().product())
}

/// The sign that says that the new element `x` comes before `best`.
fn beats(largest: bool, dtype: DType) -> String {
    let sign = if largest { ">" } else { "<" };
    match is_float(dtype) {
        // NaN loses against every number.
        true => format!("((x {sign} best && !is_nan(x)) || (is_nan(best) && !is_nan(x)))"),
        false => format!("(x {sign} best)"),
    }
}

pub(super) fn lower_arg_reduce(b: &mut Builder<'_>, node: &Node, op: &ArgReduce) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (shape, dtype) = (b.shape(x), b.dtype(x));
    let axis = normalize_axis(op.axis, shape.rank()).map_err(|error| error.to_string())?;
    let (_, extent, inner) = around(&shape, axis);
    if dtype == DType::Bool || extent == 0 {
        return Err(format!("no kernel for {dtype} of {extent} elements").into());
    }
    let new = beats(op.largest, dtype);
    let old = new.replace("best", "\u{1}").replace('x', "best").replace('\u{1}', "x").replace("mabest", "max");
    let taken = if op.select_last { format!("{new} || !{old}") } else { new };
    let operand = b.reread(x)?;
    let body = format!(
        "let start = i / {inner}u * {}u + i % {inner}u;\nvar best = $0(start);\nvar at = 0u;\nfor (var r = 1u; r < {extent}u; r = r + 1u) {{\nlet x = $0(start + r * {inner}u);\nif ({taken}) {{ best = x; at = r; }}\n}}\nreturn i64(at);",
        extent * inner
    );
    finish(b, output, Function::new(DType::I64, body, vec![operand]))
}

pub(super) fn lower_cumulate(b: &mut Builder<'_>, node: &Node, op: &Cumulate) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (shape, dtype) = (b.shape(x), b.dtype(x));
    let axis =
        b.integers(super::input(node, 1)?).and_then(|v| v.first().copied()).ok_or_else(|| super::unknown("an axis"))?;
    let axis = normalize_axis(axis, shape.rank()).map_err(|error| error.to_string())?;
    let (outer, extent, inner) = around(&shape, axis);
    if dtype == DType::Bool {
        return Err("no kernel for bool".into());
    }
    let operand = b.operands(&[x])?.remove(0);
    let to = b.output(output)?;
    let mut text = Text::default();
    let load = text.function(&operand);
    let store = text.store(to, code::storage_type(dtype));
    let (groups, index) = code::grid(outer * inner, GROUP);
    let (of, identity) = (code::value_type(dtype).unwrap_or("f32"), integer(dtype, i128::from(op.product)));
    let step = if op.reverse { format!("{}u - step", extent - 1) } else { "step".to_string() };
    let next = code::wrapped(dtype, &format!("total {} {load}(at)", if op.product { "*" } else { "+" }));
    let kept = code::stored(dtype, if op.exclusive { "total" } else { "next" });
    let kernel = format!(
        "@compute @workgroup_size({GROUP})\nfn main(@builtin(global_invocation_id) at: vec3<u32>) {{\n{index}\nline(i);\n}}\nfn line(i: u32) {{\nlet start = i / {inner}u * {}u + i % {inner}u;\nvar total: {of} = {identity};\nfor (var step = 0u; step < {extent}u; step = step + 1u) {{\nlet at = start + ({step}) * {inner}u;\nlet next = {next};\n{store}(at, {kept});\ntotal = next;\n}}\n}}\n",
        extent * inner
    );
    b.push(text, &kernel, groups, "running total", Work::default())
}

/// Each element counts those that come before it in its line: that is its rank.
pub(super) fn lower_top_k(b: &mut Builder<'_>, node: &Node, op: &TopK) -> Result<(), Unable> {
    let x = super::input(node, 0)?;
    let (shape, dtype) = (b.shape(x), b.dtype(x));
    let axis = normalize_axis(op.axis, shape.rank()).map_err(|error| error.to_string())?;
    let (_, extent, inner) = around(&shape, axis);
    let k = b.shape(node.outputs[0])[axis];
    let count = b.count(x);
    if dtype == DType::Bool || count.saturating_mul(extent) > COMPARED {
        return Err(format!("the best of lines of {extent} {dtype}s").into());
    }
    let operand = b.reread(x)?;
    let (values, indices) = (b.output(node.outputs[0])?, b.output(node.outputs[1])?);
    let mut text = Text::default();
    let load = text.function(&operand);
    let (put, put_at) = (text.store(values, code::storage_type(dtype)), text.store(indices, "i64"));
    let (groups, index) = code::grid(count, GROUP);
    let sign = if op.largest { ">" } else { "<" };
    // NaN is larger than every number.
    let before = match (is_float(dtype), op.largest) {
        (true, true) => format!("(!is_nan(own) && (is_nan(x) || x {sign} own))"),
        (true, false) => format!("(!is_nan(x) && (is_nan(own) || x {sign} own))"),
        (false, _) => format!("(x {sign} own)"),
    };
    let equal = if is_float(dtype) { "(x == own || (is_nan(x) && is_nan(own)))" } else { "(x == own)" };
    let kernel = format!(
        "@compute @workgroup_size({GROUP})\nfn main(@builtin(global_invocation_id) at: vec3<u32>) {{\n{index}\nlet place = i / {inner}u % {extent}u;\nlet start = i / {block}u * {block}u + i % {inner}u;\nlet own = {load}(i);\nvar rank = 0u;\nfor (var r = 0u; r < {extent}u; r = r + 1u) {{\nlet x = {load}(start + r * {inner}u);\nif ({before} || ({equal} && r < place)) {{ rank = rank + 1u; }}\n}}\nif (rank < {k}u) {{\nlet slot = (i / {block}u * {k}u + rank) * {inner}u + i % {inner}u;\n{put}(slot, {element});\n{put_at}(slot, i64(place));\n}}\n}}\n",
        block = extent * inner,
        element = code::stored(dtype, "own"),
    );
    b.push(text, &kernel, groups, "best of a line", Work::default())
}
