//! The pointwise half of recurrent cells: from gate pre-activations to the new state.
//!
//! The matrix products are [`super::gemm`]'s: `W·x` for all steps at once, then per step `R·h` added on top (a
//! [`Residual::Output`](super::Residual::Output)). Gates are in ONNX's order, one run of `hidden` values each. Activations are ONNX's
//! defaults (sigmoid, tanh); others are not here.

use std::ops::Range;

use super::dispatch::{Kernel, dispatch};
use super::epilogue::Output;
use super::isa::Isa;
use super::{IsaLevel, vmath};

/// One step of an LSTM for rows of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Lstm<'a> {
    pub hidden: usize,
    /// `W·x + R·h + Wb + Rb`: row `b` at `b · gates_stride`, `[i, o, f, c]` of `hidden` values each.
    pub gates: &'a [f32],
    pub gates_stride: usize,
    /// Peephole weights `[i, o, f]`, `hidden` each.
    pub peepholes: Option<&'a [f32]>,
    /// Bounds every gate's input to ±clip (ONNX `clip`).
    pub clip: Option<f32>,
    /// The forget gate is 1 − i (ONNX `input_forget`).
    pub coupled: bool,
}

/// Computes batch rows of an LSTM step. `cell` holds the cell state `[batch][hidden]` and is updated in place; `output` gets the
/// hidden state, row `b` at `b · output_stride`.
pub fn lstm(
    level: IsaLevel,
    problem: &Lstm<'_>,
    batch: Range<usize>,
    cell: Output<'_>,
    output: Output<'_>,
    output_stride: usize,
) {
    let Lstm { hidden, gates, gates_stride, peepholes, .. } = *problem;
    if batch.is_empty() || hidden == 0 {
        return;
    }
    let last = batch.end - 1;
    assert!(
        gates.len() >= last * gates_stride + 4 * hidden,
        "gates of {} for {hidden} units, rows {batch:?}",
        gates.len()
    );
    assert!(cell.len() >= batch.end * hidden, "cell state of {} for rows {batch:?}", cell.len());
    assert!(output.len() >= last * output_stride + hidden, "output of {} for rows {batch:?}", output.len());
    assert!(peepholes.is_none_or(|p| p.len() >= 3 * hidden), "too few peephole weights for {hidden} units");
    let (cell, output) = (cell.pointer(), output.pointer());
    dispatch(level, LstmStep { problem, batch, cell, output, output_stride });
}

struct LstmStep<'a> {
    problem: &'a Lstm<'a>,
    batch: Range<usize>,
    cell: *mut f32,
    output: *mut f32,
    output_stride: usize,
}

/// # Safety
/// `lanes` values at `p` are readable.
#[inline(always)]
unsafe fn load<I: Isa>(isa: I, p: *const f32, lanes: usize) -> I::V {
    // SAFETY: the caller.
    unsafe { if lanes == I::LANES { isa.load(p) } else { isa.load_partial(p, lanes) } }
}

/// # Safety
/// `lanes` values at `p` are writable.
#[inline(always)]
unsafe fn store<I: Isa>(isa: I, p: *mut f32, v: I::V, lanes: usize) {
    // SAFETY: the caller.
    unsafe { if lanes == I::LANES { isa.store(p, v) } else { isa.store_partial(p, v, lanes) } }
}

#[inline(always)]
fn bound<I: Isa>(isa: I, x: I::V, clip: Option<f32>) -> I::V {
    match clip {
        None => x,
        Some(clip) => vmath::clip(isa, x, -clip, clip),
    }
}

