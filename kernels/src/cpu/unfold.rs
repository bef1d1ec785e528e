//! What the windows of a convolution see, as the columns of a matrix: a convolution over up to three axes, with weights that need not
//! be known before the run, is then a product (Chellapilla, Puri, Simard, 2006).
//!
//! Columns go straight into the panels that [`super::gemm`] reads, so nothing is packed twice, and only as many at a time as the caller
//! has memory for.

use std::ops::Range;

use super::IsaLevel;
use super::dispatch::{Kernel, dispatch};
use super::gemm::{panel_count, panel_width};
use super::isa::Isa;
use super::window::Axis;

/// Most columns of a panel on any instruction set.
const PANEL_MAX: usize = 64;

/// The windows on `channels` of an image `[channels, depth, height, width]`.
#[derive(Clone, Copy, Debug)]
pub struct Unfold<'a> {
    pub channels: usize,
    /// Depth, height and width; an axis that images lack is [`Axis::UNIT`].
    pub axes: [Axis; 3],
    pub input: &'a [f32],
}

impl Unfold<'_> {
    /// Rows of the matrix: one per channel and tap, channels first, the taps of the last axis next to each other.
    pub fn rows(&self) -> usize {
        self.axes.iter().fold(self.channels, |rows, axis| rows * axis.kernel)
    }

    /// Columns of the matrix: one per output position.
    pub fn columns(&self) -> usize {
        self.axes.iter().map(|axis| axis.output).product()
    }
}

/// Writes panels `panels` of the matrix as [`super::gemm::pack_b`] lays them out; `packed` holds these alone.
pub fn unfold(level: IsaLevel, problem: &Unfold<'_>, panels: Range<usize>, packed: &mut [f32]) {
    let width = panel_width(level);
    problem.axes.iter().for_each(Axis::assert_valid);
    let pixels: usize = problem.axes.iter().map(|axis| axis.input).product();
    assert!(problem.input.len() >= problem.channels * pixels, "input of {}", problem.input.len());
    assert!(panels.end <= panel_count(level, problem.columns()), "panels {panels:?} of {}", problem.columns());
    assert!(width <= PANEL_MAX && packed.len() >= panels.len() * width * problem.rows(), "packed {}", packed.len());
    dispatch(level, Unfolding { problem, panels, width, packed });
}

/// Columns of a panel whose positions follow each other in one row of the output.
#[derive(Clone, Copy, Default)]
struct Run {
    lane: usize,
    count: usize,
    position: [usize; 3],
}

struct Unfolding<'a> {
    problem: &'a Unfold<'a>,
    panels: Range<usize>,
    width: usize,
    packed: &'a mut [f32],
}

