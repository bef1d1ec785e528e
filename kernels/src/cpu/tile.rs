//! The register tile that matrix products and convolutions share: `acc[m][o] += a[m, k] · b[o][k]` for k ascending.
//!
//! Every accumulator is one chain of [`Isa::fma`] over ascending k. A tile's shape therefore never changes a result, and
//! neither does storing an accumulator and going on from it later.

use super::isa::Isa;
use super::{BLOCK, IsaLevel};

/// What the images and the filter of a convolution are held in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Operands {
    #[default]
    F32,
    /// Words of two neighbouring channels in bfloat16, for processors that multiply them at once ([`IsaLevel::has_bf16`]); on others they are
    /// computed with by the scalar rung, for tests. Words are held as floats of the same bits.
    Bf16,
}

impl Operands {
    /// Words of as many values, an even number.
    pub fn words(self, values: usize) -> usize {
        match self {
            Operands::F32 => values,
            Operands::Bf16 => values / 2,
        }
    }

    /// The rung that computes with them.
    pub(crate) fn level(self, level: IsaLevel) -> IsaLevel {
        if self == Operands::F32 || level.has_bf16() { level } else { IsaLevel::SCALAR }
    }
}

/// [`Operands`] as a type: what a tile's sums are made of.
pub(crate) trait Terms: Copy {
    /// Words of a block of channels.
    const WORDS: usize;
    /// Whether they are pairs of bfloat16.
    const OF_HALVES: bool;
    /// Neighbouring pixels.
    type Pixels: Rows;
    fn pixels(first: *const f32) -> Self::Pixels;
    /// The sum and the product of what is in the words.
    fn add<I: Isa>(isa: I, sum: I::V, a: I::V, b: I::V) -> I::V;
    /// Stores values of a vector of channels, the first of which is the `lane`th of the block at `to`.
    /// # Safety
    /// The block is writable.
    unsafe fn store<I: Isa>(isa: I, to: *mut f32, lane: usize, values: I::V);
}

#[derive(Clone, Copy)]
pub(crate) struct Floats;

impl Terms for Floats {
    const WORDS: usize = BLOCK;
    const OF_HALVES: bool = false;
    type Pixels = SteppedRows<BLOCK>;

    #[inline(always)]
    fn pixels(first: *const f32) -> SteppedRows<BLOCK> {
        SteppedRows(first)
    }

    #[inline(always)]
    fn add<I: Isa>(isa: I, sum: I::V, a: I::V, b: I::V) -> I::V {
        isa.fma(a, b, sum)
    }

    #[inline(always)]
    unsafe fn store<I: Isa>(isa: I, to: *mut f32, lane: usize, values: I::V) {
        // SAFETY: the caller.
        unsafe { isa.store(to.add(lane), values) }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Pairs;

impl Terms for Pairs {
    const WORDS: usize = BLOCK / 2;
    const OF_HALVES: bool = true;
    type Pixels = SteppedRows<{ BLOCK / 2 }>;

    #[inline(always)]
    fn pixels(first: *const f32) -> SteppedRows<{ BLOCK / 2 }> {
        SteppedRows(first)
    }

    #[inline(always)]
    fn add<I: Isa>(isa: I, sum: I::V, a: I::V, b: I::V) -> I::V {
        isa.dot_bf16(sum, a, b)
    }

    #[inline(always)]
    unsafe fn store<I: Isa>(isa: I, to: *mut f32, lane: usize, values: I::V) {
        // SAFETY: the caller.
        unsafe { isa.store_bf16(to.cast::<u16>().add(lane), values) }
    }
}

/// Where the value of row `m` at depth `k` is.
pub(crate) trait Rows: Copy {
    /// # Safety
    /// Row and depth are inside what the implementor was made for.
    unsafe fn at(&self, m: usize, k: usize) -> *const f32;
}

/// `[depth][STRIDE]`, as packed for a matrix product.
#[derive(Clone, Copy)]
pub(crate) struct PackedRows<const STRIDE: usize>(pub *const f32);

impl<const STRIDE: usize> Rows for PackedRows<STRIDE> {
    #[inline(always)]
    unsafe fn at(&self, m: usize, k: usize) -> *const f32 {
        // SAFETY: the caller.
        unsafe { self.0.add(k * STRIDE + m) }
    }
}

/// Rows a constant distance apart: neighbouring pixels of a blocked or plain image.
#[derive(Clone, Copy)]
pub(crate) struct SteppedRows<const STEP: usize>(pub *const f32);

impl<const STEP: usize> Rows for SteppedRows<STEP> {
    #[inline(always)]
    unsafe fn at(&self, m: usize, k: usize) -> *const f32 {
        // SAFETY: the caller.
        unsafe { self.0.add(m * STEP + k) }
    }
}

/// Rows a constant distance apart whose values are where a list says.
#[derive(Clone, Copy)]
pub(crate) struct ListedRows<'a, const STEP: usize> {
    pub first: *const f32,
    /// By depth.
    pub offsets: &'a [u32],
}

impl<const STEP: usize> Rows for ListedRows<'_, STEP> {
    #[inline(always)]
    unsafe fn at(&self, m: usize, k: usize) -> *const f32 {
        // SAFETY: the caller.
        unsafe { self.first.add(*self.offsets.get_unchecked(k) as usize + m * STEP) }
    }
}

