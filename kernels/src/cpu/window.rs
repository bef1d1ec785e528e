//! How a sliding window lies on an image: what convolutions and pools share.

/// One spatial axis of a window. Output position `o`, tap `t` reads input position `o·stride + t·dilation − pad_before`; positions
/// outside the input are padding. (A transposed convolution reads these fields as ONNX does: see its module.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Axis {
    pub input: usize,
    pub output: usize,
    pub kernel: usize,
    pub stride: usize,
    pub dilation: usize,
    pub pad_before: usize,
    /// Matters only where padding is counted, in average pools.
    pub pad_after: usize,
}

impl Axis {
    /// The axis that a one-dimensional operator lacks: size 1, kernel 1.
    pub const UNIT: Axis = Axis { input: 1, output: 1, kernel: 1, stride: 1, dilation: 1, pad_before: 0, pad_after: 0 };

    pub(crate) fn assert_valid(&self) {
        assert!(self.kernel > 0 && self.stride > 0 && self.dilation > 0, "{self:?}");
        // All positions fit isize, so that no coordinate below can overflow.
        let reach = self
            .output
            .max(self.input)
            .checked_mul(self.stride)
            .and_then(|n| n.checked_add(self.kernel.checked_mul(self.dilation)?)?.checked_add(self.pad_before));
        assert!(reach.is_some_and(|n| n < isize::MAX as usize / 64), "{self:?}");
    }

    /// Whether every output reads exactly the input at its own position.
    pub(crate) fn is_pointwise(&self) -> bool {
        self.kernel == 1 && self.stride == 1 && self.pad_before == 0 && self.output == self.input
    }

    /// Input position of an output's first tap.
    #[inline(always)]
    pub(crate) fn start(&self, output: usize) -> isize {
        (output * self.stride) as isize - self.pad_before as isize
    }

    /// Input position of a tap that is inside the input.
    #[inline(always)]
    pub(crate) fn position(&self, output: usize, tap: usize) -> usize {
        (self.start(output) + (tap * self.dilation) as isize) as usize
    }

    /// The taps of an output that fall inside the input.
    #[inline(always)]
    pub(crate) fn taps_inside(&self, output: usize) -> std::ops::Range<usize> {
        let start = self.start(output);
        let low = if start < 0 { ((-start) as usize).div_ceil(self.dilation) } else { 0 };
        let room = self.input as isize - start;
        let high = if room <= 0 { 0 } else { (room as usize).div_ceil(self.dilation) };
        let high = high.min(self.kernel);
        low.min(high)..high
    }

    /// How many taps of an output fall inside input or padding.
    pub(crate) fn taps_inside_padded(&self, output: usize) -> usize {
        let start = self.start(output);
        let room = (self.input + self.pad_after) as isize - start;
        if room <= 0 { 0 } else { (room as usize).div_ceil(self.dilation).min(self.kernel) }
    }
}

/// Input positions that the taps of one output row (or of every pixel of a row) read: tap `first + j·step` of the kernel
/// reads `input_first + j·input_step`, for j below `count`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taps {
    pub first: usize,
    pub step: usize,
    pub count: usize,
    pub input_first: isize,
    pub input_step: isize,
}

impl Taps {
    /// Those of one output position of a convolution that are inside the input.
    pub fn inside(axis: &Axis, output: usize) -> Taps {
        let taps = axis.taps_inside(output);
        Taps {
            first: taps.start,
            step: 1,
            count: taps.len(),
            input_first: axis.start(output) + (taps.start * axis.dilation) as isize,
            input_step: axis.dilation as isize,
        }
    }

    /// All of them, relative to output position 0.
    pub fn all(axis: &Axis) -> Taps {
        Taps {
            first: 0,
            step: 1,
            count: axis.kernel,
            input_first: -(axis.pad_before as isize),
            input_step: axis.dilation as isize,
        }
    }

    /// Those of output position `output` of a transposed convolution: taps where `output + pad_before − tap·dilation` is
    /// a multiple of the stride, whatever its sign.
    pub fn transposed(axis: &Axis, output: usize) -> Taps {
        let (stride, dilation) = (axis.stride as isize, axis.dilation as isize);
        let position = output as isize + axis.pad_before as isize;
        let common = greatest_common_divisor(axis.stride, axis.dilation);
        let step = axis.stride / common;
        let first = (0..axis.kernel.min(step)).find(|&t| (position - t as isize * dilation) % stride == 0);
        match first {
            None => Taps { first: 0, step: 1, count: 0, input_first: 0, input_step: 0 },
            Some(first) => Taps {
                first,
                step,
                count: (axis.kernel - first).div_ceil(step),
                input_first: (position - first as isize * dilation) / stride,
                input_step: -((axis.dilation / common) as isize),
            },
        }
    }

    /// Drops the taps that read outside of `0..input`. For inputs that move one way along the taps.
    pub fn clipped(mut self, input: usize) -> Taps {
        let inside = |t: &Taps, j: usize| {
            let at = t.input_first + j as isize * t.input_step;
            at >= 0 && at < input as isize
        };
        while self.count > 0 && !inside(&self, 0) {
            self.first += self.step;
            self.input_first += self.input_step;
            self.count -= 1;
        }
        while self.count > 0 && !inside(&self, self.count - 1) {
            self.count -= 1;
        }
        self
    }
}

fn greatest_common_divisor(mut a: usize, mut b: usize) -> usize {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}
