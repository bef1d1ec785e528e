//! Matrix products, on the kernels that run models: every output is one chain of multiply-adds, so no result depends on the number of threads.

use super::tape::{Function, View, apply};
use candle_core::{Result, Tensor, bail};
use cutover_kernels::cpu::{
    Activation, IsaLevel, Output, Residual,
    gemm::{Bias, Gemm, Matrix, gemm, gemm_workspace_len, pack_b, panel_width},
};
use rayon::prelude::*;

/// `a·b` as ONNX multiplies: matrices along the last two axes, the others broadcast, a vector as a row or a column.
pub(crate) fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (ra, rb) = (a.rank(), b.rank());
    if ra == 0 || rb == 0 {
        bail!("a product of a scalar");
    }
    let left = if ra == 1 { a.unsqueeze(0)? } else { a.clone() };
    let right = if rb == 1 { b.unsqueeze(1)? } else { b.clone() };
    let y = apply(Product, &[&left, &right])?;
    let y = if rb == 1 { y.squeeze(y.rank() - 1)? } else { y };
    if ra == 1 { y.squeeze(y.rank() - usize::from(rb != 1) - 1) } else { Ok(y) }
}

/// `a·bᵀ` of `[m, k]` and `[n, k]`.
pub(crate) fn matmul_transposed(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    apply(TransposedProduct, &[a, b])
}

struct Product;

/// A product of matrices as a loop over pairs of them.
struct Extents {
    batch: Vec<usize>,
    m: usize,
    k: usize,
    n: usize,
}

impl Extents {
    fn of(a: &[usize], b: &[usize]) -> Extents {
        let (batch_a, batch_b) = (&a[..a.len() - 2], &b[..b.len() - 2]);
        let rank = batch_a.len().max(batch_b.len());
        let extent = |batch: &[usize], axis: usize| (axis + batch.len()).checked_sub(rank).map_or(1, |i| batch[i]);
        let batch = (0..rank).map(|axis| match extent(batch_a, axis) {
            1 => extent(batch_b, axis),
            extent => extent,
        });
        Extents { batch: batch.collect(), m: a[a.len() - 2], k: a[a.len() - 1], n: b[b.len() - 1] }
    }

    /// The number of the matrix of an operand of this batch that the `pair`-th product takes.
    fn of_operand(&self, operand: &[usize], mut pair: usize) -> usize {
        let (mut index, mut stride) = (0, 1);
        for (back, &extent) in self.batch.iter().rev().enumerate() {
            let position = pair % extent;
            pair /= extent;
            if let Some(axis) = operand.len().checked_sub(back + 1) {
                index += if operand[axis] == 1 { 0 } else { position * stride };
                stride *= operand[axis];
            }
        }
        index
    }
}

impl Function for Product {
    const NAME: &'static str = "matmul";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let [a, b] = [args[0], args[1]];
        let extents = Extents::of(a.shape, b.shape);
        let Extents { m, k, n, .. } = extents;
        let shape = [&extents.batch[..], &[m, n]].concat();
        let mut y = vec![0.0; shape.iter().product()];
        if y.is_empty() {
            return (y, shape);
        }
        if b.data.len() == k * n {
            // One matrix for all: the rows of all of `a`.
            multiply(Matrix::row_major(a.data, k), Matrix::row_major(b.data, n), [y.len() / n, k, n], &mut y);
            return (y, shape);
        }
        y.par_chunks_mut(m * n).enumerate().for_each_init(Scratch::default, |scratch, (pair, y)| {
            let left = &a.data[extents.of_operand(&a.shape[..a.shape.len() - 2], pair) * m * k..];
            let right = &b.data[extents.of_operand(&b.shape[..b.shape.len() - 2], pair) * k * n..];
            multiply_here(Matrix::row_major(left, k), Matrix::row_major(right, n), [m, k, n], false, y, scratch);
        });
        (y, shape)
    }

    fn backward(&self, args: &[View<'_>], _: View<'_>, dy: View<'_>, needs: &[bool]) -> Vec<Option<Vec<f32>>> {
        let [a, b] = [args[0], args[1]];
        let extents = Extents::of(a.shape, b.shape);
        let Extents { m, k, n, .. } = extents;
        let pairs: usize = extents.batch.iter().product();
        let (mut da, mut db) = (vec![0.0; a.data.len()], vec![0.0; b.data.len()]);
        if dy.data.is_empty() || k == 0 {
            return vec![Some(da), Some(db)];
        }
        if b.data.len() == k * n {
            let rows = dy.data.len() / n;
            if needs[0] {
                multiply(Matrix::row_major(dy.data, n), Matrix::transposed(b.data, n), [rows, n, k], &mut da);
            }
            if needs[1] {
                multiply(Matrix::transposed(a.data, k), Matrix::row_major(dy.data, n), [k, rows, n], &mut db);
            }
            return vec![needs[0].then_some(da), needs[1].then_some(db)];
        }
        let batch_of = |shape: &'_ [usize]| shape[..shape.len() - 2].to_vec();
        let (batch_a, batch_b) = (batch_of(a.shape), batch_of(b.shape));
        // Pairs by the matrix whose gradient they add to: each is summed by one thread, in order.
        let gathered = |batch: &[usize], count: usize| {
            let mut of = vec![Vec::new(); count];
            (0..pairs).for_each(|pair| of[extents.of_operand(batch, pair)].push(pair));
            of
        };
        if needs[0] {
            let of = gathered(&batch_a, da.len() / (m * k));
            da.par_chunks_mut(m * k).zip(&of).for_each_init(Scratch::default, |scratch, (da, pairs)| {
                for (i, &pair) in pairs.iter().enumerate() {
                    let right = &b.data[extents.of_operand(&batch_b, pair) * k * n..];
                    let dy = Matrix::row_major(&dy.data[pair * m * n..], n);
                    multiply_here(dy, Matrix::transposed(right, n), [m, n, k], i > 0, da, scratch);
                }
            });
        }
        if needs[1] {
            let of = gathered(&batch_b, db.len() / (k * n));
            db.par_chunks_mut(k * n).zip(&of).for_each_init(Scratch::default, |scratch, (db, pairs)| {
                for (i, &pair) in pairs.iter().enumerate() {
                    let left = &a.data[extents.of_operand(&batch_a, pair) * m * k..];
                    let dy = Matrix::row_major(&dy.data[pair * m * n..], n);
                    multiply_here(Matrix::transposed(left, k), dy, [k, m, n], i > 0, db, scratch);
                }
            });
        }
        vec![needs[0].then_some(da), needs[1].then_some(db)]
    }
}

