//! The number of elements as a tensor.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// The number of elements, an i64 scalar.
#[derive(Clone, Debug, PartialEq)]
pub struct Size;

impl Operator for Size {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        Ok(Size.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Size")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let value = inputs.tensor(0)?.element_count().map(|n| vec![n]);
        Ok(vec![TensorFact::of_constant_shape(DType::I64, &[]).with_value(value).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        Ok(vec![Tensor::scalar(inputs.tensor(0)?.element_count() as i64).into()])
    }
}
