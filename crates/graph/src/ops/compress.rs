//! Slices that a condition keeps.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, movement, normalize_axis};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// Inputs `x` and `condition [n]` (bool): the slices along `axis` where it is true, or without an axis the elements, row-major. What is
/// beyond the condition's end is left out.
#[derive(Clone, Debug, PartialEq)]
pub struct Compress {
    pub axis: Option<i64>,
}

impl Compress {
    fn moved(&self, shape: &[usize], condition: &[bool]) -> Result<movement::Moved, OpError> {
        let (outer, extent, inner) = match self.axis {
            Some(axis) => movement::around(shape, normalize_axis(axis, shape.len())?),
            None => (1, shape.iter().product(), 1),
        };
        let kept: Vec<usize> = (0..extent.min(condition.len())).filter(|&i| condition[i]).collect();
        let mut to = vec![kept.len()];
        if let Some(axis) = self.axis {
            to = shape.to_vec();
            to[normalize_axis(axis, shape.len())?] = kept.len();
        }
        let (count, block) = (outer * kept.len() * inner, (kept.len() * inner).max(1));
        let source = move |n: usize| (n / block * extent + kept[n % block / inner]) * inner + n % inner;
        Ok(movement::Moved { shape: to, sources: Box::new((0..count).map(source)) })
    }
}

impl Operator for Compress {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        Ok(Compress { axis: node.optional_int("axis")? }.into())
    }

    fn export(&self) -> Spelling {
        self.axis.map_or(Spelling::new("Compress"), |axis| Spelling::new("Compress").with("axis", axis))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, condition) = (inputs.tensor(0)?, inputs.tensor(1)?);
        if condition.dtype != DType::Bool || condition.rank().is_some_and(|rank| rank != 1) {
            return Err(OpError::input(format!("the condition must be bool[n], got {condition}")));
        }
        if let (Some(condition), Some(shape)) = (condition.constant_value(), x.constant_shape()) {
            let condition: Vec<bool> = condition.into_iter().map(|c| c != 0).collect();
            let moved = self.moved(&shape, &condition)?;
            let dims = moved.shape.iter().map(|&d| d.into()).collect();
            return movement::moved_fact(x, Some(dims), |_| Ok(moved));
        }
        let shape = match (self.axis, &x.shape) {
            (None, _) => Some(vec![context.fresh("count")]),
            (Some(axis), Some(shape)) => {
                let mut shape = shape.clone();
                let axis = normalize_axis(axis, shape.len())?;
                shape[axis] = context.fresh("count");
                Some(shape)
            }
            (Some(_), None) => None,
        };
        Ok(vec![TensorFact { dtype: x.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        self.moved(shape, &inputs.tensor(1)?.to_bools()?)?.apply(x)
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, strings};
    use cutover_tensor::Tensor;

    fn condition(values: &[bool]) -> Tensor {
        Tensor::from_bools([values.len()], values).expect("as many as the shape has")
    }

    #[test]
    fn agrees_with_onnx_runtime() {
        let x = || f32s(&[2, 3, 2], &(0..12).map(|i| i as f32).collect::<Vec<_>>());
        let flat = case("Compress", 11).input(x()).input(condition(&[true, false, true, false, true]));
        flat.gives([f32s(&[3], &[0., 2., 4.])]);
        let axis =
            |axis: i64, values: &[bool]| case("Compress", 9).with("axis", axis).input(x()).input(condition(values));
        axis(-2, &[false, true]).gives([f32s(&[2, 1, 2], &[2., 3., 8., 9.])]);
        axis(0, &[false, true, true]).gives([f32s(&[1, 3, 2], &[6., 7., 8., 9., 10., 11.])]);
        axis(2, &[]).gives([f32s(&[2, 3, 0], &[])]);
        let words = case("Compress", 28).input(strings(&[2], &["a", "b"])).input(condition(&[false, true]));
        words.gives([strings(&[1], &["b"])]);
    }

    #[test]
    fn conditions_are_lists_of_bools() {
        case("Compress", 11).wave(&[2]).wave(&[2]).fails("the condition must be bool[n]");
    }
}
