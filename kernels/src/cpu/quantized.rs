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
use super::quantized_product::{ProductShape, Quantized, load_some, store_some};

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

/// `min(max(round(x), low), high) + zero_point`, NaN as 0.
#[inline(always)]
fn rounded<I: Isa>(isa: I, x: I::V, to: &Quantization) -> I::V {
    let (low, high) = to.bounds();
    let x = isa.select(isa.eq(x, x), isa.round(x), isa.zero());
    isa.add(isa.min(isa.max(x, isa.splat(low)), isa.splat(high)), isa.splat(to.zero_point as f32))
}

/// The first `count` bytes, made unsigned, as floats.
///
/// # Safety
/// As many are readable at `p`; there are no more than lanes.
#[inline(always)]
unsafe fn load_unsigned<I: Isa>(isa: I, p: *const u8, count: usize, flip: u8) -> I::V {
    let mut bytes = [0u8; 16];
    // SAFETY: the caller; sixteen bytes are as many as lanes at least.
    unsafe {
        if count == I::LANES && flip == 0 {
            return isa.floats_of(isa.load_bytes(p));
        }
        std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), count);
        bytes.iter_mut().for_each(|b| *b ^= flip);
        isa.floats_of(isa.load_bytes(bytes.as_ptr()))
    }
}

/// Quantizes a range of elements.
pub fn quantize(level: IsaLevel, input: &[f32], to: Quantization, range: Range<usize>, output: Output<'_, u8>) {
    let (input, output) = (&input[range.clone()], part(&output, &range));
    dispatch(level, Quantize { input, to, output });
}

struct Quantize<'a> {
    input: &'a [f32],
    to: Quantization,
    output: &'a mut [u8],
}

impl Kernel for Quantize<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let scale = isa.splat(self.to.scale);
        let count = self.input.len().min(self.output.len());
        for i in (0..count).step_by(I::LANES) {
            let left = I::LANES.min(count - i);
            // SAFETY: inside both slices.
            unsafe {
                let x = isa.div(load_some(isa, self.input.as_ptr().add(i), left), scale);
                store_some(isa, self.output.as_mut_ptr().add(i), rounded(isa, x, &self.to), left);
            }
        }
    }
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
    let operands = [a, b].map(|q| (&q.bytes[range.clone()], q.unsigned()));
    let output = part(&output, &range);
    dispatch(level, Add { operands, factors: scales.map(|s| s / to.scale), to, output });
}

