//! Convolution from plain `NCHW` to `NCHW16c`: a network's first layer, whose few channels would waste a block's lanes.
//!
//! Any channel count, kernel, stride and dilation, one group. The sum of an output is one chain over channel, tap row, tap
//! column. At the left and right edges, the piece of the row that a tile reads is copied between zeros on the stack.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::conv::load_bias;
use super::dispatch::{Kernel, dispatch};
use super::epilogue::{Activation, ApplyRows, Output};
use super::isa::Isa;
use super::tile::{Floats, ListedRows, Rows, ScatteredRows, SteppedRows, Tile, accumulate, pieces};
use super::window::Axis;
use super::{BLOCK, IsaLevel, vmath};

/// Values that fit on the stack for an edge tile: the columns that it reads, of every row and channel. Larger ones are read
/// tap by tap.
const EDGE_VALUES: usize = 2048;

/// Taps of all channels for which it is listed where each is. Kernels of more go row by row.
const LISTED_TAPS: usize = 256;

/// What padding points to.
static ZERO: f32 = 0.0;

/// Sizes of a first-layer convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FirstShape {
    pub channels_in: usize,
    pub channels_out: usize,
    pub height: Axis,
    pub width: Axis,
}

impl FirstShape {
    /// Multiplications and additions of one image, those with padding included.
    pub fn operations(&self) -> u64 {
        2 * (self.channels_out * self.depth()) as u64 * (self.height.output * self.width.output) as u64
    }

    /// Elements of the plain input image.
    pub fn input_len(&self) -> usize {
        self.channels_in * self.height.input * self.width.input
    }

    /// Elements of the blocked output image.
    pub fn output_len(&self) -> usize {
        self.channels_out.div_ceil(BLOCK) * BLOCK * self.height.output * self.width.output
    }

    /// Pixels of a row whose columns are all inside, where tiles of them are steps of a constant apart.
    fn interior(&self) -> Range<usize> {
        let width = self.width;
        let first = width.pad_before.div_ceil(width.stride).min(width.output);
        let reach = (width.kernel - 1) * width.dilation + 1;
        match (width.input + width.pad_before).checked_sub(reach) {
            Some(room) if matches!(width.stride, 1 | 2 | 4) => {
                first..(room / width.stride + 1).clamp(first, width.output)
            }
            _ => 0..0,
        }
    }

    fn depth(&self) -> usize {
        self.channels_in * self.height.kernel * self.width.kernel
    }

    /// Writes where each tap is, counted from the first, of an image of such strides; the list if it is long enough.
    fn list_taps<'a>(&self, channel_stride: usize, row_stride: usize, list: &'a mut [u32]) -> Option<&'a [u32]> {
        let list = list.get_mut(..self.depth())?;
        // Strides are those of an image in memory that was checked; a list has no room for those beyond 32 bits.
        u32::try_from(self.channels_in * channel_stride + self.height.kernel * row_stride).ok()?;
        let mut places = list.iter_mut();
        for channel in 0..self.channels_in {
            for row in 0..self.height.kernel {
                for column in 0..self.width.kernel {
                    let place = channel * channel_stride + row * row_stride + column * self.width.dilation;
                    *places.next()? = place as u32;
                }
            }
        }
        Some(list)
    }
}

/// Elements of a packed first-layer filter.
pub fn packed_first_len(shape: &FirstShape) -> usize {
    shape.channels_out.div_ceil(BLOCK) * BLOCK * shape.depth()
}

/// Packs weights `[O, I, kh, kw]` as `[ceil(O/16)][I][kh][kw][16]`, lanes past the last channel 0. The same on every ISA.
pub fn pack_first(shape: &FirstShape, weights: &[f32], packed: &mut [f32]) {
    let depth = shape.depth();
    assert!(weights.len() >= shape.channels_out * depth, "{} weights for {shape:?}", weights.len());
    let packed = &mut packed[..packed_first_len(shape)];
    packed.fill(0.0);
    for channel in 0..shape.channels_out {
        for k in 0..depth {
            packed[(channel / BLOCK * depth + k) * BLOCK + channel % BLOCK] = weights[channel * depth + k];
        }
    }
}

