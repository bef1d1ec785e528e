//! Matrix products: `C = activation(alpha · A·B + bias + residual)`, f32.
//!
//! B is packed into panels of [`panel_width`] columns, once for weights, per call otherwise ([`pack_b`]); A is read by strides and
//! packed as it goes into the caller's workspace. Operands may be transposed or any strided view. Every output is one chain
//! of multiply-adds over ascending k, whatever M, the ranges and the blocking: a row's result does not depend on the rows
//! it was computed with. Beta, batches and threads are the caller's.

use std::ops::Range;

use super::dispatch::{Kernel, dispatch};
use super::epilogue::{Activation, ApplyRows, Output, Residual};
use super::isa::Isa;
use super::movement::rows_apart;
use super::tile::{Floats, PackedRows, Rows, ScatteredRows, Tile, accumulate, pieces};
use super::{IsaLevel, vmath};

/// Depth of a block: the panel of A it makes fits the first-level cache, and deep products still reread C seldom.
const DEPTH_BLOCK: usize = 512;
/// Rows of A packed at a time: with [`DEPTH_BLOCK`] a third of a MiB, for the second-level cache; B streams past once for all of
/// them, the 128 tokens of most transformers among others.
const ROW_BLOCK: usize = 144;
/// Packed rows for a block at most: the tiles' rows are padded to whole vectors, 6 to 8 and 13 or 14 to 16.
const PACKED_ROWS: usize = 192;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Up to this many rows B's stream is what bounds the product, and A is not packed.
const FEW_ROWS: usize = 3;

