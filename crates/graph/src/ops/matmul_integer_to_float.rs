//! Product of 8-bit matrices, as floats.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, broadcast_index,
    matmul::{Product, infer_shape},
    matmul_integer::{Side, per_side, shifted},
    qlinear::{DOMAIN, scale},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// `Y = a_scale · b_scale · (A − a_zero_point) · (B − b_zero_point) + bias`. Inputs `A`, `B`, `a_scale` (one), `b_scale` (one, or one for each
/// column), and, each optional, `a_zero_point`, `b_zero_point` (as their scales) and `bias`, one for each column. `Y` has the
/// scales' type. Sums of products are exact; ONNX Runtime's own saturate at 16 bits for signed `B` on x86 without VNNI.
#[derive(Clone, Debug, PartialEq)]
pub struct MatMulIntegerToFloat;

impl Operator for MatMulIntegerToFloat {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(4..=7)?;
        Ok(MatMulIntegerToFloat.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("MatMulIntegerToFloat").in_domain(DOMAIN)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        inputs.same_dtype(0, 4)?;
        inputs.same_dtype(1, 5)?;
        inputs.same_dtype(2, 3)?;
        inputs.same_dtype(2, 6)?;
        let shape = infer_shape(inputs.tensor(0)?, inputs.tensor(1)?)?;
        Ok(vec![TensorFact { dtype: inputs.tensor(2)?.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let product = Product::new(a.shape(), b.shape())?;
        context.bounded_len(&product.output)?;
        let a = shifted(a, inputs.optional_tensor(4)?, Side::Rows)?;
        let b = shifted(b, inputs.optional_tensor(5)?, Side::Columns)?;
        let sums = product.apply(&a, &b);
        let dtype = inputs.tensor(2)?.dtype();
        let y = scaled(&product, sums, scale(inputs, 2)?, inputs.tensor(3)?, inputs.optional_tensor(6)?, dtype)?;
        Ok(vec![y.into()])
    }
}

/// `sums · a_scale · b_scale + bias`; `b_scale` and `bias` are one, or one for each column.
pub(super) fn scaled(
    product: &Product,
    sums: Vec<i64>,
    a_scale: f64,
    b_scale: &Tensor,
    bias: Option<&Tensor>,
    dtype: DType,
) -> Result<Tensor, OpError> {
    let b_scales = Wide::floats(b_scale)?;
    let sources = per_side(b_scale.shape(), &product.output, Side::Columns)?;
    let mut y: Vec<f64> = sums.iter().zip(sources).map(|(&sum, at)| sum as f64 * (a_scale * b_scales[at])).collect();
    if let Some(bias) = bias {
        if super::broadcast_shape(&[bias.shape(), &product.output])? != product.output {
            return Err(OpError::input(format!("a bias of {} for a product of {}", bias.shape(), product.output)));
        }
        let values = Wide::floats(bias)?;
        y.iter_mut().zip(broadcast_index(bias.shape(), &product.output)).for_each(|(y, at)| *y += values[at]);
    }
    Wide::Float(y).narrow(dtype, product.output.clone())
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.MatMulIntegerToFloat", 1)
            .input(tensor::<u8>(&[2, 3], &[210, 58, 122, 83, 59, 228]))
            .input(tensor::<u8>(&[3, 2], &[205, 35, 236, 248, 68, 109]))
            .input(f32s(&[], &[0.02]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[120]))
            .input(tensor::<u8>(&[], &[7]))
            .input(f32s(&[2], &[0.873, -1.28]))
            .gives([f32s(&[2, 2], &[4.617, -13.498, -13.834, -6.001])]);
        case("com.microsoft.MatMulIntegerToFloat", 1)
            .input(tensor::<i8>(&[2, 2, 3], &[9, 49, -118, 80, 59, -82, 29, 0, -121, 109, 56, -49]))
            .input(tensor::<i8>(&[3, 2], &[-62, -53, 33, -45, 1, 51]))
            .input(f32s(&[], &[0.02]))
            .input(f32s(&[2], &[0.05, 0.01]))
            .input(tensor::<i8>(&[], &[3]))
            .input(tensor::<i8>(&[2], &[0, 0]))
            .gives([f32s(&[2, 2, 2], &[1.025, -1.7118, -3.011, -2.1872, -1.835, -1.5134, -4.875, -2.131])]);
        case("com.microsoft.MatMulIntegerToFloat", 1)
            .input(tensor::<u8>(&[1, 4], &[237, 68, 16, 126]))
            .input(tensor::<u8>(&[4, 3], &[215, 159, 17, 166, 88, 57, 110, 223, 247, 36, 143, 194]))
            .input(f32s(&[], &[0.5]))
            .input(f32s(&[], &[0.25]))
            .gives([f32s(&[1, 3], &[8567.38, 8156.62, 4537.62])]);
    }
}
