//! Softmax and layer normalization.
//!
//! Rows are contiguous runs, normalised each by itself; a row's result does not depend on the others. Sums run in 32 chains, one for every
//! 32nd element, added as a tree, so that they do not depend on how many lanes a vector has.

use std::ops::Range;

use super::dispatch::{Kernel, dispatch};
use super::elementwise::Source;
use super::epilogue::Output;
use super::isa::Isa;
use super::{IsaLevel, vmath};

/// Something added to the scores before a softmax, one row for several: row `r` gets row `(r / rows_each) % rows` of `data`, which
/// holds `rows` rows of the softmax's width. An attention mask `[batch, 1, 1, keys]` has `rows_each` = heads · queries.
#[derive(Clone, Copy, Debug)]
pub struct RowAddend<'a> {
    pub data: &'a [f32],
    pub rows_each: usize,
}

/// `softmax(scale · x + addend)` over rows of `width`.
#[derive(Clone, Copy, Debug)]
pub struct Softmax<'a> {
    pub width: usize,
    pub input: Source<'a>,
    pub scale: f32,
    pub addend: Option<RowAddend<'a>>,
    /// The logarithm of the softmax instead.
    pub logarithm: bool,
}

/// Computes rows of a softmax over a contiguous last axis. Both memories are `[rows][width]`. A row of which every score is
/// negative infinity gives NaN, as the definition does.
pub fn softmax(level: IsaLevel, problem: &Softmax<'_>, rows: Range<usize>, output: Output<'_>) {
    softmax_rows(level, problem, rows, output, None);
}

/// Computes only the exponentials of a softmax, the largest of a row being one, and the inverse of each row's sum: what reads the rows in
/// a sum may multiply its result instead, which is one rounding fewer in every term. `inverses` has an element for each of `rows`.
pub fn softmax_exponentials(
    level: IsaLevel,
    problem: &Softmax<'_>,
    rows: Range<usize>,
    output: Output<'_>,
    inverses: &mut [f32],
) {
    assert!(!problem.logarithm && inverses.len() == rows.len(), "{} inverses of rows {rows:?}", inverses.len());
    softmax_rows(level, problem, rows, output, Some(inverses));
}

fn softmax_rows(
    level: IsaLevel,
    problem: &Softmax<'_>,
    rows: Range<usize>,
    output: Output<'_>,
    inverses: Option<&mut [f32]>,
) {
    let (from, len) = problem.input.parts(&output);
    if rows.is_empty() || problem.width == 0 {
        return;
    }
    let end = rows.end * problem.width;
    assert!(end <= len && end <= output.len(), "rows {rows:?} of {} in {len} elements", problem.width);
    if let Some(RowAddend { data, rows_each }) = problem.addend {
        assert!(
            rows_each > 0 && data.len() >= problem.width,
            "an addend of {} for rows of {}",
            data.len(),
            problem.width
        );
    }
    dispatch(level, SoftmaxRows { problem, rows, from, to: output.pointer(), inverses });
}

struct SoftmaxRows<'a> {
    problem: &'a Softmax<'a>,
    rows: Range<usize>,
    from: *const f32,
    to: *mut f32,
    inverses: Option<&'a mut [f32]>,
}

/// Calls a step for each vector of `0..width` in order, giving the offset and the lanes; the last may have fewer.
macro_rules! for_vectors {
    ($isa:ty, $width:expr, |$at:ident, $lanes:ident, $chain:ident| $body:block) => {{
        let (mut $at, mut $chain) = (0, 0);
        while $at < $width {
            let $lanes = <$isa>::LANES.min($width - $at);
            $body
            $at += <$isa>::LANES;
            $chain = ($chain + 1) % (SUMS / <$isa>::LANES);
        }
        let _ = $chain;
    }};
}

