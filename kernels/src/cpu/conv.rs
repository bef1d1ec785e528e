//! Convolution and transposed convolution on `NCHW16c` images, one image at a time.
//!
//! Direct: weights as `[group][O/16][kh][kw][I/16][16 i][16 o]`, a register tile of neighbouring pixels by one block of
//! outputs (four for single pixels), and the sum of an output kept in a register from its first term to its last, in the order tap row, tap column,
//! channel. (Channels are innermost so that finding a tap's pixels, which is what costs, is done once for all of them.) Padding is a pointer to zeros (left, right) or a skipped tap row (above, below), never a copy. A
//! pointwise convolution is one long row of such sums (`pointwise.rs`); images of narrow rows are *flat*: one row of all pixels, each tap's
//! inputs found pixel by pixel, so that tiles stay wide. One-dimensional operators have a height of [`Axis::UNIT`].
//!
//! Not here: depthwise convolution ([`super::depthwise`]), the first layer that reads plain `NCHW` ([`super::conv_first`]), and
//! Winograd's ([`super::winograd`]).

use std::{marker::PhantomData, ops::Range};

use super::dispatch::{Kernel, dispatch, dispatch_bf16};
use super::epilogue::{Activation, ApplyRows, Output, Residual};
use super::half::{HalfType, narrow};
use super::isa::Isa;
use super::pointwise::Strip;
pub use super::tile::Operands;
use super::tile::{BlockedPixels, Floats, Pairs, Terms, Tile, accumulate_blocks, pieces};
pub use super::window::Axis;
use super::window::Taps;
use super::{BLOCK, IsaLevel, vmath};

/// Pixels of a row that make one unit of work at most, give or take balance: short enough to split a flat 7 × 7 image's
/// neighbours over threads, long enough that reading the weights again costs little.
const UNIT_PIXELS: usize = 112;

/// Rows up to this wide are joined: alone they would not fill a tile.
const FLAT_PIXELS: usize = 7;

/// What padding points to.
static ZEROS: [f32; BLOCK] = [0.0; BLOCK];

/// A convolution's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConvShape {
    pub channels_in: usize,
    pub channels_out: usize,
    pub groups: usize,
    pub height: Axis,
    pub width: Axis,
    /// Transposed, as ONNX's ConvTranspose: output position `i·stride + t·dilation − pad_before` receives input `i` times tap `t`;
    /// weights are `[I, O/groups, kh, kw]`. `output` holds the final sizes, output padding included.
    pub transposed: bool,
}

/// Channels as the kernel sees them: groups narrower than a block are joined into blocks whose weights are
/// block-diagonal.
#[derive(Clone, Copy)]
struct Grouping {
    groups: usize,
    channels_in: usize,
    channels_out: usize,
}

impl ConvShape {
    /// Whether [`conv`] can run it: one group, groups of whole blocks, or groups of 1, 2, 4 or 8 channels in and as many out with
    /// whole blocks in all. (Joined groups read each other's values times 0: infinities spread among 16 channels.)
    pub fn supported(&self) -> bool {
        self.grouping().is_some()
    }

    fn grouping(&self) -> Option<Grouping> {
        let ConvShape { channels_in, channels_out, groups, .. } = *self;
        if groups == 0 || !channels_in.is_multiple_of(groups) || !channels_out.is_multiple_of(groups) {
            return None;
        }
        let (each_in, each_out) = (channels_in / groups, channels_out / groups);
        if groups == 1 || (each_in.is_multiple_of(BLOCK) && each_out.is_multiple_of(BLOCK)) {
            Some(Grouping { groups, channels_in: each_in, channels_out: each_out })
        } else if each_in == each_out
            && each_in > 0
            && BLOCK.is_multiple_of(each_in)
            && channels_in.is_multiple_of(BLOCK)
        {
            Some(Grouping { groups: channels_in / BLOCK, channels_in: BLOCK, channels_out: BLOCK })
        } else {
            None
        }
    }

    fn checked_grouping(&self) -> Grouping {
        self.height.assert_valid();
        self.width.assert_valid();
        self.grouping().unwrap_or_else(|| panic!("groups of {self:?} are not whole blocks"))
    }

    /// Whether every output reads the input at its own position and no other.
    pub fn is_pointwise(&self) -> bool {
        self.height.is_pointwise() && self.width.is_pointwise()
    }

    fn is_flat(&self) -> bool {
        !self.transposed && !self.is_pointwise() && self.width.output <= FLAT_PIXELS && self.height.output > 1
    }

    /// Multiplications and additions of the direct sum of one image, those with padding included.
    pub fn operations(&self) -> u64 {
        let positions = |axis: Axis| if self.transposed { axis.input } else { axis.output };
        let pixels = positions(self.height) * positions(self.width) * self.height.kernel * self.width.kernel;
        2 * (self.channels_in / self.groups.max(1) * self.channels_out) as u64 * pixels as u64
    }

