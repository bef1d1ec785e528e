//! Moving values without changing them: transposes, strided copies, gathered rows.
//!
//! Values of any type may be moved as words of their size: no bit is changed.

use std::ops::Range;

use super::IsaLevel;
use super::dispatch::{Kernel, dispatch};
use super::elementwise::Odometer;
use super::epilogue::Output;
use super::isa::Isa;

/// Rows of the source that make a unit of [`transpose`].
const UNIT_ROWS: usize = 64;

/// Units of work of [`transpose`].
pub fn transpose_units(batch: usize, rows: usize) -> usize {
    batch * rows.div_ceil(UNIT_ROWS)
}

/// Transposes each of `batch` matrices: `[batch][rows][columns]` to `[batch][columns][rows]`, for a range of units.
pub fn transpose(
    level: IsaLevel,
    batch: usize,
    rows: usize,
    columns: usize,
    input: &[f32],
    units: Range<usize>,
    output: Output<'_>,
) {
    assert!(units.is_empty() || units.end <= transpose_units(batch, rows), "units {units:?} of {batch} x {rows}");
    let len = batch * rows * columns;
    assert!(input.len() >= len && output.len() >= len, "{} and {} of {len}", input.len(), output.len());
    dispatch(level, Transpose { rows, columns, input, units, output: output.pointer() });
}

struct Transpose<'a> {
    rows: usize,
    columns: usize,
    input: &'a [f32],
    units: Range<usize>,
    output: *mut f32,
}

impl Kernel for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Transpose { rows, columns, .. } = self;
        let per_matrix = rows.div_ceil(UNIT_ROWS);
        for unit in self.units {
            let (matrix, first) = (unit / per_matrix, unit % per_matrix * UNIT_ROWS);
            let last = rows.min(first + UNIT_ROWS);
            // SAFETY: the entry checked the lengths; rows and columns are inside.
            unsafe {
                let from = self.input.as_ptr().add(matrix * rows * columns);
                let to = self.output.add(matrix * rows * columns);
                transpose_block(isa, from.add(first * columns), columns, to.add(first), rows, last - first, columns);
            }
        }
    }
}

/// Sixteen rows, `stride` values apart.
#[inline(always)]
pub(crate) fn rows_apart(first: *const f32, stride: usize) -> [*const f32; 16] {
    let mut rows = [first; 16];
    for (i, row) in rows.iter_mut().enumerate() {
        *row = first.wrapping_add(i * stride);
    }
    rows
}

/// Value `(i, j)` of `rows × columns` goes from `from + i·from_stride + j` to `to + j·to_stride + i`.
///
/// # Safety
/// Both are valid for that, and apart.
#[inline(always)]
pub(crate) unsafe fn transpose_block<I: Isa>(
    isa: I,
    from: *const f32,
    from_stride: usize,
    to: *mut f32,
    to_stride: usize,
    rows: usize,
    columns: usize,
) {
    let (whole_rows, whole_columns) = (rows / I::LANES * I::LANES, columns / I::LANES * I::LANES);
    // SAFETY: the caller.
    unsafe {
        // A column of squares at a time: what is written then lies in `LANES` runs that fill up.
        for j in (0..whole_columns).step_by(I::LANES) {
            for i in (0..whole_rows).step_by(I::LANES) {
                let rows = rows_apart(from.add(i * from_stride + j), from_stride);
                isa.transpose(rows, to.add(j * to_stride + i), to_stride);
            }
        }
        for i in 0..rows {
            let start = if i < whole_rows { whole_columns } else { 0 };
            for j in start..columns {
                to.add(j * to_stride + i).write(from.add(i * from_stride + j).read());
            }
        }
    }
}

/// What can be moved: the bits of a value of 1, 2, 4 or 8 bytes.
pub trait Word: Copy + Send + Sync + 'static {}

impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}
impl Word for f32 {}

