//! Products with a matrix whose elements take 2, 4 or 8 bits, in blocks of one scale: the weights of compressed language models.
//!
//! Weights are read as they are packed and widened in registers, for all rows of A that a tile has at once: what one row of A costs is the
//! reading, what many cost is the multiplication. Within a block sums are `Σ a·q`, scaled once at its end.

use std::ops::Range;

use super::IsaLevel;
use super::dispatch::{Kernel, dispatch};
use super::epilogue::Output;
use super::isa::Isa;
use super::quantized_product::load_some;

/// `y[m, n] = bias[n] + Σ_k a[m, k] · (q[n, k] − zero_point[n, k / block]) · scale[n, k / block]`, `q` unsigned numbers of `bits` bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockedShape {
    pub rows: usize,
    pub k: usize,
    pub n: usize,
    /// 2, 4 or 8.
    pub bits: usize,
    /// A multiple of 16.
    pub block: usize,
    /// Whether blocks have zero points of their own; the middle of the range is all of theirs otherwise.
    pub has_zero_points: bool,
}

impl BlockedShape {
    pub fn blocks(&self) -> usize {
        self.k.div_ceil(self.block)
    }

    /// Words of 32 bits in which a block's elements are, of one column.
    fn words(&self) -> usize {
        self.block * self.bits / 32
    }

    /// Words of a block of a panel's columns: scales, zero points if there are any, elements.
    fn block_words(&self) -> usize {
        self.words() + 1 + usize::from(self.has_zero_points)
    }

    fn assert_valid(&self) {
        assert!(matches!(self.bits, 2 | 4 | 8) && self.block > 0 && self.block.is_multiple_of(16), "{self:?}");
    }
}

/// Vectors of columns in a panel: as many sums as it takes to keep the multipliers busy with one row.
const VECTORS: usize = 4;

/// Most columns of a panel.
const COLUMNS: usize = VECTORS * 16;

/// Most rows of a register tile.
const fn tile_rows<I: Isa>() -> usize {
    if I::REGISTERS >= 32 { 6 } else { 5 }
}

/// Rows of a tile and columns of a panel on a rung.
pub fn cut(level: IsaLevel) -> (usize, usize) {
    struct Cut;
    impl Kernel for Cut {
        type Output = (usize, usize);
        #[inline(always)]
        fn eval<I: Isa>(self, _: I) -> (usize, usize) {
            (tile_rows::<I>(), VECTORS * I::LANES)
        }
    }
    dispatch(level, Cut)
}

pub fn panels(level: IsaLevel, shape: &BlockedShape) -> usize {
    shape.n.div_ceil(cut(level).1)
}

/// `f32`s of packed weights.
pub fn packed_len(level: IsaLevel, shape: &BlockedShape) -> usize {
    panels(level, shape) * cut(level).1 * shape.blocks() * shape.block_words()
}

/// Packs weights by panels of columns, these by blocks, these word by word. `elements` are `[n][blocks][block · bits / 8]` bytes, the first
/// element in the low bits; `scales` and `zero_points` are `[n][blocks]`.
pub fn pack(
    level: IsaLevel,
    shape: &BlockedShape,
    elements: &[u8],
    scales: &[f32],
    zero_points: Option<&[f32]>,
    packed: &mut [f32],
) {
    shape.assert_valid();
    let (width, blocks, words) = (cut(level).1, shape.blocks(), shape.words());
    let count = shape.n * blocks;
    assert!(elements.len() >= count * words * 4 && scales.len() >= count && packed.len() >= packed_len(level, shape));
    assert!(zero_points.map(|z| z.len() >= count) == shape.has_zero_points.then_some(true), "{shape:?}");
    // Elements less the middle of the range are signed.
    let middle = 1u32 << (shape.bits - 1);
    let flip = (0..32 / shape.bits).fold(0, |flip, i| flip | middle << (i * shape.bits));
    packed.fill(0.0);
    let (elements, _) = elements.as_chunks::<4>();
    for n in 0..shape.n {
        for block in 0..blocks {
            let to = &mut packed[(n / width * blocks + block) * shape.block_words() * width + n % width..];
            to[0] = scales[n * blocks + block];
            let mut at = 1;
            if let Some(zero_points) = zero_points {
                to[width] = zero_points[n * blocks + block] - middle as f32;
                at = 2;
            }
            for (word, &bytes) in elements[(n * blocks + block) * words..][..words].iter().enumerate() {
                to[(at + word) * width] = f32::from_bits(u32::from_le_bytes(bytes) ^ flip);
            }
        }
    }
}

/// A product to be computed.
#[derive(Clone, Copy, Debug)]
pub struct Blocked<'a> {
    pub shape: BlockedShape,
    /// `[rows][k]`.
    pub a: &'a [f32],
    pub weights: &'a [f32],
    pub bias: Option<&'a [f32]>,
}

