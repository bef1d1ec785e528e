//! Depthwise convolution (one input and one output channel per group) on `NCHW16c` images, one image at a time.
//!
//! Channels are lanes, so nothing crosses them. The sum of an output is one chain over taps, row by row; taps outside of the
//! input are skipped. Kernels of 3, 5 and 7 columns without dilation run eight pixels at a time, with each input vector
//! loaded once per kernel row; others pixel by pixel.

use std::ops::Range;

use super::conv::load_bias;
use super::dispatch::{Kernel, dispatch};
use super::epilogue::{Activation, ApplyRows, Output, Residual};
use super::isa::Isa;
use super::window::{Axis, Taps};
use super::{BLOCK, IsaLevel};

/// Sizes of a depthwise convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DepthwiseShape {
    pub channels: usize,
    pub height: Axis,
    pub width: Axis,
}

impl DepthwiseShape {
    /// Multiplications and additions of one image, those with padding included.
    pub fn operations(&self) -> u64 {
        let taps = self.height.kernel * self.width.kernel;
        2 * (self.channels * taps) as u64 * (self.height.output * self.width.output) as u64
    }

    /// Elements of a blocked input image.
    pub fn input_len(&self) -> usize {
        self.channels.div_ceil(BLOCK) * BLOCK * self.height.input * self.width.input
    }

    /// Elements of a blocked output image.
    pub fn output_len(&self) -> usize {
        self.channels.div_ceil(BLOCK) * BLOCK * self.height.output * self.width.output
    }
}

/// Elements of a packed depthwise filter.
pub fn packed_depthwise_len(shape: &DepthwiseShape) -> usize {
    shape.channels.div_ceil(BLOCK) * BLOCK * shape.height.kernel * shape.width.kernel
}

/// Packs weights `[C, 1, kh, kw]` as `[ceil(C/16)][kh][kw][16]`, lanes past the last channel 0. The same on every ISA.
pub fn pack_depthwise(shape: &DepthwiseShape, weights: &[f32], packed: &mut [f32]) {
    let taps = shape.height.kernel * shape.width.kernel;
    assert!(weights.len() >= shape.channels * taps, "{} weights for {shape:?}", weights.len());
    let packed = &mut packed[..packed_depthwise_len(shape)];
    packed.fill(0.0);
    for channel in 0..shape.channels {
        for tap in 0..taps {
            packed[(channel / BLOCK * taps + tap) * BLOCK + channel % BLOCK] = weights[channel * taps + tap];
        }
    }
}

/// A depthwise convolution of one image.
#[derive(Clone, Copy, Debug)]
pub struct Depthwise<'a> {
    pub shape: DepthwiseShape,
    /// `[ceil(C/16)][H][W][16]`.
    pub input: &'a [f32],
    /// As [`pack_depthwise`] leaves it.
    pub filter: &'a [f32],
    /// One value per channel.
    pub bias: Option<&'a [f32]>,
    pub residual: Residual<'a>,
    pub activation: Activation,
}

/// Units of work: (channel block, output row), rows fastest.
pub fn depthwise_units(shape: &DepthwiseShape) -> usize {
    if shape.width.output == 0 { 0 } else { shape.channels.div_ceil(BLOCK) * shape.height.output }
}

/// Computes a range of units. `output` is the whole image, `[ceil(C/16)][H'][W'][16]`.
pub fn depthwise(level: IsaLevel, problem: &Depthwise<'_>, units: Range<usize>, output: Output<'_>) {
    if units.is_empty() {
        return;
    }
    let shape = &problem.shape;
    shape.height.assert_valid();
    shape.width.assert_valid();
    assert!(units.end <= depthwise_units(shape), "units {units:?} of {shape:?}");
    assert!(problem.input.len() >= shape.input_len(), "input of {} for {shape:?}", problem.input.len());
    assert!(problem.filter.len() >= packed_depthwise_len(shape), "filter of {} for {shape:?}", problem.filter.len());
    assert!(output.len() >= shape.output_len(), "output of {} for {shape:?}", output.len());
    assert!(problem.bias.is_none_or(|bias| bias.len() >= shape.channels), "too few biases for {shape:?}");
    if let Residual::Slice(residual) = problem.residual {
        assert!(residual.len() >= shape.output_len(), "residual of {} for {shape:?}", residual.len());
    }
    dispatch(level, Rows { problem, units, output: output.pointer() });
}

