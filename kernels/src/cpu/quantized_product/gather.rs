//! Rows of A as tiles read them: the windows of pixels one after the other, as bytes or less their zero point as `i16`.

use super::Product;
use crate::cpu::conv::Axis;
use std::ops::Range;

/// Elements that a gather writes at a time: what is too much of one run the next one overwrites, or the room after the last row holds.
pub(super) const RUN: usize = 16;

/// An element of gathered rows of A.
pub(super) trait Part: Copy {
    /// Of an unsigned byte.
    fn of(x: u8, zero_point: i32) -> Self;
    const ZERO: Self;
}

impl Part for i16 {
    const ZERO: i16 = 0;
    #[inline(always)]
    fn of(x: u8, zero_point: i32) -> i16 {
        i16::from(x) - zero_point as i16
    }
}

impl Part for u8 {
    const ZERO: u8 = 0;
    #[inline(always)]
    fn of(x: u8, _: i32) -> u8 {
        x
    }
}

/// Writes `count` parts of `bytes` from `from` on. Some of what follows them may be written too, up to [`RUN`] parts in all.
///
/// # Safety
/// `count` parts and [`RUN`] more are writable at `to`.
#[inline(always)]
unsafe fn put<P: Part>(to: *mut P, bytes: &[u8], from: usize, count: usize, (flip, zero_point): (u8, i32)) {
    let bytes = &bytes[from..];
    let mut i = 0;
    while i < count {
        // SAFETY: the caller; inside the bytes, the last of which come one by one.
        unsafe {
            if i + RUN <= bytes.len() {
                put_run(to.add(i), bytes.as_ptr().add(i), (flip, zero_point));
                i += RUN;
            } else {
                to.add(i).write(P::of(bytes[i] ^ flip, zero_point));
                i += 1;
            }
        }
    }
}

/// Writes [`RUN`] parts.
///
/// # Safety
/// As many are writable at `to`, and bytes readable at `from`.
#[inline(always)]
unsafe fn put_run<P: Part>(to: *mut P, from: *const u8, (flip, zero_point): (u8, i32)) {
    // SAFETY: the caller.
    unsafe {
        let run = from.cast::<[u8; RUN]>().read_unaligned();
        let mut parts = [P::ZERO; RUN];
        for j in 0..RUN {
            parts[j] = P::of(run[j] ^ flip, zero_point);
        }
        to.cast::<[P; RUN]>().write_unaligned(parts);
    }
}

/// Writes the same part `count` times, and returns where the next one goes.
///
/// # Safety
/// As many are writable at `to`.
#[inline(always)]
unsafe fn fill<P: Part>(to: *mut P, part: P, count: usize) -> *mut P {
    for i in 0..count {
        // SAFETY: the caller.
        unsafe { to.add(i).write(part) };
    }
    to.wrapping_add(count)
}

/// Gathers the windows of a range of rows, `row_len` elements apart.
#[inline(always)]
pub(super) fn gather<P: Part>(
    problem: &Product<'_>,
    group: usize,
    bytes_of: (u8, i32),
    rows: Range<usize>,
    room: &mut [f32],
    row_len: usize,
) {
    let shape = &problem.shape;
    let bytes = problem.input.bytes;
    let (height, width) = (&shape.height, &shape.width);
    let channels = shape.channels_in / shape.groups;
    let depth = shape.depth();
    let padding = P::of(bytes_of.1 as u8, bytes_of.1);
    assert!((rows.len() * row_len + RUN) * size_of::<P>() <= size_of_val(room));
    let room = room.as_mut_ptr().cast::<P>();
    // SAFETY, below: the rows lie in the room one after the other, with space for a run after the last; each is written from its start to its end.
    if shape.groups == 1 && height.is_pointwise() && width.is_pointwise() && row_len == depth {
        // Rows are pixels, one after the other.
        unsafe { put(room, bytes, rows.start * depth, rows.len() * depth, bytes_of) };
        return;
    }
    let (mut image, mut oy, mut ox) = (
        rows.start / (height.output * width.output),
        rows.start / width.output % height.output,
        rows.start % width.output,
    );
    // Where windows lie inside, and as runs.
    let is_run = width.dilation == 1 && shape.groups == 1;
    let (inside_y, inside_x) = (interior(height), if is_run { interior(width) } else { 0..0 });
    let (span, line_len) = (width.kernel * channels, width.input * channels);
    let most = bytes.len().saturating_sub(span.next_multiple_of(RUN));
    for row in 0..rows.len() {
        let mut to = unsafe { room.add(row * row_len) };
        let next = match ox + 1 == width.output {
            true if oy + 1 == height.output => (image + 1, 0, 0),
            true => (image, oy + 1, 0),
            false => (image, oy, ox + 1),
        };
        if inside_x.contains(&ox) && inside_y.contains(&oy) {
            let (y, x) = (oy * height.stride - height.pad_before, ox * width.stride - width.pad_before);
            let from = (image * height.input + y) * line_len + x * channels;
            let down = height.dilation * line_len;
            if from + (height.kernel - 1) * down <= most {
                for ky in 0..height.kernel {
                    let from = bytes.as_ptr().wrapping_add(from + ky * down);
                    for i in (0..span).step_by(RUN) {
                        // SAFETY: as above; the last line's runs were checked to end inside the bytes.
                        unsafe { put_run(to.add(i), from.add(i), bytes_of) };
                    }
                    to = unsafe { to.add(span) };
                }
                unsafe { fill(to, P::ZERO, row_len - depth) };
                (image, oy, ox) = next;
                continue;
            }
        }
        let (columns, x0) = (width.taps_inside(ox), width.start(ox));
        for ky in 0..height.kernel {
            let y = (height.start(oy) + (ky * height.dilation) as isize) as usize;
            if y >= height.input {
                to = unsafe { fill(to, padding, width.kernel * channels) };
                continue;
            }
            let line = (image * height.input + y) * width.input;
            let at = |kx: usize| (line + (x0 + (kx * width.dilation) as isize) as usize) * shape.channels_in;
            to = unsafe { fill(to, padding, columns.start * channels) };
            if width.dilation == 1 && shape.groups == 1 {
                // Neighbours in the window are neighbours in memory.
                if !columns.is_empty() {
                    let count = columns.len() * channels;
                    unsafe {
                        put(to, bytes, at(columns.start), count, bytes_of);
                        to = to.add(count);
                    }
                }
            } else {
                for kx in columns.clone() {
                    unsafe {
                        put(to, bytes, at(kx) + group * channels, channels, bytes_of);
                        to = to.add(channels);
                    }
                }
            }
            to = unsafe { fill(to, padding, (width.kernel - columns.end) * channels) };
        }
        unsafe { fill(to, P::ZERO, row_len - depth) };
        (image, oy, ox) = next;
    }
}

/// Outputs whose windows lie inside.
fn interior(axis: &Axis) -> Range<usize> {
    let reach = (axis.kernel - 1) * axis.dilation;
    match (axis.input + axis.pad_before).checked_sub(reach + 1) {
        Some(last) => axis.pad_before.div_ceil(axis.stride)..axis.output.min(last / axis.stride + 1),
        None => 0..0,
    }
}
