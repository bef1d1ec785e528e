//! Values in place of missing ones.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    ml::{ML_DOMAIN, numeric},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// What marks a missing element becomes the value of its feature, or the one value there is. NaN marks NaN.
///
/// `x` is `[n, features]` or `[features]`, of any rank where there is one value. Values are those of the class of `x`, floats or integers.
#[derive(Clone, Debug, PartialEq)]
pub struct Imputer {
    pub values: Imputed,
}

#[derive(Clone, Debug)]
pub enum Imputed {
    Floats { missing: f32, values: Vec<f32> },
    Ints { missing: i64, values: Vec<i64> },
}

/// Equal bits: what is missing is NaN as a rule.
impl PartialEq for Imputed {
    fn eq(&self, other: &Imputed) -> bool {
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        match (self, other) {
            (Imputed::Floats { missing: a, values: v }, Imputed::Floats { missing: b, values: w }) => {
                a.to_bits() == b.to_bits() && bits(v) == bits(w)
            }
            (Imputed::Ints { missing: a, values: v }, Imputed::Ints { missing: b, values: w }) => a == b && v == w,
            _ => false,
        }
    }
}

impl Imputer {
    fn check_dtype(&self, dtype: DType) -> Result<(), OpError> {
        match (&self.values, dtype.is_float()) {
            (Imputed::Floats { .. }, true) | (Imputed::Ints { .. }, false) => Ok(()),
            (Imputed::Floats { .. }, false) => Err(OpError::input(format!("floats to put in place of {dtype}"))),
            (Imputed::Ints { .. }, true) => Err(OpError::input(format!("integers to put in place of {dtype}"))),
        }
    }

    fn count(&self) -> usize {
        match &self.values {
            Imputed::Floats { values, .. } => values.len(),
            Imputed::Ints { values, .. } => values.len(),
        }
    }

    /// There must be a value, or as many as features.
    fn check_features(&self, rank: usize, features: i64) -> Result<(), OpError> {
        match self.count() {
            1 => Ok(()),
            n if matches!(rank, 1 | 2) && n as i64 == features => Ok(()),
            n => Err(OpError::input(format!("{n} values for the {features} features of a tensor of rank {rank}"))),
        }
    }
}

impl Operator for Imputer {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let floats = node.optional_floats("imputed_value_floats")?.unwrap_or_default();
        let ints = node.optional_ints("imputed_value_int64s")?.unwrap_or_default();
        let missing_float = node.float("replaced_value_float", 0.0)?;
        let missing_int = node.int("replaced_value_int64", 0)?;
        let values = match (floats.is_empty(), ints.is_empty()) {
            (false, true) => Imputed::Floats { missing: missing_float, values: floats },
            (true, false) => Imputed::Ints { missing: missing_int, values: ints },
            _ => return Err(node.corrupt("must have one of 'imputed_value_floats' and 'imputed_value_int64s'")),
        };
        Ok(Imputer { values }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("Imputer").in_domain(ML_DOMAIN);
        match &self.values {
            Imputed::Floats { missing, values } => {
                spelling.with("replaced_value_float", *missing).with("imputed_value_floats", values.clone())
            }
            Imputed::Ints { missing, values } => {
                spelling.with("replaced_value_int64", *missing).with("imputed_value_int64s", values.clone())
            }
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = numeric(inputs, 0)?;
        self.check_dtype(x.dtype)?;
        if let Some(shape) = &x.shape
            && let Some(features) = shape.last().map_or(Some(1), |features| features.as_const())
        {
            self.check_features(shape.len(), features)?;
        }
        Ok(vec![TensorFact { dtype: x.dtype, shape: x.shape.clone(), value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        self.check_dtype(x.dtype())?;
        let features = x.shape().last().copied().unwrap_or(1);
        self.check_features(x.shape().rank(), features as i64)?;
        let at = |i: usize| if self.count() == 1 { 0 } else { i % features };
        let y = match (Wide::of(x)?, &self.values) {
            (Wide::Float(x), Imputed::Floats { missing, values }) => {
                let missing = f64::from(*missing);
                let is_missing = |x: f64| x == missing || x.is_nan() && missing.is_nan();
                let filled = x.into_iter().enumerate();
                Wide::Float(filled.map(|(i, x)| if is_missing(x) { f64::from(values[at(i)]) } else { x }).collect())
            }
            (Wide::Int(x), Imputed::Ints { missing, values }) => {
                let filled = x.into_iter().enumerate();
                let is_missing = |x: i128| x == i128::from(*missing);
                Wide::Int(filled.map(|(i, x)| if is_missing(x) { i128::from(values[at(i)]) } else { x }).collect())
            }
            _ => return Err(OpError::input(format!("expected numbers, got {}", x.dtype()))),
        };
        Ok(vec![y.narrow(x.dtype(), x.shape().clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn missing_elements_are_filled() {
        let node = || case("ai.onnx.ml.Imputer", 1);
        let x = || f32s(&[2, 2], &[f32::NAN, 2.0, 0.0, f32::NAN]);
        let each = || node().with("imputed_value_floats", vec![7.0f32, 8.0]);
        each().with("replaced_value_float", f32::NAN).input(x()).gives([f32s(&[2, 2], &[7.0, 2.0, 0.0, 8.0])]);
        each().input(x()).gives([f32s(&[2, 2], &[f32::NAN, 2.0, 7.0, f32::NAN])]);
        let one = || node().with("imputed_value_floats", vec![7.0f32]).with("replaced_value_float", f32::NAN);
        one().input(x()).gives([f32s(&[2, 2], &[7.0, 2.0, 0.0, 7.0])]);
        one().input(tensor::<f64>(&[2, 1, 1], &[f64::NAN, 0.1])).gives([tensor::<f64>(&[2, 1, 1], &[7.0, 0.1])]);
        let ints = || node().with("imputed_value_int64s", vec![-1, 9]).with("replaced_value_int64", 3);
        ints().input(tensor::<i64>(&[2, 2], &[3, 3, 1, 2])).gives([tensor::<i64>(&[2, 2], &[-1, 9, 1, 2])]);
        ints().input(tensor::<i32>(&[2], &[0, 3])).gives([tensor::<i32>(&[2], &[0, 9])]);
    }

    #[test]
    fn contradictions_are_refused() {
        let node = || case("ai.onnx.ml.Imputer", 1);
        node().wave(&[1, 2]).fails("must have one of");
        let both = node().with("imputed_value_floats", vec![7.0f32]).with("imputed_value_int64s", vec![1]);
        both.wave(&[1, 2]).fails("must have one of");
        node().with("imputed_value_floats", vec![7.0f32, 8.0]).wave(&[2, 3]).fails("2 values for the 3 features");
        node().with("imputed_value_int64s", vec![7]).wave(&[2, 3]).fails("integers to put in place of f32");
    }
}
