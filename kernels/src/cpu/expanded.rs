//! A pointwise convolution and the depthwise one that reads it, in one: what inverted residual blocks begin with (Sandler et al. 2018,
//! *MobileNetV2: Inverted Residuals and Linear Bottlenecks*).
//!
//! The expanded image, several times larger than what comes before and after it, is never whole: a unit of work is a block of
//! channels by a band of output rows, and expands the rows that the band reads into the workspace, where the second-level cache keeps them. Rows that
//! the band before has expanded already are kept. Each output is the same chain of operations as by [`super::conv`] and
//! [`super::depthwise`] one after the other.

use std::{marker::PhantomData, ops::Range};

use super::conv::{self, ConvShape, Operands};
use super::depthwise::{self, Band, DepthwiseShape};
use super::dispatch::{Kernel, dispatch, dispatch_bf16};
use super::epilogue::{Activation, Output};
use super::isa::Isa;
use super::pointwise::Strip;
use super::tile::{Floats, Pairs, Terms};
use super::window::Axis;
use super::{BLOCK, IsaLevel};

/// Floats of expanded rows that a unit holds at most, give or take.
const BAND_LEN: usize = 32 * 1024;

/// Sizes of the two convolutions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExpandedShape {
    /// Channels of the input.
    pub channels_in: usize,
    /// What reads the expanded image, which has its input's height, width and channels.
    pub depthwise: DepthwiseShape,
}

impl ExpandedShape {
    /// The first convolution alone.
    pub fn pointwise(&self) -> ConvShape {
        let side = |axis: Axis| Axis { input: axis.input, output: axis.input, ..Axis::UNIT };
        let DepthwiseShape { channels, height, width } = self.depthwise;
        let (height, width) = (side(height), side(width));
        ConvShape { channels_in: self.channels_in, channels_out: channels, groups: 1, height, width, transposed: false }
    }

    fn blocks(&self) -> usize {
        self.depthwise.channels.div_ceil(BLOCK)
    }

    /// Rows that `count` neighbouring outputs read, those outside of the image included.
    fn reach(&self, count: usize) -> usize {
        let Axis { stride, kernel, dilation, .. } = self.depthwise.height;
        (count - 1) * stride + (kernel - 1) * dilation + 1
    }

    /// Output rows of a band at most.
    fn band_rows(&self) -> usize {
        let DepthwiseShape { height, width, .. } = self.depthwise;
        let rows = (BAND_LEN / (width.input * BLOCK).max(1)).saturating_sub(self.reach(1)) / height.stride + 1;
        // As equal as can be.
        height.output.div_ceil(height.output.div_ceil(rows).max(1)).max(1)
    }

    fn bands(&self) -> usize {
        self.depthwise.height.output.div_ceil(self.band_rows())
    }

    /// Rows of the expanded image that output rows read.
    fn rows_read(&self, outputs: &Range<usize>) -> Range<usize> {
        let height = self.depthwise.height;
        let start = height.start(outputs.start).max(0) as usize;
        let end = (outputs.start * height.stride + self.reach(outputs.len())).saturating_sub(height.pad_before);
        start.min(height.input)..end.clamp(start.min(height.input), height.input)
    }
}

/// Both convolutions of one image.
#[derive(Clone, Copy, Debug)]
pub struct Expanded<'a> {
    pub shape: ExpandedShape,
    /// What the input and the pointwise convolution's filter are held in.
    pub operands: Operands,
    /// `[ceil(I/16)][H][W][16]`.
    pub input: &'a [f32],
    /// Of the pointwise convolution, as [`conv::pack_filter`] leaves it, with its bias (a value per channel) and what follows it.
    pub expand_filter: &'a [f32],
    pub expand_bias: Option<&'a [f32]>,
    pub expand_activation: Activation,
    /// Of the depthwise convolution, as [`depthwise::pack_depthwise`] leaves it.
    pub filter: &'a [f32],
    pub bias: Option<&'a [f32]>,
    pub activation: Activation,
}

/// Units of work: (block of channels, band of rows), bands fastest.
pub fn expanded_units(shape: &ExpandedShape) -> usize {
    let DepthwiseShape { height, width, .. } = shape.depthwise;
    if height.output == 0 || width.output == 0 { 0 } else { shape.blocks() * shape.bands() }
}

/// Elements of workspace that [`expanded`] needs on each thread.
pub fn expanded_workspace_len(shape: &ExpandedShape) -> usize {
    shape.reach(shape.band_rows()).min(shape.depthwise.height.input) * shape.depthwise.width.input * BLOCK
}

