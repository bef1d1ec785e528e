//! The sliding window that convolution and pooling share.

use super::{NodeReader, Spelling};
use crate::{Dim, ImportError, OpError};
use std::ops::Range;

/// Kernel extents, strides, dilations and padding over the spatial axes (all but `n` and `c`).
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// `None` where the weight says (convolutions).
    pub kernel_shape: Option<Vec<usize>>,
    /// Empty for all ones.
    pub strides: Vec<usize>,
    /// Empty for all ones.
    pub dilations: Vec<usize>,
    pub padding: Padding,
    /// Output extents round up instead of down (pooling only).
    pub ceil_mode: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Padding {
    /// Elements added before and after each spatial axis; empty for none.
    Explicit { begin: Vec<usize>, end: Vec<usize> },
    /// `output = ⌈input / stride⌉`, an odd element of padding at the end.
    SameUpper,
    /// The same, an odd element at the beginning.
    SameLower,
}

/// One spatial axis of a window over an input of known extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowAxis {
    pub input: usize,
    pub output: usize,
    pub kernel: usize,
    pub stride: usize,
    pub dilation: usize,
    pub pad_begin: usize,
    pub pad_end: usize,
}

/// Largest kernel extent, stride, dilation or pad that a file may ask for: keeps every product of two within an `i64`.
const EXTENT_MAX: i64 = i32::MAX as i64;

impl Window {
    /// Takes `kernel_shape`, `strides`, `dilations`, `pads` and `auto_pad`.
    pub(super) fn read(node: &mut NodeReader) -> Result<Window, ImportError> {
        let mut extents = |name: &str, least: i64| -> Result<Option<Vec<usize>>, ImportError> {
            let Some(values) = node.optional_ints(name)? else { return Ok(None) };
            match values.iter().find(|v| !(least..=EXTENT_MAX).contains(v)) {
                Some(v) if name == "pads" && *v < 0 => Err(node.unsupported(format!("negative padding ({v})"))),
                Some(v) => Err(node.corrupt(format!("'{name}' has {v}, outside {least}..={EXTENT_MAX}"))),
                None => Ok(Some(values.into_iter().map(|v| v as usize).collect())),
            }
        };
        let kernel_shape = extents("kernel_shape", 1)?;
        let strides = extents("strides", 1)?.unwrap_or_default();
        let dilations = extents("dilations", 1)?.unwrap_or_default();
        let mut begin = extents("pads", 0)?.unwrap_or_default();
        if begin.len() % 2 != 0 {
            return Err(node.corrupt(format!("'pads' needs two values per spatial axis, has {}", begin.len())));
        }
        let end = begin.split_off(begin.len() / 2);
        let padded = begin.iter().chain(&end).any(|&pad| pad != 0);
        let padding = match node.string("auto_pad", "NOTSET")?.as_str() {
            "NOTSET" => Padding::Explicit { begin, end },
            "VALID" if !padded => Padding::Explicit { begin: Vec::new(), end: Vec::new() },
            "SAME_UPPER" if !padded => Padding::SameUpper,
            "SAME_LOWER" if !padded => Padding::SameLower,
            mode @ ("VALID" | "SAME_UPPER" | "SAME_LOWER") => {
                return Err(node.corrupt(format!("has both 'pads' and auto_pad {mode}")));
            }
            other => return Err(node.corrupt(format!("auto_pad '{other}' is not defined"))),
        };
        Ok(Window { kernel_shape, strides, dilations, padding, ceil_mode: false })
    }

