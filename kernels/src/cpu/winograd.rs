//! 3 × 3 convolution with stride 1 by Winograd's minimal filtering, on `NCHW16c` images, one image at a time.
//!
//! A tile of `M × M` outputs reads `A × A` inputs, `A = M + 2`. Both input and filter are transformed to `A²` coefficients, in which
//! the convolution is a product over the channels, one for each coefficient:
//!
//! `Y = Aᵀ [ Σ_c (G g_c Gᵀ) ⊙ (Bᵀ d_c B) ] A` (Lavin and Gray 2015, *Fast Algorithms for Convolutional Neural Networks*).
//!
//! `A²` multiplications stand where `9 M²` were. The price is a larger rounding error, which two things keep at that of a direct
//! sum: the points of interpolation are ±√½ and ±√2 (Barabasz et al. 2018, *Error Analysis and Improving the Accuracy of Winograd
//! Convolution*, on how much their choice is worth), and sums over channels are cut into chains of [`CHAIN`]. Filters of larger tiles are
//! transformed when they are packed, in `f64`, and rounded once. Those of F(2×2), whose transform is three additions, are so when they
//! are used: small images are what it is for, and there bytes cost more than operations.
//!
//! A unit of work is a few tiles by a few blocks of outputs: their coefficients stay in the second-level cache from the first transform
//! to the last, and no thread waits for another. Each output is one fixed order of operations, whatever the units and their ranges.

mod transforms;

use std::{marker::PhantomData, ops::Range};

use transforms::{F2, F4, F6, Transform};

use super::conv::{self, Conv, ConvShape, Operands, load_bias};
use super::dispatch::{Kernel, dispatch, dispatch_bf16};
use super::epilogue::{ApplyRows, Output, Residual};
use super::isa::Isa;
use super::tile::{Floats, Pairs, Terms, Tile, accumulate, pieces};
use super::{BLOCK, IsaLevel, vmath};

/// Channels that are summed in one chain before they join the sum of the others.
const CHAIN: usize = 64;

/// Tiles of a unit at most: two full register tiles of the widest kind.
const UNIT_TILES: usize = 28;

/// Floats of transformed input that a unit holds at most, give or take: with the sums, what the second-level cache holds.
const UNIT_COEFFICIENTS: usize = 160 * 1024;

/// How many outputs along each side a tile computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WinogradTile {
    /// F(2×2, 3×3): 2.25 times fewer multiplications, error below a direct sum's.
    Two,
    /// F(4×4, 3×3): 4 times fewer, error as a direct sum's.
    Four,
    /// F(6×6, 3×3): 5.06 times fewer, error about 8 times a direct sum's. Never chosen by itself.
    Six,
}

impl WinogradTile {
    /// Outputs along a side, `M`.
    pub const fn outputs(self) -> usize {
        match self {
            WinogradTile::Two => 2,
            WinogradTile::Four => 4,
            WinogradTile::Six => 6,
        }
    }

    /// Coefficients along a side, `A`.
    const fn points(self) -> usize {
        self.outputs() + 2
    }

    /// Coefficients of a tile.
    const fn coefficients(self) -> usize {
        self.points() * self.points()
    }

    /// Blocks of outputs that a unit computes from one set of transformed inputs.
    const fn unit_blocks(self) -> usize {
        if matches!(self, WinogradTile::Two) { 4 } else { 2 }
    }

    /// Whether filters are packed as coefficients, else as for a direct sum.
    pub const fn keeps_filter(self, operands: Operands) -> bool {
        !matches!((self, operands), (WinogradTile::Two, Operands::F32))
    }

    /// Whether [`winograd`] can compute this convolution: 3 × 3, stride 1, undilated, one group; in bfloat16 by F(2×2) only, and of an even number of
    /// channels.
    pub fn supports(self, shape: &ConvShape, operands: Operands) -> bool {
        let axis = |axis: &super::conv::Axis| axis.kernel == 3 && axis.stride == 1 && axis.dilation == 1;
        let is_plain = axis(&shape.height) && axis(&shape.width) && shape.groups == 1 && !shape.transposed;
        let of_pairs = self == WinogradTile::Two && shape.channels_in.is_multiple_of(2);
        is_plain && (operands == Operands::F32 || of_pairs)
    }
}

/// The tile with which a convolution is estimated fastest, `None` for none: direct convolution is.
///
/// The estimate counts operations in units of one multiply-add: the products, rounded up to whole tiles; what transforms cost; and
/// the bytes of filters, which a small image reads for few products. It looks at sizes alone, so that a model's results
/// are the same on every run and every machine of an instruction set. No tile is larger than `largest`. Of pairs of bfloat16 both operations and bytes are
/// half as many.
pub fn choose(shape: &ConvShape, operands: Operands, largest: WinogradTile) -> Option<WinogradTile> {
    let (inputs, outputs) = (shape.channels_in as f64, shape.channels_out as f64);
    let pixels = (shape.height.output * shape.width.output) as f64;
    if inputs < 16.0 || outputs < 16.0 {
        return None;
    }
    // What a filter of so many values a tap or coefficient costs to read.
    let reading = |floats: f64| {
        let is_kept = inputs * outputs * floats <= CACHED_LEN;
        floats * if is_kept { CACHED_FILTER_COST } else { FILTER_COST }
    };
    let products = match operands {
        Operands::F32 => inputs * outputs,
        Operands::Bf16 => inputs * outputs / 2.0,
    };
    let direct = products * (9.0 * pixels + reading(9.0));
    let estimate = |tile: WinogradTile| {
        let coefficients = tile.coefficients() as f64;
        let tiles = tile_count(tile, shape) as f64;
        let transforms = tiles * coefficients * TRANSFORM_COST * (inputs + outputs);
        let filter = reading(if tile.keeps_filter(operands) { coefficients } else { 9.0 });
        products * (coefficients * tiles + filter) + transforms
    };
    let tiles = [WinogradTile::Two, WinogradTile::Four, WinogradTile::Six];
    let mut best = (None, 0.9 * direct);
    for tile in tiles.into_iter().filter(|&tile| tile <= largest && tile.supports(shape, operands)) {
        // A larger tile has to be worth its error and its bytes.
        let estimate = estimate(tile);
        if estimate < best.1 {
            best = (Some(tile), 0.9 * estimate);
        }
    }
    best.0
}

