//! Vectors of `i32` on every rung, for the kernels of quantized values: products of small integers, and the way to floats and back.

use super::scalar::Scalar;

/// Vectors of as many `i32` as [`super::Isa::V`] has floats, whose bits are also pairs of `i16` or groups of four bytes.
pub trait Integers: Copy {
    type W: Copy;
    /// Whether products are best made of groups of four bytes ([`Integers::dot4`]), not of pairs of `i16`.
    const DOT4: bool;
    /// Whether the first bytes of [`Integers::dot4`] are signed, too.
    const SIGNED: bool = false;
    /// Whether they are better still made of squares of eight bytes ([`Integers::square`]); vectors have four lanes there.
    const SQUARES: bool = false;

    /// Whether it has an instruction for [`Integers::pairs`], and none for [`Integers::dot4`].
    const SATURATES: bool = false;

    fn splat_w(self, x: i32) -> Self::W;
    /// # Safety
    /// As many values as lanes are readable at `p`.
    unsafe fn load_w(self, p: *const i32) -> Self::W;
    /// # Safety
    /// As many values as lanes are writable at `p`.
    unsafe fn store_w(self, p: *mut i32, w: Self::W);
    /// Wrapping.
    fn add_w(self, a: Self::W, b: Self::W) -> Self::W;
    /// Of every bit, whether the two differ in it.
    fn xor_w(self, a: Self::W, b: Self::W) -> Self::W;
    /// Of every bit, whether both have it.
    #[inline(always)]
    fn and_w(self, a: Self::W, b: Self::W) -> Self::W {
        self.by_lanes_w(a, b, |a, b| a & b)
    }
    /// `w << up >> down`, the sign kept on the way down: a field of bits as a signed number. Less than 32 either.
    fn shift_w(self, w: Self::W, up: u32, down: u32) -> Self::W;
    /// Lane by lane `sum + a₀b₀ + a₁b₁` of pairs of `i16`, wrapping.
    fn dot2(self, sum: Self::W, a: Self::W, b: Self::W) -> Self::W;
    /// Lane by lane `sum + a₀b₀ + … + a₃b₃`, where a has unsigned bytes (signed ones where [`Integers::SIGNED`]) and b signed ones; wrapping, nothing
    /// saturates.
    fn dot4(self, sum: Self::W, a: Self::W, b: Self::W) -> Self::W;

    /// Two `i16` a lane, `a₀b₀ + a₁b₁` and `a₂b₂ + a₃b₃`, where a has unsigned bytes and b signed ones. A sum that `i16` does not hold is the nearest that it does.
    #[inline(always)]
    fn pairs(self, a: Self::W, b: Self::W) -> Self::W {
        self.by_lanes_w(a, b, |a, b| {
            let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
            let product = |i: usize| i32::from(a[i]) * i32::from(b[i] as i8);
            halves([0, 2].map(|i| (product(i) + product(i + 1)).clamp(i16::MIN.into(), i16::MAX.into()) as i16))
        })
    }

    /// Of two `i16` a lane, wrapping.
    #[inline(always)]
    fn add_halves(self, a: Self::W, b: Self::W) -> Self::W {
        self.by_lanes_w(a, b, |a, b| halves([0, 16].map(|at| ((a >> at) as i16).wrapping_add((b >> at) as i16))))
    }

    /// Of two `i16` a lane.
    #[inline(always)]
    fn max_halves(self, a: Self::W, b: Self::W) -> Self::W {
        self.by_lanes_w(a, b, |a, b| halves([0, 16].map(|at| ((a >> at) as i16).max((b >> at) as i16))))
    }

    #[inline(always)]
    fn by_lanes_w(self, a: Self::W, b: Self::W, of: impl Fn(i32, i32) -> i32) -> Self::W {
        let (a, b) = (self.to_lanes_w(a), self.to_lanes_w(b));
        let lanes: [i32; 16] = std::array::from_fn(|i| of(a[i], b[i]));
        // SAFETY: sixteen values are as many as lanes at least.
        unsafe { self.load_w(lanes.as_ptr()) }
    }

