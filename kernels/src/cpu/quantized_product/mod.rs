//! Products and convolutions of 8-bit integers, exact in `i32`, with what makes floats or quantized values of the sums.
//!
//! Images are channels-last, `[n][height][width][channels]`; a matrix product is the convolution of one row of pixels by a window of one. The
//! rows of A that a tile needs (the windows of its pixels) are gathered into the workspace, less their zero point, and multiplied with packed
//! weights: pairs of `i16`, or, where the rung multiplies bytes at once, groups of four bytes or squares of eight, the zero point taken off the sums; where it does
//! so but saturates, by steps that can't ([`bounded`]). Any way padding is the zero point, nothing saturates, and every sum is exact as long as it fits `i32`.

mod bounded;
mod gather;
mod tile;

use std::ops::Range;

use super::IsaLevel;
use super::conv::Axis;
use super::dispatch::{Kernel, dispatch};
use super::epilogue::Output;
use super::isa::Isa;
use gather::{RUN, gather};
pub(super) use tile::byte_range;

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
    fn words(&self, form: Form) -> usize {
        self.depth().div_ceil(2 * form.per_word()) * 2
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

/// How weights are packed, and values gathered for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Pairs of `i16`; the values less their zero point.
    Halves,
    /// Four bytes, or squares of eight, for instructions that add their products exactly.
    Bytes,
    /// Four bytes for one that saturates; `centred` where they are unsigned and the values signed ([`bounded`]).
    Bounded { centred: bool },
}

impl Form {
    /// Terms to a word.
    const fn per_word(self) -> usize {
        if matches!(self, Form::Halves) { 2 } else { 4 }
    }

    /// The form on this rung of weights less their zero points, for values that are signed or not, with their zero point where that is known already.
    pub fn of(level: IsaLevel, shape: &ProductShape, weights: &[i16], signed: bool, zero_point: Option<i32>) -> Form {
        // How far a zero point may be from the middle for values to count as symmetric about it.
        const FAR: i32 = 24;
        // Terms below which bounds cost more than they bring.
        const FEW: usize = 40;
        let Cut { bytes, saturates, .. } = cut(level);
        let fits = bytes || (saturates && shape.depth() >= FEW);
        let range = weights.iter().fold((0, 0), |(low, high), &w| (w.min(low), w.max(high)));
        if !fits || i8::try_from(range.0).is_err() || i8::try_from(range.1).is_err() {
            return Form::Halves;
        }
        let middle = if signed { 0 } else { 128 };
        match bytes {
            true => Form::Bytes,
            false => Form::Bounded { centred: zero_point.is_some_and(|zero| (zero - middle).abs() <= FAR) },
        }
    }
}

/// Rows of a register tile.
const fn tile_rows<I: Isa>(form: Form) -> usize {
    match form {
        Form::Bounded { .. } => bounded::tile_rows::<I>(),
        _ if I::REGISTERS >= 32 => 12,
        _ => 6,
    }
}

/// Columns of a panel.
const fn panel_columns<I: Isa>() -> usize {
    2 * I::LANES
}

/// How a rung cuts products up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    /// Rows of a tile.
    rows: usize,
    /// Columns of a panel.
    columns: usize,
    /// Whether it multiplies bytes exactly.
    bytes: bool,
    /// Whether it multiplies them, but saturates.
    saturates: bool,
    /// Whether bytes of one column are eight to a place, else four.
    squares: bool,
}

fn cut(level: IsaLevel) -> Cut {
    cut_of(level, Form::Halves)
}

fn cut_of(level: IsaLevel, form: Form) -> Cut {
    struct Cuts(Form);
    impl Kernel for Cuts {
        type Output = Cut;
        const OF_BYTES: bool = true;
        #[inline(always)]
        fn eval<I: Isa>(self, _: I) -> Cut {
            Cut {
                rows: tile_rows::<I>(self.0),
                columns: panel_columns::<I>(),
                bytes: I::DOT4,
                saturates: I::SATURATES,
                squares: I::SQUARES,
            }
        }
    }
    dispatch(level, Cuts(form))
}