    pub(super) fn spell(&self, spelling: Spelling) -> Spelling {
        let ints = |values: &[usize]| values.iter().map(|&v| v as i64).collect::<Vec<_>>();
        let mut lists: Vec<(&'static str, Vec<i64>)> = Vec::new();
        if let Some(kernel) = &self.kernel_shape {
            lists.push(("kernel_shape", ints(kernel)));
        }
        lists.push(("strides", ints(&self.strides)));
        lists.push(("dilations", ints(&self.dilations)));
        if let Padding::Explicit { begin, end } = &self.padding {
            lists.push(("pads", [ints(begin), ints(end)].concat()));
        }
        let spelling = (lists.into_iter().filter(|(_, values)| !values.is_empty()))
            .fold(spelling, |spelling, (name, values)| spelling.with(name, values));
        let spelling = match self.padding {
            Padding::Explicit { .. } => spelling,
            Padding::SameUpper => spelling.with("auto_pad", "SAME_UPPER"),
            Padding::SameLower => spelling.with("auto_pad", "SAME_LOWER"),
        };
        if self.ceil_mode { spelling.with("ceil_mode", 1) } else { spelling }
    }

    /// Output extents over spatial extents `input`, by the formulas of ONNX's `Conv` and `MaxPool`:
    /// `⌊(input + pads − dilation·(kernel − 1) − 1) / stride⌋ + 1`, or with `⌈⌉`, where no window may start in the padding
    /// at the end.
    pub fn output_extents(&self, input: &[Dim], kernel: &[Dim]) -> Result<Vec<Dim>, OpError> {
        self.check_rank(input.len(), kernel.len())?;
        let one = Dim::Const(1);
        let mut outputs = Vec::with_capacity(input.len());
        for (axis, (input, kernel)) in input.iter().zip(kernel).enumerate() {
            let stride = Dim::from(self.stride(axis));
            let output = match &self.padding {
                Padding::SameUpper | Padding::SameLower => input.ceil_div(&stride),
                Padding::Explicit { .. } => {
                    let (begin, end) = self.explicit_pads(axis);
                    let padded = input.clone() + Dim::from(begin) + Dim::from(end);
                    let span = (kernel.clone() - one.clone()) * Dim::from(self.dilation(axis)) + one.clone();
                    if let (Some(padded), Some(span)) = (padded.as_const(), span.as_const())
                        && span > padded
                    {
                        return Err(OpError::input(format!(
                            "the window spans {span} elements of spatial axis {axis}, which has {padded} with its padding"
                        )));
                    }
                    let last_start = padded - span;
                    if self.ceil_mode {
                        let starts = (input.clone() + Dim::from(begin)).ceil_div(&stride);
                        (last_start + stride.clone()).ceil_div(&stride).minimum(&starts)
                    } else {
                        (last_start + stride.clone()).floor_div(&stride)
                    }
                }
            };
            outputs.push(output);
        }
        Ok(outputs)
    }

    /// The window over an input of spatial extents `input`.
    pub fn axes(&self, input: &[usize], kernel: &[usize]) -> Result<Vec<WindowAxis>, OpError> {
        let dims = |extents: &[usize]| extents.iter().map(|&d| Dim::from(d)).collect::<Vec<_>>();
        let outputs = self.output_extents(&dims(input), &dims(kernel))?;
        let axes = outputs.into_iter().enumerate().map(|(axis, output)| {
            let (input, kernel) = (input[axis], kernel[axis]);
            let (stride, dilation) = (self.stride(axis), self.dilation(axis));
            let too_large = || OpError::Resource(format!("spatial axis {axis} is too large"));
            let output = output.as_const().and_then(|d| usize::try_from(d).ok()).ok_or_else(too_large)?;
            let span = (kernel.saturating_sub(1)).checked_mul(dilation).and_then(|n| n.checked_add(1));
            let covered = output.saturating_sub(1).checked_mul(stride).zip(span).and_then(|(a, b)| a.checked_add(b));
            let total = covered.ok_or_else(too_large)?.saturating_sub(input);
            let (pad_begin, pad_end) = match self.padding {
                Padding::Explicit { .. } => self.explicit_pads(axis),
                Padding::SameUpper => (total / 2, total - total / 2),
                Padding::SameLower => (total - total / 2, total / 2),
            };
            Ok(WindowAxis { input, output, kernel, stride, dilation, pad_begin, pad_end })
        });
        axes.collect()
    }

    /// The pooling window's own extents.
    pub(super) fn kernel(&self) -> Result<&[usize], OpError> {
        self.kernel_shape.as_deref().ok_or_else(|| OpError::input("has no kernel_shape"))
    }

    pub(super) fn stride(&self, axis: usize) -> usize {
        self.strides.get(axis).copied().unwrap_or(1)
    }

    pub(super) fn dilation(&self, axis: usize) -> usize {
        self.dilations.get(axis).copied().unwrap_or(1)
    }

    /// Zeros where the padding depends on the input.
    pub(super) fn explicit_pads(&self, axis: usize) -> (usize, usize) {
        match &self.padding {
            Padding::Explicit { begin, end } => {
                (begin.get(axis).copied().unwrap_or(0), end.get(axis).copied().unwrap_or(0))
            }
            _ => (0, 0),
        }
    }

    /// Every list that is there must have an element for each of `rank` spatial axes.
    pub(super) fn check_rank(&self, rank: usize, kernel_rank: usize) -> Result<(), OpError> {
        let pads = match &self.padding {
            Padding::Explicit { begin, .. } => begin.len(),
            _ => 0,
        };
        let kernel_shape = self.kernel_shape.as_ref().map_or(rank, Vec::len);
        let lists = [("strides", self.strides.len()), ("dilations", self.dilations.len()), ("pads", pads)];
        let wrong = lists.into_iter().find(|&(_, len)| len != 0 && len != rank);
        let kernels = [("kernel_shape", kernel_shape), ("kernel", kernel_rank)];
        match wrong.or_else(|| kernels.into_iter().find(|&(_, len)| len != rank)) {
            None => Ok(()),
            Some((name, len)) => Err(OpError::input(format!("{name} is for {len} spatial axes, the input has {rank}"))),
        }
    }
}

impl WindowAxis {
    const UNIT: WindowAxis =
        WindowAxis { input: 1, output: 1, kernel: 1, stride: 1, dilation: 1, pad_begin: 0, pad_end: 0 };

