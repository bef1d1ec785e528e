//! LSTM, GRU and RNN: the inputs' part of all gates as one product, then one kernel that walks the steps of each sequence.

use super::{
    super::{
        code::{self, Operand, Text, float},
        plan::{Builder, Unable},
    },
    product,
    written::{self, Recurrence},
};
use crate::Work;
use cutover_graph::{
    Constant, Node, ValueId,
    ops::{Cell, CellActivation, Direction, Recurrent},
};
use cutover_tensor::{DType, Tensor};
use std::fmt::Write;

/// Hidden units of which a group's memory holds three states.
const HIDDEN: usize = 1024;

fn activation(of: CellActivation, x: &str) -> String {
    use CellActivation::*;
    match of {
        Relu => format!("select({x}, 0.0, {x} < 0.0)"),
        Tanh => format!("tanh_of({x})"),
        Sigmoid => format!("sigmoid_of({x})"),
        Softsign => format!("({x} / (1.0 + abs({x})))"),
        Softplus => format!("softplus_of({x})"),
        Affine { alpha, beta } => format!("({} * {x} + {})", float(alpha), float(beta)),
        LeakyRelu { alpha } => format!("select({x}, {} * {x}, {x} < 0.0)", float(alpha)),
        ThresholdedRelu { alpha } => format!("select(0.0, {x}, {x} > {})", float(alpha)),
        ScaledTanh { alpha, beta } => format!("({} * tanh_of({} * {x}))", float(alpha), float(beta)),
        HardSigmoid { alpha, beta } => format!("clamp({} * {x} + {}, 0.0, 1.0)", float(alpha), float(beta)),
        Elu { alpha } => format!("select({x}, {} * expm1_of({x}), {x} < 0.0)", float(alpha)),
    }
}

