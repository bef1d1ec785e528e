//! A value gated by the swish of another.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// `y = a · sigmoid(alpha · a) · b`; both inputs of one shape (Shazeer, "GLU Variants Improve Transformer", 2020).
#[derive(Clone, Debug, PartialEq)]
pub struct SwiGlu {
    pub alpha: f32,
}

impl Operator for SwiGlu {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        Ok(SwiGlu { alpha: node.float("alpha", 1.0)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("SwiGLU").since(28).with("alpha", self.alpha)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.same_dtype(0, 1)?;
        if let (Some(x), Some(y)) = (a.constant_shape(), b.constant_shape())
            && x != y
        {
            return Err(OpError::input(format!("expected inputs of one shape, got {a} and {b}")));
        }
        Ok(vec![a.clone().into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        if a.shape() != b.shape() || a.dtype() != b.dtype() {
            return Err(OpError::input(format!("expected inputs of one type and shape, got {a:?} and {b:?}")));
        }
        let gate = |a: f64| a / (1.0 + (-f64::from(self.alpha) * a).exp());
        let y = Wide::floats(a)?.into_iter().zip(Wide::floats(b)?).map(|(a, b)| gate(a) * b).collect();
        Ok(vec![Wide::Float(y).narrow(a.dtype(), a.shape().clone())?.into()])
    }
}
