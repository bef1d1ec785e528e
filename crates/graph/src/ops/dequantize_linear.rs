//! Back from quantized integers to floats.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    quantize_linear::{Granularity, ScaleIndex, integers, zero_points},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// `y = (x − zero_point) · scale`; inputs `x`, `scale`, optional `zero_point` of the type of `x`. `y` has the scale's type.
#[derive(Clone, Debug, PartialEq)]
pub struct DequantizeLinear {
    pub granularity: Granularity,
}

impl Operator for DequantizeLinear {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=3)?;
        let output_dtype = node.int("output_dtype", 0)?;
        if output_dtype != 0 {
            return Err(node.unsupported(format!("output_dtype {output_dtype}")));
        }
        Ok(DequantizeLinear { granularity: Granularity::read(node)? }.into())
    }

    fn export(&self) -> Spelling {
        self.granularity.spell(Spelling::new("DequantizeLinear"))
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, scale) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.same_dtype(0, 2)?;
        self.granularity.check(x, scale)?;
        if !matches!(scale.dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(OpError::input(format!("expected scales of f32, f16 or bf16, got {scale}")));
        }
        Ok(vec![TensorFact { dtype: scale.dtype, shape: x.shape.clone(), value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, scale) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let index = ScaleIndex::new(self.granularity, x.shape(), scale.shape())?;
        let zero_points = zero_points(inputs.optional_tensor(2)?, scale.shape())?;
        let scales = Wide::floats(scale)?;
        let y = integers(x)?.into_iter().enumerate().map(|(i, x)| {
            let group = index.of(i);
            (x - zero_points.get(group).copied().unwrap_or(0)) as f64 * scales[group]
        });
        Ok(vec![Wide::Float(y.collect()).narrow(scale.dtype(), x.shape().clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("DequantizeLinear", 13)
            .input(tensor::<u8>(&[3], &[0, 128, 255]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<u8>(&[], &[128]))
            .gives([f32s(&[3], &[-64.0, 0.0, 63.5])]);
        case("DequantizeLinear", 13)
            .with("axis", -1)
            .input(tensor::<i8>(&[2, 2], &[1, -2, 3, -128]))
            .input(f32s(&[2], &[0.5, 2.0]))
            .input(tensor::<i8>(&[2], &[1, 0]))
            .gives([f32s(&[2, 2], &[0.0, -4.0, 1.0, -256.0])]);
        case("DequantizeLinear", 13)
            .input(tensor::<i32>(&[2], &[7, -9]))
            .input(f32s(&[], &[0.25]))
            .gives([f32s(&[2], &[1.75, -2.25])]);
        case("DequantizeLinear", 21)
            .with("axis", 0)
            .with("block_size", 2)
            .input(tensor::<i8>(&[3, 1], &[1, 2, 3]))
            .input(f32s(&[2, 1], &[0.5, 2.0]))
            .gives([f32s(&[3, 1], &[0.5, 1.0, 6.0])]);
    }
}
