//! Between row-major and blocked images, and from those in f32 to those in bfloat16.

use crate::cpu::frame::{Buffer, Frame, Worker};
use cutover_kernels::cpu::{IsaLevel, layout};

/// Converts every image of a batch.
pub(in crate::cpu) struct Reorder {
    pub to_blocked: bool,
    pub images: usize,
    pub channels: usize,
    pub pixels: usize,
    pub from: Buffer,
    pub to: Buffer,
}

impl Reorder {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let Reorder { images, channels, pixels, .. } = *self;
        let (blocked, plain) = (layout::blocked_len(channels, pixels), channels * pixels);
        let (from_len, to_len) = if self.to_blocked { (plain, blocked) } else { (blocked, plain) };
        for (image, units) in per_image(images, layout::layout_units(channels, pixels), worker) {
            let from = &frame.floats(self.from)[image * from_len..][..from_len];
            let to = frame.output_at(self.to, image * to_len, to_len);
            match self.to_blocked {
                true => layout::nchw_to_blocked(level, channels, pixels, from, units, to),
                false => layout::blocked_to_nchw(level, channels, pixels, from, units, to),
            }
        }
    }
}

/// Rounds every blocked image of a batch to bfloat16.
pub(in crate::cpu) struct Narrow {
    pub images: usize,
    pub channels: usize,
    pub pixels: usize,
    pub from: Buffer,
    pub to: Buffer,
}

impl Narrow {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let Narrow { images, channels, pixels, .. } = *self;
        let len = layout::blocked_len(channels, pixels);
        for (image, units) in per_image(images, layout::layout_units(channels, pixels), worker) {
            let from = &frame.floats(self.from)[image * len..][..len];
            let to = frame.output_at(self.to, image * len / 2, len / 2);
            layout::narrow_image(level, channels, pixels, from, units, to);
        }
    }
}

/// This worker's part of `images · units` units: for each image it has some of, which.
pub(super) fn per_image(
    images: usize,
    units: usize,
    worker: &Worker<'_>,
) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> + use<> {
    let mine = worker.share(images * units);
    let first = mine.start.checked_div(units).unwrap_or(0);
    let last = if units == 0 { 0 } else { mine.end.div_ceil(units) };
    (first..last).map(move |image| {
        let start = mine.start.max(image * units) - image * units;
        let end = mine.end.min((image + 1) * units) - image * units;
        (image, start..end)
    })
}
