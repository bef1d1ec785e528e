//! LSTM and GRU layers: the inputs' product for all steps at once, then the recurrence, one thread per direction.

use super::product::pack_matrix;
use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    lower::Lowered,
    plan::{Builder, NoPlan},
};
use cutover_graph::{
    Node, ValueId,
    ops::{Cell, CellActivation, Direction, Recurrent},
};
use cutover_kernels::cpu::{
    Activation, IsaLevel, Residual,
    gemm::{self, Bias, Matrix},
    recurrent,
};

/// One layer, all directions.
pub(in crate::cpu) struct Recurrence {
    lstm: bool,
    coupled: bool,
    linear_before_reset: bool,
    clip: Option<f32>,
    reversed: Vec<bool>,
    steps: usize,
    batch: usize,
    width: usize,
    hidden: usize,
    input: Buffer,
    directions: Vec<Weights>,
    initial: Option<Buffer>,
    initial_cell: Option<Buffer>,
    /// `[direction][step][batch][gates · hidden]`.
    gates: Buffer,
    /// `[direction][batch][gates · hidden]` and `[direction][batch][hidden]`, for a GRU.
    scratch: Option<(Buffer, Buffer)>,
    /// `[step][direction][batch][hidden]`.
    output: Buffer,
    /// `[direction][batch][hidden]`.
    last: Buffer,
    cell: Option<Buffer>,
}

/// One direction's weights, packed, and its biases.
struct Weights {
    input: Buffer,
    hidden: Buffer,
    /// The candidate's recurrent weights alone, for a GRU that resets before the product.
    candidate: Option<Buffer>,
    /// Added with the inputs' product.
    bias: Option<Buffer>,
    /// Added with the recurrent product.
    recurrent_bias: Option<Buffer>,
    peepholes: Option<Buffer>,
}

pub(in crate::cpu) fn lower(builder: &mut Builder<'_>, node: &Node, op: &Recurrent) -> Result<bool, NoPlan> {
    let input = |index: usize| node.inputs.get(index).copied().flatten();
    let (Some(x), Some(w), Some(r)) = (input(0), input(1), input(2)) else { return Ok(false) };
    let (lstm, coupled, linear_before_reset) = match op.cell {
        Cell::Lstm { coupled } => (true, coupled, false),
        Cell::Gru { linear_before_reset } => (false, false, linear_before_reset),
        Cell::Rnn => return Ok(false),
    };
    let expected: &[CellActivation] = match lstm {
        true => &[CellActivation::Sigmoid, CellActivation::Tanh, CellActivation::Tanh],
        false => &[CellActivation::Sigmoid, CellActivation::Tanh],
    };
    let plain_activations = op.activations.chunks(expected.len()).all(|a| a == expected);
    let weights = [Some(w), Some(r), input(3), input(7)];
    let constant = weights.iter().flatten().all(|&id| builder.constant(id).is_some());
    if op.batch_first || input(4).is_some() || !plain_activations || !constant || !builder.is_float(x) {
        return Ok(false);
    }
    let (x_shape, r_shape) = (builder.shape(x), builder.shape(r));
    let (steps, batch, width, hidden) = (x_shape[0], x_shape[1], x_shape[2], r_shape[2]);
    if steps * batch * hidden == 0 || width == 0 {
        return Ok(false);
    }
    let reversed = match op.direction {
        Direction::Forward => vec![false],
        Direction::Reverse => vec![true],
        Direction::Bidirectional => vec![false, true],
    };
    let gates = op.cell.gates() * hidden;
    let mut directions = Vec::with_capacity(reversed.len());
    for direction in 0..reversed.len() {
        directions.push(pack_direction(
            builder,
            direction,
            lstm,
            linear_before_reset,
            width,
            hidden,
            gates,
            [w, r],
            input(3),
            input(7),
        )?);
    }
    let from = builder.plain(x)?;
    let initial = input(5).map(|id| builder.plain(id)).transpose()?;
    let initial_cell = input(6).filter(|_| lstm).map(|id| builder.plain(id)).transpose()?;
    let count = reversed.len();
    let gate_buffer = builder.new_floats(count * steps * batch * gates)?;
    let scratch = match lstm {
        true => None,
        false => Some((builder.new_floats(count * batch * gates)?, builder.new_floats(count * batch * hidden)?)),
    };
    let out = |builder: &mut Builder<'_>, index: usize, len: usize| match node.outputs.get(index) {
        Some(&id) => builder.new_plain(id),
        None => builder.new_floats(len),
    };
    let output = out(builder, 0, steps * count * batch * hidden)?;
    let last = out(builder, 1, count * batch * hidden)?;
    let cell = if lstm { Some(out(builder, 2, count * batch * hidden)?) } else { None };
    builder.need_workspace(gemm::gemm_workspace_len(width.max(hidden)));
    let of_weights = |w: &Weights| [Some(w.input), Some(w.hidden), w.candidate, w.bias, w.recurrent_bias, w.peepholes];
    let reads: Vec<Buffer> =
        directions.iter().flat_map(of_weights).chain([Some(from), initial, initial_cell]).flatten().collect();
    let (scratch_a, scratch_b) = scratch.unzip();
    let writes: Vec<Buffer> =
        [Some(gate_buffer), scratch_a, scratch_b, Some(output), Some(last), cell].into_iter().flatten().collect();
    let step = Recurrence {
        lstm,
        coupled,
        linear_before_reset,
        clip: op.clip,
        reversed,
        steps,
        batch,
        width,
        hidden,
        input: from,
        directions,
        initial,
        initial_cell,
        gates: gate_buffer,
        scratch,
        output,
        last,
        cell,
    };
    builder.push(Lowered::Recurrence(step), &reads, &writes);
    Ok(true)
}