/// Copies a strided view into a contiguous output: element `i` (an index per axis of `shape`) is `input[Σ i·strides]`. Any permutation of
/// axes, slice with positive steps, or broadcast is one. The range counts output elements and may be cut anywhere.
pub fn copy_strided<T: Word>(
    level: IsaLevel,
    shape: &[usize],
    strides: &[usize],
    input: &[T],
    range: Range<usize>,
    output: Output<'_, T>,
) {
    assert!(range.start <= range.end && range.end <= output.len(), "{range:?} of {} elements", output.len());
    if range.is_empty() {
        return;
    }
    let odometer = Odometer::new(shape, [strides]);
    assert!(range.end <= odometer.count(), "{range:?} of {shape:?}");
    let last: usize = shape.iter().zip(strides).map(|(n, stride)| (n - 1) * stride).sum();
    assert!(last < input.len(), "a view of {} elements is read at {last}", input.len());
    dispatch(level, CopyStrided { odometer, input, range, to: output.pointer() });
}

struct CopyStrided<'a, T> {
    odometer: Odometer<1>,
    input: &'a [T],
    range: Range<usize>,
    to: *mut T,
}

impl<T: Word> Kernel for CopyStrided<'_, T> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let mut odometer = self.odometer;
        let (row, [stride]) = (odometer.row(), odometer.row_strides());
        let mut position = odometer.seek(self.range.start);
        let mut element = self.range.start;
        while element < self.range.end {
            // Rows that read down a matrix whose rows are the next axis's: a transpose, in squares.
            if position == 0
                && let Some((rows, row_stride)) = odometer.rows_to_come()
                && stride > 1
                && row_stride == 1
            {
                let rows = rows.min((self.range.end - element) / row).min(UNIT_ROWS);
                if rows >= I::LANES {
                    // SAFETY: the entry checked the largest offset, and the range against the output; words of four bytes are
                    // moved as f32.
                    unsafe {
                        let from = self.input.as_ptr().add(odometer.offsets[0]);
                        let to = self.to.add(element);
                        match size_of::<T>() {
                            4 => transpose_block(isa, from.cast(), stride, to.cast(), row, row, rows),
                            _ => turn(from, stride, to, row, row, rows),
                        }
                    }
                    element += rows * row;
                    for _ in 0..rows {
                        odometer.next_row();
                    }
                    continue;
                }
            }
            let count = (row - position).min(self.range.end - element);
            // SAFETY: as above.
            unsafe {
                let from = self.input.as_ptr().add(odometer.offsets[0] + position * stride);
                let to = self.to.add(element);
                match stride {
                    1 => std::ptr::copy_nonoverlapping(from, to, count),
                    0 => std::slice::from_raw_parts_mut(to, count).fill(from.read()),
                    _ => (0..count).for_each(|i| to.add(i).write(from.add(i * stride).read())),
                }
            }
            element += count;
            position = 0;
            odometer.next_row();
        }
    }
}

/// As [`transpose_block`], for words of any size.
///
/// # Safety
/// Both are valid for that, and apart.
#[inline(always)]
unsafe fn turn<T: Word>(from: *const T, from_stride: usize, to: *mut T, to_stride: usize, rows: usize, columns: usize) {
    /// Side of a square: its rows of the destination fill a cache line or more.
    const SIDE: usize = 16;
    // The channels of an image, which are few: none is asked for whether it is there.
    // SAFETY: the caller.
    unsafe {
        match rows {
            2 => return turn_few::<T, 2>(from, from_stride, to, to_stride, columns),
            3 => return turn_few::<T, 3>(from, from_stride, to, to_stride, columns),
            4 => return turn_few::<T, 4>(from, from_stride, to, to_stride, columns),
            _ => {}
        }
    }
    for i in (0..rows).step_by(SIDE) {
        for j in 0..columns {
            // SAFETY: the caller.
            unsafe {
                let (from, to) = (from.add(i * from_stride + j), to.add(j * to_stride + i));
                for k in 0..SIDE.min(rows - i) {
                    to.add(k).write(from.add(k * from_stride).read());
                }
            }
        }
    }
}