/// A first-layer convolution of one image.
#[derive(Clone, Copy, Debug)]
pub struct First<'a> {
    pub shape: FirstShape,
    /// `[I, H, W]`.
    pub input: &'a [f32],
    /// As [`pack_first`] leaves it.
    pub filter: &'a [f32],
    /// One value per output channel.
    pub bias: Option<&'a [f32]>,
    pub activation: Activation,
}

/// Units of work: output rows, all channels of each.
pub fn conv_first_units(shape: &FirstShape) -> usize {
    if shape.width.output == 0 { 0 } else { shape.height.output }
}

/// Computes a range of units. `output` is the whole image, `[ceil(O/16)][H'][W'][16]`.
pub fn conv_first(level: IsaLevel, problem: &First<'_>, units: Range<usize>, output: Output<'_>) {
    if units.is_empty() {
        return;
    }
    let shape = &problem.shape;
    shape.height.assert_valid();
    shape.width.assert_valid();
    assert!(units.end <= conv_first_units(shape), "units {units:?} of {shape:?}");
    assert!(problem.input.len() >= shape.input_len(), "input of {} for {shape:?}", problem.input.len());
    assert!(problem.filter.len() >= packed_first_len(shape), "filter of {} for {shape:?}", problem.filter.len());
    assert!(output.len() >= shape.output_len(), "output of {} for {shape:?}", output.len());
    assert!(problem.bias.is_none_or(|bias| bias.len() >= shape.channels_out), "too few biases for {shape:?}");
    dispatch(level, OutputRows { problem, units, output: output.pointer() });
}

struct OutputRows<'a> {
    problem: &'a First<'a>,
    units: Range<usize>,
    output: *mut f32,
}

#[inline(always)]
const fn tile_pixels<I: Isa>() -> usize {
    match (I::LANES, I::REGISTERS) {
        (16, _) => 14,
        (4, 16) => 2,
        _ => 6,
    }
}

impl Kernel for OutputRows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let shape = self.problem.shape;
        let blocks = shape.channels_out.div_ceil(BLOCK);
        let mut list = [0; LISTED_TAPS];
        let (channel_stride, row_stride) =
            (shape.height.input * shape.width.input, shape.height.dilation * shape.width.input);
        let taps = shape.list_taps(channel_stride, row_stride, &mut list);
        for y in self.units {
            for block in 0..blocks {
                // The tiles, and of them those whose taps are all inside.
                let tiles = pieces(shape.width.output, tile_pixels::<I>());
                let interior = match taps {
                    Some(_) if shape.height.taps_inside(y).len() == shape.height.kernel => shape.interior(),
                    _ => 0..0,
                };
                let is_inside = |tile: &Range<usize>| tile.start >= interior.start && tile.end <= interior.end;
                let mut inside = 0..0;
                for (i, piece) in tiles.enumerate() {
                    if is_inside(&piece) {
                        inside = if inside.is_empty() { i..i + 1 } else { inside.start..i + 1 };
                    } else {
                        let (problem, output, x) = (self.problem, self.output, piece.start);
                        // Guards in `const` blocks, so that tiles which a rung cannot have are not compiled for it.
                        macro_rules! tiles {
                            ($($pixels:literal)+) => {
                                match (piece.len(), BLOCK / I::LANES) {
                                    $(
                                        ($pixels, 1) if const { I::LANES == 16 } => {
                                            isa.outline(Pixels::<$pixels, 1> { problem, output, y, x, block })
                                        }
                                        ($pixels, 2) if const { I::LANES == 8 && $pixels <= tile_pixels::<I>() } => {
                                            isa.outline(Pixels::<$pixels, 2> { problem, output, y, x, block })
                                        }
                                        ($pixels, 4) if const { I::LANES == 4 && $pixels <= tile_pixels::<I>() } => {
                                            isa.outline(Pixels::<$pixels, 4> { problem, output, y, x, block })
                                        }
                                    )+
                                    _ => unreachable!("pieces fit the tiles"),
                                }
                            };
                        }
                        tiles!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
                    }
                }
                if let Some(taps) = taps.filter(|_| !inside.is_empty()) {
                    let (problem, output, tiles) = (self.problem, self.output, inside);
                    macro_rules! strip {
                        ($step:literal) => {
                            isa.outline(Interior::<$step> { problem, output, y, block, taps, tiles })
                        };
                    }
                    match shape.width.stride {
                        1 => strip!(1),
                        2 => strip!(2),
                        _ => strip!(4),
                    }
                }
            }
        }
    }
}

