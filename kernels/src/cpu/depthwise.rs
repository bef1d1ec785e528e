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
use super::window::Axis;
use super::{BLOCK, IsaLevel, vmath};

/// Sizes of a depthwise convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DepthwiseShape {
    pub channels: usize,
    pub height: Axis,
    pub width: Axis,
}

impl DepthwiseShape {
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
        // Pixels whose taps are all inside, as a range.
        let first = width.pad_before.div_ceil(width.stride).min(width.output);
        let reach = (width.kernel - 1) * width.dilation + 1;
        let last = match (width.input + width.pad_before).checked_sub(reach) {
            Some(room) => (room / width.stride + 1).clamp(first, width.output),
            None => first,
        };
        let mut unit = self.units.start;
        while unit < self.units.end {
            let (block, y) = (unit / height.output, unit % height.output);
            let rows = y..height.output.min(y + self.units.end - unit);
            unit += rows.len();
            let plane_offset = block * height.output * width.output * BLOCK;
            // SAFETY: the entry checked the lengths; the block is inside the shape.
            let band = unsafe {
                Band {
                    height,
                    width,
                    rows,
                    interior: first..last,
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
            };
            match (width.kernel, width.stride, width.dilation) {
                (3, 1, 1) => isa.outline(Fixed::<3, 1>(&band)),
                (3, 2, 1) => isa.outline(Fixed::<3, 2>(&band)),
                (5, 1, 1) => isa.outline(Fixed::<5, 1>(&band)),
                (5, 2, 1) => isa.outline(Fixed::<5, 2>(&band)),
                (7, 1, 1) => isa.outline(Fixed::<7, 1>(&band)),
                _ => isa.outline(General(&band)),
            }
            if !activation.clamps() {
                let row = width.output * BLOCK;
                // SAFETY: the rows just written.
                let pointer = unsafe { band.output.add(band.rows.start * row) };
                let width = band.rows.len() * row;
                isa.outline(ApplyRows { activation, pointer, rows: 1, row_stride: 0, width });
            }
        }
    }
}

/// Rows of one channel block.
struct Band<'a> {
    height: Axis,
    width: Axis,
    rows: Range<usize>,
    interior: Range<usize>,
    input: *const f32,
    filter: *const f32,
    bias: Option<&'a [f32]>,
    residual: *const f32,
    output: *mut f32,
    activation: Activation,
}

/// Rows with a kernel of `KW` columns and a stride of `STEP`, dilation 1.
struct Fixed<'a, const KW: usize, const STEP: usize>(&'a Band<'a>);

impl<const KW: usize, const STEP: usize> Kernel for Fixed<'_, KW, STEP> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let band = self.0;
        for lane in (0..BLOCK).step_by(I::LANES) {
            for y in band.rows.clone() {
                // SAFETY: the entry checked the lengths, and the pixels of `pixels` have all their columns inside.
                unsafe {
                    band.edge(isa, y, 0..band.interior.start, lane);
                    let mut x = band.interior.start;
                    while x + 8 <= band.interior.end {
                        band.pixels::<I, KW, STEP, 8>(isa, y, x, lane);
                        x += 8;
                    }
                    if x + 4 <= band.interior.end {
                        band.pixels::<I, KW, STEP, 4>(isa, y, x, lane);
                        x += 4;
                    }
                    if x + 2 <= band.interior.end {
                        band.pixels::<I, KW, STEP, 2>(isa, y, x, lane);
                        x += 2;
                    }
                    if x < band.interior.end {
                        band.pixels::<I, KW, STEP, 1>(isa, y, x, lane);
                    }
                    band.edge(isa, y, band.interior.end..band.width.output, lane);
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
        for lane in (0..BLOCK).step_by(I::LANES) {
            for y in self.0.rows.clone() {
                // SAFETY: the entry checked the lengths.
                unsafe { self.0.edge(isa, y, 0..self.0.width.output, lane) };
            }
        }
    }
}

impl Band<'_> {
    /// Pixels one by one, with the taps that are inside.
    ///
    /// # Safety
    /// The operands hold what the shape says; the pixels are inside the output.
    #[inline(always)]
    unsafe fn edge<I: Isa>(&self, isa: I, y: usize, pixels: Range<usize>, lane: usize) {
        let Band { height, width, .. } = self;
        for x in pixels {
            let (start_y, start_x) = (height.start(y), width.start(x));
            let taps_x = width.taps_inside(x);
            let mut sum = isa.zero();
            // SAFETY: the caller; the taps are inside.
            unsafe {
                for ky in height.taps_inside(y) {
                    let row = (start_y + (ky * height.dilation) as isize) as usize;
                    for kx in taps_x.clone() {
                        let column = (start_x + (kx * width.dilation) as isize) as usize;
                        let value = isa.load(self.input.add((row * width.input + column) * BLOCK + lane));
                        let weight = isa.load(self.filter.add((ky * width.kernel + kx) * BLOCK + lane));
                        sum = isa.fma(value, weight, sum);
                    }
                }
                self.finish(isa, [sum], y, x, lane);
            }
        }
    }

    /// `MR` pixels whose columns are all inside: each input vector is loaded once and goes to every pixel that it meets.
    ///
    /// # Safety
    /// As for `edge`, and all columns of all taps are inside.
    #[inline(always)]
    unsafe fn pixels<I: Isa, const KW: usize, const STEP: usize, const MR: usize>(
        &self,
        isa: I,
        y: usize,
        x: usize,
        lane: usize,
    ) {
        let Band { height, width, .. } = self;
        let (start_y, start_x) = (height.start(y), width.start(x));
        let mut sums = [isa.zero(); MR];
        // SAFETY: the caller; the rows are inside.
        unsafe {
            for ky in height.taps_inside(y) {
                let row = (start_y + (ky * height.dilation) as isize) as usize;
                let line = self.input.add((row * width.input + start_x as usize) * BLOCK + lane);
                let mut weights = [isa.zero(); KW];
                for (kx, weight) in weights.iter_mut().enumerate() {
                    *weight = isa.load(self.filter.add((ky * KW + kx) * BLOCK + lane));
                }
                for column in 0..(MR - 1) * STEP + KW {
                    let value = isa.load(line.add(column * BLOCK));
                    for m in 0..MR {
                        // A pixel meets its columns in ascending order, so its taps come in the order of `edge`.
                        if column >= m * STEP && column - m * STEP < KW {
                            sums[m] = isa.fma(value, weights[column - m * STEP], sums[m]);
                        }
                    }
                }
            }
            self.finish(isa, sums, y, x, lane);
        }
    }

    /// Bias, residual, clamp, store.
    ///
    /// # Safety
    /// The pixels are inside the output.
    #[inline(always)]
    unsafe fn finish<I: Isa, const MR: usize>(&self, isa: I, sums: [I::V; MR], y: usize, x: usize, lane: usize) {
        let bias = self.bias.map_or(isa.zero(), |bias| load_bias(isa, bias, lane));
        let (low, high) = self.activation.bounds();
        for (m, sum) in sums.into_iter().enumerate() {
            let at = (y * self.width.output + x + m) * BLOCK + lane;
            let mut value = isa.add(sum, bias);
            // SAFETY: the caller.
            unsafe {
                if !self.residual.is_null() {
                    value = isa.add(value, isa.load(self.residual.add(at)));
                }
                isa.store(self.output.add(at), vmath::clip(isa, value, low, high));
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
