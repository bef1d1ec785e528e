//! Vector mathematics: `exp`, `log`, `tanh`, `erf` and what is built on them, per lane.
//!
//! Polynomials: Cephes single precision (S. Moshier) for `exp`, `log` and small `tanh`; `erf` in two branches after
//! N. Juffa's published single-precision minimax fits. Errors, against `f64`, are stated on each function and tested. NaN gives
//! NaN everywhere.
// Coefficients stand as published, to the digits that single precision keeps.
#![allow(clippy::excessive_precision)]

use super::isa::Isa;

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts; the first has so few bits that a small integer times it is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

#[inline(always)]
fn horner<I: Isa, const N: usize>(isa: I, x: I::V, coefficients: [f32; N]) -> I::V {
    let mut sum = isa.splat(coefficients[0]);
    for &c in &coefficients[1..] {
        sum = isa.fma(sum, x, isa.splat(c));
    }
    sum
}

/// e^x, 2 ulp. Underflows through the subnormals to 0, overflows to infinity.
#[inline(always)]
pub fn exp<I: Isa>(isa: I, x: I::V) -> I::V {
    // The constants first: min and max then pass NaN on.
    let x = isa.min(isa.splat(89.0), isa.max(isa.splat(-104.0), x));
    let n = isa.round(isa.mul(x, isa.splat(LOG2_E)));
    let p = exp_reduced(isa, x, n);
    // In two steps: 2^n itself may be out of range where the result is subnormal or just below infinity.
    let half = isa.round(isa.mul(n, isa.splat(0.5)));
    isa.mul(isa.mul(p, isa.pow2(half)), isa.pow2(isa.sub(n, half)))
}

/// e^x for x ≤ 0, 2 ulp; 0 where it would be subnormal, below -87.7.
#[inline(always)]
pub fn exp_below_one<I: Isa>(isa: I, x: I::V) -> I::V {
    // -88 gives the power -127, whose bits are those of 0.
    let x = isa.max(isa.splat(-88.0), x);
    let n = isa.round(isa.mul(x, isa.splat(LOG2_E)));
    isa.mul(exp_reduced(isa, x, n), isa.pow2(n))
}

/// e^x / 2^n, where n is the integer nearest to x / ln 2.
#[inline(always)]
fn exp_reduced<I: Isa>(isa: I, x: I::V, n: I::V) -> I::V {
    let r = isa.fnma(n, isa.splat(LN2_HIGH), x);
    let r = isa.fnma(n, isa.splat(LN2_LOW), r);
    let p =
        horner(isa, r, [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 5.000_000_1e-1]);
    isa.add(isa.fma(p, isa.mul(r, r), r), isa.splat(1.0))
}

/// Natural logarithm, 2 ulp. -infinity at 0, NaN below.
#[inline(always)]
pub fn log<I: Isa>(isa: I, x: I::V) -> I::V {
    let zero = isa.zero();
    let tiny = isa.lt(x, isa.splat(f32::MIN_POSITIVE));
    let scaled = isa.select(tiny, isa.mul(x, isa.splat(8_388_608.0)), x);
    let (mantissa, exponent) = isa.split_exponent(scaled);
    let exponent = isa.sub(exponent, isa.select(tiny, isa.splat(23.0), zero));
    let f = isa.sub(mantissa, isa.splat(1.0));
    let z = isa.mul(f, f);
    let p = horner(
        isa,
        f,
        [
            7.037_683_6e-2,
            -1.151_461e-1,
            1.167_699_9e-1,
            -1.242_014_1e-1,
            1.424_932_3e-1,
            -1.666_805_7e-1,
            2.000_071_5e-1,
            -2.499_999_4e-1,
            3.333_333_1e-1,
        ],
    );
    let y = isa.mul(isa.mul(f, z), p);
    let y = isa.fma(exponent, isa.splat(LN2_LOW), y);
    let y = isa.fnma(z, isa.splat(0.5), y);
    let y = isa.fma(exponent, isa.splat(LN2_HIGH), isa.add(f, y));
    let infinity = isa.splat(f32::INFINITY);
    let y = isa.select(isa.lt(x, infinity), y, x);
    let y = isa.select(isa.eq(x, zero), isa.splat(f32::NEG_INFINITY), y);
    isa.select(isa.lt(x, zero), isa.splat(f32::NAN), y)
}