/// Tiles of a row whose taps are all inside, by one block of outputs: with the few taps of a first layer a tile takes so little time that
/// finding its operands must take next to none.
struct Interior<'a, const STEP: usize> {
    problem: &'a First<'a>,
    output: *mut f32,
    y: usize,
    block: usize,
    /// Where the taps are from the first, in the plain image.
    taps: &'a [u32],
    tiles: Range<usize>,
}

impl<const STEP: usize> Kernel for Interior<'_, STEP> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        match const { BLOCK / I::LANES } {
            1 => self.tiles::<I, 1>(isa),
            2 => self.tiles::<I, 2>(isa),
            _ => self.tiles::<I, 4>(isa),
        }
    }
}

impl<const STEP: usize> Interior<'_, STEP> {
    #[inline(always)]
    fn tiles<I: Isa, const VB: usize>(&self, isa: I) {
        let First { shape, input, filter, bias, activation } = *self.problem;
        let FirstShape { height, width, .. } = shape;
        let plane = height.output * width.output * BLOCK;
        let (low, high) = activation.bounds();
        let mut biases = [isa.zero(); VB];
        if let Some(bias) = bias {
            for (v, to) in biases.iter_mut().enumerate() {
                *to = load_bias(isa, bias, self.block * BLOCK + v * I::LANES);
            }
        }
        // SAFETY: the entry checked the lengths; all taps of the pixels are inside.
        unsafe {
            let filter = filter.as_ptr().add(self.block * shape.depth() * BLOCK);
            let first = input.as_ptr().offset(height.start(self.y) * width.input as isize);
            let output = self.output.add(self.block * plane + self.y * width.output * BLOCK);
            let tiles = pieces(width.output, tile_pixels::<I>());
            for piece in tiles.skip(self.tiles.start).take(self.tiles.len()) {
                let x = piece.start;
                let rows = ListedRows::<STEP> { first: first.offset(width.start(x)), offsets: self.taps };
                macro_rules! tile {
                    ($($pixels:literal)+) => {
                        match piece.len() {
                            $($pixels if const { $pixels <= tile_pixels::<I>() } => {
                                let mut acc: Tile<I, $pixels, 1, VB> = [[[isa.zero(); VB]; 1]; $pixels];
                                let depth = self.taps.len();
                                accumulate::<I, Floats, _, $pixels, 1, VB>(isa, &mut acc, rows, [filter], BLOCK, depth);
                                for m in 0..$pixels {
                                    for v in 0..VB {
                                        let value = vmath::clip(isa, isa.add(acc[m][0][v], biases[v]), low, high);
                                        isa.store(output.add((x + m) * BLOCK + v * I::LANES), value);
                                    }
                                }
                                if !activation.clamps() {
                                    let (pointer, width) = (output.add(x * BLOCK), $pixels * BLOCK);
                                    isa.outline(ApplyRows { activation, pointer, rows: 1, row_stride: 0, width });
                                }
                            })+
                            _ => unreachable!("pieces fit the tiles"),
                        }
                    };
                }
                tile!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
            }
        }
    }
}

struct Pixels<'a, const MR: usize, const VB: usize> {
    problem: &'a First<'a>,
    output: *mut f32,
    y: usize,
    x: usize,
    block: usize,
}

