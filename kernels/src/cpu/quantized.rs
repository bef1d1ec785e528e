//! Quantized values, element by element and window by window: to and from floats, through tables, sums, pools, depthwise convolutions.
//!
//! A quantized value is a byte, signed or not, less a zero point, times a scale. Windows slide over channels-last images. Plain loops: compilers
//! make vectors of them on every rung.

use std::ops::Range;

use super::IsaLevel;
use super::conv::Axis;
use super::dispatch::{Kernel, dispatch};
use super::epilogue::Output;
use super::isa::Isa;
use super::quantized_product::{ProductShape, Quantized, quantized};

/// How floats become bytes: divided by the scale, rounded to nearest even, the zero point added, saturated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantization {
    pub scale: f32,
    pub zero_point: i32,
    pub signed: bool,
}

impl Quantization {
    /// The least and the greatest byte, less the zero point.
    pub fn bounds(&self) -> (f32, f32) {
        let (least, most) = if self.signed { (-128, 127) } else { (0, 255) };
        ((least - self.zero_point) as f32, (most - self.zero_point) as f32)
    }
}

/// Runs a closure compiled for a rung.
struct Loop<F>(F);

impl<F: FnOnce()> Kernel for Loop<F> {
    type Output = ();
    #[inline(always)]
    fn eval<I: Isa>(self, _: I) {
        (self.0)()
    }
}

/// The part of an output that a range is, for this call to write alone.
fn part<'a, T>(output: &Output<'a, T>, range: &Range<usize>) -> &'a mut [T] {
    assert!(range.start <= range.end && range.end <= output.len(), "{range:?} of {} elements", output.len());
    // SAFETY: inside; an output's ranges are written by one caller each.
    unsafe { std::slice::from_raw_parts_mut(output.pointer().add(range.start), range.len()) }
}

/// Quantizes a range of elements.
pub fn quantize(level: IsaLevel, input: &[f32], to: Quantization, range: Range<usize>, output: Output<'_, u8>) {
    let (input, output) = (&input[range.clone()], part(&output, &range));
    let (low, high) = to.bounds();
    dispatch(
        level,
        Loop(
            #[inline(always)]
            || {
                for (y, &x) in output.iter_mut().zip(input) {
                    *y = quantized(x / to.scale, low, high, to.zero_point);
                }
            },
        ),
    );
}

/// Floats of a range of elements.
pub fn dequantize(level: IsaLevel, input: Quantized<'_>, scale: f32, range: Range<usize>, output: Output<'_>) {
    let (flip, zero_point) = input.unsigned();
    let (input, output) = (&input.bytes[range.clone()], part(&output, &range));
    dispatch(
        level,
        Loop(
            #[inline(always)]
            || {
                for (y, &x) in output.iter_mut().zip(input) {
                    *y = (i32::from(x ^ flip) - zero_point) as f32 * scale;
                }
            },
        ),
    );
}

/// What a table says of every byte of a range.
pub fn look_up(table: &[u8; 256], input: &[u8], range: Range<usize>, output: Output<'_, u8>) {
    for (y, &x) in part(&output, &range).iter_mut().zip(&input[range.clone()]) {
        *y = table[usize::from(x)];
    }
}