/// Hyperbolic tangent, 3 ulp.
#[inline(always)]
pub fn tanh<I: Isa>(isa: I, x: I::V) -> I::V {
    let magnitude = isa.abs(x);
    let z = isa.mul(x, x);
    let p = horner(isa, z, [-5.704_988_7e-3, 2.063_908_9e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328_2e-1]);
    let small = isa.fma(isa.mul(p, z), magnitude, magnitude);
    let e = exp(isa, isa.add(magnitude, magnitude));
    let large = isa.sub(isa.splat(1.0), isa.div(isa.splat(2.0), isa.add(e, isa.splat(1.0))));
    isa.copysign(isa.select(isa.lt(magnitude, isa.splat(0.625)), small, large), x)
}

/// 1 / (1 + e^-x), 4 ulp for x > -87; 0 where e^-x overflows.
#[inline(always)]
pub fn sigmoid<I: Isa>(isa: I, x: I::V) -> I::V {
    let one = isa.splat(1.0);
    isa.div(one, isa.add(one, exp(isa, isa.neg(x))))
}

/// The error function, 3 ulp.
#[inline(always)]
pub fn erf<I: Isa>(isa: I, x: I::V) -> I::V {
    let t = isa.abs(x);
    let s = isa.mul(x, x);
    let small = horner(
        isa,
        s,
        [-5.967_617e-4, 4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_25e-1, -3.761_253_4e-1, 1.283_791_7e-1],
    );
    let small = isa.fma(small, x, x);
    // Beyond 4 the result is 1 to the last bit; the bound keeps the polynomial where it was fitted.
    let t = isa.min(isa.splat(4.0), t);
    let s = isa.mul(t, t);
    let r = isa.fma(isa.splat(-1.728_534_7e-5), t, isa.splat(3.831_971_3e-4));
    let u = isa.fma(isa.splat(-3.883_964_4e-3), t, isa.splat(2.425_462_2e-2));
    let r = isa.fma(r, s, u);
    let r = isa.fma(r, t, isa.splat(-1.067_778_8e-1));
    let r = isa.fma(r, t, isa.splat(-6.348_466_9e-1));
    let r = isa.fma(r, t, isa.splat(-1.287_175_1e-1));
    let r = isa.sub(isa.mul(r, t), t);
    let large = isa.copysign(isa.sub(isa.splat(1.0), exp_below_one(isa, r)), x);
    isa.select(isa.lt(isa.splat(0.927_734_4), isa.abs(x)), large, small)
}

/// x/2 · (1 + erf(x/√2)); absolute error 3e-7 · max(1, |x|).
#[inline(always)]
pub fn gelu<I: Isa>(isa: I, x: I::V) -> I::V {
    let e = erf(isa, isa.mul(x, isa.splat(std::f32::consts::FRAC_1_SQRT_2)));
    let half = isa.mul(x, isa.splat(0.5));
    // Not x/2 + x/2 · erf: minus infinity would give NaN for 0 either way, but this form keeps large finite x exact.
    isa.mul(half, isa.add(isa.splat(1.0), e))
}

/// x/2 · (1 + tanh(√(2/π) · (x + 0.044715·x³))); absolute error 4e-7 · max(1, |x|).
#[inline(always)]
pub fn gelu_tanh<I: Isa>(isa: I, x: I::V) -> I::V {
    let cube = isa.mul(isa.mul(x, x), x);
    let inner = isa.mul(isa.splat(0.797_884_6), isa.fma(isa.splat(0.044_715), cube, x));
    isa.mul(isa.mul(x, isa.splat(0.5)), isa.add(isa.splat(1.0), tanh(isa, inner)))
}

/// x · σ(x).
#[inline(always)]
pub fn silu<I: Isa>(isa: I, x: I::V) -> I::V {
    isa.div(x, isa.add(isa.splat(1.0), exp(isa, isa.neg(x))))
}