impl<const MR: usize, const VB: usize> Kernel for Pixels<'_, MR, VB> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let First { shape, input, filter, .. } = *self.problem;
        let FirstShape { height, width, .. } = shape;
        let start = width.start(self.x);
        let span = (MR - 1) * width.stride + (width.kernel - 1) * width.dilation + 1;
        let interior = start >= 0 && start + span as isize <= width.input as isize;
        let taps_y = height.taps_inside(self.y);
        let first_row = (height.start(self.y) + (taps_y.start * height.dilation) as isize).max(0) as usize;
        let values = shape.channels_in * taps_y.len() * span;
        // Only what an edge tile reads is written: clearing it all would cost as much as a small kernel's products.
        let mut edge = [const { MaybeUninit::<f32>::uninit() }; EDGE_VALUES];
        // SAFETY: the entry checked the lengths; rows are inside, columns are checked here.
        let acc = unsafe {
            let b = filter.as_ptr().add(self.block * shape.depth() * BLOCK);
            let image = Image {
                first: input.as_ptr().add(first_row * width.input),
                channel_stride: height.input * width.input,
                row_stride: height.dilation * width.input,
            };
            if !interior && values > EDGE_VALUES {
                self.tap_by_tap::<I>(isa, &image, b)
            } else {
                // Everything is copied before the first accumulator lives: a call in between would spill them all.
                let image = if interior {
                    Image { first: image.first.offset(start), ..image }
                } else {
                    let left = (-start).clamp(0, span as isize) as usize;
                    let right = (width.input as isize - start).clamp(left as isize, span as isize) as usize;
                    for channel in 0..shape.channels_in {
                        for row in 0..taps_y.len() {
                            let line = image.first.add(channel * image.channel_stride + row * image.row_stride);
                            let to = edge.as_mut_ptr().cast::<f32>().add((channel * taps_y.len() + row) * span);
                            for column in 0..left {
                                to.add(column).write(0.0);
                            }
                            for column in left..right {
                                to.add(column).write(line.offset(start + column as isize).read());
                            }
                            for column in right..span {
                                to.add(column).write(0.0);
                            }
                        }
                    }
                    Image { first: edge.as_ptr().cast(), channel_stride: taps_y.len() * span, row_stride: span }
                };
                // All taps in one loop: accumulators that live through several are moved about between them.
                let mut list = [0; LISTED_TAPS];
                let taps = match taps_y.len() == height.kernel {
                    true => shape.list_taps(image.channel_stride, image.row_stride, &mut list),
                    false => None,
                };
                if let Some(offsets) = taps {
                    let (first, depth) = (image.first, offsets.len());
                    let mut acc = [[[isa.zero(); VB]; 1]; MR];
                    macro_rules! stepped {
                        ($($step:literal)+) => {
                            match width.stride {
                                $($step => {
                                    let rows = ListedRows::<$step> { first, offsets };
                                    accumulate::<I, Floats, _, MR, 1, VB>(isa, &mut acc, rows, [b], BLOCK, depth);
                                    true
                                })+
                                _ => false,
                            }
                        };
                    }
                    if stepped!(1 2 4) {
                        return self.finish(isa, acc);
                    }
                }
                match (width.stride, width.dilation) {
                    (1, 1) => self.row_by_row::<I, _>(isa, &image, b, SteppedRows::<1>),
                    (2, 1) => self.row_by_row::<I, _>(isa, &image, b, SteppedRows::<2>),
                    (4, 1) => self.row_by_row::<I, _>(isa, &image, b, SteppedRows::<4>),
                    (stride, 1) => self.row_by_row::<I, _>(isa, &image, b, |first: *const f32| {
                        let mut pointers = [first; MR];
                        for (m, pointer) in pointers.iter_mut().enumerate() {
                            *pointer = first.wrapping_add(m * stride);
                        }
                        ScatteredRows(pointers)
                    }),
                    _ => self.dilated::<I>(isa, &image, b),
                }
            }
        };
        self.finish(isa, acc);
    }
}