impl Kernel for LstmStep<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Lstm { hidden, gates, gates_stride, peepholes, clip, coupled } = *self.problem;
        for row in self.batch {
            let mut at = 0;
            while at < hidden {
                let lanes = I::LANES.min(hidden - at);
                // SAFETY: the entry checked all lengths.
                unsafe {
                    let gate = |g: usize| gates.as_ptr().add(row * gates_stride + g * hidden + at);
                    let cell = self.cell.add(row * hidden + at);
                    let before = load(isa, cell, lanes);
                    let (mut i, mut o) = (load(isa, gate(0), lanes), load(isa, gate(1), lanes));
                    let (mut f, c) = (load(isa, gate(2), lanes), load(isa, gate(3), lanes));
                    if let Some(p) = peepholes {
                        i = isa.fma(load(isa, p.as_ptr().add(at), lanes), before, i);
                        f = isa.fma(load(isa, p.as_ptr().add(2 * hidden + at), lanes), before, f);
                    }
                    let i = vmath::sigmoid(isa, bound(isa, i, clip));
                    let f = if coupled { isa.sub(isa.splat(1.0), i) } else { vmath::sigmoid(isa, bound(isa, f, clip)) };
                    let c = vmath::tanh(isa, bound(isa, c, clip));
                    let after = isa.fma(f, before, isa.mul(i, c));
                    if let Some(p) = peepholes {
                        o = isa.fma(load(isa, p.as_ptr().add(hidden + at), lanes), after, o);
                    }
                    let o = vmath::sigmoid(isa, bound(isa, o, clip));
                    store(isa, cell, after, lanes);
                    let h = isa.mul(o, vmath::tanh(isa, after));
                    store(isa, self.output.add(row * self.output_stride + at), h, lanes);
                }
                at += I::LANES;
            }
        }
    }
}

/// One step of a GRU for rows of a batch. Where ONNX's `linear_before_reset` is 0, `R·(r ∘ h)` needs the reset gate first: run
/// [`gru_reset`], the product, then [`gru`].
#[derive(Clone, Copy, Debug)]
pub struct Gru<'a> {
    pub hidden: usize,
    /// `W·x + Wb` (and `Rb` for z and r; for h too unless `linear_before_reset`): row `b` at `b · gates_stride`, `[z, r, h]` of `hidden`
    /// values each. `R·h` may have been added to z and r already, `recurrent` then holds zeros or is absent there.
    pub gates: &'a [f32],
    pub gates_stride: usize,
    /// What the recurrence adds to each gate, laid out as the gates, row `b` at `b · recurrent_stride`. With
    /// `linear_before_reset`, the third run is `R·h + Rb` and is multiplied by r.
    pub recurrent: &'a [f32],
    pub recurrent_stride: usize,
    pub linear_before_reset: bool,
    /// Bounds every gate's input to ±clip (ONNX `clip`).
    pub clip: Option<f32>,
}

impl Gru<'_> {
    fn check(&self, batch: &Range<usize>, state: &[f32]) {
        let (last, width) = (batch.end - 1, 3 * self.hidden);
        assert!(self.gates.len() >= last * self.gates_stride + width, "gates of {}", self.gates.len());
        assert!(self.recurrent.len() >= last * self.recurrent_stride + width, "recurrent of {}", self.recurrent.len());
        assert!(state.len() >= batch.end * self.hidden, "state of {} for rows {batch:?}", state.len());
    }
}

/// `output[b] = r ∘ state[b]`, both `[batch][hidden]`: what the candidate's recurrence multiplies when `linear_before_reset` is 0. Only the
/// second runs of gates and recurrent are read.
pub fn gru_reset(level: IsaLevel, problem: &Gru<'_>, batch: Range<usize>, state: &[f32], output: Output<'_>) {
    if batch.is_empty() || problem.hidden == 0 {
        return;
    }
    problem.check(&batch, state);
    assert!(output.len() >= batch.end * problem.hidden, "output of {} for rows {batch:?}", output.len());
    dispatch(level, GruReset { problem, batch, state, output: output.pointer() });
}

struct GruReset<'a> {
    problem: &'a Gru<'a>,
    batch: Range<usize>,
    state: &'a [f32],
    output: *mut f32,
}