/// Multiply-adds that could be done while one value of a filter arrives from memory.
const FILTER_COST: f64 = 6.0;
/// The same from the last cache.
const CACHED_FILTER_COST: f64 = 3.0;
/// Values of a filter that the last cache may be hoped to keep from one run to the next, in a network of such.
const CACHED_LEN: f64 = (1 << 20) as f64;
/// Multiply-adds that could be done while one coefficient of a tile is made or taken apart.
const TRANSFORM_COST: f64 = 5.0;

fn tile_count(tile: WinogradTile, shape: &ConvShape) -> usize {
    shape.height.output.div_ceil(tile.outputs()) * shape.width.output.div_ceil(tile.outputs())
}

/// Words of a packed filter: `[O/16][chain][A²][words of the chain's channels, in all C rounded up to 16][16]`, or as [`conv::pack_filter`] leaves it.
pub fn packed_winograd_len(tile: WinogradTile, shape: &ConvShape, operands: Operands) -> usize {
    if !tile.keeps_filter(operands) {
        return conv::packed_filter_len(shape);
    }
    operands.words(coefficients_len(tile, shape))
}

fn coefficients_len(tile: WinogradTile, shape: &ConvShape) -> usize {
    shape.channels_out.div_ceil(BLOCK) * shape.channels_in.div_ceil(BLOCK) * BLOCK * BLOCK * tile.coefficients()
}

/// Transforms and packs weights `[O, I, 3, 3]`.
pub fn pack_winograd(
    level: IsaLevel,
    tile: WinogradTile,
    shape: &ConvShape,
    operands: Operands,
    weights: &[f32],
    packed: &mut [f32],
) {
    assert!(tile.supports(shape, operands), "{tile:?} of {shape:?} in {operands:?}");
    assert!(weights.len() >= shape.channels_out * shape.channels_in * 9, "{} weights for {shape:?}", weights.len());
    let len = packed_winograd_len(tile, shape, operands);
    assert!(packed.len() >= len, "packed filter of {} for {shape:?}", packed.len());
    match (tile, operands) {
        (WinogradTile::Two, Operands::F32) => conv::pack_filter(shape, weights, packed),
        (_, Operands::Bf16) => {
            let mut coefficients = vec![0.0; coefficients_len(WinogradTile::Two, shape)];
            dispatch(level, Pack::<F2, 2, 4> { shape, weights, packed: &mut coefficients, of: PhantomData });
            conv::pair_rows(level, &coefficients, packed);
        }
        (WinogradTile::Four, _) => dispatch(level, Pack::<F4, 4, 6> { shape, weights, packed, of: PhantomData }),
        (WinogradTile::Six, _) => dispatch(level, Pack::<F6, 6, 8> { shape, weights, packed, of: PhantomData }),
    }
}

/// The coefficients of filters `[O, I, 3, 3]` as `[A², I, O]`, computed in `f64` and rounded once: second factors of `A²` products with the
/// coefficients of an input as `[A², tiles, I]`.
///
/// # Panics
/// On fewer weights than that.
pub fn filter_coefficients(tile: WinogradTile, [outputs, inputs]: [usize; 2], weights: &[f32]) -> Vec<f32> {
    let filter: &[[f64; 3]] = match tile {
        WinogradTile::Two => &F2::FILTER,
        WinogradTile::Four => &F4::FILTER,
        WinogradTile::Six => &F6::FILTER,
    };
    let points = filter.len();
    let mut coefficients = vec![0.0; points * points * inputs * outputs];
    for (at, taps) in weights[..outputs * inputs * 9].chunks_exact(9).enumerate() {
        let (output, input) = (at / inputs, at % inputs);
        for (i, vertical) in filter.iter().enumerate() {
            // G g, then (G g) Gᵀ.
            let half: [f64; 3] =
                std::array::from_fn(|x| (0..3).map(|y| vertical[y] * f64::from(taps[y * 3 + x])).sum());
            for (j, horizontal) in filter.iter().enumerate() {
                let value: f64 = (0..3).map(|x| horizontal[x] * half[x]).sum();
                coefficients[((i * points + j) * inputs + input) * outputs + output] = value as f32;
            }
        }
    }
    coefficients
}

