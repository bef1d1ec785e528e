//! Selection of slices by index.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, checked_shape, movement,
    normalize_axis,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `y[…, i…, …] = x[…, indices[i…], …]` at `axis`, whose place the axes of `indices` take. Negative indices count from the end.
#[derive(Clone, Debug, PartialEq)]
pub struct Gather {
    pub axis: i64,
}

pub(super) fn index(value: i64, extent: usize) -> Result<usize, OpError> {
    let wrapped = if value < 0 { value.saturating_add(extent as i64) } else { value };
    usize::try_from(wrapped)
        .ok()
        .filter(|&i| i < extent)
        .ok_or_else(|| OpError::input(format!("index {value} of an axis of {extent}")))
}

pub(super) fn check_indices(fact: &TensorFact) -> Result<(), OpError> {
    match movement::is_index(fact.dtype) {
        true => Ok(()),
        false => Err(OpError::input(format!("indices must be of type i64 or i32, got {}", fact.dtype))),
    }
}

impl Gather {
    fn moved(&self, shape: &[usize], index_shape: &[usize], indices: &[i64]) -> Result<movement::Moved, OpError> {
        let axis = normalize_axis(self.axis, shape.len())?;
        let indices = indices.iter().map(|&i| index(i, shape[axis])).collect::<Result<Vec<_>, _>>()?;
        let inner: usize = shape[axis + 1..].iter().product();
        let extent = shape[axis];
        let to = [&shape[..axis], index_shape, &shape[axis + 1..]].concat();
        let count = indices.len();
        let total = cutover_tensor::Shape::new(&to).checked_len();
        let total = total.ok_or_else(|| OpError::Resource(format!("a result of shape {to:?}")))?;
        let flat = move |n: usize| (n / (count * inner) * extent + indices[n / inner % count]) * inner + n % inner;
        Ok(movement::Moved { shape: to, sources: Box::new((0..total).map(flat)) })
    }
}

impl Operator for Gather {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        Ok(Gather { axis: node.int("axis", 0)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Gather").with("axis", self.axis)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, indices) = (inputs.tensor(0)?, inputs.tensor(1)?);
        check_indices(indices)?;
        let (Some(shape), Some(index_shape)) = (&x.shape, &indices.shape) else {
            return Ok(vec![TensorFact::unknown_rank(x.dtype).into()]);
        };
        let axis = normalize_axis(self.axis, shape.len())?;
        let dims = [&shape[..axis], index_shape, &shape[axis + 1..]].concat();
        match (indices.constant_value(), indices.constant_shape()) {
            (Some(values), Some(index_shape)) => {
                movement::moved_fact(x, Some(dims), |shape| self.moved(shape, &index_shape, &values))
            }
            _ => Ok(vec![TensorFact::new(x.dtype, dims).into()]),
        }
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let moved = self.moved(shape, inputs.tensor(1)?.shape(), &inputs.integers(1)?)?;
        checked_shape(moved.shape.clone(), context)?;
        moved.apply(x)
    }
}