/// The quantized sum of two: `scales` are those of a and b.
pub fn add(
    level: IsaLevel,
    [a, b]: [Quantized<'_>; 2],
    scales: [f32; 2],
    to: Quantization,
    range: Range<usize>,
    output: Output<'_, u8>,
) {
    let ([flip_a, flip_b], [zero_a, zero_b]) = ([a.unsigned().0, b.unsigned().0], [a.unsigned().1, b.unsigned().1]);
    let (a, b, output) = (&a.bytes[range.clone()], &b.bytes[range.clone()], part(&output, &range));
    let factors = scales.map(|s| s / to.scale);
    let (low, high) = to.bounds();
    dispatch(
        level,
        Loop(
            #[inline(always)]
            || {
                for ((y, &a), &b) in output.iter_mut().zip(a).zip(b) {
                    let (a, b) = (i32::from(a ^ flip_a) - zero_a, i32::from(b ^ flip_b) - zero_b);
                    *y = quantized(a as f32 * factors[0] + b as f32 * factors[1], low, high, to.zero_point);
                }
            },
        ),
    );
}

/// The least and the greatest of a range, 0 among them; NaN is passed over.
pub fn range_of(level: IsaLevel, input: &[f32], range: Range<usize>) -> (f32, f32) {
    let (mut low, mut high) = ([0f32; 16], [0f32; 16]);
    let input = &input[range];
    dispatch(
        level,
        Loop(
            #[inline(always)]
            || {
                let (whole, rest) = input.as_chunks::<16>();
                for x in whole {
                    for i in 0..16 {
                        low[i] = if x[i] < low[i] { x[i] } else { low[i] };
                        high[i] = if x[i] > high[i] { x[i] } else { high[i] };
                    }
                }
                for &x in rest {
                    low[0] = if x < low[0] { x } else { low[0] };
                    high[0] = if x > high[0] { x } else { high[0] };
                }
            },
        ),
    );
    (low.into_iter().fold(0.0, f32::min), high.into_iter().fold(0.0, f32::max))
}

/// What is made of a window, channel by channel; the shape's `groups` are its channels.
#[derive(Clone, Copy, Debug)]
pub enum WindowOp<'a> {
    /// A convolution of every channel with weights `[height][width][channels]` (integers, less their zero points): the sum times the channel's
    /// factor plus its offset, quantized; activations are in the bounds.
    Depthwise { weights: &'a [f32], factors: &'a [f32], offsets: &'a [f32], low: f32, high: f32, zero_point: i32 },
    /// The greatest byte, as it is.
    Max,
    /// The mean of what is in the image, or of the padding too (which is 0), times the factor, quantized.
    Average { count_padding: bool, factor: f32, to: Quantization },
}

/// Channels that a window is computed for at a time.
const CHANNELS: usize = 32;

/// Largest number of terms that a depthwise sum may have: below, every partial sum is an integer that `f32` holds.
pub const DEPTHWISE_TERMS: usize = (1 << 24) / (255 * 255);

/// Computes a range of output pixels.
pub fn windows(
    level: IsaLevel,
    shape: &ProductShape,
    op: WindowOp<'_>,
    input: Quantized<'_>,
    pixels: Range<usize>,
    output: Output<'_, u8>,
) {
    let channels = shape.channels_in;
    let taps = shape.height.kernel * shape.width.kernel;
    shape.height.assert_valid();
    shape.width.assert_valid();
    assert!(shape.channels_out == channels && pixels.end <= shape.rows(), "{pixels:?} of {shape:?}");
    assert!(input.bytes.len() >= shape.images * shape.height.input * shape.width.input * channels, "{shape:?}");
    assert!(output.len() >= shape.rows() * channels, "{} bytes of {shape:?}", output.len());
    if let WindowOp::Depthwise { weights, factors, offsets, .. } = op {
        let fits = weights.len() >= taps * channels && factors.len() >= channels && offsets.len() >= channels;
        assert!(fits && taps <= DEPTHWISE_TERMS, "{shape:?}");
    }
    dispatch(level, Windows { shape, op, input, pixels, output: output.pointer() })
}

struct Windows<'a> {
    shape: &'a ProductShape,
    op: WindowOp<'a>,
    input: Quantized<'a>,
    pixels: Range<usize>,
    output: *mut u8,
}

/// The positions of a window that lie in the image, of one axis.
#[inline(always)]
fn inside(axis: &Axis, at: usize) -> (Range<usize>, isize) {
    let first = (at * axis.stride) as isize - axis.pad_before as isize;
    let (dilation, input) = (axis.dilation as isize, axis.input as isize);
    let start = if first >= 0 { 0 } else { (-first).div_ceil_of(dilation) };
    let end = if first >= input { 0 } else { (input - first).div_ceil_of(dilation) };
    let end = end.clamp(0, axis.kernel as isize) as usize;
    ((start as usize).min(end)..end, first)
}

