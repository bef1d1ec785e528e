//! What a rung of SIMD can do, as a value: holding an [`Isa`] token proves that the instructions exist.
//!
//! Kernels are written once over [`Isa`]. Its methods are `inline(always)`: they become instructions only inside a function
//! compiled with the rung's target features, which [`Isa::outline`] and [`super::dispatch`] provide. Vectors of
//! integers are in [`integer`]. There is no operation whose result would depend on the rung except through the number of lanes and the
//! rounding of [`Isa::fma`].

pub mod integer;
pub mod scalar;

#[cfg(target_arch = "aarch64")]
pub mod neon;
#[cfg(target_arch = "x86_64")]
pub mod x86;

use super::dispatch::Kernel;
use super::typed::{half_to_float, narrow};

/// Vectors of `f32` on one rung of the ladder.
///
/// `min` and `max` follow x86: where either operand is NaN the result is the second.
pub trait Isa: integer::Integers + Copy + Send + Sync + 'static {
    /// A vector of `LANES` values.
    type V: Copy;
    /// A truth value per lane.
    type M: Copy;
    /// Values in a vector. Divides 16.
    const LANES: usize;
    /// Vector registers, which bound the register tiles.
    const REGISTERS: usize;
    /// Whether [`Isa::fma`] rounds once.
    const FUSED: bool;

    /// Runs a kernel in a function of its own, compiled for this rung.
    fn outline<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// `LANES` values are readable at `p`.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// # Safety
    /// `LANES` values are writable at `p`.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// The first `n` lanes from memory, the rest 0.
    /// # Safety
    /// `n < LANES` values are readable at `p`.
    unsafe fn load_partial(self, p: *const f32, n: usize) -> Self::V;
    /// # Safety
    /// `n < LANES` values are writable at `p`.
    unsafe fn store_partial(self, p: *mut f32, v: Self::V, n: usize);

    /// Asks for the line at `p` to be brought into the second-level cache, where the machine has such an instruction. Any address may be given.
    #[inline(always)]
    fn prefetch(self, p: *const f32) {
        let _ = p;
    }

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once if [`Isa::FUSED`].
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `c - a * b`, rounded once if [`Isa::FUSED`].
    fn fnma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn sqrt(self, a: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    fn floor(self, a: Self::V) -> Self::V;
    fn ceil(self, a: Self::V) -> Self::V;
    fn abs(self, a: Self::V) -> Self::V;
    /// The magnitude of `a` with the sign of `b`.
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V;

    /// False where either is NaN.
    fn lt(self, a: Self::V, b: Self::V) -> Self::M;
    /// False where either is NaN.
    fn le(self, a: Self::V, b: Self::V) -> Self::M;
    /// False where either is NaN.
    fn eq(self, a: Self::V, b: Self::V) -> Self::M;
    /// `a` where the mask is true, else `b`.
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V;

    /// The integers as floats, rounded where they need more than 24 bits.
    fn floats_of(self, w: Self::W) -> Self::V;
    /// As many bytes as lanes, widened without a sign.
    /// # Safety
    /// They are readable at `p`.
    unsafe fn load_bytes(self, p: *const u8) -> Self::W;
    /// The lowest byte of every lane, an integer that `i32` holds.
    /// # Safety
    /// As many bytes as lanes are writable at `p`.
    unsafe fn store_bytes(self, p: *mut u8, v: Self::V);

    /// The lowest byte of every lane of two vectors, each rounded to the nearest integer, ties to even, plus `zero`: integers that `i16` holds.
    /// # Safety
    /// As many bytes as lanes are writable at either place.
    #[inline(always)]
    unsafe fn store_rounded(self, to: [*mut u8; 2], [a, b]: [Self::V; 2], zero: i32) {
        let zero = self.splat(zero as f32);
        // SAFETY: the caller.
        unsafe {
            self.store_bytes(to[0], self.add(self.round(a), zero));
            self.store_bytes(to[1], self.add(self.round(b), zero));
        }
    }

    /// Of four vectors, every lane rounded to the nearest integer, ties to even, plus `zero`, or the nearest that a byte holds, signed or not. Values are
    /// below 2³⁰ in magnitude, `zero` is a byte.
    /// # Safety
    /// As many bytes as lanes are writable at each place.
    #[inline(always)]
    unsafe fn store_saturated(self, to: [*mut u8; 4], values: [Self::V; 4], zero: i32, signed: bool) {
        let (low, high) = if signed { (-128, 127) } else { (0, 255) };
        let (low, high) = (self.splat((low - zero) as f32), self.splat((high - zero) as f32));
        for i in 0..4 {
            let v = self.min(self.max(values[i], low), high);
            // SAFETY: the caller.
            unsafe { self.store_bytes(to[i], self.add(self.round(v), self.splat(zero as f32))) };
        }
    }

    /// Half-precision floats (IEEE 754's binary16), widened.
    /// # Safety
    /// `LANES` of them are readable at `p`.
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::V {
        let mut lanes = [0.0f32; 16];
        // SAFETY: the caller; the array holds 16 >= LANES values.
        unsafe {
            for i in 0..Self::LANES {
                lanes[i] = half_to_float(p.add(i).read());
            }
            self.load(lanes.as_ptr())
        }
    }

    /// The nearest half-precision floats, ties to even, infinite past 65504.
    /// # Safety
    /// `LANES` of them are writable at `p`.
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: Self::V) {
        let lanes = self.to_lanes(v);
        for i in 0..Self::LANES {
            // SAFETY: the caller.
            unsafe { p.add(i).write(narrow(lanes[i].into(), 10, 15)) };
        }
    }

    /// Floats of 16 bits with f32's exponents (bfloat16), widened.
    /// # Safety
    /// `LANES` of them are readable at `p`.
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::V {
        let mut lanes = [0.0f32; 16];
        // SAFETY: the caller; the array holds 16 >= LANES values.
        unsafe {
            for i in 0..Self::LANES {
                lanes[i] = f32::from_bits(u32::from(p.add(i).read()) << 16);
            }
            self.load(lanes.as_ptr())
        }
    }

    /// The nearest bfloat16, ties to even.
    /// # Safety
    /// `LANES` of them are writable at `p`.
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: Self::V) {
        let lanes = self.to_lanes(v);
        for i in 0..Self::LANES {
            let bits = lanes[i].to_bits();
            let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
            // A NaN stays one, quiet and of the same sign.
            let bits = if bits & 0x7fff_ffff > 0x7f80_0000 { bits | 0x40_0000 } else { nearest };
            // SAFETY: the caller.
            unsafe { p.add(i).write((bits >> 16) as u16) };
        }
    }

    /// Lane by lane `sum + a₀b₀ + a₁b₁` of pairs of bfloat16, the first in the lower bits. How often it rounds, and what becomes of subnormal
    /// numbers, is the processor's; without such an instruction twice, as [`Isa::fma`] does.
    #[inline(always)]
    fn dot_bf16(self, sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        self.dot_bf16_widened(sum, a, b)
    }

    #[inline(always)]
    fn dot_bf16_widened(self, sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        let (mut sum, a, b) = (sum, self.to_lanes(a), self.to_lanes(b));
        let halves = |x: f32| [f32::from_bits(x.to_bits() << 16), f32::from_bits(x.to_bits() & 0xffff_0000)];
        for half in 0..2 {
            let (mut left, mut right) = ([0.0; 16], [0.0; 16]);
            for i in 0..Self::LANES {
                (left[i], right[i]) = (halves(a[i])[half], halves(b[i])[half]);
            }
            // SAFETY: the arrays hold 16 >= LANES values.
            sum = unsafe { self.fma(self.load(left.as_ptr()), self.load(right.as_ptr()), sum) };
        }
        sum
    }

    /// `2^n` for integral `n` in -126 ..= 127.
    fn pow2(self, n: Self::V) -> Self::V;
    /// `(m, e)` with `x = m * 2^e` and `m` in [√½, √2), for finite normal `x > 0`.
    fn split_exponent(self, x: Self::V) -> (Self::V, Self::V);

    /// Transposes a square of `LANES` by `LANES`: value `j` at `rows[i]` goes to `to + j·to_stride + i`. Only the first `LANES` rows count.
    /// # Safety
    /// `LANES` values at each row are readable, the destination is writable, and they are apart.
    unsafe fn transpose(self, rows: [*const f32; 16], to: *mut f32, to_stride: usize);

    /// The sum of the lanes, in halves: lane i with lane i + LANES/2, and so on.
    #[inline(always)]
    fn reduce_sum(self, v: Self::V) -> f32 {
        let mut lanes = self.to_lanes(v);
        let mut width = Self::LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    /// The largest lane; NaN if any lane is NaN.
    #[inline(always)]
    fn reduce_max(self, v: Self::V) -> f32 {
        let lanes = self.to_lanes(v);
        let mut best = lanes[0];
        for &x in &lanes[1..Self::LANES] {
            best = if x > best || x.is_nan() { x } else { best };
        }
        best
    }

    /// The smallest lane; NaN if any lane is NaN.
    #[inline(always)]
    fn reduce_min(self, v: Self::V) -> f32 {
        let lanes = self.to_lanes(v);
        let mut best = lanes[0];
        for &x in &lanes[1..Self::LANES] {
            best = if x < best || x.is_nan() { x } else { best };
        }
        best
    }

    /// The lanes, the first `LANES` of 16.
    #[inline(always)]
    fn to_lanes(self, v: Self::V) -> [f32; 16] {
        const { assert!(Self::LANES <= 16) };
        let mut lanes = [0.0f32; 16];
        // SAFETY: the array holds 16 >= LANES values.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        lanes
    }

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    #[inline(always)]
    fn neg(self, a: Self::V) -> Self::V {
        self.sub(self.splat(-0.0), a)
    }
}
