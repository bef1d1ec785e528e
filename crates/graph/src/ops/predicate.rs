//! Truths about every element of one tensor.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// A truth about every element.
#[derive(Clone, Debug, PartialEq)]
pub enum Predicate {
    Not,
    IsNan,
    IsInf { negative: bool, positive: bool },
}

impl Operator for Predicate {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        Ok(match node.op_type.as_str() {
            "Not" => Predicate::Not,
            "IsNaN" => Predicate::IsNan,
            _ => Predicate::IsInf {
                negative: node.flag("detect_negative", true)?,
                positive: node.flag("detect_positive", true)?,
            },
        }
        .into())
    }

    fn export(&self) -> Spelling {
        match self {
            Predicate::Not => Spelling::new("Not"),
            Predicate::IsNan => Spelling::new("IsNaN"),
            Predicate::IsInf { negative, positive } => Spelling::new("IsInf")
                .with("detect_negative", i64::from(*negative))
                .with("detect_positive", i64::from(*positive)),
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let value = match (self, x.constant_value()) {
            (Predicate::Not, Some(v)) => Some(v.into_iter().map(|v| Dim::Const((v == 0).into())).collect()),
            _ => None,
        };
        Ok(vec![TensorFact { dtype: DType::Bool, shape: x.shape.clone(), value: None }.with_value(value).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let truth: Vec<bool> = match self {
            Predicate::Not => x.to_bools()?.into_iter().map(|v| !v).collect(),
            Predicate::IsNan => Wide::floats(x)?.into_iter().map(f64::is_nan).collect(),
            Predicate::IsInf { negative, positive } => Wide::floats(x)?
                .into_iter()
                .map(|v| v.is_infinite() && if v > 0.0 { *positive } else { *negative })
                .collect(),
        };
        Ok(vec![Tensor::from_bools(x.shape().clone(), &truth)?.into()])
    }
}
