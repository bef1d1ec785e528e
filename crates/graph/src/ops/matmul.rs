//! Matrix product, batched and broadcast as NumPy's.

use super::{Activation, EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// `Y = f(A · B + C)`: `A [.., m, k]`, `B [.., k, n]`, and, where it was fused, `C` that broadcasts to `Y` (usually `[n]`).
#[derive(Clone, Debug, PartialEq)]
pub struct MatMul {
    pub activation: Option<Activation>,
}

impl Operator for MatMul {
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