/// Rows that are best computed together.
pub fn rows_together(level: IsaLevel, form: Form) -> usize {
    cut_of(level, form).rows
}

/// Panels of one group's columns.
pub fn panels(level: IsaLevel, shape: &ProductShape) -> usize {
    shape.columns().div_ceil(cut(level).columns)
}

/// `f32`s of packed weights.
pub fn packed_len(level: IsaLevel, shape: &ProductShape, form: Form) -> usize {
    shape.groups * group_len(panels(level, shape), cut(level).columns, shape.words(form), form)
}

/// `f32`s of one group's packed weights: its panels, the sum of every column, the panels' limits.
fn group_len(panels: usize, width: usize, words: usize, form: Form) -> usize {
    panels * (width * (words + 1) + limits_len(words, form))
}

/// `f32`s of a panel's limits.
fn limits_len(words: usize, form: Form) -> usize {
    match form {
        Form::Bounded { .. } => bounded::limits_len(words).div_ceil(4),
        _ => 0,
    }
}

/// Packs weights `[channels_out][channels_in/groups][height][width]`, less their zero points.
pub fn pack(level: IsaLevel, shape: &ProductShape, weights: &[i16], form: Form, packed: &mut [f32]) {
    let (columns, words) = (shape.columns(), shape.words(form));
    let Cut { columns: width, squares: in_squares, .. } = cut(level);
    let (taps, channels, depth) =
        (shape.height.kernel * shape.width.kernel, shape.channels_in / shape.groups, shape.depth());
    let (mut row, mut in_bytes) = (vec![0i16; words * form.per_word()], vec![0u8; words * form.per_word()]);
    // What makes unsigned bytes of signed ones.
    let flip = if form == (Form::Bounded { centred: true }) { 0x80 } else { 0 };
    assert!(weights.len() >= shape.channels_out * shape.depth() && packed.len() >= packed_len(level, shape, form));
    let (panels, limits_len) = (panels(level, shape), limits_len(words, form));
    let group_len = group_len(panels, width, words, form);
    for group in 0..shape.groups {
        let (body, rest) = packed[group * group_len..][..group_len].split_at_mut(panels * width * words);
        let (sums, limits) = rest.split_at_mut(panels * width);
        for first in (0..columns).step_by(width) {
            let rows = &weights[(group * columns + first) * depth..][..width.min(columns - first) * depth];
            let panel = &mut body[first * words..][..width * words];
            for (column, sum) in sums[first..first + width].iter_mut().enumerate() {
                // Row-major over the window, channels innermost, as rows of A are gathered; 0 where the last word, or panel, has more.
                row.fill(0);
                let own = rows.get(column * depth..).and_then(|rows| rows.get(..depth)).unwrap_or(&[]);
                match taps {
                    1 => row[..own.len()].copy_from_slice(own),
                    _ => {
                        for (to, k) in row.iter_mut().zip(0..own.len()) {
                            *to = own[k % channels * taps + k / channels];
                        }
                    }
                }
                *sum = f32::from_bits(own.iter().map(|&w| i32::from(w)).sum::<i32>() as u32);
                if form == Form::Halves {
                    for (to, &[a, b]) in panel.chunks_exact_mut(width).zip(row.as_chunks::<2>().0) {
                        to[column] = f32::from_bits(u32::from(a as u16) | u32::from(b as u16) << 16);
                    }
                    continue;
                }
                for (to, &weight) in in_bytes.iter_mut().zip(&row) {
                    *to = weight as u8 ^ flip;
                }
                let fours = in_bytes.as_chunks::<4>().0.iter().map(|&four| f32::from_bits(u32::from_le_bytes(four)));
                match form == Form::Bytes && in_squares {
                    true => fours.enumerate().for_each(|(word, four)| {
                        panel[(word / 2 * width + column) * 2 + word % 2] = four;
                    }),
                    false => panel.chunks_exact_mut(width).zip(fours).for_each(|(to, four)| to[column] = four),
                }
            }
            if let Form::Bounded { centred } = form {
                let limits = &mut limits[first / width * limits_len..][..limits_len];
                bounded::limit(bytes(panel), width, words, centred, bytes_mut(limits));
            }
        }
    }
}