/// How the work on one image is cut: unit = (tiles, blocks of outputs), blocks fastest.
struct Units {
    tile: WinogradTile,
    operands: Operands,
    tiles: usize,
    /// Pieces that the tiles are cut into.
    tile_pieces: usize,
    /// Sets of [`WinogradTile::unit_blocks`] output blocks.
    block_sets: usize,
    /// Tiles of the longest piece.
    most_tiles: usize,
    blocks_in: usize,
}

impl Units {
    fn new(tile: WinogradTile, shape: &ConvShape, operands: Operands) -> Units {
        let tiles = tile_count(tile, shape);
        let blocks_in = shape.channels_in.div_ceil(BLOCK);
        let per_tile = tile.coefficients() * blocks_in * BLOCK;
        let most = (UNIT_COEFFICIENTS / per_tile.max(1)).clamp(UNIT_TILES / 4, UNIT_TILES);
        let tile_pieces = tiles.div_ceil(most);
        let block_sets = shape.channels_out.div_ceil(BLOCK).div_ceil(tile.unit_blocks());
        let most_tiles = tiles.div_ceil(tile_pieces.max(1));
        Units { tile, operands, tiles, tile_pieces, block_sets, most_tiles, blocks_in }
    }

    fn count(&self) -> usize {
        self.tile_pieces * self.block_sets
    }

    /// Words between the same place of neighbouring coefficients, of the transformed input. Lines of all coefficients of one
    /// pixel would fall into one set of the cache without the odd one out.
    fn input_stride(&self) -> usize {
        self.operands.words(self.blocks_in * self.most_tiles * BLOCK) + BLOCK
    }

    /// The same of the sums of a block of outputs.
    fn sum_stride(&self) -> usize {
        self.most_tiles * BLOCK + BLOCK
    }

    /// The same of a chain of a block's filter that is not kept.
    fn filter_stride(&self) -> usize {
        if self.tile.keeps_filter(self.operands) { 0 } else { (CHAIN + 1) * BLOCK }
    }

    fn workspace_len(&self) -> usize {
        let sums = self.tile.unit_blocks() * self.sum_stride();
        self.tile.coefficients() * (self.input_stride() + sums + self.filter_stride() + BLOCK)
    }
}

/// Multiplications and additions of the products of one image; transforms do not count.
pub fn winograd_operations(tile: WinogradTile, shape: &ConvShape) -> u64 {
    2 * (tile_count(tile, shape) * tile.coefficients()) as u64 * (shape.channels_in * shape.channels_out) as u64
}

/// Units of work, for [`winograd`].
pub fn winograd_units(tile: WinogradTile, shape: &ConvShape, operands: Operands) -> usize {
    Units::new(tile, shape, operands).count()
}

/// Elements of workspace that [`winograd`] needs on each thread.
pub fn winograd_workspace_len(tile: WinogradTile, shape: &ConvShape, operands: Operands) -> usize {
    Units::new(tile, shape, operands).workspace_len()
}

/// Computes a range of units. The filter is as [`pack_winograd`] leaves it, the input f32 whatever the operands of the products are;
/// `output` is the whole image, `[ceil(O/16)][H'][W'][16]`.
pub fn winograd(
    level: IsaLevel,
    tile: WinogradTile,
    conv: &Conv<'_>,
    units: Range<usize>,
    output: Output<'_>,
    workspace: &mut [f32],
) {
    if units.is_empty() {
        return;
    }
    let shape = &conv.shape;
    let of = Units::new(tile, shape, conv.operands);
    assert!(tile.supports(shape, conv.operands), "{tile:?} of {shape:?} in {:?}", conv.operands);
    assert!(units.end <= of.count(), "units {units:?} of {}", of.count());
    assert!(conv.input.len() >= shape.input_len(), "input of {} for {shape:?}", conv.input.len());
    let filter = packed_winograd_len(tile, shape, conv.operands);
    assert!(conv.filter.len() >= filter, "filter of {} for {shape:?}", conv.filter.len());
    assert!(output.len() >= shape.output_len(), "output of {} for {shape:?}", output.len());
    assert!(conv.bias.is_none_or(|bias| bias.len() >= shape.channels_out), "too few biases for {shape:?}");
    assert!(workspace.len() >= of.workspace_len(), "workspace of {} elements", workspace.len());
    if let Residual::Slice(residual) = conv.residual {
        assert!(residual.len() >= shape.output_len(), "residual of {} for {shape:?}", residual.len());
    }
    let output = output.pointer();
    macro_rules! run {
        ($dispatch:ident, $with:ident, $terms:ident) => {
            $dispatch(level, Run { conv, of, units, output, workspace, with: $with, terms: PhantomData::<$terms> })
        };
    }
    match (tile, conv.operands) {
        (_, Operands::Bf16) => run!(dispatch_bf16, F2, Pairs),
        (WinogradTile::Two, _) => run!(dispatch, F2, Floats),
        (WinogradTile::Four, _) => run!(dispatch, F4, Floats),
        (WinogradTile::Six, _) => run!(dispatch, F6, Floats),
    }
}

struct Pack<'a, W, const M: usize, const A: usize> {
    shape: &'a ConvShape,
    weights: &'a [f32],
    packed: &'a mut [f32],
    of: PhantomData<W>,
}

