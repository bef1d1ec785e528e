//! Where a tensor is not zero.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, movement};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// `[rank, n]` (i64): the index of every element that is not zero (false, the empty string), row-major, one per column.
#[derive(Clone, Debug, PartialEq)]
pub struct NonZero;

/// The indices of the elements at `found`, one axis after the other.
fn indices(shape: &[usize], found: &[usize]) -> Vec<i64> {
    let strides = movement::strides(shape);
    let along = |axis: usize| found.iter().map(move |&at| (at, axis));
    (0..shape.len()).flat_map(along).map(|(at, axis)| (at / strides[axis] % shape[axis]) as i64).collect()
}

impl Operator for NonZero {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        Ok(NonZero.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("NonZero")
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let rank = x.rank().map_or_else(|| context.fresh("rank"), Dim::from);
        if let (Some(value), Some(shape)) = (x.constant_value(), x.constant_shape()) {
            let found: Vec<usize> = (0..value.len()).filter(|&i| value[i] != 0).collect();
            let fact = TensorFact::new(DType::I64, vec![rank, found.len().into()]);
            let indices = indices(&shape, &found).into_iter().map(Dim::Const).collect();
            return Ok(vec![fact.with_value(Some(indices)).into()]);
        }
        Ok(vec![TensorFact::new(DType::I64, vec![rank, context.fresh("count")]).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let count = x.element_count();
        let found: Vec<usize> = match x.dtype() {
            DType::String => {
                let strings = x.strings()?;
                (0..count).filter(|&i| !strings[i].is_empty()).collect()
            }
            _ => match Wide::of(x)? {
                Wide::Float(v) => (0..count).filter(|&i| v[i] != 0.0).collect(),
                Wide::Int(v) => (0..count).filter(|&i| v[i] != 0).collect(),
                Wide::Bool(v) => (0..count).filter(|&i| v[i]).collect(),
            },
        };
        let to = [shape.len(), found.len()];
        context.bounded_len(&to)?;
        Ok(vec![Tensor::from_vec(to, indices(shape, &found))?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, strings, tensor};
    use cutover_tensor::Tensor;

    #[test]
    fn agrees_with_onnx_runtime() {
        let x = f32s(&[2, 3], &[0., -0.0, 1., f32::NAN, 0., -2.]);
        case("NonZero", 13).input(x).gives([tensor::<i64>(&[2, 3], &[0, 1, 1, 2, 0, 2])]);
        case("NonZero", 9).input(tensor::<i64>(&[3], &[0, 5, 0])).gives([tensor::<i64>(&[1, 1], &[1])]);
        let bools = Tensor::from_bools([1, 2, 1], &[true, true]).expect("two elements");
        case("NonZero", 13).input(bools).gives([tensor::<i64>(&[3, 2], &[0, 0, 0, 1, 0, 0])]);
        case("NonZero", 13).wave(&[0, 2]).gives([tensor::<i64>(&[2, 0], &[])]);
    }

    #[test]
    fn scalars_have_no_axis_to_name() {
        case("NonZero", 13).input(Tensor::scalar(3.0f32)).gives([tensor::<i64>(&[0, 1], &[])]);
    }

    #[test]
    fn empty_strings_are_zero() {
        case("NonZero", 13).input(strings(&[3], &["", "a", ""])).gives([tensor::<i64>(&[1, 1], &[1])]);
    }
}