/// [`turn`] of `ROWS` rows.
///
/// # Safety
/// As for that.
#[inline(always)]
unsafe fn turn_few<T: Word, const ROWS: usize>(
    from: *const T,
    from_stride: usize,
    to: *mut T,
    to_stride: usize,
    columns: usize,
) {
    for j in 0..columns {
        for i in 0..ROWS {
            // SAFETY: the caller.
            unsafe { to.add(j * to_stride + i).write(from.add(i * from_stride + j).read()) };
        }
    }
}

/// A piece of an output that comes from consecutive elements of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Its first element in the output; it ends where the next one starts.
    pub to: u32,
    /// Its first element in the input, or [`Run::FILL`].
    pub from: u32,
}

impl Run {
    /// Not from the input: the fill value.
    pub const FILL: u32 = u32::MAX;
}

/// Puts an output together from runs, in the order of `to`, the first at 0: padding, repetition, reversal, any selection that is known
/// beforehand. For a range of output elements, which the runs cover.
pub fn copy_runs<T: Word>(input: &[T], fill: T, runs: &[Run], range: Range<usize>, output: Output<'_, T>) {
    assert!(range.start <= range.end && range.end <= output.len(), "{range:?} of {} elements", output.len());
    let mut at = runs.partition_point(|run| run.to as usize <= range.start).saturating_sub(1);
    let mut element = range.start;
    while element < range.end {
        let run = runs[at];
        let end = runs.get(at + 1).map_or(range.end, |next| (next.to as usize).min(range.end));
        let count = end - element;
        // SAFETY: the range was checked against the output, a slice is bounds-checked.
        unsafe {
            let to = output.pointer().add(element);
            if run.from == Run::FILL {
                std::slice::from_raw_parts_mut(to, count).fill(fill);
            } else {
                let from = &input[run.from as usize + element - run.to as usize..][..count];
                match count {
                    1 => to.write(from[0]),
                    _ => std::ptr::copy_nonoverlapping(from.as_ptr(), to, count),
                }
            }
        }
        element = end;
        at += 1;
    }
}

/// `output = condition ? a : b` by strides over `shape` (those of the condition, a and b); conditions are bytes, true unless 0. The range counts output
/// elements.
pub fn choose<T: Word>(
    level: IsaLevel,
    shape: &[usize],
    strides: [&[usize]; 3],
    condition: &[u8],
    (a, b): (&[T], &[T]),
    range: Range<usize>,
    output: Output<'_, T>,
) {
    assert!(range.start <= range.end && range.end <= output.len(), "{range:?} of {} elements", output.len());
    if range.is_empty() {
        return;
    }
    let odometer = Odometer::new(shape, strides);
    assert!(range.end <= odometer.count(), "{range:?} of {shape:?}");
    for (strides, len) in strides.into_iter().zip([condition.len(), a.len(), b.len()]) {
        let last: usize = shape.iter().zip(strides).map(|(n, stride)| (n - 1) * stride).sum();
        assert!(last < len, "a view of {len} elements is read at {last}");
    }
    dispatch(level, Choose { odometer, condition, a, b, range, to: output.pointer() });
}

struct Choose<'a, T> {
    odometer: Odometer<3>,
    condition: &'a [u8],
    a: &'a [T],
    b: &'a [T],
    range: Range<usize>,
    to: *mut T,
}