trait DivCeil {
    fn div_ceil_of(self, by: isize) -> isize;
}

impl DivCeil for isize {
    /// Of numbers that are not negative.
    #[inline(always)]
    fn div_ceil_of(self, by: isize) -> isize {
        (self + by - 1) / by
    }
}

impl Kernel for Windows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, _: I) {
        let Windows { shape, op, input, pixels, output } = self;
        let (height, width, channels) = (&shape.height, &shape.width, shape.channels_in);
        let (flip, zero_point) = input.unsigned();
        let zero = zero_point as f32;
        for pixel in pixels {
            let (image, oy, ox) =
                (pixel / (height.output * width.output), pixel / width.output % height.output, pixel % width.output);
            let ((rows, y0), (columns, x0)) = (inside(height, oy), inside(width, ox));
            let at = |ky: usize, kx: usize| {
                let y = (y0 + (ky * height.dilation) as isize) as usize;
                let x = (x0 + (kx * width.dilation) as isize) as usize;
                ((image * height.input + y) * width.input + x) * channels
            };
            // SAFETY: the entry checked the output's length.
            let to = unsafe { std::slice::from_raw_parts_mut(output.add(pixel * channels), channels) };
            for first in (0..channels).step_by(CHANNELS) {
                let count = CHANNELS.min(channels - first);
                let to = &mut to[first..first + count];
                match op {
                    WindowOp::Depthwise { weights, factors, offsets, low, high, zero_point } => {
                        let mut sums = [0f32; CHANNELS];
                        for ky in rows.clone() {
                            for kx in columns.clone() {
                                let from = &input.bytes[at(ky, kx) + first..][..count];
                                let weights = &weights[(ky * width.kernel + kx) * channels + first..][..count];
                                if let (Some(from), Some(weights)) =
                                    (from.first_chunk::<CHANNELS>(), weights.first_chunk::<CHANNELS>())
                                {
                                    multiply::<I>(&mut sums, from, weights, flip, zero);
                                } else {
                                    multiply::<I>(&mut sums[..count], from, weights, flip, zero);
                                }
                            }
                        }
                        let (factors, offsets) = (&factors[first..][..count], &offsets[first..][..count]);
                        for (((to, sum), factor), offset) in to.iter_mut().zip(&sums).zip(factors).zip(offsets) {
                            *to = quantized(sum * factor + offset, low, high, zero_point);
                        }
                    }
                    WindowOp::Max => {
                        let mut most = [0u8; CHANNELS];
                        for ky in rows.clone() {
                            for kx in columns.clone() {
                                let from = &input.bytes[at(ky, kx) + first..][..count];
                                most.iter_mut().zip(from).for_each(|(most, &x)| *most = (*most).max(x ^ flip));
                            }
                        }
                        to.iter_mut().zip(&most).for_each(|(to, &most)| *to = most ^ flip);
                    }
                    WindowOp::Average { count_padding, factor, to: quantization } => {
                        let mut sums = [0i32; CHANNELS];
                        for ky in rows.clone() {
                            for kx in columns.clone() {
                                let from = &input.bytes[at(ky, kx) + first..][..count];
                                sums.iter_mut()
                                    .zip(from)
                                    .for_each(|(sum, &x)| *sum += i32::from(x ^ flip) - zero_point);
                            }
                        }
                        let counted = match count_padding {
                            true => counted(height, oy) * counted(width, ox),
                            false => rows.len() * columns.len(),
                        };
                        let (low, high) = quantization.bounds();
                        for (to, &sum) in to.iter_mut().zip(&sums) {
                            *to = quantized(sum as f32 / counted as f32 * factor, low, high, quantization.zero_point);
                        }
                    }
                }
            }
        }
    }
}

