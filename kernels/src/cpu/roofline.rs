//! Loops that do nothing but multiply and add, or read: what a thread can do at most, for whoever times them.

use std::hint::black_box;

use super::IsaLevel;
use super::dispatch::{Kernel, dispatch};
use super::isa::Isa;

/// Chains side by side: more than the latency of a multiply-add times how many begin in a cycle, on any CPU so far, and fewer than registers.
const CHAINS: usize = 12;

/// Multiplies and adds in registers, `rounds` times for each of some chains. Returns how many operations that was, a multiply-add
/// being two.
pub fn multiply_add(level: IsaLevel, rounds: usize) -> u64 {
    dispatch(level, MultiplyAdd { rounds })
}

struct MultiplyAdd {
    rounds: usize,
}

impl Kernel for MultiplyAdd {
    type Output = u64;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) -> u64 {
        let (factor, addend) = (isa.splat(black_box(0.5)), isa.splat(black_box(1.0)));
        let mut chains = [addend; CHAINS];
        for _ in 0..self.rounds {
            for chain in &mut chains {
                *chain = isa.fma(*chain, factor, addend);
            }
        }
        for chain in chains {
            black_box(isa.reduce_sum(chain));
        }
        2 * (self.rounds * CHAINS * I::LANES) as u64
    }
}

/// The sum of `data`, in an order of its own: reads every byte of it once.
pub fn read(level: IsaLevel, data: &[f32]) -> f32 {
    dispatch(level, Read { data })
}

struct Read<'a> {
    data: &'a [f32],
}

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) -> f32 {
        let mut sums = [isa.zero(); CHAINS];
        let parts = self.data.chunks_exact(CHAINS * I::LANES);
        let mut sum: f32 = parts.remainder().iter().sum();
        for part in parts {
            for (i, total) in sums.iter_mut().enumerate() {
                // SAFETY: a part holds CHAINS vectors.
                *total = isa.add(*total, unsafe { isa.load(part.as_ptr().add(i * I::LANES)) });
            }
        }
        for total in sums {
            sum += isa.reduce_sum(total);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_counted_and_every_value_is_read() {
        for level in IsaLevel::available() {
            let one = multiply_add(level, 1);
            assert!(one >= 2 * CHAINS as u64 && multiply_add(level, 10) == 10 * one);
            let data: Vec<f32> = (0..1000).map(|i| i as f32).collect();
            for len in [0usize, 1, 47, 48, 192, 1000] {
                let expected = (len * len.saturating_sub(1) / 2) as f32;
                assert_eq!(read(level, &data[..len]), expected, "{} {len}", level.name());
            }
        }
    }
}