impl Kernel for Unfolding<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, _isa: I) {
        let Unfold { channels, axes: [depth, height, width], input } = *self.problem;
        let (rows, columns) = (self.problem.rows(), self.problem.columns());
        let mut memory = [Run::default(); PANEL_MAX];
        for (panel, packed) in self.panels.zip(self.packed.chunks_exact_mut(rows * self.width)) {
            let first = panel * self.width;
            let used = self.width.min(columns - first);
            let runs = runs(&mut memory, first, used, height.output, width.output);
            let mut lines = packed.chunks_exact_mut(self.width);
            for channel in 0..channels {
                for (z, y) in (0..depth.kernel).flat_map(|z| (0..height.kernel).map(move |y| (z, y))) {
                    for x in 0..width.kernel {
                        let line = lines.next().expect("a row per channel and tap");
                        line[used..].fill(0.0);
                        for run in runs {
                            let to = &mut line[run.lane..][..run.count];
                            let plane = tap(&depth, run.position[0], z);
                            match plane.zip(tap(&height, run.position[1], y)) {
                                None => to.fill(0.0),
                                Some((plane, row)) => {
                                    let row = (channel * depth.input + plane) * height.input + row;
                                    copy(&input[row * width.input..][..width.input], &width, run.position[2], x, to);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The runs of `count` columns from `first`.
#[inline(always)]
fn runs(memory: &mut [Run; PANEL_MAX], first: usize, count: usize, height: usize, width: usize) -> &[Run] {
    let (mut lane, mut found) = (0, 0);
    while lane < count {
        let (line, x) = ((first + lane) / width, (first + lane) % width);
        let run = Run { lane, count: (width - x).min(count - lane), position: [line / height, line % height, x] };
        memory[found] = run;
        lane += run.count;
        found += 1;
    }
    &memory[..found]
}

/// What tap `tap` of output position `output` reads, unless it is padding.
#[inline(always)]
fn tap(axis: &Axis, output: usize, tap: usize) -> Option<usize> {
    let at = axis.start(output) + (tap * axis.dilation) as isize;
    usize::try_from(at).ok().filter(|&at| at < axis.input)
}

/// What tap `tap` of the output positions from `output` on reads of a row.
#[inline(always)]
fn copy(row: &[f32], axis: &Axis, output: usize, tap: usize, to: &mut [f32]) {
    let start = axis.start(output) + (tap * axis.dilation) as isize;
    // Those before `low` and from `high` on are padding.
    let low = ((-start).max(0) as usize).div_ceil(axis.stride).min(to.len());
    let room = (row.len() as isize - start).max(0) as usize;
    let high = room.div_ceil(axis.stride).clamp(low, to.len());
    to[..low].fill(0.0);
    to[high..].fill(0.0);
    if low == high {
        return;
    }
    let from = &row[(start + (low * axis.stride) as isize) as usize..];
    match axis.stride {
        1 => to[low..high].iter_mut().zip(from).for_each(|(to, from)| *to = *from),
        stride => to[low..high].iter_mut().zip(from.iter().step_by(stride)).for_each(|(to, from)| *to = *from),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Output;
    use super::super::conv::tests::random_axis;
    use super::super::gemm::{Matrix, pack_b, packed_b_len};
    use super::super::testing::*;
    use super::*;

    #[test]
    fn columns_are_what_the_windows_see() {
        for level in levels() {
            let mut random = Random::new(31);
            for _ in rounds(60) {
                let mut axes = [Axis::UNIT; 3];
                for axis in axes.iter_mut().skip(random.between(0, 2)) {
                    *axis = random_axis(&mut random, false);
                }
                let channels = random.between(1, 5);
                let input = random.units(channels * axes.iter().map(|axis| axis.input).product::<usize>());
                let problem = Unfold { channels, axes, input: &input };
                let (rows, columns) = (problem.rows(), problem.columns());
                let mut matrix = Vec::with_capacity(rows * columns);
                for row in 0..rows {
                    for column in 0..columns {
                        let (mut taps, mut outputs, mut at, mut inside) = (row, column, 0, true);
                        let mut size = 1;
                        for axis in axes.iter().rev() {
                            let (tap, output) = (taps % axis.kernel, outputs % axis.output);
                            (taps, outputs) = (taps / axis.kernel, outputs / axis.output);
                            let read = (output * axis.stride + tap * axis.dilation) as i64 - axis.pad_before as i64;
                            inside &= (0..axis.input as i64).contains(&read);
                            at += size * read.max(0) as usize;
                            size *= axis.input;
                        }
                        matrix.push(if inside { input[taps * size + at] } else { 0.0 });
                    }
                }
                let mut expected = vec![f32::NAN; packed_b_len(level, rows, columns)];
                let panels = panel_count(level, columns);
                let view = Matrix::row_major(&matrix, columns);
                pack_b(level, view, rows, columns, 0..panels, Output::new(&mut expected));
                let mut actual = vec![f32::NAN; expected.len()];
                for cut in random_cuts(&mut random, panels) {
                    let size = rows * panel_width(level);
                    unfold(level, &problem, cut.clone(), &mut actual[cut.start * size..cut.end * size]);
                }
                assert_same_bits(level, &axes, &actual, &expected);
            }
        }
    }
}