struct TransposedProduct;

impl Function for TransposedProduct {
    const NAME: &'static str = "matmul_transposed";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let [a, b] = [args[0], args[1]];
        let (m, k, n) = (a.shape[0], a.shape[1], b.shape[0]);
        let mut y = vec![0.0; m * n];
        multiply(Matrix::row_major(a.data, k), Matrix::transposed(b.data, k), [m, k, n], &mut y);
        (y, vec![m, n])
    }

    fn backward(&self, args: &[View<'_>], _: View<'_>, dy: View<'_>, needs: &[bool]) -> Vec<Option<Vec<f32>>> {
        let [a, b] = [args[0], args[1]];
        let (m, k, n) = (a.shape[0], a.shape[1], b.shape[0]);
        let da = needs[0].then(|| {
            let mut da = vec![0.0; m * k];
            multiply(Matrix::row_major(dy.data, n), Matrix::row_major(b.data, k), [m, n, k], &mut da);
            da
        });
        let db = needs[1].then(|| {
            let mut db = vec![0.0; n * k];
            multiply(Matrix::transposed(dy.data, n), Matrix::row_major(a.data, k), [n, m, k], &mut db);
            db
        });
        vec![da, db]
    }
}

/// Rows that are worth a thread's turn.
const ROWS_MIN: usize = 48;

/// `y = a·b` of `[m, k, n]`, by all threads.
pub(crate) fn multiply(a: Matrix<'_>, b: Matrix<'_>, [m, k, n]: [usize; 3], y: &mut [f32]) {
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        return y.fill(0.0);
    }
    let level = IsaLevel::detect();
    let width = panel_width(level);
    let mut packed = vec![0.0; n.div_ceil(width) * width * k];
    packed.par_chunks_mut(width * k).enumerate().for_each(|(panel, packed)| {
        let first = panel * width;
        let part = Matrix { data: &b.data[first * b.column_stride..], ..b };
        pack_b(level, part, k, width.min(n - first), 0..1, Output::new(packed));
    });
    let rows = m.div_ceil(2 * rayon::current_num_threads()).max(ROWS_MIN);
    y.par_chunks_mut(rows * n).enumerate().for_each_init(Vec::new, |workspace, (part, y)| {
        let a = Matrix { data: &a.data[part * rows * a.row_stride..], ..a };
        run(level, a, &packed, [y.len() / n, k, n], false, y, workspace);
    });
}

/// Memory of one thread's products, kept from one to the next.
#[derive(Default)]
pub(crate) struct Scratch {
    packed: Vec<f32>,
    workspace: Vec<f32>,
    /// Of whoever makes an operand.
    pub columns: Vec<f32>,
}

/// The same, or added to `y`, by the thread that asks.
pub(crate) fn multiply_here(
    a: Matrix<'_>,
    b: Matrix<'_>,
    [m, k, n]: [usize; 3],
    add: bool,
    y: &mut [f32],
    scratch: &mut Scratch,
) {
    let level = IsaLevel::detect();
    let width = panel_width(level);
    let panels = n.div_ceil(width);
    scratch.packed.resize((panels * width * k).max(scratch.packed.len()), 0.0);
    pack_b(level, b, k, n, 0..panels, Output::new(&mut scratch.packed));
    run(level, a, &scratch.packed, [m, k, n], add, y, &mut scratch.workspace);
}

/// A right operand, packed once for many products.
pub(crate) struct Packed {
    b: Vec<f32>,
    k: usize,
    n: usize,
}

impl Packed {
    pub fn new(b: Matrix<'_>, k: usize, n: usize) -> Packed {
        let level = IsaLevel::detect();
        let width = panel_width(level);
        let panels = n.div_ceil(width);
        let mut packed = vec![0.0; panels * width * k];
        pack_b(level, b, k, n, 0..panels, Output::new(&mut packed));
        Packed { b: packed, k, n }
    }

    /// `y = a·b`, or added to it, of `m` rows of `a`.
    pub fn multiply(&self, a: Matrix<'_>, m: usize, add: bool, y: &mut [f32], workspace: &mut Vec<f32>) {
        run(IsaLevel::detect(), a, &self.b, [m, self.k, self.n], add, y, workspace);
    }
}

fn run(
    level: IsaLevel,
    a: Matrix<'_>,
    b: &[f32],
    [m, k, n]: [usize; 3],
    add: bool,
    y: &mut [f32],
    workspace: &mut Vec<f32>,
) {
    workspace.resize(gemm_workspace_len(k).max(workspace.len()), 0.0);
    let problem = Gemm {
        m,
        n,
        k,
        a,
        b,
        alpha: 1.0,
        bias: Bias::None,
        residual: if add { Residual::Output } else { Residual::None },
        activation: Activation::Identity,
        output_stride: n,
    };
    gemm(level, &problem, 0..m, 0..n.div_ceil(panel_width(level)), Output::new(y), workspace);
}
