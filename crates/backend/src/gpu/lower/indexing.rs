//! Elements put where indices say, and images of another size.

use super::{
    super::{
        code::{self, Operand, Text, coordinates, float, position, strides},
        plan::{Builder, Unable},
    },
    elementwise::is_float,
};
use crate::Work;
use cutover_graph::{
    Constant, Node,
    ops::{Inputs, Resize, Scatter, ScatterPlace, ScatterReduction, normalize_axis},
};
use cutover_tensor::{DType, Tensor, Value};

/// A copy of `x`, then an invocation for each run of updates that could meet one another, which takes them in their order.
pub(super) fn lower_scatter(b: &mut Builder<'_>, node: &Node, op: &Scatter) -> Result<(), Unable> {
    let (x, indices, updates) = (super::input(node, 0)?, super::input(node, 1)?, super::input(node, 2)?);
    let output = node.outputs[0];
    let (shape, index_shape, of_updates) = (b.shape(x), b.shape(indices), b.shape(updates));
    let (dtype, of_index) = (b.dtype(x), b.dtype(indices));
    if !matches!(of_index, DType::I64 | DType::I32) || b.dtype(updates) != dtype {
        return Err(format!("indices of {of_index}").into());
    }
    let operand = b.operand(x)?;
    if b.count(updates) == 0 {
        return b.alias(output, x);
    }
    let to = b.copied(x, operand)?;
    let (load_index, load_update) = (b.operand(indices)?, b.operand(updates)?);
    let mut text = Text::default();
    text.fault();
    let (index_at, update_at) = (text.function(&load_index), text.function(&load_update));
    let old = format!("{}(at)", text.function(&Operand::Buffer(to, dtype)));
    let store = text.store(to, code::storage_type(dtype));
    let new = "update".to_string();
    use ScatterReduction::*;
    let combined = match (op.reduction, dtype) {
        (Replace, _) => new,
        (Add | Maximum, DType::Bool) => format!("{old} || update"),
        (Multiply | Minimum, DType::Bool) => format!("{old} && update"),
        (Add, _) => format!("{old} + update"),
        (Multiply, _) => format!("{old} * update"),
        (Maximum, dtype) if is_float(dtype) => format!("max_of({old}, update)"),
        (Minimum, dtype) if is_float(dtype) => format!("min_of({old}, update)"),
        (Maximum, _) => format!("max({old}, update)"),
        (Minimum, _) => format!("min({old}, update)"),
    };
    let element = code::stored(dtype, &code::wrapped(dtype, &combined));
    let zero = code::integer(of_index, 0);
    let resolve = |name: &str, load: &str, extent: usize| {
        let extent = code::integer(of_index, extent as i128);
        format!(
            "var {name} = {load};\nif ({name} < {zero}) {{ {name} = {name} + {extent}; }}\nif ({name} < {zero} || {name} >= {extent}) {{ {} {name} = {zero}; }}\n",
            b.fault()
        )
    };
    let own = strides(&shape);
    let (lines, walk) = match op.place {
        ScatterPlace::Elements { axis } => {
            let axis = normalize_axis(axis, shape.rank()).map_err(|error| error.to_string())?;
            let within = |at: usize| at == axis || of_updates[at] <= shape[at];
            if index_shape != of_updates || of_updates.rank() != shape.rank() || !(0..shape.rank()).all(within) {
                return Err("updates of another shape than their indices".into());
            }
            let mut line_shape = of_updates.to_vec();
            let extent = std::mem::replace(&mut line_shape[axis], 1);
            let from = strides(&of_updates);
            let walk = format!(
                "{}let first = {};\nlet base = {};\nfor (var r = 0u; r < {extent}u; r = r + 1u) {{\nlet u = first + r * {}u;\n{}let at = base + u32(index) * {}u;\nlet update = {update_at}(u);\n{store}(at, {element});\n}}\n",
                coordinates(&line_shape, "i", "c"),
                position(&from, 0, "c"),
                position(&own, 0, "c"),
                from[axis],
                resolve("index", &format!("{index_at}(u)"), shape[axis]),
                own[axis],
            );
            (line_shape.iter().product::<usize>(), walk)
        }
        ScatterPlace::Slices => {
            let tuple = index_shape[index_shape.rank() - 1];
            let tuples: usize = index_shape[..index_shape.rank() - 1].iter().product();
            let slice: usize = shape[tuple..].iter().product();
            if tuples * slice != b.count(updates) {
                return Err("updates of another shape than their indices".into());
            }
            let mut walk = format!("for (var n = 0u; n < {tuples}u; n = n + 1u) {{\nvar at = i;\n");
            for axis in 0..tuple {
                let name = format!("index{axis}");
                walk += &resolve(&name, &format!("{index_at}(n * {tuple}u + {axis}u)"), shape[axis]);
                walk += &format!("at = at + u32({name}) * {}u;\n", own[axis]);
            }
            walk += &format!("let update = {update_at}(n * {slice}u + i);\n{store}(at, {element});\n}}\n");
            (slice, walk)
        }
    };
    let (groups, index) = code::grid(lines, code::GROUP);
    let kernel = format!(
        "@compute @workgroup_size({})\nfn main(@builtin(global_invocation_id) id: vec3<u32>) {{\n{}\n{walk}}}\n",
        code::GROUP,
        index.replace("at.x", "id.x").replace("at.y", "id.y")
    );
    b.push(text, &kernel, groups, "scatter", Work::default())?;
    b.hold(output, to);
    Ok(())
}

