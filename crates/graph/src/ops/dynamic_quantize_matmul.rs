//! Product of a matrix that is quantized by the range it has, and a quantized one.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling,
    dynamic_quantize_linear::quantize,
    matmul::{Product, infer_shape},
    matmul_integer::{Side, shifted},
    matmul_integer_to_float::scaled,
    qlinear::DOMAIN,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// `Y = a_scale · b_scale · (A' − a_zero_point) · (B − b_zero_point) + bias`, where `A'`, its scale and its zero point are what
/// `DynamicQuantizeLinear` makes of `A`. Inputs `A` (f32), `B` (i8 or u8), `b_scale` (one, or one for each column), and, each optional,
/// `b_zero_point` and `bias`, one for each column.
#[derive(Clone, Debug, PartialEq)]
pub struct DynamicQuantizeMatMul;

impl Operator for DynamicQuantizeMatMul {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=5)?;
        Ok(DynamicQuantizeMatMul.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("DynamicQuantizeMatMul").in_domain(DOMAIN)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let a = inputs.tensor(0)?;
        if a.dtype != DType::F32 {
            return Err(OpError::input(format!("expected f32, got {a}")));
        }
        inputs.same_dtype(0, 2)?;
        inputs.same_dtype(1, 3)?;
        inputs.same_dtype(0, 4)?;
        let shape = infer_shape(a, inputs.tensor(1)?)?;
        Ok(vec![TensorFact { dtype: DType::F32, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let product = Product::new(a.shape(), b.shape())?;
        context.bounded_len(&product.output)?;
        let (a, scale, zero_point) = quantize(&a.to_vec::<f32>()?);
        let a: Vec<i64> = a.into_iter().map(|a| a as i64 - zero_point as i64).collect();
        let b = shifted(b, inputs.optional_tensor(3)?, Side::Columns)?;
        let sums = product.apply(&a, &b);
        let (b_scale, bias) = (inputs.tensor(2)?, inputs.optional_tensor(4)?);
        Ok(vec![scaled(&product, sums, scale.into(), b_scale, bias, DType::F32)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.DynamicQuantizeMatMul", 1)
            .input(f32s(&[2, 3], &[-1.427, -0.135, -0.7695, -1.423, 0.2585, -0.5685]))
            .input(tensor::<u8>(&[3, 2], &[66, 195, 207, 15, 143, 116]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[7]))
            .input(f32s(&[2], &[0.3587, 1.322]))
            .gives([f32s(&[2, 2], &[-10.3888, -16.3301, -5.12116, -15.0313])]);
        case("com.microsoft.DynamicQuantizeMatMul", 1)
            .input(f32s(&[2, 1, 3], &[-0.01391, 1.042, 1.402, 1.15, -2.365, 1.229]))
            .input(tensor::<i8>(&[3, 2], &[-28, 56, -46, 40, -12, -59]))
            .input(f32s(&[2], &[0.05, 0.01]))
            .gives([f32s(&[2, 1, 2], &[-3.23371, -0.416734, 3.08746, -1.02359])]);
        case("com.microsoft.DynamicQuantizeMatMul", 1)
            .input(f32s(&[1, 2], &[0.0, 0.0]))
            .input(tensor::<u8>(&[2, 2], &[232, 240, 11, 151]))
            .input(f32s(&[2], &[0.05, 0.01]))
            .input(tensor::<u8>(&[2], &[7, 9]))
            .input(f32s(&[2], &[1.0, 2.0]))
            .gives([f32s(&[1, 2], &[1.0, 2.0])]);
    }
}
