//! Softmax, norms and reductions, over rows along the last axis: callers bring the axes they mean there.

use super::{
    elementwise::{dot, sum},
    tape::{Function, View, apply},
};
use candle_core::{Result, Tensor};
use cutover_kernels::cpu::{
    Activation, IsaLevel, Output,
    elementwise::{Source, Unary, unary},
};
use rayon::prelude::*;

/// A function of every row of the last axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum RowFunction {
    Softmax,
    LogSoftmax,
    /// `(x − mean) / √(variance + epsilon)`, the mean counting as 0 where it is not `centred`.
    Standardize {
        epsilon: f32,
        centred: bool,
    },
}

/// A number for every row of the last axis, which goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reduction {
    Sum,
    Max,
    Min,
}

pub(crate) fn of_rows(function: RowFunction, x: &Tensor) -> Result<Tensor> {
    apply(function, &[x])
}

pub(crate) fn reduce(reduction: Reduction, x: &Tensor) -> Result<Tensor> {
    apply(reduction, &[x])
}

/// Rows that a thread takes at a time.
fn rows_at_once(width: usize) -> usize {
    4096usize.div_ceil(width.max(1))
}

fn exp(x: &mut [f32], memory: &mut Vec<f32>) {
    memory.clear();
    memory.extend_from_slice(x);
    unary(IsaLevel::detect(), Unary::Exp, Source::Slice(memory), 0..x.len(), Output::new(x));
}

fn largest(x: &[f32]) -> f32 {
    x.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

impl Function for RowFunction {
    const NAME: &'static str = "rows";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let x = args[0];
        let width = x.shape.last().copied().unwrap_or(1);
        let mut y = x.data.to_vec();
        if y.is_empty() {
            return (y, x.shape.to_vec());
        }
        y.par_chunks_mut(rows_at_once(width) * width).for_each_init(Vec::new, |memory, rows| {
            for y in rows.chunks_exact_mut(width) {
                match *self {
                    RowFunction::Softmax => {
                        let top = largest(y);
                        y.iter_mut().for_each(|y| *y -= top);
                        exp(y, memory);
                        let share = 1.0 / sum(y);
                        y.iter_mut().for_each(|y| *y *= share);
                    }
                    RowFunction::LogSoftmax => {
                        let top = largest(y);
                        y.iter_mut().for_each(|y| *y -= top);
                        let mut powers = y.to_vec();
                        exp(&mut powers, memory);
                        let log = sum(&powers).ln();
                        y.iter_mut().for_each(|y| *y -= log);
                    }
                    RowFunction::Standardize { epsilon, centred } => {
                        let (mean, inverse) = moments(y, epsilon, centred);
                        y.iter_mut().for_each(|y| *y = (*y - mean) * inverse);
                    }
                }
            }
        });
        (y, x.shape.to_vec())
    }

    fn backward(&self, args: &[View<'_>], y: View<'_>, dy: View<'_>, _: &[bool]) -> Vec<Option<Vec<f32>>> {
        let x = args[0];
        let width = x.shape.last().copied().unwrap_or(1);
        let mut dx = vec![0.0; x.data.len()];
        if dx.is_empty() {
            return vec![Some(dx)];
        }
        let piece = rows_at_once(width) * width;
        let pieces = x.data.par_chunks(piece).zip(y.data.par_chunks(piece)).zip(dy.data.par_chunks(piece));
        dx.par_chunks_mut(piece).zip(pieces).for_each_init(Vec::new, |memory, (dx, ((x, y), dy))| {
            let rows = x.chunks_exact(width).zip(y.chunks_exact(width)).zip(dy.chunks_exact(width));
            for (dx, ((x, y), dy)) in dx.chunks_exact_mut(width).zip(rows) {
                let products = dx.iter_mut().zip(y.iter().zip(dy));
                match *self {
                    RowFunction::Softmax => {
                        products.for_each(|(dx, (y, dy))| *dx = y * dy);
                        let total = sum(dx);
                        dx.iter_mut().zip(y).for_each(|(dx, y)| *dx -= y * total);
                    }
                    RowFunction::LogSoftmax => {
                        dx.copy_from_slice(y);
                        exp(dx, memory);
                        let total = sum(dy);
                        dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx = dy - *dx * total);
                    }
                    RowFunction::Standardize { epsilon, centred } => {
                        // Ba, Kiros and Hinton 2016: dx = (dy − mean(dy) − y·mean(y·dy)) / √(variance + epsilon).
                        let (_, inverse) = moments(x, epsilon, centred);
                        products.for_each(|(dx, (y, dy))| *dx = y * dy);
                        let along = sum(dx) / width as f32;
                        let mean = if centred { sum(dy) / width as f32 } else { 0.0 };
                        let terms = dx.iter_mut().zip(y.iter().zip(dy));
                        terms.for_each(|(dx, (y, dy))| *dx = (dy - mean - y * along) * inverse);
                    }
                }
            }
        });
        vec![Some(dx)]
    }
}

