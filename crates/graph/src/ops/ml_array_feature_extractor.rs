//! Features picked by index.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, ml::ML_DOMAIN, normalize_axis, select,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `z[…, j] = x[…, y[j]]`: the last axis of `x` by the indices `y`, of any shape. A vector `x` is one row, and gives one.
#[derive(Clone, Debug, PartialEq)]
pub struct ArrayFeatureExtractor;

impl Operator for ArrayFeatureExtractor {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        Ok(ArrayFeatureExtractor.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("ArrayFeatureExtractor").in_domain(ML_DOMAIN)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, y) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let picked = y.element_count().unwrap_or_else(|| context.fresh("picked"));
        let shape = match x.shape.as_deref() {
            None => None,
            Some([]) => return Err(OpError::input("expected at least one axis, got a scalar")),
            Some([_]) => Some(vec![Dim::Const(1), picked]),
            Some([outer @ .., _]) => Some([outer, &[picked]].concat()),
        };
        Ok(vec![TensorFact { dtype: x.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let (&features, outer) =
            x.shape().split_last().ok_or_else(|| OpError::input("expected at least one axis, got a scalar"))?;
        let picked = inputs.integers(1)?;
        let picked = picked.into_iter().map(|i| match i >= 0 {
            true => normalize_axis(i, features).map_err(|_| i),
            false => Err(i),
        });
        let picked = picked.collect::<Result<Vec<usize>, i64>>().map_err(|index| {
            OpError::input(format!("index {index} of {features} features, expected 0 to {}", features as i64 - 1))
        })?;
        let rows: usize = outer.iter().product();
        let shape = match outer {
            [] => vec![1, picked.len()],
            outer => [outer, &[picked.len()]].concat(),
        };
        context.bounded_len(&shape)?;
        let sources = (0..rows).flat_map(|row| picked.iter().map(move |&feature| row * features + feature));
        Ok(vec![select(x, shape, sources)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, strings, tensor};

    #[test]
    fn features_are_picked_by_index() {
        let node = || case("ai.onnx.ml.ArrayFeatureExtractor", 1);
        let x = || f32s(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let y = |indices: &[i64]| tensor::<i64>(&[1, indices.len()], indices);
        node().input(x()).input(y(&[2, 0, 2])).gives([f32s(&[2, 3], &[3.0, 1.0, 3.0, 6.0, 4.0, 6.0])]);
        node().input(x()).input(y(&[1])).gives([f32s(&[2, 1], &[2.0, 5.0])]);
        let cube = f32s(&[1, 2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        node().input(cube).input(y(&[1])).gives([f32s(&[1, 2, 1], &[2.0, 5.0])]);
        let names = strings(&[3], &["a", "b", "c"]);
        node().input(names).input(tensor::<i64>(&[2], &[2, 0])).gives([strings(&[1, 2], &["c", "a"])]);
        node().input(f32s(&[0, 3], &[])).input(y(&[1])).gives([f32s(&[0, 1], &[])]);
    }

    #[test]
    fn indices_outside_are_refused() {
        let node = || case("ai.onnx.ml.ArrayFeatureExtractor", 1).wave(&[2, 3]);
        node().input(tensor::<i64>(&[1], &[3])).fails("index 3 of 3 features");
        node().input(tensor::<i64>(&[1], &[-1])).fails("index -1 of 3 features");
        case("ai.onnx.ml.ArrayFeatureExtractor", 1).wave(&[]).input(tensor::<i64>(&[1], &[0])).fails("scalar");
    }
}