impl<W: Transform<M, A>, const M: usize, const A: usize> Kernel for Pack<'_, W, M, A> {
    type Output = ();

    /// A block of outputs at a time, in `f64`: the loops over its 16 lanes become vectors.
    #[inline(always)]
    fn eval<I: Isa>(self, _: I) {
        let (inputs, outputs) = (self.shape.channels_in, self.shape.channels_out);
        let depth = inputs.div_ceil(BLOCK) * BLOCK;
        for (block, packed) in self.packed.chunks_exact_mut(A * A * depth * BLOCK).enumerate() {
            let lanes = BLOCK.min(outputs.saturating_sub(block * BLOCK));
            for input in 0..depth {
                let chain = input / CHAIN * CHAIN;
                let chain_len = CHAIN.min(depth - chain);
                let mut filter = [[[0.0f64; BLOCK]; 3]; 3];
                for o in 0..if input < inputs { lanes } else { 0 } {
                    let from = &self.weights[((block * BLOCK + o) * inputs + input) * 9..][..9];
                    for tap in 0..9 {
                        filter[tap / 3][tap % 3][o] = f64::from(from[tap]);
                    }
                }
                // G g, then (G g) Gᵀ.
                let mut half = [[[0.0f64; BLOCK]; 3]; A];
                for i in 0..A {
                    for x in 0..3 {
                        for o in 0..BLOCK {
                            half[i][x][o] = W::FILTER[i][0] * filter[0][x][o]
                                + W::FILTER[i][1] * filter[1][x][o]
                                + W::FILTER[i][2] * filter[2][x][o];
                        }
                    }
                }
                for i in 0..A {
                    for j in 0..A {
                        let at = chain * A * A + (i * A + j) * chain_len + input - chain;
                        let to = &mut packed[at * BLOCK..][..BLOCK];
                        for o in 0..BLOCK {
                            to[o] = (W::FILTER[j][0] * half[i][0][o]
                                + W::FILTER[j][1] * half[i][1][o]
                                + W::FILTER[j][2] * half[i][2][o]) as f32;
                        }
                    }
                }
            }
        }
    }
}

struct Run<'a, W, T, const M: usize, const A: usize>
where
    W: Transform<M, A>,
{
    conv: &'a Conv<'a>,
    of: Units,
    units: Range<usize>,
    output: *mut f32,
    workspace: &'a mut [f32],
    with: W,
    terms: PhantomData<T>,
}

impl<W: Transform<M, A>, T: Terms, const M: usize, const A: usize> Kernel for Run<'_, W, T, M, A> {
    type Output = ();
    const OF_HALVES: bool = T::OF_HALVES;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Run { conv, of, units, output, workspace, with, terms } = self;
        let shape = &conv.shape;
        let blocks_out = shape.channels_out.div_ceil(BLOCK);
        let coefficients = A * A;
        let depth = of.blocks_in * BLOCK;
        let (inputs, rest) = workspace.split_at_mut(coefficients * of.input_stride());
        let (sums, rest) = rest.split_at_mut(of.tile.unit_blocks() * coefficients * of.sum_stride());
        let (scratch, patch) = rest.split_at_mut(coefficients * of.filter_stride());
        let mut transformed = None;
        for unit in units {
            let (piece, set) = (unit / of.block_sets, unit % of.block_sets);
            let tiles = of.tiles * piece / of.tile_pieces..of.tiles * (piece + 1) / of.tile_pieces;
            let blocks = set * of.tile.unit_blocks()..blocks_out.min((set + 1) * of.tile.unit_blocks());
            if transformed.replace(piece) != Some(piece) {
                isa.outline(TransformInputs { conv, of: &of, tiles: tiles.clone(), inputs, patch, with, terms });
            }
            // The part of a filter that is used after one of them: it arrives meanwhile.
            let next = |block: usize, start: usize| {
                let (block, start) = match block + 1 < blocks.end {
                    true => (block + 1, start),
                    false if start + CHAIN < depth => (blocks.start, start + CHAIN),
                    false => (blocks.end % blocks_out, 0),
                };
                Upcoming {
                    first: conv.filter.as_ptr().wrapping_add((block * 9 * depth + start) * BLOCK),
                    stride: depth * BLOCK,
                    len: if of.tile.keeps_filter(of.operands) { 0 } else { CHAIN.min(depth - start) * BLOCK },
                }
            };
            for start in (0..shape.channels_in).step_by(CHAIN) {
                let chain_len = CHAIN.min(depth - start);
                for (at, block) in blocks.clone().enumerate() {
                    let (filter, stride) = if of.tile.keeps_filter(of.operands) {
                        let first = of.operands.words(block * depth + start) * coefficients * BLOCK;
                        (&conv.filter[first..], of.operands.words(chain_len) * BLOCK)
                    } else {
                        let from = &conv.filter[block * 9 * depth * BLOCK..][..9 * depth * BLOCK];
                        let stride = of.filter_stride();
                        isa.outline(TransformFilter { from, depth, start, chain_len, to: &mut *scratch, stride, with });
                        (&*scratch, stride)
                    };
                    isa.outline(Multiply {
                        coefficients,
                        inputs: &inputs[of.operands.words(start) * of.most_tiles..],
                        input_stride: of.input_stride(),
                        filter,
                        filter_stride: stride,
                        sums: &mut sums[at * coefficients * of.sum_stride()..],
                        sum_stride: of.sum_stride(),
                        tiles: tiles.len(),
                        most_tiles: of.most_tiles,
                        words: CHAIN.min(shape.channels_in - start).div_ceil(BLOCK / T::WORDS),
                        first: start == 0,
                        next: next(block, start),
                        terms,
                    });
                }
            }
            isa.outline(TransformOutputs { conv, of: &of, tiles, blocks, sums, output, with });
        }
    }
}