fn pack_direction(
    builder: &mut Builder<'_>,
    direction: usize,
    lstm: bool,
    linear_before_reset: bool,
    width: usize,
    hidden: usize,
    gates: usize,
    [w, r]: [ValueId; 2],
    bias: Option<ValueId>,
    peepholes: Option<ValueId>,
) -> Result<Weights, NoPlan> {
    let level = builder.device.level;
    // Rows `rows` of direction `direction` of a `[d, gates, k]` tensor, as B of `k × rows`.
    let matrix = |builder: &mut Builder<'_>, id: ValueId, k: usize, first: usize, rows: usize| {
        let constant = builder.constant(id).expect("checked by the caller").clone();
        let how = format!("recurrent {direction} {first} {rows} {k} {}", level.name());
        builder.pack_floats(constant, how, gemm::packed_b_len(level, k, rows), 1, |all, _, packed| {
            pack_matrix(level, &all[(direction * gates + first) * k..][..rows * k], k, rows, true, packed);
        })
    };
    let input = matrix(builder, w, width, 0, gates)?;
    let recurrent = matrix(builder, r, hidden, 0, gates)?;
    let candidate = match !lstm && !linear_before_reset {
        true => Some(matrix(builder, r, hidden, 2 * hidden, hidden)?),
        false => None,
    };
    let mut vector = |id: ValueId, how: &str, len: usize, make: &(dyn Fn(&[f32]) -> Vec<f32> + Sync)| {
        let constant = builder.constant(id).expect("checked by the caller").clone();
        let how = format!("{how} {direction} {hidden}");
        builder.pack_floats(constant, how, len, 1, |all, _, packed| packed.copy_from_slice(&make(all)))
    };
    let own = |all: &[f32]| all[direction * 2 * gates..][..2 * gates].to_vec();
    // A GRU that resets after its product adds the candidate's recurrent bias inside the bracket.
    let late = !lstm && linear_before_reset;
    let with_input = |all: &[f32]| {
        let b = own(all);
        (0..gates).map(|i| if late && i >= 2 * hidden { b[i] } else { b[i] + b[gates + i] }).collect::<Vec<f32>>()
    };
    let with_recurrent = |all: &[f32]| {
        let b = own(all);
        (0..gates).map(|i| if i >= 2 * hidden { b[gates + i] } else { 0.0 }).collect::<Vec<f32>>()
    };
    let input_bias =
        bias.map(|b| vector(b, if late { "late bias" } else { "bias" }, gates, &with_input)).transpose()?;
    let recurrent_bias =
        bias.filter(|_| late).map(|b| vector(b, "recurrent bias", gates, &with_recurrent)).transpose()?;
    let peepholes = peepholes
        .map(|p| vector(p, "peepholes", 3 * hidden, &|all| all[direction * 3 * hidden..][..3 * hidden].to_vec()))
        .transpose()?;
    Ok(Weights { input, hidden: recurrent, candidate, bias: input_bias, recurrent_bias, peepholes })
}

