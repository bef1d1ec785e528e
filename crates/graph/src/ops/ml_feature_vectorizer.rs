//! Several tensors of features side by side.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling,
    ml::{ML_DOMAIN, f32_values, numeric},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// Rows of the inputs (`[n, …]`, flattened, or one row as a vector) side by side in f32, `[n, Σ widths]`: each is cut to the width that is
/// its own, or filled with zeros.
#[derive(Clone, Debug, PartialEq)]
pub struct FeatureVectorizer {
    /// One an input.
    pub widths: Vec<usize>,
}

impl Operator for FeatureVectorizer {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let widths = node.optional_ints("inputdimensions")?.unwrap_or_default();
        node.expect_inputs(1..=usize::MAX)?;
        if widths.len() != node.inputs.len() {
            let (widths, inputs) = (widths.len(), node.inputs.len());
            return Err(node.corrupt(format!("has {widths} 'inputdimensions' for {inputs} inputs")));
        }
        let width = |&width: &i64| usize::try_from(width).ok().filter(|&width| width < 1 << 31);
        match widths.iter().map(width).collect() {
            Some(widths) => Ok(FeatureVectorizer { widths }.into()),
            None => Err(node.corrupt(format!("'inputdimensions' are {widths:?}"))),
        }
    }

    fn export(&self) -> Spelling {
        let widths: Vec<i64> = self.widths.iter().map(|&width| width as i64).collect();
        Spelling::new("FeatureVectorizer").in_domain(ML_DOMAIN).with("inputdimensions", widths)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let mut rows = None;
        for index in 0..inputs.len() {
            let of = match numeric(inputs, index)?.shape.as_deref() {
                None => continue,
                Some([]) => return Err(OpError::input(format!("input {index} is a scalar, rows expected"))),
                Some([_]) => Dim::Const(1),
                Some([rows, ..]) => rows.clone(),
            };
            match &rows {
                Some(Dim::Const(_)) => {}
                _ => rows = Some(of),
            }
        }
        let rows = rows.unwrap_or_else(|| context.fresh("rows"));
        let width = self.widths.iter().fold(Dim::Const(0), |sum, &width| sum + Dim::from(width));
        Ok(vec![TensorFact::new(DType::F32, vec![rows, width]).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let total = self.widths.iter().try_fold(0usize, |sum, &width| sum.checked_add(width));
        let total = total.ok_or_else(|| OpError::Resource("a row of more features than can be counted".to_string()))?;
        let mut rows = None;
        let mut y = Vec::new();
        let mut start = 0;
        for (index, &width) in self.widths.iter().enumerate() {
            let x = inputs.tensor(index)?;
            let (count, features) = match x.shape()[..] {
                [] => return Err(OpError::input(format!("input {index} is a scalar, rows expected"))),
                [features] => (1, features),
                [rows, ref rest @ ..] => (rows, rest.iter().product()),
            };
            match rows {
                None => {
                    rows = Some(count);
                    y = vec![0f32; context.bounded_len(&[count, total])?];
                }
                Some(rows) if rows != count => {
                    return Err(OpError::input(format!("input {index} has {count} rows, and the first {rows}")));
                }
                Some(_) => {}
            }
            let kept = width.min(features);
            if kept > 0 {
                let values = f32_values(x)?;
                for (from, to) in values.chunks_exact(features).zip(y.chunks_exact_mut(total)) {
                    to[start..start + kept].copy_from_slice(&from[..kept]);
                }
            }
            start += width;
        }
        Ok(vec![Tensor::from_vec([rows.unwrap_or(0), total], y)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn features_stand_side_by_side() {
        let node = |widths: &[i64]| case("ai.onnx.ml.FeatureVectorizer", 1).with("inputdimensions", widths.to_vec());
        let x = || f32s(&[2, 2], &[1.0, 2.0, 3.0, 4.0]);
        let ints = || tensor::<i64>(&[2, 1], &[5, 6]);
        node(&[2, 1]).input(x()).input(ints()).gives([f32s(&[2, 3], &[1.0, 2.0, 5.0, 3.0, 4.0, 6.0])]);
        node(&[1, 2]).input(x()).input(ints()).gives([f32s(&[2, 3], &[1.0, 5.0, 0.0, 3.0, 6.0, 0.0])]);
        node(&[2]).input(tensor::<f64>(&[2], &[0.5, 1.5])).gives([f32s(&[1, 2], &[0.5, 1.5])]);
        node(&[4]).input(f32s(&[1, 2, 2], &[1.0, 2.0, 3.0, 4.0])).gives([f32s(&[1, 4], &[1.0, 2.0, 3.0, 4.0])]);
        node(&[0]).input(x()).gives([f32s(&[2, 0], &[])]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let node = |widths: &[i64]| case("ai.onnx.ml.FeatureVectorizer", 1).with("inputdimensions", widths.to_vec());
        node(&[2]).wave(&[1, 2]).wave(&[1, 2]).fails("1 'inputdimensions' for 2 inputs");
        node(&[-2]).wave(&[1, 2]).fails("are [-2]");
        node(&[2, 2]).wave(&[1, 2]).wave(&[2, 2]).fails("2 rows, and the first 1");
        node(&[1]).wave(&[]).fails("scalar");
    }
}
