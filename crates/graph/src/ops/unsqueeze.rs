//! New axes of extent 1.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, normalize_axes, squeeze};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// With axes of extent 1 where the second input lists them, as axes of the result.
#[derive(Clone, Debug, PartialEq)]
pub struct Unsqueeze;

fn unsqueezed<T: Clone>(shape: &[T], axes: &[i64], one: T) -> Result<Vec<T>, OpError> {
    let rank = shape.len() + axes.len();
    let axes = normalize_axes(axes, rank)?;
    let mut kept = shape.iter();
    let dim = |axis: usize| if axes.contains(&axis) { None } else { kept.next().cloned() };
    Ok((0..rank).map(dim).map(|d| d.unwrap_or(one.clone())).collect())
}

impl Operator for Unsqueeze {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let inputs = if node.opset < 13 { 1 } else { 2 };
        node.expect_inputs(inputs..=inputs)?;
        squeeze::axes_to_input(node)?;
        Ok(Unsqueeze.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Unsqueeze")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, axes) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let (Some(shape), Some(axes)) = (&x.shape, axes.constant_value()) else {
            return Ok(vec![TensorFact::unknown_rank(x.dtype).into()]);
        };
        let shape = unsqueezed(shape, &axes, Dim::Const(1))?;
        Ok(vec![TensorFact::new(x.dtype, shape).with_value(x.value.clone()).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        Ok(vec![x.reshape(unsqueezed(x.shape(), &inputs.integers(1)?, 1)?)?.into()])
    }
}
