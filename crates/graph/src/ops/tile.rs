//! Repetition.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, checked_shape, expand, movement,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `x` repeated along every axis as often as the second input says.
#[derive(Clone, Debug, PartialEq)]
pub struct Tile;

impl Operator for Tile {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        Ok(Tile.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Tile")
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, repeats) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let shape = x.shape.as_ref().map(|shape| match &repeats.value {
            Some(repeats) if repeats.len() == shape.len() => {
                shape.iter().zip(repeats).map(|(d, r)| d.clone() * r.clone()).collect::<Vec<Dim>>()
            }
            _ => (0..shape.len()).map(|a| context.fresh(&format!("dim{a}"))).collect(),
        });
        Ok(vec![TensorFact { dtype: x.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let repeats = expand::extents(&inputs.integers(1)?)?;
        if repeats.len() != shape.len() {
            return Err(OpError::input(format!("{} repeats for a tensor of rank {}", repeats.len(), shape.len())));
        }
        let product = |(&d, &r): (&usize, &usize)| d.saturating_mul(r);
        let to = checked_shape(shape.iter().zip(&repeats).map(product).collect(), context)?;
        let (from, strides) = (shape.to_vec(), movement::strides(shape));
        let flat = move |i: Vec<usize>| (0..from.len()).map(|a| i[a] % from[a] * strides[a]).sum();
        movement::Moved { shape: to.to_vec(), sources: Box::new(super::indices(&to).map(flat)) }.apply(x)
    }
}