impl<T: Word> Kernel for Choose<'_, T> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, _: I) {
        let mut odometer = self.odometer;
        let (row, strides) = (odometer.row(), odometer.row_strides());
        let mut position = odometer.seek(self.range.start);
        let mut element = self.range.start;
        while element < self.range.end {
            let count = (row - position).min(self.range.end - element);
            let [c, a, b] = odometer.offsets;
            // SAFETY: the entry checked the largest offset of each, and the range against the output.
            unsafe {
                let c = self.condition.as_ptr().add(c + position * strides[0]);
                let a = self.a.as_ptr().add(a + position * strides[1]);
                let b = self.b.as_ptr().add(b + position * strides[2]);
                let to = self.to.add(element);
                if strides == [1, 1, 1] {
                    (0..count)
                        .for_each(|i| to.add(i).write(if c.add(i).read() != 0 { a.add(i) } else { b.add(i) }.read()));
                } else {
                    for i in 0..count {
                        let chosen = match c.add(i * strides[0]).read() {
                            0 => b.add(i * strides[2]),
                            _ => a.add(i * strides[1]),
                        };
                        to.add(i).write(chosen.read());
                    }
                }
            }
            element += count;
            position = 0;
            odometer.next_row();
        }
    }
}

/// Copies `rows` runs of `width` values from rows `from_stride` apart to rows `to_stride` apart: a part of a concatenation or of a split.
pub fn copy_rows(
    input: &[f32],
    from_stride: usize,
    width: usize,
    rows: Range<usize>,
    output: Output<'_>,
    to_stride: usize,
) {
    if rows.is_empty() || width == 0 {
        return;
    }
    let last = rows.end - 1;
    assert!(last * from_stride + width <= input.len(), "rows {rows:?}, {from_stride} apart, of {}", input.len());
    assert!(last * to_stride + width <= output.len(), "rows {rows:?}, {to_stride} apart, into {}", output.len());
    for row in rows {
        // SAFETY: checked above; a slice and an output do not overlap.
        unsafe {
            let from = input.as_ptr().add(row * from_stride);
            std::ptr::copy_nonoverlapping(from, output.pointer().add(row * to_stride), width);
        }
    }
}

