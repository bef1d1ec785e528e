//! Images sampled between their pixels: regions of them at one size, and any places.
//!
//! Positions are computed in `f64`, as the operators' definitions are; values are summed in `f32`.

use std::ops::Range;

use super::dispatch::{Kernel, dispatch};
use super::epilogue::Output;
use super::isa::Isa;
use super::{BLOCK, IsaLevel};

/// Two pixels of an axis between which a sample lies, and the weight of each.
type Between = [(usize, f32); 2];

/// One axis of a region: bins, each of which is sampled at points that halve its equal parts.
#[derive(Clone, Copy, Debug)]
pub struct Side {
    /// In pixels of the map, whose first is at 0.
    pub start: f64,
    /// Length of a bin.
    pub bin: f64,
    /// Points per bin.
    pub samples: usize,
}

impl Side {
    /// The points of a bin that lie on a map of `extent` pixels, which ends one pixel beyond its first and last.
    #[inline(always)]
    fn on_map(&self, bin: usize, extent: usize) -> impl Iterator<Item = Between> + Clone + use<> {
        let Side { start, bin: length, samples } = *self;
        let (origin, step) = (start + bin as f64 * length, length / samples as f64);
        // Points that don't advance are all at one place. One more at either end covers the rounding.
        let position = |at: f64| if step == 0.0 { f64::INFINITY } else { (at - origin) / step - 0.5 };
        let ends = [position(-1.0), position(extent as f64)];
        let first = if step == 0.0 { 0.0 } else { ends[0].min(ends[1]).floor() - 1.0 };
        let last = ends[0].max(ends[1]).ceil() + 1.0;
        let range = match origin.is_finite() && step.is_finite() {
            true => first.max(0.0) as usize..(last.max(-1.0) + 1.0).min(samples as f64) as usize,
            false => 0..0,
        };
        let point = move |sample: usize| origin + (sample as f64 + 0.5) * length / samples as f64;
        range.map(point).filter(move |&at| at >= -1.0 && at <= extent as f64).map(move |at| between(at, extent))
    }
}

#[inline(always)]
fn between(at: f64, extent: usize) -> Between {
    let at = at.max(0.0);
    let low = at as usize;
    if low >= extent - 1 {
        return [(extent - 1, 1.0), (extent - 1, 0.0)];
    }
    let fraction = (at - low as f64) as f32;
    [(low, 1.0 - fraction), (low + 1, fraction)]
}

/// A region of a blocked map `[ceil(C/16)][H][W][16]`, whose bins are the means of their samples (He et al., Mask R-CNN, 2017).
#[derive(Clone, Copy, Debug)]
pub struct Region<'a> {
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    pub map: &'a [f32],
    pub rows: Side,
    pub columns: Side,
    /// Rows and columns of bins.
    pub bins: [usize; 2],
}

/// Computes a region, `output` being `[ceil(C/16)][bins][16]`. Samples that are not on the map are zeros.
pub fn align_region(level: IsaLevel, region: &Region<'_>, output: Output<'_>) {
    let lanes = region.channels.next_multiple_of(BLOCK);
    let (pixels, bins) = (region.height * region.width, region.bins[0] * region.bins[1]);
    assert!(pixels > 0 && region.map.len() >= lanes * pixels, "a map of {}", region.map.len());
    assert!(output.len() >= lanes * bins, "output of {} for {lanes} x {bins}", output.len());
    dispatch(level, Align { region, output: output.pointer() });
}

struct Align<'a> {
    region: &'a Region<'a>,
    output: *mut f32,
}

