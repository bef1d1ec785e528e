//! Rows of features against vectors: products, distances, and the kernels of support vector machines made of them.
//!
//! Each value is one chain of `LANES` partial sums and a scalar end, in an order that the number of features and the rung fix. Matrix products
//! proper are in [`super::gemm`]; here both sides are read as they lie, which is what few vectors, or rows one by one, are best served by.

use std::ops::Range;

use super::IsaLevel;
use super::dispatch::{Kernel, dispatch};
use super::epilogue::Output;
use super::isa::Isa;
use super::vmath;

/// What a row `x` and a vector `v` come to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Comparison {
    /// `x·v`
    Product,
    /// `(gamma · x·v + coef0)^degree`
    Polynomial { gamma: f32, coef0: f32, degree: f32 },
    /// `exp(-gamma · |x - v|²)`
    Radial { gamma: f32 },
    /// `tanh(gamma · x·v + coef0)`
    Sigmoid { gamma: f32, coef0: f32 },
}

/// Every row of `x` (`[n, features]`) with every one of `vectors` (`[m, features]`): `[n, m]`.
#[derive(Clone, Copy, Debug)]
pub struct Compare<'a> {
    pub comparison: Comparison,
    pub features: usize,
    pub x: &'a [f32],
    pub vectors: &'a [f32],
}

/// Computes a range of rows; `output` begins with the first of them.
pub fn compare(level: IsaLevel, problem: &Compare<'_>, rows: Range<usize>, output: Output<'_>) {
    let Compare { features, x, vectors, .. } = *problem;
    assert!(features > 0 && vectors.len().is_multiple_of(features), "{features} features of {}", vectors.len());
    assert!(x.len() >= rows.end * features, "{rows:?} of {features} features in {}", x.len());
    assert!(output.len() >= rows.len() * (vectors.len() / features));
    dispatch(level, Run { problem, rows, to: output.pointer() });
}

struct Run<'a> {
    problem: &'a Compare<'a>,
    rows: Range<usize>,
    to: *mut f32,
}

impl Kernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        match self.problem.comparison {
            // The literal makes each arm a loop of its own.
            Comparison::Radial { .. } => self.run::<I, true>(isa),
            _ => self.run::<I, false>(isa),
        }
    }
}

impl Run<'_> {
    #[inline(always)]
    fn run<I: Isa, const DISTANCE: bool>(&self, isa: I) {
        let Compare { comparison, features, x, vectors } = *self.problem;
        let count = vectors.len() / features;
        for (i, row) in self.rows.clone().enumerate() {
            // SAFETY: the entry checked the lengths of all three; `i` counts the rows of the range.
            unsafe {
                let x = x.as_ptr().add(row * features);
                let to = self.to.add(i * count);
                for j in 0..count {
                    to.add(j).write(one::<I, DISTANCE>(isa, x, vectors.as_ptr().add(j * features), features));
                }
                finish(isa, comparison, to, count);
            }
        }
    }
}

/// # Safety
/// `features` values are readable at both.
#[inline(always)]
unsafe fn one<I: Isa, const DISTANCE: bool>(isa: I, x: *const f32, v: *const f32, features: usize) -> f32 {
    // SAFETY: the caller; `k` stays below `features`.
    unsafe {
        let (mut sum, mut k) = (0.0, 0);
        if features >= I::LANES {
            let mut chains = [isa.zero(); 2];
            while k + I::LANES <= features {
                let chain = &mut chains[k / I::LANES % 2];
                let (a, b) = (isa.load(x.add(k)), isa.load(v.add(k)));
                let (a, b) = if DISTANCE { (isa.sub(a, b), isa.sub(a, b)) } else { (a, b) };
                *chain = isa.fma(a, b, *chain);
                k += I::LANES;
            }
            sum = isa.reduce_sum(isa.add(chains[0], chains[1]));
        }
        for k in k..features {
            let (a, b) = (x.add(k).read(), v.add(k).read());
            sum += if DISTANCE { (a - b) * (a - b) } else { a * b };
        }
        sum
    }
}