/// `output[i] = input[indices[i]]` for rows of `width` values, for a range of i. Indices are of rows of the input, checked by the caller: one outside
/// panics.
pub fn gather_rows(input: &[f32], width: usize, indices: &[usize], range: Range<usize>, output: Output<'_>) {
    assert!(range.end * width <= output.len(), "rows {range:?} of {width} into {}", output.len());
    for at in range {
        let row = &input[indices[at] * width..][..width];
        // SAFETY: checked above; a slice and an output do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(row.as_ptr(), output.pointer().add(at * width), width) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn matrices_are_transposed() {
        for level in levels() {
            let mut random = Random::new(20);
            for (batch, rows, columns) in [(0, 3, 3), (1, 1, 1), (2, 5, 130), (3, 16, 16), (1, 200, 33), (2, 67, 4)] {
                let input = random.units(batch * rows * columns);
                let mut output = vec![f32::NAN; input.len()];
                for units in random_cuts(&mut random, transpose_units(batch, rows)) {
                    transpose(level, batch, rows, columns, &input, units, Output::new(&mut output));
                }
                for (at, value) in output.iter().enumerate() {
                    let (matrix, j, i) = (at / rows / columns, at / rows % columns, at % rows);
                    assert_eq!(*value, input[(matrix * rows + i) * columns + j], "{} {rows} x {columns}", level.name());
                }
            }
        }
    }

    #[test]
    fn strided_views_are_copied() {
        for level in levels() {
            let mut random = Random::new(21);
            for _ in rounds(150) {
                let rank = random.between(0, 4);
                let shape: Vec<usize> = (0..rank).map(|_| random.pick(&[1, 2, 3, 16, 35])).collect();
                // A random order of the axes in memory, steps of 1 or 2, some repeated.
                let mut axes: Vec<usize> = (0..rank).collect();
                for i in (1..rank).rev() {
                    axes.swap(i, random.between(0, i));
                }
                let (mut strides, mut len) = (vec![0; rank], 1);
                for axis in axes {
                    if random.between(0, 5) > 0 {
                        let step = random.pick(&[1, 1, 1, 2]);
                        strides[axis] = len * step;
                        len *= step * shape[axis];
                    }
                }
                let input = random.units(len);
                let count = shape.iter().product();
                let mut output = vec![f32::NAN; count];
                for range in random_cuts(&mut random, count) {
                    copy_strided(level, &shape, &strides, &input, range, Output::new(&mut output));
                }
                for (element, value) in output.iter().enumerate() {
                    let (mut rest, mut at) = (element, 0);
                    for axis in (0..rank).rev() {
                        at += rest % shape[axis] * strides[axis];
                        rest /= shape[axis];
                    }
                    assert_eq!(*value, input[at], "{} {shape:?} {strides:?} [{element}]", level.name());
                }
            }
        }
    }

    #[test]
    fn words_of_every_size_are_turned_and_repeated() {
        fn check<T: Word + PartialEq + std::fmt::Debug>(from: impl Fn(usize) -> T) {
            for level in levels() {
                let mut random = Random::new(22);
                for (rows, columns) in [(1, 1), (2, 30), (3, 100), (4, 77), (5, 130), (16, 16), (67, 40), (100, 3)] {
                    let input: Vec<T> = (0..rows * columns).map(&from).collect();
                    let shape = [2, columns, rows];
                    let mut output = vec![input[0]; 2 * input.len()];
                    for range in random_cuts(&mut random, output.len()) {
                        copy_strided(level, &shape, &[0, 1, columns], &input, range, Output::new(&mut output));
                    }
                    for (at, value) in output.iter().enumerate() {
                        let (j, i) = (at / rows % columns, at % rows);
                        assert_eq!(*value, input[i * columns + j], "{} {rows} x {columns}", level.name());
                    }
                }
            }
        }
        check(|i| (i * 7 % 251) as u8);
        check(|i| (i * 7) as u16);
        check(|i| i as u32);
        check(|i| i as u64);
    }

    #[test]
    fn runs_are_put_together_and_choices_made() {
        let mut random = Random::new(23);
        let input: Vec<u16> = (0..50).collect();
        let mut expected = Vec::new();
        let mut runs = Vec::new();
        for _ in rounds(30) {
            let (start, count) = (random.between(0, 40), random.between(1, 9));
            let filled = random.between(0, 3) == 0;
            runs.push(Run { to: expected.len() as u32, from: if filled { Run::FILL } else { start as u32 } });
            expected.extend((start..start + count).map(|i| if filled { 999 } else { input[i] }));
        }
        let mut output = vec![0u16; expected.len()];
        for range in random_cuts(&mut random, expected.len()) {
            copy_runs(&input, 999, &runs, range, Output::new(&mut output));
        }
        assert_eq!(output, expected);
        for level in levels() {
            let condition: Vec<u8> = (0..35).map(|i| i % 3).collect();
            let (a, b): (Vec<u64>, Vec<u64>) = ((0..35).collect(), vec![1000, 1001, 1002, 1003, 1004]);
            let mut output = vec![0u64; 35];
            for range in random_cuts(&mut random, 35) {
                let strides: [&[usize]; 3] = [&[5, 1], &[5, 1], &[0, 1]];
                choose(level, &[7, 5], strides, &condition, (&a, &b), range, Output::new(&mut output));
            }
            for (i, &value) in output.iter().enumerate() {
                assert_eq!(value, if i % 3 != 0 { i as u64 } else { 1000 + i as u64 % 5 }, "{}", level.name());
            }
        }
    }

    #[test]
    fn rows_are_copied_and_gathered() {
        let input: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let mut output = [-1.0; 10];
        copy_rows(&input, 4, 3, 0..3, Output::new(&mut output[1..]), 3);
        assert_eq!(output, [-1.0, 0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 8.0, 9.0, 10.0]);
        let mut output = [-1.0; 8];
        gather_rows(&input, 4, &[2, 0, 1], 0..2, Output::new(&mut output));
        assert_eq!(output, [8.0, 9.0, 10.0, 11.0, 0.0, 1.0, 2.0, 3.0]);
    }
}