/// Nine runs of `len` floats, `stride` from one to the next.
#[derive(Clone, Copy)]
struct Upcoming {
    first: *const f32,
    stride: usize,
    len: usize,
}

/// For every coefficient, `sums[t] += Σ_c inputs[c/16][t][c % 16] · filter[c]` over a chain of channels, a vector of 16 outputs for each tile.
struct Multiply<'a, T> {
    coefficients: usize,
    inputs: &'a [f32],
    input_stride: usize,
    filter: &'a [f32],
    filter_stride: usize,
    sums: &'a mut [f32],
    sum_stride: usize,
    tiles: usize,
    most_tiles: usize,
    /// Of the chain.
    words: usize,
    /// Whether the sums begin here.
    first: bool,
    next: Upcoming,
    terms: PhantomData<T>,
}

impl<T: Terms> Kernel for Multiply<'_, T> {
    type Output = ();
    const OF_HALVES: bool = T::OF_HALVES;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Multiply { coefficients, inputs, filter, sums, tiles, most_tiles, words, first, next, .. } = self;
        let (block_stride, blocks, last) = (most_tiles * T::WORDS, words.div_ceil(T::WORDS), coefficients - 1);
        assert!(tiles <= most_tiles && inputs.len() >= last * self.input_stride + blocks * block_stride);
        assert!(filter.len() >= last * self.filter_stride + blocks * T::WORDS * BLOCK);
        assert!(sums.len() >= last * self.sum_stride + tiles * BLOCK);
        for coefficient in 0..coefficients {
            let lines = next.len / BLOCK;
            for line in lines * coefficient / coefficients..lines * (coefficient + 1) / coefficients {
                for run in 0..9 {
                    isa.prefetch(next.first.wrapping_add(run * next.stride + line * BLOCK));
                }
            }
            for piece in pieces(tiles, most_rows::<I>()) {
                // SAFETY: as asserted.
                let chain = unsafe {
                    Chain {
                        inputs: inputs.as_ptr().add(coefficient * self.input_stride + piece.start * T::WORDS),
                        block_stride,
                        filter: filter.as_ptr().add(coefficient * self.filter_stride),
                        sums: sums.as_mut_ptr().add(coefficient * self.sum_stride + piece.start * BLOCK),
                        words,
                        first,
                    }
                };
                macro_rules! rows {
                    ($($rows:literal)+) => {
                        match piece.len() {
                            // SAFETY: as asserted.
                            $($rows if const { $rows <= most_rows::<I>() } => match const { BLOCK / I::LANES } {
                                1 => unsafe { chain.sum::<I, T, $rows, 1>(isa) },
                                2 if const { $rows <= 6 } => unsafe { chain.sum::<I, T, $rows, 2>(isa) },
                                _ if const { $rows <= 6 } => unsafe { chain.sum::<I, T, $rows, 4>(isa) },
                                _ => unreachable!("a piece fits its tile"),
                            },)+
                            _ => unreachable!("a piece fits its tile"),
                        }
                    };
                }
                rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
            }
        }
    }
}

/// Tiles whose sums the registers hold.
#[inline(always)]
const fn most_rows<I: Isa>() -> usize {
    match (I::LANES, I::REGISTERS) {
        (16, _) => 14,
        (4, 16) => 2,
        _ => 6,
    }
}

/// A [`Multiply`] of a few tiles.
#[derive(Clone, Copy)]
struct Chain {
    inputs: *const f32,
    block_stride: usize,
    filter: *const f32,
    sums: *mut f32,
    words: usize,
    first: bool,
}

impl Chain {
    /// # Safety
    /// The operands hold `MR` tiles and `words` of them.
    #[inline(always)]
    unsafe fn sum<I: Isa, T: Terms, const MR: usize, const VB: usize>(self, isa: I) {
        let Chain { mut inputs, block_stride, mut filter, sums, words, first } = self;
        let mut acc: Tile<I, MR, 1, VB> = [[[isa.zero(); VB]; 1]; MR];
        let mut left = words;
        // SAFETY: the caller; pointers move past the last block only to be dropped.
        unsafe {
            while left > 0 {
                let block = left.min(T::WORDS);
                accumulate::<I, T, _, MR, 1, VB>(isa, &mut acc, T::pixels(inputs), [filter], BLOCK, block);
                inputs = inputs.wrapping_add(block_stride);
                filter = filter.wrapping_add(T::WORDS * BLOCK);
                left -= block;
            }
            for m in 0..MR {
                for v in 0..VB {
                    let to = sums.add(m * BLOCK + v * I::LANES);
                    let sum = if first { acc[m][0][v] } else { isa.add(isa.load(to), acc[m][0][v]) };
                    isa.store(to, sum);
                }
            }
        }
    }
}

/// The coefficients of a chain of a block's filter: `[A²][channels][16]`, `stride` from one to the next.
struct TransformFilter<'a, W, const M: usize, const A: usize> {
    /// `[3][3][depth][16]`.
    from: &'a [f32],
    depth: usize,
    start: usize,
    chain_len: usize,
    to: &'a mut [f32],
    stride: usize,
    with: W,
}