struct Rows<'a> {
    problem: &'a Depthwise<'a>,
    units: Range<usize>,
    output: *mut f32,
}

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Depthwise { shape, input, filter, bias, residual, activation } = *self.problem;
        let (height, width) = (shape.height, shape.width);
        let mut unit = self.units.start;
        while unit < self.units.end {
            let (block, y) = (unit / height.output, unit % height.output);
            let rows = y..height.output.min(y + self.units.end - unit);
            unit += rows.len();
            let plane_offset = block * height.output * width.output * BLOCK;
            // SAFETY: the entry checked the lengths; the block is inside the shape.
            unsafe {
                Band {
                    height,
                    width,
                    rows,
                    input: input.as_ptr().add(block * height.input * width.input * BLOCK),
                    filter: filter.as_ptr().add(block * height.kernel * width.kernel * BLOCK),
                    bias: bias.map(|bias| &bias[block * BLOCK..]),
                    residual: match residual {
                        Residual::None => std::ptr::null(),
                        Residual::Slice(residual) => residual.as_ptr().add(plane_offset),
                        Residual::Output => self.output.add(plane_offset),
                    },
                    output: self.output.add(plane_offset),
                    activation,
                }
                .run(isa);
            }
        }
    }
}

/// Rows of one channel block.
pub(crate) struct Band<'a> {
    pub height: Axis,
    pub width: Axis,
    /// Of the output.
    pub rows: Range<usize>,
    /// Where the block's first input row is, or would be: only rows that `rows` read are.
    pub input: *const f32,
    /// `[kh][kw][16]`.
    pub filter: *const f32,
    /// From the block's first channel on.
    pub bias: Option<&'a [f32]>,
    /// Null, or as `output`.
    pub residual: *const f32,
    /// The block's first output row.
    pub output: *mut f32,
    pub activation: Activation,
}

/// Rows with a kernel of `KW` columns and a stride of `STEP`, dilation 1.
struct Fixed<'a, const KW: usize, const STEP: usize> {
    band: &'a Band<'a>,
    /// Pixels whose taps are all inside.
    interior: Range<usize>,
}

impl<const KW: usize, const STEP: usize> Kernel for Fixed<'_, KW, STEP> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Fixed { band, interior } = self;
        // Lanes innermost: a line that was read for one vector is at hand for the next.
        for y in band.rows.clone() {
            for lane in (0..BLOCK).step_by(I::LANES) {
                // SAFETY: the entry checked the lengths, and the pixels of `pixels` have all their columns inside.
                unsafe {
                    let row = band.row(isa, y, lane);
                    row.edge(isa, 0..interior.start);
                    let mut x = interior.start;
                    while x + 8 <= interior.end {
                        row.pixels::<KW, STEP, 8>(isa, x);
                        x += 8;
                    }
                    if x + 4 <= interior.end {
                        row.pixels::<KW, STEP, 4>(isa, x);
                        x += 4;
                    }
                    if x + 2 <= interior.end {
                        row.pixels::<KW, STEP, 2>(isa, x);
                        x += 2;
                    }
                    if x < interior.end {
                        row.pixels::<KW, STEP, 1>(isa, x);
                    }
                    row.edge(isa, interior.end..band.width.output);
                }
            }
        }
    }
}

/// Rows of any kernel.
struct General<'a>(&'a Band<'a>);

impl Kernel for General<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let band = self.0;
        for y in band.rows.clone() {
            for lane in (0..BLOCK).step_by(I::LANES) {
                // SAFETY: the entry checked the lengths.
                unsafe { band.row(isa, y, lane).edge(isa, 0..band.width.output) };
            }
        }
    }
}

