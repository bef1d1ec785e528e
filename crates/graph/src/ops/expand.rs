//! Broadcasting to a given shape.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, broadcast_dims, broadcast_index,
    broadcast_shape, checked_shape, movement,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// `x` broadcast together with the shape that the second input spells.
#[derive(Clone, Debug, PartialEq)]
pub struct Expand;

pub(super) fn extents(values: &[i64]) -> Result<Vec<usize>, OpError> {
    let extent = |&v: &i64| usize::try_from(v).map_err(|_| OpError::input(format!("an extent of {v}")));
    values.iter().map(extent).collect()
}

impl Operator for Expand {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        Ok(Expand.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Expand")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, target) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let Some(spelled) = &target.value else { return Ok(vec![TensorFact::unknown_rank(x.dtype).into()]) };
        let target = TensorFact::new(DType::F32, spelled.clone());
        let shape = broadcast_dims(&[x, &target])?;
        let fact = TensorFact { dtype: x.dtype, shape: shape.clone(), value: None };
        match (fact.constant_shape(), fact.constant_count()) {
            (Some(to), Some(count)) if count <= TensorFact::VALUE_LIMIT => movement::moved_fact(x, shape, |from| {
                let sources = broadcast_index(from, &to);
                Ok(movement::Moved { shape: to, sources: Box::new(sources) })
            }),
            _ => Ok(vec![fact.into()]),
        }
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let target = extents(&inputs.integers(1)?)?;
        let to = checked_shape(broadcast_shape(&[shape, &target])?.to_vec(), context)?;
        let sources = broadcast_index(shape, &to);
        movement::Moved { shape: to.to_vec(), sources: Box::new(sources) }.apply(x)
    }
}
