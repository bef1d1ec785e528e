//! AVX2 with FMA and F16C (8 lanes) and AVX-512 F, BW, DQ, VL (16 lanes).

use std::arch::x86_64::*;

use super::Isa;
use crate::cpu::dispatch::Kernel;

/// Proof that this machine has AVX2, FMA and F16C; also AVX-VNNI, where the parameter says so.
#[derive(Clone, Copy, Debug)]
pub struct Avx2<const VNNI: bool>(());

/// Proof that this machine has AVX-512 F, BW, DQ and VL, and AVX2 with FMA and F16C; also VNNI and BF16, where the parameters say so.
#[derive(Clone, Copy, Debug)]
pub struct Avx512<const VNNI: bool, const BF16: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
    pub fn new() -> Option<Avx2<VNNI>> {
        ((!VNNI || is_x86_feature_detected!("avxvnni"))
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Avx2(()))
    }
}

impl<const VNNI: bool, const BF16: bool> Avx512<VNNI, BF16> {
    pub fn new() -> Option<Avx512<VNNI, BF16>> {
        ((!VNNI || is_x86_feature_detected!("avx512vnni"))
            && (!BF16 || is_x86_feature_detected!("avx512bf16"))
            && Avx2::<false>::new().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl"))
        .then_some(Avx512(()))
    }
}

/// # Safety
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
unsafe fn outline_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.eval(Avx2::<false>(()))
}

/// # Safety
/// The machine has AVX2, FMA, F16C and AVX-VNNI.
#[target_feature(enable = "avxvnni,avx2,fma,f16c")]
#[inline(never)]
unsafe fn outline_avx_vnni<K: Kernel>(kernel: K) -> K::Output {
    kernel.eval(Avx2::<true>(()))
}

/// # Safety
/// The machine has the features listed.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
#[inline(never)]
unsafe fn outline_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.eval(Avx512::<false, false>(()))
}

/// # Safety
/// The machine has the features listed.
#[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
#[inline(never)]
unsafe fn outline_avx512_vnni<K: Kernel>(kernel: K) -> K::Output {
    kernel.eval(Avx512::<true, false>(()))
}

/// # Safety
/// The machine has the features listed.
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
#[inline(never)]
unsafe fn outline_avx512_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.eval(Avx512::<false, true>(()))
}

/// Lanes below `n` all ones: eight values from position `8 - n`.
static MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

/// # Safety
/// The machine has AVX2; `n <= 8`.
#[inline(always)]
unsafe fn mask_avx2(n: usize) -> __m256i {
    debug_assert!(n <= 8);
    // SAFETY: the table holds 16 values and 8 - n + 8 <= 16.
    unsafe { _mm256_loadu_si256(MASKS.as_ptr().add(8 - n).cast()) }
}

/// √½ as bits: subtracting it before splitting off the exponent gives mantissas in [√½, √2).
const ROOT_HALF_BITS: i32 = 0x3f35_04f3;

// SAFETY, for every block of this impl: the token proves AVX2, FMA and F16C; memory is vouched for by the caller.
impl<const VNNI: bool> Isa for Avx2<VNNI> {
    type V = __m256;
    type M = __m256;
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    const FUSED: bool = true;

    #[inline(always)]
    fn outline<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token.
        unsafe { if VNNI { outline_avx_vnni(kernel) } else { outline_avx2(kernel) } }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the token; the caller vouches for the memory.
        unsafe { _mm256_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: the token; the caller vouches for the memory.
        unsafe { _mm256_storeu_ps(p, v) }
    }

    #[inline(always)]
    unsafe fn load_partial(self, p: *const f32, n: usize) -> Self::V {
        // SAFETY: the token; masked lanes are not touched.
        unsafe { _mm256_maskload_ps(p, mask_avx2(n)) }
    }