    /// Elements of a blocked input image.
    pub fn input_len(&self) -> usize {
        self.channels_in.div_ceil(BLOCK) * BLOCK * self.height.input * self.width.input
    }

    /// Elements of a blocked output image.
    pub fn output_len(&self) -> usize {
        self.channels_out.div_ceil(BLOCK) * BLOCK * self.height.output * self.width.output
    }
}

/// Elements of a packed filter. Panics if the shape is not [supported](ConvShape::supported).
pub fn packed_filter_len(shape: &ConvShape) -> usize {
    let g = shape.checked_grouping();
    let blocks = g.channels_in.div_ceil(BLOCK) * g.channels_out.div_ceil(BLOCK);
    g.groups * blocks * shape.height.kernel * shape.width.kernel * BLOCK * BLOCK
}

/// Packs weights `[O, I/groups, kh, kw]` (transposed: `[I, O/groups, kh, kw]`) for [`conv`]. The same on every ISA.
pub fn pack_filter(shape: &ConvShape, weights: &[f32], packed: &mut [f32]) {
    let grouping = shape.checked_grouping();
    let (each_in, each_out) = (shape.channels_in / shape.groups, shape.channels_out / shape.groups);
    let taps = shape.height.kernel * shape.width.kernel;
    assert!(weights.len() >= shape.channels_out * each_in * taps, "{} weights for {shape:?}", weights.len());
    assert!(packed.len() >= packed_filter_len(shape), "packed filter of {} for {shape:?}", packed.len());
    let blocks_in = grouping.channels_in.div_ceil(BLOCK);
    let blocks_out = grouping.channels_out.div_ceil(BLOCK);
    let mut outputs = packed.chunks_exact_mut(taps * blocks_in * BLOCK * BLOCK);
    for group in 0..grouping.groups {
        for block_out in 0..blocks_out {
            let Some(chunk) = outputs.next() else { return };
            let first = group * grouping.channels_out + block_out * BLOCK;
            let outs = BLOCK.min(grouping.channels_out - block_out * BLOCK);
            if outs < BLOCK || !grouping.channels_in.is_multiple_of(BLOCK) || grouping.groups < shape.groups {
                chunk.fill(0.0);
            }
            // The group of each output, and where its weights begin.
            let group_of: [usize; BLOCK] = std::array::from_fn(|o| (first + o) / each_out);
            let start_of: [usize; BLOCK] = std::array::from_fn(|o| match shape.transposed {
                true => (first + o) % each_out * taps,
                false => (first + o) * each_in * taps,
            });
            // Output by output innermost, so that what is written lies together.
            for i in 0..grouping.channels_in {
                let input = group * grouping.channels_in + i;
                let (own, start) = match shape.transposed {
                    true => (input / each_in, input * each_out * taps),
                    false => (input / each_in, input % each_in * taps),
                };
                for o in (0..outs).filter(|&o| group_of[o] == own) {
                    for (tap, &w) in weights[start_of[o] + start..][..taps].iter().enumerate() {
                        chunk[(tap * blocks_in * BLOCK + i) * BLOCK + o] = w;
                    }
                }
            }
        }
    }
}

/// As [`pack_filter`], in words of two neighbouring input channels, rounded to the nearest: half as many.
pub fn pack_filter_bf16(level: IsaLevel, shape: &ConvShape, weights: &[f32], packed: &mut [f32]) {
    let mut filter = vec![0.0; packed_filter_len(shape)];
    pack_filter(shape, weights, &mut filter);
    pair_rows(level, &filter, packed);
}

/// Rounds rows of 16 outputs, an even number, and makes words of two of them.
pub(super) fn pair_rows(level: IsaLevel, rows: &[f32], words: &mut [f32]) {
    let mut halves = vec![0; rows.len()];
    narrow(level, HalfType::Bf16, rows, &mut halves);
    for (two, words) in halves.chunks_exact(2 * BLOCK).zip(words.chunks_exact_mut(BLOCK)) {
        for (o, word) in words.iter_mut().enumerate() {
            *word = f32::from_bits(u32::from(two[o]) | u32::from(two[BLOCK + o]) << 16);
        }
    }
}

/// A convolution of one image.
#[derive(Clone, Copy, Debug)]
pub struct Conv<'a> {
    pub shape: ConvShape,
    /// What input and filter are held in. The rest is f32.
    pub operands: Operands,
    /// `[ceil(I/16)][H][W][16]`, or as [`narrow_image`](super::layout::narrow_image) leaves it.
    pub input: &'a [f32],
    /// As [`pack_filter`] leaves it, or [`pack_filter_bf16`].
    pub filter: &'a [f32],
    /// One value per output channel.
    pub bias: Option<&'a [f32]>,
    pub residual: Residual<'a>,
    pub activation: Activation,
}

