//! What hands its input on.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// `y = x`, for any type.
#[derive(Clone, Debug, PartialEq)]
pub struct Identity;

impl Operator for Identity {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        Ok(Identity.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Identity")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        Ok(vec![inputs.get(0).ok_or_else(|| OpError::input("input 0 is missing"))?.clone()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        Ok(vec![inputs.get(0).ok_or_else(|| OpError::input("input 0 is missing"))?.clone()])
    }
}