/// Chains of a sum, and so many vectors of the fewest lanes hold them.
const SUMS: usize = 32;
const CHAINS: usize = SUMS / 4;

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
fn fold<I: Isa>(isa: I, mut chains: [I::V; CHAINS]) -> f32 {
    let mut width = SUMS / I::LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            chains[i] = isa.add(chains[i], chains[i + width]);
        }
    }
    isa.reduce_sum(chains[0])
}

/// The largest lane; whatever is compared with NaN may be lost.
#[inline(always)]
fn largest<I: Isa>(isa: I, v: I::V) -> f32 {
    let mut lanes = isa.to_lanes(v);
    let mut width = I::LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = if lanes[i + width] > lanes[i] { lanes[i + width] } else { lanes[i] };
        }
        width /= 2;
    }
    lanes[0]
}

/// Zeros in lanes from `lanes` on.
#[inline(always)]
fn keep<I: Isa>(isa: I, v: I::V, lanes: usize) -> I::V {
    if lanes == I::LANES {
        return v;
    }
    let kept = isa.to_lanes(v);
    // SAFETY: the array holds 16 >= LANES values.
    unsafe { isa.load_partial(kept.as_ptr(), lanes) }
}

impl Kernel for SoftmaxRows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        match self.problem.logarithm {
            true => self.rows::<I, true>(isa),
            false => self.rows::<I, false>(isa),
        }
    }
}

/// Rows whose scores are computed before the exponentials of any: a processor then goes on to the next row's while it waits for those of one.
const ROWS_AHEAD: usize = 16;

impl SoftmaxRows<'_> {
    #[inline(always)]
    fn rows<I: Isa, const LOGARITHM: bool>(self, isa: I) {
        let Softmax { width, scale, addend, .. } = *self.problem;
        let scale = isa.splat(scale);
        let mut inverses = self.inverses.map(|inverses| inverses.iter_mut());
        let mut offsets = [0f32; ROWS_AHEAD];
        for first in self.rows.clone().step_by(ROWS_AHEAD) {
            let rows = first..self.rows.end.min(first + ROWS_AHEAD);
            for (row, maximum) in rows.clone().zip(&mut offsets) {
                // SAFETY, here and below: the entry checked that both memories hold the row.
                let (from, to) = unsafe { (self.from.add(row * width), self.to.add(row * width)) };
                let addend = addend.map(|RowAddend { data, rows_each }| {
                    &data[row / rows_each % (data.len() / width) * width..][..width]
                });
                // Scores into the output, and their maximum.
                *maximum = f32::NEG_INFINITY;
                let mut maxima = isa.splat(f32::NEG_INFINITY);
                for_vectors!(I, width, |at, lanes, chain| {
                    let mut score = isa.mul(unsafe { load(isa, from.add(at), lanes) }, scale);
                    if let Some(addend) = addend {
                        score = isa.add(score, unsafe { load(isa, addend.as_ptr().add(at), lanes) });
                    }
                    unsafe { store(isa, to.add(at), score, lanes) };
                    if lanes == I::LANES {
                        // NaN in the second place stays; in the first it is lost to the next score, but its own
                        // exponential makes the sum NaN.
                        maxima = isa.max(maxima, score);
                    } else {
                        for &x in &isa.to_lanes(score)[..lanes] {
                            *maximum = maximum.max(x);
                        }
                    }
                });
                *maximum = maximum.max(largest(isa, maxima));
            }
            for (row, &maximum) in rows.zip(&offsets) {
                let to = unsafe { self.to.add(row * width) };
                let offset = isa.splat(maximum);
                let mut sums = [isa.zero(); CHAINS];
                // A vector for every chain at a time: the sums stay in registers.
                let whole = width / SUMS * SUMS;
                for block in (0..whole).step_by(SUMS) {
                    for chain in 0..SUMS / I::LANES {
                        let to = unsafe { to.add(block + chain * I::LANES) };
                        let centred = isa.sub(unsafe { isa.load(to) }, offset);
                        // None is above the maximum.
                        let e = vmath::exp_below_one(isa, centred);
                        unsafe { isa.store(to, if LOGARITHM { centred } else { e }) };
                        sums[chain] = isa.add(sums[chain], e);
                    }
                }
                for_vectors!(I, width - whole, |at, lanes, chain| {
                    let to = unsafe { to.add(whole + at) };
                    let centred = isa.sub(unsafe { load(isa, to, lanes) }, offset);
                    let e = vmath::exp_below_one(isa, centred);
                    unsafe { store(isa, to, if LOGARITHM { centred } else { e }, lanes) };
                    sums[chain] = isa.add(sums[chain], keep(isa, e, lanes));
                });
                let sum = fold(isa, sums);
                if LOGARITHM {
                    let log = isa.splat(isa.to_lanes(vmath::log(isa, isa.splat(sum)))[0]);
                    for_vectors!(I, width, |at, lanes, chain| {
                        unsafe { store(isa, to.add(at), isa.sub(load(isa, to.add(at), lanes), log), lanes) };
                    });
                } else if let Some(inverse) = inverses.as_mut().and_then(Iterator::next) {
                    *inverse = 1.0 / sum;
                } else {
                    let factor = isa.splat(1.0 / sum);
                    for_vectors!(I, width, |at, lanes, chain| {
                        unsafe { store(isa, to.add(at), isa.mul(load(isa, to.add(at), lanes), factor), lanes) };
                    });
                }
            }
        }
    }
}