/// Computes the outputs, `[rows][n]`, of a range of rows and a range of panels.
pub fn blocked_product(
    level: IsaLevel,
    problem: &Blocked<'_>,
    rows: Range<usize>,
    panels_of: Range<usize>,
    output: Output<'_>,
) {
    let shape = &problem.shape;
    shape.assert_valid();
    assert!(rows.end <= shape.rows && panels_of.end <= panels(level, shape), "{rows:?}, {panels_of:?} of {shape:?}");
    assert!(problem.a.len() >= shape.rows * shape.k && problem.weights.len() >= packed_len(level, shape), "{shape:?}");
    assert!(output.len() >= shape.rows * shape.n && problem.bias.is_none_or(|b| b.len() >= shape.n), "{shape:?}");
    dispatch(level, Panels { problem, rows, panels: panels_of, output: output.pointer() })
}

struct Panels<'a> {
    problem: &'a Blocked<'a>,
    rows: Range<usize>,
    panels: Range<usize>,
    output: *mut f32,
}

impl Kernel for Panels<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Panels { problem, rows, panels, output } = self;
        let Blocked { shape, a, weights, bias } = *problem;
        let (width, tile) = (VECTORS * I::LANES, tile_rows::<I>());
        let panel_len = shape.blocks() * shape.block_words() * width;
        for panel in panels {
            let columns = panel * width..shape.n.min((panel + 1) * width);
            let mut start = [0f32; COLUMNS];
            if let Some(bias) = bias {
                start[..columns.len()].copy_from_slice(&bias[columns.clone()]);
            }
            let weights = &weights[panel * panel_len..][..panel_len];
            let mut row = rows.start;
            while row < rows.end {
                let some = tile.min(rows.end - row);
                let mut sums = [[0f32; COLUMNS]; 6];
                // SAFETY: the entry checked the lengths; all rows of a tile are inside.
                unsafe {
                    let a = a.as_ptr().add(row * shape.k);
                    macro_rules! sum {
                        ($rows:literal by $vectors:literal) => {{
                            for first in (0..VECTORS).step_by($vectors) {
                                let (start, sums) = (&start, &mut sums);
                                match shape.bits {
                                    2 => {
                                        tile_sums::<I, 2, $rows, $vectors>(isa, &shape, a, weights, first, start, sums)
                                    }
                                    4 => {
                                        tile_sums::<I, 4, $rows, $vectors>(isa, &shape, a, weights, first, start, sums)
                                    }
                                    _ => {
                                        tile_sums::<I, 8, $rows, $vectors>(isa, &shape, a, weights, first, start, sums)
                                    }
                                }
                            }
                            $rows
                        }};
                    }
                    let some = match some {
                        1 => sum!(1 by 4),
                        2..=4 => sum!(2 by 4),
                        5 => sum!(5 by 2),
                        _ => sum!(6 by 4),
                    };
                    for (r, sums) in sums[..some].iter().enumerate() {
                        let to = output.add((row + r) * shape.n + columns.start);
                        std::ptr::copy_nonoverlapping(sums.as_ptr(), to, columns.len());
                    }
                    row += some;
                }
            }
        }
    }
}

/// Sums of `ROWS` rows of A with `V` vectors of a panel's columns, from `start` on; `first` is the first of these.
///
/// # Safety
/// `ROWS` rows are readable at `a`; the panel is as long as the shape says.
#[inline(always)]
unsafe fn tile_sums<I: Isa, const BITS: usize, const ROWS: usize, const V: usize>(
    isa: I,
    shape: &BlockedShape,
    a: *const f32,
    panel: &[f32],
    first: usize,
    start: &[f32; COLUMNS],
    sums: &mut [[f32; COLUMNS]; 6],
) {
    let (k, block, width) = (shape.k, shape.block, VECTORS * I::LANES);
    let (words, has_zero_points, per_word) = (shape.words(), shape.has_zero_points, 32 / BITS);
    let first = first * I::LANES;
    for r in 0..ROWS {
        sums[r][first..first + V * I::LANES].copy_from_slice(&start[first..first + V * I::LANES]);
    }
    let mut at = panel.as_ptr().wrapping_add(first);
    for done in (0..k).step_by(block) {
        let (a, terms) = (a.wrapping_add(done), block.min(k - done));
        // SAFETY: the caller; terms end where a row of A does.
        unsafe {
            let scales = at;
            let zero_points = at.add(width);
            let mut elements = at.add(if has_zero_points { 2 * width } else { width });
            at = elements.add(words * width);
            let mut tile = [[isa.zero(); V]; ROWS];
            let mut done = 0;
            while done < terms {
                let from = a.wrapping_add(done);
                // A word's elements; fewer where A ends.
                let some = per_word.min(terms - done);
                if some == per_word {
                    for i in 0..32 / BITS {
                        step::<I, BITS, ROWS, V>(isa, from.wrapping_add(i), k, elements, i, &mut tile);
                    }
                } else {
                    for i in 0..some {
                        step::<I, BITS, ROWS, V>(isa, from.wrapping_add(i), k, elements, i, &mut tile);
                    }
                }
                elements = elements.add(width);
                done += per_word;
            }
            for r in 0..ROWS {
                let mut of_a = isa.zero();
                if has_zero_points {
                    let row = a.add(r * k);
                    for i in (0..terms).step_by(I::LANES) {
                        of_a = isa.add(of_a, load_some(isa, row.add(i), I::LANES.min(terms - i)));
                    }
                    of_a = isa.splat(isa.reduce_sum(of_a));
                }
                for v in 0..V {
                    let mut sum = tile[r][v];
                    if has_zero_points {
                        sum = isa.fnma(of_a, isa.load(zero_points.add(v * I::LANES)), sum);
                    }
                    let y = sums[r].as_mut_ptr().add(first + v * I::LANES);
                    isa.store(y, isa.fma(sum, isa.load(scales.add(v * I::LANES)), isa.load(y)));
                }
            }
        }
    }
}

