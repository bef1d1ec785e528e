//! Reductions over one axis of `[outer, axis, inner]`: sums, means, extremes and what is built on them.
//!
//! With `inner` = 1 a row is reduced in 4 · `LANES` chains that are added in a fixed order; otherwise lanes are inner positions and
//! each is one chain. Reductions over several axes are a caller's matter of collapsing or repeating.

use std::ops::Range;

use super::IsaLevel;
use super::dispatch::{Kernel, dispatch};
use super::epilogue::Output;
use super::isa::Isa;

/// What is made of the values along the axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    Sum,
    Mean,
    /// NaN if any value is.
    Max,
    /// NaN if any value is.
    Min,
    Product,
    SumOfSquares,
    SumOfMagnitudes,
    /// The root of the sum of squares.
    Euclidean,
}

/// A reduction of `[outer, axis, inner]` to `[outer, inner]`.
#[derive(Clone, Copy, Debug)]
pub struct Reduce<'a> {
    pub reduction: Reduction,
    pub axis: usize,
    pub inner: usize,
    pub input: &'a [f32],
}

/// Computes a range of the outer index. An empty axis gives the neutral element (NaN for a mean).
pub fn reduce(level: IsaLevel, problem: &Reduce<'_>, outer: Range<usize>, output: Output<'_>) {
    if outer.is_empty() || problem.inner == 0 {
        return;
    }
    let Reduce { axis, inner, input, .. } = *problem;
    assert!(input.len() >= outer.end * axis * inner, "{outer:?} of axis {axis}, inner {inner} in {}", input.len());
    assert!(output.len() >= outer.end * inner, "{outer:?} of inner {inner} into {}", output.len());
    dispatch(level, Run { problem, outer, to: output.pointer() });
}

struct Run<'a> {
    problem: &'a Reduce<'a>,
    outer: Range<usize>,
    to: *mut f32,
}

/// Independent chains of a row's reduction.
const CHAINS: usize = 4;

impl Reduction {
    #[inline(always)]
    fn neutral(self) -> f32 {
        match self {
            Reduction::Max => f32::NEG_INFINITY,
            Reduction::Min => f32::INFINITY,
            Reduction::Product => 1.0,
            _ => 0.0,
        }
    }

    /// Takes a value of the input in.
    #[inline(always)]
    fn step<I: Isa>(self, isa: I, so_far: I::V, x: I::V) -> I::V {
        match self {
            Reduction::SumOfSquares | Reduction::Euclidean => isa.fma(x, x, so_far),
            Reduction::SumOfMagnitudes => isa.add(so_far, isa.abs(x)),
            _ => self.combine(isa, so_far, x),
        }
    }

    /// Joins two partial results.
    #[inline(always)]
    fn combine<I: Isa>(self, isa: I, a: I::V, b: I::V) -> I::V {
        match self {
            Reduction::Max => isa.select(isa.eq(a, a), isa.max(a, b), a),
            Reduction::Min => isa.select(isa.eq(a, a), isa.min(a, b), a),
            Reduction::Product => isa.mul(a, b),
            _ => isa.add(a, b),
        }
    }

    /// The result from what was gathered of `count` values.
    #[inline(always)]
    fn finish<I: Isa>(self, isa: I, x: I::V, count: usize) -> I::V {
        match self {
            Reduction::Mean => isa.div(x, isa.splat(count as f32)),
            Reduction::Euclidean => isa.sqrt(x),
            _ => x,
        }
    }
}

impl Kernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        macro_rules! run {
            ($($reduction:ident)+) => {
                match self.problem.reduction {
                    // The literal makes each arm a loop of its own.
                    $(Reduction::$reduction => self.run(isa, Reduction::$reduction),)+
                }
            };
        }
        run!(Sum Mean Max Min Product SumOfSquares SumOfMagnitudes Euclidean)
    }
}