/// Multiplies rows of `width` that lie `stride` apart, each by its factor.
pub fn scale_rows(level: IsaLevel, factors: &[f32], width: usize, stride: usize, output: Output<'_>) {
    let Some(last) = factors.len().checked_sub(1) else { return };
    assert!(stride >= width && last * stride + width <= output.len(), "{} rows {stride} apart", factors.len());
    dispatch(level, ScaleRows { factors, width, stride, to: output.pointer() });
}

struct ScaleRows<'a> {
    factors: &'a [f32],
    width: usize,
    stride: usize,
    to: *mut f32,
}

impl Kernel for ScaleRows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        for (row, &factor) in self.factors.iter().enumerate() {
            let factor = isa.splat(factor);
            for_vectors!(I, self.width, |at, lanes, chain| {
                // SAFETY: the entry checked that the memory holds every row.
                unsafe {
                    let to = self.to.add(row * self.stride + at);
                    store(isa, to, isa.mul(load(isa, to, lanes), factor), lanes);
                }
            });
        }
    }
}

/// A softmax over a middle axis: `[outer, axis, inner]`, over `axis`.
#[derive(Clone, Copy, Debug)]
pub struct StridedSoftmax<'a> {
    pub axis: usize,
    pub inner: usize,
    pub input: Source<'a>,
    pub logarithm: bool,
}

/// Computes a range of the outer index.
pub fn softmax_strided(level: IsaLevel, problem: &StridedSoftmax<'_>, outer: Range<usize>, output: Output<'_>) {
    let (from, len) = problem.input.parts(&output);
    let end = outer.end * problem.axis * problem.inner;
    if outer.is_empty() || problem.axis * problem.inner == 0 {
        return;
    }
    assert!(
        end <= len && end <= output.len(),
        "{outer:?} of axis {}, inner {} in {len} elements",
        problem.axis,
        problem.inner
    );
    dispatch(level, Strided { problem, outer, from, to: output.pointer() });
}

struct Strided<'a> {
    problem: &'a StridedSoftmax<'a>,
    outer: Range<usize>,
    from: *const f32,
    to: *mut f32,
}

