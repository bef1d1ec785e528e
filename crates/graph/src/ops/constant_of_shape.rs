//! Tensors of one value.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, checked_shape, select};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// A tensor of the shape that the input spells, filled with one value.
#[derive(Clone, Debug, PartialEq)]
pub struct ConstantOfShape {
    /// Of one element.
    pub value: Tensor,
}

impl Operator for ConstantOfShape {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let value = node.optional_tensor("value")?.unwrap_or_else(|| Tensor::scalar(0f32));
        if value.element_count() != 1 {
            return Err(node.corrupt(format!("value must have one element, has {}", value.element_count())));
        }
        let value = value.reshape([1]).map_err(|e| node.corrupt(e.to_string()))?;
        Ok(ConstantOfShape { value }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("ConstantOfShape").with("value", self.value.clone())
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let target = inputs.tensor(0)?;
        let shape = match (&target.value, target.constant_shape()) {
            (Some(value), _) => Some(value.clone()),
            (None, Some(rank)) if rank.len() == 1 && rank[0] <= TensorFact::VALUE_LIMIT => {
                Some((0..rank[0]).map(|i| context.fresh(&format!("dim{i}"))).collect())
            }
            _ => None,
        };
        let fact = TensorFact { dtype: self.value.dtype(), shape, value: None };
        let count = fact.constant_count();
        let one = TensorFact::of_tensor(&self.value).value;
        let value = match (one, count) {
            (Some(one), Some(count)) if count <= TensorFact::VALUE_LIMIT => Some(vec![one[0].clone(); count]),
            _ => None,
        };
        Ok(vec![fact.with_value(value).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let extent = |v: i64| usize::try_from(v).map_err(|_| OpError::input(format!("an extent of {v}")));
        let dims = inputs.integers(0)?.into_iter().map(extent).collect::<Result<Vec<_>, _>>()?;
        let shape = checked_shape(dims, context)?;
        let count = shape.element_count();
        Ok(vec![select(&self.value, shape, std::iter::repeat_n(0, count))?.into()])
    }
}
