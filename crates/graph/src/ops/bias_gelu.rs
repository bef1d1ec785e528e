//! A bias and the function Gelu in one, as ONNX Runtime fuses them.

use super::{
    Binary, BinaryFunction, EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Unary,
    UnaryFunction, Wide, broadcast_index, broadcast_shape,
};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// `y = Gelu(a + b)`, of the broadcast shape of `a` and `b` (usually a bias `[d]`).
#[derive(Clone, Debug, PartialEq)]
pub struct BiasGelu {
    /// The approximation by tanh.
    pub tanh: bool,
}

impl Operator for BiasGelu {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let tanh = node.op_type == "FastGelu";
        node.expect_inputs(if tanh { 1..=2 } else { 2..=2 })?;
        if !node.has_input(1) {
            return Ok(Unary { function: UnaryFunction::Gelu { tanh } }.into());
        }
        Ok(BiasGelu { tanh }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new(if self.tanh { "FastGelu" } else { "BiasGelu" }).in_domain("com.microsoft")
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        inputs.same_dtype(0, 1)?;
        Binary { function: BinaryFunction::Add }.infer(inputs, context)
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let shape = broadcast_shape(&[a.shape(), b.shape()])?;
        context.bounded_len(&shape)?;
        let (x, z) = (Wide::floats(a)?, Wide::floats(b)?);
        let gelu = UnaryFunction::Gelu { tanh: self.tanh };
        let places = broadcast_index(a.shape(), &shape).zip(broadcast_index(b.shape(), &shape));
        let y = places.map(|(i, j)| gelu.of_float(x[i] + z[j])).collect();
        Ok(vec![Wide::Float(y).narrow(a.dtype(), shape)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.BiasGelu", 1)
            .wave(&[2, 3])
            .wave(&[3])
            .gives([f32s(&[2, 3], &[-0.0701035, 1.6799, -0.100323, 0.580029, 1.39979, -0.154269])]);
        case("com.microsoft.FastGelu", 1)
            .wave(&[2, 3])
            .wave(&[3])
            .gives([f32s(&[2, 3], &[-0.0702046, 1.6798, -0.100325, 0.579961, 1.39957, -0.154286])]);
        case("com.microsoft.FastGelu", 1).wave(&[3]).gives([f32s(&[3], &[-0.132286, 0.345714, -0.154286])]);
    }
}