impl<W: Transform<M, A>, const M: usize, const A: usize> Kernel for TransformFilter<'_, W, M, A> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let TransformFilter { from, depth, start, chain_len, to, stride, with } = self;
        assert!(from.len() >= 9 * depth * BLOCK && start + chain_len <= depth);
        assert!(stride >= chain_len * BLOCK && to.len() >= A * A * stride);
        for at in (0..chain_len * BLOCK).step_by(I::LANES) {
            // SAFETY: as asserted.
            unsafe {
                let from = from.as_ptr().add(start * BLOCK + at);
                let to = to.as_mut_ptr().add(at);
                let mut half = [[isa.zero(); 3]; A];
                for x in 0..3 {
                    let g = std::array::from_fn(|y| isa.load(from.add((y * 3 + x) * depth * BLOCK)));
                    let column = with.filter(isa, g);
                    for i in 0..A {
                        half[i][x] = column[i];
                    }
                }
                for i in 0..A {
                    let row = with.filter(isa, half[i]);
                    for j in 0..A {
                        isa.store(to.add((i * A + j) * stride), row[j]);
                    }
                }
            }
        }
    }
}

struct TransformInputs<'a, W, T, const M: usize, const A: usize> {
    conv: &'a Conv<'a>,
    of: &'a Units,
    tiles: Range<usize>,
    inputs: &'a mut [f32],
    /// Room for the inputs of a tile that reaches over the image's edge.
    patch: &'a mut [f32],
    with: W,
    terms: PhantomData<T>,
}

impl<W: Transform<M, A>, T: Terms, const M: usize, const A: usize> Kernel for TransformInputs<'_, W, T, M, A> {
    type Output = ();
    const OF_HALVES: bool = T::OF_HALVES;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let TransformInputs { conv, of, tiles, inputs, patch, with, .. } = self;
        let (height, width) = (conv.shape.height, conv.shape.width);
        let (columns, image) = (width.output.div_ceil(M), height.input * width.input * BLOCK);
        let stride = of.input_stride();
        assert!(inputs.len() >= A * A * stride && patch.len() >= A * A * BLOCK && tiles.len() <= of.most_tiles);
        assert!(conv.input.len() >= of.blocks_in * image);
        for (t, tile) in tiles.enumerate() {
            let (y, x) = (tile / columns * M, tile % columns * M);
            // The rows and columns of the tile's inputs that exist.
            let rows = inside(y, height.pad_before, height.input, A);
            let across = inside(x, width.pad_before, width.input, A);
            let whole = rows.len() == A && across.len() == A;
            if !whole {
                patch[..A * A * BLOCK].fill(0.0);
            }
            for block in 0..of.blocks_in {
                let to = (block * of.most_tiles + t) * T::WORDS;
                // SAFETY: `inside` gives positions that exist; `to` is inside a coefficient's part, as asserted.
                unsafe {
                    let plane = conv.input.as_ptr().add(block * image);
                    let to = inputs.as_mut_ptr().add(to);
                    if whole {
                        let from = plane.add(((y - height.pad_before) * width.input + x - width.pad_before) * BLOCK);
                        transform_input::<I, W, T, M, A>(isa, with, from, width.input * BLOCK, to, stride);
                    } else {
                        for i in rows.clone().take(if across.is_empty() { 0 } else { A }) {
                            let (y, x) = (y + i - height.pad_before, x + across.start - width.pad_before);
                            let from = plane.add((y * width.input + x) * BLOCK);
                            let to = patch.as_mut_ptr().add((i * A + across.start) * BLOCK);
                            std::ptr::copy_nonoverlapping(from, to, across.len() * BLOCK);
                        }
                        transform_input::<I, W, T, M, A>(isa, with, patch.as_ptr(), A * BLOCK, to, stride);
                    }
                }
            }
        }
    }
}

/// Which of `count` positions from `start − pad` on are below `len` and not negative, counted from the first.
#[inline(always)]
fn inside(start: usize, pad: usize, len: usize, count: usize) -> Range<usize> {
    let low = pad.saturating_sub(start).min(count);
    let high = (len + pad).saturating_sub(start).min(count);
    low..high.max(low)
}

/// `Bᵀ d B` for 16 channels.
///
/// # Safety
/// `A` rows of `A` pixels are readable, and a block of channels is writable at every coefficient.
#[inline(always)]
unsafe fn transform_input<I: Isa, W: Transform<M, A>, T: Terms, const M: usize, const A: usize>(
    isa: I,
    with: W,
    from: *const f32,
    row_stride: usize,
    to: *mut f32,
    stride: usize,
) {
    for lane in (0..BLOCK).step_by(I::LANES) {
        let mut rows = [[isa.zero(); A]; A];
        // SAFETY: the caller.
        unsafe {
            for i in 0..A {
                let mut d = [isa.zero(); A];
                for j in 0..A {
                    d[j] = isa.load(from.add(i * row_stride + j * BLOCK + lane));
                }
                rows[i] = with.input(isa, d);
            }
            for j in 0..A {
                let mut d = [isa.zero(); A];
                for i in 0..A {
                    d[i] = rows[i][j];
                }
                let d = with.input(isa, d);
                for i in 0..A {
                    T::store(isa, to.add((i * A + j) * stride), lane, d[i]);
                }
            }
        }
    }
}