/// Adds the products with element `i` of a word of every column.
///
/// # Safety
/// `ROWS` values `k` apart are readable at `a`, a word of every column at `elements`.
#[inline(always)]
unsafe fn step<I: Isa, const BITS: usize, const ROWS: usize, const V: usize>(
    isa: I,
    a: *const f32,
    k: usize,
    elements: *const f32,
    i: usize,
    tile: &mut [[I::V; V]; ROWS],
) {
    let (up, down) = (32 - BITS - i * BITS, 32 - BITS);
    // SAFETY: the caller.
    unsafe {
        // Whichever are fewer stay in registers: the rows' values or the columns' weights.
        if ROWS < V {
            let mut x = [isa.zero(); ROWS];
            for r in 0..ROWS {
                x[r] = isa.splat(a.add(r * k).read());
            }
            for v in 0..V {
                let word = isa.load_w(elements.add(v * I::LANES).cast());
                let weight = isa.floats_of(isa.shift_w(word, up as u32, down as u32));
                for r in 0..ROWS {
                    tile[r][v] = isa.fma(x[r], weight, tile[r][v]);
                }
            }
        } else {
            let mut weights = [isa.zero(); V];
            for v in 0..V {
                let word = isa.load_w(elements.add(v * I::LANES).cast());
                weights[v] = isa.floats_of(isa.shift_w(word, up as u32, down as u32));
            }
            for r in 0..ROWS {
                let x = isa.splat(a.add(r * k).read());
                for v in 0..V {
                    tile[r][v] = isa.fma(x, weights[v], tile[r][v]);
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
    fn agrees_with_plain_sums() {
        for level in levels() {
            let mut random = Random::new(71);
            for round in rounds(90) {
                let bits = [2, 4, 8][round % 3];
                let block = random.pick(&[16, 32, 64, 128]);
                let (rows, k, n) = (random.between(1, 14), random.between(1, 200), random.between(1, 150));
                let has_zero_points = random.between(0, 1) == 1;
                let shape = BlockedShape { rows, k, n, bits, block, has_zero_points };
                let blocks = shape.blocks();
                let elements: Vec<u8> = (0..n * blocks * block * bits / 8).map(|_| random.bits() as u8).collect();
                let scales = random.units(n * blocks);
                let zero_points: Vec<f32> =
                    (0..n * blocks).map(|_| random.between(0, (1 << bits) - 1) as f32 + 0.25).collect();
                let zero_points = has_zero_points.then_some(&zero_points[..]);
                let (a, bias) = (random.units(rows * k), random.units(n));
                let bias = (round % 2 == 0).then_some(&bias[..]);
                let mut weights = vec![f32::NAN; packed_len(level, &shape)];
                pack(level, &shape, &elements, &scales, zero_points, &mut weights);
                let problem = Blocked { shape, a: &a, weights: &weights, bias };
                let mut output = vec![f32::NAN; rows * n];
                blocked_product(level, &problem, 0..rows, 0..panels(level, &shape), Output::new(&mut output));
                let mut expected = Vec::new();
                for m in 0..rows {
                    for n in 0..n {
                        let mut sum = bias.map_or(0.0, |b| f64::from(b[n]));
                        for k in 0..k {
                            let at = (n * blocks * block + k) * bits;
                            let q = elements[at / 8] >> (at % 8) & (255 >> (8 - bits)) as u8;
                            let group = n * blocks + k / block;
                            let zero = zero_points.map_or(f64::from(1 << (bits - 1)), |z| f64::from(z[group]));
                            sum += f64::from(a[m * shape.k + k]) * (f64::from(q) - zero) * f64::from(scales[group]);
                        }
                        expected.push(sum);
                    }
                }
                // Terms are up to 2^bits.
                let tolerance = 1e-6 * f64::from(1 << bits) * (k as f64).sqrt();
                assert_near(level, &shape, &output, &expected, tolerance);
                let mut cut = vec![f32::NAN; rows * n];
                for rows in random_cuts(&mut random, rows) {
                    for panels in random_cuts(&mut random, panels(level, &shape)) {
                        blocked_product(level, &problem, rows.clone(), panels, Output::new(&mut cut));
                    }
                }
                assert_same_bits(level, &shape, &output, &cut);
            }
        }
    }
}
