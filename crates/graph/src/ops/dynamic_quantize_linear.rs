//! Quantization by the range that a tensor has.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, quantize_linear::saturate,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Tensor, Value};

/// `x` (f32) to `y` (u8), its scale (f32) and its zero point (u8), both scalars. The range is widened to hold 0; the scale is a
/// 255th of it, or 1 where the range is empty. Computed in f32, since rounding decides the zero point.
#[derive(Clone, Debug, PartialEq)]
pub struct DynamicQuantizeLinear;

impl Operator for DynamicQuantizeLinear {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        Ok(DynamicQuantizeLinear.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("DynamicQuantizeLinear")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        if x.dtype != DType::F32 {
            return Err(OpError::input(format!("expected f32, got {x}")));
        }
        Ok(vec![
            TensorFact { dtype: DType::U8, shape: x.shape.clone(), value: None }.into(),
            TensorFact::new(DType::F32, vec![]).into(),
            TensorFact::new(DType::U8, vec![]).into(),
        ])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let (y, scale, zero_point) = quantize(&x.to_vec::<f32>()?);
        Ok(vec![
            Wide::Int(y).narrow(DType::U8, x.shape().clone())?.into(),
            Tensor::scalar(scale).into(),
            Wide::Int(vec![zero_point]).narrow(DType::U8, Shape::scalar())?.into(),
        ])
    }
}

/// `values` in steps of their scale, moved by their zero point; that scale, and that zero point.
pub(super) fn quantize(values: &[f32]) -> (Vec<i128>, f32, i128) {
    let (low, high) = values.iter().fold((0f32, 0f32), |(low, high), &x| (low.min(x), high.max(x)));
    let scale = if high == low { 1.0 } else { (high - low) / 255.0 };
    let bounds = (0, 255);
    let zero_point = saturate(f64::from(-low / scale), 0, bounds);
    let steps = values.iter().map(|x| saturate(f64::from(x / scale), zero_point, bounds)).collect();
    (steps, scale, zero_point)
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("DynamicQuantizeLinear", 11).wave(&[2, 3]).gives([
            tensor::<u8>(&[2, 3], &[0, 178, 76, 254, 153, 51]),
            f32s(&[], &[0.00980392]),
            tensor::<u8>(&[], &[127]),
        ]);
        case("DynamicQuantizeLinear", 11).input(f32s(&[3], &[1.0, 2.0, 3.0])).gives([
            tensor::<u8>(&[3], &[85, 170, 255]),
            f32s(&[], &[0.0117647]),
            tensor::<u8>(&[], &[0]),
        ]);
        case("DynamicQuantizeLinear", 11).input(f32s(&[2], &[0.0, 0.0])).gives([
            tensor::<u8>(&[2], &[0, 0]),
            f32s(&[], &[1.0]),
            tensor::<u8>(&[], &[0]),
        ]);
    }
}