    /// The outputs for which kernel element `tap` lies inside the input (not in its padding).
    pub fn outputs_at(&self, tap: usize) -> Range<usize> {
        let offset = tap * self.dilation;
        let first = self.pad_begin.saturating_sub(offset).div_ceil(self.stride);
        let end = (self.input + self.pad_begin).saturating_sub(offset).div_ceil(self.stride).min(self.output);
        first.min(end)..end
    }

    /// The input element that kernel element `tap` of `output` reads, where [`WindowAxis::outputs_at`] holds.
    pub fn input_at(&self, output: usize, tap: usize) -> usize {
        output * self.stride + tap * self.dilation - self.pad_begin
    }

    /// Kernel elements of `output` that lie inside the padded input.
    pub(super) fn taps_in_padded_input(&self, output: usize) -> usize {
        let end = self.input + self.pad_begin + self.pad_end;
        end.saturating_sub(output * self.stride).div_ceil(self.dilation).min(self.kernel)
    }
}

/// As three axes, with unit axes in front: what evaluation loops over.
pub(super) fn three_axes(axes: &[WindowAxis]) -> Result<[WindowAxis; 3], OpError> {
    if axes.len() > 3 {
        return Err(OpError::unsupported(format!("windows over {} spatial axes", axes.len())));
    }
    let mut three = [WindowAxis::UNIT; 3];
    three[3 - axes.len()..].copy_from_slice(axes);
    Ok(three)
}

/// Calls `visit(output, input)` (flat indices in their planes) for every input element in the window of every output;
/// outputs in order, each one's inputs in order.
pub(super) fn for_each_tap(axes: &[WindowAxis; 3], mut visit: impl FnMut(usize, usize)) {
    let [z, y, x] = axes;
    let taps = |axis: &WindowAxis, output: usize| {
        let skipped = axis.pad_begin.saturating_sub(output * axis.stride).div_ceil(axis.dilation);
        let inside = (axis.input + axis.pad_begin).saturating_sub(output * axis.stride).div_ceil(axis.dilation);
        let end = inside.min(axis.kernel);
        skipped.min(end)..end
    };
    let mut output = 0;
    for oz in 0..z.output {
        for oy in 0..y.output {
            for ox in 0..x.output {
                for tz in taps(z, oz) {
                    for ty in taps(y, oy) {
                        let row = (z.input_at(oz, tz) * y.input + y.input_at(oy, ty)) * x.input;
                        for tx in taps(x, ox) {
                            visit(output, row + x.input_at(ox, tx));
                        }
                    }
                }
                output += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(stride: usize, dilation: usize, pads: Option<(usize, usize)>, ceil_mode: bool) -> Window {
        let padding = match pads {
            Some((begin, end)) => Padding::Explicit { begin: vec![begin], end: vec![end] },
            None => Padding::SameUpper,
        };
        Window { kernel_shape: None, strides: vec![stride], dilations: vec![dilation], padding, ceil_mode }
    }

    #[test]
    fn extents_follow_the_formulas() {
        let check = |window: Window, input: usize, kernel: usize, expected: (usize, usize, usize)| {
            let axis = window.axes(&[input], &[kernel]).unwrap()[0];
            assert_eq!((axis.output, axis.pad_begin, axis.pad_end), expected, "{window:?} {input} {kernel}");
        };
        check(window(2, 1, Some((1, 1)), false), 224, 3, (112, 1, 1));
        check(window(2, 1, Some((0, 0)), false), 55, 3, (27, 0, 0));
        check(window(2, 1, Some((0, 0)), true), 56, 3, (28, 0, 0));
        // A window that would start in the padding at the end is left out.
        check(window(2, 1, Some((0, 1)), true), 4, 1, (2, 0, 1));
        check(window(2, 1, None, false), 5, 4, (3, 1, 2));
        check(window(1, 3, Some((0, 0)), false), 7, 3, (1, 0, 0));
        let error = window(1, 3, Some((0, 0)), false).axes(&[6], &[3]).unwrap_err();
        assert_eq!(error.to_string(), "the window spans 7 elements of spatial axis 0, which has 6 with its padding");
    }

    #[test]
    fn symbolic_extents_simplify() {
        let extents = |window: Window, kernel: i64| {
            window.output_extents(&[Dim::symbol("H")], &[kernel.into()]).unwrap()[0].to_string()
        };
        assert_eq!(extents(window(1, 1, Some((1, 1)), false), 3), "H");
        assert_eq!(extents(window(2, 1, Some((0, 0)), false), 2), "floor(H / 2)");
        assert_eq!(extents(window(2, 1, None, false), 3), "ceil(H / 2)");
    }

    #[test]
    fn taps_agree_with_a_plain_search() {
        for (stride, dilation, begin, end, kernel, input) in
            [(1, 1, 0, 0, 1, 1), (2, 1, 1, 1, 3, 7), (3, 2, 2, 0, 3, 9), (1, 3, 4, 4, 2, 2), (2, 2, 5, 1, 2, 3)]
        {
            let axis = window(stride, dilation, Some((begin, end)), false).axes(&[input], &[kernel]).unwrap()[0];
            let inside = |o: usize, t: usize| (begin..begin + input).contains(&(o * stride + t * dilation));
            let mut seen = Vec::new();
            for_each_tap(&three_axes(&[axis]).unwrap(), |o, i| seen.push((o, i)));
            let mut expected = Vec::new();
            for o in 0..axis.output {
                expected.extend((0..kernel).filter(|&t| inside(o, t)).map(|t| (o, o * stride + t * dilation - begin)));
            }
            assert_eq!(seen, expected);
            for t in 0..kernel {
                let found: Vec<usize> = (0..axis.output).filter(|&o| inside(o, t)).collect();
                assert_eq!(axis.outputs_at(t).collect::<Vec<_>>(), found);
            }
        }
    }
}
