//! Advanced SIMD of 64-bit Arm, four lanes: part of every AArch64 target that Rust's std supports.
// Where the target's baseline has the feature, its intrinsics are safe and the blocks needless.
#![allow(unused_unsafe)]

use std::arch::aarch64::*;

use super::Isa;
use crate::cpu::dispatch::Kernel;

/// Products of four bytes (FEAT_DotProd).
pub const DOT_PRODUCT: u8 = 1;
/// Those, and of matrices of bytes (FEAT_I8MM) and of pairs of bfloat16 (FEAT_BF16): Armv8.6.
pub const MATRICES: u8 = 2;

/// Proof that this machine has Advanced SIMD; also its extensions, up to the one that the parameter names.
#[derive(Clone, Copy, Debug)]
pub struct Neon<const EXTENSIONS: u8>(());

impl<const EXTENSIONS: u8> Neon<EXTENSIONS> {
    pub fn new() -> Option<Neon<EXTENSIONS>> {
        use std::arch::is_aarch64_feature_detected as has;
        let has_dots = EXTENSIONS < DOT_PRODUCT || has!("dotprod");
        let has_matrices = EXTENSIONS < MATRICES || has!("i8mm") && has!("bf16");
        (has!("neon") && has_dots && has_matrices).then_some(Neon(()))
    }
}

/// # Safety
/// The machine has Advanced SIMD.
#[target_feature(enable = "neon")]
#[inline(never)]
unsafe fn outline_neon<K: Kernel>(kernel: K) -> K::Output {
    kernel.eval(Neon::<0>(()))
}

/// # Safety
/// The machine has Advanced SIMD with products of four bytes.
#[target_feature(enable = "neon,dotprod")]
#[inline(never)]
unsafe fn outline_neon_dot<K: Kernel>(kernel: K) -> K::Output {
    kernel.eval(Neon::<DOT_PRODUCT>(()))
}

/// # Safety
/// The machine has Advanced SIMD with all that [`MATRICES`] stands for.
#[target_feature(enable = "neon,dotprod,i8mm,bf16")]
#[inline(never)]
unsafe fn outline_neon_matrices<K: Kernel>(kernel: K) -> K::Output {
    kernel.eval(Neon::<MATRICES>(()))
}

const ROOT_HALF_BITS: i32 = 0x3f35_04f3;

macro_rules! lanewise {
    ($($name:ident($($x:ident),+) = $e:expr;)+) => {
        $(
            #[inline(always)]
            fn $name(self, $($x: Self::V),+) -> Self::V {
                // SAFETY: the token.
                unsafe { $e }
            }
        )+
    };
}

// SAFETY, for every block of this impl: the token proves Advanced SIMD; memory is vouched for by the caller.
impl<const EXTENSIONS: u8> Isa for Neon<EXTENSIONS> {
    type V = float32x4_t;
    type M = uint32x4_t;
    const LANES: usize = 4;
    const REGISTERS: usize = 32;
    const FUSED: bool = true;

