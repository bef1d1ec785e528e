//! Functions of one value, and of two with broadcasting.

use super::tape::{Function, View, apply};
use candle_core::{Result, Tensor};
use cutover_graph::ops::{Activation as Fused, BinaryFunction, UnaryFunction};
use cutover_kernels::cpu::{
    Activation, IsaLevel, Output,
    elementwise::{Source, Unary as Vectorised, unary as vectorised},
};
use rayon::prelude::*;
use std::f64::consts::{FRAC_2_SQRT_PI, PI, SQRT_2};

/// Elements that a thread works on at a time: what stays in the first-level cache with two operands and a result.
const PIECE: usize = 2048;

pub(crate) fn unary(function: UnaryFunction, x: &Tensor) -> Result<Tensor> {
    apply(Unary(function), &[x])
}

/// `min(max(x, low), high)`.
pub(crate) fn clip(x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
    apply(Clip { low, high }, &[x])
}

/// An activation that a product or convolution ends with.
pub(crate) fn fused(activation: Fused, x: &Tensor) -> Result<Tensor> {
    use UnaryFunction as U;
    let function = match activation {
        Fused::Relu => U::Relu,
        Fused::Clip { low, high } => return clip(x, low, high),
        Fused::LeakyRelu { alpha } => U::LeakyRelu { alpha },
        Fused::Sigmoid => U::Sigmoid,
        Fused::Tanh => U::Tanh,
        Fused::Silu => U::Swish { alpha: 1.0 },
        Fused::HardSigmoid { alpha, beta } => U::HardSigmoid { alpha, beta },
        Fused::HardSwish => U::HardSwish,
        Fused::Gelu => U::Gelu { tanh: false },
        Fused::GeluTanh => U::Gelu { tanh: true },
    };
    unary(function, x)
}

struct Clip {
    low: f32,
    high: f32,
}

impl Function for Clip {
    const NAME: &'static str = "clip";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        (map(args[0].data, |x| x.max(self.low).min(self.high)), args[0].shape.to_vec())
    }

    fn backward(&self, args: &[View<'_>], _: View<'_>, dy: View<'_>, _: &[bool]) -> Vec<Option<Vec<f32>>> {
        let inside = |x: f32| x >= self.low && x <= self.high;
        vec![Some(map2(args[0].data, dy.data, |x, dy| if inside(x) { dy } else { 0.0 }))]
    }
}

struct Unary(UnaryFunction);

impl Function for Unary {
    const NAME: &'static str = "unary";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let x = args[0].data;
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(y, x)| values(self.0, x, y));
        (y, args[0].shape.to_vec())
    }

    fn backward(&self, args: &[View<'_>], y: View<'_>, dy: View<'_>, _: &[bool]) -> Vec<Option<Vec<f32>>> {
        let mut dx = vec![0.0; dy.data.len()];
        let pieces = args[0].data.par_chunks(PIECE).zip(y.data.par_chunks(PIECE)).zip(dy.data.par_chunks(PIECE));
        dx.par_chunks_mut(PIECE).zip(pieces).for_each(|(dx, ((x, y), dy))| {
            slopes(self.0, x, y, dx);
            dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx *= dy);
        });
        vec![Some(dx)]
    }
}

/// The kernel of what most networks use.
fn kernel(function: UnaryFunction) -> Option<Vectorised> {
    use UnaryFunction as U;
    Some(match function {
        U::Relu => Vectorised::Activation(Activation::Relu),
        U::LeakyRelu { alpha } => Vectorised::Activation(Activation::LeakyRelu { alpha }),
        U::Sigmoid => Vectorised::Activation(Activation::Sigmoid),
        U::Tanh => Vectorised::Activation(Activation::Tanh),
        U::HardSigmoid { alpha, beta } => Vectorised::Activation(Activation::HardSigmoid { alpha, beta }),
        U::HardSwish => Vectorised::Activation(Activation::HardSwish),
        U::Gelu { tanh: false } => Vectorised::Activation(Activation::Gelu),
        U::Gelu { tanh: true } => Vectorised::Activation(Activation::GeluTanh),
        U::Swish { alpha: 1.0 } => Vectorised::Activation(Activation::Silu),
        U::Exp => Vectorised::Exp,
        U::Log => Vectorised::Log,
        U::Erf => Vectorised::Erf,
        U::Sqrt => Vectorised::Sqrt,
        U::Reciprocal => Vectorised::Reciprocal,
        U::Neg => Vectorised::Neg,
        U::Abs => Vectorised::Abs,
        U::Softplus => Vectorised::Softplus,
        _ => return None,
    })
}

