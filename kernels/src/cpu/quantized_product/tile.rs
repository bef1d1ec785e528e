//! Tiles of sums in registers, and what becomes of them.

use super::bounded::{self, MOST_ROWS, Steps};
use super::{Epilogue, Form, Product, tile_rows};
use crate::cpu::{dispatch::Kernel, isa::Isa};
use std::ops::Range;

/// The sums of a block of gathered rows and a panel's columns. All before anything becomes of one: what that takes in registers would push sums out of them.
pub(super) struct Tiles<'a> {
    pub form: Form,
    /// Whole tiles of rows of so many words.
    pub a: &'a [f32],
    pub words: usize,
    pub b: &'a [f32],
    /// What the sums of a column start from.
    pub starts: &'a [i32; 32],
    /// What those of a row start from, and by which steps its words are multiplied; of a bounded form.
    pub bounds: Option<(&'a [i32; MOST_ROWS], Steps<'a>)>,
    pub rows: usize,
    /// Whether one vector holds the panel's columns.
    pub is_narrow: bool,
    /// `[row][2][LANES]`, as bits of `i32`.
    pub sums: &'a mut [f32],
}

impl Kernel for Tiles<'_> {
    type Output = ();
    const OF_BYTES: bool = true;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Tiles { form, a, words, b, starts, bounds, rows, is_narrow, sums } = self;
        let tile = tile_rows::<I>(form);
        let whole = rows.next_multiple_of(tile);
        assert!(a.len() >= whole * words && b.len() >= 2 * I::LANES * words && sums.len() >= whole * 2 * I::LANES);
        let (a, b, sums) = (a.as_ptr().cast::<i32>(), b.as_ptr().cast::<i32>(), sums.as_mut_ptr().cast::<i32>());
        for row in (0..rows).step_by(tile) {
            let some = tile.min(rows - row);
            // SAFETY: whole tiles of rows are there, and all words of the panel's columns, and room for the sums.
            unsafe {
                let (a, sums) = (a.add(row * words), sums.add(row * 2 * I::LANES));
                macro_rules! multiply {
                    ($rows:literal) => {
                        match is_narrow {
                            false => multiply::<I, $rows, 2>(isa, form, a, words, b, starts, sums),
                            true => multiply::<I, $rows, 1>(isa, form, a, words, b, starts, sums),
                        }
                    };
                    ($rows:literal, $centred:literal, $row_starts:expr, $steps:expr) => {{
                        let starts = (starts, &$row_starts[row..]);
                        match is_narrow {
                            false => bounded::multiply::<I, $rows, 2, $centred>(isa, a, words, b, starts, $steps, sums),
                            true => bounded::multiply::<I, $rows, 1, $centred>(isa, a, words, b, starts, $steps, sums),
                        }
                    }};
                }
                macro_rules! multiply_bounded {
                    ($centred:literal, $row_starts:expr, $steps:expr) => {
                        match some {
                            1 => multiply!(1, $centred, $row_starts, $steps),
                            2 => multiply!(2, $centred, $row_starts, $steps),
                            _ if tile == 4 || some <= 4 => multiply!(4, $centred, $row_starts, $steps),
                            _ => multiply!(8, $centred, $row_starts, $steps),
                        }
                    };
                }
                match (&bounds, form) {
                    (Some((row_starts, steps)), Form::Bounded { centred }) if I::SATURATES => match centred {
                        true => multiply_bounded!(true, row_starts, steps),
                        false => multiply_bounded!(false, row_starts, steps),
                    },
                    _ => match some {
                        1 => multiply!(1),
                        2 => multiply!(2),
                        3..=4 => multiply!(4),
                        _ if tile == 6 || some <= 6 => multiply!(6),
                        _ => multiply!(12),
                    },
                }
            }
        }
    }
}

