//! The extents of a tensor as a tensor.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// The extents of axes `start` to `end` (exclusive; negative ones count from the end, all are clamped), as i64.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    pub start: i64,
    pub end: Option<i64>,
}

impl Shape {
    fn range(&self, rank: usize) -> std::ops::Range<usize> {
        let clamp = |v: i64| (if v < 0 { v.saturating_add(rank as i64) } else { v }).clamp(0, rank as i64) as usize;
        let (start, end) = (clamp(self.start), self.end.map_or(rank, clamp));
        start..end.max(start)
    }
}

impl Operator for Shape {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        Ok(Shape { start: node.int("start", 0)?, end: node.optional_int("end")? }.into())
    }

    fn export(&self) -> Spelling {
        let mut spelling = Spelling::new("Shape");
        if self.start != 0 {
            spelling = spelling.with("start", self.start);
        }
        match self.end {
            Some(end) => spelling.with("end", end),
            None => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let Some(shape) = &inputs.tensor(0)?.shape else {
            return Ok(vec![TensorFact::new(DType::I64, [context.fresh("rank")]).into()]);
        };
        let value = shape[self.range(shape.len())].to_vec();
        Ok(vec![TensorFact::of_constant_shape(DType::I64, &[value.len()]).with_value(Some(value)).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let shape = inputs.tensor(0)?.shape();
        let dims: Vec<i64> = shape[self.range(shape.rank())].iter().map(|&d| d as i64).collect();
        Ok(vec![Tensor::from_vec([dims.len()], dims)?.into()])
    }
}
