//! Products and convolutions of 8-bit integers, exact in `i32`, with what makes floats or quantized values of the sums.
//!
//! Images are channels-last, `[n][height][width][channels]`; a matrix product is the convolution of one row of pixels by a window of one. The
//! rows of A that a tile needs (the windows of its pixels) are gathered into the workspace, less their zero point, and multiplied with packed
//! weights: pairs of `i16`, or, where the rung multiplies bytes at once, groups of four bytes or squares of eight, the zero point taken off the sums. Either way
//! padding is the zero point, nothing saturates, and every sum is exact as long as it fits `i32`.

use std::ops::Range;

use super::IsaLevel;
use super::conv::Axis;
use super::dispatch::{Kernel, dispatch};
use super::epilogue::Output;
use super::isa::Isa;

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProductShape {
    pub images: usize,
    pub height: Axis,
    pub width: Axis,
    pub channels_in: usize,
    pub channels_out: usize,
    pub groups: usize,
}

impl ProductShape {
    /// `[m, k] · [k, n]`.
    pub fn matrices(m: usize, k: usize, n: usize) -> ProductShape {
        let width = Axis { input: m, output: m, ..Axis::UNIT };
        ProductShape { images: 1, height: Axis::UNIT, width, channels_in: k, channels_out: n, groups: 1 }
    }

    /// Rows of A, which are pixels of the output.
    pub fn rows(&self) -> usize {
        self.images * self.height.output * self.width.output
    }

    /// Terms of a sum.
    pub fn depth(&self) -> usize {
        self.height.kernel * self.width.kernel * self.channels_in / self.groups
    }

    /// Whether no sum of products of values and weights less their zero points leaves `i32`.
    pub fn is_exact(&self) -> bool {
        self.depth() <= i32::MAX as usize / (255 * 255)
    }

    fn columns(&self) -> usize {
        self.channels_out / self.groups
    }

    /// Words of 32 bits in a row of A, an even number.
    fn words(&self, bytes: bool) -> usize {
        self.depth().div_ceil(if bytes { 8 } else { 4 }) * 2
    }
}

/// Values of one byte and their zero point.
#[derive(Clone, Copy, Debug)]
pub struct Quantized<'a> {
    pub bytes: &'a [u8],
    pub signed: bool,
    pub zero_point: i32,
}

impl Quantized<'_> {
    /// What makes unsigned bytes of them, and the zero point of those.
    pub(crate) fn unsigned(&self) -> (u8, i32) {
        if self.signed { (0x80, self.zero_point + 128) } else { (0, self.zero_point) }
    }

    /// What makes signed bytes of them, and the zero point of those.
    fn as_signed(&self) -> (u8, i32) {
        if self.signed { (0, self.zero_point) } else { (0x80, self.zero_point - 128) }
    }
}

/// What becomes of the sums. Slices have a value for every output channel.
#[derive(Clone, Copy, Debug)]
pub enum Epilogue<'a> {
    /// `i32`.
    Sums,
    /// `f32`: `min(max(sum·(scale·factor) + bias, low), high)`.
    Floats { scale: f32, factors: &'a [f32], bias: Option<&'a [f32]>, low: f32, high: f32 },
    /// A byte: `min(max(round(sum·factor + offset), low), high) + zero_point`, bounds and zero point integral.
    Bytes { factors: &'a [f32], offsets: &'a [f32], low: f32, high: f32, zero_point: i32 },
}

impl Epilogue<'_> {
    fn size(&self) -> usize {
        if matches!(self, Epilogue::Bytes { .. }) { 1 } else { 4 }
    }
}

/// Rows of a register tile.
const fn tile_rows<I: Isa>() -> usize {
    if I::REGISTERS >= 32 { 12 } else { 6 }
}

/// Most rows and columns of a register tile.
const TILE: usize = 12 * 32;

/// Columns of a panel.
const fn panel_columns<I: Isa>() -> usize {
    2 * I::LANES
}

