//! Depthwise convolutions of quantized images, channels-last: `[n][height][width][channels]`, one window of weights for every channel.
//!
//! Bytes become floats, in which every partial sum is an integer that they hold exactly. Neighbouring outputs of a row are computed together, so
//! that a byte is converted once for all of them and a weight loaded once. The image goes on beyond its edges as its zero point, which adds
//! nothing to a sum; what it adds to the sums of raw bytes is the same everywhere, and taken off at the start.

use std::ops::Range;

use super::IsaLevel;
use super::dispatch::{Kernel, dispatch};
use super::epilogue::Output;
use super::isa::Isa;
use super::quantized_product::{ProductShape, Quantized, byte_range, load_some, store_some};

/// Largest number of terms that a sum may have: below, every partial sum is an integer that `f32` holds.
pub const DEPTHWISE_TERMS: usize = (1 << 24) / (255 * 255);

/// A depthwise convolution: `min(max(round(sum·factor + offset), low), high) + zero_point` of every channel's sums; bounds and zero point
/// are integral.
#[derive(Clone, Copy, Debug)]
pub struct Depthwise<'a> {
    /// Whose groups are its channels.
    pub shape: ProductShape,
    pub input: Quantized<'a>,
    /// `[height][width][channels]`, integers, less their zero points, after which come their sums, `[channels]`.
    pub weights: &'a [f32],
    pub factors: &'a [f32],
    pub offsets: &'a [f32],
    pub low: f32,
    pub high: f32,
    pub zero_point: i32,
}

impl Depthwise<'_> {
    /// Whether bytes are unsigned, and bounds are those of a byte, to which sums, none of them too large, are saturated.
    fn is_plain(&self) -> bool {
        let most =
            |values: &[f32]| values[..self.shape.channels_in].iter().fold(0.0, |most, x| f32::max(most, x.abs()));
        let is_number = |values: &[f32]| values[..self.shape.channels_in].iter().all(|x| x.is_finite());
        let largest = (DEPTHWISE_TERMS * 255 * 255) as f32 * most(self.factors) + most(self.offsets);
        !self.input.signed
            && byte_range(self.low, self.high, self.zero_point).is_some()
            && is_number(self.offsets)
            && largest < (1u32 << 30) as f32
    }
}

/// Computes a range of output pixels.
pub fn depthwise(level: IsaLevel, problem: &Depthwise<'_>, pixels: Range<usize>, output: Output<'_, u8>) {
    let Depthwise { shape, input, weights, factors, offsets, .. } = problem;
    let channels = shape.channels_in;
    let taps = shape.height.kernel * shape.width.kernel;
    shape.height.assert_valid();
    shape.width.assert_valid();
    assert!(shape.channels_out == channels && pixels.end <= shape.rows(), "{pixels:?} of {shape:?}");
    assert!(input.bytes.len() >= shape.images * shape.height.input * shape.width.input * channels, "{shape:?}");
    assert!(output.len() >= shape.rows() * channels, "{} bytes of {shape:?}", output.len());
    assert!(
        weights.len() >= (taps + 1) * channels && taps <= DEPTHWISE_TERMS,
        "{} weights of {shape:?}",
        weights.len()
    );
    assert!(factors.len() >= channels && offsets.len() >= channels, "{shape:?}");
    dispatch(level, Rows { problem, pixels, output: output.pointer() })
}

struct Rows<'a> {
    problem: &'a Depthwise<'a>,
    pixels: Range<usize>,
    output: *mut u8,
}

/// Outputs of a row that are computed together.
const TILE: usize = 7;

/// As many where there are fewer.
const SMALL_TILE: usize = 3;

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Rows { problem, pixels, output } = self;
        let Depthwise { shape, .. } = problem;
        let (height, width, channels) = (&shape.height, &shape.width, shape.channels_in);
        let is_plain = problem.is_plain();
        let mut pixel = pixels.start;
        while pixel < pixels.end {
            let (line, ox) = (pixel / width.output, pixel % width.output);
            let row = Row { problem, is_plain, image: line / height.output, oy: line % height.output };
            let count = (width.output - ox).min(pixels.end - pixel);
            // SAFETY: the entry checked the lengths; these outputs are inside the range.
            unsafe {
                let to = output.add(pixel * channels);
                let tiled = channels >= I::LANES && width.dilation == 1;
                match (width.kernel, width.stride) {
                    (3, 1) if tiled => row.tiles::<I, 3, 1>(isa, ox, count, to),
                    (3, 2) if tiled => row.tiles::<I, 3, 2>(isa, ox, count, to),
                    (5, 1) if tiled => row.tiles::<I, 5, 1>(isa, ox, count, to),
                    (5, 2) if tiled => row.tiles::<I, 5, 2>(isa, ox, count, to),
                    (7, 1) if tiled => row.tiles::<I, 7, 1>(isa, ox, count, to),
                    _ => (0..count).for_each(
                        #[inline(always)]
                        |i| row.pixel(isa, ox + i, to.add(i * channels)),
                    ),
                }
            }
            pixel += count;
        }
    }
}

