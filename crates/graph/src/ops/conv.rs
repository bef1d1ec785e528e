//! Convolution.

use super::{Activation, EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Window};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// `Y = f(X ∗ W + B + Z)`: `X [n, c, …]`, `W [m, c/group, …]`, optional `B [m]`, and, where a residual was fused, `Z` of the
/// shape of `Y`. Inputs in that order.
#[derive(Clone, Debug, PartialEq)]
pub struct Conv {
    pub window: Window,
    pub group: usize,
    pub activation: Option<Activation>,
}

impl Operator for Conv {
    fn import(_: &mut NodeReader) -> Result<Op, ImportError> {
        todo!()
    }
    fn export(&self) -> Spelling {
        todo!()
    }
    fn infer(&self, _: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        todo!()
    }
    fn eval(&self, _: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        todo!()
    }
}