    /// Two rows of two words.
    /// # Safety
    /// They are readable at either place.
    #[inline(always)]
    unsafe fn load_rows_w(self, rows: [*const i32; 2]) -> Self::W {
        let mut words = [0; 16];
        // SAFETY: the caller; sixteen values are as many as lanes at least.
        unsafe {
            for (row, words) in rows.into_iter().zip(words.chunks_exact_mut(2)) {
                words.copy_from_slice(&row.cast::<[i32; 2]>().read_unaligned());
            }
            self.load_w(words.as_ptr())
        }
    }

    /// Of four lanes, `sum₂ᵢ₊ⱼ + aᵢ · bⱼ`: a has two rows of eight unsigned bytes, b of eight signed ones; wrapping, nothing saturates.
    #[inline(always)]
    fn square(self, sum: Self::W, a: Self::W, b: Self::W) -> Self::W {
        self.square_by_lanes(sum, a, b)
    }

    #[inline(always)]
    fn square_by_lanes(self, sum: Self::W, a: Self::W, b: Self::W) -> Self::W {
        let [mut sum, a, b] = [sum, a, b].map(|w| self.to_lanes_w(w));
        let bytes = |words: &[i32]| -> [u8; 8] {
            let [low, high] = [words[0].to_le_bytes(), words[1].to_le_bytes()];
            std::array::from_fn(|i| if i < 4 { low[i] } else { high[i - 4] })
        };
        for (at, sum) in sum[..4].iter_mut().enumerate() {
            let (a, b) = (bytes(&a[at / 2 * 2..]), bytes(&b[at % 2 * 2..]));
            let products = (0..8).map(|k| i32::from(a[k]) * i32::from(b[k] as i8));
            *sum = sum.wrapping_add(products.sum::<i32>());
        }
        // SAFETY: sixteen values are as many as lanes at least.
        unsafe { self.load_w(sum.as_ptr()) }
    }

    /// Of four lanes, what two squares beside each other have in their first row, and in their second.
    #[inline(always)]
    fn rows_of_squares(self, left: Self::W, right: Self::W) -> [Self::W; 2] {
        let [left, right] = [left, right].map(|w| self.to_lanes_w(w));
        [0, 2].map(|row| {
            let mut lanes = [0; 16];
            lanes[..2].copy_from_slice(&left[row..row + 2]);
            lanes[2..4].copy_from_slice(&right[row..row + 2]);
            // SAFETY: sixteen values are as many as lanes at least.
            unsafe { self.load_w(lanes.as_ptr()) }
        })
    }

    /// The lanes, the first of 16.
    #[inline(always)]
    fn to_lanes_w(self, w: Self::W) -> [i32; 16] {
        let mut lanes = [0; 16];
        // SAFETY: sixteen values are as many as lanes at least.
        unsafe { self.store_w(lanes.as_mut_ptr(), w) };
        lanes
    }
}

/// Two `i16` as a word, the first in its lower half.
fn halves([low, high]: [i16; 2]) -> i32 {
    i32::from(low as u16) | i32::from(high) << 16
}

impl Integers for Scalar {
    type W = [i32; 4];
    const DOT4: bool = true;

    #[inline(always)]
    fn splat_w(self, x: i32) -> [i32; 4] {
        [x; 4]
    }

