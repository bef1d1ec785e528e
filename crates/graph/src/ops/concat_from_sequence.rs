//! A sequence's tensors as one.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, concat::concatenate, normalize_axis,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// The elements one after the other along `axis`, or beside each other along a new axis there.
#[derive(Clone, Debug, PartialEq)]
pub struct ConcatFromSequence {
    pub axis: i64,
    pub new_axis: bool,
}

impl Operator for ConcatFromSequence {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let axis = node.optional_int("axis")?.ok_or_else(|| node.corrupt("attribute 'axis' is missing"))?;
        Ok(ConcatFromSequence { axis, new_axis: node.flag("new_axis", false)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("ConcatFromSequence").with("axis", self.axis).with("new_axis", i64::from(self.new_axis))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let of = inputs.sequence(0)?.tensor()?;
        let Some(shape) = &of.shape else { return Ok(vec![TensorFact::unknown_rank(of.dtype).into()]) };
        // Elements agree in these extents, whatever they are.
        let extent = |(axis, dim): (usize, &Dim)| match dim {
            Dim::Const(_) => dim.clone(),
            _ => context.fresh(&format!("extent{axis}")),
        };
        let mut dims: Vec<Dim> = shape.iter().enumerate().map(extent).collect();
        let axis = normalize_axis(self.axis, dims.len() + usize::from(self.new_axis))?;
        match self.new_axis {
            true => dims.insert(axis, context.fresh("count")),
            false => dims[axis] = context.fresh("total"),
        }
        Ok(vec![TensorFact::new(of.dtype, dims).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let values = inputs.sequence(0)?;
        if values.is_empty() {
            return Err(OpError::input("the sequence has no elements, so that the result has no shape"));
        }
        let tensor = |value: &Value| match value {
            Value::Tensor(tensor) if self.new_axis => {
                let mut shape = tensor.shape().to_vec();
                shape.insert(normalize_axis(self.axis, shape.len() + 1)?, 1);
                Ok(tensor.reshape(shape)?)
            }
            Value::Tensor(tensor) => Ok(tensor.clone()),
            other => Err(OpError::input(format!("a sequence of tensors expected, one is a {}", other.kind()))),
        };
        let tensors: Vec<Tensor> = values.iter().map(tensor).collect::<Result<_, OpError>>()?;
        let tensors: Vec<&Tensor> = tensors.iter().collect();
        Ok(vec![concatenate(&tensors, self.axis, context)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, sequence, strings, tensor};
    use crate::{Fact, TensorFact};
    use cutover_tensor::{DType, Value};

    #[test]
    fn elements_are_joined_or_stacked() {
        let (a, b) = (f32s(&[1, 2], &[1.0, 2.0]), f32s(&[2, 2], &[3.0, 4.0, 5.0, 6.0]));
        let concat = |axis: i64| case("ConcatFromSequence", 11).with("axis", axis);
        let joined = || f32s(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        concat(0).input(sequence(&[&a, &b])).gives([joined()]);
        concat(-2).input(sequence(&[&a, &b])).with("new_axis", 0).gives([joined()]);
        concat(1).input(sequence(&[&a, &b])).fails("differ off axis 1");
        let stack = |axis: i64| concat(axis).with("new_axis", 1).input(sequence(&[&a, &a]));
        stack(0).gives([f32s(&[2, 1, 2], &[1.0, 2.0, 1.0, 2.0])]);
        stack(2).gives([f32s(&[1, 2, 2], &[1.0, 1.0, 2.0, 2.0])]);
        stack(-1).gives([f32s(&[1, 2, 2], &[1.0, 1.0, 2.0, 2.0])]);
        stack(3).fails("axis 3");
        let (i, j) = (tensor(&[], &[7i64]), tensor(&[], &[8i64]));
        concat(0).with("new_axis", 1).input(sequence(&[&i, &j])).gives([tensor(&[2], &[7i64, 8])]);
        concat(0).input(sequence(&[&i])).fails("axis 0");
        let words = strings(&[1], &["a"]);
        concat(0).input(sequence(&[&words, &words])).gives([strings(&[2], &["a", "a"])]);
        let empty = (Value::Sequence(vec![]), Fact::Sequence(Box::new(TensorFact::unknown_rank(DType::F32).into())));
        concat(0).declared(empty).fails("no elements");
        case("ConcatFromSequence", 11).input(sequence(&[&a])).fails("'axis' is missing");
    }
}