/// Makes products or squared distances what is asked for.
///
/// # Safety
/// `count` values are writable at `to`.
#[inline(always)]
unsafe fn finish<I: Isa>(isa: I, comparison: Comparison, to: *mut f32, count: usize) {
    // SAFETY: the caller.
    unsafe {
        match comparison {
            Comparison::Product => {}
            Comparison::Radial { gamma } => each(isa, to, count, |v| vmath::exp(isa, isa.mul(v, isa.splat(-gamma)))),
            Comparison::Sigmoid { gamma, coef0 } => {
                each(isa, to, count, |v| vmath::tanh(isa, isa.fma(v, isa.splat(gamma), isa.splat(coef0))))
            }
            Comparison::Polynomial { gamma, coef0, degree } => {
                let base = |v| isa.fma(v, isa.splat(gamma), isa.splat(coef0));
                match degree {
                    1.0 => each(isa, to, count, base),
                    2.0 => each(isa, to, count, |v| isa.mul(base(v), base(v))),
                    3.0 => each(isa, to, count, |v| isa.mul(isa.mul(base(v), base(v)), base(v))),
                    _ => {
                        each(isa, to, count, base);
                        for i in 0..count {
                            to.add(i).write(to.add(i).read().powf(degree));
                        }
                    }
                }
            }
        }
    }
}

/// # Safety
/// `count` values are writable at `to`.
#[inline(always)]
unsafe fn each<I: Isa>(isa: I, to: *mut f32, count: usize, f: impl Fn(I::V) -> I::V) {
    // SAFETY: the caller; the last part is shorter than a vector.
    unsafe {
        let mut i = 0;
        while i + I::LANES <= count {
            isa.store(to.add(i), f(isa.load(to.add(i))));
            i += I::LANES;
        }
        if i < count {
            isa.store_partial(to.add(i), f(isa.load_partial(to.add(i), count - i)), count - i);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Random, assert_near, assert_same_bits, levels};
    use super::*;

    #[test]
    fn rows_compare_with_vectors() {
        let mut random = Random::new(7);
        let comparisons = [
            Comparison::Product,
            Comparison::Radial { gamma: 0.25 },
            Comparison::Sigmoid { gamma: 0.5, coef0: 0.125 },
            Comparison::Polynomial { gamma: 0.5, coef0: 1.0, degree: 2.0 },
            Comparison::Polynomial { gamma: 0.5, coef0: 1.0, degree: 3.0 },
            Comparison::Polynomial { gamma: 0.0625, coef0: 4.0, degree: 2.5 },
        ];
        for level in levels() {
            for comparison in comparisons {
                let (n, m) = (random.between(1, 5), random.between(1, 40));
                let features = random.pick(&[1, 3, 8, 17, 40]);
                let (x, vectors) = (random.units(n * features), random.units(m * features));
                let problem = Compare { comparison, features, x: &x, vectors: &vectors };
                let pairs = x.chunks(features).flat_map(|x| vectors.chunks(features).map(move |v| (x, v)));
                let expected = pairs.map(|(x, v)| {
                    let pairs = x.iter().zip(v).map(|(&x, &v)| (f64::from(x), f64::from(v)));
                    let product: f64 = pairs.clone().map(|(x, v)| x * v).sum();
                    let distance: f64 = pairs.map(|(x, v)| (x - v) * (x - v)).sum();
                    match comparison {
                        Comparison::Product => product,
                        Comparison::Radial { gamma } => (-f64::from(gamma) * distance).exp(),
                        Comparison::Sigmoid { gamma, coef0 } => (f64::from(gamma) * product + f64::from(coef0)).tanh(),
                        Comparison::Polynomial { gamma, coef0, degree } => {
                            (f64::from(gamma) * product + f64::from(coef0)).powf(degree.into())
                        }
                    }
                });
                let mut output = vec![0f32; n * m];
                compare(level, &problem, 0..n, Output::new(&mut output));
                assert_near(level, &comparison, &output, &expected.collect::<Vec<_>>(), 1e-5);
                let mut last = vec![0f32; m];
                compare(level, &problem, n - 1..n, Output::new(&mut last));
                assert_same_bits(level, &comparison, &output[(n - 1) * m..], &last);
            }
        }
    }
}
