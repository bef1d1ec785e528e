//! Max and average pooling: windows and whole images, on `NCHW16c` and on plain rows.
//!
//! One image at a time. Taps are visited row by row, those in the padding skipped. A maximum is NaN if any of its values
//! is. Global pooling of plain images is a reduction of rows: see [`super::reduce`].

use std::ops::Range;

use super::dispatch::{Kernel, dispatch};
use super::epilogue::Output;
use super::isa::Isa;
use super::window::Axis;
use super::{BLOCK, IsaLevel};

/// What is taken of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pooling {
    /// The largest value inside the input; negative infinity if none is.
    Max,
    /// The mean. With padding counted, the divisor counts positions inside the input and its pads (ONNX
    /// `count_include_pad`), otherwise those inside the input.
    Average { count_padding: bool },
}

/// A pool of one image of `channels`.
#[derive(Clone, Copy, Debug)]
pub struct Pool<'a> {
    pub pooling: Pooling,
    pub channels: usize,
    /// [`Axis::UNIT`] for what has no depth.
    pub depth: Axis,
    pub height: Axis,
    pub width: Axis,
    /// [`pool_blocked`]: `[ceil(C/16)][D][H][W][16]`; [`pool_plain`]: `[C, D, H, W]`.
    pub input: &'a [f32],
}

/// Units of work of [`pool_blocked`]: (channel block, row of an output plane).
pub fn pool_blocked_units(pool: &Pool<'_>) -> usize {
    pool.channels.div_ceil(BLOCK) * pool.depth.output * pool.height.output
}

/// Units of work of [`pool_plain`]: (channel, row of an output plane).
pub fn pool_plain_units(pool: &Pool<'_>) -> usize {
    pool.channels * pool.depth.output * pool.height.output
}

/// Computes units of a pool on blocked images. `output` is the whole image, `[ceil(C/16)][D'][H'][W'][16]`.
pub fn pool_blocked(level: IsaLevel, pool: &Pool<'_>, units: Range<usize>, output: Output<'_>) {
    check(pool, pool.channels.div_ceil(BLOCK) * BLOCK, &units, pool_blocked_units(pool), &output);
    dispatch(level, Blocked { pool, units, output: output.pointer() });
}

/// Computes units of a pool on plain images. `output` is the whole image, `[C, D', H', W']`.
pub fn pool_plain(level: IsaLevel, pool: &Pool<'_>, units: Range<usize>, output: Output<'_>) {
    check(pool, pool.channels, &units, pool_plain_units(pool), &output);
    dispatch(level, Plain { pool, units, output: output.pointer() });
}

fn check(pool: &Pool<'_>, channels: usize, units: &Range<usize>, count: usize, output: &Output<'_>) {
    let axes = [pool.depth, pool.height, pool.width];
    axes.iter().for_each(Axis::assert_valid);
    assert!(units.is_empty() || units.end <= count, "units {units:?} of {count}");
    let pixels_in: usize = axes.iter().map(|axis| axis.input).product();
    let pixels_out: usize = axes.iter().map(|axis| axis.output).product();
    let input = pool.input.len();
    assert!(input >= channels * pixels_in, "input of {input}, {channels} channels of {pixels_in} pixels");
    assert!(output.len() >= channels * pixels_out, "output of {} for {channels} x {pixels_out}", output.len());
}

impl Pool<'_> {
    /// What the sum of a window is multiplied by.
    #[inline(always)]
    fn factor(&self, [z, y, x]: [usize; 3], taps: usize) -> f32 {
        let count = match self.pooling {
            Pooling::Max => return 1.0,
            Pooling::Average { count_padding: false } => taps,
            Pooling::Average { count_padding: true } => {
                let [depth, height, width] = [(self.depth, z), (self.height, y), (self.width, x)]
                    .map(|(axis, output)| axis.taps_inside_padded(output));
                depth * height * width
            }
        };
        1.0 / count as f32
    }
}