/// `sums[row][column] = starts[column]` plus the products of `ROWS` rows by the first `VECTORS` of a panel's two vectors of columns.
///
/// # Safety
/// `ROWS` rows of `words` words are readable at `a`, `words` of as many as a panel's columns at `b`; `[row][2][LANES]` are writable at `sums`.
#[inline(always)]
unsafe fn multiply<I: Isa, const ROWS: usize, const VECTORS: usize>(
    isa: I,
    form: Form,
    a: *const i32,
    words: usize,
    b: *const i32,
    starts: &[i32; 32],
    sums: *mut i32,
) {
    // SAFETY: the caller; a panel has as many columns as two vectors have lanes, 32 at most.
    unsafe {
        let mut tile = [[isa.splat_w(0); VECTORS]; ROWS];
        for r in 0..ROWS {
            for v in 0..VECTORS {
                tile[r][v] = isa.load_w(starts.as_ptr().add(v * I::LANES));
            }
        }
        macro_rules! accumulate {
            ($dot:ident) => {{
                let (mut a, mut b) = (a, b);
                for _ in 0..words / 2 {
                    for k in 0..2 {
                        let mut columns = [isa.splat_w(0); VECTORS];
                        for v in 0..VECTORS {
                            columns[v] = isa.load_w(b.add((k * 2 + v) * I::LANES));
                        }
                        for r in 0..ROWS {
                            let x = isa.splat_w(a.add(r * words + k).read());
                            for v in 0..VECTORS {
                                tile[r][v] = isa.$dot(tile[r][v], x, columns[v]);
                            }
                        }
                    }
                    (a, b) = (a.add(2), b.add(4 * I::LANES));
                }
            }};
        }
        if I::SQUARES && form == Form::Bytes {
            return multiply_squares::<I, ROWS, VECTORS>(isa, a, words, b, starts, sums);
        } else if I::DOT4 && form == Form::Bytes {
            accumulate!(dot4)
        } else {
            accumulate!(dot2)
        }
        for r in 0..ROWS {
            for v in 0..VECTORS {
                isa.store_w(sums.add((r * 2 + v) * I::LANES), tile[r][v]);
            }
        }
    }
}

/// As [`multiply`], by squares of two rows, or columns, of eight bytes.
///
/// # Safety
/// As for [`multiply`].
#[inline(always)]
unsafe fn multiply_squares<I: Isa, const ROWS: usize, const VECTORS: usize>(
    isa: I,
    a: *const i32,
    words: usize,
    b: *const i32,
    starts: &[i32; 32],
    sums: *mut i32,
) {
    const { assert!(ROWS <= 12 && VECTORS <= 2) };
    let mut tile = [[isa.splat_w(0); 4]; 6];
    // SAFETY: the caller; a panel has as many columns as two vectors have lanes, 32 at most, and sums has room for an even number of rows.
    unsafe {
        for k in (0..words).step_by(2) {
            let mut columns = [isa.splat_w(0); 4];
            for pair in 0..2 * VECTORS {
                columns[pair] = isa.load_w(b.add(k * 2 * I::LANES + pair * 4));
            }
            for pair in 0..ROWS.div_ceil(2) {
                let row = |r: usize| a.add(r.min(ROWS - 1) * words + k);
                let rows = isa.load_rows_w([row(2 * pair), row(2 * pair + 1)]);
                for column in 0..2 * VECTORS {
                    tile[pair][column] = isa.square(tile[pair][column], rows, columns[column]);
                }
            }
        }
        for pair in 0..ROWS.div_ceil(2) {
            for v in 0..VECTORS {
                let start = isa.load_w(starts.as_ptr().add(v * I::LANES));
                for (r, row) in isa.rows_of_squares(tile[pair][2 * v], tile[pair][2 * v + 1]).into_iter().enumerate() {
                    let to = sums.add(((2 * pair + r) * 2 + v) * I::LANES);
                    isa.store_w(to, isa.add_w(row, start));
                }
            }
        }
    }
}

/// What the sums of a panel's columns, which are these channels, are multiplied by, and what is added then.
#[inline(always)]
pub(super) fn scaling<I: Isa>(isa: I, epilogue: &Epilogue<'_>, channels: Range<usize>) -> [[I::V; 2]; 2] {
    match *epilogue {
        Epilogue::Sums => [[isa.zero(); 2]; 2],
        Epilogue::Floats { scale, factors, bias, .. } => {
            let [a, b] = load_pair(isa, &factors[channels.clone()]);
            let scale = isa.splat(scale);
            // −0 changes no value that it is added to.
            let bias = match bias {
                Some(bias) => load_pair(isa, &bias[channels]),
                None => [isa.splat(-0.0); 2],
            };
            [[isa.mul(scale, a), isa.mul(scale, b)], bias]
        }
        Epilogue::Bytes { factors, offsets, .. } => {
            [load_pair(isa, &factors[channels.clone()]), load_pair(isa, &offsets[channels])]
        }
    }
}

