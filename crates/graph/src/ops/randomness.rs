//! What nodes that draw numbers draw them from.
//!
//! A node's numbers are a function of its seed and of the place of each element in the result, and of nothing else: the same on every run,
//! on every machine and in every order of evaluation. A node without a seed has one that is made of its name, so that nodes beside each
//! other draw different numbers and a model still answers the same question the same way: what compares versions of a model (golden
//! vectors, the gates of a canary) needs that. So folding such a node into a constant changes no answer. It also means that a node
//! inside a loop draws the same numbers in every iteration.

use super::NodeReader;
use crate::{ImportError, OpError};
use cutover_tensor::DType;

/// SplitMix64's increment and its mixing (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
const INCREMENT: u64 = 0x9e37_79b9_7f4a_7c15;

fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The seed of a node that has none: FNV-1a of its name, as many bits as an f32 holds exactly.
fn of_name(name: &str) -> i64 {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    (mixed(hash) >> 40) as i64
}

/// Attribute `seed`, a float; made of the node's name where it is left out.
pub fn float_seed(node: &mut NodeReader) -> Result<f32, ImportError> {
    Ok(node.optional_float("seed")?.unwrap_or(of_name(&node.node) as f32))
}

/// Attribute `seed`, an integer; made of the node's name where it is left out.
pub fn integer_seed(node: &mut NodeReader) -> Result<i64, ImportError> {
    Ok(node.optional_int("seed")?.unwrap_or(of_name(&node.node)))
}

/// Attribute `dtype`, one of the floats that can be drawn.
pub fn float_dtype(node: &mut NodeReader) -> Result<Option<DType>, ImportError> {
    let Some(code) = node.optional_int("dtype")? else { return Ok(None) };
    let dtype = i32::try_from(code).ok().and_then(DType::from_onnx_code);
    match dtype.filter(|&dtype| is_drawn(dtype)) {
        Some(dtype) => Ok(Some(dtype)),
        None => Err(node.corrupt(format!("dtype {code} is not that of a float of 16 bits or more"))),
    }
}

pub fn is_drawn(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64 | DType::F16 | DType::BF16)
}

/// The numbers of one element after another.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    key: u64,
    at: u64,
}

impl Stream {
    pub fn of_float(seed: f32) -> Stream {
        Stream::new(u64::from(seed.to_bits()))
    }

    pub fn of_integer(seed: i64) -> Stream {
        Stream::new(seed as u64)
    }

    fn new(seed: u64) -> Stream {
        Stream { key: mixed(seed.wrapping_add(INCREMENT)), at: 0 }
    }

    fn next(&mut self) -> u64 {
        self.at = self.at.wrapping_add(1);
        mixed(self.key.wrapping_add(self.at.wrapping_mul(INCREMENT)))
    }

    /// From `[0, 1)`, all 2⁵³ values alike.
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Of mean 0 and deviation 1, by Marsaglia's polar method (1964). Its logarithm is made of sums, products and quotients,
    /// which every machine rounds alike.
    pub fn normal(&mut self) -> f64 {
        loop {
            let (u, v) = (2.0 * self.uniform() - 1.0, 2.0 * self.uniform() - 1.0);
            let square = u * u + v * v;
            if square > 0.0 && square < 1.0 {
                return u * (-2.0 * logarithm(square) / square).sqrt();
            }
        }
    }
}

/// The natural logarithm of a positive normal number: `2 artanh((m − 1) / (m + 1)) + e ln 2` for `x = m 2ᵉ`.
fn logarithm(x: f64) -> f64 {
    let bits = x.to_bits();
    let (mut exponent, mut mantissa) =
        ((bits >> 52) as i64 - 1023, f64::from_bits(bits & 0x000f_ffff_ffff_ffff | 0x3ff0_0000_0000_0000));
    if mantissa > std::f64::consts::SQRT_2 {
        (exponent, mantissa) = (exponent + 1, mantissa / 2.0);
    }
    let ratio = (mantissa - 1.0) / (mantissa + 1.0);
    let square = ratio * ratio;
    // The ratio is below 0.172: the terms left out are below 1e-18.
    let series = (0..12).rev().fold(0.0, |sum, k| sum * square + 1.0 / f64::from(2 * k + 1));
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * ratio * series
}

/// A probability, which every draw needs to be one.
pub fn probability(p: f64) -> Result<f64, OpError> {
    match (0.0..=1.0).contains(&p) {
        true => Ok(p),
        false => Err(OpError::input(format!("{p} is no probability"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logarithm_is_one() {
        for x in [1e-300, 1e-9, 0.3, 0.7, 1.0, 1.41, 1.5, 9.75, 1e300] {
            let (ours, theirs) = (logarithm(x), f64::ln(x));
            assert!((ours - theirs).abs() <= 4.0 * f64::EPSILON * theirs.abs().max(1.0), "ln {x}: {ours}, {theirs}");
        }
    }

    #[test]
    fn streams_are_what_they_were() {
        // Models' answers depend on these: they must not change from version to version.
        let mut stream = Stream::of_float(1.0);
        let first: Vec<u64> = (0..2).map(|_| stream.next()).collect();
        assert_eq!(first, FIRST);
        assert_ne!(Stream::of_float(2.0).next(), FIRST[0]);
        assert_eq!(of_name("node"), OF_NODE);
    }

    const FIRST: [u64; 2] = [17135012751125619531, 4094530531438354531];
    const OF_NODE: i64 = 9285861;
}
