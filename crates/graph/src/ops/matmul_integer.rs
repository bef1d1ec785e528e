//! Product of 8-bit matrices.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, broadcast_index,
    broadcast_shape,
    matmul::{Product, infer_shape},
    quantize_linear::factors,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Tensor, Value};

/// `Y = (A − a_zero_point) · (B − b_zero_point)` in i32; inputs `A`, `B` (i8 or u8) and the optional zero points: scalars, or one
/// per row of `A` and one per column of `B`.
#[derive(Clone, Debug, PartialEq)]
pub struct MatMulInteger;

impl Operator for MatMulInteger {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=4)?;
        Ok(MatMulInteger.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("MatMulInteger")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.same_dtype(0, 2)?;
        inputs.same_dtype(1, 3)?;
        Ok(vec![TensorFact { dtype: DType::I32, shape: infer_shape(a, b)?, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let product = Product::new(a.shape(), b.shape())?;
        context.bounded_len(&product.output)?;
        let a = shifted(a, inputs.optional_tensor(2)?, Side::Rows)?;
        let b = shifted(b, inputs.optional_tensor(3)?, Side::Columns)?;
        let y = product.apply(&a, &b).into_iter().map(i128::from).collect();
        Ok(vec![Wide::Int(y).narrow(DType::I32, product.output)?.into()])
    }
}

/// What a vector of zero points or scales has an element for.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Side {
    Rows,
    Columns,
}

/// A matrix of integers less its zero point.
pub(super) fn shifted(matrix: &Tensor, zero_point: Option<&Tensor>, side: Side) -> Result<Vec<i64>, OpError> {
    let values = factors(matrix)?.into_iter();
    let Some(zero_point) = zero_point else { return Ok(values.collect()) };
    let points = factors(zero_point)?;
    let sources = per_side(zero_point.shape(), matrix.shape(), side)?;
    Ok(values.zip(sources).map(|(x, source)| x - points[source]).collect())
}

/// For each element of a matrix, the index of its zero point or scale.
pub(super) fn per_side(
    parameter: &Shape,
    matrix: &Shape,
    side: Side,
) -> Result<impl Iterator<Item = usize> + use<>, OpError> {
    // A vector of one per row is a column.
    let seen: Shape = match (parameter.dims(), side) {
        ([1], _) => Shape::scalar(),
        ([rows], Side::Rows) if matrix.rank() > 1 => [*rows, 1].into(),
        _ => parameter.clone(),
    };
    if broadcast_shape(&[&seen, matrix])? != *matrix {
        return Err(OpError::input(format!("zero points or scales of {parameter} don't fit a matrix of {matrix}")));
    }
    Ok(broadcast_index(&seen, matrix))
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("MatMulInteger", 10)
            .input(tensor::<u8>(&[2, 2], &[1, 200, 3, 4]))
            .input(tensor::<i8>(&[2, 2], &[5, -6, 7, 8]))
            .input(tensor::<u8>(&[], &[2]))
            .input(tensor::<i8>(&[2], &[1, -1]))
            .gives([tensor::<i32>(&[2, 2], &[1184, 1787, 16, 13])]);
        case("MatMulInteger", 10)
            .input(tensor::<i8>(&[1, 2], &[1, -128]))
            .input(tensor::<i8>(&[2, 1], &[5, 7]))
            .gives([tensor::<i32>(&[1, 1], &[-891])]);
    }
}