impl Kernel for GruReset<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let problem = self.problem;
        let hidden = problem.hidden;
        for row in self.batch {
            for at in (0..hidden).step_by(I::LANES) {
                let lanes = I::LANES.min(hidden - at);
                // SAFETY: the entry checked all lengths.
                unsafe {
                    let r = gru_gate(isa, problem, row, hidden + at, lanes);
                    let r = vmath::sigmoid(isa, bound(isa, r, problem.clip));
                    let h = load(isa, self.state.as_ptr().add(row * hidden + at), lanes);
                    store(isa, self.output.add(row * hidden + at), isa.mul(r, h), lanes);
                }
            }
        }
    }
}

/// Gate plus recurrent at a position of a row.
///
/// # Safety
/// `lanes` values there are inside both.
#[inline(always)]
unsafe fn gru_gate<I: Isa>(isa: I, problem: &Gru<'_>, row: usize, at: usize, lanes: usize) -> I::V {
    // SAFETY: the caller.
    unsafe {
        let gate = load(isa, problem.gates.as_ptr().add(row * problem.gates_stride + at), lanes);
        let recurrent = load(isa, problem.recurrent.as_ptr().add(row * problem.recurrent_stride + at), lanes);
        isa.add(gate, recurrent)
    }
}

/// Computes batch rows of a GRU step: `(1 − z) ∘ h~ + z ∘ h`. `state` is the hidden state before, `[batch][hidden]`; row `b` of the one
/// after goes to `b · output_stride`.
pub fn gru(
    level: IsaLevel,
    problem: &Gru<'_>,
    batch: Range<usize>,
    state: &[f32],
    output: Output<'_>,
    output_stride: usize,
) {
    if batch.is_empty() || problem.hidden == 0 {
        return;
    }
    problem.check(&batch, state);
    let end = (batch.end - 1) * output_stride + problem.hidden;
    assert!(output.len() >= end, "output of {} for rows {batch:?}", output.len());
    dispatch(level, GruStep { problem, batch, state, output: output.pointer(), output_stride });
}

struct GruStep<'a> {
    problem: &'a Gru<'a>,
    batch: Range<usize>,
    state: &'a [f32],
    output: *mut f32,
    output_stride: usize,
}