/// The larger, NaN if either is.
#[inline(always)]
fn larger<I: Isa>(isa: I, a: I::V, b: I::V) -> I::V {
    // `max` gives b where either is NaN, which is right unless a is.
    isa.select(isa.eq(a, a), isa.max(a, b), a)
}

struct Blocked<'a> {
    pool: &'a Pool<'a>,
    units: Range<usize>,
    output: *mut f32,
}

impl Kernel for Blocked<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Pool { pooling, depth, height, width, input, .. } = *self.pool;
        for unit in self.units {
            let (plane, y) = (unit / height.output, unit % height.output);
            let (block, z) = (plane / depth.output, plane % depth.output);
            let (taps_z, taps_y) = (depth.taps_inside(z), height.taps_inside(y));
            for x in 0..width.output {
                let taps_x = width.taps_inside(x);
                let factor = self.pool.factor([z, y, x], taps_z.len() * taps_y.len() * taps_x.len());
                for lane in (0..BLOCK).step_by(I::LANES) {
                    let first = match pooling {
                        Pooling::Max => f32::NEG_INFINITY,
                        Pooling::Average { .. } => 0.0,
                    };
                    let mut value = isa.splat(first);
                    // SAFETY: the entry checked the lengths, and the taps are inside.
                    unsafe {
                        for (kz, ky) in taps_z.clone().flat_map(|kz| taps_y.clone().map(move |ky| (kz, ky))) {
                            let plane = block * depth.input + depth.position(z, kz);
                            let row = plane * height.input + height.position(y, ky);
                            let line = input.as_ptr().add(row * width.input * BLOCK + lane);
                            for kx in taps_x.clone() {
                                let tap = isa.load(line.add(width.position(x, kx) * BLOCK));
                                value = match pooling {
                                    Pooling::Max => larger(isa, value, tap),
                                    Pooling::Average { .. } => isa.add(value, tap),
                                };
                            }
                        }
                        let at = (unit * width.output + x) * BLOCK + lane;
                        isa.store(self.output.add(at), isa.mul(value, isa.splat(factor)));
                    }
                }
            }
        }
    }
}

struct Plain<'a> {
    pool: &'a Pool<'a>,
    units: Range<usize>,
    output: *mut f32,
}

impl Kernel for Plain<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, _isa: I) {
        let Pool { pooling, depth, height, width, input, .. } = *self.pool;
        for unit in self.units {
            let (plane, y) = (unit / height.output, unit % height.output);
            let (channel, z) = (plane / depth.output, plane % depth.output);
            let (taps_z, taps_y) = (depth.taps_inside(z), height.taps_inside(y));
            for x in 0..width.output {
                let taps_x = width.taps_inside(x);
                let mut value = match pooling {
                    Pooling::Max => f32::NEG_INFINITY,
                    Pooling::Average { .. } => 0.0,
                };
                for (kz, ky) in taps_z.clone().flat_map(|kz| taps_y.clone().map(move |ky| (kz, ky))) {
                    let plane = channel * depth.input + depth.position(z, kz);
                    let row = plane * height.input + height.position(y, ky);
                    let line = &input[row * width.input..][..width.input];
                    for kx in taps_x.clone() {
                        let tap = line[width.position(x, kx)];
                        value = match pooling {
                            Pooling::Max if tap > value || tap.is_nan() => tap,
                            Pooling::Max => value,
                            Pooling::Average { .. } => value + tap,
                        };
                    }
                }
                let factor = self.pool.factor([z, y, x], taps_z.len() * taps_y.len() * taps_x.len());
                // SAFETY: the entry checked the length.
                unsafe { self.output.add(unit * width.output + x).write(value * factor) };
            }
        }
    }
}