fn run(kernel: Vectorised, x: &[f32], y: &mut [f32]) {
    vectorised(IsaLevel::detect(), kernel, Source::Slice(x), 0..x.len(), Output::new(y));
}

fn values(function: UnaryFunction, x: &[f32], y: &mut [f32]) {
    match kernel(function) {
        Some(kernel) => run(kernel, x, y),
        None => y.iter_mut().zip(x).for_each(|(y, &x)| *y = function.of_float(x.into()) as f32),
    }
}

/// The derivative at every `x`, where the function gave `y`.
fn slopes(function: UnaryFunction, x: &[f32], y: &[f32], slope: &mut [f32]) {
    use UnaryFunction as U;
    let of_x = |slope: &mut [f32], f: &dyn Fn(f32) -> f32| slope.iter_mut().zip(x).for_each(|(s, &x)| *s = f(x));
    let of_y = |slope: &mut [f32], f: &dyn Fn(f32) -> f32| slope.iter_mut().zip(y).for_each(|(s, &y)| *s = f(y));
    match function {
        U::Relu => slope.iter_mut().zip(x).for_each(|(s, &x)| *s = if x > 0.0 { 1.0 } else { 0.0 }),
        U::Sigmoid => slope.iter_mut().zip(y).for_each(|(s, &y)| *s = y * (1.0 - y)),
        U::Tanh => slope.iter_mut().zip(y).for_each(|(s, &y)| *s = 1.0 - y * y),
        U::Exp => slope.copy_from_slice(y),
        U::Sqrt => of_y(slope, &|y| 0.5 / y),
        U::Reciprocal => of_y(slope, &|y| -y * y),
        U::Log => of_x(slope, &|x| 1.0 / x),
        U::Softplus => run(Vectorised::Activation(Activation::Sigmoid), x, slope),
        U::Erf => {
            let mut square = [0.0; PIECE];
            square.iter_mut().zip(x).for_each(|(s, &x)| *s = -x * x);
            run(Vectorised::Exp, &square[..x.len()], slope);
            slope.iter_mut().for_each(|s| *s *= FRAC_2_SQRT_PI as f32);
        }
        // Φ(x) + x·φ(x).
        U::Gelu { tanh: false } => {
            let (mut scaled, mut erf) = ([0.0; PIECE], [0.0; PIECE]);
            scaled.iter_mut().zip(x).for_each(|(s, &x)| *s = x * (1.0 / SQRT_2) as f32);
            run(Vectorised::Erf, &scaled[..x.len()], &mut erf[..x.len()]);
            scaled.iter_mut().for_each(|s| *s = -*s * *s);
            run(Vectorised::Exp, &scaled[..x.len()], slope);
            let density = (1.0 / (2.0 * PI).sqrt()) as f32;
            slope.iter_mut().zip(x).zip(&erf).for_each(|((s, &x), erf)| *s = 0.5 + 0.5 * erf + x * density * *s);
        }
        U::Swish { alpha: 1.0 } => {
            run(Vectorised::Activation(Activation::Sigmoid), x, slope);
            slope.iter_mut().zip(y).for_each(|(s, &y)| *s += y * (1.0 - *s));
        }
        _ => slope.iter_mut().zip(x).for_each(|(s, &x)| *s = slope_at(function, x.into()) as f32),
    }
}

