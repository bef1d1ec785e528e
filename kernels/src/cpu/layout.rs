//! Between row-major `NCHW` and blocked `NCHW16c` = `[ceil(C/16)][H·W][16]`, one image at a time.
//!
//! Lanes past the last channel are written as 0 on the way in and dropped on the way out. Concatenation and slicing along
//! channels need no kernel where the boundaries are multiples of 16: whole blocks are contiguous.

use std::ops::Range;

use super::dispatch::{Kernel, dispatch, dispatch_bf16};
use super::epilogue::Output;
use super::isa::Isa;
use super::movement::rows_apart;
use super::{BLOCK, IsaLevel};

/// Pixels in a unit of conversion.
const UNIT_PIXELS: usize = 512;

/// Elements of a blocked image.
pub fn blocked_len(channels: usize, pixels: usize) -> usize {
    channels.div_ceil(BLOCK) * BLOCK * pixels
}

/// Units of work of a conversion.
pub fn layout_units(channels: usize, pixels: usize) -> usize {
    channels.div_ceil(BLOCK) * pixels.div_ceil(UNIT_PIXELS)
}

/// Converts units of an image `[channels, pixels]` to `[ceil(channels/16)][pixels][16]`.
pub fn nchw_to_blocked(
    level: IsaLevel,
    channels: usize,
    pixels: usize,
    input: &[f32],
    units: Range<usize>,
    output: Output<'_>,
) {
    assert!(units.end <= layout_units(channels, pixels) || units.is_empty());
    assert!(input.len() >= channels * pixels && output.len() >= blocked_len(channels, pixels));
    dispatch(level, ToBlocked { channels, pixels, input, units, output: output.pointer() });
}

/// Converts units of an image `[ceil(channels/16)][pixels][16]` to `[channels, pixels]`.
pub fn blocked_to_nchw(
    level: IsaLevel,
    channels: usize,
    pixels: usize,
    input: &[f32],
    units: Range<usize>,
    output: Output<'_>,
) {
    assert!(units.end <= layout_units(channels, pixels) || units.is_empty());
    assert!(output.len() >= channels * pixels && input.len() >= blocked_len(channels, pixels));
    dispatch(level, FromBlocked { channels, pixels, input, units, output: output.pointer() });
}

/// Rounds units of an image `[ceil(channels/16)][pixels][16]` to bfloat16: `[ceil(channels/16)][pixels][8]` words of two neighbouring channels,
/// the first in the lower bits, 0 past the last channel. Words are held as floats of the same bits.
pub fn narrow_image(
    level: IsaLevel,
    channels: usize,
    pixels: usize,
    input: &[f32],
    units: Range<usize>,
    output: Output<'_>,
) {
    assert!(units.end <= layout_units(channels, pixels) || units.is_empty());
    let len = blocked_len(channels, pixels);
    assert!(input.len() >= len && output.len() >= len / 2);
    dispatch_bf16(level, NarrowImage { channels, pixels, input, units, output: output.pointer() });
}

/// The block and the pixels of a unit.
fn unit_range(unit: usize, pixels: usize) -> (usize, Range<usize>) {
    let per_block = pixels.div_ceil(UNIT_PIXELS);
    let start = unit % per_block * UNIT_PIXELS;
    (unit / per_block, start..pixels.min(start + UNIT_PIXELS))
}

struct ToBlocked<'a> {
    channels: usize,
    pixels: usize,
    input: &'a [f32],
    units: Range<usize>,
    output: *mut f32,
}

impl Kernel for ToBlocked<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        for unit in self.units {
            let (block, pixels) = unit_range(unit, self.pixels);
            let channels = BLOCK.min(self.channels - block * BLOCK);
            // SAFETY: the entry checked the lengths; unit, channel and pixel are inside.
            unsafe {
                let from = self.input.as_ptr().add(block * BLOCK * self.pixels);
                let to = self.output.add(block * BLOCK * self.pixels);
                let mut pixel = pixels.start;
                if channels == BLOCK {
                    while pixel + I::LANES <= pixels.end {
                        for c in (0..BLOCK).step_by(I::LANES) {
                            let rows = rows_apart(from.add(c * self.pixels + pixel), self.pixels);
                            isa.transpose(rows, to.add(pixel * BLOCK + c), BLOCK);
                        }
                        pixel += I::LANES;
                    }
                }
                for pixel in pixel..pixels.end {
                    for c in 0..channels {
                        to.add(pixel * BLOCK + c).write(from.add(c * self.pixels + pixel).read());
                    }
                    for c in channels..BLOCK {
                        to.add(pixel * BLOCK + c).write(0.0);
                    }
                }
            }
        }
    }
}