impl Kernel for Align<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Region { channels, height, width, map, rows, columns, bins } = *self.region;
        let (blocks, pixels, count) = (channels.div_ceil(BLOCK), height * width, bins[0] * bins[1]);
        let samples = rows.samples.saturating_mul(columns.samples).max(1);
        let share = (1.0 / samples as f64) as f32;
        for (row, column) in (0..bins[0]).flat_map(|row| (0..bins[1]).map(move |column| (row, column))) {
            // SAFETY: the entry checked that the map has all pixels of every block, and the output all bins.
            unsafe {
                let bin = self.output.add((row * bins[1] + column) * BLOCK);
                for block in 0..blocks {
                    for lane in (0..BLOCK).step_by(I::LANES) {
                        isa.store(bin.add(block * count * BLOCK + lane), isa.zero());
                    }
                }
                let across = columns.on_map(column, width);
                for [(top, by_top), (bottom, by_bottom)] in rows.on_map(row, height) {
                    for [(left, by_left), (right, by_right)] in across.clone() {
                        let corners = [(top, by_top, left, by_left), (top, by_top, right, by_right)];
                        let lower = [(bottom, by_bottom, left, by_left), (bottom, by_bottom, right, by_right)];
                        let of = |(y, by_row, x, by_column): (usize, f32, usize, f32)| {
                            (map.as_ptr().add((y * width + x) * BLOCK), isa.splat(share * by_row * by_column))
                        };
                        let taps = [of(corners[0]), of(corners[1]), of(lower[0]), of(lower[1])];
                        for block in 0..blocks {
                            for lane in (0..BLOCK).step_by(I::LANES) {
                                let to = bin.add(block * count * BLOCK + lane);
                                let sum = taps.iter().fold(isa.load(to), |sum, &(pixel, weight)| {
                                    isa.fma(isa.load(pixel.add(block * pixels * BLOCK + lane)), weight, sum)
                                });
                                isa.store(to, sum);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// What lies outside of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outside {
    Zeros,
    /// The nearest pixel of the border.
    Border,
    /// The image, mirrored.
    Reflection,
}

/// How many pixels of an axis a place is made of: one, two or four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    Nearest,
    Linear,
    /// With the coefficient −0.75, which ONNX fixes.
    Cubic,
}

/// An image `[C, H, W]` and places on it, `[places, 2]`: x and y, each −1 at the first pixel and 1 at the last.
#[derive(Clone, Copy, Debug)]
pub struct Grid<'a> {
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    pub image: &'a [f32],
    pub places: &'a [f32],
    pub filter: Filter,
    pub outside: Outside,
    /// −1 and 1 are the centres of the outermost pixels, not their outer edges.
    pub align_corners: bool,
}

/// Computes the given places of every channel, `output` being `[C, places]`.
pub fn sample_grid(level: IsaLevel, grid: &Grid<'_>, places: Range<usize>, output: Output<'_>) {
    let (pixels, count) = (grid.height * grid.width, grid.places.len() / 2);
    assert!(pixels > 0 && grid.image.len() >= grid.channels * pixels, "an image of {}", grid.image.len());
    assert!(places.is_empty() || places.end <= count, "places {places:?} of {count}");
    assert!(output.len() >= grid.channels * count, "output of {} for {} x {count}", output.len(), grid.channels);
    dispatch(level, Sample { grid, places, output: output.pointer() });
}

/// Pixels of an axis and their weights, the first so many.
type Taps = ([(usize, f32); 4], usize);

impl Grid<'_> {
    /// The pixels of an axis that `place` is made of; none where only zeros are there.
    #[inline(always)]
    fn taps(&self, place: f32, extent: usize) -> Taps {
        let (place, last) = (f64::from(place), extent as f64 - 1.0);
        let (low, high) = if self.align_corners { (0.0, last) } else { (-0.5, last + 0.5) };
        let mut x = match self.align_corners {
            true => (place + 1.0) / 2.0 * last,
            false => ((place + 1.0) * extent as f64 - 1.0) / 2.0,
        };
        if self.filter == Filter::Nearest {
            x = x.round_ties_even();
        }
        if !(low..=high).contains(&x) {
            match self.outside {
                Outside::Zeros => {}
                // The pixels that a cubic is made of are clamped one by one below, not its place.
                Outside::Border if self.filter == Filter::Cubic => {}
                Outside::Border => x = x.clamp(0.0, last),
                Outside::Reflection => x = reflect(x, low, high),
            }
        }
        let (first, fraction) = (x.floor(), x - x.floor());
        let all = match self.filter {
            Filter::Nearest => ([(x, 1.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)], 1),
            Filter::Linear => ([(first, 1.0 - fraction), (first + 1.0, fraction), (0.0, 0.0), (0.0, 0.0)], 2),
            Filter::Cubic => ([-1.0, 0.0, 1.0, 2.0].map(|i| (first + i, cubic((fraction - i).abs()))), 4),
        };
        let (mut taps, mut count) = ([(0, 0.0); 4], 0);
        for &(at, weight) in &all.0[..all.1] {
            let inside = (0.0..=last).contains(&at);
            let at = match self.outside {
                Outside::Zeros if !inside => continue,
                Outside::Border => at.clamp(0.0, last),
                Outside::Reflection if !inside => reflect(at, low, high).clamp(0.0, last),
                Outside::Zeros | Outside::Reflection => at,
            };
            // A cast of NaN gives 0.
            taps[count] = (at as usize, weight as f32);
            count += 1;
        }
        (taps, count)
    }
}

/// `x` mirrored at `low` and `high` until it lies between them.
fn reflect(x: f64, low: f64, high: f64) -> f64 {
    let range = high - low;
    if range <= 0.0 {
        return low;
    }
    let beyond = if x < low { low - x } else { x - high };
    if beyond < 0.0 {
        return x;
    }
    let (turns, rest) = ((beyond / range).floor(), beyond % range);
    match (x < low, turns % 2.0 == 0.0) {
        (true, true) | (false, false) => low + rest,
        (true, false) | (false, true) => high - rest,
    }
}

/// The cubic convolution filter (Keys, 1981) at a distance of up to 2.
#[inline(always)]
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.75;
    match x {
        ..1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        ..2.0 => ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A,
        _ => 0.0,
    }
}

struct Sample<'a> {
    grid: &'a Grid<'a>,
    places: Range<usize>,
    output: *mut f32,
}