/// A strided view of a matrix: element `(i, j)` is `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows of `columns` values, one after the other.
    pub fn row_major(data: &'a [f32], columns: usize) -> Matrix<'a> {
        Matrix { data, row_stride: columns, column_stride: 1 }
    }

    /// The transpose of rows of `rows_of_result` values: what ONNX calls `transA` or `transB`.
    pub fn transposed(data: &'a [f32], rows_of_result: usize) -> Matrix<'a> {
        Matrix { data, row_stride: 1, column_stride: rows_of_result }
    }

    pub(super) fn assert_holds(&self, rows: usize, columns: usize, name: &str) {
        if rows > 0 && columns > 0 {
            let last = (rows - 1) * self.row_stride + (columns - 1) * self.column_stride;
            assert!(last < self.data.len(), "{name} of {rows} x {columns} needs index {last}, has {}", self.data.len());
        }
    }
}

/// What is added to every output.
#[derive(Clone, Copy, Debug, Default)]
pub enum Bias<'a> {
    #[default]
    None,
    /// One value per column, `n` of them.
    Column(&'a [f32]),
    /// One value per row, `m` of them.
    Row(&'a [f32]),
}

/// A product of `m × k` by `k × n`.
#[derive(Clone, Copy, Debug)]
pub struct Gemm<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Matrix<'a>,
    /// B as [`pack_b`] leaves it.
    pub b: &'a [f32],
    /// Multiplies the product before bias and residual. 1 if the residual is [`Residual::Output`].
    pub alpha: f32,
    pub bias: Bias<'a>,
    pub residual: Residual<'a>,
    pub activation: Activation,
    /// Distance between the rows of the output (and of the residual), at least `n`.
    pub output_stride: usize,
}

/// Columns in a panel of packed B.
pub fn panel_width(level: IsaLevel) -> usize {
    struct Width;
    impl Kernel for Width {
        type Output = usize;
        #[inline(always)]
        fn eval<I: Isa>(self, _: I) -> usize {
            panel_vectors::<I>() * I::LANES
        }
    }
    dispatch(level, Width)
}

/// Panels of a B of `n` columns.
pub fn panel_count(level: IsaLevel, n: usize) -> usize {
    n.div_ceil(panel_width(level))
}

/// Elements of packed B.
pub fn packed_b_len(level: IsaLevel, k: usize, n: usize) -> usize {
    panel_count(level, n) * panel_width(level) * k
}

/// Elements of workspace that [`gemm`] needs on each thread, for any `m` and range.
pub fn gemm_workspace_len(k: usize) -> usize {
    PACKED_ROWS * k.min(DEPTH_BLOCK)
}

/// Packs panels of B (`k × n`) as `[panel][k][panel_width]`, columns past `n` as 0. `packed` is all of packed B; only the
/// panels of the range are written.
pub fn pack_b(level: IsaLevel, b: Matrix<'_>, k: usize, n: usize, panels: Range<usize>, packed: Output<'_>) {
    let width = panel_width(level);
    b.assert_holds(k, n, "B");
    assert!(panels.end <= n.div_ceil(width), "panels {panels:?} of {n} columns");
    assert!(packed.len() >= n.div_ceil(width) * width * k, "packed B of {k} x {n} has {} elements", packed.len());
    dispatch(level, PackB { b, k, n, panels, packed: packed.pointer() })
}

/// Computes rows `rows` and the columns of panels `panels` of a product.
///
/// `output` is all of C, `m` rows `output_stride` apart; `workspace` has [`gemm_workspace_len`] elements.
pub fn gemm(
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
    assert!(rows.end <= m, "rows {rows:?} of {m}");
    assert!(panels.end <= panel_count(level, n), "panels {panels:?} of {n} columns");
    problem.a.assert_holds(m, k, "A");
    assert!(problem.b.len() >= packed_b_len(level, k, n), "packed B of {k} x {n} has {} elements", problem.b.len());
    assert!(problem.output_stride >= n || m == 1, "rows of {n} columns {} apart", problem.output_stride);
    let last = (m - 1) * problem.output_stride + n;
    assert!(output.len() >= last, "output of {} elements, {last} needed", output.len());
    assert!(workspace.len() >= gemm_workspace_len(k), "workspace of {} elements", workspace.len());
    match problem.bias {
        Bias::None => {}
        Bias::Column(bias) => assert!(bias.len() >= n, "{} biases for {n} columns", bias.len()),
        Bias::Row(bias) => assert!(bias.len() >= m, "{} biases for {m} rows", bias.len()),
    }
    match problem.residual {
        Residual::None => {}
        Residual::Slice(residual) => assert!(residual.len() >= last, "residual of {} elements", residual.len()),
        Residual::Output => assert!(problem.alpha == 1.0, "a residual in the output needs alpha = 1"),
    }
    dispatch(level, Product { problem, rows, panels, output: output.pointer(), workspace });
}

/// Vectors in a panel's row: with [`tile_rows`] what the registers hold.
#[inline(always)]
pub(super) const fn panel_vectors<I: Isa>() -> usize {
    match (I::LANES, I::REGISTERS) {
        (4, 32) => 4,
        _ => 2,
    }
}

/// Rows of a full tile.
#[inline(always)]
pub(super) const fn tile_rows<I: Isa>() -> usize {
    match (I::LANES, I::REGISTERS) {
        (16, _) => 14,
        (4, 16) => 4,
        _ => 6,
    }
}

/// Rows of a tile as packed.
#[inline(always)]
pub(super) const fn packed_stride<I: Isa>() -> usize {
    tile_rows::<I>().next_multiple_of(I::LANES)
}

struct PackB<'a> {
    b: Matrix<'a>,
    k: usize,
    n: usize,
    panels: Range<usize>,
    packed: *mut f32,
}