/// The derivative; 0 where the function is constant but for steps.
fn slope_at(function: UnaryFunction, x: f64) -> f64 {
    use UnaryFunction as U;
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let pick = |condition: bool, a: f64, b: f64| if condition { a } else { b };
    match function {
        U::Abs => pick(x == 0.0, 0.0, x.signum()),
        U::Neg => -1.0,
        U::Sign | U::Floor | U::Ceil | U::Round | U::BitwiseNot => 0.0,
        U::Sqrt => 0.5 / x.sqrt(),
        U::Reciprocal => -1.0 / (x * x),
        U::Exp => x.exp(),
        U::Log => 1.0 / x,
        U::Sin => x.cos(),
        U::Cos => -x.sin(),
        U::Tan => 1.0 + x.tan().powi(2),
        U::Asin => 1.0 / (1.0 - x * x).sqrt(),
        U::Acos => -1.0 / (1.0 - x * x).sqrt(),
        U::Atan => 1.0 / (1.0 + x * x),
        U::Sinh => x.cosh(),
        U::Cosh => x.sinh(),
        U::Tanh => 1.0 - x.tanh().powi(2),
        U::Asinh => 1.0 / (x * x + 1.0).sqrt(),
        U::Acosh => 1.0 / (x * x - 1.0).sqrt(),
        U::Atanh => 1.0 / (1.0 - x * x),
        U::Erf => FRAC_2_SQRT_PI * (-x * x).exp(),
        U::Relu => pick(x > 0.0, 1.0, 0.0),
        U::Sigmoid => sigmoid(x) * (1.0 - sigmoid(x)),
        U::Softplus => sigmoid(x),
        U::Softsign => 1.0 / (1.0 + x.abs()).powi(2),
        U::HardSwish => pick(x <= -3.0, 0.0, pick(x >= 3.0, 1.0, x / 3.0 + 0.5)),
        U::Mish => {
            let tanh = x.exp().ln_1p().tanh();
            tanh + x * (1.0 - tanh * tanh) * sigmoid(x)
        }
        U::LeakyRelu { alpha } => pick(x >= 0.0, 1.0, alpha.into()),
        U::Elu { alpha } => pick(x >= 0.0, 1.0, f64::from(alpha) * x.exp()),
        U::Celu { alpha } => pick(x >= 0.0, 1.0, (x / f64::from(alpha)).exp()),
        U::Selu { alpha, gamma } => f64::from(gamma) * pick(x > 0.0, 1.0, f64::from(alpha) * x.exp()),
        U::HardSigmoid { alpha, beta } => {
            let inside = (0.0..=1.0).contains(&(f64::from(alpha) * x + f64::from(beta)));
            pick(inside, alpha.into(), 0.0)
        }
        U::ThresholdedRelu { alpha } => pick(x > alpha.into(), 1.0, 0.0),
        U::Gelu { tanh: false } => {
            let density = (-x * x / 2.0).exp() / (2.0 * PI).sqrt();
            0.5 * (1.0 + U::Erf.of_float(x / SQRT_2)) + x * density
        }
        U::Gelu { tanh: true } => {
            let root = (2.0 / PI).sqrt();
            let tanh = (root * (x + 0.044715 * x.powi(3))).tanh();
            0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * root * (1.0 + 3.0 * 0.044715 * x * x)
        }
        U::Shrink { lambda, .. } => pick(x.abs() > lambda.into(), 1.0, 0.0),
        U::Swish { alpha } => {
            let alpha = f64::from(alpha);
            let sigmoid = sigmoid(alpha * x);
            sigmoid + alpha * x * sigmoid * (1.0 - sigmoid)
        }
    }
}

/// `f` of every element, by all threads.
pub(crate) fn map(x: &[f32], f: impl Fn(f32) -> f32 + Sync) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    y.par_chunks_mut(PIECE)
        .zip(x.par_chunks(PIECE))
        .for_each(|(y, x)| y.iter_mut().zip(x).for_each(|(y, &x)| *y = f(x)));
    y
}

/// `f` of the elements of two slices of one length.
pub(crate) fn map2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    let mut y = vec![0.0; a.len()];
    let pieces = a.par_chunks(PIECE).zip(b.par_chunks(PIECE));
    y.par_chunks_mut(PIECE).zip(pieces).for_each(|(y, (a, b))| {
        y.iter_mut().zip(a).zip(b).for_each(|((y, &a), &b)| *y = f(a, b));
    });
    y
}

/// What two tensors are combined by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arithmetic {
    Add,
    Sub,
    Mul,
    Div,
    Pow,
    /// `a` for `a ≥ 0`, else `a·b`.
    PRelu,
    Min,
    Max,
}

