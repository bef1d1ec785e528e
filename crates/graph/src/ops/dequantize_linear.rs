//! Back from quantized integers and small floats to floats.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    quantize_linear::{Granularity, ScaleIndex, optional_dtype, same_places},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// `y = (x − zero_point) · scale`; inputs `x`, `scale`, optional `zero_point` of the type of `x`. `y` has the scale's type, or another
/// one; it is rounded once.
#[derive(Clone, Debug, PartialEq)]
pub struct DequantizeLinear {
    pub granularity: Granularity,
    pub output_dtype: Option<DType>,
}

impl Operator for DequantizeLinear {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=3)?;
        let output_dtype = optional_dtype(node, "output_dtype")?;
        Ok(DequantizeLinear { granularity: Granularity::read(node)?, output_dtype }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = self.granularity.spell(Spelling::new("DequantizeLinear"));
        match self.output_dtype {
            Some(dtype) => spelling.with("output_dtype", i64::from(dtype.onnx_code())).since(23),
            None => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, scale) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.same_dtype(0, 2)?;
        self.granularity.check(x, scale)?;
        if !matches!(scale.dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F8E8M0) {
            return Err(OpError::input(format!("expected scales of f32, f16, bf16 or f8e8m0, got {scale}")));
        }
        let dtype = self.dtype(scale.dtype)?;
        Ok(vec![TensorFact { dtype, shape: x.shape.clone(), value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, scale) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let index = ScaleIndex::new(self.granularity, x.shape(), scale.shape())?;
        let zero_points = same_places(inputs.optional_tensor(2)?, scale.shape())?.map(Wide::of).transpose()?;
        let scales = Wide::floats(scale)?;
        let y = match (Wide::of(x)?, zero_points) {
            (Wide::Int(x), None) => scaled(x.into_iter().map(|x| x as f64), &scales, index),
            (Wide::Int(x), Some(Wide::Int(zero))) => {
                let shifted = x.into_iter().enumerate().map(|(i, x)| (x - zero[index.of(i)]) as f64);
                scaled(shifted, &scales, index)
            }
            (Wide::Float(x), None) => scaled(x.into_iter(), &scales, index),
            (Wide::Float(x), Some(Wide::Float(zero))) => {
                scaled(x.into_iter().enumerate().map(|(i, x)| x - zero[index.of(i)]), &scales, index)
            }
            _ => {
                return Err(OpError::input(format!(
                    "quantized values of {}, or zero points of another type",
                    x.dtype()
                )));
            }
        };
        Ok(vec![Wide::Float(y).narrow(self.dtype(scale.dtype())?, x.shape().clone())?.into()])
    }
}

impl DequantizeLinear {
    fn dtype(&self, scale: DType) -> Result<DType, OpError> {
        let dtype = self.output_dtype.unwrap_or(scale);
        match dtype {
            DType::F32 | DType::F16 | DType::BF16 => Ok(dtype),
            other => Err(OpError::input(format!("dequantization to {other}: output_dtype must say another type"))),
        }
    }
}

fn scaled(x: impl Iterator<Item = f64>, scales: &[f64], index: ScaleIndex) -> Vec<f64> {
    x.enumerate().map(|(i, x)| x * scales[index.of(i)]).collect()
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.DequantizeLinear", 1)
            .input(tensor::<u16>(&[2], &[1, 60000]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<u16>(&[], &[30000]))
            .gives([f32s(&[2], &[-14999.5, 15000.0])]);
        case("com.microsoft.DequantizeLinear", 1)
            .with("axis", -1)
            .input(tensor::<i8>(&[1, 2], &[1, -2]))
            .input(f32s(&[2], &[0.5, 0.25]))
            .input(tensor::<i8>(&[2], &[1, 2]))
            .gives([f32s(&[1, 2], &[0.0, -1.0])]);
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