/// Makes outputs of rows of sums, in the panel's first `here` columns.
///
/// # Safety
/// The first row's outputs are writable at `to`, the others' as far apart as the shape says, aligned for their type.
#[inline(always)]
pub(super) unsafe fn finish<I: Isa>(
    isa: I,
    problem: &Product<'_>,
    sums: &[f32],
    [factors, offsets]: [[I::V; 2]; 2],
    here: usize,
    to: *mut u8,
) {
    let size = problem.epilogue.size();
    let whole = here == 2 * I::LANES;
    let mut scratch = std::mem::MaybeUninit::<[u32; 32]>::uninit();
    macro_rules! each_row {
        (|$sums:ident, $to:ident| $store:expr) => {
            for (r, row) in sums.chunks_exact(2 * I::LANES).enumerate() {
                let to = to.wrapping_add(r * problem.shape.channels_out * size);
                // SAFETY: two vectors fit the scratch, and the row where it is written to; the caller.
                unsafe {
                    let $sums = [0, I::LANES].map(|at| isa.load_w(row.as_ptr().add(at).cast()));
                    let $to = if whole { to } else { scratch.as_mut_ptr().cast::<u8>() };
                    $store;
                    if !whole {
                        std::ptr::copy_nonoverlapping($to, to, here * size);
                    }
                }
            }
        };
    }
    match problem.epilogue {
        Epilogue::Sums => each_row!(|sums, to| {
            isa.store_w(to.cast(), sums[0]);
            isa.store_w(to.cast::<i32>().add(I::LANES), sums[1]);
        }),
        Epilogue::Floats { low, high, .. } => {
            let (low, high) = (isa.splat(low), isa.splat(high));
            each_row!(|sums, to| {
                for v in 0..2 {
                    let y = isa.add(isa.mul(isa.floats_of(sums[v]), factors[v]), offsets[v]);
                    isa.store(to.cast::<f32>().add(v * I::LANES), isa.min(isa.max(y, low), high));
                }
            })
        }
        Epilogue::Bytes { low, high, zero_point, .. }
            if whole && stays_small(isa, problem, factors, offsets) && byte_range(low, high, zero_point).is_some() =>
        {
            let signed = byte_range(low, high, zero_point) == Some(true);
            let rows = sums.len() / (2 * I::LANES);
            for r in (0..rows).step_by(2) {
                // A last row alone is written twice.
                let pair = [r, (r + 1).min(rows - 1)];
                let mut values = [offsets[0]; 4];
                for i in 0..4 {
                    let (r, v) = (pair[i / 2], i % 2);
                    // SAFETY: inside the sums.
                    let sums = unsafe { isa.load_w(sums.as_ptr().add((2 * r + v) * I::LANES).cast()) };
                    values[i] = isa.add(isa.mul(isa.floats_of(sums), factors[v]), offsets[v]);
                }
                let [a, b] = pair.map(|r| to.wrapping_add(r * problem.shape.channels_out));
                let places = [a, a.wrapping_add(I::LANES), b, b.wrapping_add(I::LANES)];
                // SAFETY: the caller.
                unsafe { isa.store_saturated(places, values, zero_point, signed) };
            }
        }
        Epilogue::Bytes { low, high, zero_point, .. } => {
            let (low, high) = (isa.splat(low), isa.splat(high));
            each_row!(|sums, to| {
                // Bounds are integral: clamping first rounds the same.
                let mut pair = [low; 2];
                for v in 0..2 {
                    let y = isa.add(isa.mul(isa.floats_of(sums[v]), factors[v]), offsets[v]);
                    pair[v] = isa.min(isa.max(y, low), high);
                }
                isa.store_rounded([to, to.add(I::LANES)], pair, zero_point);
            })
        }
    }
}

/// Whether bounds are those of a byte, and if so whether of a signed one.
pub(in crate::cpu) fn byte_range(low: f32, high: f32, zero_point: i32) -> Option<bool> {
    let bounds = [low, high].map(|bound| bound + zero_point as f32);
    if bounds == [0.0, 255.0] { Some(false) } else { (bounds == [-128.0, 127.0]).then_some(true) }
}

/// Whether no sum times its factor plus its offset reaches 2³⁰.
#[inline(always)]
fn stays_small<I: Isa>(isa: I, problem: &Product<'_>, factors: [I::V; 2], offsets: [I::V; 2]) -> bool {
    let most = |[a, b]: [I::V; 2]| isa.reduce_max(isa.max(isa.abs(a), isa.abs(b)));
    let largest = problem.shape.depth() as f32 * (255.0 * 255.0) * most(factors) + most(offsets);
    largest < (1u32 << 30) as f32
}

/// Two vectors of values, 0 where there are no more.
#[inline(always)]
fn load_pair<I: Isa>(isa: I, values: &[f32]) -> [I::V; 2] {
    let mut padded = [0f32; 32];
    let mut p = values.as_ptr();
    if values.len() < 2 * I::LANES {
        padded[..values.len()].copy_from_slice(values);
        p = padded.as_ptr();
    }
    // SAFETY: as many values as two vectors have lanes, 32 at most.
    unsafe { [isa.load(p), isa.load(p.add(I::LANES))] }
}
