//! Dropout, which does nothing at inference.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// `y = x`, and a mask of ones. Training mode is refused when it is asked for at run time.
#[derive(Clone, Debug, PartialEq)]
pub struct Dropout;

impl Operator for Dropout {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=3)?;
        node.float("ratio", 0.5)?;
        node.int("seed", 0)?;
        Ok(Dropout.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Dropout")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let mask = TensorFact { dtype: DType::Bool, shape: x.shape.clone(), value: None };
        Ok(vec![x.clone().into(), mask.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        if let Some(training) = inputs.optional_tensor(2)?
            && training.to_bools()?.contains(&true)
        {
            return Err(OpError::unsupported("dropout in training mode"));
        }
        let mask = Tensor::from_bools(x.shape().clone(), &vec![true; x.element_count()])?;
        Ok(vec![x.clone().into(), mask.into()])
    }
}