/// How the outputs are numbered: unit = (group, then a set of output blocks and a piece of a row). Of these two the one
/// is fastest whose operand is read again and again: either a piece's inputs stay in the cache while the filter passes, or a set's filter
/// does while the image passes.
struct Units {
    grouping: Grouping,
    /// Output blocks that a unit computes together.
    blocks: usize,
    /// Of those in a group.
    block_sets: usize,
    rows: usize,
    /// Pixels of a row; for a transposed convolution of the longest phase of a row.
    row_pixels: usize,
    pieces: usize,
    /// Whether sets are numbered fastest, else pieces.
    sets_fastest: bool,
}

impl Units {
    fn new<I: Isa>(shape: &ConvShape) -> Units {
        let grouping = shape.checked_grouping();
        let (rows, row_pixels) = if shape.is_pointwise() || shape.is_flat() {
            (1, shape.height.output * shape.width.output)
        } else if shape.transposed {
            (shape.height.output, shape.width.output.div_ceil(shape.width.stride))
        } else {
            (shape.height.output, shape.width.output)
        };
        let blocks_out = grouping.channels_out.div_ceil(BLOCK);
        // One block of outputs by many pixels; several blocks only where too few pixels would leave the multipliers waiting.
        let blocks = match I::LANES {
            16 if row_pixels <= 3 => 4,
            8 if row_pixels == 1 => 4,
            _ => 1,
        };
        let pieces = ((row_pixels + UNIT_PIXELS / 2) / UNIT_PIXELS).max(1);
        let block_sets = blocks_out.div_ceil(blocks);
        let filter = shape.height.kernel * shape.width.kernel * grouping.channels_out;
        let image = shape.height.input * shape.width.input;
        // Values read over a group's run, in units of its input channels.
        let sets_fastest = filter.saturating_mul(rows * pieces) < image.saturating_mul(block_sets);
        Units { grouping, blocks, block_sets, rows, row_pixels, pieces, sets_fastest }
    }

    /// Group, set, row and piece of a unit.
    fn decode(&self, unit: usize) -> [usize; 4] {
        let of_group = self.block_sets * self.rows * self.pieces;
        let (group, unit) = (unit / of_group, unit % of_group);
        let (set, strip) = match self.sets_fastest {
            true => (unit % self.block_sets, unit / self.block_sets),
            false => (unit / (self.rows * self.pieces), unit % (self.rows * self.pieces)),
        };
        [group, set, strip / self.pieces, strip % self.pieces]
    }

    fn count(&self) -> usize {
        if self.row_pixels == 0 { 0 } else { self.grouping.groups * self.block_sets * self.rows * self.pieces }
    }
}

/// Units of work of a convolution, for [`conv`].
pub fn conv_units(level: IsaLevel, shape: &ConvShape, operands: Operands) -> usize {
    struct Count<'a>(&'a ConvShape);
    impl Kernel for Count<'_> {
        type Output = usize;
        #[inline(always)]
        fn eval<I: Isa>(self, _: I) -> usize {
            Units::new::<I>(self.0).count()
        }
    }
    dispatch(operands.level(level), Count(shape))
}

/// Computes a range of units. `output` is the whole image, `[ceil(O/16)][H'][W'][16]`.
pub fn conv(level: IsaLevel, conv: &Conv<'_>, units: Range<usize>, output: Output<'_>) {
    if units.is_empty() {
        return;
    }
    let Conv { shape, operands, .. } = conv;
    let (input, filter) = (operands.words(shape.input_len()), operands.words(packed_filter_len(shape)));
    assert!(conv.input.len() >= input, "input of {} for {shape:?}", conv.input.len());
    assert!(conv.filter.len() >= filter, "filter of {} for {shape:?}", conv.filter.len());
    assert!(output.len() >= shape.output_len(), "output of {} for {shape:?}", output.len());
    assert!(conv.bias.is_none_or(|bias| bias.len() >= shape.channels_out), "too few biases for {shape:?}");
    if let Residual::Slice(residual) = conv.residual {
        assert!(residual.len() >= shape.output_len(), "residual of {} for {shape:?}", residual.len());
    }
    let output = output.pointer();
    match operands {
        Operands::F32 => dispatch(level, Direct { conv, units, output, of: PhantomData::<Floats> }),
        Operands::Bf16 => dispatch_bf16(level, Direct { conv, units, output, of: PhantomData::<Pairs> }),
    }
}

struct Direct<'a, T> {
    conv: &'a Conv<'a>,
    units: Range<usize>,
    output: *mut f32,
    of: PhantomData<T>,
}