/// The means of whole blocked images: `output[c]` of the blocks in range, from `[ceil(C/16)][pixels][16]`. `output` holds
/// all blocks' channels, `ceil(C/16) * 16`.
///
/// Sixteen consecutive pixels are summed first, then those sums: a long chain of additions would lose digits.
pub fn global_average_blocked(level: IsaLevel, pixels: usize, input: &[f32], blocks: Range<usize>, output: Output<'_>) {
    if blocks.is_empty() {
        return;
    }
    assert!(input.len() >= blocks.end * pixels * BLOCK && output.len() >= blocks.end * BLOCK);
    dispatch(level, Global { maximum: false, pixels, input, blocks, output: output.pointer() });
}

/// The maxima of whole blocked images, as [`global_average_blocked`].
pub fn global_max_blocked(level: IsaLevel, pixels: usize, input: &[f32], blocks: Range<usize>, output: Output<'_>) {
    if blocks.is_empty() {
        return;
    }
    assert!(input.len() >= blocks.end * pixels * BLOCK && output.len() >= blocks.end * BLOCK);
    dispatch(level, Global { maximum: true, pixels, input, blocks, output: output.pointer() });
}

struct Global<'a> {
    maximum: bool,
    pixels: usize,
    input: &'a [f32],
    blocks: Range<usize>,
    output: *mut f32,
}

