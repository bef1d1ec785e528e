//! What the tests of all families share: seeded numbers and comparison against `f64`.

use super::IsaLevel;
use super::conv::Operands;
use super::half::{HalfType, narrow};

/// The rungs to test: all that this machine has, or those that `CUTOVER_LEVELS` names, by commas; a name that it lacks is a failure.
pub fn levels() -> impl Iterator<Item = IsaLevel> {
    let named = |names: String| -> Vec<IsaLevel> {
        let level = |name| IsaLevel::named(name).unwrap_or_else(|| panic!("this machine lacks {name}"));
        names.split(',').map(level).collect()
    };
    std::env::var("CUTOVER_LEVELS").map_or_else(|_| IsaLevel::available().collect(), named).into_iter()
}

/// What convolutions on a rung may have their operands in: pairs of bfloat16 where they are an instruction, and as the scalar rung computes them.
pub fn operands(level: IsaLevel) -> impl Iterator<Item = Operands> {
    let of_pairs = level.has_bf16() || level == IsaLevel::SCALAR;
    [Some(Operands::F32), of_pairs.then_some(Operands::Bf16)].into_iter().flatten()
}

/// The nearest bfloat16s, for [`Operands::Bf16`].
pub fn rounded(operands: Operands, values: &[f32]) -> Vec<f32> {
    let mut halves = vec![0; values.len()];
    narrow(IsaLevel::SCALAR, HalfType::Bf16, values, &mut halves);
    let widened = halves.into_iter().map(|half| f32::from_bits(u32::from(half) << 16));
    if operands == Operands::F32 { values.to_vec() } else { widened.collect() }
}

/// The random cases to run: `count`, or of each `CUTOVER_SAMPLE` of them one, and at least a few.
pub fn rounds(count: usize) -> std::ops::Range<usize> {
    const FEWEST: usize = 12;
    let share = std::env::var("CUTOVER_SAMPLE").ok().and_then(|n| n.parse().ok());
    let share = share.map_or(count, |share: usize| count / share.max(1));
    0..share.max(FEWEST).min(count)
}

/// SplitMix64 (Steele, Lea, Flood 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `low ..= high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + (self.bits() % (high - low + 1) as u64) as usize
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.between(0, of.len() - 1)]
    }

    /// Uniform in [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn units(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }
}

/// Fails with the first value further from `expected` than `tolerance · (1 + |expected|)`.
#[track_caller]
pub fn assert_near(level: IsaLevel, what: &dyn std::fmt::Debug, actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{} {what:?}", level.name());
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let near = (f64::from(a) - e).abs() <= tolerance * (1.0 + e.abs());
        assert!(
            near || (a.is_nan() && e.is_nan()) || f64::from(a) == e,
            "{} {what:?}: [{i}] is {a}, expected {e}",
            level.name()
        );
    }
}

/// Fails unless both have the same bits.
#[track_caller]
pub fn assert_same_bits(level: IsaLevel, what: &dyn std::fmt::Debug, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert!(x.to_bits() == y.to_bits(), "{} {what:?}: [{i}] is {x} one way and {y} the other", level.name());
    }
}

/// A few cuts of `0..count`, in order.
pub fn random_cuts(random: &mut Random, count: usize) -> Vec<std::ops::Range<usize>> {
    let mut edges = vec![0, count];
    for _ in 0..random.between(0, 3) {
        edges.push(random.between(0, count));
    }
    edges.sort_unstable();
    edges.windows(2).map(|w| w[0]..w[1]).collect()
}

/// `erf` by its Taylor series below 3 and its continued fraction above (Abramowitz and Stegun 7.1.5, 7.1.14).
pub fn erf(x: f64) -> f64 {
    let t = x.abs();
    let value = if t < 3.0 {
        let (mut term, mut sum) = (t, t);
        for n in 1..200 {
            term *= -t * t / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    } else {
        let mut fraction = 0.0;
        for n in (1..=100).rev() {
            fraction = n as f64 / 2.0 / (t + fraction);
        }
        1.0 - (-t * t).exp() / std::f64::consts::PI.sqrt() / (t + fraction)
    };
    value.copysign(x)
}

/// The definition of each activation, in `f64`.
pub fn activate(activation: super::Activation, x: f64) -> f64 {
    use super::Activation::*;
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Identity => x,
        Relu => x.max(0.0),
        Clip { low, high } => x.max(low.into()).min(high.into()),
        LeakyRelu { alpha } => {
            if x < 0.0 {
                f64::from(alpha) * x
            } else {
                x
            }
        }
        Elu { alpha } => {
            if x < 0.0 {
                f64::from(alpha) * x.exp_m1()
            } else {
                x
            }
        }
        Sigmoid => sigmoid(x),
        Tanh => x.tanh(),
        Silu => x * sigmoid(x),
        HardSigmoid { alpha, beta } => (f64::from(alpha) * x + f64::from(beta)).clamp(0.0, 1.0),
        HardSwish => x * (x / 6.0 + 0.5).clamp(0.0, 1.0),
        Gelu => x / 2.0 * (1.0 + erf(x / 2f64.sqrt())),
        GeluTanh => x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh()),
    }
}

pub const ACTIVATIONS: [super::Activation; 12] = {
    use super::Activation::*;
    [
        Identity,
        Relu,
        Clip { low: -0.25, high: 0.5 },
        LeakyRelu { alpha: 0.1 },
        Elu { alpha: 1.5 },
        Sigmoid,
        Tanh,
        Silu,
        HardSigmoid { alpha: 0.2, beta: 0.5 },
        HardSwish,
        Gelu,
        GeluTanh,
    ]
};