impl Kernel for GruStep<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let problem = self.problem;
        let hidden = problem.hidden;
        for row in self.batch {
            for at in (0..hidden).step_by(I::LANES) {
                let lanes = I::LANES.min(hidden - at);
                // SAFETY: the entry checked all lengths.
                unsafe {
                    let z = gru_gate(isa, problem, row, at, lanes);
                    let z = vmath::sigmoid(isa, bound(isa, z, problem.clip));
                    let candidate = if problem.linear_before_reset {
                        let r = gru_gate(isa, problem, row, hidden + at, lanes);
                        let r = vmath::sigmoid(isa, bound(isa, r, problem.clip));
                        let third = 2 * hidden + at;
                        let gate = load(isa, problem.gates.as_ptr().add(row * problem.gates_stride + third), lanes);
                        let from = problem.recurrent.as_ptr().add(row * problem.recurrent_stride + third);
                        isa.fma(r, load(isa, from, lanes), gate)
                    } else {
                        gru_gate(isa, problem, row, 2 * hidden + at, lanes)
                    };
                    let candidate = vmath::tanh(isa, bound(isa, candidate, problem.clip));
                    let before = load(isa, self.state.as_ptr().add(row * hidden + at), lanes);
                    let after = isa.fma(z, isa.sub(before, candidate), candidate);
                    store(isa, self.output.add(row * self.output_stride + at), after, lanes);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    #[test]
    fn lstm_steps_match_their_definition() {
        for level in levels() {
            let mut random = Random::new(18);
            for round in rounds(40) {
                let (batch, hidden) = (random.between(1, 4), random.pick(&[1, 5, 16, 33, 128]));
                let (gates_stride, output_stride) = (4 * hidden + random.between(0, 3), hidden + random.between(0, 3));
                let gates: Vec<f32> = (0..batch * gates_stride).map(|_| random.unit() * 5.0).collect();
                let peepholes = random.units(3 * hidden);
                let before = random.units(batch * hidden);
                let problem = Lstm {
                    hidden,
                    gates: &gates,
                    gates_stride,
                    peepholes: (round % 2 == 0).then_some(&peepholes),
                    clip: (round % 3 == 0).then_some(1.5),
                    coupled: round % 5 == 0,
                };
                let (mut cell, mut output) = (before.clone(), vec![9.0; batch * output_stride]);
                for rows in random_cuts(&mut random, batch) {
                    let (cell, output) = (Output::new(&mut cell), Output::new(&mut output));
                    lstm(level, &problem, rows, cell, output, output_stride);
                }
                let bound = |x: f64| problem.clip.map_or(x, |c| x.clamp(-f64::from(c), c.into()));
                for b in 0..batch {
                    for j in 0..hidden {
                        let gate = |g: usize| f64::from(gates[b * gates_stride + g * hidden + j]);
                        let peephole = |g: usize| problem.peepholes.map_or(0.0, |p| f64::from(p[g * hidden + j]));
                        let c = f64::from(before[b * hidden + j]);
                        let i = sigmoid(bound(gate(0) + peephole(0) * c));
                        let f = if problem.coupled { 1.0 - i } else { sigmoid(bound(gate(2) + peephole(2) * c)) };
                        let after = f * c + i * bound(gate(3)).tanh();
                        let o = sigmoid(bound(gate(1) + peephole(1) * after));
                        // A few units in the last place through three functions.
                        assert_near(level, &round, &[cell[b * hidden + j]], &[after], 2e-6);
                        assert_near(level, &round, &[output[b * output_stride + j]], &[o * after.tanh()], 2e-6);
                    }
                }
            }
        }
    }

    #[test]
    fn gru_steps_match_their_definition() {
        for level in levels() {
            let mut random = Random::new(19);
            for round in rounds(40) {
                let (batch, hidden) = (random.between(1, 4), random.pick(&[1, 5, 16, 33, 128]));
                let (stride, output_stride) = (3 * hidden + random.between(0, 3), hidden + random.between(0, 3));
                let gates: Vec<f32> = (0..batch * stride).map(|_| random.unit() * 4.0).collect();
                let recurrent: Vec<f32> = (0..batch * stride).map(|_| random.unit() * 4.0).collect();
                let state = random.units(batch * hidden);
                let problem = Gru {
                    hidden,
                    gates: &gates,
                    gates_stride: stride,
                    recurrent: &recurrent,
                    recurrent_stride: stride,
                    linear_before_reset: round % 2 == 0,
                    clip: (round % 3 == 0).then_some(1.5),
                };
                let (mut reset, mut output) = (vec![9.0; batch * hidden], vec![9.0; batch * output_stride]);
                for rows in random_cuts(&mut random, batch) {
                    gru_reset(level, &problem, rows.clone(), &state, Output::new(&mut reset));
                    gru(level, &problem, rows, &state, Output::new(&mut output), output_stride);
                }
                let bound = |x: f64| problem.clip.map_or(x, |c| x.clamp(-f64::from(c), c.into()));
                for b in 0..batch {
                    for j in 0..hidden {
                        let gate = |g: usize| f64::from(gates[b * stride + g * hidden + j]);
                        let recurrent = |g: usize| f64::from(recurrent[b * stride + g * hidden + j]);
                        let h = f64::from(state[b * hidden + j]);
                        let z = sigmoid(bound(gate(0) + recurrent(0)));
                        let r = sigmoid(bound(gate(1) + recurrent(1)));
                        let factor = if problem.linear_before_reset { r } else { 1.0 };
                        let candidate = bound(gate(2) + factor * recurrent(2)).tanh();
                        let after = (1.0 - z) * candidate + z * h;
                        // A few units in the last place through three functions.
                        assert_near(level, &round, &[reset[b * hidden + j]], &[r * h], 2e-6);
                        assert_near(level, &round, &[output[b * output_stride + j]], &[after], 2e-6);
                    }
                }
            }
        }
    }
}