impl Band<'_> {
    /// # Safety
    /// The operands hold what the fields say.
    #[inline(always)]
    pub unsafe fn run<I: Isa>(&self, isa: I) {
        let width = self.width;
        let first = width.pad_before.div_ceil(width.stride).min(width.output);
        let reach = (width.kernel - 1) * width.dilation + 1;
        let last = match (width.input + width.pad_before).checked_sub(reach) {
            Some(room) => (room / width.stride + 1).clamp(first, width.output),
            None => first,
        };
        let (band, interior) = (self, first..last);
        match (width.kernel, width.stride, width.dilation) {
            (3, 1, 1) => isa.outline(Fixed::<3, 1> { band, interior }),
            (3, 2, 1) => isa.outline(Fixed::<3, 2> { band, interior }),
            (5, 1, 1) => isa.outline(Fixed::<5, 1> { band, interior }),
            (5, 2, 1) => isa.outline(Fixed::<5, 2> { band, interior }),
            (7, 1, 1) => isa.outline(Fixed::<7, 1> { band, interior }),
            _ => isa.outline(General(band)),
        }
        if !self.activation.clamps() {
            let row = width.output * BLOCK;
            let (activation, width) = (self.activation, self.rows.len() * row);
            // SAFETY: the rows just written.
            let pointer = unsafe { self.output.add(self.rows.start * row) };
            isa.outline(ApplyRows { activation, pointer, rows: 1, row_stride: 0, width });
        }
    }

    /// # Safety
    /// The row is inside the output.
    #[inline(always)]
    unsafe fn row<I: Isa>(&self, isa: I, y: usize, lane: usize) -> Row<I> {
        let Band { height, width, .. } = *self;
        let taps = Taps::inside(&height, y);
        let row_len = width.input * BLOCK;
        let (low, high) = self.activation.bounds();
        let offset = y * width.output * BLOCK + lane;
        // SAFETY: the caller; without taps the input is not read.
        unsafe {
            Row {
                width,
                taps: taps.count,
                input: self.input.wrapping_offset(taps.input_first * row_len as isize + lane as isize),
                input_step: height.dilation * row_len,
                filter: self.filter.add(taps.first * width.kernel * BLOCK + lane),
                bias: self.bias.map_or(isa.zero(), |bias| load_bias(isa, bias, lane)),
                bounds: (isa.splat(low), isa.splat(high)),
                residual: if self.residual.is_null() { self.residual } else { self.residual.add(offset) },
                output: self.output.add(offset),
            }
        }
    }
}

/// One vector of channels of one output row.
struct Row<I: Isa> {
    width: Axis,
    /// Rows of the kernel that are inside the input.
    taps: usize,
    /// What the first of them reads, from the row's first pixel on, and how far the next is.
    input: *const f32,
    input_step: usize,
    /// The first of them.
    filter: *const f32,
    bias: I::V,
    bounds: (I::V, I::V),
    residual: *const f32,
    output: *mut f32,
}

impl<I: Isa> Row<I> {
    /// Pixels one by one, with the taps that are inside.
    ///
    /// # Safety
    /// The operands hold what the shape says; the pixels are inside the output.
    #[inline(always)]
    unsafe fn edge(&self, isa: I, pixels: Range<usize>) {
        let width = self.width;
        for x in pixels {
            let columns = width.taps_inside(x);
            let mut sum = isa.zero();
            // SAFETY: the caller; the taps are inside.
            unsafe {
                for j in 0..self.taps {
                    let line = self.input.wrapping_add(j * self.input_step);
                    let filter = self.filter.add(j * width.kernel * BLOCK);
                    for kx in columns.clone() {
                        let value = isa.load(line.wrapping_add(width.position(x, kx) * BLOCK));
                        sum = isa.fma(value, isa.load(filter.add(kx * BLOCK)), sum);
                    }
                }
                self.finish(isa, [sum], x);
            }
        }
    }

    /// `MR` pixels whose columns are all inside. A pixel's taps come in the order of `edge`.
    ///
    /// # Safety
    /// As for `edge`, and all columns of all taps are inside.
    #[inline(always)]
    unsafe fn pixels<const KW: usize, const STEP: usize, const MR: usize>(&self, isa: I, x: usize) {
        let mut sums = [isa.zero(); MR];
        let first = self.width.start(x) as usize * BLOCK;
        // SAFETY: the caller.
        unsafe {
            for j in 0..self.taps {
                let line = self.input.wrapping_add(j * self.input_step + first);
                let mut weights = [isa.zero(); KW];
                for (kx, weight) in weights.iter_mut().enumerate() {
                    *weight = isa.load(self.filter.add((j * KW + kx) * BLOCK));
                }
                if STEP == 1 {
                    // Each input vector is loaded once and goes to every pixel that it meets.
                    for column in 0..MR - 1 + KW {
                        let value = isa.load(line.add(column * BLOCK));
                        for m in 0..MR {
                            if column >= m && column - m < KW {
                                sums[m] = isa.fma(value, weights[column - m], sums[m]);
                            }
                        }
                    }
                } else {
                    for kx in 0..KW {
                        for m in 0..MR {
                            let value = isa.load(line.add((m * STEP + kx) * BLOCK));
                            sums[m] = isa.fma(value, weights[kx], sums[m]);
                        }
                    }
                }
            }
            self.finish(isa, sums, x);
        }
    }