impl<T: Terms> Kernel for Direct<'_, T> {
    type Output = ();
    const OF_HALVES: bool = T::OF_HALVES;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Conv { shape, input, filter, bias, residual, activation, .. } = *self.conv;
        let units = Units::new::<I>(&shape);
        assert!(self.units.end <= units.count(), "units {:?} of {}", self.units, units.count());
        let Grouping { channels_in, channels_out, .. } = units.grouping;
        let (blocks_in, blocks_out) = (channels_in.div_ceil(BLOCK), channels_out.div_ceil(BLOCK));
        let words_in = channels_in.div_ceil(BLOCK / T::WORDS);
        let taps = shape.height.kernel * shape.width.kernel;
        let (input_plane, output_plane) = if shape.is_pointwise() {
            (units.row_pixels, units.row_pixels)
        } else {
            (shape.height.input * shape.width.input, shape.height.output * shape.width.output)
        };
        for unit in self.units {
            let [group, set, y, piece] = units.decode(unit);
            if shape.is_pointwise() && units.blocks == 1 {
                let start = units.row_pixels * piece / units.pieces;
                let end = units.row_pixels * (piece + 1) / units.pieces;
                let (block, first_out) = (group * blocks_out + set, group * channels_out + set * BLOCK);
                // SAFETY: the entry checked the lengths; group, block and pixels are inside the shape.
                isa.outline(unsafe {
                    let output = self.output.add((block * output_plane + start) * BLOCK);
                    Strip {
                        input: input.as_ptr().add((group * blocks_in * input_plane + start) * T::WORDS),
                        input_block_stride: input_plane * T::WORDS,
                        words_in,
                        filter: filter.as_ptr().add(block * blocks_in * T::WORDS * BLOCK),
                        outputs: channels_out - set * BLOCK,
                        bias: bias.map(|bias| &bias[first_out..(group + 1) * channels_out]),
                        residual: match residual {
                            Residual::None => std::ptr::null(),
                            Residual::Slice(r) => r.as_ptr().add((block * output_plane + start) * BLOCK),
                            Residual::Output => output,
                        },
                        activation,
                        output,
                        pixels: end - start,
                        of: PhantomData::<T>,
                    }
                });
                continue;
            }
            let first_block = set * units.blocks;
            let blocks = first_block..blocks_out.min(first_block + units.blocks);
            let (input_width, output_width, y_taps) = if shape.is_pointwise() {
                (units.row_pixels, units.row_pixels, Taps::all(&Axis::UNIT))
            } else if shape.is_flat() {
                (shape.width.input, shape.width.output, Taps::all(&shape.height))
            } else if shape.transposed {
                (shape.width.input, shape.width.output, Taps::transposed(&shape.height, y).clipped(shape.height.input))
            } else {
                (shape.width.input, shape.width.output, Taps::inside(&shape.height, y))
            };
            let row_offset = y * output_width * BLOCK;
            let group_out = group * blocks_out;
            // SAFETY: the entry checked the lengths; group, block and row are inside the shape.
            let mut row = unsafe {
                Row {
                    input: input.as_ptr().add(group * blocks_in * input_plane * T::WORDS),
                    input_block_stride: input_plane * T::WORDS,
                    input_width,
                    blocks_in,
                    words_in,
                    filter: filter.as_ptr().add(group_out * blocks_in * taps * T::WORDS * BLOCK),
                    filter_taps: taps,
                    filter_width: shape.width.kernel,
                    y_taps,
                    x_taps: Taps::all(&shape.width),
                    pixel_step: shape.width.stride,
                    output: self.output.add(group_out * output_plane * BLOCK + row_offset),
                    output_block_stride: output_plane * BLOCK,
                    output_step: BLOCK,
                    residual: match residual {
                        Residual::None => std::ptr::null(),
                        Residual::Slice(r) => r.as_ptr().add(group_out * output_plane * BLOCK + row_offset),
                        Residual::Output => self.output.add(group_out * output_plane * BLOCK + row_offset),
                    },
                    bias: bias.map(|bias| &bias[group * channels_out..(group + 1) * channels_out]),
                    activation,
                    flat: shape.is_flat().then_some(&shape),
                }
            };
            let start = units.row_pixels * piece / units.pieces;
            let end = units.row_pixels * (piece + 1) / units.pieces;
            if shape.transposed && !shape.is_pointwise() {
                // Outputs of one phase, a stride apart, are a plain convolution with the taps that meet them.
                let (base, base_residual) = (row.output, row.residual);
                for phase in 0..shape.width.stride.min(output_width) {
                    let pixels = (output_width - phase).div_ceil(shape.width.stride);
                    row.x_taps = Taps::transposed(&shape.width, phase);
                    row.pixel_step = 1;
                    row.output_step = shape.width.stride * BLOCK;
                    row.output = base.wrapping_add(phase * BLOCK);
                    row.residual =
                        if base_residual.is_null() { base_residual } else { base_residual.wrapping_add(phase * BLOCK) };
                    run_row::<I, T>(isa, &row, start..end.min(pixels).max(start), blocks.clone());
                }
            } else {
                run_row::<I, T>(isa, &row, start..end, blocks);
            }
        }
    }
}

