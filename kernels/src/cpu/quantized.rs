//! Quantized values, element by element and window by window: to and from floats, through tables, sums, pools.
//!
//! A quantized value is a byte, signed or not, less a zero point, times a scale. Windows slide over channels-last images. Plain loops: compilers
//! make vectors of them on every rung.

use std::ops::Range;

use super::IsaLevel;
use super::dispatch::{Kernel, dispatch};
use super::epilogue::Output;
use super::isa::Isa;
use super::quantized_product::{ProductShape, Quantized, store_some};

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

/// `min(max(x, low), high)`, NaN as 0: what is to be rounded, and the zero point added. The bounds are integral, so that rounding first is the same.
#[inline(always)]
fn clamped<I: Isa>(isa: I, x: I::V, to: &Quantization) -> I::V {
    let (low, high) = to.bounds();
    let x = isa.select(isa.eq(x, x), x, isa.zero());
    isa.min(isa.max(x, isa.splat(low)), isa.splat(high))
}

/// Values of bytes: two vectors of floats, the zero point taken off.
///
/// # Safety
/// Twice as many bytes as lanes are readable at `p`.
#[inline(always)]
unsafe fn load_values<I: Isa>(isa: I, p: *const u8, (flip, zero_point): (u8, i32)) -> [I::V; 2] {
    let (flip, zero) = (isa.splat_w(flip.into()), isa.splat(zero_point as f32));
    // SAFETY: the caller.
    unsafe {
        let (a, b) = (isa.load_bytes(p), isa.load_bytes(p.add(I::LANES)));
        [isa.sub(isa.floats_of(isa.xor_w(a, flip)), zero), isa.sub(isa.floats_of(isa.xor_w(b, flip)), zero)]
    }
}

/// Where the vectors from `at` on begin, of a pair that `count` elements are computed by; the last begins earlier, if need be.
#[inline(always)]
fn pair_at<I: Isa>(at: usize, count: usize) -> usize {
    at.min(count.saturating_sub(2 * I::LANES))
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
        let Quantize { input, to, output } = self;
        let (scale, pair, count) = (isa.splat(to.scale), 2 * I::LANES, input.len().min(output.len()));
        let (mut padded, mut bytes) = ([0f32; 32], [0u8; 32]);
        let few = count < pair;
        if few {
            padded[..count].copy_from_slice(&input[..count]);
        }
        let (from, target) =
            if few { (padded.as_ptr(), bytes.as_mut_ptr()) } else { (input.as_ptr(), output.as_mut_ptr()) };
        for i in (0..count).step_by(pair) {
            let i = pair_at::<I>(i, count);
            // SAFETY: inside both slices, or both arrays.
            unsafe {
                let (a, b) = (isa.load(from.add(i)), isa.load(from.add(i + I::LANES)));
                let y = [clamped(isa, isa.div(a, scale), &to), clamped(isa, isa.div(b, scale), &to)];
                isa.store_rounded([target.add(i), target.add(i + I::LANES)], y, to.zero_point);
            }
        }
        if few {
            output[..count].copy_from_slice(&bytes[..count]);
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
        let Add { operands: [(a, unsigned_a), (b, unsigned_b)], factors, to, output } = self;
        let (factor_a, factor_b) = (isa.splat(factors[0]), isa.splat(factors[1]));
        let (pair, count) = (2 * I::LANES, output.len());
        let (mut padded, mut bytes) = ([[0u8; 32]; 2], [0u8; 32]);
        let few = count < pair;
        if few {
            padded[0][..count].copy_from_slice(a);
            padded[1][..count].copy_from_slice(b);
        }
        let (a, b, target) = match few {
            true => (padded[0].as_ptr(), padded[1].as_ptr(), bytes.as_mut_ptr()),
            false => (a.as_ptr(), b.as_ptr(), output.as_mut_ptr()),
        };
        for i in (0..count).step_by(pair) {
            let i = pair_at::<I>(i, count);
            // SAFETY: inside the slices, which are of one length, or the arrays.
            unsafe {
                let (a, b) = (load_values(isa, a.add(i), unsigned_a), load_values(isa, b.add(i), unsigned_b));
                let mut y = a;
                for v in 0..2 {
                    y[v] = clamped(isa, isa.add(isa.mul(a[v], factor_a), isa.mul(b[v], factor_b)), &to);
                }
                isa.store_rounded([target.add(i), target.add(i + I::LANES)], y, to.zero_point);
            }
        }
        if few {
            output.copy_from_slice(&bytes[..count]);
        }
    }
}

