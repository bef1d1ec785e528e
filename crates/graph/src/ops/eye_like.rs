//! Ones on a diagonal.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    cast::{cast, named_type},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// A matrix of the first input's shape with ones where column − row = `diagonal`, zeros elsewhere.
#[derive(Clone, Debug, PartialEq)]
pub struct EyeLike {
    pub diagonal: i64,
    /// The input's type if `None`.
    pub dtype: Option<DType>,
}

impl Operator for EyeLike {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let dtype = if node.has_attribute("dtype") { Some(named_type(node, "dtype")?) } else { None };
        Ok(EyeLike { diagonal: node.int("k", 0)?, dtype }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("EyeLike").with("k", self.diagonal);
        match self.dtype {
            Some(dtype) => spelling.with("dtype", i64::from(dtype.onnx_code())),
            None => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        if x.rank().is_some_and(|rank| rank != 2) {
            return Err(OpError::input(format!("expected a matrix, got {x}")));
        }
        Ok(vec![TensorFact { dtype: self.dtype.unwrap_or(x.dtype), shape: x.shape.clone(), value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let &[rows, columns] = x.shape().dims() else {
            return Err(OpError::input(format!("expected a matrix, got {x:?}")));
        };
        context.bounded_len(&[rows, columns])?;
        let one = |at: usize| i128::from((at % columns) as i128 - (at / columns) as i128 == i128::from(self.diagonal));
        let ones = Wide::Int((0..rows * columns).map(one).collect()).narrow(DType::I64, [rows, columns])?;
        Ok(vec![cast(&ones, self.dtype.unwrap_or(x.dtype()))?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("EyeLike", 9)
            .with("k", 1)
            .input(f32s(&[2, 3], &[9.0; 6]))
            .gives([f32s(&[2, 3], &[0.0, 1.0, 0.0, 0.0, 0.0, 1.0])]);
        case("EyeLike", 22)
            .with("k", -1)
            .with("dtype", 6)
            .input(f32s(&[2, 2], &[0.0; 4]))
            .gives([tensor::<i32>(&[2, 2], &[0, 0, 1, 0])]);
        case("EyeLike", 9).input(f32s(&[2], &[0.0; 2])).fails("a matrix");
    }
}
