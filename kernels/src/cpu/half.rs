//! Weights held in 16 bits: rounded once when they are packed, widened a piece at a time into a workspace that a cache holds.
//!
//! What is computed with them is what f32 kernels compute with the rounded weights, to the bit, on every instruction set. Half precision (binary16) has three
//! more bits of mantissa; bfloat16 has all exponents of f32.

use super::IsaLevel;
use super::dispatch::{Kernel, dispatch};
use super::isa::Isa;

/// A floating-point type of 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HalfType {
    /// IEEE 754's binary16: 10 bits of mantissa, up to [`F16_MAX`].
    F16,
    /// f32 without its last 16 bits.
    Bf16,
}

/// The largest half-precision float.
pub const F16_MAX: f32 = 65504.0;

impl HalfType {
    /// Whether `x` stays what it is, finite or not.
    pub fn holds(self, x: f32) -> bool {
        // Halfway to what would be the next one, ties go there.
        let limit = match self {
            HalfType::F16 => F16_MAX + 16.0,
            HalfType::Bf16 => f32::from_bits(0x7f7f_8000),
        };
        x.abs() < limit || !x.is_finite()
    }
}

/// Writes the values of `from` to `to`, as many.
pub fn widen(level: IsaLevel, of: HalfType, from: &[u16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "halves to widen, and room for them");
    dispatch(level, Widen { of, from, to });
}

/// Writes the nearest values to those of `from` to `to`, as many; ties to even.
pub fn narrow(level: IsaLevel, of: HalfType, from: &[f32], to: &mut [u16]) {
    assert_eq!(from.len(), to.len(), "floats to narrow, and room for them");
    dispatch(level, Narrow { of, from, to });
}

struct Widen<'a> {
    of: HalfType,
    from: &'a [u16],
    to: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let mut rest = self.from.len();
        let (mut from, mut to) = (self.from.as_ptr(), self.to.as_mut_ptr());
        // SAFETY: `rest` values are left at either place; the array holds 16 >= LANES.
        unsafe {
            while rest >= I::LANES {
                let v = match self.of {
                    HalfType::F16 => isa.load_f16(from),
                    HalfType::Bf16 => isa.load_bf16(from),
                };
                isa.store(to, v);
                (from, to, rest) = (from.add(I::LANES), to.add(I::LANES), rest - I::LANES);
            }
            if rest > 0 {
                let mut last = [0u16; 16];
                std::ptr::copy_nonoverlapping(from, last.as_mut_ptr(), rest);
                let v = match self.of {
                    HalfType::F16 => isa.load_f16(last.as_ptr()),
                    HalfType::Bf16 => isa.load_bf16(last.as_ptr()),
                };
                isa.store_partial(to, v, rest);
            }
        }
    }
}

struct Narrow<'a> {
    of: HalfType,
    from: &'a [f32],
    to: &'a mut [u16],
}

impl Kernel for Narrow<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let mut rest = self.from.len();
        let (mut from, mut to) = (self.from.as_ptr(), self.to.as_mut_ptr());
        let mut halves = [0u16; 16];
        // SAFETY: `rest` values are left at either place; the array holds 16 >= LANES.
        unsafe {
            while rest > 0 {
                let whole = rest >= I::LANES;
                let v = if whole { isa.load(from) } else { isa.load_partial(from, rest) };
                let at = if whole { to } else { halves.as_mut_ptr() };
                match self.of {
                    HalfType::F16 => isa.store_f16(at, v),
                    HalfType::Bf16 => isa.store_bf16(at, v),
                }
                if !whole {
                    std::ptr::copy_nonoverlapping(halves.as_ptr(), to, rest);
                    break;
                }
                (from, to, rest) = (from.add(I::LANES), to.add(I::LANES), rest - I::LANES);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Random, levels};
    use super::super::typed;
    use super::*;

    #[test]
    fn every_half_is_widened_and_comes_back() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        for level in levels() {
            for of in [HalfType::F16, HalfType::Bf16] {
                let (mut floats, mut back) = (vec![0f32; all.len()], vec![0u16; all.len()]);
                widen(level, of, &all, &mut floats);
                narrow(level, of, &floats, &mut back);
                for (&bits, (&float, &again)) in all.iter().zip(floats.iter().zip(&back)) {
                    let expected = match of {
                        HalfType::F16 => typed::half_to_float(bits),
                        HalfType::Bf16 => f32::from_bits(u32::from(bits) << 16),
                    };
                    let same = float.to_bits() == expected.to_bits() && again == bits;
                    assert!(same || float.is_nan() && expected.is_nan(), "{} {of:?} {bits:#x}: {float}", level.name());
                }
            }
        }
    }

    #[test]
    fn floats_round_to_the_nearest_half_ties_to_even() {
        for level in levels() {
            let mut random = Random::new(60);
            for of in [HalfType::F16, HalfType::Bf16] {
                for count in [0, 1, 3, 16, 37, 1000] {
                    // Numbers of all exponents, most of them halfway between two halves or next to it.
                    let floats: Vec<f32> = (0..count)
                        .map(|i| {
                            let bits = random.bits() as u32;
                            let tie = if of == HalfType::F16 { 1 << 12 } else { 1 << 15 };
                            let near =
                                (bits & !(2 * tie - 1) | tie).wrapping_add(random.between(0, 2) as u32).wrapping_sub(1);
                            let exponent = random.between(95, 150) as u32;
                            match i % 3 {
                                0 => f32::from_bits(bits),
                                1 => f32::from_bits(near),
                                _ => f32::from_bits(near & 0x807f_ffff | exponent << 23),
                            }
                        })
                        .collect();
                    let mut halves = vec![7u16; count];
                    narrow(level, of, &floats, &mut halves);
                    for (&float, &half) in floats.iter().zip(&halves) {
                        let expected = match of {
                            HalfType::F16 => typed::narrow(float.into(), 10, 15),
                            HalfType::Bf16 => typed::narrow(float.into(), 7, 127),
                        };
                        let infinity = if of == HalfType::F16 { 0x7c00 } else { 0x7f80 };
                        let same = if float.is_nan() { half & 0x7fff > infinity } else { half == expected };
                        assert!(same, "{} {of:?} {float:e}: {half:#x}, expected {expected:#x}", level.name());
                        assert_eq!(
                            of.holds(float),
                            half & 0x7fff != infinity || !float.is_finite(),
                            "{of:?} {float:e}"
                        );
                    }
                }
            }
        }
    }
}