    #[inline(always)]
    fn floats_of(self, w: Self::W) -> Self::V {
        // SAFETY: the token.
        unsafe { vcvtq_f32_s32(w) }
    }

    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> Self::W {
        // SAFETY: the token; the caller vouches for four bytes.
        unsafe {
            let bytes = vcreate_u8(u64::from(p.cast::<u32>().read_unaligned()));
            vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))))
        }
    }

    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: Self::V) {
        // SAFETY: the token; the caller vouches for four bytes.
        unsafe {
            let halves = vmovn_s32(vcvtq_s32_f32(v));
            let bytes = vreinterpret_u32_s8(vmovn_s16(vcombine_s16(halves, halves)));
            p.cast::<u32>().write_unaligned(vget_lane_u32::<0>(bytes));
        }
    }

    #[inline(always)]
    fn outline<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token.
        unsafe {
            match EXTENSIONS {
                0 => outline_neon(kernel),
                DOT_PRODUCT => outline_neon_dot(kernel),
                _ => outline_neon_matrices(kernel),
            }
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        // SAFETY: the token.
        unsafe { vdupq_n_f32(x) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the token; the caller vouches for the memory.
        unsafe { vld1q_f32(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: the token; the caller vouches for the memory.
        unsafe { vst1q_f32(p, v) }
    }

    #[inline(always)]
    unsafe fn load_partial(self, p: *const f32, n: usize) -> Self::V {
        let mut lanes = [0.0f32; 4];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: i < n, and the caller vouches for n readable values.
            *lane = unsafe { p.add(i).read() };
        }
        // SAFETY: the token; the array holds four values.
        unsafe { vld1q_f32(lanes.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn store_partial(self, p: *mut f32, v: Self::V, n: usize) {
        let mut lanes = [0.0f32; 4];
        // SAFETY: the token; the array holds four values.
        unsafe { vst1q_f32(lanes.as_mut_ptr(), v) };
        for (i, lane) in lanes.iter().enumerate().take(n) {
            // SAFETY: i < n, and the caller vouches for n writable values.
            unsafe { p.add(i).write(*lane) };
        }
    }

    lanewise! {
        add(a, b) = vaddq_f32(a, b);
        sub(a, b) = vsubq_f32(a, b);
        mul(a, b) = vmulq_f32(a, b);
        div(a, b) = vdivq_f32(a, b);
        fma(a, b, c) = vfmaq_f32(c, a, b);
        fnma(a, b, c) = vfmsq_f32(c, a, b);
        min(a, b) = vbslq_f32(vcltq_f32(a, b), a, b);
        max(a, b) = vbslq_f32(vcgtq_f32(a, b), a, b);
        sqrt(a) = vsqrtq_f32(a);
        round(a) = vrndnq_f32(a);
        floor(a) = vrndmq_f32(a);
        ceil(a) = vrndpq_f32(a);
        abs(a) = vabsq_f32(a);
        copysign(a, b) = vbslq_f32(vdupq_n_u32(0x8000_0000), b, a);
        pow2(n) = vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127))));
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::V {
        // SAFETY: the token; the caller vouches for four halves.
        unsafe {
            let halves = vld1_u16(p);
            let floats: float32x4_t;
            std::arch::asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) floats, in(vreg) halves, options(pure, nomem, nostack));
            floats
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: Self::V) {
        // SAFETY: the token; the caller vouches for four halves.
        unsafe {
            let halves: uint16x4_t;
            std::arch::asm!("fcvtn {0:v}.4h, {1:v}.4s", out(vreg) halves, in(vreg) v, options(pure, nomem, nostack));
            vst1_u16(p, halves);
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: Self::V) {
        // SAFETY: the token; the caller vouches for four halves.
        unsafe {
            let halves = if EXTENSIONS >= MATRICES {
                let halves: uint16x4_t;
                std::arch::asm!(
                    ".arch_extension bf16",
                    "bfcvtn {0:v}.4h, {1:v}.4s",
                    out(vreg) halves, in(vreg) v, options(pure, nomem, nostack),
                );
                halves
            } else {
                let bits = vreinterpretq_u32_f32(v);
                let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
                let nearest = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
                let quiet = vorrq_u32(bits, vdupq_n_u32(0x40_0000));
                vshrn_n_u32::<16>(vbslq_u32(vceqq_f32(v, v), nearest, quiet))
            };
            vst1_u16(p, halves);
        }
    }

    #[inline(always)]
    fn dot_bf16(self, sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        if EXTENSIONS < MATRICES {
            return self.dot_bf16_widened(sum, a, b);
        }
        let mut sum = sum;
        // SAFETY: the token.
        unsafe {
            std::arch::asm!(
                ".arch_extension bf16",
                "bfdot {0:v}.4s, {1:v}.8h, {2:v}.8h",
                inout(vreg) sum, in(vreg) a, in(vreg) b, options(pure, nomem, nostack),
            );
        }
        sum
    }

    #[inline(always)]
    fn lt(self, a: Self::V, b: Self::V) -> Self::M {
        // SAFETY: the token.
        unsafe { vcltq_f32(a, b) }
    }

    #[inline(always)]
    fn le(self, a: Self::V, b: Self::V) -> Self::M {
        // SAFETY: the token.
        unsafe { vcleq_f32(a, b) }
    }

    #[inline(always)]
    fn eq(self, a: Self::V, b: Self::V) -> Self::M {
        // SAFETY: the token.
        unsafe { vceqq_f32(a, b) }
    }

    #[inline(always)]
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { vbslq_f32(m, a, b) }
    }

    #[inline(always)]
    fn split_exponent(self, x: Self::V) -> (Self::V, Self::V) {
        // SAFETY: the token.
        unsafe {
            let offset = vdupq_n_s32(ROOT_HALF_BITS);
            let shifted = vsubq_s32(vreinterpretq_s32_f32(x), offset);
            let mantissa = vaddq_s32(vandq_s32(shifted, vdupq_n_s32(0x007f_ffff)), offset);
            (vreinterpretq_f32_s32(mantissa), vcvtq_f32_s32(vshrq_n_s32::<23>(shifted)))
        }
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