impl Kernel for Strided<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let StridedSoftmax { axis, inner, logarithm, .. } = *self.problem;
        for outer in self.outer {
            let base = outer * axis * inner;
            let mut column = 0;
            while column < inner {
                let lanes = I::LANES.min(inner - column);
                // SAFETY: the entry checked that both memories hold the outer index.
                unsafe {
                    let (from, to) = (self.from.add(base + column), self.to.add(base + column));
                    let mut maximum = isa.splat(f32::NEG_INFINITY);
                    for i in 0..axis {
                        maximum = isa.max(maximum, load(isa, from.add(i * inner), lanes));
                    }
                    let mut sum = isa.zero();
                    for i in 0..axis {
                        let centred = isa.sub(load(isa, from.add(i * inner), lanes), maximum);
                        let e = vmath::exp_below_one(isa, centred);
                        store(isa, to.add(i * inner), if logarithm { centred } else { e }, lanes);
                        sum = isa.add(sum, e);
                    }
                    let log = vmath::log(isa, sum);
                    for i in 0..axis {
                        let value = load(isa, to.add(i * inner), lanes);
                        let value = if logarithm { isa.sub(value, log) } else { isa.div(value, sum) };
                        store(isa, to.add(i * inner), value, lanes);
                    }
                }
                column += I::LANES;
            }
        }
    }
}

/// `(x − mean) / √(variance + epsilon) · gamma + beta` over rows of `width`, where x is the input plus the residual.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    pub width: usize,
    pub input: Source<'a>,
    /// `[rows][width]`, added to the input first.
    pub residual: Option<&'a [f32]>,
    /// `width` values.
    pub gamma: Option<&'a [f32]>,
    /// `width` values.
    pub beta: Option<&'a [f32]>,
    pub epsilon: f32,
    /// Divide by the root of the mean square instead, without taking the mean away (RMSNorm).
    pub root_mean_square: bool,
}

/// Computes rows of a layer normalization. Both memories are `[rows][width]`.
///
/// The mean first, then the variance from the differences.
pub fn layer_norm(level: IsaLevel, problem: &LayerNorm<'_>, rows: Range<usize>, output: Output<'_>) {
    let (from, len) = problem.input.parts(&output);
    if rows.is_empty() || problem.width == 0 {
        return;
    }
    let end = rows.end * problem.width;
    assert!(end <= len && end <= output.len(), "rows {rows:?} of {} in {len} elements", problem.width);
    assert!(problem.residual.is_none_or(|r| r.len() >= end), "too short a residual for rows {rows:?}");
    assert!(
        problem.gamma.is_none_or(|g| g.len() >= problem.width) && problem.beta.is_none_or(|b| b.len() >= problem.width)
    );
    dispatch(level, LayerNormRows { problem, rows, from, to: output.pointer() });
}

struct LayerNormRows<'a> {
    problem: &'a LayerNorm<'a>,
    rows: Range<usize>,
    from: *const f32,
    to: *mut f32,
}

