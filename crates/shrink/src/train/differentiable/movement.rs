//! Elements at other places: what an operator does to numbers it does to their positions, so the operator itself, run once over positions, says
//! where each comes from. The derivative sends them back.

use super::tape::{Function, View, apply};
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// For every element of a result the position it comes from, counted from 1; 0 is an element that `fill` stands at.
#[derive(Debug)]
pub(crate) struct Sources {
    pub shape: Vec<usize>,
    pub positions: Vec<u32>,
    pub fill: f32,
}

pub(crate) fn moved(sources: Arc<Sources>, x: &Tensor) -> Result<Tensor> {
    apply(Moved(sources), &[x])
}

struct Moved(Arc<Sources>);

impl Function for Moved {
    const NAME: &'static str = "movement";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let x = args[0].data;
        let element = |&position: &u32| if position == 0 { self.0.fill } else { x[position as usize - 1] };
        (self.0.positions.iter().map(element).collect(), self.0.shape.clone())
    }

    fn backward(&self, args: &[View<'_>], _: View<'_>, dy: View<'_>, _: &[bool]) -> Vec<Option<Vec<f32>>> {
        let mut dx = vec![0.0; args[0].data.len()];
        for (&position, dy) in self.0.positions.iter().zip(dy.data) {
            if position > 0 {
                dx[position as usize - 1] += dy;
            }
        }
        vec![Some(dx)]
    }
}

/// Rows of a table `[rows, …]`: what embeddings are read by.
pub(crate) fn gather_rows(table: &Tensor, rows: Vec<usize>, shape: Vec<usize>) -> Result<Tensor> {
    apply(GatherRows { rows, shape }, &[table])
}

struct GatherRows {
    rows: Vec<usize>,
    shape: Vec<usize>,
}

impl Function for GatherRows {
    const NAME: &'static str = "gather";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let width: usize = args[0].shape[1..].iter().product();
        let mut y = Vec::with_capacity(self.rows.len() * width);
        self.rows.iter().for_each(|row| y.extend_from_slice(&args[0].data[row * width..][..width]));
        (y, self.shape.clone())
    }

    fn backward(&self, args: &[View<'_>], _: View<'_>, dy: View<'_>, _: &[bool]) -> Vec<Option<Vec<f32>>> {
        let width: usize = args[0].shape[1..].iter().product();
        let mut table = vec![0.0; args[0].data.len()];
        for (row, dy) in self.rows.iter().zip(dy.data.chunks_exact(width.max(1))) {
            table[row * width..][..width].iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
        }
        vec![Some(table)]
    }
}

/// Axes in another order.
pub(crate) fn permuted(x: &Tensor, permutation: Vec<usize>) -> Result<Tensor> {
    if permutation.iter().enumerate().all(|(i, &axis)| i == axis) {
        return Ok(x.clone());
    }
    apply(Permuted(permutation), &[x])
}

struct Permuted(Vec<usize>);

impl Function for Permuted {
    const NAME: &'static str = "transpose";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        permute(args[0].data, args[0].shape, &self.0)
    }

    fn backward(&self, _: &[View<'_>], _: View<'_>, dy: View<'_>, _: &[bool]) -> Vec<Option<Vec<f32>>> {
        let mut inverse = vec![0; self.0.len()];
        self.0.iter().enumerate().for_each(|(i, &axis)| inverse[axis] = i);
        vec![Some(permute(dy.data, dy.shape, &inverse).0)]
    }
}

fn permute(x: &[f32], shape: &[usize], permutation: &[usize]) -> (Vec<f32>, Vec<usize>) {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    let to: Vec<usize> = permutation.iter().map(|&axis| shape[axis]).collect();
    let strides: Vec<usize> = permutation.iter().map(|&axis| strides[axis]).collect();
    let mut y = Vec::with_capacity(x.len());
    let Some((&width, outer)) = to.split_last().filter(|_| !x.is_empty()) else { return (x.to_vec(), to) };
    let stride = strides[outer.len()];
    let mut index = vec![0; outer.len()];
    let mut from = 0;
    loop {
        match stride {
            1 => y.extend_from_slice(&x[from..from + width]),
            _ => y.extend((0..width).map(|i| x[from + i * stride])),
        }
        let mut axis = outer.len();
        loop {
            if axis == 0 {
                return (y, to);
            }
            axis -= 1;
            index[axis] += 1;
            from += strides[axis];
            if index[axis] < outer[axis] {
                break;
            }
            from -= index[axis] * strides[axis];
            index[axis] = 0;
        }
    }
}