/// `min(max(x, low), high)`; NaN goes through.
#[inline(always)]
pub fn clip<I: Isa>(isa: I, x: I::V, low: f32, high: f32) -> I::V {
    isa.min(isa.splat(high), isa.max(isa.splat(low), x))
}

/// `max(0, min(1, alpha · x + beta))`.
#[inline(always)]
pub fn hard_sigmoid<I: Isa>(isa: I, x: I::V, alpha: f32, beta: f32) -> I::V {
    clip(isa, isa.fma(x, isa.splat(alpha), isa.splat(beta)), 0.0, 1.0)
}

/// x for x ≥ 0, else alpha · (e^x − 1).
#[inline(always)]
pub fn elu<I: Isa>(isa: I, x: I::V, alpha: f32) -> I::V {
    let negative = isa.mul(isa.splat(alpha), exp_m1(isa, x));
    isa.select(isa.lt(x, isa.zero()), negative, x)
}

/// e^x − 1, absolute error 2e-7 for x ≤ 1 and relative 4 ulp where |x| < 0.3466.
#[inline(always)]
pub fn exp_m1<I: Isa>(isa: I, x: I::V) -> I::V {
    let p =
        horner(isa, x, [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 5.000_000_1e-1]);
    let small = isa.fma(p, isa.mul(x, x), x);
    let large = isa.sub(exp(isa, x), isa.splat(1.0));
    isa.select(isa.lt(isa.abs(x), isa.splat(0.346_5)), small, large)
}

/// ln(1 + e^x) as max(x, 0) + ln(1 + e^-|x|).
#[inline(always)]
pub fn softplus<I: Isa>(isa: I, x: I::V) -> I::V {
    let e = exp(isa, isa.neg(isa.abs(x)));
    // ln(1 + e) for small e by its series: 1 + e would have lost it.
    let series = isa.fnma(isa.mul(e, e), isa.splat(0.5), e);
    let tail = isa.select(isa.lt(e, isa.splat(1e-3)), series, log(isa, isa.add(isa.splat(1.0), e)));
    isa.add(isa.max(isa.zero(), x), tail)
}

#[cfg(test)]
mod tests {
    use super::super::dispatch::{Kernel, dispatch};
    use super::super::testing::{self, levels};
    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Function {
        Exp,
        ExpBelowOne,
        Log,
        Tanh,
        Sigmoid,
        Erf,
        Gelu,
    }