/// Where tap rows are: of channel `c`, the `j`-th row inside the input, at `first + c·channel_stride + j·row_stride`.
struct Image {
    first: *const f32,
    channel_stride: usize,
    row_stride: usize,
}

impl<const MR: usize, const VB: usize> Pixels<'_, MR, VB> {
    /// Bias, activation, store.
    #[inline(always)]
    fn finish<I: Isa>(&self, isa: I, acc: Tile<I, MR, 1, VB>) {
        let First { shape: FirstShape { height, width, .. }, bias, activation, .. } = *self.problem;
        // SAFETY: the entry checked the lengths; the tile is inside the output.
        unsafe {
            let plane = height.output * width.output * BLOCK;
            let output = self.output.add(self.block * plane + (self.y * width.output + self.x) * BLOCK);
            let (low, high) = activation.bounds();
            for v in 0..VB {
                let first = self.block * BLOCK + v * I::LANES;
                let bias = bias.map_or(isa.zero(), |bias| load_bias(isa, bias, first));
                for m in 0..MR {
                    let value = vmath::clip(isa, isa.add(acc[m][0][v], bias), low, high);
                    isa.store(output.add(m * BLOCK + v * I::LANES), value);
                }
            }
            if !activation.clamps() {
                let width = MR * BLOCK;
                isa.outline(ApplyRows { activation, pointer: output, rows: 1, row_stride: 0, width });
            }
        }
    }

    /// With all columns there, and a whole tap row at a time.
    ///
    /// # Safety
    /// The image holds every column of every tap row; `b` the filter's block.
    #[inline(always)]
    unsafe fn row_by_row<I: Isa, R: Rows>(
        &self,
        isa: I,
        image: &Image,
        b: *const f32,
        rows: impl Fn(*const f32) -> R,
    ) -> Tile<I, MR, 1, VB> {
        let FirstShape { channels_in, height, width, .. } = self.problem.shape;
        let taps_y = height.taps_inside(self.y);
        let mut acc = [[[isa.zero(); VB]; 1]; MR];
        // SAFETY: the caller.
        unsafe {
            for channel in 0..channels_in {
                for (j, ky) in taps_y.clone().enumerate() {
                    let line = image.first.add(channel * image.channel_stride + j * image.row_stride);
                    let b = b.add((channel * height.kernel + ky) * width.kernel * BLOCK);
                    accumulate::<I, Floats, _, MR, 1, VB>(isa, &mut acc, rows(line), [b], BLOCK, width.kernel);
                }
            }
        }
        acc
    }

    /// With all columns there, tap by tap.
    ///
    /// # Safety
    /// As for `row_by_row`.
    #[inline(always)]
    unsafe fn dilated<I: Isa>(&self, isa: I, image: &Image, b: *const f32) -> Tile<I, MR, 1, VB> {
        let width = self.problem.shape.width;
        // SAFETY: the caller.
        unsafe { self.each_tap(isa, image, b, |line, kx, m| line.wrapping_add(m * width.stride + kx * width.dilation)) }
    }

    /// Tap by tap, columns outside of the input read as 0.
    ///
    /// # Safety
    /// The image holds whole input rows; `b` the filter's block.
    #[inline(always)]
    unsafe fn tap_by_tap<I: Isa>(&self, isa: I, image: &Image, b: *const f32) -> Tile<I, MR, 1, VB> {
        let width = self.problem.shape.width;
        let start = width.start(self.x);
        // SAFETY: the caller.
        unsafe {
            self.each_tap(isa, image, b, |line, kx, m| {
                let at = start + (m * width.stride + kx * width.dilation) as isize;
                if at >= 0 && at < width.input as isize { line.wrapping_offset(at) } else { &raw const ZERO }
            })
        }
    }

    /// # Safety
    /// `at(line, kx, m)` is readable for every line of the image; `b` holds the filter's block.
    #[inline(always)]
    unsafe fn each_tap<I: Isa>(
        &self,
        isa: I,
        image: &Image,
        b: *const f32,
        at: impl Fn(*const f32, usize, usize) -> *const f32,
    ) -> Tile<I, MR, 1, VB> {
        let FirstShape { channels_in, height, width, .. } = self.problem.shape;
        let taps_y = height.taps_inside(self.y);
        let mut acc = [[[isa.zero(); VB]; 1]; MR];
        // SAFETY: the caller.
        unsafe {
            for channel in 0..channels_in {
                for (j, ky) in taps_y.clone().enumerate() {
                    let line = image.first.add(channel * image.channel_stride + j * image.row_stride);
                    for kx in 0..width.kernel {
                        let mut pointers = [line; MR];
                        for (m, pointer) in pointers.iter_mut().enumerate() {
                            *pointer = at(line, kx, m);
                        }
                        let b = b.add(((channel * height.kernel + ky) * width.kernel + kx) * BLOCK);
                        accumulate::<I, Floats, _, MR, 1, VB>(isa, &mut acc, ScatteredRows(pointers), [b], BLOCK, 1);
                    }
                }
            }
        }
        acc
    }
}