/// How a rung cuts products up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Rows of a tile.
    pub rows: usize,
    /// Columns of a panel.
    pub columns: usize,
    /// Whether weights that fit signed bytes are packed as such.
    pub bytes: bool,
    /// Whether those of one column are eight to a place, else four.
    squares: bool,
}

pub fn cut(level: IsaLevel) -> Cut {
    struct Cuts;
    impl Kernel for Cuts {
        type Output = Cut;
        const OF_BYTES: bool = true;
        #[inline(always)]
        fn eval<I: Isa>(self, _: I) -> Cut {
            Cut { rows: tile_rows::<I>(), columns: panel_columns::<I>(), bytes: I::DOT4, squares: I::SQUARES }
        }
    }
    dispatch(level, Cuts)
}

/// Panels of one group's columns.
pub fn panels(level: IsaLevel, shape: &ProductShape) -> usize {
    shape.columns().div_ceil(cut(level).columns)
}

/// Whether weights less their zero points are packed as bytes on this rung.
pub fn packs_bytes(level: IsaLevel, weights: &[i16]) -> bool {
    cut(level).bytes && weights.iter().all(|w| i8::try_from(*w).is_ok())
}

/// `f32`s of packed weights.
pub fn packed_len(level: IsaLevel, shape: &ProductShape, bytes: bool) -> usize {
    let columns = panels(level, shape) * cut(level).columns;
    // The sum of every column comes last.
    shape.groups * columns * (shape.words(bytes) + 1)
}

/// Packs weights `[channels_out][channels_in/groups][height][width]`, less their zero points.
pub fn pack(level: IsaLevel, shape: &ProductShape, weights: &[i16], bytes: bool, packed: &mut [f32]) {
    let (columns, words) = (shape.columns(), shape.words(bytes));
    let Cut { columns: width, squares: in_squares, .. } = cut(level);
    let (taps, channels, depth) =
        (shape.height.kernel * shape.width.kernel, shape.channels_in / shape.groups, shape.depth());
    let per_word = if bytes { 4 } else { 2 };
    assert!(weights.len() >= shape.channels_out * shape.depth() && packed.len() >= packed_len(level, shape, bytes));
    let group_len = panels(level, shape) * width * (words + 1);
    for group in 0..shape.groups {
        let (body, sums) =
            packed[group * group_len..][..group_len].split_at_mut(group_len - panels(level, shape) * width);
        for first in (0..columns).step_by(width) {
            let rows = &weights[(group * columns + first) * depth..][..width.min(columns - first) * depth];
            let panel = &mut body[first * words..][..width * words];
            for word in 0..words {
                // Row-major over the window, channels innermost, as rows of A are gathered; 0 where the last word has more.
                let at: [usize; 4] = std::array::from_fn(|i| match word * per_word + i {
                    k if k < depth => k % channels * taps + k / channels,
                    _ => depth,
                });
                for (column, own) in rows.chunks_exact(depth).enumerate() {
                    let of = |i: usize| own.get(at[i]).copied().unwrap_or(0);
                    let place = match bytes && in_squares {
                        true => (word / 2 * width + column) * 2 + word % 2,
                        false => word * width + column,
                    };
                    panel[place] = f32::from_bits(match bytes {
                        true => u32::from_le_bytes(std::array::from_fn(|i| of(i) as i8 as u8)),
                        false => u32::from(of(0) as u16) | u32::from(of(1) as u16) << 16,
                    });
                }
            }
            for (sum, own) in sums[first..].iter_mut().zip(rows.chunks_exact(depth.max(1))) {
                *sum = f32::from_bits(own.iter().map(|&w| i32::from(w)).sum::<i32>() as u32);
            }
        }
    }
}

/// Elements that a gather writes at a time: what is too much of one run the next one overwrites, or the room after the last row holds.
const RUN: usize = 16;