    /// Bias, residual, clamp, store.
    ///
    /// # Safety
    /// The pixels are inside the output.
    #[inline(always)]
    unsafe fn finish<const MR: usize>(&self, isa: I, sums: [I::V; MR], x: usize) {
        for (m, sum) in sums.into_iter().enumerate() {
            let at = (x + m) * BLOCK;
            let mut value = isa.add(sum, self.bias);
            // SAFETY: the caller.
            unsafe {
                if !self.residual.is_null() {
                    value = isa.add(value, isa.load(self.residual.add(at)));
                }
                isa.store(self.output.add(at), isa.min(self.bounds.1, isa.max(self.bounds.0, value)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::conv::ConvShape;
    use super::super::conv::tests::{blocked, plain_conv, random_axis, unblocked};
    use super::super::testing::*;
    use super::*;

    #[test]
    fn depthwise_matches_plain_loops_and_does_not_depend_on_ranges() {
        for level in levels() {
            let mut random = Random::new(6);
            for round in rounds(100) {
                let channels = random.between(1, 40);
                let mut width = random_axis(&mut random, false);
                let mut height = if round % 6 == 0 { Axis::UNIT } else { random_axis(&mut random, false) };
                if round % 4 == 0 {
                    let side = random.between(3, 60);
                    (width.kernel, width.stride, width.dilation) = (3, 1, 1);
                    (width.input, width.output, width.pad_before) = (side, side, 1);
                    height = width;
                }
                let shape = DepthwiseShape { channels, height, width };
                let activation = ACTIVATIONS[round % ACTIVATIONS.len()];
                let (pixels_in, pixels_out) = (height.input * width.input, height.output * width.output);
                let taps = height.kernel * width.kernel;
                let input = random.units(channels * pixels_in);
                let weights = random.units(channels * taps);
                let bias = random.units(channels);
                let residual = random.units(channels * pixels_out);
                let mode = round % 3;
                let mut filter = vec![f32::NAN; packed_depthwise_len(&shape)];
                pack_depthwise(&shape, &weights, &mut filter);
                let blocked_input = blocked(level, channels, pixels_in, &input);
                let blocked_residual = blocked(level, channels, pixels_out, &residual);
                let problem = Depthwise {
                    shape,
                    input: &blocked_input,
                    filter: &filter,
                    bias: (round % 2 == 0).then_some(&bias),
                    residual: [Residual::None, Residual::Slice(&blocked_residual), Residual::Output][mode],
                    activation,
                };
                let mut whole = if mode == 2 { blocked_residual.clone() } else { vec![f32::NAN; shape.output_len()] };
                let mut cut = whole.clone();
                let count = depthwise_units(&shape);
                depthwise(level, &problem, 0..count, Output::new(&mut whole));
                for units in random_cuts(&mut random, count) {
                    depthwise(level, &problem, units, Output::new(&mut cut));
                }
                let whole = unblocked(level, channels, pixels_out, &whole);
                assert_same_bits(level, &shape, &whole, &unblocked(level, channels, pixels_out, &cut));
                let general = ConvShape {
                    channels_in: channels,
                    channels_out: channels,
                    groups: channels,
                    height,
                    width,
                    transposed: false,
                };
                let mut expected = plain_conv(&general, &input, &weights);
                for (at, value) in expected.iter_mut().enumerate() {
                    if round % 2 == 0 {
                        *value += f64::from(bias[at / pixels_out]);
                    }
                    if mode > 0 {
                        *value += f64::from(residual[at]);
                    }
                    *value = activate(activation, *value);
                }
                // A chain of at most 49 roundings of terms below 1.
                assert_near(level, &(shape, activation), &whole, &expected, 1e-5);
            }
        }
    }
}
