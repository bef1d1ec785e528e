//! Pointwise convolution with stride 1 on `NCHW16c` images: what [`super::conv`] runs for them, and the first half of
//! [`super::expanded`].
//!
//! One call computes a strip of neighbouring pixels by one block of outputs: with few input channels a tile takes a hundred cycles, and
//! finding its operands must not take as many again. Sums are those of [`super::conv`]: one chain over the channels, then bias, residual, activation.

use std::marker::PhantomData;

use super::conv::load_bias;
use super::dispatch::Kernel;
use super::epilogue::{Activation, ApplyRows};
use super::isa::Isa;
use super::tile::{Terms, Tile, accumulate, pieces};
use super::{BLOCK, vmath};

/// Neighbouring pixels by one block of outputs.
pub(crate) struct Strip<'a, T> {
    /// The first channel of the first pixel.
    pub input: *const f32,
    /// Words from a block of channels to the next.
    pub input_block_stride: usize,
    /// Words of a pixel.
    pub words_in: usize,
    /// `[I/16][words of 16 i][16 o]`.
    pub filter: *const f32,
    /// Outputs of the block that exist. Vectors past them are not written.
    pub outputs: usize,
    /// From the block's first output on.
    pub bias: Option<&'a [f32]>,
    /// Null, or as `output`.
    pub residual: *const f32,
    pub activation: Activation,
    pub output: *mut f32,
    pub pixels: usize,
    pub of: PhantomData<T>,
}

/// Pixels of a tile of `vectors` vectors of outputs.
#[inline(always)]
const fn tile_pixels<I: Isa>(vectors: usize) -> usize {
    match (I::LANES, I::REGISTERS, vectors) {
        (16, _, _) => 14,
        (_, 16, 4) => 2,
        (8, _, 2) => 6,
        (_, 16, _) | (4, _, 2) => 12,
        _ => 6,
    }
}

impl<T: Terms> Kernel for Strip<'_, T> {
    type Output = ();
    const OF_HALVES: bool = T::OF_HALVES;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        // SAFETY: whoever makes a strip vouches for its operands.
        unsafe {
            // A block that is half padding is computed by half.
            match const { BLOCK / I::LANES } {
                1 => self.tiles::<I, 1>(isa),
                2 if self.outputs <= I::LANES => self.tiles::<I, 1>(isa),
                2 => self.tiles::<I, 2>(isa),
                _ if self.outputs <= 2 * I::LANES => self.tiles::<I, 2>(isa),
                _ => self.tiles::<I, 4>(isa),
            }
            if !self.activation.clamps() {
                let Strip { activation, output: pointer, pixels, .. } = self;
                isa.outline(ApplyRows { activation, pointer, rows: 1, row_stride: 0, width: pixels * BLOCK });
            }
        }
    }
}

impl<T: Terms> Strip<'_, T> {
    /// # Safety
    /// The operands hold what the fields say.
    #[inline(always)]
    unsafe fn tiles<I: Isa, const VB: usize>(&self, isa: I) {
        let mut bias = [isa.zero(); VB];
        if let Some(values) = self.bias {
            for (v, bias) in bias.iter_mut().enumerate() {
                *bias = load_bias(isa, values, v * I::LANES);
            }
        }
        for piece in pieces(self.pixels, const { tile_pixels::<I>(VB) }) {
            macro_rules! tile {
                ($($pixels:literal)+) => {
                    match piece.len() {
                        // Guards in `const` blocks, so that tiles which a rung cannot have are not compiled for it.
                        $($pixels if const { $pixels <= tile_pixels::<I>(VB) } => {
                            // SAFETY: the caller; the piece is inside the strip.
                            unsafe { self.tile::<I, $pixels, VB>(isa, piece.start, bias) }
                        })+
                        _ => unreachable!("a piece fits its tile"),
                    }
                };
            }
            tile!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
        }
    }

    /// # Safety
    /// As for `tiles`, and the pixels are inside the strip.
    #[inline(always)]
    unsafe fn tile<I: Isa, const MR: usize, const VB: usize>(&self, isa: I, first: usize, bias: [I::V; VB]) {
        let mut acc: Tile<I, MR, 1, VB> = [[[isa.zero(); VB]; 1]; MR];
        let (low, high) = self.activation.bounds();
        // SAFETY: the caller; pointers move past the last block only to be dropped.
        unsafe {
            let mut input = self.input.add(first * T::WORDS);
            let mut filter = self.filter;
            let mut left = self.words_in;
            while left >= T::WORDS {
                accumulate::<I, T, _, MR, 1, VB>(isa, &mut acc, T::pixels(input), [filter], BLOCK, T::WORDS);
                input = input.wrapping_add(self.input_block_stride);
                filter = filter.wrapping_add(T::WORDS * BLOCK);
                left -= T::WORDS;
            }
            if left > 0 {
                accumulate::<I, T, _, MR, 1, VB>(isa, &mut acc, T::pixels(input), [filter], BLOCK, left);
            }
            let output = self.output.add(first * BLOCK);
            for m in 0..MR {
                for v in 0..VB {
                    let at = m * BLOCK + v * I::LANES;
                    let mut value = isa.add(acc[m][0][v], bias[v]);
                    if !self.residual.is_null() {
                        value = isa.add(value, isa.load(self.residual.add(first * BLOCK + at)));
                    }
                    isa.store(output.add(at), vmath::clip(isa, value, low, high));
                }
            }
        }
    }
}