impl Kernel for Global<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        for block in self.blocks {
            for lane in (0..BLOCK).step_by(I::LANES) {
                // SAFETY: the entry checked the lengths.
                unsafe {
                    let from = self.input.as_ptr().add(block * self.pixels * BLOCK + lane);
                    let to = self.output.add(block * BLOCK + lane);
                    if self.maximum {
                        let mut value = isa.splat(f32::NEG_INFINITY);
                        for pixel in 0..self.pixels {
                            value = larger(isa, value, isa.load(from.add(pixel * BLOCK)));
                        }
                        isa.store(to, value);
                        continue;
                    }
                    let mut sum = isa.zero();
                    for start in (0..self.pixels).step_by(16) {
                        let mut part = isa.zero();
                        for pixel in start..self.pixels.min(start + 16) {
                            part = isa.add(part, isa.load(from.add(pixel * BLOCK)));
                        }
                        sum = isa.add(sum, part);
                    }
                    isa.store(to, isa.mul(sum, isa.splat(1.0 / self.pixels as f32)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::conv::tests::{blocked, random_axis, unblocked};
    use super::super::testing::*;
    use super::*;

    fn expected(pool: &Pool<'_>) -> Vec<f64> {
        let axes = [pool.depth, pool.height, pool.width];
        let extents = |of: fn(&Axis) -> usize| axes.each_ref().map(of);
        let positions = |[a, b, c]: [usize; 3]| (0..a * b * c).map(move |i| [i / (b * c), i / c % b, i % c]);
        let [_, height, width] = extents(|axis| axis.input);
        let plane = pool.input.len() / pool.channels;
        let mut output = Vec::new();
        for (channel, at) in pool
            .input
            .chunks(plane)
            .flat_map(|channel| positions(extents(|axis| axis.output)).map(move |at| (channel, at)))
        {
            let (mut values, mut padded) = (Vec::new(), 0);
            for tap in positions(extents(|axis| axis.kernel)) {
                let read = [0, 1, 2].map(|i| {
                    let axis = axes[i];
                    (at[i] * axis.stride + tap[i] * axis.dilation) as i64 - axis.pad_before as i64
                });
                let below = |pads: fn(&Axis) -> usize| {
                    read.iter().zip(&axes).all(|(&read, axis)| read < (axis.input + pads(axis)) as i64)
                };
                padded += i32::from(below(|axis| axis.pad_after));
                if below(|_| 0) && read.iter().all(|&read| read >= 0) {
                    let [z, y, x] = read.map(|read| read as usize);
                    values.push(f64::from(channel[(z * height + y) * width + x]));
                }
            }
            let sum: f64 = values.iter().sum();
            output.push(match pool.pooling {
                Pooling::Max => values.into_iter().fold(f64::NEG_INFINITY, f64::max),
                Pooling::Average { count_padding: true } => sum / f64::from(padded),
                Pooling::Average { count_padding: false } => sum / values.len() as f64,
            });
        }
        output
    }

    #[test]
    fn pools_match_plain_loops_in_both_layouts() {
        for level in levels() {
            let mut random = Random::new(8);
            for round in rounds(90) {
                let channels = random.between(1, 36);
                let (height, width) = (random_axis(&mut random, false), random_axis(&mut random, false));
                let is_deep = random.between(0, 3) == 0;
                let depth = if is_deep { random_axis(&mut random, false) } else { Axis::UNIT };
                let input = random.units(channels * depth.input * height.input * width.input);
                let pooling = match round % 3 {
                    0 => Pooling::Max,
                    1 => Pooling::Average { count_padding: true },
                    _ => Pooling::Average { count_padding: false },
                };
                let pool = Pool { pooling, channels, depth, height, width, input: &input };
                let expected = expected(&pool);
                let pixels = depth.output * height.output * width.output;
                let mut plain = vec![f32::NAN; channels * pixels];
                for units in random_cuts(&mut random, pool_plain_units(&pool)) {
                    pool_plain(level, &pool, units, Output::new(&mut plain));
                }
                // At most 343 additions of values below 1.
                assert_near(level, &pool.pooling, &plain, &expected, 2e-5);
                let image = blocked(level, channels, depth.input * height.input * width.input, &input);
                let pool = Pool { input: &image, ..pool };
                let mut output = vec![f32::NAN; channels.div_ceil(BLOCK) * BLOCK * pixels];
                for units in random_cuts(&mut random, pool_blocked_units(&pool)) {
                    pool_blocked(level, &pool, units, Output::new(&mut output));
                }
                assert_near(level, &pool.pooling, &unblocked(level, channels, pixels, &output), &expected, 2e-5);
            }
        }
    }

    #[test]
    fn whole_images_reduce_to_their_mean_and_maximum() {
        for level in levels() {
            let mut random = Random::new(9);
            for (channels, pixels) in [(1, 1), (20, 49), (32, 1000)] {
                let input = random.units(channels * pixels);
                let image = blocked(level, channels, pixels, &input);
                let blocks = channels.div_ceil(BLOCK);
                let (mut mean, mut maximum) = (vec![0.0; blocks * BLOCK], vec![0.0; blocks * BLOCK]);
                for range in random_cuts(&mut random, blocks) {
                    global_average_blocked(level, pixels, &image, range.clone(), Output::new(&mut mean));
                    global_max_blocked(level, pixels, &image, range, Output::new(&mut maximum));
                }
                let rows = || input.chunks(pixels).map(|row| row.iter().map(|&x| f64::from(x)));
                let means: Vec<f64> = rows().map(|row| row.sum::<f64>() / pixels as f64).collect();
                let maxima: Vec<f64> = rows().map(|row| row.fold(f64::MIN, f64::max)).collect();
                assert_near(level, &pixels, &mean[..channels], &means, 1e-6);
                assert_near(level, &pixels, &maximum[..channels], &maxima, 0.0);
            }
        }
    }

    #[test]
    fn a_maximum_over_nan_is_nan() {
        for level in levels() {
            for position in 0..3 {
                let mut input = vec![1.0; 3];
                input[position] = f32::NAN;
                let width = Axis { input: 3, kernel: 3, ..Axis::UNIT };
                let (depth, height) = (Axis::UNIT, Axis::UNIT);
                let pool = Pool { pooling: Pooling::Max, channels: 1, depth, height, width, input: &input };
                let mut plain = [0.0];
                pool_plain(level, &pool, 0..1, Output::new(&mut plain));
                assert!(plain[0].is_nan());
                let image = blocked(level, 1, 3, &input);
                let mut output = [0.0; BLOCK];
                pool_blocked(level, &Pool { input: &image, ..pool }, 0..1, Output::new(&mut output));
                assert!(output[0].is_nan());
            }
        }
    }
}