/// One output row of one group.
struct Row<'a> {
    input: *const f32,
    input_block_stride: usize,
    input_width: usize,
    blocks_in: usize,
    /// Words of a pixel.
    words_in: usize,
    filter: *const f32,
    filter_taps: usize,
    filter_width: usize,
    y_taps: Taps,
    x_taps: Taps,
    /// Input pixels between the inputs of neighbouring outputs.
    pixel_step: usize,
    output: *mut f32,
    output_block_stride: usize,
    /// Elements between neighbouring outputs.
    output_step: usize,
    /// Null, or as `output`.
    residual: *const f32,
    bias: Option<&'a [f32]>,
    activation: Activation,
    /// Where the row is all pixels of the image.
    flat: Option<&'a ConvShape>,
}

/// Pixels that a tile of `blocks` output blocks has at most. Half the registers of AVX-512 stay free: accumulators that fill them
/// pass through memory at every tap.
#[inline(always)]
const fn tile_pixels<I: Isa>(blocks: usize) -> usize {
    match (I::LANES, I::REGISTERS, blocks) {
        (16, _, 4) => 3,
        (8, _, 4) => 1,
        (16, _, _) => 14,
        (4, 16, _) => 2,
        _ => 6,
    }
}

#[inline(always)]
fn run_row<I: Isa, T: Terms>(isa: I, row: &Row<'_>, pixels: Range<usize>, blocks: Range<usize>) {
    let mut block = blocks.start;
    while block < blocks.end {
        let count = if blocks.end - block >= 4 { 4 } else { 1 };
        for piece in pieces(pixels.len(), tile_pixels::<I>(count)) {
            let x = pixels.start + piece.start;
            // Guards in `const` blocks, so that tiles which a rung cannot have are not compiled for it.
            macro_rules! tiles {
                ($($pixels:literal)+) => {
                    match (piece.len(), count, BLOCK / I::LANES) {
                        $(
                            ($pixels, 1, 1) if const { I::LANES == 16 } => {
                                isa.outline(Pixels::<T, $pixels, 1, 1> { row, x, block, of: PhantomData })
                            }
                            ($pixels, 4, 1) if const { I::LANES == 16 && $pixels <= tile_pixels::<I>(4) } => {
                                isa.outline(Pixels::<T, $pixels, 4, 1> { row, x, block, of: PhantomData })
                            }
                            ($pixels, 1, 2) if const { I::LANES == 8 && $pixels <= tile_pixels::<I>(1) } => {
                                isa.outline(Pixels::<T, $pixels, 1, 2> { row, x, block, of: PhantomData })
                            }
                            ($pixels, 4, 2) if const { I::LANES == 8 && $pixels <= tile_pixels::<I>(4) } => {
                                isa.outline(Pixels::<T, $pixels, 4, 2> { row, x, block, of: PhantomData })
                            }
                            ($pixels, 1, 4) if const { I::LANES == 4 && $pixels <= tile_pixels::<I>(1) } => {
                                isa.outline(Pixels::<T, $pixels, 1, 4> { row, x, block, of: PhantomData })
                            }
                        )+
                        _ => unreachable!("a unit's blocks and pieces fit its tiles"),
                    }
                };
            }
            tiles!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
        }
        block += count;
    }
}

/// A tile of `MR` pixels from `x` by `OB` output blocks from `block`.
struct Pixels<'a, T, const MR: usize, const OB: usize, const VB: usize> {
    row: &'a Row<'a>,
    x: usize,
    block: usize,
    of: PhantomData<T>,
}