impl Kernel for PackB<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let width = panel_vectors::<I>() * I::LANES;
        let Matrix { data, row_stride, column_stride } = self.b;
        // Panels that are cut from contiguous rows are so for some rows at a time: each row is a page or more from the next, and all of
        // its panels are read while that is at hand.
        const ROWS: usize = 32;
        let rows = if column_stride == 1 { ROWS } else { self.k.max(1) };
        let parts = (0..self.k).step_by(rows).flat_map(|k0| self.panels.clone().map(move |panel| (k0, panel)));
        for (k0, panel) in parts {
            let first = panel * width;
            let columns = width.min(self.n - first);
            // SAFETY: the entry checked that B holds k x n and the packed memory all panels.
            unsafe {
                let out = self.packed.add(panel * width * self.k);
                let source = data.as_ptr().add(first * column_stride);
                if column_stride == 1 {
                    for k in k0..self.k.min(k0 + ROWS) {
                        let (from, to) = (source.add(k * row_stride), out.add(k * width));
                        for v in 0..panel_vectors::<I>() {
                            let done = v * I::LANES;
                            let vector = if done + I::LANES <= columns {
                                isa.load(from.add(done))
                            } else if done < columns {
                                isa.load_partial(from.add(done), columns - done)
                            } else {
                                isa.zero()
                            };
                            isa.store(to.add(done), vector);
                        }
                    }
                } else {
                    // Squares where columns are contiguous and the panel is full; else eight depths at a time, so that a
                    // contiguous column is read by cache lines.
                    let mut done = 0;
                    while row_stride == 1 && columns == width && done + I::LANES <= self.k {
                        for j in (0..width).step_by(I::LANES) {
                            let rows = rows_apart(source.add(j * column_stride + done), column_stride);
                            isa.transpose(rows, out.add(done * width + j), width);
                        }
                        done += I::LANES;
                    }
                    for k0 in (done..self.k).step_by(8) {
                        let depth = 8.min(self.k - k0);
                        for j in 0..columns {
                            let from = source.add(j * column_stride + k0 * row_stride);
                            for k in 0..depth {
                                out.add((k0 + k) * width + j).write(from.add(k * row_stride).read());
                            }
                        }
                        for k in 0..depth {
                            for j in columns..width {
                                out.add((k0 + k) * width + j).write(0.0);
                            }
                        }
                    }
                }
            }
        }
    }
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

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        // SAFETY: the entry checked every operand against the problem.
        unsafe {
            if self.rows.len() <= FEW_ROWS && self.problem.a.column_stride == 1 {
                self.few_rows(isa);
            } else {
                self.blocked(isa);
            }
        }
    }
}

impl Product<'_> {
    /// # Safety
    /// The operands hold what the problem says.
    #[inline(always)]
    unsafe fn few_rows<I: Isa>(self, isa: I) {
        let problem = self.problem;
        let group = match (self.rows.len(), I::REGISTERS / panel_vectors::<I>()) {
            (1, _) | (_, 16) => 4,
            _ => 2,
        };
        let mut panel = self.panels.start;
        while panel < self.panels.end {
            // Groups start at multiples of their size only if the range does; the values do not depend on it.
            let count = if self.panels.end - panel >= group { group } else { 1 };
            let strip = Strip { problem, row: self.rows.start, panel, output: self.output };
            macro_rules! outline {
                ($mr:literal, $ob:literal) => {
                    if const { panel_vectors::<I>() == 2 } {
                        isa.outline(Few::<$mr, $ob, 2>(strip))
                    } else {
                        isa.outline(Few::<$mr, $ob, 4>(strip))
                    }
                };
            }
            match (self.rows.len(), count) {
                (1, 1) => outline!(1, 1),
                (1, _) => outline!(1, 4),
                (2, 1) => outline!(2, 1),
                (2, 2) => outline!(2, 2),
                (2, _) => outline!(2, 4),
                (_, 1) => outline!(3, 1),
                (_, 2) => outline!(3, 2),
                _ => outline!(3, 4),
            }
            panel += count;
        }
    }

    /// # Safety
    /// The operands hold what the problem says.
    #[inline(always)]
    unsafe fn blocked<I: Isa>(self, isa: I) {
        let problem = self.problem;
        let mr = tile_rows::<I>();
        let mut k0 = 0;
        loop {
            let k = k0..problem.k.min(k0 + DEPTH_BLOCK);
            for block in pieces(self.rows.len(), ROW_BLOCK / mr * mr) {
                let block = self.rows.start + block.start..self.rows.start + block.end;
                let packed = self.workspace.as_mut_ptr();
                let tile_len = packed_stride::<I>() * k.len();
                debug_assert!(block.len().div_ceil(mr) * packed_stride::<I>() <= PACKED_ROWS);
                for (i, tile) in pieces(block.len(), mr).enumerate() {
                    let row = block.start + tile.start;
                    // SAFETY: the workspace holds PACKED_ROWS x DEPTH_BLOCK; the rows are inside A.
                    unsafe { pack_a(isa, problem.a, row, tile.len(), k.clone(), packed.add(i * tile_len)) };
                }
                for panel in self.panels.clone() {
                    let (rows, k, next) = (block.clone(), k.clone(), panel + 1 < self.panels.end);
                    let strip = PackedStrip { problem, rows, panel, k, next, output: self.output, packed };
                    let columns = problem.n - panel * panel_vectors::<I>() * I::LANES;
                    if const { panel_vectors::<I>() == 4 } {
                        match columns <= 2 * I::LANES {
                            true => isa.outline(Packed::<2>(strip)),
                            false => isa.outline(Packed::<4>(strip)),
                        }
                    } else {
                        match columns <= I::LANES {
                            true => isa.outline(Packed::<1>(strip)),
                            false => isa.outline(Packed::<2>(strip)),
                        }
                    }
                }
            }
            k0 = k.end;
            if k0 >= problem.k {
                break;
            }
        }
    }
}