pub(super) fn lower(b: &mut Builder<'_>, node: &Node, op: &Recurrent) -> Result<(), Unable> {
    let given = |index: usize| node.inputs.get(index).copied().flatten();
    let (x, w, r) = (super::input(node, 0)?, super::input(node, 1)?, super::input(node, 2)?);
    if b.dtype(x) != DType::F32 {
        return Err(format!("no kernel for {}", b.dtype(x)).into());
    }
    let (shape, hidden) = (b.shape(x), b.shape(r)[2]);
    let (steps, batch) = if op.batch_first { (shape[1], shape[0]) } else { (shape[0], shape[1]) };
    let (features, gates) = (shape[2], op.cell.gates());
    let (rows, directions) = (gates * hidden, b.shape(w)[0]);
    if hidden > HIDDEN || b.shape(r)[1] != rows || b.shape(w)[1] != rows || op.hidden_size.is_some_and(|h| h != hidden)
    {
        return Err(format!("{hidden} hidden units").into());
    }
    if let Some(lengths) = given(4)
        && let Some(known) = b.integers(lengths)
        && (known.len() != batch || known.iter().any(|&length| length < 0 || length > steps as i64))
    {
        return Err("lengths beyond the sequences".into());
    }
    if features == 0 || hidden == 0 {
        return Err("an operand without elements".into());
    }
    let count = steps * batch;
    // W · x + b for every gate, step and sequence.
    let of_input = product::inputs_of_gates(b, x, w, given(3), [directions, count, features, rows])?;
    let recurrent = columns(b, r, [directions, rows, hidden])?;
    let bias = given(3).map(|bias| b.operand(bias)).transpose()?;
    let lengths = given(4).map(|id| b.reread(id)).transpose()?;
    let initial = given(5).map(|id| b.reread(id)).transpose()?;
    let initial_cell = given(6).map(|id| b.reread(id)).transpose()?;
    let peepholes = given(7).map(|id| b.operand(id)).transpose()?;
    let outputs = node.outputs.iter().map(|&output| b.output(output)).collect::<Result<Vec<_>, _>>()?;
    let state_index = match op.batch_first {
        true => format!("(n * {directions}u + d) * {hidden}u + j"),
        false => format!("(d * {batch}u + n) * {hidden}u + j"),
    };
    let row_index = match op.batch_first {
        true => format!("(n * {steps}u + t)"),
        false => format!("(t * {batch}u + n)"),
    };
    let output_index = match op.batch_first {
        true => format!("((n * {steps}u + t) * {directions}u + d) * {hidden}u + j"),
        false => format!("((t * {directions}u + d) * {batch}u + n) * {hidden}u + j"),
    };
    let is_reverse = match op.direction {
        Direction::Forward => "false",
        Direction::Reverse => "true",
        Direction::Bidirectional => "d == 1u",
    };
    let fault = b.fault();
    let clip = |value: &str| match op.clip {
        None => value.to_string(),
        Some(clip) => format!("min(max({value}, {}), {})", float(-clip), float(clip)),
    };
    let per_direction = op.cell.activation_count();
    // What both forms of the kernel call.
    let shared = |text: &mut Text| {
        let mut shared = String::new();
        let of_input = Some(of_input.clone());
        for (name, operand) in [
            ("gate_at", &of_input),
            ("bias_at", &bias),
            ("state_at", &initial),
            ("cell_at", &initial_cell),
            ("peephole_at", &peepholes),
        ] {
            let value = operand.as_ref().map_or("0.0".to_string(), |operand| format!("{}(i)", text.function(operand)));
            let _ = writeln!(shared, "fn {name}(i: u32) -> f32 {{ return {value}; }}");
        }
        let length = match &lengths {
            None => format!("return {steps}u;"),
            Some(lengths) => {
                text.fault();
                let load = text.function(lengths);
                format!(
                    "let given = u32({load}(n));\nif (given > {steps}u) {{ {fault} }}\nreturn min(given, {steps}u);"
                )
            }
        };
        let _ = writeln!(shared, "fn length_of(n: u32) -> u32 {{\n{length}\n}}");
        for index in 0..per_direction {
            let _ = writeln!(shared, "fn activate{index}(given: f32, d: u32) -> f32 {{");
            // The last of an LSTM takes the cell as it is.
            let is_state = index == 2 && matches!(op.cell, Cell::Lstm { .. });
            let _ = writeln!(shared, "let x = {};", if is_state { "given".to_string() } else { clip("given") });
            for direction in 0..directions {
                let value = activation(op.activations[direction * per_direction + index], "x");
                match direction + 1 == directions {
                    true => drop(writeln!(shared, "return {value};\n}}")),
                    false => drop(writeln!(shared, "if (d == {direction}u) {{ return {value}; }}")),
                }
            }
        }
        shared
    };
    let work = Work { operations: 2 * (directions * count * rows * hidden) as u64, ..Work::default() };

    let mut text = Text::default();
    let mut functions = shared(&mut text);
    let arrays: Vec<String> = outputs.iter().map(|&output| text.bind(output, "f32", true)).collect();
    let y = &arrays[0];
    // A sequence without a step leaves nothing.
    let of_some = |state: &str| match &lengths {
        None => state.to_string(),
        Some(_) => format!("select({state}, 0.0, length_of(n) == 0u)"),
    };
    let last = |index: usize, of: &str| {
        arrays.get(index).map_or(String::new(), |array| format!("{array}[{state_index}] = {of};\n"))
    };
    let _ = write!(
        functions,
        "fn gate(d: u32, t: u32, n: u32, row: u32) -> f32 {{ return gate_at((d * {count}u + {row_index}) * {rows}u + row); }}
fn recurrent_bias(d: u32, row: u32) -> f32 {{ return bias_at(d * {}u + {rows}u + row); }}
fn initial(d: u32, n: u32, j: u32) -> f32 {{ return state_at({state_index}); }}
fn initial_cell(d: u32, n: u32, j: u32) -> f32 {{ return cell_at({state_index}); }}
fn peephole(d: u32, i: u32) -> f32 {{ return peephole_at(d * {}u + i); }}
fn is_reverse(d: u32) -> bool {{ return {is_reverse}; }}
fn put(d: u32, t: u32, n: u32, j: u32, h: f32) {{ {y}[{output_index}] = h; }}
fn put_last(d: u32, n: u32, j: u32, h: f32, c: f32) {{\n{}{}}}\n",
        2 * rows,
        3 * hidden,
        last(1, &of_some("h")),
        last(2, &of_some("c"))
    );
    let by_hand =
        Recurrence { cell: op.cell, directions, steps, batch, hidden, matrix: &recurrent, to: outputs[0], work };
    if written::recurrence(b, &by_hand, text, &functions) {
        return Ok(());
    }

    let mut text = Text::default();
    let mut kernel = shared(&mut text);
    let _ = writeln!(kernel, "fn weight_at(i: u32) -> f32 {{ return {}(i); }}", text.function(&recurrent));
    let arrays: Vec<String> = outputs.iter().map(|&output| text.bind(output, "f32", true)).collect();
    let group = hidden.next_multiple_of(8).min(256).min(b.gpu.invocations);
    let each = format!("for (var j = lane; j < {hidden}u; j = j + {group}u)");
    // A gate's part of the state, of `of`.
    let dot = |gate: usize, of: &str, name: &str| {
        format!(
            "var {name} = bias_at(d * {}u + {}u + j);\nfor (var k = 0u; k < {hidden}u; k = k + 1u) {{ {name} = fma(weight_at((d * {hidden}u + k) * {rows}u + {}u + j), {of}[k], {name}); }}\n",
            2 * rows,
            rows + gate * hidden,
            gate * hidden
        )
    };
    let input = |gate: usize| format!("gate_at((d * {count}u + {row_index}) * {rows}u + {}u + j)", gate * hidden);
    let step = match op.cell {
        Cell::Rnn => format!("{each} {{\n{}next[j] = activate0({} + s0, d);\n}}\n", dot(0, "state", "s0"), input(0)),
        Cell::Gru { linear_before_reset: true } => format!(
            "{each} {{\n{}{}{}let z = activate0({} + s0, d);\nlet r = activate0({} + s1, d);\nlet c = activate1({} + r * s2, d);\nnext[j] = (1.0 - z) * c + z * state[j];\n}}\n",
            dot(0, "state", "s0"),
            dot(1, "state", "s1"),
            dot(2, "state", "s2"),
            input(0),
            input(1),
            input(2)
        ),
        Cell::Gru { linear_before_reset: false } => format!(
            "{each} {{\n{}{}cell[j] = activate0({} + s0, d);\nreset[j] = activate0({} + s1, d) * state[j];\n}}\nworkgroupBarrier();\n{each} {{\n{}let c = activate1({} + s2, d);\nnext[j] = (1.0 - cell[j]) * c + cell[j] * state[j];\n}}\n",
            dot(0, "state", "s0"),
            dot(1, "state", "s1"),
            input(0),
            input(1),
            dot(2, "reset", "s2"),
            input(2)
        ),
        Cell::Lstm { coupled } => {
            let p = |at: usize| format!("peephole_at(d * {}u + {}u + j) * ", 3 * hidden, at * hidden);
            let forget = match coupled {
                true => "1.0 - input".to_string(),
                false => format!("activate0({} + s2 + {}cell[j], d)", input(2), p(2)),
            };
            format!(
                "{each} {{\n{}{}{}{}let input = activate0({} + s0 + {}cell[j], d);\nlet forget = {forget};\nlet value = forget * cell[j] + input * activate1({} + s3, d);\nlet out = activate0({} + s1 + {}value, d);\nnext[j] = out * activate2(value, d);\nreset[j] = value;\n}}\n",
                dot(0, "state", "s0"),
                dot(1, "state", "s1"),
                dot(2, "state", "s2"),
                dot(3, "state", "s3"),
                input(0),
                p(0),
                input(3),
                input(1),
                p(1)
            )
        }
    };
    let is_lstm = matches!(op.cell, Cell::Lstm { .. });
    let keep_cell = if is_lstm { "cell[j] = reset[j];\n" } else { "" };
    let y = arrays[0].clone();
    let last = |index: usize, of: &str| match arrays.get(index) {
        Some(array) => format!("{array}[{state_index}] = {};\n", of_some(&format!("{of}[j]"))),
        None => String::new(),
    };
    let _ = write!(
        kernel,
        "var<workgroup> state: array<f32, {hidden}>;\nvar<workgroup> next: array<f32, {hidden}>;\nvar<workgroup> cell: array<f32, {hidden}>;\nvar<workgroup> reset: array<f32, {hidden}>;\n@compute @workgroup_size({group})\nfn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) lane: u32) {{\nlet n = id.x;\nlet d = id.y;\nlet length = length_of(n);\n{each} {{\nstate[j] = state_at({state_index});\ncell[j] = cell_at({state_index});\n}}\nworkgroupBarrier();\nfor (var s = 0u; s < {steps}u; s = s + 1u) {{\nlet is_on = s < length;\nlet t = select(s, length - 1u - s, is_on && ({is_reverse}));\n{step}workgroupBarrier();\n{each} {{\nif (is_on) {{\nstate[j] = next[j];\n{keep_cell}{y}[{output_index}] = next[j];\n}} else {{\n{y}[{output_index}] = 0.0;\n}}\n}}\nworkgroupBarrier();\n}}\n{each} {{\n{}{}}}\n}}\n",
        last(1, "state"),
        if is_lstm { last(2, "cell") } else { String::new() }
    );
    let groups = [batch as u32, directions as u32, 1];
    b.push(text, &kernel, groups, "recurrent", work)
}