impl<T: Terms, const MR: usize, const OB: usize, const VB: usize> Kernel for Pixels<'_, T, MR, OB, VB> {
    type Output = ();
    const OF_HALVES: bool = T::OF_HALVES;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let row = self.row;
        let mut acc: Tile<I, MR, OB, VB> = [[[isa.zero(); VB]; OB]; MR];
        let filter_tap = row.blocks_in * T::WORDS * BLOCK;
        let filter_block = row.filter_taps * filter_tap;
        let step = row.pixel_step as isize;
        let x0 = self.x as isize * step + row.x_taps.input_first;
        let width = row.input_width as isize;
        // Of each pixel of a flat row, the input position of the first tap.
        let mut starts = [(0isize, 0isize); MR];
        let mut flat_height = 0;
        if let Some(shape) = row.flat {
            flat_height = shape.height.input as isize;
            for (m, start) in starts.iter_mut().enumerate() {
                let pixel = self.x + m;
                let (y, x) = (pixel / shape.width.output, pixel % shape.width.output);
                *start = ((y * shape.height.stride) as isize, (x * shape.width.stride) as isize);
            }
        }
        // SAFETY: `Direct` checked the lengths, and took rows and taps that are inside; left and right are checked here, as
        // all four sides are for flat rows.
        unsafe {
            for j in 0..row.y_taps.count {
                let y = row.y_taps.input_first + j as isize * row.y_taps.input_step;
                // Of a flat row this may be outside: its pixels are looked up below.
                let line = row.input.wrapping_offset(y * width * T::WORDS as isize);
                let tap_row = (row.y_taps.first + j * row.y_taps.step) * row.filter_width;
                for i in 0..row.x_taps.count {
                    let tap = (tap_row + row.x_taps.first + i * row.x_taps.step) * filter_tap;
                    let mut b = [row.filter; OB];
                    for (o, pointer) in b.iter_mut().enumerate() {
                        *pointer = row.filter.add((self.block + o) * filter_block + tap);
                    }
                    let left = x0 + i as isize * row.x_taps.input_step;
                    let right = left + (MR as isize - 1) * step;
                    let mut pixels = BlockedPixels { first: [ZEROS.as_ptr(); MR], block_stride: [0; MR] };
                    if row.flat.is_some() {
                        let x = row.x_taps.input_first + i as isize * row.x_taps.input_step;
                        for (m, start) in starts.into_iter().enumerate() {
                            let (y, x) = (start.0 + y, start.1 + x);
                            if y >= 0 && y < flat_height && x >= 0 && x < width {
                                pixels.first[m] = row.input.offset((y * width + x) * T::WORDS as isize);
                                pixels.block_stride[m] = row.input_block_stride;
                            }
                        }
                    } else if left >= 0 && right < width {
                        for m in 0..MR {
                            pixels.first[m] = line.offset((left + m as isize * step) * T::WORDS as isize);
                            pixels.block_stride[m] = row.input_block_stride;
                        }
                    } else {
                        for m in 0..MR {
                            let at = left + m as isize * step;
                            if at >= 0 && at < width {
                                pixels.first[m] = line.offset(at * T::WORDS as isize);
                                pixels.block_stride[m] = row.input_block_stride;
                            }
                        }
                    }
                    accumulate_blocks::<I, T, MR, OB, VB>(isa, &mut acc, pixels, b, row.words_in);
                }
            }
            finish(isa, &acc, row, self.x, self.block);
        }
    }
}

/// Bias, residual, activation, store.
///
/// # Safety
/// The tile is inside the row's output.
#[inline(always)]
unsafe fn finish<I: Isa, const MR: usize, const OB: usize, const VB: usize>(
    isa: I,
    acc: &Tile<I, MR, OB, VB>,
    row: &Row<'_>,
    x: usize,
    block: usize,
) {
    let (low, high) = row.activation.bounds();
    let offset = block * row.output_block_stride + x * row.output_step;
    // SAFETY: the caller.
    unsafe {
        let output = row.output.add(offset);
        for o in 0..OB {
            for v in 0..VB {
                let bias = match row.bias {
                    None => isa.zero(),
                    Some(bias) => load_bias(isa, bias, (block + o) * BLOCK + v * I::LANES),
                };
                for m in 0..MR {
                    let at = o * row.output_block_stride + m * row.output_step + v * I::LANES;
                    let mut value = isa.add(acc[m][o][v], bias);
                    if !row.residual.is_null() {
                        value = isa.add(value, isa.load(row.residual.add(offset + at)));
                    }
                    isa.store(output.add(at), vmath::clip(isa, value, low, high));
                }
            }
        }
        if !row.activation.clamps() {
            let activation = row.activation;
            if row.output_step == BLOCK {
                let (rows, row_stride, width) = (OB, row.output_block_stride, MR * BLOCK);
                isa.outline(ApplyRows { activation, pointer: output, rows, row_stride, width });
            } else {
                for o in 0..OB {
                    let pointer = output.add(o * row.output_block_stride);
                    let (rows, row_stride, width) = (MR, row.output_step, BLOCK);
                    isa.outline(ApplyRows { activation, pointer, rows, row_stride, width });
                }
            }
        }
    }
}

