//! Matrix products of pairs of bfloat16, summed in f32: for processors that multiply them at once ([`IsaLevel::has_bf16`]).
//!
//! Other processors have only the scalar rung, for tests. As [`super::gemm`], with both operands rounded to bfloat16, to the nearest: B when it is packed, A as it is packed per call. Two depths lie in one word, so
//! that a panel has half of f32's words. A row's result does not depend on the rows and ranges it was computed with.

use std::ops::Range;

use super::conv::Operands;
use super::dispatch::{Kernel, dispatch_bf16};
use super::epilogue::{ApplyRows, Output, Residual};
use super::gemm::{
    Bias, Gemm, Matrix, load_columns, pack_a, pack_b, packed_stride, panel_count, panel_vectors, panel_width,
    store_columns, tile_rows,
};
use super::half::{HalfType, narrow};
use super::isa::Isa;
use super::tile::pieces;
use super::{IsaLevel, vmath};

/// Words of packed A at most, where one tile does not take more: for the second-level cache.
const PACKED_LEN: usize = 1 << 16;
/// Rows of a tile as packed, on any rung.
const MOST_STRIDE: usize = 16;

/// Words of packed B.
pub fn packed_b_bf16_len(level: IsaLevel, k: usize, n: usize) -> usize {
    panel_count(level, n) * panel_width(level) * k.div_ceil(2)
}

/// Packs B (`k × n`) as `[panel][k / 2][panel_width]` words of two depths; what is past `n` and `k` is 0. Words are held as floats of the
/// same bits.
pub fn pack_b_bf16(level: IsaLevel, b: Matrix<'_>, k: usize, n: usize, packed: &mut [f32]) {
    let width = panel_width(level);
    assert!(packed.len() >= packed_b_bf16_len(level, k, n), "packed B of {k} x {n} has {} words", packed.len());
    b.assert_holds(k, n, "B");
    let (mut panel, mut halves) = (vec![0.0; width * k], vec![0; width * k]);
    for first in (0..n).step_by(width) {
        let columns = Matrix { data: &b.data[(first * b.column_stride).min(b.data.len())..], ..b };
        pack_b(level, columns, k, width.min(n - first), 0..1, Output::new(&mut panel));
        narrow(level, HalfType::Bf16, &panel, &mut halves);
        let words = &mut packed[first * k.div_ceil(2)..];
        for (pair, words) in halves.chunks(2 * width).zip(words.chunks_mut(width)) {
            let (low, high) = pair.split_at(width);
            for (j, word) in words.iter_mut().enumerate() {
                let high = high.get(j).copied().unwrap_or(0);
                *word = f32::from_bits(u32::from(low[j]) | u32::from(high) << 16);
            }
        }
    }
}

/// Elements of workspace that [`gemm_bf16`] needs on each thread.
pub fn gemm_bf16_workspace_len(k: usize) -> usize {
    let depth = k.div_ceil(2);
    MOST_STRIDE * depth + PACKED_LEN.max(MOST_STRIDE * depth)
}

/// As [`super::gemm::gemm`], of B as [`pack_b_bf16`] leaves it.
pub fn gemm_bf16(
    level: IsaLevel,
    problem: &Gemm<'_>,
    rows: Range<usize>,
    panels: Range<usize>,
    output: Output<'_>,
    workspace: &mut [f32],
) {
    let Gemm { m, n, k, .. } = *problem;
    if rows.is_empty() || panels.is_empty() {
        return;
    }
    assert!(Operands::Bf16.level(level) == level, "{} has no products of bfloat16", level.name());
    assert!(rows.end <= m, "rows {rows:?} of {m}");
    assert!(panels.end <= panel_count(level, n), "panels {panels:?} of {n} columns");
    problem.a.assert_holds(m, k, "A");
    assert!(problem.b.len() >= packed_b_bf16_len(level, k, n), "packed B of {k} x {n} has {} words", problem.b.len());
    assert!(problem.output_stride >= n || m == 1, "rows of {n} columns {} apart", problem.output_stride);
    let last = (m - 1) * problem.output_stride + n;
    assert!(output.len() >= last, "output of {} elements, {last} needed", output.len());
    assert!(workspace.len() >= gemm_bf16_workspace_len(k), "workspace of {} elements", workspace.len());
    match problem.bias {
        Bias::None => {}
        Bias::Column(bias) => assert!(bias.len() >= n, "{} biases for {n} columns", bias.len()),
        Bias::Row(bias) => assert!(bias.len() >= m, "{} biases for {m} rows", bias.len()),
    }
    if let Residual::Slice(residual) = problem.residual {
        assert!(residual.len() >= last, "residual of {} elements", residual.len());
    }
    dispatch_bf16(level, Product { problem, rows, panels, output: output.pointer(), workspace });
}