    #[inline(always)]
    unsafe fn load_w(self, p: *const i32) -> [i32; 4] {
        // SAFETY: the caller.
        unsafe { p.cast::<[i32; 4]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_w(self, p: *mut i32, w: [i32; 4]) {
        // SAFETY: the caller.
        unsafe { p.cast::<[i32; 4]>().write_unaligned(w) }
    }

    #[inline(always)]
    fn add_w(self, a: [i32; 4], b: [i32; 4]) -> [i32; 4] {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }

    #[inline(always)]
    fn xor_w(self, a: [i32; 4], b: [i32; 4]) -> [i32; 4] {
        std::array::from_fn(|i| a[i] ^ b[i])
    }

    #[inline(always)]
    fn shift_w(self, w: [i32; 4], up: u32, down: u32) -> [i32; 4] {
        std::array::from_fn(|i| w[i] << up >> down)
    }

    #[inline(always)]
    fn dot2(self, sum: [i32; 4], a: [i32; 4], b: [i32; 4]) -> [i32; 4] {
        let one = |a: i32, b: i32| (a as i16 as i32) * (b as i16 as i32) + (a >> 16) * (b >> 16);
        std::array::from_fn(|i| sum[i].wrapping_add(one(a[i], b[i])))
    }

    #[inline(always)]
    fn dot4(self, sum: [i32; 4], a: [i32; 4], b: [i32; 4]) -> [i32; 4] {
        let one = |a: i32, b: i32| {
            let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
            (0..4).map(|j| i32::from(a[j]) * i32::from(b[j] as i8)).sum::<i32>()
        };
        std::array::from_fn(|i| sum[i].wrapping_add(one(a[i], b[i])))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::x86::{Avx2, Avx512};
    use super::Integers;
    use std::arch::x86_64::*;

    // SAFETY, for every block of this impl: the token proves AVX2 (and AVX-VNNI where its parameter says so); memory is vouched for by
    // the caller.
    impl<const VNNI: bool> Integers for Avx2<VNNI> {
        type W = __m256i;
        const DOT4: bool = VNNI;
        const SATURATES: bool = !VNNI;

        #[inline(always)]
        fn splat_w(self, x: i32) -> __m256i {
            // SAFETY: the token.
            unsafe { _mm256_set1_epi32(x) }
        }

        #[inline(always)]
        unsafe fn load_w(self, p: *const i32) -> __m256i {
            // SAFETY: the token; the caller.
            unsafe { _mm256_loadu_si256(p.cast()) }
        }

        #[inline(always)]
        unsafe fn store_w(self, p: *mut i32, w: __m256i) {
            // SAFETY: the token; the caller.
            unsafe { _mm256_storeu_si256(p.cast(), w) }
        }

        #[inline(always)]
        fn add_w(self, a: __m256i, b: __m256i) -> __m256i {
            // SAFETY: the token.
            unsafe { _mm256_add_epi32(a, b) }
        }

        #[inline(always)]
        fn xor_w(self, a: __m256i, b: __m256i) -> __m256i {
            // SAFETY: the token.
            unsafe { _mm256_xor_si256(a, b) }
        }

        #[inline(always)]
        fn and_w(self, a: __m256i, b: __m256i) -> __m256i {
            // SAFETY: the token.
            unsafe { _mm256_and_si256(a, b) }
        }

        #[inline(always)]
        fn pairs(self, a: __m256i, b: __m256i) -> __m256i {
            // SAFETY: the token.
            unsafe { _mm256_maddubs_epi16(a, b) }
        }

        #[inline(always)]
        fn add_halves(self, a: __m256i, b: __m256i) -> __m256i {
            // SAFETY: the token.
            unsafe { _mm256_add_epi16(a, b) }
        }

        #[inline(always)]
        fn max_halves(self, a: __m256i, b: __m256i) -> __m256i {
            // SAFETY: the token.
            unsafe { _mm256_max_epi16(a, b) }
        }

        #[inline(always)]
        fn shift_w(self, w: __m256i, up: u32, down: u32) -> __m256i {
            // SAFETY: the token.
            unsafe {
                let up = _mm256_sll_epi32(w, _mm_cvtsi32_si128(up as i32));
                _mm256_sra_epi32(up, _mm_cvtsi32_si128(down as i32))
            }
        }

        #[inline(always)]
        fn dot2(self, sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
            // SAFETY: the token.
            unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)) }
        }

        #[inline(always)]
        fn dot4(self, sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
            // Without the instruction: the even bytes and the odd ones, as pairs of i16.
            // SAFETY: the token; AVX-VNNI where its parameter says so.
            unsafe {
                if VNNI {
                    return _mm256_dpbusd_avx_epi32(sum, a, b);
                }
                let low = _mm256_set1_epi16(0xff);
                let even =
                    _mm256_madd_epi16(_mm256_and_si256(a, low), _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(b)));
                let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(a), _mm256_srai_epi16::<8>(b));
                _mm256_add_epi32(sum, _mm256_add_epi32(even, odd))
            }
        }
    }

    // SAFETY, for every block of this impl: the token proves AVX-512 (and VNNI where its parameter says so); memory is vouched for
    // by the caller.
    impl<const VNNI: bool, const BF16: bool> Integers for Avx512<VNNI, BF16> {
        type W = __m512i;
        const DOT4: bool = VNNI;
        const SATURATES: bool = !VNNI;

        #[inline(always)]
        fn splat_w(self, x: i32) -> __m512i {
            // SAFETY: the token.
            unsafe { _mm512_set1_epi32(x) }
        }

        #[inline(always)]
        unsafe fn load_w(self, p: *const i32) -> __m512i {
            // SAFETY: the token; the caller.
            unsafe { _mm512_loadu_si512(p.cast()) }
        }

        #[inline(always)]
        unsafe fn store_w(self, p: *mut i32, w: __m512i) {
            // SAFETY: the token; the caller.
            unsafe { _mm512_storeu_si512(p.cast(), w) }
        }

        #[inline(always)]
        fn add_w(self, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: the token.
            unsafe { _mm512_add_epi32(a, b) }
        }

        #[inline(always)]
        fn xor_w(self, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: the token.
            unsafe { _mm512_xor_si512(a, b) }
        }

        #[inline(always)]
        fn and_w(self, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: the token.
            unsafe { _mm512_and_si512(a, b) }
        }

        #[inline(always)]
        fn pairs(self, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: the token.
            unsafe { _mm512_maddubs_epi16(a, b) }
        }

        #[inline(always)]
        fn add_halves(self, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: the token.
            unsafe { _mm512_add_epi16(a, b) }
        }

        #[inline(always)]
        fn max_halves(self, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: the token.
            unsafe { _mm512_max_epi16(a, b) }
        }

        #[inline(always)]
        fn shift_w(self, w: __m512i, up: u32, down: u32) -> __m512i {
            // SAFETY: the token.
            unsafe {
                let up = _mm512_sll_epi32(w, _mm_cvtsi32_si128(up as i32));
                _mm512_sra_epi32(up, _mm_cvtsi32_si128(down as i32))
            }
        }

        #[inline(always)]
        fn dot2(self, sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: the token.
            unsafe { _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)) }
        }

        #[inline(always)]
        fn dot4(self, sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: the token; VNNI where its parameter says so.
            unsafe {
                if VNNI {
                    return _mm512_dpbusd_epi32(sum, a, b);
                }
                let low = _mm512_set1_epi16(0xff);
                let even =
                    _mm512_madd_epi16(_mm512_and_si512(a, low), _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(b)));
                let odd = _mm512_madd_epi16(_mm512_srli_epi16::<8>(a), _mm512_srai_epi16::<8>(b));
                _mm512_add_epi32(sum, _mm512_add_epi32(even, odd))
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::super::neon::{DOT_PRODUCT, MATRICES, Neon};
    use super::Integers;
    use std::arch::aarch64::*;

    // SAFETY, for every block of this impl: the token proves Advanced SIMD; memory is vouched for by the caller.
    #[allow(unused_unsafe)]
    impl<const EXTENSIONS: u8> Integers for Neon<EXTENSIONS> {
        type W = int32x4_t;
        const DOT4: bool = EXTENSIONS >= DOT_PRODUCT;
        const SIGNED: bool = EXTENSIONS == DOT_PRODUCT;
        const SQUARES: bool = EXTENSIONS >= MATRICES;

        #[inline(always)]
        fn splat_w(self, x: i32) -> int32x4_t {
            // SAFETY: the token.
            unsafe { vdupq_n_s32(x) }
        }

        #[inline(always)]
        unsafe fn load_w(self, p: *const i32) -> int32x4_t {
            // SAFETY: the token; the caller.
            unsafe { vld1q_s32(p) }
        }

        #[inline(always)]
        unsafe fn store_w(self, p: *mut i32, w: int32x4_t) {
            // SAFETY: the token; the caller.
            unsafe { vst1q_s32(p, w) }
        }

        #[inline(always)]
        fn add_w(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
            // SAFETY: the token.
            unsafe { vaddq_s32(a, b) }
        }

        #[inline(always)]
        fn xor_w(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
            // SAFETY: the token.
            unsafe { veorq_s32(a, b) }
        }

        #[inline(always)]
        fn shift_w(self, w: int32x4_t, up: u32, down: u32) -> int32x4_t {
            // SAFETY: the token; shifts by negative counts go down.
            unsafe { vshlq_s32(vshlq_s32(w, vdupq_n_s32(up as i32)), vdupq_n_s32(-(down as i32))) }
        }

        #[inline(always)]
        fn dot2(self, sum: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
            // SAFETY: the token.
            unsafe {
                let (a, b) = (vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
                let (low, high) = (vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
                vaddq_s32(sum, vpaddq_s32(low, high))
            }
        }

        #[inline(always)]
        unsafe fn load_rows_w(self, rows: [*const i32; 2]) -> int32x4_t {
            // SAFETY: the token; the caller.
            unsafe { vcombine_s32(vld1_s32(rows[0]), vld1_s32(rows[1])) }
        }

        #[inline(always)]
        fn square(self, sum: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
            if EXTENSIONS < MATRICES {
                return self.square_by_lanes(sum, a, b);
            }
            let mut sum = sum;
            // SAFETY: the token.
            unsafe {
                std::arch::asm!(
                    ".arch_extension i8mm",
                    "usmmla {0:v}.4s, {1:v}.16b, {2:v}.16b",
                    inout(vreg) sum, in(vreg) a, in(vreg) b, options(pure, nomem, nostack),
                );
            }
            sum
        }

        #[inline(always)]
        fn rows_of_squares(self, left: int32x4_t, right: int32x4_t) -> [int32x4_t; 2] {
            // SAFETY: the token.
            unsafe {
                let (left, right) = (vreinterpretq_s64_s32(left), vreinterpretq_s64_s32(right));
                [vreinterpretq_s32_s64(vtrn1q_s64(left, right)), vreinterpretq_s32_s64(vtrn2q_s64(left, right))]
            }
        }

        #[inline(always)]
        fn dot4(self, sum: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
            if EXTENSIONS == DOT_PRODUCT {
                let mut sum = sum;
                // SAFETY: the token.
                unsafe {
                    std::arch::asm!(
                        ".arch_extension dotprod",
                        "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
                        inout(vreg) sum, in(vreg) a, in(vreg) b, options(pure, nomem, nostack),
                    );
                }
                return sum;
            }
            if EXTENSIONS >= MATRICES {
                let mut sum = sum;
                // SAFETY: the token.
                unsafe {
                    std::arch::asm!(
                        ".arch_extension i8mm",
                        "usdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
                        inout(vreg) sum, in(vreg) a, in(vreg) b, options(pure, nomem, nostack),
                    );
                }
                return sum;
            }
            // The even bytes and the odd ones, as pairs of i16.
            // SAFETY: the token.
            unsafe {
                let a = vreinterpretq_u16_s32(a);
                let even = vreinterpretq_s32_u16(vandq_u16(a, vdupq_n_u16(0xff)));
                let odd = vreinterpretq_s32_u16(vshrq_n_u16::<8>(a));
                let b = vreinterpretq_s16_s32(b);
                let even_b = vreinterpretq_s32_s16(vshrq_n_s16::<8>(vshlq_n_s16::<8>(b)));
                let odd_b = vreinterpretq_s32_s16(vshrq_n_s16::<8>(b));
                self.dot2(self.dot2(sum, even, even_b), odd, odd_b)
            }
        }
    }
}

/// Checks that every rung's products are those of plain integers.
#[cfg(test)]
mod tests {
    use super::super::super::dispatch::{Kernel, dispatch};
    use super::super::super::testing::{Random, levels, rounds};
    use super::super::Isa;

    struct Dots<'a>(&'a [i32; 16], &'a [i32; 16]);

    struct Products {
        two: [i32; 16],
        four: [i32; 16],
        /// Saturated pairs, their bits in common, the sum and the larger of halves.
        small: [[i32; 16]; 4],
        lanes: usize,
        is_signed: bool,
        /// The two rows of two squares beside each other.
        squares: Option<[[i32; 16]; 2]>,
    }

    impl Kernel for Dots<'_> {
        type Output = Products;
        const OF_BYTES: bool = true;

        #[inline(always)]
        fn eval<I: Isa>(self, isa: I) -> Self::Output {
            let (mut two, mut four, mut squares) = ([0; 16], [0; 16], None);
            // SAFETY: sixteen values are as many as lanes at least.
            unsafe {
                let (a, b) = (isa.load_w(self.0.as_ptr()), isa.load_w(self.1.as_ptr()));
                isa.store_w(two.as_mut_ptr(), isa.dot2(isa.splat_w(7), a, b));
                isa.store_w(four.as_mut_ptr(), isa.dot4(isa.splat_w(-3), a, b));
                if I::SQUARES || I::LANES == 4 {
                    let rows = isa.load_rows_w([self.0.as_ptr(), self.0.as_ptr().add(2)]);
                    let [left, right] = [b, a].map(|b| isa.square(isa.splat_w(5), rows, b));
                    squares = Some(isa.rows_of_squares(left, right).map(|w| isa.to_lanes_w(w)));
                }
            }
            // SAFETY: sixteen values are as many as lanes at least.
            let (a, b) = unsafe { (isa.load_w(self.0.as_ptr()), isa.load_w(self.1.as_ptr())) };
            let small = [isa.pairs(a, b), isa.and_w(a, b), isa.add_halves(a, b), isa.max_halves(a, b)];
            let small = small.map(|w| isa.to_lanes_w(w));
            Products { two, four, small, lanes: I::LANES, is_signed: I::SIGNED, squares }
        }
    }

    #[test]
    fn products_of_small_integers_are_exact() {
        for level in levels() {
            let mut random = Random::new(50);
            for round in rounds(50) {
                let extreme = |bits: i32| {
                    if round == 0 {
                        [0x7fff_7fff, -1, i32::MIN, 0x80ff_7f80u32 as i32][bits as usize & 3]
                    } else {
                        bits
                    }
                };
                let mut values = || std::array::from_fn::<i32, 16, _>(|_| extreme(random.bits() as i32));
                let (a, mut b) = (values(), values());
                // The one sum of pairs that i32 does not hold is of no use: |i16| up to 32767.
                b.iter_mut().for_each(|b| *b = (*b & 0x7fff_7fff) | 1);
                let Products { two, four, small, lanes, is_signed, squares } = dispatch(level, Dots(&a, &b));
                for i in 0..lanes {
                    let pair = |x: i32| [x as i16 as i64, (x >> 16) as i64];
                    let expected: i64 = pair(a[i]).iter().zip(pair(b[i])).map(|(a, b)| a * b).sum();
                    assert_eq!(two[i], (7 + expected) as i32, "{}", level.name());
                    let bytes = a[i].to_le_bytes().into_iter().zip(b[i].to_le_bytes());
                    let first = |a: u8| if is_signed { i32::from(a as i8) } else { i32::from(a) };
                    let expected: i32 = bytes.map(|(a, b)| first(a) * i32::from(b as i8)).sum();
                    assert_eq!(four[i], expected - 3, "{}", level.name());
                    let (x, y) = (a[i].to_le_bytes(), b[i].to_le_bytes());
                    let product = |i: usize| i32::from(x[i]) * i32::from(y[i] as i8);
                    for half in 0..2 {
                        let of = |words: &[i32; 16]| (words[i] >> (16 * half)) as i16;
                        let sum = product(2 * half) + product(2 * half + 1);
                        let expected = [
                            sum.clamp(-32768, 32767) as i16,
                            of(&a) & of(&b),
                            of(&a).wrapping_add(of(&b)),
                            of(&a).max(of(&b)),
                        ];
                        assert_eq!(small.each_ref().map(of), expected, "{}", level.name());
                    }
                }
                for (at, row) in squares.iter().flatten().enumerate() {
                    let bytes = |words: &[i32]| [words[0].to_le_bytes(), words[1].to_le_bytes()].concat();
                    for (i, own) in [&b[..2], &b[2..], &a[..2], &a[2..]].into_iter().enumerate() {
                        let pairs = bytes(&a[2 * at..]).into_iter().zip(bytes(own));
                        let expected: i32 = pairs.map(|(a, b)| i32::from(a) * i32::from(b as i8)).sum();
                        assert_eq!(row[i], expected + 5, "{}", level.name());
                    }
                }
            }
        }
    }
}
