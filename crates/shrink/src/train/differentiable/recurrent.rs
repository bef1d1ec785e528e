//! LSTM, GRU and RNN through time (Werbos 1990): one operation for all steps of a direction, whose derivative recomputes the gates at once.

use super::{
    elementwise::sum_to,
    product::{Packed, multiply},
    rows::{sigmoid, tanh},
    tape::{Function, View, apply},
};
use candle_core::{Result, Tensor};
use cutover_kernels::cpu::gemm::Matrix;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Gates in the order input, output, forget, cell.
    Lstm,
    /// Gates in the order update, reset, hidden.
    Gru {
        linear_before_reset: bool,
    },
    Rnn,
}

/// All steps of one direction: gates of the input `[t, n, g·h]`, its bias added; `R [g·h, h]`; and `h₀ [n·h]`, for an LSTM `c₀ [n·h]`, and the
/// bias of `R [g·h]` behind one another. Gives `[1, t, n, h]`, for an LSTM `[2, t, n, h]`: the states after every step, then the cells.
pub(crate) fn recur(kind: Kind, gates: &Tensor, weights: &Tensor, states: &Tensor) -> Result<Tensor> {
    apply(kind, &[gates, weights, states])
}

impl Kind {
    fn gates(self) -> usize {
        match self {
            Kind::Lstm => 4,
            Kind::Gru { .. } => 3,
            Kind::Rnn => 1,
        }
    }

    fn states(self) -> usize {
        if self == Kind::Lstm { 2 } else { 1 }
    }
}

/// Extents and operands of one run.
struct Run<'a> {
    kind: Kind,
    steps: usize,
    batch: usize,
    hidden: usize,
    gates: &'a [f32],
    weights: &'a [f32],
    initial: &'a [f32],
    bias: &'a [f32],
}

