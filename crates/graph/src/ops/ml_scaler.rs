//! Standardisation of features.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    ml::{ML_DOMAIN, numeric},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};
use std::sync::Arc;

/// `y = (x - offset) · scale` in f32, over the last axis of `x`: one pair a feature, or one for all.
#[derive(Clone, Debug, PartialEq)]
pub struct Scaler {
    pub offset: Arc<[f32]>,
    /// As many as there are offsets.
    pub scale: Arc<[f32]>,
}

impl Scaler {
    /// The features must be as many as the pairs, if these are more than one.
    fn check(&self, features: i64) -> Result<(), OpError> {
        match self.scale.len() {
            1 => Ok(()),
            n if n as i64 == features => Ok(()),
            n => Err(OpError::input(format!("the last axis has {features} features, expected {n}"))),
        }
    }
}

impl Operator for Scaler {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let offset = node.optional_floats("offset")?.unwrap_or_default();
        let scale = node.optional_floats("scale")?.unwrap_or_default();
        if offset.len() != scale.len() || scale.is_empty() {
            let (offsets, scales) = (offset.len(), scale.len());
            return Err(node.corrupt(format!("has {offsets} offsets and {scales} scales, expected as many of both")));
        }
        Ok(Scaler { offset: offset.into(), scale: scale.into() }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("Scaler").in_domain(ML_DOMAIN);
        spelling.with("offset", self.offset.to_vec()).with("scale", self.scale.to_vec())
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = numeric(inputs, 0)?;
        match x.shape.as_deref() {
            Some([]) => return Err(OpError::input("expected at least one axis, got a scalar")),
            Some([.., features]) => features.as_const().map_or(Ok(()), |features| self.check(features))?,
            None => {}
        }
        Ok(vec![TensorFact { dtype: DType::F32, shape: x.shape.clone(), value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let features = *x.shape().last().ok_or_else(|| OpError::input("expected at least one axis, got a scalar"))?;
        self.check(features as i64)?;
        let values: Vec<f64> = match Wide::of(x)? {
            Wide::Float(values) => values,
            Wide::Int(values) => values.into_iter().map(|v| v as f64).collect(),
            Wide::Bool(_) => return Err(OpError::input("expected numbers, got bool")),
        };
        let scaled = values.into_iter().enumerate().map(|(i, x)| {
            let feature = if self.scale.len() == 1 { 0 } else { i % features };
            (x - f64::from(self.offset[feature])) * f64::from(self.scale[feature])
        });
        Ok(vec![Wide::Float(scaled.collect()).narrow(DType::F32, x.shape().clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        let pair = || case("ai.onnx.ml.Scaler", 1).with("scale", vec![2.0, 3.0]).with("offset", vec![1.0, 0.0]);
        let result = || f32s(&[3, 2], &[0.0, 6.0, -8.0, 1.5, -2.0, 0.0]);
        pair().input(f32s(&[3, 2], &[1.0, 2.0, -3.0, 0.5, 0.0, 0.0])).gives([result()]);
        pair().input(tensor::<f64>(&[3, 2], &[1.0, 2.0, -3.0, 0.5, 0.0, 0.0])).gives([result()]);
        pair().input(f32s(&[2], &[1.0, 2.0])).gives([f32s(&[2], &[0.0, 6.0])]);
        pair().input(f32s(&[0, 2], &[])).gives([f32s(&[0, 2], &[])]);
        let one = case("ai.onnx.ml.Scaler", 1).with("scale", vec![2.0]).with("offset", vec![1.0]);
        one.input(tensor::<i64>(&[1, 1, 3], &[1, -3, 5])).gives([f32s(&[1, 1, 3], &[0.0, -8.0, 8.0])]);
        pair().wave(&[2, 3]).fails("3 features, expected 2");
        case("ai.onnx.ml.Scaler", 1).wave(&[2, 3]).with("scale", vec![1.0]).fails("0 offsets");
    }
}