/// Rows that are gathered at a time: some tiles' worth, which stay in the second-level cache.
fn block_rows(rows: usize, words: usize) -> usize {
    const BLOCK_WORDS: usize = 16 << 10;
    rows * (BLOCK_WORDS / (rows * words.max(1))).clamp(1, BLOCK_TILES)
}

/// Most tiles of a block: the more, the less often a panel's steps are sorted.
const BLOCK_TILES: usize = 16;

/// `f32`s of workspace that [`product`] needs on each thread.
pub fn workspace_len(level: IsaLevel, shape: &ProductShape, form: Form) -> usize {
    let words = shape.words(form);
    let own = if matches!(form, Form::Bounded { .. }) { bounded::workspace_len(words) } else { 0 };
    let Cut { rows, columns, .. } = cut_of(level, form);
    block_rows(rows, words) * (words + columns) + RUN + own
}

/// A product to be computed.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    pub shape: ProductShape,
    pub input: Quantized<'a>,
    /// Packed, in this form.
    pub weights: &'a [f32],
    pub form: Form,
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
        problem.weights.len() >= packed_len(level, shape, problem.form)
            && workspace.len() >= workspace_len(level, shape, problem.form)
    );
    assert!(
        output.len() >= shape.rows() * shape.channels_out * problem.epilogue.size(),
        "{} bytes of {shape:?}",
        output.len()
    );
    assert!((output.pointer() as usize).is_multiple_of(problem.epilogue.size()));
    let cut = cut(level);
    assert!(match problem.form {
        Form::Halves => true,
        Form::Bytes => cut.bytes,
        Form::Bounded { .. } => cut.saturates && !cut.bytes,
    });
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

impl Kernel for Multiply<'_> {
    type Output = ();
    const OF_BYTES: bool = true;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Multiply { problem, rows, panels, output, workspace } = self;
        let (shape, form) = (&problem.shape, problem.form);
        let (words, width, tile) = (shape.words(form), panel_columns::<I>(), tile_rows::<I>(form));
        let columns = shape.columns();
        let panel_count = columns.div_ceil(width);
        let group_len = group_len(panel_count, width, words, form);
        let block = block_rows(tile, words);
        let (workspace, more) = workspace.split_at_mut(block * words + RUN);
        let bytes_of = match form {
            Form::Bounded { centred: true } => problem.input.as_signed(),
            Form::Bytes if I::SIGNED => problem.input.as_signed(),
            _ => problem.input.unsigned(),
        };
        let (_, zero_point) = bytes_of;
        let size = problem.epilogue.size();
        let (sums, more) = more.split_at_mut(block * width);
        for group in 0..shape.groups {
            let packed = &problem.weights[group * group_len..][..group_len];
            let (packed, rest) = packed.split_at(panel_count * width * words);
            let (column_sums, limits) = rest.split_at(panel_count * width);
            for first in rows.clone().step_by(block) {
                let count = block.min(rows.end - first);
                match form {
                    Form::Halves => {
                        gather::<i16>(problem, group, bytes_of, first..first + count, workspace, words * 2);
                    }
                    _ => gather::<u8>(problem, group, bytes_of, first..first + count, workspace, words * 4),
                }
                let mut measured = match form {
                    Form::Bounded { centred } if I::SATURATES => {
                        Some(bounded::measure(isa, centred, bytes(&workspace[..count * words]), words, more))
                    }
                    _ => None,
                };
                for panel in panels.clone() {
                    let start = panel * width;
                    let mut starts = [0i32; 32];
                    if form != Form::Halves {
                        // What the zero point adds to every sum.
                        for (start, sum) in starts.iter_mut().zip(&column_sums[start..start + width]) {
                            *start = zero_point.wrapping_mul(sum.to_bits() as i32).wrapping_neg();
                        }
                    }
                    let bounds = measured.as_mut().map(|(measures, lists)| {
                        let len = limits_len(words, form);
                        (&measures.starts, measures.steps(bytes(&limits[panel * len..][..len]), words, lists))
                    });
                    let here = width.min(columns - start);
                    isa.outline(tile::Tiles {
                        form,
                        a: &workspace[..block * words],
                        words,
                        b: &packed[start * words..][..width * words],
                        starts: &starts,
                        bounds,
                        rows: count,
                        is_narrow: here <= I::LANES,
                        sums,
                    });
                    let channel = group * columns + start;
                    let at = first * shape.channels_out + channel;
                    let scaling = tile::scaling(isa, &problem.epilogue, channel..channel + here);
                    // SAFETY: the entry checked the output's length, of which these rows and channels are inside.
                    unsafe { tile::finish(isa, problem, &sums[..count * width], scaling, here, output.add(at * size)) };
                }
            }
        }
    }
}