/// Positions of a window that lie in the image or its padding.
#[inline(always)]
fn counted(axis: &Axis, at: usize) -> usize {
    let reach = axis.input + axis.pad_before + axis.pad_after;
    (0..axis.kernel).filter(|k| at * axis.stride + k * axis.dilation < reach).count()
}

#[inline(always)]
fn multiply<I: Isa>(sums: &mut [f32], from: &[u8], weights: &[f32], flip: u8, zero: f32) {
    for ((sum, &x), &weight) in sums.iter_mut().zip(from).zip(weights) {
        let x = f32::from(x ^ flip) - zero;
        // Exact either way: every product and sum is an integer below 2²⁴.
        *sum = if I::FUSED { x.mul_add(weight, *sum) } else { *sum + x * weight };
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn floats_become_bytes_and_come_back() {
        for level in IsaLevel::available() {
            let input = [-1.0f32, 0.0, 0.5, 1.5, 2.5, 300.0, -1e30, f32::NAN, f32::INFINITY];
            for (signed, zero_point) in [(false, 3), (true, -5)] {
                let to = Quantization { scale: 0.5, zero_point, signed };
                let mut output = [0u8; 9];
                for range in [0..4, 4..9] {
                    quantize(level, &input, to, range, Output::new(&mut output));
                }
                let value = |byte: u8| if signed { i32::from(byte as i8) } else { i32::from(byte) };
                let (least, most) = if signed { (-128, 127) } else { (0, 255) };
                for (&x, &y) in input.iter().zip(&output) {
                    let e = i128::from((f64::from(x) / 0.5).round_ties_even() as i64) + i128::from(zero_point);
                    assert_eq!(i128::from(value(y)), e.clamp(least, most), "{} {x}", level.name());
                }
                let mut back = [0f32; 9];
                dequantize(level, Quantized { bytes: &output, signed, zero_point }, 0.5, 0..9, Output::new(&mut back));
                for (&x, &y) in output.iter().zip(&back) {
                    assert_eq!(y, (value(x) - zero_point) as f32 * 0.5);
                }
                assert_eq!(range_of(level, &input, 0..9), (-1e30, f32::INFINITY));
                assert_eq!(range_of(level, &input, 2..5), (0.0, 2.5));
            }
        }
    }

    #[test]
    fn sums_and_tables() {
        let table: [u8; 256] = std::array::from_fn(|i| (i * 7) as u8);
        let bytes: Vec<u8> = (0..=255).collect();
        let mut output = vec![0u8; 256];
        look_up(&table, &bytes, 0..256, Output::new(&mut output));
        assert_eq!(output, table);
        for level in IsaLevel::available() {
            let a = Quantized { bytes: &bytes, signed: true, zero_point: 4 };
            let b = Quantized { bytes: &table, signed: false, zero_point: 100 };
            let to = Quantization { scale: 0.75, zero_point: 128, signed: false };
            add(level, [a, b], [0.5, 0.25], to, 0..256, Output::new(&mut output));
            for i in 0..256 {
                let x = (f64::from(bytes[i] as i8) - 4.0) * 0.5 + (f64::from(table[i]) - 100.0) * 0.25;
                let e = ((x / 0.75).round() + 128.0).clamp(0.0, 255.0);
                assert!((f64::from(output[i]) - e).abs() <= 1.0, "{} {i}: {} {e}", level.name(), output[i]);
            }
        }
    }

    #[test]
    fn windows_slide_over_channels() {
        for level in IsaLevel::available() {
            let mut random = Random::new(61);
            for _ in 0..60 {
                let mut axis = |input: usize| {
                    let (kernel, stride, dilation) = (random.between(1, 3), random.between(1, 2), random.between(1, 2));
                    let (pad_before, pad_after) = (random.between(0, kernel - 1), random.between(0, kernel - 1));
                    let span = (kernel - 1) * dilation + 1;
                    let output = (input + pad_before + pad_after).saturating_sub(span) / stride + 1;
                    Axis { input, output, kernel, stride, dilation, pad_before, pad_after }
                };
                let (height, width) = (axis(7), axis(6));
                let channels = random.pick(&[1, 5, 31, 32, 40, 70]);
                let shape = ProductShape {
                    images: 2,
                    height,
                    width,
                    channels_in: channels,
                    channels_out: channels,
                    groups: channels,
                };
                let bytes: Vec<u8> = (0..2 * 42 * channels).map(|_| random.bits() as u8).collect();
                let signed = random.between(0, 1) == 1;
                let zero_point = if signed { -3 } else { 117 };
                let input = Quantized { bytes: &bytes, signed, zero_point };
                let weights: Vec<f32> = (0..9 * channels).map(|_| f32::from(random.bits() as i8)).collect();
                let (factors, offsets) = (vec![0.01; channels], random.units(channels));
                let to = Quantization { scale: 1.0, zero_point: 30, signed: false };
                let (low, high) = to.bounds();
                let ops = [
                    WindowOp::Depthwise {
                        weights: &weights,
                        factors: &factors,
                        offsets: &offsets,
                        low,
                        high,
                        zero_point: 30,
                    },
                    WindowOp::Max,
                    WindowOp::Average { count_padding: false, factor: 0.5, to },
                    WindowOp::Average { count_padding: true, factor: 0.5, to },
                ];
                for op in ops {
                    let mut output = vec![0u8; shape.rows() * channels];
                    for pixels in random_cuts(&mut random, shape.rows()) {
                        windows(level, &shape, op, input, pixels, Output::new(&mut output));
                    }
                    for (i, &actual) in output.iter().enumerate() {
                        let (row, c) = (i / channels, i % channels);
                        let (image, oy, ox) = (
                            row / (height.output * width.output),
                            row / width.output % height.output,
                            row % width.output,
                        );
                        let (mut values, mut counted, mut sum) = (Vec::new(), 0, 0.0);
                        for ky in 0..height.kernel {
                            for kx in 0..width.kernel {
                                let (y, x) = (
                                    oy * height.stride + ky * height.dilation,
                                    ox * width.stride + kx * width.dilation,
                                );
                                counted += usize::from(
                                    y < 7 + height.pad_before + height.pad_after
                                        && x < 6 + width.pad_before + width.pad_after,
                                );
                                let (y, x) = (y.wrapping_sub(height.pad_before), x.wrapping_sub(width.pad_before));
                                if y < 7 && x < 6 {
                                    let byte = bytes[((image * 7 + y) * 6 + x) * channels + c];
                                    let value = if signed { i32::from(byte as i8) } else { i32::from(byte) };
                                    values.push(value);
                                    sum += f64::from(value - zero_point)
                                        * f64::from(weights[(ky * width.kernel + kx) * channels + c]);
                                }
                            }
                        }
                        let mean =
                            |count: usize| values.iter().map(|v| f64::from(v - zero_point)).sum::<f64>() / count as f64;
                        let real = match op {
                            WindowOp::Depthwise { .. } => sum * f64::from(0.01f32) + f64::from(offsets[c]),
                            WindowOp::Max => {
                                let most = values.iter().copied().max().unwrap_or(if signed { -128 } else { 0 });
                                assert_eq!(i32::from(if signed { actual as i8 as i16 } else { actual.into() }), most);
                                continue;
                            }
                            WindowOp::Average { count_padding, .. } if !values.is_empty() => {
                                mean(if count_padding { counted } else { values.len() }) * 0.5
                            }
                            WindowOp::Average { .. } => 0.0,
                        };
                        let e = (real.round() + 30.0).clamp(0.0, 255.0);
                        assert!(
                            (f64::from(actual) - e).abs() <= 1.0,
                            "{} {shape:?} {op:?}: {actual}, expected {e}",
                            level.name()
                        );
                    }
                }
            }
        }
    }
}
