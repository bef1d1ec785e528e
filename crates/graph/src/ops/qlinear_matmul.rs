//! Matrix product from quantized values to quantized values.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    matmul::{Product, infer_shape},
    matmul_integer::{Side, per_side, shifted},
    qlinear::Target,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// Inputs `a`, its scale and zero point (one, or one per row), `b`, its scale and zero point (one, or one per column), and the
/// scale and zero point of `y`.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearMatMul;

impl Operator for QLinearMatMul {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(8..=8)?;
        Ok(QLinearMatMul.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("QLinearMatMul")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        inputs.same_dtype(0, 2)?;
        inputs.same_dtype(3, 5)?;
        let shape = infer_shape(inputs.tensor(0)?, inputs.tensor(3)?)?;
        Ok(vec![TensorFact { dtype: inputs.tensor(7)?.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (a, b, y_zero_point) = (inputs.tensor(0)?, inputs.tensor(3)?, inputs.tensor(7)?);
        let product = Product::new(a.shape(), b.shape())?;
        context.bounded_len(&product.output)?;
        // Scales are per row and per column of the factors, and so of the product, unless they differ between batches.
        let scales = |index: usize, side: Side| {
            let tensor = inputs.tensor(index)?;
            let values = Wide::floats(tensor)?;
            let sources = match tensor.shape().rank() {
                0 | 1 => per_side(tensor.shape(), &product.output, side)?,
                _ if tensor.shape().rank() == product.output.rank() => per_side(tensor.shape(), &product.output, side)?,
                rank => return Err(OpError::unsupported(format!("scales of {rank} axes"))),
            };
            Ok(sources.map(move |source| values[source]))
        };
        let sums = product.apply(
            &shifted(a, Some(inputs.tensor(2)?), Side::Rows)?,
            &shifted(b, Some(inputs.tensor(5)?), Side::Columns)?,
        );
        let target = Target::read(inputs, 6, y_zero_point.dtype())?;
        let factors = scales(1, Side::Rows)?.zip(scales(4, Side::Columns)?);
        let y = sums.into_iter().zip(factors);
        let y_scale = target.scale as f32;
        let y = y.map(|(sum, (a, b))| target.requantize(sum, a as f32 * b as f32 / y_scale));
        Ok(vec![target.tensor(y.collect(), product.output.clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("QLinearMatMul", 10)
            .input(tensor::<u8>(&[2, 2], &[1, 200, 3, 4]))
            .input(f32s(&[1], &[0.5]))
            .input(tensor::<u8>(&[1], &[2]))
            .input(tensor::<i8>(&[2, 2], &[5, -6, 7, 8]))
            .input(f32s(&[2], &[0.25, 0.75]))
            .input(tensor::<i8>(&[2], &[1, -1]))
            .input(f32s(&[1], &[3.0]))
            .input(tensor::<u8>(&[1], &[90]))
            .gives([tensor::<u8>(&[2, 2], &[139, 255, 91, 92])]);
    }
}