/// Rows that are gathered at a time: some tiles' worth, which stay in the second-level cache.
fn block_rows(rows: usize, words: usize) -> usize {
    const BLOCK_WORDS: usize = 16 << 10;
    rows * (BLOCK_WORDS / (rows * words.max(1))).clamp(1, 8)
}

/// `f32`s of workspace that [`product`] needs on each thread.
pub fn workspace_len(level: IsaLevel, shape: &ProductShape) -> usize {
    let rows = cut(level).rows;
    let of = |bytes| block_rows(rows, shape.words(bytes)) * shape.words(bytes);
    of(true).max(of(false)) + RUN
}

/// A product to be computed.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    pub shape: ProductShape,
    pub input: Quantized<'a>,
    /// Packed, as bytes or as pairs of `i16`.
    pub weights: &'a [f32],
    pub bytes: bool,
    pub epilogue: Epilogue<'a>,
}

/// Computes the outputs of a range of rows and, within each group, a range of panels. The output is `[rows][channels_out]`, in bytes of memory.
pub fn product(
    level: IsaLevel,
    problem: &Product<'_>,
    rows: Range<usize>,
    panels_of: Range<usize>,
    output: Output<'_, u8>,
    workspace: &mut [f32],
) {
    let shape = &problem.shape;
    shape.height.assert_valid();
    shape.width.assert_valid();
    assert!(rows.end <= shape.rows() && panels_of.end <= panels(level, shape), "{rows:?}, {panels_of:?} of {shape:?}");
    let pixels = shape.images * shape.height.input * shape.width.input;
    assert!(
        problem.input.bytes.len() >= pixels * shape.channels_in,
        "{} bytes of {shape:?}",
        problem.input.bytes.len()
    );
    assert!(
        problem.weights.len() >= packed_len(level, shape, problem.bytes)
            && workspace.len() >= workspace_len(level, shape)
    );
    assert!(
        output.len() >= shape.rows() * shape.channels_out * problem.epilogue.size(),
        "{} bytes of {shape:?}",
        output.len()
    );
    assert!(
        (output.pointer() as usize).is_multiple_of(problem.epilogue.size()) && (!problem.bytes || cut(level).bytes)
    );
    let fits = |values: &[f32]| assert!(values.len() >= shape.channels_out, "{} of {shape:?}", values.len());
    match problem.epilogue {
        Epilogue::Sums => {}
        Epilogue::Floats { factors, bias, .. } => [Some(factors), bias].into_iter().flatten().for_each(fits),
        Epilogue::Bytes { factors, offsets, .. } => [factors, offsets].into_iter().for_each(fits),
    }
    if rows.is_empty() || panels_of.is_empty() || shape.depth() == 0 {
        assert!(shape.depth() > 0 || rows.is_empty(), "sums of no terms");
        return;
    }
    dispatch(level, Multiply { problem, rows, panels: panels_of, output: output.pointer(), workspace })
}

struct Multiply<'a> {
    problem: &'a Product<'a>,
    rows: Range<usize>,
    panels: Range<usize>,
    output: *mut u8,
    workspace: &'a mut [f32],
}