/// Separable: each axis has a table of which elements an element of the result is made of, and their weights.
pub(super) fn lower_resize(b: &mut Builder<'_>, node: &Node, op: &Resize) -> Result<(), Unable> {
    use cutover_graph::ops::CoordinateMode;
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let dtype = b.dtype(x);
    if op.coordinates == CoordinateMode::TfCropAndResize || !is_float(dtype) {
        return Err(format!("regions, or elements of {dtype}").into());
    }
    let mut values: Vec<Option<Value>> = vec![None];
    for input in node.inputs.iter().skip(1) {
        values.push(match *input {
            None => None,
            Some(id) => Some(Value::Tensor(b.known(id).ok_or_else(|| super::unknown("sizes"))?)),
        });
    }
    let zeros = Tensor::zeros(dtype, [0]).map_err(|error| error.to_string())?;
    values[0] = Some(Value::Tensor(zeros));
    let borrowed: Vec<Option<&Value>> = values.iter().map(Option::as_ref).collect();
    let (shape, to) = (b.shape(x), b.shape(output));
    let weights = op.weights(&shape, Inputs(&borrowed)).map_err(|error| error.to_string())?;
    let mut operands = vec![b.reread(x)?];
    let own = strides(&shape);
    let mut text = coordinates(&to, "i", "c");
    let (mut at, mut factor) = ("0u".to_string(), String::new());
    let (mut loops, mut end) = (String::new(), String::new());
    for (axis, taps) in weights.iter().enumerate() {
        let Some(taps) = taps else {
            at += &format!(" + c{axis} * {}u", own[axis]);
            continue;
        };
        let most = taps.iter().map(Vec::len).max().unwrap_or(0);
        if most == 0 || taps.len() != to[axis] {
            return Err("a filter without taps".into());
        }
        let padded =
            |tap: &Vec<(usize, f64)>| (0..most).map(|t| tap.get(t).copied().unwrap_or((0, 0.0))).collect::<Vec<_>>();
        let all: Vec<(usize, f64)> = taps.iter().flat_map(padded).collect();
        let places = all.iter().flat_map(|(place, _)| (*place as u32).to_le_bytes()).collect::<Vec<u8>>();
        let places = Tensor::from_bytes(DType::U32, [all.len()], &places).map_err(|error| error.to_string())?;
        let table = operands.len();
        operands.push(b.upload(&Constant::new(places), "plain", super::super::executable::to_device)?);
        let is_one = all.iter().all(|(_, weight)| *weight == 1.0) && most == 1;
        loops += &format!(
            "for (var t{axis} = 0u; t{axis} < {most}u; t{axis} = t{axis} + 1u) {{\nlet p{axis} = ${table}(c{axis} * {most}u + t{axis});\n"
        );
        end += "}\n";
        at += &format!(" + p{axis} * {}u", own[axis]);
        if !is_one {
            let weights = all.iter().map(|(_, weight)| *weight as f32).collect();
            let weights = Tensor::from_vec([all.len()], weights).map_err(|error| error.to_string())?;
            factor += &format!(" * ${}(c{axis} * {most}u + t{axis})", operands.len());
            operands.push(b.upload(&Constant::new(weights), "plain", super::super::executable::to_device)?);
        }
    }
    text += &format!(
        "var total = {};\n{loops}total = total + $0({at}){factor};\n{end}return {};",
        float(0.0),
        code::wrapped(dtype, "total")
    );
    b.define(output, text, operands)?;
    b.in_memory(output).map(drop)
}