impl Kernel for LayerNormRows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let LayerNorm { width, residual, gamma, beta, epsilon, root_mean_square, .. } = *self.problem;
        for row in self.rows {
            // SAFETY: the entry checked that all memories hold the row.
            unsafe {
                let (from, to) = (self.from.add(row * width), self.to.add(row * width));
                let mut sums = [isa.zero(); CHAINS];
                for_vectors!(I, width, |at, lanes, chain| {
                    let mut x = load(isa, from.add(at), lanes);
                    if let Some(residual) = residual {
                        x = isa.add(x, load(isa, residual.as_ptr().add(row * width + at), lanes));
                    }
                    store(isa, to.add(at), x, lanes);
                    sums[chain] = isa.add(sums[chain], x);
                });
                let mean = if root_mean_square { 0.0 } else { fold(isa, sums) / width as f32 };
                let mean = isa.splat(mean);
                let mut squares = [isa.zero(); CHAINS];
                for_vectors!(I, width, |at, lanes, chain| {
                    let d = keep(isa, isa.sub(load(isa, to.add(at), lanes), mean), lanes);
                    squares[chain] = isa.fma(d, d, squares[chain]);
                });
                let variance = fold(isa, squares) / width as f32;
                let factor = isa.splat(1.0 / (variance + epsilon).sqrt());
                let shift = isa.mul(mean, factor);
                for_vectors!(I, width, |at, lanes, chain| {
                    let mut x = isa.fma(load(isa, to.add(at), lanes), factor, isa.neg(shift));
                    if let Some(gamma) = gamma {
                        x = isa.mul(x, load(isa, gamma.as_ptr().add(at), lanes));
                    }
                    if let Some(beta) = beta {
                        x = isa.add(x, load(isa, beta.as_ptr().add(at), lanes));
                    }
                    store(isa, to.add(at), x, lanes);
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn plain_softmax(scores: &[f64], logarithm: bool) -> Vec<f64> {
        let maximum = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|x| (x - maximum).exp()).sum();
        scores.iter().map(|x| if logarithm { x - maximum - sum.ln() } else { (x - maximum).exp() / sum }).collect()
    }

    #[test]
    fn softmax_of_rows_matches_its_definition() {
        for level in levels() {
            let mut random = Random::new(14);
            for round in rounds(80) {
                let (rows, width) = (random.between(1, 9), random.pick(&[1, 2, 7, 16, 33, 64, 128, 200]));
                let input: Vec<f32> = (0..rows * width).map(|_| random.unit() * 20.0).collect();
                let (scale, rows_each) = (random.pick(&[1.0, 0.125]), random.between(1, 4));
                let mut mask = random.units(rows.div_ceil(rows_each) * width);
                mask[width / 2] = f32::MIN;
                if width > 1 {
                    mask[0] = f32::NEG_INFINITY;
                }
                let addend = (round % 2 == 0).then_some(RowAddend { data: &mask, rows_each });
                let problem = Softmax { width, input: Source::Slice(&input), scale, addend, logarithm: round % 3 == 0 };
                let mut output = vec![f32::NAN; rows * width];
                for rows in random_cuts(&mut random, rows) {
                    softmax(level, &problem, rows, Output::new(&mut output));
                }
                let mut expected = Vec::new();
                for row in 0..rows {
                    let score = |j: usize| {
                        let add = if round % 2 == 0 { f64::from(mask[row / rows_each * width + j]) } else { 0.0 };
                        f64::from(input[row * width + j]) * f64::from(scale) + add
                    };
                    expected.extend(plain_softmax(&(0..width).map(score).collect::<Vec<_>>(), round % 3 == 0));
                }
                // An exponential of an argument rounded at 20, a sum of up to 200.
                assert_near(level, &problem.width, &output, &expected, 4e-6);
                let mut in_place = input.clone();
                softmax(level, &Softmax { input: Source::Output, ..problem }, 0..rows, Output::new(&mut in_place));
                assert_same_bits(level, &width, &in_place, &output);
                if !problem.logarithm {
                    let mut inverses = vec![f32::NAN; rows];
                    let (mut scaled, stride) = (vec![7.0; rows * (width + 3)], width + 3);
                    softmax_exponentials(level, &problem, 0..rows, Output::new(&mut in_place), &mut inverses);
                    for (to, from) in scaled.chunks_mut(stride).zip(in_place.chunks(width)) {
                        to[..width].copy_from_slice(from);
                    }
                    scale_rows(level, &inverses, width, stride, Output::new(&mut scaled));
                    let (rows, between): (Vec<_>, Vec<_>) = scaled.chunks(stride).map(|r| r.split_at(width)).unzip();
                    assert_same_bits(level, &width, &rows.concat(), &output);
                    assert!(between.concat().iter().all(|&x| x == 7.0), "what lies between rows stays");
                }
            }
        }
    }

    #[test]
    fn softmax_of_a_middle_axis_matches_its_definition() {
        for level in levels() {
            let mut random = Random::new(15);
            for (outer, axis, inner, logarithm) in
                [(1, 3, 1, false), (2, 10, 33, false), (3, 5, 16, true), (2, 1, 7, true)]
            {
                let input: Vec<f32> = (0..outer * axis * inner).map(|_| random.unit() * 20.0).collect();
                let problem = StridedSoftmax { axis, inner, input: Source::Slice(&input), logarithm };
                let mut output = vec![f32::NAN; input.len()];
                for range in random_cuts(&mut random, outer) {
                    softmax_strided(level, &problem, range, Output::new(&mut output));
                }
                let mut expected = vec![0.0; input.len()];
                for o in 0..outer {
                    for j in 0..inner {
                        let at = |i: usize| (o * axis + i) * inner + j;
                        let scores: Vec<f64> = (0..axis).map(|i| input[at(i)].into()).collect();
                        for (i, value) in plain_softmax(&scores, logarithm).into_iter().enumerate() {
                            expected[at(i)] = value;
                        }
                    }
                }
                assert_near(level, &(axis, inner), &output, &expected, 4e-6);
            }
        }
    }

    #[test]
    fn nan_in_a_row_spoils_that_row_only() {
        for level in levels() {
            for position in [0, 5, 17] {
                let mut input = vec![0.5; 36];
                input[position] = f32::NAN;
                let problem =
                    Softmax { width: 18, input: Source::Slice(&input), scale: 1.0, addend: None, logarithm: false };
                let mut output = vec![0.0; 36];
                softmax(level, &problem, 0..2, Output::new(&mut output));
                assert!(output[..18].iter().all(|x| x.is_nan()), "{} {position}: {output:?}", level.name());
                assert!(output[18..].iter().all(|x| (x - 1.0 / 18.0).abs() < 1e-6));
            }
        }
    }

    #[test]
    fn layer_normalization_matches_its_definition() {
        for level in levels() {
            let mut random = Random::new(16);
            for round in rounds(60) {
                let (rows, width) = (random.between(1, 7), random.pick(&[1, 5, 16, 31, 64, 384, 700]));
                // A large mean: what a one-pass variance would fail on.
                let input: Vec<f32> = (0..rows * width).map(|_| random.unit() + 30.0).collect();
                let residual = random.units(rows * width);
                let (gamma, beta) = (random.units(width), random.units(width));
                let problem = LayerNorm {
                    width,
                    input: Source::Slice(&input),
                    residual: (round % 2 == 0).then_some(&residual),
                    gamma: (round % 3 > 0).then_some(&gamma),
                    beta: (round % 5 > 0).then_some(&beta),
                    epsilon: 1e-5,
                    root_mean_square: round % 4 == 3,
                };
                let mut output = vec![f32::NAN; rows * width];
                for rows in random_cuts(&mut random, rows) {
                    layer_norm(level, &problem, rows, Output::new(&mut output));
                }
                let mut expected = Vec::new();
                for row in 0..rows {
                    let x: Vec<f64> = (0..width)
                        .map(|j| {
                            let residual = problem.residual.map_or(0.0, |r| r[row * width + j]);
                            f64::from(input[row * width + j] + residual)
                        })
                        .collect();
                    let mean = if problem.root_mean_square { 0.0 } else { x.iter().sum::<f64>() / width as f64 };
                    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / width as f64;
                    expected.extend(x.iter().enumerate().map(|(j, x)| {
                        let y = (x - mean) / (variance + f64::from(problem.epsilon)).sqrt();
                        y * problem.gamma.map_or(1.0, |g| g[j].into()) + problem.beta.map_or(0.0, |b| b[j].into())
                    }));
                }
                // The mean of values near 30 is rounded at 2e-6 and divided by a deviation of about ½; a row of one is all
                // rounding, divided by √epsilon.
                let tolerance = if width == 1 { 2e-3 } else { 4e-5 };
                assert_near(level, &(width, round), &output, &expected, tolerance);
            }
        }
    }
}
