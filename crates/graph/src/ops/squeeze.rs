//! Removal of axes of extent 1.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, normalize_axes};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// Without the axes of extent 1 that the second input lists, or without any where it is omitted.
#[derive(Clone, Debug, PartialEq)]
pub struct Squeeze;

/// An attribute `axes` of before opset 13 as the input it became.
pub(super) fn axes_to_input(node: &mut NodeReader) -> Result<(), ImportError> {
    if let Some(axes) = node.optional_ints("axes")? {
        if node.opset >= 13 || node.has_input(1) {
            return Err(node.corrupt("attribute 'axes' was replaced by an input in opset 13"));
        }
        let tensor = Tensor::from_vec([axes.len()], axes).map_err(|e| node.corrupt(e.to_string()))?;
        node.push_constant(1, tensor);
    }
    Ok(())
}

impl Operator for Squeeze {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=if node.opset < 13 { 1 } else { 2 })?;
        axes_to_input(node)?;
        Ok(Squeeze.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Squeeze")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let unknown = || Ok(vec![TensorFact::unknown_rank(x.dtype).into()]);
        let Some(shape) = &x.shape else { return unknown() };
        let drop: Vec<usize> = match inputs.optional_tensor(1)? {
            Some(axes) => match axes.constant_value() {
                Some(axes) => normalize_axes(&axes, shape.len())?,
                None => return unknown(),
            },
            // A symbol may be 1: which axes go is known only where all extents are.
            None if shape.iter().any(|d| d.as_const().is_none()) => return unknown(),
            None => (0..shape.len()).filter(|&a| shape[a].as_const() == Some(1)).collect(),
        };
        if let Some(&axis) = drop.iter().find(|&&a| shape[a].as_const().is_some_and(|d| d != 1)) {
            return Err(OpError::input(format!("axis {axis} has extent {}, expected 1", shape[axis])));
        }
        let kept: Vec<Dim> = (0..shape.len()).filter(|a| !drop.contains(a)).map(|a| shape[a].clone()).collect();
        Ok(vec![TensorFact::new(x.dtype, kept).with_value(x.value.clone()).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let shape = x.shape();
        let drop = match inputs.get(1) {
            Some(_) => normalize_axes(&inputs.integers(1)?, shape.rank())?,
            None => (0..shape.rank()).filter(|&a| shape[a] == 1).collect(),
        };
        if let Some(&axis) = drop.iter().find(|&&a| shape[a] != 1) {
            return Err(OpError::input(format!("axis {axis} has extent {}, expected 1", shape[axis])));
        }
        let kept: Vec<usize> = (0..shape.rank()).filter(|a| !drop.contains(a)).map(|a| shape[a]).collect();
        Ok(vec![x.reshape(kept)?.into()])
    }
}