struct TransformOutputs<'a, W, const M: usize, const A: usize> {
    conv: &'a Conv<'a>,
    of: &'a Units,
    tiles: Range<usize>,
    blocks: Range<usize>,
    sums: &'a [f32],
    output: *mut f32,
    with: W,
}

impl<W: Transform<M, A>, const M: usize, const A: usize> Kernel for TransformOutputs<'_, W, M, A> {
    type Output = ();

    /// `Aᵀ m A`, then bias, residual, activation, store.
    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let TransformOutputs { conv, of, tiles, blocks, sums, output, with } = self;
        let (height, width) = (conv.shape.height.output, conv.shape.width.output);
        let columns = width.div_ceil(M);
        let stride = of.sum_stride();
        let (low, high) = conv.activation.bounds();
        assert!(sums.len() >= blocks.len() * A * A * stride && tiles.len() <= of.most_tiles);
        for (at, block) in blocks.enumerate() {
            for (t, tile) in tiles.clone().enumerate() {
                let (y, x) = (tile / columns * M, tile % columns * M);
                let (rows, across) = (M.min(height - y), M.min(width - x));
                let first = ((block * height + y) * width + x) * BLOCK;
                // SAFETY: the entry checked the lengths of output and residual; the tile's pixels that are stored exist.
                unsafe {
                    let residual = match conv.residual {
                        Residual::None => std::ptr::null(),
                        Residual::Slice(r) => r.as_ptr().add(first),
                        Residual::Output => output.add(first).cast_const(),
                    };
                    let output = output.add(first);
                    let sums = sums.as_ptr().add(at * A * A * stride + t * BLOCK);
                    for lane in (0..BLOCK).step_by(I::LANES) {
                        let bias = match conv.bias {
                            None => isa.zero(),
                            Some(bias) => load_bias(isa, &bias[..conv.shape.channels_out], block * BLOCK + lane),
                        };
                        let mut half = [[isa.zero(); A]; M];
                        for j in 0..A {
                            let mut m = [isa.zero(); A];
                            for i in 0..A {
                                m[i] = isa.load(sums.add((i * A + j) * stride + lane));
                            }
                            let m = with.output(isa, m);
                            for i in 0..M {
                                half[i][j] = m[i];
                            }
                        }
                        for i in 0..M {
                            if i >= rows {
                                break;
                            }
                            let values = with.output(isa, half[i]);
                            for j in 0..M {
                                if j >= across {
                                    break;
                                }
                                let to = (i * width + j) * BLOCK + lane;
                                let mut value = isa.add(values[j], bias);
                                if !residual.is_null() {
                                    value = isa.add(value, isa.load(residual.add(to)));
                                }
                                isa.store(output.add(to), vmath::clip(isa, value, low, high));
                            }
                        }
                    }
                    if !conv.activation.clamps() {
                        let (activation, row_stride, width) = (conv.activation, width * BLOCK, across * BLOCK);
                        isa.outline(ApplyRows { activation, pointer: output, rows, row_stride, width });
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::conv::Axis;
    use super::super::conv::tests::{blocked, plain_conv, unblocked};
    use super::super::epilogue::Activation;
    use super::super::testing::*;
    use super::*;

    const TILES: [WinogradTile; 3] = [WinogradTile::Two, WinogradTile::Four, WinogradTile::Six];

    fn axis(input: usize, pad_before: usize, pad_after: usize) -> Axis {
        let output = input + pad_before + pad_after - 2;
        Axis { input, output, kernel: 3, stride: 1, dilation: 1, pad_before, pad_after }
    }

    fn shape(channels_in: usize, channels_out: usize, height: Axis, width: Axis) -> ConvShape {
        ConvShape { channels_in, channels_out, groups: 1, height, width, transposed: false }
    }

    fn packed(level: IsaLevel, tile: WinogradTile, shape: &ConvShape, operands: Operands, weights: &[f32]) -> Vec<f32> {
        let mut packed = vec![f32::NAN; packed_winograd_len(tile, shape, operands)];
        pack_winograd(level, tile, shape, operands, weights, &mut packed);
        packed
    }

    /// The whole image, and again in random cuts of units: the same bits. Gives `[O, H', W']`.
    fn run(level: IsaLevel, tile: WinogradTile, problem: &Conv<'_>, start: &[f32], random: &mut Random) -> Vec<f32> {
        let shape = &problem.shape;
        let count = winograd_units(tile, shape, problem.operands);
        let mut workspace = vec![f32::NAN; winograd_workspace_len(tile, shape, problem.operands)];
        let (mut whole, mut cut) = (start.to_vec(), start.to_vec());
        winograd(level, tile, problem, 0..count, Output::new(&mut whole), &mut workspace);
        for units in random_cuts(random, count) {
            workspace.fill(f32::NAN);
            winograd(level, tile, problem, units, Output::new(&mut cut), &mut workspace);
        }
        let pixels = shape.height.output * shape.width.output;
        let whole = unblocked(level, shape.channels_out, pixels, &whole);
        assert_same_bits(level, shape, &whole, &unblocked(level, shape.channels_out, pixels, &cut));
        whole
    }

    #[test]
    fn any_shape_matches_plain_loops_and_does_not_depend_on_ranges() {
        for level in levels() {
            let mut random = Random::new(11);
            let operands: Vec<Operands> = operands(level).collect();
            for round in rounds(90) {
                let (tile, operands) = match random.pick(&operands) {
                    Operands::F32 => (TILES[round % 3], Operands::F32),
                    Operands::Bf16 => (WinogradTile::Two, Operands::Bf16),
                };
                let mut side = || loop {
                    let (input, before, after) = (random.between(1, 19), random.between(0, 3), random.between(0, 3));
                    if input + before + after > 2 {
                        return axis(input, before, after);
                    }
                };
                let (height, width) = (side(), side());
                let mut shape = shape(random.between(1, 90), random.between(1, 70), height, width);
                if operands == Operands::Bf16 {
                    shape.channels_in = shape.channels_in.next_multiple_of(2);
                }
                let pixels = shape.height.output * shape.width.output;
                let input = random.units(shape.channels_in * shape.height.input * shape.width.input);
                let weights = random.units(shape.channels_in * shape.channels_out * 9);
                let (bias, residual) = (random.units(shape.channels_out), random.units(shape.channels_out * pixels));
                let (use_bias, use_residual) = (random.between(0, 1) == 1, random.between(0, 2));
                let activation = ACTIVATIONS[round % ACTIVATIONS.len()];
                let image = blocked(level, shape.channels_in, shape.height.input * shape.width.input, &input);
                let blocked_residual = blocked(level, shape.channels_out, pixels, &residual);
                let problem = Conv {
                    shape,
                    operands,
                    input: &image,
                    filter: &packed(level, tile, &shape, operands, &weights),
                    bias: use_bias.then_some(&bias),
                    residual: [Residual::None, Residual::Slice(&blocked_residual), Residual::Output][use_residual],
                    activation,
                };
                let start =
                    if use_residual == 2 { blocked_residual.clone() } else { vec![f32::NAN; shape.output_len()] };
                let output = run(level, tile, &problem, &start, &mut random);
                let mut expected = plain_conv(&shape, &input, &weights);
                for (at, value) in expected.iter_mut().enumerate() {
                    *value += if use_bias { f64::from(bias[at / pixels]) } else { 0.0 };
                    *value += if use_residual > 0 { f64::from(residual[at]) } else { 0.0 };
                    *value = activate(activation, *value);
                }
                let terms = (shape.channels_in * 9) as f64;
                let each = match (tile, operands) {
                    (_, Operands::Bf16) => 8e-3,
                    (WinogradTile::Six, _) => 2e-5,
                    _ => 3e-6,
                };
                assert_near(
                    level,
                    &(tile, operands, shape, activation),
                    &output,
                    &expected,
                    each * (1.0 + terms.sqrt()),
                );
            }
        }
    }

    /// Root of the mean square of the error over that of the output, of ReLU-like inputs and weights of variance 2/(9 C).
    #[test]
    fn the_error_is_as_small_as_stated() {
        let level = IsaLevel::detect();
        let mut random = Random::new(12);
        let side = axis(12, 1, 1);
        let shape = shape(256, 16, side, side);
        let input: Vec<f32> = random.units(256 * 144).into_iter().map(|x| x.max(0.0)).collect();
        let scale = (2.0f32 / (9.0 * 256.0)).sqrt() * 3f32.sqrt();
        let weights: Vec<f32> = random.units(256 * 16 * 9).into_iter().map(|x| x * scale).collect();
        let expected = plain_conv(&shape, &input, &weights);
        let image = blocked(level, 256, 144, &input);
        // Rounding to bfloat16 alone is 2.4e-3, of inputs and weights.
        for (tile, operands, most) in [
            (WinogradTile::Two, Operands::F32, 6e-7),
            (WinogradTile::Four, Operands::F32, 9e-7),
            (WinogradTile::Six, Operands::F32, 7e-6),
            (WinogradTile::Two, Operands::Bf16, 4e-3),
        ] {
            let problem = Conv {
                shape,
                operands,
                input: &image,
                filter: &packed(level, tile, &shape, operands, &weights),
                bias: None,
                residual: Residual::None,
                activation: Activation::Identity,
            };
            let output = run(level, tile, &problem, &vec![0.0; shape.output_len()], &mut random);
            let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
            let error = square(&mut output.iter().zip(&expected).map(|(&a, e)| f64::from(a) - e));
            let relative = (error / square(&mut expected.iter().copied())).sqrt();
            assert!(relative < most, "{tile:?}: {relative:e}, expected below {most:e}");
        }
    }

    #[test]
    fn large_images_with_channels_are_worth_it_and_others_are_not() {
        let of = |channels: usize, side: usize| {
            let side = axis(side, 1, 1);
            choose(&shape(channels, channels, side, side), Operands::F32, WinogradTile::Four)
        };
        assert_eq!(of(64, 56), Some(WinogradTile::Four));
        // Of more coefficients than caches keep.
        assert_eq!(of(256, 14), Some(WinogradTile::Two));
        assert_eq!(of(64, 14), Some(WinogradTile::Four));
        assert_eq!(of(8, 56), None);
        assert_eq!(of(64, 1), None);
        let strided = Axis { stride: 2, output: 28, ..axis(56, 1, 1) };
        assert_eq!(choose(&shape(64, 64, strided, strided), Operands::F32, WinogradTile::Four), None);
    }
}