    #[inline(always)]
    unsafe fn store_partial(self, p: *mut f32, v: Self::V, n: usize) {
        // SAFETY: the token; masked lanes are not touched.
        unsafe { _mm256_maskstore_ps(p, mask_avx2(n), v) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const f32) {
        // SAFETY: a hint, without effect where the address is none.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn fnma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_min_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_sqrt_ps(a) }
    }

    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    fn floor(self, a: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    fn ceil(self, a: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    fn abs(self, a: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
    }

    #[inline(always)]
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            _mm256_or_ps(_mm256_andnot_ps(sign, a), _mm256_and_ps(sign, b))
        }
    }

    #[inline(always)]
    fn lt(self, a: Self::V, b: Self::V) -> Self::M {
        // SAFETY: the token.
        unsafe { _mm256_cmp_ps::<_CMP_LT_OQ>(a, b) }
    }

    #[inline(always)]
    fn le(self, a: Self::V, b: Self::V) -> Self::M {
        // SAFETY: the token.
        unsafe { _mm256_cmp_ps::<_CMP_LE_OQ>(a, b) }
    }

    #[inline(always)]
    fn eq(self, a: Self::V, b: Self::V) -> Self::M {
        // SAFETY: the token.
        unsafe { _mm256_cmp_ps::<_CMP_EQ_OQ>(a, b) }
    }

    #[inline(always)]
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_blendv_ps(b, a, m) }
    }

    #[inline(always)]
    fn floats_of(self, w: Self::W) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm256_cvtepi32_ps(w) }
    }

    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> Self::W {
        // SAFETY: the token; the caller vouches for eight bytes.
        unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())) }
    }

    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: Self::V) {
        // SAFETY: the token; the caller vouches for eight bytes.
        unsafe {
            let low = _mm256_and_si256(_mm256_cvtps_epi32(v), _mm256_set1_epi32(0xff));
            let pairs = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256::<1>(low));
            _mm_storel_epi64(p.cast(), _mm_packus_epi16(pairs, pairs));
        }
    }

    #[inline(always)]
    unsafe fn store_rounded(self, to: [*mut u8; 2], [a, b]: [Self::V; 2], zero: i32) {
        // SAFETY: the token; the caller vouches for eight bytes of each.
        unsafe {
            // Four of a, four of b, in either half.
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
            let words = _mm256_add_epi16(words, _mm256_set1_epi16(zero as i16));
            let low = _mm256_and_si256(words, _mm256_set1_epi16(0xff));
            let bytes = _mm_packus_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256::<1>(low));
            let bytes = _mm_shuffle_epi32::<0b11_01_10_00>(bytes);
            _mm_storel_epi64(to[0].cast(), bytes);
            _mm_storeh_pd(to[1].cast(), _mm_castsi128_pd(bytes));
        }
    }

    #[inline(always)]
    unsafe fn store_saturated(self, to: [*mut u8; 4], values: [Self::V; 4], zero: i32, signed: bool) {
        // SAFETY: the token; the caller vouches for eight bytes of each.
        unsafe {
            let zero = _mm256_set1_epi16(zero as i16);
            let [a, b, c, d] = values;
            let first = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
            let second = _mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
            let (first, second) = (_mm256_adds_epi16(first, zero), _mm256_adds_epi16(second, zero));
            // Four of each in either half.
            let bytes = if signed { _mm256_packs_epi16(first, second) } else { _mm256_packus_epi16(first, second) };
            let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            let (low, high) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
            for (i, half) in [low, high].into_iter().enumerate() {
                to[2 * i].cast::<i64>().write_unaligned(_mm_extract_epi64::<0>(half));
                to[2 * i + 1].cast::<i64>().write_unaligned(_mm_extract_epi64::<1>(half));
            }
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::V {
        // SAFETY: the token; the caller vouches for eight halves.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::V {
        // SAFETY: the token; the caller vouches for eight halves.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: Self::V) {
        // SAFETY: the token; the caller vouches for eight halves.
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }

    #[inline(always)]
    fn pow2(self, n: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        }
    }

    #[inline(always)]
    fn split_exponent(self, x: Self::V) -> (Self::V, Self::V) {
        // SAFETY: the token.
        unsafe {
            let offset = _mm256_set1_epi32(ROOT_HALF_BITS);
            let shifted = _mm256_sub_epi32(_mm256_castps_si256(x), offset);
            let mantissa = _mm256_add_epi32(_mm256_and_si256(shifted, _mm256_set1_epi32(0x007f_ffff)), offset);
            (_mm256_castsi256_ps(mantissa), _mm256_cvtepi32_ps(_mm256_srai_epi32::<23>(shifted)))
        }
    }

    #[inline(always)]
    unsafe fn transpose(self, rows: [*const f32; 16], to: *mut f32, to_stride: usize) {
        // SAFETY: the token; the caller vouches for both squares.
        unsafe {
            let mut r = [_mm256_setzero_ps(); 8];
            for i in 0..8 {
                r[i] = _mm256_loadu_ps(rows[i]);
            }
            // Columns of four rows each: u[i + j] has column 4l + j of rows i..i+4 in its 128-bit lane l.
            let mut u = [_mm256_setzero_ps(); 8];
            for i in [0, 4] {
                let (a, b) = (_mm256_unpacklo_ps(r[i], r[i + 1]), _mm256_unpackhi_ps(r[i], r[i + 1]));
                let (c, d) = (_mm256_unpacklo_ps(r[i + 2], r[i + 3]), _mm256_unpackhi_ps(r[i + 2], r[i + 3]));
                u[i] = _mm256_shuffle_ps::<0x44>(a, c);
                u[i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
                u[i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
                u[i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
            }
            for j in 0..4 {
                _mm256_storeu_ps(to.add(j * to_stride), _mm256_permute2f128_ps::<0x20>(u[j], u[4 + j]));
                _mm256_storeu_ps(to.add((4 + j) * to_stride), _mm256_permute2f128_ps::<0x31>(u[j], u[4 + j]));
            }
        }
    }
}

// SAFETY, for every block of this impl: the token proves AVX-512 (and BF16 where its parameter says so); memory is vouched for by the
// caller.
impl<const VNNI: bool, const BF16: bool> Isa for Avx512<VNNI, BF16> {
    type V = __m512;
    type M = __mmask16;
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    const FUSED: bool = true;

    #[inline(always)]
    fn outline<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token.
        unsafe {
            match (VNNI, BF16) {
                (_, true) => outline_avx512_bf16(kernel),
                (true, false) => outline_avx512_vnni(kernel),
                (false, false) => outline_avx512(kernel),
            }
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the token; the caller vouches for the memory.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: the token; the caller vouches for the memory.
        unsafe { _mm512_storeu_ps(p, v) }
    }

    #[inline(always)]
    unsafe fn load_partial(self, p: *const f32, n: usize) -> Self::V {
        // SAFETY: the token; masked lanes are not touched.
        unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as __mmask16, p) }
    }

    #[inline(always)]
    unsafe fn store_partial(self, p: *mut f32, v: Self::V, n: usize) {
        // SAFETY: the token; masked lanes are not touched.
        unsafe { _mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as __mmask16, v) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const f32) {
        // SAFETY: a hint, without effect where the address is none.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn fnma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_sqrt_ps(a) }
    }

    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    fn floor(self, a: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    fn ceil(self, a: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    fn abs(self, a: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_abs_ps(a) }
    }

    #[inline(always)]
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe {
            let sign = _mm512_set1_ps(-0.0);
            _mm512_or_ps(_mm512_andnot_ps(sign, a), _mm512_and_ps(sign, b))
        }
    }

    #[inline(always)]
    fn lt(self, a: Self::V, b: Self::V) -> Self::M {
        // SAFETY: the token.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
    }

    #[inline(always)]
    fn le(self, a: Self::V, b: Self::V) -> Self::M {
        // SAFETY: the token.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b) }
    }

    #[inline(always)]
    fn eq(self, a: Self::V, b: Self::V) -> Self::M {
        // SAFETY: the token.
        unsafe { _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b) }
    }

    #[inline(always)]
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_mask_blend_ps(m, b, a) }
    }

    #[inline(always)]
    fn floats_of(self, w: Self::W) -> Self::V {
        // SAFETY: the token.
        unsafe { _mm512_cvtepi32_ps(w) }
    }

    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> Self::W {
        // SAFETY: the token; the caller vouches for sixteen bytes.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: Self::V) {
        // SAFETY: the token; the caller vouches for sixteen bytes.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))) }
    }

    #[inline(always)]
    unsafe fn store_rounded(self, to: [*mut u8; 2], [a, b]: [Self::V; 2], zero: i32) {
        // SAFETY: the token; the caller vouches for sixteen bytes of each.
        unsafe {
            let zero = _mm512_set1_epi32(zero);
            let (a, b) = (_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
            _mm_storeu_si128(to[0].cast(), _mm512_cvtepi32_epi8(_mm512_add_epi32(a, zero)));
            _mm_storeu_si128(to[1].cast(), _mm512_cvtepi32_epi8(_mm512_add_epi32(b, zero)));
        }
    }

    #[inline(always)]
    unsafe fn store_saturated(self, to: [*mut u8; 4], values: [Self::V; 4], zero: i32, signed: bool) {
        // SAFETY: the token; the caller vouches for sixteen bytes of each.
        unsafe {
            let zero = _mm512_set1_epi32(zero);
            for i in 0..4 {
                let words = _mm512_add_epi32(_mm512_cvtps_epi32(values[i]), zero);
                let bytes = match signed {
                    true => _mm512_cvtsepi32_epi8(words),
                    // The instruction takes its words for unsigned ones.
                    false => _mm512_cvtusepi32_epi8(_mm512_max_epi32(words, _mm512_setzero_si512())),
                };
                _mm_storeu_si128(to[i].cast(), bytes);
            }
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::V {
        // SAFETY: the token; the caller vouches for sixteen halves.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::V {
        // SAFETY: the token; the caller vouches for sixteen halves.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: Self::V) {
        // SAFETY: the token; the caller vouches for sixteen halves.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: Self::V) {
        // SAFETY: the token; the caller vouches for sixteen halves. Both types are 256 bits.
        unsafe {
            let halves = match BF16 {
                // Subnormal numbers become 0.
                true => std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v)),
                false => {
                    let bits = _mm512_castps_si512(v);
                    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                    let nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                    let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
                    let bits = _mm512_mask_or_epi32(nearest, is_nan, bits, _mm512_set1_epi32(0x40_0000));
                    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits))
                }
            };
            _mm256_storeu_si256(p.cast(), halves);
        }
    }

    #[inline(always)]
    fn dot_bf16(self, sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        if !BF16 {
            return self.dot_bf16_widened(sum, a, b);
        }
        // SAFETY: the token; both types are 512 bits.
        unsafe {
            _mm512_dpbf16_ps(
                sum,
                std::mem::transmute::<__m512, __m512bh>(a),
                std::mem::transmute::<__m512, __m512bh>(b),
            )
        }
    }

    #[inline(always)]
    fn pow2(self, n: Self::V) -> Self::V {
        // SAFETY: the token.
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        }
    }

    #[inline(always)]
    fn split_exponent(self, x: Self::V) -> (Self::V, Self::V) {
        // SAFETY: the token.
        unsafe {
            let offset = _mm512_set1_epi32(ROOT_HALF_BITS);
            let shifted = _mm512_sub_epi32(_mm512_castps_si512(x), offset);
            let mantissa = _mm512_add_epi32(_mm512_and_si512(shifted, _mm512_set1_epi32(0x007f_ffff)), offset);
            (_mm512_castsi512_ps(mantissa), _mm512_cvtepi32_ps(_mm512_srai_epi32::<23>(shifted)))
        }
    }

    #[inline(always)]
    unsafe fn transpose(self, rows: [*const f32; 16], to: *mut f32, to_stride: usize) {
        // SAFETY: the token; the caller vouches for both squares.
        unsafe {
            let mut r = [_mm512_setzero_ps(); 16];
            for i in 0..16 {
                r[i] = _mm512_loadu_ps(rows[i]);
            }
            // Columns of four rows each: u[i + j] has column 4l + j of rows i..i+4 in its 128-bit lane l.
            let mut u = [_mm512_setzero_ps(); 16];
            for i in [0, 4, 8, 12] {
                let (a, b) = (_mm512_unpacklo_ps(r[i], r[i + 1]), _mm512_unpackhi_ps(r[i], r[i + 1]));
                let (c, d) = (_mm512_unpacklo_ps(r[i + 2], r[i + 3]), _mm512_unpackhi_ps(r[i + 2], r[i + 3]));
                u[i] = _mm512_shuffle_ps::<0x44>(a, c);
                u[i + 1] = _mm512_shuffle_ps::<0xee>(a, c);
                u[i + 2] = _mm512_shuffle_ps::<0x44>(b, d);
                u[i + 3] = _mm512_shuffle_ps::<0xee>(b, d);
            }
            for j in 0..4 {
                let (a, b, c, d) = (u[j], u[4 + j], u[8 + j], u[12 + j]);
                let (x, y) = (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
                let (z, w) = (_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
                _mm512_storeu_ps(to.add(j * to_stride), _mm512_shuffle_f32x4::<0x88>(x, z));
                _mm512_storeu_ps(to.add((4 + j) * to_stride), _mm512_shuffle_f32x4::<0xdd>(x, z));
                _mm512_storeu_ps(to.add((8 + j) * to_stride), _mm512_shuffle_f32x4::<0x88>(y, w));
                _mm512_storeu_ps(to.add((12 + j) * to_stride), _mm512_shuffle_f32x4::<0xdd>(y, w));
            }
        }
    }
}
