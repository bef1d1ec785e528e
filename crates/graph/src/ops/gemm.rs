//! General matrix product.

use super::{Activation, EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// `Y = f(alpha · A' · B' + beta · C)`, where `'` is a transposition if its flag says so; `C` broadcasts to `[m, n]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gemm {
    pub alpha: f32,
    pub beta: f32,
    pub transpose_a: bool,
    pub transpose_b: bool,
    pub activation: Option<Activation>,
}

impl Operator for Gemm {
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