/// An element of gathered rows of A.
trait Part: Copy {
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

impl Kernel for Multiply<'_> {
    type Output = ();
    const OF_BYTES: bool = true;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Multiply { problem, rows, panels, output, workspace } = self;
        let shape = &problem.shape;
        let (words, width, tile) = (shape.words(problem.bytes), panel_columns::<I>(), tile_rows::<I>());
        let columns = shape.columns();
        let panel_count = columns.div_ceil(width);
        let group_len = panel_count * width * (words + 1);
        let block = block_rows(tile, words);
        let bytes_of = if problem.bytes && I::SIGNED { problem.input.as_signed() } else { problem.input.unsigned() };
        let (_, zero_point) = bytes_of;
        let (size, in_bytes) = (problem.epilogue.size(), problem.bytes);
        let mut sums = [0i32; TILE];
        for group in 0..shape.groups {
            let packed = &problem.weights[group * group_len..][..group_len];
            let column_sums = &packed[panel_count * width * words..];
            for first in rows.clone().step_by(block) {
                let count = block.min(rows.end - first);
                match problem.bytes {
                    true => gather::<u8>(problem, group, bytes_of, first..first + count, workspace, words * 4),
                    false => gather::<i16>(problem, group, bytes_of, first..first + count, workspace, words * 2),
                }
                for panel in panels.clone() {
                    let start = panel * width;
                    let mut starts = [0i32; 32];
                    if problem.bytes {
                        // What the zero point adds to every sum.
                        for (start, sum) in starts.iter_mut().zip(&column_sums[start..start + width]) {
                            *start = zero_point.wrapping_mul(sum.to_bits() as i32).wrapping_neg();
                        }
                    }
                    let channel = group * columns + start;
                    let here = width.min(columns - start);
                    let scaling = scaling(isa, &problem.epilogue, channel..channel + here);
                    for row in (0..count).step_by(tile) {
                        let some = tile.min(count - row);
                        let at = (first + row) * shape.channels_out + channel;
                        let (a, b) = (&workspace[row * words..], &packed[panel * words * width..]);
                        // SAFETY: the workspace holds whole tiles of rows, the panel all words of its columns; the entry checked the output's
                        // length, of which these rows and channels are inside.
                        unsafe {
                            let (a, b) = (a.as_ptr().cast::<i32>(), b.as_ptr().cast::<i32>());
                            let to = output.add(at * size);
                            macro_rules! multiply {
                                ($rows:literal) => {
                                    // A panel of which no more than half is there takes one vector.
                                    match here > I::LANES {
                                        true => multiply::<I, $rows, 2>(isa, in_bytes, a, words, b, &starts, &mut sums),
                                        false => {
                                            multiply::<I, $rows, 1>(isa, in_bytes, a, words, b, &starts, &mut sums)
                                        }
                                    }
                                };
                            }
                            match some {
                                1 => multiply!(1),
                                2 => multiply!(2),
                                3..=4 => multiply!(4),
                                _ if tile == 6 || some <= 6 => multiply!(6),
                                _ => multiply!(12),
                            }
                            finish(isa, problem, &sums[..some * width], scaling, here, to);
                        }
                    }
                }
            }
        }
    }
}

/// `sums[row][column] = starts[column]` plus the products of `ROWS` rows by the first `VECTORS` of a panel's two vectors of columns.
///
/// # Safety
/// `ROWS` rows of `words` words are readable at `a`, `words` of as many as a panel's columns at `b`.
#[inline(always)]
unsafe fn multiply<I: Isa, const ROWS: usize, const VECTORS: usize>(
    isa: I,
    bytes: bool,
    a: *const i32,
    words: usize,
    b: *const i32,
    starts: &[i32; 32],
    sums: &mut [i32; TILE],
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
        if I::SQUARES && bytes {
            return multiply_squares::<I, ROWS, VECTORS>(isa, a, words, b, starts, sums);
        } else if I::DOT4 && bytes {
            accumulate!(dot4)
        } else {
            accumulate!(dot2)
        }
        for r in 0..ROWS {
            for v in 0..VECTORS {
                isa.store_w(sums.as_mut_ptr().add((r * 2 + v) * I::LANES), tile[r][v]);
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
    sums: &mut [i32; TILE],
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
                    let to = sums.as_mut_ptr().add(((2 * pair + r) * 2 + v) * I::LANES);
                    isa.store_w(to, isa.add_w(row, start));
                }
            }
        }
    }
}