impl Run<'_> {
    #[inline(always)]
    fn run<I: Isa>(&self, isa: I, reduction: Reduction) {
        let Reduce { axis, inner, input, .. } = *self.problem;
        let neutral = isa.splat(reduction.neutral());
        for outer in self.outer.clone() {
            // SAFETY: the entry checked both lengths.
            unsafe {
                let from = input.as_ptr().add(outer * axis * inner);
                let to = self.to.add(outer * inner);
                if inner == 1 {
                    let mut chains = [neutral; CHAINS];
                    let mut i = 0;
                    while i + CHAINS * I::LANES <= axis {
                        for (c, chain) in chains.iter_mut().enumerate() {
                            *chain = reduction.step(isa, *chain, isa.load(from.add(i + c * I::LANES)));
                        }
                        i += CHAINS * I::LANES;
                    }
                    while i + I::LANES <= axis {
                        chains[0] = reduction.step(isa, chains[0], isa.load(from.add(i)));
                        i += I::LANES;
                    }
                    let even = reduction.combine(isa, chains[0], chains[1]);
                    let odd = reduction.combine(isa, chains[2], chains[3]);
                    let lanes = isa.to_lanes(reduction.combine(isa, even, odd));
                    let mut result = isa.splat(lanes[0]);
                    for &lane in &lanes[1..I::LANES] {
                        result = reduction.combine(isa, result, isa.splat(lane));
                    }
                    for i in i..axis {
                        result = reduction.step(isa, result, isa.splat(from.add(i).read()));
                    }
                    isa.store_partial(to, reduction.finish(isa, result, axis), 1);
                    continue;
                }
                let mut column = 0;
                while column < inner {
                    let lanes = I::LANES.min(inner - column);
                    let mut result = neutral;
                    for i in 0..axis {
                        let p = from.add(i * inner + column);
                        let x = if lanes == I::LANES { isa.load(p) } else { isa.load_partial(p, lanes) };
                        result = reduction.step(isa, result, x);
                    }
                    let result = reduction.finish(isa, result, axis);
                    if lanes == I::LANES {
                        isa.store(to.add(column), result);
                    } else {
                        isa.store_partial(to.add(column), result, lanes);
                    }
                    column += I::LANES;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn reductions_match_their_definitions() {
        let definitions: [(Reduction, fn(&[f64]) -> f64); 8] = [
            (Reduction::Sum, |x| x.iter().sum()),
            (Reduction::Mean, |x| x.iter().sum::<f64>() / x.len() as f64),
            (Reduction::Max, |x| x.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
            (Reduction::Min, |x| x.iter().copied().fold(f64::INFINITY, f64::min)),
            (Reduction::Product, |x| x.iter().product()),
            (Reduction::SumOfSquares, |x| x.iter().map(|x| x * x).sum()),
            (Reduction::SumOfMagnitudes, |x| x.iter().map(|x| x.abs()).sum()),
            (Reduction::Euclidean, |x| x.iter().map(|x| x * x).sum::<f64>().sqrt()),
        ];
        for level in levels() {
            let mut random = Random::new(17);
            for round in rounds(120) {
                let (outer, axis) = (random.between(1, 5), random.pick(&[0, 1, 2, 7, 16, 63, 200, 515]));
                let inner = random.pick(&[1, 1, 2, 16, 35]);
                let (reduction, definition) = definitions[round % 8];
                let input = random.units(outer * axis * inner);
                let problem = Reduce { reduction, axis, inner, input: &input };
                let mut output = vec![7.0; outer * inner];
                for range in random_cuts(&mut random, outer) {
                    reduce(level, &problem, range, Output::new(&mut output));
                }
                let expected: Vec<f64> = (0..outer * inner)
                    .map(|at| {
                        let (o, j) = (at / inner, at % inner);
                        let values: Vec<f64> = (0..axis).map(|i| input[(o * axis + i) * inner + j].into()).collect();
                        definition(&values)
                    })
                    .collect();
                // Up to 515 additions of values below 1 in one chain.
                assert_near(level, &(reduction, axis, inner), &output, &expected, 2e-5);
            }
        }
    }

    #[test]
    fn extremes_pass_nan_on() {
        for level in levels() {
            for reduction in [Reduction::Max, Reduction::Min] {
                for (axis, position) in [(3, 0), (3, 2), (200, 0), (200, 77), (200, 199)] {
                    let mut input = vec![1.0; axis];
                    input[position] = f32::NAN;
                    let mut output = [0.0];
                    let problem = Reduce { reduction, axis, inner: 1, input: &input };
                    reduce(level, &problem, 0..1, Output::new(&mut output));
                    assert!(output[0].is_nan(), "{} {reduction:?} {axis} {position}", level.name());
                }
            }
        }
    }
}