impl Arithmetic {
    pub fn of(function: BinaryFunction) -> Option<Arithmetic> {
        Some(match function {
            BinaryFunction::Add => Arithmetic::Add,
            BinaryFunction::Sub => Arithmetic::Sub,
            BinaryFunction::Mul => Arithmetic::Mul,
            BinaryFunction::Div => Arithmetic::Div,
            BinaryFunction::Pow => Arithmetic::Pow,
            BinaryFunction::PRelu => Arithmetic::PRelu,
            _ => return None,
        })
    }
}

/// `a` and `b` as ONNX broadcasts them.
pub(crate) fn binary(function: Arithmetic, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if function == Arithmetic::Add && a.dims() == b.dims() {
        // The gradient goes on as it is, uncopied.
        return a + b;
    }
    let shape = a.shape().broadcast_shape_binary_op(b.shape(), "binary")?;
    apply(Binary { function, shape: shape.dims().to_vec() }, &[a, b])
}

struct Binary {
    function: Arithmetic,
    shape: Vec<usize>,
}

impl Function for Binary {
    const NAME: &'static str = "binary";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let walk = Walk::new(&self.shape, [args[0].shape, args[1].shape]);
        let (a, b) = (args[0].data, args[1].data);
        let y = match self.function {
            Arithmetic::Add => walk.map(a, b, |a, b| a + b),
            Arithmetic::Sub => walk.map(a, b, |a, b| a - b),
            Arithmetic::Mul => walk.map(a, b, |a, b| a * b),
            Arithmetic::Div => walk.map(a, b, |a, b| a / b),
            Arithmetic::Pow => walk.map(a, b, power),
            Arithmetic::PRelu => walk.map(a, b, |a, b| if a >= 0.0 { a } else { a * b }),
            Arithmetic::Min => walk.map(a, b, f32::min),
            Arithmetic::Max => walk.map(a, b, f32::max),
        };
        (y, self.shape.clone())
    }

    fn backward(&self, args: &[View<'_>], y: View<'_>, dy: View<'_>, needs: &[bool]) -> Vec<Option<Vec<f32>>> {
        let walk = Walk::new(&self.shape, [args[0].shape, args[1].shape]);
        let (a, b, dy) = (args[0].data, args[1].data, dy.data);
        let same = |of: usize, values: Vec<f32>| sum_to(&values, &self.shape, args[of].shape);
        let times = |of: usize, slopes: Vec<f32>| same(of, map2(&slopes, dy, |s, dy| s * dy));
        let da = needs[0].then(|| match self.function {
            Arithmetic::Add | Arithmetic::Sub => sum_to(dy, &self.shape, args[0].shape),
            Arithmetic::Mul => times(0, walk.map(a, b, |_, b| b)),
            Arithmetic::Div => times(0, walk.map(a, b, |_, b| 1.0 / b)),
            Arithmetic::Pow => times(0, walk.map(a, b, |a, b| if b == 0.0 { 0.0 } else { b * power(a, b - 1.0) })),
            Arithmetic::PRelu => times(0, walk.map(a, b, |a, b| if a >= 0.0 { 1.0 } else { b })),
            Arithmetic::Min => times(0, walk.map(a, b, |a, b| if a <= b { 1.0 } else { 0.0 })),
            Arithmetic::Max => times(0, walk.map(a, b, |a, b| if a >= b { 1.0 } else { 0.0 })),
        });
        let db = needs[1].then(|| match self.function {
            Arithmetic::Add => sum_to(dy, &self.shape, args[1].shape),
            Arithmetic::Sub => same(1, map(dy, |dy| -dy)),
            Arithmetic::Mul => times(1, walk.map(a, b, |a, _| a)),
            Arithmetic::Div => times(1, walk.map(a, b, |a, b| -a / (b * b))),
            Arithmetic::Pow => {
                let slopes = walk.map(a, b, |a, _| if a > 0.0 { a.ln() } else { 0.0 });
                times(1, map2(&slopes, y.data, |s, y| s * y))
            }
            Arithmetic::PRelu => times(1, walk.map(a, b, |a, _| a.min(0.0))),
            Arithmetic::Min => times(1, walk.map(a, b, |a, b| if a <= b { 0.0 } else { 1.0 })),
            Arithmetic::Max => times(1, walk.map(a, b, |a, b| if a >= b { 0.0 } else { 1.0 })),
        });
        vec![da, db]
    }
}