/// What the sums of a panel's columns, which are these channels, are multiplied by, and what is added then.
#[inline(always)]
fn scaling<I: Isa>(isa: I, epilogue: &Epilogue<'_>, channels: Range<usize>) -> [[I::V; 2]; 2] {
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
unsafe fn finish<I: Isa>(
    isa: I,
    problem: &Product<'_>,
    sums: &[i32],
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
                    let $sums = [isa.load_w(row.as_ptr()), isa.load_w(row.as_ptr().add(I::LANES))];
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

/// The first `count` lanes from memory.
///
/// # Safety
/// As many values are readable at `p`; there are no more than lanes.
#[inline(always)]
pub(crate) unsafe fn load_some<I: Isa>(isa: I, p: *const f32, count: usize) -> I::V {
    // SAFETY: the caller.
    unsafe { if count == I::LANES { isa.load(p) } else { isa.load_partial(p, count) } }
}

/// The bytes of the first `count` lanes.
///
/// # Safety
/// As many are writable at `p`; there are no more than lanes.
#[inline(always)]
pub(crate) unsafe fn store_some<I: Isa>(isa: I, p: *mut u8, v: I::V, count: usize) {
    // SAFETY: the caller; sixteen bytes are as many as lanes at least.
    unsafe {
        if count == I::LANES {
            isa.store_bytes(p, v);
        } else {
            let mut bytes = [0u8; 16];
            isa.store_bytes(bytes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), p, count);
        }
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
                let run = bytes.as_ptr().add(i).cast::<[u8; RUN]>().read_unaligned();
                let mut parts = [P::ZERO; RUN];
                for j in 0..RUN {
                    parts[j] = P::of(run[j] ^ flip, zero_point);
                }
                to.add(i).cast::<[P; RUN]>().write_unaligned(parts);
                i += RUN;
            } else {
                to.add(i).write(P::of(bytes[i] ^ flip, zero_point));
                i += 1;
            }
        }
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
fn gather<P: Part>(
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
    for row in 0..rows.len() {
        let mut to = unsafe { room.add(row * row_len) };
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
        ox += 1;
        if ox == width.output {
            (ox, oy) = (0, oy + 1);
            if oy == height.output {
                (oy, image) = (0, image + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn axis(random: &mut Random, input: usize) -> Axis {
        let (kernel, stride, dilation) = (random.between(1, 3), random.between(1, 2), random.between(1, 2));
        let (pad_before, pad_after) = (random.between(0, 2), random.between(0, 2));
        let span = (kernel - 1) * dilation + 1;
        let output = (input + pad_before + pad_after).saturating_sub(span) / stride + 1;
        Axis { input, output, kernel, stride, dilation, pad_before, pad_after }
    }

    /// The sums by definition, `[rows][channels_out]`.
    fn sums(shape: &ProductShape, input: &Quantized<'_>, weights: &[i16]) -> Vec<i32> {
        let (height, width) = (shape.height, shape.width);
        let (group_in, group_out) = (shape.channels_in / shape.groups, shape.channels_out / shape.groups);
        let mut sums = Vec::new();
        for row in 0..shape.rows() {
            let (image, oy, ox) =
                (row / (height.output * width.output), row / width.output % height.output, row % width.output);
            for m in 0..shape.channels_out {
                let mut sum = 0;
                for c in 0..group_in {
                    for ky in 0..height.kernel {
                        for kx in 0..width.kernel {
                            let y = (oy * height.stride + ky * height.dilation).wrapping_sub(height.pad_before);
                            let x = (ox * width.stride + kx * width.dilation).wrapping_sub(width.pad_before);
                            if y < height.input && x < width.input {
                                let at = ((image * height.input + y) * width.input + x) * shape.channels_in;
                                let byte = input.bytes[at + m / group_out * group_in + c];
                                let value = if input.signed { i32::from(byte as i8) } else { i32::from(byte) };
                                let weight = weights[((m * group_in + c) * height.kernel + ky) * width.kernel + kx];
                                sum += (value - input.zero_point) * i32::from(weight);
                            }
                        }
                    }
                }
                sums.push(sum);
            }
        }
        sums
    }

    #[test]
    fn sums_are_exact_and_their_epilogues_round_once() {
        for level in levels() {
            let mut random = Random::new(60);
            for round in rounds(60) {
                let groups = random.pick(&[1, 1, 2, 3]);
                let shape = match round % 3 {
                    0 => ProductShape::matrices(random.between(1, 40), random.between(1, 70), random.between(1, 70)),
                    _ => {
                        let (h, w) = (random.between(3, 9), random.between(3, 9));
                        let (height, width) = (axis(&mut random, h), axis(&mut random, w));
                        let (channels_in, channels_out) =
                            (random.between(1, 19) * groups, random.between(1, 37) * groups);
                        ProductShape { images: random.between(1, 2), height, width, channels_in, channels_out, groups }
                    }
                };
                let pixels = shape.images * shape.height.input * shape.width.input;
                let extreme = round % 7 == 0;
                let byte = |bits: u64| if extreme { [0, 0x80, 0xff][bits as usize % 3] } else { bits as u8 };
                let bytes: Vec<u8> = (0..pixels * shape.channels_in).map(|_| byte(random.bits())).collect();
                let signed = random.between(0, 1) == 1;
                let zero_point = random.pick(&[0, 5, 127]) - if signed { 64 } else { 0 };
                let input = Quantized { bytes: &bytes, signed, zero_point };
                let wide = random.between(0, 3) == 0;
                let weight = |bits: u64| match (wide, extreme) {
                    (true, _) => (bits % 511) as i16 - 255,
                    (false, true) => [-128, 127][bits as usize % 2],
                    (false, false) => bits as i8 as i16,
                };
                let weights: Vec<i16> =
                    (0..shape.channels_out * shape.depth()).map(|_| weight(random.bits())).collect();
                let in_bytes = packs_bytes(level, &weights);
                let mut packed = vec![0.0; packed_len(level, &shape, in_bytes)];
                pack(level, &shape, &weights, in_bytes, &mut packed);
                let expected = sums(&shape, &input, &weights);
                let factors: Vec<f32> = random.units(shape.channels_out).iter().map(|x| x.abs() * 1e-2).collect();
                let offsets = random.units(shape.channels_out);
                let epilogues = [
                    Epilogue::Sums,
                    Epilogue::Floats {
                        scale: 0.5,
                        factors: &factors,
                        bias: Some(&offsets),
                        low: -3.0,
                        high: f32::INFINITY,
                    },
                    Epilogue::Bytes { factors: &factors, offsets: &offsets, low: -10.0, high: 200.0, zero_point: 10 },
                ];
                for epilogue in epilogues {
                    let problem = Product { shape, input, weights: &packed, bytes: in_bytes, epilogue };
                    let mut output = vec![0u32; shape.rows() * shape.channels_out];
                    let mut workspace = vec![f32::NAN; workspace_len(level, &shape)];
                    for rows in random_cuts(&mut random, shape.rows()) {
                        for panels in random_cuts(&mut random, panels(level, &shape)) {
                            // SAFETY: the vector's own memory.
                            let to = unsafe { Output::from_raw(output.as_mut_ptr().cast::<u8>(), output.len() * 4) };
                            product(level, &problem, rows.clone(), panels, to, &mut workspace);
                        }
                    }
                    let what = format!("{} {shape:?} {epilogue:?}", level.name());
                    for (i, &sum) in expected.iter().enumerate() {
                        let m = i % shape.channels_out;
                        match epilogue {
                            Epilogue::Sums => assert_eq!(output[i] as i32, sum, "{what}"),
                            Epilogue::Floats { .. } => {
                                let e = (sum as f32 * (0.5 * factors[m]) + offsets[m]).max(-3.0);
                                assert_eq!(f32::from_bits(output[i]), e, "{what}");
                            }
                            Epilogue::Bytes { .. } => {
                                let e =
                                    (sum as f32 * factors[m] + offsets[m]).round_ties_even().clamp(-10.0, 200.0) + 10.0;
                                let byte = output[i / 4].to_le_bytes()[i % 4];
                                assert_eq!(f32::from(byte), e, "{what}");
                            }
                        }
                    }
                }
            }
        }
    }
}