struct Product<'a> {
    problem: &'a Gemm<'a>,
    rows: Range<usize>,
    panels: Range<usize>,
    output: *mut f32,
    workspace: &'a mut [f32],
}

impl Kernel for Product<'_> {
    type Output = ();
    const OF_HALVES: bool = true;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let problem = self.problem;
        let (depth, mr) = (problem.k.div_ceil(2), tile_rows::<I>());
        let tile_len = packed_stride::<I>() * depth;
        let (pairs, packed) = self.workspace.split_at_mut(MOST_STRIDE * depth);
        let tiles_at_once = (packed.len() / tile_len.max(1)).clamp(1, 64);
        for block in pieces(self.rows.len(), mr * tiles_at_once) {
            let first = self.rows.start + block.start;
            for (i, tile) in pieces(block.len(), mr).enumerate() {
                // SAFETY: the entry checked A; the workspace holds a tile's rows, and as many packed tiles.
                unsafe {
                    pair_rows(isa, problem.a, first + tile.start, tile.len(), problem.k, pairs.as_mut_ptr());
                    let rows = Matrix { data: pairs, row_stride: depth, column_stride: 1 };
                    pack_a(isa, rows, 0, tile.len(), 0..depth, packed[i * tile_len..].as_mut_ptr());
                }
            }
            for panel in self.panels.clone() {
                for (i, tile) in pieces(block.len(), mr).enumerate() {
                    let packed = packed[i * tile_len..].as_ptr();
                    let strip = Strip { problem, row: first + tile.start, panel, output: self.output, packed };
                    macro_rules! tile {
                        ($($rows:literal)+) => {
                            match tile.len() {
                                // Guards in `const` blocks, so that tiles which a rung cannot have are not compiled for it.
                                $($rows if const { tile_rows::<I>() >= $rows } => {
                                    if const { panel_vectors::<I>() == 4 } {
                                        isa.outline(Tile::<$rows, 4>(strip))
                                    } else {
                                        isa.outline(Tile::<$rows, 2>(strip))
                                    }
                                })+
                                _ => unreachable!("pieces are at most a tile's rows"),
                            }
                        };
                    }
                    tile!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
                }
            }
        }
    }
}

/// Rounds rows to words of two depths, `[mr][k / 2]`.
///
/// # Safety
/// The rows are inside A; there is room at `pairs`.
#[inline(always)]
unsafe fn pair_rows<I: Isa>(isa: I, a: Matrix<'_>, row: usize, mr: usize, k: usize, pairs: *mut f32) {
    // SAFETY: the caller.
    unsafe {
        for m in 0..mr {
            let from = a.data.as_ptr().add((row + m) * a.row_stride);
            let to = pairs.add(m * k.div_ceil(2)).cast::<u16>();
            let mut done = 0;
            while a.column_stride == 1 && done + I::LANES <= k {
                isa.store_bf16(to.add(done), isa.load(from.add(done)));
                done += I::LANES;
            }
            while done < k.next_multiple_of(2) {
                let (mut floats, mut halves) = ([0.0f32; 16], [0u16; 16]);
                let count = I::LANES.min(k.next_multiple_of(2) - done);
                for i in 0..count.min(k - done) {
                    floats[i] = from.add((done + i) * a.column_stride).read();
                }
                isa.store_bf16(halves.as_mut_ptr(), isa.load(floats.as_ptr()));
                std::ptr::copy_nonoverlapping(halves.as_ptr(), to.add(done), count);
                done += count;
            }
        }
    }
}

#[derive(Clone)]
struct Strip<'a> {
    problem: &'a Gemm<'a>,
    row: usize,
    panel: usize,
    output: *mut f32,
    packed: *const f32,
}

/// `MR` packed rows by a panel of `VB` vectors.
struct Tile<'a, const MR: usize, const VB: usize>(Strip<'a>);

