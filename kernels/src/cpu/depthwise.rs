//! Depthwise convolution (one input and one output channel per group) on `NCHW16c` images, one image at a time.
//!
//! Channels are lanes, so nothing crosses them. The sum of an output is one chain over taps, row by row. A row's tile reads
//! each tap's pixels once per vector; at the left and right edges taps outside are skipped.

use std::ops::Range;

use super::conv::load_bias;
use super::dispatch::{Kernel, dispatch};
use super::epilogue::{Activation, ApplyRows, Output, Residual};
use super::isa::Isa;
use super::tile::pieces;
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

/// Pixels of a tile: accumulators, with registers left for the tap and the loads.
#[inline(always)]
const fn tile_pixels<I: Isa>() -> usize {
    if I::REGISTERS == 32 { 14 } else { 7 }
}

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Depthwise { shape, input, filter, bias, residual, activation } = *self.problem;
        let (height, width) = (shape.height, shape.width);
        for unit in self.units {
            let (block, y) = (unit / height.output, unit % height.output);
            let row_offset = (block * height.output + y) * width.output * BLOCK;
            // SAFETY: the entry checked the lengths; block and row are inside the shape.
            let row = unsafe {
                Row {
                    width: &width,
                    height: &height,
                    y,
                    input: input.as_ptr().add(block * height.input * width.input * BLOCK),
                    filter: filter.as_ptr().add(block * height.kernel * width.kernel * BLOCK),
                    bias: bias.map(|bias| &bias[block * BLOCK..]),
                    residual: match residual {
                        Residual::None => std::ptr::null(),
                        Residual::Slice(residual) => residual.as_ptr().add(row_offset),
                        Residual::Output => self.output.add(row_offset),
                    },
                    output: self.output.add(row_offset),
                    activation,
                }
            };
            for piece in pieces(width.output, tile_pixels::<I>()) {
                let x = piece.start;
                macro_rules! tiles {
                    ($($pixels:literal)+) => {
                        match piece.len() {
                            $($pixels if $pixels <= tile_pixels::<I>() => {
                                isa.outline(Pixels::<$pixels> { row: &row, x })
                            })+
                            _ => unreachable!("pieces are at most a tile's pixels"),
                        }
                    };
                }
                tiles!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
            }
            if !activation.clamps() {
                let (pointer, width) = (row.output, width.output * BLOCK);
                isa.outline(ApplyRows { activation, pointer, rows: 1, row_stride: 0, width });
            }
        }
    }
}

struct Row<'a> {
    width: &'a Axis,
    height: &'a Axis,
    y: usize,
    input: *const f32,
    filter: *const f32,
    bias: Option<&'a [f32]>,
    residual: *const f32,
    output: *mut f32,
    activation: Activation,
}

struct Pixels<'a, const MR: usize> {
    row: &'a Row<'a>,
    x: usize,
}

impl<const MR: usize> Kernel for Pixels<'_, MR> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Row { width, height, .. } = *self.row;
        let taps_y = height.taps_inside(self.row.y);
        let start = width.start(self.x);
        let last = start + ((MR - 1) * width.stride + (width.kernel - 1) * width.dilation) as isize;
        let interior = start >= 0 && last < width.input as isize;
        for lane in (0..BLOCK).step_by(I::LANES) {
            let mut acc = [isa.zero(); MR];
            // SAFETY: the entry checked the lengths; tap rows are inside, columns are checked here.
            unsafe {
                for ky in taps_y.clone() {
                    let y = (height.start(self.row.y) + (ky * height.dilation) as isize) as usize;
                    let line = self.row.input.add(y * width.input * BLOCK + lane);
                    let filter = self.row.filter.add(ky * width.kernel * BLOCK + lane);
                    if interior {
                        let line = line.add(start as usize * BLOCK);
                        if width.stride == 1 {
                            tap_row::<I, MR, 1>(isa, &mut acc, line, filter, 1, width);
                        } else if width.stride == 2 {
                            tap_row::<I, MR, 2>(isa, &mut acc, line, filter, 2, width);
                        } else {
                            tap_row::<I, MR, 0>(isa, &mut acc, line, filter, width.stride, width);
                        }
                    } else {
                        for kx in 0..width.kernel {
                            let weight = isa.load(filter.add(kx * BLOCK));
                            for (m, sum) in acc.iter_mut().enumerate() {
                                let at = start + (m * width.stride + kx * width.dilation) as isize;
                                if at >= 0 && at < width.input as isize {
                                    *sum = isa.fma(isa.load(line.offset(at * BLOCK as isize)), weight, *sum);
                                }
                            }
                        }
                    }
                }
                let bias = self.row.bias.map_or(isa.zero(), |bias| load_bias(isa, bias, lane));
                let (low, high) = self.row.activation.bounds();
                for (m, sum) in acc.into_iter().enumerate() {
                    let at = (self.x + m) * BLOCK + lane;
                    let mut value = isa.add(sum, bias);
                    if !self.row.residual.is_null() {
                        value = isa.add(value, isa.load(self.row.residual.add(at)));
                    }
                    isa.store(self.row.output.add(at), vmath::clip(isa, value, low, high));
                }
            }
        }
    }
}

/// One row of taps for pixels whose taps are all inside; `STEP` is the stride, or 0 for the one given.
///
/// # Safety
/// All taps of the `MR` pixels are readable from `line` on, and the filter's row.
#[inline(always)]
unsafe fn tap_row<I: Isa, const MR: usize, const STEP: usize>(
    isa: I,
    acc: &mut [I::V; MR],
    line: *const f32,
    filter: *const f32,
    stride: usize,
    width: &Axis,
) {
    let step = if STEP == 0 { stride } else { STEP };
    let mut sums = *acc;
    for kx in 0..width.kernel {
        // SAFETY: the caller.
        unsafe {
            let weight = isa.load(filter.add(kx * BLOCK));
            let from = line.add(kx * width.dilation * BLOCK);
            for m in 0..MR {
                sums[m] = isa.fma(isa.load(from.add(m * step * BLOCK)), weight, sums[m]);
            }
        }
    }
    *acc = sums;
}

#[cfg(test)]
mod tests {
    use super::super::conv::ConvShape;
    use super::super::conv::tests::{blocked, plain_conv, random_axis, unblocked};
    use super::super::testing::*;
    use super::*;

    #[test]
    fn depthwise_matches_plain_loops_and_does_not_depend_on_ranges() {
        for level in IsaLevel::available() {
            let mut random = Random::new(6);
            for round in 0..100 {
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
