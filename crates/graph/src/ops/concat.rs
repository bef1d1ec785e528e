//! Joining along an axis.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, normalize_axis, select_from,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// The inputs one after the other along `axis`; all other extents agree.
#[derive(Clone, Debug, PartialEq)]
pub struct Concat {
    pub axis: i64,
}

impl Operator for Concat {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=usize::MAX)?;
        let axis = node.optional_int("axis")?.ok_or_else(|| node.corrupt("attribute 'axis' is missing"))?;
        Ok(Concat { axis }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Concat").with("axis", self.axis)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let facts = (0..inputs.len().max(1)).map(|i| inputs.tensor(i)).collect::<Result<Vec<_>, _>>()?;
        if let Some(other) = facts.iter().find(|f| f.dtype != facts[0].dtype) {
            return Err(OpError::input(format!("types {} and {} differ", facts[0].dtype, other.dtype)));
        }
        let unknown = TensorFact::unknown_rank(facts[0].dtype);
        let Some(shapes) = facts.iter().map(|f| f.shape.as_ref()).collect::<Option<Vec<_>>>() else {
            return Ok(vec![unknown.into()]);
        };
        let axis = normalize_axis(self.axis, shapes[0].len())?;
        let mut dims = shapes[0].clone();
        for shape in &shapes[1..] {
            if shape.len() != dims.len() {
                return Err(OpError::input(format!("ranks {} and {} differ", dims.len(), shape.len())));
            }
            for (at, (dim, other)) in dims.iter_mut().zip(shape.iter()).enumerate() {
                match (at == axis, dim.as_const(), other.as_const()) {
                    (true, ..) => *dim = dim.clone() + other.clone(),
                    (false, Some(a), Some(b)) if a != b => {
                        return Err(OpError::input(format!("extents {a} and {b} of axis {at} differ")));
                    }
                    // Symbols can't be proved equal; at run time they must be. A number says more than a symbol.
                    (false, None, Some(_)) => *dim = other.clone(),
                    _ => {}
                }
            }
        }
        let values: Option<Vec<&Vec<Dim>>> = facts.iter().map(|f| f.value.as_ref()).collect();
        // Of one axis, the elements simply follow each other; exporters' shapes are such.
        let value = values.filter(|_| dims.len() == 1).map(|v| v.into_iter().flatten().cloned().collect());
        Ok(vec![TensorFact::new(facts[0].dtype, dims).with_value(value).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let tensors = (0..inputs.len().max(1)).map(|i| inputs.tensor(i)).collect::<Result<Vec<_>, _>>()?;
        Ok(vec![concatenate(&tensors, self.axis, context)?.into()])
    }
}

/// At least one tensor, one after the other along `axis`.
pub(super) fn concatenate(tensors: &[&Tensor], axis: i64, context: &EvalContext) -> Result<Tensor, OpError> {
    let first = tensors.first().ok_or_else(|| OpError::input("no tensor to concatenate"))?.shape().dims();
    let axis = normalize_axis(axis, first.len())?;
    let mut shape = first.to_vec();
    shape[axis] = 0;
    for tensor in tensors {
        let dims = tensor.shape().dims();
        let agrees = dims.len() == first.len() && (0..dims.len()).all(|a| a == axis || dims[a] == first[a]);
        if !agrees {
            return Err(OpError::input(format!(
                "shapes {} and {} differ off axis {axis}",
                tensors[0].shape(),
                tensor.shape()
            )));
        }
        shape[axis] = shape[axis].saturating_add(dims[axis]);
    }
    context.bounded_len(&shape)?;
    let outer: usize = first[..axis].iter().product();
    let inner: usize = first[axis + 1..].iter().product();
    let blocks: Vec<usize> = tensors.iter().map(|t| t.shape()[axis] * inner).collect();
    let sources = (0..outer).flat_map(|o| {
        blocks.iter().enumerate().flat_map(move |(t, &block)| (0..block).map(move |i| (t, o * block + i)))
    });
    select_from(tensors, shape, sources)
}