impl<const MR: usize, const VB: usize> Kernel for Tile<'_, MR, VB> {
    type Output = ();
    const OF_HALVES: bool = true;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Strip { problem, row, panel, output, packed } = self.0;
        let (depth, width, stride) = (problem.k.div_ceil(2), VB * I::LANES, problem.output_stride);
        let columns = (problem.n - panel * width).min(width);
        // SAFETY: the entry checked the operands, the driver packed A; only columns below n are touched.
        unsafe {
            let b = problem.b.as_ptr().add(panel * width * depth);
            let mut sums = [[isa.zero(); VB]; MR];
            for k in 0..depth {
                let mut vectors = [isa.zero(); VB];
                for v in 0..VB {
                    vectors[v] = isa.load(b.add(k * width + v * I::LANES));
                }
                for m in 0..MR {
                    let a = isa.splat(packed.add(k * packed_stride::<I>() + m).read());
                    for v in 0..VB {
                        sums[m][v] = isa.dot_bf16(sums[m][v], a, vectors[v]);
                    }
                }
            }
            let (low, high) = problem.activation.bounds();
            let output = output.add(row * stride + panel * width);
            for m in 0..MR {
                for v in 0..VB {
                    let (column, to) = (v * I::LANES, output.add(m * stride));
                    let bias = match problem.bias {
                        Bias::None => isa.zero(),
                        Bias::Column(bias) => load_columns(isa, bias.as_ptr().add(panel * width), column, columns),
                        Bias::Row(bias) => isa.splat(*bias.get_unchecked(row + m)),
                    };
                    let mut x = isa.fma(sums[m][v], isa.splat(problem.alpha), bias);
                    match problem.residual {
                        Residual::None => {}
                        Residual::Slice(residual) => {
                            let from = residual.as_ptr().add((row + m) * stride + panel * width);
                            x = isa.add(x, load_columns(isa, from, column, columns));
                        }
                        Residual::Output => x = isa.add(x, load_columns(isa, to, column, columns)),
                    }
                    store_columns(isa, to, column, columns, vmath::clip(isa, x, low, high));
                }
            }
            if !problem.activation.clamps() {
                let activation = problem.activation;
                isa.outline(ApplyRows { activation, pointer: output, rows: MR, row_stride: stride, width: columns });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn products_of_rounded_operands_match_plain_loops_and_do_not_depend_on_ranges() {
        for level in levels().filter(|&level| operands(level).any(|operands| operands == Operands::Bf16)) {
            let mut random = Random::new(61);
            for round in rounds(100) {
                let large = round % 20 == 0;
                let (m, n) =
                    (random.between(1, if large { 120 } else { 30 }), random.between(1, if large { 150 } else { 40 }));
                let k = if large { random.between(500, 1100) } else { random.between(0, 70) };
                let (a, b) = (random.units(m * k), random.units(k * n));
                let transposed = [random.between(0, 1) == 1, random.between(0, 1) == 1];
                let matrix = |data, columns, rows, transposed| match transposed {
                    true => Matrix::transposed(data, rows),
                    false => Matrix::row_major(data, columns),
                };
                let (a_view, b_view) = (matrix(&a, k, m, transposed[0]), matrix(&b, n, k, transposed[1]));
                let stride = n + random.between(0, 3);
                let (bias, residual) = (random.units(m.max(n)), random.units(m * stride));
                let mut packed = vec![f32::NAN; packed_b_bf16_len(level, k, n)];
                pack_b_bf16(level, b_view, k, n, &mut packed);
                let which = [random.between(0, 2), random.between(0, 2)];
                let problem = Gemm {
                    m,
                    n,
                    k,
                    a: a_view,
                    b: &packed,
                    alpha: random.pick(&[1.0, 0.125]),
                    bias: [Bias::None, Bias::Column(&bias), Bias::Row(&bias)][which[0]],
                    residual: [Residual::None, Residual::Slice(&residual), Residual::Output][which[1]],
                    activation: ACTIVATIONS[round % ACTIVATIONS.len()],
                    output_stride: stride,
                };
                let mut workspace = vec![f32::NAN; gemm_bf16_workspace_len(k)];
                let before = if which[1] == 2 { residual.clone() } else { vec![7.0; m * stride] };
                let (mut whole, mut cut) = (before.clone(), before.clone());
                let panels = panel_count(level, n);
                gemm_bf16(level, &problem, 0..m, 0..panels, Output::new(&mut whole), &mut workspace);
                for rows in random_cuts(&mut random, m) {
                    for panels in random_cuts(&mut random, panels) {
                        gemm_bf16(level, &problem, rows.clone(), panels, Output::new(&mut cut), &mut workspace);
                    }
                }
                let case = (m, n, k, transposed, which, problem.activation);
                assert_same_bits(level, &case, &whole, &cut);
                let round = |x: f32| {
                    let mut half = [0];
                    narrow(IsaLevel::SCALAR, HalfType::Bf16, &[x], &mut half);
                    f64::from(f32::from_bits(u32::from(half[0]) << 16))
                };
                let expected: Vec<f64> = (0..m * stride)
                    .map(|at| {
                        let (i, j) = (at / stride, at % stride);
                        if j >= n {
                            return before[at].into();
                        }
                        let mut sum = 0.0;
                        for l in 0..k {
                            let a = a[i * a_view.row_stride + l * a_view.column_stride];
                            sum += round(a) * round(b[l * b_view.row_stride + j * b_view.column_stride]);
                        }
                        sum *= f64::from(problem.alpha);
                        sum += [0.0, bias[j].into(), bias[i].into()][which[0]];
                        sum += if which[1] > 0 { f64::from(residual[at]) } else { 0.0 };
                        activate(problem.activation, sum)
                    })
                    .collect();
                // Products are exact, their sums are rounded at most twice a pair: as a chain of k roundings in f32.
                assert_near(level, &case, &whole, &expected, 2e-6 * (1.0 + (k as f64).sqrt()));
            }
        }
    }
}