/// Packs `mr` rows as `[k][packed_stride]`; lanes from `mr` on may hold anything.
///
/// # Safety
/// The rows and depths are inside A; `packed` has room for `packed_stride · k.len()`.
#[inline(always)]
pub(super) unsafe fn pack_a<I: Isa>(isa: I, a: Matrix<'_>, row: usize, mr: usize, k: Range<usize>, packed: *mut f32) {
    let (depth, stride) = (k.len(), packed_stride::<I>());
    // SAFETY: the caller.
    unsafe {
        let source = a.data.as_ptr().add(row * a.row_stride + k.start * a.column_stride);
        if a.row_stride == 1 {
            for k in 0..depth {
                std::ptr::copy_nonoverlapping(source.add(k * a.column_stride), packed.add(k * stride), mr);
            }
            return;
        }
        let mut done = 0;
        while a.column_stride == 1 && done + I::LANES <= depth {
            for m in (0..mr).step_by(I::LANES) {
                let mut rows = [source; 16];
                for (i, row) in rows.iter_mut().enumerate() {
                    // Lanes past the last row repeat it.
                    *row = source.add((m + i).min(mr - 1) * a.row_stride + done);
                }
                isa.transpose(rows, packed.add(done * stride + m), stride);
            }
            done += I::LANES;
        }
        for k0 in (done..depth).step_by(16) {
            let block = 16.min(depth - k0);
            for m in 0..mr {
                let from = source.add(m * a.row_stride + k0 * a.column_stride);
                for k in 0..block {
                    packed.add((k0 + k) * stride + m).write(from.add(k * a.column_stride).read());
                }
            }
        }
    }
}

/// A block of packed rows by one panel.
#[derive(Clone)]
struct PackedStrip<'a> {
    problem: &'a Gemm<'a>,
    rows: Range<usize>,
    panel: usize,
    k: Range<usize>,
    /// Whether the panel behind this one comes next: it arrives meanwhile.
    next: bool,
    output: *mut f32,
    packed: *const f32,
}

/// All tiles of a strip.
struct Packed<'a, const VB: usize>(PackedStrip<'a>);

impl<const VB: usize> Kernel for Packed<'_, VB> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let strip = self.0;
        let (problem, k) = (strip.problem, strip.k.clone());
        let (width, mr) = (panel_vectors::<I>() * I::LANES, tile_rows::<I>());
        let first_column = strip.panel * width;
        let columns = problem.n - first_column;
        let mut bias = [isa.zero(); VB];
        if let Bias::Column(values) = problem.bias {
            for (v, bias) in bias.iter_mut().enumerate() {
                // SAFETY: only columns below n are touched.
                *bias = unsafe { load_columns(isa, values.as_ptr().add(first_column), v * I::LANES, columns) };
            }
        }
        let (tiles, lines) = (strip.rows.len().div_ceil(mr), k.len() * width * size_of::<f32>() / LINE);
        let next = problem.b.as_ptr().wrapping_add(((strip.panel + 1) * problem.k + k.start) * width);
        for (i, tile) in pieces(strip.rows.len(), mr).enumerate() {
            // A part with every tile.
            if strip.next {
                for line in lines * i / tiles..lines * (i + 1) / tiles {
                    isa.prefetch(next.cast::<u8>().wrapping_add(line * LINE).cast());
                }
            }
            let row = strip.rows.start + tile.start;
            macro_rules! tile {
                ($($rows:literal)+) => {
                    match tile.len() {
                        // Guards in `const` blocks, so that tiles which a rung cannot have are not compiled for it.
                        // SAFETY: the entry checked the operands, and the driver packed A.
                        $($rows if const { tile_rows::<I>() >= $rows } => unsafe {
                            let packed = strip.packed.add(i * packed_stride::<I>() * k.len());
                            strip.tile::<I, $rows, VB>(isa, row, packed, bias);
                        },)+
                        _ => unreachable!("pieces are at most a tile's rows"),
                    }
                };
            }
            tile!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
            if k.end == problem.k && !problem.activation.clamps() {
                // SAFETY: the rows just written, up to column n - 1.
                let pointer = unsafe { strip.output.add(row * problem.output_stride + first_column) };
                isa.outline(ApplyRows {
                    activation: problem.activation,
                    pointer,
                    rows: tile.len(),
                    row_stride: problem.output_stride,
                    width: columns.min(width),
                });
            }
        }
    }
}