/// Computes a range of units. `output` is the depthwise convolution's whole image, `[ceil(C/16)][H'][W'][16]`.
pub fn expanded(
    level: IsaLevel,
    problem: &Expanded<'_>,
    units: Range<usize>,
    output: Output<'_>,
    workspace: &mut [f32],
) {
    if units.is_empty() {
        return;
    }
    let shape = &problem.shape;
    let DepthwiseShape { channels, height, width } = shape.depthwise;
    height.assert_valid();
    width.assert_valid();
    let pointwise = shape.pointwise();
    assert!(units.end <= expanded_units(shape), "units {units:?} of {shape:?}");
    let words = |values| problem.operands.words(values);
    assert!(problem.input.len() >= words(pointwise.input_len()), "input of {} for {shape:?}", problem.input.len());
    let (expand_filter, filter) = (problem.expand_filter.len(), problem.filter.len());
    assert!(expand_filter >= words(conv::packed_filter_len(&pointwise)), "filter of {expand_filter} for {pointwise:?}");
    assert!(filter >= depthwise::packed_depthwise_len(&shape.depthwise), "filter of {filter} for {shape:?}");
    assert!(output.len() >= shape.depthwise.output_len(), "output of {} for {shape:?}", output.len());
    for bias in [problem.expand_bias, problem.bias].into_iter().flatten() {
        assert!(bias.len() >= channels, "too few biases for {shape:?}");
    }
    assert!(workspace.len() >= expanded_workspace_len(shape), "workspace of {} elements", workspace.len());
    let output = output.pointer();
    match problem.operands {
        Operands::F32 => dispatch(level, Bands { problem, units, output, workspace, of: PhantomData::<Floats> }),
        Operands::Bf16 => dispatch_bf16(level, Bands { problem, units, output, workspace, of: PhantomData::<Pairs> }),
    }
}

struct Bands<'a, T> {
    problem: &'a Expanded<'a>,
    units: Range<usize>,
    output: *mut f32,
    workspace: &'a mut [f32],
    of: PhantomData<T>,
}