/// The least and the greatest of a range, 0 among them; NaN is passed over.
pub fn range_of(level: IsaLevel, input: &[f32], range: Range<usize>) -> (f32, f32) {
    dispatch(level, RangeOf(&input[range]))
}

struct RangeOf<'a>(&'a [f32]);

impl Kernel for RangeOf<'_> {
    type Output = (f32, f32);
    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) -> (f32, f32) {
        let (mut low, mut high) = ([isa.zero(); 4], [isa.zero(); 4]);
        let (mut least, mut most) = (0f32, 0f32);
        let whole = self.0.len() / (4 * I::LANES) * (4 * I::LANES);
        for i in (0..whole).step_by(4 * I::LANES) {
            for v in 0..4 {
                // SAFETY: inside the slice. Where either is NaN, both give their second operand, which never is.
                unsafe {
                    let x = isa.load(self.0.as_ptr().add(i + v * I::LANES));
                    low[v] = isa.min(x, low[v]);
                    high[v] = isa.max(x, high[v]);
                }
            }
        }
        for v in 0..4 {
            least = least.min(isa.reduce_min(low[v]));
            most = most.max(isa.reduce_max(high[v]));
        }
        for &x in &self.0[whole..] {
            least = if x < least { x } else { least };
            most = if x > most { x } else { most };
        }
        (least, most)
    }
}

/// What is made of a window, channel by channel; the shape's `groups` are its channels.
#[derive(Clone, Copy, Debug)]
pub enum WindowOp {
    /// The greatest byte, as it is.
    Max,
    /// The mean of what is in the image, or of the padding too (which is 0), times the factor, quantized.
    Average { count_padding: bool, factor: f32, to: Quantization },
}

/// Channels that a window is computed for at a time.
const CHANNELS: usize = 32;

/// Computes a range of output pixels.
pub fn windows(
    level: IsaLevel,
    shape: &ProductShape,
    op: WindowOp,
    input: Quantized<'_>,
    pixels: Range<usize>,
    output: Output<'_, u8>,
) {
    let channels = shape.channels_in;
    shape.height.assert_valid();
    shape.width.assert_valid();
    assert!(shape.channels_out == channels && pixels.end <= shape.rows(), "{pixels:?} of {shape:?}");
    assert!(input.bytes.len() >= shape.images * shape.height.input * shape.width.input * channels, "{shape:?}");
    assert!(output.len() >= shape.rows() * channels, "{} bytes of {shape:?}", output.len());
    dispatch(level, Windows { shape, op, input, pixels, output: output.pointer() })
}

struct Windows<'a> {
    shape: &'a ProductShape,
    op: WindowOp,
    input: Quantized<'a>,
    pixels: Range<usize>,
    output: *mut u8,
}

impl Kernel for Windows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Windows { shape, op, input, pixels, output } = self;
        let (height, width, channels) = (&shape.height, &shape.width, shape.channels_in);
        let (flip, zero_point) = input.unsigned();
        for pixel in pixels {
            let (image, oy, ox) =
                (pixel / (height.output * width.output), pixel / width.output % height.output, pixel % width.output);
            let (rows, y0) = (height.taps_inside(oy), height.start(oy));
            let (columns, x0) = (width.taps_inside(ox), width.start(ox));
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
                            true => height.taps_inside_padded(oy) * width.taps_inside_padded(ox),
                            false => rows.len() * columns.len(),
                        };
                        let by = isa.splat(counted as f32);
                        for v in (0..count).step_by(I::LANES) {
                            let left = I::LANES.min(count - v);
                            // SAFETY: the sums are a multiple of every vector; only bytes that exist are written.
                            unsafe {
                                let sum = isa.floats_of(isa.load_w(sums.as_ptr().add(v)));
                                let y = clamped(isa, isa.mul(isa.div(sum, by), isa.splat(factor)), &quantization);
                                let y = isa.add(isa.round(y), isa.splat(quantization.zero_point as f32));
                                store_some(isa, to.as_mut_ptr().add(v), y, left);
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::conv::Axis;
    use super::super::testing::*;
    use super::*;

    #[test]
    fn floats_become_bytes_and_come_back() {
        for level in levels() {
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
        for level in levels() {
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
        for level in levels() {
            let mut random = Random::new(61);
            for _ in rounds(60) {
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
                let to = Quantization { scale: 1.0, zero_point: 30, signed: false };
                let ops = [
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
                        let (mut values, mut counted) = (Vec::new(), 0);
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
                                }
                            }
                        }
                        let mean =
                            |count: usize| values.iter().map(|v| f64::from(v - zero_point)).sum::<f64>() / count as f64;
                        let real = match op {
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