impl PackedStrip<'_> {
    /// # Safety
    /// `packed` holds `MR` rows; the operands hold what the problem says.
    #[inline(always)]
    unsafe fn tile<I: Isa, const MR: usize, const VB: usize>(
        &self,
        isa: I,
        row: usize,
        packed: *const f32,
        column_bias: [I::V; VB],
    ) {
        let PackedStrip { problem, ref k, .. } = *self;
        let width = panel_vectors::<I>() * I::LANES;
        let (first_column, stride) = (self.panel * width, problem.output_stride);
        let columns = problem.n - first_column;
        // Whether every vector of every row is whole.
        let whole = columns >= VB * I::LANES;
        // SAFETY: output and residual hold row m - 1 up to column n - 1, of which no other columns are touched; packed B holds the depths.
        unsafe {
            let output = self.output.add(row * stride + first_column);
            let mut acc: Tile<I, MR, 1, VB> = [[[isa.zero(); VB]; 1]; MR];
            if k.start > 0 || matches!(problem.residual, Residual::Output) {
                acc = load_tile(isa, output, stride, columns, whole);
            }
            let b = problem.b.as_ptr().add((self.panel * problem.k + k.start) * width);
            if const { packed_stride::<I>() == 4 } {
                accumulate::<I, Floats, _, MR, 1, VB>(isa, &mut acc, PackedRows::<4>(packed), [b], width, k.len());
            } else if const { packed_stride::<I>() == 8 } {
                accumulate::<I, Floats, _, MR, 1, VB>(isa, &mut acc, PackedRows::<8>(packed), [b], width, k.len());
            } else {
                accumulate::<I, Floats, _, MR, 1, VB>(isa, &mut acc, PackedRows::<16>(packed), [b], width, k.len());
            }
            if k.end == problem.k {
                let alpha = isa.splat(problem.alpha);
                for m in 0..MR {
                    for v in 0..VB {
                        let bias = match problem.bias {
                            Bias::Row(bias) => isa.splat(*bias.get_unchecked(row + m)),
                            _ => column_bias[v],
                        };
                        acc[m][0][v] = isa.fma(acc[m][0][v], alpha, bias);
                    }
                }
                if let Residual::Slice(residual) = problem.residual {
                    let residual = residual.as_ptr().add(row * stride + first_column);
                    let addend: Tile<I, MR, 1, VB> = load_tile(isa, residual, stride, columns, whole);
                    for m in 0..MR {
                        for v in 0..VB {
                            acc[m][0][v] = isa.add(acc[m][0][v], addend[m][0][v]);
                        }
                    }
                }
                let (low, high) = problem.activation.bounds();
                for m in 0..MR {
                    for v in 0..VB {
                        acc[m][0][v] = vmath::clip(isa, acc[m][0][v], low, high);
                    }
                }
            }
            for m in 0..MR {
                for v in 0..VB {
                    let to = output.add(m * stride);
                    match whole {
                        true => isa.store(to.add(v * I::LANES), acc[m][0][v]),
                        false => store_columns(isa, to, v * I::LANES, columns, acc[m][0][v]),
                    }
                }
            }
        }
    }
}

