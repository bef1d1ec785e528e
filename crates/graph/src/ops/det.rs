//! Determinants.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// The determinant of every matrix of `x [*, m, m]`: `[*]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Det;

impl Operator for Det {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        Ok(Det.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Det")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let Some(dims) = &x.shape else { return Ok(vec![TensorFact::unknown_rank(x.dtype).into()]) };
        match dims.as_slice() {
            [batch @ .., rows, columns] if rows.as_const().zip(columns.as_const()).is_none_or(|(r, c)| r == c) => {
                Ok(vec![TensorFact::new(x.dtype, batch).into()])
            }
            _ => Err(OpError::input(format!("expected square matrices, got {x}"))),
        }
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let (batch, extent) = match x.shape().dims() {
            [batch @ .., rows, columns] if rows == columns => (batch, *rows),
            _ => return Err(OpError::input(format!("expected square matrices, got {x:?}"))),
        };
        let count = context.bounded_len(batch)?;
        let mut values = Wide::floats(x)?;
        let determinants = match extent {
            // The product of nothing.
            0 => vec![1.0; count],
            _ => values.chunks_exact_mut(extent * extent).map(|matrix| determinant(matrix, extent)).collect(),
        };
        Ok(vec![Wide::Float(determinants).narrow(x.dtype(), batch)?.into()])
    }
}

/// By elimination, each time with the largest element that is left of a column.
fn determinant(matrix: &mut [f64], extent: usize) -> f64 {
    let mut product = 1.0;
    for step in 0..extent {
        let size = |row: usize| matrix[row * extent + step].abs();
        let pivot = (step..extent).max_by(|&a, &b| size(a).total_cmp(&size(b))).unwrap_or(step);
        if pivot != step {
            (0..extent).for_each(|column| matrix.swap(pivot * extent + column, step * extent + column));
            product = -product;
        }
        let (done, rest) = matrix.split_at_mut((step + 1) * extent);
        let top = &done[step * extent..];
        product *= top[step];
        if top[step] == 0.0 {
            return product;
        }
        for row in rest.chunks_exact_mut(extent) {
            let ratio = row[step] / top[step];
            row.iter_mut().zip(top).skip(step).for_each(|(x, t)| *x -= ratio * t);
        }
    }
    product
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_numpy() {
        let matrices = [0., 1., 2., 3., 2., 0., 0., 0.5, 0., 0., 0., 0.];
        case("Det", 11).input(f32s(&[3, 2, 2], &matrices)).gives([f32s(&[3], &[-2., 1., 0.])]);
        let matrix = [2., -1., 0., 4., 1., 3., -2., 5., 0.5];
        case("Det", 22).input(f32s(&[3, 3], &matrix)).gives([f32s(&[], &[-21.])]);
        case("Det", 22).input(f32s(&[2, 0, 0], &[])).gives([f32s(&[2], &[1., 1.])]);
        case("Det", 22).input(f32s(&[1, 1], &[f32::NAN])).gives([f32s(&[], &[f32::NAN])]);
        case("Det", 22).input(f32s(&[2, 3], &[0.; 6])).fails("expected square matrices");
    }
}