impl<'a> Run<'a> {
    fn new(kind: Kind, args: &[View<'a>]) -> Run<'a> {
        let (steps, batch, hidden) = (args[0].shape[0], args[0].shape[1], args[1].shape[1]);
        let (initial, bias) = args[2].data.split_at(kind.states() * batch * hidden);
        Run { kind, steps, batch, hidden, gates: args[0].data, weights: args[1].data, initial, bias }
    }

    /// Numbers in a state, and in all gates of a step.
    fn sizes(&self) -> (usize, usize) {
        (self.batch * self.hidden, self.batch * self.kind.gates() * self.hidden)
    }

    /// The rows of `R` from gate `from` to gate `to`, as the right operand of a product with states.
    fn packed(&self, from: usize, to: usize) -> Packed {
        let h = self.hidden;
        Packed::new(Matrix::transposed(&self.weights[from * h * h..], h), h, (to - from) * h)
    }

    fn add_bias(&self, of_state: &mut [f32]) {
        for row in of_state.chunks_exact_mut(self.bias.len().max(1)) {
            row.iter_mut().zip(self.bias).for_each(|(x, b)| *x += b);
        }
    }

    /// One step's update: `x` the gates of the input and `q` those of the state, which become the activated gates; `states` are `h` and, behind it, `c`.
    fn step(&self, x: &[f32], q: &mut [f32], states: &mut [f32], reset: Option<&Packed>, memory: &mut Memory) {
        let (h, gates) = (self.hidden, self.kind.gates());
        let (state, cell) = states.split_at_mut(self.batch * h);
        match self.kind {
            Kind::Lstm => {
                q.iter_mut().zip(x).for_each(|(q, x)| *q += x);
                for (n, q) in q.chunks_exact_mut(gates * h).enumerate() {
                    sigmoid(&mut q[..3 * h], &mut memory.copy);
                    tanh(&mut q[3 * h..], &mut memory.copy);
                    let (state, cell) = (&mut state[n * h..][..h], &mut cell[n * h..][..h]);
                    for i in 0..h {
                        cell[i] = q[2 * h + i] * cell[i] + q[i] * q[3 * h + i];
                    }
                    state.copy_from_slice(cell);
                    tanh(state, &mut memory.copy);
                    state.iter_mut().zip(&q[h..2 * h]).for_each(|(s, o)| *s *= o);
                }
            }
            Kind::Gru { .. } => {
                for (n, (q, x)) in q.chunks_exact_mut(gates * h).zip(x.chunks_exact(gates * h)).enumerate() {
                    let (zr, hidden) = q.split_at_mut(2 * h);
                    zr.iter_mut().zip(x).for_each(|(q, x)| *q += x);
                    sigmoid(zr, &mut memory.copy);
                    let state = &mut state[n * h..][..h];
                    match reset {
                        None => hidden.iter_mut().zip(&zr[h..]).for_each(|(q, r)| *q *= r),
                        Some(packed) => {
                            let scaled: Vec<f32> = state.iter().zip(&zr[h..]).map(|(s, r)| s * r).collect();
                            hidden.copy_from_slice(&self.bias[2 * h..]);
                            packed.multiply(Matrix::row_major(&scaled, h), 1, true, hidden, &mut memory.workspace);
                        }
                    }
                    hidden.iter_mut().zip(&x[2 * h..]).for_each(|(q, x)| *q += x);
                    tanh(hidden, &mut memory.copy);
                    for i in 0..h {
                        state[i] = (1.0 - zr[i]) * hidden[i] + zr[i] * state[i];
                    }
                }
            }
            Kind::Rnn => {
                q.iter_mut().zip(x).for_each(|(q, x)| *q += x);
                tanh(q, &mut memory.copy);
                state.copy_from_slice(q);
            }
        }
    }
}

#[derive(Default)]
struct Memory {
    copy: Vec<f32>,
    workspace: Vec<f32>,
}

impl Function for Kind {
    const NAME: &'static str = "recurrence";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let run = Run::new(*self, args);
        let (size, width) = run.sizes();
        let mut y = vec![0.0; self.states() * run.steps * size];
        let mut states = run.initial.to_vec();
        let (packed, mut memory, mut q) = (run.packed(0, self.gates()), Memory::default(), vec![0.0; width]);
        let reset = (*self == Kind::Gru { linear_before_reset: false }).then(|| run.packed(2, 3));
        for t in 0..run.steps {
            let state = Matrix::row_major(&states, run.hidden);
            packed.multiply(state, run.batch, false, &mut q, &mut memory.workspace);
            run.add_bias(&mut q);
            run.step(&run.gates[t * width..][..width], &mut q, &mut states, reset.as_ref(), &mut memory);
            for (part, state) in states.chunks_exact(size.max(1)).enumerate() {
                y[(part * run.steps + t) * size..][..size].copy_from_slice(state);
            }
        }
        (y, vec![self.states(), run.steps, run.batch, run.hidden])
    }

    fn backward(&self, args: &[View<'_>], y: View<'_>, dy: View<'_>, _: &[bool]) -> Vec<Option<Vec<f32>>> {
        let run = Run::new(*self, args);
        let (size, width) = run.sizes();
        let (h, gates, steps) = (run.hidden, self.gates(), run.steps);
        let all = steps * size;
        let before =
            |part: usize| [&run.initial[part * size..][..size], &y.data[part * all..][..all - size.min(all)]].concat();
        let (h_before, c_before) = (before(0), if *self == Kind::Lstm { before(1) } else { Vec::new() });
        // What `R` gives at every step, at once.
        let mut q = vec![0.0; steps * width];
        multiply(
            Matrix::row_major(&h_before, h),
            Matrix::transposed(run.weights, h),
            [steps * run.batch, h, gates * h],
            &mut q,
        );
        run.add_bias(&mut q);
        // `d_x` are gradients at the gates of the input, `d_q` at those of the state.
        let (mut d_x, mut d_q) = (vec![0.0; steps * width], vec![0.0; steps * width]);
        let (mut dh, mut dc) = (vec![0.0; size], vec![0.0; size]);
        let mut memory = Memory::default();
        let reset = (*self == Kind::Gru { linear_before_reset: false }).then(|| run.packed(2, 3));
        let back = Packed::new(Matrix::row_major(run.weights, h), gates * h, h);
        let back_update = Packed::new(Matrix::row_major(run.weights, h), 2.min(gates) * h, h);
        let back_hidden = Packed::new(Matrix::row_major(&run.weights[(gates - 1) * h * h..], h), h, h);
        let mut scaled_before = if reset.is_some() { vec![0.0; all] } else { Vec::new() };
        for t in (0..steps).rev() {
            let x = &run.gates[t * width..][..width];
            let raw = q[t * width..][..width].to_vec();
            let g = &mut q[t * width..][..width];
            let mut states =
                [&h_before[t * size..][..size], c_before.get(t * size..(t + 1) * size).unwrap_or(&[])].concat();
            run.step(x, g, &mut states, reset.as_ref(), &mut memory);
            let (h0, c0) = (&h_before[t * size..][..size], c_before.get(t * size..).unwrap_or(&[]));
            dh.iter_mut().zip(&dy.data[t * size..]).for_each(|(dh, dy)| *dh += dy);
            let (d_x, d_q) = (&mut d_x[t * width..][..width], &mut d_q[t * width..][..width]);
            match *self {
                Kind::Lstm => {
                    dc.iter_mut().zip(&dy.data[all + t * size..]).for_each(|(dc, dy)| *dc += dy);
                    let mut tanh_c = states[size..].to_vec();
                    tanh(&mut tanh_c, &mut memory.copy);
                    for n in 0..run.batch {
                        let (g, d_x) = (&g[n * gates * h..][..gates * h], &mut d_x[n * gates * h..][..gates * h]);
                        for i in 0..h {
                            let (at, input, output, forget, cell) =
                                (n * h + i, g[i], g[h + i], g[2 * h + i], g[3 * h + i]);
                            let d_cell = dc[at] + dh[at] * output * (1.0 - tanh_c[at] * tanh_c[at]);
                            d_x[i] = d_cell * cell * input * (1.0 - input);
                            d_x[h + i] = dh[at] * tanh_c[at] * output * (1.0 - output);
                            d_x[2 * h + i] = d_cell * c0[at] * forget * (1.0 - forget);
                            d_x[3 * h + i] = d_cell * input * (1.0 - cell * cell);
                            dc[at] = d_cell * forget;
                        }
                    }
                    d_q.copy_from_slice(d_x);
                    back.multiply(Matrix::row_major(d_q, gates * h), run.batch, false, &mut dh, &mut memory.workspace);
                }
                Kind::Rnn => {
                    d_x.iter_mut().zip(dh.iter().zip(g.iter())).for_each(|(d, (dh, g))| *d = dh * (1.0 - g * g));
                    d_q.copy_from_slice(d_x);
                    back.multiply(Matrix::row_major(d_q, h), run.batch, false, &mut dh, &mut memory.workspace);
                }
                Kind::Gru { linear_before_reset } => {
                    let mut d_before = vec![0.0; size];
                    for n in 0..run.batch {
                        let rows = n * gates * h..(n + 1) * gates * h;
                        let (g, raw) = (&g[rows.clone()], &raw[rows.clone()]);
                        let (d_x, d_q) = (&mut d_x[rows.clone()], &mut d_q[rows]);
                        for i in 0..h {
                            let (at, z, r, hidden) = (n * h + i, g[i], g[h + i], g[2 * h + i]);
                            d_x[i] = dh[at] * (h0[at] - hidden) * z * (1.0 - z);
                            d_x[2 * h + i] = dh[at] * (1.0 - z) * (1.0 - hidden * hidden);
                            d_before[at] = dh[at] * z;
                            d_q[2 * h + i] = d_x[2 * h + i] * if linear_before_reset { r } else { 1.0 };
                            d_x[h + i] = d_x[2 * h + i] * raw[2 * h + i] * r * (1.0 - r);
                        }
                        if !linear_before_reset {
                            let mut d_scaled = vec![0.0; h];
                            let d_hidden = Matrix::row_major(&d_q[2 * h..], h);
                            back_hidden.multiply(d_hidden, 1, false, &mut d_scaled, &mut memory.workspace);
                            for i in 0..h {
                                let (at, r) = (n * h + i, g[h + i]);
                                d_x[h + i] = d_scaled[i] * h0[at] * r * (1.0 - r);
                                d_before[at] += d_scaled[i] * r;
                                scaled_before[t * size + at] = h0[at] * r;
                            }
                        }
                        d_q[..2 * h].copy_from_slice(&d_x[..2 * h]);
                    }
                    let through = if linear_before_reset { &back } else { &back_update };
                    let d_gates = Matrix { data: d_q, row_stride: gates * h, column_stride: 1 };
                    through.multiply(d_gates, run.batch, true, &mut d_before, &mut memory.workspace);
                    dh = d_before;
                }
            }
        }
        let mut d_weights = vec![0.0; gates * h * h];
        let rows = steps * run.batch;
        let by_state = |gate: usize, count: usize, states: &[f32], to: &mut [f32]| {
            let a = Matrix { data: &d_q[gate * h..], row_stride: 1, column_stride: gates * h };
            multiply(a, Matrix::row_major(states, h), [count * h, rows, h], to);
        };
        if rows > 0 {
            by_state(0, gates, &h_before, &mut d_weights);
            if reset.is_some() {
                by_state(2, 1, &scaled_before, &mut d_weights[2 * h * h..]);
            }
        }
        let d_bias = sum_to(&d_q, &[rows, gates * h], &[gates * h]);
        let d_states = if *self == Kind::Lstm { [dh, dc, d_bias].concat() } else { [dh, d_bias].concat() };
        vec![Some(d_x), Some(d_weights), Some(d_states)]
    }
}
