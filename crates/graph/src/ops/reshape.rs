//! The same elements in the same order under another shape.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, movement};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `x` under the shape that the second input spells: -1 is whatever is left, and 0 the extent of `x` there, unless `allow_zero`.
#[derive(Clone, Debug, PartialEq)]
pub struct Reshape {
    pub allow_zero: bool,
}

impl Operator for Reshape {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        if node.opset < 5 {
            node.expect_inputs(1..=1)?;
            let shape = node.optional_ints("shape")?.ok_or_else(|| node.corrupt("attribute 'shape' is missing"))?;
            let shape = movement::integers(node, shape)?;
            node.push_constant(1, shape);
        }
        node.expect_inputs(2..=2)?;
        Ok(Reshape { allow_zero: node.flag("allowzero", false)? }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("Reshape");
        if self.allow_zero { spelling.with("allowzero", 1) } else { spelling }
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, target) = (inputs.tensor(0)?, inputs.tensor(1)?);
        if let Some(rank) = target.rank().filter(|&rank| rank != 1) {
            return Err(OpError::input(format!("the new shape has {rank} axes, expected a list of extents")));
        }
        let Some(spelled) = &target.value else {
            let rank = target.constant_shape().and_then(|s| s.first().copied());
            let fresh = |rank: usize| (0..rank).map(|i| context.fresh(&format!("dim{i}"))).collect::<Vec<_>>();
            let shape = rank.filter(|&r| r <= TensorFact::VALUE_LIMIT).map(fresh);
            return Ok(vec![TensorFact { dtype: x.dtype, shape, value: None }.into()]);
        };
        let mut dims = Vec::with_capacity(spelled.len());
        let mut open = None;
        for (at, dim) in spelled.iter().enumerate() {
            match dim.as_const() {
                Some(-1) if open.replace(at).is_some() => {
                    return Err(OpError::input("-1 is there twice in the new shape"));
                }
                Some(-1) => dims.push(Dim::Const(1)),
                Some(0) if !self.allow_zero => match &x.shape {
                    Some(shape) => dims.push(shape.get(at).cloned().ok_or_else(|| {
                        OpError::input(format!("0 at {at} of the new shape, and the input has {} axes", shape.len()))
                    })?),
                    None => dims.push(context.fresh(&format!("dim{at}"))),
                },
                Some(v) if v < 0 => return Err(OpError::input(format!("{v} in the new shape"))),
                _ => dims.push(dim.clone()),
            }
        }
        let count = x.element_count();
        if let Some(at) = open {
            let known = dims.iter().fold(Dim::Const(1), |n, d| n * d.clone());
            let rest = count.as_ref().and_then(|count| match (count.as_const(), known.as_const()) {
                (Some(count), Some(known)) => (known != 0 && count % known == 0).then(|| Dim::Const(count / known)),
                _ => count.exact_div(&known),
            });
            if let (None, Some(count), Some(known)) = (&rest, count.as_ref().and_then(Dim::as_const), known.as_const())
            {
                return Err(OpError::input(format!("{count} elements do not divide by {known}")));
            }
            dims[at] = rest.unwrap_or_else(|| context.fresh(&format!("dim{at}")));
        } else {
            let made = dims.iter().fold(Dim::Const(1), |n, d| n * d.clone());
            if let (Some(from), Some(to)) = (count.as_ref().and_then(Dim::as_const), made.as_const())
                && from != to
            {
                return Err(OpError::input(format!("{from} elements under a shape of {to}")));
            }
        }
        Ok(vec![TensorFact::new(x.dtype, dims).with_value(x.value.clone()).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, spelled) = (inputs.tensor(0)?, inputs.integers(1)?);
        let rank = inputs.tensor(1)?.shape().rank();
        if rank != 1 {
            return Err(OpError::input(format!("the new shape has {rank} axes, expected a list of extents")));
        }
        let mut dims = Vec::with_capacity(spelled.len());
        let mut open = None;
        for (at, &dim) in spelled.iter().enumerate() {
            dims.push(match dim {
                -1 if open.replace(at).is_some() => return Err(OpError::input("-1 is there twice in the new shape")),
                -1 => 1,
                0 if !self.allow_zero => *x.shape().get(at).ok_or_else(|| {
                    OpError::input(format!("0 at {at} of the new shape, and the input has shape {}", x.shape()))
                })?,
                d => usize::try_from(d).map_err(|_| OpError::input(format!("{d} in the new shape")))?,
            });
        }
        if let Some(at) = open {
            let known = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).unwrap_or(0);
            if known == 0 || !x.element_count().is_multiple_of(known) {
                return Err(OpError::input(format!("{} elements do not divide by {known}", x.element_count())));
            }
            dims[at] = x.element_count() / known;
        }
        Ok(vec![x.reshape(dims)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, tensor, wave};

    #[test]
    fn a_shape_as_attribute() {
        case("Reshape", 1).with("shape", vec![0i64, -1]).wave(&[2, 1, 2]).gives([wave(&[2, 2], 0)]);
        case("Reshape", 1).wave(&[2]).fails("attribute 'shape' is missing");
        let square = tensor::<i64>(&[1, 2], &[2, 1]);
        case("Reshape", 13).wave(&[2]).input(square).fails("the new shape has 2 axes, expected a list of extents");
    }
}