struct Add<'a> {
    operands: [(&'a [u8], (u8, i32)); 2],
    factors: [f32; 2],
    to: Quantization,
    output: &'a mut [u8],
}

impl Kernel for Add<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let [(a, (flip_a, zero_a)), (b, (flip_b, zero_b))] = self.operands;
        let factors = self.factors.map(|f| isa.splat(f));
        let (zero_a, zero_b) = (isa.splat(zero_a as f32), isa.splat(zero_b as f32));
        let count = self.output.len();
        for i in (0..count).step_by(I::LANES) {
            let left = I::LANES.min(count - i);
            // SAFETY: inside the slices, which are of one length.
            unsafe {
                let a = isa.sub(load_unsigned(isa, a.as_ptr().add(i), left, flip_a), zero_a);
                let b = isa.sub(load_unsigned(isa, b.as_ptr().add(i), left, flip_b), zero_b);
                let x = isa.add(isa.mul(a, factors[0]), isa.mul(b, factors[1]));
                store_some(isa, self.output.as_mut_ptr().add(i), rounded(isa, x, &self.to), left);
            }
        }
    }
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
    /// A convolution of every channel with weights `[height][width][channels]` (integers, less their zero points), after which come their sums,
    /// `[channels]`: the sum times the channel's factor plus its offset, quantized; activations are in the bounds.
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
        let fits = weights.len() >= (taps + 1) * channels && factors.len() >= channels && offsets.len() >= channels;
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
    fn eval<I: Isa>(self, isa: I) {
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
            if let WindowOp::Depthwise { weights, factors, offsets, low, high, zero_point } = op {
                let to_zero = isa.splat(zero_point as f32);
                let bounds = (isa.splat(low), isa.splat(high));
                let whole = rows.len() * columns.len() == height.kernel * width.kernel;
                let sums_at = height.kernel * width.kernel * channels;
                // What the zero point adds to the sum of a whole window is taken off once; at the edge, value by value.
                let off = isa.splat(if whole { 0.0 } else { zero });
                let mut first = 0;
                while first < channels {
                    // Vectors of four at a time, so that additions do not wait for each other.
                    let four = first + 4 * I::LANES <= channels && flip == 0;
                    let count = if four { 4 * I::LANES } else { I::LANES.min(channels - first) };
                    let sum_of = |v: usize| weights[sums_at + first + v * I::LANES..].as_ptr();
                    // SAFETY: the entry checked the lengths; only channels that exist are read and written.
                    unsafe {
                        let mut sums = [isa.zero(); 4];
                        if four {
                            let mut tile = [isa.zero(); 4];
                            if whole {
                                for v in 0..4 {
                                    tile[v] = isa.mul(isa.load(sum_of(v)), isa.splat(-zero));
                                }
                            }
                            for ky in rows.clone() {
                                for kx in columns.clone() {
                                    let from = input.bytes[at(ky, kx)..][..channels].as_ptr().add(first);
                                    let weights = weights.as_ptr().add((ky * width.kernel + kx) * channels + first);
                                    for v in 0..4 {
                                        let x = isa.floats_of(isa.load_bytes(from.add(v * I::LANES)));
                                        tile[v] =
                                            isa.fma(isa.sub(x, off), isa.load(weights.add(v * I::LANES)), tile[v]);
                                    }
                                }
                            }
                            sums = tile;
                        } else {
                            let mut sum = isa.zero();
                            if whole {
                                sum = isa.mul(load_some(isa, sum_of(0), count), isa.splat(-zero));
                            }
                            for ky in rows.clone() {
                                for kx in columns.clone() {
                                    let from = input.bytes[at(ky, kx)..][..channels].as_ptr().add(first);
                                    let weights = weights.as_ptr().add((ky * width.kernel + kx) * channels + first);
                                    let x = isa.sub(load_unsigned(isa, from, count, flip), off);
                                    sum = isa.fma(x, load_some(isa, weights, count), sum);
                                }
                            }
                            sums[0] = sum;
                        }
                        for v in 0..count.div_ceil(I::LANES) {
                            let (at, count) = (first + v * I::LANES, count.min(I::LANES));
                            let factor = load_some(isa, factors.as_ptr().add(at), count);
                            let offset = load_some(isa, offsets.as_ptr().add(at), count);
                            let y = isa.round(isa.add(isa.mul(sums[v], factor), offset));
                            let y = isa.add(isa.min(isa.max(y, bounds.0), bounds.1), to_zero);
                            store_some(isa, to.as_mut_ptr().add(at), y, count);
                        }
                    }
                    first += count;
                }
                continue;
            }
            for first in (0..channels).step_by(CHANNELS) {
                let count = CHANNELS.min(channels - first);
                let to = &mut to[first..first + count];
                match op {
                    WindowOp::Depthwise { .. } => {}
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
                        let by = isa.splat(counted as f32);
                        for v in (0..count).step_by(I::LANES) {
                            let left = I::LANES.min(count - v);
                            // SAFETY: the sums are a multiple of every vector; only bytes that exist are written.
                            unsafe {
                                let sum = isa.floats_of(isa.load_w(sums.as_ptr().add(v)));
                                let y = isa.mul(isa.div(sum, by), isa.splat(factor));
                                store_some(isa, to.as_mut_ptr().add(v), rounded(isa, y, &quantization), left);
                            }
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
                let taps = height.kernel * width.kernel;
                let mut weights: Vec<f32> = (0..taps * channels).map(|_| f32::from(random.bits() as i8)).collect();
                let sums = (0..channels).map(|c| weights.iter().skip(c).step_by(channels).sum::<f32>());
                weights.extend(sums.collect::<Vec<_>>());
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