impl<T: Terms> Kernel for Bands<'_, T> {
    type Output = ();
    const OF_HALVES: bool = T::OF_HALVES;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Expanded { shape, input, expand_filter, expand_bias, expand_activation, filter, bias, activation, .. } =
            *self.problem;
        let DepthwiseShape { height, width, .. } = shape.depthwise;
        let (bands, band_rows, row_len) = (shape.bands(), shape.band_rows(), width.input * BLOCK);
        let (blocks_in, row_words) = (shape.channels_in.div_ceil(BLOCK), width.input * T::WORDS);
        let rows = self.workspace.as_mut_ptr();
        // The rows that the workspace holds, and of which block.
        let mut held = (usize::MAX, 0..0);
        for unit in self.units {
            let (block, band) = (unit / bands, unit % bands);
            let outputs = band * band_rows..height.output.min((band + 1) * band_rows);
            let read = shape.rows_read(&outputs);
            let kept = if held.0 == block { read.start.max(held.1.start)..held.1.end.min(read.end) } else { 0..0 };
            let first_new = if kept.is_empty() || kept.start != read.start { read.start } else { kept.end };
            // SAFETY: the entry checked the lengths; block and rows are inside the shape, and the workspace holds what a band reads.
            unsafe {
                if first_new > read.start {
                    let from = rows.add((read.start - held.1.start) * row_len);
                    std::ptr::copy(from, rows, (first_new - read.start) * row_len);
                }
                let first_out = block * BLOCK;
                let pixels = (read.end - first_new) * width.input;
                isa.outline(Strip {
                    input: input.as_ptr().add(first_new * row_words),
                    input_block_stride: height.input * row_words,
                    words_in: shape.channels_in.div_ceil(BLOCK / T::WORDS),
                    filter: expand_filter.as_ptr().add(block * blocks_in * T::WORDS * BLOCK),
                    outputs: shape.depthwise.channels - first_out,
                    bias: expand_bias.map(|bias| &bias[first_out..shape.depthwise.channels]),
                    residual: std::ptr::null(),
                    activation: expand_activation,
                    output: rows.add((first_new - read.start) * row_len),
                    pixels,
                    of: PhantomData::<T>,
                });
                held = (block, read.clone());
                let plane_offset = block * height.output * width.output * BLOCK;
                Band {
                    height,
                    width,
                    rows: outputs,
                    // Where the image's first row would be.
                    input: rows.wrapping_sub(read.start * row_len),
                    filter: filter.as_ptr().add(block * height.kernel * width.kernel * BLOCK),
                    bias: bias.map(|bias| &bias[first_out..]),
                    residual: std::ptr::null(),
                    output: self.output.add(plane_offset),
                    activation,
                }
                .run(isa);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::conv::tests::{blocked, filter as held_filter, held, random_axis, unblocked};
    use super::super::conv::{Conv, conv, conv_units};
    use super::super::depthwise::{Depthwise, depthwise, depthwise_units, pack_depthwise, packed_depthwise_len};
    use super::super::epilogue::Residual;
    use super::super::testing::*;
    use super::*;

    /// Of one convolution after the other, which their own tests compare with plain loops.
    #[test]
    fn both_in_one_are_one_after_the_other_and_do_not_depend_on_ranges() {
        for (level, operands) in levels().flat_map(|level| operands(level).map(move |operands| (level, operands))) {
            let mut random = Random::new(8);
            for round in rounds(80) {
                let (channels_in, channels) = (random.between(1, 40), random.between(2, 50));
                let (mut height, mut width) = (random_axis(&mut random, false), random_axis(&mut random, false));
                if round % 4 == 0 {
                    // Of several bands.
                    let (kernel, stride) = (random.pick(&[3, 5]), random.between(1, 2));
                    let pad = kernel / 2;
                    let side = |input: usize| Axis {
                        input,
                        output: (input + 2 * pad - kernel) / stride + 1,
                        kernel,
                        stride,
                        dilation: 1,
                        pad_before: pad,
                        pad_after: pad,
                    };
                    (height, width) = (side(random.between(30, 60)), side(random.between(100, 150)));
                }
                let shape = ExpandedShape { channels_in, depthwise: DepthwiseShape { channels, height, width } };
                let pointwise = shape.pointwise();
                let activations = [ACTIVATIONS[round % ACTIVATIONS.len()], ACTIVATIONS[round / 3 % ACTIVATIONS.len()]];
                let (pixels_in, pixels_out) = (height.input * width.input, height.output * width.output);
                let input = blocked(level, channels_in, pixels_in, &random.units(channels_in * pixels_in));
                let input = held(level, operands, channels_in, pixels_in, &input);
                let expand_filter = held_filter(level, operands, &pointwise, &random.units(channels_in * channels));
                let mut filter = vec![f32::NAN; packed_depthwise_len(&shape.depthwise)];
                pack_depthwise(&shape.depthwise, &random.units(channels * height.kernel * width.kernel), &mut filter);
                let biases = [random.units(channels), random.units(channels)];
                let [expand_bias, bias] = [0, 1].map(|i| (round % (2 + i) == 0).then_some(&biases[i][..]));

                let mut between = vec![f32::NAN; pointwise.output_len()];
                let first = Conv {
                    shape: pointwise,
                    operands,
                    input: &input,
                    filter: &expand_filter,
                    bias: expand_bias,
                    residual: Residual::None,
                    activation: activations[0],
                };
                conv(level, &first, 0..conv_units(level, &pointwise, operands), Output::new(&mut between));
                let second = Depthwise {
                    shape: shape.depthwise,
                    input: &between,
                    filter: &filter,
                    bias,
                    residual: Residual::None,
                    activation: activations[1],
                };
                let mut expected = vec![f32::NAN; shape.depthwise.output_len()];
                let units = depthwise_units(&shape.depthwise);
                depthwise(level, &second, 0..units, Output::new(&mut expected));
                let expected = unblocked(level, channels, pixels_out, &expected);

                let problem = Expanded {
                    shape,
                    operands,
                    input: &input,
                    expand_filter: &expand_filter,
                    expand_bias,
                    expand_activation: activations[0],
                    filter: &filter,
                    bias,
                    activation: activations[1],
                };
                let mut workspace = vec![f32::NAN; expanded_workspace_len(&shape)];
                let count = expanded_units(&shape);
                for _ in 0..2 {
                    let mut output = vec![f32::NAN; shape.depthwise.output_len()];
                    for units in random_cuts(&mut random, count) {
                        expanded(level, &problem, units, Output::new(&mut output), &mut workspace);
                    }
                    assert_same_bits(level, &shape, &expected, &unblocked(level, channels, pixels_out, &output));
                }
            }
        }
    }
}