/// Squares, roots and the like without the general function.
fn power(a: f32, b: f32) -> f32 {
    match b {
        2.0 => a * a,
        1.0 => a,
        0.5 => a.sqrt(),
        _ => a.powf(b),
    }
}

/// A walk over a result of two operands that are broadcast: its axes, neighbours joined where both operands go on alike.
struct Walk {
    /// Extent, and the operands' strides.
    axes: Vec<(usize, [usize; 2])>,
}

impl Walk {
    fn new(shape: &[usize], operands: [&[usize]; 2]) -> Walk {
        let strides = operands.map(|operand| {
            let lead = shape.len() - operand.len();
            let mut stride = 1;
            let mut strides = vec![0; shape.len()];
            for (axis, &extent) in operand.iter().enumerate().rev() {
                strides[lead + axis] = if extent == 1 { 0 } else { stride };
                stride *= extent;
            }
            strides
        });
        let mut axes: Vec<(usize, [usize; 2])> = Vec::new();
        for (axis, &extent) in shape.iter().enumerate().filter(|(_, extent)| **extent != 1) {
            let stride = [strides[0][axis], strides[1][axis]];
            match axes.last_mut() {
                Some((last, of)) if (0..2).all(|i| of[i] == stride[i] * extent) => {
                    (*last, *of) = (*last * extent, stride);
                }
                _ => axes.push((extent, stride)),
            }
        }
        if axes.is_empty() {
            axes.push((1, [0, 0]));
        }
        Walk { axes }
    }

    /// Where the operands of a row, a run along the last axis, begin.
    fn row(&self, mut row: usize) -> [usize; 2] {
        let mut offsets = [0, 0];
        for &(extent, strides) in self.axes[..self.axes.len() - 1].iter().rev() {
            let index = row % extent;
            row /= extent;
            offsets[0] += index * strides[0];
            offsets[1] += index * strides[1];
        }
        offsets
    }

    fn map(&self, a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
        let (width, strides) = *self.axes.last().expect("an axis");
        let count: usize = self.axes.iter().map(|(extent, _)| extent).product();
        let mut y = vec![0.0; count];
        if count == 0 {
            return y;
        }
        if self.axes.len() == 1 && strides == [1, 1] {
            return map2(a, b, f);
        }
        let rows = PIECE.div_ceil(width);
        y.par_chunks_mut(rows * width).enumerate().for_each(|(piece, y)| {
            for (row, y) in y.chunks_mut(width).enumerate() {
                let [i, j] = self.row(piece * rows + row);
                match strides {
                    [0, 0] => y.fill(f(a[i], b[j])),
                    [_, 0] => y.iter_mut().zip(&a[i..]).for_each(|(y, &a)| *y = f(a, b[j])),
                    [0, _] => y.iter_mut().zip(&b[j..]).for_each(|(y, &b)| *y = f(a[i], b)),
                    _ => y.iter_mut().zip(&a[i..]).zip(&b[j..]).for_each(|((y, &a), &b)| *y = f(a, b)),
                }
            }
        });
        y
    }
}

/// Sums values of `from`'s shape over what `to` was broadcast along.
pub(crate) fn sum_to(values: &[f32], from: &[usize], to: &[usize]) -> Vec<f32> {
    let count: usize = to.iter().product();
    if count == values.len() {
        return values.to_vec();
    }
    let walk = Walk::new(from, [to, to]);
    let (width, [stride, _]) = *walk.axes.last().expect("an axis");
    let mut sums = vec![0.0; count];
    for (row, values) in values.chunks_exact(width.max(1)).enumerate() {
        let [at, _] = walk.row(row);
        match stride {
            0 => sums[at] += sum(values),
            _ => sums[at..].iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
        }
    }
    sums
}

/// Eight sums side by side, then together: an order that the length alone fixes.
pub(crate) fn sum(values: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let chunks = values.chunks_exact(8);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += value);
    }
    sums.iter().sum::<f32>() + rest
}

/// Eight sums side by side, then together.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (chunks_a, chunks_b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = chunks_a.remainder().iter().zip(chunks_b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in chunks_a.zip(chunks_b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f32>() + rest
}