/// Rows anywhere.
#[derive(Clone, Copy)]
pub(crate) struct ScatteredRows<const MR: usize>(pub [*const f32; MR]);

impl<const MR: usize> Rows for ScatteredRows<MR> {
    #[inline(always)]
    unsafe fn at(&self, m: usize, k: usize) -> *const f32 {
        // SAFETY: the caller.
        unsafe { self.0[m].add(k) }
    }
}

/// Accumulators: `MR` rows by `OB` operands of `VB` vectors.
pub(crate) type Tile<I, const MR: usize, const OB: usize, const VB: usize> = [[[<I as Isa>::V; VB]; OB]; MR];

/// Goes on with the chains of a tile over `depth` steps. Vector `v` of operand `o` at depth `k` is at `b[o] + k·b_step + v·LANES`.
///
/// # Safety
/// All rows and all of `b` are readable for `depth` steps.
#[inline(always)]
pub(crate) unsafe fn accumulate<I: Isa, T: Terms, R: Rows, const MR: usize, const OB: usize, const VB: usize>(
    isa: I,
    acc: &mut Tile<I, MR, OB, VB>,
    rows: R,
    b: [*const f32; OB],
    b_step: usize,
    depth: usize,
) {
    let mut sums = *acc;
    for k in 0..depth {
        let mut vectors = [[isa.zero(); VB]; OB];
        for o in 0..OB {
            for v in 0..VB {
                // SAFETY: the caller vouches for b.
                vectors[o][v] = unsafe { isa.load(b[o].add(k * b_step + v * I::LANES)) };
            }
        }
        for m in 0..MR {
            // SAFETY: the caller vouches for the rows.
            let a = isa.splat(unsafe { rows.at(m, k).read() });
            for o in 0..OB {
                for v in 0..VB {
                    sums[m][o][v] = T::add(isa, sums[m][o][v], a, vectors[o][v]);
                }
            }
        }
    }
    *acc = sums;
}

/// Pixels of a blocked image: word `k` of pixel `m` is at `first[m] + (k / WORDS)·block_stride[m] + k % WORDS`. A stride of 0 repeats one
/// block, of zeros for padding.
#[derive(Clone, Copy)]
pub(crate) struct BlockedPixels<const MR: usize> {
    pub first: [*const f32; MR],
    pub block_stride: [usize; MR],
}

/// [`accumulate`] over the words of pixels. The operands are contiguous, a block of 16 outputs per word.
///
/// # Safety
/// All pixels and all of `b` are readable for `words`.
#[inline(always)]
pub(crate) unsafe fn accumulate_blocks<I: Isa, T: Terms, const MR: usize, const OB: usize, const VB: usize>(
    isa: I,
    acc: &mut Tile<I, MR, OB, VB>,
    pixels: BlockedPixels<MR>,
    mut b: [*const f32; OB],
    words: usize,
) {
    let mut rows = ScatteredRows(pixels.first);
    let mut done = 0;
    while done < words {
        let depth = T::WORDS.min(words - done);
        // SAFETY: the caller; the pointers move past the last block only to be dropped.
        unsafe { accumulate::<I, T, _, MR, OB, VB>(isa, acc, rows, b, BLOCK, depth) };
        for (pointer, stride) in rows.0.iter_mut().zip(pixels.block_stride) {
            *pointer = pointer.wrapping_add(stride);
        }
        for pointer in &mut b {
            *pointer = pointer.wrapping_add(T::WORDS * BLOCK);
        }
        done += T::WORDS;
    }
}

/// Cuts `count` outputs into pieces of at most `most`, as equal as can be: the i-th is `balanced(count, most, i)`.
///
/// Equal pieces keep every tile wide enough to hide the latency of a multiplication.
pub(crate) fn pieces(count: usize, most: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let tiles = count.div_ceil(most);
    (0..tiles).map(move |i| count * i / tiles..count * (i + 1) / tiles)
}

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn pieces_cover_the_count_in_order_and_are_nearly_equal() {
        for (count, most) in [(0, 6), (1, 6), (7, 6), (13, 14), (49, 14), (128, 14), (57, 4)] {
            let mut next = 0;
            let mut sizes = Vec::new();
            for piece in pieces(count, most) {
                assert_eq!(piece.start, next);
                next = piece.end;
                sizes.push(piece.len());
            }
            assert_eq!(next, count);
            if let (Some(least), Some(largest)) = (sizes.iter().min(), sizes.iter().max()) {
                assert!(*least >= 1 && largest - least <= 1 && *largest <= most, "{count} by {most}: {sizes:?}");
            }
        }
    }
}