struct NarrowImage<'a> {
    channels: usize,
    pixels: usize,
    input: &'a [f32],
    units: Range<usize>,
    output: *mut f32,
}

impl Kernel for NarrowImage<'_> {
    type Output = ();
    const OF_HALVES: bool = true;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        for unit in self.units {
            let (block, pixels) = unit_range(unit, self.pixels);
            let channels = BLOCK.min(self.channels - block * BLOCK);
            // SAFETY: the entry checked the lengths; unit, channel and pixel are inside.
            unsafe {
                let from = self.input.as_ptr().add((block * self.pixels + pixels.start) * BLOCK);
                let to = self.output.cast::<u16>().add((block * self.pixels + pixels.start) * BLOCK);
                if channels == BLOCK {
                    for at in (0..pixels.len() * BLOCK).step_by(I::LANES) {
                        isa.store_bf16(to.add(at), isa.load(from.add(at)));
                    }
                    continue;
                }
                for pixel in 0..pixels.len() {
                    for lane in (0..BLOCK).step_by(I::LANES) {
                        let at = pixel * BLOCK + lane;
                        let values = match channels.saturating_sub(lane) {
                            0 => isa.zero(),
                            left if left < I::LANES => isa.load_partial(from.add(at), left),
                            _ => isa.load(from.add(at)),
                        };
                        isa.store_bf16(to.add(at), values);
                    }
                }
            }
        }
    }
}

struct FromBlocked<'a> {
    channels: usize,
    pixels: usize,
    input: &'a [f32],
    units: Range<usize>,
    output: *mut f32,
}

impl Kernel for FromBlocked<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        for unit in self.units {
            let (block, pixels) = unit_range(unit, self.pixels);
            let channels = BLOCK.min(self.channels - block * BLOCK);
            // SAFETY: the entry checked the lengths; unit, channel and pixel are inside.
            unsafe {
                let from = self.input.as_ptr().add(block * BLOCK * self.pixels);
                let to = self.output.add(block * BLOCK * self.pixels);
                let mut pixel = pixels.start;
                if channels == BLOCK {
                    while pixel + I::LANES <= pixels.end {
                        for c in (0..BLOCK).step_by(I::LANES) {
                            let rows = rows_apart(from.add(pixel * BLOCK + c), BLOCK);
                            isa.transpose(rows, to.add(c * self.pixels + pixel), self.pixels);
                        }
                        pixel += I::LANES;
                    }
                }
                for pixel in pixel..pixels.end {
                    for c in 0..channels {
                        to.add(c * self.pixels + pixel).write(from.add(pixel * BLOCK + c).read());
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn blocks_hold_sixteen_channels_and_zeros_past_the_last() {
        for level in levels() {
            let mut random = Random::new(3);
            for (channels, pixels) in [(0, 5), (1, 1), (3, 50), (16, 49), (24, 16), (33, 700), (48, 1030)] {
                let image = random.units(channels * pixels);
                let mut blocked = vec![f32::NAN; blocked_len(channels, pixels)];
                let mut back = vec![f32::NAN; channels * pixels];
                for units in random_cuts(&mut random, layout_units(channels, pixels)) {
                    nchw_to_blocked(level, channels, pixels, &image, units, Output::new(&mut blocked));
                }
                for (at, &value) in blocked.iter().enumerate() {
                    let (block, pixel, lane) = (at / BLOCK / pixels, at / BLOCK % pixels, at % BLOCK);
                    let channel = block * BLOCK + lane;
                    let expected = if channel < channels { image[channel * pixels + pixel] } else { 0.0 };
                    assert_eq!(value, expected, "{} {channels} x {pixels} [{at}]", level.name());
                }
                for units in random_cuts(&mut random, layout_units(channels, pixels)) {
                    blocked_to_nchw(level, channels, pixels, &blocked, units, Output::new(&mut back));
                }
                assert_eq!(back, image, "{} {channels} x {pixels}", level.name());
            }
        }
    }
}