/// `MR` rows of `VB` vectors, zeros from `columns` on.
///
/// # Safety
/// The rows are readable below `columns`, and `whole` where that is all of them.
#[inline(always)]
unsafe fn load_tile<I: Isa, const MR: usize, const VB: usize>(
    isa: I,
    from: *const f32,
    stride: usize,
    columns: usize,
    whole: bool,
) -> Tile<I, MR, 1, VB> {
    let mut tile = [[[isa.zero(); VB]; 1]; MR];
    for m in 0..MR {
        for v in 0..VB {
            // SAFETY: the caller.
            tile[m][0][v] = unsafe {
                match whole {
                    true => isa.load(from.add(m * stride + v * I::LANES)),
                    false => load_columns(isa, from.add(m * stride), v * I::LANES, columns),
                }
            };
        }
    }
    tile
}

/// Few rows by a few panels.
#[derive(Clone)]
struct Strip<'a> {
    problem: &'a Gemm<'a>,
    row: usize,
    panel: usize,
    output: *mut f32,
}

/// A tile of few rows read where they are, by several panels.
struct Few<'a, const MR: usize, const OB: usize, const VB: usize>(Strip<'a>);

impl<const MR: usize, const OB: usize, const VB: usize> Kernel for Few<'_, MR, OB, VB> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let a = self.0.problem.a;
        let mut pointers = [a.data.as_ptr(); MR];
        for (m, pointer) in pointers.iter_mut().enumerate() {
            *pointer = a.data.as_ptr().wrapping_add((self.0.row + m) * a.row_stride);
        }
        // SAFETY: the entry checked the operands.
        unsafe { self.0.compute::<I, _, MR, OB, VB>(isa, ScatteredRows(pointers)) }
    }
}

impl Strip<'_> {
    /// # Safety
    /// The operands hold what the problem says.
    #[inline(always)]
    unsafe fn compute<I: Isa, R: Rows, const MR: usize, const OB: usize, const VB: usize>(self, isa: I, rows: R) {
        let problem = self.problem;
        let width = panel_vectors::<I>() * I::LANES;
        let first_column = self.panel * width;
        let columns = (problem.n - first_column).min(OB * width);
        // SAFETY: output and residual hold row m - 1 up to column n - 1.
        let output = unsafe { self.output.add(self.row * problem.output_stride + first_column) };

        let mut acc: Tile<I, MR, OB, VB> = [[[isa.zero(); VB]; OB]; MR];
        if matches!(problem.residual, Residual::Output) {
            for m in 0..MR {
                for o in 0..OB {
                    for v in 0..VB {
                        let column = o * width + v * I::LANES;
                        // SAFETY: only columns below n are touched.
                        acc[m][o][v] =
                            unsafe { load_columns(isa, output.add(m * problem.output_stride), column, columns) };
                    }
                }
            }
        }
        let mut b = [problem.b.as_ptr(); OB];
        for (o, pointer) in b.iter_mut().enumerate() {
            // SAFETY: the panels of the strip are inside packed B.
            *pointer = unsafe { problem.b.as_ptr().add((self.panel + o) * problem.k * width) };
        }
        // SAFETY: packed B holds the depths of each panel.
        unsafe { accumulate::<I, Floats, R, MR, OB, VB>(isa, &mut acc, rows, b, width, problem.k) };

        let (low, high) = problem.activation.bounds();
        let alpha = isa.splat(problem.alpha);
        for m in 0..MR {
            for o in 0..OB {
                for v in 0..VB {
                    let column = o * width + v * I::LANES;
                    let mut x = acc[m][o][v];
                    // SAFETY: the operands hold what the problem says; only columns below n are touched.
                    unsafe {
                        let bias = match problem.bias {
                            Bias::None => isa.zero(),
                            Bias::Column(bias) => load_columns(isa, bias.as_ptr().add(first_column), column, columns),
                            Bias::Row(bias) => isa.splat(*bias.get_unchecked(self.row + m)),
                        };
                        x = isa.fma(x, alpha, bias);
                        if let Residual::Slice(residual) = problem.residual {
                            let row = residual.as_ptr().add((self.row + m) * problem.output_stride + first_column);
                            x = isa.add(x, load_columns(isa, row, column, columns));
                        }
                        x = vmath::clip(isa, x, low, high);
                        store_columns(isa, output.add(m * problem.output_stride), column, columns, x);
                    }
                }
            }
        }
        if !problem.activation.clamps() {
            isa.outline(ApplyRows {
                activation: problem.activation,
                pointer: output,
                rows: MR,
                row_stride: problem.output_stride,
                width: columns,
            });
        }
    }
}