    struct Apply<'a>(Function, &'a mut [f32]);

    impl Kernel for Apply<'_> {
        type Output = ();

        #[inline(always)]
        fn eval<I: Isa>(self, isa: I) {
            for chunk in self.1.chunks_exact_mut(I::LANES) {
                // SAFETY: a chunk holds LANES values.
                unsafe {
                    let x = isa.load(chunk.as_ptr());
                    let y = match self.0 {
                        Function::Exp => exp(isa, x),
                        Function::ExpBelowOne => exp_below_one(isa, x),
                        Function::Log => log(isa, x),
                        Function::Tanh => tanh(isa, x),
                        Function::Sigmoid => sigmoid(isa, x),
                        Function::Erf => erf(isa, x),
                        Function::Gelu => gelu(isa, x),
                    };
                    isa.store(chunk.as_mut_ptr(), y);
                }
            }
        }
    }

    /// Distance in units of the last place of the rounded expectation.
    fn ulps(actual: f32, expected: f64) -> f64 {
        if f64::from(actual) == expected || (actual.is_nan() && expected.is_nan()) {
            return 0.0;
        }
        let rounded = expected as f32;
        if rounded.is_infinite() || actual.is_infinite() {
            return if rounded == actual { 0.0 } else { f64::INFINITY };
        }
        let ulp = f64::from(f32::from_bits((rounded.abs().to_bits()).max(1) + 1)) - f64::from(rounded.abs());
        (f64::from(actual) - expected).abs() / ulp
    }

    #[test]
    fn errors_are_within_what_the_documentation_says() {
        let cases: [(Function, f32, f32, f64, fn(f64) -> f64); 7] = [
            (Function::Exp, -87.0, 88.7, 2.0, f64::exp),
            (Function::ExpBelowOne, -87.0, 0.0, 2.0, f64::exp),
            (Function::Log, 1e-38, 1e38, 2.0, f64::ln),
            (Function::Tanh, -12.0, 12.0, 3.0, f64::tanh),
            (Function::Sigmoid, -87.0, 87.0, 4.0, |x| 1.0 / (1.0 + (-x).exp())),
            (Function::Erf, -5.0, 5.0, 3.0, testing::erf),
            // Relative to max(1, |x|) below: the tail cancels.
            (Function::Gelu, -8.0, 8.0, 0.0, |x| x / 2.0 * (1.0 + testing::erf(x / 2f64.sqrt()))),
        ];
        for level in levels() {
            let mut random = testing::Random::new(13);
            for (function, low, high, bound, definition) in cases {
                let inputs: Vec<f32> = (0..16_000)
                    .map(|i| match i % 4 {
                        // Even over the range, and even over the exponents.
                        0 | 1 => (low + (high - low) * (random.unit() * 0.5 + 0.5)).clamp(low, high),
                        _ => {
                            let x = (random.unit() * 40.0).exp2();
                            let x = if i % 4 == 2 || low >= 0.0 { x } else { -x };
                            x.clamp(low, high)
                        }
                    })
                    .collect();
                let mut outputs = inputs.clone();
                dispatch(level, Apply(function, &mut outputs));
                for (&x, &y) in inputs.iter().zip(&outputs) {
                    let expected = definition(x.into());
                    if matches!(function, Function::Gelu) {
                        let error = (f64::from(y) - expected).abs() / f64::from(x.abs().max(1.0));
                        assert!(error < 3e-7, "{} gelu({x}) = {y}, expected {expected}", level.name());
                    } else {
                        let error = ulps(y, expected);
                        let name = level.name();
                        assert!(error <= bound, "{name} {function:?}({x}) = {y}, expected {expected}: {error} ulp");
                    }
                }
            }
        }
    }

    #[test]
    fn special_values_are_right() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let cases: [(Function, &[(f32, f32)]); 6] = [
            (Function::ExpBelowOne, &[(0.0, 1.0), (-88.0, 0.0), (-1e30, 0.0), (-inf, 0.0), (nan, nan)]),
            (Function::Exp, &[(inf, inf), (-inf, 0.0), (nan, nan), (100.0, inf), (-200.0, 0.0), (0.0, 1.0)]),
            (Function::Log, &[(0.0, -inf), (-0.0, -inf), (-1.0, nan), (inf, inf), (nan, nan), (1.0, 0.0)]),
            (Function::Tanh, &[(inf, 1.0), (-inf, -1.0), (nan, nan), (0.0, 0.0), (-0.0, -0.0)]),
            (Function::Sigmoid, &[(inf, 1.0), (-inf, 0.0), (nan, nan), (0.0, 0.5)]),
            (Function::Erf, &[(inf, 1.0), (-inf, -1.0), (nan, nan), (-0.0, -0.0)]),
        ];
        for level in levels() {
            for (function, pairs) in cases {
                for &(x, expected) in pairs {
                    let mut values = [x; 16];
                    dispatch(level, Apply(function, &mut values));
                    let same = values[0].to_bits() == expected.to_bits() || (values[0].is_nan() && expected.is_nan());
                    assert!(same, "{} {function:?}({x}) = {}, expected {expected}", level.name(), values[0]);
                }
            }
            // Subnormal results and arguments.
            let mut values = [-95.0; 16];
            dispatch(level, Apply(Function::Exp, &mut values));
            assert!((f64::from(values[0]) / (-95f64).exp() - 1.0).abs() < 1e-3);
            let mut values = [1e-42; 16];
            dispatch(level, Apply(Function::Log, &mut values));
            assert!((f64::from(values[0]) - f64::from(1e-42f32).ln()).abs() < 1e-4);
        }
    }
}