#[cfg(test)]
mod tests {
    use super::super::conv::ConvShape;
    use super::super::conv::tests::{plain_conv, random_axis, unblocked};
    use super::super::testing::*;
    use super::*;

    #[test]
    fn first_layers_match_plain_loops_and_do_not_depend_on_ranges() {
        for level in levels() {
            let mut random = Random::new(7);
            for round in rounds(100) {
                let mut width = random_axis(&mut random, false);
                let mut height = if round % 6 == 0 { Axis::UNIT } else { random_axis(&mut random, false) };
                if round % 4 == 0 {
                    let side = random.between(30, 70);
                    (width.kernel, width.stride, width.dilation) = (random.pick(&[3, 7, 40]), 2, 1);
                    (width.input, width.pad_before) = (side, 3);
                    width.output = (side + 6 - width.kernel) / 2 + 1;
                    if round % 8 == 0 {
                        // Rows that reach further than the stack holds.
                        (width.stride, width.output) = (40, (side + 6 - width.kernel) / 40 + 1);
                    }
                    height = width;
                }
                let (channels_in, channels_out) = (random.between(1, 5), random.between(1, 50));
                let shape = FirstShape { channels_in, channels_out, height, width };
                let activation = ACTIVATIONS[round % ACTIVATIONS.len()];
                let pixels_out = height.output * width.output;
                let input = random.units(shape.input_len());
                let weights = random.units(channels_out * shape.depth());
                let bias = random.units(channels_out);
                let mut filter = vec![f32::NAN; packed_first_len(&shape)];
                pack_first(&shape, &weights, &mut filter);
                let bias_given = (round % 2 == 0).then_some(&bias[..]);
                let problem = First { shape, input: &input, filter: &filter, bias: bias_given, activation };
                let mut whole = vec![f32::NAN; shape.output_len()];
                let mut cut = whole.clone();
                let count = conv_first_units(&shape);
                conv_first(level, &problem, 0..count, Output::new(&mut whole));
                for units in random_cuts(&mut random, count) {
                    conv_first(level, &problem, units, Output::new(&mut cut));
                }
                assert_same_bits(level, &shape, &whole, &cut);
                let general = ConvShape { channels_in, channels_out, groups: 1, height, width, transposed: false };
                let mut expected = plain_conv(&general, &input, &weights);
                for (at, value) in expected.iter_mut().enumerate() {
                    *value = activate(activation, *value + bias_given.map_or(0.0, |b| b[at / pixels_out].into()));
                }
                // A chain of as many roundings as terms, of terms below 1.
                let tolerance = 2e-6 * (1.0 + (shape.depth() as f64).sqrt());
                let whole = unblocked(level, channels_out, pixels_out, &whole);
                assert_near(level, &(shape, activation), &whole, &expected, tolerance);
            }
        }
    }
}