/// An output row.
struct Row<'a> {
    problem: &'a Depthwise<'a>,
    is_plain: bool,
    image: usize,
    oy: usize,
}

impl Row<'_> {
    /// Where the line of the image that a row of the window lies on begins, if it is inside.
    #[inline(always)]
    fn line(&self, ky: usize) -> Option<usize> {
        let (height, width) = (&self.problem.shape.height, &self.problem.shape.width);
        let y = (height.start(self.oy) + (ky * height.dilation) as isize) as usize;
        (y < height.input).then(|| (self.image * height.input + y) * width.input)
    }

    /// Outputs `ox .. ox + count`, with windows of `W` columns, `S` apart.
    ///
    /// # Safety
    /// They are writable at `to`; there are as many channels as lanes.
    #[inline(always)]
    unsafe fn tiles<I: Isa, const W: usize, const S: usize>(&self, isa: I, ox: usize, count: usize, to: *mut u8) {
        let width = &self.problem.shape.width;
        let channels = self.problem.shape.channels_in;
        let mut done = 0;
        while done < count {
            // The last tile begins earlier, if need be: its outputs come out the same again.
            let tile = if count >= TILE {
                TILE
            } else if count >= SMALL_TILE {
                SMALL_TILE
            } else {
                1
            };
            let first = done.min(count - tile);
            let x0 = width.start(ox + first);
            let inside = x0 >= 0 && x0 as usize + (tile - 1) * S + W <= width.input;
            // SAFETY: the caller.
            unsafe {
                let to = to.add(first * channels);
                match (tile, inside) {
                    (1, _) => self.tile::<I, W, S, 1, true, false>(isa, x0, to),
                    (SMALL_TILE, _) => self.tile::<I, W, S, SMALL_TILE, true, false>(isa, x0, to),
                    (_, true) if self.is_plain => self.tile::<I, W, S, TILE, false, true>(isa, x0, to),
                    (_, true) => self.tile::<I, W, S, TILE, false, false>(isa, x0, to),
                    (_, false) => self.tile::<I, W, S, TILE, true, false>(isa, x0, to),
                }
            }
            done = first + tile;
        }
    }

    /// `T` neighbouring outputs, the first of which has its window at column `x0`; `EDGE` where columns may lie outside of the image, `PLAIN` as
    /// [`Depthwise::is_plain`] says.
    ///
    /// # Safety
    /// As [`Row::tiles`].
    #[inline(always)]
    unsafe fn tile<I: Isa, const W: usize, const S: usize, const T: usize, const EDGE: bool, const PLAIN: bool>(
        &self,
        isa: I,
        x0: isize,
        to: *mut u8,
    ) {
        // By value: what is written could be any memory to the compiler.
        let Depthwise { shape, input, weights, factors, offsets, low, high, zero_point } = *self.problem;
        let (channels, rows, columns_in) = (shape.channels_in, shape.height.kernel, shape.width.input);
        let (flip, zero) = input.unsigned();
        let (flip, outside, minus_zero) = (isa.splat_w(flip.into()), isa.splat(zero as f32), isa.splat(-(zero as f32)));
        let signed = PLAIN && byte_range(low, high, zero_point) == Some(true);
        let (low, high) = (isa.splat(low), isa.splat(high));
        let (weights, factors, offsets) = (weights.as_ptr(), factors.as_ptr(), offsets.as_ptr());
        let sums = weights.wrapping_add(rows * W * channels);
        // The rows of the window that lie in the image, where the first of them begins, and how far apart they are.
        let inside = shape.height.taps_inside(self.oy);
        let y = shape.height.start(self.oy) + (inside.start * shape.height.dilation) as isize;
        let corner = ((self.image * shape.height.input) as isize + y) * columns_in as isize + x0;
        let corner = input.bytes.as_ptr().wrapping_offset(corner * channels as isize);
        let line = shape.height.dilation * columns_in * channels;
        let mut done = 0;
        while done < channels {
            // The last vector begins earlier, if need be.
            let first = done.min(channels - I::LANES);
            // SAFETY: the entry checked the lengths; rows and columns outside of the image are not read.
            unsafe {
                let mut start = isa.mul(isa.load(sums.add(first)), minus_zero);
                for k in (0..inside.start * W).chain(inside.end * W..rows * W) {
                    start = isa.fma(outside, isa.load(weights.add(k * channels + first)), start);
                }
                let mut tile = [start; T];
                let (mut from, mut own) =
                    (corner.wrapping_add(first), weights.add(inside.start * W * channels + first));
                for _ in inside.clone() {
                    let mut row = [outside; W];
                    for k in 0..W {
                        row[k] = isa.load(own.wrapping_add(k * channels));
                    }
                    // Windows overlap: every column is converted once, for all windows that it is in.
                    for c in 0..(T - 1) * S + W {
                        let mut x = outside;
                        if !EDGE || (x0.wrapping_add(c as isize) as usize) < columns_in {
                            let bytes = isa.load_bytes(from.wrapping_add(c * channels));
                            x = isa.floats_of(if PLAIN { bytes } else { isa.xor_w(bytes, flip) });
                        }
                        for t in 0..T {
                            if c >= t * S && c < t * S + W {
                                tile[t] = isa.fma(x, row[c - t * S], tile[t]);
                            }
                        }
                    }
                    own = own.wrapping_add(W * channels);
                    from = from.wrapping_add(line);
                }
                let (factor, offset) = (isa.load(factors.add(first)), isa.load(offsets.add(first)));
                for t in 0..T {
                    // Bounds are integral: clamping first rounds the same.
                    tile[t] = isa.add(isa.mul(tile[t], factor), offset);
                    if !PLAIN {
                        tile[t] = isa.min(isa.max(tile[t], low), high);
                    }
                }
                let to = to.add(first);
                if PLAIN {
                    for t in (0..T).step_by(4) {
                        // The last one is written again in place of those past the end.
                        let at = [t, (t + 1).min(T - 1), (t + 2).min(T - 1), (t + 3).min(T - 1)];
                        let (mut places, mut values) = ([to; 4], [offset; 4]);
                        for i in 0..4 {
                            (places[i], values[i]) = (to.add(at[i] * channels), tile[at[i]]);
                        }
                        isa.store_saturated(places, values, zero_point, signed);
                    }
                    done = first + I::LANES;
                    continue;
                }
                for t in (0..T).step_by(2) {
                    // An odd last one is written twice.
                    let u = (t + 1).min(T - 1);
                    let places = [to.add(t * channels), to.add(u * channels)];
                    isa.store_rounded(places, [tile[t], tile[u]], zero_point);
                }
            }
            done = first + I::LANES;
        }
    }

    /// One output, of whatever window and number of channels.
    ///
    /// # Safety
    /// It is writable at `to`.
    #[inline(always)]
    unsafe fn pixel<I: Isa>(&self, isa: I, ox: usize, to: *mut u8) {
        let Depthwise { shape, input, weights, factors, offsets, low, high, zero_point } = *self.problem;
        let (width, channels) = (&shape.width, shape.channels_in);
        let (flip, zero) = input.unsigned();
        let (taps, x0) = (width.taps_inside(ox), width.start(ox));
        let zero = isa.splat(zero as f32);
        for first in (0..channels).step_by(I::LANES) {
            let count = I::LANES.min(channels - first);
            let mut sum = isa.zero();
            for ky in 0..shape.height.kernel {
                let Some(line) = self.line(ky) else { continue };
                for kx in taps.clone() {
                    let x = (x0 + (kx * width.dilation) as isize) as usize;
                    let mut bytes = [0u8; 16];
                    bytes[..count].copy_from_slice(&input.bytes[(line + x) * channels + first..][..count]);
                    // SAFETY: sixteen bytes are as many as lanes at least; the entry checked the weights' length.
                    unsafe {
                        let x = isa.xor_w(isa.load_bytes(bytes.as_ptr()), isa.splat_w(flip.into()));
                        let weights = weights.as_ptr().add((ky * width.kernel + kx) * channels + first);
                        sum = isa.fma(isa.sub(isa.floats_of(x), zero), load_some(isa, weights, count), sum);
                    }
                }
            }
            // SAFETY: the entry checked the lengths; the caller.
            unsafe {
                let factor = load_some(isa, factors.as_ptr().add(first), count);
                let offset = load_some(isa, offsets.as_ptr().add(first), count);
                let y = isa.round(isa.add(isa.mul(sum, factor), offset));
                let y = isa.add(isa.min(isa.max(y, isa.splat(low)), isa.splat(high)), isa.splat(zero_point as f32));
                store_some(isa, to.add(first), y, count);
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
    fn agrees_with_plain_sums() {
        for level in levels() {
            let mut random = Random::new(61);
            for round in rounds(120) {
                let mut axis = |input: usize| {
                    let (kernel, stride) = (random.pick(&[1, 2, 3, 3, 5, 7]), random.between(1, 3));
                    let dilation = random.pick(&[1, 1, 1, 2]);
                    let (pad_before, pad_after) = (random.between(0, 3), random.between(0, 3));
                    let span = (kernel - 1) * dilation + 1;
                    let input = input.max(span);
                    let output = (input + pad_before + pad_after - span) / stride + 1;
                    Axis { input, output, kernel, stride, dilation, pad_before, pad_after }
                };
                let (height, width) = (axis(round % 9 + 1), axis(round % 31 + 1));
                let channels = random.pick(&[1, 5, 8, 16, 31, 32, 40, 70]);
                let (channels_in, images) = (channels, 1 + round % 2);
                let shape =
                    ProductShape { images, height, width, channels_in, channels_out: channels, groups: channels };
                let extreme = round % 5 == 0;
                let count = images * height.input * width.input * channels;
                let bytes: Vec<u8> = (0..count).map(|_| if extreme { 255 } else { random.bits() as u8 }).collect();
                let signed = random.between(0, 1) == 1;
                let input = Quantized { bytes: &bytes, signed, zero_point: if signed { -128 } else { 117 } };
                let taps = height.kernel * width.kernel;
                let weight = |bits: u64| if extreme { -128.0 } else { f32::from(bits as i8) };
                let mut weights: Vec<f32> = (0..taps * channels).map(|_| weight(random.bits())).collect();
                let sums = (0..channels).map(|c| weights.iter().skip(c).step_by(channels).sum::<f32>());
                weights.extend(sums.collect::<Vec<_>>());
                let (factors, offsets) = (vec![0.01; channels], random.units(channels));
                let (low, high, zero_point) =
                    random.pick(&[(-30.0, 225.0, 30), (-100.0, 155.0, -28), (-10.0, 100.0, 20)]);
                let (weights, factors, offsets) = (&weights[..], &factors[..], &offsets[..]);
                let problem = Depthwise { shape, input, weights, factors, offsets, low, high, zero_point };
                let mut output = vec![0u8; shape.rows() * channels];
                for pixels in random_cuts(&mut random, shape.rows()) {
                    depthwise(level, &problem, pixels, Output::new(&mut output));
                }
                for (i, &actual) in output.iter().enumerate() {
                    let (row, c) = (i / channels, i % channels);
                    let (line, ox) = (row / width.output, row % width.output);
                    let (image, oy) = (line / height.output, line % height.output);
                    let mut sum = 0;
                    for tap in 0..taps {
                        let (ky, kx) = (tap / width.kernel, tap % width.kernel);
                        let y = (oy * height.stride + ky * height.dilation).wrapping_sub(height.pad_before);
                        let x = (ox * width.stride + kx * width.dilation).wrapping_sub(width.pad_before);
                        if y < height.input && x < width.input {
                            let byte = bytes[((image * height.input + y) * width.input + x) * channels + c];
                            let value = if signed { i32::from(byte as i8) } else { i32::from(byte) };
                            sum += (value - input.zero_point) * weights[tap * channels + c] as i32;
                        }
                    }
                    let e = (sum as f32 * 0.01 + offsets[c]).round_ties_even().clamp(low, high);
                    assert_eq!(actual, (e as i32 + zero_point) as u8, "{} {shape:?} {i}", level.name());
                }
            }
        }
    }
}
