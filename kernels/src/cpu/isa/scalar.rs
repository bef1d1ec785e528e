//! The rung that every machine has: four lanes in plain Rust, which compilers turn into the baseline vectors of the target.

use super::Isa;
use crate::cpu::dispatch::Kernel;

/// Plain Rust, four lanes.
#[derive(Clone, Copy, Debug)]
pub struct Scalar;

/// Four values, aligned as the baseline vectors are.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub struct Lanes<T>([T; 4]);

impl<T: Copy> Lanes<T> {
    #[inline(always)]
    fn zip<U: Copy, R: Copy>(self, other: Lanes<U>, f: impl Fn(T, U) -> R) -> Lanes<R> {
        let (a, b) = (self.0, other.0);
        Lanes([f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])])
    }

    #[inline(always)]
    fn map<R: Copy>(self, f: impl Fn(T) -> R) -> Lanes<R> {
        let a = self.0;
        Lanes([f(a[0]), f(a[1]), f(a[2]), f(a[3])])
    }
}

impl Isa for Scalar {
    type V = Lanes<f32>;
    type M = Lanes<bool>;
    const LANES: usize = 4;
    const REGISTERS: usize = 16;
    const FUSED: bool = false;

    #[inline(never)]
    fn outline<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.eval(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        Lanes([x; 4])
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the caller vouches for four readable values.
        Lanes(unsafe { p.cast::<[f32; 4]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller vouches for four writable values.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(v.0) }
    }

    #[inline(always)]
    unsafe fn load_partial(self, p: *const f32, n: usize) -> Self::V {
        let mut v = [0.0; 4];
        for (i, lane) in v.iter_mut().enumerate().take(n) {
            // SAFETY: i < n, and the caller vouches for n readable values.
            *lane = unsafe { p.add(i).read() };
        }
        Lanes(v)
    }

    #[inline(always)]
    unsafe fn store_partial(self, p: *mut f32, v: Self::V, n: usize) {
        for (i, lane) in v.0.iter().enumerate().take(n) {
            // SAFETY: i < n, and the caller vouches for n writable values.
            unsafe { p.add(i).write(*lane) };
        }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        a.zip(b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        a.zip(b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        a.zip(b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        a.zip(b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        self.add(self.mul(a, b), c)
    }

    #[inline(always)]
    fn fnma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        self.sub(c, self.mul(a, b))
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        a.zip(b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        a.zip(b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        a.map(f32::sqrt)
    }

    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        // From 2^23 on the spacing of values is 1: adding 2^23 rounds, ties to even. Larger values are integral already.
        const INTEGRAL: f32 = 8_388_608.0;
        let rounded = a.map(|x| ((x.abs() + INTEGRAL) - INTEGRAL).copysign(x));
        self.select(a.map(|x| x.abs() < INTEGRAL), rounded, a)
    }

    #[inline(always)]
    fn floor(self, a: Self::V) -> Self::V {
        self.round(a).zip(a, |rounded, x| if rounded > x { rounded - 1.0 } else { rounded })
    }

    #[inline(always)]
    fn ceil(self, a: Self::V) -> Self::V {
        self.round(a).zip(a, |rounded, x| if rounded < x { (rounded + 1.0).copysign(x) } else { rounded })
    }

    #[inline(always)]
    fn abs(self, a: Self::V) -> Self::V {
        a.map(f32::abs)
    }

    #[inline(always)]
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V {
        a.zip(b, f32::copysign)
    }

    #[inline(always)]
    fn lt(self, a: Self::V, b: Self::V) -> Self::M {
        a.zip(b, |a, b| a < b)
    }

    #[inline(always)]
    fn le(self, a: Self::V, b: Self::V) -> Self::M {
        a.zip(b, |a, b| a <= b)
    }

    #[inline(always)]
    fn eq(self, a: Self::V, b: Self::V) -> Self::M {
        a.zip(b, |a, b| a == b)
    }

    #[inline(always)]
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V {
        let m = m.0;
        Lanes([
            if m[0] { a.0[0] } else { b.0[0] },
            if m[1] { a.0[1] } else { b.0[1] },
            if m[2] { a.0[2] } else { b.0[2] },
            if m[3] { a.0[3] } else { b.0[3] },
        ])
    }

    #[inline(always)]
    fn floats_of(self, w: Self::W) -> Self::V {
        Lanes(w.map(|x| x as f32))
    }

    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> Self::W {
        // SAFETY: the caller vouches for four readable bytes.
        unsafe { p.cast::<[u8; 4]>().read_unaligned() }.map(i32::from)
    }

    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: Self::V) {
        // SAFETY: the caller vouches for four writable bytes.
        unsafe { p.cast::<[u8; 4]>().write_unaligned(v.0.map(|x| x as i32 as u8)) }
    }

    #[inline(always)]
    fn pow2(self, n: Self::V) -> Self::V {
        // `as` saturates and sends NaN to 0; the shift then builds the exponent field.
        n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23))
    }

    #[inline(always)]
    fn split_exponent(self, x: Self::V) -> (Self::V, Self::V) {
        const ROOT_HALF_BITS: i32 = 0x3f35_04f3;
        let shifted = x.map(|x| (x.to_bits() as i32).wrapping_sub(ROOT_HALF_BITS));
        let mantissa = shifted.map(|s| f32::from_bits(((s & 0x007f_ffff).wrapping_add(ROOT_HALF_BITS)) as u32));
        (mantissa, shifted.map(|s| (s >> 23) as f32))
    }

    #[inline(always)]
    unsafe fn transpose(self, rows: [*const f32; 16], to: *mut f32, to_stride: usize) {
        let mut square = [[0.0f32; 4]; 4];
        for (row, from) in square.iter_mut().zip(rows) {
            // SAFETY: the caller vouches for the source.
            *row = unsafe { from.cast::<[f32; 4]>().read_unaligned() };
        }
        for j in 0..4 {
            let column = [square[0][j], square[1][j], square[2][j], square[3][j]];
            // SAFETY: the caller vouches for the destination.
            unsafe { to.add(j * to_stride).cast::<[f32; 4]>().write_unaligned(column) };
        }
    }
}
