//! Two axes out of many.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, normalize_axis};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `[d₀ · … · d(axis-1), d(axis) · …]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Flatten {
    pub axis: i64,
}

impl Flatten {
    fn split(&self, rank: usize) -> Result<usize, OpError> {
        if self.axis == rank as i64 {
            Ok(rank)
        } else if rank == 0 && self.axis == 0 {
            Ok(0)
        } else {
            normalize_axis(self.axis, rank)
        }
    }
}

impl Operator for Flatten {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        Ok(Flatten { axis: node.int("axis", 1)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Flatten").with("axis", self.axis)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let Some(shape) = &x.shape else {
            return Ok(vec![TensorFact::new(x.dtype, [context.fresh("rows"), context.fresh("columns")]).into()]);
        };
        let (rows, columns) = shape.split_at(self.split(shape.len())?);
        let product = |dims: &[Dim]| dims.iter().fold(Dim::Const(1), |n, d| n * d.clone());
        Ok(vec![TensorFact::new(x.dtype, [product(rows), product(columns)]).with_value(x.value.clone()).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let (rows, columns) = x.shape().split_at(self.split(x.shape().rank())?);
        Ok(vec![x.reshape([rows.iter().product::<usize>(), columns.iter().product()])?.into()])
    }
}