/// Matrices `[directions, rows, columns]` with their rows side by side: `[directions, columns, rows]`.
fn columns(b: &mut Builder<'_>, id: ValueId, [directions, rows, columns]: [usize; 3]) -> Result<Operand, Unable> {
    if let Some(constant) = b.constant(id) {
        let packed = columns_of(&constant, [directions, rows, columns])?;
        return b.upload(&packed, "plain", super::super::executable::to_device);
    }
    let operand = b.operand(id)?;
    let matrix = rows * columns;
    let body = format!("return $0(i / {matrix}u * {matrix}u + i % {rows}u * {columns}u + i / {rows}u % {columns}u);");
    super::reduce::computed(b, code::Function::new(DType::F32, body, vec![operand]), directions * matrix)
}

pub(super) fn columns_of(constant: &Constant, [directions, rows, columns]: [usize; 3]) -> Result<Constant, Unable> {
    let values = constant.tensor.to_vec::<f32>().map_err(|error| error.to_string())?;
    let mut moved: Vec<f32> = Vec::with_capacity(values.len());
    for matrix in values.chunks_exact(rows * columns) {
        (0..columns).for_each(|column| moved.extend(matrix.iter().skip(column).step_by(columns)));
    }
    let tensor = Tensor::from_vec([directions, columns, rows], moved).map_err(|error| error.to_string())?;
    Ok(Constant::derived(tensor, "rows side by side", &[constant.identity()]))
}