impl Kernel for Sample<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, _isa: I) {
        let Grid { channels, height, width, image, places, .. } = *self.grid;
        let (pixels, count) = (height * width, places.len() / 2);
        for place in self.places {
            let (rows, row_count) = self.grid.taps(places[2 * place + 1], height);
            let (columns, column_count) = self.grid.taps(places[2 * place], width);
            for channel in 0..channels {
                let plane = &image[channel * pixels..][..pixels];
                let mut sum = 0.0;
                for &(y, by_row) in &rows[..row_count] {
                    for &(x, by_column) in &columns[..column_count] {
                        sum += plane[y * width + x] * (by_row * by_column);
                    }
                }
                // SAFETY: the entry checked the length.
                unsafe { self.output.add(channel * count + place).write(sum) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::conv::tests::{blocked, unblocked};
    use super::super::testing::*;
    use super::*;

    /// The image at `(y, x)`, linear between pixels.
    fn linear(plane: &[f32], height: usize, width: usize, y: f64, x: f64) -> f64 {
        let axis = |at: f64, extent: usize| {
            let at = at.clamp(0.0, extent as f64 - 1.0);
            let low = (at as usize).min(extent.saturating_sub(2));
            (low, (low + 1).min(extent - 1), at - low as f64)
        };
        let ((top, bottom, down), (left, right, along)) = (axis(y, height), axis(x, width));
        let pixel = |y: usize, x: usize| f64::from(plane[y * width + x]);
        let row = |y: usize| pixel(y, left) * (1.0 - along) + pixel(y, right) * along;
        row(top) * (1.0 - down) + row(bottom) * down
    }

    #[test]
    fn regions_are_means_of_samples() {
        for level in levels() {
            let mut random = Random::new(41);
            for _ in rounds(60) {
                let channels = random.between(1, 40);
                let (height, width) = (random.between(1, 9), random.between(1, 9));
                let bins = [random.between(1, 4), random.between(1, 4)];
                let mut side = |extent: usize, bins: usize| {
                    let start = f64::from(random.unit()) * extent as f64;
                    let bin = f64::from(random.unit() + 1.0) * extent as f64 / bins as f64;
                    Side { start, bin, samples: random.between(0, 3) }
                };
                let (rows, columns) = (side(height, bins[0]), side(width, bins[1]));
                let map = random.units(channels * height * width);
                let mut expected = Vec::new();
                for plane in map.chunks(height * width) {
                    for bin in 0..bins[0] * bins[1] {
                        let at = |side: &Side, bin: usize, sample: usize| {
                            side.start + (bin as f64 + (sample as f64 + 0.5) / side.samples as f64) * side.bin
                        };
                        let samples = (0..rows.samples).flat_map(|y| (0..columns.samples).map(move |x| (y, x)));
                        let values = samples.map(|(y, x)| {
                            let (y, x) = (at(&rows, bin / bins[1], y), at(&columns, bin % bins[1], x));
                            let inside = |at: f64, extent: usize| (-1.0..=extent as f64).contains(&at);
                            let is_inside = inside(y, height) && inside(x, width);
                            if is_inside { linear(plane, height, width, y, x) } else { 0.0 }
                        });
                        let count = (rows.samples * columns.samples).max(1);
                        expected.push(values.sum::<f64>() / count as f64);
                    }
                }
                let image = blocked(level, channels, height * width, &map);
                let region = Region { channels, height, width, map: &image, rows, columns, bins };
                let mut output = vec![f32::NAN; channels.next_multiple_of(BLOCK) * bins[0] * bins[1]];
                align_region(level, &region, Output::new(&mut output));
                let actual = unblocked(level, channels, bins[0] * bins[1], &output);
                // Weights of f32, and sums of at most 36 products.
                assert_near(level, &region.rows, &actual, &expected, 1e-5);
            }
        }
    }

    #[test]
    fn endless_regions_are_zero() {
        let level = IsaLevel::detect();
        let map = [1.0; BLOCK];
        for (start, bin, samples) in
            [(-1e30, 2e30, usize::MAX), (f64::NAN, 1.0, 2), (0.0, f64::INFINITY, 7), (0.0, 0.0, 0)]
        {
            let side = Side { start, bin, samples };
            let (rows, columns, bins) = (side, side, [1, 1]);
            let region = Region { channels: 1, height: 1, width: 1, map: &map, rows, columns, bins };
            let mut output = [f32::NAN; BLOCK];
            align_region(level, &region, Output::new(&mut output));
            assert_eq!(output[0], 0.0, "{side:?}");
        }
    }

    #[test]
    fn places_are_interpolated() {
        for level in levels() {
            let mut random = Random::new(42);
            for _ in rounds(60) {
                let (channels, height, width) = (random.between(1, 3), random.between(1, 7), random.between(1, 7));
                let image = random.units(channels * height * width);
                let count = random.between(1, 9);
                let places = random.units(2 * count);
                let grid = Grid {
                    channels,
                    height,
                    width,
                    image: &image,
                    places: &places,
                    filter: Filter::Linear,
                    outside: Outside::Border,
                    align_corners: random.between(0, 1) == 0,
                };
                let mut output = vec![f32::NAN; channels * count];
                for cut in random_cuts(&mut random, count) {
                    sample_grid(level, &grid, cut, Output::new(&mut output));
                }
                let mut expected = Vec::new();
                for plane in image.chunks(height * width) {
                    for place in places.chunks(2) {
                        let at = |place: f32, extent: usize| match grid.align_corners {
                            true => (f64::from(place) + 1.0) / 2.0 * (extent as f64 - 1.0),
                            false => (f64::from(place) + 1.0) / 2.0 * extent as f64 - 0.5,
                        };
                        expected.push(linear(plane, height, width, at(place[1], height), at(place[0], width)));
                    }
                }
                assert_near(level, &grid.align_corners, &output, &expected, 1e-6);
            }
        }
    }

    #[test]
    fn outside_lies_what_was_asked_for() {
        let image = [1.0, 2.0, 3.0];
        for level in levels() {
            let sample = |filter, outside, x: f32| {
                let places = [x, 0.0];
                let grid = Grid {
                    channels: 1,
                    height: 1,
                    width: 3,
                    image: &image,
                    places: &places,
                    filter,
                    outside,
                    align_corners: true,
                };
                let mut output = [f32::NAN];
                sample_grid(level, &grid, 0..1, Output::new(&mut output));
                output[0]
            };
            for (outside, x, expected) in [
                (Outside::Zeros, 1.5, 1.5),
                (Outside::Zeros, 2.5, 0.0),
                (Outside::Border, 2.5, 3.0),
                (Outside::Border, f32::NEG_INFINITY, 1.0),
                (Outside::Reflection, 1.5, 2.5),
                (Outside::Reflection, -2.0, 2.0),
                (Outside::Zeros, f32::NAN, 0.0),
            ] {
                assert_eq!(sample(Filter::Linear, outside, x), expected, "{outside:?} at {x}");
            }
            assert_eq!(sample(Filter::Nearest, Outside::Zeros, 0.6), 3.0);
            // Between 1 and 2, with 1 again before them: −0.09375, 0.59375, 0.59375, −0.09375.
            assert_eq!(sample(Filter::Cubic, Outside::Border, -0.5), 1.40625);
        }
    }
}
