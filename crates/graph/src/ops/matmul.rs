//! Matrix product, batched and broadcast as NumPy's.

use super::{
    Activation, EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    broadcast::broadcast_dim, broadcast_index, broadcast_shape, conv::differ,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Value};
use std::{
    num::Wrapping,
    ops::{AddAssign, Mul},
};

/// `Y = f(A · B + C)`: `A [.., m, k]`, `B [.., k, n]`, and, where it was fused, `C` that broadcasts to `Y` (usually `[n]`).
/// A vector `A` counts as one row, a vector `B` as one column, and the axis this adds is dropped from `Y`.
#[derive(Clone, Debug, PartialEq)]
pub struct MatMul {
    pub activation: Option<Activation>,
}

impl Operator for MatMul {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        Ok(MatMul { activation: None }.into())
    }

    fn export(&self) -> Spelling {
        let mut spelling = Spelling::new("MatMul");
        spelling.added_input = Some(2);
        spelling.then.extend(self.activation.map(Activation::spelling));
        spelling
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.same_dtype(0, 1)?;
        inputs.same_dtype(0, 2)?;
        Ok(vec![TensorFact { dtype: a.dtype, shape: infer_shape(a, b)?, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let product = Product::new(a.shape(), b.shape())?;
        context.bounded_len(&product.output)?;
        let c = inputs.optional_tensor(2)?;
        if let Some(c) = c
            && broadcast_shape(&[c.shape(), &product.output])? != product.output
        {
            let message = format!("a sum of {} and the product {} would be larger", c.shape(), product.output);
            return Err(OpError::input(message));
        }
        let y = match (Wide::of(a)?, Wide::of(b)?) {
            (Wide::Float(a), Wide::Float(b)) => {
                let mut y = product.apply(&a, &b);
                if let Some(c) = c {
                    let values = Wide::floats(c)?;
                    let sources = broadcast_index(c.shape(), &product.output);
                    y.iter_mut().zip(sources).for_each(|(y, source)| *y += values[source]);
                }
                if let Some(f) = self.activation {
                    y.iter_mut().for_each(|y| *y = f.apply(*y));
                }
                Wide::Float(y)
            }
            (Wide::Int(a), Wide::Int(b)) if c.is_none() && self.activation.is_none() => {
                Wide::Int(product.apply_integers(&a, &b))
            }
            _ => return Err(OpError::input(format!("cannot multiply {} by {}", a.dtype(), b.dtype()))),
        };
        Ok(vec![y.narrow(a.dtype(), product.output)?.into()])
    }
}

/// The shape of `A · B`; `None` where a rank is unknown.
pub(super) fn infer_shape(a: &TensorFact, b: &TensorFact) -> Result<Option<Vec<Dim>>, OpError> {
    let (Some(xs), Some(ys)) = (&a.shape, &b.shape) else { return Ok(None) };
    if xs.is_empty() || ys.is_empty() {
        return Err(OpError::input(format!("cannot multiply {a} by {b}: a scalar is no matrix")));
    }
    let (x_batch, x_core) = xs.split_at(xs.len().saturating_sub(2));
    let (y_batch, y_core) = ys.split_at(ys.len().saturating_sub(2));
    if differ(&x_core[x_core.len() - 1], &y_core[0]) {
        return Err(OpError::input(format!(
            "cannot multiply {a} by {b}: {} columns against {} rows",
            x_core[x_core.len() - 1],
            y_core[0]
        )));
    }
    let rank = x_batch.len().max(y_batch.len());
    let at = |batch: &[Dim], axis: usize| match (axis + batch.len()).checked_sub(rank) {
        Some(axis) => batch[axis].clone(),
        None => Dim::Const(1),
    };
    let mut shape = Vec::with_capacity(rank + 2);
    for axis in 0..rank {
        let (x, y) = (at(x_batch, axis), at(y_batch, axis));
        shape.push(
            broadcast_dim(&x, &y)
                .ok_or_else(|| OpError::input(format!("cannot multiply {a} by {b}: {x} matrices against {y}")))?,
        );
    }
    shape.extend(x_core[..x_core.len() - 1].iter().cloned());
    shape.extend(y_core[1..].iter().cloned());
    Ok(Some(shape))
}

/// One matrix product with every extent known.
pub(super) struct Product {
    pub output: Shape,
    batch: Vec<usize>,
    a_batch: Vec<usize>,
    b_batch: Vec<usize>,
    pub m: usize,
    pub k: usize,
    pub n: usize,
}

impl Product {
    pub fn new(a: &Shape, b: &Shape) -> Result<Product, OpError> {
        let fact = |shape: &Shape| TensorFact::of_constant_shape(cutover_tensor::DType::F32, shape);
        let output = infer_shape(&fact(a), &fact(b))?;
        let output = output.into_iter().flatten().filter_map(|d| usize::try_from(d.as_const()?).ok()).collect();
        let (a_batch, a_core) = a.split_at(a.rank().saturating_sub(2));
        let (b_batch, b_core) = b.split_at(b.rank().saturating_sub(2));
        Ok(Product {
            output,
            batch: broadcast_shape(&[a_batch, b_batch])?.to_vec(),
            a_batch: a_batch.to_vec(),
            b_batch: b_batch.to_vec(),
            m: if a_core.len() == 2 { a_core[0] } else { 1 },
            k: b_core[0],
            n: if b_core.len() == 2 { b_core[1] } else { 1 },
        })
    }

    /// Modulo 2^128, and so modulo the size of any integer type.
    pub fn apply_integers(&self, a: &[i128], b: &[i128]) -> Vec<i128> {
        let wrap = |values: &[i128]| values.iter().map(|&x| Wrapping(x)).collect::<Vec<_>>();
        self.apply(&wrap(a), &wrap(b)).into_iter().map(|x| x.0).collect()
    }

    /// Each sum in the order of `k`.
    pub fn apply<T: Copy + Default + AddAssign + Mul<Output = T>>(&self, a: &[T], b: &[T]) -> Vec<T> {
        let (m, k, n) = (self.m, self.k, self.n);
        let mut y = vec![T::default(); self.output.element_count()];
        if y.is_empty() || k == 0 {
            return y;
        }
        let pairs = broadcast_index(&self.a_batch, &self.batch).zip(broadcast_index(&self.b_batch, &self.batch));
        for (y, (a_index, b_index)) in y.chunks_exact_mut(m * n).zip(pairs) {
            let (a, b) = (&a[a_index * m * k..][..m * k], &b[b_index * k * n..][..k * n]);
            for (y, a) in y.chunks_exact_mut(n).zip(a.chunks_exact(k)) {
                for (&a, b) in a.iter().zip(b.chunks_exact(n)) {
                    y.iter_mut().zip(b).for_each(|(y, &b)| *y += a * b);
                }
            }
        }
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{case, check_fused, f32s, tensor, wave};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("MatMul", 13).wave(&[2, 3]).wave(&[3, 2]).gives([f32s(&[2, 2], &[0.25, -1.9375, -1.3125, 1.375])]);
        case("MatMul", 13).wave(&[3]).wave(&[3]).gives([f32s(&[], &[1.125])]);
        case("MatMul", 13).wave(&[3]).wave(&[2, 3, 1]).gives([f32s(&[2, 1], &[1.125, 1.4375])]);
        case("MatMul", 13).wave(&[2, 2, 3]).wave(&[3]).gives([f32s(&[2, 2], &[1.125, -0.5, -0.75, -1.0])]);
        case("MatMul", 13)
            .wave(&[2, 1, 1, 2])
            .wave(&[3, 2, 1])
            .gives([f32s(&[2, 3, 1, 1], &[1.25, -0.6875, -1.25, 1.8125, -1.0625, -0.5])]);
        case("MatMul", 13).wave(&[2, 0]).wave(&[0, 2]).gives([f32s(&[2, 2], &[0.0, 0.0, 0.0, 0.0])]);
        case("MatMul", 13)
            .input(tensor::<i32>(&[2, 2], &[1, -2, 3, 4]))
            .input(tensor::<i32>(&[2, 1], &[5, 6]))
            .gives([tensor::<i32>(&[2, 1], &[-7, 39])]);
    }

    #[test]
    fn contradictions_are_errors() {
        case("MatMul", 13).wave(&[0, 1, 2]).wave(&[1, 2, 1]).gives([f32s(&[0, 1, 1], &[])]);
        case("MatMul", 13).wave(&[2, 3]).wave(&[2, 2]).fails("3 columns against 2 rows");
        case("MatMul", 13).wave(&[2, 2, 2]).wave(&[3, 2, 2]).fails("2 matrices against 3");
        case("MatMul", 13).wave(&[]).wave(&[2]).fails("a scalar is no matrix");
    }

    #[test]
    fn a_fused_sum_and_activation_come_after_the_product() {
        let (plain, fused) = (MatMul { activation: None }, MatMul { activation: Some(Activation::Tanh) });
        let inputs = [wave(&[2, 2, 3], 0), wave(&[3, 4], 1), wave(&[4], 2)].map(Some);
        check_fused(plain, fused, &inputs, 2, Activation::Tanh);
    }
}