/// A row's mean and `1 / √(variance + epsilon)`.
fn moments(x: &[f32], epsilon: f32, centred: bool) -> (f32, f32) {
    let mean = if centred { sum(x) / x.len() as f32 } else { 0.0 };
    let mut squares = [0.0f32; 8];
    let chunks = x.chunks_exact(8);
    let rest: f32 = chunks.remainder().iter().map(|x| (x - mean).powi(2)).sum();
    for chunk in chunks {
        squares.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += (x - mean) * (x - mean));
    }
    let variance = (squares.iter().sum::<f32>() + rest) / x.len() as f32;
    (mean, 1.0 / (variance + epsilon).sqrt())
}

impl Function for Reduction {
    const NAME: &'static str = "reduction";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let x = args[0];
        let (&width, outer) = x.shape.split_last().unwrap_or((&1, &[]));
        if width == 0 {
            let nothing = match self {
                Reduction::Sum => 0.0,
                Reduction::Max => f32::NEG_INFINITY,
                Reduction::Min => f32::INFINITY,
            };
            return (vec![nothing; outer.iter().product()], outer.to_vec());
        }
        let rows = x.data.chunks_exact(width);
        let y = match self {
            Reduction::Sum => rows.map(sum).collect(),
            Reduction::Max => rows.map(|x| x[self.place(x)]).collect(),
            Reduction::Min => rows.map(|x| x[self.place(x)]).collect(),
        };
        (y, outer.to_vec())
    }

    fn backward(&self, args: &[View<'_>], _: View<'_>, dy: View<'_>, _: &[bool]) -> Vec<Option<Vec<f32>>> {
        let x = args[0];
        let width = x.shape.last().copied().unwrap_or(1).max(1);
        let mut dx = vec![0.0; x.data.len()];
        for ((dx, x), &dy) in dx.chunks_exact_mut(width).zip(x.data.chunks_exact(width)).zip(dy.data) {
            match self {
                Reduction::Sum => dx.fill(dy),
                _ => dx[self.place(x)] = dy,
            }
        }
        vec![Some(dx)]
    }
}

impl Reduction {
    /// Where the first largest, or smallest, element is.
    fn place(self, x: &[f32]) -> usize {
        let better = |a: f32, b: f32| if self == Reduction::Min { a < b } else { a > b };
        (0..x.len()).fold(0, |best, i| if better(x[i], x[best]) { i } else { best })
    }
}

/// `1 / (1 + e⁻ˣ)` in place.
pub(crate) fn sigmoid(x: &mut [f32], memory: &mut Vec<f32>) {
    activate(Activation::Sigmoid, x, memory);
}

pub(crate) fn tanh(x: &mut [f32], memory: &mut Vec<f32>) {
    activate(Activation::Tanh, x, memory);
}

fn activate(activation: Activation, x: &mut [f32], memory: &mut Vec<f32>) {
    memory.clear();
    memory.extend_from_slice(x);
    unary(IsaLevel::detect(), Unary::Activation(activation), Source::Slice(memory), 0..x.len(), Output::new(x));
}

/// The cosine of the rows of two tensors of one shape; 0 where either is 0.
pub(crate) fn cosine(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    apply(Cosine, &[a, b])
}

struct Cosine;

impl Cosine {
    /// The inner product and both lengths.
    fn parts(a: &[f32], b: &[f32]) -> (f32, f32, f32) {
        (dot(a, b), dot(a, a).sqrt(), dot(b, b).sqrt())
    }
}

impl Function for Cosine {
    const NAME: &'static str = "cosine";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let (&width, outer) = args[0].shape.split_last().unwrap_or((&1, &[]));
        let rows = args[0].data.chunks_exact(width.max(1)).zip(args[1].data.chunks_exact(width.max(1)));
        let cosine = |(a, b): (&[f32], &[f32])| match Cosine::parts(a, b) {
            (_, 0.0, _) | (_, _, 0.0) => 0.0,
            (dot, la, lb) => dot / (la * lb),
        };
        (rows.map(cosine).collect(), outer.to_vec())
    }

    fn backward(&self, args: &[View<'_>], _: View<'_>, dy: View<'_>, needs: &[bool]) -> Vec<Option<Vec<f32>>> {
        let width = args[0].shape.last().copied().unwrap_or(1).max(1);
        let gradient = |x: &[f32], other: &[f32]| {
            let mut dx = vec![0.0; x.len()];
            let rows = x.chunks_exact(width).zip(other.chunks_exact(width)).zip(dy.data);
            for (dx, ((x, other), dy)) in dx.chunks_exact_mut(width).zip(rows) {
                let (dot, lx, lo) = Cosine::parts(x, other);
                if lx > 0.0 && lo > 0.0 {
                    let (along, across) = (dy / (lx * lo), dy * dot / (lx * lx * lx * lo));
                    dx.iter_mut().zip(x.iter().zip(other)).for_each(|(dx, (x, o))| *dx = along * o - across * x);
                }
            }
            dx
        };
        let (a, b) = (args[0].data, args[1].data);
        vec![needs[0].then(|| gradient(a, b)), needs[1].then(|| gradient(b, a))]
    }
}
