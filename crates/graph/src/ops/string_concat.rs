//! Strings joined elementwise.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, broadcast_dims, broadcast_index,
    broadcast_shape,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// `z = x` followed by `y`, with broadcasting.
#[derive(Clone, Debug, PartialEq)]
pub struct StringConcat;

impl Operator for StringConcat {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        Ok(StringConcat.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("StringConcat")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, y) = (inputs.strings(0)?, inputs.strings(1)?);
        let shape = broadcast_dims(&[x, y])?;
        Ok(vec![TensorFact { dtype: DType::String, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, y) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let shape = broadcast_shape(&[x.shape(), y.shape()])?;
        context.bounded_len(&shape)?;
        let (first, second) = (x.strings()?, y.strings()?);
        let mut bytes = 0usize;
        let pairs = broadcast_index(x.shape(), &shape).zip(broadcast_index(y.shape(), &shape));
        let joined = pairs.map(|(i, j)| {
            bytes = bytes.saturating_add(first[i].len() + second[j].len());
            context.bounded_len(&[bytes])?;
            Ok(format!("{}{}", first[i], second[j]))
        });
        let joined = joined.collect::<Result<Vec<_>, OpError>>()?;
        Ok(vec![Tensor::from_strings(shape, joined)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, strings};

    #[test]
    fn strings_are_joined_with_broadcasting() {
        let concat = |x, y| case("StringConcat", 20).input(x).input(y);
        let x = || strings(&[2, 1], &["a", "ü"]);
        concat(x(), strings(&[2], &["1", ""])).gives([strings(&[2, 2], &["a1", "a", "ü1", "ü"])]);
        concat(strings(&[], &["日"]), strings(&[], &["本"])).gives([strings(&[], &["日本"])]);
        concat(strings(&[2, 0], &[]), strings(&[2, 0], &[])).gives([strings(&[2, 0], &[])]);
        concat(x(), strings(&[3, 1], &["1", "2", "3"])).fails("broadcast");
        concat(x(), f32s(&[1], &[1.0])).fails("input 1 must hold strings, got f32[1]");
    }
}