fn bytes_mut(floats: &mut [f32]) -> &mut [u8] {
    // SAFETY: bytes may be anything, lie anywhere, and make any float.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), size_of_val(floats)) }
}

/// The bytes of floats that hold bytes.
fn bytes(floats: &[f32]) -> &[u8] {
    // SAFETY: bytes may be anything, and lie anywhere.
    unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), size_of_val(floats)) }
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
                    0 => ProductShape::matrices(random.between(1, 80), random.between(1, 150), random.between(1, 70)),
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
                // Narrow values and weights are multiplied in other ways than wide ones, where that depends on bounds.
                let (narrow, about) = (random.pick(&[1, 3, 20]), random.pick(&[0, 64, 128]));
                let byte = |bits: u64| match extreme {
                    true => [0, 0x80, 0xff][bits as usize % 3],
                    false => (about + i32::from(bits as i8) / narrow) as u8,
                };
                let bytes: Vec<u8> = (0..pixels * shape.channels_in).map(|_| byte(random.bits())).collect();
                let signed = random.between(0, 1) == 1;
                let zero_point = random.pick(&[0, 5, 64, 127]) - if signed { 64 } else { 0 };
                let light = random.pick(&[1, 2, 9]);
                let input = Quantized { bytes: &bytes, signed, zero_point };
                let wide = random.between(0, 3) == 0;
                let weight = |bits: u64| match (wide, extreme) {
                    (true, _) => (bits % 511) as i16 - 255,
                    (false, true) => [-128, 127][bits as usize % 2],
                    (false, false) => i16::from(bits as i8) / light,
                };
                let weights: Vec<i16> =
                    (0..shape.channels_out * shape.depth()).map(|_| weight(random.bits())).collect();
                let form = Form::of(level, &shape, &weights, signed, (random.between(0, 1) == 1).then_some(zero_point));
                let mut packed = vec![0.0; packed_len(level, &shape, form)];
                pack(level, &shape, &weights, form, &mut packed);
                let expected = sums(&shape, &input, &weights);
                let factors: Vec<f32> = random.units(shape.channels_out).iter().map(|x| x.abs() * 1e-2).collect();
                let offsets = random.units(shape.channels_out);
                // Beyond what rounds to an `i32`.
                let large: Vec<f32> = factors.iter().map(|factor| factor * 1e9).collect();
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
                    Epilogue::Bytes { factors: &factors, offsets: &offsets, low: -10.0, high: 245.0, zero_point: 10 },
                    Epilogue::Bytes { factors: &factors, offsets: &offsets, low: -125.0, high: 130.0, zero_point: -3 },
                    Epilogue::Bytes { factors: &large, offsets: &offsets, low: -10.0, high: 245.0, zero_point: 10 },
                ];
                for epilogue in epilogues {
                    let problem = Product { shape, input, weights: &packed, form, epilogue };
                    let mut output = vec![0u32; shape.rows() * shape.channels_out];
                    let mut workspace = vec![f32::NAN; workspace_len(level, &shape, form)];
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
                            Epilogue::Bytes { factors, low, high, zero_point, .. } => {
                                let e = (sum as f32 * factors[m] + offsets[m]).round_ties_even().clamp(low, high);
                                let byte = output[i / 4].to_le_bytes()[i % 4];
                                assert_eq!(byte, (e as i32 + zero_point) as u8, "{what}");
                            }
                        }
                    }
                }
            }
        }
    }
}