/// # Safety
/// The row is readable below `columns`.
#[inline(always)]
pub(super) unsafe fn load_columns<I: Isa>(isa: I, row: *const f32, column: usize, columns: usize) -> I::V {
    // SAFETY: the caller.
    unsafe {
        if column + I::LANES <= columns {
            isa.load(row.add(column))
        } else if column < columns {
            isa.load_partial(row.add(column), columns - column)
        } else {
            isa.zero()
        }
    }
}

/// # Safety
/// The row is writable below `columns`.
#[inline(always)]
pub(super) unsafe fn store_columns<I: Isa>(isa: I, row: *mut f32, column: usize, columns: usize, x: I::V) {
    // SAFETY: the caller.
    unsafe {
        if column + I::LANES <= columns {
            isa.store(row.add(column), x);
        } else if column < columns {
            isa.store_partial(row.add(column), x, columns - column);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[derive(Debug, Clone, Copy)]
    struct Case {
        m: usize,
        n: usize,
        k: usize,
        transpose: (bool, bool),
        alpha: f32,
        bias: usize,
        residual: usize,
        activation: Activation,
    }

    fn check(level: IsaLevel, case: Case, random: &mut Random) {
        let Case { m, n, k, .. } = case;
        let (a, b) = (random.units(m * k), random.units(k * n));
        let matrix = |data, rows, columns, transposed| {
            if transposed { Matrix::transposed(data, rows) } else { Matrix::row_major(data, columns) }
        };
        let a_view = matrix(&a, m, k, case.transpose.0);
        let b_view = matrix(&b, k, n, case.transpose.1);
        let output_stride = n + random.between(0, 3);
        let bias = random.units(m.max(n));
        let residual = random.units(m * output_stride);
        let mut packed = vec![f32::NAN; packed_b_len(level, k, n)];
        for panels in random_cuts(random, panel_count(level, n)) {
            pack_b(level, b_view, k, n, panels, Output::new(&mut packed));
        }
        let problem = Gemm {
            m,
            n,
            k,
            a: a_view,
            b: &packed,
            alpha: case.alpha,
            bias: [Bias::None, Bias::Column(&bias), Bias::Row(&bias)][case.bias],
            residual: [Residual::None, Residual::Slice(&residual), Residual::Output][case.residual],
            activation: case.activation,
            output_stride,
        };
        let mut workspace = vec![f32::NAN; gemm_workspace_len(k)];
        let mut whole = if case.residual == 2 { residual.clone() } else { vec![7.0; m * output_stride] };
        let mut cut = whole.clone();
        let before = whole.clone();
        gemm(level, &problem, 0..m, 0..panel_count(level, n), Output::new(&mut whole), &mut workspace);
        for rows in random_cuts(random, m) {
            for panels in random_cuts(random, panel_count(level, n)) {
                gemm(level, &problem, rows.clone(), panels, Output::new(&mut cut), &mut workspace);
            }
        }
        assert_same_bits(level, &case, &whole, &cut);
        let expected: Vec<f64> = (0..m * output_stride)
            .map(|at| {
                let (i, j) = (at / output_stride, at % output_stride);
                if j >= n {
                    return before[at].into();
                }
                let mut sum = 0.0;
                for l in 0..k {
                    let a = a[i * a_view.row_stride + l * a_view.column_stride];
                    let b = b[l * b_view.row_stride + j * b_view.column_stride];
                    sum += f64::from(a) * f64::from(b);
                }
                sum *= f64::from(case.alpha);
                sum += [0.0, bias[j].into(), bias[i].into()][case.bias];
                if case.residual > 0 {
                    sum += f64::from(residual[at]);
                }
                activate(case.activation, sum)
            })
            .collect();
        // A chain of k roundings of terms below 1: far below k · 2^-24 · √k in practice.
        assert_near(level, &case, &whole, &expected, 2e-6 * (1.0 + (k as f64).sqrt()));
    }

    #[test]
    fn products_match_plain_loops_and_do_not_depend_on_ranges() {
        for level in levels() {
            let mut random = Random::new(1);
            for round in rounds(160) {
                let large = round % 20 == 0;
                let limit = if large { 150 } else { 40 };
                let residual = random.between(0, 2);
                let case = Case {
                    m: if round % 3 == 0 { random.between(0, 4) } else { random.between(1, limit) },
                    n: random.between(usize::from(round % 7 == 0) ^ 1, limit),
                    k: if large { random.between(500, 1100) } else { random.between(0, 70) },
                    transpose: (random.between(0, 1) == 1, random.between(0, 1) == 1),
                    alpha: if residual == 2 { 1.0 } else { random.pick(&[1.0, 0.125]) },
                    bias: random.between(0, 2),
                    residual,
                    activation: ACTIVATIONS[round % ACTIVATIONS.len()],
                };
                check(level, case, &mut random);
            }
        }
    }

    #[test]
    fn heads_are_read_and_written_by_strides() {
        // Two heads of scores, queries times keys, from rows that hold both, into columns of one output.
        for level in levels() {
            let mut random = Random::new(22);
            let (tokens, heads, depth) = (9, 2, 5);
            let (queries, keys) = (random.units(tokens * heads * depth), random.units(tokens * heads * depth));
            let mut output = vec![f32::NAN; tokens * heads * tokens];
            for head in 0..heads {
                let row = heads * depth;
                let keys = Matrix { data: &keys[head * depth..], row_stride: 1, column_stride: row };
                let panels = 0..panel_count(level, tokens);
                let mut packed = vec![0.0; packed_b_len(level, depth, tokens)];
                pack_b(level, keys, depth, tokens, panels.clone(), Output::new(&mut packed));
                let problem = Gemm {
                    m: tokens,
                    n: tokens,
                    k: depth,
                    a: Matrix { data: &queries[head * depth..], row_stride: row, column_stride: 1 },
                    b: &packed,
                    alpha: 0.5,
                    bias: Bias::None,
                    residual: Residual::None,
                    activation: Activation::Identity,
                    output_stride: heads * tokens,
                };
                let mut workspace = vec![0.0; gemm_workspace_len(depth)];
                gemm(level, &problem, 0..tokens, panels, Output::new(&mut output).skip(head * tokens), &mut workspace);
            }
            let expected: Vec<f64> = (0..output.len())
                .map(|at| {
                    let (i, head, j) = (at / heads / tokens, at / tokens % heads, at % tokens);
                    let dot = |l: usize| {
                        let of = |x: &[f32], token: usize| f64::from(x[(token * heads + head) * depth + l]);
                        of(&queries, i) * of(&keys, j)
                    };
                    0.5 * (0..depth).map(dot).sum::<f64>()
                })
                .collect();
            assert_near(level, &"heads", &output, &expected, 1e-6);
        }
    }

    #[test]
    fn a_row_gives_the_same_bits_whatever_it_is_batched_with() {
        for level in levels() {
            let mut random = Random::new(2);
            let (m, n, k) = (33, 70, 600);
            let (a, b) = (random.units(m * k), random.units(k * n));
            let mut packed = vec![0.0; packed_b_len(level, k, n)];
            pack_b(level, Matrix::row_major(&b, n), k, n, 0..panel_count(level, n), Output::new(&mut packed));
            let mut workspace = vec![0.0; gemm_workspace_len(k)];
            let mut run = |a: &[f32], m: usize| {
                let mut output = vec![0.0; m * n];
                let problem = Gemm {
                    m,
                    n,
                    k,
                    a: Matrix::row_major(a, k),
                    b: &packed,
                    alpha: 1.0,
                    bias: Bias::None,
                    residual: Residual::None,
                    activation: Activation::Gelu,
                    output_stride: n,
                };
                gemm(level, &problem, 0..m, 0..panel_count(level, n), Output::new(&mut output), &mut workspace);
                output
            };
            let batch = run(&a, m);
            for row in [0, 13, 32] {
                let single = run(&a[row * k..(row + 1) * k], 1);
                assert_same_bits(level, &row, &batch[row * n..(row + 1) * n], &single);
            }
        }
    }
}