/// A vector of biases from `first`, 0 past the last channel.
#[inline(always)]
pub(crate) fn load_bias<I: Isa>(isa: I, bias: &[f32], first: usize) -> I::V {
    let left = bias.len().saturating_sub(first);
    // SAFETY: only biases that exist are read.
    unsafe {
        if left >= I::LANES {
            isa.load(bias.as_ptr().add(first))
        } else if left > 0 {
            isa.load_partial(bias.as_ptr().add(first), left)
        } else {
            isa.zero()
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::layout::{blocked_len, blocked_to_nchw, layout_units, narrow_image, nchw_to_blocked};
    use super::super::testing::*;
    use super::*;

    /// The definition: `[O, H', W']` from `[I, H, W]`, in `f64`.
    pub fn plain_conv(shape: &ConvShape, input: &[f32], weights: &[f32]) -> Vec<f64> {
        let ConvShape { channels_in, channels_out, groups, height, width, transposed } = *shape;
        let (each_in, each_out) = (channels_in / groups, channels_out / groups);
        let mut output = vec![0.0f64; channels_out * height.output * width.output];
        // (input, output) position pairs of each tap, along one axis.
        let pairs = |axis: Axis| {
            let (from, to) = if transposed { (axis.input, axis.output) } else { (axis.output, axis.input) };
            let mut pairs = Vec::new();
            for position in 0..from {
                for tap in 0..axis.kernel {
                    let other = position * axis.stride + tap * axis.dilation;
                    if other >= axis.pad_before && other - axis.pad_before < to {
                        let other = other - axis.pad_before;
                        pairs.push(if transposed { (position, other, tap) } else { (other, position, tap) });
                    }
                }
            }
            pairs
        };
        let (rows, columns) = (pairs(height), pairs(width));
        for o in 0..channels_out {
            for i in 0..each_in {
                let channel = o / each_out * each_in + i;
                for &(yi, yo, ky) in &rows {
                    for &(xi, xo, kx) in &columns {
                        let from = if transposed { channel * each_out + o % each_out } else { o * each_in + i };
                        let w = weights[(from * height.kernel + ky) * width.kernel + kx];
                        let x = input[(channel * height.input + yi) * width.input + xi];
                        output[(o * height.output + yo) * width.output + xo] += f64::from(w) * f64::from(x);
                    }
                }
            }
        }
        output
    }

    pub fn random_axis(random: &mut Random, transposed: bool) -> Axis {
        loop {
            let axis = Axis {
                input: random.between(1, 20),
                output: 0,
                kernel: random.pick(&[1, 1, 2, 3, 3, 3, 5, 7]),
                stride: random.pick(&[1, 1, 1, 2, 3]),
                dilation: random.pick(&[1, 1, 1, 2, 3]),
                pad_before: random.between(0, 3),
                pad_after: random.between(0, 3),
            };
            let reach = (axis.kernel - 1) * axis.dilation + 1;
            let pads = axis.pad_before + axis.pad_after;
            if transposed {
                let full = (axis.input - 1) * axis.stride + reach + random.between(0, axis.stride - 1);
                if full > pads {
                    return Axis { output: full - pads, ..axis };
                }
            } else if axis.input + pads >= reach {
                return Axis { output: (axis.input + pads - reach) / axis.stride + 1, ..axis };
            }
        }
    }

    /// A blocked image filled from `[channels, pixels]`, padding lanes with something large.
    pub fn blocked(level: IsaLevel, channels: usize, pixels: usize, image: &[f32]) -> Vec<f32> {
        let mut output = vec![0.0; blocked_len(channels, pixels)];
        nchw_to_blocked(level, channels, pixels, image, 0..layout_units(channels, pixels), Output::new(&mut output));
        for (at, value) in output.iter_mut().enumerate() {
            if at / BLOCK / pixels * BLOCK + at % BLOCK >= channels {
                *value = f32::NAN;
            }
        }
        output
    }

    /// A blocked image as `operands` hold it.
    pub fn held(level: IsaLevel, operands: Operands, channels: usize, pixels: usize, image: &[f32]) -> Vec<f32> {
        if operands == Operands::F32 {
            return image.to_vec();
        }
        let mut output = vec![f32::NAN; image.len() / 2];
        narrow_image(level, channels, pixels, image, 0..layout_units(channels, pixels), Output::new(&mut output));
        output
    }

    /// A filter as `operands` hold it.
    pub fn filter(level: IsaLevel, operands: Operands, shape: &ConvShape, weights: &[f32]) -> Vec<f32> {
        let mut filter = vec![f32::NAN; operands.words(packed_filter_len(shape))];
        match operands {
            Operands::F32 => pack_filter(shape, weights, &mut filter),
            Operands::Bf16 => pack_filter_bf16(level, shape, weights, &mut filter),
        }
        filter
    }

    pub fn unblocked(level: IsaLevel, channels: usize, pixels: usize, image: &[f32]) -> Vec<f32> {
        let mut output = vec![0.0; channels * pixels];
        blocked_to_nchw(level, channels, pixels, image, 0..layout_units(channels, pixels), Output::new(&mut output));
        output
    }

    fn check(level: IsaLevel, operands: Operands, shape: ConvShape, activation: Activation, random: &mut Random) {
        let (h, w) = (shape.height, shape.width);
        let (pixels_in, pixels_out) = (h.input * w.input, h.output * w.output);
        let input = random.units(shape.channels_in * pixels_in);
        let weights = random.units(shape.channels_in * shape.channels_out / shape.groups * h.kernel * w.kernel);
        let bias = random.units(shape.channels_out);
        let residual = random.units(shape.channels_out * pixels_out);
        let (use_bias, use_residual) = (random.between(0, 1) == 1, random.between(0, 2));
        let blocked_input = blocked(level, shape.channels_in, pixels_in, &input);
        let blocked_input = held(level, operands, shape.channels_in, pixels_in, &blocked_input);
        let blocked_residual = blocked(level, shape.channels_out, pixels_out, &residual);
        let problem = Conv {
            shape,
            operands,
            input: &blocked_input,
            filter: &filter(level, operands, &shape, &weights),
            bias: use_bias.then_some(&bias),
            residual: [Residual::None, Residual::Slice(&blocked_residual), Residual::Output][use_residual],
            activation,
        };
        let mut whole = if use_residual == 2 { blocked_residual.clone() } else { vec![f32::NAN; shape.output_len()] };
        let mut cut = whole.clone();
        let count = conv_units(level, &shape, operands);
        conv(level, &problem, 0..count, Output::new(&mut whole));
        for units in random_cuts(random, count) {
            conv(level, &problem, units, Output::new(&mut cut));
        }
        let whole = unblocked(level, shape.channels_out, pixels_out, &whole);
        assert_same_bits(level, &shape, &whole, &unblocked(level, shape.channels_out, pixels_out, &cut));
        let mut expected = plain_conv(&shape, &rounded(operands, &input), &rounded(operands, &weights));
        for (at, value) in expected.iter_mut().enumerate() {
            if use_bias {
                *value += f64::from(bias[at / pixels_out]);
            }
            if use_residual > 0 {
                *value += f64::from(residual[at]);
            }
            *value = activate(activation, *value);
        }
        // A chain of as many roundings as terms, of terms below 1.
        let terms = (shape.channels_in / shape.groups * h.kernel * w.kernel) as f64;
        assert_near(level, &(shape, operands, activation), &whole, &expected, 2e-6 * (1.0 + terms.sqrt()));
    }

    #[test]
    fn convolutions_match_plain_loops_and_do_not_depend_on_ranges() {
        for level in levels() {
            let mut random = Random::new(4);
            for round in rounds(150) {
                let transposed = round % 3 == 2;
                let (channels_in, channels_out, groups) = match round % 8 {
                    0 => (32, 64, 2),
                    1 => random.pick(&[(32, 32, 8), (16, 16, 16), (64, 64, 8), (48, 48, 24)]),
                    _ => (random.between(1, 40), random.between(1, 80), 1),
                };
                let width = random_axis(&mut random, transposed);
                let height = if round % 5 == 0 { Axis::UNIT } else { random_axis(&mut random, transposed) };
                let shape = ConvShape { channels_in, channels_out, groups, height, width, transposed };
                for operands in operands(level) {
                    check(level, operands, shape, ACTIVATIONS[round % ACTIVATIONS.len()], &mut random);
                }
            }
        }
    }

    #[test]
    fn shapes_of_real_networks_match_plain_loops() {
        let axis = |input: usize, kernel: usize, stride: usize, pad: usize| Axis {
            input,
            output: (input + 2 * pad - kernel) / stride + 1,
            kernel,
            stride,
            dilation: 1,
            pad_before: pad,
            pad_after: pad,
        };
        let up = Axis { input: 9, output: 18, kernel: 2, stride: 2, dilation: 1, pad_before: 0, pad_after: 0 };
        for level in levels() {
            let mut random = Random::new(5);
            for (channels_in, channels_out, side, transposed) in [
                (64, 64, axis(28, 3, 1, 1), false),
                (96, 24, axis(28, 1, 1, 0), false),
                (32, 64, axis(14, 1, 2, 0), false),
                (24, 128, axis(7, 3, 1, 1), false),
                (64, 32, up, true),
            ] {
                let shape = ConvShape { channels_in, channels_out, groups: 1, height: side, width: side, transposed };
                for operands in operands(level) {
                    check(level, operands, shape, Activation::Relu, &mut random);
                }
            }
        }
    }

    #[test]
    fn groups_that_are_not_whole_blocks_are_not_supported() {
        let shape = |channels_in, channels_out, groups| ConvShape {
            channels_in,
            channels_out,
            groups,
            height: Axis::UNIT,
            width: Axis::UNIT,
            transposed: false,
        };
        for (shape, expected) in [
            (shape(5, 7, 1), true),
            (shape(64, 32, 2), true),
            (shape(32, 32, 4), true),
            (shape(24, 24, 2), false),
            (shape(32, 64, 4), false),
            (shape(24, 24, 3), false),
        ] {
            assert_eq!(shape.supported(), expected, "{shape:?}");
        }
    }
}