impl Recurrence {
    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>, level: IsaLevel) {
        for direction in worker.share(self.directions.len()) {
            self.direction(direction, frame, worker.workspace, level);
        }
    }

    fn direction(&self, direction: usize, frame: &Frame<'_>, workspace: &mut [f32], level: IsaLevel) {
        let Recurrence { steps, batch, width, hidden, .. } = *self;
        let weights = &self.directions[direction];
        let gates = if self.lstm { 4 * hidden } else { 3 * hidden };
        let state = batch * hidden;
        let rows = steps * batch;
        let floats = |b: Buffer| frame.floats(b);
        let product = gemm::Gemm {
            m: rows,
            n: gates,
            k: width,
            a: Matrix::row_major(floats(self.input), width),
            b: floats(weights.input),
            alpha: 1.0,
            bias: weights.bias.map_or(Bias::None, |b| Bias::Column(floats(b))),
            residual: Residual::None,
            activation: Activation::Identity,
            output_stride: gates,
        };
        let all = frame.output_at(self.gates, direction * rows * gates, rows * gates);
        gemm::gemm(level, &product, 0..rows, 0..gemm::panel_count(level, gates), all, workspace);
        if let Some(cell) = self.cell {
            self.begin(frame, cell, self.initial_cell, direction);
        }
        // The last state's place holds the state before the first step until it is overwritten.
        self.begin(frame, self.last, self.initial, direction);
        let mut before = (self.last, direction * state);
        for number in 0..steps {
            let step = if self.reversed[direction] { steps - 1 - number } else { number };
            let at = (direction * rows + step * batch) * gates;
            let to = (step * self.directions.len() + direction) * state;
            let h = &floats(before.0)[before.1..][..state];
            let recurrent = gemm::Gemm {
                m: batch,
                n: gates,
                k: hidden,
                a: Matrix::row_major(h, hidden),
                b: floats(weights.hidden),
                alpha: 1.0,
                bias: weights.recurrent_bias.map_or(Bias::None, |b| Bias::Column(floats(b))),
                residual: if self.lstm { Residual::Output } else { Residual::None },
                activation: Activation::Identity,
                output_stride: gates,
            };
            let panels = 0..gemm::panel_count(level, gates);
            let output = frame.output_at(self.output, to, state);
            if let Some(cell) = self.cell {
                let sum = frame.output_at(self.gates, at, batch * gates);
                gemm::gemm(level, &recurrent, 0..batch, panels, sum, workspace);
                let problem = recurrent::Lstm {
                    hidden,
                    gates: &floats(self.gates)[at..][..batch * gates],
                    gates_stride: gates,
                    peepholes: weights.peepholes.map(&floats),
                    clip: self.clip,
                    coupled: self.coupled,
                };
                let cell = frame.output_at(cell, direction * state, state);
                recurrent::lstm(level, &problem, 0..batch, cell, output, hidden);
            } else if let Some((scratch, reset)) = self.scratch {
                let from = direction * batch * gates;
                gemm::gemm(
                    level,
                    &recurrent,
                    0..batch,
                    panels,
                    frame.output_at(scratch, from, batch * gates),
                    workspace,
                );
                let problem = recurrent::Gru {
                    hidden,
                    gates: &floats(self.gates)[at..][..batch * gates],
                    gates_stride: gates,
                    recurrent: &floats(scratch)[from..][..batch * gates],
                    recurrent_stride: gates,
                    linear_before_reset: self.linear_before_reset,
                    clip: self.clip,
                };
                if let Some(candidate) = weights.candidate {
                    recurrent::gru_reset(
                        level,
                        &problem,
                        0..batch,
                        h,
                        frame.output_at(reset, direction * state, state),
                    );
                    let product = gemm::Gemm {
                        n: hidden,
                        a: Matrix::row_major(&floats(reset)[direction * state..][..state], hidden),
                        b: floats(candidate),
                        ..recurrent
                    };
                    let to = frame.output_at(scratch, from + 2 * hidden, batch * gates - 2 * hidden);
                    gemm::gemm(level, &product, 0..batch, 0..gemm::panel_count(level, hidden), to, workspace);
                }
                recurrent::gru(level, &problem, 0..batch, h, output, hidden);
            }
            before = (self.output, to);
        }
        let bytes = &frame.bytes(before.0)[before.1 * 4..][..state * 4];
        frame.write(self.last, direction * state * 4, bytes);
    }

    /// Puts a direction's initial state, or zeros, into `to`.
    fn begin(&self, frame: &Frame<'_>, to: Buffer, initial: Option<Buffer>, direction: usize) {
        let bytes = self.batch * self.hidden * 4;
        match initial {
            Some(from) => frame.write(to, direction * bytes, &frame.bytes(from)[direction * bytes..][..bytes]),
            None => frame.zero(to, direction * bytes, bytes),
        }
    }
}
