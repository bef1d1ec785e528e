//! Selection of single elements by index.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, gather, movement, normalize_axis,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `y[i₀, …] = x[i₀, …, indices[i₀, …], …]` at `axis`; `y` has the shape of `indices`.
#[derive(Clone, Debug, PartialEq)]
pub struct GatherElements {
    pub axis: i64,
}

impl Operator for GatherElements {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        Ok(GatherElements { axis: node.int("axis", 0)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("GatherElements").with("axis", self.axis)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, indices) = (inputs.tensor(0)?, inputs.tensor(1)?);
        gather::check_indices(indices)?;
        Ok(vec![TensorFact { dtype: x.dtype, shape: indices.shape.clone(), value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let to = inputs.tensor(1)?.shape();
        let axis = normalize_axis(self.axis, shape.len())?;
        if to.rank() != shape.len() || (0..shape.len()).any(|a| a != axis && to[a] > shape[a]) {
            return Err(OpError::input(format!("indices of shape {to} into a tensor of shape {}", x.shape())));
        }
        let strides = movement::strides(shape);
        let mut sources = Vec::with_capacity(to.element_count());
        for (position, &given) in super::indices(to).zip(&inputs.integers(1)?) {
            let found = gather::index(given, shape[axis])?;
            let at = |a: usize| if a == axis { found } else { position[a] };
            sources.push((0..shape.len()).map(|a| at(a) * strides[a]).sum());
        }
        movement::Moved { shape: to.to_vec(), sources: Box::new(sources.into_iter()) }.apply(x)
    }
}
