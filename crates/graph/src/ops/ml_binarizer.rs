//! Numbers to 0 and 1, by a threshold.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    ml::{ML_DOMAIN, numeric},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `y = 1` where `x > threshold`, else 0 (for NaN too), in the type of `x`.
#[derive(Clone, Debug, PartialEq)]
pub struct Binarizer {
    pub threshold: f32,
}

impl Operator for Binarizer {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        Ok(Binarizer { threshold: node.float("threshold", 0.0)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Binarizer").in_domain(ML_DOMAIN).with("threshold", self.threshold)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = numeric(inputs, 0)?;
        Ok(vec![TensorFact { dtype: x.dtype, shape: x.shape.clone(), value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let threshold = f64::from(self.threshold);
        let y = match Wide::of(x)? {
            Wide::Float(values) => {
                Wide::Float(values.into_iter().map(|x| f64::from(u8::from(x > threshold))).collect())
            }
            Wide::Int(values) => Wide::Int(values.into_iter().map(|x| i128::from(x as f64 > threshold)).collect()),
            Wide::Bool(_) => return Err(OpError::input("expected numbers, got bool")),
        };
        Ok(vec![y.narrow(x.dtype(), x.shape().clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn what_is_above_the_threshold_is_one() {
        let node = || case("ai.onnx.ml.Binarizer", 1).with("threshold", 0.5f32);
        node().input(f32s(&[2, 2], &[0.5, 0.75, -1.0, f32::NAN])).gives([f32s(&[2, 2], &[0.0, 1.0, 0.0, 0.0])]);
        node().input(tensor::<i64>(&[3], &[0, 1, -1])).gives([tensor::<i64>(&[3], &[0, 1, 0])]);
        node().input(tensor::<f64>(&[2], &[0.500000001, 0.5])).gives([tensor::<f64>(&[2], &[1.0, 0.0])]);
        case("ai.onnx.ml.Binarizer", 1).input(tensor::<u8>(&[1], &[0])).fails("expected f32");
    }
}
